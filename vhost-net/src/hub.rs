//! What joins ports: the ports themselves, and the way to the shard on each reactor that moves their packets.

use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use poll_engine::clock::Clock;
use poll_engine::device::QueueHandler;
use poll_engine::engine::Engine;
use poll_engine::engine::queue::Queue;
use poll_engine::engine::reactor::Io;

use crate::outside::News;
use crate::seats::{Change, MAX_REACTORS, Seats};
use crate::stats::PairStats;
use crate::steering::Steering;
use crate::switch::fdb::MAX_PORTS;
use crate::switch::{PortConfig, PortId, Switch};

/// For how long packets wait for a port that has them wait, while its receive queues have stopped or have not come yet: as
/// long as its front end takes to come back (QEMU's `reconnect=1`).
pub const PATIENCE: Duration = Duration::from_secs(2);

/// Where packets of a port go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Plan {
    /// Back to where they came from, with the MAC addresses swapped.
    Echo,
    /// Nowhere.
    Discard,
    /// Nowhere, while packets of this many bytes come from nowhere as fast as the guest takes them: each queue's are numbered
    /// behind their Ethernet headers, so that it can be seen whether all have come, and in order.
    Generate(u16),
    /// To the other one of two ports.
    Wire,
    /// To where the hub's switch says.
    Switch,
}

impl Plan {
    /// What a port is joined to by it.
    pub fn name(self) -> &'static str {
        match self {
            Plan::Switch => "switch",
            Plan::Wire => "wire",
            Plan::Echo | Plan::Discard | Plan::Generate(_) => "loopback",
        }
    }
}

/// One port of a hub: what the device says of it and what is counted.
#[derive(Debug)]
pub struct Port {
    /// For people.
    pub name: String,
    /// Its own: another port that has its number later has another one.
    pub(crate) serial: u64,
    /// One for each pair of queues.
    pub pairs: Vec<PairStats>,
    /// Whether the link is up, as the administrator has it.
    pub link: AtomicBool,
    /// Reactors that have a receive queue of it, the bit of each one's seat.
    pub(crate) places: AtomicU64,
    /// Queues that run.
    pub running: AtomicUsize,
    /// They stop, to be started again at once: the switch is not to take its guest for gone.
    returns: AtomicBool,
    /// The seat of the reactor that has, or last had, each receive queue of it.
    pub(crate) homes: Vec<AtomicUsize>,
    /// What its driver has asked for through the control queue.
    steering: Mutex<Arc<Steering>>,
    /// A packet waits for buffers of its receiver, and those behind it wait with it; otherwise it is dropped.
    pub waits: bool,
    /// When packets no longer wait for its receive queues, of the hub's clock.
    expected_until: AtomicU64,
}

/// The next port's.
static SERIAL: AtomicU64 = AtomicU64::new(0);

impl Port {
    /// One whose link is up and whose guest is not there.
    pub fn new(name: String, pairs: u16, waits: bool) -> Port {
        let homes = std::iter::repeat_with(Default::default).take(pairs.into()).collect();
        let pairs = std::iter::repeat_with(Default::default).take(pairs.into()).collect();
        Port {
            name,
            serial: SERIAL.fetch_add(1, Ordering::Relaxed),
            pairs,
            homes,
            steering: Mutex::default(),
            link: AtomicBool::new(true),
            places: AtomicU64::new(0),
            running: AtomicUsize::new(0),
            returns: AtomicBool::new(false),
            waits,
            // As long as nobody has come.
            expected_until: AtomicU64::new(if waits { u64::MAX } else { 0 }),
        }
    }

    /// Counts a packet of that pair of its sender's that came to a reactor which its queue had left.
    pub(crate) fn miss_rx(&self, pair: usize) {
        self.pairs[pair % self.pairs.len()].miss_rx();
    }

