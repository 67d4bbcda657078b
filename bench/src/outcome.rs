//! What a job has measured, and how it ended.

use hdrhistogram::Histogram;

use crate::measure::{Batches, Cost, Side, histogram};
use crate::requests::{Op, Region};
use crate::verify::Ledger;

/// Why a job ended before its time.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    /// In words.
    pub message: String,
    /// As a number, for JSON.
    pub errno: i32,
}

/// What a job measured.
#[derive(Clone, Debug)]
pub struct JobResult {
    /// Requests finished in the measured time.
    pub requests: u64,
    /// Seconds measured.
    pub seconds: f64,
    /// Latencies in nanoseconds.
    pub latency: Histogram<u64>,
    /// Kicks sent.
    pub kicks: u64,
    /// CPU seconds of this thread in all.
    pub cpu_seconds: f64,
    /// The reads.
    pub read: Side,
    /// The writes.
    pub write: Side,
    /// The flushes, which are in none of the sums.
    pub sync: Side,
    /// Requests in flight when one was sent.
    pub depths: Batches,
    /// Requests sent at once.
    pub sent: Batches,
    /// Requests collected at once.
    pub collected: Batches,
    /// What the measured time took of the machine.
    pub cost: Cost,
    /// How many jobs this is the sum of.
    pub jobs: u64,
    /// What went wrong.
    pub failure: Option<Failure>,
    /// Where it worked.
    pub region: Region,
    /// What it has written, if it verifies.
    pub ledger: Option<Ledger>,
}

impl JobResult {
    /// Of a job that has done nothing.
    pub fn nothing(region: Region, failure: Option<Failure>) -> JobResult {
        JobResult {
            requests: 0,
            seconds: 0.0,
            latency: histogram(),
            kicks: 0,
            cpu_seconds: 0.0,
            read: Side::default(),
            write: Side::default(),
            sync: Side::default(),
            depths: Batches::default(),
            sent: Batches::default(),
            collected: Batches::default(),
            cost: Cost::default(),
            jobs: 1,
            failure,
            region,
            ledger: None,
        }
    }

    /// Where requests of a kind are counted.
    #[inline]
    pub fn side(&mut self, op: Op) -> &mut Side {
        match op {
            Op::Read => &mut self.read,
            Op::Write => &mut self.write,
            Op::Flush => &mut self.sync,
        }
    }

    /// CPU time in user mode and in the kernel, as percentages of the measured time.
    pub fn cpu_percent(&self) -> (f64, f64) {
        let percent =
            |seconds: f64| (seconds * 100.0 / (self.seconds.max(1e-9) * self.jobs as f64)).clamp(0.0, 100.0);
        if self.seconds > 0.0 { (percent(self.cost.user), percent(self.cost.system)) } else { (0.0, 0.0) }
    }

    /// Adds that of another job of the same section.
    pub fn merge(&mut self, other: &JobResult) {
        self.requests += other.requests;
        self.seconds = self.seconds.max(other.seconds);
        // Same bounds, so it always fits.
        let _ = self.latency.add(&other.latency);
        self.kicks += other.kicks;
        self.cpu_seconds += other.cpu_seconds;
        self.read.merge(&other.read);
        self.write.merge(&other.write);
        self.sync.merge(&other.sync);
        self.depths.merge(&other.depths);
        self.sent.merge(&other.sent);
        self.collected.merge(&other.collected);
        self.cost.add(&other.cost, 1);
        self.jobs += other.jobs;
        self.failure = self.failure.take().or_else(|| other.failure.clone());
    }
}
