//! The two rings of a queue pair, with the memory of their packets.

use std::mem;
use std::sync::Arc;

use poll_engine::device::features;
use poll_engine::memory::{MemoryMap, Ram};
use poll_engine::ring::RingConfig;
use poll_engine::ring::driver::{Buffer, DriverRing};
use vmm_sys_util::eventfd::EventFd;

use super::frame::{Frames, Head, MOST, Mark, VNET, WORDS};
use super::session::net_features::MRG_RXBUF;
use super::spec::NetSpec;

/// No slot.
const NONE: u16 = u16::MAX;
/// Most buffers that are looked at together.
pub const BATCH: usize = 32;

/// Lays a ring out, with what was negotiated.
pub fn lay_out(spec: &NetSpec, features: u64, ram: &mut Ram) -> Option<RingConfig> {
    DriverRing::lay_out(ram, spec.load.ring_size, features)
}

/// A queue pair of one port.
#[derive(Debug)]
pub struct Port {
    /// The port's memory.
    pub map: Arc<MemoryMap>,
    /// receiveq.
    pub rx: Rx,
    /// transmitq.
    pub tx: Tx,
}

/// Memory of one packet.
#[derive(Clone, Copy, Debug)]
struct Place {
    data: u64,
    table: u64,
}

/// A ring whose descriptors belong to places.
#[derive(Debug)]
struct Queue {
    ring: DriverRing,
    kick: EventFd,
    kicks: u64,
    indirect: bool,
    places: Vec<Place>,
    by_head: Vec<u16>,
}

impl Queue {
    fn new(
        spec: &NetSpec,
        negotiated: u64,
        ram: &mut Ram,
        (config, kick): (RingConfig, EventFd),
        size: u32,
    ) -> Option<Queue> {
        let place =
            |ram: &mut Ram| Some(Place { table: ram.alloc(48, 64)?, data: ram.alloc(size.into(), 64)? });
        Some(Queue {
            ring: DriverRing::new(&config, ram.map()).ok()?,
            kick,
            kicks: 0,
            indirect: negotiated & features::INDIRECT_DESC != 0,
            places: (0..spec.load.ring_size).map(|_| place(ram)).collect::<Option<_>>()?,
            by_head: vec![NONE; config.size as usize],
        })
    }

    #[inline]
    fn add(&mut self, map: &MemoryMap, place: u16, len: u32, writable: bool) -> Option<()> {
        let Place { data, table } = self.places[usize::from(place)];
        let head = if self.indirect {
            // As drivers do that have no room before a frame: the header has a descriptor of its own.
            let vnet = VNET as u32;
            self.ring.add_indirect(
                map,
                table,
                &[
                    Buffer { addr: data, len: vnet, writable },
                    Buffer { addr: data + u64::from(vnet), len: len - vnet, writable },
                ],
            )?
        } else {
            self.ring.add(&[Buffer { addr: data, len, writable }])?
        };
        self.by_head[usize::from(head)] = place;
        Some(())
    }

    /// Shows what was added.
    #[inline]
    fn publish(&mut self) {
        if self.ring.publish() {
            self.kicks += 1;
            // A counter that is full has been kicked.
            let _ = self.kick.write(1);
        }
    }

    /// Collects one that is finished: its place and the bytes written. `Err` when the back end makes it up.
    #[inline]
    fn collect(&mut self) -> Result<Option<(u16, u32)>, MadeUp> {
        if self.ring.finished() == 0 {
            return Ok(None);
        }
        let (head, len) = self.ring.collect().ok_or(MadeUp)?;
        let place = self.by_head.get_mut(usize::from(head)).map_or(NONE, |slot| mem::replace(slot, NONE));
        if place == NONE { Err(MadeUp) } else { Ok(Some((place, len))) }
    }
}

/// The back end has returned a descriptor that it did not have.
#[derive(Clone, Copy, Debug)]
pub struct MadeUp;

/// The sending side.
#[derive(Debug)]
pub struct Tx {
    queue: Queue,
    free: Vec<u16>,
    /// Which kind of frame is in each place.
    kinds: Vec<u8>,
}

impl Tx {
    /// A ring of which all is free.
    pub fn new(spec: &NetSpec, features: u64, ram: &mut Ram, ring: (RingConfig, EventFd)) -> Option<Tx> {
        let size = VNET as u32 + spec.load.size.largest() + MOST as u32;
        let queue = Queue::new(spec, features, ram, ring, size)?;
        let n = spec.load.ring_size;
        Some(Tx { free: (0..n).rev().collect(), kinds: vec![0; n.into()], queue })
    }

    /// Writes a frame into each place.
    pub fn fill(&mut self, map: &MemoryMap, frames: &Frames) {
        for slot in 0..self.queue.places.len() {
            self.write(map, frames, slot, 0);
        }
    }

