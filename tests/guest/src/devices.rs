//! The devices, and the orders that set them up and take them down.

use alloc::vec::Vec;

use kickless_guest::{DeviceInfo, MAX_DEVICES, Order, failure, misdeed};
use vring::driver::DriverRing;

use crate::arena::Arena;
use crate::cpu::{self, Counters, LINES};
use crate::mailbox::Inbox;
use crate::misbehave::misbehave;
use crate::transport::{CONFIG_CHANGE, Place, Transport};

/// Virtio device type of a network card.
pub const NET: u32 = 1;
/// Virtio device type of a disk.
pub const BLOCK: u32 = 2;

/// One device.
pub struct Device {
    pub transport: Transport,
    pub info: DeviceInfo,
    /// The rings that run, by queue; those under load are elsewhere meanwhile.
    pub rings: Vec<DriverRing>,
    /// Where they lie.
    pub places: Vec<Place>,
    /// The order by which it was attached.
    pub attached: Order,
}

impl Device {
    /// Reads why the device has interrupted, and the configuration if that has changed.
    pub fn acknowledge(transport: Transport, info: &mut DeviceInfo) {
        if transport.acknowledge() & CONFIG_CHANGE != 0 {
            info.config_changes += 1;
            info.config = transport.config();
        }
    }
}

/// All devices, in the order of the command line.
pub struct Devices(Vec<Device>);

impl Devices {
    /// Looks for a device at each place.
    pub fn probe(places: impl Iterator<Item = (usize, u32)>) -> Devices {
        let device = |(base, line)| {
            let (transport, id) = Transport::probe(base, line)?;
            let info = DeviceInfo { id, config: transport.config(), ..DeviceInfo::default() };
            let (rings, places) = (Vec::new(), Vec::new());
            Some(Device { transport, info, rings, places, attached: Order::default() })
        };
        Devices(places.filter(|&(_, line)| line < LINES).filter_map(device).take(MAX_DEVICES).collect())
    }

    /// How many.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Shows the harness what is known of them.
    pub fn show(&self, inbox: &Inbox) {
        self.0.iter().enumerate().for_each(|(i, device)| inbox.show_device(i, &device.info));
    }

    /// The devices that an order is about, with their indices.
    pub fn named(&mut self, order: &Order) -> Result<Vec<(usize, &mut Device)>, u32> {
        let named = |i: usize| order.devices >> i & 1 != 0;
        if order.devices == 0 || (self.0.len()..MAX_DEVICES).any(named) {
            return Err(failure::NO_DEVICE);
        }
        Ok(self.0.iter_mut().enumerate().filter(|&(i, _)| named(i)).collect())
    }

    /// A device by its index.
    pub fn get(&mut self, index: usize) -> &mut Device {
        &mut self.0[index]
    }

    /// Negotiates with a device and starts its queues, whose rings keep the order's memory.
    pub fn attach(&mut self, order: &Order, cpus: usize) -> Result<(), u32> {
        let [(_, device)] = &mut self.named(order)?[..] else { return Err(failure::ORDER) };
        device.attach(*order, cpus)
    }

    /// Resets the devices.
    pub fn reset(&mut self, order: &Order) -> Result<(), u32> {
        for (_, device) in self.named(order)? {
            device.rings.clear();
            device.info.queues = 0;
            device.transport.reset();
        }
        Ok(())
    }

    /// Misbehaves on every queue; `order.requests` times where that makes sense.
    pub fn misbehave(&mut self, order: &Order, cpus: usize) -> Result<(), u32> {
        for (_, device) in self.named(order)? {
            for _ in 0..order.requests.max(1) {
                let mut arena = Arena::new(order.arena, order.arena_size);
                if device.rings.is_empty() {
                    return Err(failure::QUEUE);
                }
                for (queue, ring) in device.rings.iter_mut().enumerate() {
                    misbehave(ring, order, &mut arena).ok_or(failure::MEMORY)?;
                    ring.publish();
                    device.transport.notify(queue as u32);
                }
                if order.misdeed == misdeed::RESET_IN_FLIGHT {
                    device.attach(device.attached, cpus)?;
                }
            }
        }
        Ok(())
    }

    /// Waits until each device has announced more than `order.requests` changes of its configuration.
    pub fn await_config(&mut self, order: &Order, cpus: usize) -> Result<(), u32> {
        let counters = Counters::of(0);
        for (_, device) in self.named(order)? {
            // Only this CPU's interrupts are watched here.
            cpu::route(device.transport.line, Some(cpu::apic_id()));
            loop {
                let total = counters.total();
                Device::acknowledge(device.transport, &mut device.info);
                if device.info.config_changes > order.requests {
                    break;
                }
                cpu::sleep(total);
            }
            device.route(cpus);
        }
        Ok(())
    }
}

impl Device {
    /// Negotiates and starts queues, from the beginning.
    pub fn attach(&mut self, order: Order, cpus: usize) -> Result<(), u32> {
        self.attached = order;
        let mut arena = Arena::new(order.arena, order.arena_size);
        self.rings.clear();
        self.info.queues = 0;
        self.info.features = self.transport.negotiate(order.features)?;
        self.info.config = self.transport.config();
        self.route(cpus);
        let started = self.transport.start(self.info.features, order.queues, order.ring_size, &mut arena)?;
        (self.rings, self.places) = started.into_iter().unzip();
        self.info.queues = self.rings.len() as u32;
        Ok(())
    }

    /// One line for all queues, whichever CPU has them.
    fn route(&self, cpus: usize) {
        cpu::route(self.transport.line, if cpus == 1 { Some(cpu::apic_id()) } else { None });
    }
}
