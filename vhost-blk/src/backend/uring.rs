//! Files and block devices through the reactor's io_uring, straight between the file and guest memory.
//!
//! A request is a slot; its index is the tag of its operations, of which it has one at a time. Short transfers go on
//! where they stopped, discards go on with their next range, and what ends is handed to `finish`.
#![allow(unsafe_code)] // submissions carry addresses of guest memory, iovecs and bounce buffers

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use io_uring::{opcode, squeue, types};
use poll_engine::engine::queue::{Queue, Request};
use poll_engine::engine::reactor::Io;
use poll_engine::ring::chain::{ChainView, HeldChain, Slices};

use super::{Backend, Begun, Failure, Outcome};
use crate::device::Cache;
use crate::disk::{Access, Disk};
use crate::open::FileTraits;
use crate::request::{HEADER, Operation, Range, ranges};

/// Most iovecs of one operation (`UIO_MAXIOV`); longer requests go in several.
const MAX_IOVECS: usize = 1024;
/// Bytes of a bounce buffer; longer requests go through it piece by piece.
const BOUNCE_PAGES: usize = 32;
/// Bounce buffers of a queue; further requests that need one wait their turn.
const MAX_BOUNCES: usize = 8;
/// Bytes of zeros written at a time where the file system has no better way.
const ZEROS: usize = 64 << 10;

#[repr(C, align(4096))]
#[derive(Clone, Copy)]
struct Page([u8; 4096]);

#[repr(C, align(4096))]
struct Zeros([u8; ZEROS]);

static ZERO: Zeros = Zeros([0; ZEROS]);

/// What the operation under way is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// A transfer, or the flush of a flush request.
    Main,
    /// `fallocate` on range `.0`.
    Range(usize),
    /// Writing zeros to range `.0`, of which `.1` bytes are done.
    Zeros(usize, u64),
    /// Making a write-through request durable.
    Sync,
}

#[derive(Default)]
struct Slot {
    request: Option<Request>,
    operation: Option<Operation>,
    phase: Option<Phase>,
    held: HeldChain,
    /// Bytes transferred.
    done: u32,
    iovecs: Vec<libc::iovec>,
    needs_bounce: bool,
    bounce: Option<Vec<Page>>,
    ranges: Vec<Range>,
}

// SAFETY: the iovecs are addresses kept for the kernel, not used by us; they point into memory that `held` or `bounce`
// of the same slot keeps alive, whatever thread that is on.
unsafe impl Send for Slot {}

/// The io_uring back end of one queue.
pub struct UringBackend {
    file: File,
    traits: FileTraits,
    disk: Arc<Disk>,
    cache: Cache,
    slots: Vec<Slot>,
    free: Vec<u32>,
    bounces: Vec<Vec<Page>>,
    bounces_made: usize,
    waiting: VecDeque<u32>,
}

/// What to do with a slot after a step.
enum Step {
    /// An operation is under way, or waits for a bounce buffer.
    Going,
    /// The request is over.
    Over(Outcome),
}

impl UringBackend {
    /// On `file`, with room for `ring_size` requests.
    pub fn new(
        file: File,
        traits: FileTraits,
        disk: Arc<Disk>,
        cache: Cache,
        ring_size: u16,
    ) -> UringBackend {
        let size = u32::from(ring_size);
        UringBackend {
            file,
            traits,
            disk,
            cache,
            slots: std::iter::repeat_with(Slot::default).take(size as usize).collect(),
            free: (0..size).rev().collect(),
            bounces: Vec::new(),
            bounces_made: 0,
            waiting: VecDeque::new(),
        }
    }

    fn write_through(&self) -> bool {
        match self.cache {
            Cache::AsConfigured => !self.disk.writeback(),
            Cache::Fixed(writeback) => !writeback,
        }
    }

    fn push(io: &mut Io<'_>, tag: u32, entry: squeue::Entry) {
        let entry = entry.user_data(io.label(tag));
        // SAFETY: the entry points into guest memory held by the slot, to the slot's iovecs, to its bounce buffer or to
        // static zeros. The slot keeps all of them, unchanged, until the completion with this tag. The file is open
        // for as long as this is, which outlives what is pending (`QueueHandler::detach`).
        unsafe { io.uring().push(&entry) };
    }

