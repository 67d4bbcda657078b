//! A machine of two nodes, made by QEMU: which CPUs are chosen near disks of either node, and on which reactor a queue is whose
//! guest's memory is on the one or the other.

use anyhow::{Context, Result, ensure};
use kickless_tests::process::built;
use kickless_tests::qemu::overlay::Overlay;
use kickless_tests::qemu::{self, Vm};
use kickless_tests::scene::Scene;
use serde_json::Value;

use super::LIMIT;

const PROGRAMS: [&str; 3] = ["vhost-blk", "vhostctl", "vbench"];

pub fn missing_needs() -> Option<String> {
    let unbuilt = || PROGRAMS.iter().find(|name| built(name).is_none());
    qemu::missing_needs().or_else(|| unbuilt().map(|name| format!("no {name}: run cargo build")))
}

/// CPUs 0 and 1 are on node 0, 2 and 3 on node 1; and behind a bridge of each node is a disk.
fn boot(scene: &Scene) -> Result<Vm> {
    let overlay = Overlay::new(scene, "overlay")?;
    for name in PROGRAMS {
        overlay.stripped(name, &built(name).with_context(|| format!("no {name}"))?)?;
    }
    let mut vm = Vm::builder().memory_mib(768).cpus(4).nodes(2).overlay(overlay);
    for node in 0..2 {
        vm = vm
            .arg("device", &format!("pxb,id=pxb{node},bus=pci.0,bus_nr={},numa_node={node}", 64 * (node + 1)))
            .arg("blockdev", &format!("null-co,node-name=null{node},size=67108864,read-zeroes=on"))
            .arg("device", &format!("virtio-blk-pci,drive=null{node},bus=pxb{node},addr=1"));
    }
    vm.boot(scene)
}

pub fn two_nodes(scene: &Scene) -> Result<Option<String>> {
    let mut vm = boot(scene)?;
    let nodes = vm.check("grep . /sys/block/vd?/device/../numa_node")?;
    let on = |node: usize| -> Result<&str> {
        let line = nodes.lines().find(|line| line.ends_with(&format!(":{node}")));
        line.and_then(|line| line.split('/').nth(3))
            .with_context(|| format!("no disk on node {node}: {nodes}"))
    };
    near_disks(&mut vm, on(0)?, on(1)?)?;
    near_memory(&mut vm)?;
    vm.quit()?;
    Ok(None)
}

fn near_disks(vm: &mut Vm, near: &str, far: &str) -> Result<()> {
    let disk = |name: &str, node| format!("--disk name={name},socket-path=/tmp/{name},blk-file=/dev/{node}");
    let (near, far) = (disk("near", near), disk("far", far));
    for (what, chosen) in [
        (format!("auto {far}"), "reactors on CPU 2 (node 1, of far);"),
        (format!("auto {near} {far}"), "reactors on CPU 1 (node 0, of near), CPU 2 (node 1, of far);"),
        (format!("auto:2 {far}"), "reactors on CPU 2 (node 1, of far), CPU 3 (node 1, of far);"),
        (format!("auto --guest-cpus 2 {far}"), "reactors on CPU 3 (node 1, of far);"),
        // Node 0 is the nearest one then.
        (
            format!("auto --guest-cpus 2-3 {far}"),
            "reactors on CPU 1 (node 0; node 1, of far, has none left);",
        ),
    ] {
        let said = vm.check(&format!("vhost-blk --check --cpus {what} 2>&1"))?;
        ensure!(said.contains(chosen), "--cpus {what}: {said}");
    }
    Ok(())
}

/// Two guests whose memory is on node 1, then one whose memory is on node 0: without a look at it the second would be on the
/// other reactor than the first, which had a queue already.
fn near_memory(vm: &mut Vm) -> Result<()> {
    // Memory is where the CPU is that first writes to it.
    let guests = [("a", 2, 1), ("b", 3, 1), ("c", 0, 0)];
    let disk = |&(name, ..): &(&str, u32, u32)| {
        format!(" --disk name={name},socket-path=/tmp/{name},backend=null:64M")
    };
    let disks = guests.iter().map(disk).collect::<Vec<_>>().concat();
    vm.start("daemon", &format!("vhost-blk --cpus 1,2 --poll event --api /tmp/api{disks}"))?;
    vm.check_soon("test -S /tmp/api -a -S /tmp/c", LIMIT)?;
    for (name, cpu, reactor) in guests {
        let load =
            "--rw randread --iodepth 1 --completion interrupt --rate_iops 100 --time_based --runtime 600";
        vm.start(name, &format!("taskset -c {cpu} vbench run --socket-path /tmp/{name} {load}"))?;
        let runs = format!("vhostctl --api /tmp/api --json show {name} | grep -q '\"reactor\"'");
        vm.check_soon(&runs, LIMIT)?;
        let said = vm.check(&format!("vhostctl --api /tmp/api --json show {name}"))?;
        let shown: Value = serde_json::from_str(&said).with_context(|| said.clone())?;
        ensure!(shown["queues"][0]["reactor"] == reactor, "memory of CPU {cpu}: {said}");
    }
    vm.check("killall vbench vhost-blk")?;
    Ok(())
}
