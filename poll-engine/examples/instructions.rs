//! What `scripts/instructions.sh` counts the instructions of: the steps of a request, by the names of their functions.
//!
//! Without arguments it lists the cases; with a format, a chain's form, a batch and a number of requests it runs one.
//! An example and not a benchmark, because benchmarks are built to unwind and the programs are not.
#![allow(clippy::unwrap_used)] // arguments come from the script

#[path = "../benches/pair/mod.rs"]
mod pair;

use std::hint::black_box;
use std::time::Duration;

use pair::{BATCHES, Device, FORMATS, Pair, SHAPES};
use poll_engine::clock::Clock;

fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [format, shape, batch, requests] = args.as_slice() else {
        for (format, shape) in FORMATS.iter().flat_map(|f| SHAPES.iter().map(move |s| (f, s))) {
            for batch in BATCHES {
                println!("{} {} {batch}", format.name, shape.name);
            }
        }
        return;
    };
    let format = *FORMATS.iter().find(|f| f.name == *format).unwrap();
    let shape = *SHAPES.iter().find(|s| s.name == *shape).unwrap();
    let batch: u16 = batch.parse().unwrap();
    let batches = requests.parse::<u64>().unwrap() / u64::from(batch);

    // How long the clock measures what a tick is worth is not to be counted.
    let clock = Clock::new();
    std::thread::sleep(Duration::from_millis(30));
    black_box(clock.delta_as_nanos(0, 1));

    let mut steps = Pair::new(format, shape);
    for _ in 0..batches {
        steps.submit(batch);
        steps.pop(batch);
        steps.validate(batch);
        steps.complete(batch);
        steps.publish();
        steps.collect(batch);
    }
    // A pair of its own: the storage of chains is warmed up by the one as by the other.
    let mut whole = Pair::new(format, shape);
    for _ in 0..batches {
        whole.submit(batch);
        whole.null(batch);
        whole.collect(batch);
    }
    let mut device = Device::new(format, shape);
    for _ in 0..batches {
        device.submit(batch);
        assert_eq!(device.round(), usize::from(batch));
        device.collect(batch);
    }
}
