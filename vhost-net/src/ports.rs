//! The ports that a daemon serves, and what can be changed of them while it runs.

use std::io;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use control::common::Running;
use control::moving::{Movable, Placed, expect_none_paused, move_away};
use control::refused::{Changes, Refused};
use control::saved::Reactors;
use daemon::Place;
use daemon::file::{Step, Wrong};
use daemon::takeover::{self, Successor};
use poll_engine::engine::Engine;
use poll_engine::engine::pacing::Pacing;
use poll_engine::session::server::Server;
use poll_engine::takeover::give::{Estate, Lot};
use tracing::{info, warn};

use crate::captured::{Captured, Wish};
use crate::check::check;
use crate::cli::Options;
use crate::hub::{Hub, Plan, Port};
use crate::hubs::{AddError, Hubs, RunningHub};
use crate::join;
use crate::metrics;
use crate::reload::{Reload, reload};
use crate::report::cycles;
use crate::saved::saved;
use crate::seats::locked;
use crate::served::{HubPort, Outer, Served, Wanted};
use crate::spec::{PortLimits, PortSpec};
use crate::switch::fdb::Entry;
use crate::switches::{SwitchSpec, called};
use crate::takeover::About;
use crate::witness::Witness;

/// An address that a switch has learnt, behind the name of the port that it is at.
pub type Learnt = (String, Entry);

/// How long a port that is removed may take to finish what is in flight, before its removal is said to be under way.
const DRAIN: Duration = Duration::from_secs(30);
/// How often to look meanwhile.
const LOOK: Duration = Duration::from_millis(2);

fn conflict(e: &anyhow::Error) -> Refused {
    e.into()
}

/// What is wrong with what somebody wants to come.
fn refused(wrong: Wrong) -> Refused {
    // What others have is no mistake of its own.
    let is_taken = |why: &str| ["two ports", "two switches", "a wire has"].iter().any(|w| why.starts_with(w));
    match (wrong.at.last(), wrong.why) {
        (_, why) if is_taken(&why) => Refused::Conflict(why),
        (Some(Step::Key(key)), why) if *key != "port" => Refused::Wrong(Some(key), why),
        (_, why) => Refused::Wrong(None, why),
    }
}

impl From<AddError> for Refused {
    fn from(e: AddError) -> Refused {
        match e {
            AddError::Hub(e) => Refused::Conflict(e.to_string()),
            AddError::Engine(e) => e.into(),
        }
    }
}

/// What ports are served with.
pub struct Setting {
    /// What runs the queues.
    pub engine: Arc<Engine>,
    /// How its ports are joined.
    pub plan: Plan,
    /// Features that cards on taps do not offer.
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
    /// After what is served, whose queues their shards have.
    hubs: Hubs,
}

impl Ports {
    /// These, by `options`, joined by these hubs.
    pub fn new(
        setting: Setting,
        options: Options,
        served: Vec<Served>,
        captured: Option<Captured>,
        hubs: Vec<RunningHub>,
    ) -> Ports {
        Ports {
            setting,
            options: Mutex::new(options),
            served: Mutex::new(served.into_iter().map(Arc::new).collect()),
            captured: Mutex::new(captured),
            changes: Changes::default(),
            hubs: Hubs::new(hubs),
        }
    }

    /// All, in their order, without uplinks.
    pub fn all(&self) -> Vec<Arc<Served>> {
        locked(&self.served).clone()
    }

    /// What joins them: one for each switch.
    pub fn hubs(&self) -> Vec<Arc<Hub>> {
        self.hubs.all()
    }

    /// The file that the options come from.
    pub fn file(&self) -> Option<&Path> {
        self.setting.file.as_deref()
    }

    /// The uplinks.
    pub fn uplinks(&self) -> Vec<Outer> {
        let outer = |spec: PortSpec| {
            let hub = self.hubs.find(spec.switch.as_deref())?;
            let number = hub.uplink?;
            Some(Outer { spec, port: HubPort::new(hub, number) })
        };
        let specs = locked(&self.options).uplink.clone();
        specs.into_iter().filter_map(outer).collect()
    }

