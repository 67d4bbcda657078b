//! Linux with fio that verifies, on an image of the cluster: the cluster stands still, the daemon is killed, another takes over.

use std::time::Duration;

use anyhow::{Result, ensure};
use kickless_tests::daemon::{Medium, Options};
use kickless_tests::fio::Fio;
use kickless_tests::qemu::{Disk, Vm};
use kickless_tests::scene::Scene;
use nix::sys::signal::Signal;

use crate::cluster::Cluster;

/// A process that has died keeps the image's lock for some seconds, and its successor writes nothing before it has it.
const LIMIT: Duration = Duration::from_secs(180);

pub fn linux(scene: &Scene) -> Result<Option<String>> {
    let cluster = Cluster::up(scene)?;
    cluster.rbd("create --size 64M rbd/disk")?;
    let name = cluster.name("disk");
    let mut daemon = Options::default().upgradable().spawn(scene, "rbd", Medium::Named(&name))?;
    let mut vm = Vm::builder().disk(Disk::new("disk", daemon.socket())).boot(scene)?;
    // QEMU asks a back end that has gone where its rings are.
    vm.tolerate("ring restore failed");
    let fio = Fio::new("load", "/dev/vda").arg("rw=randrw").arg("bsrange=4k-64k").arg("fsync=64").jobs(2, 4);
    fio.start_loop(&mut vm)?;
    fio.wait_busy(&mut vm, "vda")?;

    cluster.osd(Signal::SIGSTOP)?;
    std::thread::sleep(Duration::from_secs(8));
    ensure!(daemon.times_said("and the cluster has not answered") == 1, "no line of it");
    cluster.osd(Signal::SIGCONT)?;
    fio.wait_busy(&mut vm, "vda")?;

    for _ in 0..2 {
        daemon.kill_and_restart(scene)?;
        fio.wait_busy(&mut vm, "vda")?;
    }
    daemon.upgrade(scene, &[])?;
    fio.wait_busy(&mut vm, "vda")?;
    fio.finish(&mut vm, LIMIT)?;

    // A file system, and what is discarded.
    vm.check("mkfs.ext4 -q /dev/vda && mount /dev/vda /mnt && head -c 8000000 /dev/urandom >/mnt/a && sync")?;
    let sum = vm.check("sha256sum </mnt/a")?;
    vm.check("umount /mnt && mount -o discard /dev/vda /mnt")?;
    ensure!(vm.check("sha256sum </mnt/a")? == sum, "the file is another one");
    vm.check("rm /mnt/a && umount /mnt && e2fsck -fn /dev/vda")?;
    vm.quit()?;
    daemon.terminate()?;
    Ok(None)
}
