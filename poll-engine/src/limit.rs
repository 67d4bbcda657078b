//! Token buckets: how much of something may pass in a time. They can be changed while they are asked.
//!
//! A bucket is one number, the time at which it is full again (the "virtual scheduling" of ITU-T I.371): what passes
//! puts that off by what it costs. Something passes as long as the bucket is not in debt, and may put it in debt, so that
//! what is larger than the bucket is not stuck for ever. So within any time `t` there passes at most `rate * (t + burst)`,
//! and one piece for each reactor that is at it; and whoever comes later than it might have loses nothing, as long as that
//! is less than the burst.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// Ticks of a nanosecond: times are in ticks, so that a piece of few nanoseconds still has a price. Good for nine years.
const TICKS: u64 = 64;
const SECOND: u64 = 1_000_000_000 * TICKS;
/// The part of a price behind the point: what a price of one a second leaves room for.
const FRACTION: u32 = 28;

/// How long a bucket takes to fill up where nothing is said: short against a second, in which a rate is to be kept, and
/// long against the time that somebody who waits for it oversleeps.
pub const BURST: Duration = Duration::from_millis(10);

/// How far a bucket may run over for a while, when whoever is to let things pass [came late](Bucket::came_late).
pub const GRACE: Duration = Duration::from_millis(100);
const GRACE_TICKS: u64 = GRACE.as_nanos() as u64 * TICKS;
/// And for which while.
const WHILE: u64 = SECOND;

/// A bucket, shared by the reactors. One that has no rate lets everything pass.
#[derive(Debug, Default)]
pub struct Bucket {
    /// In ticks.
    full_at: AtomicU64,
    /// Ticks of a piece, `FRACTION` bits of them behind the point; 0 without a rate.
    price: AtomicU64,
    /// Ticks.
    burst: AtomicU64,
    /// Until when it may run over, in ticks.
    grace_until: AtomicU64,
}

impl Bucket {
    /// A full one, through which `per_second` pass, at least one, and in a burst as many as in that time.
    pub fn new(per_second: u64, burst: Duration) -> Bucket {
        let bucket = Bucket::default();
        bucket.set(Some((per_second, burst)));
        bucket
    }

    /// Another rate and burst, or none, from now on. The bucket is full.
    pub fn set(&self, rate: Option<(u64, Duration)>) {
        let (price, burst) = rate.map_or((0, 0), |(per_second, burst)| {
            let price = (u128::from(SECOND) << FRACTION).div_ceil(u128::from(per_second.max(1)));
            (price, burst.as_nanos().saturating_mul(u128::from(TICKS)))
        });
        // Whoever asks meanwhile may see some of the old: it is right or wrong by one piece.
        self.price.store(price.try_into().unwrap_or(u64::MAX), Ordering::Relaxed);
        self.burst.store(burst.try_into().unwrap_or(u64::MAX), Ordering::Relaxed);
        self.full_at.store(0, Ordering::Relaxed);
        self.grace_until.store(0, Ordering::Relaxed);
    }

    /// Something waited, and would have passed long before `now` (nanoseconds), had somebody been there to let it: a
    /// reactor whose CPU the system gave to others. That is made up for: for a second, what is not used is kept although
    /// the bucket is full, up to what passes in [`GRACE`].
    #[cold]
    pub fn came_late(&self, now: u64) {
        self.grace_until.store(now.saturating_mul(TICKS).saturating_add(WHILE), Ordering::Relaxed);
    }

    /// Whether something may pass at `now` (nanoseconds).
    #[inline]
    pub fn is_open(&self, now: u64) -> bool {
        let burst = self.burst.load(Ordering::Relaxed);
        self.full_at.load(Ordering::Relaxed) <= now.saturating_mul(TICKS).saturating_add(burst)
    }

    /// Nanoseconds: from when on something may pass. May be past.
    pub fn open_at(&self) -> u64 {
        let burst = self.burst.load(Ordering::Relaxed);
        self.full_at.load(Ordering::Relaxed).saturating_sub(burst).div_ceil(TICKS)
    }

    /// So much passes at `now` (nanoseconds).
    #[inline]
    pub fn charge(&self, now: u64, amount: u64) {
        self.reserve(now, amount);
    }