    /// In which way packets go to its guest.
    pub(crate) fn steering(&self) -> Arc<Steering> {
        Arc::clone(&self.steering.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// That of an uplink on the reactor at this seat, down until it is seen to be up.
    pub fn uplink(name: String, reactor: usize) -> Port {
        let port = Port::new(name, 1, false);
        port.link.store(false, Ordering::Relaxed);
        port.running.store(1, Ordering::Relaxed);
        port.places.store(1 << reactor, Ordering::Relaxed);
        port
    }
}

/// By their numbers.
#[derive(Debug)]
struct Ports {
    /// Those that were removed stay until another one comes in their place.
    all: Arc<[Arc<Port>]>,
    /// Numbers of those that were removed.
    free: Vec<usize>,
}

/// Why a port, or a reactor, neither comes nor goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HubError {
    /// There are as many as there can be.
    #[error("there are {MAX_PORTS} ports, and there is no room for more")]
    Full,
    /// There are as many reactors as there can be.
    #[error("there are {MAX_REACTORS} reactors, and ports are joined on no more than that")]
    NoSeat,
    /// A reactor would not hear of it.
    #[error("a reactor does not turn; see what keeps it")]
    Stuck,
}

/// How long a reactor may take to hear of a port.
pub(crate) const HEARING: Duration = Duration::from_secs(10);

/// Ports, what is done with their packets, and the shards that do it. Nothing goes from one hub to another.
#[derive(Debug)]
pub struct Hub {
    /// The name of its switch, if that has one.
    pub name: Option<String>,
    /// The number of its uplink, if there is one.
    pub uplink: Option<u16>,
    /// Features that cards of its ports do not offer.
    pub withheld: u64,
    /// What is done with packets.
    pub plan: Plan,
    ports: Mutex<Ports>,
    /// With [`Plan::Switch`]: its ports are those, by the same numbers.
    pub switch: Option<Arc<Switch>>,
    clock: Clock,
    start: u64,
    patience: u64,
    /// A queue has run.
    begun: AtomicBool,
    /// There may be ports that are [expected](Hub::expects).
    pub(crate) expecting: AtomicBool,
    pub(crate) seats: Mutex<Seats>,
    /// Whoever announces a station, one at a time.
    pub(crate) announcing: Mutex<()>,
    /// Of the uplink, if there is one.
    pub outside: News,
}

impl Hub {
    /// Joins `ports` as `plan` says, on so many reactors.
    pub fn new(plan: Plan, ports: Vec<Arc<Port>>, reactors: usize) -> Hub {
        let (clock, seats) = (Clock::new(), Mutex::new(Seats::new(reactors)));
        let (announcing, outside) = (Mutex::default(), News::default());
        let (start, patience, begun) = (clock.raw(), PATIENCE.as_nanos() as u64, AtomicBool::new(false));
        let expecting = AtomicBool::new(ports.iter().any(|port| port.waits));
        let ports = Mutex::new(Ports { all: ports.into(), free: Vec::new() });
        Hub {
            name: None,
            uplink: None,
            withheld: 0,
            plan,
            ports,
            switch: None,
            clock,
            start,
            patience,
            begun,
            expecting,
            seats,
            announcing,
            outside,
        }
    }

    /// Joins `ports` by a switch that has the same ones, of as many shards as there are reactors.
    pub fn switched(switch: Arc<Switch>, ports: Vec<Arc<Port>>, reactors: usize) -> Hub {
        let hub = Hub { switch: Some(switch), ..Hub::new(Plan::Switch, ports, reactors) };
        // Those that are expected get what goes to many.
        hub.look_at_those_that_wait();
        hub
    }

    /// With another [`PATIENCE`].
    #[must_use]
    pub fn patient(mut self, patience: Duration) -> Hub {
        self.patience = patience.as_nanos() as u64;
        self
    }

    /// The ports, those that were removed included.
    pub fn ports(&self) -> Arc<[Arc<Port>]> {
        Arc::clone(&self.slots().all)
    }

    /// The port of this number.
    ///
    /// # Panics
    /// If there never was one.
    pub fn port(&self, at: usize) -> Arc<Port> {
        Arc::clone(&self.slots().all[at])
    }

    fn slots(&self) -> MutexGuard<'_, Ports> {
        self.ports.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Joins one more port, with these rules of the switch: its number. When it returns, all reactors know of it, so that its
    /// queues may start.
    pub fn add_port(&self, port: Port, rules: PortConfig, engine: &Engine) -> Result<usize, HubError> {
        let waits = port.waits;
        let at = {
            let mut slots = self.slots();
            let at = slots.free.pop().unwrap_or(slots.all.len());
            if at == MAX_PORTS {
                return Err(HubError::Full);
            }
            let mut all = slots.all.to_vec();
            match all.get_mut(at) {
                Some(slot) => *slot = port.into(),
                None => all.push(port.into()),
            }
            slots.all = all.into();
            if let Some(switch) = &self.switch {
                switch.put(PortId(at as u16), rules);
            }
            at
        };
        self.tell_all(Change::Ports);
        // A round that has not heard of it yet would find its address, and not the port.
        if !engine.turns(HEARING) {
            self.remove_port(at, engine)?;
            return Err(HubError::Stuck);
        }
        if waits {
            self.expecting.store(true, Ordering::SeqCst);
            self.look_at_link(at);
        }
        Ok(at)
    }

    /// A port, whose queues have stopped, is not there any more. Its number is another one's when no reactor can mean it.
    pub fn remove_port(&self, at: usize, engine: &Engine) -> Result<(), HubError> {
        self.port(at).link.store(false, Ordering::SeqCst);
        if let Some(switch) = &self.switch {
            switch.remove(PortId(at as u16));
        }
        if !engine.turns(HEARING) {
            return Err(HubError::Stuck);
        }
        self.slots().free.push(at);
        Ok(())
    }

    /// Nanoseconds since the ports were joined: the time of all shards.
    #[inline]
    pub fn now(&self) -> u64 {
        self.clock.delta_as_nanos(self.start, self.clock.raw())
    }

    /// Has a port's link up or down, as the administrator wants it.
    pub fn set_link(&self, port: usize, up: bool) {
        self.port(port).link.store(up, Ordering::SeqCst);
        self.look_at_link(port);
    }

