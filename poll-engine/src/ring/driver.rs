//! The driver side of a split ring in guest memory of ours: what tests and benchmarks drive a device with. What it does
//! is in [`vring::driver`].
#![allow(unsafe_code)] // holds a layout beside what keeps it mapped

use std::ops::Deref;

pub use vring::driver::Buffer;

use super::layout::{DESC_SIZE, SplitLayout, split_bytes};
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
    /// Lays a split ring out in `ram`.
    pub fn lay_out(ram: &mut Ram, size: u16, event_idx: bool, indirect: bool) -> Option<RingConfig> {
        let (desc, avail, used) = split_bytes(size);
        // A part of its own page for each side: a driver's writes never share a cache line with a device's.
        let desc_addr = ram.alloc(desc, 4096)?;
        let avail_addr = ram.alloc(avail, 4096)?;
        let used_addr = ram.alloc(used, 4096)?;
        Some(RingConfig {
            size: u32::from(size),
            desc_addr: ram.user_addr(desc_addr),
            avail_addr: ram.user_addr(avail_addr),
            used_addr: ram.user_addr(used_addr),
            format: RingFormat::Split,
            base: RingFormat::Split.initial_base(),
            event_idx,
            indirect,
            in_order: false,
            access_platform: false,
        })
    }

    /// Starts the driver side; the available ring begins at `config.base`.
    pub fn new(config: &RingConfig, map: &MemoryMap) -> Result<DriverRing, RingError> {
        let layout = SplitLayout::new(config, map)?;
        // SAFETY: the addresses are kept beside the ring that the layout goes into, which never leaves this struct
        // and is dropped before them.
        let (layout, parts) = unsafe { layout.into_parts() };
        let ring = vring::driver::DriverRing::new(layout, config.base as u16, config.event_idx);
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

    /// [`vring::driver::DriverRing::collect_keeping`].
    #[inline(always)]
    pub fn collect_keeping(&mut self) -> Option<(u16, u32)> {
        self.ring.collect_keeping()
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
