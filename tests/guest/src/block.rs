//! Load on one queue of a block device (virtio 1.3, 5.2).

use alloc::vec;
use alloc::vec::Vec;

use kickless_guest::{LaneReport, Order, failure, op, verify, wait};
use vring::driver::{Buffer, DriverRing};

use crate::arena::{Arena, Piece};
use crate::cpu;
use crate::transport::{Place, Transport};

const SECTOR: u64 = 512;
const STATUS_OK: u8 = 0;

/// Latencies, the latest kept.
pub struct Samples {
    piece: Option<Piece>,
    room: u64,
}

impl Samples {
    /// Room for `order.samples_each` of lane `index`.
    pub fn new(order: &Order, index: usize) -> Samples {
        let room = u64::from(order.samples_each);
        let bytes = room * 4;
        let piece = (order.samples != 0 && room != 0)
            .then(|| Arena::new(order.samples + index as u64 * bytes, bytes).take(bytes as usize, 4))
            .flatten();
        Samples { piece, room }
    }

    /// Records one.
    #[inline]
    pub fn record(&self, report: &mut LaneReport, ticks: u64) {
        if let Some(piece) = &self.piece {
            piece.put(
                (report.samples % self.room * 4) as usize,
                u32::try_from(ticks).unwrap_or(u32::MAX).to_le(),
            );
            report.samples += 1;
        }
        report.longest = report.longest.max(ticks);
    }
}

/// A request in flight, or room for one.
struct Slot {
    /// Header, table and status, a cache line each.
    control: Piece,
    data: Piece,
    op: u32,
    block: u64,
    started: u64,
}

const HEADER: usize = 0;
const TABLE: usize = 64;
const STATUS: usize = 128;

/// One queue under load. In random order slot `s` only touches blocks that are `s` modulo the depth, so that no two
/// requests in flight meet, and what a read must find is always known.
pub struct BlockLane {
    ring: DriverRing,
    place: Place,
    /// Requests that had been issued at the last reset of the queue.
    reset_at: u64,
    transport: Transport,
    order: Order,
    slots: Vec<Slot>,
    free: Vec<u16>,
    by_head: Vec<u16>,
    /// How often each block has been written, where contents are verified.
    generations: Vec<u8>,
    blocks_each: u64,
    random: u64,
    issued: u64,
    /// Where blocks come one after the other: the next.
    next_block: u64,
    writes_since_flush: u32,
    indirect: bool,
    samples: Samples,
    report: LaneReport,
}

impl BlockLane {
    /// Prepares lane `index` of the order. The ring comes back by [`BlockLane::end`].
    pub fn new(
        (ring, place): (DriverRing, Place),
        transport: Transport,
        features: u64,
        order: &Order,
        index: usize,
        arena: &mut Arena,
        (device, queue): (u32, u32),
    ) -> Result<BlockLane, u32> {
        if order.reset_every != 0 && !Transport::has_ring_reset(features) {
            return Err(failure::FEATURES);
        }
        let size = usize::from(ring.size());
        let indirect = order.indirect != 0 && Transport::has_indirect(features);
        let per_request = if indirect { 1 } else { 3 };
        let depth = (order.depth.max(1) as usize).min(size / per_request);
        let block_size = order.block_size as usize;
        let blocks_each = order.span / u64::from(order.block_size.max(1)) / depth as u64;
        if block_size == 0 || !block_size.is_multiple_of(SECTOR as usize) || blocks_each == 0 {
            return Err(failure::ORDER);
        }
        let mut slots = Vec::new();
        for _ in 0..depth {
            let control = arena.take(192, 64).ok_or(failure::MEMORY)?;
            let data = arena.take(block_size.max(16), 4096).ok_or(failure::MEMORY)?;
            slots.push(Slot { control, data, op: op::READ, block: 0, started: 0 });
        }
        let verified = if order.verify == verify::STAMPS { blocks_each as usize * depth } else { 0 };
        Ok(BlockLane {
            ring,
            place,
            reset_at: 0,
            transport,
            order: *order,
            free: (0..depth as u16).rev().collect(),
            by_head: vec![0; size],
            slots,
            generations: vec![0; verified],
            blocks_each,
            random: (order.seed ^ (index as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15)) | 1,
            issued: 0,
            next_block: 0,
            writes_since_flush: 0,
            indirect,
            samples: Samples::new(order, index),
            report: LaneReport { device, queue, first_bad: u64::MAX, ..LaneReport::default() },
        })
    }

