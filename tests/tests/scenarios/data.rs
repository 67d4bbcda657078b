//! What is written is what is read.

use anyhow::{Context, Result, ensure};
use kickless_tests::daemon::{Kind, Options};
use kickless_tests::fio::Fio;
use kickless_tests::image::{Image, MIB};
use kickless_tests::qemu::{Disk, Vm};
use kickless_tests::scene::Scene;
use nix::sched::{CpuSet, sched_getaffinity};
use nix::unistd::Pid;

use super::{FIO_LIMIT, OneDisk, expect_output, populate, verify};

/// A file system lives through remounting, and is clean as the guest and as the host see it.
pub fn ext4(scene: &Scene) -> Result<Option<String>> {
    let mut one = OneDisk::new(scene)?;
    let sums = populate(&mut one.vm, "vda")?;
    one.vm.check("umount /mnt")?;
    verify(&mut one.vm, "vda", &sums)?;
    one.finish()?.fsck()?;
    Ok(None)
}

/// Four jobs on four queues, with small, large and odd-sized requests.
pub fn four_queues(scene: &Scene) -> Result<Option<String>> {
    let loads = [
        ("small", "bs=4k", 6),
        ("large", "bs=64k", 16),
        ("odd", "bssplit=512/20:1536/20:3584/20:13312/20:66048/20 --bs_unaligned=1", 8),
    ];
    load_four_queues(scene, &Options::default(), &loads)
}

/// The same with the queues spread over two reactors that are bound to CPUs.
pub fn two_reactors(scene: &Scene) -> Result<Option<String>> {
    if Kind::from_env() == Kind::Qsd {
        return Ok(Some("an option of vhost-blk".to_owned()));
    }
    let set = sched_getaffinity(Pid::from_raw(0))?;
    let cpus: Vec<usize> = (0..CpuSet::count()).filter(|&cpu| set.is_set(cpu) == Ok(true)).take(2).collect();
    let [first, second] = cpus[..] else { return Ok(Some("there is but one CPU".to_owned())) };
    let options = Options::default().args(&[&format!("--cpus={first},{second}")]);
    load_four_queues(scene, &options, &[("mixed", "bssplit=4k/50:20k/50", 8)])
}

fn load_four_queues(scene: &Scene, options: &Options, loads: &[(&str, &str, u64)]) -> Result<Option<String>> {
    let mut one = OneDisk::with(scene, options)?;
    expect_output(&mut one.vm, "ls /sys/block/vda/mq | wc -l", "4")?;
    let mut total = 0;
    for &(name, blocks, each_mib) in loads {
        let fio = Fio::new(name, "/dev/vda").arg("rw=randrw").arg(blocks).jobs(4, each_mib);
        let result = fio.run(&mut one.vm, FIO_LIMIT)?;
        total += result.reads + result.writes;
    }
    if Kind::from_env() == Kind::VhostBlk {
        let stats = one.daemon.stats()?;
        let requests = stats.requests();
        ensure!(requests.len() == 4, "the daemon reports {requests:?}:\n{}", stats.text());
        // Every queue has served a fair part. The kernel merges some requests and splits others.
        let fair = total / 16;
        ensure!(requests.values().all(|&n| n > fair), "of {total} requests each queue has seen {requests:?}");
        ensure!(stats.errors() == 0, "the daemon has seen errors:\n{}", stats.text());
    }
    one.finish()?;
    Ok(None)
}

/// Two disks of one guest, one daemon polling all the time and the other never.
pub fn two_disks(scene: &Scene) -> Result<Option<String>> {
    let image_a = Image::create(scene, "a.img", 48 * MIB)?;
    let image_b = Image::create(scene, "b.img", 32 * MIB)?;
    let busy = Options::default().poll("busy").spawn(scene, "busy", &image_a)?;
    let event = Options::default().poll("event").spawn(scene, "event", &image_b)?;
    let mut vm =
        Vm::builder().disk(Disk::new("a", busy.socket())).disk(Disk::new("b", event.socket())).boot(scene)?;
    expect_output(&mut vm, "cat /sys/block/vda/size /sys/block/vdb/size", "98304\n65536")?;
    for disk in ["vda", "vdb"] {
        let fio = Fio::new(disk, &format!("/dev/{disk}")).arg("rw=randrw").arg("bs=8k").jobs(2, 8);
        fio.run(&mut vm, FIO_LIMIT)?;
    }
    // Both at once.
    let both = ["vda", "vdb"].map(|disk| {
        Fio::new(&format!("{disk}-both"), &format!("/dev/{disk}")).arg("rw=randrw").arg("bs=4k").jobs(2, 4)
    });
    for fio in &both {
        fio.start(&mut vm)?;
    }
    for fio in &both {
        fio.join(&mut vm, FIO_LIMIT)?;
    }
    vm.quit()?;
    busy.terminate()?;
    event.terminate()?;
    Ok(None)
}

