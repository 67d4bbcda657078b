//! The packed virtqueue, device side (virtio 1.3, 2.8).
//!
//! ```text
//!        written, not shown      in flight           known to be available
//!   ... ┌───────────────────┬────────────────────┬───────────────────┬ ...
//!       │ first ──►         │ next_used          │ next_avail ──►    │
//!   ... └───────────────────┴────────────────────┴───────────────────┴ ...
//!   used descriptors are written in the order of completion, over those of chains that may still be in flight: these
//!   were read whole when they were taken
//! ```
//!
//! A used descriptor is one 64-bit write. Those of a round are all written but the first; the driver looks no further
//! than that one, so writing it last shows them together ([`publish`](PackedRing::publish)).

use std::sync::atomic::{Ordering, fence};

use vring::packed::{DESC_F_AVAIL, DESC_F_USED, EVENT_SIZE, Event, PackedDesc, Position, Rest};

use super::chain::Chain;
use super::inflight::packed::PackedInflight;
use super::inflight::{Kept, QueueRegion};
use super::layout::{DESC_F_INDIRECT, DESC_F_NEXT, DESC_F_WRITE, DESC_SIZE, Desc, PackedLayout};
use super::table::{MIN_CHAIN_LIMIT, Table};
use super::{Ahead, MAX_SURVEYED, RingConfig, RingError, Token, Used, survey_desc};
use crate::fault_point::pass;
use crate::memory::iotlb::Miss;
use crate::memory::log::{LoggedPart, QueueLog};
use crate::memory::map::{Locator, MemoryMap};
use crate::memory::slice::RawSlice;

/// How many chains are looked ahead for: as many as a queue takes in a round.
const LOOK_AHEAD: u16 = 16;

/// Of these flags the one or the other says that a descriptor is available, by turns.
const BOTH: u16 = DESC_F_AVAIL | DESC_F_USED;

/// The running device side of a packed ring.
#[derive(Debug)]
#[allow(clippy::struct_excessive_bools)] // each of its own meaning
pub struct PackedRing {
    layout: PackedLayout,
    event_idx: bool,
    indirect: bool,
    in_order: bool,
    /// The next descriptor to take.
    next_avail: Position,
    /// Chains known to be available from there on.
    ready: u16,
    /// Where the chains that were found available together have their first buffers, how many chains and descriptors.
    heads: [u64; LOOK_AHEAD as usize],
    found: u16,
    found_descs: u16,
    /// Where the next used descriptor belongs.
    next_used: Position,
    /// Descriptors from `next_used` to `next_avail`: those of chains taken and not completed.
    held: u16,
    /// Chains taken and not completed. Not of the size of `held`: two that are written one by one and read together would
    /// have to be in the cache first, behind all that was written before.
    in_flight: u32,
    /// Where the used descriptors end that the driver has been shown.
    shown: Position,
    /// The used descriptor that will show all that were written after it.
    first: Option<(u16, Rest)>,
    /// With `IN_ORDER`: the used descriptor that stands for the chains completed last (2.8.9).
    batch: Option<Batch>,
    /// Descriptors used since the last publish, and since the driver was last signalled or found not to want it.
    unpublished: u32,
    unsignalled: u32,
    notify: bool,
    /// While the front end wants to know of writes to the ring.
    log: Option<Logged>,
    pub(super) kept: Kept<PackedInflight>,
    /// The driver is owed an interrupt, whatever it says it wants: an earlier one may have been lost.
    overdue: bool,
}

/// The parts of the ring that the device writes, in a dirty log.
#[derive(Debug)]
struct Logged {
    descs: LoggedPart,
    event: LoggedPart,
}

/// Chains of which only the last is told.
#[derive(Clone, Copy, Debug)]
struct Batch {
    at: Position,
    id: u16,
    written: u32,
    /// The last has been used completely, so that another may follow.
    open: bool,
}

