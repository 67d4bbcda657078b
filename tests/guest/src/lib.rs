//! What the harness and the bare-metal guest say to each other, through pages that both see.
//!
//! The harness writes an [`Order`], then raises [`Mailbox::given`]; the guest carries it out, writes a [`Report`] and
//! sets [`Mailbox::answered`] to the same number. Where the pages are is said on the guest's command line
//! (`kickless.mailbox=0xADDRESS`). Both are built from this file at the same time, so there is no version to check.
#![no_std]

use core::sync::atomic::{AtomicU32, AtomicU64};

/// Most devices a guest drives.
pub const MAX_DEVICES: usize = 64;
/// Most lanes (queues under load) of one order.
pub const MAX_LANES: usize = 64;
/// Most CPUs.
pub const MAX_CPUS: usize = 16;

/// Port the guest writes an [`event`] to. A VMM that knows the port stops the CPU until there is an order; for others
/// it is a write to nowhere.
pub const EVENT_PORT: u16 = 0xf4;

/// What is written to [`EVENT_PORT`].
pub mod event {
    /// Nothing to do: come back when there is an order.
    pub const IDLE: u32 = 1;
    /// The first request since power-on has completed.
    pub const FIRST_REQUEST: u32 = 2;
    /// The guest cannot go on; [`Mailbox::state`](super::Mailbox::state) says why.
    pub const FAILED: u32 = 3;
}

/// [`Mailbox::state`].
pub mod state {
    /// The guest has not come so far.
    pub const OFF: u32 = 0;
    /// It takes orders.
    pub const UP: u32 = 1;
    /// A processor exception, in [`Mailbox::fault`](super::Mailbox::fault).
    pub const FAULT: u32 = 2;
    /// A panic, in [`Mailbox::message`](super::Mailbox::message).
    pub const PANIC: u32 = 3;
}

/// [`Order::kind`].
pub mod kind {
    /// Set a device up: negotiate [`Order::features`](super::Order::features), start the queues, whose rings keep the
    /// order's memory.
    pub const ATTACH: u32 = 1;
    /// Reset the devices.
    pub const RESET: u32 = 2;
    /// Load the queues of block devices.
    pub const BLOCK: u32 = 3;
    /// Send packets on the transmit queues of network devices and expect them back on the receive queues, each once
    /// and in the order in which they were sent.
    pub const ECHO: u32 = 4;
    /// Write the rings as no driver may: [`Order::misdeed`](super::Order::misdeed).
    pub const MISBEHAVE: u32 = 5;
    /// Sleep until the devices have announced a change of their configuration, more often than
    /// [`Order::requests`](super::Order::requests) times since power-on.
    pub const AWAIT_CONFIG: u32 = 6;
    /// Read through an unmapped address: for tests of the fault report.
    pub const FAULT: u32 = 7;
    /// Never answer: for tests of deadlines.
    pub const HANG: u32 = 8;
    /// As [`ECHO`], between two network devices: what one sends is for the other, which sends as many.
    pub const EXCHANGE: u32 = 9;
}

/// [`Order::op`], by the names of the virtio specification (5.2.6).
pub mod op {
    /// `VIRTIO_BLK_T_IN`.
    pub const READ: u32 = 0;
    /// `VIRTIO_BLK_T_OUT`.
    pub const WRITE: u32 = 1;
    /// Some of both: [`Order::write_percent`](super::Order::write_percent).
    pub const MIX: u32 = 2;
    /// `VIRTIO_BLK_T_FLUSH`.
    pub const FLUSH: u32 = 4;
    /// `VIRTIO_BLK_T_DISCARD`.
    pub const DISCARD: u32 = 11;
    /// `VIRTIO_BLK_T_WRITE_ZEROES`.
    pub const WRITE_ZEROES: u32 = 13;
}

/// [`Order::wait`].
pub mod wait {
    /// Look at the rings all the time, with interrupts suppressed.
    pub const POLL: u32 = 0;
    /// Suppress interrupts while there is work; sleep with them on when there is none.
    pub const SLEEP: u32 = 1;
    /// Ask for an interrupt with every completion, and do not look at the rings before one has come.
    pub const EVERY: u32 = 2;
}

