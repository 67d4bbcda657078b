//! The clock that requests are timed by: the CPU's time-stamp counter, or the kernel's clock where that does not run evenly.
//!
//! What a tick is worth is measured against the kernel's clock over the time that has passed since the process's first
//! [`Clock`]. So nobody waits for a calibration: a daemon that is started again begins at once. A crate that calibrates
//! ([quanta](https://docs.rs/quanta)) takes half a millisecond, and on a busy machine up to 200.
#![allow(unsafe_code)] // reads the counter

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

use nix::time::{ClockId, clock_gettime};

/// After so many nanoseconds what was measured counts for good: the two clocks are read within 0.1 µs, most of the time.
const MEASURED_LONG_ENOUGH: u64 = 20_000_000;

/// Rates are in nanoseconds a tick, times 2^32.
const ONE: u64 = 1 << 32;

static BEGIN: OnceLock<Reading> = OnceLock::new();
/// 0 until it is known.
static RATE: AtomicU64 = AtomicU64::new(0);

/// Both clocks at the same time.
#[derive(Clone, Copy, Debug)]
struct Reading {
    ticks: u64,
    ns: u64,
}

impl Reading {
    /// The closest of a few tries: whoever is interrupted in between reads two different times.
    fn now() -> Reading {
        let read = || {
            let (before, ns, after) = (ticks(), kernel_ns(), ticks());
            let span = after.wrapping_sub(before);
            (span, Reading { ticks: before.wrapping_add(span / 2), ns })
        };
        let tries = [read(), read(), read(), read()];
        tries.into_iter().min_by_key(|&(span, _)| span).map_or(Reading { ticks: 0, ns: 0 }, |(_, r)| r)
    }
}

/// A clock whose reading costs some ten nanoseconds. All are the same clock.
#[derive(Clone, Debug)]
pub struct Clock {
    has_counter: bool,
}

impl Default for Clock {
    fn default() -> Clock {
        Clock::new()
    }
}

impl Clock {
    /// The clock.
    pub fn new() -> Clock {
        let has_counter = has_even_counter();
        if has_counter {
            BEGIN.get_or_init(Reading::now);
        }
        Clock { has_counter }
    }

    /// What it says now, in ticks.
    #[inline]
    pub fn raw(&self) -> u64 {
        if self.has_counter { ticks() } else { kernel_ns() }
    }

    /// Nanoseconds from one reading to a later one; 0 if it is none.
    #[inline]
    pub fn delta_as_nanos(&self, start: u64, end: u64) -> u64 {
        let delta = end.saturating_sub(start);
        if !self.has_counter {
            return delta;
        }
        let known = RATE.load(Ordering::Relaxed);
        let rate = if known > 0 { known } else { measured_rate() };
        ((u128::from(delta) * u128::from(rate)) >> 32) as u64
    }
}

/// The rate as far as it can be told by now.
#[cold]
fn measured_rate() -> u64 {
    let begin = *BEGIN.get_or_init(Reading::now);
    let now = Reading::now();
    let (ticks, ns) = (now.ticks.saturating_sub(begin.ticks), now.ns.saturating_sub(begin.ns));
    let rate = (u128::from(ns) * u128::from(ONE)).checked_div(ticks.into()).unwrap_or(0);
    // What has no tick yet has no nanosecond to speak of.
    let rate = u64::try_from(rate).unwrap_or(0).max(1);
    if ns >= MEASURED_LONG_ENOUGH {
        // Whoever comes first: it does not change from then on.
        let _other = RATE.compare_exchange(0, rate, Ordering::Relaxed, Ordering::Relaxed);
    }
    rate
}

fn kernel_ns() -> u64 {
    clock_gettime(ClockId::CLOCK_MONOTONIC)
        .map_or(0, |t| t.tv_sec().unsigned_abs() * 1_000_000_000 + t.tv_nsec().unsigned_abs())
}

#[cfg(target_arch = "x86_64")]
#[inline]
fn ticks() -> u64 {
    // SAFETY: every x86-64 CPU has the instruction, and Linux permits it.
    unsafe { core::arch::x86_64::_rdtsc() }
}

/// Whether the counter runs at one rate whatever the CPU does ("invariant TSC").
#[cfg(target_arch = "x86_64")]
fn has_even_counter() -> bool {
    use core::arch::x86_64::__cpuid;
    __cpuid(0x8000_0000).eax >= 0x8000_0007 && __cpuid(0x8000_0007).edx & 1 << 8 != 0
}

#[cfg(not(target_arch = "x86_64"))]
fn ticks() -> u64 {
    kernel_ns()
}

#[cfg(not(target_arch = "x86_64"))]
fn has_even_counter() -> bool {
    false
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::*;

    /// Against the standard library's clock: what lies between the inner two of four readings, and between the outer.
    fn agrees(clock: &Clock, sleep: Duration, tolerance: u128) {
        let outer = Instant::now();
        let start = clock.raw();
        let inner = Instant::now();
        std::thread::sleep(sleep);
        let inner = inner.elapsed().as_nanos();
        let end = clock.raw();
        let outer = outer.elapsed().as_nanos();
        let ns = u128::from(clock.delta_as_nanos(start, end));
        let (least, most) = (inner - inner / tolerance, outer + outer / tolerance);
        assert!((least..=most).contains(&ns), "{ns} ns is none of {least} to {most}");
    }

    #[test]
    fn a_tick_is_worth_what_the_kernel_says() {
        let clock = Clock::new();
        // Before it is known for good, and afterwards.
        agrees(&clock, Duration::from_millis(1), 20);
        std::thread::sleep(Duration::from_nanos(MEASURED_LONG_ENOUGH));
        agrees(&clock, Duration::from_millis(5), 1000);
        agrees(&clock, Duration::from_millis(50), 1000);
        assert_eq!(clock.has_counter, RATE.load(Ordering::Relaxed) > 0);
    }

    #[test]
    fn a_reading_that_is_earlier_is_no_time() {
        let clock = Clock::new();
        assert_eq!(clock.delta_as_nanos(2, 1), 0);
        assert_eq!(clock.delta_as_nanos(7, 7), 0);
    }

    #[test]
    fn years_do_not_overflow() {
        let clock = Clock::new();
        std::thread::sleep(Duration::from_nanos(MEASURED_LONG_ENOUGH));
        // A year at 5 GHz.
        let year = 5_000_000_000 * 86_400 * 365;
        assert!(clock.delta_as_nanos(1, 1 + year) > 1_000_000_000 * 86_400 * 365 / 10);
    }
}
