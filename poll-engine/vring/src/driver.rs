//! The driver side of a split ring: what tests, benchmarks and guests of our own drive a device with. It is as honest
//! as a good driver and does not defend itself against a broken device.

use alloc::vec;
use alloc::vec::Vec;
use core::mem;
use core::sync::atomic::{Ordering, fence};

use crate::layout::{
    AVAIL_F_NO_INTERRUPT, DESC_F_INDIRECT, DESC_F_NEXT, DESC_F_WRITE, DESC_SIZE, Desc, SplitLayout,
    USED_F_NO_NOTIFY, need_event,
};

/// One buffer of a request.
#[derive(Clone, Copy, Debug)]
pub struct Buffer {
    /// Guest-physical address.
    pub addr: u64,
    /// Bytes.
    pub len: u32,
    /// The device writes it; otherwise it reads it.
    pub writable: bool,
}

/// The driver side of a running split ring.
#[derive(Debug)]
pub struct DriverRing {
    layout: SplitLayout,
    event_idx: bool,
    /// Free descriptors, taken and returned last first so that few cache lines stay warm.
    free: Vec<u16>,
    /// How many descriptors each chain took, by head; and what follows each, so that the table is only written.
    taken: Vec<u16>,
    next: Vec<u16>,
    next_avail: u16,
    published: u16,
    next_used: u16,
    seen_used: u16,
    interrupts: bool,
}

impl DriverRing {
    /// Starts the driver side; the available ring begins at `base`, the used ring where the device has left it.
    pub fn new(layout: SplitLayout, base: u16, event_idx: bool) -> DriverRing {
        let (size, used) = (layout.size(), layout.used_idx());
        let mut ring = DriverRing {
            layout,
            event_idx,
            free: (0..size).rev().collect(),
            taken: vec![0; usize::from(size)],
            next: vec![0; usize::from(size)],
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

    /// Adds a request in descriptors of the ring. `None` when there is no room (or nothing to add).
    #[inline(always)] // the beginning of every request
    pub fn add(&mut self, buffers: &[Buffer]) -> Option<u16> {
        if buffers.is_empty() || buffers.len() > self.free.len() {
            return None;
        }
        let head = *self.free.last()?;
        let mut index = head;
        for (i, b) in buffers.iter().enumerate() {
            self.free.pop();
            let last = i + 1 == buffers.len();
            let next = if last { 0 } else { *self.free.last()? };
            let flags = if b.writable { DESC_F_WRITE } else { 0 } | if last { 0 } else { DESC_F_NEXT };
            self.layout.set_desc(index, Desc { addr: b.addr, len: b.len, flags, next });
            self.next[usize::from(index)] = next;
            index = next;
        }
        self.taken[usize::from(head)] = buffers.len() as u16;
        self.make_available(head);
        Some(head)
    }

    /// Adds a request as an indirect table at guest-physical `table`: `write(i, bytes)` is called for each of its
    /// descriptors, which belong 16 bytes apart. `None`, with nothing written, when there is no room (or nothing to
    /// add, or more than a table can hold).
    pub fn add_indirect(
        &mut self,
        table: u64,
        buffers: &[Buffer],
        mut write: impl FnMut(usize, [u8; 16]),
    ) -> Option<u16> {
        let count = u16::try_from(buffers.len()).ok().filter(|&n| n > 0)?;
        let head = self.free.pop()?;
        for (i, b) in buffers.iter().enumerate() {
            let last = i + 1 == buffers.len();
            let flags = if b.writable { DESC_F_WRITE } else { 0 } | if last { 0 } else { DESC_F_NEXT };
            write(i, Desc { addr: b.addr, len: b.len, flags, next: i as u16 + 1 }.to_bytes());
        }
        let len = DESC_SIZE * u32::from(count);
        self.layout.set_desc(head, Desc { addr: table, len, flags: DESC_F_INDIRECT, next: 0 });
        self.taken[usize::from(head)] = 1;
        self.make_available(head);
        Some(head)
    }

    /// Makes a descriptor that is already in the table available again, as it stands: for a driver that reuses its
    /// chains, and for tests that write their own.
    #[inline]
    pub fn make_available(&mut self, head: u16) {
        self.layout.set_avail_ring(self.next_avail, head);
        self.next_avail = self.next_avail.wrapping_add(1);
    }

    /// Shows added requests to the device; true when it wants a notification (a kick).
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

    /// Requests the device has finished and that are not yet collected.
    #[inline]
    pub fn finished(&mut self) -> u16 {
        if self.seen_used == self.next_used {
            self.seen_used = self.layout.used_idx();
        }
        self.seen_used.wrapping_sub(self.next_used)
    }

    /// Collects a finished request as its head and the bytes written, leaving its descriptors in the table: for a
    /// driver that reuses its chains.
    #[inline]
    pub fn collect_keeping(&mut self) -> Option<(u16, u32)> {
        if self.finished() == 0 {
            return None;
        }
        let (head, len) = self.layout.used_ring(self.next_used);
        self.next_used = self.next_used.wrapping_add(1);
        if self.interrupts && self.event_idx {
            self.layout.set_used_event(self.next_used);
        }
        Some((head as u16, len))
    }

    /// Collects a finished request as its head and the bytes written, and frees its descriptors.
    #[inline(always)] // the end of every request
    pub fn collect(&mut self) -> Option<(u16, u32)> {
        let (head, len) = self.collect_keeping()?;
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

    /// Asks for an interrupt with the next finished request, or for none. When asking, true means that something has
    /// finished already.
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
