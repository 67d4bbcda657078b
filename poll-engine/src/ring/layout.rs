//! The split ring in guest memory: a [`RingConfig`] resolved to host addresses. What lies where, and how it is
//! accessed, is in [`vring::layout`].
#![allow(unsafe_code)] // tells `vring` where the mapped parts of a ring are

use std::ops::Deref;

pub use vring::layout::{
    AVAIL_F_NO_INTERRUPT, DESC_F_INDIRECT, DESC_F_NEXT, DESC_F_WRITE, DESC_SIZE, Desc, USED_F_NO_NOTIFY,
    split_bytes,
};

use super::{RingConfig, RingError};
use crate::memory::map::{MemoryMap, RingAddress};
use crate::memory::slice::GuestSlice;

/// A [`vring::layout::SplitLayout`] with the memory that it lies in kept mapped.
///
/// It gives the layout out by shared reference only: one that could be moved out would outlive the mapping.
#[derive(Debug)]
pub struct SplitLayout {
    layout: vring::layout::SplitLayout,
    /// After the layout, which must not outlive them.
    parts: [RingAddress; 3],
}

impl SplitLayout {
    /// Resolves the parts of `config` in `map`, checking size, alignment (virtio 1.3, 2.7) and bounds.
    pub fn new(config: &RingConfig, map: &MemoryMap) -> Result<SplitLayout, RingError> {
        let size = config.checked_size()?;
        let (desc_len, avail_len, used_len) = split_bytes(size);
        let resolve = |addr: u64, len: u64, align: usize| {
            let at = map.ring_address(addr, len, config.access_platform)?;
            if at.host.addr().get().is_multiple_of(align) { Ok(at) } else { Err(RingError::Misaligned(addr)) }
        };
        let desc = resolve(config.desc_addr, desc_len, 16)?;
        let avail = resolve(config.avail_addr, avail_len, 2)?;
        let used = resolve(config.used_addr, used_len, 4)?;
        // SAFETY: size, alignment and length are checked above. The parts are mapped for reading and writing, and
        // stay so while the RingAddresses beside the layout live. Guest memory is accessed by copies and by layouts,
        // never by reference (see `GuestSlice`).
        let layout = unsafe { vring::layout::SplitLayout::at(desc.host, avail.host, used.host, size) };
        Ok(SplitLayout { layout, parts: [desc, avail, used] })
    }

    /// Takes the layout apart from what keeps it mapped.
    ///
    /// # Safety
    /// The addresses must be kept for as long as the layout lives.
    pub(super) unsafe fn into_parts(self) -> (vring::layout::SplitLayout, [RingAddress; 3]) {
        (self.layout, self.parts)
    }
}

impl Deref for SplitLayout {
    type Target = vring::layout::SplitLayout;

    #[inline]
    fn deref(&self) -> &vring::layout::SplitLayout {
        &self.layout
    }
}

/// Reads descriptor `index` of an indirect table that lies in one slice, each byte once.
#[inline]
pub fn indirect_desc(table: &GuestSlice<'_>, index: u16) -> Option<Desc> {
    table
        .part(usize::from(index) * DESC_SIZE as usize, DESC_SIZE as usize)
        .read_pair_once()
        .map(Desc::from_pair)
}
