//! The split virtqueue, device side (virtio 1.3, 2.7).
//!
//! ```text
//!   avail->idx ──┐ written by the driver            used->idx ──┐ written by publish
//!   ... ┌────────┴───────┐                 ... ┌────────────────┴───┐
//!       │ next_avail ──► │ seen_avail          │ published ──► next_used │
//!   ... └────────────────┘                 ... └────────────────────┘
//!   all four are free-running 16-bit numbers; slot = number mod size, distance = wrapping difference
//! ```

use std::sync::atomic::{Ordering, fence};

pub use vring::layout::need_event;

use super::chain::Chain;
use super::inflight::{Kept, QueueRegion, SplitInflight};
use super::layout::{
    AVAIL_F_NO_INTERRUPT, DESC_F_INDIRECT, DESC_F_NEXT, DESC_F_WRITE, Desc, SplitLayout, USED_F_NO_NOTIFY,
};
use super::table::{MIN_CHAIN_LIMIT, Table};
use super::{Ahead, MAX_SURVEYED, RingConfig, RingError, Token, Used, survey_desc};
use crate::fault_point::pass;
use crate::memory::iotlb::Miss;
use crate::memory::log::LoggedPart;
use crate::memory::map::{Locator, MemoryMap};
use crate::memory::slice::{RawSlice, prefetch_write};

/// With the event index, `avail_event` is moved on when the driver has come this far past it, so that the driver's
/// 16-bit numbers never come round to it while notifications are off.
const STALE_EVENT: u16 = 1 << 14;

/// The used ring (virtio 1.3, 2.7.8): where its index and its entries are, and how long one is.
const USED_IDX: u64 = 2;
const USED_RING: u64 = 4;
const USED_ENTRY: u64 = 8;

/// The running device side of a split ring.
#[derive(Debug)]
#[allow(clippy::struct_excessive_bools)] // each of its own meaning
pub struct SplitRing {
    layout: SplitLayout,
    event_idx: bool,
    indirect: bool,
    in_order: bool,
    /// The next slot of the available ring to take.
    next_avail: u16,
    /// `avail->idx` as last read.
    seen_avail: u16,
    /// The next slot of the used ring to fill.
    next_used: u16,
    /// The entry filled last, and whether the next chain may be told of by the same one.
    entry: u16,
    joins: bool,
    /// `used->idx` as last written.
    published: u16,
    /// `published` when the driver was last signalled or found not to want it: the `old` of 2.7.7.2.
    signalled: u16,
    in_flight: u16,
    /// `avail_event` as last written.
    avail_event: u16,
    notify: bool,
    /// While the front end wants to know of writes to the used ring.
    log: Option<LoggedPart>,
    pub(super) kept: Kept<SplitInflight>,
    /// The driver is owed an interrupt, whatever it says it wants: an earlier one may have been lost.
    overdue: bool,
    /// The head taken last, and where its first buffer is.
    recent: (u16, usize),
}

impl SplitRing {
    pub(super) fn new(layout: SplitLayout, config: &RingConfig) -> Result<SplitRing, RingError> {
        let base = u16::try_from(config.base).map_err(|_| RingError::BadBase(config.base))?;
        // The used index is the guest's to keep across a stop and start: whatever it is, we go on from there.
        let used = layout.used_idx();
        let mut ring = SplitRing {
            layout,
            event_idx: config.event_idx,
            indirect: config.indirect,
            in_order: config.in_order,
            next_avail: base,
            seen_avail: base,
            next_used: used,
            entry: used,
            joins: false,
            published: used,
            signalled: used,
            in_flight: 0,
            avail_event: 0,
            notify: true,
            log: None,
            kept: Kept::default(),
            overdue: false,
            recent: (0, 0),
        };
        ring.disable_notification();
        Ok(ring)
    }

    /// As [`Ring::recover`](super::Ring::recover); true when the region says where the ring goes on.
    pub(super) fn recover(&mut self, region: QueueRegion) -> Result<bool, RingError> {
        let (inflight, left) = SplitInflight::recover(region, self.size(), self.published)?;
        self.kept.record = Some(inflight);
        let Some(heads) = left else { return Ok(false) };
        // Whatever was made available and is not used had been taken, or comes now: chains are taken in order.
        self.next_avail = self.published.wrapping_add(heads.len() as u16);
        self.seen_avail = self.next_avail;
        self.kept.again = heads;
        Ok(true)
    }

