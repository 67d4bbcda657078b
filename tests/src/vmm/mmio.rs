//! The registers of a virtio-mmio device, version 2 (virtio 1.3, 4.2.2), as a state machine without I/O.

use poll_engine::device::features::RING_RESET;

use super::backend::QueueSetup;

/// Bytes of address space a device takes.
pub const SIZE: u64 = 0x1000;
/// Offset of `QueueNotify`, which KVM watches by itself.
pub const QUEUE_NOTIFY: u64 = 0x050;
const QUEUE_READY: u64 = 0x044;
/// `QueueReset`: reads as 0, for the queue has been reset when the write is over.
const QUEUE_RESET: u64 = 0x0c0;
const CONFIG: u64 = 0x100;

const MAGIC: u32 = 0x7472_6976;
const VENDOR: u32 = 0x4b4c_434b;

/// `InterruptStatus`: the device has used a buffer.
pub const INT_VRING: u32 = 1;
/// `InterruptStatus`: the configuration has changed.
pub const INT_CONFIG: u32 = 2;

const DRIVER_OK: u32 = 4;
const FEATURES_OK: u32 = 8;
/// `DEVICE_NEEDS_RESET`.
pub const NEEDS_RESET: u32 = 64;

/// One queue's registers.
#[derive(Debug, Clone, Copy, Default)]
pub struct Queue {
    /// What the driver has set up.
    pub setup: QueueSetup,
    /// `QueueReady`.
    pub ready: bool,
}

/// What a write to a register asks for, beyond the register.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Effect {
    /// Nothing.
    None,
    /// `DRIVER_OK` was set: start the queues that are ready.
    Start,
    /// Status 0 was written: stop everything.
    Reset,
    /// `QueueReset` was written: stop this queue (2.6.1).
    ResetQueue(usize),
    /// A queue that was reset is ready again, in a device that runs.
    StartQueue(usize),
    /// `QueueNotify` was written and KVM did not catch it.
    Notify(u32),
    /// The configuration space was written.
    WriteConfig(u32, Vec<u8>),
}

/// The registers.
#[derive(Debug)]
pub struct Registers {
    id: u32,
    offered: u64,
    accepted: u64,
    device_features_sel: u32,
    driver_features_sel: u32,
    queue_sel: u32,
    max_size: u16,
    /// The queues.
    pub queues: Vec<Queue>,
    /// `Status`.
    pub status: u32,
    /// `ConfigGeneration`.
    pub generation: u32,
    /// `InterruptStatus`, but for [`INT_VRING`]: the back end interrupts past us, so that bit always reads as set.
    pub interrupts: u32,
}

impl Registers {
    /// A device as it is after power-on.
    pub fn new(id: u32, offered: u64, queues: usize, max_size: u16) -> Registers {
        Registers {
            id,
            offered,
            accepted: 0,
            device_features_sel: 0,
            driver_features_sel: 0,
            queue_sel: 0,
            max_size,
            queues: vec![Queue::default(); queues],
            status: 0,
            generation: 0,
            interrupts: 0,
        }
    }

    /// Features that both sides have agreed on.
    pub fn features(&self) -> u64 {
        self.accepted & self.offered
    }

    /// Whether the driver has set `DRIVER_OK`.
    pub fn is_running(&self) -> bool {
        self.status & DRIVER_OK != 0
    }

    fn queue(&self) -> Option<&Queue> {
        self.queues.get(self.queue_sel as usize)
    }

    fn half(value: u64, select: u32) -> u32 {
        match select {
            0 => value as u32,
            1 => (value >> 32) as u32,
            _ => 0,
        }
    }

    /// Reads a register, or a part of `config`.
    pub fn read(&self, offset: u64, config: &[u8], data: &mut [u8]) {
        if offset >= CONFIG {
            for (i, byte) in data.iter_mut().enumerate() {
                *byte = config.get((offset - CONFIG) as usize + i).copied().unwrap_or(0);
            }
            return;
        }
        let value = match offset {
            0x000 => MAGIC,
            0x004 => 2,
            0x008 => self.id,
            0x00c => VENDOR,
            0x010 => Self::half(self.offered, self.device_features_sel),
            0x034 => self.queue().map_or(0, |_| u32::from(self.max_size)),
            QUEUE_READY => self.queue().map_or(0, |queue| u32::from(queue.ready)),
            0x060 => self.interrupts | if self.is_running() { INT_VRING } else { 0 },
            0x070 => self.status,
            0x0fc => self.generation,
            _ => 0,
        };
        let bytes = value.to_le_bytes();
        data.iter_mut().zip(bytes).for_each(|(to, from)| *to = from);
    }

