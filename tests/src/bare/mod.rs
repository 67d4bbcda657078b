//! The bare-metal guest: booted, given orders, read out. See the crate `kickless-guest` for what it is.
#![allow(unsafe_code)] // pages shared with the guest

pub mod guest;
pub mod microvm;

use std::collections::BTreeMap;
use std::fs::File;
use std::path::PathBuf;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use hdrhistogram::Histogram;
use kickless_guest::{
    DeviceInfo, Fault, LaneReport, MAX_DEVICES, MAX_LANES, Mailbox, Order, Report, failure, kind, state,
};
use vm_memory::{FileOffset, MmapRegion};
use vring::layout::split_bytes;

use crate::process;
use crate::vmm::machine::Machine;

/// Bytes of memory that a guest needs, as the places below are laid out.
pub const MEMORY: u64 = 64 << 20;
/// Where orders are left.
const MAILBOX: u64 = 48 << 20;
/// Rings of the devices.
const RINGS: u64 = 16 << 20;
/// Buffers of the order at hand.
const BUFFERS: u64 = 24 << 20;
const BUFFERS_SIZE: u64 = MAILBOX - BUFFERS;
/// Latencies.
const SAMPLES: u64 = 49 << 20;
const SAMPLES_SIZE: u64 = MEMORY - SAMPLES;

/// How long a guest may take from the start to taking orders.
const BOOT_LIMIT: Duration = Duration::from_secs(60);

/// What to do where there is no guest.
pub const BUILD: &str =
    "kickless-guest is not built: cargo build --release -p kickless-guest --features bare";

/// The guest's file: an optimised program whatever this is, as it has no unwinder, and debug builds want one.
pub fn program() -> Option<PathBuf> {
    process::optimised("kickless-guest")
}

/// The guest's command line, to which a VMM adds the devices.
pub fn cmdline(cpus: usize) -> String {
    format!("kickless.mailbox={MAILBOX:#x} kickless.cpus={cpus}")
}

/// What the guest runs in.
pub trait Host {
    /// Tells it that there is an order.
    fn ring(&mut self);
    /// What has gone wrong, if something has.
    fn failure(&mut self) -> Option<String>;
    /// Ends it at once. What is known of where it was.
    fn stop(&mut self) -> String;
    /// What it has written to its serial port.
    fn serial(&mut self) -> String;
    /// The machine, if it is one of ours.
    fn machine(&mut self) -> Option<&mut Machine> {
        None
    }
    /// The machine, if it is one of QEMU's.
    fn microvm(&mut self) -> Option<&mut microvm::Microvm> {
        None
    }
}

impl Host for Machine {
    fn ring(&mut self) {
        Machine::ring(self);
    }

    fn failure(&mut self) -> Option<String> {
        Machine::failure(self)
    }

    fn stop(&mut self) -> String {
        let line = |(i, end)| format!("CPU {i}: {end:?}\n");
        Machine::stop(self).into_iter().enumerate().map(line).collect()
    }

    fn serial(&mut self) -> String {
        Machine::serial(self)
    }

    fn machine(&mut self) -> Option<&mut Machine> {
        Some(self)
    }
}

/// A guest that takes orders.
pub struct Bare {
    host: Box<dyn Host>,
    pages: Pages,
    given: u32,
    ticks_per_ns: f64,
    /// Start and size of the memory that each device has for its rings.
    rings: BTreeMap<u64, (u64, u64)>,
}

impl std::fmt::Debug for Bare {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Bare").field("given", &self.given).finish_non_exhaustive()
    }
}

impl Bare {
    /// Waits for a guest that has been started to take orders. `memory` is the file of its memory from address 0 on.
    pub fn meet(host: Box<dyn Host>, memory: File, ticks_per_ns: f64) -> Result<Bare> {
        let pages = Pages::map(memory)?;
        let mut guest = Bare { host, pages, given: 0, ticks_per_ns, rings: BTreeMap::new() };
        let deadline = Instant::now() + BOOT_LIMIT;
        while guest.pages.mailbox().state.load(Ordering::Acquire) == state::OFF {
            guest.check(deadline, "boot")?;
        }
        guest.check(deadline, "boot")?;
        Ok(guest)
    }

