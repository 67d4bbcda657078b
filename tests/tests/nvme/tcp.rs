//! A namespace of another machine, which is this one: NVMe over TCP on loopback. Its path is lost for a while under load.

use std::fs;

use anyhow::{Result, ensure};
use kickless_tests::qemu::Vm;
use kickless_tests::scene::Scene;

use crate::guest::{LIMIT, attach, end, guest, said, serve, verified};

const SUBSYSTEM: &str = "/sys/kernel/config/nvmet/subsystems/disk";
const PORT: &str = "/sys/kernel/config/nvmet/ports/1";

pub fn over_tcp(scene: &Scene) -> Result<Option<String>> {
    let file = scene.path("host.img");
    fs::File::create(&file)?.set_len(64 << 20)?;
    let drive = format!("if=none,id=host,format=raw,file={}", file.display());
    let vm = guest(scene)?.arg("drive", &drive).arg("device", "virtio-blk-pci,drive=host");
    let mut vm = vm.boot(scene)?;
    for m in ["nvmet_tcp", "nvme_tcp", "vduse", "virtio_vdpa"] {
        vm.check(&format!("modprobe {m}"))?;
    }
    connect(&mut vm)?;
    for disk in ["/dev/ng0n1", "/dev/nvme0n1"] {
        serve(&mut vm, "t", &format!("--blk-file {disk} --poll event"))?;
        let log = said(&mut vm, "t");
        let told = log.contains("is given no NVMe commands, using /dev/nvme0n1: it is reached by tcp");
        ensure!(told == (disk == "/dev/ng0n1"), "{disk}: {log}");
        verified(&mut vm, "t", "--bssplit 4k/50:64k/50 --iodepth 8 --size 2M")?;
        end(&mut vm, "t", "TERM")?;
    }
    path_lost(&mut vm)?;
    vm.quit()?;
    Ok(None)
}

/// Exports the virtio disk, and connects to it.
fn connect(vm: &mut Vm) -> Result<()> {
    vm.check("mount -t configfs none /sys/kernel/config")?;
    vm.check(&format!(
        "mkdir {SUBSYSTEM} && echo 1 >{SUBSYSTEM}/attr_allow_any_host && mkdir {SUBSYSTEM}/namespaces/1"
    ))?;
    vm.check(&format!("cd {SUBSYSTEM}/namespaces/1 && printf /dev/vda >device_path && echo 1 >enable"))?;
    vm.check(&format!("mkdir {PORT} && cd {PORT} && echo tcp >addr_trtype && echo ipv4 >addr_adrfam && echo 127.0.0.1 >addr_traddr && echo 4420 >addr_trsvcid"))?;
    vm.check(&format!("ln -s {SUBSYSTEM} {PORT}/subsystems/disk"))?;
    // As `nvme connect` does.
    let id = "hostid=6b1ab0a4-4d8e-4e4b-a1b0-5c8c5a3c9d11,hostnqn=nqn.2014-08.org.nvmexpress:uuid:6b1ab0a4-4d8e-4e4b-a1b0-5c8c5a3c9d11";
    vm.check(&format!("printf transport=tcp,traddr=127.0.0.1,trsvcid=4420,nqn=disk,reconnect_delay=1,ctrl_loss_tmo=-1,nr_io_queues=2,{id} >/dev/nvme-fabrics"))?;
    vm.check_soon("test -b /dev/nvme0n1 && test -c /dev/ng0n1", LIMIT)
}

/// While there is no path, requests wait; nothing fails, nothing is lost.
fn path_lost(vm: &mut Vm) -> Result<()> {
    // What the kernel says of it.
    for words in ["I/O error", "failed", "error"] {
        vm.tolerate(words);
    }
    let node = attach(vm, "v", "/dev/ng0n1")?;
    let fio = format!("fio --name=v --filename={node} --direct=1 --ioengine=libaio --iodepth=16 --minimal");
    let load = "--rw=randrw --bs=4k --size=8M --verify=crc32c --verify_fatal=1 --time_based --runtime=600";
    vm.start("load", &format!("{fio} {load}"))?;
    let done = format!("awk '{{ print $1 + $5 }}' /sys/block/{}/stat", node.trim_start_matches("/dev/"));
    let state = "cat /sys/class/nvme/nvme0/state";
    for _ in 0..2 {
        let before: u64 = vm.check(&done)?.parse()?;
        vm.check_soon(&format!("test $({done}) -gt {}", before + 300), LIMIT)?;
        vm.check(&format!("rm {PORT}/subsystems/disk"))?;
        vm.check_soon(&format!("test $({state}) = connecting"), LIMIT)?;
        // Whatever was on its way is over; from here on, nothing goes on.
        vm.check("sleep 1")?;
        let stalled = vm.check(&done)?;
        vm.check("sleep 3")?;
        ensure!(vm.check(&done)? == stalled, "requests end without a path");
        ensure!(vm.is_running("load")?, "the load has ended: {}", vm.check("cat /tmp/load.out")?);
        vm.check(&format!("ln -s {SUBSYSTEM} {PORT}/subsystems/disk"))?;
        vm.check_soon(&format!("test $({state}) = live"), LIMIT)?;
        let stalled: u64 = stalled.parse()?;
        vm.check_soon(&format!("test $({done}) -gt {}", stalled + 300), LIMIT)?;
    }
    vm.check("kill -INT $(pidof fio)")?;
    let ended = vm.join("load", LIMIT)?;
    ensure!(!ended.stdout.contains("verify"), "fio: {}\n{}", ended.stdout, said(vm, "v"));
    vm.check("kill -USR1 $(cat /tmp/v.pid)")?;
    vm.check_soon("grep -q ^all /tmp/v.out", LIMIT)?;
    let report = vm.check("cat /tmp/v.out")?;
    ensure!(!report.contains("errors io"), "{report}");
    end(vm, "v", "TERM")
}
