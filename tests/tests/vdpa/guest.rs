//! The guest, with our program in it.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use kickless_tests::process;
use kickless_tests::qemu::overlay::Overlay;
use kickless_tests::qemu::release::Release;
use kickless_tests::qemu::{Vm, VmBuilder};
use kickless_tests::scene::Scene;
use serde_json::Value;

/// How long something may take in a guest that is emulated on a busy machine.
pub const LIMIT: Duration = Duration::from_secs(60);

fn program() -> Option<PathBuf> {
    process::built("vdpactl")
}

pub fn missing_program() -> Option<String> {
    program().is_none().then(|| "no vdpactl: run cargo build, or set KICKLESS_BIN_DIR".to_owned())
}

/// A guest with our programs, as small as they can be: they are unpacked into its memory.
pub fn guest(scene: &Scene) -> Result<VmBuilder> {
    let overlay = Overlay::new(scene, "overlay")?;
    for (name, path) in [("vdpactl", program().context("no vdpactl")?), ("client", std::env::current_exe()?)]
    {
        let stripped = scene.path(name);
        let status = Command::new("strip").arg("-o").arg(&stripped).arg(path).status().context("strip")?;
        ensure!(status.success(), "strip: {status}");
        overlay.program(Path::new(&stripped))?;
    }
    Ok(Vm::builder().release(Release::Backports).memory_mib(768).cpus(2).overlay(overlay))
}

/// Loads the bus and what is on it.
pub fn prepare(vm: &mut Vm) -> Result<()> {
    vm.check("for m in vduse virtio_vdpa vhost_vdpa tun; do modprobe $m || exit 1; done")?;
    Ok(())
}

/// Has our program serve something, and waits for what becomes of it.
pub fn serve(vm: &mut Vm, name: &str, args: &str) -> Result<String> {
    vm.check(&format!("rm -f /tmp/{name}.node; vdpactl {args} >/tmp/{name}.node 2>>/tmp/{name}.log & echo $! >/tmp/{name}.pid"))?;
    let up = vm.check_soon(&format!("test -s /tmp/{name}.node"), LIMIT);
    up.with_context(|| said(vm, name))?;
    vm.check(&format!("head -n 1 /tmp/{name}.node"))
}

/// What our program has said.
pub fn said(vm: &mut Vm, name: &str) -> String {
    vm.check(&format!("cat /tmp/{name}.log")).unwrap_or_default()
}

/// Sends our program a signal, and waits for its end if that is what it asks for.
pub fn signal(vm: &mut Vm, name: &str, signal: &str) -> Result<()> {
    vm.check(&format!("kill -{signal} $(cat /tmp/{name}.pid)"))?;
    if signal != "HUP" {
        gone(vm, name)?;
    }
    Ok(())
}

/// Waits for the end of our program.
pub fn gone(vm: &mut Vm, name: &str) -> Result<()> {
    let wait = format!("! test -e /proc/$(cat /tmp/{name}.pid)/exe");
    vm.check_soon(&wait, LIMIT).with_context(|| said(vm, name))
}

/// What iproute2 and we say of the bus is the same, name for name.
pub fn compare_with_iproute2(vm: &mut Vm) -> Result<()> {
    for (theirs, ours) in [("dev show", "list"), ("mgmtdev show", "mgmtdev"), ("dev config show", "config")] {
        let theirs: Value = serde_json::from_str(&vm.check(&format!("vdpa -j {theirs}"))?)?;
        let text = vm.check(&format!("vdpactl {ours} --json"))?;
        ensure!(serde_json::from_str::<Value>(&text)? == theirs, "we say {text}, iproute2 {theirs}");
        ensure!(theirs.as_object().is_some_and(|all| !all.is_empty()), "iproute2 says nothing: {theirs}");
    }
    Ok(())
}
