//! Rings in guest memory: a [`RingConfig`] resolved to host addresses. What lies where, and how it is accessed, is in
//! [`vring::layout`] and [`vring::packed`].
#![allow(unsafe_code)] // tells `vring` where the mapped parts of a ring are

use std::ops::Deref;
use std::ptr::NonNull;

pub use vring::layout::{
    AVAIL_F_NO_INTERRUPT, DESC_F_INDIRECT, DESC_F_NEXT, DESC_F_WRITE, DESC_SIZE, Desc, USED_F_NO_NOTIFY,
    split_bytes,
};

use super::{RingConfig, RingError, RingFormat};
use crate::memory::map::{MemoryMap, RingAddress};
use crate::memory::slice::GuestSlice;

/// A layout of `vring` with the memory that it lies in kept mapped.
///
/// It gives the layout out by shared reference only: one that could be moved out would outlive the mapping.
#[derive(Debug)]
pub struct Mapped<L> {
    layout: L,
    /// After the layout, which must not outlive them.
    parts: [RingAddress; 3],
}

/// A split ring in guest memory.
pub type SplitLayout = Mapped<vring::layout::SplitLayout>;

/// A packed ring in guest memory.
pub type PackedLayout = Mapped<vring::packed::PackedLayout>;

/// Resolves the parts of `config`, checking size, alignment and bounds.
fn resolve(config: &RingConfig, map: &MemoryMap) -> Result<(u16, [RingAddress; 3]), RingError> {
    let size = config.checked_size()?;
    let (desc_len, driver_len, device_len) = config.format.bytes(size);
    let (desc_align, driver_align, device_align) = config.format.alignment();
    let part = |addr: u64, len: u64, align: usize| {
        let at = map.ring_address(addr, len, config.access_platform)?;
        if at.host.addr().get().is_multiple_of(align) { Ok(at) } else { Err(RingError::Misaligned(addr)) }
    };
    let desc = part(config.desc_addr, desc_len, desc_align)?;
    let driver = part(config.avail_addr, driver_len, driver_align)?;
    let device = part(config.used_addr, device_len, device_align)?;
    Ok((size, [desc, driver, device]))
}

fn hosts(parts: &[RingAddress; 3]) -> [NonNull<u8>; 3] {
    parts.each_ref().map(|part| part.host)
}

impl SplitLayout {
    /// Resolves the parts of `config`, which is of a split ring, in `map`.
    pub fn new(config: &RingConfig, map: &MemoryMap) -> Result<SplitLayout, RingError> {
        let (size, parts) = resolve(&RingConfig { format: RingFormat::Split, ..*config }, map)?;
        let [desc, avail, used] = hosts(&parts);
        // SAFETY: size, alignment and length are checked. The parts are mapped for reading and writing, and stay so
        // while the RingAddresses beside the layout live. Guest memory is accessed by copies and by layouts, never by
        // reference (see `GuestSlice`).
        let layout = unsafe { vring::layout::SplitLayout::at(desc, avail, used, size) };
        Ok(Mapped { layout, parts })
    }
}

impl PackedLayout {
    /// Resolves the parts of `config`, which is of a packed ring, in `map`.
    pub fn new(config: &RingConfig, map: &MemoryMap) -> Result<PackedLayout, RingError> {
        let (size, parts) = resolve(&RingConfig { format: RingFormat::Packed, ..*config }, map)?;
        let [desc, driver, device] = hosts(&parts);
        // SAFETY: as for the split ring.
        let layout = unsafe { vring::packed::PackedLayout::at(desc, driver, device, size) };
        Ok(Mapped { layout, parts })
    }
}

impl<L> Mapped<L> {
    /// Guest-physical address of the descriptors.
    pub(super) fn guest_addr(&self) -> u64 {
        self.parts[0].guest_addr()
    }

    /// Takes the layout apart from what keeps it mapped.
    ///
    /// # Safety
    /// The addresses must be kept for as long as the layout lives.
    pub(super) unsafe fn into_parts(self) -> (L, [RingAddress; 3]) {
        (self.layout, self.parts)
    }
}

impl<L> Deref for Mapped<L> {
    type Target = L;

    #[inline]
    fn deref(&self) -> &L {
        &self.layout
    }
}

/// Reads the two halves of descriptor `index` of an indirect table that lies in one slice, each byte once.
#[inline]
pub fn indirect_pair(table: &GuestSlice<'_>, index: u16) -> Option<[u64; 2]> {
    table.part(usize::from(index) * DESC_SIZE as usize, DESC_SIZE as usize).read_pair_once()
}
