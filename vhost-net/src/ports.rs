//! The ports that a daemon serves, and what can be changed of them while it runs.

use std::collections::HashMap;
use std::io;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use control::common::Running;
use control::moving::{Movable, Placed, move_away};
use control::refused::{Changes, Refused};
use daemon::Place;
use daemon::file::Step;
use daemon::takeover::{self, Successor};
use poll_engine::confine::{self, Role};
use poll_engine::device::Device;
use poll_engine::engine::pacing::Pacing;
use poll_engine::engine::placement::CpuList;
use poll_engine::engine::placement::auto::Cpus;
use poll_engine::engine::{Engine, RunningStation};
use poll_engine::session::serve::Export;
use poll_engine::session::server::{AskError, Server};
use poll_engine::stats::QueueStats;
use poll_engine::takeover::give::{Estate, Lot};
use tracing::{info, warn};

use crate::captured::{Captured, Wish};
use crate::check::check;
use crate::cli::Options;
use crate::device::{Card, Joined, MTU_RANGE, NetDevice};
use crate::hub::{Hub, Plan, Port};
use crate::metrics;
use crate::mib::{self, Flow};
use crate::port::tap::Tap;
use crate::port::tap::card::TapCard;
use crate::reload::{Reload, reload};
use crate::report::{cycles, report, tap_report, uplink_report};
use crate::saved::saved;
use crate::spec::{PortLimits, PortSpec};
use crate::stats::DROPS;
use crate::switch::fdb::Entry;
use crate::switch::{PortConfig, PortId};
use crate::takeover::About;

/// How long a port that is removed may take to finish what is in flight, before its removal is said to be under way.
const DRAIN: Duration = Duration::from_secs(30);
/// How often to look meanwhile.
const LOOK: Duration = Duration::from_millis(2);

/// A port as asked for, and what is open of it.
#[derive(Debug)]
pub struct Wanted {
    /// What it is known by.
    pub name: String,
    /// Where it is to be served.
    pub place: Place,
    /// As it is asked for.
    pub spec: PortSpec,
    /// What its guest sees.
    pub card: Card,
    /// What it is joined to, if not to a hub.
    pub tap: Option<Arc<Tap>>,
}

impl Wanted {
    /// Opens what a port is joined to. A card that is joined to a tap has its MTU and as many pairs of queues.
    pub fn open(spec: PortSpec, options: &Options) -> Result<Wanted> {
        let tap = match (&spec.tap, spec.tap_fds.as_slice()) {
            (Some(name), _) => {
                // Over the API by a thread that may.
                let (name, pairs, mtu) = (name.clone(), options.num_queue_pairs, spec.mtu);
                Some(confine::have(Role::Opener, move || Tap::open(&name, pairs, mtu))??)
            }
            (None, []) => None,
            (None, numbers) => Some(Tap::inherit_numbers(numbers, spec.mtu)?),
        };
        let place = spec.place().with_context(|| format!("port {}: nowhere to listen", spec.name()))?;
        let of_tap = tap.as_ref().and_then(|tap| u16::try_from(tap.mtu()).ok());
        let mtu = spec.mtu.or(of_tap.filter(|mtu| MTU_RANGE.contains(mtu)));
        let pairs = tap.as_ref().map_or(options.num_queue_pairs, |tap| tap.pairs());
        let card = Card { mac: spec.mac, mtu, pairs, ring_size: options.queue_size };
        Ok(Wanted { name: spec.name(), place, spec, card, tap })
    }

