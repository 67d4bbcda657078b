//! What a guest can write into a ring to break its device, case by case: each has its error, and none does harm.
#![allow(clippy::unwrap_used)]

use std::sync::Arc;

use crossbeam::sync::WaitGroup;
use poll_engine::device::features;
use poll_engine::engine::queue::{Notifier, Queue};
use poll_engine::memory::{MapHold, MemoryError, MemoryMap, Ram};
use poll_engine::ring::chain::Chain;
use poll_engine::ring::driver::DriverRing;
use poll_engine::ring::layout::{DESC_F_INDIRECT, DESC_F_NEXT, DESC_F_WRITE, Desc};
use poll_engine::ring::{Ahead, Ring, RingConfig, RingError};
use poll_engine::stats::{ErrorKind, QueueStats};

const SIZE: u16 = 16;
const GUEST: u64 = 0x10_0000;
const BYTES: u64 = 1 << 20;
const END: u64 = GUEST + BYTES;
/// Free for tables and data.
const AREA: u64 = GUEST + 0x1_0000;

const NEXT: u16 = DESC_F_NEXT;
const WRITE: u16 = DESC_F_WRITE;
const INDIRECT: u16 = DESC_F_INDIRECT;

fn desc(addr: u64, len: u32, flags: u16, next: u16) -> Desc {
    Desc { addr, len, flags, next }
}

struct Guest {
    _ram: Ram,
    map: Arc<MemoryMap>,
    config: RingConfig,
    driver: DriverRing,
    ring: Ring,
}

impl Guest {
    fn new() -> Guest {
        Guest::with(Vec::new(), true)
    }

    /// A guest with further memory.
    fn with(more: Vec<&Ram>, indirect: bool) -> Guest {
        let mut ram = Ram::new(GUEST, BYTES, false).unwrap();
        let config =
            DriverRing::lay_out(&mut ram, SIZE, if indirect { features::INDIRECT_DESC } else { 0 }).unwrap();
        let regions = std::iter::once(&ram).chain(more).map(|r| Arc::clone(&r.map().regions()[0]));
        let map = Arc::new(MemoryMap::new(regions.collect()).unwrap());
        let driver = DriverRing::new(&config, &map).unwrap();
        let ring = Ring::activate(&config, &map).unwrap();
        Guest { _ram: ram, map, config, driver, ring }
    }

    fn set_ring(&self, descs: &[Desc]) {
        for (i, &desc) in (0..).zip(descs) {
            self.driver.split().unwrap().set_desc(i, desc);
        }
    }

    fn set_table(&self, at: u64, descs: &[Desc]) {
        for (i, desc) in (0..).zip(descs) {
            self.write(at + 16 * i, &desc.to_bytes());
        }
    }

    fn write(&self, at: u64, bytes: &[u8]) {
        let n = self.map.slice(at, bytes.len() as u32).unwrap().write(bytes);
        if n < bytes.len() {
            self.write(at + n as u64, &bytes[n..]);
        }
    }

    fn show(&mut self, head: u16) {
        self.driver.make_available(head);
        self.driver.publish();
    }

    /// Has the device take the chain at `head`.
    fn take(&mut self, head: u16) -> Result<(), RingError> {
        self.show(head);
        assert_eq!(self.ring.available()?, 1);
        // Hints follow the guest's values, too.
        self.ring.prefetch(SIZE, Ahead::HEADER, &self.map);
        let token = self.ring.take(&self.map, &mut Chain::default())?;
        self.ring.complete(token, 0);
        Ok(())
    }

    /// As `take`, on a fresh guest with these descriptors.
    fn one(ring: &[Desc]) -> Result<(), RingError> {
        let mut guest = Guest::new();
        guest.set_ring(ring);
        guest.take(0)
    }

    /// As `one`, with an indirect table at `AREA`.
    fn table(table: &[Desc], bytes: u32) -> Result<(), RingError> {
        let mut guest = Guest::new();
        guest.set_table(AREA, table);
        guest.set_ring(&[desc(AREA, bytes, INDIRECT, 0)]);
        guest.take(0)
    }

    /// The lengths of the slices of the chain at `head`, readable and writable ones, as a handler sees them.
    fn slices(&mut self, head: u16) -> (Vec<usize>, Vec<usize>) {
        self.show(head);
        let hold = MapHold::new(Arc::clone(&self.map), WaitGroup::new());
        let mut queue =
            Queue::new("q".into(), &self.config, hold, Notifier::default(), Arc::default()).unwrap();
        assert_eq!(queue.ready(), 1);
        let request = queue.take().unwrap();
        let lengths = |s: poll_engine::ring::chain::Slices<'_>| s.map(|s| s.len()).collect();
        let chain = queue.chain();
        let all = (lengths(chain.readable(0, u32::MAX)), lengths(chain.writable(0, u32::MAX)));
        queue.complete(request, 0);
        all
    }
}

