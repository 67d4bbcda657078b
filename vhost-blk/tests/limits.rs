//! Disks with limits on a reactor: what has to wait stays in the ring, the reactor sleeps meanwhile, and nobody else waits.
//! How much passes in a second is tried in `throttle.rs`, where time is told.
#![allow(clippy::unwrap_used)]

use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam::sync::WaitGroup;
use nix::sys::eventfd::EventFd;
use poll_engine::device::{Device, features};
use poll_engine::engine::pacing::Pacing;
use poll_engine::engine::queue::{Notifier, Queue};
use poll_engine::engine::{Engine, EngineConfig, RunningQueue};
use poll_engine::memory::{MapHold, Ram};
use poll_engine::ring::driver::{Buffer, DriverRing};
use poll_engine::stats::QueueStats;
use vhost_blk::device::BlkDevice;
use vhost_blk::disk::{Disk, DiskConfig, Storage};
use vhost_blk::request::{T_IN, T_OUT};

const RING_SIZE: u16 = 256;
const LIMIT: Duration = Duration::from_secs(60);

fn disk(storage: Storage, limits: &str) -> Arc<Disk> {
    let config = DiskConfig {
        block_size: 512,
        read_only: false,
        serial: String::new(),
        writeback: true,
        ring_size: RING_SIZE,
        path: std::path::PathBuf::new(),
        incoming: false,
    };
    let disk = Disk::new(storage, 1 << 30, &config);
    disk.throttle().set(limits.parse().unwrap());
    Arc::new(disk)
}

/// A driver with one queue of a disk.
struct Driver {
    ring: DriverRing,
    kick: EventFd,
    requests: u64,
    bytes: u32,
    stats: Arc<QueueStats>,
    running: Option<RunningQueue>,
    done: u32,
    _ram: Ram,
}

impl Driver {
    fn start(engine: &Engine, disk: &Arc<Disk>, features: u64, bytes: u32) -> Driver {
        let mut ram = Ram::new(0x10_0000, 8 << 20, false).unwrap();
        let config = DriverRing::lay_out(&mut ram, RING_SIZE, features).unwrap();
        let ring = DriverRing::new(&config, ram.map()).unwrap();
        // A header to read and one to write by, a status, and data.
        let requests = ram.alloc(48, 16).unwrap();
        for (at, kind) in [(0, T_IN), (16, T_OUT)] {
            ram.map().slice(requests + at, 4).unwrap().write(&kind.to_le_bytes());
        }
        ram.alloc(bytes.into(), 4096).unwrap();
        let (stats, kick) = (Arc::new(QueueStats::default()), EventFd::new().unwrap());
        let notifier =
            Notifier { kick: Some(kick.as_fd().try_clone_to_owned().unwrap()), ..Notifier::default() };
        let hold = MapHold::new(Arc::clone(ram.map()), WaitGroup::new());
        let queue = Queue::new("q".into(), &config, hold, notifier, Arc::clone(&stats)).unwrap();
        let device = BlkDevice::new(Arc::clone(disk), 1, RING_SIZE, None);
        let handler = device.start_queue(0, features, RING_SIZE).unwrap();
        let running = Some(engine.run_queue(queue, handler, Some(0)).unwrap());
        Driver { ring, kick, requests, bytes, stats, running, done: 0, _ram: ram }
    }

    fn submit(&mut self, kind: u32, count: u32) {
        for _ in 0..count {
            let header = self.requests + if kind == T_IN { 0 } else { 16 };
            let data = (self.requests + 4096) & !4095;
            let buffers = [
                Buffer { addr: header, len: 16, writable: false },
                Buffer { addr: data, len: self.bytes, writable: kind == T_IN },
                Buffer { addr: self.requests + 32, len: 1, writable: true },
            ];
            self.ring.add(&buffers).unwrap();
        }
        if self.ring.publish() {
            self.kick.write(1).unwrap();
        }
    }

    fn look(&mut self) -> u32 {
        while self.ring.finished() > 0 {
            self.ring.collect().unwrap();
            self.done += 1;
        }
        self.done
    }

