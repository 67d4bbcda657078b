//! A reactor: one thread, one io_uring, any number of queues. It polls, submits, reaps, publishes, and sleeps when
//! its pacing says so. Nothing else ever touches a ring that runs here.

mod dormant;

use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::sync::atomic::AtomicUsize;
use std::time::Duration;

use crossbeam::channel::Sender;
use crossbeam::sync::WaitGroup;
use tracing::{debug, warn};

pub use dormant::Dormancy;
use dormant::Sweep;

use super::EngineConfig;
use super::mailbox::Mailbox;
use super::pacing::{Pacer, Pacing};
use super::queue::{MapChange, Queue};
use super::station::{Queues, Station, Waker};
use super::times::Times;
use crate::clock::Clock;
use crate::device::QueueHandler;
use crate::fault_point;
use crate::memory::fault::faults;
use crate::memory::iotlb::Miss;
use crate::memory::log::QueueLog;
use crate::probes;
use crate::stats::{Counter, ErrorKind};
use crate::uring::{Completion, FixedBuffers, Uring};

/// Submission entries; completions have four times as many.
pub(super) const URING_ENTRIES: u32 = 1024;

/// How often rings are looked at before the mailbox and the kernel are, while nothing is in flight.
const MAX_LOOKS: u32 = 8;
/// Most rounds, and most submissions, that may wait for more where CPU time is to be saved.
const MAX_HELD_ROUNDS: u32 = 8;
const MAX_HELD: u32 = 32;

/// How long a reactor may sleep while it has a queue that no kick descriptor can wake it for: a few interrupts' time,
/// and long against the microseconds that a look at the rings takes.
const NAP: Duration = Duration::from_micros(100);

/// A queue's (or a station's) place on its reactor. It is never that of another one before very many have come and gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QueueId {
    pub(super) slot: u16,
    generation: u16,
}

/// What control threads can ask of a reactor.
pub(super) enum Message {
    /// Run this queue from now on.
    Start { queue: Box<Queue>, handler: Box<dyn QueueHandler>, paused: bool, id: Sender<QueueId> },
    /// Take no more chains, finish what is in flight, answer with the base and let the queue go.
    Stop { id: QueueId, base: Sender<u32> },
    /// Go over to a new memory map.
    SetMap { id: QueueId, change: MapChange },
    /// Take no more chains for now, finish what is in flight, and let `paused` go.
    Pause { id: QueueId, paused: WaitGroup },
    /// Take chains again.
    Resume { id: QueueId },
    /// Wait in this way from now on.
    SetPacing(Pacing),
    /// Take no more chains, finish what is in flight, and leave the ring alone until a map comes that has it.
    Park { id: QueueId, parked: WaitGroup },
    /// The front end has no translation for this, or (`None`) for the ring.
    Refuse { id: QueueId, miss: Option<Miss> },
    /// Tell a dirty log what is written from now on, or nobody, and let `adopted` go.
    SetLog { id: QueueId, log: Option<QueueLog>, adopted: WaitGroup },
    /// Replace one of the event descriptors.
    SetNotifier { id: QueueId, change: NotifierChange },
    /// Poll this station from now on.
    AddStation { station: Box<dyn Station>, id: Sender<QueueId> },
    /// Let this station go once nothing of its own is in flight.
    RemoveStation { id: QueueId, gone: WaitGroup },
    /// Say that it turns.
    Turn(Sender<()>),
    /// Leave, once no queue is left.
    Quit,
}

/// A new event descriptor for a running queue.
#[derive(Debug)]
pub enum NotifierChange {
    /// To be signalled when chains were used.
    Call(Option<std::os::fd::OwnedFd>),
    /// To be signalled when the queue breaks.
    Err(Option<std::os::fd::OwnedFd>),
}

/// What a completion belongs to: packed into the 64 bits io_uring carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
enum Purpose {
    Handler = 0,
    Kick = 1,
    Signal = 2,
    Bell = 3,
    Cancel = 4,
    Station = 5,
}