/// [`Order::verify`].
pub mod verify {
    /// Contents do not matter.
    pub const NONE: u32 = 0;
    /// What is written can be told apart by place, time and seed, and what is read must be what was written last: by
    /// the same order, or once by an earlier one if this one only reads.
    pub const STAMPS: u32 = 1;
    /// What is read must be zeroes.
    pub const ZEROES: u32 = 2;
}

/// [`Order::misdeed`].
pub mod misdeed {
    /// A head beyond the ring.
    pub const HEAD_OUT_OF_RANGE: u32 = 0;
    /// A chain that comes back to itself.
    pub const LOOP: u32 = 1;
    /// An available index further on than the ring is long.
    pub const INDEX_JUMP: u32 = 2;
    /// Buffers outside memory.
    pub const WILD_ADDRESS: u32 = 3;
    /// An indirect table inside an indirect table.
    pub const NESTED_INDIRECT: u32 = 4;
    /// A request without a header.
    pub const NO_HEADER: u32 = 5;
    /// Random bytes all over the rings.
    pub const NOISE: u32 = 6;
    /// A reset while requests are in flight.
    pub const RESET_IN_FLIGHT: u32 = 7;
    /// How many there are.
    pub const COUNT: u32 = 8;
}

/// Times [`Order::patience`] after which nothing more is expected.
pub const GIVES_UP: u64 = 100;

/// What the guest is to do. Which fields matter depends on the kind.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct Order {
    /// One of [`kind`].
    pub kind: u32,
    /// How long a block or a packet is, in bytes.
    pub block_size: u32,
    /// Which devices, a bit each, in the order of the command line.
    pub devices: u64,
    /// Guest memory for what the order needs: rings when attaching, buffers afterwards.
    pub arena: u64,
    /// Bytes of it.
    pub arena_size: u64,
    /// Attach: features that are accepted where they are offered.
    pub features: u64,
    /// Attach: queues a device, as far as it has them.
    pub queues: u32,
    /// Attach: descriptors a ring, at most.
    pub ring_size: u32,
    /// One of [`op`].
    pub op: u32,
    /// Writes of a hundred requests of [`op::MIX`].
    pub write_percent: u32,
    /// Blocks in random order (not 0) or one after the other.
    pub random: u32,
    /// Requests in flight on a queue.
    pub depth: u32,
    /// One of [`wait`].
    pub wait: u32,
    /// One of [`verify`].
    pub verify: u32,
    /// Not 0: requests are tables of indirect descriptors.
    pub indirect: u32,
    /// Not 0: a flush after so many writes.
    pub flush_every: u32,
    /// Requests a queue; when 0, time decides.
    pub requests: u64,
    /// Time-stamp counter ticks to go on for, when `requests` is 0.
    pub ticks: u64,
    /// Where on the disk the first queue begins, in bytes.
    pub offset: u64,
    /// Bytes of the disk each queue has to itself.
    pub span: u64,
    /// Makes the contents and the random order differ.
    pub seed: u64,
    /// Where latencies go, as `u32` ticks each; 0 for nowhere.
    pub samples: u64,
    /// How many for each queue; the latest are kept.
    pub samples_each: u32,
    /// One of [`misdeed`].
    pub misdeed: u32,
    /// Not 0: after so many requests a queue is reset, with others in flight, set up anew, and those that the device had
    /// not taken are submitted again.
    pub reset_every: u32,
    /// Network: packets may be missing, or come twice. After so many ticks without one another is sent, as if one had come,
    /// and after [`GIVES_UP`] times as many the rest counts as missing. 0: none may be.
    pub patience: u64,
}