    /// Ready to be served: what a server needs, and what becomes of it then. `at` is its number in the hub, if it is none of
    /// a tap's, and in the capture, if there is one.
    pub fn ready(
        mut self,
        (hub, engine, withheld): (&Arc<Hub>, &Arc<Engine>, u64),
        number: Option<u16>,
        captured: Option<(&Captured, u32)>,
    ) -> Result<(Export, Ready)> {
        let (joined, counted) = if let Some(tap) = self.tap.take() {
            let capture = captured.map(|(captured, index)| (captured.capture(), index));
            (Joined::Tap(TapCard::new(Arc::clone(&tap), capture)), Counted::Tap(tap))
        } else {
            let number = number.context("a port of the hub is missing")?;
            let port = hub.port(number.into());
            (Joined::Hub(Arc::clone(hub), number.into()), Counted::Hub(port, number))
        };
        let device = Arc::new(NetDevice::new(self.card, joined, withheld));
        if self.spec.link_down {
            device.set_link(false).with_context(|| format!("port {}: its link", self.name))?;
        }
        let stats: Vec<_> = std::iter::repeat_with(Arc::default).take(device.num_queues().into()).collect();
        let (name, engine) = (self.name.clone(), Arc::clone(engine));
        let export = Export { name, device: Arc::clone(&device) as _, stats: stats.clone(), engine };
        let hub = matches!(counted, Counted::Hub(..)).then(|| Arc::clone(hub));
        Ok((export, Ready { wanted: self, counted, stats, device, hub }))
    }
}

/// Where a port's packets are counted.
#[derive(Debug)]
pub enum Counted {
    /// At the port of this number.
    Hub(Arc<Port>, u16),
    /// At its tap.
    Tap(Arc<Tap>),
}

/// A port that is about to be served.
#[derive(Debug)]
pub struct Ready {
    /// As it was asked for.
    pub wanted: Wanted,
    counted: Counted,
    stats: Vec<Arc<QueueStats>>,
    device: Arc<NetDevice>,
    hub: Option<Arc<Hub>>,
}

impl Ready {
    /// It is, by this server.
    pub fn served(self, server: Arc<Server>) -> Served {
        let Ready { wanted: Wanted { name, place, spec, card, .. }, counted, stats, device, hub } = self;
        if let Counted::Tap(tap) = &counted {
            tap.on_change(server.config_notifier());
        }
        device.on_change(server.config_notifier());
        if spec.link_down {
            server.set_link(false);
        }
        info!("serving {name}");
        Served { name, place, card, counted, stats, server, device, hub, spec: Mutex::new(spec) }
    }
}

/// A port being served.
#[derive(Debug)]
pub struct Served {
    /// What it is known by.
    pub name: String,
    /// Where it is served.
    pub place: Place,
    /// What its guest sees.
    pub card: Card,
    /// Where its packets are counted.
    pub counted: Counted,
    /// Counters of its queues.
    pub stats: Vec<Arc<QueueStats>>,
    /// What serves it.
    pub server: Arc<Server>,
    device: Arc<NetDevice>,
    /// What it is joined to other ports by, if not to a tap.
    hub: Option<Arc<Hub>>,
    spec: Mutex<PortSpec>,
}

impl Movable for Served {
    fn key(&self) -> &str {
        &self.name
    }

    fn stats(&self) -> &[Arc<QueueStats>] {
        &self.stats
    }

    fn server(&self) -> &Server {
        &self.server
    }

    fn restart(&self) -> Result<(), AskError> {
        let restart = || self.server.restart_queues();
        match (&self.hub, self.number()) {
            (Some(hub), Some(number)) => hub.while_restarting(number.into(), restart),
            _ => restart(),
        }
    }
}

impl Served {
    /// As it is asked for now.
    pub fn spec(&self) -> PortSpec {
        locked(&self.spec).clone()
    }

    /// Its number in the hub.
    pub fn number(&self) -> Option<u16> {
        match &self.counted {
            Counted::Hub(_, number) => Some(*number),
            Counted::Tap(_) => None,
        }
    }

    /// What has gone to its guest, and what has come from it.
    pub fn flows(&self, hub: &Hub) -> [Flow; 2] {
        match &self.counted {
            Counted::Hub(port, number) => mib::flows(&port.pairs, &switched(hub, *number)),
            Counted::Tap(tap) => tap.flows(),
        }
    }

    /// Its counters by the names that `ethtool -S` and the switch have for them, those that are zero left out.
    pub fn counters(&self, hub: &Hub) -> Vec<(String, u64)> {
        let mut all = match &self.counted {
            Counted::Hub(port, number) => counters(port, hub, *number),
            Counted::Tap(tap) => tap.counters(),
        };
        all.retain(|(_, n)| *n > 0);
        all
    }