fn label(purpose: Purpose, id: QueueId, tag: u32) -> u64 {
    (purpose as u64) << 60
        | u64::from(id.generation & 0xfff) << 48
        | u64::from(id.slot) << 32
        | u64::from(tag)
}

fn unlabel(user_data: u64) -> (u8, QueueId, u32) {
    let id = QueueId { slot: (user_data >> 32) as u16, generation: (user_data >> 48) as u16 & 0xfff };
    ((user_data >> 60) as u8, id, user_data as u32)
}

/// A handler's way into the kernel.
pub struct Io<'a> {
    uring: &'a mut Uring,
    id: QueueId,
    purpose: Purpose,
    reactor: usize,
}

impl<'a> Io<'a> {
    /// Without a reactor, for driving a handler by hand where it is measured: completions go nowhere.
    pub fn alone(uring: &'a mut Uring) -> Io<'a> {
        Io { uring, id: NOBODY, purpose: Purpose::Handler, reactor: 0 }
    }

    /// The queue whose handler this is for; or the station.
    #[inline]
    pub fn id(&self) -> QueueId {
        self.id
    }

    /// The number of this reactor.
    #[inline]
    pub fn reactor(&self) -> usize {
        self.reactor
    }

    /// The reactor's io_uring, for registering files and finding registered memory.
    #[inline]
    pub fn uring(&mut self) -> &mut Uring {
        self.uring
    }

    /// The label of the handler's (or station's) operation `tag`: its completion comes back to
    /// [`QueueHandler::complete`] (or [`Station::complete`]) with this tag.
    #[inline]
    pub fn label(&self, tag: u32) -> u64 {
        label(self.purpose, self.id, tag)
    }

    pub(super) fn signal(&mut self, fd: BorrowedFd<'_>, tag: u32) {
        self.uring.signal(fd, label(Purpose::Signal, self.id, tag));
    }

    /// Ends a signal that is under way.
    pub(super) fn cancel_signal(&mut self, tag: u32) {
        self.uring.cancel(label(Purpose::Signal, self.id, tag), label(Purpose::Cancel, self.id, tag));
    }
}

#[allow(clippy::struct_excessive_bools)] // each of its own meaning
pub(super) struct Task {
    pub(super) id: QueueId,
    queue: Box<Queue>,
    handler: Box<dyn QueueHandler>,
    /// Set when asked to stop: who waits for the base.
    stopping: Option<Sender<u32>>,
    /// Set when asked to leave the ring alone: who waits for that.
    parking: Option<WaitGroup>,
    /// Is to take nothing for now, unless it is to stop; and who waits for that.
    paused: bool,
    pausing: Option<WaitGroup>,
    /// Takes nothing, for one of these reasons: kept up to date by [`settle`](Self::settle).
    rests: bool,
    watching_kick: bool,
    reported: bool,
    /// Has completed chains to publish after reaping.
    reaped: bool,
    /// A station has had its hands on the queue in this round.
    touched: bool,
    /// Had something since the last search for those that have not.
    worked: bool,
    /// A station waits for chains of this queue.
    pub(super) wanted: bool,
}

impl Task {
    /// Nothing more to wait for: stopped, and the last request is back.
    fn is_done(&self) -> bool {
        self.stopping.is_some() && self.queue.in_flight() == 0 && !self.queue.has_resubmits()
    }

    /// Is to stop, and its handler does not know when it will have a use for what an earlier back end had begun.
    fn waits_idly(&self) -> bool {
        let idle = self.stopping.is_some() && !self.handler.wants_chains();
        idle && self.queue.in_flight() == 0 && self.queue.has_resubmits()
    }

    /// The queue, for a station; one that is to take chains only if the queue may.
    #[inline]
    pub(super) fn touch(&mut self, takes: bool) -> Option<&mut Queue> {
        if takes && !self.polls() {
            return None;
        }
        self.touched = true;
        Some(&mut self.queue)
    }

    /// Whether chains of the driver are to wake a reactor that sleeps.
    fn waits_for_chains(&self) -> bool {
        self.wanted || self.handler.wants_chains() || self.queue.has_resubmits()
    }

