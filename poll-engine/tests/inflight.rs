//! The record of requests in flight: back ends die at any step, and what takes over serves every request exactly once,
//! in the order it was taken. What a front end may write into the record costs its queue at most.
#![allow(clippy::unwrap_used)]

use std::collections::VecDeque;
use std::sync::Arc;

use poll_engine::device::features;
use poll_engine::memory::{MemoryMap, Ram};
use poll_engine::ring::chain::Chain;
use poll_engine::ring::driver::{Buffer, DriverRing};
use poll_engine::ring::inflight::{InflightMemory, InflightSpec, MAX_MEMENTO, QueueRegion};
use poll_engine::ring::{Ring, RingConfig, RingFormat, Token};
use proptest::prelude::*;

/// Features of the ring.
const RING: u64 = features::EVENT_IDX | features::INDIRECT_DESC;
const SIZE: u16 = 8;
const QUEUES: u16 = 2;
/// The queue under test: behind another one.
const QUEUE: u16 = 1;

/// What a front end keeps: guest memory, and the record.
struct Kept {
    _ram: Ram,
    driver: DriverRing,
    config: RingConfig,
    map: Arc<MemoryMap>,
    record: Ram,
    spec: InflightSpec,
    data: u64,
}

impl Kept {
    fn new(format: RingFormat, in_order: bool) -> Kept {
        let mut ram = Ram::new(0x10_0000, 1 << 20, false).unwrap();
        let packed = if format == RingFormat::Packed { features::RING_PACKED } else { 0 };
        let in_order = if in_order { features::IN_ORDER } else { 0 };
        let bits = features::EVENT_IDX | features::INDIRECT_DESC | packed | in_order;
        let config = DriverRing::lay_out(&mut ram, SIZE, bits).unwrap();
        let map = Arc::clone(ram.map());
        let driver = DriverRing::new(&config, &map).unwrap();
        let data = ram.alloc(4096, 16).unwrap();
        let record = Ram::new(0, 1 << 14, false).unwrap();
        let spec = InflightSpec { num_queues: QUEUES, queue_size: SIZE, ..InflightSpec::default() };
        Kept { _ram: ram, driver, config, map, record, spec: spec.sized(format), data }
    }

    fn region(&self) -> QueueRegion {
        let fd = self.record.fd().try_clone_to_owned().unwrap();
        let memory = InflightMemory::map(self.spec, fd).unwrap();
        memory.queue(QUEUE, self.config.format).unwrap().unwrap()
    }

    fn at(&self) -> u64 {
        self.spec.regions_bytes(self.config.format) / u64::from(QUEUES) * u64::from(QUEUE)
    }

    /// Where entry `i` lies; headers and entries are of the same size.
    fn entry(&self, i: usize) -> usize {
        (1 + i) * if self.config.format == RingFormat::Packed { 32 } else { 16 }
    }

    fn bytes(&self) -> Vec<u8> {
        let mut bytes = vec![0; (self.spec.regions_bytes(self.config.format) / u64::from(QUEUES)) as usize];
        self.record.map().slice(self.at(), bytes.len() as u32).unwrap().read(&mut bytes);
        bytes
    }

    fn set_bytes(&self, offset: usize, bytes: &[u8]) {
        let at = self.at() + offset as u64;
        assert_eq!(self.record.map().slice(at, bytes.len() as u32).unwrap().write(bytes), bytes.len());
    }

    /// A ring as QEMU starts it whose back end has died: of a split ring it knows where the used ring ends, of a packed
    /// one nothing.
    fn activate(&self) -> Ring {
        let used_idx = self.driver.split().map(|ring| ring.used_idx().into());
        let config = RingConfig { base: used_idx.unwrap_or(self.config.base), ..self.config };
        Ring::activate(&config, &self.map).unwrap().recover(self.region()).unwrap()
    }
}

/// A request and the how-manieth to be taken it was.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Taken {
    nth: u64,
    id: u16,
}

