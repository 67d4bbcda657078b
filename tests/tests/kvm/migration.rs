//! Live migration of a guest that verifies what it reads, between two QEMUs and two daemons that share the image.

use anyhow::{Context, Result, ensure};
use kickless_tests::daemon::{Daemon, Kind, Options};
use kickless_tests::image::{Image, MIB};
use kickless_tests::qemu::migration::{self, Migration, Way};
use kickless_tests::scenario::{Load, Op, Plan, Platform};
use kickless_tests::scene::Scene;
use poll_engine::memory::userfault;

/// Bytes of a request: several pages.
const BLOCK: u32 = 16384;

/// Moves the guest to and fro in these ways, each under a load.
fn to_and_fro(scene: &Scene, platform: Platform, ways: &[Way]) -> Result<Option<String>> {
    if Kind::from_env() == Kind::Qsd {
        return Ok(Some("qemu-storage-daemon cannot be migrated".to_owned()));
    }
    let image = Image::create(scene, "disk.img", 64 * MIB)?;
    let mut daemons = [
        Options::default().spawn(scene, "here", &image)?,
        Options::default().args(&["--incoming"]).spawn(scene, "there", &image)?,
    ];
    let mut guest = Plan::new().cpus(2).disk(daemons[0].socket(), 4).boot(platform, scene)?;
    let (mut at, mut moves) = (0, Vec::new());
    for round in 0..migration::rounds()? {
        for &way in ways {
            let context = || format!("round {round}, {way:?}");
            let to = Migration::to(&[daemons[1 - at].socket()]);
            let load = Load::verified().block_size(BLOCK).flush_every(50).seed(round as u64 + 1);
            let load = if round % 2 == 0 {
                // Reads alone: buffers that the guest itself hardly ever writes, so that nobody but the daemon can
                // tell that they have changed.
                let written = load.clone().requests(load.span / u64::from(BLOCK));
                guest
                    .run(&Load { op: Op::Write, random: false, flush_every: 0, ..written })?
                    .expect_clean()?;
                Load { op: Op::Read, flush_every: 0, ..load }
            } else {
                load
            };
            guest.start(&load.until_told())?;
            guest.after(1000)?;
            match way {
                Way::Cancelled => guest.cancel_migration(scene, &to).with_context(context)?,
                Way::PreCopy | Way::PostCopy => {
                    let to = if way == Way::PostCopy { to.post_copy() } else { to };
                    let moved = guest.migrate(scene, &to).with_context(context)?;
                    at = 1 - at;
                    println!("round {round}, {way:?}: {moved:?}");
                    ensure!(
                        way != Way::PostCopy || moved.requested > 0,
                        "no page was missing in {}",
                        context()
                    );
                    moves.push((way, moved));
                }
            }
            guest.some_more(500).with_context(context)?;
            guest.stop()?;
            guest.finish().with_context(context)?.expect_clean().with_context(context)?;
            daemons.iter_mut().try_for_each(Daemon::expect_alive)?;
        }
    }
    migration::print_downtimes(&moves);
    guest.power_off()?;
    if ways.contains(&Way::PostCopy) {
        for line in ["its guest comes before its memory", "all memory of its guest has come"] {
            let said: usize = daemons.iter().map(|d| d.times_said(line)).sum();
            ensure!(said == migration::rounds()?, "{said} times: {line}");
        }
    }
    for mut daemon in daemons {
        ensure!(daemon.stats()?.errors() == 0, "{}", daemon.stats()?.text());
        daemon.terminate()?;
    }
    Ok(None)
}

pub fn before_its_memory(scene: &Scene, platform: Platform) -> Result<Option<String>> {
    to_and_fro(scene, platform, &[Way::Cancelled, Way::PreCopy])
}

pub fn after_it_has_come(scene: &Scene, platform: Platform) -> Result<Option<String>> {
    if !userfault::is_available() {
        return Ok(Some("userfaultfd is not permitted here".to_owned()));
    }
    to_and_fro(scene, platform, &[Way::PostCopy])
}

pub fn every_way(scene: &Scene, platform: Platform) -> Result<Option<String>> {
    if userfault::is_available() {
        return to_and_fro(scene, platform, &[Way::PreCopy, Way::Cancelled, Way::PostCopy]);
    }
    let skipped = to_and_fro(scene, platform, &[Way::PreCopy, Way::Cancelled])?;
    Ok(skipped.or_else(|| Some("all but post-copy has passed: userfaultfd is not permitted here".to_owned())))
}
