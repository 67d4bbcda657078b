//! Packed rings as no good driver writes them, and the device's reading of them against a model that is written from the
//! specification alone (virtio 1.3, 2.8).
#![allow(clippy::unwrap_used)]

use std::cell::Cell;
use std::sync::Arc;

use crossbeam::sync::WaitGroup;
use poll_engine::device::features;
use poll_engine::engine::queue::{Notifier, Queue};
use poll_engine::memory::{MapHold, Ram};
use poll_engine::ring::chain::Chain;
use poll_engine::ring::driver::DriverRing;
use poll_engine::ring::layout::{DESC_F_INDIRECT, DESC_F_NEXT, DESC_F_WRITE, PackedLayout};
use poll_engine::ring::{Ahead, Ring, RingConfig, RingError, Token};
use poll_engine::stats::QueueStats;
use proptest::prelude::*;
use proptest::test_runner::TestRunner;
use vring::packed::{PackedDesc, Position, Rest};

const GUEST: u64 = 0x4000_0000;
const BYTES: u64 = 256 << 10;
const TABLES: u64 = GUEST + 0x8000;
const TABLE_SLOTS: u64 = 256;
const DATA: u64 = GUEST + 0x1_0000;

const NEXT: u16 = DESC_F_NEXT;
const WRITE: u16 = DESC_F_WRITE;
const INDIRECT: u16 = DESC_F_INDIRECT;

struct Guest {
    ram: Ram,
    config: RingConfig,
    layout: PackedLayout,
}

impl Guest {
    fn new(size: u16, indirect: bool) -> Guest {
        let mut ram = Ram::new(GUEST, BYTES, false).unwrap();
        let bits = if indirect { features::INDIRECT_DESC } else { 0 };
        let config = DriverRing::lay_out(&mut ram, size, features::RING_PACKED | bits).unwrap();
        let layout = PackedLayout::new(&config, ram.map()).unwrap();
        Guest { ram, config, layout }
    }

    fn ring(&self) -> Ring {
        Ring::activate(&self.config, self.ram.map()).unwrap()
    }

    fn set_table(&self, at: u64, desc: PackedDesc) {
        self.ram.map().slice(at, 16).unwrap().write(&desc.to_bytes());
    }

    /// Makes these descriptors available, from the beginning on.
    fn set(&self, descs: &[PackedDesc]) {
        let mut at = Position::START;
        for desc in descs {
            self.layout.set_desc(at.index, PackedDesc { flags: desc.flags | at.available(), ..*desc });
            at = at.advance(1, self.layout.size());
        }
    }

    /// Has a device take what begins at the first descriptor.
    fn take(descs: &[PackedDesc], indirect: bool) -> Result<u16, RingError> {
        let guest = Guest::new(16, indirect);
        guest.set_table(TABLES, desc(DATA, 8, WRITE));
        guest.set(descs);
        take(&mut guest.ring(), &guest).map(give_back)
    }
}

fn take(ring: &mut Ring, guest: &Guest) -> Result<Token, RingError> {
    assert!(ring.available()? > 0);
    ring.prefetch(16, Ahead::HEADER, guest.ram.map());
    ring.take(guest.ram.map(), &mut Chain::default())
}

/// The ID; the token is of a ring that nobody uses any more.
fn give_back(token: Token) -> u16 {
    let id = token.id();
    std::mem::forget(token);
    id
}

fn desc(addr: u64, len: u32, flags: u16) -> PackedDesc {
    PackedDesc { addr, len, id: 7, flags }
}

macro_rules! refused {
    ($outcome:expr, $error:pat) => {{
        let outcome = $outcome;
        assert!(matches!(&outcome, Err($error)), "{outcome:?}");
    }};
}

#[test]
fn lists_without_an_end_and_longer_than_there_is_room() {
    refused!(Guest::take(&[desc(DATA, 8, NEXT); 16], true), RingError::TooLong(16));
    let mut longest = [desc(DATA, 8, NEXT); 16];
    longest[15].flags = WRITE;
    assert_eq!(Guest::take(&longest, true).unwrap(), 7);
    // What is in flight is not the driver's to write over: a list that would is too long for what is left.
    let guest = Guest::new(4, true);
    guest.set(&[desc(DATA, 8, 0), desc(DATA, 8, 0), desc(DATA, 8, NEXT), desc(DATA, 8, NEXT)]);
    let mut ring = guest.ring();
    let tokens = [take(&mut ring, &guest).unwrap(), take(&mut ring, &guest).unwrap()];
    guest.layout.set_desc(0, desc(DATA, 8, Position { index: 0, wrap: false }.available()));
    refused!(take(&mut ring, &guest), RingError::TooManyInFlight);
    assert_eq!(ring.in_flight(), 2);
    for token in tokens {
        ring.complete(token, 0);
    }
}

