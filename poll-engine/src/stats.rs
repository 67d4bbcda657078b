//! Per-queue counters and latency: written by the one reactor that owns the queue, read by anyone at any time.
//!
//! Every number is an atomic with one writer, so a count is a load, an add and a store: no locked instruction, no
//! fence, and a reader costs the data path nothing but the occasional cache line.

use std::sync::atomic::{AtomicU64, Ordering};

/// A counter with a single writer.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Adds `n` (only the owning reactor may).
    #[inline]
    pub fn add(&self, n: u64) {
        self.0.store(self.0.load(Ordering::Relaxed).wrapping_add(n), Ordering::Relaxed);
    }

    /// Raises to `n` if that is more.
    #[inline]
    pub fn raise(&self, n: u64) {
        if n > self.0.load(Ordering::Relaxed) {
            self.0.store(n, Ordering::Relaxed);
        }
    }

    /// The value now.
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// What can go wrong with a request or a queue, as counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(usize)]
pub enum ErrorKind {
    /// A broken ring or chain: indices, loops, indirect tables. Stops the queue.
    Ring,
    /// A ring or buffer address outside guest memory. Stops the queue.
    Memory,
    /// A request without a whole header, a writable status byte or the right data for its type.
    Malformed,
    /// A request beyond the end of the device, or not in its block size.
    Range,
    /// A request type or flag the device does not offer.
    Unsupported,
    /// A write to a read-only device.
    ReadOnly,
    /// The back end's own failure.
    Io,
    /// The event descriptor of a queue fails.
    Notify,
}

/// Names of [`ErrorKind`], in order.
pub const ERROR_KINDS: [(ErrorKind, &str); 8] = [
    (ErrorKind::Ring, "ring"),
    (ErrorKind::Memory, "memory"),
    (ErrorKind::Malformed, "malformed"),
    (ErrorKind::Range, "range"),
    (ErrorKind::Unsupported, "unsupported"),
    (ErrorKind::ReadOnly, "read-only"),
    (ErrorKind::Io, "io"),
    (ErrorKind::Notify, "notify"),
];

/// The counters of one queue. They outlive the queue's starts and stops.
#[derive(Debug, Default)]
pub struct QueueStats {
    /// Requests completed.
    pub requests: Counter,
    /// Bytes read by the guest.
    pub bytes_read: Counter,
    /// Bytes written by the guest.
    pub bytes_written: Counter,
    /// Times the ring was looked at.
    pub polls: Counter,
    /// Times it had nothing.
    pub empty_polls: Counter,
    /// Notifications taken from the driver.
    pub kicks: Counter,
    /// How many of these had the reactor look at the ring again, which it had left to its kick.
    pub kicks_dormant: Counter,
    /// Interrupts sent to the driver.
    pub signals: Counter,
    /// Publishes after which the driver wanted no interrupt.
    pub signals_suppressed: Counter,
    /// Times it had to wait for an address to be translated.
    pub iotlb_misses: Counter,
    /// Times that a limit had it leave its chains where they were.
    pub limited: Counter,
    /// For how long, in nanoseconds.
    pub limited_ns: Counter,
    /// How much of that the reactor came too late, when that was so long that the limit let less pass than it is to; in
    /// nanoseconds.
    pub limited_late_ns: Counter,
    /// Most requests ever in flight at once.
    pub in_flight_peak: Counter,
    errors: [Counter; ERROR_KINDS.len()],
    /// Number of the reactor that it runs on, and one; 0 while it does not run. Written by its control thread.
    reactor: AtomicU64,
    /// Time from taking a request to giving it back, in nanoseconds.
    pub latency: Histogram,
}

impl QueueStats {
    /// Counts an error; true when it is the first of its kind, which is the one to log.
    pub fn error(&self, kind: ErrorKind) -> bool {
        let counter = &self.errors[kind as usize];
        counter.add(1);
        counter.get() == 1
    }

    /// Notes which reactor the queue runs on.
    pub fn runs_on(&self, reactor: Option<usize>) {
        self.reactor.store(reactor.map_or(0, |number| number as u64 + 1), Ordering::Release);
    }

    /// The number of the reactor that the queue runs on, if it runs.
    pub fn reactor(&self) -> Option<usize> {
        self.reactor.load(Ordering::Acquire).checked_sub(1).map(|number| number as usize)
    }

    /// How many errors of this kind.
    pub fn errors(&self, kind: ErrorKind) -> u64 {
        self.errors[kind as usize].get()
    }

