//! Stations: what moves chains between queues, as a switch does. A station lives on one reactor and may use every queue
//! there; the handlers of queues that are a station's have nothing to do but to tell it of them.

use std::time::Duration;

use super::queue::Queue;
use super::reactor::{Io, QueueId, Task};
pub use super::waker::Waker;

/// Something on a reactor that is polled like a queue's handler, without a queue of its own.
pub trait Station: Send {
    /// Called once on the reactor, before anything else.
    fn attach(&mut self, _io: &mut Io<'_>) {}

    /// Looks at everything it moves once, a bounded amount of it; returns how many pieces of work there were.
    fn poll(&mut self, queues: &mut Queues<'_>, io: &mut Io<'_>) -> usize;

    /// One of its own operations is complete; of a multishot one there is more to come, or not.
    fn complete(&mut self, _queues: &mut Queues<'_>, _io: &mut Io<'_>, _tag: u32, _result: i32, _more: bool) {
    }

    /// The reactor is about to sleep: has watched what this waits for ([`Queues::wake_on`], operations of its own). True
    /// if there is work to be done instead.
    fn prepare_sleep(&mut self, _queues: &mut Queues<'_>, _io: &mut Io<'_>) -> bool {
        false
    }

    /// How long the reactor may sleep if nothing wakes it: asked after [`prepare_sleep`](Self::prepare_sleep). `None`: for
    /// ever.
    fn longest_sleep(&self) -> Option<Duration> {
        None
    }

    /// It is to leave: begins nothing more and cancels what is under way.
    fn stop(&mut self, _queues: &mut Queues<'_>, _io: &mut Io<'_>) {}

    /// Operations of its own whose completions are still to come: it is not let go before they have.
    fn in_flight(&self) -> usize {
        0
    }
}

/// The queues of a reactor.
pub struct Queues<'a> {
    pub(super) tasks: &'a mut [Task],
    pub(super) places: &'a [Option<usize>],
    /// Those from this place on are dormant.
    pub(super) polled: usize,
    /// One of these was asked for.
    pub(super) stirred: bool,
}

impl Queues<'_> {
    #[inline]
    fn position(&mut self, id: QueueId) -> Option<usize> {
        let place = self.places.get(usize::from(id.slot)).copied().flatten()?;
        self.stirred |= place >= self.polled;
        (self.tasks.get(place)?.id == id).then_some(place)
    }

    /// A queue that may take chains: it runs here, and is neither to stop nor broken. What is completed is shown to its
    /// driver at the end of the round.
    #[inline]
    pub fn get(&mut self, id: QueueId) -> Option<&mut Queue> {
        let place = self.position(id)?;
        self.tasks.get_mut(place)?.touch(true)
    }

    /// Whether a queue takes nothing for now, and will again: somebody has it pause, or its ring is about to be found anew. Its
    /// reactor is woken when it goes on.
    pub fn only_rests(&mut self, id: QueueId) -> bool {
        self.position(id).is_some_and(|place| self.tasks[place].only_rests())
    }

    /// A queue that may have to stop: requests taken earlier can be completed.
    #[inline]
    pub fn finishing(&mut self, id: QueueId) -> Option<&mut Queue> {
        let place = self.position(id)?;
        self.tasks.get_mut(place)?.touch(false)
    }

    /// A queue of which chains were taken, as [`finishing`](Self::finishing) has it, and another one that may take some, as
    /// [`get`](Self::get) has it. `None` unless both are there.
    #[inline]
    pub fn pair(&mut self, taken: QueueId, takes: QueueId) -> Option<(&mut Queue, &mut Queue)> {
        let [a, b] = [self.position(taken)?, self.position(takes)?];
        let [a, b] = self.tasks.get_disjoint_mut([a, b]).ok()?;
        Some((a.touch(false)?, b.touch(true)?))
    }

    /// Has this queue's driver wake the reactor, which is about to sleep, by making chains available: buffers that are
    /// waited for.
    pub fn wake_on(&mut self, id: QueueId) {
        if let Some(place) = self.position(id) {
            self.tasks[place].wanted = true;
        }
    }
}
