//! The record of a packed queue, `QueueRegionPacked`. Its ring does not keep what was taken: used descriptors are written
//! over it. So each descriptor of a chain is copied into an entry of the record; entries that are not in use are a list.
//!
//! ```text
//!   0 features u64 | 8 version u16 | 10 desc_num u16 | 12 free_head u16 | 14 old_free_head u16
//!   16 used_idx u16 | 18 old_used_idx u16 | 20 used_wrap_counter u8 | 21 old_used_wrap_counter u8
//!   32 + 32 i:  0 inflight u8 | 2 next u16 | 4 last u16 | 6 num u16 | 8 counter u64
//!               16 id u16 | 18 flags u16 | 20 len u32 | 24 addr u64
//! ```
//!
//! Chains may be taken between a completion and its being shown to the driver, so that completed chains go back to the
//! list only then: until the end of a [`show`](PackedInflight::showing) the old fields and the new ones are the same.
#![allow(unsafe_code)] // records at raw addresses in memory that is shared
#![allow(clippy::many_single_char_names)] // bytes

use std::ptr::NonNull;
use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU64, Ordering};

use vring::packed::{Position, Rest};

use super::{PACKED_ENTRY, PACKED_HEADER, QueueRegion, VERSION};
use crate::fault_point::pass;
use crate::ring::RingError;

const FREE_HEAD: usize = 12;
const OLD_FREE_HEAD: usize = 14;
/// `used_idx` and the three after it.
const POSITIONS: usize = 16;

/// What the last back end has left.
#[derive(Debug)]
pub(in crate::ring) struct Left {
    /// Where the next used descriptor belongs.
    pub(in crate::ring) used: Position,
    /// Where the next descriptor is taken.
    pub(in crate::ring) avail: Position,
    /// The entries of chains to be served again, those taken first last.
    pub(in crate::ring) chains: Vec<u16>,
}

/// Our own copy of an entry's links: what the front end may write into them does not count once they were read.
#[derive(Clone, Copy, Debug, Default)]
struct Links {
    next: u16,
    last: u16,
    num: u16,
}

/// The entries of a chain that is being looked at.
#[derive(Debug)]
pub(in crate::ring) struct Notes<'a> {
    record: &'a PackedInflight,
    next: u16,
    last: u16,
}

impl Notes<'_> {
    /// Copies the chain's next descriptor. There is no entry left for it when a driver has made more available than its
    /// ring has, over what it has not been given back.
    #[inline]
    pub(in crate::ring) fn note(&mut self, addr: u64, rest: Rest) -> Result<(), RingError> {
        let (record, entry) = (self.record, self.next);
        let links = record.links.get(usize::from(entry)).ok_or(RingError::TooManyInFlight)?;
        record.entry_word(entry, 24).store(addr, Ordering::Relaxed);
        record.entry_word(entry, 16).store(entry_rest(rest), Ordering::Relaxed);
        (self.last, self.next) = (entry, links.next);
        Ok(())
    }

    /// The entry of the last one.
    #[inline]
    pub(in crate::ring) fn last(&self) -> u16 {
        self.last
    }
}

/// The record of a running packed queue.
#[derive(Debug)]
pub(in crate::ring) struct PackedInflight {
    base: NonNull<u8>,
    /// Descriptors of the ring.
    size: u16,
    /// The global counter: what the next chain taken gets.
    counter: u64,
    links: Vec<Links>,
    /// Where the list of entries not in use begins.
    free_head: u16,
    used: Position,
    /// Entries of chains completed and not shown.
    batch: Vec<u16>,
    region: QueueRegion,
}

// SAFETY: an address in a mapping that `region` keeps; access is atomic, and allows for the front end writing meanwhile.
unsafe impl Send for PackedInflight {}

impl AsRef<QueueRegion> for PackedInflight {
    fn as_ref(&self) -> &QueueRegion {
        &self.region
    }
}

