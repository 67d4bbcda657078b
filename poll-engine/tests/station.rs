//! A station that moves what comes in on one queue to another, under every way of waiting.

mod support;

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use crossbeam::sync::WaitGroup;
use nix::sys::eventfd::EventFd;
use poll_engine::device::QueueHandler;
use poll_engine::engine::pacing::Pacing;
use poll_engine::engine::placement::CpuList;
use poll_engine::engine::queue::{Notifier, Queue};
use poll_engine::engine::reactor::{Io, QueueId};
use poll_engine::engine::station::{Queues, Station, Waker};
use poll_engine::engine::{Engine, EngineConfig};
use poll_engine::memory::Ram;
use poll_engine::memory::map::MapHold;
use poll_engine::ring::Ahead;
use poll_engine::ring::driver::{Buffer, DriverRing};

/// Where the queues of a station are.
#[derive(Default)]
struct Ends {
    ids: [Mutex<Option<QueueId>>; 2],
    /// Given by another thread, to be written to the second queue as well.
    given: AtomicUsize,
}

/// A queue that is a station's.
struct Member {
    ends: Arc<Ends>,
    index: usize,
}

impl QueueHandler for Member {
    fn attach(&mut self, io: &mut Io<'_>) {
        *self.ends.ids[self.index].lock().unwrap() = Some(io.id());
    }
    fn poll(&mut self, _: &mut Queue, _: &mut Io<'_>) -> usize {
        0
    }
    fn complete(&mut self, _: &mut Queue, _: &mut Io<'_>, _: u32, _: i32) {}
    fn detach(&mut self, _: &mut Io<'_>) {
        *self.ends.ids[self.index].lock().unwrap() = None;
    }
    fn wants_chains(&self) -> bool {
        self.index == 0
    }
}

/// Copies what the first queue brings into buffers of the second.
struct Mover {
    ends: Arc<Ends>,
    starved: bool,
    gone: Arc<AtomicUsize>,
}

impl Mover {
    fn ids(&self) -> Option<(QueueId, QueueId)> {
        let id = |i: usize| *self.ends.ids[i].lock().unwrap();
        Some((id(0)?, id(1)?))
    }
}

impl Station for Mover {
    fn poll(&mut self, queues: &mut Queues<'_>, _: &mut Io<'_>) -> usize {
        let Some((from, to)) = self.ids() else { return 0 };
        let Some((from, to)) = queues.pair(from, to) else { return 0 };
        let mut moved = 0;
        while self.ends.given.load(Ordering::Acquire) > 0 && to.ready_for(1, Ahead::HEADER) == 1 {
            self.ends.given.fetch_sub(1, Ordering::AcqRel);
            let request = to.take().unwrap();
            to.chain().writable(0, 4).write(b"bell");
            to.complete(request, 4);
            moved += 1;
        }
        let ready = from.ready();
        self.starved = ready > 0 && to.ready_for(1, Ahead::HEADER) == 0;
        for _ in 0..ready {
            let Some(source) = from.take() else { break };
            if to.ready_for(1, Ahead::HEADER) == 0 {
                from.untake(source);
                break;
            }
            let Some(target) = to.take() else {
                from.untake(source);
                break;
            };
            let mut bytes = vec![0; from.chain().readable_len() as usize];
            from.chain().readable(0, u32::MAX).read(&mut bytes);
            let written = to.chain().writable(0, u32::MAX).write(&bytes);
            from.complete(source, 0);
            to.complete(target, written as u32);
            moved += 1;
        }
        moved
    }

    fn prepare_sleep(&mut self, queues: &mut Queues<'_>, _: &mut Io<'_>) -> bool {
        let Some((_, to)) = self.ids() else { return false };
        let given = self.ends.given.load(Ordering::Acquire) > 0;
        if self.starved || given {
            queues.wake_on(to);
        }
        false
    }
}

impl Drop for Mover {
    fn drop(&mut self) {
        self.gone.fetch_add(1, Ordering::AcqRel);
    }
}

/// The driver's side of one queue.
struct Side {
    ram: Ram,
    driver: DriverRing,
    kick: EventFd,
    data: u64,
    running: Option<poll_engine::engine::RunningQueue>,
}

impl Side {
    fn start(engine: &Engine, ends: &Arc<Ends>, index: usize, features: u64) -> Side {
        let mut ram = Ram::new(0x10_0000, 1 << 20, false).unwrap();
        let config = DriverRing::lay_out(&mut ram, 16, features).unwrap();
        let driver = DriverRing::new(&config, ram.map()).unwrap();
        let kick = EventFd::new().unwrap();
        let data = ram.alloc(64 * 16, 16).unwrap();
        let hold = MapHold::new(Arc::clone(ram.map()), WaitGroup::new());
        let notifier = Notifier {
            kick: Some(std::os::fd::AsFd::as_fd(&kick).try_clone_to_owned().unwrap()),
            ..Notifier::default()
        };
        let queue = Queue::new("q".into(), &config, hold, notifier, Arc::default()).unwrap();
        let member = Box::new(Member { ends: Arc::clone(ends), index });
        let running = Some(engine.run_queue(queue, member, Some(0)).unwrap());
        Side { ram, driver, kick, data, running }
    }