/// The image behind the host's page cache, and a disk that announces no write cache.
pub fn buffered_and_writethrough(scene: &Scene) -> Result<Option<String>> {
    if Kind::from_env() == Kind::Qsd {
        return Ok(Some("an option of vhost-blk".to_owned()));
    }
    let mut one = OneDisk::with(scene, &Options::default().buffered().args(&["--cache=writethrough"]))?;
    expect_output(&mut one.vm, "cat /sys/block/vda/cache_type", "write through")?;
    for (name, blocks) in [("small", "bs=4k"), ("odd", "bssplit=512/40:1536/30:33280/30 --bs_unaligned=1")] {
        Fio::new(name, "/dev/vda").arg("rw=randrw").arg(blocks).jobs(2, 4).run(&mut one.vm, FIO_LIMIT)?;
    }
    let sums = populate(&mut one.vm, "vda")?;
    one.vm.check("umount /mnt")?;
    verify(&mut one.vm, "vda", &sums)?;
    one.finish()?.fsck()?;
    Ok(None)
}

/// Discarded ranges leave holes in the image, zeroed ones read as zeroes, and their neighbours stay as they are.
pub fn discard(scene: &Scene) -> Result<Option<String>> {
    const FILL: u8 = 0xA5;
    let image = Image::filled(scene, "disk.img", 64 * MIB, FILL)?;
    let full = image.allocated()?;
    ensure!(full >= 64 * MIB, "{full} bytes allocated for an image of 64 MiB");
    let daemon = Options::default().spawn(scene, "daemon", &image)?;
    let mut vm = Vm::builder().disk(Disk::new("disk", daemon.socket())).boot(scene)?;

    vm.check("blkdiscard -o 16M -l 16M /dev/vda")?;
    let punched = image.allocated()?;
    ensure!(punched + 15 * MIB <= full, "discarding 16 MiB: {full} bytes allocated before, {punched} after");
    image.expect_fill(0, 16 << 20, FILL)?;
    image.expect_fill(16 * MIB, 16 << 20, 0)?;
    image.expect_fill(32 * MIB, 32 << 20, FILL)?;

    // Odd in sectors and in pages.
    vm.check("blkdiscard -z -o $((40 * 1048576 + 512)) -l $((4 * 1048576 + 1536)) /dev/vda")?;
    let (start, len) = (40 * MIB + 512, 4 * MIB + 1536);
    image.expect_fill(32 * MIB, (start - 32 * MIB) as usize, FILL)?;
    image.expect_fill(start, len as usize, 0)?;
    image.expect_fill(start + len, (64 * MIB - start - len) as usize, FILL)?;
    let zeroes = "dd if=/dev/vda bs=1M skip=41 count=3 iflag=direct 2>/dev/null | tr -d '\\000' | wc -c";
    expect_output(&mut vm, zeroes, "0")?;

    vm.check("mkfs.ext4 -q -F -E nodiscard /dev/vda && mount /dev/vda /mnt")?;
    vm.check("dd if=/dev/urandom of=/mnt/big bs=1M count=24 2>/dev/null && sync")?;
    let used = image.allocated()?;
    vm.check("rm /mnt/big && sync && fstrim /mnt && umount /mnt && e2fsck -fn /dev/vda")?;
    let trimmed = image.allocated()?;
    ensure!(trimmed + 20 * MIB <= used, "fstrim: {used} bytes allocated before, {trimmed} after");

    vm.quit()?;
    daemon.terminate()?;
    image.fsck().context("after fstrim")?;
    Ok(None)
}

/// The guest turns the write cache off and on while it is writing.
pub fn write_cache(scene: &Scene) -> Result<Option<String>> {
    if Kind::from_env() == Kind::Qsd {
        return Ok(Some("a feature of vhost-blk".to_owned()));
    }
    let mut one = OneDisk::new(scene)?;
    let cache_type = "cat /sys/block/vda/cache_type";
    expect_output(&mut one.vm, cache_type, "write back")?;
    let fio = Fio::new("load", "/dev/vda").arg("rw=randrw").arg("bs=4k").arg("fsync=16").jobs(2, 4);
    fio.start_loop(&mut one.vm)?;
    for _ in 0..3 {
        for mode in ["write through", "write back"] {
            fio.wait_busy(&mut one.vm, "vda")?;
            one.vm.check(&format!("echo {mode} >/sys/block/vda/cache_type"))?;
            expect_output(&mut one.vm, cache_type, mode)?;
        }
    }
    fio.finish(&mut one.vm, FIO_LIMIT)?;
    one.finish()?;
    Ok(None)
}
