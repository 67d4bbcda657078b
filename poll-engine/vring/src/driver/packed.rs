//! The driver side of a packed ring (virtio 1.3, 2.8).
//!
//! What is added is written at once, but for the first descriptor's flags: the device looks no further than a
//! descriptor that is not available, so these alone show it all.

use alloc::collections::VecDeque;
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
    /// Buffer IDs not in use, taken and returned last first so that few cache lines stay warm.
    ids: Vec<u16>,
    taken: Vec<Taken>,
    next_avail: Position,
    next_used: Position,
    /// The first descriptor that is added and not shown.
    hidden: Option<(u16, Rest)>,
    /// Descriptors added and not shown.
    added: u32,
    /// Buffer IDs in the order in which they were added, with `IN_ORDER`.
    order: VecDeque<u16>,
    /// A used descriptor that stands for all requests up to its own, with `IN_ORDER`.
    batch: Option<Rest>,
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
            order: VecDeque::with_capacity(if negotiated.in_order { size.into() } else { 0 }),
            batch: None,
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
    #[inline]
    pub fn add(&mut self, buffers: &[Buffer]) -> Option<u16> {
        if buffers.is_empty() || buffers.len() > usize::from(self.free) {
            return None;
        }
        let id = self.ids.pop()?;
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
        let id = self.ids.pop()?;
        for (i, b) in buffers.iter().enumerate() {
            // 2.8.19: no flag but WRITE within an indirect table; the ID is reserved.
            let desc = PackedDesc { addr: b.addr, len: b.len, id: 0, flags: flags(b, false) };
            write(i, desc.to_bytes());
        }
        self.put(PackedDesc { addr: table, len: DESC_SIZE * u32::from(count), id, flags: DESC_F_INDIRECT });
        self.take(id, Taken { descs: 1, writable: writable(buffers) });
        Some(id)
    }

    /// Writes the next descriptor; it is available once what was added before it is.
    #[inline]
    fn put(&mut self, desc: PackedDesc) {
        let at = self.next_avail;
        let desc = PackedDesc { flags: desc.flags | at.available(), ..desc };
        if self.hidden.is_none() {
            self.hidden = Some((at.index, self.layout.prepare(at.index, desc)));
        } else {
            self.layout.set_desc(at.index, desc);
        }
        self.next_avail = at.advance(1, self.layout.size());
    }

    #[inline]
    fn take(&mut self, id: u16, taken: Taken) {
        self.free -= taken.descs;
        self.added += u32::from(taken.descs);
        self.taken[usize::from(id)] = taken;
        if self.negotiated.in_order {
            self.order.push_back(id);
        }
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
            count,
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
    #[inline]
    pub fn finished(&mut self) -> u16 {
        let size = self.layout.size();
        let mut at = self.next_used;
        let mut left = u32::from(size - self.free) - self.added;
        let mut count = 0;
        // All requests before the next used descriptor are its batch's, with IN_ORDER.
        let mut order = self.order.iter();
        let mut batch = self.batch;
        while left > 0 {
            let Some(rest) = batch.take().or_else(|| self.used(at)) else { break };
            let last = rest.id();
            loop {
                let id = if self.negotiated.in_order { order.next().copied().unwrap_or(last) } else { last };
                let descs = self.taken.get(usize::from(id)).map_or(0, |t| t.descs);
                count += 1;
                at = at.advance(descs, size);
                left = left.saturating_sub(u32::from(descs.max(1)));
                if id == last || left == 0 {
                    break;
                }
            }
        }
        count
    }

    /// As [`DriverRing::collect`](super::DriverRing::collect).
    #[inline]
    pub fn collect(&mut self) -> Option<(u16, u32)> {
        let size = self.layout.size();
        // Only what is in flight can be used; what lies beyond was used in the round before.
        if u32::from(size - self.free) == self.added {
            return None;
        }
        let rest = match self.batch {
            Some(rest) => rest,
            None => self.used(self.next_used)?,
        };
        let mut id = rest.id();
        let mut len = rest.len();
        if self.negotiated.in_order {
            id = self.order.pop_front().unwrap_or(id);
            let over = id == rest.id();
            self.batch = (!over).then_some(rest);
            if !over {
                // 2.8.9: "assumed to have been used (read or written) by the device completely".
                len = self.taken.get(usize::from(id)).map_or(0, |t| t.writable);
            }
        }
        let descs = self.taken.get_mut(usize::from(id)).map_or(0, |t| core::mem::take(&mut t.descs));
        self.next_used = self.next_used.advance(descs, size);
        if descs > 0 {
            self.free += descs;
            self.ids.push(id);
        }
        if self.interrupts && self.negotiated.event_idx {
            self.layout.set_driver_event(Event::Desc(self.next_used));
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
