//! What changes while the guest runs.

use std::time::Duration;

use anyhow::{Result, ensure};
use kickless_guest::{LaneReport, Order, kind, misdeed, op, verify, wait};
use kickless_tests::bare::{Bare, lanes};
use kickless_tests::daemon::Options;
use kickless_tests::image::MIB;
use kickless_tests::scenario::{Expect, Load, Op, Platform};
use kickless_tests::scene::Scene;

use crate::OneDisk;

/// Upgrades of one guest's daemon.
const UPGRADES: u64 = 6;

/// The image grows, an interrupt says so, and what lies beyond the old end can be used.
pub fn growth(scene: &Scene, platform: Platform) -> Result<Option<String>> {
    let mut one = OneDisk::boot(scene, platform, 1)?;
    ensure!(one.guest.capacity(0)? == 64 * MIB, "{} bytes at first", one.guest.capacity(0)?);
    let beyond = Load::new(Op::Write).span(80 * MIB).block_size(1 << 20).depth(1).requests(80);
    let early = one.guest.run(&beyond)?;
    ensure!(early.errors == 16, "writes beyond the end: {early:?}");
    for mib in [80, 100] {
        one.image.resize(mib * MIB)?;
        one.daemon.sighup()?;
        one.guest.await_capacity(0, mib * MIB)?;
    }
    one.guest.run(&beyond)?.expect_clean()?;
    one.finish()?;
    Ok(None)
}

/// Regions of memory are added and removed while requests are in flight, and their buffers are used.
pub fn memory(scene: &Scene, platform: Platform) -> Result<Option<String>> {
    let mut one = OneDisk::boot(scene, platform, 2)?;
    for round in 0..3 {
        one.guest.start(&Load::verified().until_told().seed(round))?;
        one.guest.after(500)?;
        one.guest.add_memory(32)?;
        one.guest.add_memory(64)?;
        one.guest.some_more(500)?;
        one.guest.stop()?;
        one.guest.finish()?.expect_clean()?;
        // With buffers in the last one; the other goes away under load after it.
        one.guest.start(&Load::verified().requests(3000).seed(round + 10))?;
        one.guest.after(500)?;
        one.guest.finish()?.expect_clean()?;
        one.guest.remove_memory()?;
        one.guest.run(&Load::verified())?.expect_clean()?;
        one.guest.remove_memory()?;
        one.guest.run(&Load::verified())?.expect_clean()?;
    }
    one.finish()?;
    Ok(None)
}

/// Reset, negotiate, start, load, thirty times.
pub fn resets(scene: &Scene, platform: Platform) -> Result<Option<String>> {
    let mut one = OneDisk::boot(scene, platform, 4)?;
    for seed in 0..30 {
        one.guest.run(&Load::verified().requests(50).seed(seed))?.expect_clean()?;
        one.guest.reset()?;
    }
    one.finish()?;
    Ok(None)
}

/// Queues are reset one by one through their registers, with requests in flight; each goes on with what the device had
/// not taken, and everything read is what was written.
pub fn queue_resets(scene: &Scene, platform: Platform) -> Result<Option<String>> {
    let mut one = OneDisk::boot(scene, platform, 3)?;
    let order = Order {
        op: op::MIX,
        verify: verify::STAMPS,
        wait: wait::SLEEP,
        block_size: 4096,
        write_percent: 50,
        random: 1,
        depth: 32,
        indirect: 1,
        requests: 4000,
        span: 4 * MIB,
        seed: 9,
        reset_every: 100,
        ..Bare::blank(kind::BLOCK, 1)
    };
    let report = one.guest.bare()?.order(&order, Duration::from_secs(60))?;
    let lanes = lanes(&report);
    ensure!(lanes.len() == 3, "{} queues", lanes.len());
    for lane in lanes {
        ensure!(lane.requests == 4000 && lane.errors + lane.mismatches == 0, "{lane:?}");
        ensure!(lane.resets >= 30 && lane.drained > lane.resets, "nothing in flight: {lane:?}");
    }
    let sum = |of: fn(&LaneReport) -> u64| lanes.iter().map(of).sum::<u64>();
    println!(
        "{} resets, {} requests finished by them, {} not taken before",
        sum(|l| l.resets),
        sum(|l| l.drained),
        sum(|l| l.untaken)
    );
    one.guest.run(&Load::verified())?.expect_clean()?;
    ensure!(one.daemon.stats()?.errors() == 0, "{}", one.daemon.stats()?.text());
    one.finish()?;
    Ok(None)
}

