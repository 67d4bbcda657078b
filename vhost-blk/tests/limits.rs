//! Disks with limits, and disks that share a reactor or a device: what has to wait stays in the ring, the reactor sleeps
//! meanwhile, and nobody else waits. How much passes in a second, and who has how much in flight, is tried in `throttle.rs`
//! and `share.rs`, where time is told.
#![allow(clippy::unwrap_used)]

use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam::sync::WaitGroup;
use nix::sys::eventfd::EventFd;
use poll_engine::device::{Device, QueueHandler, features};
use poll_engine::engine::pacing::Pacing;
use poll_engine::engine::placement::{CpuList, usable_cpus};
use poll_engine::engine::queue::{Notifier, Queue};
use poll_engine::engine::reactor::Io;
use poll_engine::engine::{Engine, EngineConfig, RunningQueue};
use poll_engine::limit::GRACE;
use poll_engine::memory::{MapHold, Ram};
use poll_engine::ring::driver::{Buffer, DriverRing};
use poll_engine::stats::QueueStats;
use poll_engine::uring::Uring;
use vhost_blk::device::BlkDevice;
use vhost_blk::disk::{Disk, DiskConfig, Storage};
use vhost_blk::open::{Owner, open};
use vhost_blk::request::{T_IN, T_OUT};

const RING_SIZE: u16 = 256;
const LIMIT: Duration = Duration::from_secs(60);

fn disk(storage: Storage, limits: &str) -> Arc<Disk> {
    sharing(storage, limits, 16)
}

