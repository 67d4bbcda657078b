//! The control API of this daemon: its calls, what they are given and what they answer.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use axum::Router;
use axum::extract::{FromRef, State};
use axum::http::StatusCode;
use control::body::{Json, Path, Query};
use control::common::{self, Answer, Common, Fails, Force, Running, VERSION};
use control::moving::Placed;
use control::problem::Problem;
use control::refused::Refused;
use poll_engine::stats::QueueStats;
use serde::{Deserialize, Serialize};
use utoipa::openapi::OpenApi;
use utoipa::{IntoParams, ToSchema};
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use crate::captured::Wish;
use crate::hub::Hub;
use crate::mac::MacAddr;
use crate::mib;
use crate::pcap::filter::FilterError;
use crate::pcap::{CaptureConfig, SNAPLEN};
use crate::ports::{Ports, no_switch};
use crate::served::{Counted, Outer, Served};
use crate::spec::{PortLimits, PortSpec};
use crate::switch::fdb::Entry;
use crate::switches::SwitchSpec;

/// What all calls have.
#[derive(Clone)]
struct Api {
    ports: Arc<Ports>,
    common: Common,
}

impl FromRef<Api> for Common {
    fn from_ref(api: &Api) -> Common {
        api.common.clone()
    }
}

impl Api {
    /// Changes something.
    async fn change<T: Send + 'static>(
        &self,
        act: impl FnOnce(&Ports) -> Result<T, Refused> + Send + 'static,
    ) -> Result<T, Problem> {
        self.common.change(&self.ports, act).await
    }
}

/// The daemon.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
struct Daemon {
    /// Its name.
    program: String,
    /// Its version.
    version: String,
    /// The version of this API.
    api: String,
    /// The number of its process.
    pid: u32,
    /// The file that it was started with.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    config: Option<String>,
    /// How reactors wait for packets.
    poll: String,
    /// How its ports are joined: switch, wire, or loopback.
    joined: String,
    /// How many ports of guests it serves.
    ports: usize,
}

/// A port.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
#[allow(clippy::struct_excessive_bools)] // each by itself
struct Port {
    /// What it is known by: its name, or the path of its socket.
    name: String,
    /// Where front ends connect; an uplink has none.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    socket: Option<String>,
    /// What it is joined to: switch, wire, loopback, tap or uplink.
    kind: String,
    /// The name of the switch that it is on, if that has one.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    switch: Option<String>,
    /// The interface of the host's that it is, or is joined to.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    interface: Option<String>,
    /// Its card's address, if that is not left to the guest.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    mac: Option<String>,
    /// Whether its link is up: as the administrator has it, or of an uplink, as the interface says.
    up: bool,
    /// Whether a front end is connected.
    attached: bool,
    /// Whether its queues are to take nothing.
    paused: bool,
    /// Whether no front end can come any more.
    ended: bool,
    /// What its guest was given, or what has left by an uplink.
    rx: Flow,
    /// What its guest has sent, or what has come in by an uplink.
    tx: Flow,
}

/// One way of a port, since it is there.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
struct Flow {
    /// Packets.
    packets: u64,
    /// Their bytes, with Ethernet headers.
    bytes: u64,
    /// Packets that were dropped although nothing was wrong with them.
    discards: u64,
    /// Packets that something was wrong with.
    errors: u64,
}

impl From<mib::Flow> for Flow {
    fn from(flow: mib::Flow) -> Flow {
        let mib::Flow { packets, octets, discards, errors } = flow;
        Flow { packets: packets.iter().sum(), bytes: octets, discards, errors }
    }
}

/// A port, its queues, and why packets went nowhere.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
struct PortDetail {
    #[serde(flatten)]
    port: Port,
    /// Counters that are not zero, by the names that they have in the statistics.
    counters: BTreeMap<String, u64>,
    /// Its queues: receive and transmit queues in turn, and the control queue.
    queues: Vec<Queue>,
}

/// A queue.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
#[allow(clippy::struct_field_names)] // as it is called in calls
struct Queue {
    /// Its number.
    queue: u16,
    /// The number of the reactor that it runs on, if it runs.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    reactor: Option<usize>,
    /// Times that its ring was looked at.
    polls: u64,
    /// Notifications taken from the guest.
    kicks: u64,
    /// Interrupts sent to the guest.
    signals: u64,
    /// Errors of any kind.
    errors: u64,
}

impl Port {
    fn of(s: &Served) -> Port {
        let [rx, tx] = s.flows().map(Flow::from);
        let spec = s.spec();
        let interface = match &s.counted {
            Counted::Hub(_) => None,
            Counted::Tap(tap) => Some(tap.name().to_owned()),
        };
        Port {
            name: s.name.clone(),
            socket: Some(s.place.key()),
            kind: s.kind().into(),
            switch: spec.switch,
            interface,
            mac: spec.mac.map(|mac| MacAddr(mac).to_string()),
            up: !spec.link_down,
            attached: s.server.is_attached(),
            paused: s.server.is_paused(),
            ended: s.server.has_ended(),
            rx,
            tx,
        }
    }

