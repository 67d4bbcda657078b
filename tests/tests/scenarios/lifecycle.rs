//! Guests, front ends, disks and daemons that come and go.

use anyhow::{Result, ensure};
use kickless_tests::daemon::{Daemon, Kind, Options};
use kickless_tests::fio::Fio;
use kickless_tests::image::{Image, MIB};
use kickless_tests::qemu::{Disk, Vm};
use kickless_tests::scene::Scene;
use serde_json::json;

use super::{FIO_LIMIT, OneDisk, expect_output, populate, verify};

/// The guest reboots by itself, several times, the last of them in the middle of a load.
pub fn reboot(scene: &Scene) -> Result<Option<String>> {
    let mut one = OneDisk::new(scene)?;
    let sums = populate(&mut one.vm, "vda")?;
    one.vm.check("umount /mnt")?;
    for _ in 0..2 {
        one.vm.reboot()?;
        verify(&mut one.vm, "vda", &sums)?;
    }
    let fio = file_load(&mut one.vm)?;
    fio.expect_running(&mut one.vm)?;
    // The kernel has its disks fail whatever is still asked of them when it shuts down.
    one.vm.tolerate("I/O error");
    one.vm.reboot()?;
    one.vm.check("mount /dev/vda /mnt && rm -f /mnt/load && umount /mnt")?;
    verify(&mut one.vm, "vda", &sums)?;
    one.finish()?.fsck()?;
    Ok(None)
}

/// The machine is stopped, which has QEMU take the rings' bases, and continued, which has it give them back.
pub fn stop_and_continue(scene: &Scene) -> Result<Option<String>> {
    let mut one = OneDisk::new(scene)?;
    expect_format(&mut one.vm, scene)?;
    let fio = Fio::new("load", "/dev/vda").arg("rw=randrw").arg("bs=4k").jobs(4, 4);
    fio.start_loop(&mut one.vm)?;
    for _ in 0..5 {
        fio.wait_busy(&mut one.vm, "vda")?;
        one.vm.qmp(&json!({ "execute": "stop" }))?;
        one.vm.qmp(&json!({ "execute": "cont" }))?;
    }
    fio.wait_busy(&mut one.vm, "vda")?;
    fio.finish(&mut one.vm, FIO_LIMIT)?;
    one.finish()?;
    Ok(None)
}

/// QEMU is killed in the middle of a load, and the next one finds what had been synced.
pub fn front_end_killed(scene: &Scene) -> Result<Option<String>> {
    let mut one = OneDisk::new(scene)?;
    let sums = populate(&mut one.vm, "vda")?;
    one.vm.check("umount /mnt")?;
    for _ in 0..2 {
        let fio = file_load(&mut one.vm)?;
        fio.expect_running(&mut one.vm)?;
        one.vm.kill()?;
        one.daemon.expect_alive()?;
        one.vm = Vm::builder().disk(Disk::new("disk", one.daemon.socket())).boot(scene)?;
        // Mounting replays the journal.
        one.vm.check("mount /dev/vda /mnt && rm -f /mnt/load && umount /mnt")?;
        verify(&mut one.vm, "vda", &sums)?;
    }
    one.finish()?.fsck()?;
    Ok(None)
}

/// The disk is taken out of the running guest and put back.
pub fn replug(scene: &Scene) -> Result<Option<String>> {
    let mut one = OneDisk::new(scene)?;
    let sums = populate(&mut one.vm, "vda")?;
    one.vm.check("umount /mnt")?;
    let first = Disk::new("disk", one.daemon.socket());
    one.vm.unplug_disk(&first)?;
    expect_output(&mut one.vm, "ls /sys/block", "")?;
    // Another number of queues and another ring size than before.
    for (id, queues, size) in [("again", 1, 64), ("third", 4, 256)] {
        let disk = Disk::new(id, one.daemon.socket()).prop("num-queues", queues).prop("queue-size", size);
        one.vm.hotplug_disk(&disk)?;
        expect_output(&mut one.vm, "ls /sys/block/vda/mq | wc -l", &queues.to_string())?;
        verify(&mut one.vm, "vda", &sums)?;
        one.vm.unplug_disk(&disk)?;
        expect_output(&mut one.vm, "ls /sys/block", "")?;
    }
    one.finish()?.fsck()?;
    Ok(None)
}

/// The disk is taken away while the guest is using it: the guest's load fails, nothing else does.
pub fn unplug_under_load(scene: &Scene) -> Result<Option<String>> {
    let mut one = OneDisk::new(scene)?;
    let doomed = Fio::new("doomed", "/dev/vda").arg("rw=randrw").arg("bs=4k").arg("loops=1000").jobs(4, 4);
    doomed.start(&mut one.vm)?;
    doomed.wait_busy(&mut one.vm, "vda")?;
    let disk = Disk::new("disk", one.daemon.socket());
    one.vm.unplug_disk(&disk)?;
    let output = one.vm.join("doomed", FIO_LIMIT)?;
    ensure!(output.code != 0, "fio has not noticed that its disk is gone");
    one.daemon.expect_alive()?;

    let again = Disk::new("again", one.daemon.socket());
    one.vm.hotplug_disk(&again)?;
    Fio::new("load", "/dev/vda").arg("rw=randrw").arg("bs=4k").jobs(4, 4).run(&mut one.vm, FIO_LIMIT)?;
    one.vm.tolerate("I/O error");
    one.finish()?;
    Ok(None)
}