    /// Has the link up or down, and the guest see it.
    fn set_link(&self, up: bool) -> Result<()> {
        if self.device.set_link(up)? {
            self.server.set_link(up);
            info!("port {}: its link is {}", self.name, if up { "up" } else { "down" });
        }
        Ok(())
    }

    /// Is what is asked for now, as far as that can change.
    fn change(&self, spec: &PortSpec, hub: &Hub) -> Result<()> {
        if let Some(number) = self.number() {
            set_rules(hub, number, spec);
        }
        self.set_link(!spec.link_down).with_context(|| format!("port {}: its link", self.name))?;
        locked(&self.spec).clone_from(spec);
        Ok(())
    }

    fn report(&self, hub: &Hub) -> String {
        match &self.counted {
            Counted::Hub(port, number) => report(port, &self.stats, &switched(hub, *number)),
            Counted::Tap(tap) => tap_report(&self.name, tap),
        }
    }
}

/// The drops of a port's queues by reason, and the switch's.
fn counters(port: &Port, hub: &Hub, number: u16) -> Vec<(String, u64)> {
    let own = DROPS.iter().flat_map(|&(why, name)| {
        let sum = |rx: bool| {
            port.pairs.iter().map(|p| if rx { p.rx_drops(why) } else { p.tx_drops(why) }).sum::<u64>()
        };
        [(format!("rx_{name}_drops"), sum(true)), (format!("tx_{name}_drops"), sum(false))]
    });
    let waits = port.pairs.iter().map(|p| p.tx_waits.get()).sum();
    let switched = switched(hub, number).into_iter().map(|(name, n)| (format!("switch_{name}"), n));
    own.chain([("tx_waits".to_owned(), waits)]).chain(switched).collect()
}

fn switched(hub: &Hub, number: u16) -> Vec<(&'static str, u64)> {
    hub.switch.as_ref().map(|switch| switch.counters(PortId(number))).unwrap_or_default()
}