    /// One that is to stop takes nothing new, but what an earlier back end had begun is as good as in flight.
    fn polls(&self) -> bool {
        let takes = self.stopping.is_none() || self.queue.has_resubmits();
        takes && !self.rests && self.queue.is_running()
    }

    /// Takes nothing for now, and will again.
    pub(super) fn only_rests(&self) -> bool {
        self.rests && self.stopping.is_none() && self.queue.is_running()
    }

    /// To be called when it was told to stop, to park, to pause, or to go on.
    fn settle(&mut self) {
        self.rests = self.parking.is_some() || self.paused && self.stopping.is_none();
    }
}

const NOBODY: QueueId = QueueId { slot: 0, generation: 0 };

/// The way into the kernel of one that lives here.
fn io(uring: &mut Uring, purpose: Purpose, id: QueueId, reactor: usize) -> Io<'_> {
    Io { uring, id, purpose, reactor }
}

/// What a reactor has done.
#[derive(Debug, Default)]
pub struct ReactorStats {
    /// Rounds in which there was work, if that was to be counted.
    pub busy_rounds: Counter,
    /// Cycles of the time-stamp counter that these took, each from the look at the rings that found it.
    pub busy_cycles: Counter,
    /// How many of its queues are left to their kicks now.
    pub(super) dormant: AtomicUsize,
}

struct Stationed {
    station: Box<dyn Station>,
    id: QueueId,
    /// Set when it is to leave: who waits for that.
    leaving: Option<WaitGroup>,
}

/// The thread's state.
pub(super) struct Reactor {
    name: Arc<str>,
    index: usize,
    waker: Waker,
    stations: Vec<Stationed>,
    uring: Uring,
    mailbox: Mailbox<Message>,
    /// The first `polled` are looked at in every round, the others are dormant.
    tasks: Vec<Task>,
    polled: usize,
    sweep: Sweep,
    /// Slot of the id to position in `tasks`.
    places: Vec<Option<usize>>,
    generation: u16,
    pacer: Pacer,
    fixed: FixedBuffers,
    completions: Vec<Completion>,
    watching_bell: bool,
    /// Rounds since the last submit.
    held_back: u32,
    /// Memory faults caught, as last looked at.
    seen_faults: usize,
    stats: Arc<ReactorStats>,
    cycles: Option<Clock>,
    /// When the last look at the rings began, of that clock.
    looked: u64,
    quitting: bool,
    /// Answers owed to control threads that wait for requests to be over.
    awaited: usize,
}

impl Reactor {
    pub(super) fn new(
        name: Arc<str>,
        index: usize,
        (mailbox, waker): (Mailbox<Message>, Waker),
        config: &EngineConfig,
        times: Arc<Times>,
        stats: Arc<ReactorStats>,
    ) -> std::io::Result<Reactor> {
        Ok(Reactor {
            name,
            index,
            waker,
            stations: Vec::new(),
            uring: Uring::new(URING_ENTRIES)?,
            mailbox,
            tasks: Vec::new(),
            polled: 0,
            sweep: Sweep::new(config.dormancy),
            places: Vec::new(),
            generation: 0,
            pacer: Pacer::new(config.pacing, times),
            fixed: config.fixed_buffers,
            completions: Vec::with_capacity(4 * URING_ENTRIES as usize),
            watching_bell: false,
            held_back: 0,
            seen_faults: 0,
            stats,
            cycles: config.count_cycles.then(Clock::new),
            looked: 0,
            quitting: false,
            awaited: 0,
        })
    }

    /// Runs until told to quit.
    pub(super) fn run(&mut self) {
        fault_point::hijack_reactor(&mut self.uring);
        loop {
            if self.mailbox.has_mail() {
                self.read_mail();
            }
            if self.quitting && self.tasks.is_empty() && self.stations.is_empty() {
                return;
            }
            let worked = if self.cycles.is_some() { self.counted_round() } else { self.round() };
            if worked > 0 {
                self.pacer.worked();
            } else if (self.tasks.is_empty() && self.stations.is_empty()) || self.pacer.idle() {
                self.sleep();
            } else {
                std::hint::spin_loop();
            }
        }
    }

