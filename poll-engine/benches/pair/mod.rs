//! Both sides of one ring in one thread, and the steps of a request on it, for what measures them: steady state, 4 KiB
//! segments, a read of the null disk. Descriptors are written anew for every request, headers once.
//!
//! No step is inlined into what calls it, so that a profiler sees it by name.
#![allow(unsafe_code)] // views chains outside of a queue
#![allow(dead_code, clippy::unwrap_used)] // each user needs a part; a ring of our own that is broken ends the run

use std::hint::black_box;
use std::sync::Arc;

use crossbeam::sync::WaitGroup;
use poll_engine::device::{QueueHandler, features};
use poll_engine::engine::queue::{Notifier, Queue};
use poll_engine::engine::reactor::Io;
use poll_engine::memory::{MapHold, MemoryMap, Ram};
use poll_engine::ring::chain::Chain;
use poll_engine::ring::driver::{Buffer, DriverRing};
use poll_engine::ring::{Ahead, Ring, RingConfig, Token};
use poll_engine::uring::Uring;
use vhost_blk::backend::null::Null;
use vhost_blk::disk::{Disk, DiskConfig, Storage};
use vhost_blk::queue::BlkQueue;
use vhost_blk::request::{Operation, STATUS_OK, parse};

/// A ring format: its name, and the feature that it takes.
#[derive(Clone, Copy)]
pub struct Format {
    pub name: &'static str,
    features: u64,
}

/// What is measured. Another format is one more entry.
pub const FORMATS: [Format; 2] =
    [Format { name: "split", features: 0 }, Format { name: "packed", features: features::RING_PACKED }];

/// The form of a chain: a header, data segments, a status.
#[derive(Clone, Copy)]
pub struct Shape {
    pub name: &'static str,
    segments: u16,
    indirect: bool,
}

pub const SHAPES: [Shape; 4] = [
    Shape { name: "direct-3", segments: 1, indirect: false },
    Shape { name: "indirect-3", segments: 1, indirect: true },
    Shape { name: "direct-18", segments: 16, indirect: false },
    Shape { name: "indirect-130", segments: 128, indirect: true },
];

/// Requests made available, taken and published together.
pub const BATCHES: [u16; 2] = [1, 16];

const RING: u64 = features::EVENT_IDX | features::INDIRECT_DESC;
const RING_SIZE: u16 = 1024;
const SEGMENT: u32 = 4096;
/// Requests that may be in flight, each with a header, status and table of its own.
const SLOTS: u16 = 64;
const DISK: u64 = 1 << 30;

impl Shape {
    /// How many requests fit into the ring at once, as whole batches.
    pub fn room(self, batch: u16) -> u16 {
        let descriptors = if self.indirect { 1 } else { self.segments + 2 };
        (RING_SIZE / descriptors).min(SLOTS) / batch * batch
    }

    fn data(self) -> u32 {
        u32::from(self.segments) * SEGMENT
    }
}

/// The driver's side.
struct Driver {
    ring: DriverRing,
    map: Arc<MemoryMap>,
    indirect: bool,
    slots: Vec<(u64, Vec<Buffer>)>,
    next: usize,
    written: u32,
}

impl Driver {
    fn new(format: Format, shape: Shape) -> (Driver, RingConfig) {
        let mut ram = Ram::new(0x10_0000, 8 << 20, false).unwrap();
        let config = DriverRing::lay_out(&mut ram, RING_SIZE, format.features | RING).unwrap();
        let data = ram.alloc(u64::from(shape.data()), 4096).unwrap();
        let map = Arc::clone(ram.map());
        let slots = (0..SLOTS).map(|_| {
            // Header and status beside each other, as drivers have them.
            let header = ram.alloc(64, 64).unwrap();
            let table = ram.alloc(16 * (u64::from(shape.segments) + 2), 64).unwrap();
            let segment = |i| data + u64::from(i) * u64::from(SEGMENT);
            let mut buffers = vec![Buffer { addr: header, len: 16, writable: false }];
            buffers.extend((0..shape.segments).map(|i| Buffer {
                addr: segment(i),
                len: SEGMENT,
                writable: true,
            }));
            buffers.push(Buffer { addr: header + 16, len: 1, writable: true });
            (table, buffers)
        });
        let slots = slots.collect();
        let mut ring = DriverRing::new(&config, &map).unwrap();
        ring.set_interrupts(false);
        let written = shape.data() + 1;
        (Driver { ring, map, indirect: shape.indirect, slots, next: 0, written }, config)
    }

    fn submit(&mut self, count: u16) {
        for _ in 0..count {
            let (table, buffers) = &self.slots[self.next];
            self.next = (self.next + 1) % self.slots.len();
            let head = if self.indirect {
                self.ring.add_indirect(&self.map, *table, buffers)
            } else {
                self.ring.add(buffers)
            };
            assert!(head.is_some(), "the ring is full");
        }
        assert!(!self.ring.publish(), "a device that polls wants no notification");
    }

    fn collect(&mut self, count: u16) {
        for _ in 0..count {
            let (_, written) = self.ring.collect().unwrap();
            assert_eq!(written, self.written);
        }
    }
}

fn disk() -> Disk {
    let config = DiskConfig {
        block_size: 512,
        read_only: false,
        serial: String::new(),
        writeback: true,
        ring_size: RING_SIZE,
        path: std::path::PathBuf::new(),
        incoming: false,
        shared_depth: 16,
    };
    Disk::new(Storage::Null, DISK, &config)
}