    fn wait_for(&mut self, done: u32) {
        let deadline = Instant::now() + LIMIT;
        while self.look() < done {
            assert!(Instant::now() < deadline, "{} of {done}: the reactor sleeps", self.done);
            std::thread::sleep(Duration::from_micros(100));
        }
    }

    fn stop(&mut self) -> u32 {
        self.running.take().unwrap().stop().unwrap()
    }
}

fn engine(pacing: Pacing) -> Engine {
    Engine::start(&EngineConfig { pacing, ..EngineConfig::default() }).unwrap()
}

/// For how long threads of this name have had a CPU.
fn cpu_time(name: &str) -> Duration {
    let threads = std::fs::read_dir("/proc/self/task").unwrap().map(|t| t.unwrap().path());
    let named = threads.filter(|t| std::fs::read_to_string(t.join("comm")).is_ok_and(|n| n.trim() == name));
    let run = named.filter_map(|t| std::fs::read_to_string(t.join("schedstat")).ok());
    let ns = run.map(|s| s.split(' ').next().unwrap().parse::<u64>().unwrap());
    Duration::from_nanos(ns.sum())
}

const FORMATS: [u64; 4] =
    [0, features::EVENT_IDX, features::RING_PACKED, features::RING_PACKED | features::EVENT_IDX];

/// In one test, because it looks for its reactors by their name.
#[test]
fn what_has_to_wait_stays_in_the_ring_and_the_reactor_sleeps() {
    for (pacing, format) in
        [Pacing::Event, Pacing::Adaptive].into_iter().flat_map(|p| FORMATS.map(|f| (p, f)))
    {
        let engine = engine(pacing);
        let limited = disk(Storage::Null, "iops-read=100");
        let mut driver = Driver::start(&engine, &limited, format, 4096);
        let (begin, used) = (Instant::now(), cpu_time("reactor"));
        driver.submit(T_IN, 32);
        driver.wait_for(32);
        let (time, used) = (begin.elapsed(), cpu_time("reactor").saturating_sub(used));
        // All but a burst of 10 ms and the one that puts it in debt.
        assert!(time >= Duration::from_millis(300), "{time:?}, {pacing:?}");
        assert!(used < time / 2, "{used:?} of {time:?}: it spins, {pacing:?} {format:#x}");
        let stats = &driver.stats;
        assert_eq!(stats.in_flight_peak.get().max(16), 16, "no more than a round looks at");
        assert!((1..=31).contains(&stats.limited.get()), "{}", stats.limited.get());
        assert!(stats.limited_ns.get() >= 280_000_000, "{}", stats.limited_ns.get());

        // More than anybody waits for: nobody else does, and a change is heard in the middle of it.
        limited.throttle().set("bps-total=1,iops-read=1000000".parse().unwrap());
        let mut other = Driver::start(&engine, &disk(Storage::Null, "iops-read=1000000"), format, 4096);
        driver.submit(T_IN, 20);
        driver.wait_for(33);
        for n in 1..=200 {
            other.submit(T_IN, 1);
            other.wait_for(n);
        }
        // A second queue of the disk has nothing left to it, either.
        let mut second = Driver::start(&engine, &limited, format, 4096);
        second.submit(T_OUT, 1);
        std::thread::sleep(Duration::from_millis(30));
        assert_eq!((driver.look(), second.look()), (33, 0));
        limited.throttle().set("iops-read=1000000,bps-write=1".parse().unwrap());
        driver.wait_for(52);
        second.wait_for(1);
        second.submit(T_OUT, 10);
        second.submit(T_IN, 1);

        // It stops as it is, and goes on elsewhere.
        let stopped = second.stop() & 0x7fff;
        second.look();
        assert_eq!(stopped, if format & features::RING_PACKED == 0 { second.done } else { 3 * second.done });
        assert_eq!((driver.stop() & 0x7fff) % 52, 0);
        other.stop();
    }
}