    /// The uplink of this name.
    pub fn uplink(&self, name: &str) -> Option<Outer> {
        self.uplinks().into_iter().find(|outer| outer.spec.name() == name)
    }

    /// The one of this name.
    pub fn find(&self, name: &str) -> Result<Arc<Served>, Refused> {
        let found = locked(&self.served).iter().find(|s| s.name == name).cloned();
        found.ok_or_else(|| {
            let why = if self.uplink(name).is_some() {
                format!("{name} is an uplink, which stays as it is but for its limits")
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
        check(&options).map_err(refused)?;
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
        let Setting { engine, withheld, .. } = &self.setting;
        let wanted = Wanted::open(spec, options)?;
        let listener = wanted.place.listen()?;
        let mut captured = locked(&self.captured);
        let index = captured.as_ref().map(|captured| captured.capture().add(&wanted.name));
        let port = if wanted.tap.is_some() {
            None
        } else {
            let port = Port::new(wanted.name.clone(), wanted.card.pairs, wanted.spec.wait);
            let switch = wanted.spec.switch.as_deref();
            let hub = self.hubs.find(switch).with_context(|| format!("there is no {}", called(switch)))?;
            let number = hub.add_port(port, wanted.spec.rules(), engine)?;
            Some(HubPort::new(hub, number as u16))
        };
        if let (Some(captured), Some(port), Some(index)) = (captured.as_mut(), &port, index) {
            captured.joins((port.hub.name.clone(), port.number), index);
            captured.witness(&port.hub, engine)?;
        }
        let start = || {
            let index = captured.as_ref().zip(index);
            let (export, ready) = wanted.ready(engine, port.clone(), *withheld, index)?;
            let server = Server::start(export, listener, || {}).context("cannot start a control thread")?;
            anyhow::Ok(Arc::new(ready.served(Arc::new(server))))
        };
        start().inspect_err(|_| {
            // Nobody has come to it.
            let _ = port.as_ref().map(|port| port.hub.remove_port(port.number.into(), engine));
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
        if let Some(port) = served.of_hub() {
            let removed = port.hub.remove_port(port.number.into(), &self.setting.engine);
            removed.map_err(|e| Refused::Conflict(e.to_string()))?;
        }
        locked(&self.served).retain(|s| s.name != name);
        locked(&self.options).drop_port(&served.place);
        info!("{name} is served no more");
        Ok(())
    }

    /// Has there be one switch more, without ports.
    pub fn add_switch(&self, spec: SwitchSpec) -> Result<Arc<Hub>, Refused> {
        let _change = self.changes.begin()?;
        if self.setting.plan != Plan::Switch {
            return Err(Refused::Conflict(
                "this daemon was started without a switch; start it with --switch".into(),
            ));
        }
        let mut options = locked(&self.options).clone();
        options.add_switch(spec);
        check(&options).map_err(refused)?;
        let captured = locked(&self.captured);
        let running =
            RunningHub::start(join::newest(&options), self.engine(), &|hub| witness(captured.as_ref(), hub));
        let running = running.map_err(|e| conflict(&e))?;
        let hub = Arc::clone(&running.hub);
        self.hubs.add(running);
        *locked(&self.options) = options;
        info!("there is the {}", called(hub.name.as_deref()));
        Ok(hub)
    }

    /// Has a switch that has no ports be no more.
    pub fn remove_switch(&self, name: &str) -> Result<(), Refused> {
        let _change = self.changes.begin()?;
        let hub = self.hubs.find(Some(name)).ok_or_else(|| no_switch(name))?;
        if self.hubs.all().len() == 1 {
            return Err(Refused::Conflict(format!("{name} is the only switch, and stays")));
        }
        let uplink = self.uplinks().into_iter().find(|outer| outer.spec.switch.as_deref() == Some(name));
        let is_there = |s: &Arc<Served>| s.of_hub().is_some_and(|port| Arc::ptr_eq(&port.hub, &hub));
        let port = self.all().into_iter().find(is_there).map(|s| s.name.clone());
        if let Some(port) = port.or(uplink.map(|outer| outer.spec.name())) {
            let why =
                format!("{port} is on {name}; remove its ports first, and an uplink by a restart without it");
            return Err(Refused::Conflict(why));
        }
        self.hubs.remove(Some(name));
        locked(&self.options).switch.retain(|switch| switch.name.as_deref() != Some(name));
        info!("the switch {name} is no more");
        Ok(())
    }

    /// Has its link up or down.
    pub fn set_link(&self, name: &str, up: bool) -> Result<Arc<Served>, Refused> {
        let _change = self.changes.begin()?;
        let served = self.find(name)?;
        let spec = PortSpec { link_down: !up, ..served.spec() };
        served.change(&spec).map_err(|e| conflict(&e))?;
        locked(&self.options).set_port(&spec);
        Ok(served)
    }

    /// Has its queues take nothing and answer nothing, or go on.
    pub fn set_paused(&self, name: &str, paused: bool) -> Result<Arc<Served>, Refused> {
        let _change = self.changes.begin()?;
        let served = self.find(name)?;
        served.set_paused(paused)?;
        Ok(served)
    }

    /// Moves a queue, or all of them, to a reactor.
    pub fn place(&self, name: &str, at: Placed) -> Result<Arc<Served>, Refused> {
        let _change = self.changes.begin()?;
        let served = self.find(name)?;
        served.place(self.engine(), at)?;
        Ok(served)
    }

    /// The limits of a port, or of an uplink.
    pub fn limits(&self, name: &str) -> Result<PortLimits, Refused> {
        match self.uplink(name) {
            Some(outer) => Ok(outer.spec.limits()),
            None => Ok(self.find(name)?.spec().limits()),
        }
    }

    /// Keeps a port, or an uplink, to other limits from now on.
    pub fn set_limits(&self, name: &str, limits: PortLimits) -> Result<PortLimits, Refused> {
        let _change = self.changes.begin()?;
        if let Some(outer) = self.uplink(name) {
            let new = outer.spec.with_limits(limits);
            outer.port.set_rules(&new);
            for spec in locked(&self.options).uplink.iter_mut().filter(|spec| **spec == outer.spec) {
                spec.clone_from(&new);
            }
            return Ok(limits);
        }
        let served = self.find(name)?;
        if served.of_hub().is_none_or(|port| port.hub.switch.is_none()) {
            return Err(Refused::Conflict(format!(
                "{name} is no port of a switch, and nothing else keeps packets to limits"
            )));
        }
        let spec = served.spec().with_limits(limits);
        served.change(&spec).map_err(|e| conflict(&e))?;
        locked(&self.options).set_port(&spec);
        Ok(limits)
    }

    /// The addresses that switches have learnt, with the names of their ports: of each switch its own.
    pub fn fdb(&self) -> Vec<(Arc<Hub>, Vec<Learnt>)> {
        let of = |hub: &Arc<Hub>| {
            let ports = hub.ports();
            let name = |entry: &Entry| ports.get(usize::from(entry.port.0)).map(|port| port.name.clone());
            let entries = hub.switch.as_ref()?.fdb().dump();
            let mut all: Vec<_> = entries.filter_map(|entry| Some((name(&entry)?, entry))).collect();
            all.sort_by_key(|(_, entry)| (entry.vid, entry.mac.0));
            Some((Arc::clone(hub), all))
        };
        self.hubs().iter().filter_map(of).collect()
    }

    /// How a switch is asked for now.
    pub fn switch(&self, hub: &Hub) -> Option<(SwitchSpec, u32)> {
        let options = locked(&self.options);
        let spec = options.switch.iter().find(|switch| switch.name == hub.name)?;
        Some((spec.clone(), options.ageing(spec)))
    }

    /// The capture that there is: its file, frames written and lost.
    pub fn capture(&self) -> Option<(PathBuf, u64, u64)> {
        locked(&self.captured).as_ref().map(|captured| captured.capture().counts())
    }

    /// Begins to capture what crosses all ports, or ends it.
    pub fn set_capture(&self, wish: Option<Wish>) -> Result<(), Refused> {
        let _change = self.changes.begin()?;
        let mut captured = locked(&self.captured);
        let engine = &self.setting.engine;
        let new = match wish {
            Some(_) if captured.is_some() => {
                return Err(Refused::Conflict("there is a capture already; end that first".into()));
            }
            Some(wish) => {
                let of_hub = |port: &HubPort| (port.hub.name.clone(), port.number);
                let uplinks = self.uplinks().into_iter().map(|o| (o.spec.name(), Some(of_hub(&o.port))));
                let ports = self.all().into_iter().map(|s| (s.name.clone(), s.of_hub().map(of_hub)));
                Some(Captured::begin(wish, ports.chain(uplinks)).map_err(|e| conflict(&e))?)
            }
            None => None,
        };
        for hub in self.hubs() {
            let done = match &new {
                Some(captured) => captured.witness(&hub, engine),
                None => Captured::nobody(&hub, engine),
            };
            done.map_err(|e| Refused::Conflict(e.to_string()))?;
        }
        for s in self.all().iter().filter(|s| s.of_hub().is_none()) {
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
            served.change(&spec).unwrap_or_else(|e| warn!("{e:#}"));
        }
        *locked(&self.options) = new;
        self.uplinks().iter().for_each(|outer| outer.port.set_rules(&outer.spec));
        info!("{} was read again", path.display());
    }

    /// Statistics as text.
    pub fn report(&self) -> String {
        let mut text: String = self.all().iter().map(|s| s.report()).collect();
        text.extend(self.uplinks().iter().map(Outer::report));
        if locked(&self.options).record_core_cycles {
            let ports: Vec<_> = self.hubs().iter().flat_map(|hub| hub.ports().to_vec()).collect();
            text += &cycles(self.setting.engine.stats().iter().map(|s| &**s), &ports);
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
        let captured = locked(&self.captured);
        self.hubs.add_reactor(self.engine(), cpu, &|hub| witness(captured.as_ref(), hub))?;
        Ok(())
    }

    fn retire(&self, number: usize) -> Result<(), Refused> {
        let _change = self.changes.begin()?;
        let engine = &self.setting.engine;
        let retiring = move_away(engine, engine.retire(number)?, || self.all())?;
        match self.hubs.leave(&retiring, engine) {
            Ok(()) => {
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
        locked(&self.options).run.poll = pacing;
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
        *options = saved(path, &options, &Reactors::of(self.engine())).map_err(|e| conflict(&e))?;
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
        self.setting.successor.expect_beside(options.http.api.as_deref()).map_err(|e| conflict(&e))
    }

    fn metrics(&self) -> String {
        metrics::text(self)
    }

    fn exports(&self) -> Vec<control::stats::Export> {
        metrics::views(self)
    }
}

/// Nothing has this name.
pub fn no_switch(name: &str) -> Refused {
    Refused::Missing(format!("there is no switch {name}; GET /v1/switches lists those there are"))
}

/// Who notes what crosses a hub, if there is a capture.
pub fn witness(captured: Option<&Captured>, hub: &Hub) -> Witness {
    captured.map(|captured| captured.one(hub)).unwrap_or_default()
}

/// What is there when a newer process takes over.
pub struct HandedOver(pub Arc<Ports>);

impl Estate for HandedOver {
    fn with(&self, give: &mut dyn FnMut(&[Lot])) -> io::Result<()> {
        let _change = self.0.changes.wait();
        let about = About::from(self.0.setting.plan);
        let served = self.0.all();
        expect_none_paused(&served)?;
        let lot = |s: &Arc<Served>| {
            takeover::lot(s.place.key(), &about, vec![], &s.server, Arc::clone(&s.device) as _)
        };
        let lots = served.iter().map(lot).collect::<Result<Vec<_>>>().map_err(io::Error::other)?;
        give(&lots);
        Ok(())
    }
}