fn sharing(storage: Storage, limits: &str, shared_depth: u16) -> Arc<Disk> {
    let config = DiskConfig {
        block_size: 512,
        read_only: false,
        serial: String::new(),
        writeback: true,
        ring_size: RING_SIZE,
        path: std::path::PathBuf::new(),
        incoming: false,
        shared_depth,
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
    submitted: u32,
    done: u32,
    _ram: Ram,
}

impl Driver {
    fn start(engine: &Engine, disk: &Arc<Disk>, features: u64, bytes: u32) -> Driver {
        let (driver, queue, handler) = Driver::new(disk, features, bytes);
        Driver { running: Some(engine.run_queue(queue, handler, None).unwrap()), ..driver }
    }

    /// With the queue and its handler, which nobody runs yet.
    fn new(disk: &Arc<Disk>, features: u64, bytes: u32) -> (Driver, Queue, Box<dyn QueueHandler>) {
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
        let driver =
            Driver { ring, kick, requests, bytes, stats, running: None, submitted: 0, done: 0, _ram: ram };
        (driver, queue, handler)
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
        self.submitted += count;
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
    sched_time(name, 0)
}

/// And (1) for how long they could have used one that others had.
fn sched_time(name: &str, field: usize) -> Duration {
    let threads = std::fs::read_dir("/proc/self/task").unwrap().map(|t| t.unwrap().path());
    let named = threads.filter(|t| std::fs::read_to_string(t.join("comm")).is_ok_and(|n| n.trim() == name));
    let run = named.filter_map(|t| std::fs::read_to_string(t.join("schedstat")).ok());
    let ns = run.map(|s| s.split(' ').nth(field).unwrap().trim().parse::<u64>().unwrap());
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

/// A second of a driver that always has 64 requests in the ring: how many are done, in which time, and how long of that may be
/// lost because the driver or the reactor came too late; and how long a reactor could have used a CPU that others had.
fn a_second(driver: &mut Driver) -> (u64, Duration, Duration, Duration) {
    // Less than what a limit's bucket holds.
    const TOO_LONG: Duration = Duration::from_millis(5);
    let stats = Arc::clone(&driver.stats);
    let late = || Duration::from_nanos(stats.limited_late_ns.get());
    let (done, was_late, waited) = (driver.look(), late(), sched_time("reactor", 1));
    let begin = Instant::now();
    let (mut last, mut lost) = (begin, Duration::ZERO);
    loop {
        let in_flight = driver.submitted - driver.look();
        driver.submit(T_IN, 64 - in_flight);
        let now = Instant::now();
        lost += Some(now - last).filter(|gap| *gap > TOO_LONG).unwrap_or_default();
        last = now;
        if now - begin >= Duration::from_secs(1) {
            let (done, time) = (u64::from(driver.look() - done), begin.elapsed());
            let lost = lost + late().saturating_sub(was_late);
            return (done, time, lost, sched_time("reactor", 1).saturating_sub(waited));
        }
        std::thread::sleep(Duration::from_micros(100));
    }
}

#[test]
#[ignore = "counts seconds of real time, so it is for a machine with nothing else to do"]
fn a_second_has_its_rate_on_a_real_clock() {
    for rate in [1000, 50_000] {
        let engine = engine(Pacing::Adaptive);
        let mut driver = Driver::start(&engine, &disk(Storage::Null, &format!("iops-read={rate}")), 0, 4096);
        // What was saved up before the first request.
        a_second(&mut driver);
        let mut was_quiet = false;
        // Until there is a second in which nobody took the CPUs, nor in the one before: what is lost then is made up for.
        let judged = (0..3).any(|_| {
            let (done, time, lost, waited) = a_second(&mut driver);
            let wanted = rate as f64 * time.as_secs_f64();
            let is_quiet = lost.is_zero() && waited < Duration::from_millis(100);
            let lost = rate as f64 * (lost + waited).as_secs_f64();
            let strict = std::mem::replace(&mut was_quiet, is_quiet) && is_quiet;
            let least = wanted * 0.98 - if strict { 1.0 } else { lost };
            let most = wanted * 1.02 + if strict { 1.0 } else { rate as f64 * GRACE.as_secs_f64() };
            let said = format!(
                "{done} of {wanted:.0} at {rate} a second, {waited:?} without a CPU, {lost:.0} excused"
            );
            println!("{said}");
            assert!((least..=most).contains(&(done as f64)), "{said}");
            strict
        });
        if !judged {
            println!(
                "{rate} a second: no second with CPUs of one's own, so only the wide bounds were looked at"
            );
        }
        driver.stop();
    }
}

/// So many of these are taken in a round of the reactor.
fn taken_in_a_round(storage: Storage, bytes: u32) -> usize {
    let (mut driver, mut queue, mut handler) = Driver::new(&disk(storage, ""), 0, bytes);
    driver.submit(T_IN, 32);
    let mut uring = Uring::new(8).unwrap();
    let taken = handler.poll(&mut queue, &mut Io::alone(&mut uring));
    queue.publish();
    assert_eq!(driver.look() as usize, taken);
    taken
}

#[test]
fn a_round_takes_no_more_bytes_than_others_can_wait_for() {
    let ram = || Storage::Ram(Arc::new(Ram::new(0, 1 << 30, false).unwrap()));
    for (bytes, taken) in [(512, 16), (4096, 16), (32 << 10, 8), (128 << 10, 4), (1 << 20, 1), (4 << 20, 1)] {
        assert_eq!(taken_in_a_round(ram(), bytes), taken, "{bytes} bytes");
    }
    assert_eq!(taken_in_a_round(Storage::Null, 1 << 20), 16, "nothing is copied");
}

fn image(dir: &tempfile::TempDir, name: &str) -> Storage {
    let path = dir.path().join(name);
    std::fs::write(&path, vec![7; 8 << 20]).unwrap();
    // Not by the first one who reads past the page cache.
    std::fs::File::open(&path).unwrap().sync_all().unwrap();
    let (file, traits, _) = open(&path, false, true, 512, Owner::Us).unwrap();
    Storage::File(file, traits)
}

/// How many requests queues of these disks take in two rounds of a reactor, each of `count` that are there. They are never
/// over, so the thread is to have no other use.
fn taken(disks: &[(&Arc<Disk>, u32)]) -> usize {
    let mut uring = Uring::new(256).unwrap();
    let mut taken = 0;
    for &(disk, count) in disks {
        let (mut driver, mut queue, mut handler) = Driver::new(disk, 0, 4096);
        handler.attach(&mut Io::alone(&mut uring));
        driver.submit(T_IN, count);
        taken += handler.poll(&mut queue, &mut Io::alone(&mut uring));
        taken += handler.poll(&mut queue, &mut Io::alone(&mut uring));
        std::mem::forget((driver, queue, handler));
    }
    taken
}

#[test]
fn a_deep_disk_leaves_room_while_another_one_is_on_its_reactor() {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    for (depth, beside) in [(16, 16), (24, 24), (0, 65)] {
        let [deep, other] = ["a", "b"].map(|name| sharing(image(&dir, &format!("{name}{depth}")), "", depth));
        let alone = || taken(&[(&deep, 32), (&deep, 32)]);
        let both = || taken(&[(&other, 1), (&deep, 32), (&deep, 32)]);
        // A reactor each.
        std::thread::scope(|threads| {
            assert_eq!(threads.spawn(alone).join().unwrap(), 64, "{depth}");
            // Where this process waits for longer than disks count, they are alone: once at least it has to get through.
            let mut tries = (0..20).map(|_| threads.spawn(both).join().unwrap());
            assert!(tries.any(|both| both == beside), "{depth}");
        });
    }
}

/// Deep queues of two disks on one device, with one reactor and with two: whoever has no room is looked at again.
#[test]
fn disks_on_one_device_all_get_on() {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let disks = ["a", "b"].map(|name| disk(image(&dir, name), ""));
    for pacing in [Pacing::Event, Pacing::Adaptive] {
        // On a CPU each, which has their reactors bear other names than those above.
        for reactors in [1, 2] {
            let cpus = CpuList(vec![usable_cpus().unwrap()[0]; reactors]);
            let engine = Engine::start(&EngineConfig { pacing, cpus, ..EngineConfig::default() }).unwrap();
            // Two queues of the first: one may have all that the disk may have.
            let mut drivers =
                [&disks[0], &disks[0], &disks[1]].map(|disk| Driver::start(&engine, disk, 0, 64 << 10));
            for round in 1..=4 {
                for driver in &mut drivers {
                    driver.submit(T_IN, 80);
                }
                for driver in &mut drivers {
                    driver.wait_for(80 * round);
                }
            }
            for driver in &mut drivers {
                driver.stop();
                assert_eq!(driver.stats.errors_total(), 0);
            }
        }
    }
}
