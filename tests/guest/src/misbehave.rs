//! What no driver may do. Nothing is waited for: the device is expected to stop the queue.

use kickless_guest::{Order, misdeed, op};
use vring::driver::{Buffer, DriverRing};
use vring::layout::{DESC_F_INDIRECT, DESC_F_NEXT, DESC_F_WRITE, Desc};
use vring::packed::{PackedDesc, Position};

use crate::arena::{Arena, Piece};

/// Requests in flight when a device is reset.
const IN_FLIGHT: usize = 32;

/// Breaks the rules of one ring. `None` when the arena is too small.
pub fn misbehave(ring: &mut DriverRing, order: &Order, arena: &mut Arena) -> Option<()> {
    let size = ring.size();
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
        // A packed ring has no heads and no index: what comes nearest is a list without an end.
        misdeed::HEAD_OUT_OF_RANGE | misdeed::LOOP | misdeed::INDEX_JUMP if ring.packed().is_some() => {
            endless(ring, header);
        }
        misdeed::LOOP => {
            let first = ring.add(&chain(data.address()))?;
            let last = Desc { addr: header, len: 16, flags: DESC_F_NEXT | DESC_F_WRITE, next: first };
            ring.split()?.set_desc(first, last);
        }
        misdeed::HEAD_OUT_OF_RANGE => ring.make_available(size | 0x8000),
        misdeed::INDEX_JUMP => {
            for _ in 0..=size {
                ring.make_available(0);
            }
        }
        misdeed::WILD_ADDRESS => {
            ring.add(&chain(0xffff_ffff_ffff_f000))?;
            ring.add(&chain(0x7f00_0000_0000))?;
        }
        // Where the flags in a table do not count, a table cannot be nested; but a list must not have one.
        misdeed::NESTED_INDIRECT if ring.packed().is_some() => {
            let layout = ring.packed()?;
            let at = ring.next_position()?;
            let flags = DESC_F_INDIRECT | DESC_F_NEXT | at.available();
            layout.set_desc(at.index, PackedDesc { addr: data.address(), len: 64, id: 0, flags });
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
            noise(ring, order.seed, data)?;
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

/// Every descriptor is available and says that another follows.
fn endless(ring: &mut DriverRing, header: u64) {
    let (Some(layout), Some(mut at)) = (ring.packed(), ring.next_position()) else { return };
    for _ in 0..layout.size() {
        let flags = DESC_F_NEXT | DESC_F_WRITE | at.available();
        layout.set_desc(at.index, PackedDesc { addr: header, len: 16, id: 0, flags });
        at = at.advance(1, layout.size());
    }
}

fn noise(ring: &mut DriverRing, seed: u64, data: Piece) -> Option<()> {
    let mut random = seed | 1;
    let mut next = || {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        random
    };
    let size = ring.size();
    for index in 0..size {
        let near = data.address() + next() % 8192;
        let addr = if next().is_multiple_of(3) { next() } else { near };
        let (len, flags, other) = ((next() % 9000) as u32, (next() % 8) as u16, next() as u16);
        if let Some(layout) = ring.packed() {
            // Available for the one wrap counter or the other.
            let flags = flags | Position { index: 0, wrap: next().is_multiple_of(2) }.available();
            layout.set_desc(index, PackedDesc { addr, len, id: other, flags });
        } else {
            ring.split()?.set_desc(index, Desc { addr, len, flags, next: other % size });
        }
    }
    for _ in 0..=next() % u64::from(size) {
        ring.make_available(next() as u16 % size);
    }
    Some(())
}
