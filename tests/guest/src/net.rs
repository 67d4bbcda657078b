//! Load on one pair of queues of a network device (virtio 1.3, 5.1): packets are sent, and expected to come back, or
//! others in their place from the device that they are for.

use alloc::vec;
use alloc::vec::Vec;

use kickless_guest::{LaneReport, Order, failure, wait};
use vring::driver::{Buffer, DriverRing};

use crate::arena::{Arena, Piece};
use crate::block::Samples;
use crate::cpu;
use crate::transport::Transport;

/// `struct virtio_net_hdr` with `num_buffers`, as `VIRTIO_F_VERSION_1` has it.
const HEADER: usize = 12;
/// Addresses and type of an Ethernet frame.
const ETHERNET: usize = 14;
/// Ours, within the frame: number and time.
const STAMP: usize = 16;
/// The EtherType for local experiments (IEEE 802).
const ETHER_TYPE: u16 = 0x88b5;
const SMALLEST: u32 = 60;

/// A pair of queues under load.
pub struct EchoLane {
    receive: DriverRing,
    transmit: DriverRing,
    transport: Transport,
    order: Order,
    pair: u32,
    /// Buffers by index; the second half of them are for transmission.
    receive_buffers: Vec<Piece>,
    transmit_buffers: Vec<Piece>,
    receive_by_head: Vec<u16>,
    transmit_by_head: Vec<u16>,
    free: Vec<u16>,
    from: u64,
    to: u64,
    sent: u64,
    samples: Samples,
    report: LaneReport,
}

impl EchoLane {
    /// Prepares lane `index`; the rings are the pair's receive and transmit queue.
    pub fn new(
        (receive, transmit): (DriverRing, DriverRing),
        transport: Transport,
        order: &Order,
        index: usize,
        arena: &mut Arena,
        (device, pair): (u32, u32),
        (from, to): (u64, u64),
    ) -> Result<EchoLane, u32> {
        let depth =
            (order.depth.max(1) as usize).min(usize::from(receive.size())).min(usize::from(transmit.size()));
        if order.block_size < SMALLEST {
            return Err(failure::ORDER);
        }
        let len = HEADER + order.block_size as usize;
        let mut buffers = || (0..depth).map(|_| arena.take(len, 64)).collect::<Option<Vec<_>>>();
        let receive_buffers = buffers().ok_or(failure::MEMORY)?;
        let transmit_buffers = buffers().ok_or(failure::MEMORY)?;
        let by_head = |ring: &DriverRing| vec![0; usize::from(ring.size())];
        let mut lane = EchoLane {
            receive_by_head: by_head(&receive),
            transmit_by_head: by_head(&transmit),
            receive,
            transmit,
            transport,
            order: *order,
            pair,
            receive_buffers,
            transmit_buffers,
            free: (0..depth as u16).rev().collect(),
            from,
            to,
            sent: 0,
            samples: Samples::new(order, index),
            report: LaneReport { device, queue: pair, first_bad: u64::MAX, ..LaneReport::default() },
        };
        for index in 0..depth as u16 {
            lane.post(index);
        }
        lane.notify_receive();
        Ok(lane)
    }

    /// The rings, and what has been done.
    pub fn end(self) -> (DriverRing, DriverRing, LaneReport) {
        (self.receive, self.transmit, self.report)
    }

    fn post(&mut self, index: u16) {
        let piece = &self.receive_buffers[usize::from(index)];
        let len = (HEADER + self.order.block_size as usize) as u32;
        let head = self.receive.add(&[Buffer { addr: piece.address(), len, writable: true }]);
        self.receive_by_head[usize::from(head.expect("a buffer for each descriptor at most"))] = index;
    }

    fn notify_receive(&mut self) {
        if self.receive.publish() {
            self.transport.notify(2 * self.pair);
            self.report.kicks += 1;
        }
    }

    /// Suppresses interrupts or asks for them. Those of transmission are of no use.
    pub fn begin(&mut self) {
        self.transmit.set_interrupts(false);
        self.receive.set_interrupts(self.order.wait == wait::EVERY);
    }

