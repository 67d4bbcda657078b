//! The driver side of a packed ring (virtio 1.3, 2.8).
//!
//! What is added is written at once, but for the first descriptor's flags: the device looks no further than a
//! descriptor that is not available, so these alone show it all.

use alloc::vec;
use alloc::vec::Vec;
use core::sync::atomic::{Ordering, fence};

use super::{Buffer, Negotiated, flags, writable};
use crate::layout::{DESC_F_INDIRECT, DESC_SIZE};
use crate::packed::{Event, PackedDesc, PackedLayout, Position, Rest};

/// A request in flight, by its buffer ID.
#[derive(Clone, Copy, Debug, Default)]
struct Taken {
    /// Descriptors of the ring.
    descs: u16,
    /// Bytes that the device may write.
    writable: u32,
}

/// The driver side of a running packed ring.
#[derive(Debug)]
pub struct PackedDriver {
    layout: PackedLayout,
    negotiated: Negotiated,
    free: u16,
    /// Buffer IDs not in use, taken and returned last first so that few cache lines stay warm. With `IN_ORDER` a
    /// request's ID is the index of its first descriptor, which nothing else in flight can have.
    ids: Vec<u16>,
    taken: Vec<Taken>,
    next_avail: Position,
    next_used: Position,
    /// The first descriptor that is added and not shown.
    hidden: Option<(u16, Rest)>,
    /// Descriptors added and not shown.
    added: u16,
    /// Requests found finished, by buffer ID and bytes written; how many of them are collected, and how many
    /// descriptors they have.
    found: Vec<(u16, u32)>,
    collected: usize,
    found_descs: u16,
    interrupts: bool,
}

impl PackedDriver {
    /// Starts the driver side at `base`: the lower half is the position of the next descriptor to make available, the
    /// upper one that of the next used descriptor.
    pub fn new(layout: PackedLayout, base: u32, negotiated: Negotiated) -> PackedDriver {
        let size = layout.size();
        let mut ring = PackedDriver {
            layout,
            negotiated,
            free: size,
            ids: (0..size).rev().collect(),
            taken: vec![Taken::default(); usize::from(size)],
            next_avail: Position::from_bits(base as u16),
            next_used: Position::from_bits((base >> 16) as u16),
            hidden: None,
            added: 0,
            found: Vec::with_capacity(size.into()),
            collected: 0,
            found_descs: 0,
            interrupts: true,
        };
        // Memory of a ring that has run before says something else.
        ring.set_interrupts(true);
        ring
    }

    /// The ring in memory, for tests that break its rules.
    pub fn layout(&self) -> &PackedLayout {
        &self.layout
    }

    /// Where the next descriptor goes.
    pub fn next_position(&self) -> Position {
        self.next_avail
    }

    /// Descriptors not in use.
    pub fn free(&self) -> usize {
        self.free.into()
    }

    /// As [`DriverRing::add`](super::DriverRing::add).
    #[inline(always)] // the beginning of every request
    pub fn add(&mut self, buffers: &[Buffer]) -> Option<u16> {
        if buffers.is_empty() || buffers.len() > usize::from(self.free) {
            return None;
        }
        let id = self.next_id()?;
        for (i, b) in buffers.iter().enumerate() {
            let flags = flags(b, i + 1 < buffers.len());
            self.put(PackedDesc { addr: b.addr, len: b.len, id, flags });
        }
        self.take(id, Taken { descs: buffers.len() as u16, writable: writable(buffers) });
        Some(id)
    }

    /// As [`DriverRing::add_indirect`](super::DriverRing::add_indirect).
    #[inline]
    pub fn add_indirect(
        &mut self,
        table: u64,
        buffers: &[Buffer],
        mut write: impl FnMut(usize, [u8; 16]),
    ) -> Option<u16> {
        let count = u16::try_from(buffers.len()).ok().filter(|&n| n > 0 && self.free > 0)?;
        let id = self.next_id()?;
        for (i, b) in buffers.iter().enumerate() {
            // 2.8.19: no flag but WRITE within an indirect table; the ID is reserved.
            let desc = PackedDesc { addr: b.addr, len: b.len, id: 0, flags: flags(b, false) };
            write(i, desc.to_bytes());
        }
        self.put(PackedDesc { addr: table, len: DESC_SIZE * u32::from(count), id, flags: DESC_F_INDIRECT });
        self.take(id, Taken { descs: 1, writable: writable(buffers) });
        Some(id)
    }