    /// How many errors of any kind.
    pub fn errors_total(&self) -> u64 {
        self.errors.iter().map(Counter::get).sum()
    }
}

/// Bits of a value below its leading one that a bucket keeps: 16 buckets a power of two, so 6 % at worst.
const SUB_BITS: u32 = 4;
const SUB: usize = 1 << SUB_BITS;
/// Values from 2^36 ns (69 s) on share the last bucket.
const MAX_BITS: u32 = 36;
const BUCKETS: usize = (MAX_BITS - SUB_BITS + 1) as usize * SUB;

/// A log-linear histogram with a single writer.
#[derive(Debug)]
pub struct Histogram {
    buckets: Box<[Counter]>,
}

impl Default for Histogram {
    fn default() -> Self {
        Histogram { buckets: std::iter::repeat_with(Counter::default).take(BUCKETS).collect() }
    }
}

impl Histogram {
    #[inline]
    fn bucket(value: u64) -> usize {
        if value < SUB as u64 {
            return value as usize;
        }
        let top = value.ilog2();
        if top >= MAX_BITS {
            return BUCKETS - 1;
        }
        let shift = top - SUB_BITS;
        (shift as usize + 1) * SUB + ((value >> shift) as usize & (SUB - 1))
    }

    /// The largest value that falls into bucket `i`.
    fn upper(i: usize) -> u64 {
        if i < SUB {
            return i as u64;
        }
        let shift = (i / SUB - 1) as u32;
        (((SUB + i % SUB) as u64 + 1) << shift) - 1
    }

    /// Counts `value` `times` times.
    #[inline]
    pub fn record(&self, value: u64, times: u64) {
        self.buckets[Self::bucket(value)].add(times);
    }

    /// All counts at this moment, as (largest value of the bucket, count), empty buckets left out.
    pub fn counts(&self) -> Vec<(u64, u64)> {
        let all = self.buckets.iter().enumerate().map(|(i, c)| (Self::upper(i), c.get()));
        all.filter(|&(_, n)| n > 0).collect()
    }
}

/// The value below which `percent` of the counts lie (as [`Histogram::counts`] gives them); 0 when there are none.
pub fn percentile(counts: &[(u64, u64)], percent: f64) -> u64 {
    let total: u64 = counts.iter().map(|&(_, n)| n).sum();
    let rank = ((percent / 100.0 * total as f64).ceil() as u64).max(1);
    let mut seen = 0;
    for &(value, n) in counts {
        seen += n;
        if seen >= rank {
            return value;
        }
    }
    0
}

/// Adds histograms up, for a device of several queues.
pub fn merge(all: impl IntoIterator<Item = Vec<(u64, u64)>>) -> Vec<(u64, u64)> {
    let mut sum = std::collections::BTreeMap::new();
    for (value, n) in all.into_iter().flatten() {
        *sum.entry(value).or_insert(0) += n;
    }
    sum.into_iter().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_value_falls_into_a_bucket_within_one_sixteenth() {
        let mut last = 0;
        let wide = (15..MAX_BITS).flat_map(|b| [1 << b, (1 << b) + 12_345, (2 << b) - 1]);
        for value in (0..20_000u64).chain(wide) {
            let i = Histogram::bucket(value);
            assert!(Histogram::upper(i) >= value, "{value} above its bucket");
            assert!(Histogram::upper(i) - value <= value / SUB as u64, "{value} in too wide a bucket");
            assert!(i >= last, "buckets out of order at {value}");
            last = i;
        }
        assert_eq!(Histogram::bucket(u64::MAX), BUCKETS - 1);
    }

    #[test]
    fn percentiles_follow_the_counts() {
        let h = Histogram::default();
        h.record(10, 90);
        h.record(1000, 9);
        h.record(100_000, 1);
        let counts = h.counts();
        assert_eq!(percentile(&counts, 50.0), 10);
        assert!((1000..1070).contains(&percentile(&counts, 99.0)));
        assert!(percentile(&counts, 100.0) >= 100_000);
        assert_eq!(percentile(&[], 50.0), 0);
    }

    #[test]
    fn only_the_first_error_of_a_kind_is_to_be_logged() {
        let s = QueueStats::default();
        assert!(s.error(ErrorKind::Ring));
        assert!(!s.error(ErrorKind::Ring));
        assert!(s.error(ErrorKind::Io));
        assert_eq!((s.errors(ErrorKind::Ring), s.errors_total()), (2, 3));
    }
}