    /// The ring that completions to wait for come on.
    pub fn ring(&mut self) -> &mut DriverRing {
        &mut self.receive
    }

    /// Whether all that was sent has come back.
    pub fn finished(&self, stop: bool) -> bool {
        self.report.requests == self.sent && self.all_sent(stop)
    }

    fn all_sent(&self, stop: bool) -> bool {
        stop || (self.order.requests != 0 && self.sent >= self.order.requests)
    }

    /// Takes what has arrived and sends what there is room for. The number of packets taken, if anything was done.
    pub fn turn(&mut self, stop: bool) -> Option<u64> {
        let mut arrived = 0;
        loop {
            let finished = self.receive.finished();
            let now = cpu::ticks();
            for _ in 0..finished {
                let Some((head, len)) = self.receive.collect() else { break };
                let index = self.receive_by_head[usize::from(head)];
                self.check(index, len, now);
                self.post(index);
            }
            arrived += u64::from(finished);
            // As for blocks.
            if self.order.wait != wait::EVERY || !self.receive.set_interrupts(true) {
                break;
            }
        }
        if arrived != 0 {
            self.notify_receive();
        }
        while let Some((head, _)) = self.transmit.collect() {
            self.free.push(self.transmit_by_head[usize::from(head)]);
        }
        let mut sent = false;
        // What is on its way finds a buffer when it comes back.
        while !self.all_sent(stop)
            && self.sent.saturating_sub(self.report.requests) < self.receive_buffers.len() as u64
            && let Some(index) = self.free.pop()
        {
            self.send(index);
            sent = true;
        }
        if sent && self.transmit.publish() {
            self.transport.notify(2 * self.pair + 1);
            self.report.kicks += 1;
        }
        (sent || arrived != 0).then_some(arrived)
    }

    fn send(&mut self, index: u16) {
        let piece = &self.transmit_buffers[usize::from(index)];
        let len = self.order.block_size as usize;
        piece.put(0, [0u8; HEADER]);
        for (at, mac) in [(HEADER, self.to), (HEADER + 6, self.from)] {
            mac.to_le_bytes().iter().take(6).enumerate().for_each(|(i, &byte)| piece.put(at + i, byte));
        }
        piece.put(HEADER + 12, ETHER_TYPE.to_be());
        let number = self.sent;
        piece.put(HEADER + ETHERNET, number.to_le());
        for i in STAMP..len - ETHERNET {
            piece.put(HEADER + ETHERNET + i, self.byte(number, i));
        }
        piece.put(HEADER + ETHERNET + 8, cpu::ticks());
        let head = self.transmit.add(&[Buffer {
            addr: piece.address(),
            len: (HEADER + len) as u32,
            writable: false,
        }]);
        self.transmit_by_head[usize::from(head.expect("a buffer for each descriptor at most"))] = index;
        self.sent += 1;
    }

    fn byte(&self, number: u64, index: usize) -> u8 {
        (number.wrapping_mul(31).wrapping_add(self.order.seed) as u8).wrapping_add(index as u8)
    }

    fn check(&mut self, index: u16, used: u32, now: u64) {
        let piece = self.receive_buffers[usize::from(index)];
        let len = self.order.block_size as usize;
        let number = u64::from_le(piece.get(HEADER + ETHERNET));
        let good = used as usize == HEADER + len
            && piece.get::<u16>(HEADER + 12) == ETHER_TYPE.to_be()
            // None is lost, none overtakes another.
            && number == self.report.requests
            && (STAMP..len - ETHERNET)
                .all(|i| piece.get::<u8>(HEADER + ETHERNET + i) == self.byte(number, i));
        self.report.requests += 1;
        self.report.mismatches += u64::from(!good);
        if good {
            let sent: u64 = piece.get(HEADER + ETHERNET + 8);
            self.samples.record(&mut self.report, now.wrapping_sub(sent));
        } else {
            self.report.first_bad = self.report.first_bad.min(number);
        }
    }
}
