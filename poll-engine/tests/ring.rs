//! Both sides of a ring of either format against each other, with a model of what each of them is owed: every request comes back
//! exactly once, and whoever goes to sleep is woken.
#![allow(clippy::unwrap_used, clippy::struct_excessive_bools)]

use std::collections::VecDeque;
use std::sync::Arc;

use crossbeam::sync::WaitGroup;
use poll_engine::device::features;
use poll_engine::engine::queue::{Notifier, Queue};
use poll_engine::memory::{MapHold, MemoryMap, Ram};
use poll_engine::ring::chain::Chain;
use poll_engine::ring::driver::{Buffer, DriverRing};
use poll_engine::ring::layout::SplitLayout;
use poll_engine::ring::split::need_event;
use poll_engine::ring::{Ring, RingConfig, Token};
use proptest::prelude::*;
use proptest::sample::Index;
use vring::packed::Position;

const MAX_PARTS: usize = 8;
const DATA: u64 = 64 << 10;

/// Both sides of one ring, and what they owe each other.
struct Pair {
    map: Arc<MemoryMap>,
    driver: DriverRing,
    ring: Ring,
    chain: Chain,
    data: u64,
    tables: u64,
    table: u64,
    added: VecDeque<u16>,
    /// Writable bytes of chains not yet taken.
    writable: VecDeque<u32>,
    shown: VecDeque<u16>,
    /// Tokens, and how many bytes can be written to their chains.
    in_flight: Vec<(Token, u32)>,
    completed: VecDeque<(u16, u32)>,
    returned: VecDeque<(u16, u32)>,
    in_order: bool,
    interrupts: bool,
    notification: bool,
    /// Something has been published, and not yet been asked about.
    unasked: bool,
    /// It was published to a driver that slept.
    owed: bool,
    /// The driver has declined interrupts since: too late to be heard, it may get one more.
    declined_late: bool,
    driver_sleeps: bool,
    device_sleeps: bool,
}

/// Features of a ring.
const SPLIT: u64 = features::INDIRECT_DESC;
const PACKED: u64 = SPLIT | features::RING_PACKED;
const FORMATS: [u64; 2] = [SPLIT, PACKED];
const EVENT_IDX: u64 = features::EVENT_IDX;
const IN_ORDER: u64 = features::IN_ORDER;

/// A ring that has run before, up to `base` and `used`. Of a packed ring `base` alone says how far, since both sides
/// have come equally far when nothing is in flight.
fn lay_out(size: u16, features: u64, base: u16, used: u16) -> (Ram, RingConfig) {
    let mut ram = Ram::new(0x10_0000, 8 << 20, false).unwrap();
    let config = DriverRing::lay_out(&mut ram, size, features).unwrap();
    let base = if features & features::RING_PACKED == 0 {
        // Both sides go on from what is in memory.
        let layout = SplitLayout::new(&config, ram.map()).unwrap();
        layout.set_avail_idx(base);
        layout.set_used_idx(used);
        base.into()
    } else {
        let at = Position { index: (base & 0x7fff) % size, wrap: base >> 15 == 0 };
        u32::from(at.bits()) * 0x1_0001
    };
    (ram, RingConfig { base, ..config })
}

impl Pair {
    fn new(size: u16, features: u64, base: u16, used: u16) -> Pair {
        let (mut ram, config) = lay_out(size, features, base, used);
        let map = Arc::clone(ram.map());
        Pair {
            driver: DriverRing::new(&config, &map).unwrap(),
            ring: Ring::activate(&config, &map).unwrap(),
            chain: Chain::default(),
            data: ram.alloc(DATA, 16).unwrap(),
            tables: ram.alloc(16 * MAX_PARTS as u64 * u64::from(size), 16).unwrap(),
            map,
            table: 0,
            added: VecDeque::new(),
            writable: VecDeque::new(),
            shown: VecDeque::new(),
            in_flight: Vec::new(),
            completed: VecDeque::new(),
            returned: VecDeque::new(),
            in_order: features & IN_ORDER != 0,
            interrupts: true,
            notification: false,
            unasked: false,
            owed: false,
            declined_late: false,
            driver_sleeps: false,
            device_sleeps: false,
        }
    }

