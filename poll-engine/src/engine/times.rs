//! Where the time of a reactor goes: busy with requests, idle (looking at rings in vain), asleep.
//!
//! Only what is not work is timed: a round that finds nothing ends with a look at the clock, and so do both ends of a sleep.
//! The rest has been work, so that a reactor which never rests never looks. All of it is time on the wall: a reactor that
//! the kernel has taken off its CPU was what it was then.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use crate::clock::Clock;
use crate::stats::Counter;

/// What a reactor has spent its time on since it began. None of these ever becomes less.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Spent {
    /// Serving requests.
    pub busy: Duration,
    /// Looking at rings that had nothing.
    pub idle: Duration,
    /// Waiting in the kernel.
    pub asleep: Duration,
}

/// In `asleep`: it sleeps now, and the rest is what it had slept before less when it fell asleep.
const SLEEPS: u64 = 1 << 63;

/// Written by the reactor, read by anyone.
#[derive(Debug)]
pub(super) struct Times {
    clock: Clock,
    began: u64,
    /// In ticks of the clock.
    idle: Counter,
    /// In ticks; one word for two things, so that no reader sees one of them without the other.
    asleep: AtomicU64,
    /// What was told already: busy and asleep are sums of what is not read at the same moment.
    told: [AtomicU64; 3],
}

impl Times {
    pub(super) fn new() -> Times {
        let clock = Clock::new();
        let began = clock.raw();
        Times { clock, began, idle: Counter::default(), asleep: AtomicU64::new(0), told: Default::default() }
    }

    #[inline]
    pub(super) fn now(&self) -> u64 {
        self.clock.raw()
    }

    /// Nanoseconds from one moment to a later one.
    #[inline]
    pub(super) fn nanos(&self, start: u64, end: u64) -> u64 {
        self.clock.delta_as_nanos(start, end)
    }

    /// It has looked in vain for so many ticks more.
    #[inline]
    pub(super) fn idled(&self, ticks: u64) {
        self.idle.add(ticks);
    }

    pub(super) fn falls_asleep(&self, now: u64) {
        let slept = self.asleep.load(Ordering::Relaxed);
        self.asleep.store(slept.wrapping_sub(now) & !SLEEPS | SLEEPS, Ordering::Relaxed);
    }

    pub(super) fn wakes(&self, now: u64) {
        self.asleep.store(slept(self.asleep.load(Ordering::Relaxed), now), Ordering::Relaxed);
    }

    /// What it has spent until now.
    pub(super) fn spent(&self) -> Spent {
        let (idle, asleep) = (self.idle.get(), self.asleep.load(Ordering::Relaxed));
        let now = self.now();
        let all = now.saturating_sub(self.began);
        // Read before its end, a sleep has lasted until now at most; whatever else is off by this is told once.
        let asleep = slept(asleep, now).min(all);
        let busy = all.saturating_sub(idle).saturating_sub(asleep);
        let [busy, idle, asleep] = [(busy, 0), (idle, 1), (asleep, 2)].map(|(ticks, i)| {
            let ns = self.nanos(0, ticks);
            Duration::from_nanos(ns.max(self.told[i].fetch_max(ns, Ordering::Relaxed)))
        });
        Spent { busy, idle, asleep }
    }
}

/// Ticks slept by this moment.
fn slept(word: u64, now: u64) -> u64 {
    if word & SLEEPS == 0 { word } else { word.wrapping_add(now) & !SLEEPS }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_neither_idle_nor_asleep_was_work() {
        // A billion ticks ago, of which half were slept in two parts, and a quarter in vain.
        const ALL: u64 = 1_000_000_000;
        let times = Times::new();
        let began = times.began - ALL;
        let times = Times { began, ..times };
        times.falls_asleep(began);
        times.wakes(began + ALL / 4);
        times.idled(ALL / 4);
        let all = times.now() - began;
        times.falls_asleep(times.now() - ALL / 4);
        let spent = times.spent();
        let ticks = |part: Duration| part.as_nanos() as f64 / times.nanos(0, ALL) as f64;
        assert!(ticks(spent.asleep) >= 0.499 && ticks(spent.idle) > 0.249, "{spent:?}");
        assert!(ticks(spent.idle) < 0.251, "{spent:?}");
        assert!(ticks(spent.busy) < 0.251 + (all - ALL) as f64 / ALL as f64, "{spent:?}");
        // It sleeps still.
        let later = times.spent();
        assert!(later.asleep > spent.asleep, "{spent:?} {later:?}");
        assert!((spent.busy, spent.idle) <= (later.busy, later.idle));
    }

    #[test]
    fn nothing_that_was_told_is_taken_back() {
        let times = Times::new();
        times.falls_asleep(times.now());
        let asleep = times.spent().asleep;
        // A wake-up noted with an earlier reading of another CPU's counter.
        times.wakes(times.began);
        assert!(times.spent().asleep >= asleep);
    }
}