/// A driver, and back ends one after the other.
struct Pair {
    kept: Kept,
    ring: Ring,
    chain: Chain,
    /// Shown to the device and not taken.
    shown: VecDeque<u16>,
    /// Taken and not completed, in the order they were taken first.
    taken: Vec<(Taken, Option<Token>)>,
    nth: u64,
    /// The latest of those that the driver has seen completed.
    latest: u64,
    /// Completed and not published, as the driver will see them.
    completed: VecDeque<Taken>,
    added: usize,
}

impl Pair {
    fn new(format: RingFormat) -> Pair {
        Pair::with(format, false)
    }

    fn with(format: RingFormat, in_order: bool) -> Pair {
        let kept = Kept::new(format, in_order);
        let (ring, chain) = (kept.activate(), Chain::default());
        Pair {
            kept,
            ring,
            chain,
            shown: VecDeque::new(),
            taken: Vec::new(),
            nth: 0,
            latest: 0,
            completed: VecDeque::new(),
            added: 0,
        }
    }

    /// Chains of one, two and three descriptors.
    fn add(&mut self) {
        self.added += 1;
        let buffers: Vec<_> = (0..=self.added as u64 % 3)
            .map(|i| Buffer { addr: self.kept.data + 16 * i, len: 8, writable: i > 0 })
            .collect();
        if let Some(id) = self.kept.driver.add(&buffers) {
            self.kept.driver.publish();
            self.shown.push_back(id);
        }
    }

    fn take(&mut self) {
        if self.ring.available().unwrap() == 0 {
            assert!(self.shown.is_empty() && self.taken.iter().all(|(_, token)| token.is_some()));
            return;
        }
        let token = self.ring.take(&self.kept.map, &mut self.chain).unwrap();
        if let Some((taken, left)) = self.taken.iter_mut().find(|(_, token)| token.is_none()) {
            assert_eq!(token.id(), taken.id, "resubmitted out of order");
            *left = Some(token);
        } else {
            assert_eq!(Some(token.id()), self.shown.pop_front());
            self.taken.push((Taken { nth: self.nth, id: token.id() }, Some(token)));
            self.nth += 1;
        }
    }

    fn complete(&mut self, which: usize) {
        let here: Vec<usize> = (0..self.taken.len()).filter(|&i| self.taken[i].1.is_some()).collect();
        if here.is_empty() {
            return;
        }
        let (taken, token) = self.taken.remove(here[which % here.len()]);
        self.ring.complete(token.unwrap(), 8);
        self.completed.push_back(taken);
    }

    /// Stopped and started again, with nothing in flight but what an earlier back end had begun: that is available again,
    /// unless the driver of a split ring has seen others overtake it.
    fn stop(&mut self) {
        if self.taken.iter().any(|(_, token)| token.is_some()) {
            return;
        }
        self.publish(None);
        let overtaken = self.taken.iter().any(|(taken, _)| taken.nth < self.latest);
        let is_split = self.kept.config.format == RingFormat::Split;
        assert_eq!(self.ring.return_resubmits(), !(is_split && overtaken));
        if is_split && overtaken {
            return;
        }
        self.taken.drain(..).rev().for_each(|(taken, _)| self.shown.push_front(taken.id));
        let config = RingConfig { base: self.ring.base(), ..self.kept.config };
        let ring = Ring::activate(&config, &self.kept.map).unwrap();
        self.ring = ring.recover(self.kept.region().with_known_base(true)).unwrap();
        assert_eq!((self.ring.resubmits(), self.ring.in_flight()), (0, 0));
    }

