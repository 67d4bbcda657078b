//! Reactors and the queues on them, seen from the control side.

pub mod alarm;
mod mailbox;
pub mod pacing;
pub mod placement;
pub mod queue;
pub mod reactor;
pub mod station;
mod waker;

use std::io;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use crossbeam::channel::{Receiver, bounded};
use crossbeam::sync::WaitGroup;
use tracing::info;

use crate::confine::{self, Role};
use crate::device::QueueHandler;
use crate::memory::iotlb::Miss;
use crate::memory::log::QueueLog;
use crate::uring::FixedBuffers;
use mailbox::{Postbox, mailbox};
use pacing::Pacing;
use placement::{CpuList, pin_to, usable_cpus};
use queue::{MapChange, Queue};
pub use reactor::ReactorStats;
use reactor::{Message, NotifierChange, QueueId, Reactor};
use station::{Station, Waker};

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

struct ReactorHandle {
    postbox: Postbox<Message>,
    waker: Waker,
    queues: AtomicUsize,
    stats: Arc<ReactorStats>,
}

/// A set of reactors. Dropping it ends their threads once their queues have been stopped.
pub struct Engine {
    reactors: Vec<Arc<ReactorHandle>>,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

impl Engine {
    /// Starts the reactors.
    pub fn start(config: &EngineConfig) -> Result<Engine, EngineError> {
        let usable = usable_cpus().map_err(io::Error::from)?;
        if let Some(&cpu) = config.cpus.0.iter().find(|cpu| !usable.contains(cpu)) {
            return Err(EngineError::NoCpu { cpu, usable });
        }
        let cpus: Vec<Option<usize>> = match config.cpus.0.as_slice() {
            [] => vec![None],
            list => list.iter().copied().map(Some).collect(),
        };
        let mut engine = Engine { reactors: Vec::new(), threads: Mutex::default() };
        for cpu in cpus {
            engine.start_reactor(cpu, config)?;
        }
        Ok(engine)
    }

    fn start_reactor(&mut self, cpu: Option<usize>, config: &EngineConfig) -> io::Result<()> {
        let (postbox, mail) = mailbox()?;
        let waker = Waker::new(mail.shared_bell());
        let (index, own) = (self.reactors.len(), waker.clone());
        let stats = Arc::new(ReactorStats::default());
        let cycles = config.count_cycles.then(|| Arc::clone(&stats));
        let name: Arc<str> = cpu.map_or("reactor".into(), |cpu| format!("reactor-{cpu}").into());
        let (pacing, fixed) = (config.pacing, config.fixed_buffers);
        let (ready_tx, ready) = bounded(1);
        let thread = std::thread::Builder::new().name(name.to_string()).spawn(move || {
            let _guard = AbortOnPanic;
            // The ring belongs to the thread that made it, so it is made here.
            let made = cpu.map_or(Ok(()), |cpu| pin_to(cpu).map_err(io::Error::from));
            match made
                .and_then(|()| Reactor::new(Arc::clone(&name), index, (mail, own), pacing, fixed, cycles))
                .and_then(|reactor| confine::begin(Role::Reactor).map(|()| reactor))
            {
                Ok(mut reactor) => {
                    let _ = ready_tx.send(Ok(()));
                    reactor.run();
                }
                Err(e) => {
                    let _ = ready_tx.send(Err(e));
                }
            }
        })?;
        ready.recv().map_err(|_| io::Error::other("the reactor's thread ended"))??;
        info!("reactor on {}, {pacing:?}", cpu.map_or("any CPU".into(), |cpu| format!("CPU {cpu}")));
        self.threads.lock().unwrap_or_else(PoisonError::into_inner).push(thread);
        self.reactors.push(Arc::new(ReactorHandle { postbox, waker, queues: AtomicUsize::new(0), stats }));
        Ok(())
    }

    /// How many reactors there are.
    pub fn reactors(&self) -> usize {
        self.reactors.len()
    }

    /// The counters of each reactor.
    pub fn stats(&self) -> impl Iterator<Item = &ReactorStats> {
        self.reactors.iter().map(|r| &*r.stats)
    }

    /// What wakes reactor number `reactor`, counted round those there are.
    pub fn waker(&self, reactor: usize) -> Waker {
        self.reactors[reactor % self.reactors.len()].waker.clone()
    }

    /// Puts a station on reactor number `reactor`, counted round those there are.
    pub fn add_station(&self, reactor: usize, station: Box<dyn Station>) -> io::Result<RunningStation> {
        let reactor = &self.reactors[reactor % self.reactors.len()];
        let (tx, rx) = bounded(1);
        reactor.postbox.post(Message::AddStation { station, id: tx });
        let id = rx.recv().map_err(|_| gone())?;
        Ok(RunningStation { reactor: Arc::clone(reactor), id })
    }

    /// Moves a queue into reactor number `place`, counted round those there are, or the one that has the fewest.
    pub fn run_queue(
        &self,
        queue: Queue,
        handler: Box<dyn QueueHandler>,
        place: Option<usize>,
    ) -> io::Result<RunningQueue> {
        let reactor = match place {
            Some(place) => &self.reactors[place % self.reactors.len()],
            None => self.reactors.iter().min_by_key(|r| r.queues.load(Ordering::Relaxed)).ok_or_else(gone)?,
        };
        let (tx, rx) = bounded(1);
        reactor.queues.fetch_add(1, Ordering::Relaxed);
        reactor.postbox.post(Message::Start { queue: Box::new(queue), handler, id: tx });
        let id = rx.recv().map_err(|_| gone())?;
        Ok(RunningQueue { reactor: Arc::clone(reactor), id, stopped: false })
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        for reactor in &self.reactors {
            reactor.postbox.post(Message::Quit);
        }
        for thread in std::mem::take(&mut *self.threads.lock().unwrap_or_else(PoisonError::into_inner)) {
            // A panic has already ended the process.
            let _ = thread.join();
        }
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
        StoppingQueue { reactor: Arc::clone(&self.reactor), base }
    }

    /// Goes over to a new memory map.
    pub fn set_map(&self, change: MapChange) {
        self.reactor.postbox.post(Message::SetMap { id: self.id, change });
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
    base: Receiver<u32>,
}

impl StoppingQueue {
    /// Waits for the last request. Returns where to go on.
    pub fn wait(self) -> io::Result<u32> {
        let base = self.base.recv().map_err(|_| gone());
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
