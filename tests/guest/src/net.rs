//! Load on one pair of queues of a network device (virtio 1.3, 5.1): packets are sent, and expected to come back, or
//! others in their place from the device that they are for.

use alloc::vec;
use alloc::vec::Vec;
use core::sync::atomic::{AtomicU64, Ordering};

use kickless_guest::{GIVES_UP, LaneReport, MAX_LANES, Order, failure, wait};
use vring::driver::{Buffer, DriverRing};

use crate::arena::{Arena, Piece};
use crate::block::Samples;
use crate::cpu;
use crate::transport::{Place, Transport};

/// `struct virtio_net_hdr` with `num_buffers`, as `VIRTIO_F_VERSION_1` has it.
const HEADER: usize = 12;
/// Addresses and type of an Ethernet frame.
const ETHERNET: usize = 14;
/// Ours, within the frame: number and time.
const STAMP: usize = 16;
/// The EtherType for local experiments (IEEE 802).
const ETHER_TYPE: u16 = 0x88b5;
const SMALLEST: u32 = 60;

/// By pair: packets that each of its lanes sends, in a load that has been told to stop; 0 in one that has not.
static ENDS: [AtomicU64; MAX_LANES] = [const { AtomicU64::new(0) }; MAX_LANES];

/// Before a load begins.
pub fn forget_ends() {
    for end in &ENDS {
        end.store(0, Ordering::Relaxed);
    }
}

/// A pair of queues under load.
pub struct EchoLane {
    receive: DriverRing,
    transmit: DriverRing,
    /// Where the two are set up again after a reset.
    places: [Place; 2],
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
    /// When the last packet came, or another one was sent in its place, and when the last one came.
    heard: u64,
    last: u64,
    /// Packets sent when queues were reset last.
    reset_at: u64,
    /// Packets to be sent in all, once that is known.
    last_one: Option<u64>,
    samples: Samples,
    report: LaneReport,
}

impl EchoLane {
    /// Prepares lane `index`; the rings are the pair's receive and transmit queue.
    pub fn new(
        ([receive, transmit], places): ([DriverRing; 2], [Place; 2]),
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
            places,
            transport,
            order: *order,
            pair,
            receive_buffers,
            transmit_buffers,
            free: (0..depth as u16).rev().collect(),
            from,
            to,
            sent: 0,
            heard: cpu::ticks(),
            last: cpu::ticks(),
            reset_at: 0,
            last_one: (order.requests != 0).then_some(order.requests),
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
    pub fn end(mut self) -> (DriverRing, DriverRing, LaneReport) {
        self.report.missing += self.sent.saturating_sub(self.report.requests);
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
    pub fn finished(&self) -> bool {
        self.all_sent() && (self.report.requests == self.sent || self.gives_up())
    }

    /// Whether nothing more is expected.
    fn gives_up(&self) -> bool {
        let patience = self.order.patience;
        patience != 0 && cpu::ticks().wrapping_sub(self.last) > GIVES_UP * patience
    }

    fn all_sent(&self) -> bool {
        self.last_one.is_some_and(|last| self.sent >= last)
    }

    /// Two that exchange packets must send as many each: who is told to stop first sets the number, which is beyond what
    /// the other, who is ahead by its buffers at most, can have sent.
    fn agree_on_the_end(&mut self) {
        let mine = self.sent + 4 * self.receive_buffers.len() as u64;
        let agreed = ENDS[self.pair as usize % MAX_LANES].compare_exchange(
            0,
            mine,
            Ordering::AcqRel,
            Ordering::Acquire,
        );
        self.last_one = Some(agreed.err().unwrap_or(mine));
    }

    /// Takes what has arrived and sends what there is room for. The number of packets taken, if anything was done.
    pub fn turn(&mut self, stop: bool) -> Option<u64> {
        let mut arrived = 0;
        if stop && self.last_one.is_none() {
            self.agree_on_the_end();
        }
        let every = u64::from(self.order.reset_every);
        if every != 0 && self.sent - self.reset_at >= every {
            arrived += self.reset();
        }
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
            self.last = cpu::ticks();
            self.heard = self.last;
        }
        self.collect_sent();
        let mut one_more = self.has_waited_enough();
        let mut sent = false;
        // What is on its way finds a buffer when it comes back.
        while !self.all_sent()
            && (self.sent.saturating_sub(self.report.requests) < self.receive_buffers.len() as u64
                || core::mem::take(&mut one_more))
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

    fn collect_sent(&mut self) {
        while let Some((head, _)) = self.transmit.collect() {
            self.free.push(self.transmit_by_head[usize::from(head)]);
        }
    }

    /// Whether to send one more, for want of packets that may be lost.
    fn has_waited_enough(&mut self) -> bool {
        let (now, patience) = (cpu::ticks(), self.order.patience);
        let enough = patience != 0 && now.wrapping_sub(self.heard) > patience;
        if enough {
            self.heard = now;
        }
        enough
    }

    /// Resets both queues with packets in flight, one after the other, and goes on with what the device had not taken. The
    /// number of packets that had come.
    fn reset(&mut self) -> u64 {
        self.reset_at = self.sent;
        self.report.resets += 1;
        self.transport.reset_queue(2 * self.pair + 1);
        let before = self.free.len();
        self.collect_sent();
        self.report.drained += (self.free.len() - before) as u64;
        let mut open: Vec<u16> =
            (0..self.transmit_buffers.len() as u16).filter(|index| !self.free.contains(index)).collect();
        open.sort_unstable_by_key(|&index| {
            self.transmit_buffers[usize::from(index)].get::<u64>(HEADER + ETHERNET)
        });
        self.transmit = self.transport.restart_queue(2 * self.pair + 1, &self.places[1]);
        self.report.untaken += open.len() as u64;
        for index in open {
            self.offer(index);
        }

        self.transport.reset_queue(2 * self.pair);
        let (mut arrived, now) = (0, cpu::ticks());
        while let Some((head, len)) = self.receive.collect() {
            self.check(self.receive_by_head[usize::from(head)], len, now);
            arrived += 1;
        }
        self.receive = self.transport.restart_queue(2 * self.pair, &self.places[0]);
        (0..self.receive_buffers.len() as u16).for_each(|index| self.post(index));
        self.begin();
        self.notify_receive();
        if self.transmit.publish() {
            self.transport.notify(2 * self.pair + 1);
        }
        arrived
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
        self.offer(index);
        self.sent += 1;
    }

    /// Makes a packet available.
    fn offer(&mut self, index: u16) {
        let addr = self.transmit_buffers[usize::from(index)].address();
        let len = HEADER as u32 + self.order.block_size;
        let head = self.transmit.add(&[Buffer { addr, len, writable: false }]);
        self.transmit_by_head[usize::from(head.expect("a buffer for each descriptor at most"))] = index;
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
            && (number == self.report.requests || self.order.patience != 0)
            && (STAMP..len - ETHERNET)
                .all(|i| piece.get::<u8>(HEADER + ETHERNET + i) == self.byte(number, i));
        if good && number < self.report.requests {
            self.report.repeated += 1;
            return;
        }
        if good {
            self.report.missing += number - self.report.requests;
            self.report.requests = number;
        }
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