    pub(super) fn return_resubmits(&mut self) -> bool {
        let first = self.next_avail.wrapping_sub(self.kept.resubmits());
        let mut slots = (0..).map(|i| self.layout.avail_ring(first.wrapping_add(i)));
        if !self.kept.again.iter().rev().all(|&head| slots.next() == Some(head)) {
            return false;
        }
        // Latest first: a record with some of them left is as right as the whole.
        for head in self.kept.again.drain(..) {
            if let Some(inflight) = &mut self.kept.record {
                inflight.untaken(head);
            }
        }
        (self.next_avail, self.seen_avail) = (first, first);
        true
    }

    pub(super) fn size(&self) -> u16 {
        self.layout.size()
    }

    pub(super) fn base(&self) -> u32 {
        u32::from(self.next_avail)
    }

    #[inline]
    pub(super) fn in_flight(&self) -> u16 {
        self.in_flight
    }

    #[inline]
    pub(super) fn available(&mut self) -> Result<u16, RingError> {
        if self.kept.resubmits() > 0 {
            return Ok(self.kept.resubmits());
        }
        let left = self.seen_avail.wrapping_sub(self.next_avail);
        if left > 0 {
            return Ok(left);
        }
        self.seen_avail = self.layout.avail_idx();
        let ready = self.seen_avail.wrapping_sub(self.next_avail);
        if ready > self.size() {
            self.seen_avail = self.next_avail;
            return Err(RingError::AvailJump(ready));
        }
        Ok(ready)
    }

    /// What is read here is a hint only; `take` reads and checks it again.
    #[inline]
    pub(super) fn prefetch(&mut self, count: u16, ahead: Ahead, map: &MemoryMap) {
        if self.kept.resubmits() > 0 {
            return;
        }
        for i in (0..count).step_by(8) {
            self.layout.prefetch_used(self.next_used.wrapping_add(i));
        }
        if count == 1 {
            // Nothing to overlap with but itself. A driver with one request in flight uses the same descriptors and
            // header again and again: they come along with the entry of the available ring that names them.
            self.layout.prefetch_desc(self.recent.0);
            prefetch_write(std::ptr::without_provenance(self.recent.1));
            return;
        }
        for i in 0..count {
            self.layout.prefetch_desc(self.layout.avail_ring(self.next_avail.wrapping_add(i)));
        }
        if ahead == Ahead::RING {
            return;
        }
        for i in 0..count {
            let head = self.layout.avail_ring(self.next_avail.wrapping_add(i));
            let desc = self.layout.desc(head);
            ahead.fetch(map, desc.addr, desc.len);
        }
    }

    #[inline]
    pub(super) fn take(&mut self, map: &MemoryMap, chain: &mut Chain) -> Result<Token, RingError> {
        if self.in_flight >= self.size() {
            return Err(RingError::TooManyInFlight);
        }
        let again = self.kept.again.last().copied();
        let head = again.unwrap_or_else(|| {
            debug_assert_ne!(self.next_avail, self.seen_avail, "take without available");
            self.layout.avail_ring(self.next_avail)
        });
        if head >= self.size() {
            return Err(RingError::BadIndex { index: head, size: u32::from(self.size()) });
        }
        chain.clear();
        let desc = self.layout.desc(head);
        if desc.flags & DESC_F_INDIRECT == 0 {
            self.walk(head, desc, map, chain)?;
        } else {
            self.walk_table(desc, map, chain)?;
        }
        self.recent = (head, chain.first_addr());
        // Commit: from here on the chain is ours.
        self.in_flight += 1;
        if again.is_some() {
            self.kept.again.pop();
            pass("recover-taken");
        } else {
            self.next_avail = self.next_avail.wrapping_add(1);
            if let Some(inflight) = &mut self.kept.record {
                inflight.taken(head);
            }
        }
        let token = Token::new(head, 1, chain.writable_len());
        Ok(if again.is_some() { token.again() } else { token })
    }

    /// As [`Ring::take_singles`](super::Ring::take_singles).
    #[inline(always)] // once a burst
    pub(super) fn take_singles(
        &mut self,
        at: &mut Locator<'_>,
        ahead: Ahead,
        slices: &mut [RawSlice],
        used: &mut [Used],
    ) -> usize {
        if !self.kept.again.is_empty() {
            return 0;
        }
        let (size, first) = (self.size(), self.next_avail);
        let room = size.saturating_sub(self.in_flight);
        let mut taken = 0u16;
        // What each chain changes is kept in registers until all are there.
        for (slice, used) in slices.iter_mut().zip(used.iter_mut()).take(room.into()) {
            let head = self.layout.avail_ring(first.wrapping_add(taken));
            if head >= size {
                break;
            }
            let desc = self.layout.desc(head);
            if desc.flags & (DESC_F_INDIRECT | DESC_F_NEXT) != 0 {
                break;
            }
            let writable = desc.flags & DESC_F_WRITE != 0;
            let Some(found) = at.whole(desc.addr, desc.len, writable) else { break };
            found.prefetch_lines(ahead.bytes, ahead.write);
            (*slice, *used) = (found, Used::new(head, 1, if writable { desc.len } else { 0 }));
            taken += 1;
        }
        self.in_flight += taken;
        self.next_avail = first.wrapping_add(taken);
        if let Some(inflight) = &mut self.kept.record {
            used.iter().take(taken.into()).for_each(|used| inflight.taken(used.id()));
        }
        taken.into()
    }

