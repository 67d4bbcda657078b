//! When requests are due.

use crate::requests::Random;
use crate::spec::Rate;

/// Gives out the times at which requests are due, in nanoseconds of the job's clock.
#[derive(Debug)]
pub struct Pacer {
    rate: Rate,
    random: Random,
    next: f64,
}

impl Pacer {
    /// Starts at time zero.
    pub fn new(rate: Rate, seed: u64) -> Pacer {
        let mut pacer = Pacer { rate, random: Random::new(seed), next: 0.0 };
        if let Rate::Open { poisson: true, .. } = rate {
            pacer.advance();
        }
        pacer
    }

    /// Counts from `now` instead.
    pub fn begin(&mut self, now: u64) {
        self.next += now as f64;
    }

    /// Requests that should have begun by `now` and were not taken; of a Poisson process about as many.
    pub fn due(&self, now: u64) -> u64 {
        match self.rate {
            Rate::Open { rate, .. } if self.next <= now as f64 => {
                ((now as f64 - self.next) * rate / 1e9) as u64 + 1
            }
            _ => 0,
        }
    }

    /// When the next request is due; `None` when at once.
    #[inline]
    pub fn next(&self) -> Option<u64> {
        if self.rate == Rate::Full { None } else { Some(self.next as u64) }
    }

    /// The time from which a request's latency counts, if one is due at `now`, and goes on to the next.
    #[inline]
    pub fn take(&mut self, now: u64) -> Option<u64> {
        let due = self.next as u64;
        match self.rate {
            Rate::Full => Some(now),
            _ if due > now => None,
            Rate::Closed(_) => {
                self.advance();
                Some(now)
            }
            Rate::Open { .. } => {
                self.advance();
                Some(due)
            }
        }
    }

    fn advance(&mut self) {
        self.next += match self.rate {
            Rate::Full => 0.0,
            Rate::Closed(rate) | Rate::Open { rate, poisson: false } => 1e9 / rate,
            Rate::Open { rate, poisson: true } => {
                // 53 bits, from above 0 to 1.
                let uniform = ((self.random.next() >> 11) + 1) as f64 / (1u64 << 53) as f64;
                -uniform.ln() * 1e9 / rate
            }
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_a_rate_everything_is_due_now() {
        let mut pacer = Pacer::new(Rate::Full, 0);
        assert_eq!((pacer.take(7), pacer.take(7), pacer.next()), (Some(7), Some(7), None));
    }

    #[test]
    fn a_closed_loop_counts_from_when_it_sends() {
        let mut pacer = Pacer::new(Rate::Closed(1000.0), 0);
        assert_eq!(pacer.take(5), Some(5));
        assert_eq!((pacer.take(999_999), pacer.next()), (None, Some(1_000_000)));
        assert_eq!(pacer.take(1_000_500), Some(1_000_500));
        // Behind, it catches up: the rate is that of the whole run.
        assert_eq!((pacer.take(4_000_000), pacer.take(4_000_000)), (Some(4_000_000), Some(4_000_000)));
    }

    #[test]
    fn an_open_loop_counts_from_when_requests_were_due() {
        let mut pacer = Pacer::new(Rate::Open { rate: 1000.0, poisson: false }, 0);
        // The queue was full for five milliseconds: none of what came meanwhile is forgotten.
        let late: Vec<_> = std::iter::from_fn(|| pacer.take(5_000_000)).collect();
        assert_eq!(late, [0, 1_000_000, 2_000_000, 3_000_000, 4_000_000, 5_000_000]);
    }

    #[test]
    fn poisson_arrivals_have_the_rate_and_the_spread_that_they_should() {
        let mut pacer = Pacer::new(Rate::Open { rate: 1e6, poisson: true }, 1);
        let times: Vec<_> = (0..100_000).filter_map(|_| pacer.take(u64::MAX)).collect();
        let gaps: Vec<_> = times.windows(2).map(|w| (w[1] - w[0]) as f64).collect();
        let mean = gaps.iter().sum::<f64>() / gaps.len() as f64;
        let deviation = (gaps.iter().map(|g| (g - mean).powi(2)).sum::<f64>() / gaps.len() as f64).sqrt();
        // Of an exponential distribution both are the same.
        assert!(
            (980.0..1020.0).contains(&mean) && (970.0..1030.0).contains(&deviation),
            "{mean} {deviation}"
        );
        assert_ne!(Pacer::new(Rate::Open { rate: 1e6, poisson: true }, 2).next(), times.first().copied());
    }
}
