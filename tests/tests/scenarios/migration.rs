//! Live migration between two daemons that share the image.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use kickless_tests::accel::{self, Accel};
use kickless_tests::daemon::{Daemon, Kind, Options};
use kickless_tests::fio::Fio;
use kickless_tests::image::{Image, MIB};
use kickless_tests::qemu::migration::Migration;
use kickless_tests::qemu::{Disk, Vm};
use kickless_tests::scene::Scene;

use super::FIO_LIMIT;

/// How often the guest moves in each way: `KICKLESS_MIGRATIONS`, or 3.
fn rounds() -> Result<usize> {
    match std::env::var("KICKLESS_MIGRATIONS") {
        Ok(number) => number.parse().context("KICKLESS_MIGRATIONS is no number"),
        Err(_) => Ok(3),
    }
}

/// What becomes of each attempt to move.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    PreCopy,
    PostCopy,
    Cancelled,
}

/// The guest moves to and fro between two QEMUs and two daemons while it verifies what it reads.
fn to_and_fro(scene: &Scene, ways: &[Way]) -> Result<Option<String>> {
    if Kind::from_env() == Kind::Qsd {
        return Ok(Some("qemu-storage-daemon cannot be migrated".to_owned()));
    }
    if accel::choose()? == Accel::Tcg {
        // Seen with QEMU 7.2.22: a guest whose CPUs write much does not survive, without any disk as well.
        return Ok(Some("an emulated guest does not survive its migration under load; needs KVM".to_owned()));
    }
    let image = Image::create(scene, "disk.img", 64 * MIB)?;
    let mut daemons = [
        Options::default().spawn(scene, "here", &image)?,
        Options::default().args(&["--incoming"]).spawn(scene, "there", &image)?,
    ];
    let mut vm = Vm::builder().disk(Disk::new("disk", daemons[0].socket())).boot(scene)?;
    let fio = Fio::new("load", "/dev/vda").arg("rw=randrw").arg("bs=4k").jobs(4, 4);
    fio.start_loop(&mut vm)?;
    let (mut at, mut downtimes) = (0, Vec::new());
    for round in 0..rounds()? {
        for &way in ways {
            fio.wait_busy(&mut vm, "vda")?;
            let to = Migration::to(&[daemons[1 - at].socket()]);
            let context = || format!("round {round}, {way:?}");
            if way == Way::Cancelled {
                vm.cancel_migration(scene, &to).with_context(context)?;
            } else {
                let to = if way == Way::PostCopy { to.post_copy() } else { to };
                let moved = vm.migrate(scene, &to).with_context(context)?;
                at = 1 - at;
                println!("round {round}: {way:?}: {moved:?}");
                downtimes.push(moved.downtime);
            }
            fio.expect_running(&mut vm).with_context(context)?;
            daemons.iter_mut().try_for_each(Daemon::expect_alive)?;
        }
    }
    fio.wait_busy(&mut vm, "vda")?;
    fio.finish(&mut vm, FIO_LIMIT)?;
    downtimes.sort();
    if let (Some(least), Some(most)) = (downtimes.first(), downtimes.last()) {
        let median = downtimes[downtimes.len() / 2];
        println!(
            "{} migrations; downtime: least {least:?}, median {median:?}, most {most:?}",
            downtimes.len()
        );
        ensure!(*least > Duration::ZERO, "a migration without any downtime");
    }
    vm.quit()?;
    for daemon in daemons {
        daemon.terminate()?;
    }
    Ok(None)
}

pub fn pre_copy(scene: &Scene) -> Result<Option<String>> {
    to_and_fro(scene, &[Way::PreCopy, Way::Cancelled])
}