impl PackedInflight {
    /// Takes the region up for a ring of `size` descriptors. A new region begins at `used`, and so does one in which
    /// nothing is in flight if the front end is known to know better than the region where the ring stands.
    /// `flags_at` reads the flags of a descriptor of the ring.
    pub(in crate::ring) fn recover(
        region: QueueRegion,
        size: u16,
        used: Position,
        flags_at: impl Fn(u16) -> u16,
    ) -> Result<(PackedInflight, Option<Left>), RingError> {
        let bad = |what| Err(RingError::BadInflight(what));
        if size > region.desc_num {
            return bad("it has fewer entries than the ring has descriptors");
        }
        let mut this = PackedInflight {
            base: region.at.host,
            size,
            counter: 0,
            links: Vec::new(),
            free_head: 0,
            used,
            batch: Vec::with_capacity(size.into()),
            region,
        };
        match this.half(8).load(Ordering::Relaxed) {
            0 => this.begin(used),
            VERSION => {
                let left = this.left(flags_at)?;
                if !(left.chains.is_empty() && this.region.base_is_known) {
                    return Ok((this, Some(left)));
                }
                this.begin(used);
            }
            _ => return bad("its version is unknown"),
        }
        Ok((this, None))
    }

    /// Makes a region of one in which nothing is in flight. Not in use before all of it is right.
    fn begin(&mut self, used: Position) {
        self.half(8).store(0, Ordering::Release);
        let n = self.region.desc_num;
        self.links = (0..n).map(|i| Links { next: i + 1, ..Links::default() }).collect();
        for entry in 0..n {
            self.inflight(entry).store(0, Ordering::Relaxed);
            self.field(entry, 2).store(entry + 1, Ordering::Relaxed);
        }
        (self.free_head, self.used) = (0, used);
        self.word(0).store(0, Ordering::Relaxed);
        self.half(10).store(n, Ordering::Relaxed);
        self.set_new();
        self.set_old();
        self.half(8).store(VERSION, Ordering::Release);
    }

    /// What the last back end has left: an update in progress is carried through if the driver has seen it, and undone
    /// if it has not; what is not in the list of unused entries then is to be served again.
    fn left(&mut self, flags_at: impl Fn(u16) -> u16) -> Result<Left, RingError> {
        let bad = |what| Err(RingError::BadInflight(what));
        let n = self.region.desc_num;
        if self.word(0).load(Ordering::Relaxed) != 0 {
            return bad("it uses features that are unknown");
        }
        if self.half(10).load(Ordering::Relaxed) != n {
            return bad("its number of entries is not the one announced");
        }
        let [a, b, c, d, new_wrap, old_wrap, ..] = self.word(POSITIONS).load(Ordering::Relaxed).to_ne_bytes();
        let new = Position { index: u16::from_ne_bytes([a, b]), wrap: new_wrap != 0 };
        let old = Position { index: u16::from_ne_bytes([c, d]), wrap: old_wrap != 0 };
        if new.index >= self.size || old.index >= self.size {
            return bad("its used index is outside the ring");
        }
        // Of the whole position: a batch as long as the ring moves the wrap counter only.
        let shown = new != old && !old.is_available(flags_at(old.index));
        (self.used, self.free_head) = if shown {
            (new, self.half(FREE_HEAD).load(Ordering::Relaxed))
        } else {
            (old, self.half(OLD_FREE_HEAD).load(Ordering::Relaxed))
        };
        self.links = (0..n)
            .map(|i| {
                let link = |at| self.field(i, at).load(Ordering::Relaxed);
                Links { next: link(2), last: link(4), num: link(6) }
            })
            .collect();
        let mut seen = vec![false; n.into()];
        let mut visit = |entry: u16| {
            let first = seen.get_mut(usize::from(entry)).is_some_and(|seen| !std::mem::replace(seen, true));
            if first {
                Ok(())
            } else {
                Err(RingError::BadInflight("its lists loop or lead out of the table"))
            }
        };
        let mut entry = self.free_head;
        let mut free = 0;
        while entry < n {
            visit(entry)?;
            free += 1;
            self.inflight(entry).store(0, Ordering::Relaxed);
            entry = self.links[usize::from(entry)].next;
        }
        let mut chains = Vec::new();
        let mut held = 0;
        for head in (0..n).filter(|&i| self.inflight(i).load(Ordering::Relaxed) != 0) {
            let Links { last, num, .. } = self.links[usize::from(head)];
            let mut entry = head;
            for i in 1..=num {
                visit(entry)?;
                if i == num && entry != last {
                    return bad("a chain does not end where it says");
                }
                entry = self.links[usize::from(entry)].next;
            }
            held += u32::from(num);
            if num == 0 || held > u32::from(self.size) {
                return bad("its chains do not fit into the ring");
            }
            chains.push((self.counter_of(head).load(Ordering::Relaxed), head));
        }
        if free + held != u32::from(n) {
            return bad("some of its entries are in no list");
        }
        let newest = chains
            .iter()
            .map(|&(counter, _)| counter)
            .reduce(|a, b| if b.wrapping_sub(a) < u64::MAX / 2 { b } else { a });
        self.counter = newest.map_or(0, |n| n.wrapping_add(1));
        chains.sort_by_key(|&(counter, _)| self.counter.wrapping_sub(counter));
        pass("recover-begins");
        // The one that is right first: it is what the other one becomes.
        if shown {
            self.set_old();
        } else {
            self.set_new();
        }
        let chains = chains.into_iter().map(|(_, head)| head).collect();
        Ok(Left { used: self.used, avail: self.used.advance(held as u16, self.size), chains })
    }

