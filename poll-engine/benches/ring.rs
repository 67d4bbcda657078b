//! Nanoseconds a request of the steps of a request on a ring (`scripts/bench.sh ring`). Everything is in the cache of one
//! CPU: what it costs that the other side is on another one is not in here.
//!
//! A step of a batch takes less time than a clock needs, so a step is timed over as many requests as the ring has room
//! for, and then the next step over the same ones. The steps of `null` are timed together, as they follow each other
//! in a device; `turn` and `device` are both sides in turn, batch by batch, with the driver's work in it: the first with
//! the steps of `null`, the second with a queue and its handler.

mod pair;

use std::time::Duration;

use criterion::{Criterion, Throughput};
use pair::{BATCHES, Device, FORMATS, Pair, SHAPES};
use poll_engine::clock::Clock;

/// What is timed of a run over all requests that the ring has room for.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Step {
    Pop,
    Validate,
    Complete,
    /// With the completing, once a batch; by itself it is over before the clock is read.
    CompletePublish,
    Null,
}

const STEPS: [(&str, Step); 5] = [
    ("pop", Step::Pop),
    ("validate", Step::Validate),
    ("complete", Step::Complete),
    ("complete+publish", Step::CompletePublish),
    ("null", Step::Null),
];

struct Timer {
    clock: Clock,
    /// What reading the clock twice takes.
    overhead: u64,
}

impl Timer {
    fn new() -> Timer {
        let clock = Clock::new();
        let mut pauses: Vec<u64> = (0..10_001).map(|_| clock.raw().abs_diff(clock.raw())).collect();
        pauses.sort_unstable();
        Timer { clock, overhead: pauses[pauses.len() / 2] }
    }

    /// Clock ticks that `work` takes, if it is `wanted`.
    #[inline(always)]
    fn ticks(&self, wanted: bool, work: impl FnOnce()) -> u64 {
        if !wanted {
            work();
            return 0;
        }
        let since = self.clock.raw();
        work();
        self.clock.raw().saturating_sub(since).saturating_sub(self.overhead)
    }

    /// Ticks of `step` over `room` requests in batches.
    fn step(&self, pair: &mut Pair, step: Step, room: u16, batch: u16) -> u64 {
        let batches = room / batch;
        pair.submit(room);
        let mut ticks = 0;
        if step == Step::Null {
            ticks += self.ticks(true, || (0..batches).for_each(|_| pair.null(batch)));
        } else {
            ticks += self.ticks(step == Step::Pop, || (0..batches).for_each(|_| pair.pop(batch)));
            ticks += self.ticks(step == Step::Validate, || (0..batches).for_each(|_| pair.validate(batch)));
            if step == Step::CompletePublish {
                ticks += self.ticks(true, || {
                    for _ in 0..batches {
                        pair.complete(batch);
                        pair.publish();
                    }
                });
            } else {
                ticks +=
                    self.ticks(step == Step::Complete, || (0..batches).for_each(|_| pair.complete(batch)));
                pair.publish();
            }
        }
        pair.collect(room);
        ticks
    }

    /// The time for `requests` where `runs` times `each` of them took so long.
    fn scale(&self, ticks: u64, runs: u64, each: u64, requests: u64) -> Duration {
        let ns = self.clock.delta_as_nanos(0, ticks) as f64;
        Duration::from_secs_f64(ns / 1e9 * requests as f64 / (runs * each) as f64)
    }
}

fn main() {
    let mut criterion = Criterion::default()
        .warm_up_time(Duration::from_millis(200))
        .measurement_time(Duration::from_millis(600))
        .sample_size(30)
        .configure_from_args();
    let timer = Timer::new();
    for (format, shape) in FORMATS.iter().flat_map(|f| SHAPES.iter().map(move |s| (*f, *s))) {
        for batch in BATCHES {
            let mut group = criterion.benchmark_group(format!("{}/{}/{batch}", format.name, shape.name));
            group.throughput(Throughput::Elements(1));
            let each = u64::from(batch);
            let room = shape.room(batch);
            for (name, step) in STEPS {
                let mut pair = Pair::new(format, shape);
                group.bench_function(name, |b| {
                    b.iter_custom(|requests| {
                        let runs = requests.div_ceil(u64::from(room));
                        let ticks = (0..runs).map(|_| timer.step(&mut pair, step, room, batch)).sum();
                        timer.scale(ticks, runs, u64::from(room), requests)
                    });
                });
            }
            let mut pair = Pair::new(format, shape);
            group.bench_function("turn", |b| {
                b.iter_custom(|requests| {
                    let turns = requests.div_ceil(each);
                    let ticks = timer.ticks(true, || {
                        for _ in 0..turns {
                            pair.submit(batch);
                            pair.null(batch);
                            pair.collect(batch);
                        }
                    });
                    timer.scale(ticks, turns, each, requests)
                });
            });
            let mut device = Device::new(format, shape);
            group.bench_function("device", |b| {
                b.iter_custom(|requests| {
                    let turns = requests.div_ceil(each);
                    let ticks = timer.ticks(true, || {
                        for _ in 0..turns {
                            device.submit(batch);
                            device.round();
                            device.collect(batch);
                        }
                    });
                    timer.scale(ticks, turns, each, requests)
                });
            });
            group.finish();
        }
    }
    criterion.final_summary();
}