    /// The plain descriptor, not a registered file: see `Uring`.
    fn target(&self) -> types::Fd {
        types::Fd(self.file.as_raw_fd())
    }

    fn rw_flags(&self, access: Access) -> i32 {
        if access == Access::Write && self.write_through() { libc::RWF_DSYNC } else { 0 }
    }

    /// Submits the next transfer of a read or write.
    fn transfer(&mut self, io: &mut Io<'_>, tag: u32, access: Access, offset: u64, len: u32) -> Step {
        if self.slots[tag as usize].needs_bounce {
            return self.transfer_bounced(io, tag, access, offset, len);
        }
        let flags = self.rw_flags(access);
        let fd = self.target();
        let slot = &mut self.slots[tag as usize];
        let Some(chain) = slot.held.view() else { return lost() };
        let at = offset + u64::from(slot.done);
        let mut slices = data(&chain, access, slot.done, len - slot.done);
        slot.iovecs.clear();
        let first = slices.next();
        let second = slices.next();
        let entry = if let (Some(only), None) = (first, second) {
            let (host, n) = (only.host_addr(), only.len() as u32);
            match (io.uring().fixed_buffer(&only), access) {
                (Some(buffer), Access::Read) => {
                    opcode::ReadFixed::new(fd, host, n, buffer).offset(at).rw_flags(flags).build()
                }
                (Some(buffer), Access::Write) => {
                    opcode::WriteFixed::new(fd, host, n, buffer).offset(at).rw_flags(flags).build()
                }
                (None, Access::Read) => opcode::Read::new(fd, host, n).offset(at).rw_flags(flags).build(),
                (None, Access::Write) => opcode::Write::new(fd, host, n).offset(at).rw_flags(flags).build(),
            }
        } else {
            let all = first.into_iter().chain(second).chain(slices).take(MAX_IOVECS);
            slot.iovecs.extend(all.map(|s| libc::iovec { iov_base: s.host_addr().cast(), iov_len: s.len() }));
            let (iovecs, n) = (slot.iovecs.as_ptr(), slot.iovecs.len() as u32);
            match access {
                Access::Read => opcode::Readv::new(fd, iovecs, n).offset(at).rw_flags(flags).build(),
                Access::Write => opcode::Writev::new(fd, iovecs, n).offset(at).rw_flags(flags).build(),
            }
        };
        Self::push(io, tag, entry);
        Step::Going
    }

    /// As `transfer`, through a buffer that is aligned where the guest's memory is not.
    fn transfer_bounced(&mut self, io: &mut Io<'_>, tag: u32, access: Access, offset: u64, len: u32) -> Step {
        if self.slots[tag as usize].bounce.is_none() {
            let Some(buffer) = self.take_bounce() else {
                self.waiting.push_back(tag);
                return Step::Going;
            };
            self.slots[tag as usize].bounce = Some(buffer);
        }
        let flags = self.rw_flags(access);
        let fd = self.target();
        let slot = &mut self.slots[tag as usize];
        let (Some(chain), Some(buffer)) = (slot.held.view(), &mut slot.bounce) else { return lost() };
        let at = offset + u64::from(slot.done);
        let n = (len - slot.done).min((BOUNCE_PAGES * size_of::<Page>()) as u32);
        let host = buffer.as_mut_ptr().cast::<u8>();
        let entry = match access {
            Access::Read => opcode::Read::new(fd, host, n).offset(at).rw_flags(flags).build(),
            Access::Write => {
                data(&chain, access, slot.done, n).read(bytes_mut(buffer));
                opcode::Write::new(fd, host, n).offset(at).rw_flags(flags).build()
            }
        };
        Self::push(io, tag, entry);
        Step::Going
    }

    fn take_bounce(&mut self) -> Option<Vec<Page>> {
        if let Some(buffer) = self.bounces.pop() {
            return Some(buffer);
        }
        (self.bounces_made < MAX_BOUNCES).then(|| {
            self.bounces_made += 1;
            vec![Page([0; 4096]); BOUNCE_PAGES]
        })
    }

    fn sync(&self, io: &mut Io<'_>, tag: u32) -> Step {
        let entry = opcode::Fsync::new(self.target()).flags(types::FsyncFlags::DATASYNC).build();
        Self::push(io, tag, entry);
        Step::Going
    }

