//! virtio over MMIO, version 2 (virtio 1.3, 4.2), the driver's side.

use alloc::vec::Vec;

use kickless_guest::failure;
use vring::driver::{DriverRing, Layout, Negotiated};
use vring::layout::{RingFormat, SplitLayout};
use vring::packed::PackedLayout;

use crate::arena::{Arena, Piece};
use crate::cpu::{mmio_read, mmio_write};

const MAGIC: usize = 0x000;
const VERSION: usize = 0x004;
const DEVICE_ID: usize = 0x008;
const DEVICE_FEATURES: usize = 0x010;
const DEVICE_FEATURES_SEL: usize = 0x014;
const DRIVER_FEATURES: usize = 0x020;
const DRIVER_FEATURES_SEL: usize = 0x024;
const QUEUE_SEL: usize = 0x030;
const QUEUE_NUM_MAX: usize = 0x034;
const QUEUE_NUM: usize = 0x038;
const QUEUE_READY: usize = 0x044;
const QUEUE_NOTIFY: usize = 0x050;
const INTERRUPT_STATUS: usize = 0x060;
const INTERRUPT_ACK: usize = 0x064;
const STATUS: usize = 0x070;
const QUEUE_DESC: usize = 0x080;
const QUEUE_DRIVER: usize = 0x090;
const QUEUE_DEVICE: usize = 0x0a0;
const QUEUE_RESET: usize = 0x0c0;
const CONFIG_GENERATION: usize = 0x0fc;
const CONFIG: usize = 0x100;

const ACKNOWLEDGE: u32 = 1;
const DRIVER: u32 = 2;
const DRIVER_OK: u32 = 4;
const FEATURES_OK: u32 = 8;
const NEEDS_RESET: u32 = 64;

const F_INDIRECT_DESC: u64 = 1 << 28;
const F_EVENT_IDX: u64 = 1 << 29;
const F_VERSION_1: u64 = 1 << 32;
const F_RING_PACKED: u64 = 1 << 34;
const F_IN_ORDER: u64 = 1 << 35;
const F_RING_RESET: u64 = 1 << 40;

/// `InterruptStatus`: the configuration has changed.
pub const CONFIG_CHANGE: u32 = 2;

/// The registers of one device.
#[derive(Clone, Copy)]
pub struct Transport {
    base: usize,
    /// Its line at the I/O APIC.
    pub line: u32,
}

/// Memory of a ring, and what its queue is set up with.
#[derive(Clone, Copy)]
pub struct Place {
    parts: [Piece; 3],
    size: u16,
    format: RingFormat,
    negotiated: Negotiated,
}

impl Transport {
    /// A device at `base`, if there is one: its type with it.
    pub fn probe(base: usize, line: u32) -> Option<(Transport, u32)> {
        let found = Transport { base, line };
        let id = found.read(DEVICE_ID);
        (found.read(MAGIC) == 0x7472_6976 && found.read(VERSION) == 2 && id != 0).then_some((found, id))
    }

    fn read(&self, register: usize) -> u32 {
        mmio_read(self.base + register)
    }

    fn write(&self, register: usize, value: u32) {
        mmio_write(self.base + register, value);
    }

    fn write_wide(&self, register: usize, value: u64) {
        self.write(register, value as u32);
        self.write(register + 4, (value >> 32) as u32);
    }

    /// Resets the device and waits until it is (4.2.2.2).
    pub fn reset(&self) {
        self.write(STATUS, 0);
        while self.read(STATUS) != 0 {
            core::hint::spin_loop();
        }
    }

    /// Accepts those of `wanted` that are offered (3.1.1, steps 1 to 6). Without `F_VERSION_1` nothing goes.
    pub fn negotiate(&self, wanted: u64) -> Result<u64, u32> {
        self.reset();
        self.write(STATUS, ACKNOWLEDGE);
        self.write(STATUS, ACKNOWLEDGE | DRIVER);
        let half = |index: u32| {
            self.write(DEVICE_FEATURES_SEL, index);
            u64::from(self.read(DEVICE_FEATURES))
        };
        let offered = half(0) | half(1) << 32;
        let features = offered & (wanted | F_VERSION_1);
        for index in 0..2 {
            self.write(DRIVER_FEATURES_SEL, index);
            self.write(DRIVER_FEATURES, (features >> (32 * index)) as u32);
        }
        self.write(STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK);
        if features & F_VERSION_1 == 0 || self.read(STATUS) & FEATURES_OK == 0 {
            return Err(failure::FEATURES);
        }
        Ok(features)
    }

