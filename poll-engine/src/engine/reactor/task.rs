//! A queue with its handler, as the reactor that runs it sees it.

use crossbeam::channel::Sender;
use crossbeam::sync::WaitGroup;

use super::QueueId;
use crate::device::QueueHandler;
use crate::engine::queue::Queue;

#[allow(clippy::struct_excessive_bools)] // each of its own meaning
pub(in crate::engine) struct Task {
    pub(in crate::engine) id: QueueId,
    pub(super) queue: Box<Queue>,
    pub(super) handler: Box<dyn QueueHandler>,
    /// Set when asked to stop: who waits for the base.
    pub(super) stopping: Option<Sender<u32>>,
    /// Set when asked to leave the ring alone: who waits for that.
    pub(super) parking: Option<WaitGroup>,
    /// Is to take nothing for now, unless it is to stop; and who waits for that.
    pub(super) paused: bool,
    pub(super) pausing: Option<WaitGroup>,
    /// Takes nothing, for one of these reasons: kept up to date by [`settle`](Self::settle).
    pub(super) rests: bool,
    pub(super) watching_kick: bool,
    pub(super) reported: bool,
    /// Has completed chains to publish after reaping.
    pub(super) reaped: bool,
    /// A station has had its hands on the queue in this round.
    pub(super) touched: bool,
    /// Had something since the last search for those that have not.
    pub(super) worked: bool,
    /// A station waits for chains of this queue.
    pub(in crate::engine) wanted: bool,
}

impl Task {
    /// Nothing more to wait for: stopped, and the last request is back.
    pub(super) fn is_done(&self) -> bool {
        self.stopping.is_some() && self.queue.in_flight() == 0 && !self.queue.has_resubmits()
    }

    /// Is to stop, and its handler does not know when it will have a use for what an earlier back end had begun.
    pub(super) fn waits_idly(&self) -> bool {
        let idle = self.stopping.is_some() && !self.handler.wants_chains();
        idle && self.queue.in_flight() == 0 && self.queue.has_resubmits()
    }

    /// The queue, for a station; one that is to take chains only if the queue may.
    #[inline]
    pub(in crate::engine) fn touch(&mut self, takes: bool) -> Option<&mut Queue> {
        if takes && !self.polls() {
            return None;
        }
        self.touched = true;
        Some(&mut self.queue)
    }

    /// Whether chains of the driver are to wake a reactor that sleeps.
    pub(super) fn waits_for_chains(&self) -> bool {
        self.wanted || self.handler.wants_chains() || self.queue.has_resubmits()
    }

    /// One that is to stop takes nothing new, but what an earlier back end had begun is as good as in flight.
    pub(super) fn polls(&self) -> bool {
        let takes = self.stopping.is_none() || self.queue.has_resubmits();
        takes && !self.rests && self.queue.is_running()
    }

    /// Takes nothing for now, and will again.
    pub(in crate::engine) fn only_rests(&self) -> bool {
        self.rests && self.stopping.is_none() && self.queue.is_running()
    }

    /// To be called when it was told to stop, to park, to pause, or to go on.
    pub(super) fn settle(&mut self) {
        self.rests = self.parking.is_some() || self.paused && self.stopping.is_none();
    }
}