    #[inline]
    pub(super) fn untake(&mut self, used: Used) {
        assert!(self.in_flight > 0, "untook more chains than were taken");
        self.in_flight -= 1;
        if used.again() {
            // It stays recorded until it is completed.
            self.kept.again.push(used.id());
            return;
        }
        self.next_avail = self.next_avail.wrapping_sub(1);
        if let Some(inflight) = &mut self.kept.record {
            inflight.untaken(used.id());
        }
    }

    /// Looks for what the available chains name and `map` does not translate, until `found` returns false. Nothing is
    /// taken, and nothing is believed: `take` reads and checks all of it again.
    #[cold]
    pub(super) fn survey(&self, map: &MemoryMap, found: &mut impl FnMut(Miss) -> bool) {
        let ready = self.layout.avail_idx().wrapping_sub(self.next_avail).min(self.size());
        let mut left = MAX_SURVEYED;
        for i in 0..ready {
            let mut index = self.layout.avail_ring(self.next_avail.wrapping_add(i));
            loop {
                let desc = self.layout.desc(index);
                left = left.saturating_sub(1);
                if left == 0 || !survey_desc(map, &desc, Desc::from_pair, &mut left, found) {
                    return;
                }
                if desc.flags & DESC_F_NEXT == 0 {
                    break;
                }
                index = desc.next;
            }
        }
    }

    /// A chain in the ring's own table. It may end in an indirect one (2.7.5.3.2: "zero or more normal chained
    /// descriptors followed by a single descriptor with flags&VIRTQ_DESC_F_INDIRECT").
    #[inline]
    fn walk(&self, head: u16, mut desc: Desc, map: &MemoryMap, chain: &mut Chain) -> Result<(), RingError> {
        let size = self.size();
        let mut filling = chain.fill(map);
        for _ in 0..size {
            filling.push(desc.addr, desc.len, desc.flags & DESC_F_WRITE != 0)?;
            if desc.flags & DESC_F_NEXT == 0 {
                return filling.finish();
            }
            let index = desc.next;
            if index >= size {
                return Err(RingError::BadIndex { index, size: u32::from(size) });
            }
            if index == head {
                break;
            }
            desc = self.layout.desc(index);
            if desc.flags & DESC_F_INDIRECT != 0 {
                filling.finish()?;
                return self.walk_table(desc, map, chain);
            }
        }
        Err(RingError::TooLong(u32::from(size)))
    }

    /// Appends the chain in an indirect table.
    #[inline(never)] // the chain in the ring is in registers
    fn walk_table(&self, table: Desc, map: &MemoryMap, chain: &mut Chain) -> Result<(), RingError> {
        if !self.indirect || table.flags & DESC_F_NEXT != 0 {
            return Err(RingError::BadIndirect);
        }
        let mut chain = chain.fill(map);
        let table = Table::new(map, table.addr, table.len)?;
        let entries = table.entries();
        // 2.7.5.3.1: "A driver MUST NOT create a descriptor chain longer than the Queue Size". The bound ends a loop.
        let limit = entries.min(u32::from(self.size()).max(MIN_CHAIN_LIMIT));
        let mut index: u16 = 0;
        for _ in 0..limit {
            if u32::from(index) >= entries {
                return Err(RingError::BadIndex { index, size: entries });
            }
            let desc = Desc::from_pair(table.read(index)?);
            if desc.flags & DESC_F_INDIRECT != 0 {
                return Err(RingError::BadIndirect);
            }
            chain.push(desc.addr, desc.len, desc.flags & DESC_F_WRITE != 0)?;
            if desc.flags & DESC_F_NEXT == 0 {
                return chain.finish();
            }
            index = desc.next;
        }
        Err(RingError::TooLong(limit))
    }