macro_rules! refused {
    ($outcome:expr, $error:pat $(if $cond:expr)?) => {{
        let outcome = $outcome;
        assert!(matches!(&outcome, Err(e) if matches!(e, $error $(if $cond)?)), "{outcome:?}");
    }};
}

#[test]
fn indices_outside_the_table() {
    for head in [SIZE, SIZE + 1, 0x8000, 0xffff] {
        refused!(Guest::new().take(head), RingError::BadIndex { index, size: 16 } if *index == head);
    }
    refused!(Guest::one(&[desc(AREA, 1, NEXT, SIZE)]), RingError::BadIndex { index: 16, size: 16 });
    refused!(Guest::one(&[desc(AREA, 1, NEXT, 0xffff)]), RingError::BadIndex { index: 0xffff, .. });
    refused!(Guest::table(&[desc(AREA, 1, NEXT, 2)], 32), RingError::BadIndex { index: 2, size: 2 });
    // Without NEXT, whatever `next` says does not matter.
    Guest::one(&[desc(AREA, 1, 0, 0xffff)]).unwrap();
}

#[test]
fn loops() {
    refused!(Guest::one(&[desc(AREA, 1, NEXT, 0)]), RingError::TooLong(16));
    refused!(Guest::one(&[desc(AREA, 1, NEXT, 1), desc(AREA, 1, NEXT, 0)]), RingError::TooLong(16));
    refused!(Guest::one(&[desc(AREA, 1, NEXT, 1), desc(AREA, 1, NEXT, 1)]), RingError::TooLong(16));
    refused!(Guest::table(&[desc(AREA, 1, NEXT, 0)], 16), RingError::TooLong(1));
    refused!(Guest::table(&[desc(AREA, 1, NEXT, 1), desc(AREA, 1, NEXT, 0)], 64), RingError::TooLong(4));
    // However long the table says it is, a loop is not followed for longer than any driver's chain.
    refused!(Guest::table(&[desc(AREA, 1, NEXT, 0)], 16 * 4000), RingError::TooLong(1024));
}

#[test]
fn indirect_where_it_must_not_be() {
    refused!(Guest::table(&[desc(AREA, 16, INDIRECT, 0)], 16), RingError::BadIndirect);
    refused!(
        Guest::table(&[desc(AREA, 16, NEXT, 1), desc(AREA, 16, INDIRECT, 0)], 32),
        RingError::BadIndirect
    );
    let plain = desc(AREA, 16, 0, 0);
    refused!(Guest::one(&[desc(AREA, 16, INDIRECT | NEXT, 1), plain]), RingError::BadIndirect);
    let second = desc(AREA, 16, INDIRECT | NEXT, 2);
    refused!(Guest::one(&[desc(AREA, 16, NEXT, 1), second, plain]), RingError::BadIndirect);
    let mut guest = Guest::with(Vec::new(), false);
    guest.set_table(AREA, &[plain]);
    guest.set_ring(&[desc(AREA, 16, INDIRECT, 0)]);
    refused!(guest.take(0), RingError::BadIndirect);
}

#[test]
fn indirect_tables_of_bad_length() {
    // The last one is of more entries than `next` can name.
    for bytes in [0, 1, 15, 17, 24, u32::MAX, (1 << 20) + 16] {
        refused!(Guest::table(&[desc(AREA, 1, 0, 0)], bytes), RingError::BadTable(n) if *n == bytes);
    }
    Guest::table(&[desc(AREA, 1, 0, 0)], 1 << 20).unwrap();
    // Longer than the ring is against 2.7.5.3.1, but drivers do it.
    let long: Vec<_> = (1..=40).map(|i| desc(AREA, 1, if i < 40 { NEXT } else { 0 }, i)).collect();
    Guest::table(&long, 16 * 40).unwrap();
}

#[test]
fn addresses_outside_of_memory() {
    let outside = [
        (0, 1),
        (GUEST - 1, 1),
        (GUEST - 1, 2),
        (END, 1),
        (END - 1, 2),
        (END - 8, u32::MAX),
        (u64::MAX, 1),
        (u64::MAX, u32::MAX),
        (u64::MAX - 7, 16),
        (GUEST, u32::MAX),
    ];
    for (addr, len) in outside {
        for flags in [0, WRITE] {
            let outcome = Guest::one(&[desc(addr, len, flags, 0)]);
            refused!(outcome, RingError::Memory(MemoryError::Outside { addr: a, .. }) if *a == addr);
        }
        // As the address of a table, too, when not even its first entry is inside.
        if addr != GUEST {
            refused!(Guest::one(&[desc(addr, 16, INDIRECT, 0)]), RingError::Memory(_));
        }
    }
    Guest::one(&[desc(END - 1, 1, 0, 0)]).unwrap();
    refused!(Guest::one(&[desc(END - 16, 32, INDIRECT, 0)]), RingError::ZeroLength);
    let mut guest = Guest::new();
    guest.set_table(END - 16, &[desc(AREA, 1, NEXT, 1)]);
    guest.set_ring(&[desc(END - 16, 32, INDIRECT, 0)]);
    refused!(guest.take(0), RingError::Memory(_));
}

