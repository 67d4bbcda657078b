//! A device on a ring in memory that its guest writes to at any time: what is taken is inside of guest memory, no more than
//! the ring has is in flight, and whatever the guest writes ends in an error at most.
//!
//! Input: a byte of features, one of the size; then steps, each a byte and what it takes.

use std::sync::Arc;

use crossbeam::sync::WaitGroup;
use poll_engine::device::features::{EVENT_IDX, IN_ORDER, INDIRECT_DESC, RING_PACKED};
use poll_engine::engine::queue::{Notifier, Queue, Request};
use poll_engine::memory::{MapHold, Ram};
use poll_engine::ring::Ahead;
use poll_engine::ring::driver::{Buffer, DriverRing};

use super::Bytes;

const GUEST: u64 = 0x10_0000;
const BYTES: u64 = 1 << 17;

pub fn run(data: &[u8]) {
    let mut bytes = Bytes(data);
    let (wanted, size) = (bytes.byte(), 1 << (1 + bytes.byte() % 5));
    let bit = |n: u8, feature| if wanted >> n & 1 != 0 { feature } else { 0 };
    let features = bit(0, RING_PACKED) | bit(1, EVENT_IDX) | bit(2, INDIRECT_DESC) | bit(3, IN_ORDER);
    let mut ram = Ram::new(GUEST, BYTES, false).unwrap();
    let config = DriverRing::lay_out(&mut ram, size, features).unwrap();
    let map = Arc::clone(ram.map());
    let mut driver = DriverRing::new(&config, &map).unwrap();
    let area = ram.alloc(4096, 4096).unwrap();
    let parts = config.parts().map(|(at, len, _)| (at - ram.spec().user_addr + GUEST, len));
    let hold = MapHold::new(Arc::clone(&map), WaitGroup::new());
    let mut queue = Queue::new("q".into(), &config, hold, Notifier::default(), Arc::default()).unwrap();
    // In the order in which they were taken.
    let mut taken: Vec<Request> = Vec::new();
    let mut completed = 0;
    while !bytes.0.is_empty() && !queue.is_broken() {
        match bytes.byte() % 10 {
            // The guest writes: into a part of the ring, or behind it, where tables are.
            0..=2 => {
                let (part, at) = (bytes.byte() % 4, u64::from(bytes.byte()));
                let (start, len) = parts.get(usize::from(part)).copied().unwrap_or((area, 4096));
                let len_here = usize::from(bytes.byte() % 33);
                let said = bytes.take(len_here);
                let at = start + (at * 2) % len;
                if let Some(slice) = map.slice(at, said.len() as u32) {
                    slice.write(said);
                }
            }
            // As a driver does.
            3 => {
                let (count, shape) = (u64::from(bytes.byte() % 4), bytes.byte());
                let buffer = |i: u64| Buffer {
                    addr: area + 512 * i,
                    len: u32::from(shape) + 1,
                    writable: i >= u64::from(shape % 4),
                };
                driver.add(&(0..count).map(buffer).collect::<Vec<_>>());
                driver.publish();
            }
            4 | 5 => {
                let ready = queue.ready_for(u16::from(bytes.byte() % 40), Ahead::HEADER);
                for _ in 0..ready {
                    let Some(request) = queue.take() else { break };
                    let chain = queue.chain();
                    let read: usize = chain.readable(0, u32::MAX).map(|slice| slice.len()).sum();
                    let written: usize = chain.writable(0, u32::MAX).map(|slice| slice.len()).sum();
                    assert_eq!(
                        (read as u64, written as u64),
                        (chain.readable_len().into(), chain.writable_len().into())
                    );
                    taken.push(request);
                }
                assert!(usize::from(queue.in_flight()) == taken.len() && taken.len() <= usize::from(size));
            }
            6 if !taken.is_empty() => {
                let at = if features & IN_ORDER != 0 { 0 } else { usize::from(bytes.byte()) % taken.len() };
                completed += 1;
                queue.complete(taken.remove(at), u32::from(bytes.half()));
                // What was taken after it cannot go back any more.
            }
            7 => _ = queue.publish(),
            // All that was taken goes back, if none of it has been completed.
            8 if completed == 0 => {
                while let Some(request) = taken.pop() {
                    queue.untake(request);
                }
            }
            8 if taken.is_empty() => completed = 0,
            9 => {
                queue.disable_notification();
                // The driver's side does not defend itself against what has been written over its ring.
                let _ = (0..size).find(|_| driver.collect().is_none());
            }
            _ => {}
        }
    }
    taken.into_iter().for_each(std::mem::forget);
}
