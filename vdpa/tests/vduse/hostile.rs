//! Drivers and kernels that do as they like: whatever comes, everything is answered, and the device is served again.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use nix::sys::eventfd::{EfdFlags, EventFd};
use poll_engine::device::{ConfigRefused, Device, QueueHandler};
use poll_engine::engine::queue::{Queue, Request};
use poll_engine::engine::reactor::Io;
use poll_engine::memory::Ram;
use poll_engine::ring::chain::HeldChain;
use proptest::prelude::*;

use crate::rig::{BOUNCE, PACKED, RINGS, Rig, SPLIT, file_of};

#[derive(Clone, Debug)]
enum Step {
    Status(u8),
    State(u32),
    Update(u64, u64),
    Other(u32, u64),
    Map { start: u64, len: u64, offset: u64, perm: u8, rings: bool },
    Unmap(usize),
    Lie(Option<(u64, u64, u64, u8)>),
    Queue { index: usize, num: u32, addrs: [u64; 3], state: u64, ready: bool },
    Features(u64),
    Kick(usize),
    Garbage(u64),
}

fn address() -> impl Strategy<Value = u64> {
    prop_oneof![
        Just(0),
        Just(u64::MAX),
        Just(RINGS),
        (0..64u64).prop_map(|page| RINGS + page * 4096),
        (0..256u64).prop_map(|page| page * 4096),
        any::<u64>(),
    ]
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        3 => prop_oneof![Just(0u8), Just(11), Just(15), any::<u8>()].prop_map(Step::Status),
        1 => prop_oneof![0..4u32, any::<u32>()].prop_map(Step::State),
        2 => (address(), address()).prop_map(|(a, b)| Step::Update(a, b)),
        1 => (any::<u32>(), any::<u64>()).prop_map(|(kind, x)| Step::Other(kind, x)),
        3 => (address(), 1..600_000u64, 0..80u64, 0..5u8, any::<bool>())
            .prop_map(|(start, len, page, perm, rings)| Step::Map { start, len, offset: page * 4096, perm, rings }),
        1 => (0..4usize).prop_map(Step::Unmap),
        1 => prop::option::of((any::<u64>(), address(), address(), any::<u8>())).prop_map(Step::Lie),
        3 => (0..2usize, prop_oneof![Just(16u32), any::<u32>(), 0..40u32], [address(), address(), address()], any::<u64>(), any::<bool>())
            .prop_map(|(index, num, addrs, state, ready)| Step::Queue { index, num, addrs, state, ready }),
        1 => prop_oneof![Just(SPLIT), Just(PACKED), any::<u64>()].prop_map(Step::Features),
        1 => (0..2usize).prop_map(Step::Kick),
        1 => any::<u64>().prop_map(Step::Garbage),
    ]
}

/// More in a long run.
fn cases() -> u32 {
    std::env::var("PROPTEST_CASES").ok().and_then(|n| n.parse().ok()).unwrap_or(48)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: cases(), ..ProptestConfig::default() })]

    #[test]
    fn whatever_comes_is_answered(steps in prop::collection::vec(step(), 1..40), packed in any::<bool>()) {
        let mut rig = Rig::new(if packed { PACKED } else { SPLIT });
        rig.serve(false);
        let memory = Ram::new(RINGS, 64 * 4096, false).unwrap();
        let file = file_of(&memory);
        for step in steps {
            match step {
                Step::Status(status) => {
                    rig.kernel.set_status(status);
                }
                Step::State(index) => {
                    rig.kernel.vq_state(index);
                }
                Step::Update(first, last) => prop_assert_eq!(rig.kernel.update_iotlb(first, last), first <= last),
                Step::Other(kind, x) => {
                    rig.kernel.ask(kind, &[x as u32, (x >> 32) as u32, x as u32]);
                }
                Step::Map { start, len, offset, perm, rings } => {
                    let start = if rings { RINGS } else { start };
                    if start.checked_add(len).is_some() {
                        rig.kernel.map(start, len, offset, perm, &file);
                    }
                }
                Step::Unmap(at) => {
                    let mut kernel = rig.kernel.lock();
                    if at < kernel.table.len() {
                        kernel.table.remove(at);
                    }
                }
                Step::Queue { index, num, addrs, state, ready } => {
                    let mut kernel = rig.kernel.lock();
                    let queue = &mut kernel.queues[index];
                    (queue.num, queue.addrs, queue.ready) = (num, addrs, ready);
                    queue.state = std::array::from_fn(|i| (state >> (16 * i)) as u16);
                }
                Step::Lie(lie) => rig.kernel.lock().lie = lie,
                Step::Features(features) => rig.kernel.lock().driver_features = features,
                Step::Kick(index) => rig.kernel.kick(index),
                Step::Garbage(seed) => {
                    for i in 0..64u64 {
                        let at = seed.rotate_left(i as u32) % (64 * 4096 - 8);
                        let word = seed.wrapping_mul(i | 1).to_le_bytes();
                        memory.map().slice(RINGS + at, 8).unwrap().write(&word);
                    }
                }
            }
        }
        // A driver that behaves is served.
        prop_assert!(rig.kernel.set_status(0));
        {
            let mut kernel = rig.kernel.lock();
            kernel.table.clear();
            kernel.lie = None;
            kernel.driver_features = rig.features;
        }
        let mut driver = rig.drive();
        driver.write(0, 3, 0x5a);
        prop_assert_eq!(driver.read(0, 3), 0x5a);
    }
}

