//! Results in words or JSON.

use hdrhistogram::Histogram;
use serde_json::json;

use crate::Run;
use crate::job::JobResult;

/// Prints the sum of all jobs.
pub fn print(run: &Run, jobs: &[JobResult]) {
    let mut latency =
        Histogram::<u64>::new(3).unwrap_or_else(|e| unreachable!("three digits are allowed: {e}"));
    for job in jobs {
        // Same settings, so it always fits.
        let _ = latency.add(&job.latency);
    }
    let iops: f64 = jobs.iter().map(|j| j.requests as f64 / j.seconds.max(1e-9)).sum();
    let us = |percent: f64| latency.value_at_percentile(percent) as f64 / 1000.0;
    let kicks: u64 = jobs.iter().map(|j| j.kicks).sum();
    let requests: u64 = jobs.iter().map(|j| j.requests).sum();
    let cpu: f64 = jobs.iter().map(|j| j.cpu_seconds).sum();
    if run.json {
        println!(
            "{}",
            json!({
                "rw": format!("{:?}", run.rw).to_lowercase(), "bs": run.bs, "iodepth": run.iodepth, "numjobs": run.numjobs,
                "requests": requests, "iops": iops, "kicks": kicks, "driver_cpu_seconds": cpu,
                "latency_us": { "p50": us(50.0), "p90": us(90.0), "p99": us(99.0), "p99.9": us(99.9), "max": us(100.0) },
            })
        );
    } else {
        println!(
            "{:?} bs={} iodepth={} numjobs={}: {:.0} IOPS, {:.1} MiB/s, latency us p50={:.2} p90={:.2} p99={:.2} p99.9={:.2} max={:.2}, {} kicks",
            run.rw,
            run.bs,
            run.iodepth,
            run.numjobs,
            iops,
            iops * f64::from(run.bs) / f64::from(1 << 20),
            us(50.0),
            us(90.0),
            us(99.0),
            us(99.9),
            us(100.0),
            kicks,
        );
    }
}
