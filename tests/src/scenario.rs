//! One way to write a scenario, whatever guest it runs on.
//!
//! A [`Plan`] says what the guest has, [`Plan::boot`] makes it on a [`Platform`], and a [`Guest`] is given [`Load`]s:
//!
//! ```no_run
//! # use kickless_tests::{daemon::Options, image::{Image, MIB}, scenario::{Load, Plan, Platform}, scene::Scene};
//! # fn main() -> anyhow::Result<()> {
//! let scene = Scene::new()?;
//! let image = Image::create(&scene, "disk.img", 64 * MIB)?;
//! let daemon = Options::default().spawn(&scene, "daemon", &image)?;
//! let mut guest = Plan::new().disk(daemon.socket(), 4).boot(Platform::Bare, &scene)?;
//! let outcome = guest.run(&Load::verified().requests(1000))?;
//! assert_eq!((outcome.errors, outcome.mismatches), (0, 0));
//! guest.power_off()?;
//! daemon.terminate()
//! # }
//! ```

use std::fmt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use hdrhistogram::Histogram;

use poll_engine::device::features::{IN_ORDER, RING_PACKED};

use crate::bare::{self, Bare};
use crate::qemu::migration::{Migrated, Migration};
use crate::qemu::{self, Vm};
use crate::scene::Scene;
use crate::vmm;
use crate::vmm::backend::Kind;
use crate::vmm::memory::Backing;

/// What a guest runs on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Platform {
    /// The bare-metal guest in our own virtual machine, on KVM.
    Bare,
    /// The same file in QEMU's `microvm`, on KVM.
    Microvm,
    /// Linux in our own virtual machine, on KVM.
    LinuxKvm,
    /// Linux in QEMU, on KVM or emulated, whichever is faster here.
    LinuxQemu,
}

impl fmt::Display for Platform {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Bare => "bare",
            Self::Microvm => "microvm",
            Self::LinuxKvm => "linux-kvm",
            Self::LinuxQemu => "linux-qemu",
        })
    }
}

impl Platform {
    /// Why it cannot be had here, if it cannot.
    pub fn missing_needs(self) -> Option<String> {
        let no_guest = || bare::program().is_none().then(|| bare::BUILD.to_owned());
        match self {
            Self::Bare => vmm::missing_needs().or_else(no_guest),
            Self::Microvm => vmm::missing_needs().or_else(no_guest).or_else(qemu::missing_program),
            Self::LinuxKvm => vmm::missing_needs().or_else(crate::linux::missing_needs),
            Self::LinuxQemu => qemu::missing_needs(),
        }
    }
}

/// A device of a guest.
#[derive(Debug, Clone)]
pub struct DevicePlan {
    /// What it is.
    pub kind: Kind,
    /// Where its back end listens.
    pub socket: PathBuf,
    /// Queues; of a network card, pairs of them times two.
    pub queues: usize,
}

/// What a guest is to be like.
#[derive(Debug, Clone)]
pub struct Plan {
    /// CPUs.
    pub cpus: usize,
    /// Host CPUs that they are bound to, in turn.
    pub pin: Vec<usize>,
    /// What memory is made of.
    pub backing: Backing,
    /// Descriptors a ring.
    pub ring_size: u16,
    /// Features that the driver accepts.
    pub features: u64,
    /// Disks and network cards.
    pub devices: Vec<DevicePlan>,
}

impl Default for Plan {
    fn default() -> Self {
        Self {
            cpus: 1,
            pin: Vec::new(),
            backing: Backing::Pages,
            ring_size: 256,
            features: !0,
            devices: Vec::new(),
        }
    }
}

impl Plan {
    /// A guest with one CPU and no devices.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a disk.
    #[must_use]
    pub fn disk(mut self, socket: &Path, queues: usize) -> Self {
        self.devices.push(DevicePlan { kind: Kind::Block, socket: socket.to_owned(), queues });
        self
    }