    /// So much will pass, and is charged at `now` (nanoseconds): from when on it may. May be past. Those who wait come one
    /// after the other, as they have reserved.
    #[inline]
    pub fn reserve(&self, now: u64, amount: u64) -> u64 {
        let price = self.price.load(Ordering::Relaxed);
        if price == 0 {
            return 0;
        }
        let burst = self.burst.load(Ordering::Relaxed);
        let now = now.saturating_mul(TICKS);
        let grace = if now < self.grace_until.load(Ordering::Relaxed) { GRACE_TICKS } else { 0 };
        let from = now.saturating_sub(grace);
        let cost = u64::try_from((u128::from(price) * u128::from(amount)) >> FRACTION).unwrap_or(u64::MAX);
        let later = |full_at: u64| Some(full_at.max(from).saturating_add(cost));
        let (Ok(before) | Err(before)) =
            self.full_at.fetch_update(Ordering::Relaxed, Ordering::Relaxed, later);
        before.saturating_sub(burst).div_ceil(TICKS)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: u64 = 1_000_000;
    const SEC: u64 = 1000 * MS;

    /// What passes if somebody asks every `step` nanoseconds.
    fn passed(bucket: &Bucket, times: std::ops::Range<u64>, step: u64, amount: u64) -> u64 {
        let mut passed = 0;
        for now in times.step_by(step as usize) {
            while bucket.is_open(now) {
                bucket.charge(now, amount);
                passed += amount;
            }
        }
        passed
    }

    #[test]
    fn a_second_lets_pass_what_it_is_to() {
        for (rate, step, amount) in [
            (1, MS, 1),
            (7, MS, 1),
            (1000, 100_000, 1),
            (1_000_000, 70_000, 1),
            // As somebody who sleeps too long by most of a burst.
            (50_000, 9 * MS, 1),
            (100 << 20, 100_000, 4096),
            (10 << 30, 50_000, 65_536),
        ] {
            let bucket = Bucket::new(rate, BURST);
            // It starts full.
            let mut from = 5 * SEC;
            passed(&bucket, from..from + SEC, step, amount);
            for _ in 0..5 {
                from += SEC;
                let n = passed(&bucket, from..from + SEC, step, amount);
                let slack = rate / 50 + amount;
                assert!((rate - slack..=rate + slack).contains(&n), "{n} of {rate} by {amount} in {step} ns");
            }
        }
    }

    #[test]
    fn a_burst_is_saved_up_and_no_more() {
        let bucket = Bucket::new(1000, Duration::from_secs(2));
        assert_eq!(passed(&bucket, 0..1, 1, 1), 2001, "and the one that puts it in debt");
        assert_eq!(bucket.open_at(), MS);
        assert_eq!(passed(&bucket, 60 * SEC..60 * SEC + 1, 1, 1), 2001);
    }

    #[test]
    fn what_is_larger_than_the_bucket_passes_and_is_paid_for() {
        let bucket = Bucket::new(1 << 20, Duration::ZERO);
        bucket.charge(SEC, 8 << 20);
        assert!(!bucket.is_open(9 * SEC - 1));
        assert!(bucket.is_open(9 * SEC));
        assert_eq!(bucket.open_at(), 9 * SEC);
    }

    #[test]
    fn those_who_wait_come_one_after_the_other() {
        let bucket = Bucket::new(1000, Duration::ZERO);
        assert!(bucket.reserve(SEC, 1) <= SEC);
        assert_eq!([1, 2, 1].map(|n| bucket.reserve(SEC, n)), [1, 2, 4].map(|ms| SEC + ms * MS));
        assert!(!bucket.is_open(SEC + 5 * MS - 1) && bucket.is_open(SEC + 5 * MS));
    }

    #[test]
    fn a_change_takes_effect_at_once() {
        let bucket = Bucket::new(1, BURST);
        bucket.charge(0, 1_000_000);
        assert!(!bucket.is_open(999_000 * SEC));
        bucket.set(Some((1000, BURST)));
        assert_eq!(passed(&bucket, 0..SEC, 100_000, 1), 1010);
        bucket.set(None);
        (0..10).for_each(|_| bucket.charge(SEC, u64::MAX));
        assert!(bucket.is_open(0) && bucket.open_at() == 0, "without a rate everything passes");
    }

    #[test]
    fn what_somebody_was_late_for_is_made_up_for_and_not_for_ever() {
        let bucket = Bucket::new(1000, BURST);
        passed(&bucket, SEC..2 * SEC, MS, 1);
        // Nobody there for 80 ms: of that, the burst is left.
        assert_eq!(passed(&bucket, 2 * SEC + 80 * MS..2 * SEC + 80 * MS + 1, 1, 1), 11);
        passed(&bucket, 2 * SEC + 80 * MS..3 * SEC, MS, 1);
        // The same, and it was no choice of those who waited.
        bucket.came_late(3 * SEC + 80 * MS);
        let n = passed(&bucket, 3 * SEC + 80 * MS..3 * SEC + 80 * MS + 1, 1, 1);
        assert!((79..=81).contains(&n), "{n}");
        // Longer than is made up for.
        bucket.came_late(4 * SEC);
        let n = passed(&bucket, 4 * SEC..4 * SEC + 1, 1, 1);
        assert!((109..=112).contains(&n), "{n}");
        // After a second it is as before.
        assert_eq!(passed(&bucket, 6 * SEC..6 * SEC + 1, 1, 1), 11);
    }

    #[test]
    fn extremes_neither_overflow_nor_stick() {
        for per_second in [0, 1, u64::MAX] {
            let bucket = Bucket::new(per_second, Duration::MAX);
            assert!(bucket.is_open(0));
            bucket.charge(0, u64::MAX);
            bucket.charge(u64::MAX, u64::MAX);
            bucket.set(Some((per_second, BURST)));
            assert!(bucket.is_open(0));
        }
    }
}