    /// Where the descriptors of the next chain are noted, before it is known whether it can be taken.
    #[inline]
    pub(in crate::ring) fn notes(&self) -> Notes<'_> {
        Notes { record: self, next: self.free_head, last: self.free_head }
    }

    /// A chain of `count` descriptors, which were all noted, has been taken; its entry.
    #[inline]
    pub(in crate::ring) fn taken(&mut self, count: u16, last: u16) -> u16 {
        let head = self.free_head;
        pass("take-begins");
        self.counter_of(head).store(self.counter, Ordering::Relaxed);
        self.field(head, 6).store(count, Ordering::Relaxed);
        self.field(head, 4).store(last, Ordering::Relaxed);
        pass("take-counter");
        self.counter = self.counter.wrapping_add(1);
        self.inflight(head).store(1, Ordering::Release);
        pass("take-inflight");
        self.free_head = self.links[usize::from(last)].next;
        let links = &mut self.links[usize::from(head)];
        (links.last, links.num) = (last, count);
        self.half(FREE_HEAD).store(self.free_head, Ordering::Release);
        pass("take-free-head");
        self.half(OLD_FREE_HEAD).store(self.free_head, Ordering::Release);
        pass("take-old-free-head");
        head
    }

    /// A chain has gone back to those that are available. In the list of unused entries first: what is in it does not count
    /// as in flight, and an entry that is neither cannot be told from garbage.
    pub(in crate::ring) fn untaken(&mut self, head: u16) {
        let last = self.links[usize::from(head)].last;
        self.links[usize::from(last)].next = self.free_head;
        self.field(last, 2).store(self.free_head, Ordering::Release);
        pass("untake-next");
        self.free_head = head;
        self.half(FREE_HEAD).store(head, Ordering::Release);
        pass("untake-free-head");
        self.half(OLD_FREE_HEAD).store(head, Ordering::Release);
        pass("untake-old-free-head");
        self.inflight(head).store(0, Ordering::Release);
        pass("untake-inflight");
    }

    /// The descriptors of a chain that an earlier back end had taken, and how many there are.
    pub(in crate::ring) fn chain(&self, head: u16) -> (u16, impl Iterator<Item = (u64, Rest)>) {
        let count = self.links[usize::from(head)].num;
        let mut entry = head;
        let descs = (0..count).map(move |_| {
            let rest = self.entry_word(entry, 16).load(Ordering::Relaxed).to_ne_bytes();
            let half = |at: usize| u16::from_ne_bytes([rest[at], rest[at + 1]]);
            let len = u32::from_ne_bytes([rest[4], rest[5], rest[6], rest[7]]);
            let addr = self.entry_word(entry, 24).load(Ordering::Relaxed);
            entry = self.links[usize::from(entry)].next;
            (addr, Rest::new(len, half(0), half(2)))
        });
        (count, descs)
    }

    /// A chain has been completed; the driver does not see it yet.
    #[inline]
    pub(in crate::ring) fn completed(&mut self, head: u16) {
        pass("complete-begins");
        self.batch.push(head);
    }

    /// What was completed is about to be shown to the driver, up to `used`.
    #[inline]
    pub(in crate::ring) fn showing(&mut self, used: Position) {
        for i in 0..self.batch.len() {
            let head = self.batch[i];
            let last = self.links[usize::from(head)].last;
            self.links[usize::from(last)].next = self.free_head;
            self.field(last, 2).store(self.free_head, Ordering::Release);
            pass("publish-next");
            self.free_head = head;
            self.half(FREE_HEAD).store(head, Ordering::Release);
            pass("publish-free-head");
        }
        self.set_positions(used, self.used);
        self.used = used;
        pass("publish-used-idx");
    }

    /// It has been shown.
    #[inline]
    pub(in crate::ring) fn shown(&mut self) {
        pass("publish-shown");
        for i in 0..self.batch.len() {
            self.inflight(self.batch[i]).store(0, Ordering::Release);
            pass("publish-clear");
        }
        self.batch.clear();
        pass("publish-cleared");
        self.set_old();
        pass("publish-noted");
    }

    fn set_new(&self) {
        self.half(FREE_HEAD).store(self.free_head, Ordering::Release);
        self.set_positions(self.used, self.used);
    }

    #[inline]
    fn set_old(&self) {
        self.half(OLD_FREE_HEAD).store(self.free_head, Ordering::Release);
        pass("publish-old-free-head");
        self.set_positions(self.used, self.used);
    }

    /// Writes `used_idx`, `old_used_idx` and the wrap counters that go with them, all at once: an index with the wrap
    /// counter of another would be taken for a place a whole ring away.
    #[inline]
    fn set_positions(&self, new: Position, old: Position) {
        let ([a, b], [c, d]) = (new.index.to_ne_bytes(), old.index.to_ne_bytes());
        let word = u64::from_ne_bytes([a, b, c, d, new.wrap.into(), old.wrap.into(), 0, 0]);
        self.word(POSITIONS).store(word, Ordering::Release);
    }

    #[inline]
    fn half(&self, offset: usize) -> &AtomicU16 {
        debug_assert!(offset < PACKED_HEADER as usize);
        // SAFETY: an even offset inside the header of a region that is aligned to 8 and kept mapped; access is atomic.
        unsafe { self.base.add(offset).cast().as_ref() }
    }

    #[inline]
    fn word(&self, offset: usize) -> &AtomicU64 {
        debug_assert!(offset < PACKED_HEADER as usize);
        // SAFETY: as for `half`, with an offset that is a multiple of 8.
        unsafe { self.base.add(offset).cast().as_ref() }
    }

    #[inline]
    fn entry(&self, entry: u16) -> NonNull<u8> {
        assert!(entry < self.region.desc_num);
        // SAFETY: the region has as many entries (see `InflightMemory::queue`).
        unsafe { self.base.add((PACKED_HEADER + PACKED_ENTRY * u64::from(entry)) as usize) }
    }

    #[inline]
    fn inflight(&self, entry: u16) -> &AtomicU8 {
        // SAFETY: the first byte of an entry; access is atomic.
        unsafe { self.entry(entry).cast().as_ref() }
    }

    #[inline]
    fn field(&self, entry: u16, offset: usize) -> &AtomicU16 {
        debug_assert!(offset < 8);
        // SAFETY: an even offset in an entry that is aligned to 8; access is atomic.
        unsafe { self.entry(entry).add(offset).cast().as_ref() }
    }

    #[inline]
    fn counter_of(&self, entry: u16) -> &AtomicU64 {
        self.entry_word(entry, 8)
    }

    #[inline]
    fn entry_word(&self, entry: u16, offset: usize) -> &AtomicU64 {
        debug_assert!(offset < PACKED_ENTRY as usize);
        // SAFETY: a multiple of 8 in an entry that is aligned to 8; access is atomic.
        unsafe { self.entry(entry).add(offset).cast().as_ref() }
    }
}

/// `id`, `flags` and `len` of an entry, which are one after the other, in one number.
#[inline]
fn entry_rest(rest: Rest) -> u64 {
    let ([a, b], [c, d]) = (rest.id().to_ne_bytes(), rest.flags().to_ne_bytes());
    let [e, f, g, h] = rest.len().to_ne_bytes();
    u64::from_ne_bytes([a, b, c, d, e, f, g, h])
}