/// Why an order was not carried out: [`Report::failure`].
pub mod failure {
    /// It was.
    pub const NONE: u32 = 0;
    /// There is no such device, or not of that type.
    pub const NO_DEVICE: u32 = 1;
    /// The device refuses the features (`FEATURES_OK` does not stay).
    pub const FEATURES: u32 = 2;
    /// The arena is too small.
    pub const MEMORY: u32 = 3;
    /// The device is not attached, or a queue does not start.
    pub const QUEUE: u32 = 4;
    /// A device says that it needs a reset.
    pub const NEEDS_RESET: u32 = 5;
    /// The order makes no sense.
    pub const ORDER: u32 = 6;
}

/// What one queue has done.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct LaneReport {
    /// Index of the device.
    pub device: u32,
    /// Index of its queue.
    pub queue: u32,
    /// Requests (or packets) completed.
    pub requests: u64,
    /// Of these, reads.
    pub reads: u64,
    /// Of these, writes.
    pub writes: u64,
    /// Requests that failed.
    pub errors: u64,
    /// Blocks that were not what had been written, or packets that were not what had been sent.
    pub mismatches: u64,
    /// Notifications sent.
    pub kicks: u64,
    /// Longest latency in ticks.
    pub longest: u64,
    /// Latencies recorded, those overwritten since included.
    pub samples: u64,
    /// First sector (or packet) with an error or a mismatch.
    pub first_bad: u64,
    /// Resets of the queue.
    pub resets: u64,
    /// Requests that were finished between the begin and the end of a reset.
    pub drained: u64,
    /// Requests that a reset found not taken.
    pub untaken: u64,
    /// Packets that have not come, where that may be.
    pub missing: u64,
    /// Packets that have come again.
    pub repeated: u64,
}

/// What has come of an order.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Report {
    /// One of [`failure`].
    pub failure: u32,
    /// How many of `lane` are filled.
    pub lanes: u32,
    /// Ticks it took.
    pub ticks: u64,
    /// Interrupts of devices taken meanwhile, on all CPUs.
    pub interrupts: u64,
    /// How often a CPU went to sleep.
    pub sleeps: u64,
    /// By queue.
    pub lane: [LaneReport; MAX_LANES],
}

/// What the guest knows of a device.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct DeviceInfo {
    /// Virtio device type: 1 network, 2 block.
    pub id: u32,
    /// Queues it runs.
    pub queues: u32,
    /// Features in use.
    pub features: u64,
    /// Block: sectors; network: the MAC address. Read again at every change of the configuration.
    pub config: u64,
    /// Changes of the configuration announced.
    pub config_changes: u64,
}

/// The processor's state at an exception. General registers in the order in which they were pushed, the last first.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct Fault {
    /// Address of a page fault.
    pub cr2: u64,
    /// rax, rbx, rcx, rdx, rsi, rdi, rbp, r8 to r15.
    pub general: [u64; 15],
    /// The exception.
    pub vector: u64,
    /// Its error code, or 0.
    pub error: u64,
    /// Where.
    pub rip: u64,
    /// Privilege level, in the two lowest bits.
    pub cs: u64,
    /// Flags.
    pub rflags: u64,
    /// Stack.
    pub rsp: u64,
    /// Its segment.
    pub ss: u64,
}

/// The shared pages.
#[repr(C, align(4096))]
#[derive(Debug)]
pub struct Mailbox {
    /// One of [`state`].
    pub state: AtomicU32,
    /// CPUs at work.
    pub cpus: AtomicU32,
    /// Number of the last order given. Written by the harness.
    pub given: AtomicU32,
    /// Number of the last order answered. Written by the guest.
    pub answered: AtomicU32,
    /// Number of the order whose load is to come to its end now. Written by the harness.
    pub stop: AtomicU32,
    /// Requests completed since power-on, for watching.
    pub progress: AtomicU64,
    /// The order.
    pub order: Order,
    /// The answer.
    pub report: Report,
    /// What devices there are, by index.
    pub device: [DeviceInfo; MAX_DEVICES],
    /// With [`state::FAULT`].
    pub fault: Fault,
    /// With [`state::PANIC`]: text, up to the first 0.
    pub message: [u8; 512],
}
