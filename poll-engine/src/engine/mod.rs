//! Reactors and the queues on them, seen from the control side.

pub mod alarm;
mod mailbox;
pub mod pacing;
pub mod placement;
pub mod queue;
pub mod reactor;
pub mod station;
mod times;
mod waker;
pub mod wanted;

use std::io;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crossbeam::channel::{Receiver, bounded};
use crossbeam::sync::WaitGroup;
use tracing::info;

use crate::confine::{self, Role};
use crate::device::QueueHandler;
use crate::memory::iotlb::Miss;
use crate::memory::log::QueueLog;
use crate::memory::shortfall::{locked, memlock_limit};
use crate::stats::QueueStats;
use crate::uring::{FixedBuffers, locked_bytes};
use mailbox::{Postbox, mailbox};
use pacing::Pacing;
use placement::topology::{SYSFS, Topology};
use placement::{CpuList, pin_to, usable_cpus};
use queue::{MapChange, Queue};
pub use reactor::{Dormancy, ReactorStats};
use reactor::{Message, NotifierChange, QueueId, Reactor, URING_ENTRIES};
use station::{Station, Waker};
pub use times::Spent;
use times::Times;

/// How an engine is to be run.
#[derive(Clone, Debug, Default)]
pub struct EngineConfig {
    /// One reactor for each of these CPUs, pinned to it. Without any: one reactor, which runs where the kernel puts it.
    pub cpus: CpuList,
    /// How reactors wait.
    pub pacing: Pacing,
    /// Which guest memory is registered with io_uring.
    pub fixed_buffers: FixedBuffers,
    /// Whether reactors count the cycles of their rounds.
    pub count_cycles: bool,
    /// When rings that have nothing are left to their kicks.
    pub dormancy: Dormancy,
}

/// Why an engine does not start.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// A CPU that does not exist or that this process may not use.
    #[error("CPU {cpu} cannot be used; this process may run on {usable:?}")]
    NoCpu {
        /// The CPU asked for.
        cpu: usize,
        /// Those there are.
        usable: Vec<usize>,
    },
    /// The kernel refuses what a reactor needs.
    #[error("cannot start a reactor: {0} (io_uring needs Linux 5.13, and kernel.io_uring_disabled=0)")]
    Reactor(#[from] io::Error),
}

/// Why the set of reactors stays as it is.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum RetireError {
    /// No such one.
    #[error("there is no reactor {0}")]
    Unknown(usize),
    /// Somebody has to run the queues.
    #[error("it is the only reactor; add another one first")]
    Last,
}

/// What a reactor is, for people.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ReactorInfo {
    /// Its number, which no other one ever has.
    pub number: usize,
    /// The CPU it is pinned to.
    pub cpu: Option<usize>,
    /// How many queues run on it.
    pub queues: usize,
    /// How many of these have had nothing for a while, and are left to their kicks.
    pub dormant: usize,
    /// What it has spent its time on.
    pub spent: Spent,
}

/// Where a queue is to run, and how it begins.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct At {
    /// On the reactor of this number, if it is there still: somebody wants it there.
    pub reactor: Option<usize>,
    /// Else on this one, counted round those there are, which a device says that has places for its queues.
    pub place: Option<usize>,
    /// Else on the one that has the fewest queues of those on the first of these nodes that has any, or of all.
    pub near: [Option<usize>; 2],
    /// It takes nothing before [`RunningQueue::resume`].
    pub paused: bool,
}

struct ReactorHandle {
    number: usize,
    cpu: Option<usize>,
    node: Option<usize>,
    thread: Mutex<Option<JoinHandle<()>>>,
    postbox: Postbox<Message>,
    waker: Waker,
    queues: AtomicUsize,
    stats: Arc<ReactorStats>,
    times: Arc<Times>,
}

/// A set of reactors. Dropping it ends their threads once their queues have been stopped.
pub struct Engine {
    reactors: RwLock<Vec<Arc<ReactorHandle>>>,
    /// As the next reactor is to be; and its number.
    next: Mutex<(EngineConfig, usize)>,
    topology: Topology,
}