/// The device is reset with 32 requests in flight on each queue, and set up anew: what was written before is there.
pub fn device_resets_in_flight(scene: &Scene, platform: Platform) -> Result<Option<String>> {
    let mut one = OneDisk::boot(scene, platform, 2)?;
    let blocks = 512;
    let pass =
        |op| Load::new(op).expect(Expect::Written).requests(blocks).span(blocks * 4096).depth(16).seed(3);
    one.guest.run(&pass(Op::Write))?.expect_clean()?;
    let resets = Order { misdeed: misdeed::RESET_IN_FLIGHT, requests: 20, ..Bare::blank(kind::MISBEHAVE, 1) };
    for _ in 0..5 {
        one.guest.bare()?.order(&resets, Duration::from_secs(60))?;
        one.guest.run(&pass(Op::Read))?.expect_clean()?;
    }
    ensure!(one.daemon.stats()?.errors() == 0, "{}", one.daemon.stats()?.text());
    one.finish()?;
    Ok(None)
}

/// SIGTERM, and another daemon on the same socket: the driver sees nothing but a pause.
pub fn restarted(scene: &Scene, platform: Platform) -> Result<Option<String>> {
    let mut one = OneDisk::boot(scene, platform, 2)?;
    one.guest.start(&Load::verified().until_told())?;
    for _ in 1..=3 {
        one.guest.some_more(2000)?;
        one.daemon.terminate()?;
        one.daemon = Options::default().spawn(scene, "daemon", &one.image)?;
        one.guest.reconnect(0)?;
    }
    one.guest.some_more(2000)?;
    one.guest.stop()?;
    one.guest.finish()?.expect_clean()?;
    one.finish()?;
    Ok(None)
}

/// Newer daemons take over, one from the other, in the middle of a load each: the driver sees nothing but a pause, which is
/// the longest of its requests then.
pub fn upgraded(scene: &Scene, platform: Platform) -> Result<Option<String>> {
    let mut one = OneDisk::boot_as(scene, platform, &Options::default().upgradable(), 2)?;
    let undisturbed = one.guest.run(&Load::verified().requests(10_000))?.longest;
    let mut pauses = Vec::new();
    for round in 0..UPGRADES {
        one.guest.start(&Load::verified().until_told().seed(round))?;
        one.guest.after(1000)?;
        one.daemon.upgrade(scene, &[["--poll=adaptive", "--poll=event"][round as usize % 2]])?;
        one.guest.some_more(1000)?;
        one.guest.stop()?;
        let outcome = one.guest.finish()?;
        outcome.expect_clean()?;
        pauses.push(outcome.longest);
    }
    one.guest.run(&Load::verified().seed(UPGRADES))?.expect_clean()?;
    pauses.sort();
    println!(
        "longest request in each load with an upgrade: p50 {:.1?}, max {:.1?} of {UPGRADES}; without one {undisturbed:.1?}",
        pauses[pauses.len() / 2],
        pauses[pauses.len() - 1]
    );
    one.finish()?;
    Ok(None)
}

/// SIGKILL under load: what was in flight is finished by the next daemon, and the driver sees nothing but a pause.
pub fn killed_under_load(scene: &Scene, platform: Platform) -> Result<Option<String>> {
    let mut one = OneDisk::boot(scene, platform, 2)?;
    one.guest.start(&Load::verified().until_told())?;
    for _ in 1..=6 {
        one.guest.some_more(2000)?;
        one.daemon.kill9()?;
        one.daemon = Options::default().spawn(scene, "daemon", &one.image)?;
        one.guest.reconnect(0)?;
    }
    one.guest.some_more(2000)?;
    one.guest.stop()?;
    one.guest.finish()?.expect_clean()?;
    // What the guest read back was its own; and all of it is there still.
    one.guest.run(&Load::verified())?.expect_clean()?;
    one.finish()?;
    Ok(None)
}

/// SIGKILL with one request in flight, which is served again: nothing that completed is missing.
pub fn killed(scene: &Scene, platform: Platform) -> Result<Option<String>> {
    let mut one = OneDisk::boot(scene, platform, 1)?;
    let blocks = 4000;
    let pass = |op| Load::new(op).expect(Expect::Written).requests(blocks).span(blocks * 4096).depth(1);
    one.guest.start(&pass(Op::Write))?;
    one.guest.after(1000)?;
    one.daemon.kill9()?;
    one.daemon = Options::default().spawn(scene, "daemon", &one.image)?;
    one.guest.reconnect(0)?;
    one.guest.finish()?.expect_clean()?;
    one.guest.run(&pass(Op::Read).depth(1))?.expect_clean()?;
    one.finish()?;
    Ok(None)
}