    fn offer(&mut self, slot: u16, bytes: Option<&[u8]>) {
        let addr = self.data + 64 * u64::from(slot % 16);
        if let Some(bytes) = bytes {
            self.ram.map().slice(addr, 64).unwrap().write(bytes);
        }
        let len = bytes.map_or(64, |b| b.len() as u32);
        self.driver.add(&[Buffer { addr, len, writable: bytes.is_none() }]).unwrap();
        if self.driver.publish() {
            self.kick.write(1).unwrap();
        }
    }

    fn collect(&mut self) -> u32 {
        let deadline = Instant::now() + Duration::from_secs(60);
        loop {
            if let Some((_, len)) = self.driver.collect() {
                return len;
            }
            assert!(Instant::now() < deadline, "nothing comes: the reactor sleeps");
            std::thread::yield_now();
        }
    }

    fn bytes(&self, slot: u16, len: u32) -> Vec<u8> {
        let mut bytes = vec![0; len as usize];
        self.ram.map().slice(self.data + 64 * u64::from(slot % 16), len).unwrap().read(&mut bytes);
        bytes
    }
}

fn set_up(pacing: Pacing) -> (Engine, Arc<Ends>, Mover, Waker) {
    let config = EngineConfig { pacing, cpus: CpuList::default(), ..EngineConfig::default() };
    let engine = Engine::start(&config).unwrap();
    let ends = Arc::new(Ends::default());
    let mover = Mover { ends: Arc::clone(&ends), starved: false, gone: Arc::default() };
    let waker = engine.waker(0);
    (engine, ends, mover, waker)
}

const EVENT_IDX: u64 = 1 << 29;
const PACKED: u64 = 1 << 34;

#[test]
fn moves_between_queues_and_never_oversleeps() {
    for pacing in [Pacing::Busy, Pacing::Adaptive, Pacing::Event] {
        for features in [0, EVENT_IDX, PACKED, PACKED | EVENT_IDX] {
            let (engine, ends, mover, waker) = set_up(pacing);
            let station = engine.add_station(0, Box::new(mover)).unwrap();
            let mut from = Side::start(&engine, &ends, 0, features);
            let mut to = Side::start(&engine, &ends, 1, features);
            for turn in 0..200u16 {
                let sent = format!("packet {turn}");
                // First the one, then the other, after a nap now and then: the reactor may sleep in between.
                let pause = || {
                    if turn % 20 == 0 {
                        std::thread::sleep(Duration::from_millis(2));
                    }
                };
                match turn % 3 {
                    0 => {
                        to.offer(turn, None);
                        pause();
                        from.offer(turn, Some(sent.as_bytes()));
                    }
                    1 => {
                        from.offer(turn, Some(sent.as_bytes()));
                        pause();
                        to.offer(turn, None);
                    }
                    _ => {
                        to.offer(turn, None);
                        pause();
                        ends.given.fetch_add(1, Ordering::AcqRel);
                        waker.wake();
                        assert_eq!(to.collect(), 4);
                        assert_eq!(to.bytes(turn, 4), b"bell");
                        continue;
                    }
                }
                let len = to.collect();
                assert_eq!(to.bytes(turn, len), sent.as_bytes(), "{pacing:?}, {features:#x}");
                assert_eq!(from.collect(), 0);
            }
            for side in [&mut from, &mut to] {
                side.running.take().unwrap().stop().unwrap();
            }
            drop(station);
        }
    }
}

#[test]
fn a_station_that_leaves_is_gone_when_that_returns() {
    let (engine, _, mover, _) = set_up(Pacing::Event);
    let gone = Arc::clone(&mover.gone);
    let station = engine.add_station(7, Box::new(mover)).unwrap();
    assert_eq!(gone.load(Ordering::Acquire), 0);
    drop(station);
    assert_eq!(gone.load(Ordering::Acquire), 1);
}

#[test]
fn a_reactor_that_comes_has_its_station_before_any_queue() {
    let (engine, ends, mover, _) = set_up(Pacing::Event);
    let gone = Arc::clone(&mover.gone);
    let station = |number, _| {
        assert_eq!((number, engine.reactors()), (1, 1), "queues could run there already");
        vec![Box::new(mover) as Box<dyn Station>]
    };
    let (number, stations) = engine.add_reactor_with(None, station).unwrap();
    assert_eq!((number, engine.reactors(), stations.len()), (1, 2, 1));
    let retiring = engine.retire(0).unwrap();
    assert!(retiring.turns(Duration::from_secs(60)));
    retiring.finish();
    let mut from = Side::start(&engine, &ends, 0, 0);
    let mut to = Side::start(&engine, &ends, 1, 0);
    to.offer(0, None);
    from.offer(0, Some(b"packet"));
    let len = to.collect();
    assert_eq!((to.bytes(0, len).as_slice(), from.collect()), (&b"packet"[..], 0));
    for side in [&mut from, &mut to] {
        side.running.take().unwrap().stop().unwrap();
    }
    drop(stations);
    assert_eq!(gone.load(Ordering::Acquire), 1);
}
