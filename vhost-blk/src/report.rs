//! Statistics as text: a line for the disk, a line for each queue, one for each kind of error that has happened, and one
//! each for a disk behind a vIOMMU and one that was kept to a limit.

use std::fmt::Write;
use std::sync::Arc;

use poll_engine::stats::{ERROR_KINDS, QueueStats, merge, percentile};

/// Column heads; times are in microseconds.
const HEAD: &str = "queue    requests          read       written errors        polls        empty    kicks  signals suppressed peak \
                    p50-us p99-us p99.9-us max-us";

/// The report of one disk.
pub fn report(name: &str, capacity: u64, queues: &[Arc<QueueStats>]) -> String {
    let mut out = format!("disk {name} {capacity} bytes, {} queues\n{HEAD}\n", queues.len());
    for (i, queue) in queues.iter().enumerate() {
        line(&mut out, &i.to_string(), std::slice::from_ref(queue));
    }
    line(&mut out, "all", queues);
    for (kind, name) in ERROR_KINDS {
        let count: u64 = queues.iter().map(|q| q.errors(kind)).sum();
        if count > 0 {
            let _ = writeln!(out, "errors {name} {count}");
        }
    }
    // Times that a queue had to wait for an address to be translated.
    let misses: u64 = queues.iter().map(|q| q.iotlb_misses.get()).sum();
    if misses > 0 {
        let _ = writeln!(out, "iotlb misses {misses}");
    }
    let sum = |of: fn(&QueueStats) -> u64| queues.iter().map(|q| of(q)).sum::<u64>();
    let times = sum(|q| q.limited.get());
    if times > 0 {
        let seconds = sum(|q| q.limited_ns.get()) as f64 / 1e9;
        let _ = writeln!(out, "limited {times} times, {seconds:.3} s");
    }
    out
}

fn line(out: &mut String, name: &str, queues: &[Arc<QueueStats>]) {
    let sum = |of: fn(&QueueStats) -> u64| queues.iter().map(|q| of(q)).sum::<u64>();
    let latency = merge(queues.iter().map(|q| q.latency.counts()));
    let us = |percent: f64| percentile(&latency, percent) as f64 / 1000.0;
    // Writing to a String does not fail.
    let _ = writeln!(
        out,
        "{name:<5} {:>11} {:>13} {:>13} {:>6} {:>12} {:>12} {:>8} {:>8} {:>10} {:>4} {:>6.2} {:>6.2} {:>8.2} {:>6.2}",
        sum(|q| q.requests.get()),
        sum(|q| q.bytes_read.get()),
        sum(|q| q.bytes_written.get()),
        sum(QueueStats::errors_total),
        sum(|q| q.polls.get()),
        sum(|q| q.empty_polls.get()),
        sum(|q| q.kicks.get()),
        sum(|q| q.signals.get()),
        sum(|q| q.signals_suppressed.get()),
        queues.iter().map(|q| q.in_flight_peak.get()).max().unwrap_or(0),
        us(50.0),
        us(99.0),
        us(99.9),
        us(100.0),
    );
}
