//! Doorbells and interrupts: as many as asked for, none that is lost, none that is not needed.

use std::time::Duration;

use anyhow::{Result, ensure};
use kickless_tests::daemon::{Daemon, Medium, Options};
use kickless_tests::image::MIB;
use kickless_tests::scenario::{Guest, Load, Op, Plan, Platform, Wait};
use kickless_tests::scene::Scene;
use poll_engine::device::features;

/// A guest with one queue of a disk that answers at once, and its daemon.
fn boot(
    scene: &Scene,
    platform: Platform,
    poll: &'static str,
    refused: u64,
) -> Result<(Box<dyn Guest>, Daemon)> {
    let daemon = Options::default().poll(poll).spawn(scene, "daemon", Medium::Null(64 * MIB))?;
    let guest = Plan::new().disk(daemon.socket(), 1).without(refused).boot(platform, scene)?;
    Ok((guest, daemon))
}

/// A driver that wants to hear of every completion, one request at a time: an interrupt for each, by the guest's
/// count and by the daemon's, with the event index and without.
pub fn counted(scene: &Scene, platform: Platform) -> Result<Option<String>> {
    const REQUESTS: u64 = 1500;
    for (refused, poll) in [(0, "adaptive"), (features::EVENT_IDX, "adaptive"), (0, "event")] {
        let (mut guest, mut daemon) = boot(scene, platform, poll, refused)?;
        let load = Load::new(Op::Read).depth(1).requests(REQUESTS).wait(Wait::EveryInterrupt);
        let outcome = guest.run(&load)?;
        outcome.expect_clean()?;
        let signals = daemon.stats()?.column("signals")[&0];
        ensure!(
            (outcome.interrupts, signals) == (REQUESTS, REQUESTS),
            "{REQUESTS} requests one by one: {} interrupts, {signals} signals ({poll}, refused {refused:#x})",
            outcome.interrupts
        );
        guest.power_off()?;
        daemon.terminate()?;
    }
    Ok(None)
}

/// A driver that polls hears nothing, and one that sleeps hears no more often than it slept.
pub fn suppressed(scene: &Scene, platform: Platform) -> Result<Option<String>> {
    for refused in [0, features::EVENT_IDX] {
        let (mut guest, mut daemon) = boot(scene, platform, "adaptive", refused)?;
        let outcome = guest.run(&Load::new(Op::Read).requests(20_000).wait(Wait::Poll))?;
        outcome.expect_clean()?;
        let signals = daemon.stats()?.column("signals")[&0];
        ensure!(
            (outcome.interrupts, signals) == (0, 0),
            "{} interrupts, {signals} signals",
            outcome.interrupts
        );
        let outcome = guest.run(&Load::new(Op::Read).requests(20_000).wait(Wait::Sleep))?;
        outcome.expect_clean()?;
        let signals = daemon.stats()?.column("signals")[&0];
        ensure!(outcome.interrupts <= signals, "{} interrupts of {signals} signals", outcome.interrupts);
        ensure!(signals < outcome.requests / 2, "{signals} signals for {} requests", outcome.requests);
        guest.power_off()?;
        daemon.terminate()?;
    }
    Ok(None)
}

/// Both sides go to sleep after every request and must be woken every time.
fn wake_ups(scene: &Scene, platform: Platform, poll: &'static str) -> Result<Option<String>> {
    let (mut guest, daemon) = boot(scene, platform, poll, 0)?;
    let load = Load::new(Op::Read).depth(1).requests(20_000).limit(Duration::from_secs(60));
    let outcome = guest.run(&load)?;
    outcome.expect_clean()?;
    ensure!(outcome.interrupts > 1000, "{} interrupts: the guest has hardly slept", outcome.interrupts);
    guest.power_off()?;
    daemon.terminate()?;
    Ok(None)
}

/// With a reactor that spins for a while before it sleeps.
pub fn wake_ups_adaptive(scene: &Scene, platform: Platform) -> Result<Option<String>> {
    wake_ups(scene, platform, "adaptive")
}

/// With a reactor that sleeps at once.
pub fn wake_ups_event(scene: &Scene, platform: Platform) -> Result<Option<String>> {
    wake_ups(scene, platform, "event")
}

/// A reactor that never sleeps asks for no notifications, and the guest, which polls, has no reason to come out: by
/// the CPU's own statistics. Those exits that the host brings about (its timer, its scheduler) are not counted.
pub fn doorbells(scene: &Scene, platform: Platform) -> Result<Option<String>> {
    for (refused, requests) in [(0, 1_000_000), (features::EVENT_IDX, 200_000)] {
        let (mut guest, daemon) = boot(scene, platform, "busy", refused)?;
        let load = Load::new(Op::Read).block_size(512).wait(Wait::Poll).unrecorded();
        // Memory is touched for the first time here.
        guest.run(&load)?.expect_clean()?;
        let before = guest.bare()?.machine()?.stats()?;
        let outcome = guest.run(&load.requests(requests))?;
        let after = guest.bare()?.machine()?.stats()?;
        outcome.expect_clean()?;
        let grown = |name: &str| after[0].get(name).unwrap_or(&0) - before[0].get(name).unwrap_or(&0);
        let (kicks, hosts) = (outcome.kicks, grown("irq_exits"));
        let exits = grown("exits") - hosts;
        println!("{requests} requests: {kicks} kicks, {exits} exits of the guest's, {hosts} of the host's");
        ensure!(kicks < 10, "{kicks} kicks (refused features {refused:#x})");
        ensure!(exits < 100, "{exits} exits: {before:?} {after:?}");
        guest.power_off()?;
        daemon.terminate()?;
    }
    Ok(None)
}
