//! Where somebody wants queues to run, which a device keeps for when they start next.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::{Mutex, PoisonError};

/// The numbers of the reactors that queues are wanted on, if somebody wants that.
#[derive(Debug, Default)]
pub struct WantedOn(Mutex<HashMap<u16, usize>>);

impl WantedOn {
    /// Has these queues on this reactor when they start next.
    pub fn set(&self, queues: Range<u16>, reactor: usize) {
        let mut wanted = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        wanted.extend(queues.map(|queue| (queue, reactor)));
    }

    /// The one for this queue ([`Device::reactor`](crate::device::Device::reactor)).
    pub fn of(&self, queue: u16) -> Option<usize> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).get(&queue).copied()
    }
}