/// A driver, and the device's side step by step.
pub struct Pair {
    driver: Driver,
    map: Arc<MemoryMap>,
    ring: Ring,
    disk: Disk,
    chains: Vec<Chain>,
    tokens: Vec<Option<Token>>,
    written: Vec<u32>,
    popped: usize,
    validated: usize,
    completed: usize,
    interrupts: u64,
}

impl Pair {
    pub fn new(format: Format, shape: Shape) -> Pair {
        let (driver, config) = Driver::new(format, shape);
        let map = Arc::clone(&driver.map);
        let slots = usize::from(SLOTS);
        Pair {
            ring: Ring::activate(&config, &map).unwrap(),
            driver,
            map,
            disk: disk(),
            chains: (0..slots).map(|_| Chain::default()).collect(),
            tokens: (0..slots).map(|_| None).collect(),
            written: vec![0; slots],
            popped: 0,
            validated: 0,
            completed: 0,
            interrupts: 0,
        }
    }

    /// The driver makes `count` requests available.
    #[inline(never)]
    pub fn submit(&mut self, count: u16) {
        self.driver.submit(count);
        (self.popped, self.validated, self.completed) = (0, 0, 0);
    }

    /// Takes chains: descriptors are read, checked and translated.
    #[inline(never)]
    pub fn pop(&mut self, batch: u16) {
        let ready = self.ring.available().unwrap().min(batch);
        self.ring.prefetch(ready, Ahead::HEADER, &self.map);
        for _ in 0..ready {
            let chain = &mut self.chains[self.popped];
            self.tokens[self.popped] = Some(self.ring.take(&self.map, chain).unwrap());
            self.popped += 1;
        }
    }

    /// Parses them as block requests and checks these against the disk.
    #[inline(never)]
    pub fn validate(&mut self, batch: u16) {
        for _ in 0..batch {
            // SAFETY: `pop` has translated the chain by this map, the only one there is.
            let chain = unsafe { self.chains[self.validated].view(&self.map) };
            let Ok(Operation::Read { len, .. }) = parse(&chain, &self.disk) else {
                panic!("not the read we sent")
            };
            self.written[self.validated] = len + 1;
            self.validated += 1;
        }
    }

    /// Gives them back.
    #[inline(never)]
    pub fn complete(&mut self, batch: u16) {
        for _ in 0..batch {
            let token = self.tokens[self.completed].take().unwrap();
            self.ring.complete(token, self.written[self.completed]);
            self.completed += 1;
        }
    }

    /// Shows what was given back to the driver and looks whether it wants an interrupt.
    #[inline(never)]
    pub fn publish(&mut self) {
        assert!(self.ring.publish());
        self.ring.disable_notification();
        self.interrupts += u64::from(self.ring.wants_interrupt().unwrap());
    }

    /// The whole way of null requests through the device: from the available ring to the used ring.
    #[inline(never)]
    pub fn null(&mut self, batch: u16) {
        let ready = self.ring.available().unwrap().min(batch);
        self.ring.prefetch(ready, Ahead::HEADER, &self.map);
        let chain = &mut self.chains[0];
        for _ in 0..ready {
            let token = self.ring.take(&self.map, chain).unwrap();
            // SAFETY: `take` has just translated the chain by this map.
            let view = unsafe { chain.view(&self.map) };
            let Ok(Operation::Read { len, .. }) = parse(&view, &self.disk) else {
                panic!("not the read we sent")
            };
            view.last_writable().unwrap().write_byte(STATUS_OK);
            self.ring.complete(token, len + 1);
        }
        assert!(self.ring.publish());
        self.ring.disable_notification();
        self.interrupts += u64::from(self.ring.wants_interrupt().unwrap());
    }

    /// The driver collects them.
    #[inline(never)]
    pub fn collect(&mut self, count: u16) {
        self.driver.collect(count);
        // Not asserted to be none: with the event index a driver that declines them gets one each 65,536 requests.
        black_box(self.interrupts);
    }
}

/// A driver, and the device as a reactor runs it: the queue with its counters and clock, the handler with its back end.
pub struct Device {
    driver: Driver,
    queue: Queue,
    handler: Box<dyn QueueHandler>,
    uring: Uring,
}

impl Device {
    pub fn new(format: Format, shape: Shape) -> Device {
        let (driver, config) = Driver::new(format, shape);
        let hold = MapHold::new(Arc::clone(&driver.map), WaitGroup::new());
        let queue = Queue::new("q".into(), &config, hold, Notifier::default(), Arc::default()).unwrap();
        let handler = Box::new(BlkQueue::new(Arc::new(disk()), Null, None));
        Device { driver, queue, handler, uring: Uring::new(8).unwrap() }
    }

    /// The driver makes `count` requests available.
    #[inline(never)]
    pub fn submit(&mut self, count: u16) {
        self.driver.submit(count);
    }

    /// What a reactor does for a queue in a round with requests, and in the round without that follows.
    #[inline(never)]
    pub fn round(&mut self) -> usize {
        let io = &mut Io::alone(&mut self.uring);
        let worked = self.handler.poll(&mut self.queue, io);
        self.queue.publish();
        self.queue.disable_notification();
        if self.queue.is_signal_due(true) {
            self.queue.signal(io);
        }
        worked
    }

    /// The driver collects them.
    #[inline(never)]
    pub fn collect(&mut self, count: u16) {
        self.driver.collect(count);
    }
}
