//! What is counted while a job runs.

use std::time::Duration;

use hdrhistogram::Histogram;
use nix::sys::resource::{Usage, UsageWho, getrusage};
use nix::sys::time::TimeValLike;

/// Longest latency that is told apart from longer ones.
const LONGEST: u64 = 3_600_000_000_000;
/// How often rates are sampled, as fio does.
pub const SAMPLE: Duration = Duration::from_millis(500);

/// An empty histogram of nanoseconds.
pub fn histogram() -> Histogram<u64> {
    Histogram::new_with_bounds(1, LONGEST, 3).unwrap_or_else(|_| unreachable!("fixed and good bounds"))
}

/// Number, sum and extremes of something.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Moments {
    /// How many.
    pub n: u64,
    /// The smallest.
    pub min: f64,
    /// The largest.
    pub max: f64,
    sum: f64,
    squares: f64,
}

impl Moments {
    /// Adds a value.
    pub fn add(&mut self, value: f64) {
        self.min = if self.n == 0 { value } else { self.min.min(value) };
        self.max = self.max.max(value);
        self.n += 1;
        self.sum += value;
        self.squares += value * value;
    }

    /// Adds those of another job.
    pub fn merge(&mut self, other: &Moments) {
        if other.n > 0 {
            self.min = if self.n == 0 { other.min } else { self.min.min(other.min) };
            self.max = self.max.max(other.max);
            self.n += other.n;
            self.sum += other.sum;
            self.squares += other.squares;
        }
    }

    /// The mean, 0 of nothing.
    pub fn mean(&self) -> f64 {
        self.sum / self.n.max(1) as f64
    }

    /// The standard deviation.
    pub fn deviation(&self) -> f64 {
        let mean = self.mean();
        (self.squares / self.n.max(1) as f64 - mean * mean).max(0.0).sqrt()
    }
}

/// Reads, or writes, of a job.
#[derive(Clone, Debug)]
pub struct Side {
    /// Requests.
    pub ios: u64,
    /// Bytes.
    pub bytes: u64,
    /// Seconds in which there could be any.
    pub seconds: f64,
    /// Latencies in nanoseconds.
    pub latency: Histogram<u64>,
    /// What of them was waiting for the queue.
    pub waits: Moments,
    /// Requests a second, sampled.
    pub iops: Moments,
    /// Bytes a second, sampled.
    pub bandwidth: Moments,
    sampled: (u64, u64),
}

impl Default for Side {
    fn default() -> Side {
        Side {
            ios: 0,
            bytes: 0,
            seconds: 0.0,
            latency: histogram(),
            waits: Moments::default(),
            iops: Moments::default(),
            bandwidth: Moments::default(),
            sampled: (0, 0),
        }
    }
}

impl Side {
    /// A finished request.
    #[inline]
    pub fn count(&mut self, bytes: u32, latency: u64) {
        self.ios += 1;
        self.bytes += u64::from(bytes);
        self.latency.saturating_record(latency);
    }

    /// The rate since the last sample.
    pub fn sample(&mut self, seconds: f64) {
        let (ios, bytes) = (self.ios - self.sampled.0, self.bytes - self.sampled.1);
        self.sampled = (self.ios, self.bytes);
        if self.ios > 0 {
            self.iops.add(ios as f64 / seconds);
            self.bandwidth.add(bytes as f64 / seconds);
        }
    }

    /// Adds those of another job of the same time.
    pub fn merge(&mut self, other: &Side) {
        self.ios += other.ios;
        self.bytes += other.bytes;
        self.seconds = self.seconds.max(other.seconds);
        // Same bounds, so it always fits.
        let _ = self.latency.add(&other.latency);
        self.waits.merge(&other.waits);
        self.iops.merge(&other.iops);
        self.bandwidth.merge(&other.bandwidth);
    }
}