    fn counted_round(&mut self) -> usize {
        let worked = self.round();
        if let (Some(clock), true) = (&self.cycles, worked > 0) {
            self.stats.busy_rounds.add(1);
            self.stats.busy_cycles.add(clock.raw().wrapping_sub(self.looked));
        }
        worked
    }

    /// One round: every ring that is looked at, one submit, every completion once.
    #[inline]
    fn round(&mut self) -> usize {
        // With nothing to come from the kernel, rings are all there is to look at.
        let looks = if self.pacer.saves_cpu() { 1 } else { MAX_LOOKS };
        let mut worked = 0;
        for _ in 0..looks {
            // Looks that find nothing are no work.
            if let Some(clock) = &self.cycles {
                self.looked = clock.raw();
            }
            let (found, in_flight) = self.poll_rings();
            worked += found;
            if found > 0 || in_flight || self.uring.queued() > 0 {
                break;
            }
            std::hint::spin_loop();
        }
        // To save CPU time, submissions wait for each other and go with the call that sleeps: one entry into the
        // kernel, and one doorbell of the disk below, for many requests.
        self.held_back += 1;
        if !self.pacer.saves_cpu() || self.held_back > MAX_HELD_ROUNDS || self.uring.queued() >= MAX_HELD {
            self.held_back = 0;
            self.uring.submit();
        }
        worked += self.reap();
        if self.awaited > 0 {
            self.park();
            self.retire();
        } else if self.sweep.is_wanted(self.polled) {
            self.sweep();
        }
        if self.seen_faults != faults() {
            self.seen_faults = faults();
            // What breaks by this is reported in the next round, before any sleep.
            worked += 1;
            for task in &mut self.tasks {
                task.queue.check_memory();
            }
            self.rouse_those(|task| task.queue.is_broken());
        }
        worked
    }

    /// Looks once at every ring that is not dormant: how much was found, and whether any request is in flight.
    #[inline]
    fn poll_rings(&mut self) -> (usize, bool) {
        let mut worked = 0;
        let mut in_flight = false;
        for at in 0..self.stations.len() {
            worked += self.on_station(at, |station, queues, io| station.poll(queues, io));
        }
        for task in &mut self.tasks[..self.polled] {
            let io = &mut io(&mut self.uring, Purpose::Handler, task.id, self.index);
            let n = if task.polls() {
                task.handler.poll(&mut task.queue, io)
            } else if task.queue.in_flight() > 0 {
                task.handler.go_on(&mut task.queue, io)
            } else {
                0
            };
            let touched = std::mem::take(&mut task.touched);
            let mut busy = n > 0;
            if busy || touched {
                worked += n;
                busy |= task.queue.publish();
                task.queue.disable_notification();
                task.worked = true;
            }
            if task.queue.is_signal_due(!busy) {
                task.queue.signal(io);
            }
            if task.queue.is_broken() && !task.reported {
                task.reported = true;
                task.queue.report_broken(io);
            }
            in_flight |= task.queue.in_flight() > 0;
        }
        (worked, in_flight)
    }

    /// Does something with a station and the queues of this reactor.
    #[inline]
    fn on_station<T>(
        &mut self,
        at: usize,
        act: impl FnOnce(&mut dyn Station, &mut Queues<'_>, &mut Io<'_>) -> T,
    ) -> T {
        let Stationed { station, id, .. } = &mut self.stations[at];
        let (tasks, places) = (&mut self.tasks, &self.places);
        let mut queues = Queues { tasks, places, polled: self.polled, stirred: false };
        let io = &mut io(&mut self.uring, Purpose::Station, *id, self.index);
        let done = act(station.as_mut(), &mut queues, io);
        if queues.stirred {
            self.rouse_those(|task| task.touched || task.wanted);
        }
        done
    }