/// The front end may put a region as high as addresses go; a guest's range must not wrap around to the bottom.
#[test]
fn addresses_at_the_top_do_not_wrap_around() {
    let top = Ram::new(u64::MAX - 0xfff, 0xfff, false).unwrap();
    let bottom = Ram::new(0, 4096, false).unwrap();
    for flags in [0, WRITE] {
        let mut guest = Guest::with(vec![&top, &bottom], true);
        guest.set_ring(&[desc(u64::MAX - 16, 64, flags, 0), desc(u64::MAX - 16, 16, flags, 0)]);
        refused!(guest.take(0), RingError::Memory(MemoryError::Outside { .. }));
        let mut guest = Guest::with(vec![&top, &bottom], true);
        guest.set_ring(&[desc(u64::MAX - 16, 16, flags, 0)]);
        guest.take(0).unwrap();
    }
    // A table whose later entries would lie beyond the last address.
    let mut guest = Guest::with(vec![&top, &bottom], true);
    guest.set_table(u64::MAX - 32, &[desc(AREA, 1, NEXT, 9)]);
    guest.set_ring(&[desc(u64::MAX - 32, 256, INDIRECT, 0)]);
    refused!(guest.take(0), RingError::Memory(MemoryError::Outside { .. }));
}

#[test]
fn buffers_and_tables_may_cross_from_one_region_into_the_next() {
    let next = Ram::new(END, BYTES, false).unwrap();
    let mut guest = Guest::with(vec![&next], true);
    guest.set_ring(&[desc(END - 100, 300, NEXT, 1), desc(END - 1, 2, WRITE, 0)]);
    assert_eq!(guest.slices(0), (vec![100, 200], vec![1, 1]));
    // A table that is cut in the middle of a descriptor, and one between two.
    for cut in [24, 16, 7] {
        let mut guest = Guest::with(vec![&next], true);
        guest.set_table(END - cut, &[desc(AREA, 10, NEXT, 2), desc(0, 0, 0, 0), desc(AREA, 20, WRITE, 0)]);
        guest.set_ring(&[desc(END - cut, 48, INDIRECT, 0)]);
        assert_eq!(guest.slices(0), (vec![10], vec![20]));
    }
    // There is a third region, but a gap before it.
    let far = Ram::new(END + BYTES + 4096, BYTES, false).unwrap();
    let mut guest = Guest::with(vec![&next, &far], true);
    guest.set_ring(&[desc(END - 100, (BYTES + 8192) as u32, WRITE, 0)]);
    refused!(guest.take(0), RingError::Memory(_));
}

#[test]
fn zero_length_and_order() {
    refused!(Guest::one(&[desc(AREA, 0, 0, 0)]), RingError::ZeroLength);
    refused!(Guest::one(&[desc(AREA, 0, WRITE, 0)]), RingError::ZeroLength);
    refused!(Guest::one(&[desc(AREA, 8, NEXT, 1), desc(AREA, 0, WRITE, 0)]), RingError::ZeroLength);
    refused!(Guest::table(&[desc(AREA, 0, 0, 0)], 16), RingError::ZeroLength);
    refused!(Guest::one(&[desc(AREA, 8, WRITE | NEXT, 1), desc(AREA, 8, 0, 0)]), RingError::BadOrder);
    let table = [desc(AREA, 8, WRITE | NEXT, 1), desc(AREA, 8, 0, 0)];
    refused!(Guest::table(&table, 32), RingError::BadOrder);
    // Also from the ring's table into an indirect one.
    let mut guest = Guest::new();
    guest.set_table(AREA, &[desc(AREA, 8, 0, 0)]);
    guest.set_ring(&[desc(AREA, 8, WRITE | NEXT, 1), desc(AREA, 16, INDIRECT, 0)]);
    refused!(guest.take(0), RingError::BadOrder);
}