    /// Adds a network card with one pair of queues.
    #[must_use]
    pub fn nic(mut self, socket: &Path) -> Self {
        self.devices.push(DevicePlan { kind: Kind::Net, socket: socket.to_owned(), queues: 2 });
        self
    }

    /// Sets the number of CPUs.
    #[must_use]
    pub fn cpus(mut self, cpus: usize) -> Self {
        self.cpus = cpus;
        self
    }

    /// Binds the CPUs to these of the host.
    #[must_use]
    pub fn pin(mut self, cpus: &[usize]) -> Self {
        self.pin = cpus.to_vec();
        self
    }

    /// Has the guest's memory in huge pages.
    #[must_use]
    pub fn huge_pages(mut self) -> Self {
        self.backing = Backing::HugePages;
        self
    }

    /// Has the driver not accept these features.
    #[must_use]
    pub fn without(mut self, features: u64) -> Self {
        self.features &= !features;
        self
    }

    /// Sets the size of the rings.
    #[must_use]
    pub fn ring_size(mut self, descriptors: u16) -> Self {
        self.ring_size = descriptors;
        self
    }

    /// Starts the guest, and waits until it takes loads.
    pub fn boot(&self, platform: Platform, scene: &Scene) -> Result<Box<dyn Guest>> {
        let plan = &self.clone().without(if scene.packed() { 0 } else { RING_PACKED | IN_ORDER });
        match platform {
            Platform::Bare => Ok(Box::new(bare::guest::boot(plan)?)),
            Platform::Microvm => Ok(Box::new(bare::guest::boot_microvm(plan, scene)?)),
            Platform::LinuxKvm => crate::linux::boot_kvm(plan, scene),
            Platform::LinuxQemu => crate::linux::boot_qemu(plan, scene),
        }
    }
}

/// What is done with each block (or packet).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Op {
    /// Read.
    Read,
    /// Write.
    Write,
    /// Half and half.
    Mix,
    /// Discard.
    Discard,
    /// Write zeroes without sending any.
    WriteZeroes,
    /// Flush, and nothing else.
    Flush,
    /// Network: send, and expect it to come back, in order.
    Echo,
    /// Network: what each of two cards sends is for the other, and comes in order.
    Exchange,
}

/// What reads are compared with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Expect {
    /// Nothing.
    Anything,
    /// What was written last.
    Written,
    /// Zeroes.
    Zeroes,
}

/// How a guest learns that a request has completed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wait {
    /// It looks at the ring all the time. (Linux cannot be told so.)
    Poll,
    /// It sleeps when it has nothing to do, and asks for interrupts only then.
    Sleep,
    /// It asks for an interrupt with every completion, and looks at nothing before one has come.
    EveryInterrupt,
}

/// Work for the queues of some devices.
#[derive(Debug, Clone)]
pub struct Load {
    /// Indices of the devices, in the order of the plan.
    pub devices: Vec<usize>,
    /// What is done.
    pub op: Op,
    /// What is expected.
    pub expect: Expect,
    /// In random order, or one after the other.
    pub random: bool,
    /// Bytes of a request.
    pub block_size: u32,
    /// Requests in flight on a queue.
    pub depth: u32,
    /// Requests a queue; 0 to go by `time`.
    pub requests: u64,
    /// How long to go on.
    pub time: Duration,
    /// Bytes of the disk that each queue has to itself.
    pub span: u64,
    /// How it is waited.
    pub wait: Wait,
    /// Whether requests are indirect tables, where the device has them.
    pub indirect: bool,
    /// A flush after so many writes; 0 for none.
    pub flush_every: u32,
    /// Whether latencies are recorded.
    pub record: bool,
    /// Network: packets may be missing or come twice, and after so long without one it is gone on. Zero: none may be.
    pub patience: Duration,
    /// Queues are reset after so many requests, with others in flight; 0 for never.
    pub reset_every: u32,
    /// Makes contents and order differ.
    pub seed: u64,
    /// How long it may take in all, before it counts as hanging.
    pub limit: Duration,
}