    fn add(&mut self, readable: usize, writable: usize, indirect: bool) {
        let buffers: Vec<_> = (0..readable + writable)
            .map(|i| Buffer { addr: self.data + 100 * i as u64, len: 100, writable: i >= readable })
            .collect();
        let room = self.driver.free() >= if indirect { 1 } else { buffers.len() };
        let head = if indirect {
            // As many tables as descriptors: a table is used again only when its chain has been read.
            let table = self.tables + 16 * MAX_PARTS as u64 * (self.table % u64::from(self.ring.size()));
            self.driver.add_indirect(&self.map, table, &buffers)
        } else {
            self.driver.add(&buffers)
        };
        assert_eq!(head.is_some(), room, "{} free for {}", self.driver.free(), buffers.len());
        if let Some(head) = head {
            self.table += 1;
            self.added.push_back(head);
            self.writable.push_back(100 * writable as u32);
        }
    }

    fn publish(&mut self) {
        let any = !self.added.is_empty();
        let kick = self.driver.publish();
        if self.device_sleeps && any {
            assert!(kick, "lost kick");
        }
        if !self.notification || !any {
            assert!(!kick, "kick that nobody asked for");
        }
        self.device_sleeps &= !any;
        self.shown.append(&mut self.added);
    }

    fn take(&mut self, count: u16) {
        for _ in 0..count {
            if self.ring.available().unwrap() == 0 {
                assert!(self.shown.is_empty(), "chains hidden from the device");
                return;
            }
            let token = self.ring.take(&self.map, &mut self.chain).unwrap();
            assert_eq!(Some(token.id()), self.shown.pop_front(), "out of order");
            let writable = self.writable.pop_front().unwrap();
            self.in_flight.push((token, writable));
            self.device_sleeps = false;
        }
        assert_eq!(usize::from(self.ring.in_flight()), self.in_flight.len());
    }

    /// Takes some, thinks better of it, and would come upon the same ones again.
    fn untake(&mut self, count: u16) {
        let before = self.in_flight.len();
        self.take(count);
        for (token, writable) in self.in_flight.drain(before..).rev() {
            self.shown.push_front(token.id());
            self.writable.push_front(writable);
            self.ring.untake(token);
        }
        assert_eq!(usize::from(self.ring.in_flight()), before);
    }

    fn complete(&mut self, which: Index, len: u32) {
        if !self.in_flight.is_empty() {
            let which = if self.in_order { 0 } else { which.index(self.in_flight.len()) };
            let (token, writable) = self.in_flight.remove(which);
            // Whether it was used completely matters to IN_ORDER.
            let len = if len.is_multiple_of(2) { writable } else { len };
            self.completed.push_back((token.id(), len));
            self.ring.complete(token, len);
        }
    }

    fn show_completed(&mut self) {
        let any = !self.completed.is_empty();
        assert_eq!(self.ring.publish(), any);
        self.unasked |= any;
        self.owed |= any && self.driver_sleeps;
        self.driver_sleeps &= !any;
        self.returned.append(&mut self.completed);
    }

    fn ask(&mut self) {
        let signal = self.ring.wants_interrupt();
        assert_eq!(signal.is_some(), self.unasked);
        if let Some(signal) = signal {
            assert!(signal || !self.owed, "lost interrupt");
            assert!(!signal || self.interrupts || self.declined_late, "interrupt that nobody asked for");
        }
        (self.unasked, self.owed, self.declined_late) = (false, false, false);
    }