impl Engine {
    /// Starts the reactors.
    pub fn start(config: &EngineConfig) -> Result<Engine, EngineError> {
        expect_usable(&config.cpus.0)?;
        let cpus: Vec<Option<usize>> = match config.cpus.0.as_slice() {
            [] => vec![None],
            list => list.iter().copied().map(Some).collect(),
        };
        let next = Mutex::new((config.clone(), 0));
        // Now, while files may be opened.
        let engine = Engine { reactors: RwLock::default(), next, topology: Topology::read(SYSFS.as_ref()) };
        for cpu in cpus {
            engine.start_reactor(cpu, |_, _| Vec::new())?;
        }
        Ok(engine)
    }

    /// Starts a reactor more, pinned to this CPU if one is named: its number. Queues that start from now on may run there.
    pub fn add_reactor(&self, cpu: Option<usize>) -> Result<usize, EngineError> {
        expect_usable(cpu.as_slice())?;
        Ok(self.start_reactor(cpu, |_, _| Vec::new())?.0)
    }

    /// The same, with stations that are there before any queue: made of its number and what wakes it.
    pub fn add_reactor_with(
        &self,
        cpu: Option<usize>,
        stations: impl FnOnce(usize, Waker) -> Vec<Box<dyn Station>>,
    ) -> Result<(usize, Vec<RunningStation>), EngineError> {
        expect_usable(cpu.as_slice())?;
        Ok(self.start_reactor(cpu, stations)?)
    }

    fn start_reactor(
        &self,
        cpu: Option<usize>,
        stations: impl FnOnce(usize, Waker) -> Vec<Box<dyn Station>>,
    ) -> io::Result<(usize, Vec<RunningStation>)> {
        let (config, next) = &mut *self.next.lock().unwrap_or_else(PoisonError::into_inner);
        let index = *next;
        let (postbox, mail) = mailbox()?;
        let waker = Waker::new(mail.shared_bell());
        let own = waker.clone();
        let stats = Arc::new(ReactorStats::default());
        let times = Arc::new(Times::new());
        let own_times = Arc::clone(&times);
        let (own_config, own_stats) = (config.clone(), Arc::clone(&stats));
        let name: Arc<str> = cpu.map_or("reactor".into(), |cpu| format!("reactor-{cpu}").into());
        let pacing = config.pacing;
        let builder = std::thread::Builder::new().name(name.to_string());
        // The ring belongs to the thread that made it, so it is made there.
        let make = move || {
            let guard = AbortOnPanic;
            cpu.map_or(Ok(()), |cpu| pin_to(cpu).map_err(io::Error::from))?;
            let reactor = Reactor::new(name, index, (mail, own), &own_config, own_times, own_stats)?;
            Ok((guard, reactor))
        };
        let thread = confine::spawn_with(builder, Role::Reactor, make, |(_guard, mut reactor)| reactor.run())
            .map_err(|e| short_of_memory(e, config.cpus.0.len().max(index + 1)))?;
        info!("reactor on {}, {pacing:?}", cpu.map_or("any CPU".into(), |cpu| format!("CPU {cpu}")));
        let handle = Arc::new(ReactorHandle {
            number: index,
            cpu,
            node: cpu.and_then(|cpu| self.topology.node_of(cpu)),
            thread: Mutex::new(Some(thread)),
            postbox,
            waker,
            queues: AtomicUsize::new(0),
            stats,
            times,
        });
        let stations = stations(index, handle.waker.clone());
        let stations = stations.into_iter().map(|station| handle.run_station(station));
        let stations = stations.collect::<io::Result<_>>()?;
        self.reactors.write().unwrap_or_else(PoisonError::into_inner).push(handle);
        *next += 1;
        Ok((index, stations))
    }

