//! What the main thread and a job's thread tell each other.

use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, AtomicU64, Ordering};

/// What a job is to do. Orders only ever go up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub enum Order {
    /// Run without counting.
    Ramp,
    /// Run and count.
    Measure,
    /// End, after reading back what is to be verified.
    Stop,
    /// Send nothing more, and collect what is in flight.
    Halt,
    /// End at once: nothing more will come.
    Abort,
}

/// One job's side. Alone on its cache lines: the job writes it with every batch.
#[derive(Debug)]
#[repr(align(128))]
pub struct Control {
    order: AtomicU8,
    finished: AtomicU64,
    in_flight: AtomicU32,
    ended: AtomicBool,
    failed: AtomicBool,
}

impl Control {
    /// For a job that is to begin with this order.
    pub fn new(order: Order) -> Control {
        Control {
            order: AtomicU8::new(order as u8),
            finished: AtomicU64::new(0),
            in_flight: AtomicU32::new(0),
            ended: AtomicBool::new(false),
            failed: AtomicBool::new(false),
        }
    }

    /// What to do.
    #[inline]
    pub fn order(&self) -> Order {
        match self.order.load(Ordering::Relaxed) {
            0 => Order::Ramp,
            1 => Order::Measure,
            2 => Order::Stop,
            3 => Order::Halt,
            _ => Order::Abort,
        }
    }

    /// Gives an order; true if it is a new one.
    pub fn give(&self, order: Order) -> bool {
        self.order.fetch_max(order as u8, Ordering::Relaxed) < order as u8
    }

    /// How far the job is, by the job.
    #[inline]
    pub fn report(&self, finished: u64, in_flight: usize) {
        self.finished.store(finished, Ordering::Relaxed);
        self.in_flight.store(in_flight as u32, Ordering::Relaxed);
    }

    /// Requests finished and in flight.
    pub fn progress(&self) -> (u64, u32) {
        (self.finished.load(Ordering::Relaxed), self.in_flight.load(Ordering::Relaxed))
    }

    /// The job has ended.
    pub fn end(&self, failed: bool) {
        self.failed.store(failed, Ordering::Relaxed);
        self.ended.store(true, Ordering::Release);
    }

    /// Whether it has ended, and if so, whether it failed.
    pub fn ended(&self) -> Option<bool> {
        self.ended.load(Ordering::Acquire).then(|| self.failed.load(Ordering::Relaxed))
    }
}
