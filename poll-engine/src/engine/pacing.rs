//! When a reactor spins and when it sleeps.

use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use super::times::Times;

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
/// Decides, round by round, whether to go on spinning, and notes where the time goes.
#[derive(Debug)]
pub(super) struct Pacer {
    pacing: Pacing,
    times: Arc<Times>,
    /// Since when rounds have found nothing, and when the last of them ended.
    idle: Option<(u64, u64)>,
}

impl Pacer {
    pub(super) fn new(pacing: Pacing, times: Arc<Times>) -> Pacer {
        Pacer { pacing, times, idle: None }
    }

    /// Waits in another way from now on.
    pub(super) fn set(&mut self, pacing: Pacing) {
        self.pacing = pacing;
    }

    /// Whether CPU time is to be saved rather than latency.
    pub(super) fn saves_cpu(&self) -> bool {
        self.pacing == Pacing::Event
    }

    /// A round that found work.
    #[inline]
    pub(super) fn worked(&mut self) {
        self.idle = None;
    }

    /// A round that found none; true when it is time to sleep.
    #[inline]
    pub(super) fn idle(&mut self) -> bool {
        let now = self.times.now();
        let (since, last) = self.idle.unwrap_or((now, now));
        self.times.idled(now.saturating_sub(last));
        self.idle = Some((since, now));
        match self.pacing {
            Pacing::Busy => false,
            Pacing::Event => true,
            Pacing::Adaptive => u128::from(self.times.nanos(since, now)) >= SPIN.as_nanos(),
        }
    }

    /// Sleeps in `wait`.
    pub(super) fn asleep(&mut self, wait: impl FnOnce()) {
        self.times.falls_asleep(self.times.now());
        wait();
        let now = self.times.now();
        self.times.wakes(now);
        self.idle = self.idle.map(|(since, _)| (since, now));
    }
}
