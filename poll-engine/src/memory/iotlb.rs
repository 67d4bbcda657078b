//! The device IOTLB: what a device behind a vIOMMU may touch, and where that is (vhost-user, "IOMMU support").
//!
//! With it, ring and buffer addresses are I/O virtual. The front end translates them for us, a piece at a time, when
//! asked; what it has told is kept here, on the control thread, as intervals. Each change ends in a new snapshot
//! ([`Iotlb::snapshot`]), a [`MemoryMap`] whose spans are those intervals, so the data path is the same with and
//! without. An address that is in no interval is a [`Miss`].

use std::ops::Range;
use std::sync::Arc;

use crate::sync::Bell;
use crossbeam::queue::ArrayQueue;

use super::map::{MemoryMap, Span};

/// Most intervals kept. Neighbours that go on where the last one ends are one, so a guest whose I/O addresses are its
/// physical ones needs a handful; one that maps and unmaps for every request has as many as it has pages in flight.
pub const MAX_ENTRIES: usize = 2048;

/// Most misses that wait to be asked for. A queue that finds no room posts again when the map changes.
const MAX_POSTED: usize = 256;

/// The smallest page an IOMMU translates.
const PAGE: u64 = 4096;

/// What is done, or may be done, with memory (`VHOST_ACCESS_RO`, `_WO`, `_RW`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Access(u8);

impl Access {
    /// The device reads.
    pub const READ: Access = Access(1);
    /// The device writes.
    pub const WRITE: Access = Access(2);
    /// Both.
    pub const BOTH: Access = Access(3);

    /// From the protocol's number; `None` for one that permits nothing or is unknown.
    pub fn from_bits(bits: u8) -> Option<Access> {
        matches!(bits, 1..=3).then_some(Access(bits))
    }

    /// The protocol's number.
    pub fn bits(self) -> u8 {
        self.0
    }

    /// Whether all of `wanted` is permitted.
    #[inline(always)]
    pub fn allows(self, wanted: Access) -> bool {
        self.0 & wanted.0 == wanted.0
    }
}

/// An I/O virtual address that cannot be translated, for want of an interval or of permission.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Miss {
    /// The address.
    pub iova: u64,
    /// What was to be done there.
    pub access: Access,
}

/// Where queues say what they miss; their control thread asks the front end.
#[derive(Debug)]
pub struct Misses {
    posted: ArrayQueue<Miss>,
    bell: Arc<Bell>,
}

impl Misses {
    /// Misses that ring `bell`.
    pub fn new(bell: Arc<Bell>) -> Misses {
        Misses { posted: ArrayQueue::new(MAX_POSTED), bell }
    }

    /// Posts misses, as many as there is room for. Costs a system call: the queue goes to rest over it anyway.
    pub fn post(&self, misses: &[Miss]) {
        // What finds no room is posted again when something has been answered.
        let _ = misses.iter().try_for_each(|&miss| self.posted.push(miss));
        self.bell.ring();
    }

    /// The next one.
    pub fn take(&self) -> Option<Miss> {
        self.posted.pop()
    }
}

/// A translation as the front end tells it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mapping {
    /// First I/O virtual address.
    pub iova: u64,
    /// Bytes.
    pub size: u64,
    /// The same memory's address in the front end.
    pub user_addr: u64,
    /// What the device may do there.
    pub access: Access,
}

/// What a front end can get wrong about translations.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum IotlbError {
    /// No bytes, or a range that wraps around.
    #[error("I/O address range at {iova:#x} with size {size:#x} is empty or wraps around")]
    BadRange {
        /// First address.
        iova: u64,
        /// Bytes.
        size: u64,
    },
    /// A translation to something that is not within one memory region.
    #[error(
        "I/O address {iova:#x} is mapped to {user_addr:#x}, size {size:#x}, which is not in one memory region"
    )]
    Outside {
        /// First I/O virtual address.
        iova: u64,
        /// Where it is said to be.
        user_addr: u64,
        /// Bytes.
        size: u64,
    },
}

/// What a change took away: nothing in flight may point there when the front end hears that the change is done.
#[derive(Debug, Default)]
pub struct Revoked {
    /// Host addresses.
    host: Vec<Range<usize>>,
}

impl Revoked {
    /// This and what another change took away.
    pub fn merge(&mut self, other: Revoked) {
        self.host.extend(other.host);
    }

    /// Whether nothing was taken away.
    pub fn is_empty(&self) -> bool {
        self.host.is_empty()
    }