impl PackedRing {
    pub(super) fn new(layout: PackedLayout, config: &RingConfig) -> Result<PackedRing, RingError> {
        let next_avail = Position::from_bits(config.base as u16);
        // Some front ends know the lower half only: DPDK's virtio-user, and those on the `vhost` crate. What is used
        // has then caught up with what is available, as it has whenever a queue has stopped.
        let next_used = match (config.base >> 16) as u16 {
            0 => next_avail,
            used => Position::from_bits(used),
        };
        let size = layout.size();
        let bad = RingError::BadBase(config.base);
        if next_avail.index >= size || next_used.index >= size {
            return Err(bad);
        }
        let held = next_avail.since(next_used, size);
        if held > u32::from(size) {
            return Err(bad);
        }
        let mut ring = PackedRing {
            layout,
            event_idx: config.event_idx,
            indirect: config.indirect,
            in_order: config.in_order,
            next_avail,
            ready: 0,
            heads: [0; LOOK_AHEAD as usize],
            found: 0,
            found_descs: 0,
            next_used,
            held: held as u16,
            in_flight: 0,
            shown: next_used,
            first: None,
            batch: None,
            unpublished: 0,
            unsignalled: 0,
            notify: true,
            log: None,
            kept: Kept::default(),
            overdue: false,
        };
        ring.disable_notification();
        Ok(ring)
    }

    /// As [`Ring::recover`](super::Ring::recover); true when the region says where the ring goes on.
    pub(super) fn recover(&mut self, region: QueueRegion) -> Result<bool, RingError> {
        let size = self.size();
        let flags_at = |index| self.layout.rest(index).flags();
        let (inflight, left) = PackedInflight::recover(region, size, self.next_used, flags_at)?;
        self.kept.record = Some(inflight);
        let Some(left) = left else { return Ok(false) };
        (self.next_used, self.shown, self.next_avail) = (left.used, left.used, left.avail);
        self.held = left.avail.since(left.used, size) as u16;
        self.ready = 0;
        // All but the first of the used descriptors that the last back end had not shown yet are written: the driver must
        // not come upon them behind one of ours.
        let mut at = left.used;
        for _ in 0..self.held {
            if at.is_used(self.layout.rest(at.index).flags()) {
                self.layout.set_rest(at.index, Rest::taken(at));
                pass("recover-erased");
            }
            at = at.advance(1, size);
        }
        fence(Ordering::Release);
        self.kept.again = left.chains;
        Ok(true)
    }

    pub(super) fn return_resubmits(&mut self) -> bool {
        let Some(inflight) = &mut self.kept.record else { return self.kept.again.is_empty() };
        // Used descriptors may have been written over them. Their driver looks at none of these places before one is
        // used, so the record's copies go there, in the order in which they were taken.
        let (size, mut at) = (self.layout.size(), self.next_used);
        for &entry in self.kept.again.iter().rev() {
            for (addr, rest) in inflight.chain(entry).1 {
                let flags = rest.flags() & !BOTH | at.available();
                let desc = PackedDesc { addr, len: rest.len(), id: rest.id(), flags };
                self.layout.set_desc(at.index, desc);
                if let Some(log) = &self.log {
                    log.descs.wrote(u64::from(DESC_SIZE) * u64::from(at.index), DESC_SIZE.into());
                }
                at = at.next(size);
                pass("return-written");
            }
        }
        for entry in self.kept.again.drain(..) {
            inflight.untaken(entry);
        }
        (self.next_avail, self.held, self.ready) = (self.next_used, 0, 0);
        true
    }

    #[inline]
    pub(super) fn size(&self) -> u16 {
        self.layout.size()
    }

    pub(super) fn base(&self) -> u32 {
        u32::from(self.next_avail.bits()) | u32::from(self.next_used.bits()) << 16
    }

    #[inline]
    pub(super) fn in_flight(&self) -> u16 {
        self.in_flight as u16
    }

    #[inline]
    pub(super) fn available(&mut self) -> u16 {
        if self.kept.resubmits() > 0 {
            return self.kept.resubmits();
        }
        if self.ready > 0 {
            return self.ready;
        }
        self.look();
        self.ready
    }

    /// Looks which of the next descriptors are available.
    #[inline(always)] // with nothing to do it is all there is
    fn look(&mut self) {
        let mut at = self.layout.cursor(self.next_avail.index);
        let mut available = self.next_avail.available();
        let mut flags = at.rest().flags();
        if flags & BOTH != available {
            return;
        }
        let size = self.size();
        let (mut found, mut left) = (0, size);
        for head in &mut self.heads {
            *head = at.addr();
            found += 1;
            // 2.8.6: a list is available as a whole. One that is too long ends the look; `take` finds it.
            loop {
                if at.step() {
                    available ^= BOTH;
                }
                left -= 1;
                if left == 0 || flags & DESC_F_NEXT == 0 {
                    break;
                }
                flags = at.rest().flags();
            }
            if left == 0 {
                break;
            }
            flags = at.rest().flags();
            if flags & BOTH != available {
                break;
            }
        }
        (self.ready, self.found, self.found_descs) = (found, found, size - left);
    }

