//! The packed ring in memory: positions with their wrap counters, descriptors, event suppression structures, and atomic
//! access to them, for both sides (virtio 1.3, 2.8).
//!
//! ```text
//!    descriptor ring                              16 bytes: addr 64 | len 32 | id 16 | flags 16
//!    ┌────┬────┬────┬────┬────┬────┬────┬────┐    the upper half, with the flags, is one 64-bit access
//!    │used│    │ in flight    │available│    │
//!    └────┴────┴────┴────┴────┴────┴────┴────┘
//!         ▲ next used         ▲ next available    each with a wrap counter that turns over at the end of the ring
//! ```
#![allow(unsafe_code)] // rings are shared with the other side and live at raw addresses

use core::marker::PhantomData;
use core::ptr::NonNull;
use core::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use crate::layout::{DESC_F_WRITE, prefetch_write};

/// `VIRTQ_DESC_F_AVAIL`: available when it matches the driver's wrap counter and [`DESC_F_USED`] does not.
pub const DESC_F_AVAIL: u16 = 1 << 7;
/// `VIRTQ_DESC_F_USED`: used when it and [`DESC_F_AVAIL`] match the device's wrap counter.
pub const DESC_F_USED: u16 = 1 << 15;

/// Descriptors in a cache line.
const DESCS_A_LINE: u16 = 4;

/// A place in the ring with its wrap counter (2.8.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Position {
    /// Which descriptor.
    pub index: u16,
    /// The ring wrap counter.
    pub wrap: bool,
}

impl Position {
    /// Where both sides of a new ring begin.
    pub const START: Position = Position { index: 0, wrap: true };

    /// From 15 bits of index and one of wrap counter: an event suppression structure's `desc`, half of a base.
    #[inline]
    pub fn from_bits(bits: u16) -> Position {
        Position { index: bits & 0x7fff, wrap: bits >> 15 == 1 }
    }

    /// What [`from_bits`](Self::from_bits) takes.
    #[inline]
    pub fn bits(self) -> u16 {
        self.index | u16::from(self.wrap) << 15
    }

    /// `count` descriptors further, at most `size`.
    #[inline]
    #[must_use]
    pub fn advance(self, count: u16, size: u16) -> Position {
        let index = self.index + count;
        if index < size {
            Position { index, wrap: self.wrap }
        } else {
            Position { index: index - size, wrap: !self.wrap }
        }
    }

    /// `count` descriptors back, at most `size`.
    #[inline]
    #[must_use]
    pub fn retreat(self, count: u16, size: u16) -> Position {
        match self.index.checked_sub(count) {
            Some(index) => Position { index, wrap: self.wrap },
            None => Position { index: self.index + size - count, wrap: !self.wrap },
        }
    }

    /// One descriptor further. The end of the ring is a branch that is hardly ever taken.
    #[inline]
    #[must_use]
    pub fn next(self, size: u16) -> Position {
        let index = self.index + 1;
        if index == size { Position { index: 0, wrap: !self.wrap } } else { Position { index, ..self } }
    }

    /// A number that is one higher a descriptor further, in a circle of two rings.
    #[inline]
    fn linear(self, size: u16) -> u32 {
        u32::from(self.index) + if self.wrap { 0 } else { u32::from(size) }
    }

    /// How many descriptors it is from `earlier` to here: less than two rings.
    #[inline]
    pub fn since(self, earlier: Position, size: u16) -> u32 {
        let (here, there) = (self.linear(size), earlier.linear(size));
        if here >= there { here - there } else { here + 2 * u32::from(size) - there }
    }

    /// Whether a descriptor here with these flags is available.
    #[inline]
    pub fn is_available(self, flags: u16) -> bool {
        flags & (DESC_F_AVAIL | DESC_F_USED) == self.available()
    }

    /// Whether a descriptor here with these flags is used.
    #[inline]
    pub fn is_used(self, flags: u16) -> bool {
        flags & (DESC_F_AVAIL | DESC_F_USED) == self.used()
    }

    /// The flags that make a descriptor here available.
    #[inline]
    pub fn available(self) -> u16 {
        if self.wrap { DESC_F_AVAIL } else { DESC_F_USED }
    }

