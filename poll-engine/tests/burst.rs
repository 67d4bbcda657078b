//! Chains taken together are those that are taken one by one: the same bytes, in the same order, given back alike.
#![allow(clippy::unwrap_used)]

use std::sync::Arc;

use crossbeam::sync::WaitGroup;
use poll_engine::device::features;
use poll_engine::engine::queue::{MAX_BURST, Notifier, Queue};
use poll_engine::memory::{MapHold, MemoryMap, Ram};
use poll_engine::ring::Ahead;
use poll_engine::ring::chain::ChainView;
use poll_engine::ring::driver::{Buffer, DriverRing};
use proptest::prelude::*;

const SIZE: u16 = 16;
const AHEAD: Ahead = Ahead { bytes: 64, write: false };

/// Readable and writable buffers, and whether they are in a table.
type Shape = (usize, usize, bool);

/// One ring with both its sides.
struct Side {
    driver: DriverRing,
    queue: Queue,
    map: Arc<MemoryMap>,
    data: u64,
    tables: u64,
    added: u64,
}

impl Side {
    fn new(features: u64) -> Side {
        let mut ram = Ram::new(0x10_0000, 1 << 20, false).unwrap();
        let config = DriverRing::lay_out(&mut ram, SIZE, features | features::INDIRECT_DESC).unwrap();
        let (data, tables) = (ram.alloc(1 << 16, 16).unwrap(), ram.alloc(1 << 16, 16).unwrap());
        let map = Arc::clone(ram.map());
        let bytes: Vec<u8> = (0..1u32 << 14).flat_map(u32::to_le_bytes).collect();
        map.slice(data, 1 << 16).unwrap().write(&bytes);
        let hold = MapHold::new(Arc::clone(&map), WaitGroup::new());
        let queue = Queue::new("q".into(), &config, hold, Notifier::default(), Arc::default()).unwrap();
        Side { driver: DriverRing::new(&config, &map).unwrap(), queue, map, data, tables, added: 0 }
    }

    fn add(&mut self, (readable, writable, indirect): Shape) -> bool {
        let buffer = |i: usize| Buffer {
            addr: self.data + (self.added * 400 + 100 * i as u64) % 60_000,
            len: 60 + i as u32,
            writable: i >= readable,
        };
        let buffers: Vec<_> = (0..readable + writable).map(buffer).collect();
        let head = if indirect {
            let table = self.tables + self.added % 64 * 256;
            self.driver.add_indirect(&self.map, table, &buffers)
        } else {
            self.driver.add(&buffers)
        };
        self.added += 1;
        head.is_some()
    }

    fn collect(&mut self) -> Vec<(u16, u32)> {
        self.queue.publish();
        std::iter::from_fn(|| self.driver.finished().checked_sub(1).and_then(|_| self.driver.collect()))
            .collect()
    }
}

/// What a device can see of a chain.
fn seen(chain: &ChainView<'_>) -> (Vec<u8>, Vec<u8>) {
    let (mut out, mut into) =
        (vec![0; chain.readable_len() as usize], vec![0; chain.writable_len() as usize]);
    assert_eq!(chain.readable(0, u32::MAX).read(&mut out), out.len());
    assert_eq!(chain.writable(0, u32::MAX).read(&mut into), into.len());
    (out, into)
}

proptest! {
    #[test]
    fn a_burst_is_chains_one_by_one(
        packed: bool,
        rounds in prop::collection::vec(
            (prop::collection::vec((0..3usize, 0..3usize, prop::bool::weighted(0.2)), 0..12), 0..14usize, 0..14usize),
            1..40,
        ),
    ) {
        let format = if packed { features::RING_PACKED } else { 0 };
        let (mut together, mut alone) = (Side::new(format), Side::new(format));
        for (shapes, wanted, done) in rounds {
            for shape in shapes.into_iter().filter(|s| s.0 + s.1 > 0) {
                let fits = together.add(shape);
                prop_assert_eq!(alone.add(shape), fits);
            }
            together.driver.publish();
            alone.driver.publish();
            let taken = together.queue.take_burst(wanted.min(MAX_BURST), AHEAD);
            prop_assert!(taken > 0 || wanted == 0 || !alone.queue.has_chain());
            let done = done.min(taken);
            let written = |at: usize| at as u32;
            for at in 0..done {
                prop_assert!(alone.queue.has_chain());
                let request = alone.queue.take().unwrap();
                prop_assert_eq!(seen(&together.queue.burst(at)), seen(&alone.queue.chain()));
                alone.queue.complete(request, written(at));
            }
            together.queue.end_burst(done, written);
            prop_assert_eq!(together.queue.in_flight(), 0);
            prop_assert_eq!(together.queue.base(), alone.queue.base());
            prop_assert_eq!(together.collect(), alone.collect());
        }
        prop_assert!(!together.queue.is_broken());
    }
}