#[test]
fn a_full_ring_that_goes_on() {
    for kind in [0, INDIRECT] {
        let guest = Guest::new(4, true);
        guest.set_table(TABLES, desc(DATA, 8, 0));
        guest.set(&[desc(TABLES, 16, kind); 4]);
        let mut ring = guest.ring();
        let tokens: Vec<_> = (0..4).map(|_| take(&mut ring, &guest).unwrap()).collect();
        guest.layout.set_desc(0, desc(TABLES, 16, kind | Position { index: 0, wrap: false }.available()));
        refused!(take(&mut ring, &guest), RingError::TooManyInFlight);
        assert_eq!(ring.base(), 0x8000_0000, "four taken, none used");
        for token in tokens {
            ring.complete(token, 0);
        }
        assert_eq!((ring.in_flight(), ring.base()), (0, 0));
    }
}

#[test]
fn indirect_where_it_must_not_be() {
    let table = desc(TABLES, 16, INDIRECT);
    assert_eq!(Guest::take(&[table], true).unwrap(), 7);
    refused!(Guest::take(&[table], false), RingError::BadIndirect);
    refused!(
        Guest::take(&[desc(TABLES, 16, INDIRECT | NEXT), desc(DATA, 8, 0)], true),
        RingError::BadIndirect
    );
    refused!(Guest::take(&[desc(DATA, 8, NEXT), table], true), RingError::BadIndirect);
    for len in [0, 1, 15, 17, u32::MAX] {
        refused!(Guest::take(&[desc(TABLES, len, INDIRECT)], true), RingError::BadTable(_));
    }
    // 2.8.7: all of the table is the list, so a long one is refused before it is read.
    refused!(Guest::take(&[desc(TABLES, 16 * 1025, INDIRECT)], true), RingError::TooLong(1024));
    refused!(Guest::take(&[desc(u64::MAX - 15, 16, INDIRECT)], true), RingError::Memory(_));
    refused!(Guest::take(&[desc(GUEST + BYTES - 16, 32, INDIRECT)], true), RingError::ZeroLength);
}

#[test]
fn flags_in_a_table_do_not_count_but_for_write() {
    let guest = Guest::new(16, true);
    guest.set_table(TABLES, PackedDesc { flags: !WRITE, ..desc(DATA, 8, 0) });
    guest.set_table(TABLES + 16, PackedDesc { flags: 0xffff, ..desc(DATA, 9, 0) });
    guest.set(&[desc(TABLES, 32, INDIRECT | WRITE)]);
    let (id, parts) = read(&guest).unwrap();
    assert_eq!((id, parts), (7, vec![(DATA, 8, false), (DATA, 9, true)]));
}

#[test]
fn buffers_that_are_none() {
    refused!(Guest::take(&[desc(DATA, 0, 0)], true), RingError::ZeroLength);
    refused!(Guest::take(&[desc(DATA, 8, WRITE | NEXT), desc(DATA, 8, 0)], true), RingError::BadOrder);
    for addr in [0, GUEST - 1, GUEST + BYTES, u64::MAX] {
        refused!(Guest::take(&[desc(addr, 2, 0)], true), RingError::Memory(_));
        refused!(Guest::take(&[desc(DATA, 1, NEXT), desc(addr, 2, WRITE)], true), RingError::Memory(_));
    }
}