/// More translations than are kept: each page of a scattered driver.
#[test]
fn translations_without_end_are_forgotten_in_turn() {
    let mut rig = Rig::new(SPLIT);
    rig.serve(false);
    let mut driver = rig.drive();
    driver.write(0, 1, 7);
    let pages = Ram::new(0, 4096, false).unwrap();
    let file = file_of(&pages);
    for i in 0..1200u64 {
        rig.kernel.map((1 << 40) + i * 8192, 4096, 0, 3, &file);
    }
    for i in (0..1200u64).step_by(2) {
        driver.submit(0, 0, 1, (1 << 40) + i * 8192);
        assert_eq!(driver.wait(0), Some(0), "page {i}");
    }
}

/// Keeps every request until its gate is opened.
struct Slow {
    gate: EventFd,
    taken: Arc<AtomicUsize>,
}

impl Slow {
    fn new() -> Arc<Slow> {
        let gate = EventFd::from_flags(EfdFlags::EFD_NONBLOCK).unwrap();
        Arc::new(Slow { gate, taken: Arc::default() })
    }

    /// Waits until a request is in flight.
    fn has_taken(&self) {
        let taken = || self.taken.load(Ordering::Acquire) > 0;
        crate::until("the request is not taken", taken);
    }
}

struct SlowQueue {
    gate: OwnedFd,
    taken: Arc<AtomicUsize>,
    held: Vec<(Request, HeldChain)>,
}

impl Device for Slow {
    fn features(&self) -> u64 {
        0
    }
    fn num_queues(&self) -> u16 {
        crate::rig::QUEUES
    }
    fn max_ring_size(&self) -> u16 {
        crate::rig::RING
    }
    fn read_config(&self, _: u32, into: &mut [u8]) {
        into.fill(0);
    }
    fn write_config(&self, offset: u32, _: &[u8]) -> Result<(), ConfigRefused> {
        Err(ConfigRefused { offset, end: offset })
    }
    fn start_queue(&self, _: u16, _: u64, _: u16) -> std::io::Result<Box<dyn QueueHandler>> {
        let gate = self.gate.as_fd().try_clone_to_owned()?;
        Ok(Box::new(SlowQueue { gate, taken: Arc::clone(&self.taken), held: vec![] }))
    }
    fn reset(&self) {}
}

impl QueueHandler for SlowQueue {
    fn attach(&mut self, io: &mut Io<'_>) {
        let label = io.label(0);
        io.uring().watch(self.gate.as_fd(), label);
    }
    fn poll(&mut self, queue: &mut Queue, _: &mut Io<'_>) -> usize {
        let ready = queue.ready();
        for _ in 0..ready {
            let Some(request) = queue.take() else { break };
            let mut held = HeldChain::default();
            queue.hold_chain(&mut held);
            self.held.push((request, held));
            self.taken.fetch_add(1, Ordering::Release);
        }
        ready.into()
    }
    fn complete(&mut self, queue: &mut Queue, _: &mut Io<'_>, _: u32, _: i32) {
        for (request, held) in self.held.drain(..) {
            queue.complete_held(request, 0, &held.view().unwrap());
        }
    }
    fn detach(&mut self, io: &mut Io<'_>) {
        let (watch, own) = (io.label(0), io.label(1));
        io.uring().unwatch(watch, own);
    }
}

#[test]
fn a_request_that_takes_too_long_has_failed_and_breaks_nothing() {
    let device = Slow::new();
    let mut rig = Rig::with(SPLIT, Arc::clone(&device) as _);
    rig.patience = Duration::from_millis(300);
    rig.serve(false);
    let mut driver = rig.drive();
    driver.submit(0, 0, 1, 0x2000);
    device.has_taken();
    let begun = Instant::now();
    let state = rig.kernel.vq_state(0);
    let waited = begun.elapsed();
    let reset = rig.kernel.set_status(0);
    // First: a test that fails must not wait for what is in flight.
    device.gate.write(1).unwrap();
    assert_eq!(state, None, "of a queue that does not come to rest");
    assert!(waited < Duration::from_secs(10), "the kernel gives the device up after 30 seconds");
    assert!(!reset, "nor can it be reset");
    let deadline = Instant::now() + Duration::from_secs(60);
    while !rig.kernel.set_status(0) {
        assert!(Instant::now() < deadline, "it is not served any more");
    }
}

/// What is in flight may still write to where translations pointed: they have changed only when it does not any more.
#[test]
fn translations_change_when_nothing_in_flight_uses_them() {
    let device = Slow::new();
    let mut rig = Rig::with(SPLIT, Arc::clone(&device) as _);
    rig.serve(false);
    let mut driver = rig.drive();
    driver.submit(0, 0, 1, 0x2000);
    device.has_taken();
    rig.kernel.lock().table.retain(|t| t.start != 0);
    let update = rig.kernel.post(2, &[0, 0, BOUNCE as u32 - 1, 0]);
    crate::until("it is not read", || rig.kernel.lock().requests.is_empty());
    // Long enough for an answer that comes too early.
    std::thread::sleep(Duration::from_millis(300));
    let early = rig.kernel.lock().answers.contains_key(&update);
    // First: a test that fails must not wait for what is in flight.
    device.gate.write(1).unwrap();
    assert!(!early, "the kernel may give the memory to others now");
    assert_eq!(rig.kernel.answer(update).result, 0);
}