    /// The ring, and what has been done.
    pub fn end(self) -> (DriverRing, LaneReport) {
        (self.ring, self.report)
    }

    /// The ring.
    pub fn ring(&mut self) -> &mut DriverRing {
        &mut self.ring
    }

    /// Whether all that was to be done is done.
    pub fn finished(&self, stop: bool) -> bool {
        self.free.len() == self.slots.len() && self.all_issued(stop)
    }

    fn all_issued(&self, stop: bool) -> bool {
        stop || (self.order.requests != 0 && self.issued >= self.order.requests)
    }

    /// Collects what is finished and issues what there is room for. The number of completions, if anything was done.
    pub fn turn(&mut self, stop: bool) -> Option<u64> {
        let mut completed = 0;
        loop {
            let finished = self.ring.finished();
            let now = cpu::ticks();
            for _ in 0..finished {
                let Some((head, _)) = self.ring.collect() else { break };
                self.complete(self.by_head[usize::from(head)], now);
            }
            completed += u64::from(finished);
            // Before waiting for an interrupt without looking: what finished before the device was told where to
            // interrupt next (virtio 1.3, 2.7.7.2).
            if self.order.wait != wait::EVERY || !self.ring.set_interrupts(true) {
                break;
            }
        }
        let mut issued = false;
        while !self.all_issued(stop)
            && let Some(slot) = self.free.pop()
        {
            self.issue(slot);
            issued = true;
        }
        if issued && self.ring.publish() {
            self.transport.notify(self.report.queue);
            self.report.kicks += 1;
        }
        let every = u64::from(self.order.reset_every);
        if issued && every != 0 && self.issued - self.reset_at >= every {
            completed += self.reset();
        }
        (issued || completed != 0).then_some(completed)
    }

    /// Resets the queue with requests in flight, and goes on with what the device had not taken. The number of completions.
    fn reset(&mut self) -> u64 {
        let queue = self.report.queue;
        self.reset_at = self.issued;
        self.transport.reset_queue(queue);
        let mut open = vec![true; self.slots.len()];
        let mut drained = 0;
        let now = cpu::ticks();
        while let Some((head, _)) = self.ring.collect() {
            self.complete(self.by_head[usize::from(head)], now);
            drained += 1;
        }
        self.free.iter().for_each(|&slot| open[usize::from(slot)] = false);
        self.ring = self.transport.restart_queue(queue, &self.place);
        self.begin();
        self.report.resets += 1;
        self.report.drained += drained;
        for slot in (0..self.slots.len() as u16).filter(|&slot| open[usize::from(slot)]) {
            self.report.untaken += 1;
            self.submit(slot);
        }
        if self.ring.publish() {
            self.transport.notify(queue);
        }
        drained
    }