impl Load {
    /// `op` on the first device: blocks of 4 KiB one after the other, 32 in flight on each queue, a thousand of them.
    pub fn new(op: Op) -> Self {
        Self {
            devices: vec![0],
            op,
            expect: Expect::Anything,
            random: false,
            block_size: 4096,
            depth: 32,
            requests: 1000,
            time: Duration::ZERO,
            span: 4 << 20,
            wait: Wait::Sleep,
            indirect: true,
            flush_every: 0,
            record: true,
            patience: Duration::ZERO,
            reset_every: 0,
            seed: 1,
            limit: Duration::from_secs(60),
        }
    }

    /// Random reads and writes, verified.
    pub fn verified() -> Self {
        Self { expect: Expect::Written, random: true, ..Self::new(Op::Mix) }
    }

    /// Puts it on these devices.
    #[must_use]
    pub fn on(mut self, devices: &[usize]) -> Self {
        self.devices = devices.to_vec();
        self
    }

    /// Sets what reads are compared with.
    #[must_use]
    pub fn expect(mut self, expect: Expect) -> Self {
        self.expect = expect;
        self
    }

    /// Has the blocks come in random order.
    #[must_use]
    pub fn random(mut self) -> Self {
        self.random = true;
        self
    }

    /// Sets the size of a request.
    #[must_use]
    pub fn block_size(mut self, bytes: u32) -> Self {
        self.block_size = bytes;
        self
    }

    /// Sets the requests in flight on a queue.
    #[must_use]
    pub fn depth(mut self, depth: u32) -> Self {
        self.depth = depth;
        self
    }

    /// Sets the requests for each queue.
    #[must_use]
    pub fn requests(mut self, requests: u64) -> Self {
        self.requests = requests;
        self
    }

    /// Goes on for so long, however many requests that is.
    #[must_use]
    pub fn time(mut self, time: Duration) -> Self {
        (self.requests, self.time) = (0, time);
        self
    }

    /// Goes on until [`Guest::stop`], at most ten minutes.
    #[must_use]
    pub fn until_told(self) -> Self {
        let time = Duration::from_secs(600);
        self.time(time).limit(time)
    }

    /// Sets how much of the disk each queue has to itself.
    #[must_use]
    pub fn span(mut self, bytes: u64) -> Self {
        self.span = bytes;
        self
    }

    /// Sets how completions are waited for.
    #[must_use]
    pub fn wait(mut self, wait: Wait) -> Self {
        self.wait = wait;
        self
    }

    /// Puts each request into descriptors of the ring.
    #[must_use]
    pub fn direct(mut self) -> Self {
        self.indirect = false;
        self
    }

    /// Flushes after so many writes.
    #[must_use]
    pub fn flush_every(mut self, writes: u32) -> Self {
        self.flush_every = writes;
        self
    }

    /// Records no latencies, which takes memory that is touched for the first time.
    #[must_use]
    pub fn unrecorded(mut self) -> Self {
        self.record = false;
        self
    }

    /// Allows for packets that are missing, or come twice. It must poll: nothing interrupts a guest that waits in vain.
    #[must_use]
    pub fn lossy(mut self) -> Self {
        (self.patience, self.wait) = (Duration::from_millis(20), Wait::Poll);
        self
    }

    /// Resets queues after so many requests.
    #[must_use]
    pub fn reset_every(mut self, requests: u32) -> Self {
        self.reset_every = requests;
        self
    }

    /// Sets the seed.
    #[must_use]
    pub fn seed(mut self, seed: u64) -> Self {
        self.seed = seed;
        self
    }

    /// Sets how long it may take before it counts as hanging.
    #[must_use]
    pub fn limit(mut self, limit: Duration) -> Self {
        self.limit = limit;
        self
    }
}

