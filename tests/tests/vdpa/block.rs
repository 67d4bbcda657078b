//! Disks: a plain `/dev/vdX`, and `/dev/vhost-vdpa-N`.

use anyhow::{Result, ensure};
use kickless_tests::qemu::Vm;
use kickless_tests::scene::Scene;
use std::time::Duration;

use crate::guest::{LIMIT, compare_with_iproute2, gone, guest, prepare, said, serve, signal};

const ATTACH: &str = "attach /disk/image.img --num-queues 4 --queue-size 128";

/// How often a disk comes and goes.
fn rounds() -> u32 {
    std::env::var("KICKLESS_VDPA_ROUNDS").ok().and_then(|n| n.parse().ok()).unwrap_or(3)
}

pub fn disks(scene: &Scene) -> Result<Option<String>> {
    let file = scene.path("host.img");
    std::fs::File::create(&file)?.set_len(512 << 20)?;
    let drive = format!("if=none,id=host,format=raw,file={}", file.display());
    let vm = guest(scene)?.arg("drive", &drive).arg("device", "virtio-blk-pci,drive=host");
    let mut vm = vm.boot(scene)?;
    prepare(&mut vm)?;
    // Images on a real file system: io_uring, direct I/O.
    vm.check(
        "mkfs.ext4 -q /dev/vda && mkdir /disk && mount /dev/vda /disk && truncate -s 64M /disk/image.img",
    )?;

    let node = serve(&mut vm, "image", ATTACH)?;
    ensure!(node == "/dev/vdb", "it is {node}");
    compare_with_iproute2(&mut vm)?;
    let queues = vm.check("vdpactl list --json")?;
    ensure!(queues.contains("\"max_vqs\":4") && queues.contains("\"max_vq_size\":128"), "{queues}");
    let features = vm.check("cat /sys/bus/vdpa/devices/image/virtio*/features")?;
    ensure!(features.as_bytes()[34] == b'1', "the ring is not packed: {features}");

    file_system(&mut vm)?;
    verify(&mut vm, "/dev/vdb", "8M")?;
    vm.check("blkdiscard -f -o 1M -l 2M /dev/vdb && blkdiscard -z -o 4M -l 1M /dev/vdb")?;
    vm.check("dd if=/dev/vdb bs=1M skip=4 count=1 iflag=direct 2>/dev/null | cmp -n 1048576 - /dev/zero")?;
    grow(&mut vm)?;
    killed_under_load(&mut vm)?;
    vm.check("vdpactl detach /disk/image.img")?;
    gone(&mut vm, "image")?;
    vm.check("! test -e /dev/vdb && ! test -e /dev/vduse/image && ! test -e /run/kickless-vdpa/image")?;

    for _ in 0..rounds() {
        serve(&mut vm, "image", ATTACH)?;
        vm.check("dd if=/dev/vdb of=/dev/null bs=64K count=4 iflag=direct 2>/dev/null")?;
        signal(&mut vm, "image", "TERM")?;
        vm.check("! test -e /dev/vdb && ! test -e /dev/vduse/image")?;
    }
    own_memory(&mut vm)?;
    vhost_vdpa(&mut vm)?;
    refusals(&mut vm)?;
    vm.quit()?;
    Ok(None)
}

fn file_system(vm: &mut Vm) -> Result<()> {
    vm.check("mkfs.ext4 -q /dev/vdb && mount /dev/vdb /mnt && head -c 5000000 /dev/urandom >/mnt/a && sync")?;
    let sum = vm.check("sha256sum </mnt/a")?;
    // Neither a signal nor a detach takes a mounted disk away.
    let refused = vm.run("vdpactl detach image")?;
    ensure!(refused.code == 1 && refused.stdout.contains("in use"), "{}", refused.stdout);
    vm.check("kill -TERM $(cat /tmp/image.pid) && sleep 1 && umount /mnt && mount /dev/vdb /mnt")?;
    ensure!(vm.check("sha256sum </mnt/a")? == sum, "the file is another one");
    vm.check("umount /mnt && e2fsck -fn /dev/vdb")?;
    Ok(())
}

/// Writes that are read back, with flushes among them.
fn verify(vm: &mut Vm, node: &str, size: &str) -> Result<()> {
    let job = format!(
        "--name=v --filename={node} --rw=randwrite --bs=4k --size={size} --direct=1 --ioengine=libaio"
    );
    let said =
        vm.run_for(&format!("fio {job} --iodepth=32 --fsync=64 --verify=crc32c --minimal"), 2 * LIMIT)?;
    ensure!(said.code == 0, "fio: {}", said.stdout);
    Ok(())
}

