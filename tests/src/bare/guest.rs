//! The bare-metal guest as a [`Guest`] of a scenario, in our own machine and in QEMU's.

use std::fs::File;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use hdrhistogram::Histogram;
use kickless_guest::{Order, kind, op, verify, wait};

use super::{Bare, Host, MEMORY, cmdline, lanes, program};
use crate::process::{self, Process};
use crate::qemu::QEMU;
use crate::scenario::{Expect, Guest, Load, Op, Outcome, Plan, Wait};
use crate::scene::Scene;
use crate::vmm;
use crate::vmm::boot::Image;
use crate::vmm::device::DeviceSpec;
use crate::vmm::machine::{Config, Machine};
use crate::vmm::memory::Backing;

/// Where memory that is added later begins; every region has this much room.
const ADDED: u64 = 1 << 30;
const ADDED_ROOM: u64 = 256 << 20;

/// A bare-metal guest with the devices of a plan.
#[derive(Debug)]
pub struct BareGuest {
    bare: Bare,
    plan: Plan,
    order: Order,
    limit: Duration,
    before: u64,
    /// Start and size of what was added.
    added: Vec<(u64, u64)>,
}

/// Boots in a machine of ours.
pub fn boot(plan: &Plan) -> Result<BareGuest> {
    let devices = plan.devices.iter().map(|device| DeviceSpec {
        kind: device.kind,
        socket: device.socket.clone(),
        queues: device.queues,
        // What it leaves of these, the guest says itself.
        ring_size: 1024,
        features: !0,
    });
    let kernel = program().context("kickless-guest is not built: cargo build --workspace --bins")?;
    let machine = Machine::start(&Config {
        memory: MEMORY,
        backing: plan.backing,
        cpus: plan.cpus,
        pin: plan.pin.clone(),
        devices: devices.collect(),
        image: Image { kernel, initramfs: None, cmdline: cmdline(plan.cpus) },
        timer: false,
    })?;
    let (memory, _) = machine.memory_file(0)?;
    BareGuest::meet(Box::new(machine), memory, plan)
}

/// Boots in QEMU's `microvm`, whose memory is a file that we see as well.
pub fn boot_microvm(plan: &Plan, scene: &Scene) -> Result<BareGuest> {
    let kernel = program().context("kickless-guest is not built: cargo build --workspace --bins")?;
    let memory_path = scene.path("microvm-memory");
    let memory = File::options().read(true).write(true).create(true).truncate(true).open(&memory_path)?;
    memory.set_len(MEMORY)?;
    let serial = scene.fresh_log("microvm-serial");
    let mut args: Vec<String> = Vec::new();
    let mut add = |option: &str, value: String| args.extend([format!("-{option}"), value]);
    let machine = "microvm,accel=kvm,acpi=off,pit=off,pic=off,rtc=off,isa-serial=on,x-option-roms=off";
    add("machine", format!("{machine},memory-backend=mem"));
    let (path, mib) = (memory_path.display(), MEMORY >> 20);
    add("object", format!("memory-backend-file,id=mem,size={mib}M,mem-path={path},share=on"));
    add("m", format!("{mib}M"));
    add("cpu", "host".to_owned());
    add("smp", plan.cpus.to_string());
    add("global", "virtio-mmio.force-legacy=false".to_owned());
    add("serial", format!("file:{}", serial.display()));
    add("kernel", kernel.display().to_string());
    add("append", cmdline(plan.cpus));
    for (i, device) in plan.devices.iter().enumerate() {
        ensure!(device.kind == vmm::backend::Kind::Block, "only disks in microvm so far");
        add("chardev", format!("socket,id=c{i},path={},reconnect=1", device.socket.display()));
        let (queues, size) = (device.queues, plan.ring_size);
        add("device", format!("vhost-user-blk,chardev=c{i},num-queues={queues},queue-size={size}"));
    }
    args.extend(["-nodefaults", "-no-user-config", "-no-reboot", "-display", "none"].map(str::to_owned));
    let qemu = process::find_program(QEMU).with_context(|| format!("no {QEMU}"))?;
    let process = Process::spawn(scene, "microvm", &qemu, &args)?;
    BareGuest::meet(Box::new(Microvm { process, serial }), memory, plan)
}

struct Microvm {
    process: Process,
    serial: std::path::PathBuf,
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
}

impl BareGuest {
    fn meet(host: Box<dyn Host>, memory: File, plan: &Plan) -> Result<BareGuest> {
        let bare = Bare::meet(host, memory, vmm::ticks_per_ns()?)?;
        let order = Order::default();
        let mut guest = BareGuest {
            bare,
            plan: plan.clone(),
            order,
            limit: Duration::ZERO,
            before: 0,
            added: Vec::new(),
        };
        guest.attach()?;
        Ok(guest)
    }

    fn attach(&mut self) -> Result<()> {
        for (i, device) in self.plan.devices.iter().enumerate() {
            let (queues, size) = (device.queues as u32, u32::from(self.plan.ring_size));
            self.bare.attach(1 << i, queues, size, self.plan.features)?;
            let found = self.bare.device(i).queues;
            ensure!(found == queues, "device {i}: {found} of {queues} queues");
        }
        Ok(())
    }