    #[inline]
    pub(super) fn complete(&mut self, used: Used, written: u32) {
        assert!(self.in_flight > 0, "completed more chains than were taken");
        // 2.7.9: one entry may stand for several chains, of which all but the last were used completely.
        if !self.joins {
            self.entry = self.next_used;
        }
        self.layout.set_used_ring(self.entry, used.id(), written);
        self.joins = self.in_order && written == used.writable();
        if let Some(inflight) = &mut self.kept.record {
            inflight.completed(used.id());
        }
        self.next_used = self.next_used.wrapping_add(1);
        self.in_flight -= 1;
    }

    /// As [`Ring::complete_all`](super::Ring::complete_all).
    #[inline(always)] // once a burst
    pub(super) fn complete_all(&mut self, used: &[Used], written: impl Fn(usize) -> u32) {
        if self.in_order || self.kept.record.is_some() {
            used.iter().enumerate().for_each(|(at, &used)| self.complete(used, written(at)));
            return;
        }
        let count = used.len() as u16;
        assert!(self.in_flight >= count, "completed more chains than were taken");
        let first = self.next_used;
        for (at, used) in used.iter().enumerate() {
            self.layout.set_used_ring(first.wrapping_add(at as u16), used.id(), written(at));
        }
        self.next_used = first.wrapping_add(count);
        self.in_flight -= count;
    }

    #[inline]
    pub(super) fn publish(&mut self) -> bool {
        if self.published == self.next_used {
            return false;
        }
        if let Some(log) = &self.log {
            self.log_entries(log);
        }
        pass("publish-begins");
        self.layout.set_used_idx(self.next_used);
        self.joins = false;
        self.published = self.next_used;
        if let Some(inflight) = &mut self.kept.record {
            inflight.published(self.published);
        }
        if let Some(log) = &self.log {
            log.wrote(USED_IDX, 2);
        }
        true
    }

    /// Logs the used-ring entries that are about to be published.
    #[cold]
    fn log_entries(&self, log: &LoggedPart) {
        let size = u64::from(self.size());
        let first = u64::from(self.published) & (size - 1);
        let count = u64::from(self.next_used.wrapping_sub(self.published));
        let before_wrap = count.min(size - first);
        log.wrote(USED_RING + USED_ENTRY * first, USED_ENTRY * before_wrap);
        log.wrote(USED_RING, USED_ENTRY * (count - before_wrap));
    }

    fn set_avail_event(&mut self, event: u16) {
        self.avail_event = event;
        self.layout.set_avail_event(event);
        if let Some(log) = &self.log {
            log.wrote(USED_RING + USED_ENTRY * u64::from(self.size()), 2);
        }
    }

    fn set_used_flags(&self, flags: u16) {
        self.layout.set_used_flags(flags);
        if let Some(log) = &self.log {
            log.wrote(0, 2);
        }
    }

    pub(super) fn set_log(&mut self, log: Option<LoggedPart>) {
        self.log = log;
        if let Some(log) = &self.log {
            // What was written before anybody listened: when the ring was started.
            log.wrote(0, USED_RING);
            log.wrote(USED_RING + USED_ENTRY * u64::from(self.size()), 2);
        }
    }

    #[inline]
    pub(super) fn wants_interrupt(&mut self) -> Option<bool> {
        if self.signalled == self.published && !self.overdue {
            return None;
        }
        // 2.7.7.2: the used index must be visible before we look at what the driver wants, or both sides miss it.
        fence(Ordering::SeqCst);
        let old = std::mem::replace(&mut self.signalled, self.published);
        if std::mem::take(&mut self.overdue) {
            return Some(true);
        }
        Some(if self.event_idx {
            need_event(self.layout.used_event(), self.published, old)
        } else {
            self.layout.avail_flags() & AVAIL_F_NO_INTERRUPT == 0
        })
    }

    pub(super) fn owe_interrupt(&mut self) {
        self.overdue = true;
    }

    pub(super) fn enable_notification(&mut self) -> bool {
        if self.event_idx {
            self.set_avail_event(self.next_avail);
        } else {
            self.set_used_flags(0);
        }
        self.notify = true;
        // 2.7.10.1: look again after asking, or a chain made available in between is never heard of.
        fence(Ordering::SeqCst);
        self.layout.avail_idx() != self.next_avail || self.kept.resubmits() > 0
    }

    pub(super) fn disable_notification(&mut self) {
        if self.event_idx {
            // The driver notifies when it passes avail_event; one that lies behind it is never passed.
            if self.notify || self.next_avail.wrapping_sub(self.avail_event) > STALE_EVENT {
                self.set_avail_event(self.next_avail.wrapping_sub(1));
            }
        } else if self.notify {
            self.set_used_flags(USED_F_NO_NOTIFY);
        }
        self.notify = false;
    }

    pub(super) fn relocate(&mut self, layout: SplitLayout) {
        self.layout = layout;
    }
}
