//! NVMe namespaces by commands of their own (`IORING_OP_URING_CMD` on `/dev/ngXnY`), straight from and to guest memory: past
//! the block layer, and polled for where the driver has queues for that.
//!
//! A request is a slot; its index labels its command, of which it has one at a time. What is more than a command takes goes in
//! several; what fails for reasons that may pass is asked for again, as the block layer would.
#![allow(unsafe_code)] // commands carry addresses of guest memory

mod command;
mod namespace;

use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::sync::Arc;

use io_uring::{opcode, types};
use poll_engine::engine::queue::{Queue, Request};
use poll_engine::engine::reactor::Io;
use poll_engine::memory::map::MemoryMap;
use poll_engine::ring::chain::{ChainView, HeldChain};
use poll_engine::uring::FixedBuffers;
use poll_engine::uring::commands::CommandRing;

use self::command::{Ask, Command, Deallocated, Status};
pub use self::namespace::{Found, Namespace, NoCommands, find};
use self::namespace::{Takes, URING_CMD_IO, URING_CMD_IO_VEC};
use super::uring::ranges::{ZERO, ZEROS};
use super::uring::slot::data;
use super::{Backend, Begun, Failure, Outcome};
use crate::device::Cache;
use crate::disk::{Access, Disk};
use crate::request::{Operation, Range, ranges};

/// Most iovecs of one command (`UIO_MAXIOV`).
const MAX_IOVECS: usize = 1024;
/// Most ranges of one Dataset Management.
const MAX_RANGES: usize = 64;
/// How often a command that has failed for a reason that may pass is tried again, as in the kernel (`nvme_max_retries`).
const MAX_RETRIES: u8 = 5;
/// The tag of the wait for completions; the ring has no slot of this number.
const COMPLETIONS: u32 = u32::MAX;

/// A request under way, and what it holds until it is over.
#[derive(Default)]
struct Slot {
    request: Option<Request>,
    operation: Option<Operation>,
    held: HeldChain,
    /// Bytes transferred; of the range at hand, for a request of ranges.
    done: u64,
    /// The range at hand.
    range: usize,
    /// What the command under way adds to `done`.
    piece: u64,
    /// Where a discard goes on after the command under way.
    next: (usize, u64),
    retries: u8,
    iovecs: Vec<libc::iovec>,
    ranges: Vec<Range>,
    deallocated: Vec<Deallocated>,
}

// SAFETY: the iovecs are addresses kept for the kernel, not used by us; they point into memory that `held` of the same slot
// keeps alive, whatever thread that is on.
unsafe impl Send for Slot {}

/// The back end of one queue.
pub struct NvmeBackend {
    namespace: Arc<Namespace>,
    takes: Takes,
    disk: Arc<Disk>,
    cache: Cache,
    /// There until the queue has stopped.
    ring: Option<CommandRing>,
    slots: Vec<Slot>,
    free: Vec<u32>,
    /// Requests that were over before a command could be given.
    over: Vec<(u32, Outcome)>,
    /// The reactor's ring waits for completions.
    watching: bool,
}

/// What to do with a slot after a step.
enum Step {
    /// A command is under way.
    Going,
    /// The request is over.
    Over(Outcome),
}