    /// Publishes; the back end is killed when the driver can see it and `clears` entries are cleared, if told to be.
    fn publish(&mut self, dies: Option<usize>) {
        let before = self.kept.bytes();
        self.ring.publish();
        for taken in self.completed.drain(..) {
            self.latest = self.latest.max(taken.nth);
            assert_eq!(
                self.kept.driver.collect(),
                Some((taken.id, 8)),
                "what was completed is seen, in order"
            );
        }
        assert_eq!(self.kept.driver.collect(), None);
        if let Some(cleared) = dies {
            let after = self.kept.bytes();
            if self.kept.config.format == RingFormat::Packed {
                // The old fields.
                for old in [14..16, 18..20, 21..22] {
                    self.kept.set_bytes(old.start, &before[old]);
                }
            } else {
                self.kept.set_bytes(14, &before[14..16]);
            }
            let of_batch = |&i: &usize| before[i] == 1 && after[i] == 0;
            let entries = (0..usize::from(SIZE)).map(|i| self.kept.entry(i)).filter(of_batch);
            entries.skip(cleared).for_each(|at| self.kept.set_bytes(at, &[1]));
            self.die();
        }
    }

    /// Killed: nothing is told to anybody. What was completed and not published is in flight still.
    fn die(&mut self) {
        self.taken.extend(self.completed.drain(..).map(|taken| (taken, None)));
        for (_, token) in &mut self.taken {
            std::mem::forget(token.take());
        }
        self.taken.sort_by_key(|&(taken, _)| taken);
        self.ring = self.kept.activate();
        assert_eq!(usize::from(self.ring.resubmits()), self.taken.len());
        assert_eq!(self.ring.wants_interrupt(), Some(true), "the interrupt may have died with the back end");
        assert_eq!(self.ring.wants_interrupt(), None);
    }

    fn finish(mut self) {
        while self.ring.available().unwrap() > 0 {
            self.take();
        }
        while !self.taken.is_empty() {
            self.complete(0);
        }
        self.publish(None);
        assert_eq!((self.ring.in_flight(), self.ring.resubmits()), (0, 0));
        let base = self.ring.base();
        match self.kept.driver.split() {
            Some(ring) => assert_eq!(base, u32::from(ring.used_idx())),
            None => assert_eq!(base >> 16, base & 0xffff, "used behind available"),
        }
        let idle = self.kept.bytes();
        let in_flight = (0..usize::from(SIZE)).filter(|&i| idle[self.kept.entry(i)] != 0).count();
        assert_eq!(in_flight, 0, "still said to be in flight");
        assert_eq!(self.kept.driver.free(), usize::from(SIZE));
    }
}

#[derive(Clone, Copy, Debug)]
enum Op {
    Add,
    Take,
    Complete(usize),
    Publish(Option<usize>),
    Die,
    Stop,
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        6 => Just(Op::Add),
        6 => Just(Op::Take),
        4 => (0usize..8).prop_map(Op::Complete),
        3 => Just(Op::Publish(None)),
        1 => (0usize..8).prop_map(|n| Op::Publish(Some(n))),
        1 => Just(Op::Die),
        1 => Just(Op::Stop),
    ]
}

proptest! {
    #[test]
    fn back_ends_that_die_lose_and_double_nothing(
        ops in prop::collection::vec(op(), 0..400),
        packed: bool,
        in_order: bool,
    ) {
        let mut pair = Pair::with(if packed { RingFormat::Packed } else { RingFormat::Split }, in_order);
        for op in ops {
            match op {
                Op::Add => pair.add(),
                Op::Take => pair.take(),
                // A device that promises the order keeps it, with what another back end had begun as well.
                Op::Complete(which) => pair.complete(if in_order { 0 } else { which }),
                Op::Publish(dies) => pair.publish(dies),
                Op::Die => pair.die(),
                Op::Stop => pair.stop(),
            }
        }
        pair.finish();
    }

    #[test]
    fn no_record_makes_a_ring_panic_or_loop(
        noise in prop::collection::vec((0usize..288, any::<u8>()), 0..40),
        whole in any::<bool>(),
        sane in any::<[bool; 4]>(),
        added in 0usize..4,
        packed: bool,
    ) {
        let mut pair = Pair::new(if packed { RingFormat::Packed } else { RingFormat::Split });
        (0..added).for_each(|_| pair.add());
        (0..added / 2).for_each(|_| pair.take());
        if whole {
            pair.kept.set_bytes(0, &noise.iter().map(|(at, byte)| byte ^ *at as u8).cycle().take(192).collect::<Vec<_>>());
        }
        let room = pair.kept.bytes().len();
        for (at, byte) in noise {
            pair.kept.set_bytes(at % room, &[byte % 10]);
        }
        // Most random headers are refused at once: get some of them past that.
        let sane_at: [(usize, &[u8]); 4] =
            [(0, &[0; 8]), (8, &1u16.to_ne_bytes()), (10, &SIZE.to_ne_bytes()), (14, &[0, 0])];
        for ((at, value), _) in sane_at.iter().zip(sane).filter(|(_, sane)| *sane) {
            pair.kept.set_bytes(*at, value);
        }
        pair.taken.drain(..).for_each(std::mem::forget);
        let ring = Ring::activate(&pair.kept.config, &pair.kept.map).unwrap();
        if let Ok(mut ring) = ring.recover(pair.kept.region()) {
            prop_assert!(ring.resubmits() <= SIZE);
            for _ in 0..2 * SIZE {
                match ring.available() {
                    Ok(0) | Err(_) => break,
                    Ok(_) => {}
                }
                let Ok(token) = ring.take(&pair.kept.map, &mut pair.chain) else { break };
                ring.complete(token, 8);
                ring.publish();
            }
        }
    }
}