    /// Writes what does not change from one frame of this kind to the next.
    fn write(&mut self, map: &MemoryMap, frames: &Frames, slot: usize, kind: usize) -> Option<()> {
        let (end, body) = (frames.kinds()[kind].before_body(), frames.body(kind, slot));
        let to = map.slice(self.queue.places[slot].data, (end + body.len()) as u32)?;
        for (i, word) in frames.head(kind, slot).iter().enumerate() {
            // What is beyond the end is the body's.
            to.part(8 * i, 8).write(&word.to_le_bytes());
        }
        to.part(end, body.len()).write(body);
        self.kinds[slot] = kind as u8;
        Some(())
    }

    /// Places that are free.
    #[inline]
    pub fn room(&self) -> usize {
        self.free.len()
    }

    /// Packets in the ring.
    pub fn in_flight(&self) -> usize {
        self.queue.places.len() - self.free.len()
    }

    /// Adds a frame; false when there is no room.
    #[inline]
    pub fn send(&mut self, map: &MemoryMap, frames: &Frames, kind: usize, mark: &Mark) -> bool {
        let Some(&slot) = self.free.last() else { return false };
        let at = usize::from(slot);
        if usize::from(self.kinds[at]) != kind && self.write(map, frames, at, kind).is_none() {
            return false;
        }
        let (fields, this) = (frames.fields(kind, at, mark), frames.kinds()[kind]);
        let (len, end) = (VNET as u32 + this.size, this.before_body());
        let Some(to) = map.slice(self.queue.places[at].data, len) else { return false };
        to.part(46, 2).write(&fields.port.to_le_bytes());
        if this.gso_size.is_none() {
            to.part(52, 2).write(&fields.csum.to_le_bytes());
        }
        to.part(end - 20, 8).write(&fields.number.to_le_bytes());
        to.part(end - 12, 8).write(&fields.time.to_le_bytes());
        to.part(end - 4, 4).write(&fields.check.to_le_bytes());
        if self.queue.add(map, slot, len, false).is_none() {
            return false;
        }
        self.free.pop();
        true
    }

    /// Shows what was added.
    #[inline]
    pub fn publish(&mut self) {
        self.queue.publish();
    }

    /// Takes places back whose packets have been taken; how many.
    #[inline]
    pub fn reclaim(&mut self) -> Result<usize, MadeUp> {
        let before = self.free.len();
        while let Some((slot, _)) = self.queue.collect()? {
            self.free.push(slot);
        }
        Ok(self.free.len() - before)
    }

    /// Asks for interrupts, or for none; true if something is finished already.
    pub fn set_interrupts(&mut self, on: bool) -> bool {
        self.queue.ring.set_interrupts(on)
    }

    /// Kicks sent.
    pub fn kicks(&self) -> u64 {
        self.queue.kicks
    }
}

/// A packet that has arrived: places of its buffers, and the bytes in them.
#[derive(Clone, Copy, Debug)]
pub struct Arrived {
    /// Place of its first buffer.
    first: u16,
    /// Bytes in that, with the virtio-net header.
    len: u32,
}

/// The receiving side.
#[derive(Debug)]
pub struct Rx {
    queue: Queue,
    mergeable: bool,
    buffer: u32,
    /// Bytes of a packet that lies in several buffers.
    gathered: Vec<u8>,
}

/// What is known of a packet before it is looked into.
#[derive(Debug)]
pub struct Packet<'a> {
    /// The first bytes, the virtio-net header included; what is beyond its end is not its own.
    pub head: Head,
    /// Bytes of the frame, without that header; `None` if there is less than a header.
    pub len: Option<u32>,
    rest: Rest<'a>,
}

#[derive(Debug)]
enum Rest<'a> {
    Guest(&'a MemoryMap, u64),
    Gathered(&'a [u8]),
}

impl Packet<'_> {
    /// Whether it has this from `at` on (the virtio-net header included). `scratch` holds as much.
    #[inline]
    pub fn has(&self, at: usize, expected: &[u8], scratch: &mut [u8]) -> bool {
        if expected.is_empty() {
            return true;
        }
        match self.rest {
            Rest::Guest(map, data) => {
                let scratch = &mut scratch[..expected.len()];
                let slice = map.slice(data + at as u64, expected.len() as u32);
                slice.is_some_and(|s| s.read(scratch) == expected.len()) && scratch == expected
            }
            Rest::Gathered(bytes) => bytes.get(at..at + expected.len()) == Some(expected),
        }
    }
}

