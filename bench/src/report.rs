//! Results in words or JSON.

use hdrhistogram::Histogram;
use serde_json::json;

use crate::Run;
use crate::job::JobResult;

/// The sum of all jobs.
#[derive(Debug)]
pub struct Summary {
    /// Requests a second.
    pub iops: f64,
    /// Requests measured.
    pub requests: u64,
    kicks: u64,
    cpu_seconds: f64,
    latency: Histogram<u64>,
}

impl Summary {
    /// Adds jobs up.
    pub fn of(jobs: &[JobResult]) -> Summary {
        let empty = jobs.first().map(|j| Histogram::new_from(&j.latency));
        let mut latency = empty.unwrap_or_else(|| unreachable!("a run has at least one job"));
        for job in jobs {
            // Same settings, so it always fits.
            let _ = latency.add(&job.latency);
        }
        Summary {
            iops: jobs.iter().map(|j| j.requests as f64 / j.seconds.max(1e-9)).sum(),
            requests: jobs.iter().map(|j| j.requests).sum(),
            kicks: jobs.iter().map(|j| j.kicks).sum(),
            cpu_seconds: jobs.iter().map(|j| j.cpu_seconds).sum(),
            latency,
        }
    }

    /// A latency percentile in microseconds.
    pub fn us(&self, percent: f64) -> f64 {
        self.latency.value_at_percentile(percent) as f64 / 1000.0
    }
}

/// Prints the sum of all jobs.
pub fn print(run: &Run, jobs: &[JobResult]) {
    let load = &run.load;
    let sum = Summary::of(jobs);
    let [p50, p90, p99, p999, max] = [50.0, 90.0, 99.0, 99.9, 100.0].map(|p| sum.us(p));
    let (iops, rw) = (sum.iops, format!("{:?}", load.rw).to_lowercase());
    if run.json {
        println!(
            "{}",
            json!({
                "rw": rw, "bs": load.bs, "iodepth": load.iodepth, "numjobs": load.numjobs,
                "requests": sum.requests, "iops": iops, "kicks": sum.kicks, "driver_cpu_seconds": sum.cpu_seconds,
                "latency_us": { "p50": p50, "p90": p90, "p99": p99, "p99.9": p999, "max": max },
            })
        );
    } else {
        let mib = iops * f64::from(load.bs) / f64::from(1 << 20);
        println!(
            "{rw} bs={} iodepth={} numjobs={}: {iops:.0} IOPS, {mib:.1} MiB/s, latency us p50={p50:.2} p90={p90:.2} \
             p99={p99:.2} p99.9={p999:.2} max={max:.2}, {} kicks",
            load.bs, load.iodepth, load.numjobs, sum.kicks,
        );
    }
}