    #[inline]
    pub(super) fn prefetch(&mut self, count: u16, ahead: Ahead, map: &MemoryMap) {
        // One chain has nothing to overlap with: a prefetch would only add to its latency.
        if count < 2 || self.kept.resubmits() > 0 {
            return;
        }
        // Used descriptors will be written over these, once the first of them is complete; the driver waits for that. In
        // order, one stands for all.
        self.layout.prefetch_write(self.next_used.index, if self.in_order { 1 } else { self.found_descs });
        if ahead == Ahead::RING {
            return;
        }
        let from = usize::from(self.found - self.ready);
        let heads = self.heads.get(from..usize::from(self.found)).unwrap_or_default();
        for &addr in heads.iter().take(count.into()) {
            ahead.fetch(map, addr, ahead.bytes);
        }
    }

    #[inline]
    pub(super) fn take(&mut self, map: &MemoryMap, chain: &mut Chain) -> Result<Token, RingError> {
        chain.clear();
        if let Some(&entry) = self.kept.again.last() {
            return self.take_again(entry, map, chain);
        }
        debug_assert_ne!(self.ready, 0, "take without available");
        let (id, count, last) = match &self.kept.record {
            None => {
                let (id, count) = self.walk(map, chain, |_, _| Ok(()))?;
                (id, count, 0)
            }
            Some(inflight) => {
                let mut notes = inflight.notes();
                let (id, count) = self.walk(map, chain, |addr, rest| notes.note(addr, rest))?;
                (id, count, notes.last())
            }
        };
        // Commit: from here on the chain is ours.
        self.next_avail = self.next_avail.advance(count, self.size());
        self.ready -= 1;
        self.held += count;
        self.in_flight += 1;
        let token = Token::new(id, count, chain.writable_len());
        Ok(match &mut self.kept.record {
            Some(inflight) => token.recorded(inflight.taken(count, last)),
            None => token,
        })
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
        if !self.kept.again.is_empty() || self.kept.record.is_some() {
            return 0;
        }
        let size = self.size();
        let (mut next, mut taken) = (self.next_avail, 0u16);
        // What each chain changes is kept in registers until all are there.
        let room = size.saturating_sub(self.held).min(self.ready);
        for (slice, used) in slices.iter_mut().zip(used).take(room.into()) {
            let (addr, rest) = self.layout.cursor(next.index).pair();
            if rest.flags() & (DESC_F_INDIRECT | DESC_F_NEXT) != 0 {
                break;
            }
            let writable = rest.flags() & DESC_F_WRITE != 0;
            let Some(found) = at.whole(addr, rest.len(), writable) else { break };
            found.prefetch_lines(ahead.bytes, ahead.write);
            (*slice, *used) = (found, Used::new(rest.id(), 1, if writable { rest.len() } else { 0 }));
            next = next.next(size);
            taken += 1;
        }
        self.next_avail = next;
        self.ready -= taken;
        self.held += taken;
        self.in_flight += u32::from(taken);
        taken.into()
    }

    #[inline]
    pub(super) fn untake(&mut self, used: Used) {
        assert!(self.in_flight > 0, "untook more chains than were taken");
        self.in_flight -= 1;
        if used.again() {
            // It stays recorded until it is completed.
            self.kept.again.push(used.entry());
            return;
        }
        self.next_avail = self.next_avail.retreat(used.len(), self.size());
        self.held -= used.len();
        // What was seen behind it is looked for again.
        self.ready = 0;
        if let Some(inflight) = &mut self.kept.record {
            inflight.untaken(used.entry());
        }
    }

    /// Takes a chain that an earlier back end had taken, as the record has it: in the ring it may be written over.
    #[cold]
    fn take_again(&mut self, entry: u16, map: &MemoryMap, chain: &mut Chain) -> Result<Token, RingError> {
        let Some(inflight) = &self.kept.record else { unreachable!("chains are taken again from a record") };
        let (count, descs) = inflight.chain(entry);
        let mut id = 0;
        for (addr, rest) in descs {
            if rest.flags() & DESC_F_INDIRECT == 0 {
                let mut chain = chain.fill(map);
                chain.push(addr, rest.len(), rest.flags() & DESC_F_WRITE != 0)?;
                chain.finish()?;
            } else if count == 1 {
                self.walk_table(addr, rest, map, chain)?;
            } else {
                return Err(RingError::BadIndirect);
            }
            id = rest.id();
        }
        self.kept.again.pop();
        self.in_flight += 1;
        pass("recover-taken");
        Ok(Token::new(id, count, chain.writable_len()).recorded(entry).again())
    }

