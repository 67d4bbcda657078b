//! Several guests on one back end, side by side.

use std::sync::Barrier;
use std::thread::ScopedJoinHandle;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use hdrhistogram::Histogram;
use kickless_tests::daemon::Options;
use kickless_tests::image::{Image, MIB};
use kickless_tests::scenario::{Load, Op, Outcome, Plan, Platform, Wait};
use kickless_tests::scene::Scene;

use crate::{Demo, thousands};

const IMAGE: u64 = 16 * MIB;
/// Verified requests of a guest.
const VERIFIED: u64 = 5000;

/// What one guest has to say.
struct Seen {
    first_request: Duration,
    reads: Outcome,
    verified: Outcome,
}

impl Seen {
    fn errors(&self) -> u64 {
        [&self.reads, &self.verified].iter().map(|load| load.errors + load.mismatches).sum()
    }
}

/// Runs it and prints the table.
pub fn run(demo: &Demo) -> Result<()> {
    let scene = Scene::new()?;
    let images: Vec<Image> = (0..demo.guests)
        .map(|i| Image::filled(&scene, &format!("disk-{i}.img"), IMAGE, 0x4b))
        .collect::<Result<_>>()?;
    let images: Vec<&Image> = images.iter().collect();
    let mut daemon = Options::default().poll(demo.poll.name()).spawn_many(&scene, "daemon", &images)?;
    println!(
        "{} guests of one CPU on one vhost-blk process (--poll {}), each with a disk of {} MiB of its own.\n\
         {} s of random reads of 4 KiB, {} in flight a guest, waiting by interrupts; then {} verified reads and \
         writes a guest.\n",
        demo.guests,
        demo.poll.name(),
        IMAGE / MIB,
        demo.seconds,
        demo.depth,
        thousands(VERIFIED),
    );
    let ready = Barrier::new(demo.guests.into());
    let seen: Vec<Result<Seen>> = std::thread::scope(|scope| {
        let threads: Vec<_> = daemon
            .sockets()
            .iter()
            .map(|socket| {
                let (ready, scene) = (&ready, &scene);
                scope.spawn(move || guest(demo, &Plan::new().disk(socket, 1), scene, ready))
            })
            .collect();
        let joined = threads.into_iter().map(ScopedJoinHandle::join);
        joined.map(|seen| seen.unwrap_or_else(|_| Err(anyhow::anyhow!("its thread has panicked")))).collect()
    });
    let mut guests = Vec::new();
    for (i, seen) in seen.into_iter().enumerate() {
        guests.push(seen.with_context(|| format!("guest {i}\n{}", scene.report()))?);
    }
    print(&guests)?;
    let served = daemon.stats()?;
    let requests: u64 = served.disks().iter().flat_map(|disk| disk.requests().into_values()).sum();
    println!(
        "\nvhost-blk has counted {} requests on {} disks, {} errors.",
        thousands(requests),
        served.disks().len(),
        served.errors()
    );
    daemon.terminate()?;
    let errors = served.errors() + guests.iter().map(Seen::errors).sum::<u64>();
    ensure!(errors == 0, "{errors} requests failed, or have read what was not written");
    Ok(())
}

/// One guest from boot to power-off.
fn guest(demo: &Demo, plan: &Plan, scene: &Scene, ready: &Barrier) -> Result<Seen> {
    let reads = Load::new(Op::Read).random().depth(demo.depth).wait(Wait::Sleep).span(IMAGE);
    let booted = plan.boot(Platform::Bare, scene).and_then(|mut guest| {
        guest.run(&reads.clone().requests(1))?.expect_clean()?;
        let first = guest.bare()?.machine()?.first_request().context("the guest has not said so")?;
        Ok((guest, first))
    });
    // Also for one that has failed, or the others would wait for it.
    ready.wait();
    let (mut guest, first_request) = booted?;
    let time = Duration::from_secs(demo.seconds);
    let reads = guest.run(&reads.time(time).limit(time + Duration::from_secs(60)))?;
    let verified =
        guest.run(&Load::verified().depth(demo.depth).requests(VERIFIED).limit(Duration::from_secs(120)))?;
    guest.power_off()?;
    Ok(Seen { first_request, reads, verified })
}

fn print(guests: &[Seen]) -> Result<()> {
    println!(
        "{:>5} {:>16} {:>10} {:>9} {:>9} {:>9} {:>7}",
        "guest", "first request ms", "IOPS", "p50 us", "p99 us", "p99.9 us", "errors"
    );
    let row = |name: &str, first: Duration, iops: f64, latency: &Histogram<u64>, errors: u64| {
        let us = |percent: f64| latency.value_at_percentile(percent) as f64 / 1000.0;
        println!(
            "{name:>5} {:>16.1} {:>10} {:>9.1} {:>9.1} {:>9.1} {errors:>7}",
            first.as_secs_f64() * 1000.0,
            thousands(iops as u64),
            us(50.0),
            us(99.0),
            us(99.9),
        );
    };
    let mut all = Histogram::new(3)?;
    for (i, guest) in guests.iter().enumerate() {
        row(&i.to_string(), guest.first_request, guest.reads.iops(), &guest.reads.latency, guest.errors());
        all.add(&guest.reads.latency)?;
    }
    let slowest = guests.iter().map(|guest| guest.first_request).max().unwrap_or_default();
    let iops = guests.iter().map(|guest| guest.reads.iops()).sum();
    row("total", slowest, iops, &all, guests.iter().map(Seen::errors).sum());
    println!(
        "\nFirst request: from the start of its virtual machine, booting included; in total the slowest."
    );
    Ok(())
}