    fn all(&self) -> Vec<Arc<ReactorHandle>> {
        self.reactors.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// That of this place, counted round those there are.
    fn at(&self, place: usize) -> Arc<ReactorHandle> {
        let all = self.reactors.read().unwrap_or_else(PoisonError::into_inner);
        Arc::clone(&all[place % all.len()])
    }

    /// How many reactors there are.
    pub fn reactors(&self) -> usize {
        self.all().len()
    }

    /// Whether there are reactors on several nodes, so that it matters which one a queue is on.
    pub fn spans_nodes(&self) -> bool {
        let all = self.reactors.read().unwrap_or_else(PoisonError::into_inner);
        all.windows(2).any(|pair| pair[0].node != pair[1].node)
    }

    /// The CPUs of the reactors that it began with.
    pub fn began_on(&self) -> CpuList {
        self.next.lock().unwrap_or_else(PoisonError::into_inner).0.cpus.clone()
    }

    /// What there is to say of each reactor.
    pub fn list(&self) -> Vec<ReactorInfo> {
        let info = |r: &Arc<ReactorHandle>| ReactorInfo {
            number: r.number,
            cpu: r.cpu,
            queues: r.queues.load(Ordering::Relaxed),
            dormant: r.stats.dormant.load(Ordering::Relaxed),
            spent: r.times.spent(),
        };
        self.all().iter().map(info).collect()
    }

    /// Whether every reactor gets round to its mailbox within `limit`. Wakes those that sleep.
    pub fn turns(&self, limit: Duration) -> bool {
        turn(&self.all(), limit)
    }

    /// The counters of each reactor.
    pub fn stats(&self) -> Vec<Arc<ReactorStats>> {
        self.all().iter().map(|r| Arc::clone(&r.stats)).collect()
    }

    /// How reactors wait.
    pub fn pacing(&self) -> Pacing {
        self.next.lock().unwrap_or_else(PoisonError::into_inner).0.pacing
    }

    /// Has all reactors wait in this way from now on.
    pub fn set_pacing(&self, pacing: Pacing) {
        // Held for both: a reactor that starts meanwhile has it from here, or from there.
        let next = &mut *self.next.lock().unwrap_or_else(PoisonError::into_inner);
        next.0.pacing = pacing;
        for reactor in self.all() {
            reactor.postbox.post(Message::SetPacing(pacing));
        }
    }

    /// Starts no queue on this reactor from now on. It ends with [`Retiring::finish`], when it has none left.
    pub fn retire(&self, number: usize) -> Result<Retiring, RetireError> {
        let mut all = self.reactors.write().unwrap_or_else(PoisonError::into_inner);
        let at = all.iter().position(|r| r.number == number).ok_or(RetireError::Unknown(number))?;
        if all.len() == 1 {
            return Err(RetireError::Last);
        }
        Ok(Retiring { reactor: all.remove(at) })
    }

    /// Takes one back that was to retire.
    pub fn keep(&self, retiring: Retiring) {
        let mut all = self.reactors.write().unwrap_or_else(PoisonError::into_inner);
        all.push(retiring.reactor);
        all.sort_by_key(|r| r.number);
    }

    /// What wakes reactor number `reactor`, counted round those there are.
    pub fn waker(&self, reactor: usize) -> Waker {
        self.at(reactor).waker.clone()
    }

    /// Puts a station on reactor number `reactor`, counted round those there are.
    pub fn add_station(&self, reactor: usize, station: Box<dyn Station>) -> io::Result<RunningStation> {
        self.at(reactor).run_station(station)
    }

    /// Moves a queue into reactor number `place`, counted round those there are, or the one that has the fewest.
    pub fn run_queue(
        &self,
        queue: Queue,
        handler: Box<dyn QueueHandler>,
        place: Option<usize>,
    ) -> io::Result<RunningQueue> {
        self.run_queue_at(queue, handler, At { place, ..At::default() })
    }

    /// As [`run_queue`](Self::run_queue), with more to say about it.
    pub fn run_queue_at(
        &self,
        queue: Queue,
        handler: Box<dyn QueueHandler>,
        At { place, reactor, near, paused }: At,
    ) -> io::Result<RunningQueue> {
        let reactor = {
            // Counted under the lock: one that retires knows of all queues that may still come.
            let all = self.reactors.read().unwrap_or_else(PoisonError::into_inner);
            let wished = all.iter().find(|r| Some(r.number) == reactor);
            let placed = || place.map(|place| &all[place % all.len()]);
            let idlest = |on: Option<usize>| {
                let on_it = all.iter().filter(|r| on.is_none() || r.node == on);
                on_it.min_by_key(|r| r.queues.load(Ordering::Relaxed))
            };
            let nearest = || near.iter().flatten().find_map(|node| idlest(Some(*node)));
            let chosen = wished.or_else(placed).or_else(nearest).or_else(|| idlest(None)).ok_or_else(gone)?;
            chosen.queues.fetch_add(1, Ordering::Relaxed);
            Arc::clone(chosen)
        };
        let (tx, rx) = bounded(1);
        let stats = queue.shared_stats();
        reactor.postbox.post(Message::Start { queue: Box::new(queue), handler, paused, id: tx });
        let id = rx.recv().map_err(|_| gone())?;
        stats.runs_on(Some(reactor.number));
        Ok(RunningQueue { reactor, id, stats, stopped: false })
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        let all = self.all();
        for reactor in &all {
            reactor.postbox.post(Message::Quit);
        }
        for reactor in &all {
            reactor.join();
        }
    }
}

fn turn(reactors: &[Arc<ReactorHandle>], limit: Duration) -> bool {
    let until = Instant::now() + limit;
    let (tell, heard) = bounded(reactors.len());
    for reactor in reactors {
        reactor.postbox.post(Message::Turn(tell.clone()));
    }
    reactors.iter().all(|_| heard.recv_deadline(until).is_ok())
}

impl ReactorHandle {
    fn run_station(self: &Arc<Self>, station: Box<dyn Station>) -> io::Result<RunningStation> {
        let (tx, rx) = bounded(1);
        self.postbox.post(Message::AddStation { station, id: tx });
        let id = rx.recv().map_err(|_| gone())?;
        Ok(RunningStation { reactor: Arc::clone(self), id })
    }

