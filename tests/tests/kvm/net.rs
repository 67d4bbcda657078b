//! A network card: the harness has them too.

use std::time::Duration;

use anyhow::{Result, ensure};
use kickless_tests::daemon::Options;
use kickless_tests::echo::Card;
use kickless_tests::image::{Image, MIB};
use kickless_tests::net;
use kickless_tests::scenario::{Load, Op, Plan, Platform, Wait};
use kickless_tests::scene::Scene;

/// Packets of all sizes are sent and come back as they were.
pub fn echo(scene: &Scene, platform: Platform) -> Result<Option<String>> {
    let card = Card::serve(scene)?;
    let mut guest = Plan::new().nic(&card.socket).boot(platform, scene)?;
    for (bytes, wait) in
        [(60, Wait::Poll), (256, Wait::Sleep), (1514, Wait::Sleep), (1514, Wait::EveryInterrupt)]
    {
        let outcome = guest.run(&Load::new(Op::Echo).block_size(bytes).requests(2000).wait(wait))?;
        outcome.expect_clean()?;
        ensure!(outcome.requests == 2000, "{outcome:?}");
    }
    guest.power_off()?;
    Ok(None)
}

/// Devices of two kinds in one guest.
pub fn with_disk(scene: &Scene, platform: Platform) -> Result<Option<String>> {
    let card = Card::serve(scene)?;
    let image = Image::create(scene, "disk.img", 16 * MIB)?;
    let daemon = Options::default().spawn(scene, "daemon", &image)?;
    let mut guest = Plan::new().disk(daemon.socket(), 2).nic(&card.socket).boot(platform, scene)?;
    for seed in 0..3 {
        guest.run(&Load::verified().seed(seed).requests(200))?.expect_clean()?;
        guest.run(&Load::new(Op::Echo).on(&[1]).block_size(500).requests(200))?.expect_clean()?;
    }
    guest.power_off()?;
    daemon.terminate()?;
    Ok(None)
}

/// Packets between two cards on a switch: none is lost, none overtakes another.
pub fn exchange(scene: &Scene, platform: Platform) -> Result<Option<String>> {
    if let Some(reason) = net::missing_needs() {
        return Ok(Some(reason));
    }
    let packets = std::env::var("KICKLESS_PACKETS").ok().and_then(|n| n.parse().ok()).unwrap_or(100_000);
    let mut daemon = net::Options::switch().queues(1).lossless().spawn(scene, "switch")?;
    let mut plan = Plan::new().cpus(2);
    for socket in daemon.sockets() {
        plan = plan.nic(socket);
    }
    let mut guest = plan.boot(platform, scene)?;
    // Half of them small, a tenth large, and what is left over with sleeping guests.
    for (bytes, part, wait) in [(60, 5, Wait::Poll), (1514, 1, Wait::Poll), (300, 4, Wait::Sleep)] {
        let load = Load::new(Op::Exchange).on(&[0, 1]).block_size(bytes).unrecorded().wait(wait).depth(128);
        let each = packets * part / 20;
        let outcome = guest.run(&load.requests(each).limit(Duration::from_secs(60 + packets / 10_000)))?;
        outcome.expect_clean()?;
        ensure!(outcome.requests == 2 * each, "{outcome:?}");
    }
    guest.power_off()?;
    let stats = daemon.stats()?;
    ensure!(!stats.text().contains("\ndrops "), "{}", stats.text());
    daemon.terminate()?;
    Ok(None)
}