    /// Whether any of these host ranges was taken away, if only in part.
    pub fn touches(&self, pinned: &[Range<usize>]) -> bool {
        pinned.iter().any(|p| self.host.iter().any(|r| p.start < r.end && r.start < p.end))
    }
}

/// First and last address of a range that an invalidation names. The whole address space has a size that 64 bits do
/// not hold: QEMU's `addr_mask + 1` makes 0 of it.
pub fn inclusive(iova: u64, size: u64) -> Result<(u64, u64), IotlbError> {
    if (iova, size) == (0, 0) {
        return Ok((0, u64::MAX));
    }
    let last = size.checked_sub(1).and_then(|rest| iova.checked_add(rest));
    last.map(|last| (iova, last)).ok_or(IotlbError::BadRange { iova, size })
}

/// The translations of a session.
#[derive(Debug, Default)]
pub struct Iotlb {
    /// By I/O virtual address, without overlaps.
    spans: Vec<Span>,
    /// Which to evict next.
    victim: usize,
    /// Something has been evicted since this was last taken.
    evicted: bool,
}

impl Iotlb {
    /// Adds a translation, in place of what is known of these addresses. Returns what could be done before and cannot
    /// be any more.
    pub fn update(&mut self, mapping: &Mapping, memory: &MemoryMap) -> Result<Revoked, IotlbError> {
        let Mapping { iova, size, user_addr, access } = *mapping;
        let last = size.checked_sub(1).and_then(|rest| iova.checked_add(rest));
        let last = last.ok_or(IotlbError::BadRange { iova, size })?;
        let host = memory.find_user(user_addr, size).ok_or(IotlbError::Outside { iova, user_addr, size })?;
        let mut revoked = Revoked::default();
        for old in self.cut(iova, last) {
            let same = host.wrapping_add((old.addr - iova) as usize) == old.host;
            if !same || !access.allows(old.access()) {
                revoked.host.push(old.host_range());
            }
        }
        self.insert(Span::new(iova, host, size, access), memory);
        Ok(revoked)
    }

    /// Forgets the addresses from `first` to `last`. Returns what could be done there.
    pub fn invalidate(&mut self, first: u64, last: u64) -> Revoked {
        Revoked { host: self.cut(first, last).iter().map(Span::host_range).collect() }
    }

    /// Forgets everything.
    pub fn clear(&mut self) {
        self.spans.clear();
        self.evicted = false;
    }

    /// Goes over to another memory table: forgets what is in no region of it.
    pub fn retain_in(&mut self, memory: &MemoryMap) {
        self.spans.retain(|span| memory.find_host(&span.host_range()).is_some());
    }

    /// Whether something has been evicted since this was last asked. It is known no more where that was, so who needs
    /// to know that nothing points there has to wait for everything.
    pub fn take_evicted(&mut self) -> bool {
        std::mem::take(&mut self.evicted)
    }

    /// What is known, as the map that queues translate by, in the memory of `memory`. Misses are posted to `misses`.
    pub fn snapshot(&self, memory: &MemoryMap, misses: &Arc<Misses>) -> MemoryMap {
        memory.translated(self.spans.clone(), Arc::clone(misses))
    }

    /// How many intervals there are.
    pub fn len(&self) -> usize {
        self.spans.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.spans.is_empty()
    }

    /// Takes the addresses from `first` to `last` out, and returns what was there.
    fn cut(&mut self, first: u64, last: u64) -> Vec<Span> {
        let from = self.spans.partition_point(|s| s.last() < first);
        let to = self.spans.partition_point(|s| s.addr <= last).max(from);
        let mut kept = Vec::new();
        let mut removed = Vec::new();
        for span in &self.spans[from..to] {
            let (start, end) = (span.addr.max(first), span.last().min(last));
            if span.addr < start {
                kept.push(span.part(span.addr, start - 1));
            }
            removed.push(span.part(start, end));
            if end < span.last() {
                kept.push(span.part(end + 1, span.last()));
            }
        }
        self.spans.splice(from..to, kept);
        removed
    }

