//! The words of the session's state machine ([`super::state`]): what it wants done, what is to be answered, and why
//! not.

use std::os::fd::OwnedFd;

use super::device_state::Direction;
use super::logging::Logging;
use super::wire::Reply;
use crate::memory::RegionSpec;
use crate::memory::iotlb::Mapping;
use crate::ring::RingConfig;
use crate::ring::inflight::InflightSpec;

/// What the state machine wants done, in order.
#[derive(Debug)]
pub enum Action {
    /// Replace the whole memory table.
    SetMemory(Vec<(RegionSpec, OwnedFd)>),
    /// Map one region more.
    AddMemory(RegionSpec, OwnedFd),
    /// Unmap a region, once nothing in flight points into it.
    RemoveMemory(RegionSpec),
    /// Have a userfaultfd ready, whose descriptor goes with the answer.
    Advise,
    /// Memory mapped from now on comes late.
    Listen,
    /// The front end sees to the faults of all memory that it has been told of: it may be used.
    Adopt,
    /// All memory has come.
    EndPostcopy,
    /// Log to this memory from now on.
    LogBase {
        /// Where the log begins in the shared file.
        offset: u64,
        /// Bytes.
        size: u64,
        /// The file.
        fd: OwnedFd,
    },
    /// Signal this when pages were marked.
    LogFd(OwnedFd),
    /// What these queues are to log from now on; done when all that run do so.
    Log(Vec<(u16, Logging)>),
    /// The first queue is going to run.
    Acquire,
    /// The last queue has stopped while writes were logged: the guest may have left.
    HandOver,
    /// Run a queue.
    Start(u16, RingConfig),
    /// Stop a queue, finish what is in flight, and tell [`Session::stopped`](super::state::Session::stopped) its base.
    Stop(u16),
    /// A queue's kick descriptor; `None` for a queue to be polled.
    Kick(u16, Option<OwnedFd>),
    /// A queue's call descriptor.
    Call(u16, Option<OwnedFd>),
    /// A queue's error descriptor.
    Err(u16, Option<OwnedFd>),
    /// Make memory for an in-flight record, whose descriptor goes with the answer.
    AllocateInflight(InflightSpec),
    /// Keep the in-flight record of every queue started from now on there.
    SetInflight(InflightSpec, OwnedFd),
    /// The channel for our own requests.
    BackendChannel(OwnedFd),
    /// A guest of this address is here now.
    Announce([u8; 6]),
    /// The guest's driver keeps to this MTU.
    SetMtu(u64),
    /// Write configuration space.
    WriteConfig(u32, Vec<u8>),
    /// Bring the device back to its initial state.
    ResetDevice,
    /// Transfer the device's state through this pipe.
    TransferState(Direction, OwnedFd),
    /// Say how that went.
    CheckState,
    /// Take a translation.
    MapIova(Mapping),
    /// Forget the translations of some addresses, once nothing in flight points there.
    UnmapIova {
        /// First I/O virtual address.
        iova: u64,
        /// Bytes.
        size: u64,
    },
}

/// What to answer once the actions are carried out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// Nothing, unless an acknowledgement was asked for.
    Ack,
    /// The same, whether or not such are negotiated: QEMU waits for that of an IOTLB message.
    Done,
    /// A number.
    Number(u64),
    /// The front end's channel for the device's state is taken, or not.
    StateChannel,
    /// The device's state was transferred, or not.
    StateChecked,
    /// The base of a queue.
    Base(u16),
    /// An in-flight record, with its descriptor.
    Inflight(InflightSpec),
    /// A userfaultfd.
    Userfault,
    /// As [`Done`](Self::Done), but a failure ends the session.
    Listening,
    /// Where new memory is mapped: the whole table, or one region. A failure ends the session.
    Mapped {
        /// The whole table.
        whole: bool,
    },
    /// An acknowledgement, asked for or not.
    Ended,
    /// A log was taken; one that was not ends the session, for the protocol has no word for it.
    Log {
        /// As asked.
        size: u64,
        /// As asked.
        offset: u64,
    },
    /// Configuration space from `offset` of the device's own numbering, with offset and flags echoed as asked.
    Config {
        /// First byte, in the device's numbering.
        start: u32,
        /// Bytes.
        size: u32,
        /// As asked.
        offset: u32,
        /// As asked.
        flags: u32,
    },
}

/// Why a request is refused. The session goes on.
#[derive(Debug, thiserror::Error)]
pub enum Refusal {
    /// Not offered, or not known.
    #[error("request {0} is not supported")]
    Unsupported(u32),
    /// Feature bits beyond those offered.
    #[error("feature bits {0:#x} were not offered")]
    Features(u64),
    /// A queue that does not exist.
    #[error("queue {index} does not exist, there are {queues}")]
    Queue {
        /// As asked.
        index: u32,
        /// How many there are.
        queues: u16,
    },
    /// A ring size that the device does not take.
    #[error("ring size {num} is none up to {max} that the ring format allows")]
    RingSize {
        /// As asked.
        num: u32,
        /// The device's limit.
        max: u16,
    },
    /// A number beyond its field.
    #[error("{0} is out of range")]
    OutOfRange(&'static str),
    /// The device's state is asked for, or given, while it changes.
    #[error("the device's state cannot be transferred while its queues run")]
    Running,
    /// Descriptors missing or too many.
    #[error("{sent} descriptors where {wanted} belong")]
    Descriptors {
        /// How many came.
        sent: usize,
        /// How many should have.
        wanted: usize,
    },
}

/// How a refusal is told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Refused {
    /// By an error reply.
    Reply(Reply),
    /// Not at all: the request does not matter.
    Silence,
    /// By ending the session: the protocol has no other way.
    End,
}