    /// Begins range `i` of a discard or write-zeroes request, or ends the request behind the last.
    fn range(&mut self, io: &mut Io<'_>, tag: u32, i: usize) -> Step {
        let slot = &mut self.slots[tag as usize];
        let Some(range) = slot.ranges.get(i).copied() else {
            if self.write_through() {
                self.slots[tag as usize].phase = Some(Phase::Sync);
                return self.sync(io, tag);
            }
            return Step::Over(Outcome::Done);
        };
        slot.phase = Some(Phase::Range(i));
        let give_up_space = range.unmap || matches!(slot.operation, Some(Operation::Discard { .. }));
        let mode = if give_up_space { libc::FALLOC_FL_PUNCH_HOLE } else { libc::FALLOC_FL_ZERO_RANGE };
        let entry = opcode::Fallocate::new(self.target(), range.len)
            .offset(range.offset)
            .mode(mode | libc::FALLOC_FL_KEEP_SIZE)
            .build();
        Self::push(io, tag, entry);
        Step::Going
    }

    fn write_zeros(&mut self, io: &mut Io<'_>, tag: u32, i: usize, done: u64) -> Step {
        let slot = &mut self.slots[tag as usize];
        let range = slot.ranges[i];
        if done >= range.len {
            return self.range(io, tag, i + 1);
        }
        slot.phase = Some(Phase::Zeros(i, done));
        let n = (range.len - done).min(ZEROS as u64) as u32;
        let entry = opcode::Write::new(self.target(), ZERO.0.as_ptr(), n).offset(range.offset + done).build();
        Self::push(io, tag, entry);
        Step::Going
    }

    /// Acts on the result of the slot's operation.
    fn step(&mut self, io: &mut Io<'_>, tag: u32, result: i32) -> Step {
        let slot = &mut self.slots[tag as usize];
        let (Some(operation), Some(phase)) = (slot.operation, slot.phase) else { return lost() };
        let failed = result < 0;
        let error = || io::Error::from_raw_os_error(-result);
        if failed && matches!(-result, libc::EINTR | libc::EAGAIN) {
            // Not begun; again.
            return match phase {
                Phase::Main => self.main(io, tag),
                Phase::Range(i) => self.range(io, tag, i),
                Phase::Zeros(i, done) => self.write_zeros(io, tag, i, done),
                Phase::Sync => self.sync(io, tag),
            };
        }
        match (phase, operation) {
            (Phase::Main, Operation::Read { len, .. } | Operation::Write { len, .. }) => {
                let access =
                    if matches!(operation, Operation::Read { .. }) { Access::Read } else { Access::Write };
                let what = if access == Access::Read { "read" } else { "write" };
                if failed {
                    return fail(what, error());
                }
                let n = result as u32;
                // Zero bytes is the end of a file that has shrunk; an odd count in direct mode is too.
                if n == 0
                    || !u64::from(n).is_multiple_of(u64::from(self.traits.offset_align)) && self.traits.direct
                {
                    return fail(what, io::ErrorKind::UnexpectedEof.into());
                }
                if let (Access::Read, Some(buffer), Some(chain)) =
                    (access, &mut slot.bounce, slot.held.view())
                {
                    data(&chain, access, slot.done, n).write(&bytes_mut(buffer)[..n as usize]);
                }
                slot.done += n;
                if slot.done < len { self.main(io, tag) } else { Step::Over(Outcome::Done) }
            }
            (Phase::Main | Phase::Sync, _) if failed => fail("flush", error()),
            (Phase::Main | Phase::Sync, _) => Step::Over(Outcome::Done),
            (Phase::Range(i), _) if !failed => self.range(io, tag, i + 1),
            // Not every file system, or device under one, can give space up or zero a range by itself.
            (Phase::Range(i), _) if -result == libc::EOPNOTSUPP => match operation {
                // 5.2.6.2: a discard is advice.
                Operation::Discard { .. } => self.range(io, tag, i + 1),
                _ => self.write_zeros(io, tag, i, 0),
            },
            (Phase::Range(_), _) => fail("fallocate", error()),
            (Phase::Zeros(..), _) if failed => fail("writing zeros", error()),
            (Phase::Zeros(..), _) if result == 0 => fail("writing zeros", io::ErrorKind::WriteZero.into()),
            (Phase::Zeros(i, done), _) => self.write_zeros(io, tag, i, done + result as u64),
        }
    }