    /// Looks for what the available chains name and `map` does not translate, until `found` returns false. Nothing is
    /// taken, and nothing is believed: `take` reads and checks all of it again.
    #[cold]
    pub(super) fn survey(&self, map: &MemoryMap, found: &mut impl FnMut(Miss) -> bool) {
        let decode = |pair| {
            let PackedDesc { addr, len, flags, .. } = PackedDesc::from_pair(pair);
            Desc { addr, len, flags, next: 0 }
        };
        let mut at = self.next_avail;
        let mut left = MAX_SURVEYED;
        // Descriptor by descriptor, which all say whether they are available; no more than there are.
        for _ in 0..self.size() - self.held {
            let PackedDesc { addr, len, flags, .. } = self.layout.desc(at.index);
            let desc = Desc { addr, len, flags, next: 0 };
            left = left.saturating_sub(1);
            if !at.is_available(flags) || left == 0 || !survey_desc(map, &desc, decode, &mut left, found) {
                return;
            }
            at = at.advance(1, self.size());
        }
    }

    /// The next list: its buffer ID, which its last descriptor has (2.8.6), and how long it is in the ring. Each of its
    /// descriptors there is noted once it is known to be good.
    #[inline(always)] // twice in `take`
    fn walk(
        &self,
        map: &MemoryMap,
        chain: &mut Chain,
        mut note: impl FnMut(u64, Rest) -> Result<(), RingError>,
    ) -> Result<(u16, u16), RingError> {
        let room = self.size() - self.held;
        let mut at = self.layout.cursor(self.next_avail.index);
        let (mut addr, mut rest) = at.pair();
        if rest.flags() & DESC_F_INDIRECT != 0 {
            if room == 0 {
                return Err(RingError::TooManyInFlight);
            }
            self.walk_table(addr, rest, map, chain)?;
            note(addr, rest)?;
            return Ok((rest.id(), 1));
        }
        let mut filling = chain.fill(map);
        let mut left = room;
        while left > 0 {
            left -= 1;
            // 2.8.19: no "direct descriptors with DESC_F_INDIRECT set in a scatter-gather list linked by NEXT".
            if rest.flags() & DESC_F_INDIRECT != 0 {
                return Err(RingError::BadIndirect);
            }
            filling.push(addr, rest.len(), rest.flags() & DESC_F_WRITE != 0)?;
            note(addr, rest)?;
            if rest.flags() & DESC_F_NEXT == 0 {
                filling.finish()?;
                return Ok((rest.id(), room - left));
            }
            at.step();
            (addr, rest) = at.pair();
        }
        Err(if self.held == 0 { RingError::TooLong(self.size().into()) } else { RingError::TooManyInFlight })
    }

    /// 2.8.7: all of the table is the list; of its descriptors' flags only `WRITE` counts.
    #[inline(never)] // the list in the ring is in registers
    fn walk_table(&self, addr: u64, rest: Rest, map: &MemoryMap, chain: &mut Chain) -> Result<(), RingError> {
        // 2.8.19, as in `walk`.
        if !self.indirect || rest.flags() & DESC_F_NEXT != 0 {
            return Err(RingError::BadIndirect);
        }
        let mut chain = chain.fill(map);
        let table = Table::new(map, addr, rest.len())?;
        let limit = u32::from(self.size()).max(MIN_CHAIN_LIMIT);
        if table.entries() > limit {
            return Err(RingError::TooLong(limit));
        }
        for index in 0..table.entries() as u16 {
            let desc = PackedDesc::from_pair(table.read(index)?);
            chain.push(desc.addr, desc.len, desc.flags & DESC_F_WRITE != 0)?;
        }
        chain.finish()
    }

    #[inline(always)] // the end of every request
    pub(super) fn complete(&mut self, used: Used, written: u32) {
        assert!(self.in_flight > 0, "completed more chains than were taken");
        let at = self.next_used;
        self.next_used = at.advance(used.len(), self.size());
        self.held -= used.len();
        self.in_flight -= 1;
        self.unpublished += u32::from(used.len());
        if let Some(inflight) = &mut self.kept.record {
            inflight.completed(used.entry());
        }
        if self.in_order {
            self.join(at, used, written);
        } else {
            self.write(at, used.id(), written);
        }
    }

