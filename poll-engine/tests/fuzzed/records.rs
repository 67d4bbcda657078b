//! A record of requests in flight that the front end has written, and the ring that goes with it: recovered or refused.
//! What is recovered is served at most once, and ends.
//!
//! Input: a byte of features; where and what to write, into the record and into the ring; then the steps of a back end.

use std::sync::Arc;

use poll_engine::device::features::{EVENT_IDX, IN_ORDER, INDIRECT_DESC, RING_PACKED};
use poll_engine::memory::Ram;
use poll_engine::ring::chain::Chain;
use poll_engine::ring::driver::{Buffer, DriverRing};
use poll_engine::ring::inflight::{InflightMemory, InflightSpec};
use poll_engine::ring::{Ring, RingConfig};

use super::Bytes;

const GUEST: u64 = 0x10_0000;
const SIZE: u16 = 8;

pub fn run(data: &[u8]) {
    let mut bytes = Bytes(data);
    let wanted = bytes.byte();
    let bit = |n: u8, feature| if wanted >> n & 1 != 0 { feature } else { 0 };
    let features = bit(0, RING_PACKED) | bit(1, EVENT_IDX) | bit(2, INDIRECT_DESC) | bit(3, IN_ORDER);
    let mut ram = Ram::new(GUEST, 1 << 16, false).unwrap();
    let config = DriverRing::lay_out(&mut ram, SIZE, features).unwrap();
    let map = Arc::clone(ram.map());
    let mut driver = DriverRing::new(&config, &map).unwrap();
    let area = ram.alloc(4096, 4096).unwrap();
    let parts = config.parts().map(|(at, len, _)| (at - ram.spec().user_addr + GUEST, len));
    let record = Ram::new(0, 1 << 14, false).unwrap();
    let spec =
        InflightSpec { num_queues: 1, queue_size: SIZE, ..InflightSpec::default() }.sized(config.format);
    let region = || {
        let fd = record.fd().try_clone_to_owned().unwrap();
        InflightMemory::map(spec, fd).unwrap().queue(0, config.format).unwrap().unwrap()
    };
    let mut chain = Chain::default();
    let mut taken = Vec::new();
    // A back end that has got somewhere, and died.
    if let Ok(mut ring) = Ring::activate(&config, &map).unwrap().recover(region()) {
        for _ in 0..bytes.byte() % 12 {
            let buffers = [16u32, 32, 48].map(|len| Buffer { addr: area, len, writable: len > 16 });
            driver.add(&buffers[..=usize::from(bytes.byte() % 3)]);
            driver.publish();
            if bytes.byte() % 3 > 0 && ring.available().is_ok_and(|n| n > 0) {
                taken.extend(ring.take(&map, &mut chain));
            }
            if bytes.byte() % 3 == 0 && !taken.is_empty() {
                ring.complete(taken.remove(0), 8);
                ring.publish();
                let _ = (0..SIZE).find(|_| driver.collect().is_none());
            }
        }
    }
    taken.drain(..).for_each(std::mem::forget);
    // What its front end and its guest make of that.
    for _ in 0..bytes.byte() % 24 {
        let (part, at, len) = (bytes.byte() % 6, u64::from(bytes.half()), bytes.byte() % 17);
        let said = bytes.take(len.into());
        let (memory, start, room) = match parts.get(usize::from(part)) {
            Some(&(start, len)) => (&map, start, len),
            None => (record.map(), 0, spec.mmap_size),
        };
        if let Some(slice) = memory.slice(start + at % room, said.len() as u32) {
            slice.write(said);
        }
    }
    let base = bytes.half();
    let base = if base == 0 { config.base } else { u32::from(base) | u32::from(bytes.half()) << 16 };
    let Ok(ring) = Ring::activate(&RingConfig { base, ..config }, &map) else { return };
    let known = bytes.byte() % 2 == 1;
    let Ok(mut ring) = ring.recover(region().with_known_base(known)) else { return };
    assert!(ring.resubmits() <= SIZE);
    for _ in 0..64 {
        assert!(taken.len() == usize::from(ring.in_flight()) && taken.len() <= usize::from(SIZE));
        match bytes.byte() % 6 {
            0..=2 => match ring.available() {
                Ok(0) => {}
                Ok(_) => match ring.take(&map, &mut chain) {
                    Ok(token) => taken.push(token),
                    Err(_) => break,
                },
                Err(_) => break,
            },
            3 if !taken.is_empty() => {
                let at = if features & IN_ORDER != 0 { 0 } else { usize::from(bytes.byte()) % taken.len() };
                ring.complete(taken.remove(at), 8);
            }
            4 => _ = ring.publish(),
            5 if taken.is_empty() => {
                ring.publish();
                let before = ring.resubmits();
                let returned = ring.return_resubmits();
                assert_eq!(ring.resubmits(), if returned { 0 } else { before });
            }
            _ => {}
        }
    }
    taken.into_iter().for_each(std::mem::forget);
}