    fn collect(&mut self, count: u16) {
        for _ in 0..count {
            let got = self.driver.collect();
            assert_eq!(got, self.returned.pop_front());
            if got.is_none() {
                break;
            }
            // It is awake.
            self.owed = false;
        }
        self.driver_sleeps = self.interrupts && self.returned.is_empty();
    }

    fn set_interrupts(&mut self, on: bool) {
        self.interrupts = on;
        self.declined_late = !on && self.unasked;
        self.owed = false;
        let pending = self.driver.set_interrupts(on);
        assert_eq!(pending, on && !self.returned.is_empty());
        self.driver_sleeps = on && !pending;
    }

    fn set_notification(&mut self, on: bool) {
        self.notification = on;
        if on {
            let pending = self.ring.enable_notification();
            assert_eq!(pending, !self.shown.is_empty());
            self.device_sleeps = !pending;
        } else {
            self.ring.disable_notification();
            self.device_sleeps = false;
        }
    }

    /// Finishes everything; afterwards all descriptors are free again.
    fn drain(&mut self) {
        self.publish();
        self.take(u16::MAX);
        for (token, _) in self.in_flight.drain(..) {
            self.completed.push_back((token.id(), 7));
            self.ring.complete(token, 7);
        }
        self.show_completed();
        self.ask();
        self.collect(u16::MAX);
        assert_eq!(self.driver.free(), usize::from(self.ring.size()), "descriptors lost or doubled");
        assert_eq!(self.ring.in_flight(), 0);
    }
}

#[derive(Clone, Debug)]
enum Step {
    Add { readable: usize, writable: usize, indirect: bool },
    Publish,
    Take(u16),
    Untake(u16),
    Complete(Index, u32),
    ShowCompleted,
    Ask,
    Collect(u16),
    Interrupts(bool),
    Notification(bool),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        6 => (0..=MAX_PARTS / 2, 0..=MAX_PARTS / 2, any::<bool>())
            .prop_filter("a chain has a buffer", |(r, w, _)| r + w > 0)
            .prop_map(|(readable, writable, indirect)| Step::Add { readable, writable, indirect }),
        4 => Just(Step::Publish),
        4 => (1..8u16).prop_map(Step::Take),
        2 => (1..8u16).prop_map(Step::Untake),
        6 => (any::<Index>(), any::<u32>()).prop_map(|(which, len)| Step::Complete(which, len)),
        4 => Just(Step::ShowCompleted),
        4 => Just(Step::Ask),
        4 => (1..8u16).prop_map(Step::Collect),
        2 => any::<bool>().prop_map(Step::Interrupts),
        2 => any::<bool>().prop_map(Step::Notification),
    ]
}

/// A size, and features that go with it.
fn kind() -> impl Strategy<Value = (u16, u64)> {
    let size = prop_oneof![(0..=8u32).prop_map(|n| 1u16 << n), 1..=300u16];
    let bits = prop::sample::subsequence(vec![EVENT_IDX, IN_ORDER], 0..=2);
    (size, any::<bool>(), bits).prop_map(|(size, packed, bits)| {
        let features =
            bits.iter().sum::<u64>() | if packed || !size.is_power_of_two() { PACKED } else { SPLIT };
        (size, features)
    })
}