    /// The flags that make a descriptor here used.
    #[inline]
    pub fn used(self) -> u16 {
        if self.wrap { DESC_F_AVAIL | DESC_F_USED } else { 0 }
    }
}

/// Whether the last `count` descriptors before `new` have `event` among them: what "made available" or "used" means
/// for a descriptor specific event (2.8.10). An event outside the ring counts as passed: a notification too many does
/// no harm.
#[inline]
pub fn passes(event: Position, new: Position, count: u32, size: u16) -> bool {
    // One less than the distance, where none is a whole circle.
    event.index >= size
        || match new.since(event, size) {
            0 => count >= 2 * u32::from(size),
            distance => distance <= count,
        }
}

/// `struct pvirtq_desc` (2.8.13), as read once.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct PackedDesc {
    /// Guest-physical address of the buffer; of no meaning in a used descriptor.
    pub addr: u64,
    /// Bytes; of a used descriptor, those written.
    pub len: u32,
    /// Buffer ID.
    pub id: u16,
    /// `DESC_F_*`.
    pub flags: u16,
}

impl PackedDesc {
    /// Decodes a descriptor from its two halves, read as little-endian numbers.
    #[inline]
    pub fn from_pair([addr, rest]: [u64; 2]) -> PackedDesc {
        PackedDesc { addr, len: rest as u32, id: (rest >> 32) as u16, flags: (rest >> 48) as u16 }
    }

    /// Encodes the descriptor.
    #[inline]
    pub fn to_bytes(self) -> [u8; 16] {
        let mut b = [0; 16];
        b[..8].copy_from_slice(&self.addr.to_le_bytes());
        b[8..].copy_from_slice(&self.rest().to_le_bytes());
        b
    }

    #[inline]
    fn rest(self) -> u64 {
        u64::from(self.len) | u64::from(self.id) << 32 | u64::from(self.flags) << 48
    }
}

/// The upper half of a descriptor: all that a used one has, and what tells whether one is available.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rest(u64);

impl Rest {
    /// Of what it has.
    #[inline]
    pub fn new(len: u32, id: u16, flags: u16) -> Rest {
        Rest(PackedDesc { addr: 0, len, id, flags }.rest())
    }

    /// A used descriptor at `at` for the buffer `id`, with `written` bytes written to it (2.8.3, 2.8.4).
    #[inline]
    pub fn used(at: Position, id: u16, written: u32) -> Rest {
        let flags = at.used() | if written > 0 { DESC_F_WRITE } else { 0 };
        Rest::new(written, id, flags)
    }

    /// What a descriptor at `at` looks like that is neither used nor to be read again.
    #[inline]
    pub fn taken(at: Position) -> Rest {
        Rest::new(0, 0, at.available())
    }

    /// `DESC_F_*`.
    #[inline]
    pub fn flags(self) -> u16 {
        (self.0 >> 48) as u16
    }

    /// Buffer ID.
    #[inline]
    pub fn id(self) -> u16 {
        (self.0 >> 32) as u16
    }

    /// Bytes.
    #[inline]
    pub fn len(self) -> u32 {
        self.0 as u32
    }

    /// Whether there are no bytes.
    #[inline]
    pub fn is_empty(self) -> bool {
        self.len() == 0
    }
}

/// An event suppression structure (2.8.14): when the side that writes it wants to be notified.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// `RING_EVENT_FLAGS_ENABLE`: whenever there is something. The reserved value is taken for it, too.
    Enable,
    /// `RING_EVENT_FLAGS_DISABLE`: never.
    Disable,
    /// `RING_EVENT_FLAGS_DESC`: when this descriptor is passed. Needs `VIRTIO_F_EVENT_IDX`.
    Desc(Position),
}

impl Event {
    #[inline]
    fn to_bits(self) -> u32 {
        match self {
            Event::Enable => 0,
            Event::Disable => 1 << 16,
            Event::Desc(at) => 2 << 16 | u32::from(at.bits()),
        }
    }

    #[inline]
    fn from_bits(bits: u32) -> Event {
        match bits >> 16 & 3 {
            1 => Event::Disable,
            2 => Event::Desc(Position::from_bits(bits as u16)),
            _ => Event::Enable,
        }
    }