#[test]
fn the_layout_is_that_of_the_document() {
    let mut pair = Pair::new(RingFormat::Split);
    assert_eq!(
        pair.kept.spec.regions_bytes(RingFormat::Split),
        2 * 192,
        "16 + 8 * 16 bytes, to the next multiple of 64"
    );
    assert_eq!(pair.kept.spec.mmap_size, 2 * 192 + 64 + 2 * 2048, "and the memento");
    let half = |pair: &Pair, at: usize| u16::from_ne_bytes(pair.kept.bytes()[at..at + 2].try_into().unwrap());
    assert_eq!([8, 10, 12, 14].map(|at| half(&pair, at)), [1, SIZE, 0, 0]);
    (0..3).for_each(|_| pair.add());
    (0..3).for_each(|_| pair.take());
    let heads: Vec<u16> = pair.taken.iter().map(|(taken, _)| taken.id).collect();
    for (counter, head) in heads.iter().enumerate() {
        let entry = &pair.kept.bytes()[16 + 16 * usize::from(*head)..][..16];
        assert_eq!(entry[0], 1, "inflight");
        assert_eq!(u64::from_ne_bytes(entry[8..].try_into().unwrap()), counter as u64);
    }
    pair.complete(2);
    pair.complete(0);
    assert_eq!(half(&pair, 12), heads[0], "last_batch_head");
    assert_eq!(half(&pair, 16 + 16 * usize::from(heads[0]) + 6), heads[2], "next");
    assert_eq!(half(&pair, 14), 0, "used_idx");
    pair.publish(None);
    assert_eq!(half(&pair, 14), 2);
    let entries = pair.kept.bytes();
    assert_eq!([0, 1, 2].map(|i| entries[16 + 16 * usize::from(heads[i])]), [0, 1, 0]);
    pair.finish();
}