    /// Submits the first, or next, operation of a transfer or flush.
    fn main(&mut self, io: &mut Io<'_>, tag: u32) -> Step {
        match self.slots[tag as usize].operation {
            Some(Operation::Read { offset, len }) => self.transfer(io, tag, Access::Read, offset, len),
            Some(Operation::Write { offset, len }) => self.transfer(io, tag, Access::Write, offset, len),
            Some(Operation::Flush) => self.sync(io, tag),
            _ => lost(),
        }
    }

    /// Gives a slot's bounce buffer to whoever waits for one.
    fn pass_bounce_on(&mut self, io: &mut Io<'_>, tag: u32) {
        let Some(buffer) = self.slots[tag as usize].bounce.take() else { return };
        self.bounces.push(buffer);
        if let Some(next) = self.waiting.pop_front() {
            // It has a buffer now, so it is under way; nothing can be over yet.
            let _going = self.main(io, next);
        }
    }
}

impl Backend for UringBackend {
    fn begin(&mut self, request: Request, operation: Operation, queue: &mut Queue, io: &mut Io<'_>) -> Begun {
        // The ring lets no more chains be in flight than it has descriptors, and there is a slot for each.
        let Some(tag) = self.free.pop() else { unreachable!("more requests than ring slots") };
        let slot = &mut self.slots[tag as usize];
        let begun = match operation {
            Operation::Discard { .. } | Operation::WriteZeroes { .. } => {
                ranges(&queue.chain(), &self.disk, operation, &mut slot.ranges)
            }
            _ => Ok(()),
        };
        if let Err(e) = begun {
            self.free.push(tag);
            return Begun::Over(request, Outcome::Failed(e.into()));
        }
        slot.request = Some(request);
        slot.operation = Some(operation);
        slot.phase = Some(Phase::Main);
        slot.done = 0;
        slot.needs_bounce =
            self.traits.direct && is_misaligned(&queue.chain(), operation, self.traits.mem_align);
        queue.hold_chain(&mut slot.held);
        let step = match operation {
            Operation::Discard { .. } | Operation::WriteZeroes { .. } => self.range(io, tag, 0),
            _ => self.main(io, tag),
        };
        assert!(matches!(step, Step::Going), "a request was over before it began");
        Begun::Pending
    }

    fn complete(
        &mut self,
        io: &mut Io<'_>,
        tag: u32,
        result: i32,
        finish: &mut dyn FnMut(Request, Operation, Outcome, ChainView<'_>),
    ) {
        let Step::Over(outcome) = self.step(io, tag, result) else { return };
        let slot = &mut self.slots[tag as usize];
        if let (Some(request), Some(operation), Some(chain)) =
            (slot.request.take(), slot.operation.take(), slot.held.view())
        {
            finish(request, operation, outcome, chain);
        }
        slot.held.release();
        self.pass_bounce_on(io, tag);
        self.free.push(tag);
    }

    fn uses_fixed_buffers(&self) -> bool {
        self.traits.direct
    }
}

/// The data of a transfer, `len` bytes from `done` on.
fn data<'a>(chain: &ChainView<'a>, access: Access, done: u32, len: u32) -> Slices<'a> {
    match access {
        Access::Read => chain.writable(done, len),
        Access::Write => chain.readable(HEADER + done, len),
    }
}

fn is_misaligned(chain: &ChainView<'_>, operation: Operation, align: u32) -> bool {
    let mut slices = match operation {
        Operation::Read { len, .. } => data(chain, Access::Read, 0, len),
        Operation::Write { len, .. } => data(chain, Access::Write, 0, len),
        _ => return false,
    };
    slices.any(|s| (s.host_addr().addr() | s.len()) & (align as usize - 1) != 0)
}

fn bytes_mut(pages: &mut [Page]) -> &mut [u8] {
    let len = size_of_val(pages);
    // SAFETY: a Page is 4096 bytes without padding, and any bytes make one.
    unsafe { std::slice::from_raw_parts_mut(pages.as_mut_ptr().cast(), len) }
}

fn fail(what: &'static str, error: io::Error) -> Step {
    Step::Over(Outcome::Failed(Failure::Io { what, error }))
}

/// A completion for a slot that has no request: our own mistake.
fn lost() -> Step {
    unreachable!("an operation completed that no request is waiting for")
}
