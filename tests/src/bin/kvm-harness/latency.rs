//! What the virtual machine adds to a request: a driver without one and a driver in one, in turn, with the same
//! ring code on the same CPU against the same disk.

use std::os::fd::AsRawFd;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};
use hdrhistogram::Histogram;
use kickless_tests::daemon::{Medium, Options};
use kickless_tests::scenario::{Load, Op, Plan, Platform, Wait};
use kickless_tests::scene::Scene;
use kickless_tests::vmm::backend::{Backend, Kind, QueueSetup};
use poll_engine::device::features::{EVENT_IDX, VERSION_1};
use poll_engine::engine::placement::pin_to;
use poll_engine::memory::Ram;
use poll_engine::ring::driver::{Buffer, DriverRing};
use quanta::Clock;
use vhost::VhostUserMemoryRegionInfo;

use crate::{Latency, spread, thousands};

/// What both drivers accept.
const FEATURES: u64 = VERSION_1 | EVENT_IDX;
const RING: u16 = 64;
const BLOCK: u32 = 4096;
/// Blocks that are read one after the other, again and again.
const BLOCKS: u64 = 1024;
/// Requests before those that count.
const WARM_UP: u32 = 20_000;
/// How long a round may take.
const LIMIT: Duration = Duration::from_secs(120);

/// Percentiles of a round, in microseconds.
#[derive(Clone, Copy)]
struct Round {
    p50: f64,
    p99: f64,
}

impl Round {
    fn of(latency: &Histogram<u64>) -> Round {
        let us = |percent: f64| latency.value_at_percentile(percent) as f64 / 1000.0;
        Round { p50: us(50.0), p99: us(99.0) }
    }
}

/// Runs both in turn and prints the tables.
pub fn run(what: &Latency) -> Result<()> {
    let scene = Scene::new()?;
    let options = Options::default().poll("busy").args(&[&format!("--cpus={}", what.device_cpu)]);
    let daemon = options.spawn(&scene, "daemon", Medium::Null(1 << 30))?;
    let (mut without, mut within) = (Vec::new(), Vec::new());
    for _ in 0..what.rounds {
        without.push(Round::of(&process(daemon.socket(), what).context("the driver without a machine")?));
        within.push(Round::of(&guest(daemon.socket(), what, &scene).context("the driver in a machine")?));
    }
    daemon.terminate()?;
    println!(
        "Reads of 4 KiB, null disk, --poll busy on CPU {}, driver polling on CPU {}, depth 1; {} rounds of {} requests \
         in turn; min / median / max",
        what.device_cpu,
        what.driver_cpu,
        what.rounds,
        thousands(what.requests.into()),
    );
    println!("{:<22} {:>24} {:>24}", "driver", "p50 us", "p99 us");
    let cell = |[a, b, c]: [f64; 3]| format!("{a:.3} / {b:.3} / {c:.3}");
    for (name, rounds) in [("process", &without), ("guest, ring 3", &within)] {
        let over = |of: fn(&Round) -> f64| cell(spread(rounds.iter().map(of).collect()));
        println!("{name:<22} {:>24} {:>24}", over(|round| round.p50), over(|round| round.p99));
    }
    for (name, of) in [
        ("difference by round", (|a, b| b - a) as fn(f64, f64) -> f64),
        ("ratio by round", (|a, b| b / a) as fn(f64, f64) -> f64),
    ] {
        let by_round = |pick: fn(&Round) -> f64| {
            cell(spread(without.iter().zip(&within).map(|(a, b)| of(pick(a), pick(b))).collect()))
        };
        println!("{name:<22} {:>24} {:>24}", by_round(|round| round.p50), by_round(|round| round.p99));
    }
    Ok(())
}