/// `QueueRegionPacked` and `DescStatePacked` of the vhost-user document, by their offsets.
#[test]
fn the_layout_of_packed_rings_is_that_of_the_document() {
    let mut pair = Pair::new(RingFormat::Packed);
    assert_eq!(
        pair.kept.spec.regions_bytes(RingFormat::Packed),
        2 * 320,
        "32 + 8 * 32 bytes, to the next 64"
    );
    let half = |pair: &Pair, at: usize| u16::from_ne_bytes(pair.kept.bytes()[at..at + 2].try_into().unwrap());
    // features, version, desc_num, free_head, old_free_head, used_idx, old_used_idx; then both wrap counters.
    let header = |pair: &Pair| [0, 2, 4, 6, 8, 10, 12, 14, 16, 18].map(|at| half(pair, at));
    let wraps = |pair: &Pair| [pair.kept.bytes()[20], pair.kept.bytes()[21]];
    assert_eq!((header(&pair), wraps(&pair)), ([0, 0, 0, 0, 1, SIZE, 0, 0, 0, 0], [1, 1]));
    // Of two, three and one descriptors.
    (0..3).for_each(|_| pair.add());
    (0..3).for_each(|_| pair.take());
    assert_eq!((header(&pair), wraps(&pair)), ([0, 0, 0, 0, 1, SIZE, 6, 6, 0, 0], [1, 1]));
    let ids: Vec<u16> = pair.taken.iter().map(|(taken, _)| taken.id).collect();
    for (counter, (first, num)) in [(0, 2), (2, 3), (5, 1)].into_iter().enumerate() {
        let bytes = pair.kept.bytes();
        let entry = |i: usize| &bytes[32 + 32 * i..][..32];
        let half = |i: usize, at: usize| u16::from_ne_bytes(entry(i)[at..at + 2].try_into().unwrap());
        assert_eq!(entry(first)[0], 1, "inflight");
        assert_eq!([4, 6].map(|at| usize::from(half(first, at))), [first + num - 1, num], "last and num");
        assert_eq!(u64::from_ne_bytes(entry(first)[8..16].try_into().unwrap()), counter as u64, "counter");
        for i in 0..num {
            let at = first + i;
            if i > 0 {
                assert_eq!((entry(at)[0], usize::from(half(at - 1, 2))), (0, at), "inflight and next");
            }
            assert_eq!(half(at, 16), ids[counter], "id");
            // WRITE for all but the first (virtio 1.3, 2.8.5).
            assert_eq!(half(at, 18) & 2, if i > 0 { 2 } else { 0 }, "flags");
            assert_eq!(u32::from_ne_bytes(entry(at)[20..24].try_into().unwrap()), 8, "len");
            let addr = u64::from_ne_bytes(entry(at)[24..].try_into().unwrap());
            assert_eq!(addr, pair.kept.data + 16 * i as u64, "addr");
        }
    }
    pair.complete(2);
    pair.complete(0);
    assert_eq!([16, 18].map(|at| half(&pair, at)), [0, 0], "not before they are shown");
    pair.publish(None);
    assert_eq!(
        ([16, 18].map(|at| half(&pair, at)), wraps(&pair)),
        ([3, 3], [1, 1]),
        "used_idx, and as it was"
    );
    let bytes = pair.kept.bytes();
    assert_eq!([0, 2, 5].map(|i| bytes[32 + 32 * i]), [0, 1, 0], "inflight");
    assert_eq!(half(&pair, 12), half(&pair, 14), "free_head, and as it was");
    pair.finish();
}

#[test]
fn packed_records_of_other_rings_are_refused() {
    let kept = Kept::new(RingFormat::Packed, false);
    drop(kept.activate());
    let refused = |what: &str| {
        let ring = Ring::activate(&kept.config, &kept.map).unwrap();
        let error = ring.recover(kept.region()).unwrap_err().to_string();
        assert!(error.contains(what), "{error}");
    };
    // Offset, bytes that are wrong there, those that are right.
    let n = SIZE.to_ne_bytes();
    for (at, bad, good, what) in [
        (8, [2, 0], [1, 0], "version"),
        (0, [1, 0], [0, 0], "features"),
        (10, [9, 0], n, "number of entries"),
        (16, n, [0, 0], "used index"),
        (12, n, [0, 0], "in no list"),
        (14, n, [0, 0], "in no list"),
        (34, [0, 0], [1, 0], "loop"),
        (32 + 7 * 32 + 2, [3, 0], n, "loop"),
    ] {
        // Only one of both heads counts, by where the ring stands.
        let both = at == 12 || at == 14;
        kept.set_bytes(at, &bad);
        if both {
            kept.set_bytes(26 - at, &bad);
        }
        refused(what);
        kept.set_bytes(at, &good);
        if both {
            kept.set_bytes(26 - at, &good);
        }
    }
    let whole = Ring::activate(&kept.config, &kept.map).unwrap();
    whole.recover(kept.region()).unwrap();
    let mut ram = Ram::new(0x10_0000, 1 << 20, false).unwrap();
    let config = DriverRing::lay_out(&mut ram, 2 * SIZE, RING | features::RING_PACKED).unwrap();
    let larger = Ring::activate(&config, ram.map()).unwrap();
    assert!(larger.recover(kept.region()).is_err());
}

