//! The newer emulator and kernel that tests of vDPA and SR-IOV run on, and what such a test adds to the guest.

use std::path::Path;

use anyhow::{Result, ensure};
use kickless_tests::qemu::Vm;
use kickless_tests::qemu::overlay::Overlay;
use kickless_tests::qemu::release::Release;
use kickless_tests::runner::{self, Test};
use kickless_tests::scene::Scene;

fn main() -> std::process::ExitCode {
    let test = Test {
        name: "newer_guest_has_vdpa_and_sriov".to_owned(),
        needs: Box::new(|| Release::Backports.missing_needs()),
        run: Box::new(newer_guest),
    };
    runner::run(vec![test], "KICKLESS_REQUIRE_QEMU")
}

fn newer_guest(scene: &Scene) -> Result<Option<String>> {
    let overlay = Overlay::new(scene, "overlay")?;
    overlay.text("/etc/start", "#!/bin/sh\necho started >>/run/started\n")?;
    overlay.program(Path::new("/usr/bin/getconf"))?;
    let mut vm = Vm::builder()
        .release(Release::Backports)
        .iommu()
        .cpus(1)
        .kernel_arg("intel_iommu=on")
        .arg("device", "pcie-root-port,id=port1,chassis=1")
        .arg("device", "igb,bus=port1")
        .overlay(overlay)
        .boot(scene)?;
    ensure!(vm.check("cat /run/started")? == "started");
    ensure!(vm.check("getconf PAGE_SIZE")? == "4096");
    vm.check("modprobe vduse && test -c /dev/vduse/control && vdpa mgmtdev show | grep -q vduse")?;
    vm.check("modprobe igb && cat /sys/bus/pci/drivers/igb/*/sriov_totalvfs")?;
    vm.check("lspci -n | grep -q 8086:10c9 && test -d /sys/kernel/iommu_groups/0")?;
    vm.quit()?;
    Ok(None)
}