    /// Stops a port's queues and starts them again, which the switch is not to take for a guest that leaves.
    pub fn while_restarting<T>(&self, port: usize, restart: impl FnOnce() -> T) -> T {
        let own = self.port(port);
        own.returns.store(true, Ordering::SeqCst);
        let done = restart();
        own.returns.store(false, Ordering::SeqCst);
        self.look_at_link(port);
        done
    }

    /// Has a port of the switch be something else from now on.
    pub fn set_rules(&self, port: usize, config: PortConfig) {
        let Some(switch) = &self.switch else { return };
        switch.set_rules(PortId(port as u16), config);
        // Found before the next packet is moved, so that nobody need be woken.
        self.tell_all(Change::Rules);
    }

    /// Has packets for a port go to its guest in this way, from the next one on.
    pub fn steer(&self, port: usize, steering: Steering) {
        *self.port(port).steering.lock().unwrap_or_else(PoisonError::into_inner) = Arc::new(steering);
        self.tell_all(Change::Steering(port));
    }

    /// No packet longer than this (without Ethernet header and tags) goes to a port of the switch.
    pub fn set_mtu(&self, port: usize, mtu: u32) {
        if let Some(switch) = &self.switch {
            let rules = switch.rules(PortId(port as u16));
            if rules.mtu != mtu {
                self.set_rules(port, PortConfig { mtu, ..rules });
            }
        }
    }

    /// Whether packets for a port wait for its receive queues, of which none is there.
    pub(crate) fn expects(&self, port: &Port) -> bool {
        let is_missing = port.waits && port.places.load(Ordering::Relaxed) == 0;
        is_missing && port.link.load(Ordering::Relaxed) && self.may_come(port)
    }

    fn may_come(&self, port: &Port) -> bool {
        self.now() < port.expected_until.load(Ordering::SeqCst)
    }

    /// A port's last receive queue has stopped.
    pub(crate) fn miss(&self, port: &Port) {
        if port.waits {
            port.expected_until.store(self.now() + self.patience, Ordering::SeqCst);
            self.expecting.store(true, Ordering::SeqCst);
        }
    }

    /// A queue runs: the others are expected from now on.
    fn begin(&self) {
        if !self.begun.swap(true, Ordering::SeqCst) {
            self.ports().iter().for_each(|port| self.miss(port));
        }
    }

    /// When to look again whether ports that were expected are up, if there are such.
    pub(crate) fn next_look(&self) -> Option<u64> {
        self.ports().iter().any(|port| port.waits).then(|| self.now() + self.patience)
    }

    /// Looks whether they are.
    #[cold]
    pub(crate) fn look_again(&self) {
        self.expecting.store(false, Ordering::SeqCst);
        if self.look_at_those_that_wait() {
            self.expecting.store(true, Ordering::SeqCst);
        }
    }

    /// Whether one of them may still come.
    fn look_at_those_that_wait(&self) -> bool {
        let mut may_come = false;
        for (at, port) in self.ports().iter().enumerate().filter(|(_, port)| port.waits) {
            self.look_at_link(at);
            may_come |= self.may_come(port);
        }
        may_come
    }

    /// A switch's port is up when its link is and its guest is there, or expected.
    fn look_at_link(&self, at: usize) {
        let Some(switch) = &self.switch else { return };
        let (port, id) = (self.port(at), PortId(at as u16));
        let runs = || port.running.load(Ordering::SeqCst) > 0 || port.returns.load(Ordering::SeqCst);
        let is_there = || runs() || self.may_come(&port);
        let is_up = || port.link.load(Ordering::SeqCst) && is_there();
        // Another thread may have changed it while this one said what it was.
        loop {
            let up = is_up();
            switch.set_link(id, up);
            if up == is_up() {
                return;
            }
        }
    }
}

/// The handler of a queue whose chains a shard moves: it tells the shard of the queue, and has nothing else to do.
pub(crate) struct Member {
    pub(crate) hub: Arc<Hub>,
    pub(crate) port: usize,
    pub(crate) own: Arc<Port>,
    pub(crate) index: u16,
    pub(crate) features: u64,
}

impl QueueHandler for Member {
    fn attach(&mut self, io: &mut Io<'_>) {
        let Member { port, index, features, .. } = *self;
        self.hub.begin();
        self.hub.seat_on(io.reactor()).inbox.put(Change::Up { port, index, id: io.id(), features });
        if self.own.running.fetch_add(1, Ordering::SeqCst) == 0 {
            self.hub.look_at_link(port);
        }
    }

    fn poll(&mut self, _: &mut Queue, _: &mut Io<'_>) -> usize {
        0
    }

    fn complete(&mut self, _: &mut Queue, _: &mut Io<'_>, _: u32, _: i32) {}

    fn detach(&mut self, io: &mut Io<'_>) {
        let Member { port, index, .. } = *self;
        self.hub.seat_on(io.reactor()).inbox.put(Change::Down { port, index });
        if self.own.running.fetch_sub(1, Ordering::SeqCst) == 1 {
            self.hub.miss(&self.own);
            self.hub.look_at_link(port);
        }
    }

    /// The shard says what it waits for.
    fn wants_chains(&self) -> bool {
        false
    }
}
