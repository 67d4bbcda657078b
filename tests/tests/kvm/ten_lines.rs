//! The scenario of docs/kvm-harness.md.

use anyhow::Result;
use kickless_tests::daemon::Options;
use kickless_tests::image::{Image, MIB};
use kickless_tests::scenario::{Load, Plan, Platform};
use kickless_tests::scene::Scene;

pub fn restart(scene: &Scene, platform: Platform) -> Result<Option<String>> {
    let image = Image::create(scene, "disk.img", 64 * MIB)?;
    let mut daemon = Options::default().spawn(scene, "daemon", &image)?;
    let mut guest = Plan::new().disk(daemon.socket(), 4).boot(platform, scene)?;
    guest.start(&Load::verified().requests(5000))?;
    guest.after(1000)?;
    daemon.terminate()?;
    daemon = Options::default().spawn(scene, "daemon", &image)?;
    guest.reconnect(0)?;
    guest.finish()?.expect_clean()?;
    guest.power_off()?;
    daemon.terminate()?;
    Ok(None)
}