/// Index numbers that wrap within a few requests, and others.
fn start() -> impl Strategy<Value = u16> {
    prop_oneof![Just(0u16), 0xfff0..=0xffffu16, any::<u16>()]
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn every_request_comes_back_once_and_nobody_sleeps_too_long(
        (size, features) in kind(),
        base in start(),
        used in start(),
        steps in prop::collection::vec(step(), 1..250),
    ) {
        let mut pair = Pair::new(size, features, base, used);
        for step in steps {
            match step {
                Step::Add { readable, writable, indirect } => pair.add(readable, writable, indirect),
                Step::Publish => pair.publish(),
                Step::Take(n) => pair.take(n),
                Step::Untake(n) => pair.untake(n),
                Step::Complete(which, len) => pair.complete(which, len),
                Step::ShowCompleted => pair.show_completed(),
                Step::Ask => pair.ask(),
                Step::Collect(n) => pair.collect(n),
                Step::Interrupts(on) => pair.set_interrupts(on),
                Step::Notification(on) => pair.set_notification(on),
            }
        }
        pair.drain();
    }

    /// Cut into descriptors anyhow, a chain is two streams of bytes.
    #[test]
    fn a_handler_sees_the_bytes_the_driver_wrote(
        parts in prop::collection::vec((1..600u32, any::<bool>()), 1..MAX_PARTS),
        indirect: bool,
        format in prop::sample::select(&FORMATS[..]),
        at in (0..5000u32, 0..5000u32),
        seed: u8,
    ) {
        let (mut ram, config) = lay_out(16, format | EVENT_IDX, 0xfff8, 0xfffc);
        let map = Arc::clone(ram.map());
        let mut driver = DriverRing::new(&config, &map).unwrap();
        let hold = MapHold::new(Arc::clone(&map), WaitGroup::new());
        let mut queue = Queue::new("q".into(), &config, hold, Notifier::default(), Arc::default()).unwrap();
        let mut parts = parts;
        parts.sort_by_key(|&(_, writable)| writable);
        let buffers: Vec<_> = parts
            .iter()
            // Neither adjacent nor in order of their addresses.
            .map(|&(len, writable)| Buffer { addr: ram.alloc(u64::from(len) + 5, 1).unwrap(), len, writable })
            .collect();
        let mut sent = Vec::new();
        for (i, b) in buffers.iter().enumerate().filter(|(_, b)| !b.writable) {
            let bytes: Vec<u8> = (0..b.len).map(|j| seed.wrapping_add((i * 31) as u8).wrapping_add(j as u8)).collect();
            map.slice(b.addr, b.len).unwrap().write(&bytes);
            sent.extend(bytes);
        }
        if indirect {
            let table = ram.alloc(256, 1).unwrap();
            driver.add_indirect(&map, table, &buffers).unwrap();
        } else {
            driver.add(&buffers).unwrap();
        }
        driver.publish();

        assert_eq!(queue.ready(), 1);
        let request = queue.take().unwrap();
        let chain = queue.chain();
        let writable: u32 = buffers.iter().filter(|b| b.writable).map(|b| b.len).sum();
        assert_eq!((chain.readable_len() as usize, chain.writable_len()), (sent.len(), writable));
        let mut seen = vec![0; sent.len() + 1];
        assert_eq!(chain.readable(0, u32::MAX).read(&mut seen), sent.len());
        assert_eq!(&seen[..sent.len()], &sent[..]);
        // A window anywhere in the stream.
        let (from, len) = ((at.0 as usize).min(sent.len()), at.1);
        let expected = &sent[from..sent.len().min(from + len as usize)];
        let mut window = vec![0; len as usize];
        assert_eq!(chain.readable(from as u32, len).read(&mut window), expected.len());
        assert_eq!(&window[..expected.len()], expected);
        let answer: Vec<u8> = (0..writable).map(|i| seed ^ (i as u8)).collect();
        assert_eq!(chain.writable(0, u32::MAX).write(&answer), answer.len());
        queue.complete(request, writable);

        let mut received = Vec::new();
        for b in buffers.iter().filter(|b| b.writable) {
            let at = received.len();
            received.resize(at + b.len as usize, 0);
            map.slice(b.addr, b.len).unwrap().read(&mut received[at..]);
        }
        assert_eq!(received, answer);
        // What a reactor's round ends with.
        queue.publish();
        assert!(driver.collect().is_some_and(|(_, len)| len == writable));
    }
}

