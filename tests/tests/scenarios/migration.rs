//! Live migration of Linux, which verifies what it reads, between two QEMUs and two daemons that share the image.

use anyhow::{Context, Result, ensure};
use kickless_tests::daemon::{Daemon, Kind, Options};
use kickless_tests::fio::Fio;
use kickless_tests::image::{Image, MIB};
use kickless_tests::qemu::migration::{self, Migration, Way};
use kickless_tests::qemu::{Disk, Vm};
use kickless_tests::scene::Scene;
use poll_engine::memory::userfault;

use super::FIO_LIMIT;

/// The guest moves to and fro in each of these ways while it verifies what it reads.
fn to_and_fro(scene: &Scene, ways: &[Way]) -> Result<Option<String>> {
    if Kind::from_env() == Kind::Qsd {
        return Ok(Some("qemu-storage-daemon cannot be migrated".to_owned()));
    }
    let image = Image::create(scene, "disk.img", 64 * MIB)?;
    let mut daemons = [
        Options::default().spawn(scene, "here", &image)?,
        Options::default().args(&["--incoming"]).spawn(scene, "there", &image)?,
    ];
    let disk = Disk::new("disk", daemons[0].socket()).prop("num-queues", 2);
    let mut vm = Vm::builder().cpus(2).disk(disk).boot(scene)?;
    let fio = Fio::new("load", "/dev/vda").arg("rw=randrw").arg("bs=4k").jobs(2, 4);
    // Beside it reads alone, each verified, into buffers that the guest itself never writes: nobody but the daemon can tell
    // that they have changed.
    let reader = "fio --filename=/dev/vda --ioengine=libaio --direct=1 --iodepth=64 --offset=32m --size=4m --bs=4k \
                  --verify=crc32c --verify_fatal=1 --name=reader";
    vm.check(&format!("{reader} --rw=write --do_verify=0 --output=/tmp/written"))?;
    vm.check("rm -f /tmp/stop")?;
    vm.start(
        "reader",
        &format!("while ! test -e /tmp/stop; do {reader} --rw=read --loops=8 || exit 1; done"),
    )?;
    fio.start_loop(&mut vm)?;
    let (mut at, mut moves) = (0, Vec::new());
    for round in 0..migration::rounds()? {
        for &way in ways {
            let context = || format!("round {round}, {way:?}");
            fio.wait_busy(&mut vm, "vda").with_context(context)?;
            let to = Migration::to(&[daemons[1 - at].socket()]).background(32 * MIB);
            if way == Way::Cancelled {
                vm.cancel_migration(scene, &to).with_context(context)?;
            } else {
                let to = if way == Way::PostCopy { to.post_copy() } else { to };
                let moved = vm.migrate(scene, &to).with_context(context)?;
                println!("round {round}, {way:?}: {moved:?}");
                let late = way == Way::PostCopy;
                ensure!(!late || moved.requested > 0, "no page was missing in {}", context());
                at = 1 - at;
                moves.push((way, moved));
            }
            fio.expect_running(&mut vm).with_context(context)?;
            ensure!(vm.is_running("reader")?, "{}: {:?}", context(), vm.join("reader", FIO_LIMIT)?);
            daemons.iter_mut().try_for_each(Daemon::expect_alive)?;
        }
    }
    fio.wait_busy(&mut vm, "vda")?;
    ensure!(vm.is_running("reader")?, "the reader has ended: {:?}", vm.join("reader", FIO_LIMIT)?);
    fio.finish(&mut vm, FIO_LIMIT)?;
    let read = vm.join("reader", FIO_LIMIT)?;
    ensure!(read.code == 0, "the reader: {read:?}");
    migration::print_downtimes(&moves);
    vm.quit()?;
    // The image has been with whoever served the guest: each move is one daemon that gives it up and one that takes it.
    for line in [" is unlocked: its guest may go on elsewhere", " is locked again: its guest runs here"] {
        let said: usize = daemons.iter().map(|daemon| daemon.times_said(line)).sum();
        ensure!(said >= moves.len(), "{said} times for {} moves: {line}", moves.len());
    }
    for mut daemon in daemons {
        ensure!(daemon.stats()?.errors() == 0, "{}", daemon.stats()?.text());
        daemon.terminate()?;
    }
    Ok(None)
}

/// All ways in turn; without userfaultfd those that do not need it.
pub fn every_way(scene: &Scene) -> Result<Option<String>> {
    if userfault::is_available() {
        return to_and_fro(scene, &[Way::PreCopy, Way::Cancelled, Way::PostCopy]);
    }
    let skipped = to_and_fro(scene, &[Way::PreCopy, Way::Cancelled])?;
    Ok(skipped.or_else(|| Some("all but post-copy has passed: userfaultfd is not permitted here".to_owned())))
}