    fn uplink(outer: &Outer) -> Port {
        let [rx, tx] = outer.port.flows().map(Flow::from);
        Port {
            name: outer.spec.name(),
            socket: None,
            kind: "uplink".into(),
            switch: outer.spec.switch.clone(),
            interface: outer.spec.interface().map(str::to_owned),
            mac: None,
            up: outer.is_up(),
            attached: false,
            paused: false,
            ended: false,
            rx,
            tx,
        }
    }
}

impl PortDetail {
    fn of(s: &Served) -> PortDetail {
        let queue = |(number, stats): (u16, &Arc<QueueStats>)| Queue {
            queue: number,
            reactor: stats.reactor(),
            polls: stats.polls.get(),
            kicks: stats.kicks.get(),
            signals: stats.signals.get(),
            errors: stats.errors_total(),
        };
        PortDetail {
            port: Port::of(s),
            counters: s.counters().into_iter().collect(),
            queues: (0..).zip(&s.stats).map(queue).collect(),
        }
    }

    fn uplink(outer: &Outer) -> PortDetail {
        PortDetail {
            port: Port::uplink(outer),
            counters: outer.counters().into_iter().collect(),
            queues: Vec::new(),
        }
    }
}

/// A link.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct Link {
    /// Whether it is up.
    up: bool,
}

/// What to capture.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct NewCapture {
    /// The file to be made (pcapng).
    #[schema(value_type = String)]
    file: PathBuf,
    /// Bytes of each frame, at most.
    #[serde(default)]
    #[schema(minimum = 14)]
    snaplen: Option<u32>,
    /// Which frames, such as "tcp port 80 or arp"; without it, all.
    #[serde(default)]
    filter: Option<String>,
}

/// A capture.
#[derive(Debug, Serialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct Capture {
    /// Its file, if there is a capture.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    file: Option<String>,
    /// Frames that are in the file.
    written: u64,
    /// Frames that are not, because they came too fast.
    lost: u64,
}

/// Where an address is.
#[derive(Debug, Serialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct Station {
    /// The address.
    mac: String,
    /// The name of the switch that has learnt it, if that has one.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    switch: Option<String>,
    /// Its VLAN, 0 where there are none.
    vlan: u16,
    /// The port that it is behind.
    port: String,
    /// Whether it belongs there for good.
    fixed: bool,
}

/// Which addresses.
#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
struct OfSwitch {
    /// Those of the switch of this name; without it, of all.
    #[serde(default)]
    #[param(required = false, nullable = false)]
    switch: Option<String>,
}

/// A switch.
#[derive(Debug, Serialize, ToSchema)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
struct Switch {
    /// What it is known by; one may have none.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    name: Option<String>,
    /// How many ports of guests are on it.
    ports: usize,
    /// The name of its uplink, if it has one.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    uplink: Option<String>,
    /// For how many seconds it knows an address that sends nothing.
    mac_ageing: u32,
    /// How many addresses it has learnt.
    addresses: usize,
}

/// All calls.
pub fn router(ports: Arc<Ports>) -> Router {
    let (router, document) = calls();
    let common = Common::new(Arc::clone(&ports) as _, &document);
    router.with_state(Api { ports, common })
}

fn calls() -> (Router<Api>, OpenApi) {
    let own = OpenApiRouter::new()
        .routes(routes!(daemon))
        .routes(routes!(list, add))
        .routes(routes!(show, remove))
        .routes(routes!(set_link))
        .routes(routes!(pause))
        .routes(routes!(resume))
        .routes(routes!(place))
        .routes(routes!(limits, set_limits))
        .routes(routes!(capture, begin_capture, end_capture))
        .routes(routes!(fdb))
        .routes(routes!(switches, add_switch))
        .routes(routes!(remove_switch));
    let about = "Ports of a running vhost-net: what they do, and what can be changed while guests run.";
    common::calls("vhost-net", about, own)
}

/// What the daemon is
#[utoipa::path(get, path = "/v1/daemon", responses((status = 200, body = Daemon), Fails))]
async fn daemon(State(api): State<Api>) -> Json<Daemon> {
    Json(Daemon {
        program: "vhost-net".into(),
        version: env!("CARGO_PKG_VERSION").into(),
        api: VERSION.into(),
        pid: std::process::id(),
        config: api.ports.file().map(|path| path.display().to_string()),
        poll: api.ports.engine().pacing().name().into(),
        joined: api.ports.setting.plan.name().into(),
        ports: api.ports.all().len(),
    })
}

