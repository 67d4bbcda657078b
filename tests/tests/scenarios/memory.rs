//! Guest memory that changes, and guest memory in pieces.

use anyhow::{Result, ensure};
use kickless_tests::daemon::Options;
use kickless_tests::fio::Fio;
use kickless_tests::image::{Image, MIB};
use kickless_tests::qemu::{Disk, Vm};
use kickless_tests::scene::Scene;

use super::{FIO_LIMIT, OneDisk};

/// The size of a memory module. Linux takes memory in blocks of 128 MiB.
const MODULE_MIB: u64 = 128;

/// Memory is plugged in and out while requests are in flight. Pages that can be moved go to the new memory first,
/// so the load's buffers are in it.
pub fn hotplug(scene: &Scene) -> Result<Option<String>> {
    let mut one = OneDisk::new(scene)?;
    let at_boot = one.vm.memory_kib()?;
    let fio = Fio::new("load", "/dev/vda").arg("rw=randrw").arg("bs=4k").jobs(2, 2);
    fio.start_loop(&mut one.vm)?;
    for round in 0..2 {
        for module in ["a", "b"] {
            fio.wait_busy(&mut one.vm, "vda")?;
            one.vm.hotplug_memory(&format!("{module}{round}"), MODULE_MIB)?;
        }
        fio.wait_busy(&mut one.vm, "vda")?;
        for module in ["a", "b"] {
            one.vm.unplug_memory(&format!("{module}{round}"))?;
            fio.wait_busy(&mut one.vm, "vda")?;
        }
    }
    fio.finish(&mut one.vm, FIO_LIMIT)?;
    let at_end = one.vm.memory_kib()?;
    ensure!(at_end == at_boot, "{at_boot} KiB of memory at boot, {at_end} KiB at the end");
    one.finish()?;
    Ok(None)
}

/// The guest's memory consists of several files from the start.
pub fn many_regions(scene: &Scene) -> Result<Option<String>> {
    let image = Image::create(scene, "disk.img", 64 * MIB)?;
    let daemon = Options::default().spawn(scene, "daemon", &image)?;
    let mut vm = Vm::builder()
        .memory_mib(256)
        .dimm_mib(MODULE_MIB)
        .dimm_mib(MODULE_MIB)
        .dimm_mib(MODULE_MIB)
        .disk(Disk::new("disk", daemon.socket()))
        .boot(scene)?;
    let memory = vm.memory_kib()?;
    ensure!(memory > 500 << 10, "the guest has {memory} KiB of memory");
    Fio::new("load", "/dev/vda").arg("rw=randrw").arg("bs=128k").jobs(4, 16).run(&mut vm, FIO_LIMIT)?;
    vm.quit()?;
    daemon.terminate()?;
    Ok(None)
}
