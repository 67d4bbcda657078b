//! Linux as a guest of a scenario, in QEMU and in a machine of ours: commands over the agent, fio for loads.

mod load;

use std::fs;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use poll_engine::device::features::{EVENT_IDX, IN_ORDER, INDIRECT_DESC, RING_PACKED};

use crate::agent::{Agent, Output, Shell};
use crate::qemu::migration::{Migrated, Migration};
use crate::qemu::{self, BOOT_LIMIT, Disk, KERNEL_ARGS, KERNEL_COMPLAINTS, Vm, guest_dir};
use crate::scenario::{Guest, Load, Outcome, Plan};
use crate::scene::Scene;
use crate::vmm::backend::Kind;
use crate::vmm::boot::Image;
use crate::vmm::device::DeviceSpec;
use crate::vmm::machine::{Config, Machine};
use crate::vmm::memory::Backing;
use crate::vmm::speed;
use crate::wait;

/// Bytes of memory in a machine of ours.
const MEMORY: u64 = 512 << 20;
/// How long the guest may take to notice things.
const LIMIT: Duration = Duration::from_secs(60);

/// Why Linux cannot be had in a machine of ours, if it cannot.
pub fn missing_needs() -> Option<String> {
    let guest = guest_dir();
    if !guest.join("vmlinux").is_file() || !guest.join("initramfs").is_file() {
        return Some(format!("no guest in {}: run scripts/guest-image.sh", guest.display()));
    }
    speed::is_emulated()
}

/// Boots in a machine of ours.
pub fn boot_kvm(plan: &Plan, scene: &Scene) -> Result<Box<dyn Guest>> {
    expect_disks(plan)?;
    let devices = plan.devices.iter().map(|device| DeviceSpec {
        kind: device.kind,
        socket: device.socket.clone(),
        queues: device.queues,
        ring_size: plan.ring_size,
        features: plan.features,
    });
    let guest = guest_dir();
    let mut machine = Machine::start(&Config {
        memory: MEMORY,
        backing: plan.backing,
        cpus: plan.cpus,
        pin: plan.pin.clone(),
        devices: devices.collect(),
        image: Image {
            kernel: guest.join("vmlinux"),
            initramfs: Some(guest.join("initramfs")),
            cmdline: format!("{KERNEL_ARGS} reboot=k kickless.agent=ttyS1"),
        },
        timer: true,
    })?;
    let agent = Agent::new(machine.talk()?)?;
    let mut own = Own { machine, agent, log: scene.fresh_log("kernel") };
    own.wait_ready()?;
    LinuxGuest::meet(Box::new(own), plan)
}

/// Boots in QEMU.
pub fn boot_qemu(plan: &Plan, scene: &Scene) -> Result<Box<dyn Guest>> {
    expect_disks(plan)?;
    ensure!(plan.pin.is_empty(), "the CPUs of QEMU's guests cannot be bound");
    ensure!(plan.backing == Backing::Pages, "QEMU's guests have no huge pages here");
    let refused = !plan.features;
    // Of in-order use QEMU 7.2 does not let the guest know in any case.
    let can_be_refused = INDIRECT_DESC | EVENT_IDX | RING_PACKED | IN_ORDER;
    ensure!(
        refused & !can_be_refused == 0,
        "QEMU's guests cannot be kept from features {:#x}",
        refused & !can_be_refused
    );
    let mut builder = Vm::builder().cpus(plan.cpus as u32);
    for (i, device) in plan.devices.iter().enumerate() {
        let disk = Disk::new(&format!("disk{i}"), &device.socket)
            .prop("num-queues", device.queues)
            .prop("queue-size", plan.ring_size)
            .prop("indirect_desc", refused & INDIRECT_DESC == 0)
            .prop("event_idx", refused & EVENT_IDX == 0)
            .prop("packed", refused & RING_PACKED == 0);
        builder = builder.disk(disk);
    }
    let vm = builder.boot(scene)?;
    LinuxGuest::meet(Box::new(InQemu { vm, added: 0 }), plan)
}

fn expect_disks(plan: &Plan) -> Result<()> {
    ensure!(plan.devices.iter().all(|device| device.kind == Kind::Block), "Linux takes only disks here");
    ensure!(plan.devices.len() <= 26, "{} disks", plan.devices.len());
    Ok(())
}