#[test]
fn rings_and_bases_that_cannot_be() {
    let guest = Guest::new(16, true);
    let activate = |config: RingConfig| Ring::activate(&config, guest.ram.map()).map(|ring| ring.base());
    let good = guest.config;
    for size in [0, 32769, u32::MAX] {
        refused!(activate(RingConfig { size, ..good }), RingError::BadSize(_));
    }
    assert_eq!(activate(RingConfig { size: 3, ..good }).unwrap(), 0x8000_8000);
    for (desc, driver, device) in [(8, 0, 0), (0, 2, 0), (0, 0, 2)] {
        let (desc_addr, avail_addr) = (good.desc_addr + desc, good.avail_addr + driver);
        let moved = RingConfig { desc_addr, avail_addr, used_addr: good.used_addr + device, ..good };
        refused!(activate(moved), RingError::Misaligned(_));
    }
    let at = |base: u32| activate(RingConfig { base, ..good });
    // Beyond the ring, or more in flight than it holds.
    for base in [0x8000_8010, 0x8010_8000, 0x8001_8000, 0x7fff_7fff] {
        refused!(at(base), RingError::BadBase(_));
    }
    // Whatever a front end says of both, with either wrap counter.
    let halves = [0, 1, 15, 16, 17, 0x4000, 0x7fff].map(|index| [index, index | 0x8000]).concat();
    for (used, avail) in halves.iter().flat_map(|used| halves.iter().map(move |avail| (used, avail))) {
        let beyond = |half: &u32| half & 0x7fff >= 16;
        let told = at(avail | used << 16);
        assert!(told.is_err() || !(beyond(avail) || beyond(used)), "{avail:#x} and {used:#x}");
    }
    for base in [0x8000_8000, 0x800f_800f, 0x8000_0000, 0x8001_0001, 0x0005_0005, 0x0005_0007] {
        assert_eq!(at(base).unwrap(), base);
    }
    // Half a base: what is used has caught up.
    for (half, whole) in [(0x8000, 0x8000_8000), (0x8005, 0x8005_8005), (5, 0x0005_0005), (0, 0)] {
        assert_eq!(at(half).unwrap(), whole);
    }
}

#[test]
fn used_descriptors_are_shown_together_by_the_first() {
    let guest = Guest::new(8, false);
    let mut ring = guest.ring();
    let lists = [desc(DATA, 8, NEXT), desc(DATA, 8, WRITE), desc(DATA, 8, 0), desc(DATA, 8, WRITE)];
    guest.set(&lists);
    let mut tokens: Vec<_> = (0..3).map(|_| take(&mut ring, &guest).unwrap()).collect();
    let before = guest.layout.rest(0);
    // Out of order: the last one first, where the first began.
    for (token, written) in [(tokens.remove(2), 8), (tokens.remove(0), 0), (tokens.remove(0), 0)] {
        ring.complete(token, written);
    }
    assert_eq!(guest.layout.rest(0), before, "shown before it was published");
    assert!(ring.publish());
    let used = |at: u16, written: u32| Rest::used(Position { index: at, wrap: true }, 7, written);
    // 2.8.6: the device skips forward by the length of each list.
    assert_eq!(guest.layout.rest(0), used(0, 8));
    assert_eq!(guest.layout.rest(1), used(1, 0));
    assert_eq!(guest.layout.rest(3), used(3, 0));
    assert_eq!(ring.base(), 0x8004_8004);
}

/// One buffer: address, length, writable.
type Part = (u64, u32, bool);

/// What the device takes the first list to be.
fn read(guest: &Guest) -> Option<(u16, Vec<Part>)> {
    let hold = MapHold::new(Arc::clone(guest.ram.map()), WaitGroup::new());
    let stats = Arc::new(QueueStats::default());
    let (name, notifier) = ("q".into(), Notifier::default());
    let mut queue = Queue::new(name, &guest.config, hold, notifier, Arc::clone(&stats)).unwrap();
    if queue.ready() == 0 {
        return None;
    }
    let Some(request) = queue.take() else {
        assert!(queue.is_broken() && stats.errors_total() == 1);
        return None;
    };
    let host = guest.ram.map().regions()[0].host_addr().addr() as u64;
    let chain = queue.chain();
    let slices = chain.readable(0, u32::MAX).map(|s| (s, false));
    let slices = slices.chain(chain.writable(0, u32::MAX).map(|s| (s, true)));
    let parts =
        slices.map(|(s, w)| (s.host_addr().addr() as u64 - host + GUEST, s.len() as u32, w)).collect();
    queue.complete(request, 0);
    queue.publish();
    let at = Position::from_bits(guest.config.base as u16);
    Some((guest.layout.rest(at.index).id(), parts))
}