/// All ports, and uplinks
#[utoipa::path(get, path = "/v1/ports", responses((status = 200, body = Vec<Port>), Fails))]
async fn list(State(api): State<Api>) -> Json<Vec<Port>> {
    let ports = api.ports.all();
    let uplinks = api.ports.uplinks();
    Json(ports.iter().map(|s| Port::of(s)).chain(uplinks.iter().map(Port::uplink)).collect())
}

/// Serves one more port, with the keys of a [[port]] of the configuration file
#[utoipa::path(post, path = "/v1/ports", request_body = PortSpec, responses((status = 201, body = PortDetail), Fails))]
async fn add(
    State(api): State<Api>,
    Json(spec): Json<PortSpec>,
) -> Result<(StatusCode, Json<PortDetail>), Problem> {
    let served = api.change(|ports| ports.add(spec)).await?;
    Ok((StatusCode::CREATED, Json(PortDetail::of(&served))))
}

/// A port and its queues
#[utoipa::path(get, path = "/v1/ports/{name}", params(("name" = String, Path)), responses((status = 200, body = PortDetail), Fails))]
async fn show(State(api): State<Api>, Path(name): Path<String>) -> Answer<PortDetail> {
    Ok(Json(match api.ports.uplink(&name) {
        Some(outer) => PortDetail::uplink(&outer),
        None => PortDetail::of(&*api.ports.find(&name)?),
    }))
}

