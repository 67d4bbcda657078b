//! A namespace of QEMU's controller, by commands of its own.

use std::fs;

use anyhow::{Result, ensure};
use kickless_tests::qemu::{Vm, VmBuilder};
use kickless_tests::scene::Scene;

use crate::guest::{LIMIT, attach, end, guest, holds, said, serve, verified};

/// Two controllers: one that takes 32 KiB in a command, and one with a namespace of 4 KiB blocks and one with metadata.
fn disks(vm: VmBuilder, scene: &Scene) -> Result<VmBuilder> {
    let mut vm = vm;
    for (name, mib) in [("plain", 64_u64), ("large", 32), ("meta", 32)] {
        let file = scene.path(&format!("{name}.img"));
        fs::File::create(&file)?.set_len(mib << 20)?;
        let drive = format!("if=none,id={name},format=raw,discard=unmap,file={}", file.display());
        vm = vm.arg("drive", &drive);
    }
    Ok(vm
        .arg("device", "nvme,id=a,drive=plain,serial=plain,mdts=3")
        .arg("device", "nvme,id=b,serial=two")
        .arg("device", "nvme-ns,bus=b,nsid=1,drive=large,logical_block_size=4096,physical_block_size=4096")
        .arg("device", "nvme-ns,bus=b,nsid=2,drive=meta,ms=8"))
}

pub fn by_commands(scene: &Scene) -> Result<Option<String>> {
    let mut vm = disks(guest(scene)?, scene)?.boot(scene)?;
    vm.check("modprobe nvme && for m in vduse virtio_vdpa; do modprobe $m || exit 1; done")?;
    name_all(&mut vm)?;
    interrupts(&mut vm)?;
    linux(&mut vm)?;
    other_formats(&mut vm)?;
    polled(&mut vm)?;
    fallen_back(&mut vm)?;
    vm.quit()?;
    Ok(None)
}

/// Gives each namespace the name that it has in this file, for controllers are numbered as they come: `/tmp/plain` is the
/// generic device of a namespace, `/tmp/plain.block` the block device.
fn name_all(vm: &mut Vm) -> Result<()> {
    for (name, serial, nsid) in [("plain", "plain", 1), ("large", "two", 1), ("meta", "two", 2)] {
        vm.check_soon(
            &format!(
                "for d in /sys/block/nvme*; do grep -qx {nsid} $d/nsid && grep -qw {serial} $d/device/serial && \
                 n=${{d#/sys/block/nvme}} && test -c /dev/ng$n && ln -sfn /dev/ng$n /tmp/{name} && \
                 ln -sfn /dev/nvme$n /tmp/{name}.block; done; test -c /tmp/{name}"
            ),
            LIMIT,
        )?;
    }
    Ok(())
}

/// Requests of all sizes, several commands each, with and without registered memory, by each way of waiting.
fn interrupts(vm: &mut Vm) -> Result<()> {
    for (more, job) in [
        ("--poll event --fixed-buffers on", "--bssplit 4k/40:16k/40:96k/20 --iodepth 16 --indirect"),
        ("--poll busy --cache writethrough", "--bs 4k --iodepth 8 --packed"),
    ] {
        serve(vm, "a", &format!("--blk-file /tmp/plain --num-queues 2 {more}"))?;
        let log = said(vm, "a");
        ensure!(log.contains("/tmp/plain is given NVMe commands"), "{log}");
        verified(vm, "a", &format!("{job} --numjobs 2 --size 4M --offset-increment 8M"))?;
        // Nobody else may have it, by either of its names.
        for other in ["/tmp/plain.block", "/tmp/plain"] {
            let second = vm.run(&format!("vhost-blk --blk-file {other} --socket-path /tmp/second.sock"))?;
            ensure!(
                second.code == 1 && second.stdout.contains("another process has it open"),
                "{}",
                second.stdout
            );
        }
        vm.check("kill -USR1 $(cat /tmp/a.pid)")?;
        vm.check_soon("grep -q ^all /tmp/a.out && ! grep -q ^errors /tmp/a.out", LIMIT)?;
        end(vm, "a", "TERM")?;
    }
    Ok(())
}

