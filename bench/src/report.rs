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
    /// Of packets, what went over the wire.
    pub wire: Option<Wire>,
    latency: Histogram<u64>,
}

/// What went over the wire.
#[derive(Clone, Copy, Debug)]
pub struct Wire {
    /// Gbit/s of frames that arrived.
    pub gbits: f64,
    /// Percent of those sent that did not.
    pub loss_percent: f64,
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
            wire: None,
            latency,
        }
    }

    /// Of packets: those that arrived.
    pub fn of_packets(requests: u64, seconds: f64, wire: Wire, latency: Histogram<u64>) -> Summary {
        let iops = requests as f64 / seconds.max(1e-9);
        Summary { iops, requests, kicks: 0, cpu_seconds: 0.0, wire: Some(wire), latency }
    }

    /// A latency percentile in microseconds.
    pub fn us(&self, percent: f64) -> f64 {
        self.latency.value_at_percentile(percent) as f64 / 1000.0
    }
}