    /// Whether `count` descriptors up to `new` are something to be notified of. `event_idx` is whether that feature is
    /// negotiated; without it [`Event::Desc`] means as much as [`Event::Enable`].
    #[inline]
    pub fn wants(self, new: Position, count: u32, size: u16, event_idx: bool) -> bool {
        match self {
            Event::Enable => true,
            Event::Disable => false,
            Event::Desc(event) => !event_idx || passes(event, new, count, size),
        }
    }
}

/// A way along the descriptors of a ring, from each to the next, without a check at each.
#[derive(Clone, Copy, Debug)]
pub struct Cursor<'a> {
    at: NonNull<AtomicU64>,
    end: NonNull<AtomicU64>,
    start: NonNull<AtomicU64>,
    layout: PhantomData<&'a PackedLayout>,
}

impl Cursor<'_> {
    /// To the next descriptor; true when that is the first of the ring.
    #[inline(always)] // every descriptor
    pub fn step(&mut self) -> bool {
        // SAFETY: at is a descriptor, so behind it is another one, or the end.
        self.at = unsafe { self.at.add(2) };
        let wraps = self.at == self.end;
        if wraps {
            self.at = self.start;
        }
        wraps
    }

    #[inline(always)] // every descriptor
    fn halves(&self) -> (&AtomicU64, &AtomicU64) {
        // SAFETY: a descriptor of the layout, as for `PackedLayout::halves`.
        unsafe { (self.at.as_ref(), self.at.add(1).as_ref()) }
    }

    /// As [`PackedLayout::rest`].
    #[inline(always)] // every descriptor
    pub fn rest(&self) -> Rest {
        Rest(u64::from_le(self.halves().1.load(Ordering::Acquire)))
    }

    /// As [`PackedLayout::desc`], in its two halves.
    #[inline(always)] // every descriptor
    pub fn pair(&self) -> (u64, Rest) {
        let rest = self.rest();
        (self.addr(), rest)
    }

    /// The address in the descriptor.
    #[inline(always)] // every descriptor
    pub fn addr(&self) -> u64 {
        u64::from_le(self.halves().0.load(Ordering::Relaxed))
    }
}

/// Takes values and not references to them, which would be in memory.
#[cold]
#[inline(never)]
fn outside(index: u16, size: u16) -> ! {
    panic!("descriptor {index} of {size}")
}

/// Bytes of an event suppression structure.
pub const EVENT_SIZE: u64 = 4;

/// The three parts of a packed ring, wherever they are mapped.
///
/// It does not keep them mapped: it is neither `Clone` nor `Copy`, so that whoever made it knows how long it lives.
#[derive(Debug)]
pub struct PackedLayout {
    desc: NonNull<AtomicU64>,
    driver: NonNull<AtomicU32>,
    device: NonNull<AtomicU32>,
    size: u16,
}

// SAFETY: three addresses, valid for every thread as `at` was promised; all access is atomic and allows for the other
// side writing meanwhile.
unsafe impl Send for PackedLayout {}

impl PackedLayout {
    /// The ring of `size` descriptors with its descriptor ring at `desc`, the driver's event suppression structure at
    /// `driver` and the device's at `device`.
    ///
    /// # Safety
    /// - The size is from 1 to 32768.
    /// - The parts are aligned to 16, 4 and 4 bytes (2.8.10.1) and 16 bytes a descriptor, [`EVENT_SIZE`] and
    ///   [`EVENT_SIZE`] long.
    /// - For as long as the layout lives, the parts are valid for reads and writes, by every thread that it is sent
    ///   to, and no reference to their bytes is made but through layouts. The other side may write them at any moment.
    #[inline]
    pub unsafe fn at(desc: NonNull<u8>, driver: NonNull<u8>, device: NonNull<u8>, size: u16) -> PackedLayout {
        debug_assert!((1..=1 << 15).contains(&size));
        debug_assert!([(desc, 16), (driver, 4), (device, 4)].iter().all(|(p, n)| p.addr().get() % n == 0));
        PackedLayout { desc: desc.cast(), driver: driver.cast(), device: device.cast(), size }
    }

    /// Number of descriptors.
    #[inline]
    pub fn size(&self) -> u16 {
        self.size
    }

