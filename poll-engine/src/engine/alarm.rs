//! Says that a queue broke, to the control thread that has to know: a flag, and the bell that this thread waits on.

use crate::sync::{Arc, AtomicBool, Bell, Ordering};

/// An alarm, which any of a session's queues raises.
#[derive(Debug)]
pub struct Alarm {
    raised: AtomicBool,
    bell: Arc<Bell>,
}

impl Alarm {
    /// An alarm that rings `bell`.
    pub fn new(bell: Arc<Bell>) -> Alarm {
        Alarm { raised: AtomicBool::new(false), bell }
    }

    /// Raises it.
    pub fn raise(&self) {
        self.raised.swap(true, Ordering::Release);
        self.bell.ring();
    }

    /// Whether it was raised since this was last asked. To be asked after the bell was heard, not before.
    pub fn take(&self) -> bool {
        self.raised.swap(false, Ordering::Acquire)
    }
}