    /// Lays `queues` rings out and starts the device.
    pub fn start(
        &self,
        features: u64,
        queues: u32,
        ring_size: u32,
        arena: &mut Arena,
    ) -> Result<Vec<(DriverRing, Place)>, u32> {
        let format = if features & F_RING_PACKED == 0 { RingFormat::Split } else { RingFormat::Packed };
        if !format.allows_size(ring_size) {
            return Err(failure::ORDER);
        }
        let mut rings = Vec::new();
        for index in 0..queues {
            self.write(QUEUE_SEL, index);
            let most = self.read(QUEUE_NUM_MAX);
            if self.read(QUEUE_READY) != 0 || most == 0 {
                break;
            }
            let size = ring_size.min(most).min(1 << 15) as u16;
            let (desc, driver, device) = format.bytes(size);
            let mut part = |len: u64| arena.take(len as usize, 4096).ok_or(failure::MEMORY);
            let parts = [part(desc)?, part(driver)?, part(device)?];
            let negotiated =
                Negotiated { event_idx: features & F_EVENT_IDX != 0, in_order: features & F_IN_ORDER != 0 };
            let place = Place { parts, size, format, negotiated };
            rings.push((self.set_up(index, &place), place));
        }
        self.write(STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
        let ready = self.read(STATUS);
        if ready & NEEDS_RESET != 0 {
            return Err(failure::NEEDS_RESET);
        }
        if rings.is_empty() { Err(failure::QUEUE) } else { Ok(rings) }
    }

    /// An empty ring at `place`, told to the device (4.2.3.2).
    fn set_up(&self, index: u32, place: &Place) -> DriverRing {
        let Place { parts, size, format, negotiated } = *place;
        parts.iter().for_each(Piece::clear);
        let [desc, driver, device] = parts;
        self.write(QUEUE_SEL, index);
        self.write(QUEUE_NUM, u32::from(size));
        self.write_wide(QUEUE_DESC, desc.address());
        self.write_wide(QUEUE_DRIVER, driver.address());
        self.write_wide(QUEUE_DEVICE, device.address());
        self.write(QUEUE_READY, 1);
        // SAFETY: the pieces are as long as the parts and at pages of their own; they stay ours as long as the
        // device is attached, since the harness gives every order an arena of its own.
        let layout = unsafe {
            let (desc, driver, device) = (desc.pointer(), driver.pointer(), device.pointer());
            match format {
                RingFormat::Split => Layout::Split(SplitLayout::at(desc, driver, device, size)),
                RingFormat::Packed => Layout::Packed(PackedLayout::at(desc, driver, device, size)),
            }
        };
        DriverRing::new(layout, format.initial_base(), negotiated)
    }

    /// Resets one queue and waits until it is (2.6.1). What was used before that can be collected from the ring's memory.
    pub fn reset_queue(&self, index: u32) {
        self.write(QUEUE_SEL, index);
        self.write(QUEUE_RESET, 1);
        while self.read(QUEUE_RESET) != 0 {
            core::hint::spin_loop();
        }
        assert!(self.read(QUEUE_READY) == 0, "a queue that was reset is ready");
    }

    /// Sets a queue up again after [`reset_queue`](Self::reset_queue).
    pub fn restart_queue(&self, index: u32, place: &Place) -> DriverRing {
        let ring = self.set_up(index, place);
        assert!(self.read(STATUS) & NEEDS_RESET == 0, "a queue does not start again");
        ring
    }

    /// Whether queues can be reset alone.
    pub fn has_ring_reset(features: u64) -> bool {
        features & F_RING_RESET != 0
    }

    /// Whether indirect descriptors are among the features.
    pub fn has_indirect(features: u64) -> bool {
        features & F_INDIRECT_DESC != 0
    }

    /// Tells the device to look at a queue.
    #[inline]
    pub fn notify(&self, queue: u32) {
        self.write(QUEUE_NOTIFY, queue);
    }

    /// Reads and acknowledges why the device has interrupted.
    pub fn acknowledge(&self) -> u32 {
        let why = self.read(INTERRUPT_STATUS);
        if why != 0 {
            self.write(INTERRUPT_ACK, why);
        }
        why
    }

    /// The first eight bytes of the configuration, all of one generation (2.5.1).
    pub fn config(&self) -> u64 {
        loop {
            let before = self.read(CONFIG_GENERATION);
            let value = u64::from(self.read(CONFIG)) | u64::from(self.read(CONFIG + 4)) << 32;
            if self.read(CONFIG_GENERATION) == before {
                return value;
            }
        }
    }
}