    fn next_random(&mut self) -> u64 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        self.random
    }

    fn choose_op(&mut self, block: u64) -> u32 {
        if self.order.flush_every != 0 && self.writes_since_flush >= self.order.flush_every {
            self.writes_since_flush = 0;
            return op::FLUSH;
        }
        if self.order.op != op::MIX {
            return self.order.op;
        }
        // What has never been written cannot be verified.
        let unwritten = self.generations.get(block as usize) == Some(&0);
        let write = unwritten || self.next_random() % 100 < u64::from(self.order.write_percent);
        if write { op::WRITE } else { op::READ }
    }

    fn issue(&mut self, index: u16) {
        let depth = self.slots.len() as u64;
        let block = match self.order.random {
            0 => self.next_block % (self.blocks_each * depth),
            _ => u64::from(index) + depth * (self.next_random() % self.blocks_each),
        };
        let op = self.choose_op(block);
        self.next_block += u64::from(op != op::FLUSH);
        let sector = (self.order.offset + block * u64::from(self.order.block_size)) / SECTOR;
        let slot = &mut self.slots[usize::from(index)];
        slot.op = op;
        slot.block = block;
        slot.control.put(HEADER, op.to_le());
        slot.control.put(HEADER + 4, 0u32);
        slot.control.put(HEADER + 8, if op == op::FLUSH { 0 } else { sector.to_le() });
        slot.control.put(STATUS, 0xffu8);
        if matches!(op, op::DISCARD | op::WRITE_ZEROES) {
            slot.data.put(0, sector.to_le());
            slot.data.put(8, (self.order.block_size / SECTOR as u32).to_le());
            slot.data.put(12, 0u32);
        }
        if op == op::WRITE {
            self.writes_since_flush += 1;
            if self.order.verify == verify::STAMPS {
                let generation = &mut self.generations[block as usize];
                *generation = generation.checked_add(1).unwrap_or(1);
                stamp(&slot.data, self.order.block_size, sector, self.order.seed, *generation);
            }
        } else if op == op::READ && self.order.verify != verify::NONE {
            // What is found must come from the disk, not from an earlier request.
            slot.data.put(0, !0u64);
        }
        self.submit(index);
        self.issued += 1;
    }

    /// Puts a slot's request on the ring.
    fn submit(&mut self, index: u16) {
        let slot = &mut self.slots[usize::from(index)];
        let op = slot.op;
        let len = match op {
            op::FLUSH => 0,
            op::DISCARD | op::WRITE_ZEROES => 16,
            _ => self.order.block_size,
        };
        let at = |offset: usize| slot.control.address() + offset as u64;
        let mut buffers = [
            Buffer { addr: at(HEADER), len: 16, writable: false },
            Buffer { addr: slot.data.address(), len, writable: op == op::READ },
            Buffer { addr: at(STATUS), len: 1, writable: true },
        ];
        if len == 0 {
            buffers.swap(1, 2);
        }
        let used = &buffers[..if len == 0 { 2 } else { 3 }];
        slot.started = cpu::ticks();
        let head = if self.indirect {
            let control = slot.control;
            self.ring.add_indirect(at(TABLE), used, |i, desc| control.put(TABLE + 16 * i, desc))
        } else {
            self.ring.add(used)
        };
        let head = head.expect("slots are as many as the ring has room for");
        self.by_head[usize::from(head)] = index;
    }

    fn complete(&mut self, index: u16, now: u64) {
        let slot = &self.slots[usize::from(index)];
        self.samples.record(&mut self.report, now.wrapping_sub(slot.started));
        self.report.requests += 1;
        let sector = (self.order.offset + slot.block * u64::from(self.order.block_size)) / SECTOR;
        let mut bad = false;
        if slot.control.get::<u8>(STATUS) == STATUS_OK {
            self.report.reads += u64::from(slot.op == op::READ);
            self.report.writes += u64::from(slot.op == op::WRITE);
            if slot.op == op::READ {
                bad = !self.is_expected(slot, sector);
                self.report.mismatches += u64::from(bad);
            }
        } else {
            self.report.errors += 1;
            bad = true;
        }
        if bad {
            self.report.first_bad = self.report.first_bad.min(sector);
        }
        self.free.push(index);
    }

    fn is_expected(&self, slot: &Slot, sector: u64) -> bool {
        let words = u64::from(self.order.block_size) / 8;
        let all =
            |want: &dyn Fn(u64) -> u64| (0..words).all(|i| slot.data.get::<u64>(i as usize * 8) == want(i));
        match self.order.verify {
            verify::ZEROES => all(&|_| 0),
            verify::STAMPS => {
                // A pass that only reads follows one that has written everything once.
                let only_reads = self.order.op == op::READ;
                let generation = if only_reads { 1 } else { self.generations[slot.block as usize] };
                all(&|i| word(sector + i / 64, self.order.seed, generation, i % 64))
            }
            _ => true,
        }
    }

    /// Suppresses interrupts or asks for them, as the order has it, before the load begins.
    pub fn begin(&mut self) {
        self.ring.set_interrupts(self.order.wait == wait::EVERY);
    }
}

/// The words of a sector: no two sectors, generations or seeds have the same.
fn word(sector: u64, seed: u64, generation: u8, index: u64) -> u64 {
    (sector << 8 | u64::from(generation))
        .wrapping_mul(0x9e37_79b9_7f4a_7c15)
        .wrapping_add(seed)
        .rotate_left(29)
        .wrapping_add(index.wrapping_mul(0xd134_2543_de82_ef95))
}

fn stamp(data: &Piece, len: u32, sector: u64, seed: u64, generation: u8) {
    for i in 0..u64::from(len) / 8 {
        data.put(i as usize * 8, word(sector + i / 64, seed, generation, i % 64));
    }
}