#[test]
fn rings_of_every_size_go_round_and_round() {
    for size in (0..=15).map(|n| 1u16 << n) {
        for features in FORMATS.into_iter().flat_map(|f| [f, f | EVENT_IDX, f | IN_ORDER]) {
            let mut pair = Pair::new(size, features, 0xfff0, 0xfffa);
            for turn in 0..3 {
                for _ in 0..size {
                    pair.add(1, 0, turn == 1);
                }
                pair.drain();
                // As a reactor does after every round with work in it.
                pair.ring.disable_notification();
            }
        }
    }
}

#[test]
fn a_chain_as_long_as_the_ring_is_taken() {
    for format in FORMATS {
        let mut pair = Pair::new(8, format, 0, 0);
        pair.add(4, 4, false);
        assert_eq!(pair.driver.free(), 0);
        pair.drain();
    }
}

/// The numbers have 16 bits: whoever waits longer than those last must be heard of neither too often nor never.
#[test]
fn notification_stays_off_for_more_than_65536_requests() {
    for features in FORMATS.into_iter().flat_map(|f| [f, f | EVENT_IDX]) {
        let mut pair = Pair::new(256, features, 0, 0);
        for _ in 0..1200 {
            for _ in 0..128 {
                pair.add(1, 0, false);
            }
            pair.drain();
            pair.ring.disable_notification();
        }
        pair.set_notification(true);
        pair.add(1, 0, false);
        pair.publish(); // asserts the kick
        pair.drain();
    }
}

#[test]
fn flags_are_what_the_spec_says() {
    let mut pair = Pair::new(4, SPLIT, 0, 0);
    assert_eq!(pair.driver.split().unwrap().used_flags(), 1, "NO_NOTIFY from the start");
    pair.set_notification(true);
    assert_eq!(pair.driver.split().unwrap().used_flags(), 0);
    pair.set_notification(false);
    assert_eq!(pair.driver.split().unwrap().used_flags(), 1);
    pair.set_interrupts(false);
    assert_eq!(pair.driver.split().unwrap().avail_flags(), 1, "NO_INTERRUPT");
    // With the event index, flags must be ignored (2.7.7.2, 2.7.10).
    let mut pair = Pair::new(4, SPLIT | EVENT_IDX, 0, 0);
    pair.driver.split().unwrap().set_avail_flags(1);
    pair.add(0, 1, false);
    pair.driver_sleeps = true;
    pair.drain();
    assert_eq!(pair.driver.split().unwrap().used_flags(), 0);
}

/// 2.7.10.1: an event is due when the move from `old` to `new` passes it, that is when it is one of the indices
/// `old`, `old` + 1, ... up to but without `new`.
#[test]
fn need_event_is_its_definition() {
    let check = |old: u16, moved: u16, ahead: u16| {
        let (event, new) = (old.wrapping_add(ahead), old.wrapping_add(moved));
        assert_eq!(need_event(event, new, old), ahead < moved, "event {event} new {new} old {old}");
    };
    for old in [0, 1, 0x7fff, 0x8000, 0xfffe, 0xffff] {
        // All moves with the events around both ends; all events with the moves that matter.
        for moved in 0..=u16::MAX {
            for ahead in [0, 1, moved.wrapping_sub(1), moved, moved.wrapping_add(1), 0x7fff, 0x8000, 0xffff] {
                check(old, moved, ahead);
            }
        }
        for moved in (0..16).map(|n| 1u16 << n).flat_map(|n| [n - 1, n, n + 1]).chain([0xfffe, 0xffff]) {
            for ahead in 0..=u16::MAX {
                check(old, moved, ahead);
            }
        }
    }
    // And the definition itself, walked step by step.
    for (old, new) in [(0u16, 3u16), (0xfffe, 2), (5, 5)] {
        for event in 0..=u16::MAX {
            let passed = (0..new.wrapping_sub(old)).any(|i| old.wrapping_add(i) == event);
            assert_eq!(need_event(event, new, old), passed, "event {event} new {new} old {old}");
        }
    }
}
