//! What no driver may do. Nothing is waited for: the device is expected to stop the queue.

use kickless_guest::{Order, misdeed, op};
use vring::driver::{Buffer, DriverRing};
use vring::layout::{DESC_F_INDIRECT, DESC_F_NEXT, DESC_F_WRITE, Desc};

use crate::arena::{Arena, Piece};

/// Requests in flight when a device is reset.
const IN_FLIGHT: usize = 32;

/// Breaks the rules of one ring. `None` when the arena is too small.
pub fn misbehave(ring: &mut DriverRing, order: &Order, arena: &mut Arena) -> Option<()> {
    let size = ring.layout().size();
    let control = arena.take(64, 64)?;
    let data = arena.take(4096, 4096)?;
    control.put(0, op::READ.to_le());
    control.put(4, 0u32);
    control.put(8, 0u64);
    let header = control.address();
    let chain = |data: u64| {
        [
            Buffer { addr: header, len: 16, writable: false },
            Buffer { addr: data, len: 4096, writable: true },
            Buffer { addr: header + 32, len: 1, writable: true },
        ]
    };
    match order.misdeed {
        misdeed::HEAD_OUT_OF_RANGE => ring.make_available(size | 0x8000),
        misdeed::LOOP => {
            let first = ring.add(&chain(data.address()))?;
            let last = Desc { addr: header, len: 16, flags: DESC_F_NEXT | DESC_F_WRITE, next: first };
            ring.layout().set_desc(first, last);
        }
        misdeed::INDEX_JUMP => {
            for _ in 0..=size {
                ring.make_available(0);
            }
        }
        misdeed::WILD_ADDRESS => {
            ring.add(&chain(0xffff_ffff_ffff_f000))?;
            ring.add(&chain(0x7f00_0000_0000))?;
        }
        misdeed::NESTED_INDIRECT => {
            let nested = Desc { addr: data.address(), len: 64, flags: DESC_F_INDIRECT, next: 0 };
            ring.add_indirect(data.address(), &chain(header), |i, _| data.put(16 * i, nested.to_bytes()))?;
        }
        misdeed::NO_HEADER => {
            ring.add(&[Buffer { addr: header + 32, len: 1, writable: true }])?;
            ring.add(&[Buffer { addr: header, len: 8, writable: false }])?;
        }
        misdeed::NOISE => {
            noise(ring, order.seed, data);
        }
        // In flight, as many as go; the caller resets.
        _ => {
            for _ in 0..IN_FLIGHT {
                if ring.add(&chain(data.address())).is_none() {
                    break;
                }
            }
        }
    }
    Some(())
}

fn noise(ring: &mut DriverRing, seed: u64, data: Piece) {
    let mut random = seed | 1;
    let mut next = || {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        random
    };
    let size = ring.layout().size();
    for index in 0..size {
        let near = data.address() + next() % 8192;
        let addr = if next().is_multiple_of(3) { next() } else { near };
        let desc = Desc {
            addr,
            len: (next() % 9000) as u32,
            flags: (next() % 8) as u16,
            next: next() as u16 % size,
        };
        ring.layout().set_desc(index, desc);
    }
    for _ in 0..=next() % u64::from(size) {
        ring.make_available(next() as u16 % size);
    }
}