    /// 2.8.9: one used descriptor, where the first chain was, with the ID of the last; those before it count as used
    /// completely, so one that was not ends the batch.
    #[inline]
    fn join(&mut self, at: Position, used: Used, written: u32) {
        let open = written == used.writable();
        let at = match self.batch.take() {
            Some(batch) if batch.open => batch.at,
            Some(batch) => {
                self.write(batch.at, batch.id, batch.written);
                at
            }
            None => at,
        };
        self.batch = Some(Batch { at, id: used.id(), written, open });
    }

    #[inline]
    fn write(&mut self, at: Position, id: u16, written: u32) {
        let rest = Rest::used(at, id, written);
        if self.first.is_none() {
            self.first = Some((at.index, rest));
        } else {
            self.layout.set_rest(at.index, rest);
        }
    }

    #[inline]
    pub(super) fn publish(&mut self) -> bool {
        if let Some(batch) = self.batch.take() {
            self.write(batch.at, batch.id, batch.written);
        }
        let Some((index, rest)) = self.first.take() else { return false };
        if let Some(log) = &self.log {
            self.log_used(log);
        }
        pass("publish-begins");
        if let Some(inflight) = &mut self.kept.record {
            inflight.showing(self.next_used);
        }
        self.layout.show(index, rest);
        if let Some(inflight) = &mut self.kept.record {
            inflight.shown();
        }
        if let Some(log) = &self.log {
            log.descs.wrote(u64::from(DESC_SIZE) * u64::from(index), DESC_SIZE.into());
        }
        self.shown = self.next_used;
        self.unsignalled = self.unsignalled.saturating_add(std::mem::take(&mut self.unpublished));
        true
    }

    /// Logs the used descriptors that are about to be shown.
    #[cold]
    fn log_used(&self, log: &Logged) {
        let (size, first) = (u64::from(self.size()), u64::from(self.shown.index));
        let count = u64::from(self.unpublished);
        let before_wrap = count.min(size - first);
        let desc = u64::from(DESC_SIZE);
        log.descs.wrote(desc * first, desc * before_wrap);
        log.descs.wrote(0, desc * (count - before_wrap).min(first));
    }

    /// The used ring that the front end gives an address of is the device area; the device writes descriptors, too.
    pub(super) fn set_log(&mut self, log: Option<&QueueLog>) {
        self.log = log.and_then(|log| {
            let descs = LoggedPart { log: log.log.clone(), guest_addr: self.layout.guest_addr() };
            Some(Logged { descs, event: log.used_part()? })
        });
        if let Some(log) = &self.log {
            // What was written before anybody listened: when the ring was started.
            log.event.wrote(0, EVENT_SIZE);
        }
    }

    fn set_event(&self, event: Event) {
        self.layout.set_device_event(event);
        if let Some(log) = &self.log {
            log.event.wrote(0, EVENT_SIZE);
        }
    }

    #[inline]
    pub(super) fn wants_interrupt(&mut self) -> Option<bool> {
        if self.unsignalled == 0 && !self.overdue {
            return None;
        }
        // The used descriptors must be visible before we look at what the driver wants, or both sides miss it (2.8.22).
        fence(Ordering::SeqCst);
        let count = std::mem::take(&mut self.unsignalled);
        if std::mem::take(&mut self.overdue) {
            return Some(true);
        }
        Some(self.layout.driver_event().wants(self.shown, count, self.size(), self.event_idx))
    }

    pub(super) fn owe_interrupt(&mut self) {
        self.overdue = true;
    }

    pub(super) fn enable_notification(&mut self) -> bool {
        let event = if self.event_idx { Event::Desc(self.next_avail) } else { Event::Enable };
        self.set_event(event);
        self.notify = true;
        // 2.8.21.3.1: look again after asking, or a chain made available in between is never heard of.
        fence(Ordering::SeqCst);
        let flags = self.layout.rest(self.next_avail.index).flags();
        self.next_avail.is_available(flags) || self.kept.resubmits() > 0
    }

    #[inline]
    pub(super) fn disable_notification(&mut self) {
        if self.notify {
            self.set_event(Event::Disable);
            self.notify = false;
        }
    }

    pub(super) fn relocate(&mut self, layout: PackedLayout) {
        self.layout = layout;
    }
}
