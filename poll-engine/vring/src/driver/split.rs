//! The driver side of a split ring (virtio 1.3, 2.7).

use alloc::collections::VecDeque;
use alloc::vec;
use alloc::vec::Vec;
use core::mem;
use core::sync::atomic::{Ordering, fence};

use super::{Buffer, Negotiated, flags, writable};
use crate::layout::{
    AVAIL_F_NO_INTERRUPT, DESC_F_INDIRECT, DESC_SIZE, Desc, SplitLayout, USED_F_NO_NOTIFY, need_event,
};

/// With `IN_ORDER`: what is in flight.
#[derive(Debug)]
struct InOrder {
    /// Heads with the bytes that the device may write, oldest first.
    requests: VecDeque<(u16, u32)>,
    /// A used entry that stands for all requests up to its own.
    batch: Option<(u16, u32)>,
    /// The next descriptor: 2.7.9 wants them used round and round.
    next: u16,
}

/// The driver side of a running split ring.
#[derive(Debug)]
pub struct SplitDriver {
    layout: SplitLayout,
    event_idx: bool,
    /// Free descriptors, taken and returned last first so that few cache lines stay warm.
    free: Vec<u16>,
    /// How many descriptors each chain took, by head; and what follows each, so that the table is only written.
    taken: Vec<u16>,
    next: Vec<u16>,
    in_order: Option<InOrder>,
    next_avail: u16,
    published: u16,
    next_used: u16,
    seen_used: u16,
    interrupts: bool,
}

impl SplitDriver {
    /// Starts the driver side; the available ring begins at `base`, the used ring where the device has left it.
    pub fn new(layout: SplitLayout, base: u16, negotiated: Negotiated) -> SplitDriver {
        let (size, used) = (layout.size(), layout.used_idx());
        let in_order = || InOrder { requests: VecDeque::with_capacity(size.into()), batch: None, next: 0 };
        let mut ring = SplitDriver {
            layout,
            event_idx: negotiated.event_idx,
            free: (0..size).rev().collect(),
            taken: vec![0; usize::from(size)],
            next: vec![0; usize::from(size)],
            in_order: negotiated.in_order.then(in_order),
            next_avail: base,
            published: base,
            next_used: used,
            seen_used: used,
            interrupts: true,
        };
        // Memory of a ring that has run before says something else.
        ring.set_interrupts(true);
        ring
    }

    /// The ring in memory, for tests that break its rules.
    pub fn layout(&self) -> &SplitLayout {
        &self.layout
    }

    /// Descriptors not in use.
    pub fn free(&self) -> usize {
        self.free.len()
    }

    /// Takes the next free descriptor: any, or with `IN_ORDER` the one after the last.
    #[inline]
    fn next_free(&mut self) -> Option<u16> {
        let any = self.free.pop()?;
        let Some(in_order) = &mut self.in_order else { return Some(any) };
        // 2.7.9: each follows the one before, and the first the last. As many are free as the list says.
        let next = in_order.next;
        in_order.next = (next + 1) & (self.layout.size() - 1);
        Some(next)
    }

    /// As [`DriverRing::add`](super::DriverRing::add).
    #[inline(always)] // the beginning of every request
    pub fn add(&mut self, buffers: &[Buffer]) -> Option<u16> {
        if buffers.is_empty() || buffers.len() > self.free.len() {
            return None;
        }
        let head = self.next_free()?;
        let mut index = head;
        for (i, b) in buffers.iter().enumerate() {
            let more = i + 1 < buffers.len();
            let next = if more { self.next_free()? } else { 0 };
            self.layout.set_desc(index, Desc { addr: b.addr, len: b.len, flags: flags(b, more), next });
            self.next[usize::from(index)] = next;
            index = next;
        }
        self.taken[usize::from(head)] = buffers.len() as u16;
        self.show(head, buffers);
        Some(head)
    }