    /// Waits a moment; an error when the guest cannot go on, or has had its time.
    fn check(&mut self, deadline: Instant, what: &str) -> Result<()> {
        let state = self.pages.mailbox().state.load(Ordering::Acquire);
        let failed = match state {
            state::FAULT => Some(describe_fault(&self.pages.fault())),
            state::PANIC => Some(self.pages.message()),
            _ => self.host.failure(),
        };
        let failed = match failed {
            None if Instant::now() >= deadline => Some("no answer in time".to_owned()),
            failed => failed,
        };
        if let Some(why) = failed {
            let end = self.host.stop();
            let serial = self.host.serial();
            bail!("the guest, while it was to {what}: {why}\n{end}it wrote: {serial}");
        }
        std::thread::sleep(Duration::from_micros(200));
        Ok(())
    }

    /// Gives an order without waiting for the answer.
    pub fn start(&mut self, order: &Order) {
        self.given += 1;
        self.pages.put_order(order);
        self.pages.mailbox().given.store(self.given, Ordering::Release);
        self.host.ring();
    }

    /// Tells the load of the last order to come to its end.
    pub fn stop_load(&self) {
        self.pages.mailbox().stop.store(self.given, Ordering::Relaxed);
    }

    /// Waits for the answer to the last order.
    pub fn finish(&mut self, limit: Duration) -> Result<Report> {
        let deadline = Instant::now() + limit;
        while self.pages.mailbox().answered.load(Ordering::Acquire) != self.given {
            self.check(deadline, "carry an order out")?;
        }
        let report = self.pages.report();
        match report.failure {
            failure::NONE => Ok(report),
            failure::NO_DEVICE => bail!("the guest has no such device"),
            failure::FEATURES => bail!("the device does not accept the features"),
            failure::MEMORY => bail!("the order's memory is too small"),
            failure::QUEUE => bail!("the device has no queues that run"),
            failure::NEEDS_RESET => bail!("the device needs a reset: {:?}", self.host.failure()),
            other => bail!("the guest refuses the order ({other})"),
        }
    }

    /// Whether the last order has been answered.
    pub fn has_answered(&self) -> bool {
        self.pages.mailbox().answered.load(Ordering::Acquire) == self.given
    }

    /// Gives an order and waits.
    pub fn order(&mut self, order: &Order, limit: Duration) -> Result<Report> {
        self.start(order);
        self.finish(limit)
    }

    /// Sets devices up.
    pub fn attach(&mut self, devices: u64, queues: u32, ring_size: u32, features: u64) -> Result<()> {
        // Each part of a ring has pages to itself.
        let page = |bytes: u64| bytes.next_multiple_of(4096);
        let (desc, avail, used) = split_bytes(ring_size.min(1 << 15) as u16);
        let size = u64::from(queues) * (page(desc) + page(avail) + page(used));
        for index in (0..MAX_DEVICES as u64).filter(|i| devices >> i & 1 != 0) {
            let next = self.rings.values().map(|(start, size)| start + size).max().unwrap_or(RINGS);
            let place = self.rings.entry(index).or_insert((next, size));
            if place.1 < size {
                *place = (next, size);
            }
            let (arena, arena_size) = *place;
            ensure!(arena + arena_size <= BUFFERS, "the rings have outgrown their place");
            let order = Order {
                kind: kind::ATTACH,
                devices: 1 << index,
                arena,
                arena_size,
                queues,
                ring_size,
                features,
                ..Order::default()
            };
            self.order(&order, BOOT_LIMIT).with_context(|| format!("attaching device {index}"))?;
        }
        Ok(())
    }

    /// An order with the memory that orders have.
    pub fn blank(kind: u32, devices: u64) -> Order {
        Order { kind, devices, arena: BUFFERS, arena_size: BUFFERS_SIZE, ..Order::default() }
    }

    /// Has as many latencies recorded by an order as there is room for, on so many queues.
    pub fn record(order: &mut Order, lanes: usize) {
        order.samples = SAMPLES;
        order.samples_each = (SAMPLES_SIZE / 4 / lanes.max(1) as u64) as u32;
    }

    /// The latencies that an order has recorded, in nanoseconds.
    pub fn latencies(&self, order: &Order, report: &Report) -> Result<Histogram<u64>> {
        let mut all = Histogram::new(3)?;
        for (lane, done) in lanes(report).iter().enumerate() {
            let kept = done.samples.min(u64::from(order.samples_each));
            let first = order.samples + lane as u64 * u64::from(order.samples_each) * 4;
            for i in 0..kept {
                all.record((f64::from(self.pages.word(first + 4 * i)) / self.ticks_per_ns) as u64)?;
            }
        }
        Ok(all)
    }

    /// Ticks of the guest's clock as time.
    pub fn time(&self, ticks: u64) -> Duration {
        Duration::from_nanos((ticks as f64 / self.ticks_per_ns) as u64)
    }

    /// Time as ticks of the guest's clock.
    pub fn ticks(&self, time: Duration) -> u64 {
        (time.as_nanos() as f64 * self.ticks_per_ns) as u64
    }

