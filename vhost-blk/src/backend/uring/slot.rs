//! A request under way.
#![allow(unsafe_code)] // iovecs for the kernel go from thread to thread with their slot

use poll_engine::engine::queue::Request;
use poll_engine::ring::chain::{ChainView, HeldChain, Slices};

use crate::backend::bounce::{Bounce, Pool};
use crate::backend::layout::Layout;
use crate::disk::Access;
use crate::request::{HEADER, Operation, Range};

/// What the operation under way is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Phase {
    /// A transfer, or the flush of a flush request.
    Main,
    /// `fallocate` on range `.0` from its byte `.1` on.
    Range(usize, u64),
    /// Writing zeros to range `.0`, of which `.1` bytes are done.
    Zeros(usize, u64),
    /// A worker makes room for what is to be written.
    Room,
    /// Making a write-through request durable.
    Sync,
    /// None: it was over before it could be told.
    Over,
}

/// Which buffers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Through {
    /// Those for pieces of requests.
    Pieces,
    /// Those for whole short requests.
    Short,
}

/// A request, and what it holds until it is over.
#[derive(Default)]
pub(super) struct Slot {
    pub request: Option<Request>,
    pub operation: Option<Operation>,
    pub phase: Option<Phase>,
    pub held: HeldChain,
    /// Bytes transferred.
    pub done: u32,
    pub iovecs: Vec<libc::iovec>,
    /// Which buffers its data pass through, if they do.
    pub through: Option<Through>,
    pub bounce: Option<Bounce>,
    /// Whether the transfer under way is from or to the bounce buffer.
    pub bounced: bool,
    /// Whether a worker has to write what comes next.
    pub brings_data: bool,
    pub ranges: Vec<Range>,
    /// Bytes of a range that are being seen to.
    pub piece: u64,
    /// Files synced.
    pub synced: usize,
    /// What is durable when all are.
    pub mark: u64,
    /// What a log of writes calls the operation under way; 0: nothing.
    pub logged: u64,
}

// SAFETY: the iovecs are addresses kept for the kernel, not used by us; they point into memory that `held` or `bounce`
// of the same slot keeps alive, whatever thread that is on.
unsafe impl Send for Slot {}

/// The data of a transfer, `len` bytes from `done` on.
pub(in crate::backend) fn data<'a>(chain: &ChainView<'a>, access: Access, done: u32, len: u32) -> Slices<'a> {
    match access {
        Access::Read => chain.writable(done, len),
        Access::Write => chain.readable(HEADER + done, len),
    }
}

pub(super) fn is_misaligned(chain: &ChainView<'_>, operation: Operation, align: u32) -> bool {
    let mut slices = match operation {
        Operation::Read { len, .. } => data(chain, Access::Read, 0, len),
        Operation::Write { len, .. } => data(chain, Access::Write, 0, len),
        _ => return false,
    };
    slices.any(|s| (s.host_addr().addr() | s.len()) & (align as usize - 1) != 0)
}

/// Whether a transfer has no more bytes than this.
pub(super) fn is_within(operation: Operation, bytes: u32) -> bool {
    matches!(operation, Operation::Read { len, .. } | Operation::Write { len, .. } if len <= bytes)
}

/// Has a slot hold a bounce buffer, with the `len` bytes in it that are to be written at `offset` of the disk; false if it has
/// to wait for one.
pub(super) fn fill_bounce<L: Layout>(
    slot: &mut Slot,
    bounces: &mut Pool,
    layout: &mut L,
    tag: u32,
    (access, offset, len): (Access, u64, u32),
) -> bool {
    if slot.bounce.is_none() {
        slot.bounce = bounces.take(tag);
    }
    let (Some(buffer), Some(chain)) = (&mut slot.bounce, slot.held.view()) else { return false };
    if access == Access::Write {
        let data = data(&chain, access, slot.done, len);
        if L::CIPHERS {
            layout.encipher(offset, data, &mut buffer.bytes_mut()[..len as usize]);
        } else {
            data.read(buffer.bytes_mut());
        }
    }
    slot.bounced = true;
    true
}