#[test]
fn four_gibibytes_are_too_many() {
    // Never touched, so it costs nothing.
    let big = Ram::new(1 << 32, 1 << 32, false).unwrap();
    let mut guest = Guest::with(vec![&big], true);
    guest.set_ring(&[desc(1 << 32, u32::MAX, WRITE, 0)]);
    assert_eq!(guest.slices(0), (vec![], vec![u32::MAX as usize]));
    for second in [0, WRITE] {
        for (len, ok) in [(1 << 31, false), ((1 << 31) - 1, true)] {
            let mut guest = Guest::with(vec![&big], true);
            guest.set_ring(&[desc(1 << 32, 1 << 31, second & WRITE | NEXT, 1), desc(1 << 32, len, WRITE, 0)]);
            let outcome = guest.take(0);
            assert!(if ok { outcome.is_ok() } else { matches!(outcome, Err(RingError::TooManyBytes)) });
        }
    }
}

#[test]
fn the_available_index_must_not_jump() {
    for jump in [SIZE + 1, 0x7fff, 0x8000, 0xffff] {
        let mut guest = Guest::new();
        guest.driver.split().unwrap().set_avail_idx(jump);
        refused!(guest.ring.available(), RingError::AvailJump(n) if *n == jump);
        // Nothing was taken over from it.
        guest.driver.split().unwrap().set_avail_idx(0);
        assert_eq!(guest.ring.available().unwrap(), 0);
    }
    let mut guest = Guest::new();
    guest.driver.split().unwrap().set_avail_idx(SIZE);
    assert_eq!(guest.ring.available().unwrap(), SIZE);
}

#[test]
fn one_head_again_and_again() {
    let mut guest = Guest::new();
    guest.set_ring(&[desc(AREA, 1, 0, 0)]);
    let mut tokens = Vec::new();
    for _ in 0..SIZE {
        guest.show(0);
        assert_eq!(guest.ring.available().unwrap(), 1);
        tokens.push(guest.ring.take(&guest.map, &mut Chain::default()).unwrap());
    }
    guest.show(0);
    assert_eq!(guest.ring.available().unwrap(), 1);
    refused!(guest.ring.take(&guest.map, &mut Chain::default()), RingError::TooManyInFlight);
    assert_eq!((guest.ring.in_flight(), guest.ring.base()), (SIZE, u32::from(SIZE)));
    for token in tokens {
        guest.ring.complete(token, 0);
    }
    assert_eq!(guest.ring.in_flight(), 0);
}

#[test]
fn rings_that_cannot_be() {
    let guest = Guest::new();
    let good = guest.config;
    let activate = |config: RingConfig| Ring::activate(&config, &guest.map).map(|_| ());
    activate(good).unwrap();
    for size in [0, 3, 32769, 65536, u32::MAX] {
        refused!(activate(RingConfig { size, ..good }), RingError::BadSize(n) if *n == size);
    }
    let misaligned = [
        RingConfig { desc_addr: good.desc_addr + 8, ..good },
        RingConfig { avail_addr: good.avail_addr + 1, ..good },
        RingConfig { used_addr: good.used_addr + 2, ..good },
    ];
    for config in misaligned {
        refused!(activate(config), RingError::Misaligned(_));
    }
    let last = guest.map.regions()[0].spec().user_addr + BYTES;
    for addr in [last - 16, last, u64::MAX - 15, 0] {
        refused!(activate(RingConfig { desc_addr: addr, ..good }), RingError::Memory(_));
        refused!(activate(RingConfig { avail_addr: addr, ..good }), RingError::Memory(_));
        refused!(activate(RingConfig { used_addr: addr, ..good }), RingError::Memory(_));
    }
    // The event field behind the used ring belongs to it.
    let exact = last - (6 + 8 * u64::from(SIZE)).next_multiple_of(4);
    activate(RingConfig { used_addr: exact, ..good }).unwrap();
    refused!(activate(RingConfig { used_addr: exact + 4, ..good }), RingError::Memory(_));
}

#[test]
fn a_broken_ring_is_counted_by_kind_and_takes_nothing_more() {
    let cases: [(Desc, ErrorKind); 2] =
        [(desc(AREA, 0, 0, 0), ErrorKind::Ring), (desc(END, 1, 0, 0), ErrorKind::Memory)];
    for (bad, kind) in cases {
        let mut guest = Guest::new();
        guest.set_ring(&[desc(AREA, 1, 0, 0), bad]);
        let hold = MapHold::new(Arc::clone(&guest.map), WaitGroup::new());
        let stats = Arc::new(QueueStats::default());
        let notifier = Notifier::default();
        let mut queue = Queue::new("q".into(), &guest.config, hold, notifier, Arc::clone(&stats)).unwrap();
        guest.show(0);
        guest.show(1);
        assert_eq!(queue.ready(), 2);
        let good = queue.take().unwrap();
        assert!(queue.take().is_none());
        assert!(queue.is_broken());
        assert_eq!((stats.errors(kind), stats.errors_total(), queue.base()), (1, 1, 1));
        queue.complete(good, 0);
        assert_eq!(queue.in_flight(), 0);
    }
}