    #[inline]
    fn reap(&mut self) -> usize {
        self.uring.reap(&mut self.completions);
        if self.completions.is_empty() {
            return 0;
        }
        let completions = std::mem::take(&mut self.completions);
        let count = completions.len();
        probes::reap(count);
        for c in &completions {
            self.dispatch(*c);
        }
        self.completions = completions;
        self.completions.clear();
        for task in &mut self.tasks[..self.polled] {
            if std::mem::take(&mut task.reaped) || task.touched {
                task.worked = true;
                task.queue.publish();
            }
        }
        count
    }

    fn dispatch(&mut self, c: Completion) {
        let (purpose, id, tag) = unlabel(c.user_data);
        if purpose == Purpose::Bell as u8 {
            self.watching_bell = c.more;
            return;
        }
        if purpose == Purpose::Station as u8 {
            if let Some(at) = self.stations.iter().position(|s| s.id == id) {
                self.on_station(at, |s, queues, io| s.complete(queues, io, tag, c.result, c.more));
            }
            return;
        }
        // A completion of a queue that has left (its watch being cancelled) finds nobody.
        let Some(place) = self.place(id) else { return };
        let was_dormant = place >= self.polled;
        let place = self.rouse(place);
        let task = &mut self.tasks[place];
        if purpose == Purpose::Handler as u8 {
            if !task.reaped {
                task.reaped = true;
                task.queue.mark_reaped();
            }
            let io = &mut io(&mut self.uring, Purpose::Handler, id, self.index);
            task.handler.complete(&mut task.queue, io, tag, c.result);
        } else if purpose == Purpose::Kick as u8 {
            task.watching_kick = c.more;
            if c.result >= 0 {
                probes::kick(&*task.queue);
                task.queue.stats().kicks.add(1);
                task.queue.stats().kicks_dormant.add(was_dormant.into());
            } else {
                // Without its kick the queue can only be polled.
                task.queue.notifier.kick = None;
                let error = std::io::Error::from_raw_os_error(-c.result);
                task.queue.count_error(ErrorKind::Notify, &format_args!("kick descriptor: {error}"));
            }
        } else if purpose == Purpose::Signal as u8 {
            task.queue.signalled(&mut io(&mut self.uring, Purpose::Handler, id, self.index), tag);
            if c.result < 0 {
                let error = std::io::Error::from_raw_os_error(-c.result);
                task.queue.count_error(ErrorKind::Notify, &format_args!("call descriptor: {error}"));
            }
        }
    }

    /// A queue without a kick descriptor can wake nobody, so somebody has to look.
    fn is_polled(&self) -> bool {
        self.tasks[..self.polled]
            .iter()
            .any(|t| t.polls() && t.waits_for_chains() && t.queue.notifier.kick.is_none())
    }

    /// Sleeps until there is a completion: a kick, the bell, or I/O; or for a nap. Never with work at hand: each ring is looked at
    /// again after its driver was asked to notify (virtio 1.3, 2.7.10.1).
    fn sleep(&mut self) {
        self.watch();
        self.waker.lie_down();
        let mut work = false;
        for at in 0..self.stations.len() {
            work |= self.on_station(at, |station, queues, io| station.prepare_sleep(queues, io));
        }
        for task in &mut self.tasks[..self.polled] {
            work |= task.polls() && task.waits_for_chains() && task.queue.enable_notification();
            let io = &mut io(&mut self.uring, Purpose::Handler, task.id, self.index);
            work |= task.handler.prepare_sleep(io);
        }
        if !work && !self.mailbox.has_mail() {
            self.held_back = 0;
            let nap = self.is_polled().then_some(NAP);
            let stations = self.stations.iter().filter_map(|s| s.station.longest_sleep());
            let handlers = self.tasks[..self.polled]
                .iter()
                .filter(|t| t.polls())
                .filter_map(|t| t.handler.longest_sleep());
            let limit = stations.chain(handlers).chain(nap).min();
            self.pacer.asleep(|| self.uring.wait(limit));
            // A nap that brought nothing is followed by the next one after a look at the rings.
            work = self.reap() > 0 || limit.is_none();
        }
        self.waker.get_up();
        for task in &mut self.tasks[..self.polled] {
            task.wanted = false;
            task.queue.disable_notification();
        }
        if work {
            self.pacer.worked();
        }
    }