/// The guest takes its driver off the disk in the middle of a load and puts it back, which resets the device: what was
/// written before is there, and the disk works.
pub fn driver_rebound(scene: &Scene) -> Result<Option<String>> {
    let mut one = OneDisk::new(scene)?;
    let kept =
        Fio::new("kept", "/dev/vda").arg("rw=randwrite").arg("bs=64k").arg("offset=32m").arg("size=8m");
    kept.run(&mut one.vm, FIO_LIMIT)?;
    let sum = "dd if=/dev/vda bs=64k skip=512 count=128 2>/dev/null | sha256sum";
    let written = one.vm.check(sum)?;
    let device = one.vm.check("basename $(readlink -f /sys/block/vda/device)")?;
    let driver = "/sys/bus/virtio/drivers/virtio_blk";
    one.vm.tolerate("I/O error");
    for _ in 0..3 {
        let doomed =
            Fio::new("doomed", "/dev/vda").arg("rw=randrw").arg("bs=4k").arg("loops=1000").jobs(4, 4);
        doomed.start(&mut one.vm)?;
        doomed.wait_busy(&mut one.vm, "vda")?;
        one.vm.check(&format!("echo {} >{driver}/unbind", device.trim()))?;
        let output = one.vm.join("doomed", FIO_LIMIT)?;
        ensure!(output.code != 0, "fio has not noticed that its disk is gone");
        expect_output(&mut one.vm, "ls /sys/block", "")?;
        one.vm.check(&format!("echo {} >{driver}/bind", device.trim()))?;
        one.vm.check_soon("test -b /dev/vda", FIO_LIMIT)?;
        expect_output(&mut one.vm, sum, written.trim())?;
    }
    Fio::new("load", "/dev/vda").arg("rw=randrw").arg("bs=4k").jobs(4, 4).run(&mut one.vm, FIO_LIMIT)?;
    let stats = one.daemon.stats()?;
    ensure!(stats.errors() == 0, "the daemon has seen\n{}", stats.text());
    one.finish()?;
    Ok(None)
}

/// The daemon goes away and another one takes its place, while the guest is writing. QEMU reconnects, and the
/// guest notices nothing but a pause.
pub fn daemon_restarted(scene: &Scene) -> Result<Option<String>> {
    if Kind::from_env() == Kind::Qsd {
        return Ok(Some("qemu-storage-daemon leaves requests unanswered when it ends".to_owned()));
    }
    replaced_under_load(scene, 3, Daemon::terminate)
}

/// The daemon is killed, again and again, while the guest is writing. QEMU has kept the record of what was in flight, and
/// the next daemon finishes it: no request of the guest fails, and what it reads back is what it wrote.
pub fn daemon_killed(scene: &Scene) -> Result<Option<String>> {
    if Kind::from_env() == Kind::Qsd {
        return Ok(Some("qemu-storage-daemon keeps no record of requests in flight".to_owned()));
    }
    replaced_under_load(scene, 5, Daemon::kill9)
}

/// The driver has taken the ring format that the test is about: VIRTIO_F_RING_PACKED is number 34.
fn expect_format(vm: &mut Vm, scene: &Scene) -> Result<()> {
    let packed = if scene.packed() { "1" } else { "0" };
    expect_output(vm, "cut -c35 /sys/block/vda/device/features", packed)
}

/// Ends the daemon by `end` and starts another one, this many times, while the guest is writing.
fn replaced_under_load(scene: &Scene, times: u32, end: fn(Daemon) -> Result<()>) -> Result<Option<String>> {
    let image = Image::create(scene, "disk.img", 64 * MIB)?;
    let mut daemon = Options::default().spawn(scene, "daemon", &image)?;
    let mut vm = Vm::builder().disk(Disk::new("disk", daemon.socket())).boot(scene)?;
    expect_format(&mut vm, scene)?;
    let fio = Fio::new("load", "/dev/vda").arg("rw=randrw").arg("bs=4k").jobs(4, 4);
    fio.start_loop(&mut vm)?;
    for _ in 0..times {
        fio.wait_busy(&mut vm, "vda")?;
        end(daemon)?;
        daemon = Options::default().spawn(scene, "daemon", &image)?;
    }
    fio.wait_busy(&mut vm, "vda")?;
    fio.finish(&mut vm, FIO_LIMIT)?;
    // QEMU has lost its back end now and then, and says so.
    vm.tolerate("vhost");
    vm.quit()?;
    daemon.terminate()?;
    Ok(None)
}

/// Newer daemons take over, one from the other, while the guest is writing. It notices a pause, and QEMU nothing.
pub fn daemon_upgraded(scene: &Scene) -> Result<Option<String>> {
    if Kind::from_env() == Kind::Qsd {
        return Ok(Some("qemu-storage-daemon has nobody take over from it".to_owned()));
    }
    let mut one = OneDisk::with(scene, &Options::default().upgradable())?;
    expect_format(&mut one.vm, scene)?;
    let fio = Fio::new("load", "/dev/vda").arg("rw=randrw").arg("bs=4k").jobs(4, 4);
    fio.start_loop(&mut one.vm)?;
    for further in [&["--poll=event"][..], &["--cpus=0", "--fixed-buffers=off"], &[]] {
        fio.wait_busy(&mut one.vm, "vda")?;
        one.daemon.upgrade(scene, further)?;
    }
    fio.wait_busy(&mut one.vm, "vda")?;
    fio.finish(&mut one.vm, FIO_LIMIT)?;
    // Neither the guest nor QEMU may have said anything of it: QEMU would, had it lost its back end.
    one.finish()?;
    Ok(None)
}

/// Mounts the file system and starts a load on a file of its own in it.
fn file_load(vm: &mut Vm) -> Result<Fio> {
    vm.check("mount /dev/vda /mnt")?;
    let fio = Fio::new("load", "/mnt/load").arg("rw=randrw").arg("bs=4k").arg("size=12m").arg("loops=1000");
    fio.start(vm)?;
    fio.wait_busy(vm, "vda")?;
    Ok(fio)
}