impl Rx {
    /// A ring whose buffers all wait for packets; they are shown by `start`.
    pub fn new(spec: &NetSpec, features: u64, ram: &mut Ram, ring: (RingConfig, EventFd)) -> Option<Rx> {
        let mergeable = features & MRG_RXBUF != 0;
        let buffer = spec.rx_buffer(mergeable);
        // What is read first is all there, however short a frame is.
        let mut queue = Queue::new(spec, features, ram, ring, buffer.max(MOST as u32))?;
        for place in 0..spec.load.ring_size {
            queue.add(ram.map(), place, buffer, true)?;
        }
        Some(Rx { queue, mergeable, buffer, gathered: Vec::new() })
    }

    /// Shows the buffers that were added.
    #[inline]
    pub fn publish(&mut self) {
        self.queue.publish();
    }

    /// Packets, or parts of them, that are there.
    #[inline]
    pub fn ready(&mut self) -> usize {
        self.queue.ring.finished().into()
    }

    /// Takes the next buffers, at most as `batch` has room; they have to be given to [`Rx::packet`] in order.
    #[inline]
    pub fn take(
        &mut self,
        map: &MemoryMap,
        batch: &mut [Arrived; BATCH],
        most: usize,
    ) -> Result<usize, MadeUp> {
        let mut n = 0;
        for arrived in batch.iter_mut().take(most) {
            let Some((first, len)) = self.queue.collect()? else { break };
            *arrived = Arrived { first, len };
            n += 1;
            // The back end's CPU has these lines: their misses overlap.
            if let Some(slice) = map.slice(self.queue.places[usize::from(first)].data, MOST as u32) {
                slice.prefetch();
                slice.part(64, 1).prefetch();
            }
        }
        Ok(n)
    }

    /// The packet that begins with `batch[0]`, and how many buffers it takes, which may be more than are in the batch.
    #[inline]
    pub fn packet<'a>(
        &'a mut self,
        map: &'a MemoryMap,
        batch: &[Arrived],
    ) -> Result<(Packet<'a>, usize), MadeUp> {
        let Arrived { first, len } = batch[0];
        let data = self.queue.places[usize::from(first)].data;
        let len = len.min(self.buffer);
        let mut head: Head = [0; WORDS];
        if let Some(slice) = map.slice(data, MOST as u32) {
            for (i, pair) in head.chunks_exact_mut(2).enumerate() {
                pair.copy_from_slice(&slice.part(16 * i, 16).read_pair_once().unwrap_or_default());
            }
        }
        let buffers = if self.mergeable { (head[1] >> 16) as u16 } else { 1 };
        if buffers <= 1 {
            let len = len.checked_sub(VNET as u32);
            return Ok((Packet { head, len, rest: Rest::Guest(map, data) }, 1));
        }
        // All of a packet's buffers are shown at once (virtio 1.3, 5.1.6.4.1).
        self.gathered.clear();
        for i in 0..usize::from(buffers) {
            let arrived = if let Some(arrived) = batch.get(i) {
                *arrived
            } else {
                let (first, len) = self.queue.collect()?.ok_or(MadeUp)?;
                self.give_back(map, first)?;
                Arrived { first, len }
            };
            let at = self.gathered.len();
            let len = arrived.len.min(self.buffer);
            self.gathered.resize(at + len as usize, 0);
            let slice = map.slice(self.queue.places[usize::from(arrived.first)].data, len);
            if let Some(slice) = slice {
                slice.read(&mut self.gathered[at..]);
            }
        }
        let len = (self.gathered.len() as u32).checked_sub(VNET as u32);
        self.gathered.resize(self.gathered.len().max(MOST), 0);
        for (word, bytes) in head.iter_mut().zip(self.gathered.chunks_exact(8)) {
            *word = bytes.first_chunk().map_or(0, |bytes| u64::from_le_bytes(*bytes));
        }
        Ok((Packet { head, len, rest: Rest::Gathered(&self.gathered) }, buffers.into()))
    }

    fn give_back(&mut self, map: &MemoryMap, place: u16) -> Result<(), MadeUp> {
        self.queue.add(map, place, self.buffer, true).ok_or(MadeUp)
    }

    /// Adds the buffers of a batch again.
    #[inline]
    pub fn recycle(&mut self, map: &MemoryMap, batch: &[Arrived]) -> Result<(), MadeUp> {
        batch.iter().try_for_each(|arrived| self.give_back(map, arrived.first))
    }

    /// Asks for interrupts, or for none; true if something is there already.
    pub fn set_interrupts(&mut self, on: bool) -> bool {
        self.queue.ring.set_interrupts(on)
    }

    /// Kicks sent.
    pub fn kicks(&self) -> u64 {
        self.queue.kicks
    }
}

impl Arrived {
    /// Nothing yet.
    pub const NONE: Arrived = Arrived { first: 0, len: 0 };
}
