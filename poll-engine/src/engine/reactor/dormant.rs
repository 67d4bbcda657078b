//! Rings that have nothing for a while are left to their kicks, so that a round of a reactor with hundreds of them costs
//! what those in use cost.
//!
//! A dormant queue is as one whose reactor sleeps: its driver was asked to notify, the ring was looked at again after that
//! (virtio 1.3, 2.7.10.1), and its kick is watched. Whatever happens to it but requests (a message, a completion, a station)
//! has it looked at again before anything else. Queues without a kick descriptor, with a request in flight, or with anything
//! but chains to wait for are never dormant.

use std::os::fd::AsFd;
use std::sync::atomic::Ordering;
use std::time::Duration;

use super::io::{Purpose, label};
use super::{Reactor, Task};
use crate::clock::Clock;
use crate::uring::Uring;

/// Most rings that a round looks into for this: each costs a memory barrier, and the first time a system call.
const MAX_SWEPT: usize = 8;

/// When rings are left to their kicks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Dormancy {
    /// A reactor looks at so many rings in any case.
    pub above: usize,
    /// Of more, those go that had nothing for so long, or up to twice as long.
    pub after: Duration,
}

impl Default for Dormancy {
    /// Looking at a ring in vain takes some nanoseconds, so 16 are less than what one request costs. Drivers that come back
    /// within milliseconds are not made to kick.
    fn default() -> Dormancy {
        Dormancy { above: 16, after: Duration::from_millis(5) }
    }
}

/// How far the search for idle rings has come.
pub(super) struct Sweep {
    dormancy: Dormancy,
    clock: Clock,
    began: u64,
    /// Places below this are still to be looked at.
    left: usize,
}

impl Sweep {
    pub(super) fn new(dormancy: Dormancy) -> Sweep {
        let clock = Clock::new();
        Sweep { dormancy, began: clock.raw(), clock, left: 0 }
    }

    /// Whether to search, with so many rings to be looked at.
    #[inline]
    pub(super) fn is_wanted(&self, polled: usize) -> bool {
        polled > self.dormancy.above
    }
}

impl Task {
    /// Has had nothing since this was last asked, and waits for nothing but chains.
    fn is_idle(&mut self) -> bool {
        !std::mem::take(&mut self.worked)
            && self.polls()
            && self.queue.notifier.kick.is_some()
            && self.queue.in_flight() == 0
            && !self.queue.has_resubmits()
            && !self.queue.is_signal_due(true)
            && self.handler.wants_chains()
            && self.handler.longest_sleep().is_none()
    }
}

impl Reactor {
    /// Looks for rings that have had nothing since the last search, a few in a round, and leaves them to their kicks.
    #[inline(never)]
    pub(super) fn sweep(&mut self) {
        let Sweep { dormancy, clock, began, left } = &mut self.sweep;
        if *left == 0 {
            let now = clock.raw();
            if u128::from(clock.delta_as_nanos(*began, now)) < dormancy.after.as_nanos() {
                return;
            }
            (*began, *left) = (now, self.polled);
        }
        let end = (*left).min(self.polled);
        *left = end.saturating_sub(MAX_SWEPT);
        // From the end: what takes the place of one that goes has been looked at.
        for place in (self.sweep.left..end).rev() {
            if self.sweep.is_wanted(self.polled) && self.tasks[place].is_idle() {
                self.leave(place);
            }
        }
    }

    /// Leaves the queue of this place to its kick, if nothing has come meanwhile.
    fn leave(&mut self, place: usize) {
        let task = &mut self.tasks[place];
        Reactor::watch_kick(task, &mut self.uring);
        if task.queue.enable_notification() {
            task.queue.disable_notification();
            return;
        }
        self.polled -= 1;
        self.swap(place, self.polled);
        self.tell_dormant();
    }

    /// Looks at the queue of this place from now on; its place.
    #[inline]
    pub(super) fn rouse(&mut self, place: usize) -> usize {
        if place < self.polled { place } else { self.rouse_dormant(place) }
    }

    #[cold]
    fn rouse_dormant(&mut self, place: usize) -> usize {
        let task = &mut self.tasks[place];
        task.worked = true;
        task.queue.disable_notification();
        let to = self.polled;
        self.swap(place, to);
        self.polled += 1;
        self.tell_dormant();
        // It is no time to sleep before it was looked at.
        self.pacer.worked();
        to
    }

    /// Looks from now on at all dormant queues of which this is true.
    #[cold]
    pub(super) fn rouse_those(&mut self, which: impl Fn(&Task) -> bool) {
        for place in self.polled..self.tasks.len() {
            if which(&self.tasks[place]) {
                self.rouse(place);
            }
        }
    }

    /// Has one more task, which is looked at.
    pub(super) fn insert(&mut self, task: Task) {
        let place = self.tasks.len();
        self.places[usize::from(task.id.slot)] = Some(place);
        self.tasks.push(task);
        self.swap(place, self.polled);
        self.polled += 1;
    }

    /// Takes one out that is looked at.
    pub(super) fn remove(&mut self, place: usize) -> Task {
        assert!(place < self.polled, "a dormant queue is roused before it goes");
        self.polled -= 1;
        self.swap(place, self.polled);
        let task = self.tasks.swap_remove(self.polled);
        self.places[usize::from(task.id.slot)] = None;
        if let Some(moved) = self.tasks.get(self.polled) {
            self.places[usize::from(moved.id.slot)] = Some(self.polled);
        }
        task
    }

    fn swap(&mut self, a: usize, b: usize) {
        self.tasks.swap(a, b);
        for place in [a, b] {
            self.places[usize::from(self.tasks[place].id.slot)] = Some(place);
        }
    }

    fn tell_dormant(&self) {
        self.stats.dormant.store(self.tasks.len() - self.polled, Ordering::Relaxed);
    }

    /// Has a kick complete from now on, if there is a descriptor for it.
    pub(super) fn watch_kick(task: &mut Task, uring: &mut Uring) {
        if let (false, Some(kick)) = (task.watching_kick, &task.queue.notifier.kick) {
            task.watching_kick = true;
            uring.watch(kick.as_fd(), label(Purpose::Kick, task.id, 0));
        }
    }
}
