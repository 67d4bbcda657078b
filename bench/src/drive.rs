//! Runs jobs at the same time: when they measure and stop, and what becomes of them when the back end does not go on.

use std::ops::Range;
use std::os::fd::RawFd;
use std::sync::{Arc, Barrier};
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow};
use nix::errno::Errno;
use vmm_sys_util::eventfd::EventFd;

use crate::control::{Control, Order};
use crate::event::{Done, hung_up};
use crate::outcome::Failure;
use crate::spec::Spec;

/// How long requests may be in flight without any of the queue's being finished.
const PATIENCE: Duration = Duration::from_secs(5);
/// How often that is looked at.
const LOOK: Duration = Duration::from_millis(100);
/// And how often at least, before that is too long.
const LOOKS: u32 = 25;

/// What a thread of a run does.
pub trait Work: Send + Sized + 'static {
    /// What becomes of it.
    type Outcome: Send + 'static;
    /// What it has in flight, in words.
    const UNITS: &'static str;
    /// Wakes it when it sleeps until an interrupt.
    fn waker(&self) -> std::io::Result<EventFd>;
    /// Runs those of one thread, several only if they are to [share one](Spec::one_thread), until their work is done or they
    /// are told to end; `ready` is called before they begin.
    fn run(works: Vec<(Self, Arc<Control>)>, ready: impl FnOnce()) -> Vec<Self::Outcome>;
    /// Where an outcome says what went wrong.
    fn failure(outcome: &mut Self::Outcome) -> &mut Option<Failure>;
}

/// What one thread is to run, and which jobs these are.
struct Thread<W> {
    shared: bool,
    works: Vec<(W, Arc<Control>)>,
    places: Vec<usize>,
}

/// A running job as the main thread sees it.
struct Watched {
    spec: Arc<Spec>,
    control: Arc<Control>,
    waker: EventFd,
    /// How far it was when that last changed, and how often it was looked at since: a machine that stands still, and this
    /// thread with it, is no back end that does.
    seen: (u64, Instant, u32),
    failure: Option<Failure>,
}

impl Watched {
    fn give(&self, order: Order) {
        if self.control.give(order) {
            // A counter that is full wakes as well.
            let _ = self.waker.write(1);
        }
    }

    fn abort(&mut self, errno: Errno, message: String) {
        if self.control.ended().is_none() {
            self.failure.get_or_insert(Failure { message, errno: errno as i32 });
            self.give(Order::Abort);
        }
    }

    /// When the next order is due, after the start.
    fn next(&self) -> Option<Duration> {
        match self.control.order() {
            Order::Ramp => Some(self.spec.ramp_time),
            Order::Measure => self.spec.runtime.map(|time| time + self.spec.ramp_time),
            _ => None,
        }
    }

    /// Requests that are in flight without progress for too long.
    fn stuck(&mut self) -> Option<u32> {
        let (finished, in_flight) = self.control.progress();
        if finished != self.seen.0 || in_flight == 0 {
            self.seen = (finished, Instant::now(), 0);
        }
        self.seen.2 = self.seen.2.saturating_add(1);
        (self.seen.1.elapsed() >= PATIENCE && self.seen.2 >= LOOKS).then_some(in_flight)
    }
}

/// Runs all jobs to their end; `sockets` says which of them are whose. `mark` is called when the first of them begins
/// to measure and when the first has reached its runtime.
pub fn drive<W: Work>(
    jobs: Vec<(Arc<Spec>, W)>,
    sockets: &[(RawFd, Range<usize>)],
    mut mark: impl FnMut(),
) -> Result<Vec<W::Outcome>> {
    let done = Arc::new(Done::new()?);
    let (mut watched, mut threads) = (Vec::new(), Vec::<Thread<W>>::new());
    for (at, (spec, job)) in jobs.into_iter().enumerate() {
        let begin = if spec.ramp_time.is_zero() { Order::Measure } else { Order::Ramp };
        let control = Arc::new(Control::new(begin));
        let (waker, seen) = (job.waker()?, (0, Instant::now(), 0));
        let (shares, work) = (spec.one_thread, (job, Arc::clone(&control)));
        match threads.iter_mut().find(|thread| shares && thread.shared) {
            Some(thread) => {
                thread.works.push(work);
                thread.places.push(at);
            }
            None => threads.push(Thread { shared: shares, works: vec![work], places: vec![at] }),
        }
        watched.push(Watched { spec, control, waker, seen, failure: None });
    }
    let start = Arc::new(Barrier::new(threads.len() + 1));
    let run = |Thread { works, places, .. }| {
        let (start, done) = (Arc::clone(&start), Arc::clone(&done));
        let ready = move || {
            start.wait();
        };
        let thread = std::thread::spawn(move || {
            let results = W::run(works, ready);
            done.tell();
            results
        });
        (places, thread)
    };
    let threads: Vec<_> = threads.into_iter().map(run).collect();
    start.wait();
    let begun = Instant::now();
    let mut marks = 0;
    if watched.iter().any(|w| w.control.order() == Order::Measure) {
        mark();
        marks = 1;
    }
    while watched.iter().any(|w| w.control.ended().is_none()) {
        let next = watched.iter().filter_map(Watched::next).min();
        let wait = next.map_or(LOOK, |at| at.saturating_sub(begun.elapsed()).min(LOOK));
        let gone = hung_up(sockets.iter().map(|s| s.0), &done, wait)?;
        for (_, jobs) in sockets.iter().zip(gone).filter_map(|(s, gone)| gone.then_some(s)) {
            for job in &mut watched[jobs.clone()] {
                job.abort(Errno::ECONNRESET, "the back end has closed the connection".into());
            }
        }
        let elapsed = begun.elapsed();
        for order in [Order::Measure, Order::Stop] {
            let due = |w: &Watched| {
                w.control.order() as u8 + 1 == order as u8 && w.next().is_some_and(|at| elapsed >= at)
            };
            if watched.iter().any(due) && marks < order as u8 {
                mark();
                marks = order as u8;
            }
            watched.iter().filter(|w| due(w)).for_each(|w| w.give(order));
        }
        for job in &mut watched {
            if let Some(n) = job.stuck() {
                let message =
                    format!("the back end does not go on: {n} {} without an answer for 5 s", W::UNITS);
                job.abort(Errno::ETIMEDOUT, message);
            }
        }
        if watched.iter().any(|w| w.failure.is_some() || w.control.ended() == Some(true)) {
            for job in &watched {
                job.give(Order::Halt);
            }
        }
    }
    let mut results = Vec::new();
    for (places, thread) in threads {
        results.extend(places.into_iter().zip(thread.join().map_err(|_| anyhow!("a job panicked"))?));
    }
    results.sort_by_key(|(place, _)| *place);
    let ended = results.into_iter().zip(watched).map(|((_, mut result), watched)| {
        let failure = W::failure(&mut result);
        *failure = failure.take().or(watched.failure);
        result
    });
    Ok(ended.collect())
}
