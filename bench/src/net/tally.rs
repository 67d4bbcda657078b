//! What was sent and what has arrived, added up.

use hdrhistogram::Histogram;

use crate::measure::{Cost, histogram};
use crate::outcome::Failure;

/// One port: what it has sent, and what has arrived at it.
#[derive(Clone, Debug)]
pub struct Side {
    /// Packets sent.
    pub sent: u64,
    /// Bytes of their frames.
    pub sent_bytes: u64,
    /// Packets that were due at the end and not sent: the back end had not made room.
    pub unsent: u64,
    /// Packets that arrived as they were sent, each counted once.
    pub received: u64,
    /// Bytes of their frames.
    pub received_bytes: u64,
    /// Those that arrived until the measured time was over, foreign ones included.
    pub received_in_time: u64,
    /// Bytes of those.
    pub received_bytes_in_time: u64,
    /// Packets that arrived after one of the same flow that was sent later.
    pub reordered: u64,
    /// Packets that had arrived before.
    pub duplicates: u64,
    /// Packets that are not as they were sent.
    pub corrupt: u64,
    /// The beginning of the first of them.
    pub first_corrupt: Option<Vec<u8>>,
    /// Packets that this run has not sent.
    pub foreign: u64,
    /// Nanoseconds from being sent, or due to be sent, to arriving.
    pub latency: Histogram<u64>,
    /// A latency that is not in there yet, and how many times.
    same: (u64, u64),
}

impl Side {
    fn new() -> Side {
        Side {
            sent: 0,
            sent_bytes: 0,
            unsent: 0,
            received: 0,
            received_bytes: 0,
            received_in_time: 0,
            received_bytes_in_time: 0,
            reordered: 0,
            duplicates: 0,
            corrupt: 0,
            first_corrupt: None,
            foreign: 0,
            latency: histogram(),
            same: (0, 0),
        }
    }

    /// Notes a latency. Packets of a burst often have the same.
    #[inline]
    pub fn record(&mut self, latency: u64) {
        if self.same.0 != latency {
            self.record_rest();
            self.same.0 = latency;
        }
        self.same.1 += 1;
    }

    /// What was noted is in the histogram after this.
    #[inline]
    pub fn record_rest(&mut self) {
        let (latency, n) = self.same;
        if n > 0 {
            self.latency.saturating_record_n(latency, n);
            self.same.1 = 0;
        }
    }

    /// Adds another.
    pub fn merge(&mut self, other: &Side) {
        self.sent += other.sent;
        self.sent_bytes += other.sent_bytes;
        self.unsent += other.unsent;
        self.received += other.received;
        self.received_bytes += other.received_bytes;
        self.received_in_time += other.received_in_time;
        self.received_bytes_in_time += other.received_bytes_in_time;
        self.reordered += other.reordered;
        self.duplicates += other.duplicates;
        self.corrupt += other.corrupt;
        self.first_corrupt = self.first_corrupt.take().or_else(|| other.first_corrupt.clone());
        self.foreign += other.foreign;
        // Same bounds, so it always fits.
        let _ = self.latency.add(&other.latency);
    }
}

/// What one thread has counted, or all of them.
#[derive(Clone, Debug)]
pub struct Tally {
    /// Of each port.
    pub sides: Vec<Side>,
    /// Seconds measured.
    pub seconds: f64,
    /// Kicks sent.
    pub kicks: u64,
    /// What the measured time took of the machine.
    pub cost: Cost,
    /// What went wrong.
    pub failure: Option<Failure>,
}

impl Tally {
    /// Of nothing.
    pub fn new(ports: usize) -> Tally {
        let sides = vec![Side::new(); ports];
        Tally { sides, seconds: 0.0, kicks: 0, cost: Cost::default(), failure: None }
    }

    /// Adds that of another thread.
    pub fn merge(&mut self, other: &Tally) {
        for (side, other) in self.sides.iter_mut().zip(&other.sides) {
            side.merge(other);
        }
        self.seconds = self.seconds.max(other.seconds);
        self.kicks += other.kicks;
        self.cost.add(&other.cost, 1);
        self.failure = self.failure.take().or_else(|| other.failure.clone());
    }

    /// Both directions together.
    pub fn sum(&self) -> Side {
        let mut sum = Side::new();
        self.sides.iter().for_each(|side| sum.merge(side));
        sum
    }

    /// A count for each second.
    pub fn rate(&self, n: u64) -> f64 {
        n as f64 / self.seconds.max(1e-9)
    }
}

impl Side {
    /// Packets that were sent and have not arrived, in whatever state. Only of a sum of both directions.
    pub fn lost(&self) -> u64 {
        self.sent.saturating_sub(self.received + self.corrupt)
    }

    /// The part of the packets that were lost, or that the back end made no room for, in percent.
    pub fn loss_percent(&self) -> f64 {
        (self.lost() + self.unsent) as f64 * 100.0 / (self.sent + self.unsent).max(1) as f64
    }
}
