//! The bare-metal guest as a [`Guest`] of a scenario, in our own machine and in QEMU's.

use std::fs::File;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use hdrhistogram::Histogram;
use kickless_guest::{Order, kind, op, verify, wait};

use super::microvm::Microvm;
use super::{Bare, Host, MEMORY, Pages, cmdline, lanes, program};
use crate::qemu::migration::{Migrated, Migration, expect_possible};
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

const NO_QEMU: &str = "only guests of QEMU can be migrated";

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
    let kernel = program().context(super::BUILD)?;
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

/// Boots in QEMU's `microvm`.
pub fn boot_microvm(plan: &Plan, scene: &Scene) -> Result<BareGuest> {
    let (microvm, memory) = Microvm::start(plan, scene, false)?;
    BareGuest::meet(Box::new(microvm), memory, plan)
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

    /// Another QEMU for the guest to move to.
    fn destination(&mut self, scene: &Scene, how: &Migration) -> Result<(Microvm, File, Plan)> {
        expect_possible(&mut self.bare.host().microvm().context(NO_QEMU)?.qmp)?;
        let mut plan = self.plan.clone();
        ensure!(plan.devices.len() == how.sockets.len(), "a back end for each disk");
        for (device, socket) in plan.devices.iter_mut().zip(&how.sockets) {
            device.socket.clone_from(socket);
        }
        let (there, memory) = Microvm::start(&plan, scene, true)?;
        Ok((there, memory, plan))
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
        let kind = match load.op {
            Op::Echo => kind::ECHO,
            Op::Exchange => kind::EXCHANGE,
            _ => kind::BLOCK,
        };
        let mut order = Bare::blank(kind, devices);
        if let Some(&(start, size)) = self.added.last() {
            (order.arena, order.arena_size) = (start, size);
        }
        if load.record {
            let queues = |&i: &usize| self.plan.devices.get(i).map_or(0, |device| device.queues);
            Bare::record(&mut order, load.devices.iter().map(queues).sum());
        }
        Order {
            op: match load.op {
                Op::Read | Op::Echo | Op::Exchange => op::READ,
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
            patience: self.bare.ticks(load.patience),
            reset_every: load.reset_every,
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

    fn stop(&mut self) -> Result<()> {
        self.bare.stop_load();
        Ok(())
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
            missing: sum(|lane| lane.missing),
            repeated: sum(|lane| lane.repeated),
            resets: sum(|lane| lane.resets),
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

    fn migrate(&mut self, scene: &Scene, how: &Migration) -> Result<Migrated> {
        let (mut there, memory, plan) = self.destination(scene, how)?;
        let here = self.bare.host().microvm().context(NO_QEMU)?;
        let moved = how.run(&mut here.qmp, &mut there.qmp, scene)?;
        // Not before all of it has come: a page that is touched earlier counts as there, and is never sent.
        self.bare.pages = Pages::map(memory)?;
        // The old one holds a guest that must not run again.
        self.bare.host = Box::new(there);
        self.plan = plan;
        Ok(moved)
    }

    fn cancel_migration(&mut self, scene: &Scene, how: &Migration) -> Result<()> {
        let (mut there, ..) = self.destination(scene, how)?;
        let here = self.bare.host().microvm().context(NO_QEMU)?;
        how.give_up(&mut here.qmp, &mut there.qmp, scene)
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