    fn watch(&mut self) {
        if !self.watching_bell {
            self.watching_bell = true;
            self.uring.watch(self.mailbox.bell().fd(), label(Purpose::Bell, NOBODY, 0));
        }
        for task in &mut self.tasks[..self.polled] {
            Reactor::watch_kick(task, &mut self.uring);
        }
    }

    #[cold]
    fn read_mail(&mut self) {
        // What is queued names descriptors that a message may replace.
        self.uring.submit();
        for message in self.mailbox.take() {
            match message {
                Message::Start { queue, handler, paused, id } => {
                    let started = self.start(queue, handler, paused);
                    // Whoever asked may have given up; then the queue is stopped by its owner going away.
                    let _ = id.send(started);
                }
                Message::Stop { id, base } => {
                    if let Some(task) = self.find(id) {
                        task.stopping = Some(base);
                        task.settle();
                        self.awaited += 1;
                    } else {
                        warn!("{}: asked to stop a queue that does not run here", self.name);
                    }
                }
                Message::SetMap { id, change } => {
                    let done = self.find(id).map(|task| task.queue.set_map(change));
                    self.awaited += usize::from(matches!(done, Some((_, None))));
                    self.sync_buffers();
                    // Last: whoever waits for the old map takes its memory away.
                    drop(done);
                }
                Message::Park { id, parked } => {
                    if let Some(task) = self.find(id) {
                        task.parking = Some(parked);
                        task.settle();
                        self.awaited += 1;
                    }
                }
                Message::Pause { id, paused } => {
                    if let Some(task) = self.find(id) {
                        task.paused = true;
                        let waits = task.pausing.replace(paused).is_none();
                        task.settle();
                        self.awaited += usize::from(waits);
                    }
                }
                Message::Resume { id } => {
                    if let Some(task) = self.find(id) {
                        task.paused = false;
                        let waited = task.pausing.take().is_some();
                        task.settle();
                        self.awaited -= usize::from(waited);
                        self.pacer.worked();
                    }
                }
                Message::SetPacing(pacing) => self.pacer.set(pacing),
                Message::Refuse { id, miss } => {
                    if let Some(task) = self.find(id) {
                        task.queue.refuse(miss);
                    }
                }
                Message::SetLog { id, log, adopted } => {
                    if let Some(task) = self.find(id) {
                        task.queue.set_log(log);
                    }
                    drop(adopted);
                }
                Message::SetNotifier { id, change } => {
                    if let Some(task) = self.find(id) {
                        match change {
                            NotifierChange::Call(fd) => task.queue.set_call(fd),
                            NotifierChange::Err(fd) => {
                                task.queue.notifier.err = fd;
                                // One that comes too late to hear of it is told now.
                                task.reported = false;
                            }
                        }
                    }
                }
                Message::AddStation { station, id } => {
                    let _ = id.send(self.add_station(station));
                }
                Message::RemoveStation { id, gone } => {
                    if let Some(at) = self.stations.iter().position(|s| s.id == id) {
                        self.on_station(at, |station, queues, io| station.stop(queues, io));
                        self.stations[at].leaving = Some(gone);
                        self.awaited += 1;
                    }
                }
                Message::Turn(heard) => {
                    let _ = heard.send(());
                }
                Message::Quit => self.quitting = true,
            }
        }
    }

    fn place(&self, id: QueueId) -> Option<usize> {
        let place = self.places.get(usize::from(id.slot)).copied().flatten()?;
        (self.tasks.get(place)?.id == id).then_some(place)
    }

    /// The queue, which is looked at from now on.
    fn find(&mut self, id: QueueId) -> Option<&mut Task> {
        let place = self.place(id)?;
        let place = self.rouse(place);
        self.tasks.get_mut(place)
    }