type Finish<'a> = &'a mut dyn FnMut(Request, Operation, Outcome, ChainView<'_>);

impl NvmeBackend {
    /// On this namespace, with room for `ring_size` requests.
    pub fn new(
        namespace: Arc<Namespace>,
        disk: Arc<Disk>,
        cache: Cache,
        ring_size: u16,
    ) -> io::Result<NvmeBackend> {
        let size = u32::from(ring_size);
        Ok(NvmeBackend {
            takes: namespace.takes(),
            ring: Some(namespace.take_ring()?),
            namespace,
            disk,
            cache,
            slots: std::iter::repeat_with(Slot::default).take(size as usize).collect(),
            free: (0..size).rev().collect(),
            over: Vec::with_capacity(size as usize),
            watching: false,
        })
    }

    fn write_through(&self) -> bool {
        match self.cache {
            Cache::AsConfigured => !self.disk.writeback(),
            Cache::Fixed(writeback) => !writeback,
        }
    }

    /// Gives a command for the request of `tag`. One for an array of iovecs has no registered buffer.
    fn give(&mut self, tag: u32, command: &Command, is_vec: bool, buffer: Option<u16>) -> Step {
        let Some(ring) = &mut self.ring else { return lost() };
        let fd = types::Fd(self.namespace.generic().as_raw_fd());
        let what = if is_vec { URING_CMD_IO_VEC } else { URING_CMD_IO };
        let entry = opcode::UringCmd80::new(fd, what).cmd(command.bytes()).buf_index(buffer).build();
        // SAFETY: the command points into guest memory held by the slot, to the slot's iovecs, to its ranges or to static
        // zeros. The slot keeps all of them, unchanged, until the completion with this tag. The namespace is open for as
        // long as this back end is there, which outlives what is pending (`QueueHandler::detach`).
        unsafe { ring.push(&entry.user_data(tag.into())) };
        Step::Going
    }

    /// Gives the first, or next, command of a request.
    fn go(&mut self, tag: u32) -> Step {
        match self.slots[tag as usize].operation {
            Some(Operation::Read { offset, len }) => self.transfer(tag, Access::Read, offset, len),
            Some(Operation::Write { offset, len }) => self.transfer(tag, Access::Write, offset, len),
            Some(Operation::Flush) if self.slots[tag as usize].done > 0 => Step::Over(Outcome::Done),
            Some(Operation::Flush) => {
                self.slots[tag as usize].piece = 1;
                self.give(tag, &Command::new(self.namespace.nsid(), Ask::Flush), false, None)
            }
            Some(Operation::WriteZeroes { .. }) => self.zero(tag),
            Some(Operation::Discard { .. }) => self.deallocate(tag),
            _ => lost(),
        }
    }

    fn transfer(&mut self, tag: u32, access: Access, offset: u64, len: u32) -> Step {
        let (durable, nsid) = (self.write_through(), self.namespace.nsid());
        let Takes { block_shift, max_bytes, .. } = self.takes;
        let slot = &mut self.slots[tag as usize];
        let done = slot.done as u32;
        let left = len - done;
        if left == 0 {
            return Step::Over(Outcome::Done);
        }
        let mut bytes = left.min(max_bytes);
        let Some(chain) = slot.held.view() else { return lost() };
        let mut slices = data(&chain, access, done, bytes);
        let (first, second) = (slices.next(), slices.next());
        let (addr, data_len, is_vec, buffer);
        if let (Some(only), None) = (&first, &second) {
            buffer = self.ring.as_ref().and_then(|ring| ring.fixed_buffer(only));
            (addr, data_len, is_vec) = (only.host_addr().addr() as u64, bytes, false);
        } else {
            let all = data(&chain, access, done, bytes).take(MAX_IOVECS);
            slot.iovecs.clear();
            slot.iovecs.extend(all.map(|s| libc::iovec { iov_base: s.host_addr().cast(), iov_len: s.len() }));
            let named: usize = slot.iovecs.iter().map(|v| v.iov_len).sum();
            // Whole blocks, where there are more pieces than a command takes.
            bytes = named as u32 >> block_shift << block_shift;
            let mut excess = named - bytes as usize;
            while let Some(last) = slot.iovecs.last_mut().filter(|_| excess > 0) {
                let cut = excess.min(last.iov_len);
                (last.iov_len, excess) = (last.iov_len - cut, excess - cut);
                if last.iov_len == 0 {
                    slot.iovecs.pop();
                }
            }
            if bytes == 0 {
                return fail("transfer", io::Error::other("a block in more than 1024 pieces of memory"));
            }
            (addr, data_len, is_vec, buffer) =
                (slot.iovecs.as_ptr().addr() as u64, slot.iovecs.len() as u32, true, None);
        }
        slot.piece = bytes.into();
        let (first, blocks) = ((offset + u64::from(done)) >> block_shift, bytes >> block_shift);
        let ask = match access {
            Access::Read => Ask::Read { first, blocks },
            Access::Write => Ask::Write { first, blocks, durable },
        };
        self.give(tag, &Command::new(nsid, ask).with_data(addr, data_len), is_vec, buffer)
    }

    /// Has the next piece of a write-zeroes request read as zeros: by writing them, where there is no command for it.
    fn zero(&mut self, tag: u32) -> Step {
        let (durable, nsid) = (self.write_through(), self.namespace.nsid());
        let Takes { block_shift, max_bytes, max_zero_blocks, zero_unmaps, .. } = self.takes;
        let slot = &mut self.slots[tag as usize];
        let Some(range) = at_hand(slot) else { return Step::Over(Outcome::Done) };
        let first = (range.offset + slot.done) >> block_shift;
        let left = (range.len - slot.done) >> block_shift;
        if max_zero_blocks > 0 {
            let blocks = left.min(max_zero_blocks.into()) as u32;
            slot.piece = u64::from(blocks) << block_shift;
            let unmap = range.unmap && zero_unmaps;
            let command = Command::new(nsid, Ask::Zero { first, blocks, durable, unmap });
            return self.give(tag, &command, false, None);
        }
        let blocks = left.min(u64::from(max_bytes.min(ZEROS as u32) >> block_shift)) as u32;
        slot.piece = u64::from(blocks) << block_shift;
        let zeros = ZERO.0.as_ptr().addr() as u64;
        let command =
            Command::new(nsid, Ask::Write { first, blocks, durable }).with_data(zeros, blocks << block_shift);
        self.give(tag, &command, false, None)
    }

    /// Gives up the space of the ranges of a discard request from the one at hand on, as many as a command names.
    fn deallocate(&mut self, tag: u32) -> Step {
        let nsid = self.namespace.nsid();
        let Takes { block_shift, max_deallocate_blocks: most, .. } = self.takes;
        let slot = &mut self.slots[tag as usize];
        if most == 0 {
            // 5.2.6.2: a discard is advice.
            return Step::Over(Outcome::Done);
        }
        let begins = (slot.range, slot.done);
        slot.deallocated.clear();
        while let Some(range) = at_hand(slot).filter(|_| slot.deallocated.len() < MAX_RANGES) {
            let left = (range.len - slot.done) >> block_shift;
            let blocks = left.min(most.into()) as u32;
            slot.deallocated.push(Deallocated::new((range.offset + slot.done) >> block_shift, blocks));
            slot.done += u64::from(blocks) << block_shift;
        }
        slot.next = (slot.range, slot.done);
        (slot.range, slot.done) = begins;
        if slot.deallocated.is_empty() {
            return Step::Over(Outcome::Done);
        }
        let count = slot.deallocated.len() as u32;
        let named = slot.deallocated.as_ptr().addr() as u64;
        let command = Command::new(nsid, Ask::Deallocate(count)).with_data(named, count * Deallocated::LEN);
        self.give(tag, &command, false, None)
    }

    /// Acts on the result of a command.
    fn step(&mut self, tag: u32, result: i32) -> Step {
        let slot = &mut self.slots[tag as usize];
        let Some(operation) = slot.operation else { return lost() };
        if result == 0 {
            slot.retries = 0;
            if matches!(operation, Operation::Discard { .. }) {
                (slot.range, slot.done) = slot.next;
            } else {
                slot.done += slot.piece;
            }
            return self.go(tag);
        }
        let is_denied = -result == libc::EACCES;
        let is_unknown = is_denied || result > 0 && Status(result).is_unknown();
        match operation {
            // It is advice.
            Operation::Discard { .. } if is_unknown => return Step::Over(Outcome::Done),
            Operation::WriteZeroes { .. } if is_unknown && self.takes.max_zero_blocks > 0 => {
                self.takes.max_zero_blocks = 0;
                return self.go(tag);
            }
            _ => {}
        }
        let may_pass = match result {
            0.. => Status(result).may_pass(),
            // Its controller has been reset meanwhile.
            _ => matches!(-result, libc::EINTR | libc::EAGAIN),
        };
        if may_pass && slot.retries < MAX_RETRIES {
            slot.retries += 1;
            return self.go(tag);
        }
        let what = match operation {
            Operation::Read { .. } => "read",
            Operation::Write { .. } => "write",
            Operation::Flush => "flush",
            Operation::Discard { .. } => "deallocate",
            Operation::WriteZeroes { .. } | Operation::GetId { .. } => "write zeroes",
        };
        let error = match result {
            0.. => io::Error::other(Status(result).to_string()),
            _ => io::Error::from_raw_os_error(-result),
        };
        fail(what, error)
    }

    fn end(&mut self, tag: u32, outcome: Outcome, finish: Finish<'_>) {
        let slot = &mut self.slots[tag as usize];
        if let (Some(request), Some(operation), Some(chain)) =
            (slot.request.take(), slot.operation.take(), slot.held.view())
        {
            finish(request, operation, outcome, chain);
        }
        slot.held.release();
        self.free.push(tag);
    }
}

/// The range at hand of a request of ranges, going over to the next one at its end.
fn at_hand(slot: &mut Slot) -> Option<Range> {
    loop {
        let range = *slot.ranges.get(slot.range)?;
        if slot.done < range.len {
            return Some(range);
        }
        (slot.range, slot.done) = (slot.range + 1, 0);
    }
}

impl Backend for NvmeBackend {
    fn begin(&mut self, request: Request, operation: Operation, queue: &mut Queue, _: &mut Io<'_>) -> Begun {
        // Nothing of it was written by us, and the kernel lets only writers flush.
        if matches!(operation, Operation::Flush) && self.disk.is_read_only() {
            return Begun::Over(request, Outcome::Done);
        }
        // The ring lets no more chains be in flight than it has descriptors, and there is a slot for each.
        let Some(tag) = self.free.pop() else { unreachable!("more requests than ring slots") };
        let slot = &mut self.slots[tag as usize];
        if let Operation::Discard { .. } | Operation::WriteZeroes { .. } = operation
            && let Err(e) = ranges(&queue.chain(), &self.disk, operation, &mut slot.ranges)
        {
            self.free.push(tag);
            return Begun::Over(request, Outcome::Failed(e.into()));
        }
        slot.request = Some(request);
        slot.operation = Some(operation);
        (slot.done, slot.range, slot.piece, slot.retries) = (0, 0, 0, 0);
        queue.hold_chain(&mut slot.held);
        if let Step::Over(outcome) = self.go(tag) {
            self.over.push((tag, outcome));
        }
        Begun::Pending
    }

    fn turn(&mut self, _: &mut Io<'_>, finish: Finish<'_>) -> usize {
        let mut ended = 0;
        while let Some((tag, outcome)) = self.over.pop() {
            ended += 1;
            self.end(tag, outcome, finish);
        }
        let Some(ring) = &mut self.ring else { return ended };
        ring.submit();
        while let Some(completion) = self.ring.as_mut().and_then(CommandRing::reap) {
            ended += 1;
            let tag = completion.user_data as u32;
            if let Step::Over(outcome) = self.step(tag, completion.result) {
                self.end(tag, outcome, finish);
            }
        }
        ended
    }

    fn complete(&mut self, io: &mut Io<'_>, tag: u32, _: i32, finish: Finish<'_>) {
        assert_eq!(tag, COMPLETIONS, "an operation completed that nothing is waiting for");
        self.watching = false;
        self.turn(io, finish);
    }

    fn prepare_sleep(&mut self, io: &mut Io<'_>) -> bool {
        let Some(ring) = &mut self.ring else { return false };
        ring.submit();
        if !self.over.is_empty() || ring.is_polled() && ring.outstanding() > 0 {
            return true;
        }
        if ring.outstanding() > 0 && !self.watching {
            self.watching = true;
            let fd = types::Fd(ring.as_fd().as_raw_fd());
            let poll = opcode::PollAdd::new(fd, libc::POLLIN as u32).build().user_data(io.label(COMPLETIONS));
            // SAFETY: the entry points to nothing, and the ring is open until the queue has stopped and this was cancelled.
            unsafe { io.uring().push(&poll) };
        }
        false
    }

    fn detach(&mut self, io: &mut Io<'_>) {
        if self.watching {
            let label = io.label(COMPLETIONS);
            io.uring().unwatch(label, label);
        }
        if let Some(mut ring) = self.ring.take() {
            ring.sync_buffers(FixedBuffers::On, None);
            self.namespace.give_ring(ring);
        }
    }

    fn register_memory(&mut self, mode: FixedBuffers, map: &MemoryMap) {
        if let Some(ring) = &mut self.ring {
            ring.sync_buffers(mode, Some(map));
        }
    }
}

fn fail(what: &'static str, error: io::Error) -> Step {
    Step::Over(Outcome::Failed(Failure::Io { what, error }))
}

/// A completion for a slot that has no request: our own mistake.
fn lost<T>() -> T {
    unreachable!("a command completed that no request is waiting for")
}