    /// Writes a register. Only whole ones are written (4.2.2.2).
    pub fn write(&mut self, offset: u64, data: &[u8]) -> Effect {
        if offset >= CONFIG {
            return Effect::WriteConfig((offset - CONFIG) as u32, data.to_vec());
        }
        let Ok(bytes) = data.try_into() else { return Effect::None };
        let value = u32::from_le_bytes(bytes);
        match offset {
            0x014 => self.device_features_sel = value,
            0x020 if self.status & FEATURES_OK == 0 => {
                let shift = 32 * self.driver_features_sel.min(1);
                self.accepted = self.accepted & !(0xffff_ffff << shift) | u64::from(value) << shift;
            }
            0x024 => self.driver_features_sel = value,
            0x030 => self.queue_sel = value,
            QUEUE_NOTIFY => return Effect::Notify(value),
            0x064 => self.interrupts &= !value,
            0x070 => return self.set_status(value),
            QUEUE_RESET if value == 1 && self.features() & RING_RESET != 0 => {
                let index = self.queue_sel as usize;
                if let Some(queue) = self.queues.get_mut(index) {
                    *queue = Queue::default();
                    return Effect::ResetQueue(index);
                }
            }
            QUEUE_READY => {
                let was_ready = self.queue().is_none_or(|queue| queue.ready);
                self.set_queue(offset, value);
                if !was_ready && value & 1 != 0 && self.is_running() {
                    return Effect::StartQueue(self.queue_sel as usize);
                }
            }
            _ => self.set_queue(offset, value),
        }
        Effect::None
    }

    fn set_status(&mut self, value: u32) -> Effect {
        if value == 0 {
            *self = Registers {
                generation: self.generation,
                ..Registers::new(self.id, self.offered, self.queues.len(), self.max_size)
            };
            return Effect::Reset;
        }
        let started = !self.is_running() && value & DRIVER_OK != 0;
        self.status = value | self.status & NEEDS_RESET;
        // A driver that accepts what is not offered does not get FEATURES_OK (3.1.1, step 5).
        if self.accepted & !self.offered != 0 {
            self.status &= !FEATURES_OK;
        }
        if started && self.status & FEATURES_OK != 0 { Effect::Start } else { Effect::None }
    }

    fn set_queue(&mut self, offset: u64, value: u32) {
        let max = u32::from(self.max_size);
        let Some(queue) = self.queues.get_mut(self.queue_sel as usize) else { return };
        let low = |old: u64| old & !0xffff_ffff | u64::from(value);
        let high = |old: u64| old & 0xffff_ffff | u64::from(value) << 32;
        let setup = &mut queue.setup;
        match offset {
            0x038 if value <= max => setup.size = value as u16,
            QUEUE_READY => queue.ready = value & 1 != 0,
            0x080 => setup.desc = low(setup.desc),
            0x084 => setup.desc = high(setup.desc),
            0x090 => setup.driver = low(setup.driver),
            0x094 => setup.driver = high(setup.driver),
            0x0a0 => setup.device = low(setup.device),
            0x0a4 => setup.device = high(setup.device),
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{Effect, Registers};

    fn write(registers: &mut Registers, offset: u64, value: u32) -> Effect {
        registers.write(offset, &value.to_le_bytes())
    }

    fn read(registers: &Registers, offset: u64) -> u32 {
        let mut data = [0; 4];
        registers.read(offset, &[1, 2, 3, 4], &mut data);
        u32::from_le_bytes(data)
    }

    #[test]
    fn a_driver_sets_a_device_up_and_resets_it() {
        let mut device = Registers::new(2, 1 << 32 | 3, 2, 256);
        assert_eq!([read(&device, 0), read(&device, 4), read(&device, 8)], [0x7472_6976, 2, 2]);
        for status in [1, 3] {
            assert_eq!(write(&mut device, 0x70, status), Effect::None);
        }
        write(&mut device, 0x14, 1);
        assert_eq!(read(&device, 0x10), 1);
        write(&mut device, 0x20, 2);
        write(&mut device, 0x24, 1);
        write(&mut device, 0x20, 1);
        write(&mut device, 0x70, 11);
        assert_eq!((read(&device, 0x70), device.features()), (11, 1 << 32 | 2));
        write(&mut device, 0x30, 1);
        assert_eq!(read(&device, 0x34), 256);
        for (offset, value) in [(0x38, 64), (0x80, 0x1000), (0x84, 1), (0x44, 1)] {
            write(&mut device, offset, value);
        }
        assert_eq!(write(&mut device, 0x70, 15), Effect::Start);
        assert_eq!(write(&mut device, 0x70, 15), Effect::None);
        let queue = device.queues[1];
        assert_eq!((queue.ready, queue.setup.size, queue.setup.desc), (true, 64, 0x1_0000_1000));
        assert!(!device.queues[0].ready);
        assert_eq!(read(&device, 0x100), 0x0403_0201);
        assert_eq!(write(&mut device, 0x70, 0), Effect::Reset);
        assert!(!device.queues[1].ready && device.features() == 0 && read(&device, 0x70) == 0);
    }

    #[test]
    fn features_that_are_not_offered_are_refused() {
        let mut device = Registers::new(2, 1 << 32, 1, 256);
        write(&mut device, 0x20, 1);
        write(&mut device, 0x70, 11);
        assert_eq!(read(&device, 0x70), 3);
    }

    #[test]
    fn odd_accesses_do_no_harm() {
        let mut device = Registers::new(2, 1 << 32, 1, 256);
        assert_eq!(device.write(0x70, &[1, 2]), Effect::None);
        write(&mut device, 0x30, 77);
        assert_eq!(read(&device, 0x34), 0);
        for offset in (0..0x100).step_by(4) {
            if offset != 0x70 {
                write(&mut device, offset, 0xffff_ffff);
            }
        }
        let mut data = [0xff; 8];
        device.read(0xffc, &[], &mut data);
        assert_eq!(data, [0; 8]);
    }
}
