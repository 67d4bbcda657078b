//! Carries an order's load out, on all CPUs: queue by queue they are dealt out to them.

use alloc::boxed::Box;
use alloc::vec::Vec;
use core::ptr;
use core::sync::atomic::{AtomicPtr, Ordering};

use kickless_guest::{DeviceInfo, LaneReport, MAX_CPUS, MAX_LANES, Order, Report, failure, kind, wait};
use vring::driver::DriverRing;

use crate::arena::Arena;
use crate::block::BlockLane;
use crate::cpu::{self, Counters};
use crate::devices::{BLOCK, Device, Devices, NET};
use crate::mailbox;
use crate::net::{EchoLane, forget_ends};
use crate::transport::Transport;

enum Lane {
    Block(Box<BlockLane>),
    Echo(Box<EchoLane>),
}

impl Lane {
    fn begin(&mut self) {
        match self {
            Lane::Block(lane) => lane.begin(),
            Lane::Echo(lane) => lane.begin(),
        }
    }

    fn turn(&mut self, stop: bool) -> Option<u64> {
        match self {
            Lane::Block(lane) => lane.turn(stop),
            Lane::Echo(lane) => lane.turn(stop),
        }
    }

    fn finished(&self, stop: bool) -> bool {
        match self {
            Lane::Block(lane) => lane.finished(stop),
            Lane::Echo(lane) => lane.finished(),
        }
    }

    fn ring(&mut self) -> &mut DriverRing {
        match self {
            Lane::Block(lane) => lane.ring(),
            Lane::Echo(lane) => lane.ring(),
        }
    }

    /// What has been done, and the rings by queue.
    fn end(self) -> (LaneReport, Vec<DriverRing>) {
        match self {
            Lane::Block(lane) => {
                let (ring, report) = lane.end();
                (report, Vec::from([ring]))
            }
            Lane::Echo(lane) => {
                let (receive, transmit, report) = lane.end();
                (report, Vec::from([receive, transmit]))
            }
        }
    }
}

/// The share of one CPU.
struct Work {
    lanes: Vec<Lane>,
    /// The devices of these lanes, with the interrupts of their lines that have been dealt with.
    devices: Vec<(Transport, DeviceInfo, usize, u32)>,
    wait: u32,
    end: Option<u64>,
    sleeps: u64,
}

impl Work {
    fn run(&mut self, cpu: usize) {
        let counters = Counters::of(cpu);
        self.lanes.iter_mut().for_each(Lane::begin);
        loop {
            let total = counters.total();
            if self.wait == wait::EVERY {
                self.acknowledge(counters);
            }
            let stop = self.end.is_some_and(|end| cpu::ticks() >= end || mailbox::is_told_to_stop());
            let (mut worked, mut open) = (false, false);
            for lane in &mut self.lanes {
                if let Some(completed) = lane.turn(stop) {
                    worked = true;
                    if completed != 0 {
                        mailbox::progress(completed);
                    }
                }
                open |= !lane.finished(stop);
            }
            if !open {
                break;
            }
            match self.wait {
                wait::EVERY => self.await_interrupt(counters, total),
                _ if worked => {}
                wait::POLL => core::hint::spin_loop(),
                _ => self.sleep(counters),
            }
        }
        self.acknowledge(counters);
    }

    /// Sleeps until there may be something to do. Whatever comes after `total` is read ends the sleep at once, so the
    /// order of these steps is what no wake-up is lost by (virtio 1.3, 2.7.7).
    fn sleep(&mut self, counters: Counters) {
        let total = counters.total();
        self.acknowledge(counters);
        let mut ready = false;
        for lane in &mut self.lanes {
            ready |= lane.ring().set_interrupts(true);
        }
        if !ready {
            cpu::sleep(total);
            self.sleeps += 1;
        }
        self.acknowledge(counters);
        self.lanes.iter_mut().for_each(|lane| {
            lane.ring().set_interrupts(false);
        });
    }

    /// Does not look at the rings before an interrupt has come.
    fn await_interrupt(&mut self, counters: Counters, total: u32) {
        while counters.total() == total {
            cpu::sleep(total);
            self.sleeps += 1;
        }
    }

    fn acknowledge(&mut self, counters: Counters) {
        for (transport, info, _, seen) in &mut self.devices {
            let now = counters.line(transport.line);
            if now != *seen {
                *seen = now;
                Device::acknowledge(*transport, info);
            }
        }
    }
}

static WORK: [AtomicPtr<Work>; MAX_CPUS] = [const { AtomicPtr::new(ptr::null_mut()) }; MAX_CPUS];
static DONE: [AtomicPtr<Work>; MAX_CPUS] = [const { AtomicPtr::new(ptr::null_mut()) }; MAX_CPUS];

/// What the other CPUs do: wait for their share, and do it.
pub fn serve(cpu: usize) -> ! {
    let counters = Counters::of(cpu);
    loop {
        let total = counters.total();
        let work = WORK[cpu].swap(ptr::null_mut(), Ordering::AcqRel);
        // SAFETY: from Box::into_raw in `run`, and taken by nobody else.
        if let Some(work) = unsafe { work.as_mut() } {
            work.run(cpu);
            DONE[cpu].store(work, Ordering::Release);
        } else {
            cpu::sleep(total);
        }
    }
}