    fn order_for(&self, load: &Load) -> Order {
        let devices = load.devices.iter().fold(0, |all, &i| all | 1 << i);
        let mut order = Bare::blank(if load.op == Op::Echo { kind::ECHO } else { kind::BLOCK }, devices);
        if let Some(&(start, size)) = self.added.last() {
            (order.arena, order.arena_size) = (start, size);
        }
        if load.record {
            let queues = |&i: &usize| self.plan.devices.get(i).map_or(0, |device| device.queues);
            Bare::record(&mut order, load.devices.iter().map(queues).sum());
        }
        Order {
            op: match load.op {
                Op::Read | Op::Echo => op::READ,
                Op::Write => op::WRITE,
                Op::Mix => op::MIX,
                Op::Discard => op::DISCARD,
                Op::WriteZeroes => op::WRITE_ZEROES,
                Op::Flush => op::FLUSH,
            },
            verify: match load.expect {
                Expect::Anything => verify::NONE,
                Expect::Written => verify::STAMPS,
                Expect::Zeroes => verify::ZEROES,
            },
            wait: match load.wait {
                Wait::Poll => wait::POLL,
                Wait::Sleep => wait::SLEEP,
                Wait::EveryInterrupt => wait::EVERY,
            },
            block_size: load.block_size,
            write_percent: 50,
            random: u32::from(load.random),
            depth: load.depth,
            indirect: u32::from(load.indirect),
            flush_every: load.flush_every,
            requests: load.requests,
            ticks: self.bare.ticks(load.time),
            span: load.span,
            seed: load.seed,
            ..order
        }
    }
}

impl Guest for BareGuest {
    fn start(&mut self, load: &Load) -> Result<()> {
        self.order = self.order_for(load);
        self.limit = load.limit;
        self.before = self.bare.progress();
        self.bare.start(&self.order);
        Ok(())
    }

    fn progress(&mut self) -> Result<u64> {
        ensure!(self.bare.has_answered() || self.bare.host().failure().is_none(), "the guest has stopped");
        Ok(self.bare.progress() - self.before)
    }

    fn finish(&mut self) -> Result<Outcome> {
        let report = self.bare.finish(self.limit)?;
        let sum = |of: fn(&kickless_guest::LaneReport) -> u64| lanes(&report).iter().map(of).sum::<u64>();
        let longest = lanes(&report).iter().map(|lane| lane.longest).max().unwrap_or(0);
        Ok(Outcome {
            requests: sum(|lane| lane.requests),
            reads: sum(|lane| lane.reads),
            writes: sum(|lane| lane.writes),
            errors: sum(|lane| lane.errors),
            mismatches: sum(|lane| lane.mismatches),
            kicks: sum(|lane| lane.kicks),
            interrupts: report.interrupts,
            elapsed: self.bare.time(report.ticks),
            longest: self.bare.time(longest),
            latency: self
                .bare
                .latencies(&self.order, &report)
                .or_else(|_| Ok::<_, anyhow::Error>(Histogram::new(3)?))?,
        })
    }

    fn capacity(&mut self, device: usize) -> Result<u64> {
        Ok(self.bare.device(device).config * 512)
    }

    fn await_capacity(&mut self, device: usize, bytes: u64) -> Result<()> {
        while self.capacity(device)? != bytes {
            let known = self.bare.device(device).config_changes;
            let order = Order { requests: known, ..Bare::blank(kind::AWAIT_CONFIG, 1 << device) };
            self.bare.order(&order, Duration::from_secs(15))?;
        }
        Ok(())
    }

    fn add_memory(&mut self, mib: u64) -> Result<()> {
        let (start, size) = (ADDED + self.added.len() as u64 * ADDED_ROOM, mib << 20);
        ensure!(size <= ADDED_ROOM, "at most {} MiB at once", ADDED_ROOM >> 20);
        self.bare.machine()?.add_memory(start, size, Backing::Pages)?;
        self.added.push((start, size));
        Ok(())
    }

    fn remove_memory(&mut self) -> Result<()> {
        let (start, _) = self.added.pop().context("no memory was added")?;
        self.bare.machine()?.remove_memory(start)
    }

    fn reset(&mut self) -> Result<()> {
        let all = (0..self.plan.devices.len()).fold(0, |all, i| all | 1 << i);
        self.bare.order(&Bare::blank(kind::RESET, all), Duration::from_secs(15))?;
        self.attach()
    }

    fn reconnect(&mut self, device: usize) -> Result<()> {
        match self.bare.host().machine() {
            Some(machine) => machine.reconnect(device),
            None => Ok(()), // QEMU does by itself
        }
    }

    fn power_off(mut self: Box<Self>) -> Result<()> {
        if self.bare.host().failure().is_none() {
            let all = (0..self.plan.devices.len()).fold(0, |all, i| all | 1 << i);
            self.bare.order(&Bare::blank(kind::RESET, all), Duration::from_secs(15))?;
        }
        self.bare.host().stop();
        Ok(())
    }

    fn bare(&mut self) -> Result<&mut Bare> {
        Ok(&mut self.bare)
    }
}