    fn start(&mut self, queue: Box<Queue>, mut handler: Box<dyn QueueHandler>, paused: bool) -> QueueId {
        let slot = self.places.iter().position(Option::is_none).unwrap_or_else(|| {
            self.places.push(None);
            self.places.len() - 1
        });
        let id = QueueId { slot: slot as u16, generation: self.next_generation() };
        handler.attach(&mut io(&mut self.uring, Purpose::Handler, id, self.index));
        probes::start(&*queue, queue.name());
        self.insert(Task {
            id,
            queue,
            handler,
            stopping: None,
            parking: None,
            paused,
            pausing: None,
            rests: paused,
            watching_kick: false,
            reported: false,
            reaped: false,
            touched: false,
            worked: true,
            wanted: false,
        });
        self.sync_buffers();
        self.pacer.worked();
        id
    }

    fn next_generation(&mut self) -> u16 {
        self.generation = self.generation.wrapping_add(1) & 0xfff;
        self.generation
    }

    fn add_station(&mut self, mut station: Box<dyn Station>) -> QueueId {
        let taken = |slot: &u16| self.stations.iter().any(|s| s.id.slot == *slot);
        let slot = (0..u16::MAX).find(|slot| !taken(slot)).unwrap_or(u16::MAX);
        let id = QueueId { slot, generation: self.next_generation() };
        station.attach(&mut io(&mut self.uring, Purpose::Station, id, self.index));
        self.stations.push(Stationed { station, id, leaving: None });
        self.pacer.worked();
        id
    }

    fn sync_buffers(&mut self) {
        let users = self.tasks.iter().filter(|t| t.handler.uses_fixed_buffers());
        self.uring.sync_buffers(self.fixed, users.map(|t| t.queue.map()));
        for task in &mut self.tasks {
            task.handler.register_memory(self.fixed, task.queue.map());
        }
    }

    /// Says what has become true with the requests that are over: nothing points any more to what was revoked, and rings
    /// that were to be left alone are.
    #[cold]
    fn park(&mut self) {
        for task in &mut self.tasks[..self.polled] {
            self.awaited -= task.queue.release_revoked();
            if task.parking.is_some() && task.queue.in_flight() == 0 {
                task.queue.publish();
                task.queue.signal(&mut io(&mut self.uring, Purpose::Handler, task.id, self.index));
                task.queue.unmap_ring();
                self.awaited -= 1;
                task.parking = None;
                task.settle();
            }
            if task.pausing.is_some() && task.queue.in_flight() == 0 {
                task.queue.publish();
                task.queue.signal(&mut io(&mut self.uring, Purpose::Handler, task.id, self.index));
                self.awaited -= 1;
                task.pausing = None;
            }
        }
    }

    /// Lets the queues and stations go that were asked to stop and have finished.
    #[cold]
    fn retire(&mut self) {
        let all = self.stations.len();
        self.stations.retain(|s| s.leaving.is_none() || s.station.in_flight() > 0);
        self.awaited -= all - self.stations.len();
        for task in self.tasks[..self.polled].iter_mut().filter(|t| t.waits_idly()) {
            task.queue.return_resubmits();
        }
        while let Some(place) = self.tasks[..self.polled].iter().position(Task::is_done) {
            let mut task = self.remove(place);
            let io = &mut io(&mut self.uring, Purpose::Handler, task.id, self.index);
            task.queue.publish();
            task.queue.signal(io);
            // The driver may be run by somebody else from here on, who wants to hear of it.
            task.queue.enable_notification();
            task.handler.detach(io);
            if task.watching_kick {
                io.uring.unwatch(label(Purpose::Kick, task.id, 0), label(Purpose::Cancel, task.id, 0));
            }
            io.uring.submit();
            // What has not been taken by now waits for a front end that does not read.
            task.queue.cancel_signals(io);
            self.uring.submit();
            self.awaited -= 1 + task.queue.revoked();
            let base = task.queue.base();
            probes::stop(&*task.queue);
            let reply = task.stopping.take();
            debug!("{}: a queue has left at {base:#x}", self.name);
            drop(task);
            self.sync_buffers();
            if let Some(reply) = reply {
                // Nobody waiting any more is no trouble: the queue is gone either way.
                let _ = reply.send(base);
            }
        }
    }
}
