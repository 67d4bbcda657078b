//! Results in words, much as fio prints them.

use crate::fio_json::grouped;
use crate::measure::Side;
use crate::report::Summary;
use crate::run::{Entry, Report};

/// Prints all jobs, and their sum if there are several.
pub fn print(report: &Report) {
    // What could not even begin has said so.
    if report.failure.is_some() && report.entries.iter().all(|e| e.result.requests == 0) {
        return;
    }
    for entry in &grouped(&report.entries) {
        job(entry);
    }
    for jobs in report.entries.chunk_by(|a, b| a.group == b.group) {
        if jobs.len() > 1 {
            let results: Vec<_> = jobs.iter().map(|e| e.result.clone()).collect();
            let sum = Summary::of(&results);
            println!(
                "group {}: {} jobs, IOPS={}, clat p50={:.2} p99={:.2} p99.9={:.2} us, kicks={}, cpu={:.2} s",
                jobs[0].group,
                jobs.len(),
                short(sum.iops, 1000.0, &["", "k", "M"]),
                sum.us(50.0),
                sum.us(99.0),
                sum.us(99.9),
                sum.kicks,
                sum.cpu_seconds
            );
        }
    }
    if report.failure.is_some() {
        println!("partial result: the run did not end as it should");
    }
}

fn job(entry: &Entry) {
    let Entry { spec, group, result, .. } = entry;
    let error = result.failure.as_ref().map_or(0, |f| f.errno);
    let blocks = spec.sizes.each_ref().map(|s| {
        let (small, large) = s.range();
        if small == large { format!("{small}") } else { format!("{small}-{large}") }
    });
    println!(
        "{}: (groupid={group}, jobs={}): err={error}, rw={}, bs={}/{}, iodepth={}",
        spec.name,
        result.jobs,
        format!("{:?}", spec.rw).to_lowercase(),
        blocks[0],
        blocks[1],
        spec.iodepth
    );
    for (name, side) in [("read", &result.read), ("write", &result.write)] {
        if side.ios > 0 {
            direction(name, side);
        }
    }
    if result.sync.ios > 0 {
        println!("  fsync: {}", result.sync.ios);
        latency("sync", &result.sync);
    }
    let (user, system) = result.cpu_percent();
    println!("  cpu: usr={user:.2}%, sys={system:.2}%, ctx={}, kicks={}", result.cost.switches, result.kicks);
}

fn direction(name: &str, side: &Side) {
    let seconds = side.seconds.max(1e-9);
    println!(
        "  {name}: IOPS={}, BW={}/s ({}/s)({}/{:.0}msec)",
        short(side.ios as f64 / seconds, 1000.0, &["", "k", "M"]),
        short(side.bytes as f64 / seconds, 1024.0, &["B", "KiB", "MiB", "GiB", "TiB"]),
        short(side.bytes as f64 / seconds, 1000.0, &["B", "kB", "MB", "GB", "TB"]),
        short(side.bytes as f64, 1024.0, &["B", "KiB", "MiB", "GiB", "TiB"]),
        seconds * 1000.0
    );
    latency("clat", side);
}

fn latency(name: &str, side: &Side) {
    let latency = &side.latency;
    let (unit, scale) = match (latency.min(), latency.max()) {
        (2_000_001.., 100_000_000..) => ("msec", 1e6),
        (2001.., 100_000..) => ("usec", 1e3),
        _ => ("nsec", 1.0),
    };
    let digits = if scale > 1.0 { 2 } else { 0 };
    let value = |n: f64| format!("{:.digits$}", n / scale);
    println!(
        "    {name} ({unit}): min={}, max={}, avg={}, stdev={}",
        value(latency.min() as f64),
        value(latency.max() as f64),
        value(latency.mean()),
        value(latency.stdev())
    );
    let at = |p: f64| format!("{p}th={}", value(latency.value_at_percentile(p) as f64));
    println!("    {name} percentiles ({unit}): {}", [1.0, 50.0, 90.0, 99.0, 99.9, 99.99].map(at).join(", "));
    if side.waits.n > 0 {
        println!(
            "    of that waiting for the queue ({unit}): avg={}, max={}, in {} requests",
            value(side.waits.mean()),
            value(side.waits.max),
            side.waits.n
        );
    }
}

/// Three digits or more, and a unit.
fn short(mut n: f64, step: f64, units: &[&str]) -> String {
    let mut unit = 0;
    // As fio: 9999 stays whole.
    while n >= if unit == 0 { 10_000.0 } else { step } && unit + 1 < units.len() {
        n /= step;
        unit += 1;
    }
    let digits = usize::from(unit > 0 && n < 100.0);
    format!("{n:.digits$}{}", units[unit])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_short() {
        let rate = |n| short(n, 1000.0, &["", "k", "M"]);
        assert_eq!(
            [rate(9.0), rate(9999.0), rate(12_345.0), rate(1_234_567.0)],
            ["9", "9999", "12.3k", "1.2M"]
        );
        assert_eq!(short(2_147_483_648.0, 1024.0, &["B", "KiB", "MiB", "GiB"]), "2.0GiB");
    }
}
