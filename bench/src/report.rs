//! What jobs have measured, added up.

use hdrhistogram::Histogram;

use crate::job::JobResult;

/// The sum of all jobs.
#[derive(Debug)]
pub struct Summary {
    /// Requests a second.
    pub iops: f64,
    /// Requests measured.
    pub requests: u64,
    /// Kicks sent.
    pub kicks: u64,
    /// CPU seconds of the jobs in all.
    pub cpu_seconds: f64,
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