/// What Linux runs in.
trait Host: Shell {
    fn add_memory(&mut self, mib: u64) -> Result<()>;
    fn remove_memory(&mut self) -> Result<()>;
    fn reconnect(&mut self, device: usize) -> Result<()>;
    fn power_off(self: Box<Self>) -> Result<()>;
    fn qemu(&mut self) -> Result<&mut Vm>;
}

struct InQemu {
    vm: Vm,
    /// Memory modules plugged in.
    added: usize,
}

impl Shell for InQemu {
    fn run_for(&mut self, command: &str, limit: Duration) -> Result<Output> {
        self.vm.run_for(command, limit)
    }
}

impl Host for InQemu {
    fn add_memory(&mut self, mib: u64) -> Result<()> {
        self.vm.hotplug_memory(&format!("added{}", self.added), mib)?;
        self.added += 1;
        Ok(())
    }

    fn remove_memory(&mut self) -> Result<()> {
        self.added = self.added.checked_sub(1).context("no memory was added")?;
        self.vm.unplug_memory(&format!("added{}", self.added))
    }

    /// QEMU does by itself.
    fn reconnect(&mut self, _device: usize) -> Result<()> {
        Ok(())
    }

    fn power_off(self: Box<Self>) -> Result<()> {
        self.vm.quit()
    }

    fn qemu(&mut self) -> Result<&mut Vm> {
        Ok(&mut self.vm)
    }
}

/// A machine of ours with the agent at its second serial port.
struct Own {
    machine: Machine,
    agent: Agent,
    /// Where what the kernel says goes in the end.
    log: PathBuf,
}

impl Own {
    fn wait_ready(&mut self) -> Result<()> {
        let deadline = Instant::now() + BOOT_LIMIT;
        loop {
            let failure = self.machine.failure();
            match self.agent.wait_ready(Duration::from_millis(200)) {
                Ok(()) => return Ok(()),
                Err(error) if failure.is_some() || Instant::now() >= deadline => {
                    return Err(self.explain(error));
                }
                Err(_) => {}
            }
        }
    }

    fn explain(&mut self, error: anyhow::Error) -> anyhow::Error {
        let failure = self.machine.failure().unwrap_or_default();
        let end = self.machine.stop();
        error.context(format!("the machine: {failure}\n{end:?}"))
    }
}

impl Drop for Own {
    fn drop(&mut self) {
        let _ = fs::write(&self.log, self.machine.serial());
    }
}

impl Shell for Own {
    fn run_for(&mut self, command: &str, limit: Duration) -> Result<Output> {
        self.agent.run(command, limit).map_err(|error| self.explain(error))
    }
}

impl Host for Own {
    fn add_memory(&mut self, _mib: u64) -> Result<()> {
        bail!("Linux cannot be told of more memory in a machine of ours")
    }

    fn remove_memory(&mut self) -> Result<()> {
        bail!("Linux cannot be told of less memory in a machine of ours")
    }

    fn reconnect(&mut self, device: usize) -> Result<()> {
        self.machine.reconnect(device)
    }

    fn power_off(mut self: Box<Self>) -> Result<()> {
        self.agent.send("sync; reboot -f")?;
        wait::until("the guest's end", LIMIT, || {
            if let Some(failure) = self.machine.failure() {
                bail!("the machine: {failure}");
            }
            Ok(self.machine.is_off().then_some(()))
        })?;
        qemu::expect_silence("the guest's kernel", &self.machine.serial(), &KERNEL_COMPLAINTS, &[])
    }

    fn qemu(&mut self) -> Result<&mut Vm> {
        bail!("not a guest of QEMU")
    }
}

/// Linux with the disks of a plan.
struct LinuxGuest {
    host: Box<dyn Host>,
    plan: Plan,
    /// The load at hand, its disks, and what they had done before it.
    load: Option<(Load, Vec<String>, u64)>,
}

impl LinuxGuest {
    fn meet(host: Box<dyn Host>, plan: &Plan) -> Result<Box<dyn Guest>> {
        let mut guest = LinuxGuest { host, plan: plan.clone(), load: None };
        guest.await_disks()?;
        Ok(Box::new(guest))
    }

    fn await_disks(&mut self) -> Result<()> {
        let count = format!("test $(ls /sys/block | grep -c ^vd) = {}", self.plan.devices.len());
        self.host.check_soon(&count, LIMIT)
    }

    /// The name of a device; they come in the order of the plan.
    fn disk(&self, device: usize) -> Result<String> {
        ensure!(device < self.plan.devices.len(), "no device {device}");
        Ok(format!("vd{}", (b'a' + device as u8) as char))
    }

