//! A reactor: one thread, one io_uring, any number of queues. It polls, submits, reaps, publishes, and sleeps when
//! its pacing says so. Nothing else ever touches a ring that runs here.

mod dormant;
mod io;
mod mail;
mod task;

use std::sync::Arc;
use std::sync::atomic::AtomicUsize;
use std::time::Duration;

use crossbeam::sync::WaitGroup;

pub use dormant::Dormancy;
use dormant::Sweep;
pub use io::{Io, QueueId};
use io::{NOBODY, Purpose, io, label, unlabel};
pub(super) use mail::Message;
pub use mail::NotifierChange;
pub(super) use task::Task;

use super::EngineConfig;
use super::mailbox::Mailbox;
use super::pacing::Pacer;
use super::station::{Queues, Station, Waker};
use super::times::Times;
use crate::clock::Clock;
use crate::fault_point;
use crate::memory::fault::faults;
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

    fn place(&self, id: QueueId) -> Option<usize> {
        let place = self.places.get(usize::from(id.slot)).copied().flatten()?;
        (self.tasks.get(place)?.id == id).then_some(place)
    }
}
