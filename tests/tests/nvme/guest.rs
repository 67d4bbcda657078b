//! The guest, with our programs in it.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use kickless_tests::process;
use kickless_tests::qemu::overlay::Overlay;
use kickless_tests::qemu::release::Release;
use kickless_tests::qemu::{Vm, VmBuilder};
use kickless_tests::scene::Scene;

/// How long something may take in a guest that is emulated on a busy machine.
pub const LIMIT: Duration = Duration::from_secs(90);

/// Of ours, in the guest.
const PROGRAMS: [&str; 3] = ["vhost-blk", "vdpactl", "vbench"];

pub fn missing_program() -> Option<String> {
    let missing = PROGRAMS.iter().find(|name| process::built(name).is_none())?;
    Some(format!("no {missing}: run cargo build, or set KICKLESS_BIN_DIR"))
}

/// A guest with our programs.
pub fn guest(scene: &Scene) -> Result<VmBuilder> {
    let overlay = Overlay::new(scene, "overlay")?;
    for name in PROGRAMS {
        let path = process::built(name).with_context(|| format!("no {name}"))?;
        overlay.stripped(name, &path)?;
    }
    Ok(Vm::builder().release(Release::Backports).memory_mib(768).cpus(2).overlay(overlay))
}

/// Has our daemon serve something at `/tmp/NAME.sock`.
pub fn serve(vm: &mut Vm, name: &str, args: &str) -> Result<()> {
    vm.check(&format!("rm -f /tmp/{name}.sock; vhost-blk {args} --socket-path /tmp/{name}.sock >/tmp/{name}.out 2>/tmp/{name}.log & echo $! >/tmp/{name}.pid"))?;
    vm.check_soon(&format!("test -S /tmp/{name}.sock"), LIMIT).with_context(|| said(vm, name))
}

/// Has the kernel serve something by way of VDUSE, as the node that is returned.
pub fn attach(vm: &mut Vm, name: &str, args: &str) -> Result<String> {
    vm.check(&format!("rm -f /tmp/{name}.out; vdpactl attach --name {name} {args} >/tmp/{name}.out 2>>/tmp/{name}.log & echo $! >/tmp/{name}.pid"))?;
    vm.check_soon(&format!("test -s /tmp/{name}.out"), LIMIT).with_context(|| said(vm, name))?;
    vm.check(&format!("head -n 1 /tmp/{name}.out"))
}

/// What our program has said.
pub fn said(vm: &mut Vm, name: &str) -> String {
    vm.check(&format!("cat /tmp/{name}.log")).unwrap_or_default()
}

/// Has our program end, and waits for that.
pub fn end(vm: &mut Vm, name: &str, signal: &str) -> Result<()> {
    vm.check(&format!("kill -{signal} $(cat /tmp/{name}.pid)"))?;
    let wait = format!("! test -e /proc/$(cat /tmp/{name}.pid)/exe");
    vm.check_soon(&wait, LIMIT).with_context(|| said(vm, name))
}

/// Our load generator writes parts of the disk that `job` names and reads them back, of which it checks each block.
pub fn verified(vm: &mut Vm, name: &str, job: &str) -> Result<()> {
    let run = format!("vbench run --socket-path /tmp/{name}.sock --rw randwrite --verify crc32c");
    let done = vm.run_for(&format!("{run} --completion interrupt {job}"), 2 * LIMIT)?;
    ensure!(done.code == 0, "{job}: {}\n{}", done.stdout, said(vm, name));
    Ok(())
}

/// The bytes of a range of the namespace, in MiB, are what `with` prints.
pub fn holds(vm: &mut Vm, node: &str, skip: u64, count: u64, with: &str) -> Result<()> {
    let read = format!("dd if={node} bs=1M skip={skip} count={count} iflag=direct 2>/dev/null");
    vm.check(&format!("{with} | head -c {} >/tmp/wanted && {read} | cmp - /tmp/wanted", count << 20))?;
    Ok(())
}