    /// Inserts where nothing is, joined with neighbours that it goes on from.
    fn insert(&mut self, mut new: Span, memory: &MemoryMap) {
        // Never from one region into the next, which need not be mapped together for ever.
        let joined = |a: &Span, b: &Span| {
            let whole = a.longer(b.size());
            let fits = a.goes_on_in(b) && a.access() == b.access();
            (fits && memory.find_host(&whole.host_range()).is_some()).then_some(whole)
        };
        let mut at = self.spans.partition_point(|s| s.addr < new.addr);
        if let Some(whole) = self.spans.get(at).and_then(|next| joined(&new, next)) {
            new = whole;
            self.spans.remove(at);
        }
        if let Some(whole) = at.checked_sub(1).and_then(|i| joined(&self.spans[i], &new)) {
            at -= 1;
            self.spans[at] = whole;
        } else {
            self.spans.insert(at, new);
        }
        if self.spans.len() > MAX_ENTRIES {
            // Round and round: whatever is used is asked for again.
            self.victim = (self.victim + 1) % self.spans.len();
            if self.victim == at {
                self.victim = (self.victim + 1) % self.spans.len();
            }
            self.spans.remove(self.victim);
            self.evicted = true;
        }
    }
}

/// Calls `found` with the first address of each page in `len` bytes at `addr` that `map` does not translate for
/// `access`, until it returns false.
pub(crate) fn each_missing(
    map: &MemoryMap,
    addr: u64,
    len: u64,
    access: Access,
    mut found: impl FnMut(Miss) -> bool,
) {
    let Some(last) = len.checked_sub(1).and_then(|rest| addr.checked_add(rest)) else { return };
    let mut at = addr;
    loop {
        let end = match map.span(at, access) {
            Some(span) => span.last(),
            None if !found(Miss { iova: at, access }) => return,
            None => at | (PAGE - 1),
        };
        if end >= last {
            return;
        }
        at = end + 1;
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::memory::slice::RawSlice;
    use crate::memory::{MemoryError, Ram, RegionSpec};
    use proptest::prelude::*;

    const SPACE: u64 = 256;

    fn misses() -> Arc<Misses> {
        Arc::new(Misses::new(Arc::new(Bell::new().unwrap())))
    }

    /// Two regions, neighbours in the front end.
    fn memory() -> (MemoryMap, [Ram; 2]) {
        let rams = [0x1000_0000u64, 0x2000_0000].map(|at| Ram::new(at, SPACE, false).unwrap());
        let region = |(i, ram): (u64, &Ram)| {
            let spec = RegionSpec { user_addr: 0x7000 + i * SPACE, ..ram.spec() };
            Arc::new(crate::memory::Region::map(spec, ram.fd().try_clone_to_owned().unwrap()).unwrap())
        };
        (MemoryMap::new((0..).zip(&rams).map(region).collect()).unwrap(), rams)
    }

    #[derive(Clone, Debug)]
    enum Op {
        Update { at: u64, len: u64, user: u64, access: u8 },
        Invalidate { at: u64, len: u64 },
    }

    fn op() -> impl Strategy<Value = Op> {
        let at = 0..SPACE;
        prop_oneof![
            3 => (at.clone(), 1..80u64, 0..2 * SPACE, 1..4u8)
                .prop_map(|(at, len, user, access)| Op::Update { at, len, user, access }),
            // Such that neighbours often go on where others end.
            2 => (at.clone(), 1..80u64).prop_map(|(at, len)| Op::Update { at, len, user: at, access: 3 }),
            2 => (at, 1..120u64).prop_map(|(at, len)| Op::Invalidate { at, len }),
        ]
    }

    type Model = Vec<Option<(usize, Access)>>;

    proptest! {
        /// Every byte of a small space is where a model says, at either end of all addresses.
        #[test]
        fn translations_are_those_of_a_model(
            ops in prop::collection::vec(op(), 1..60),
            base in prop_oneof![Just(0), Just(u64::MAX - (SPACE - 1))],
            reads in prop::collection::vec((0..SPACE, 1..SPACE as u32), 8),
        ) {
            let (memory, _rams) = memory();
            let misses = misses();
            let mut iotlb = Iotlb::default();
            let mut model: Model = vec![None; SPACE as usize];
            let host = |user: u64| {
                let r = &memory.regions()[(user / SPACE) as usize];
                r.host_addr().addr() + (user % SPACE) as usize
            };
            for op in ops {
                let before = model.clone();
                let revoked = match op {
                    Op::Update { at, len, user, access } => {
                        let len = len.min(SPACE - at);
                        let access = Access::from_bits(access).unwrap();
                        let mapping = Mapping { iova: base + at, size: len, user_addr: 0x7000 + user, access };
                        let outcome = iotlb.update(&mapping, &memory);
                        if user / SPACE != (user + len - 1) / SPACE || user + len > 2 * SPACE {
                            prop_assert!(matches!(outcome, Err(IotlbError::Outside { .. })), "{outcome:?}");
                            continue;
                        }
                        for i in 0..len {
                            model[(at + i) as usize] = Some((host(user + i), access));
                        }
                        outcome.unwrap()
                    }
                    Op::Invalidate { at, len } => {
                        let len = len.min(SPACE - at);
                        model[at as usize..(at + len) as usize].fill(None);
                        let (first, last) = inclusive(base + at, len).unwrap();
                        iotlb.invalidate(first, last)
                    }
                };
                for (old, new) in before.iter().zip(&model) {
                    let Some((host, access)) = *old else { continue };
                    let lost = new.is_none_or(|(h, a)| h != host || !a.allows(access));
                    if lost {
                        let byte = host..host + 1;
                        prop_assert!(revoked.touches(&[byte]), "lost without being revoked");
                    }
                }
                let taken: usize = revoked.host.iter().map(ExactSizeIterator::len).sum();
                let changed = before.iter().zip(&model).filter(|(a, b)| a.is_some() && a != b).count();
                prop_assert!(taken <= changed, "{taken} bytes revoked of {changed}");
                for pair in iotlb.spans.windows(2) {
                    prop_assert!(pair[0].last() < pair[1].addr, "overlap or disorder");
                    let joins = pair[0].goes_on_in(&pair[1]) && pair[0].access() == pair[1].access();
                    let whole = pair[0].longer(pair[1].size()).host_range();
                    prop_assert!(!joins || memory.find_host(&whole).is_none(), "not joined");
                }
                let map = iotlb.snapshot(&memory, &misses);
                for (i, byte) in (0..).zip(&model) {
                    for access in [Access::READ, Access::WRITE, Access::BOTH] {
                        prop_assert_eq!(map.allows(base + i, access), byte.is_some_and(|b| b.1.allows(access)));
                    }
                }
                for &(at, len) in &reads {
                    let len = len.min((SPACE - at) as u32);
                    let mut out: Vec<RawSlice> = Vec::new();
                    let there = &model[at as usize..][..len as usize];
                    let whole = map.locate().whole(base + at, len, true).map(RawSlice::host_range);
                    match map.translate(base + at, len, Access::WRITE, &mut out) {
                        Ok(()) => {
                            let one = (out.len() == 1).then(|| out[0].host_range());
                            prop_assert_eq!(whole, one);
                            let got: Vec<usize> = out.iter().flat_map(|s| s.host_range()).collect();
                            let want: Option<Vec<usize>> = there
                                .iter()
                                .map(|b| b.filter(|b| b.1.allows(Access::WRITE)).map(|b| b.0))
                                .collect();
                            prop_assert_eq!(Some(got), want);
                        }
                        Err(MemoryError::Miss(miss)) => {
                            prop_assert_eq!(whole, None);
                            let first = there.iter().position(|b| b.is_none_or(|b| !b.1.allows(Access::WRITE)));
                            prop_assert_eq!(first.map(|i| base + at + i as u64), Some(miss.iova));
                        }
                        Err(other) => prop_assert!(false, "{other}"),
                    }
                }
            }
            let whole = iotlb.invalidate(0, u64::MAX);
            prop_assert!(iotlb.is_empty());
            prop_assert_eq!(whole.is_empty(), model.iter().all(Option::is_none));
        }
    }

    #[test]
    fn hostile_ranges_are_refused_or_are_everything() {
        let (memory, _rams) = memory();
        let mut iotlb = Iotlb::default();
        let good = Mapping { iova: 0x1000, size: 16, user_addr: 0x7000, access: Access::BOTH };
        for (iova, size, user_addr) in [
            (0x1000, 0, 0x7000),
            (0, 0, 0x7000),
            (u64::MAX, 2, 0x7000),
            (u64::MAX - 5, u64::MAX, 0x7000),
            (0x1000, 16, 0x6fff),
            (0x1000, 2 * SPACE, 0x7000),
            (0x1000, u64::MAX - 0x1000, 0x7000),
            (0x1000, 16, u64::MAX - 3),
            (0x1000, 2, 0x7000 + SPACE - 1), // two regions
        ] {
            let bad = Mapping { iova, size, user_addr, ..good };
            assert!(iotlb.update(&bad, &memory).is_err(), "{bad:x?}");
        }
        assert!(iotlb.is_empty());
        iotlb.update(&Mapping { iova: u64::MAX - 15, ..good }, &memory).unwrap();
        assert_eq!(inclusive(5, 0), Err(IotlbError::BadRange { iova: 5, size: 0 }));
        assert_eq!(inclusive(2, u64::MAX), Err(IotlbError::BadRange { iova: 2, size: u64::MAX }));
        assert_eq!(inclusive(1, u64::MAX), Ok((1, u64::MAX)));
        assert_eq!(inclusive(0, 0), Ok((0, u64::MAX)), "what QEMU makes of the whole space");
        assert_eq!(Access::from_bits(0), None);
        assert_eq!(Access::from_bits(4), None);
    }

    #[test]
    fn there_is_an_end_to_what_is_kept() {
        let (memory, _rams) = memory();
        let mut iotlb = Iotlb::default();
        let at = |i: u64| Mapping { iova: i << 20, size: 16, user_addr: 0x7000, access: Access::BOTH };
        for i in 0..MAX_ENTRIES as u64 {
            iotlb.update(&at(i), &memory).unwrap();
        }
        assert!(!iotlb.take_evicted());
        for i in 0..3 * MAX_ENTRIES as u64 {
            let new = at(MAX_ENTRIES as u64 + i);
            iotlb.update(&new, &memory).unwrap();
            assert_eq!(iotlb.len(), MAX_ENTRIES);
            assert!(iotlb.snapshot(&memory, &misses()).knows(new.iova), "the newest was evicted");
        }
        assert!(iotlb.take_evicted() && !iotlb.take_evicted());
    }

    #[test]
    fn another_memory_table_keeps_what_is_in_both() {
        let (memory, _rams) = memory();
        let mut iotlb = Iotlb::default();
        for (iova, user_addr) in [(0x1000, 0x7000), (0x2000, 0x7000 + SPACE)] {
            iotlb.update(&Mapping { iova, size: 16, user_addr, access: Access::BOTH }, &memory).unwrap();
        }
        let rest = MemoryMap::new(vec![Arc::clone(&memory.regions()[1])]).unwrap();
        iotlb.retain_in(&rest);
        let map = iotlb.snapshot(&rest, &misses());
        assert!(!map.knows(0x1000) && map.knows(0x2000));
    }

    #[test]
    fn scattered_ring_pages_are_mapped_beside_each_other() {
        let mut ram = Ram::new(0, 16 * PAGE, false).unwrap();
        let at = ram.alloc(16 * PAGE, PAGE).unwrap();
        let mut iotlb = Iotlb::default();
        // Three I/O pages in pages 9, 4 and 5 of the memory; the ring begins in the middle of the first.
        for (i, page) in (0..).zip([9, 4, 5]) {
            let user_addr = ram.user_addr(at + page * PAGE);
            let iova = 0xabc_d000 + i * PAGE;
            iotlb.update(&Mapping { iova, size: PAGE, user_addr, access: Access::BOTH }, ram.map()).unwrap();
        }
        let map = iotlb.snapshot(ram.map(), &misses());
        for page in [9, 4, 5] {
            ram.map().slice(at + page * PAGE, PAGE as u32).unwrap().fill(page as u8);
        }
        assert_eq!(map.physical(0xabc_e010), Some(at + 4 * PAGE + 0x10), "what the dirty log is told");
        assert_eq!(map.physical(0xabc_c000), None);
        let ring = map.ring_address(0xabc_d800, 2 * PAGE + 16, true).unwrap();
        let host = ring.region.host_addr();
        assert_eq!(host, ring.host.as_ptr());
        assert_eq!(ring.guest_addr(), at + 9 * PAGE + 0x800);
        let bytes = crate::memory::slice::tests_read(host, 2 * PAGE as usize + 16);
        assert!(bytes[..0x800].iter().all(|&b| b == 9));
        assert!(bytes[0x800..0x1800].iter().all(|&b| b == 4));
        assert!(bytes[0x1800..].iter().all(|&b| b == 5));
        // Neighbours need no mapping of their own.
        let whole = map.ring_address(0xabc_e000, 2 * PAGE, true).unwrap();
        assert!(Arc::ptr_eq(&whole.region, &ram.map().regions()[0]));
        assert!(matches!(map.ring_address(0xabc_e000, 3 * PAGE, true), Err(MemoryError::Miss(_))));
    }
}
