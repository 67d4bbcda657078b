//! The disk given to a virtual machine: QEMU in the guest, emulating, with its own driver of vhost-vdpa nodes, and in it the
//! bare-metal guest of these tests, which takes seconds where Linux would take minutes.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use kickless_tests::qemu::{Vm, VmBuilder};
use kickless_tests::scene::Scene;
use kickless_tests::{bare, process};

use crate::guest::{LIMIT, said, serve, signal};

/// Where the emulator of Debian's backports is unpacked (`scripts/backports.sh`).
fn emulator() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/backports/qemu/usr")
}

/// Gives the machine a disk (not one of virtio, so that those have the names they have) with all that is needed.
pub fn files(vm: VmBuilder, scene: &Scene) -> Result<VmBuilder> {
    let (directory, image) = (scene.path("nested"), scene.path("nested.img"));
    lay_out(&directory)?;
    fs::File::create(&image)?.set_len(128 << 20)?;
    let mkfs = process::find_program("mkfs.ext4").unwrap_or("/sbin/mkfs.ext4".into());
    let status = Command::new(mkfs).args(["-q", "-d"]).args([&directory, &image]).status();
    let status = status.context("mkfs.ext4")?;
    ensure!(status.success(), "mkfs.ext4: {status}");
    let drive = format!("if=none,id=nested,format=raw,readonly=on,file={}", image.display());
    Ok(vm.arg("drive", &drive).arg("device", "nvme,drive=nested,serial=nested"))
}

/// The emulator with its libraries and firmware, and the kernel that it is to boot.
fn lay_out(directory: &Path) -> Result<()> {
    fs::create_dir(directory)?;
    let copy = |from: &Path, name: &str| {
        fs::copy(from, directory.join(name)).with_context(|| from.display().to_string()).map(drop)
    };
    let qemu = emulator().join("bin/qemu-system-x86_64");
    copy(&qemu, "qemu")?;
    let needs = Command::new("ldd").arg(&qemu).output().context("ldd")?;
    for library in String::from_utf8_lossy(&needs.stdout).split_whitespace().filter(|w| w.starts_with('/')) {
        let name = Path::new(library).file_name().context("a library has a name")?;
        copy(Path::new(library), &name.to_string_lossy())?;
    }
    for firmware in ["share/seabios/bios-microvm.bin", "share/qemu/qboot.rom", "share/qemu/pvh.bin"] {
        let name = Path::new(firmware).file_name().context("a file has a name")?;
        copy(&emulator().join(firmware), &name.to_string_lossy())?;
    }
    copy(&bare::program().context(bare::BUILD)?, "kernel")
}

/// A disk of ours in a virtual machine, whose driver writes all of its queues and reads them back.
pub fn virtual_machine(vm: &mut Vm) -> Result<()> {
    let files = "/nested";
    vm.check("modprobe nvme")?;
    vm.check_soon("test -b /dev/nvme0n1", LIMIT)?;
    vm.check(&format!("mkdir {files} && mount -o ro,noload /dev/nvme0n1 {files}"))?;
    let node = serve(
        vm,
        "vm",
        "serve blk --name vm --backend ram:16M --num-queues 1 --queue-size 256 --driver vhost",
    )?;
    let machine = "microvm,accel=tcg,acpi=off,pit=off,pic=off,rtc=off,isa-serial=on,x-option-roms=off";
    let qemu = format!("{files}/ld-linux-x86-64.so.2 --library-path {files} {files}/qemu -L {files}");
    // Memory that the device's process can have as well.
    let memory = "-m 64 -object memory-backend-memfd,id=mem,size=64M,share=on";
    let device = format!("-global virtio-mmio.force-legacy=false -device vhost-vdpa-device,vhostdev={node}");
    let kernel = format!("-kernel {files}/kernel -append 'kickless.cpus=1 kickless.selftest'");
    let rest = "-nodefaults -no-user-config -no-reboot -display none -serial file:/tmp/serial";
    vm.start(
        "qemu",
        &format!("{qemu} -machine {machine},memory-backend=mem {memory} {device} {kernel} {rest}"),
    )?;
    let done = vm.check_soon("grep -q 'guest: done' /tmp/serial", 2 * LIMIT);
    let serial = vm.check("cat /tmp/serial /tmp/qemu.out 2>&1 || true")?;
    done.with_context(|| format!("{serial}\n{}", said(vm, "vm")))?;
    ensure!(serial.contains("disk 0: ok"), "{serial}");
    vm.check("kill $(pidof ld-linux-x86-64.so.2)")?;
    vm.join("qemu", LIMIT)?;
    signal(vm, "vm", "TERM")
}
