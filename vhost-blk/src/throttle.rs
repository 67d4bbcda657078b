//! Keeps a disk to its [`Limits`]: its queues ask before they begin a request, and leave those in the ring that have to wait.
//!
//! What has to wait is charged at once and told its time. So the queues of a disk get their turns in the order in which
//! they have asked, also from different reactors, and none of them takes all there is.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use poll_engine::clock::Clock;
use poll_engine::limit::{BURST, Bucket};
use poll_engine::stats::QueueStats;

use crate::disk::Access;
use crate::limits::{KINDS, Kind, Limits, Rate};
use crate::request::Operation;

/// How long a queue waits at most before it looks whether the limits are others now.
const LONGEST: Duration = Duration::from_millis(20);
/// How long a reactor sleeps at least, because it sleeps at all.
const SHORTEST: Duration = Duration::from_micros(1);

/// The limits of a disk, shared by its queues.
#[derive(Debug)]
pub struct Throttle {
    /// Odd while there are limits; another number with every change.
    version: AtomicU32,
    limits: Mutex<Limits>,
    levels: [Level; KINDS.len()],
    clock: Clock,
    start: u64,
}

/// What keeps to one limit.
#[derive(Debug, Default)]
struct Level {
    average: Bucket,
    max: Bucket,
}

impl Level {
    fn set(&self, rate: Option<Rate>) {
        self.average.set(rate.map(|rate| {
            // What is saved up for a burst is what that takes beyond the average.
            let saved = rate.max.map_or(0.0, |b| (b.max - rate.average) as f64 * b.length as f64);
            let burst = Duration::try_from_secs_f64(saved / rate.average as f64).unwrap_or(Duration::MAX);
            (rate.average, BURST.saturating_add(burst))
        }));
        self.max.set(rate.and_then(|rate| rate.max).map(|burst| (burst.max, BURST)));
    }

    fn came_late(&self, now: u64) {
        self.average.came_late(now);
        self.max.came_late(now);
    }

    fn reserve(&self, now: u64, amount: u64) -> u64 {
        self.average.reserve(now, amount).max(self.max.reserve(now, amount))
    }
}

/// What a request is charged for.
type Cost = (Access, u32);

/// What there is to be charged: nothing for what moves no data and changes none.
fn cost(operation: &Operation) -> Option<Cost> {
    match *operation {
        Operation::Read { len, .. } => Some((Access::Read, len)),
        Operation::Write { len, .. } => Some((Access::Write, len)),
        Operation::Discard { .. } | Operation::WriteZeroes { .. } => Some((Access::Write, 0)),
        Operation::Flush | Operation::GetId { .. } => None,
    }
}

impl Default for Throttle {
    fn default() -> Throttle {
        let clock = Clock::new();
        let start = clock.raw();
        Throttle {
            version: AtomicU32::new(0),
            limits: Mutex::default(),
            levels: Default::default(),
            clock,
            start,
        }
    }
}

impl Throttle {
    /// The limits.
    pub fn limits(&self) -> Limits {
        *self.limits.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Other limits from now on, from any thread. Those that stay keep what was used of them. Queues that wait go by the
    /// new ones within 20 ms.
    pub fn set(&self, limits: Limits) {
        let mut known = self.limits.lock().unwrap_or_else(PoisonError::into_inner);
        if *known == limits {
            return;
        }
        for ((kind, _), level) in KINDS.into_iter().zip(&self.levels) {
            if known.get(kind) != limits.get(kind) {
                level.set(limits.get(kind));
            }
        }
        *known = limits;
        let next = (self.version.load(Ordering::Relaxed) / 2 + 1) * 2;
        self.version.store(next + u32::from(!limits.is_empty()), Ordering::Release);
    }

    /// Whether anything is limited.
    #[inline]
    pub fn is_on(&self) -> bool {
        self.version.load(Ordering::Relaxed) & 1 == 1
    }

    /// The time by which queues go, in nanoseconds.
    #[inline]
    pub fn now(&self) -> u64 {
        self.clock.delta_as_nanos(self.start, self.clock.raw())
    }

    /// A request that was held back begins only now, and the guest might lose by that.
    #[cold]
    fn came_late(&self, now: u64) {
        self.levels.iter().for_each(|level| level.came_late(now));
    }

    /// Charges a request; from when on it may begin.
    fn reserve(&self, (access, bytes): Cost, now: u64) -> u64 {
        let kinds = match access {
            Access::Read => [Kind::IopsTotal, Kind::IopsRead, Kind::BpsTotal, Kind::BpsRead],
            Access::Write => [Kind::IopsTotal, Kind::IopsWrite, Kind::BpsTotal, Kind::BpsWrite],
        };
        let bytes = u64::from(bytes);
        let amounts = [1, 1, bytes, bytes];
        kinds
            .into_iter()
            .zip(amounts)
            .map(|(kind, n)| self.levels[kind as usize].reserve(now, n))
            .max()
            .unwrap_or(0)
    }
}

/// Where the requests of one queue wait.
#[derive(Debug, Default)]
pub struct Gate {
    waits: Option<Wait>,
}

/// A request that was charged and has to wait in the ring.
#[derive(Clone, Copy, Debug)]
struct Wait {
    cost: Cost,
    since: u64,
    until: u64,
    /// Of the limits that it was charged by.
    version: u32,
}

impl Gate {
    /// Whether requests are left where they are, as far as is known.
    #[inline]
    pub fn is_closed(&self) -> bool {
        self.waits.is_some()
    }