/// Loads the queues of the order's devices and reports.
pub fn run(devices: &mut Devices, order: &Order, cpus: usize, report: &mut Report) -> Result<(), u32> {
    let mut arena = Arena::new(order.arena, order.arena_size);
    let end = (order.requests == 0).then(|| cpu::ticks() + order.ticks);
    let mut shares: Vec<Work> = (0..cpus)
        .map(|_| Work { lanes: Vec::new(), devices: Vec::new(), wait: order.wait, end, sleeps: 0 })
        .collect();
    // By device; of two, each is the other's.
    let mut peers: Vec<u64> = devices.named(order)?.iter().map(|(_, device)| device.info.config).collect();
    if order.kind == kind::EXCHANGE {
        if peers.len() != 2 {
            return Err(failure::ORDER);
        }
        peers.swap(0, 1);
    }
    forget_ends();
    let mut lanes = 0;
    for ((index, device), peer) in devices.named(order)?.into_iter().zip(peers) {
        for lane in prepare(device, index, order, &mut arena, lanes, peer)? {
            let cpu = lanes % cpus;
            let share = &mut shares[cpu];
            if share.devices.iter().all(|&(_, _, known, _)| known != index) {
                let seen = Counters::of(cpu).line(device.transport.line);
                let info = DeviceInfo { config_changes: 0, ..device.info };
                share.devices.push((device.transport, info, index, seen));
            }
            share.lanes.push(lane);
            lanes += 1;
        }
    }
    let mut done = Vec::new();
    for share in work_together(shares) {
        report.sleeps += share.sleeps;
        for (_, info, index, _) in share.devices {
            let known = &mut devices.get(index).info;
            if info.config_changes != 0 {
                known.config_changes += info.config_changes;
                known.config = info.config;
            }
        }
        done.extend(share.lanes.into_iter().map(Lane::end));
    }
    done.sort_unstable_by_key(|(lane, _)| (lane.device, lane.queue));
    report.lanes = done.len() as u32;
    for (i, (lane, rings)) in done.into_iter().enumerate() {
        report.lane[i] = lane;
        devices.get(lane.device as usize).rings.extend(rings);
    }
    if order.kind != kind::BLOCK {
        // Receive buffers stay with the device until it is reset.
        for (_, device) in devices.named(order)? {
            device.attach(device.attached, cpus)?;
        }
    }
    Ok(())
}

/// Takes the rings of a device into lanes, which are numbered from `first`. A device for which that fails has to be
/// attached again.
fn prepare(
    device: &mut Device,
    index: usize,
    order: &Order,
    arena: &mut Arena,
    first: usize,
    peer: u64,
) -> Result<Vec<Lane>, u32> {
    if device.info.id != if order.kind == kind::BLOCK { BLOCK } else { NET } {
        return Err(failure::NO_DEVICE);
    }
    if device.rings.is_empty() {
        return Err(failure::QUEUE);
    }
    let mut rings = core::mem::take(&mut device.rings).into_iter();
    let mut lanes = Vec::new();
    while let Some(ring) = rings.next() {
        let queue = lanes.len() as u32;
        let number = first + lanes.len();
        if number >= MAX_LANES {
            return Err(failure::ORDER);
        }
        let Device { transport, info, .. } = *device;
        lanes.push(if order.kind == kind::BLOCK {
            // Each queue has a part of the disk to itself.
            let own = Order { offset: order.offset + u64::from(queue) * order.span, ..*order };
            let who = (index as u32, queue);
            let ring = (ring, device.places[queue as usize]);
            Lane::Block(Box::new(BlockLane::new(ring, transport, info.features, &own, number, arena, who)?))
        } else {
            let transmit = rings.next().ok_or(failure::QUEUE)?;
            let places = [0, 1].map(|i| device.places[2 * queue as usize + i]);
            if order.reset_every != 0 && !Transport::has_ring_reset(info.features) {
                return Err(failure::FEATURES);
            }
            let who = (index as u32, queue);
            // An echo is for the device's own address, and from it as well: whoever sends it back need not change it.
            let addresses = (info.config, peer);
            Lane::Echo(Box::new(EchoLane::new(
                ([ring, transmit], places),
                transport,
                order,
                number,
                arena,
                who,
                addresses,
            )?))
        });
    }
    Ok(lanes)
}

/// Each CPU does its share; this one is the first.
fn work_together(mut shares: Vec<Work>) -> Vec<Work> {
    let others = shares.split_off(1);
    let mut sent = 0;
    for (i, share) in others.into_iter().enumerate() {
        WORK[i + 1].store(Box::into_raw(Box::new(share)), Ordering::Release);
        sent += 1;
    }
    if sent != 0 {
        cpu::wake_others();
    }
    shares[0].run(0);
    for done in &DONE[1..=sent] {
        loop {
            let work = done.swap(ptr::null_mut(), Ordering::AcqRel);
            if !work.is_null() {
                // SAFETY: from Box::into_raw above, given back by `serve`.
                shares.push(*unsafe { Box::from_raw(work) });
                break;
            }
            core::hint::spin_loop();
        }
    }
    shares
}