/// Linux's driver and fio, by way of VDUSE; what they write, discard and zero is so for whoever reads the block device.
fn linux(vm: &mut Vm) -> Result<()> {
    let args = "/tmp/plain --num-queues 2";
    let node = attach(vm, "v", args)?;
    let log = said(vm, "v");
    ensure!(log.contains("/tmp/plain is given NVMe commands"), "{log}");
    let fio = format!("fio --name=v --filename={node} --direct=1 --ioengine=libaio --iodepth=16 --minimal");
    let job = "--rw=randwrite --bsrange=4k-128k --size=8M --offset=16M --fsync=16 --verify=crc32c";
    let done = vm.run_for(&format!("{fio} {job}"), 2 * LIMIT)?;
    ensure!(done.code == 0, "fio: {}\n{}", done.stdout, said(vm, "v"));

    vm.check(&format!(
        "yes kickless | head -c 8388608 | dd of={node} bs=1M oflag=direct iflag=fullblock 2>/dev/null"
    ))?;
    vm.check(&format!("blkdiscard -z -o 1M -l 1M {node} && blkdiscard -f -o 3M -l 1M {node} && sync"))?;
    // Deallocated blocks of this controller read as zeros.
    for (skip, with) in [(1, "cat /dev/zero"), (3, "cat /dev/zero")] {
        holds(vm, "/tmp/plain.block", skip, 1, with)?;
        holds(vm, &node, skip, 1, with)?;
    }
    let pattern = |skip: u64| format!("yes kickless | tail -c +{}", (skip << 20) + 1);
    for skip in [0, 2, 4, 7] {
        holds(vm, "/tmp/plain.block", skip, 1, &pattern(skip))?;
    }

    // What a killed process had begun is done by the next one.
    let load = "--rw=randrw --bs=4k --size=8M --offset=32M --verify=crc32c --verify_fatal=1 --time_based --runtime=600";
    vm.start("load", &format!("{fio} {load}"))?;
    let requests = format!("awk '{{ print $1 + $5 }}' /sys/block/{}/stat", node.trim_start_matches("/dev/"));
    for _ in 0..2 {
        let before: u64 = vm.check(&requests)?.parse()?;
        vm.check_soon(&format!("test $({requests}) -gt {}", before + 500), LIMIT)?;
        end(vm, "v", "KILL")?;
        ensure!(attach(vm, "v", args)? == node);
    }
    let before: u64 = vm.check(&requests)?.parse()?;
    vm.check_soon(&format!("test $({requests}) -gt {}", before + 500), LIMIT)?;
    ensure!(vm.is_running("load")?, "the load has ended by itself");
    vm.check("kill -INT $(pidof fio)")?;
    let done = vm.join("load", LIMIT)?;
    ensure!(!done.stdout.contains("verify"), "fio: {}\n{}", done.stdout, said(vm, "v"));
    let log = said(vm, "v");
    ensure!(log.matches("going on with its driver").count() == 2, "{log}");
    end(vm, "v", "TERM")
}

/// Blocks of 4 KiB, and blocks with metadata.
fn other_formats(vm: &mut Vm) -> Result<()> {
    let args = "vhost-blk --socket-path /tmp/second.sock --blk-file";
    for (disk, why) in [
        ("/tmp/large", "--block-size 4096"),
        ("/tmp/meta", "8 bytes of metadata"),
        ("/dev/null", "neither a"),
    ] {
        let refused = vm.run(&format!("{args} {disk}"))?;
        ensure!(refused.code == 1 && refused.stdout.contains(why), "{disk}: {}", refused.stdout);
    }
    serve(vm, "b", "--blk-file /tmp/large --block-size 4096 --poll event")?;
    let log = said(vm, "b");
    ensure!(log.contains("/tmp/large is given NVMe commands"), "{log}");
    verified(vm, "b", "--bssplit 4k/50:64k/50 --iodepth 8 --size 4M")?;
    end(vm, "b", "TERM")
}

/// The driver has queues to be polled.
fn polled(vm: &mut Vm) -> Result<()> {
    vm.check("rmmod nvme && modprobe nvme poll_queues=1")?;
    name_all(vm)?;
    for poll in ["event", "busy"] {
        serve(vm, "p", &format!("--blk-file /tmp/plain --num-queues 2 --fixed-buffers on --poll {poll}"))?;
        let log = said(vm, "p");
        ensure!(log.contains("/tmp/plain is given NVMe commands, polled for"), "{log}");
        let job = "--bssplit 4k/60:40k/40 --iodepth 8 --numjobs 2 --size 2M --offset-increment 8M";
        verified(vm, "p", job)?;
        end(vm, "p", "TERM")?;
    }
    Ok(())
}

/// Where commands do not pass, the block device is used, and the log says so.
fn fallen_back(vm: &mut Vm) -> Result<()> {
    // A node that nobody may open.
    vm.check("mount -t tmpfs -o nodev none /mnt && mknod /mnt/ng c $(printf '%d %d' $(stat -L -c '0x%t 0x%T' /tmp/plain))")?;
    serve(vm, "f", "--blk-file /mnt/ng --poll event")?;
    let log = said(vm, "f");
    let block = vm.check("readlink /tmp/plain.block")?;
    let why = format!("/mnt/ng is given no NVMe commands, using {block}: cannot open it");
    ensure!(log.contains(&why), "{log}");
    verified(vm, "f", "--bs 4k --iodepth 8 --size 1M")?;
    end(vm, "f", "TERM")
}