    /// Both halves of a descriptor.
    #[inline]
    fn halves(&self, index: u16) -> (&AtomicU64, &AtomicU64) {
        if index >= self.size {
            outside(index, self.size);
        }
        // SAFETY: inside the ring, 16-byte aligned and valid while the layout lives, as `at` was promised; all access
        // is atomic.
        unsafe {
            let at = self.desc.add(2 * usize::from(index));
            (at.as_ref(), at.add(1).as_ref())
        }
    }

    /// A way along the descriptors that begins at one.
    #[inline]
    pub fn cursor(&self, index: u16) -> Cursor<'_> {
        let at = NonNull::from(self.halves(index).0);
        // SAFETY: the end of the ring.
        let end = unsafe { self.desc.add(2 * usize::from(self.size)) };
        Cursor { at, end, start: self.desc, layout: PhantomData }
    }

    /// The upper half of a descriptor; what was written before it is visible after.
    #[inline]
    pub fn rest(&self, index: u16) -> Rest {
        Rest(u64::from_le(self.halves(index).1.load(Ordering::Acquire)))
    }

    /// Reads a descriptor, each byte once, the flags first.
    #[inline]
    pub fn desc(&self, index: u16) -> PackedDesc {
        let (addr, rest) = self.cursor(index).pair();
        PackedDesc::from_pair([addr, rest.0])
    }

    /// Writes a descriptor that the other side does not look at yet (driver side).
    #[inline]
    pub fn set_desc(&self, index: u16, desc: PackedDesc) {
        let (addr, rest) = self.halves(index);
        addr.store(desc.addr.to_le(), Ordering::Relaxed);
        rest.store(desc.rest().to_le(), Ordering::Relaxed);
    }

    /// Writes a descriptor's address, and gives the half that is to follow by [`show`](Self::show) (driver side).
    #[inline]
    pub fn prepare(&self, index: u16, desc: PackedDesc) -> Rest {
        self.halves(index).0.store(desc.addr.to_le(), Ordering::Relaxed);
        Rest(desc.rest())
    }

    /// Writes the upper half of a descriptor that the other side does not look at before an earlier one.
    #[inline]
    pub fn set_rest(&self, index: u16, rest: Rest) {
        self.halves(index).1.store(rest.0.to_le(), Ordering::Relaxed);
    }

    /// Writes the upper half of the descriptor that the other side looks at, after all that was written before.
    #[inline]
    pub fn show(&self, index: u16, rest: Rest) {
        self.halves(index).1.store(rest.0.to_le(), Ordering::Release);
    }

    /// Asks the CPU to fetch `count` descriptors from `index` on, at most all, to be written.
    #[inline]
    pub fn prefetch_write(&self, mut index: u16, count: u16) {
        for _ in (0..count).step_by(DESCS_A_LINE.into()) {
            prefetch_write(core::ptr::from_ref(self.halves(index).0).cast());
            index = if self.size - index > DESCS_A_LINE { index + DESCS_A_LINE } else { 0 };
        }
    }

    #[inline]
    fn event(part: &NonNull<AtomicU32>) -> &AtomicU32 {
        // SAFETY: one of the two event suppression structures, aligned and valid while the layout lives, as `at` was
        // promised; all access is atomic.
        unsafe { part.as_ref() }
    }

    /// When the driver wants an interrupt.
    #[inline]
    pub fn driver_event(&self) -> Event {
        Event::from_bits(u32::from_le(Self::event(&self.driver).load(Ordering::Relaxed)))
    }

    /// Says when the driver wants an interrupt (driver side).
    #[inline]
    pub fn set_driver_event(&self, event: Event) {
        Self::event(&self.driver).store(event.to_bits().to_le(), Ordering::Relaxed);
    }

    /// When the device wants a notification (driver side).
    #[inline]
    pub fn device_event(&self) -> Event {
        Event::from_bits(u32::from_le(Self::event(&self.device).load(Ordering::Relaxed)))
    }

    /// Says when the device wants a notification.
    #[inline]
    pub fn set_device_event(&self, event: Event) {
        Self::event(&self.device).store(event.to_bits().to_le(), Ordering::Relaxed);
    }
}