/// The bare-metal guest.
fn guest(socket: &Path, what: &Latency, scene: &Scene) -> Result<Histogram<u64>> {
    let plan = Plan::new().disk(socket, 1).ring_size(RING).without(!FEATURES).pin(&[what.driver_cpu]);
    let mut guest = plan.boot(Platform::Bare, scene)?;
    let load =
        Load::new(Op::Read).depth(1).direct().wait(Wait::Poll).span(BLOCKS * u64::from(BLOCK)).limit(LIMIT);
    guest.run(&load.clone().requests(WARM_UP.into()))?.expect_clean()?;
    guest.start(&load.requests(what.requests.into()))?;
    let begun = Instant::now();
    while guest.progress()? < u64::from(what.requests) {
        ensure!(begun.elapsed() < LIMIT, "no end after {LIMIT:?}");
        // Seldom: whoever looks takes one of the two CPUs away.
        std::thread::sleep(Duration::from_millis(50));
    }
    let outcome = guest.finish()?;
    outcome.expect_clean()?;
    ensure!(outcome.latency.len() == u64::from(what.requests), "not all latencies were kept");
    guest.power_off()?;
    Ok(outcome.latency)
}

/// A thread of this process.
fn process(socket: &Path, what: &Latency) -> Result<Histogram<u64>> {
    std::thread::scope(|scope| {
        let driver = scope.spawn(|| {
            pin_to(what.driver_cpu).with_context(|| format!("cannot run on CPU {}", what.driver_cpu))?;
            drive(socket, what.requests)
        });
        driver.join().map_err(|_| anyhow!("its thread has panicked"))?
    })
}

fn drive(socket: &Path, requests: u32) -> Result<Histogram<u64>> {
    let full = "memory for the ring and one request";
    let mut ram = Ram::new(0, 1 << 20, false)?;
    let spec = ram.spec();
    let region = VhostUserMemoryRegionInfo {
        guest_phys_addr: spec.guest_addr,
        memory_size: spec.size,
        userspace_addr: spec.user_addr,
        mmap_offset: 0,
        mmap_handle: ram.fd().as_raw_fd(),
    };
    let mut backend = Backend::connect(Kind::Block, socket, 1, &[region], Arc::new(|| {}))?;
    ensure!(backend.features() & FEATURES == FEATURES, "the back end lacks features");
    let config = DriverRing::lay_out(&mut ram, RING, FEATURES).context(full)?;
    let (control, data) = ram.alloc(192, 64).zip(ram.alloc(u64::from(BLOCK), 4096)).context(full)?;
    let mut ring = DriverRing::new(&config, ram.map())?;
    ring.set_interrupts(false);
    let setup = QueueSetup {
        size: RING,
        desc: config.desc_addr,
        driver: config.avail_addr,
        device: config.used_addr,
    };
    // The ring's addresses are ours already.
    backend.begin(FEATURES, setup.size)?;
    backend.start(&[(0, setup, 0)], Ok)?;
    // A cache line each, as in the guest.
    let status_at = control + 128;
    let header = ram.map().slice(control, 16).context(full)?;
    let status = ram.map().slice(status_at, 1).context(full)?;
    let clock = Clock::new();
    let mut latency = Histogram::new(3)?;
    let begun = Instant::now();
    for n in 0..WARM_UP + requests {
        let sector = u64::from(n) % BLOCKS * u64::from(BLOCK / 512);
        let mut bytes = [0; 16];
        bytes[8..].copy_from_slice(&sector.to_le_bytes());
        header.write(&bytes);
        status.write_byte(0xff);
        let started = clock.raw();
        ring.add(&[
            Buffer { addr: control, len: 16, writable: false },
            Buffer { addr: data, len: BLOCK, writable: true },
            Buffer { addr: status_at, len: 1, writable: true },
        ]);
        if ring.publish() {
            backend.wires()[0].kick.write(1)?;
        }
        let mut looks = 0u32;
        while ring.finished() == 0 {
            looks = looks.wrapping_add(1);
            if looks.is_multiple_of(1 << 26) && begun.elapsed() > LIMIT {
                bail!("no answer to request {n}");
            }
            std::hint::spin_loop();
        }
        let finished = clock.raw();
        ring.collect();
        let mut done = [0xff];
        status.read(&mut done);
        ensure!(done == [0], "request {n} failed with status {}", done[0]);
        if n >= WARM_UP {
            latency.record(clock.delta_as_nanos(started, finished))?;
        }
    }
    backend.stop(0)?;
    Ok(latency)
}
