//! How a queue goes to sleep, with its reactor or left alone by it, and how a driver wakes it: an outline of `ring::split`, `ring::packed`, `engine::reactor`
//! and `vring::driver` with the same atomics and orderings, in every order that the memory model allows. The same steps
//! the other way round are those of interrupts: the driver sleeps and the device wakes it.
//!
//! The rings themselves lie in memory that is shared with another process, where the checker cannot follow; that the
//! code takes these steps is what the soak tests are for.
#![allow(clippy::unwrap_used)]

use loom::sync::Arc;
use loom::sync::atomic::{AtomicBool, AtomicU16, AtomicU64, Ordering, fence};
use loom::thread;

/// The kick: an eventfd whose every write wakes its watcher once.
#[derive(Default)]
struct Kick(AtomicBool);

impl Kick {
    fn ring(&self) {
        self.0.swap(true, Ordering::AcqRel);
    }

    /// For ever, if nobody rings: a model that does not end, which the checker says.
    fn sleep(&self) {
        while !self.0.swap(false, Ordering::AcqRel) {
            thread::yield_now();
        }
    }
}

/// Virtio 1.3, 2.7.7.2 and 2.7.10: whether going from `old` to `new` passes `event`.
fn need_event(event: u16, new: u16, old: u16) -> bool {
    new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
}

/// What both sides of a split ring see.
#[derive(Default)]
struct Split {
    avail_idx: AtomicU16,
    avail_event: AtomicU16,
    used_flags: AtomicU16,
    kick: Kick,
}

/// `SplitRing::enable_notification`; true when there is work.
fn enable_split(ring: &Split, event_idx: bool, next: u16) -> bool {
    if event_idx {
        ring.avail_event.store(next, Ordering::Relaxed);
    } else {
        ring.used_flags.store(0, Ordering::Relaxed);
    }
    fence(Ordering::SeqCst);
    ring.avail_idx.load(Ordering::Acquire) != next
}

/// `SplitRing::disable_notification`.
fn disable_split(ring: &Split, event_idx: bool, next: u16) {
    if event_idx {
        ring.avail_event.store(next.wrapping_sub(1), Ordering::Relaxed);
    } else {
        ring.used_flags.store(1, Ordering::Relaxed);
    }
}

/// `DriverRing::publish`, and the kick if the device wants it.
fn publish_split(ring: &Split, event_idx: bool, old: u16, new: u16) {
    ring.avail_idx.store(new, Ordering::Release);
    fence(Ordering::SeqCst);
    let wanted = if event_idx {
        need_event(ring.avail_event.load(Ordering::Relaxed), new, old)
    } else {
        ring.used_flags.load(Ordering::Relaxed) & 1 == 0
    };
    if wanted {
        ring.kick.ring();
    }
}

fn split(event_idx: bool) {
    loom::model(move || {
        let ring = Arc::new(Split::default());
        disable_split(&ring, event_idx, 0);
        let theirs = Arc::clone(&ring);
        let driver = thread::spawn(move || {
            publish_split(&theirs, event_idx, 0, 1);
            publish_split(&theirs, event_idx, 1, 2);
        });
        let mut next = 0;
        while next < 2 {
            let seen = ring.avail_idx.load(Ordering::Acquire);
            if seen != next {
                next = seen;
                continue;
            }
            if !enable_split(&ring, event_idx, next) {
                ring.kick.sleep();
            }
            disable_split(&ring, event_idx, next);
        }
        driver.join().unwrap();
    });
}

#[test]
fn a_split_ring_with_event_index_wakes_its_queue() {
    split(true);
}

#[test]
fn a_split_ring_with_flags_wakes_its_queue() {
    split(false);
}

/// What both sides of a packed ring see: two descriptors' flags, and the device's event suppression structure.
#[derive(Default)]
struct Packed {
    available: [AtomicBool; 2],
    off_wrap: AtomicU16,
    flags: AtomicU16,
    kick: Kick,
}

const ENABLE: u16 = 0;
const DISABLE: u16 = 1;
const DESC: u16 = 2;

/// Asks to be notified from slot `next` on; true when there is work. The place first, then that it counts.
fn enable_packed(ring: &Packed, events: bool, next: u16) -> bool {
    if events {
        ring.off_wrap.store(next, Ordering::Relaxed);
        ring.flags.store(DESC, Ordering::Release);
    } else {
        ring.flags.store(ENABLE, Ordering::Relaxed);
    }
    fence(Ordering::SeqCst);
    ring.available[usize::from(next)].load(Ordering::Acquire)
}

/// Makes slot `at` available, and kicks if the device wants it.
fn publish_packed(ring: &Packed, at: u16) {
    ring.available[usize::from(at)].store(true, Ordering::Release);
    fence(Ordering::SeqCst);
    let flags = ring.flags.load(Ordering::Acquire);
    let wanted = match flags {
        ENABLE => true,
        DESC => need_event(ring.off_wrap.load(Ordering::Relaxed), at + 1, at),
        _ => false,
    };
    if wanted {
        ring.kick.ring();
    }
}

fn packed(events: bool) {
    loom::model(move || {
        let ring = Arc::new(Packed::default());
        ring.flags.store(DISABLE, Ordering::Relaxed);
        let theirs = Arc::clone(&ring);
        let driver = thread::spawn(move || {
            publish_packed(&theirs, 0);
            publish_packed(&theirs, 1);
        });
        let mut next = 0;
        while next < 2 {
            if ring.available[usize::from(next)].load(Ordering::Acquire) {
                next += 1;
                continue;
            }
            if !enable_packed(&ring, events, next) {
                ring.kick.sleep();
            }
            ring.flags.store(DISABLE, Ordering::Relaxed);
        }
        driver.join().unwrap();
    });
}

#[test]
fn a_packed_ring_with_event_index_wakes_its_queue() {
    packed(true);
}

#[test]
fn a_packed_ring_with_flags_wakes_its_queue() {
    packed(false);
}

/// The counters of a queue have one writer, who adds by a load and a store: no count is lost, and a reader never sees
/// one go back.
#[test]
fn counters_of_one_writer_lose_nothing() {
    loom::model(|| {
        let counter = Arc::new(AtomicU64::new(0));
        let theirs = Arc::clone(&counter);
        let writer = thread::spawn(move || {
            for _ in 0..3 {
                theirs.store(theirs.load(Ordering::Relaxed) + 1, Ordering::Relaxed);
            }
        });
        let (first, second) = (counter.load(Ordering::Relaxed), counter.load(Ordering::Relaxed));
        assert!(first <= second && second <= 3);
        writer.join().unwrap();
        assert_eq!(counter.load(Ordering::Relaxed), 3);
    });
}