    /// Whether the next request may be looked at at `now`.
    pub fn opens(&self, throttle: &Throttle, now: u64) -> bool {
        let is_current = |wait: &Wait| wait.version == throttle.version.load(Ordering::Acquire);
        self.waits.as_ref().is_none_or(|wait| wait.until <= now || !is_current(wait))
    }

    /// Whether this request, the next of the queue, may begin at `now`. Otherwise it is the first to be asked about again
    /// when the gate [opens](Self::opens).
    pub fn passes(
        &mut self,
        operation: &Operation,
        throttle: &Throttle,
        now: u64,
        stats: &QueueStats,
    ) -> bool {
        let version = throttle.version.load(Ordering::Acquire);
        let waited = self.waits.take();
        if let Some(wait) = waited {
            stats.limited_ns.add(now.saturating_sub(wait.since));
            let late = now.saturating_sub(wait.until);
            if u128::from(late) > BURST.as_nanos() {
                stats.limited_late_ns.add(late);
                throttle.came_late(now);
            }
        }
        let Some(cost) = cost(operation) else { return true };
        // What has been paid for; a driver that has put something else there pays for that, too.
        if waited.is_some_and(|wait| wait.cost == cost && wait.version == version && wait.until <= now) {
            return true;
        }
        if version & 1 == 0 {
            return true;
        }
        let until = throttle.reserve(cost, now);
        if until <= now {
            return true;
        }
        if waited.is_none() {
            stats.limited.add(1);
        }
        self.waits = Some(Wait { cost, since: now, until, version });
        false
    }

