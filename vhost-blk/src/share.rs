//! Fair shares of a storage device between the disks of a reactor.
//!
//! A storage device takes whatever it is given and serves it in some order of its own, so that a disk with hundreds of
//! requests in flight has everybody else wait for them. While more than one disk of a reactor uses a device, all of them
//! together have the device's depth in flight there, or [`EACH`] for each, or each its share of it: who has less may always
//! begin, who has more leaves requests in its ring until there is room. A disk that is alone has as many in flight as its
//! driver likes.
//!
//! All of a device's counters are one reactor's, the only one to write them: plain loads and stores.

use std::cell::RefCell;
use std::fs::File;
use std::os::linux::fs::MetadataExt;
use std::os::unix::fs::FileTypeExt;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Weak};

use poll_engine::clock::Clock;

use crate::request::Operation;

/// Bytes that weigh as much as one request more.
const HEAVY: u32 = 32 << 10;
/// What disks have in flight together, for each of them, if that is more than the depth: where each has one request, those
/// of all the others wait for no more than as many again.
const EACH: u32 = 2;
/// What a disk may have in flight in any case.
const LEAST: u32 = 4;
/// Ticks of the clock for which somebody counts, as a power of two: some milliseconds.
const TERM: u32 = 24;

/// What a request weighs.
#[inline]
pub fn weight_of(operation: &Operation) -> u32 {
    weight_by(HEAVY, operation)
}

/// As [`weight_of`], where so many bytes weigh as much as one request more.
#[inline]
pub fn weight_by(heavy: u32, operation: &Operation) -> u32 {
    match *operation {
        Operation::Read { len, .. } | Operation::Write { len, .. } => 1 + len / heavy,
        _ => 1,
    }
}

/// A storage device that takes time, as disks are configured to share it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Device {
    number: u64,
    depth: u32,
}

impl Device {
    /// The one that `file` is on, or is; disks have `depth` requests in flight there while they share it.
    pub fn of(file: &File, depth: u32) -> Device {
        let number = file.metadata().map_or(0, |meta| {
            if meta.file_type().is_block_device() { meta.st_rdev() } else { meta.st_dev() }
        });
        Device { number, depth }
    }
}

/// A counter that one thread writes.
#[derive(Debug, Default)]
struct Cell(AtomicU32);

impl Cell {
    fn get(&self) -> u32 {
        self.0.load(Ordering::Relaxed)
    }

    fn set(&self, to: u32) {
        self.0.store(to, Ordering::Relaxed);
    }
}

/// A device as a reactor uses it.
#[derive(Debug)]
struct Medium {
    device: Device,
    in_flight: Cell,
    /// The present term, and how many disks have begun something in it and in the one before.
    term: Cell,
    users: Cell,
    users_before: Cell,
}

impl Medium {
    /// A disk begins something for the first time in this term.
    #[cold]
    fn join(&self, term: u32) {
        let known = self.term.get();
        if known != term {
            self.users_before.set(if term == known.wrapping_add(1) { self.users.get() } else { 0 });
            self.users.set(0);
            self.term.set(term);
        }
        self.users.set(self.users.get() + 1);
    }

    #[inline]
    fn users(&self) -> u32 {
        self.users.get().max(self.users_before.get())
    }

    #[inline]
    fn depth(&self, users: u32) -> u32 {
        users.saturating_mul(EACH).max(self.device.depth)
    }
}

/// A disk on a device, as a reactor uses it.
#[derive(Debug)]
struct Part {
    /// Which disk: what tells it from others for as long as it has queues here.
    disk: usize,
    medium: Arc<Medium>,
    in_flight: Cell,
    term: Cell,
}

thread_local! {
    /// What this reactor uses.
    static PARTS: RefCell<Vec<Weak<Part>>> = const { RefCell::new(Vec::new()) };
}

/// A disk's share of the device that it is on: one for all of its queues on a reactor.
#[derive(Clone, Debug)]
pub struct Share {
    part: Arc<Part>,
    clock: Clock,
}

impl Share {
    /// The present thread's, of this disk, which is on `device`. To be used on this thread only.
    pub fn join(device: Device, disk: usize) -> Share {
        PARTS.with_borrow_mut(|parts| {
            parts.retain(|part| part.strong_count() > 0);
            let mut all = parts.iter().filter_map(Weak::upgrade);
            let part = all.find(|part| part.disk == disk).unwrap_or_else(|| {
                let mut all = parts.iter().filter_map(Weak::upgrade);
                let medium =
                    all.find(|part| part.medium.device == device).map(|part| Arc::clone(&part.medium));
                let medium = medium.unwrap_or_else(|| {
                    let [in_flight, term, users, users_before] = Default::default();
                    Arc::new(Medium { device, in_flight, term, users, users_before })
                });
                let part = Arc::new(Part { disk, medium, in_flight: Cell::default(), term: Cell::default() });
                parts.push(Arc::downgrade(&part));
                part
            });
            Share { part, clock: Clock::new() }
        })
    }

    /// Whether the disk may begin something more.
    #[inline]
    pub fn has_room(&self) -> bool {
        let medium = &self.part.medium;
        let users = medium.users();
        users < 2
            || medium.in_flight.get() < medium.depth(users)
            || self.part.in_flight.get() < (medium.depth(users) / users).max(LEAST)
    }