fn grow(vm: &mut Vm) -> Result<()> {
    vm.check("truncate -s 96M /disk/image.img")?;
    signal(vm, "image", "HUP")?;
    vm.check_soon("test $(blockdev --getsize64 /dev/vdb) = 100663296", LIMIT)
}

/// Whatever was in flight is finished by the next process.
fn killed_under_load(vm: &mut Vm) -> Result<()> {
    let job = "--name=k --filename=/dev/vdb --rw=randrw --bs=4k --size=24M --direct=1 --ioengine=libaio --iodepth=64";
    vm.start(
        "load",
        &format!("fio {job} --verify=crc32c --verify_fatal=1 --time_based --runtime=8 --minimal"),
    )?;
    for _ in 0..3 {
        vm.check("sleep 1.5")?;
        ensure!(vm.is_running("load")?, "the load has ended too early");
        signal(vm, "image", "KILL")?;
        let node = serve(vm, "image", ATTACH)?;
        ensure!(node == "/dev/vdb", "it is {node}");
    }
    let load = vm.join("load", 2 * LIMIT)?;
    ensure!(load.code == 0, "fio: {}\n{}", load.stdout, said(vm, "image"));
    let log = said(vm, "image");
    ensure!(log.contains("going on with its driver"), "{log}");
    ensure!(log.contains("requests of an earlier back end are served again"), "nothing was in flight: {log}");
    Ok(())
}

/// Pages bounce through huge pages of ours; the ring is a split one.
fn own_memory(vm: &mut Vm) -> Result<()> {
    vm.check("echo 8 >/proc/sys/vm/nr_hugepages")?;
    let node =
        serve(vm, "huge", "attach /disk/image.img --name huge --bounce huge --bounce-size 8M --packed off")?;
    verify(vm, &node, "4M")?;
    ensure!(vm.check("cat /sys/class/vduse/huge/bounce_size")? == "8388608");
    let log = said(vm, "huge");
    ensure!(log.contains("8 MiB of our own huge pages"), "{log}");
    signal(vm, "huge", "TERM")?;
    vm.check("test $(awk '/HugePages_Free/ { print $2 }' /proc/meminfo) = 8")?;
    Ok(())
}

/// The same disk for an independent driver; one of a killed process is taken away.
fn vhost_vdpa(vm: &mut Vm) -> Result<()> {
    let node = serve(vm, "v", "attach /disk/image.img --name v --driver vhost --num-queues 2")?;
    ensure!(node == "/dev/vhost-vdpa-0", "it is {node}");
    for _ in 0..2 {
        let client = vm.run_for(&format!("client client {node}"), LIMIT + Duration::from_secs(30))?;
        ensure!(client.code == 0, "{}\n{}", client.stdout, said(vm, "v"));
    }
    signal(vm, "v", "KILL")?;
    vm.check("vdpactl detach")?;
    vm.check("! test -e /dev/vhost-vdpa-0 && ! test -e /dev/vduse/v && ! test -e /run/kickless-vdpa/v")?;
    Ok(())
}

fn refusals(vm: &mut Vm) -> Result<()> {
    serve(vm, "one", "attach /disk/image.img --name one --driver vhost")?;
    for (command, why) in [
        ("vdpactl serve blk --backend null:1G --name one", "served by process"),
        ("vdpactl attach /disk/image.img --name two", "another process has it open"),
        ("vdpactl add three", "three"),
        ("vdpactl detach three", "no device three"),
    ] {
        let refused = vm.run(command)?;
        ensure!(refused.code == 1 && refused.stdout.contains(why), "{command}: {}", refused.stdout);
        ensure!(
            refused.stdout.lines().filter(|l| l.starts_with("vdpactl:")).count() == 1,
            "{}",
            refused.stdout
        );
    }
    signal(vm, "one", "TERM")?;
    vm.check("modprobe -r virtio_vdpa vhost_vdpa vduse 2>/dev/null; rmmod virtio_vdpa; rmmod vhost_vdpa; rmmod vduse; ! test -e /dev/vduse/control")?;
    let missing = vm.run("vdpactl attach /disk/image.img")?;
    ensure!(missing.code == 1 && missing.stdout.contains("modprobe"), "{}", missing.stdout);
    Ok(())
}
