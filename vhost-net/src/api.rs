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
use utoipa::ToSchema;
use utoipa::openapi::OpenApi;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use crate::captured::Wish;
use crate::hub::{Hub, Plan};
use crate::mac::MacAddr;
use crate::mib;
use crate::pcap::filter::FilterError;
use crate::pcap::{CaptureConfig, SNAPLEN};
use crate::ports::{Counted, Ports, Served};
use crate::spec::{PortLimits, PortSpec};

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

    fn detail(&self, served: &Served) -> Json<PortDetail> {
        Json(PortDetail::of(served, self.ports.hub()))
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
    /// Where front ends connect; the uplink has none.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    socket: Option<String>,
    /// What it is joined to: switch, wire, loopback, tap or uplink.
    kind: String,
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
    /// What its guest was given, or what has left by the uplink.
    rx: Flow,
    /// What its guest has sent, or what has come in by the uplink.
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
    fn of(s: &Served, hub: &Hub) -> Port {
        let [rx, tx] = s.flows(hub).map(Flow::from);
        let spec = s.spec();
        let kind = match &s.counted {
            Counted::Hub(..) => joined(hub.plan),
            Counted::Tap(_) => "tap",
        };
        let interface = match &s.counted {
            Counted::Hub(..) => None,
            Counted::Tap(tap) => Some(tap.name().to_owned()),
        };
        Port {
            name: s.name.clone(),
            socket: Some(s.place.key()),
            kind: kind.into(),
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

    fn uplink(ports: &Ports, spec: &PortSpec, number: u16) -> Port {
        let ([rx, tx], _) = ports.uplink_counts(number);
        Port {
            name: spec.name(),
            socket: None,
            kind: "uplink".into(),
            interface: spec.interface().map(str::to_owned),
            mac: None,
            up: ports.hub().outside.latest().0.up,
            attached: false,
            paused: false,
            ended: false,
            rx: rx.into(),
            tx: tx.into(),
        }
    }
}

impl PortDetail {
    fn of(s: &Served, hub: &Hub) -> PortDetail {
        let queue = |(number, stats): (u16, &Arc<QueueStats>)| Queue {
            queue: number,
            reactor: stats.reactor(),
            polls: stats.polls.get(),
            kicks: stats.kicks.get(),
            signals: stats.signals.get(),
            errors: stats.errors_total(),
        };
        PortDetail {
            port: Port::of(s, hub),
            counters: s.counters(hub).into_iter().collect(),
            queues: (0..).zip(&s.stats).map(queue).collect(),
        }
    }

    fn uplink(ports: &Ports, spec: &PortSpec, number: u16) -> PortDetail {
        let (_, counters) = ports.uplink_counts(number);
        PortDetail {
            port: Port::uplink(ports, spec, number),
            counters: counters.into_iter().collect(),
            queues: Vec::new(),
        }
    }
}

fn joined(plan: Plan) -> &'static str {
    match plan {
        Plan::Switch => "switch",
        Plan::Wire => "wire",
        Plan::Echo | Plan::Discard | Plan::Generate(_) => "loopback",
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
    /// Its VLAN, 0 where there are none.
    vlan: u16,
    /// The port that it is behind.
    port: String,
    /// Whether it belongs there for good.
    fixed: bool,
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
        .routes(routes!(fdb));
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
        joined: joined(api.ports.hub().plan).into(),
        ports: api.ports.all().len(),
    })
}

/// All ports, and the uplink
#[utoipa::path(get, path = "/v1/ports", responses((status = 200, body = Vec<Port>), Fails))]
async fn list(State(api): State<Api>) -> Json<Vec<Port>> {
    let ports = api.ports.all();
    let uplink = api.ports.uplink().map(|(spec, number)| Port::uplink(&api.ports, &spec, number));
    Json(ports.iter().map(|s| Port::of(s, api.ports.hub())).chain(uplink).collect())
}

/// Serves one more port, with the keys of a [[port]] of the configuration file
#[utoipa::path(post, path = "/v1/ports", request_body = PortSpec, responses((status = 201, body = PortDetail), Fails))]
async fn add(
    State(api): State<Api>,
    Json(spec): Json<PortSpec>,
) -> Result<(StatusCode, Json<PortDetail>), Problem> {
    let served = api.change(|ports| ports.add(spec)).await?;
    Ok((StatusCode::CREATED, api.detail(&served)))
}

/// A port and its queues
#[utoipa::path(get, path = "/v1/ports/{name}", params(("name" = String, Path)), responses((status = 200, body = PortDetail), Fails))]
async fn show(State(api): State<Api>, Path(name): Path<String>) -> Answer<PortDetail> {
    match api.ports.uplink() {
        Some((spec, number)) if spec.name() == name => {
            Ok(Json(PortDetail::uplink(&api.ports, &spec, number)))
        }
        _ => Ok(api.detail(&*api.ports.find(&name)?)),
    }
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
    Ok(api.detail(&served))
}

/// Takes nothing from its guest for now and gives it nothing, as a guest that has no buffers
#[utoipa::path(post, path = "/v1/ports/{name}/pause", params(("name" = String, Path)), responses((status = 200, body = PortDetail), Fails))]
async fn pause(State(api): State<Api>, Path(name): Path<String>) -> Answer<PortDetail> {
    let served = api.change(move |ports| ports.set_paused(&name, true)).await?;
    Ok(api.detail(&served))
}

/// Goes on
#[utoipa::path(post, path = "/v1/ports/{name}/resume", params(("name" = String, Path)), responses((status = 200, body = PortDetail), Fails))]
async fn resume(State(api): State<Api>, Path(name): Path<String>) -> Answer<PortDetail> {
    let served = api.change(move |ports| ports.set_paused(&name, false)).await?;
    Ok(api.detail(&served))
}

/// Moves queues to a reactor, where they stay
#[utoipa::path(put, path = "/v1/ports/{name}/reactor", params(("name" = String, Path)), request_body = Placed, responses((status = 200, body = PortDetail), Fails))]
async fn place(
    State(api): State<Api>,
    Path(name): Path<String>,
    Json(at): Json<Placed>,
) -> Answer<PortDetail> {
    let served = api.change(move |ports| ports.place(&name, at)).await?;
    Ok(api.detail(&served))
}

/// The limits of a port or of the uplink
#[utoipa::path(get, path = "/v1/ports/{name}/limits", params(("name" = String, Path)), responses((status = 200, body = PortLimits), Fails))]
async fn limits(State(api): State<Api>, Path(name): Path<String>) -> Answer<PortLimits> {
    Ok(Json(api.ports.limits(&name)?))
}

/// Keeps a port or the uplink to these limits from now on; what is not named has none
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

/// The addresses that the switch has learnt
#[utoipa::path(get, path = "/v1/fdb", responses((status = 200, body = Vec<Station>), Fails))]
async fn fdb(State(api): State<Api>) -> Json<Vec<Station>> {
    let station = |(port, entry): (String, crate::switch::fdb::Entry)| Station {
        mac: entry.mac.to_string(),
        vlan: entry.vid,
        port,
        fixed: entry.is_static,
    };
    Json(api.ports.fdb().into_iter().map(station).collect())
}