/// Has a port of the switch be what is asked for now; its MTU stays.
fn set_rules(hub: &Hub, number: u16, spec: &PortSpec) {
    let Some(switch) = &hub.switch else { return };
    let was = switch.rules(PortId(number));
    let rules = PortConfig { mtu: was.mtu, ..spec.rules() };
    if rules != was {
        info!("port {}: other rules from now on", rules.name);
        hub.set_rules(number.into(), rules);
    }
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn conflict(e: &anyhow::Error) -> Refused {
    e.into()
}

/// The switch's port to an interface of the host's.
#[derive(Clone, Copy, Debug)]
pub struct Outer {
    /// Its number in the hub.
    pub number: u16,
}

/// What ports are served with.
pub struct Setting {
    /// What runs the queues.
    pub engine: Arc<Engine>,
    /// What joins the ports.
    pub hub: Arc<Hub>,
    /// Where the uplink is, if there is one.
    pub outer: Option<Outer>,
    /// Features that cards do not offer.
    pub withheld: u64,
    /// The file that the options come from.
    pub file: Option<PathBuf>,
    /// Who may take over, and cannot have taps.
    pub successor: Successor,
    /// Whether it may open interfaces.
    pub opens: bool,
}

/// All of them.
pub struct Ports {
    /// What they are served with.
    pub setting: Setting,
    /// As they hold now, with what was changed since the start.
    options: Mutex<Options>,
    served: Mutex<Vec<Arc<Served>>>,
    captured: Mutex<Option<Captured>>,
    changes: Changes,
    /// The hub's, by the numbers of their reactors. After what is served, whose queues they have.
    shards: Mutex<HashMap<usize, RunningStation>>,
}

impl Ports {
    /// These, by `options`, with a shard on each reactor.
    pub fn new(
        setting: Setting,
        options: Options,
        served: Vec<Served>,
        captured: Option<Captured>,
        shards: Vec<RunningStation>,
    ) -> Ports {
        Ports {
            setting,
            options: Mutex::new(options),
            served: Mutex::new(served.into_iter().map(Arc::new).collect()),
            captured: Mutex::new(captured),
            changes: Changes::default(),
            shards: Mutex::new(shards.into_iter().enumerate().collect()),
        }
    }

    /// All, in their order, without the uplink.
    pub fn all(&self) -> Vec<Arc<Served>> {
        locked(&self.served).clone()
    }

    /// What joins them.
    pub fn hub(&self) -> &Hub {
        &self.setting.hub
    }

    /// The file that the options come from.
    pub fn file(&self) -> Option<&Path> {
        self.setting.file.as_deref()
    }

    /// The uplink as it is asked for now, and its number.
    pub fn uplink(&self) -> Option<(PortSpec, u16)> {
        locked(&self.options).uplink.clone().zip(self.setting.outer.map(|outer| outer.number))
    }

    /// Both ways of the uplink, as of any other port, and its counters.
    pub fn uplink_counts(&self, number: u16) -> ([Flow; 2], Vec<(String, u64)>) {
        let (hub, port) = (self.hub(), self.hub().port(number.into()));
        let mut all = counters(&port, hub, number);
        all.retain(|(_, n)| *n > 0);
        (mib::flows(&port.pairs, &switched(hub, number)), all)
    }

    /// The one of this name.
    pub fn find(&self, name: &str) -> Result<Arc<Served>, Refused> {
        let found = locked(&self.served).iter().find(|s| s.name == name).cloned();
        found.ok_or_else(|| {
            let why = if self.uplink().is_some_and(|(spec, _)| spec.name() == name) {
                format!("{name} is the uplink, which stays as it is but for its limits")
            } else {
                format!("there is no port {name}; GET /v1/ports lists those there are")
            };
            Refused::Missing(why)
        })
    }

    /// Serves one more.
    pub fn add(&self, spec: PortSpec) -> Result<Arc<Served>, Refused> {
        let _change = self.changes.begin()?;
        let mut options = locked(&self.options).clone();
        options.port.push(spec);
        check(&options).map_err(|wrong| match (wrong.at.last(), wrong.why) {
            // What others have is no mistake of its own.
            (_, why) if why.starts_with("two ports") || why.starts_with("a wire has") => {
                Refused::Conflict(why)
            }
            (Some(Step::Key(key)), why) if *key != "port" => Refused::Wrong(Some(key), why),
            (_, why) => Refused::Wrong(None, why),
        })?;
        let spec = options.ports().pop().unwrap_or_default();
        for (key, inherits) in [("fd", spec.fd.is_some()), ("tap-fds", !spec.tap_fds.is_empty())] {
            if inherits {
                let why = "a running daemon inherits nothing; give a socket-path, and a tap by its name";
                return Err(Refused::Wrong(Some(key), why.into()));
            }
        }
        if self.setting.successor.expected_at().is_some() && spec.has_tap() {
            let why = "a port that is joined to a tap cannot be handed over, and a newer process may take over from this one \
                       (--control, POST /v1/takeover)";
            return Err(Refused::Conflict(why.into()));
        }
        if !self.setting.opens && spec.has_tap() {
            let why = "this daemon has given up the right to open interfaces, as it began without any; start it with a port \
                       that has a tap, with an uplink, or with --sandbox off";
            return Err(Refused::Conflict(why.into()));
        }
        let served = self.begin(spec, &options).map_err(|e| conflict(&e))?;
        locked(&self.served).push(Arc::clone(&served));
        *locked(&self.options) = options;
        Ok(served)
    }

    fn begin(&self, spec: PortSpec, options: &Options) -> Result<Arc<Served>> {
        let Setting { engine, hub, withheld, .. } = &self.setting;
        let wanted = Wanted::open(spec, options)?;
        let listener = wanted.place.listen()?;
        let mut captured = locked(&self.captured);
        let index = captured.as_ref().map(|captured| captured.capture().add(&wanted.name));
        let number = if wanted.tap.is_some() {
            None
        } else {
            let port = Port::new(wanted.name.clone(), wanted.card.pairs, wanted.spec.wait);
            u16::try_from(hub.add_port(port, wanted.spec.rules(), engine)?).ok()
        };
        if let (Some(captured), Some(number), Some(index)) = (captured.as_mut(), number, index) {
            captured.joins(number, index);
            captured.witness(hub, engine)?;
        }
        let start = || {
            let index = captured.as_ref().zip(index);
            let (export, ready) = wanted.ready((hub, engine, *withheld), number, index)?;
            let server = Server::start(export, listener, || {}).context("cannot start a control thread")?;
            anyhow::Ok(Arc::new(ready.served(Arc::new(server))))
        };
        start().inspect_err(|_| {
            // Nobody has come to it.
            let _ = number.map(|number| hub.remove_port(number.into(), engine));
        })
    }

    /// Serves this one no more, once what is in flight is finished.
    pub fn remove(&self, name: &str, force: bool) -> Result<(), Refused> {
        let _change = self.changes.begin()?;
        let served = self.find(name)?;
        if force {
            served.server.begin_stop();
        } else if !served.server.begin_stop_unattached() {
            return Err(Refused::Conflict(format!(
                "a front end is connected to {name}; detach the card from its guest first, or force it"
            )));
        }
        let until = Instant::now() + DRAIN;
        while !served.server.has_ended() {
            if Instant::now() > until {
                return Err(Refused::Conflict(format!(
                    "{name} serves nobody any more, but its queues have not stopped after {DRAIN:?}; remove it again"
                )));
            }
            std::thread::sleep(LOOK);
        }
        if let Place::Path(path) = &served.place {
            // Its control thread may remove sockets only where there were some at the start.
            let is_socket = std::fs::symlink_metadata(path).is_ok_and(|meta| meta.file_type().is_socket());
            if is_socket && let Err(e) = std::fs::remove_file(path) {
                warn!("{} is left behind: {e}", path.display());
            }
        }
        if let Some(number) = served.number() {
            let removed = self.setting.hub.remove_port(number.into(), &self.setting.engine);
            removed.map_err(|e| Refused::Conflict(e.to_string()))?;
        }
        locked(&self.served).retain(|s| s.name != name);
        locked(&self.options).drop_port(&served.place);
        info!("{name} is served no more");
        Ok(())
    }

    /// Has its link up or down.
    pub fn set_link(&self, name: &str, up: bool) -> Result<Arc<Served>, Refused> {
        let _change = self.changes.begin()?;
        let served = self.find(name)?;
        let spec = PortSpec { link_down: !up, ..served.spec() };
        served.change(&spec, self.hub()).map_err(|e| conflict(&e))?;
        locked(&self.options).set_port(&spec);
        Ok(served)
    }

    /// Has its queues take nothing and answer nothing, or go on.
    pub fn set_paused(&self, name: &str, paused: bool) -> Result<Arc<Served>, Refused> {
        let _change = self.changes.begin()?;
        let served = self.find(name)?;
        served.server.set_paused(paused)?;
        info!("port {name} {}", if paused { "is paused" } else { "goes on" });
        Ok(served)
    }

    /// Moves a queue, or all of them, to a reactor.
    pub fn place(&self, name: &str, at: Placed) -> Result<Arc<Served>, Refused> {
        let _change = self.changes.begin()?;
        let served = self.find(name)?;
        let queues = at.queues(self.engine(), name, served.stats.len())?;
        served.device.want_on(queues, at.reactor);
        served.restart()?;
        Ok(served)
    }

    /// The limits of a port, or of the uplink.
    pub fn limits(&self, name: &str) -> Result<PortLimits, Refused> {
        match self.uplink() {
            Some((spec, _)) if spec.name() == name => Ok(spec.limits()),
            _ => Ok(self.find(name)?.spec().limits()),
        }
    }

    /// Keeps a port, or the uplink, to other limits from now on.
    pub fn set_limits(&self, name: &str, limits: PortLimits) -> Result<PortLimits, Refused> {
        let _change = self.changes.begin()?;
        let hub = self.hub();
        if let Some((spec, number)) = self.uplink().filter(|(spec, _)| spec.name() == name) {
            let spec = spec.with_limits(limits);
            set_rules(hub, number, &spec);
            locked(&self.options).uplink = Some(spec);
            return Ok(limits);
        }
        let served = self.find(name)?;
        if hub.plan != Plan::Switch || served.number().is_none() {
            return Err(Refused::Conflict(format!(
                "{name} is no port of a switch, and nothing else keeps packets to limits"
            )));
        }
        let spec = served.spec().with_limits(limits);
        served.change(&spec, hub).map_err(|e| conflict(&e))?;
        locked(&self.options).set_port(&spec);
        Ok(limits)
    }

    /// The addresses that the switch has learnt, with the names of their ports.
    pub fn fdb(&self) -> Vec<(String, Entry)> {
        let Some(switch) = &self.hub().switch else { return Vec::new() };
        let ports = self.hub().ports();
        let name = |entry: &Entry| ports.get(usize::from(entry.port.0)).map(|port| port.name.clone());
        let mut all: Vec<_> = switch.fdb().dump().filter_map(|entry| Some((name(&entry)?, entry))).collect();
        all.sort_by_key(|(_, entry)| (entry.vid, entry.mac.0));
        all
    }

    /// The capture that there is: its file, frames written and lost.
    pub fn capture(&self) -> Option<(PathBuf, u64, u64)> {
        locked(&self.captured).as_ref().map(|captured| captured.capture().counts())
    }

    /// Begins to capture what crosses all ports, or ends it.
    pub fn set_capture(&self, wish: Option<Wish>) -> Result<(), Refused> {
        let _change = self.changes.begin()?;
        let mut captured = locked(&self.captured);
        let Setting { engine, hub, .. } = &self.setting;
        let new = match wish {
            Some(_) if captured.is_some() => {
                return Err(Refused::Conflict("there is a capture already; end that first".into()));
            }
            Some(wish) => {
                let uplink = self.uplink().map(|(spec, number)| (spec.name(), Some(number)));
                let ports = self.all().into_iter().map(|s| (s.name.clone(), s.number())).chain(uplink);
                Some(Captured::begin(wish, ports).map_err(|e| conflict(&e))?)
            }
            None => None,
        };
        let done = match &new {
            Some(captured) => captured.witness(hub, engine),
            None => Captured::nobody(hub, engine),
        };
        done.map_err(|e| Refused::Conflict(e.to_string()))?;
        for s in self.all().iter().filter(|s| s.number().is_none()) {
            s.device.set_capture(new.as_ref().and_then(|new| Some((new.capture(), new.index_of(&s.name)?))));
            s.server.restart_queues()?;
        }
        if let Some(new) = &new {
            new.capture().keep();
        }
        // The last one that has it: what is noted yet is written by its drop.
        *captured = new;
        Ok(())
    }

    /// Does what its file asks for now, as far as that can be done while guests run.
    pub fn read_again(&self) {
        let Some(path) = self.file() else { return warn!("there is no --config to be read again") };
        let _change = self.changes.wait();
        let now = locked(&self.options).clone();
        let wanted = Options::read(path).map_err(|e| format!("{e:#}"));
        let Reload { options: new, refused } = match wanted.and_then(|wanted| reload(&now, &wanted)) {
            Ok(reload) => reload,
            Err(e) => return warn!("{e}; nothing was changed"),
        };
        for why in refused {
            warn!("{}: {why}: start it anew for that", path.display());
        }
        for (served, spec) in self.all().iter().zip(new.ports()) {
            served.change(&spec, self.hub()).unwrap_or_else(|e| warn!("{e:#}"));
        }
        if let (Some(uplink), Some(outer)) = (&new.uplink, self.setting.outer) {
            set_rules(self.hub(), outer.number, uplink);
        }
        *locked(&self.options) = new;
        info!("{} was read again", path.display());
    }

    /// Statistics as text.
    pub fn report(&self) -> String {
        let (engine, hub) = (&self.setting.engine, self.hub());
        let mut text: String = self.all().iter().map(|s| s.report(hub)).collect();
        if let Some((uplink, number)) = self.uplink() {
            text += &uplink_report(&uplink.name(), hub, number.into());
        }
        if locked(&self.options).record_core_cycles {
            text += &cycles(engine.stats().iter().map(|s| &**s), &hub.ports());
        }
        if let Some(captured) = &*locked(&self.captured) {
            text += &captured.capture().line();
            text.push('\n');
        }
        text
    }

    /// Begins to stop, all at once; each is awaited by its drop.
    pub fn begin_stop(&self) {
        self.changes.stop();
        for s in self.all() {
            s.server.begin_stop();
        }
    }
}

impl Running for Ports {
    fn engine(&self) -> &Engine {
        &self.setting.engine
    }

    fn add_reactor(&self, cpu: Option<usize>) -> Result<(), Refused> {
        let _change = self.changes.begin()?;
        let Setting { engine, hub, .. } = &self.setting;
        let captured = locked(&self.captured);
        let witness = captured.as_ref().map(Captured::one).unwrap_or_default();
        let seat = hub.reserve(engine).map_err(|e| Refused::Conflict(e.to_string()))?;
        let shard = |number, waker| Box::new(seat.shard(number, waker, witness)) as _;
        let (number, shard) = engine.add_reactor_with(cpu, shard)?;
        locked(&self.shards).insert(number, shard);
        Ok(())
    }

    fn retire(&self, number: usize) -> Result<(), Refused> {
        let _change = self.changes.begin()?;
        let Setting { engine, hub, outer, .. } = &self.setting;
        let retiring = move_away(engine, engine.retire(number)?, || self.all())?;
        let uplink = outer.map(|outer| outer.number.into());
        match hub.leave(&retiring, uplink, engine) {
            Ok(left) => {
                // Returns when the shard is gone.
                drop(locked(&self.shards).remove(&number));
                left.count(hub);
                retiring.finish();
                Ok(())
            }
            Err(e) => {
                engine.keep(retiring);
                Err(Refused::Conflict(format!("reactor {number} stays: {e}")))
            }
        }
    }

    fn set_pacing(&self, pacing: Pacing) -> Result<(), Refused> {
        let _change = self.changes.begin()?;
        self.setting.engine.set_pacing(pacing);
        locked(&self.options).poll = pacing;
        info!("reactors wait by {pacing:?} from now on");
        Ok(())
    }

    fn save(&self) -> Result<PathBuf, Refused> {
        let _change = self.changes.begin()?;
        let Some(path) = self.file() else {
            return Err(Refused::Conflict(
                "there is no file to save to; start the daemon with --config".into(),
            ));
        };
        let mut options = locked(&self.options);
        let mut now = options.clone();
        // One that is not pinned cannot be said beside others that are.
        if let Some(mut cpus) = self.engine().list().iter().map(|r| r.cpu).collect::<Option<Vec<_>>>() {
            cpus.sort_unstable();
            let mut began_on = self.engine().began_on().0;
            began_on.sort_unstable();
            // They are chosen again at the next start, unless somebody has chosen others.
            if !matches!(now.cpus, Some(Cpus::Auto(_))) || cpus != began_on {
                now.cpus = Some(Cpus::These(CpuList(cpus)));
            }
        }
        saved(path, &now).map_err(|e| conflict(&e))?;
        *options = now;
        info!("what has changed is saved to {}", path.display());
        Ok(path.to_owned())
    }

    fn expect_successor(&self) -> Result<PathBuf, Refused> {
        let _change = self.changes.begin()?;
        let options = locked(&self.options);
        if let Some(spec) = options.ports().iter().chain(&options.uplink).find(|spec| spec.has_tap()) {
            let why = format!(
                "{} is joined to a tap, which cannot be handed over; restart the daemon instead",
                spec.name()
            );
            return Err(Refused::Conflict(why));
        }
        self.setting.successor.expect_beside(options.api.as_deref()).map_err(|e| conflict(&e))
    }

    fn metrics(&self) -> String {
        metrics::text(self)
    }

    fn exports(&self) -> Vec<control::stats::Export> {
        metrics::views(self)
    }
}

/// What is there when a newer process takes over.
pub struct HandedOver(pub Arc<Ports>);

impl Estate for HandedOver {
    fn with(&self, give: &mut dyn FnMut(&[Lot])) -> io::Result<()> {
        let _change = self.0.changes.wait();
        let about = About::from(self.0.hub().plan);
        if let Some(paused) = self.0.all().iter().find(|s| s.server.is_paused()) {
            return Err(io::Error::other(format!("{} is paused; resume it first", paused.name)));
        }
        let lot = |s: &Arc<Served>| {
            takeover::lot(s.place.key(), &about, vec![], &s.server, Arc::clone(&s.device) as _)
        };
        let lots = self.0.all().iter().map(lot).collect::<Result<Vec<_>>>().map_err(io::Error::other)?;
        give(&lots);
        Ok(())
    }
}