    /// As [`DriverRing::add_indirect`](super::DriverRing::add_indirect).
    #[inline]
    pub fn add_indirect(
        &mut self,
        table: u64,
        buffers: &[Buffer],
        mut write: impl FnMut(usize, [u8; 16]),
    ) -> Option<u16> {
        let count = u16::try_from(buffers.len()).ok().filter(|&n| n > 0)?;
        let head = self.next_free()?;
        for (i, b) in buffers.iter().enumerate() {
            let flags = flags(b, i + 1 < buffers.len());
            write(i, Desc { addr: b.addr, len: b.len, flags, next: i as u16 + 1 }.to_bytes());
        }
        let len = DESC_SIZE * u32::from(count);
        self.layout.set_desc(head, Desc { addr: table, len, flags: DESC_F_INDIRECT, next: 0 });
        self.taken[usize::from(head)] = 1;
        self.show(head, buffers);
        Some(head)
    }

    #[inline]
    fn show(&mut self, head: u16, buffers: &[Buffer]) {
        if let Some(in_order) = &mut self.in_order {
            in_order.requests.push_back((head, writable(buffers)));
        }
        self.make_available(head);
    }

    /// As [`DriverRing::make_available`](super::DriverRing::make_available).
    #[inline]
    pub fn make_available(&mut self, head: u16) {
        self.layout.set_avail_ring(self.next_avail, head);
        self.next_avail = self.next_avail.wrapping_add(1);
    }

    /// As [`DriverRing::publish`](super::DriverRing::publish).
    #[inline]
    pub fn publish(&mut self) -> bool {
        if self.published == self.next_avail {
            return false;
        }
        let old = mem::replace(&mut self.published, self.next_avail);
        self.layout.set_avail_idx(self.next_avail);
        fence(Ordering::SeqCst);
        if self.event_idx {
            need_event(self.layout.avail_event(), self.next_avail, old)
        } else {
            self.layout.used_flags() & USED_F_NO_NOTIFY == 0
        }
    }

    /// As [`DriverRing::finished`](super::DriverRing::finished).
    #[inline]
    pub fn finished(&mut self) -> u16 {
        if self.seen_used == self.next_used {
            self.seen_used = self.layout.used_idx();
        }
        self.seen_used.wrapping_sub(self.next_used)
    }

    /// The next finished request. With `IN_ORDER` one entry may stand for several (2.7.9).
    #[inline]
    fn next_finished(&mut self) -> (u16, u32) {
        let batch = self.in_order.as_mut().and_then(|o| o.batch.take());
        let last = batch.unwrap_or_else(|| {
            let (head, len) = self.layout.used_ring(self.next_used);
            (head as u16, len)
        });
        let Some(in_order) = &mut self.in_order else { return last };
        match in_order.requests.pop_front() {
            Some((head, writable)) if head != last.0 => {
                // "assumed to have been used (read or written) by the device completely"
                in_order.batch = Some(last);
                (head, writable)
            }
            _ => last,
        }
    }

    /// As [`DriverRing::collect`](super::DriverRing::collect).
    #[inline(always)] // the end of every request
    pub fn collect(&mut self) -> Option<(u16, u32)> {
        if self.finished() == 0 {
            return None;
        }
        let (head, len) = self.next_finished();
        self.next_used = self.next_used.wrapping_add(1);
        if self.interrupts && self.event_idx {
            self.layout.set_used_event(self.next_used);
        }
        let count = self.taken.get_mut(usize::from(head)).map_or(0, mem::take);
        let first = self.free.len();
        let mut index = head;
        for _ in 0..count {
            self.free.push(index);
            self.layout.prefetch_desc_write(index);
            index = self.next[usize::from(index)];
        }
        self.free[first..].reverse();
        Some((head, len))
    }

    /// As [`DriverRing::set_interrupts`](super::DriverRing::set_interrupts).
    pub fn set_interrupts(&mut self, on: bool) -> bool {
        self.interrupts = on;
        if self.event_idx {
            // As far behind as numbers go is what the device passes last.
            self.layout.set_used_event(if on { self.next_used } else { self.next_used.wrapping_sub(1) });
        } else {
            self.layout.set_avail_flags(if on { 0 } else { AVAIL_F_NO_INTERRUPT });
        }
        fence(Ordering::SeqCst);
        on && self.layout.used_idx() != self.next_used
    }
}