#[test]
fn records_of_other_rings_are_refused() {
    let kept = Kept::new(RingFormat::Split, false);
    drop(kept.activate());
    let refused = |what: &str| {
        let ring = Ring::activate(&kept.config, &kept.map).unwrap();
        let error = ring.recover(kept.region()).unwrap_err().to_string();
        assert!(error.contains(what), "{error}");
    };
    kept.set_bytes(8, &2u16.to_ne_bytes());
    refused("version");
    kept.set_bytes(8, &1u16.to_ne_bytes());
    kept.set_bytes(0, &[1]);
    refused("features");
    kept.set_bytes(0, &[0]);
    kept.set_bytes(10, &9u16.to_ne_bytes());
    refused("number of entries");
    kept.set_bytes(10, &SIZE.to_ne_bytes());
    kept.set_bytes(16, &[1]);
    kept.set_bytes(14, &100u16.to_ne_bytes());
    refused("used index");
    // One request was finished by the batch whose end was not written down: it cannot be one outside of the table.
    kept.set_bytes(14, &u16::MAX.to_ne_bytes());
    kept.set_bytes(12, &SIZE.to_ne_bytes());
    refused("out of the table");
    let mut ram = Ram::new(0x10_0000, 1 << 20, false).unwrap();
    let config = DriverRing::lay_out(&mut ram, 2 * SIZE, RING).unwrap();
    let larger = Ring::activate(&config, ram.map()).unwrap();
    assert!(larger.recover(kept.region()).is_err());
}

/// A ring that is laid out anew and keeps a record in which nothing is in flight begins where the driver does.
#[test]
fn an_idle_record_outlives_a_reset_of_the_ring() {
    let mut pair = Pair::new(RingFormat::Split);
    for _ in 0..20 {
        pair.add();
        pair.take();
        pair.complete(0);
        pair.publish(None);
    }
    pair.kept.driver.split().unwrap().set_used_idx(0);
    pair.kept.driver.split().unwrap().set_avail_idx(0);
    pair.kept.driver = DriverRing::new(&pair.kept.config, &pair.kept.map).unwrap();
    pair.ring = pair.kept.activate();
    assert_eq!((pair.ring.base(), pair.ring.resubmits()), (0, 0));
    pair.add();
    pair.take();
    pair.finish();
}

#[test]
fn a_memento_is_what_was_left_last_whatever_the_front_end_does() {
    for format in [RingFormat::Split, RingFormat::Packed] {
        let kept = Kept::new(format, false);
        let place = || {
            let fd = kept.record.fd().try_clone_to_owned().unwrap();
            InflightMemory::map(kept.spec, fd).unwrap().memento(format).unwrap()
        };
        assert!(place().read().is_empty());
        for (n, len) in [1, MAX_MEMENTO, 0, 700, 3].into_iter().enumerate() {
            place().write(&vec![n as u8; len]);
            assert_eq!(place().read(), vec![n as u8; len], "by another process");
        }
        let at = kept.spec.regions_bytes(format);
        for current in [u64::MAX, 1 << 32 | 0x801, 0x800, u64::MAX << 32, 1 << 63] {
            kept.record.map().slice(at, 8).unwrap().write(&current.to_ne_bytes());
            assert!(place().read().len() <= MAX_MEMENTO);
            place().write(b"again");
            assert_eq!(place().read(), b"again");
        }
        // Other back ends' records have no room for one.
        let spec = InflightSpec { mmap_size: kept.spec.mmap_size - 1, ..kept.spec };
        let memory = InflightMemory::map(spec, kept.record.fd().try_clone_to_owned().unwrap()).unwrap();
        assert!(memory.memento(format).is_none());
    }
}
