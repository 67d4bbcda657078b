//! The guest, with our program in it.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use kickless_tests::qemu::overlay::Overlay;
use kickless_tests::qemu::release::Release;
use kickless_tests::qemu::{Vm, VmBuilder};
use kickless_tests::scene::Scene;
use kickless_tests::{process, qemu_img};
use serde_json::Value;

/// How long something may take in a guest that is emulated on a busy machine.
pub const LIMIT: Duration = Duration::from_secs(60);

/// Of ours, in the guest.
const PROGRAMS: [&str; 2] = ["vdpactl", "vbench"];

pub fn missing_program() -> Option<String> {
    if let Some(missing) = PROGRAMS.iter().find(|name| process::built(name).is_none()) {
        return Some(format!("no {missing}: run cargo build, or set KICKLESS_BIN_DIR"));
    }
    process::no_fault_points()
}

/// A guest with our programs.
pub fn guest(scene: &Scene) -> Result<VmBuilder> {
    let overlay = Overlay::new(scene, "overlay")?;
    let programs = PROGRAMS.iter().filter_map(|name| Some((*name, process::built(name)?)));
    for (name, path) in programs.chain([("client", std::env::current_exe()?)]) {
        overlay.stripped(name, &path)?;
    }
    overlay.program(&process::find_program("setpriv").context("no setpriv")?)?;
    let image = scene.path("image.qcow2");
    qemu_img::create(&image, 32 << 20, "", &[])?;
    overlay.file("/usr/share/image.qcow2", &image)?;
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

/// What iproute2 and we say of the bus, and of the device `name` on it, is the same: word for word, and field by field.
pub fn compare_with_iproute2(vm: &mut Vm, name: &str) -> Result<()> {
    for (theirs, ours) in [
        ("dev show", "list"),
        (&format!("dev show {name}"), &format!("show {name}")),
        ("mgmtdev show", "mgmtdev"),
        ("mgmtdev show vduse", "mgmtdev vduse"),
        ("dev config show", "config"),
        (&format!("dev config show {name}"), &format!("config {name}")),
    ] {
        let json: Value = serde_json::from_str(&vm.check(&format!("vdpa -j {theirs}"))?)?;
        let text = vm.check(&format!("vdpactl {ours} --json"))?;
        ensure!(serde_json::from_str::<Value>(&text)? == json, "we say {text}, iproute2 {json}");
        ensure!(json.as_object().is_some_and(|all| !all.is_empty()), "iproute2 says nothing: {json}");
        let plain = |text: String| text.split_whitespace().map(str::to_owned).collect::<Vec<_>>();
        let (theirs, ours) =
            (plain(vm.check(&format!("vdpa {theirs}"))?), plain(vm.check(&format!("vdpactl {ours}"))?));
        ensure!(ours == theirs, "we say {ours:?}, iproute2 {theirs:?}");
    }
    // Nothing is counted by the kernel for a VDUSE device, and both say so; and what is not there.
    for (theirs, ours, why) in [
        (format!("dev vstats show {name} qidx 0"), format!("stats {name}"), "not supported"),
        ("dev show nobody".into(), "show nobody".into(), "No such device"),
        ("dev del nobody".into(), "del nobody".into(), "No such device"),
        ("dev add mgmtdev vduse name nobody".into(), "add nobody".into(), "Invalid argument"),
        (format!("dev add mgmtdev vduse name {name}"), format!("add {name}"), "File exists"),
    ] {
        // It ends well all the same.
        let said = vm.run(&format!("vdpa {theirs}"))?.stdout;
        ensure!(said.contains(why), "iproute2, {theirs}: {said}");
        refused(vm, &format!("vdpactl {ours}"), why)?;
    }
    Ok(())
}

/// A command that is refused with one line of ours, in which there is `why`.
pub fn refused(vm: &mut Vm, command: &str, why: &str) -> Result<()> {
    let said = vm.run(command)?;
    let lines = said.stdout.lines().filter(|l| l.starts_with("vdpactl:")).count();
    ensure!(
        said.code == 1 && said.stdout.contains(why) && lines == 1,
        "{command}: {}, {}",
        said.code,
        said.stdout
    );
    Ok(())
}