    /// Waits for its end, after it was told to quit.
    fn join(&self) {
        let thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take();
        // A panic has already ended the process.
        thread.map(JoinHandle::join);
    }
}

/// A reactor on its way out.
pub struct Retiring {
    reactor: Arc<ReactorHandle>,
}

impl Retiring {
    /// Its number.
    pub fn number(&self) -> usize {
        self.reactor.number
    }

    /// How many queues it has yet. None can come any more.
    pub fn queues(&self) -> usize {
        self.reactor.queues.load(Ordering::Relaxed)
    }

    /// Whether it gets round to its mailbox within `limit`.
    pub fn turns(&self, limit: Duration) -> bool {
        turn(std::slice::from_ref(&self.reactor), limit)
    }

    /// Ends it, once its queues and stations are gone.
    pub fn finish(self) {
        self.reactor.postbox.post(Message::Quit);
        self.reactor.join();
        info!("reactor {} has ended", self.reactor.number);
    }
}

fn expect_usable(cpus: &[usize]) -> Result<(), EngineError> {
    let usable = usable_cpus().map_err(io::Error::from)?;
    match cpus.iter().find(|cpu| !usable.contains(cpu)) {
        Some(&cpu) => Err(EngineError::NoCpu { cpu, usable }),
        None => Ok(()),
    }
}

/// With what `reactors` reactors need, if it is that.
fn short_of_memory(error: io::Error, reactors: usize) -> io::Error {
    match error.raw_os_error() {
        Some(libc::ENOMEM) => {
            let needed = reactors as u64 * locked_bytes(URING_ENTRIES);
            io::Error::new(error.kind(), format!("{error}; {}", locked(needed, memlock_limit())))
        }
        _ => error,
    }
}

fn gone() -> io::Error {
    io::Error::other("the reactor is gone")
}

/// The control side's handle of a station. Dropping it ends the station, and returns once it is gone.
pub struct RunningStation {
    reactor: Arc<ReactorHandle>,
    id: QueueId,
}

impl Drop for RunningStation {
    fn drop(&mut self) {
        let gone = WaitGroup::new();
        self.reactor.postbox.post(Message::RemoveStation { id: self.id, gone: gone.clone() });
        gone.wait();
    }
}

/// The control side's handle of a queue that runs. Dropping it stops the queue.
pub struct RunningQueue {
    reactor: Arc<ReactorHandle>,
    id: QueueId,
    stats: Arc<QueueStats>,
    stopped: bool,
}

impl RunningQueue {
    /// Stops the queue: no more chains are taken, those in flight are finished. Returns where to go on.
    pub fn stop(self) -> io::Result<u32> {
        self.begin_stop().wait()
    }