/// What the specification takes it to be, if it is a good one.
fn model(ring: &[PackedDesc], tables: &[PackedDesc], base: u16) -> Option<(u16, Vec<Part>)> {
    let (mut index, wrap) = (usize::from(base & 0x7fff), base & 0x8000 != 0);
    let bit = |desc: &PackedDesc, n: u16| desc.flags >> n & 1 == 1;
    let mut list = Vec::new();
    let first = &ring[index];
    // 2.8.1: AVAIL matches the wrap counter, USED its inverse.
    if bit(first, 7) != wrap || bit(first, 15) == wrap {
        return None;
    }
    let id = if bit(first, 2) {
        // 2.8.7 and 2.8.19.
        let slot = first.addr.checked_sub(TABLES).filter(|o| o.is_multiple_of(16))? / 16;
        let count = u64::from(first.len / 16);
        if bit(first, 0) || first.len == 0 || !first.len.is_multiple_of(16) || slot + count > TABLE_SLOTS {
            return None;
        }
        list.extend_from_slice(&tables[slot as usize..(slot + count) as usize]);
        first.id
    } else {
        // 2.8.6.
        loop {
            let desc = &ring[index];
            if bit(desc, 2) || list.len() == ring.len() {
                return None;
            }
            list.push(*desc);
            if !bit(desc, 0) {
                break desc.id;
            }
            index = (index + 1) % ring.len();
        }
    };
    let parts: Vec<Part> = list.iter().map(|d| (d.addr, d.len, bit(d, 1))).collect();
    let inside = |&(addr, len, _): &Part| {
        len > 0 && addr >= GUEST && addr.checked_add(len.into()).is_some_and(|end| end <= GUEST + BYTES)
    };
    // 2.8.17: "any device-writable descriptor elements after any device-readable".
    (parts.iter().all(inside) && parts.is_sorted_by_key(|p| p.2)).then_some((id, parts))
}

fn garbage() -> impl Strategy<Value = PackedDesc> {
    let addr = prop_oneof![
        12 => DATA..GUEST + BYTES - 0x2000,
        4 => (0..TABLE_SLOTS - 20).prop_map(|i| TABLES + 16 * i),
        1 => any::<u64>(),
        1 => GUEST + BYTES - 16..GUEST + BYTES + 16,
    ];
    let len = prop_oneof![8 => (1..6u32).prop_map(|n| 16 * n), 2 => 0..0x2000u32];
    let kind = prop_oneof![8 => prop::sample::select(vec![0u16, 1, 2, 3, 4]), 1 => any::<u16>()];
    let state = prop::sample::select(vec![0u16, 0x80, 0x80, 0x8000, 0x8000, 0x8080]);
    (addr, len, any::<u16>(), kind, state).prop_map(|(addr, len, id, kind, state)| {
        let flags = if kind > 7 { kind } else { kind | state };
        let addr = if kind == INDIRECT && id % 8 > 0 { TABLES + 16 * u64::from(id % 200) } else { addr };
        PackedDesc { addr, len, id, flags }
    })
}

#[test]
fn garbage_is_read_as_the_specification_has_it() {
    let config = ProptestConfig { cases: 3000, failure_persistence: None, ..ProptestConfig::default() };
    let descs = |n: usize| prop::collection::vec(garbage(), n);
    let taken = Cell::new([0; 3]);
    let ring = (1..=24usize).prop_flat_map(move |size| (descs(size), 0..size, any::<bool>()));
    TestRunner::new(config)
        .run(&(ring, descs(TABLE_SLOTS as usize)), |((ring, index, wrap), tables)| {
            let mut guest = Guest::new(ring.len() as u16, true);
            let at = Position { index: index as u16, wrap };
            guest.config.base = u32::from(at.bits()) * 0x1_0001;
            for (i, &desc) in (0..).zip(&ring) {
                guest.layout.set_desc(i, desc);
            }
            for (i, &desc) in (0..).zip(&tables) {
                guest.set_table(TABLES + 16 * i, desc);
            }
            // The ring lies in the same memory, so what the model is to know of it is read first.
            let expected = model(&ring, &tables, at.bits());
            let found = read(&guest);
            // Behind the end of the tables the model knows nothing.
            assert_eq!(found, expected);
            let mut counts = taken.get();
            counts[match &expected {
                None => 0,
                Some(_) if ring[index].flags & INDIRECT != 0 => 1,
                Some(_) => 2,
            }] += 1;
            taken.set(counts);
            Ok(())
        })
        .unwrap();
    // Else the garbage has been too bad to tell anything.
    assert!(taken.get().iter().all(|&n| n > 10), "{:?}", taken.get());
}