    /// Something of this weight is begun.
    #[inline]
    pub fn begin(&self, weight: u32) {
        self.begin_in((self.clock.raw() >> TERM) as u32, weight);
    }

    #[inline]
    fn begin_in(&self, term: u32, weight: u32) {
        let Part { medium, in_flight, term: last, .. } = &*self.part;
        if last.get() != term {
            last.set(term);
            medium.join(term);
        }
        in_flight.set(in_flight.get() + weight);
        medium.in_flight.set(medium.in_flight.get() + weight);
    }

    /// And is over.
    #[inline]
    pub fn end(&self, weight: u32) {
        let Part { medium, in_flight, .. } = &*self.part;
        in_flight.set(in_flight.get() - weight);
        medium.in_flight.set(medium.in_flight.get() - weight);
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use super::*;

    fn device(number: u64) -> Device {
        Device { number, depth: 16 }
    }

    /// A device that serves what comes first, and disks that want so much in flight each, asked by turns. How much in
    /// flight each has after many rounds.
    fn settle(wanted: &[(u32, u32)], terms: u32) -> Vec<u32> {
        let disks: Vec<_> = (0..wanted.len()).map(|disk| Share::join(device(1), disk)).collect();
        let mut device = VecDeque::new();
        for round in 0..terms * 50 {
            for (disk, &(depth, weight)) in wanted.iter().enumerate() {
                // No more than a round's worth at a time.
                for _ in 0..16 {
                    let busy = device.iter().filter(|(d, _)| *d == disk).count() as u32;
                    if busy == depth || !disks[disk].has_room() {
                        break;
                    }
                    disks[disk].begin_in(1 + round / 50, weight);
                    device.push_back((disk, weight));
                }
            }
            for _ in 0..3 {
                if let Some((disk, weight)) = device.pop_front() {
                    disks[disk].end(weight);
                }
            }
        }
        disks.iter().map(|disk| disk.part.in_flight.get()).collect()
    }

    #[test]
    fn one_alone_has_what_it_likes() {
        assert!(settle(&[(256, 1)], 10)[0] > 250);
        assert!(settle(&[(64, 33)], 10)[0] > 60 * 33);
    }

    #[test]
    fn a_deep_one_leaves_the_others_their_place() {
        let mut wanted = vec![(1, 1); 9];
        wanted.insert(4, (256, 1));
        let held = settle(&wanted, 10);
        let all: u32 = held.iter().sum();
        assert!(held[4] >= 9 && all <= 20 + 9, "{held:?}");
        // As many bytes as small ones would have requests.
        wanted[4] = (64, 5);
        let held = settle(&wanted, 10);
        assert!(held.iter().sum::<u32>() <= 20 + 9 + 5, "{held:?}");
    }

    #[test]
    fn two_deep_ones_share_evenly() {
        let held = settle(&[(256, 1), (256, 1)], 20);
        assert!(held.iter().all(|n| (6..=9).contains(n)), "{held:?}");
    }

    #[test]
    fn whoever_has_gone_is_not_waited_for() {
        let (deep, other) = (Share::join(device(1), 1), Share::join(device(1), 2));
        (0..100).for_each(|_| deep.begin_in(7, 1));
        assert!(deep.has_room());
        other.begin_in(7, 1);
        other.end(1);
        assert!(!deep.has_room() && other.has_room());
        (0..40).for_each(|_| deep.end(1));
        assert!(!deep.has_room(), "60 are more than all may have");
        (0..50).for_each(|_| deep.end(1));
        deep.begin_in(8, 1);
        assert!(deep.has_room());
        (0..100).for_each(|_| deep.begin_in(8, 1));
        assert!(!deep.has_room(), "the other one was there a moment ago");
        deep.begin_in(9, 1);
        assert!(deep.has_room(), "nobody else for a whole term");
    }

    #[test]
    fn each_device_and_each_disk_has_one_of_its_own_on_each_reactor() {
        let shares = [(1, 1), (2, 2), (1, 3), (1, 1)].map(|(n, disk)| Share::join(device(n), disk));
        let same = |a: usize, b: usize| Arc::ptr_eq(&shares[a].part.medium, &shares[b].part.medium);
        assert!(same(0, 2) && same(0, 3) && !same(0, 1));
        assert!(
            Arc::ptr_eq(&shares[0].part, &shares[3].part) && !Arc::ptr_eq(&shares[0].part, &shares[2].part)
        );
        let elsewhere = std::thread::spawn(|| Share::join(device(1), 1)).join().unwrap();
        assert!(!Arc::ptr_eq(&shares[0].part.medium, &elsewhere.part.medium));
        // Who has gone leaves nothing.
        drop(shares);
        Share::join(device(3), 1);
        PARTS.with_borrow(|parts| assert_eq!(parts.len(), 1));
    }

    #[test]
    fn the_depth_is_what_was_asked_for() {
        let held = |depth| {
            let disks = [1, 2].map(|disk| Share::join(Device { number: 1, depth }, disk));
            disks[1].begin_in(1, 1);
            let mut held = 0;
            while disks[0].has_room() && held < 1000 {
                disks[0].begin_in(1, 1);
                held += 1;
            }
            held
        };
        assert_eq!([1, 16, 64, 256].map(held), [4, 15, 63, 255]);
    }
}