    /// How long there is nothing to be done; `None` if it is open.
    pub fn longest_sleep(&self, now: u64) -> Option<Duration> {
        let wait = self.waits?;
        Some(Duration::from_nanos(wait.until.saturating_sub(now)).clamp(SHORTEST, LONGEST))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: u64 = 1_000_000;
    const SEC: u64 = 1000 * MS;
    const STEP: u64 = 100_000;

    fn throttle(limits: &str) -> Throttle {
        let throttle = Throttle::default();
        throttle.set(limits.parse().unwrap());
        throttle
    }

    fn read(len: u32) -> Operation {
        Operation::Read { offset: 0, len }
    }

    fn write(len: u32) -> Operation {
        Operation::Write { offset: 0, len }
    }

    /// A queue with ever more of the same request.
    struct Backlog {
        gate: Gate,
        stats: QueueStats,
        operation: Operation,
        passed: u64,
    }

    impl Backlog {
        fn of(operation: Operation) -> Backlog {
            Backlog { gate: Gate::default(), stats: QueueStats::default(), operation, passed: 0 }
        }

        /// A round of the reactor.
        fn round(&mut self, throttle: &Throttle, now: u64) {
            if !self.gate.opens(throttle, now) {
                return;
            }
            for _ in 0..16 {
                if !self.gate.passes(&self.operation, throttle, now, &self.stats) {
                    return;
                }
                self.passed += 1;
            }
        }
    }

    /// How many requests of each pass from `from` on, for so long.
    fn run<const N: usize>(throttle: &Throttle, queues: &mut [Backlog; N], from: u64, time: u64) -> [u64; N] {
        let before: Vec<_> = queues.iter().map(|q| q.passed).collect();
        for now in (from..from + time).step_by(STEP as usize) {
            for queue in queues.iter_mut() {
                queue.round(throttle, now);
            }
        }
        std::array::from_fn(|i| queues[i].passed - before[i])
    }

    fn near(n: u64, wanted: u64) -> bool {
        n.abs_diff(wanted) <= wanted / 50 + 1
    }

    #[test]
    fn every_second_has_its_rate_and_reads_and_writes_have_their_own() {
        let throttle = throttle("iops-read=1000,bps-write=10M");
        let mut queues = [Backlog::of(read(1 << 20)), Backlog::of(write(64 << 10)), Backlog::of(write(0))];
        for second in 0..5 {
            let [reads, writes, empty] = run(&throttle, &mut queues, second * SEC, SEC);
            assert!(near(reads, 1000), "{reads} reads");
            assert!(near(writes, 160), "{writes} writes");
            assert!(empty > 0, "of writes without bytes any number");
        }
        assert!(queues[0].stats.limited.get() >= 4900, "a wait for nearly each");
        let waited = queues[0].stats.limited_ns.get();
        assert!((4 * SEC..5 * SEC).contains(&waited), "{waited}");
    }

    #[test]
    fn a_total_is_of_both_and_the_least_limit_counts() {
        let throttle = throttle("iops-total=1000,iops-write=100,bps-total=1G");
        let mut queues = [Backlog::of(read(4096)), Backlog::of(write(4096))];
        run(&throttle, &mut queues, 0, SEC);
        let [reads, writes] = run(&throttle, &mut queues, SEC, 5 * SEC);
        assert!(near(writes, 500) && near(reads, 4500), "{reads} reads, {writes} writes");
    }

    #[test]
    fn queues_of_a_disk_have_equal_shares() {
        let throttle = throttle("iops-total=900");
        let mut queues = [(); 3].map(|()| Backlog::of(read(4096)));
        run(&throttle, &mut queues, 0, SEC);
        let shares = run(&throttle, &mut queues, SEC, 5 * SEC);
        assert!(shares.iter().all(|&n| near(n, 1500)), "{shares:?}");
    }

    #[test]
    fn a_burst_lasts_as_long_as_it_is_to_and_comes_back_when_it_is_saved_up() {
        let throttle = throttle("iops-read=1000,iops-read-max=5000,iops-read-max-length=3");
        let mut queue = [Backlog::of(read(4096))];
        let second = |queue: &mut [Backlog; 1], at: u64| run(&throttle, queue, at * SEC, SEC)[0];
        let burst: Vec<_> = (0..6).map(|at| second(&mut queue, at)).collect();
        assert!(burst[..3].iter().all(|&n| near(n, 5000)), "{burst:?}");
        assert!(burst[3..].iter().all(|&n| near(n, 1000)), "{burst:?}");
        // Twelve seconds of the average are what three at the maximum take beyond it.
        queue[0].gate = Gate::default();
        let again: Vec<_> = (18..23).map(|at| second(&mut queue, at)).collect();
        assert!(again[..3].iter().all(|&n| near(n, 5000)), "{again:?}");
        assert!(near(again[4], 1000), "{again:?}");
    }

    #[test]
    fn what_becomes_another_request_is_charged_again() {
        let throttle = throttle("bps-write=1M");
        let mut queue = [Backlog::of(write(512))];
        run(&throttle, &mut queue, 0, SEC);
        let gate = &mut queue[0].gate;
        assert!(gate.is_closed());
        // Small while it waits, large when its turn comes: it waits for the difference as well.
        let later = SEC + 20 * MS;
        assert!(gate.opens(&throttle, later));
        assert!(gate.passes(&write(1 << 20), &throttle, later, &queue[0].stats), "what was saved up");
        assert!(!gate.passes(&write(512), &throttle, later, &queue[0].stats));
        assert!(!gate.opens(&throttle, later + 900 * MS), "nothing is for free");
    }

    #[test]
    fn what_the_reactor_is_late_for_is_not_lost() {
        let throttle = throttle("iops-read=50000");
        let mut queue = [Backlog::of(read(4096))];
        run(&throttle, &mut queue, 0, SEC);
        let late = queue[0].stats.limited_late_ns.get();
        let before = queue[0].passed;
        for at in 1..=10 {
            // Off its CPU for 50 ms in each 100.
            run(&throttle, &mut queue, SEC + (2 * at - 1) * 50 * MS, 50 * MS);
        }
        let n = queue[0].passed - before;
        assert!(near(n, 50_000), "{n}");
        let late = queue[0].stats.limited_late_ns.get() - late;
        assert!(late >= 450 * MS, "{late}");
    }

    #[test]
    fn a_change_counts_at_once_and_only_for_what_changes() {
        let throttle = throttle("bps-read=1,iops-write=100");
        let mut queues = [Backlog::of(read(4096)), Backlog::of(write(4096))];
        assert_eq!(run(&throttle, &mut queues, 0, SEC)[0], 1);
        assert!(queues[0].gate.longest_sleep(SEC).unwrap() <= LONGEST, "it looks now and then");
        throttle.set("bps-read=4096K,iops-write=100".parse().unwrap());
        let [reads, writes] = run(&throttle, &mut queues, SEC, SEC);
        assert!(near(reads, 1024 + 10) && near(writes, 100), "{reads} reads, {writes} writes");
        throttle.set(Limits::default());
        assert!(!throttle.is_on());
        let rounds = SEC / STEP * 16;
        assert_eq!(run(&throttle, &mut queues, 2 * SEC, SEC), [rounds, rounds]);
        assert!(queues.iter().all(|q| !q.gate.is_closed() && q.gate.longest_sleep(0).is_none()));
    }

    #[test]
    fn what_moves_no_data_waits_for_nothing() {
        let throttle = throttle("iops-total=1,bps-total=1");
        let mut queues = [Backlog::of(Operation::Flush), Backlog::of(Operation::Discard { count: 1 })];
        let [flushes, discards] = run(&throttle, &mut queues, 0, SEC);
        // The second after a second, less the burst.
        assert_eq!((flushes, discards), (SEC / STEP * 16, 2));
    }
}
