//! The bare-metal guest in QEMU's `microvm`, whose memory is a file that we see as well.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use nix::sys::memfd::{MFdFlags, memfd_create};
use poll_engine::device::features::RING_PACKED;

use super::{Host, MEMORY, cmdline, program};
use crate::accel::Accel;
use crate::agent::Agent;
use crate::process::{self, Process};
use crate::qemu::{self, QEMU};
use crate::qmp::Qmp;
use crate::scenario::Plan;
use crate::scene::Scene;
use crate::vmm;

/// A running `microvm`. Dropping it kills it.
pub struct Microvm {
    process: Process,
    serial: PathBuf,
    /// QEMU's control socket.
    pub(super) qmp: Qmp,
}

impl Microvm {
    /// Starts QEMU for a guest that boots, or for one that is `incoming`; the file of its memory comes with it.
    pub(super) fn start(plan: &Plan, scene: &Scene, incoming: bool) -> Result<(Microvm, File)> {
        let kernel = program().context(super::BUILD)?;
        let serial = scene.fresh_log("microvm-serial");
        File::create(&serial)?;
        // Of a kind whose pages can be missing: not every file system's can.
        let memory = File::from(memfd_create(c"microvm-memory", MFdFlags::MFD_CLOEXEC)?);
        memory.set_len(MEMORY)?;
        let qmp_path = serial.with_extension("qmp");
        let qmp = Agent::listen(&qmp_path)?;
        let mut args: Vec<String> = Vec::new();
        let mut add = |option: &str, value: String| args.extend([format!("-{option}"), value]);
        let machine = "microvm,accel=kvm,acpi=off,pit=off,pic=off,rtc=off,isa-serial=on,x-option-roms=off";
        add("machine", format!("{machine},memory-backend=mem"));
        let (us, fd, mib) = (std::process::id(), memory.as_raw_fd(), MEMORY >> 20);
        let path = format!("/proc/{us}/fd/{fd}");
        add("object", format!("memory-backend-file,id=mem,size={mib}M,mem-path={path},share=on"));
        add("m", format!("{mib}M"));
        add("cpu", Accel::Kvm.qemu_cpu().to_owned());
        add("smp", plan.cpus.to_string());
        add("global", "virtio-mmio.force-legacy=false".to_owned());
        add("serial", format!("file:{}", serial.display()));
        add("chardev", format!("socket,id=qmp,path={}", qmp_path.display()));
        add("mon", "chardev=qmp,mode=control".to_owned());
        add("kernel", kernel.display().to_string());
        add("append", cmdline(plan.cpus));
        for (i, device) in plan.devices.iter().enumerate() {
            ensure!(device.kind == vmm::backend::Kind::Block, "only disks in microvm so far");
            add("chardev", format!("socket,id=c{i},path={},reconnect=1", device.socket.display()));
            let (queues, size) = (device.queues, plan.ring_size);
            let packed = if plan.features & RING_PACKED == 0 { "off" } else { "on" };
            let device = format!("vhost-user-blk,chardev=c{i},num-queues={queues},queue-size={size}");
            add("device", format!("{device},packed={packed}"));
        }
        if incoming {
            add("incoming", "defer".to_owned());
        }
        args.extend(["-nodefaults", "-no-user-config", "-no-reboot", "-display", "none"].map(str::to_owned));
        let program = process::find_program(QEMU).with_context(|| format!("no {QEMU}"))?;
        let mut process = Process::spawn(scene, "microvm", &program, &args)?;
        let qmp = Qmp::new(qemu::accept(&qmp, &mut process)?)?;
        Ok((Microvm { process, serial, qmp }, memory))
    }
}

impl Host for Microvm {
    fn ring(&mut self) {}

    fn failure(&mut self) -> Option<String> {
        match self.process.poll_exit() {
            Ok(None) => None,
            Ok(Some(status)) => Some(format!("QEMU has ended ({status}): {}", self.process.stderr_tail())),
            Err(error) => Some(error.to_string()),
        }
    }

    fn stop(&mut self) -> String {
        let _ = self.process.kill9();
        self.process.stderr_tail()
    }

    fn serial(&mut self) -> String {
        crate::scene::tail(&self.serial, 20)
    }

    fn microvm(&mut self) -> Option<&mut Microvm> {
        Some(self)
    }
}