    /// Requests that disks have completed since they are there.
    fn completed(&mut self, disks: &[String]) -> Result<u64> {
        let files: Vec<_> = disks.iter().map(|disk| format!("/sys/block/{disk}/stat")).collect();
        // Reads, writes, discards, flushes (Documentation/block/stat.rst).
        let sum = format!("awk '{{ n += $1 + $5 + $12 + $16 }} END {{ print n }}' {}", files.join(" "));
        Ok(self.host.check(&sum)?.parse()?)
    }
}

impl Guest for LinuxGuest {
    fn start(&mut self, load: &Load) -> Result<()> {
        ensure!(
            load.indirect || self.plan.features & INDIRECT_DESC == 0,
            "Linux uses indirect tables whenever the device has them: Plan::without them"
        );
        let disks = load.devices.iter().map(|&device| self.disk(device)).collect::<Result<Vec<_>>>()?;
        let queues: Vec<usize> =
            load.devices.iter().map(|&device| self.plan.devices[device].queues).collect();
        let script = load::script(load, &disks, &queues, self.plan.cpus)?;
        let before = self.completed(&disks)?;
        self.host.check("rm -f /tmp/load*")?;
        // A command is one line, and not a long one.
        for line in script.split_inclusive('\n') {
            let end = if line.ends_with('\n') { "\\n" } else { "" };
            let line = line.trim_end_matches('\n').as_bytes();
            for (i, part) in line.chunks(1000).enumerate() {
                let part = std::str::from_utf8(part)?.replace('\'', "'\\''");
                let end = if (i + 1) * 1000 >= line.len() { end } else { "" };
                self.host.check(&format!("printf '%s{end}' '{part}' >>/tmp/load.sh"))?;
            }
        }
        self.host.start("load", "sh /tmp/load.sh")?;
        self.load = Some((load.clone(), disks, before));
        Ok(())
    }

    fn progress(&mut self) -> Result<u64> {
        let (load, disks, before) = self.load.take().context("no load has been started")?;
        let now = self.completed(&disks)?;
        self.load = Some((load, disks, before));
        Ok(now - before)
    }

    fn stop(&mut self) -> Result<()> {
        self.host.check(&format!("touch {}", load::STOP)).map(drop)
    }

    fn finish(&mut self) -> Result<Outcome> {
        let (load, ..) = self.load.take().context("no load has been started")?;
        let output = self.host.join("load", load.limit)?;
        // Without the white space, of which there is much.
        let reports = self.host.check("cat /tmp/load.reports 2>/dev/null | tr -d ' \\n\\t'")?;
        load::outcome(&load, &output, &reports).with_context(|| format!("load: {}", output.stdout))
    }

    fn capacity(&mut self, device: usize) -> Result<u64> {
        let disk = self.disk(device)?;
        let sectors: u64 = self.host.check(&format!("cat /sys/block/{disk}/size"))?.parse()?;
        Ok(sectors * 512)
    }

    fn await_capacity(&mut self, device: usize, bytes: u64) -> Result<()> {
        let what = format!("a disk of {bytes} bytes");
        wait::until(&what, LIMIT, || Ok((self.capacity(device)? == bytes).then_some(())))
    }

    fn add_memory(&mut self, mib: u64) -> Result<()> {
        self.host.add_memory(mib)
    }

    fn remove_memory(&mut self) -> Result<()> {
        self.host.remove_memory()
    }

    fn reset(&mut self) -> Result<()> {
        // All go before the first comes back, so that each gets the name it had.
        self.host.check(
            "cd /sys/bus/virtio/drivers/virtio_blk && set -- $(ls -d virtio* | sort -V) && \
             for d; do echo $d >unbind || exit 1; done && for d; do echo $d >bind || exit 1; done",
        )?;
        self.await_disks()
    }

    fn reconnect(&mut self, device: usize) -> Result<()> {
        self.host.reconnect(device)
    }

    fn power_off(self: Box<Self>) -> Result<()> {
        self.host.power_off()
    }

    fn migrate(&mut self, scene: &Scene, how: &Migration) -> Result<Migrated> {
        self.host.qemu()?.migrate(scene, how)
    }

    fn cancel_migration(&mut self, scene: &Scene, how: &Migration) -> Result<()> {
        self.host.qemu()?.cancel_migration(scene, how)
    }

    fn qemu(&mut self) -> Result<&mut Vm> {
        self.host.qemu()
    }
}
