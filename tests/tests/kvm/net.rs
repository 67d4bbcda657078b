//! A network card: the harness has them too.

use anyhow::{Result, ensure};
use kickless_tests::daemon::Options;
use kickless_tests::echo::Card;
use kickless_tests::image::{Image, MIB};
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
