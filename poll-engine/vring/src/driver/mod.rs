//! The driver side of a ring: what tests, benchmarks and guests of our own drive a device with. It is as honest as a
//! good driver and does not defend itself against a broken device.

pub mod packed;
pub mod split;

use crate::layout::SplitLayout;
use crate::packed::{PackedLayout, Position};
use packed::PackedDriver;
use split::SplitDriver;

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

/// A ring in memory.
#[derive(Debug)]
pub enum Layout {
    /// Virtio 1.3, 2.7.
    Split(SplitLayout),
    /// Virtio 1.3, 2.8.
    Packed(PackedLayout),
}

/// What the driver has negotiated for its rings.
#[derive(Clone, Copy, Debug, Default)]
pub struct Negotiated {
    /// `VIRTIO_F_EVENT_IDX`.
    pub event_idx: bool,
    /// `VIRTIO_F_IN_ORDER`.
    pub in_order: bool,
}

/// The driver side of a running ring.
#[derive(Debug)]
pub enum DriverRing {
    /// Virtio 1.3, 2.7.
    Split(SplitDriver),
    /// Virtio 1.3, 2.8.
    Packed(PackedDriver),
}

macro_rules! each_format {
    ($self:ident, $ring:ident => $call:expr) => {
        match $self {
            DriverRing::Split($ring) => $call,
            DriverRing::Packed($ring) => $call,
        }
    };
}

impl DriverRing {
    /// Starts the driver side at `base`, which is what vhost-user has as a ring's base. Of a split ring that is where
    /// the available ring begins; the used ring goes on where the device has left it. Of a packed ring it is both.
    pub fn new(layout: Layout, base: u32, negotiated: Negotiated) -> DriverRing {
        match layout {
            Layout::Split(layout) => DriverRing::Split(SplitDriver::new(layout, base as u16, negotiated)),
            Layout::Packed(layout) => DriverRing::Packed(PackedDriver::new(layout, base, negotiated)),
        }
    }

    /// A split ring in memory, for tests that break its rules.
    pub fn split(&self) -> Option<&SplitLayout> {
        match self {
            DriverRing::Split(ring) => Some(ring.layout()),
            DriverRing::Packed(_) => None,
        }
    }

    /// A packed ring in memory, for tests that break its rules.
    pub fn packed(&self) -> Option<&PackedLayout> {
        match self {
            DriverRing::Split(_) => None,
            DriverRing::Packed(ring) => Some(ring.layout()),
        }
    }

    /// Where a packed ring's next descriptor goes, for tests that break its rules.
    pub fn next_position(&self) -> Option<Position> {
        match self {
            DriverRing::Split(_) => None,
            DriverRing::Packed(ring) => Some(ring.next_position()),
        }
    }

    /// Number of descriptors.
    pub fn size(&self) -> u16 {
        match self {
            DriverRing::Split(ring) => ring.layout().size(),
            DriverRing::Packed(ring) => ring.layout().size(),
        }
    }

    /// Descriptors not in use.
    pub fn free(&self) -> usize {
        each_format!(self, ring => ring.free())
    }

    /// Adds a request in descriptors of the ring; gives its name, the head's index or the buffer ID. `None` when there
    /// is no room (or nothing to add).
    #[inline(always)] // every request passes through
    pub fn add(&mut self, buffers: &[Buffer]) -> Option<u16> {
        each_format!(self, ring => ring.add(buffers))
    }

    /// Adds a request as an indirect table at guest-physical `table`: `write(i, bytes)` is called for each of its
    /// descriptors, which belong 16 bytes apart. `None`, with nothing written, when there is no room (or nothing to
    /// add, or more than a table can hold).
    #[inline]
    pub fn add_indirect(
        &mut self,
        table: u64,
        buffers: &[Buffer],
        write: impl FnMut(usize, [u8; 16]),
    ) -> Option<u16> {
        each_format!(self, ring => ring.add_indirect(table, buffers, write))
    }

    /// Makes a descriptor of a split ring available again, as it stands: for tests that write their own. Descriptors
    /// of a packed ring say themselves whether they are available.
    pub fn make_available(&mut self, head: u16) {
        if let DriverRing::Split(ring) = self {
            ring.make_available(head);
        }
    }

    /// Shows added requests to the device; true when it wants a notification (a kick).
    #[inline]
    pub fn publish(&mut self) -> bool {
        each_format!(self, ring => ring.publish())
    }

    /// Requests the device has finished and that are not yet collected.
    #[inline(always)] // every request passes through
    pub fn finished(&mut self) -> u16 {
        each_format!(self, ring => ring.finished())
    }

    /// Collects a finished request as its name and the bytes written, and frees its descriptors.
    #[inline(always)] // every request passes through
    pub fn collect(&mut self) -> Option<(u16, u32)> {
        each_format!(self, ring => ring.collect())
    }

    /// Asks for an interrupt with the next finished request, or for none. When asking, true means that something has
    /// finished already.
    pub fn set_interrupts(&mut self, on: bool) -> bool {
        each_format!(self, ring => ring.set_interrupts(on))
    }
}

/// `DESC_F_WRITE` and `DESC_F_NEXT` of a buffer in a chain.
#[inline]
fn flags(buffer: &Buffer, next: bool) -> u16 {
    use crate::layout::{DESC_F_NEXT, DESC_F_WRITE};
    let write = if buffer.writable { DESC_F_WRITE } else { 0 };
    write | if next { DESC_F_NEXT } else { 0 }
}

/// Bytes that the device may write.
#[inline]
fn writable(buffers: &[Buffer]) -> u32 {
    buffers.iter().filter(|b| b.writable).fold(0, |sum, b| sum.wrapping_add(b.len))
}