    #[inline]
    fn next_id(&mut self) -> Option<u16> {
        if self.negotiated.in_order { Some(self.next_avail.index) } else { self.ids.pop() }
    }

    /// Writes the next descriptor; it is available once what was added before it is.
    #[inline(always)]
    fn put(&mut self, desc: PackedDesc) {
        let at = self.next_avail;
        let desc = PackedDesc { flags: desc.flags | at.available(), ..desc };
        if self.hidden.is_none() {
            self.hidden = Some((at.index, self.layout.prepare(at.index, desc)));
        } else {
            self.layout.set_desc(at.index, desc);
        }
        self.next_avail = at.next(self.layout.size());
    }

    #[inline]
    fn take(&mut self, id: u16, taken: Taken) {
        self.free -= taken.descs;
        self.added += taken.descs;
        self.taken[usize::from(id)] = taken;
    }

    /// As [`DriverRing::publish`](super::DriverRing::publish).
    #[inline]
    pub fn publish(&mut self) -> bool {
        let Some((index, rest)) = self.hidden.take() else { return false };
        let count = core::mem::take(&mut self.added);
        self.layout.show(index, rest);
        // 2.8.21.2: the flags must be exposed before we look whether notifications are suppressed.
        fence(Ordering::SeqCst);
        self.layout.device_event().wants(
            self.next_avail,
            count.into(),
            self.layout.size(),
            self.negotiated.event_idx,
        )
    }

    /// The next used descriptor, if there is one.
    #[inline]
    fn used(&self, at: Position) -> Option<Rest> {
        let rest = self.layout.rest(at.index);
        at.is_used(rest.flags()).then_some(rest)
    }

    /// As [`DriverRing::finished`](super::DriverRing::finished).
    #[inline(always)] // every request passes through
    pub fn finished(&mut self) -> u16 {
        if self.collected == self.found.len() {
            self.look();
        }
        (self.found.len() - self.collected) as u16
    }

    /// Looks once for all that is finished, and fetches the descriptors to be written again: the device's CPU has them.
    #[inline]
    fn look(&mut self) {
        let size = self.layout.size();
        // Only what is in flight can be used; what lies beyond was used in the round before.
        let in_flight = size - self.free - self.added;
        if in_flight == 0 {
            return;
        }
        let first = self.next_used;
        let Some(mut rest) = self.used(first) else { return };
        self.found.clear();
        self.collected = 0;
        if !self.negotiated.in_order {
            // Each says where the next one is, so they would come one by one: as many as the last time.
            self.layout.prefetch_write(first.index, self.found_descs.min(in_flight));
        }
        let mut descs = 0;
        loop {
            let id = if self.negotiated.in_order { self.next_used.index } else { rest.id() };
            let taken = self.taken.get(usize::from(id)).copied().unwrap_or_default();
            let is_told = id == rest.id();
            // 2.8.9: "assumed to have been used (read or written) by the device completely".
            self.found.push((id, if is_told { rest.len() } else { taken.writable }));
            descs += taken.descs.max(1);
            self.next_used = self.next_used.advance(taken.descs, size);
            if descs >= in_flight {
                break;
            }
            if is_told {
                let Some(next) = self.used(self.next_used) else { break };
                rest = next;
            }
        }
        self.found_descs = descs;
        if self.negotiated.in_order {
            self.layout.prefetch_write(first.index, descs.min(in_flight));
        }
        if self.interrupts && self.negotiated.event_idx {
            self.layout.set_driver_event(Event::Desc(self.next_used));
        }
    }

    /// As [`DriverRing::collect`](super::DriverRing::collect).
    #[inline(always)] // the end of every request
    pub fn collect(&mut self) -> Option<(u16, u32)> {
        if self.finished() == 0 {
            return None;
        }
        let &(id, len) = self.found.get(self.collected)?;
        self.collected += 1;
        let descs = self.taken.get_mut(usize::from(id)).map_or(0, |t| core::mem::take(&mut t.descs));
        if descs > 0 {
            self.free += descs;
            if !self.negotiated.in_order {
                self.ids.push(id);
            }
        }
        Some((id, len))
    }

    /// As [`DriverRing::set_interrupts`](super::DriverRing::set_interrupts).
    pub fn set_interrupts(&mut self, on: bool) -> bool {
        self.interrupts = on;
        self.layout.set_driver_event(match on {
            false => Event::Disable,
            true if self.negotiated.event_idx => Event::Desc(self.next_used),
            true => Event::Enable,
        });
        // 2.8.22: look again after asking.
        fence(Ordering::SeqCst);
        on && self.finished() > 0
    }
}
