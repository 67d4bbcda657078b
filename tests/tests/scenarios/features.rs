//! What the disk says of itself.

use std::time::Duration;

use anyhow::{Result, ensure};
use kickless_tests::daemon::{Kind, Options};
use kickless_tests::fio::Fio;
use kickless_tests::image::{Image, MIB};
use kickless_tests::qemu::{Disk, Vm, VmBuilder};
use kickless_tests::scene::Scene;

use super::{FIO_LIMIT, OneDisk, expect_output, populate, verify};

/// A read-only disk cannot be written, and a disk has the serial number it was given.
pub fn read_only(scene: &Scene) -> Result<Option<String>> {
    let image = Image::filled(scene, "disk.img", 8 * MIB, 0x3C)?;
    let before = image.sha256()?;
    let mut options = Options::default().read_only();
    if Kind::from_env() == Kind::VhostBlk {
        options = options.args(&["--serial", "kickless-0042"]);
    }
    let daemon = options.spawn(scene, "daemon", &image)?;
    let mut vm = Vm::builder().disk(Disk::new("disk", daemon.socket())).boot(scene)?;
    expect_output(&mut vm, "cat /sys/block/vda/ro", "1")?;
    expect_output(&mut vm, "blockdev --getro /dev/vda", "1")?;
    if Kind::from_env() == Kind::VhostBlk {
        expect_output(&mut vm, "cat /sys/block/vda/serial", "kickless-0042")?;
    }
    expect_output(&mut vm, "sha256sum </dev/vda | cut -d' ' -f1", &before)?;
    let write = vm.run("dd if=/dev/zero of=/dev/vda bs=4k count=1 oflag=direct conv=notrunc")?;
    ensure!(write.code != 0, "writing to a read-only disk has succeeded: {}", write.stdout);
    let discard = vm.run("blkdiscard /dev/vda")?;
    ensure!(discard.code != 0, "discarding a read-only disk has succeeded: {}", discard.stdout);
    vm.quit()?;
    daemon.terminate()?;
    ensure!(image.sha256()? == before, "the image of a read-only disk has changed");
    Ok(None)
}

/// A disk with logical blocks of 4 KiB says so and works.
pub fn block_size(scene: &Scene) -> Result<Option<String>> {
    let mut one = OneDisk::with(scene, &Options::default().block_size(4096))?;
    expect_output(&mut one.vm, "cat /sys/block/vda/queue/logical_block_size", "4096")?;
    expect_output(&mut one.vm, "blockdev --getss --getsize64 /dev/vda", "4096\n67108864")?;
    let small =
        one.vm.run("fio --name=small --filename=/dev/vda --rw=read --bs=512 --size=512 --direct=1")?;
    ensure!(small.code != 0, "a read of 512 bytes has succeeded: {}", small.stdout);
    Fio::new("load", "/dev/vda")
        .arg("rw=randrw")
        .arg("bssplit=4k/50:12k/25:68k/25")
        .jobs(2, 6)
        .run(&mut one.vm, FIO_LIMIT)?;
    let sums = populate(&mut one.vm, "vda")?;
    one.vm.check("umount /mnt")?;
    verify(&mut one.vm, "vda", &sums)?;
    one.finish()?.fsck()?;
    Ok(None)
}

/// The image grows, the guest notices, and what lies beyond the old end is there to be used.
pub fn growth(scene: &Scene) -> Result<Option<String>> {
    if Kind::from_env() == Kind::Qsd {
        return Ok(Some("a signal of vhost-blk".to_owned()));
    }
    let mut one = OneDisk::new(scene)?;
    let beyond =
        "tr '\\000' Z </dev/zero | dd of=/dev/vda bs=64k count=16 iflag=fullblock oflag=direct conv=notrunc";
    for mib in [80_u64, 200] {
        let at = (mib - 1) * 16;
        let early = one.vm.run(&format!("{beyond} seek={at}"))?;
        ensure!(early.code != 0, "writing beyond the end has succeeded: {}", early.stdout);
        one.image.resize(mib * MIB)?;
        one.daemon.sighup()?;
        let seen = format!("test $(cat /sys/block/vda/size) = {}", mib * 2048);
        one.vm.check_soon(&seen, Duration::from_secs(60))?;
        one.vm.check(&format!("{beyond} seek={at}"))?;
        one.image.expect_fill((mib - 1) * MIB, 1 << 20, b'Z')?;
    }
    // The new size is there after a reset of the device, too.
    one.vm.reboot()?;
    expect_output(&mut one.vm, "blockdev --getsize64 /dev/vda", &(200 * MIB).to_string())?;
    one.finish()?;
    Ok(None)
}

/// The guest translates addresses through its DMA API, which is the identity here.
pub fn iommu_platform(scene: &Scene) -> Result<Option<String>> {
    access_platform(scene, Vm::builder(), |vm| load_16k().run(vm, FIO_LIMIT).map(drop))
}

/// The same with every buffer copied through the guest's bounce buffers.
pub fn swiotlb(scene: &Scene) -> Result<Option<String>> {
    access_platform(scene, Vm::builder().kernel_arg("swiotlb=force"), |vm| {
        // Slots of 2 KiB in use while there are requests of 16 KiB.
        vm.check("mount -t debugfs none /sys/kernel/debug 2>/dev/null; true")?;
        let fio = load_16k();
        fio.start_loop(vm)?;
        vm.check_soon("test $(cat /sys/kernel/debug/swiotlb/io_tlb_used) -ge 8", FIO_LIMIT)?;
        fio.finish(vm, FIO_LIMIT).map(drop)
    })
}

fn load_16k() -> Fio {
    Fio::new("load", "/dev/vda").arg("rw=randrw").arg("bs=16k").jobs(4, 4)
}

fn access_platform(
    scene: &Scene,
    builder: VmBuilder,
    load: fn(&mut Vm) -> Result<()>,
) -> Result<Option<String>> {
    if Kind::from_env() == Kind::Qsd {
        return Ok(Some("a feature of vhost-blk".to_owned()));
    }
    let image = Image::create(scene, "disk.img", 64 * MIB)?;
    let daemon = Options::default().spawn(scene, "daemon", &image)?;
    let disk = Disk::new("disk", daemon.socket()).prop("iommu_platform", true).prop("disable-legacy", "on");
    let mut vm = builder.disk(disk).boot(scene)?;
    // The features are a string of bits, the lowest first; VIRTIO_F_ACCESS_PLATFORM is number 33.
    expect_output(&mut vm, "cut -c34 /sys/block/vda/device/features", "1")?;
    load(&mut vm)?;
    let sums = populate(&mut vm, "vda")?;
    vm.check("umount /mnt")?;
    verify(&mut vm, "vda", &sums)?;
    vm.quit()?;
    daemon.terminate()?;
    image.fsck()?;
    Ok(None)
}
