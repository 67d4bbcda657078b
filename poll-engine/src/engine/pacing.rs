//! When a reactor spins and when it sleeps.

use std::str::FromStr;
use std::time::Duration;

use crate::clock::Clock;

/// How a reactor waits for work.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Pacing {
    /// Never sleeps: lowest latency, a whole CPU.
    Busy,
    /// Spins for a while after the last work, then sleeps until notified.
    #[default]
    Adaptive,
    /// Sleeps as soon as there is nothing to do.
    Event,
}

impl Pacing {
    /// As it is written.
    pub fn name(self) -> &'static str {
        match self {
            Pacing::Busy => "busy",
            Pacing::Adaptive => "adaptive",
            Pacing::Event => "event",
        }
    }
}

impl FromStr for Pacing {
    type Err = String;

    fn from_str(s: &str) -> Result<Pacing, String> {
        match s {
            "busy" => Ok(Pacing::Busy),
            "adaptive" => Ok(Pacing::Adaptive),
            "event" => Ok(Pacing::Event),
            other => Err(format!("'{other}' is none of busy, adaptive, event")),
        }
    }
}

/// How long `adaptive` spins after the last work. Longer than a guest needs to come back with the next request after
/// an interrupt (a few tens of microseconds), short against the cost of a whole CPU.
const SPIN: Duration = Duration::from_micros(100);
/// How many empty rounds pass between two looks at the clock.
const ROUNDS_PER_LOOK: u32 = 16;

/// Decides, round by round, whether to go on spinning.
#[derive(Debug)]
pub(super) struct Pacer {
    pacing: Pacing,
    clock: Clock,
    idle_since: Option<u64>,
    rounds: u32,
}

impl Pacer {
    pub(super) fn new(pacing: Pacing) -> Pacer {
        Pacer { pacing, clock: Clock::new(), idle_since: None, rounds: 0 }
    }

    /// Whether CPU time is to be saved rather than latency.
    pub(super) fn saves_cpu(&self) -> bool {
        self.pacing == Pacing::Event
    }

    /// A round that found work.
    #[inline]
    pub(super) fn worked(&mut self) {
        self.idle_since = None;
        self.rounds = 0;
    }

    /// A round that found none; true when it is time to sleep.
    #[inline]
    pub(super) fn idle(&mut self) -> bool {
        match self.pacing {
            Pacing::Busy => false,
            Pacing::Event => true,
            Pacing::Adaptive => {
                self.rounds += 1;
                if !self.rounds.is_multiple_of(ROUNDS_PER_LOOK) {
                    return false;
                }
                let now = self.clock.raw();
                let since = *self.idle_since.get_or_insert(now);
                u128::from(self.clock.delta_as_nanos(since, now)) >= SPIN.as_nanos()
            }
        }
    }
}
