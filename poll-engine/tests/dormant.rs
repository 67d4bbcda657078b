//! Rings that are left to their kicks after a while without work: whatever comes then, comes through.
#![allow(clippy::unwrap_used)]

mod support;

use std::os::fd::{AsFd, AsRawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crossbeam::sync::WaitGroup;
use nix::sys::eventfd::EventFd;
use poll_engine::device::{QueueHandler, features};
use poll_engine::engine::pacing::Pacing;
use poll_engine::engine::queue::{Notifier, Queue};
use poll_engine::engine::reactor::Io;
use poll_engine::engine::{Dormancy, Engine, EngineConfig, RunningQueue};
use poll_engine::memory::log::LOG_PAGE;
use poll_engine::memory::{MapHold, Ram};
use poll_engine::ring::driver::{Buffer, DriverRing};
use poll_engine::session::wire::{F_LOG_ALL, VRING_F_LOG};
use poll_engine::stats::QueueStats;
use support::{Back, FEATURES, Guest, LIMIT, longs, until, words};

const PACINGS: [Pacing; 3] = [Pacing::Busy, Pacing::Adaptive, Pacing::Event];
const FORMATS: [u64; 4] =
    [0, features::EVENT_IDX, features::RING_PACKED, features::RING_PACKED | features::EVENT_IDX];
/// As soon as there is nothing.
const EAGER: Dormancy = Dormancy { above: 0, after: Duration::ZERO };

fn dormant(engine: &Engine) -> usize {
    engine.list().iter().map(|r| r.dormant).sum()
}

/// Until so many of an engine's rings are dormant. A reactor that sleeps does not look for them, so it is woken.
fn until_dormant(engine: &Engine, wanted: usize) {
    until("rings to be left alone", || engine.turns(LIMIT) && dormant(engine) == wanted);
}

fn engine(pacing: Pacing, dormancy: Dormancy) -> Engine {
    Engine::start(&EngineConfig { pacing, dormancy, ..EngineConfig::default() }).unwrap()
}

/// Gives every chain back at once.
struct Sink;

impl QueueHandler for Sink {
    fn attach(&mut self, _: &mut Io<'_>) {}
    fn poll(&mut self, queue: &mut Queue, _: &mut Io<'_>) -> usize {
        let ready = queue.ready();
        for _ in 0..ready {
            let Some(request) = queue.take() else { break };
            queue.complete(request, 0);
        }
        ready.into()
    }
    fn complete(&mut self, _: &mut Queue, _: &mut Io<'_>, _: u32, _: i32) {}
    fn detach(&mut self, _: &mut Io<'_>) {}
}

/// A driver with one queue.
struct Driver {
    ring: DriverRing,
    kick: EventFd,
    data: u64,
    stats: Arc<QueueStats>,
    running: Option<RunningQueue>,
    _ram: Ram,
}

impl Driver {
    fn start(engine: &Engine, features: u64) -> Driver {
        Driver::start_as(engine, features, true, Box::new(Sink))
    }

    fn start_as(engine: &Engine, features: u64, kicks: bool, handler: Box<dyn QueueHandler>) -> Driver {
        let mut ram = Ram::new(0x10_0000, 1 << 20, false).unwrap();
        let config = DriverRing::lay_out(&mut ram, 16, features).unwrap();
        let ring = DriverRing::new(&config, ram.map()).unwrap();
        let data = ram.alloc(64, 16).unwrap();
        let kick = EventFd::new().unwrap();
        let hold = MapHold::new(Arc::clone(ram.map()), WaitGroup::new());
        let notifier = Notifier {
            kick: kicks.then(|| kick.as_fd().try_clone_to_owned().unwrap()),
            ..Notifier::default()
        };
        let stats = Arc::new(QueueStats::default());
        let queue = Queue::new("q".into(), &config, hold, notifier, Arc::clone(&stats)).unwrap();
        let running = Some(engine.run_queue(queue, handler, None).unwrap());
        Driver { ring, kick, data, stats, running, _ram: ram }
    }

    /// Makes so many requests available; whether the device wants to hear of it.
    fn add(&mut self, count: usize) -> bool {
        for _ in 0..count {
            self.ring.add(&[Buffer { addr: self.data, len: 64, writable: false }]).unwrap();
        }
        self.ring.publish()
    }

    fn submit(&mut self, count: usize) {
        if self.add(count) {
            self.kick.write(1).unwrap();
        }
    }

    fn wait(&mut self, count: usize) {
        for _ in 0..count {
            until("a request", || self.ring.collect().is_some());
        }
    }

    fn round_trip(&mut self) {
        self.submit(1);
        self.wait(1);
    }
}

fn stop_all(drivers: &mut [Driver]) {
    for driver in drivers {
        driver.running.take().unwrap().stop().unwrap();
    }
}

#[test]
fn a_kick_has_it_served() {
    for pacing in PACINGS {
        for features in FORMATS {
            let engine = engine(pacing, EAGER);
            let mut driver = Driver::start(&engine, features);
            for turn in 0..40 {
                until_dormant(&engine, 1);
                let before = driver.stats.kicks_dormant.get();
                let polls = driver.stats.polls.get();
                std::thread::sleep(Duration::from_micros(300));
                assert_eq!(driver.stats.polls.get(), polls, "looked at, {pacing:?} {features:#x}");
                driver.round_trip();
                assert_eq!(driver.stats.kicks_dormant.get(), before + 1, "{turn} {pacing:?} {features:#x}");
            }
            driver.running.take().unwrap().stop().unwrap();
            assert_eq!(dormant(&engine), 0);
        }
    }
}

/// Those that have work are looked at, and those without a kick descriptor; and none is left alone where there are few.
#[test]
fn only_idle_ones_go_and_only_where_there_are_many() {
    let engine = engine(Pacing::Busy, Dormancy { above: 3, after: Duration::from_millis(1) });
    let mut drivers: Vec<_> = (0..2).map(|_| Driver::start(&engine, features::EVENT_IDX)).collect();
    drivers.push(Driver::start_as(&engine, features::EVENT_IDX, false, Box::new(Sink)));
    let looked = |drivers: &[Driver]| drivers.iter().map(|d| d.stats.polls.get()).min().unwrap();
    let looked_at_all = |drivers: &[Driver]| {
        let before = looked(drivers);
        until("looks at all rings", || looked(drivers) > before + 100_000);
    };
    looked_at_all(&drivers);
    assert_eq!(dormant(&engine), 0);
    // Three more: three of the five that can be kicked go.
    drivers.extend((0..3).map(|_| Driver::start(&engine, features::EVENT_IDX)));
    until_dormant(&engine, 3);
    // All but one have work now and then; the one without a kick has none.
    let stop = AtomicBool::new(false);
    std::thread::scope(|threads| {
        let (silent, kicking): (Vec<_>, Vec<_>) = drivers.iter_mut().enumerate().partition(|(i, _)| *i == 2);
        let worker = threads.spawn(|| {
            let mut kicking = kicking;
            while !stop.load(Ordering::Acquire) {
                for (_, driver) in &mut kicking {
                    driver.round_trip();
                }
            }
        });
        for (_, driver) in silent {
            let before = driver.stats.polls.get();
            until("looks at the ring", || driver.stats.polls.get() > before + 10_000);
            // Nobody hears of it.
            driver.add(3);
            driver.wait(3);
        }
        stop.store(true, Ordering::Release);
        worker.join().unwrap();
    });
    until_dormant(&engine, 3);
    stop_all(&mut drivers);
}

/// A driver that does not notify loses its own requests only until it does; kicks without a request bring nobody anything.
#[test]
fn drivers_that_notify_too_little_or_too_much() {
    for pacing in PACINGS {
        let engine = engine(pacing, EAGER);
        let [mut quiet, mut loud, mut other] = [0, 1, 2].map(|_| Driver::start(&engine, features::EVENT_IDX));
        until_dormant(&engine, 3);
        assert!(quiet.add(1), "it was asked to");
        for _ in 0..200 {
            loud.kick.write(1).unwrap();
            other.round_trip();
        }
        assert!(quiet.ring.collect().is_none());
        assert!(loud.stats.kicks.get() > 0 && loud.stats.requests.get() == 0);
        quiet.kick.write(1).unwrap();
        quiet.wait(1);
        loud.round_trip();
        until_dormant(&engine, 3);
        for driver in [&mut quiet, &mut loud, &mut other] {
            driver.running.take().unwrap().stop().unwrap();
        }
    }
}

/// Load that comes and goes at random on queues of each kind, which go and come back between any two requests.
#[test]
fn nothing_is_lost_under_load_that_comes_and_goes() {
    let until = Instant::now() + Duration::from_secs(3);
    std::thread::scope(|threads| {
        for (seed, pacing) in (0..).zip(PACINGS) {
            threads.spawn(move || {
                // Knuth's numbers, of which the upper bits are good.
                let mut state: u64 = seed;
                let mut below = |n: u64| {
                    state =
                        state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                    (state >> 33) as usize % n as usize
                };
                let after = Duration::from_micros(seed * 20);
                let engine =
                    engine(pacing, Dormancy { above: usize::from(pacing == Pacing::Busy) * 2, after });
                let mut drivers: Vec<_> = (0..12).map(|i| Driver::start(&engine, FORMATS[i % 4])).collect();
                while Instant::now() < until {
                    let one = below(12);
                    let count = 1 + below(16);
                    drivers[one].submit(count);
                    if below(10) < 3 {
                        let two = below(12);
                        if two != one {
                            drivers[two].round_trip();
                        }
                    }
                    drivers[one].wait(count);
                    if below(10) == 0 {
                        std::thread::sleep(Duration::from_micros(below(200) as u64));
                    }
                    if below(50) == 0 {
                        let driver = &mut drivers[one];
                        driver.running.take().unwrap().stop().unwrap();
                        drivers[one] = Driver::start(&engine, FORMATS[below(4)]);
                    }
                }
                until_dormant(&engine, if pacing == Pacing::Busy { 10 } else { 12 });
                let kicks: u64 = drivers.iter().map(|d| d.stats.kicks_dormant.get()).sum();
                assert!(kicks > 10, "{kicks} kicks of rings that were left alone");
                stop_all(&mut drivers);
            });
        }
    });
}

/// What a session does with a queue finds it as if it had never been left alone.
#[test]
fn sessions_stop_start_log_and_hand_over_what_is_dormant() {
    for pacing in PACINGS {
        let mut back = Back::start_with(pacing, EAGER);
        let mut peer = back.front();
        let mut guest = Guest::new(0);
        guest.start(&mut peer);
        let mut count = 0;
        let mut trips = |guest: &mut Guest, back: &Back| {
            for _ in 0..2 {
                until_dormant(&back.engine, 1);
                guest.round_trip();
                count += 1;
            }
            until_dormant(&back.engine, 1);
            count
        };
        trips(&mut guest, &back);
        // GET_VRING_BASE, and on from there.
        let base = guest.stop(&mut peer);
        assert_eq!((base, dormant(&back.engine)), (2, 0));
        guest.submit();
        guest.describe(&mut peer, base);
        guest.set_kick(&mut peer);
        guest.wait();
        trips(&mut guest, &back);
        // Not enabled: paused.
        guest.enable(&mut peer, false);
        guest.submit();
        guest.enable(&mut peer, true);
        guest.wait();
        trips(&mut guest, &back);
        // Another map.
        assert!(peer.mem_table(&[guest.region()]));
        trips(&mut guest, &back);
        // A dirty log: the ring's pages are marked by whatever is written there.
        let log = Ram::new(0, 1 << 16, false).unwrap();
        peer.send(6, false, &longs(&[1 << 16, 0]), &[log.fd().as_raw_fd()]);
        assert_eq!(peer.reply(6), Some(longs(&[1 << 16, 0])));
        assert!(peer.ack(2, &longs(&[FEATURES | F_LOG_ALL]), &[]));
        let c = &guest.config;
        let addresses = longs(&[c.desc_addr, c.used_addr, c.avail_addr, guest.used()]);
        assert!(peer.ack(9, &[words(&[guest.index, VRING_F_LOG]), addresses].concat(), &[]));
        guest.round_trip();
        let page = guest.used() / LOG_PAGE;
        let mut byte = [0];
        log.map().slice(page / 8, 1).unwrap().read(&mut byte);
        assert!(byte[0] & 1 << (page % 8) != 0, "what was used");
        // To other back ends, and requests that come while it is nobody's.
        for next in PACINGS {
            until_dormant(&back.engine, 1);
            guest.submit();
            back = back.hand_over(next).0;
            guest.wait();
            until_dormant(&back.engine, 1);
        }
        // Between reactors.
        back.engine.add_reactor(None).unwrap();
        for reactor in [1, 0, 1] {
            *back.echo.wanted_on.lock().unwrap() = Some(reactor);
            let stats = Arc::clone(&back.stats[0]);
            back.server.restart_queues().unwrap();
            until("the move", || stats.reactor() == Some(reactor));
            until_dormant(&back.engine, 1);
            guest.round_trip();
        }
        // One that goes without a word.
        until_dormant(&back.engine, 1);
        drop(peer);
        until("the queue to go", || back.engine.list().iter().all(|r| r.queues == 0));
        until_dormant(&back.engine, 0);
    }
}