    /// Begins to stop the queue, so that several can finish at once.
    pub fn begin_stop(mut self) -> StoppingQueue {
        self.post_stop()
    }

    fn post_stop(&mut self) -> StoppingQueue {
        self.stopped = true;
        let (tx, base) = bounded(1);
        self.reactor.postbox.post(Message::Stop { id: self.id, base: tx });
        StoppingQueue { reactor: Arc::clone(&self.reactor), stats: Arc::clone(&self.stats), base }
    }

    /// Goes over to a new memory map.
    pub fn set_map(&self, change: MapChange) {
        self.reactor.postbox.post(Message::SetMap { id: self.id, change });
    }

    /// Takes no more requests before [`resume`](Self::resume). `paused` is dropped once those in flight are finished.
    pub fn pause(&self, paused: WaitGroup) {
        self.reactor.postbox.post(Message::Pause { id: self.id, paused });
    }

    /// Takes requests again.
    pub fn resume(&self) {
        self.reactor.postbox.post(Message::Resume { id: self.id });
    }

    /// Takes no more requests, finishes those in flight, and leaves the ring alone until
    /// [`set_map`](Self::set_map) says where it is. `parked` is dropped once that is so.
    pub fn park(&self, parked: WaitGroup) {
        self.reactor.postbox.post(Message::Park { id: self.id, parked });
    }

    /// The front end refuses to translate this, or (`None`) the ring's addresses: breaks the queue if it waits for that.
    pub fn refuse(&self, miss: Option<Miss>) {
        self.reactor.postbox.post(Message::Refuse { id: self.id, miss });
    }

    /// Tells a dirty log what the queue writes from now on, or nobody. `adopted` is dropped once that is so.
    pub fn set_log(&self, log: Option<QueueLog>, adopted: WaitGroup) {
        self.reactor.postbox.post(Message::SetLog { id: self.id, log, adopted });
    }

    /// Replaces an event descriptor.
    pub fn set_notifier(&self, change: NotifierChange) {
        self.reactor.postbox.post(Message::SetNotifier { id: self.id, change });
    }
}

impl Drop for RunningQueue {
    fn drop(&mut self) {
        if !self.stopped {
            // Only its base is lost, and nobody asked for that.
            let _ = self.post_stop().wait();
        }
    }
}

/// A queue that finishes what is in flight.
pub struct StoppingQueue {
    reactor: Arc<ReactorHandle>,
    stats: Arc<QueueStats>,
    base: Receiver<u32>,
}

impl StoppingQueue {
    /// Waits for the last request. Returns where to go on.
    pub fn wait(self) -> io::Result<u32> {
        let base = self.base.recv().map_err(|_| gone());
        self.stats.runs_on(None);
        self.reactor.queues.fetch_sub(1, Ordering::Relaxed);
        base
    }
}

/// A reactor that panics holds guests' requests it can no longer answer; a supervisor restarts a process that died,
/// not one that hangs.
struct AbortOnPanic;

impl Drop for AbortOnPanic {
    fn drop(&mut self) {
        if std::thread::panicking() {
            std::process::abort();
        }
    }
}