    /// Requests completed since power-on.
    pub fn progress(&self) -> u64 {
        self.pages.mailbox().progress.load(Ordering::Relaxed)
    }

    /// What the guest knows of a device, as of the last answer.
    pub fn device(&self, index: usize) -> DeviceInfo {
        self.pages.device(index)
    }

    /// CPUs that the guest runs on.
    pub fn cpus(&self) -> u32 {
        self.pages.mailbox().cpus.load(Ordering::Relaxed)
    }

    /// What it runs in.
    pub fn host(&mut self) -> &mut dyn Host {
        &mut *self.host
    }

    /// The machine it runs in, which must be one of ours.
    pub fn machine(&mut self) -> Result<&mut Machine> {
        self.host.machine().context("this guest does not run in a machine of ours")
    }
}

/// The queues of a report.
pub fn lanes(report: &Report) -> &[LaneReport] {
    &report.lane[..(report.lanes as usize).min(MAX_LANES)]
}

/// An exception with its registers.
fn describe_fault(fault: &Fault) -> String {
    let names = [
        "rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rbp", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15",
    ];
    let general: Vec<String> =
        names.iter().zip(fault.general).map(|(name, value)| format!("{name} {value:#x}")).collect();
    format!(
        "exception {} (error code {:#x}) at rip {:#x}, cs {:#x}, rflags {:#x}, rsp {:#x}, cr2 {:#x}, {}",
        fault.vector,
        fault.error,
        fault.rip,
        fault.cs,
        fault.rflags,
        fault.rsp,
        fault.cr2,
        general.join(" ")
    )
}

/// The guest's memory as we see it.
struct Pages {
    map: MmapRegion,
}

impl Pages {
    fn map(memory: File) -> Result<Pages> {
        let map = MmapRegion::from_file(FileOffset::new(memory, 0), MEMORY as usize)
            .context("the guest's memory cannot be mapped")?;
        ensure!(size_of::<Mailbox>() as u64 <= SAMPLES - MAILBOX, "the mailbox has outgrown its place");
        Ok(Pages { map })
    }

    fn at<T>(&self, guest: u64) -> NonNull<T> {
        assert!(guest + size_of::<T>() as u64 <= MEMORY, "beyond the guest's memory");
        // SAFETY: inside the mapping, which is MEMORY long.
        unsafe { NonNull::new_unchecked(self.map.as_ptr().add(guest as usize).cast()) }
    }

    /// For the atomics in it. The other fields are read and written as a whole by the functions below, by one side
    /// at a time: whose turn it is, `given` and `answered` say.
    fn mailbox(&self) -> &Mailbox {
        // SAFETY: mapped as long as we live, page-aligned, and any bytes are a mailbox.
        unsafe { self.at(MAILBOX).as_ref() }
    }

    fn put_order(&self, order: &Order) {
        let mailbox = self.at::<Mailbox>(MAILBOX).as_ptr();
        // SAFETY: mapped; our turn.
        unsafe { (&raw mut (*mailbox).order).write_volatile(*order) };
    }

    fn report(&self) -> Report {
        let mailbox = self.at::<Mailbox>(MAILBOX).as_ptr();
        // SAFETY: mapped; any bytes are a report.
        unsafe { (&raw const (*mailbox).report).read_volatile() }
    }

    fn fault(&self) -> Fault {
        let mailbox = self.at::<Mailbox>(MAILBOX).as_ptr();
        // SAFETY: mapped; any bytes are a fault.
        unsafe { (&raw const (*mailbox).fault).read_volatile() }
    }

    fn message(&self) -> String {
        let mailbox = self.at::<Mailbox>(MAILBOX).as_ptr();
        // SAFETY: mapped; any bytes will do.
        let bytes = unsafe { (&raw const (*mailbox).message).read_volatile() };
        let text = bytes.split(|&b| b == 0).next().unwrap_or_default();
        String::from_utf8_lossy(text).into_owned()
    }

    fn device(&self, index: usize) -> DeviceInfo {
        assert!(index < MAX_DEVICES, "no device {index}");
        let mailbox = self.at::<Mailbox>(MAILBOX).as_ptr();
        // SAFETY: mapped; any bytes are a device.
        unsafe { (&raw const (*mailbox).device[index]).read_volatile() }
    }

    fn word(&self, guest: u64) -> u32 {
        // SAFETY: mapped, aligned by the callers' layout.
        u32::from_le(unsafe { self.at::<AtomicU32>(guest).as_ref() }.load(Ordering::Relaxed))
    }
}