/// Requests by depth or batch, in fio's classes: 0, up to 4, 8, 16, 32, 64 and more.
#[derive(Clone, Copy, Debug, Default)]
pub struct Batches(pub [u64; 7]);

impl Batches {
    /// `weight` at `n`.
    #[inline]
    pub fn add(&mut self, n: usize, weight: u64) {
        let class = match n {
            0 => 0,
            1..=4 => 1,
            _ => (n - 1).ilog2() as usize,
        };
        self.0[class.min(6)] += weight;
    }

    /// Depth `n`, whose classes are 1, 2, 4, 8, 16, 32, 64 and more.
    #[inline]
    pub fn add_depth(&mut self, n: usize, weight: u64) {
        self.0[(n.max(1).ilog2() as usize).min(6)] += weight;
    }

    /// Percentages.
    pub fn percent(&self) -> [f64; 7] {
        let all = self.0.iter().sum::<u64>().max(1) as f64;
        self.0.map(|n| n as f64 * 100.0 / all)
    }

    /// Adds those of another job.
    pub fn merge(&mut self, other: &Batches) {
        for (sum, n) in self.0.iter_mut().zip(other.0) {
            *sum += n;
        }
    }
}

/// What the thread took of the machine.
#[derive(Clone, Copy, Debug, Default)]
pub struct Cost {
    /// CPU seconds in user mode.
    pub user: f64,
    /// CPU seconds in the kernel.
    pub system: f64,
    /// Context switches.
    pub switches: i64,
    /// Page faults with input.
    pub major: i64,
    /// Page faults without.
    pub minor: i64,
}

impl Cost {
    /// Of the calling thread since it began.
    pub fn now() -> Cost {
        let seconds = |time: nix::sys::time::TimeVal| time.num_microseconds() as f64 / 1e6;
        getrusage(UsageWho::RUSAGE_THREAD).map_or(Cost::default(), |u: Usage| Cost {
            user: seconds(u.user_time()),
            system: seconds(u.system_time()),
            switches: u.voluntary_context_switches() + u.involuntary_context_switches(),
            major: u.major_page_faults(),
            minor: u.minor_page_faults(),
        })
    }

    /// Adds (or with -1 takes away) another.
    pub fn add(&mut self, other: &Cost, sign: i64) {
        self.user += other.user * sign as f64;
        self.system += other.system * sign as f64;
        self.switches += other.switches * sign;
        self.major += other.major * sign;
        self.minor += other.minor * sign;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_within_a_thousandth() {
        let mut side = Side::default();
        for n in 1..=100_000 {
            side.count(4096, n * 10);
        }
        for (percent, exact) in [(50.0, 500_000.0), (99.0, 990_000.0), (99.9, 999_000.0)] {
            let found = side.latency.value_at_percentile(percent) as f64;
            assert!((found / exact - 1.0).abs() < 0.001, "{percent}: {found}");
        }
        assert_eq!((side.ios, side.bytes), (100_000, 409_600_000));
    }

    #[test]
    fn jobs_add_up() {
        let (mut a, mut b) = (Side::default(), Side::default());
        a.count(512, 100);
        b.count(512, 300);
        b.count(512, 500);
        (a.seconds, b.seconds) = (1.0, 2.0);
        a.sample(0.5);
        b.sample(0.5);
        a.merge(&b);
        assert_eq!((a.ios, a.seconds, a.latency.len()), (3, 2.0, 3));
        assert_eq!((a.iops.n, a.iops.min, a.iops.max, a.iops.mean()), (2, 2.0, 4.0, 3.0));
        assert!((a.iops.deviation() - 1.0).abs() < 1e-9);
    }

    #[test]
    fn classes_are_fios() {
        let mut batches = Batches::default();
        for n in [0, 1, 4, 5, 8, 9, 32, 33, 64, 65, 1000] {
            batches.add(n, 1);
        }
        assert_eq!(batches.0, [1, 2, 2, 1, 1, 2, 2]);
    }
}