/// What has come of a load. What a platform cannot tell is 0 (or empty).
#[derive(Debug, Clone)]
pub struct Outcome {
    /// Requests completed, over all queues.
    pub requests: u64,
    /// Of these, reads.
    pub reads: u64,
    /// Of these, writes.
    pub writes: u64,
    /// Requests that failed.
    pub errors: u64,
    /// Reads that were not as expected.
    pub mismatches: u64,
    /// Packets that have not come, and that have come again, where that may be.
    pub missing: u64,
    /// See [`missing`](Self::missing).
    pub repeated: u64,
    /// Resets of queues.
    pub resets: u64,
    /// Notifications the driver sent.
    pub kicks: u64,
    /// Interrupts taken.
    pub interrupts: u64,
    /// How long it took.
    pub elapsed: Duration,
    /// The longest request.
    pub longest: Duration,
    /// Latencies in nanoseconds, as many as there was room for.
    pub latency: Histogram<u64>,
}

impl Outcome {
    /// Requests a second.
    pub fn iops(&self) -> f64 {
        self.requests as f64 / self.elapsed.as_secs_f64()
    }

    /// Fails unless every request has done what it should have.
    pub fn expect_clean(&self) -> Result<()> {
        if self.errors != 0 || self.mismatches != 0 || self.requests == 0 {
            bail!("{} requests, {} errors, {} mismatches", self.requests, self.errors, self.mismatches);
        }
        Ok(())
    }
}

/// A running guest. Dropping it is pulling the plug.
pub trait Guest {
    /// Begins a load.
    fn start(&mut self, load: &Load) -> Result<()>;

    /// Requests that the load at hand has completed so far.
    fn progress(&mut self) -> Result<u64>;

    /// Tells the load at hand, which goes by time, to come to its end.
    fn stop(&mut self) -> Result<()>;

    /// Waits for the end of the load.
    fn finish(&mut self) -> Result<Outcome>;

    /// A load from beginning to end.
    fn run(&mut self, load: &Load) -> Result<Outcome> {
        self.start(load)?;
        self.finish()
    }

    /// Waits until the load at hand has completed so many requests.
    fn after(&mut self, requests: u64) -> Result<()> {
        let deadline = Instant::now() + Duration::from_secs(60);
        while self.progress()? < requests {
            if Instant::now() > deadline {
                bail!("the guest has not completed {requests} requests within a minute");
            }
            std::thread::sleep(Duration::from_micros(500));
        }
        Ok(())
    }

    /// Waits until the load at hand has completed so many requests more.
    fn some_more(&mut self, requests: u64) -> Result<()> {
        let before = self.progress()?;
        self.after(before + requests)
    }

    /// Bytes of a disk, as the guest sees it.
    fn capacity(&mut self, device: usize) -> Result<u64>;

    /// Waits until the guest sees a disk of so many bytes.
    fn await_capacity(&mut self, device: usize, bytes: u64) -> Result<()>;

    /// Gives the guest more memory while it runs. On bare metal, loads have their buffers there from then on.
    fn add_memory(&mut self, mib: u64) -> Result<()>;

    /// Takes the memory that was added last away again.
    fn remove_memory(&mut self) -> Result<()>;

    /// Has the driver reset its devices and set them up again.
    fn reset(&mut self) -> Result<()>;

    /// Moves the guest to another machine on this host while it runs. If that fails, it goes on where it is.
    fn migrate(&mut self, _scene: &Scene, _how: &Migration) -> Result<Migrated> {
        bail!("this guest cannot be migrated")
    }

    /// Begins to move the guest and gives up; it goes on where it is.
    fn cancel_migration(&mut self, _scene: &Scene, _how: &Migration) -> Result<()> {
        bail!("this guest cannot be migrated")
    }

    /// To be called when a back end was started again: connects to it, where the platform does not by itself.
    fn reconnect(&mut self, device: usize) -> Result<()>;

    /// Ends the guest in good order.
    fn power_off(self: Box<Self>) -> Result<()>;

    /// The guest, for what only bare metal can do.
    fn bare(&mut self) -> Result<&mut Bare> {
        bail!("not a bare-metal guest")
    }

    /// The virtual machine, for what only QEMU can do.
    fn qemu(&mut self) -> Result<&mut Vm> {
        bail!("not a guest of QEMU")
    }
}
