//! How far two CPUs are from each other: the round trip of a cache line between them.
//!
//! No back end can answer a request faster than that, and on virtual machines it changes: two virtual CPUs are two
//! threads of one core now and cores far apart a moment later.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use super::backend::spawn_on;
use super::spread::Spread;

const TRIPS: u64 = 64;
const BATCHES: usize = 301;
const LIMIT: Duration = Duration::from_millis(500);

/// A cache line, and the one that is fetched along with it.
#[repr(align(128))]
struct Line(AtomicU64);

/// Median nanoseconds of a round trip; `None` where there is only one CPU, or others were in the way all the time.
pub fn median_ns(here: usize, there: usize) -> Option<f64> {
    if here == there {
        return None;
    }
    let shared = Arc::new((Line(AtomicU64::new(0)), AtomicBool::new(false)));
    let echo = {
        let shared = Arc::clone(&shared);
        spawn_on(&[there], move || {
            let (line, done) = &*shared;
            while !done.load(Ordering::Relaxed) {
                let seen = line.0.load(Ordering::Acquire);
                if seen & 1 == 1 {
                    line.0.store(seen + 1, Ordering::Release);
                } else {
                    std::hint::spin_loop();
                }
            }
        })
        .ok()?
    };
    let call = {
        let shared = Arc::clone(&shared);
        spawn_on(&[here], move || {
            let (line, done) = &*shared;
            let begun = Instant::now();
            let mut batches = Vec::with_capacity(BATCHES);
            let (mut at, mut spins) = (0, 0u32);
            'all: while batches.len() < BATCHES {
                let batch = Instant::now();
                for _ in 0..TRIPS {
                    line.0.store(at + 1, Ordering::Release);
                    while line.0.load(Ordering::Acquire) != at + 2 {
                        spins = spins.wrapping_add(1);
                        // Rarely, so that the clock is not what is measured.
                        if spins.is_multiple_of(4096) && begun.elapsed() > LIMIT {
                            break 'all;
                        }
                        std::hint::spin_loop();
                    }
                    at += 2;
                }
                batches.push(batch.elapsed().as_nanos() as f64 / TRIPS as f64);
            }
            done.store(true, Ordering::Relaxed);
            batches
        })
        .ok()
    };
    let batches = call.and_then(|c| c.join().ok()).and_then(Result::ok);
    // Also where the caller could not run.
    shared.1.store(true, Ordering::Relaxed);
    let _ = echo.join();
    Spread::of(batches?.into_iter()).map(|s| s.median)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_cpus_are_some_nanoseconds_apart_and_one_is_not() {
        assert_eq!(median_ns(0, 0), None);
        let cpus = poll_engine::engine::placement::usable_cpus().unwrap();
        if let [a, b, ..] = cpus[..]
            && let Some(ns) = median_ns(a, b)
        {
            assert!((1.0..1e8).contains(&ns), "{ns}");
        }
        // A CPU that does not exist ends in nothing, not in waiting.
        assert_eq!(median_ns(0, 1000), None);
        assert_eq!(median_ns(1000, 0), None);
    }
}