/// Serves a port no more, once what is in flight is finished
#[utoipa::path(delete, path = "/v1/ports/{name}", params(("name" = String, Path), Force), responses((status = 204), Fails))]
async fn remove(
    State(api): State<Api>,
    Path(name): Path<String>,
    Query(force): Query<Force>,
) -> Result<StatusCode, Problem> {
    api.change(move |ports| ports.remove(&name, force.force)).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Has its link up or down, as a cable that is plugged in or pulled
#[utoipa::path(put, path = "/v1/ports/{name}/link", params(("name" = String, Path)), request_body = Link, responses((status = 200, body = PortDetail), Fails))]
async fn set_link(
    State(api): State<Api>,
    Path(name): Path<String>,
    Json(link): Json<Link>,
) -> Answer<PortDetail> {
    let served = api.change(move |ports| ports.set_link(&name, link.up)).await?;
    Ok(Json(PortDetail::of(&served)))
}

/// Takes nothing from its guest for now and gives it nothing, as a guest that has no buffers
#[utoipa::path(post, path = "/v1/ports/{name}/pause", params(("name" = String, Path)), responses((status = 200, body = PortDetail), Fails))]
async fn pause(State(api): State<Api>, Path(name): Path<String>) -> Answer<PortDetail> {
    let served = api.change(move |ports| ports.set_paused(&name, true)).await?;
    Ok(Json(PortDetail::of(&served)))
}

/// Goes on
#[utoipa::path(post, path = "/v1/ports/{name}/resume", params(("name" = String, Path)), responses((status = 200, body = PortDetail), Fails))]
async fn resume(State(api): State<Api>, Path(name): Path<String>) -> Answer<PortDetail> {
    let served = api.change(move |ports| ports.set_paused(&name, false)).await?;
    Ok(Json(PortDetail::of(&served)))
}

/// Moves queues to a reactor, where they stay
#[utoipa::path(put, path = "/v1/ports/{name}/reactor", params(("name" = String, Path)), request_body = Placed, responses((status = 200, body = PortDetail), Fails))]
async fn place(
    State(api): State<Api>,
    Path(name): Path<String>,
    Json(at): Json<Placed>,
) -> Answer<PortDetail> {
    let served = api.change(move |ports| ports.place(&name, at)).await?;
    Ok(Json(PortDetail::of(&served)))
}

/// The limits of a port or of an uplink
#[utoipa::path(get, path = "/v1/ports/{name}/limits", params(("name" = String, Path)), responses((status = 200, body = PortLimits), Fails))]
async fn limits(State(api): State<Api>, Path(name): Path<String>) -> Answer<PortLimits> {
    Ok(Json(api.ports.limits(&name)?))
}

/// Keeps a port or an uplink to these limits from now on; what is not named has none
#[utoipa::path(put, path = "/v1/ports/{name}/limits", params(("name" = String, Path)), request_body = PortLimits, responses((status = 200, body = PortLimits), Fails))]
async fn set_limits(
    State(api): State<Api>,
    Path(name): Path<String>,
    Json(to): Json<PortLimits>,
) -> Answer<PortLimits> {
    Ok(Json(api.change(move |ports| ports.set_limits(&name, to)).await?))
}

fn captured(ports: &Ports) -> Capture {
    match ports.capture() {
        Some((file, written, lost)) => Capture { file: Some(file.display().to_string()), written, lost },
        None => Capture { file: None, written: 0, lost: 0 },
    }
}

/// Whether there is a capture, and how far it is
#[utoipa::path(get, path = "/v1/capture", responses((status = 200, body = Capture), Fails))]
async fn capture(State(api): State<Api>) -> Json<Capture> {
    Json(captured(&api.ports))
}

/// Captures what crosses ports to a new file from now on
#[utoipa::path(put, path = "/v1/capture", request_body = NewCapture, responses((status = 200, body = Capture), Fails))]
async fn begin_capture(State(api): State<Api>, Json(new): Json<NewCapture>) -> Answer<Capture> {
    if new.snaplen.is_some_and(|n| n < 14) {
        return Err(Problem::bad("write a number of bytes from 14 on").at("snaplen"));
    }
    let filter = new.filter.map(|text| text.parse()).transpose();
    let filter =
        filter.map_err(|e: FilterError| Problem::bad(e.to_string()).at("filter"))?.unwrap_or_default();
    let config = CaptureConfig { snaplen: new.snaplen.unwrap_or(SNAPLEN), filter };
    let wish = Wish { file: new.file, config };
    Ok(Json(api.change(move |ports| ports.set_capture(Some(wish)).map(|()| captured(ports))).await?))
}

/// Captures no more; the file is whole when this answers
#[utoipa::path(delete, path = "/v1/capture", responses((status = 204), Fails))]
async fn end_capture(State(api): State<Api>) -> Result<StatusCode, Problem> {
    api.change(|ports| ports.set_capture(None)).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// The addresses that switches have learnt
#[utoipa::path(get, path = "/v1/fdb", params(OfSwitch), responses((status = 200, body = Vec<Station>), Fails))]
async fn fdb(State(api): State<Api>, Query(of): Query<OfSwitch>) -> Answer<Vec<Station>> {
    let mut all = api.ports.fdb();
    if let Some(name) = of.switch {
        all.retain(|(hub, _)| hub.name.as_ref() == Some(&name));
        if all.is_empty() {
            return Err(no_switch(&name).into());
        }
    }
    let station = |switch: &Option<String>, (port, entry): (String, Entry)| Station {
        mac: entry.mac.to_string(),
        switch: switch.clone(),
        vlan: entry.vid,
        port,
        fixed: entry.is_static,
    };
    let stations = |(hub, entries): (Arc<Hub>, Vec<_>)| {
        entries.into_iter().map(|entry| station(&hub.name, entry)).collect::<Vec<_>>()
    };
    Ok(Json(all.into_iter().flat_map(stations).collect()))
}

fn switch(ports: &Ports, hub: &Hub) -> Option<Switch> {
    let (spec, mac_ageing) = ports.switch(hub)?;
    let is_on = |name: &Option<String>| *name == spec.name;
    let on = ports.all().iter().filter_map(|s| s.of_hub()).filter(|port| is_on(&port.hub.name)).count();
    let uplink = ports.uplinks().into_iter().find(|outer| is_on(&outer.spec.switch));
    Some(Switch {
        ports: on,
        uplink: uplink.map(|outer| outer.spec.name()),
        mac_ageing,
        addresses: hub.switch.as_ref()?.fdb().dump().count(),
        name: spec.name,
    })
}

/// All switches
#[utoipa::path(get, path = "/v1/switches", responses((status = 200, body = Vec<Switch>), Fails))]
async fn switches(State(api): State<Api>) -> Json<Vec<Switch>> {
    Json(api.ports.hubs().iter().filter_map(|hub| switch(&api.ports, hub)).collect())
}

/// Has there be one switch more, without ports, with the keys of a [[switch]] of the configuration file
#[utoipa::path(post, path = "/v1/switches", request_body = SwitchSpec, responses((status = 201, body = Switch), Fails))]
async fn add_switch(
    State(api): State<Api>,
    Json(spec): Json<SwitchSpec>,
) -> Result<(StatusCode, Json<Switch>), Problem> {
    let added = api.change(move |ports| {
        let hub = ports.add_switch(spec)?;
        switch(ports, &hub).ok_or_else(|| Refused::Conflict("it has gone again".into()))
    });
    Ok((StatusCode::CREATED, Json(added.await?)))
}

/// Has a switch that has no ports be no more
#[utoipa::path(delete, path = "/v1/switches/{name}", params(("name" = String, Path)), responses((status = 204), Fails))]
async fn remove_switch(State(api): State<Api>, Path(name): Path<String>) -> Result<StatusCode, Problem> {
    api.change(move |ports| ports.remove_switch(&name)).await?;
    Ok(StatusCode::NO_CONTENT)
}
