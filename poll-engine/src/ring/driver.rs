//! The driver side of a ring in guest memory of ours: what tests and benchmarks drive a device with. What it does is in
//! [`vring::driver`].
#![allow(unsafe_code)] // holds a layout beside what keeps it mapped

use std::ops::Deref;

pub use vring::driver::Buffer;
use vring::driver::{Layout, Negotiated};

use super::layout::{DESC_SIZE, PackedLayout, SplitLayout};
use super::{RingConfig, RingError, RingFormat};
use crate::memory::map::{MemoryMap, RingAddress};
use crate::memory::ram::Ram;

/// A [`vring::driver::DriverRing`] with the memory that it lies in kept mapped.
///
/// What changes it is passed on method by method: a mutable reference to the inner ring could be swapped with another,
/// and each would then be kept by the wrong memory.
#[derive(Debug)]
pub struct DriverRing {
    ring: vring::driver::DriverRing,
    /// After the ring, whose layout must not outlive them.
    _parts: [RingAddress; 3],
}

impl DriverRing {
    /// Lays a new ring out in `ram`, as the negotiated `features` have it.
    pub fn lay_out(ram: &mut Ram, size: u16, features: u64) -> Option<RingConfig> {
        let format = RingConfig::new(size.into(), [0; 3], features).format;
        let (desc, driver, device) = format.bytes(size);
        // A part of its own page for each side: a driver's writes never share a cache line with a device's.
        let parts = [ram.alloc(desc, 4096)?, ram.alloc(driver, 4096)?, ram.alloc(device, 4096)?];
        Some(RingConfig::new(size.into(), parts.map(|part| ram.user_addr(part)), features))
    }

    /// Starts the driver side at `config.base`.
    pub fn new(config: &RingConfig, map: &MemoryMap) -> Result<DriverRing, RingError> {
        let (layout, parts) = match config.format {
            RingFormat::Split => {
                // SAFETY: the addresses are kept beside the ring that the layout goes into, which never leaves this
                // struct and is dropped before them.
                let (layout, parts) = unsafe { SplitLayout::new(config, map)?.into_parts() };
                (Layout::Split(layout), parts)
            }
            RingFormat::Packed => {
                // SAFETY: as above.
                let (layout, parts) = unsafe { PackedLayout::new(config, map)?.into_parts() };
                (Layout::Packed(layout), parts)
            }
        };
        let negotiated = Negotiated { event_idx: config.event_idx, in_order: config.in_order };
        let ring = vring::driver::DriverRing::new(layout, config.base, negotiated);
        Ok(DriverRing { ring, _parts: parts })
    }

    /// Adds a request as an indirect table, which is written to guest-physical `table` (16 bytes a buffer).
    pub fn add_indirect(&mut self, map: &MemoryMap, table: u64, buffers: &[Buffer]) -> Option<u16> {
        let len = DESC_SIZE * buffers.len() as u32;
        let slice = map.slice(table, len).filter(|s| s.len() == len as usize && !s.is_empty())?;
        self.ring.add_indirect(table, buffers, |i, desc| {
            slice.part(DESC_SIZE as usize * i, DESC_SIZE as usize).write(&desc);
        })
    }

    /// [`vring::driver::DriverRing::add`].
    #[inline(always)]
    pub fn add(&mut self, buffers: &[Buffer]) -> Option<u16> {
        self.ring.add(buffers)
    }

    /// [`vring::driver::DriverRing::make_available`].
    #[inline(always)]
    pub fn make_available(&mut self, head: u16) {
        self.ring.make_available(head);
    }

    /// [`vring::driver::DriverRing::publish`].
    #[inline(always)]
    pub fn publish(&mut self) -> bool {
        self.ring.publish()
    }

    /// [`vring::driver::DriverRing::finished`].
    #[inline(always)]
    pub fn finished(&mut self) -> u16 {
        self.ring.finished()
    }

    /// [`vring::driver::DriverRing::collect`].
    #[inline(always)]
    pub fn collect(&mut self) -> Option<(u16, u32)> {
        self.ring.collect()
    }

    /// [`vring::driver::DriverRing::set_interrupts`].
    #[inline(always)]
    pub fn set_interrupts(&mut self, on: bool) -> bool {
        self.ring.set_interrupts(on)
    }
}

impl Deref for DriverRing {
    type Target = vring::driver::DriverRing;

    #[inline(always)]
    fn deref(&self) -> &vring::driver::DriverRing {
        &self.ring
    }
}
