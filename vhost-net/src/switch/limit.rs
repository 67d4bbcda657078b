//! Rate limits: token buckets ([`poll_engine::limit`]) of packets and of bits, and limits of storms.
//!
//! A packet passes as long as no bucket is in debt, and may put it in debt. So within any time `t` there passes at most
//! `rate * (t + burst)`, and one packet for each reactor that is at it.

use std::time::Duration;

use poll_engine::limit::{BURST, Bucket};

/// How much may pass.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Rate {
    /// Packets a second; a frame to be segmented counts as what it becomes.
    pub packets: Option<u64>,
    /// Bits a second, of frames from their addresses to their payload's end.
    pub bits: Option<u64>,
    /// How long the bucket takes to fill up: a burst is what passes in this time.
    pub burst: Option<Duration>,
}

/// A limit of packets and bits a second.
#[derive(Debug)]
pub struct Limiter {
    packets: Option<Bucket>,
    bits: Option<Bucket>,
}

impl Limiter {
    /// With full buckets. `None` when nothing is limited.
    pub fn new(rate: Rate) -> Option<Limiter> {
        let burst = rate.burst.unwrap_or(BURST);
        let bucket = |per_second: Option<u64>| per_second.map(|n| Bucket::new(n, burst));
        let (packets, bits) = (bucket(rate.packets), bucket(rate.bits));
        (packets.is_some() || bits.is_some()).then_some(Limiter { packets, bits })
    }

    fn buckets(&self) -> impl Iterator<Item = &Bucket> {
        self.packets.iter().chain(&self.bits)
    }

    /// Whether something may pass at `now` (nanoseconds); it is not charged.
    #[inline]
    pub fn is_open(&self, now: u64) -> bool {
        self.buckets().all(|b| b.is_open(now))
    }

    /// Lets `packets` of `bytes` together pass at `now` (nanoseconds), or not.
    #[inline]
    pub fn take(&self, now: u64, packets: u32, bytes: u32) -> bool {
        let open = self.is_open(now);
        if open {
            self.packets.iter().for_each(|b| b.charge(now, u64::from(packets)));
            self.bits.iter().for_each(|b| b.charge(now, 8 * u64::from(bytes)));
        }
        open
    }

    /// Nanoseconds: from when on something may pass. May be past.
    pub fn open_at(&self) -> u64 {
        self.buckets().map(Bucket::open_at).max().unwrap_or(0)
    }
}

/// Frames that go to many ports, in packets a second for each kind; `None`: as many as there are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StormRates {
    /// To all.
    pub broadcast: Option<u64>,
    /// To a group.
    pub multicast: Option<u64>,
    /// To one that nobody knows.
    pub unknown: Option<u64>,
}

/// Limits of what a port may send to many.
#[derive(Debug)]
pub struct Storm {
    /// To all.
    pub broadcast: Option<Limiter>,
    /// To a group.
    pub multicast: Option<Limiter>,
    /// To one that nobody knows.
    pub unknown: Option<Limiter>,
}

impl Storm {
    /// Whether anything is limited.
    pub fn limits(&self) -> bool {
        self.broadcast.is_some() || self.multicast.is_some() || self.unknown.is_some()
    }

    /// With full buckets.
    pub fn new(rates: StormRates) -> Storm {
        let limiter = |packets| Limiter::new(Rate { packets, ..Rate::default() });
        Storm {
            broadcast: limiter(rates.broadcast),
            multicast: limiter(rates.multicast),
            unknown: limiter(rates.unknown),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: u64 = 1_000_000;

    fn limiter(packets: u64, burst_ms: u64) -> Limiter {
        let burst = Some(Duration::from_millis(burst_ms));
        Limiter::new(Rate { packets: Some(packets), bits: None, burst }).unwrap()
    }

    #[test]
    fn a_burst_passes_and_then_the_rate() {
        let l = limiter(1000, 10);
        // Ten milliseconds at a thousand a second, and the one that puts it in debt.
        assert_eq!((0..100).filter(|_| l.take(0, 1, 0)).count(), 11);
        assert_eq!(l.open_at(), MS);
        assert!(!l.take(MS - 1, 1, 0));
        assert!(l.take(MS, 1, 0));
        assert_eq!((0..10 * MS).step_by(1000).filter(|at| l.take(2 * MS + at, 1, 0)).count(), 10);
        // It does not save up more than a burst.
        assert_eq!((0..100).filter(|_| l.take(60_000 * MS, 1, 0)).count(), 11);
    }

    #[test]
    fn a_frame_larger_than_the_bucket_passes_and_is_paid_for() {
        let rate = Rate { bits: Some(8_000_000), burst: Some(Duration::ZERO), ..Rate::default() };
        let l = Limiter::new(rate).unwrap();
        assert!(l.take(5, 45, 65_000));
        assert_eq!(l.open_at(), 5 + 65 * MS);
        assert!(!l.take(65 * MS + 4, 1, 60));
        assert!(l.take(65 * MS + 5, 1, 60));
    }

    #[test]
    fn what_one_bucket_refuses_is_not_taken_from_the_other() {
        let burst = Some(Duration::from_millis(2));
        let l = Limiter::new(Rate { packets: Some(1000), bits: Some(8_000_000), burst }).unwrap();
        assert_eq!((0..100).filter(|_| l.take(0, 1, 100)).count(), 3);
        // Three frames of 0.1 ms each, not a hundred, in a bucket of two.
        let bits = l.bits.as_ref().unwrap();
        assert!(bits.is_open(0));
        bits.charge(0, 8 * 1800);
        assert_eq!(bits.open_at(), 100_000);
    }

    #[test]
    fn extremes_neither_overflow_nor_stick() {
        for per_second in [0, 1, u64::MAX] {
            let l = limiter(per_second, 1);
            assert!(l.take(0, u32::MAX, u32::MAX));
            l.take(u64::MAX, u32::MAX, u32::MAX);
        }
        assert!(Limiter::new(Rate::default()).is_none());
    }
}
