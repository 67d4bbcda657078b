//! Files and block devices through the reactor's io_uring, straight between the file and guest memory.
//!
//! A request is a slot; its index is the tag of its operations, of which it has one at a time. Short transfers go on
//! where they stopped, as do those that lie in several places of a [`Layout`], discards go on with their next range, and
//! what ends is handed to `finish`. What the layout does not know the place of is a worker's errand.
#![allow(unsafe_code)] // submissions carry addresses of guest memory, iovecs and bounce buffers

mod memory;
pub(super) mod ranges;
pub(super) mod slot;

use std::io;
use std::os::fd::RawFd;
use std::sync::Arc;

use io_uring::{opcode, squeue, types};
use poll_engine::engine::queue::{Queue, Request};
use poll_engine::engine::reactor::Io;
use poll_engine::ring::chain::ChainView;

use self::memory::Memory;
use self::slot::{Phase, Slot, Through, data, fill_bounce, is_misaligned, is_within};
use super::bounce::Pool;
use super::formatted::errand::{Answer, Errand, Inbox, WANTS_DATA, What};
use super::layout::{Layout, Place};
use super::write_log::Change;
use super::{Backend, Begun, Failure, Outcome};
use crate::device::Cache;
use crate::disk::{Access, Disk};
use crate::open::FileTraits;
use crate::request::{Operation, ranges};
use crate::share::{Share, weight_by, weight_of};

/// Most iovecs of one operation (`UIO_MAXIOV`); longer requests go in several.
const MAX_IOVECS: usize = 1024;
/// Buffers of a queue that pieces of requests pass through.
const BOUNCES: usize = 8;
/// The same where all of them do, and are enciphered on the way: few long ones, which bounds for how long neighbours wait.
const LONG_PIECES: usize = 4;
/// And requests that are no longer than a buffer of so many pages, in numbers that storage is kept busy with.
const SHORT: (usize, usize) = (4, 128);
/// The tag of the wait for answers of workers; the ring has no slot of this number.
const ANSWERS: u32 = u32::MAX;

/// The io_uring back end of one queue.
pub struct UringBackend<L> {
    layout: L,
    traits: FileTraits,
    disk: Arc<Disk>,
    /// While it runs, on a device that others may use.
    share: Option<Share>,
    cache: Cache,
    slots: Vec<Slot>,
    free: Vec<u32>,
    bounces: Pool,
    /// Those of short requests, with a cipher.
    short: Pool,
    /// For a layout in memory.
    memory: Option<Memory>,
}

/// What to do with a slot after a step.
enum Step {
    /// An operation is under way, or waits for a bounce buffer.
    Going,
    /// The request is over.
    Over(Outcome),
}

impl<L: Layout> UringBackend<L> {
    /// On a disk laid out so, with room for `ring_size` requests.
    pub fn new(
        layout: L,
        traits: FileTraits,
        disk: Arc<Disk>,
        cache: Cache,
        ring_size: u16,
    ) -> UringBackend<L> {
        let size = u32::from(ring_size);
        let in_memory = layout.is_in_memory();
        let buffers = match (L::CIPHERS, in_memory) {
            (false, _) => BOUNCES,
            (true, false) => LONG_PIECES,
            (true, true) => 1,
        };
        let bounces = Pool::new(L::BOUNCE_PAGES, buffers);
        UringBackend {
            memory: in_memory.then(|| Memory::new(L::CIPHERS.then(|| bounces.size()))),
            layout,
            traits,
            disk,
            share: None,
            cache,
            slots: std::iter::repeat_with(Slot::default).take(size as usize).collect(),
            free: (0..size).rev().collect(),
            bounces,
            short: Pool::new(SHORT.0, SHORT.1),
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
        // static zeros. The slot keeps all of them, unchanged, until the completion with this tag. Files are open
        // for as long as the layout is, which outlives what is pending (`QueueHandler::detach`).
        unsafe { io.uring().push(&entry) };
    }

    fn rw_flags(&self, access: Access) -> i32 {
        if access == Access::Write && self.write_through() { libc::RWF_DSYNC } else { 0 }
    }

    /// Writes a change down that is about to be submitted.
    #[inline]
    fn log(&mut self, tag: u32, fd: types::Fd, change: Change<'_>) {
        if let Some(log) = self.layout.write_log() {
            self.slots[tag as usize].logged = log.begin(fd.0, change);
        }
    }

    /// As `log`, of a write of the request's data.
    #[inline]
    fn log_write(&mut self, tag: u32, fd: types::Fd, offset: u64, len: u32) {
        let Some(log) = self.layout.write_log() else { return };
        let durable = self.write_through();
        let slot = &mut self.slots[tag as usize];
        let Some(chain) = slot.held.view() else { return lost() };
        let mut bytes = vec![0; len as usize];
        match &slot.bounce {
            Some(buffer) if slot.bounced => bytes.copy_from_slice(&buffer.bytes()[..len as usize]),
            _ => drop(data(&chain, Access::Write, slot.done, len).read(&mut bytes)),
        }
        slot.logged = log.begin(fd.0, Change::Write { offset, bytes: &bytes, durable });
    }

    /// Submits the next transfer of a read or write.
    fn transfer(&mut self, io: &mut Io<'_>, tag: u32, access: Access, offset: u64, len: u32) -> Step {
        loop {
            let slot = &mut self.slots[tag as usize];
            let (at, left) = (offset + u64::from(slot.done), len - slot.done);
            match (self.layout.place(access, at, left), access) {
                (Place::File { fd, offset, len }, _) => {
                    return if slot.through.is_some() {
                        self.transfer_bounced(io, tag, access, at, (fd, offset, len))
                    } else {
                        self.transfer_at(io, tag, access, (fd, offset, len))
                    };
                }
                (Place::Zeros(n), Access::Read) => {
                    let Some(chain) = slot.held.view() else { return lost() };
                    data(&chain, access, slot.done, n).for_each(|s| s.fill(0));
                    slot.done += n;
                    if slot.done == len {
                        return Step::Over(Outcome::Done);
                    }
                }
                (Place::Zeros(n), Access::Write) | (Place::Elsewhere(n), _) => {
                    return self.send(tag, access, at, n);
                }
            }
        }
    }

    /// Submits a transfer in a file.
    fn transfer_at(
        &mut self,
        io: &mut Io<'_>,
        tag: u32,
        access: Access,
        (fd, at, len): (RawFd, u64, u32),
    ) -> Step {
        let flags = self.rw_flags(access);
        let fd = types::Fd(fd);
        if access == Access::Write {
            self.log_write(tag, fd, at, len);
        }
        let slot = &mut self.slots[tag as usize];
        let Some(chain) = slot.held.view() else { return lost() };
        let mut slices = data(&chain, access, slot.done, len);
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

    /// As `transfer_at`, through a buffer: one that is aligned where the guest's memory is not, or one for a cipher to work
    /// in. On the disk, it is the part from `offset` on.
    fn transfer_bounced(
        &mut self,
        io: &mut Io<'_>,
        tag: u32,
        access: Access,
        offset: u64,
        (fd, at, len): (RawFd, u64, u32),
    ) -> Step {
        let flags = self.rw_flags(access);
        let fd = types::Fd(fd);
        let slot = &mut self.slots[tag as usize];
        let short = slot.through == Some(Through::Short);
        let pool = if short { &mut self.short } else { &mut self.bounces };
        let n = len.min(pool.size());
        if !fill_bounce(slot, pool, &mut self.layout, tag, (access, offset, n)) {
            return Step::Going;
        }
        if access == Access::Write {
            self.log_write(tag, fd, at, n);
        }
        let Some(buffer) = &mut self.slots[tag as usize].bounce else { return lost() };
        if let Some(memory) = &mut self.memory {
            memory.transfer_piece(tag, fd.0, access, at, &mut buffer.bytes_mut()[..n as usize]);
            return Step::Going;
        }
        let host = buffer.bytes_mut().as_mut_ptr();
        let entry = match access {
            Access::Read => opcode::Read::new(fd, host, n).offset(at).rw_flags(flags).build(),
            Access::Write => opcode::Write::new(fd, host, n).offset(at).rw_flags(flags).build(),
        };
        Self::push(io, tag, entry);
        Step::Going
    }

    /// Has a worker make the transfer, or the beginning of it; or, for a write, room for it first.
    fn send(&mut self, tag: u32, access: Access, offset: u64, len: u32) -> Step {
        let durable = self.write_through();
        let slot = &mut self.slots[tag as usize];
        if access == Access::Write && !slot.brings_data {
            slot.phase = Some(Phase::Room);
            self.layout.send(Errand { tag, offset, len: len.into(), what: What::MakeRoom });
            return Step::Going;
        }
        let len = len.min(self.bounces.size());
        if !fill_bounce(slot, &mut self.bounces, &mut self.layout, tag, (access, offset, len)) {
            return Step::Going;
        }
        let Some(buffer) = slot.bounce.take() else { return lost() };
        let what = match access {
            Access::Read => What::Read(buffer),
            Access::Write => What::Write { buffer, durable },
        };
        self.layout.send(Errand { tag, offset, len: len.into(), what });
        Step::Going
    }

    /// Begins to make everything durable, or goes on with the next file.
    fn sync(&mut self, io: &mut Io<'_>, tag: u32) -> Step {
        if self.is_durable() {
            return Step::Over(Outcome::Done);
        }
        let slot = &mut self.slots[tag as usize];
        if slot.synced == 0 {
            slot.mark = self.layout.flush_mark();
        }
        let Some(fd) = self.layout.flush_fd(slot.synced) else {
            self.layout.flushed(slot.mark);
            return Step::Over(Outcome::Done);
        };
        let entry = opcode::Fsync::new(types::Fd(fd)).flags(types::FsyncFlags::DATASYNC).build();
        self.log(tag, types::Fd(fd), Change::Sync);
        Self::push(io, tag, entry);
        Step::Going
    }

    /// Acts on the result of the slot's operation.
    fn step(&mut self, io: &mut Io<'_>, tag: u32, result: i32) -> Step {
        let whole = self.whole(result);
        let slot = &mut self.slots[tag as usize];
        let (Some(operation), Some(phase)) = (slot.operation, slot.phase) else { return lost() };
        if let Some(log) = self.layout.write_log() {
            log.end(std::mem::take(&mut slot.logged), result.into());
        }
        let failed = result < 0;
        let error = || io::Error::from_raw_os_error(-result);
        if phase == Phase::Room {
            if failed {
                return fail("write", error());
            }
            (slot.phase, slot.brings_data) = (Some(Phase::Main), result == WANTS_DATA);
            return self.main(io, tag);
        }
        if failed && matches!(-result, libc::EINTR | libc::EAGAIN) {
            // Not begun; again.
            return self.again(io, tag, phase);
        }
        match (phase, operation) {
            (Phase::Main, Operation::Read { offset, len } | Operation::Write { offset, len }) => {
                let access =
                    if matches!(operation, Operation::Read { .. }) { Access::Read } else { Access::Write };
                let what = if access == Access::Read { "read" } else { "write" };
                if failed {
                    return fail(what, error());
                }
                let n = whole;
                // Zero bytes is the end of a file that has shrunk; an odd count in direct mode is too.
                if n == 0
                    || !u64::from(n).is_multiple_of(u64::from(self.traits.offset_align)) && self.traits.direct
                {
                    return fail(what, io::ErrorKind::UnexpectedEof.into());
                }
                if let (Access::Read, true, Some(buffer), Some(chain)) =
                    (access, slot.bounced, &mut slot.bounce, slot.held.view())
                {
                    let (data, bytes) =
                        (data(&chain, access, slot.done, n), &mut buffer.bytes_mut()[..n as usize]);
                    if L::CIPHERS {
                        self.layout.decipher(offset + u64::from(slot.done), bytes, data);
                    } else {
                        data.write(bytes);
                    }
                }
                (slot.bounced, slot.brings_data) = (false, false);
                slot.done += n;
                if slot.done < len {
                    return self.main(io, tag);
                }
                if access == Access::Write && self.layout.is_behind() && self.write_through() {
                    self.slots[tag as usize].phase = Some(Phase::Sync);
                    return self.sync(io, tag);
                }
                Step::Over(Outcome::Done)
            }
            (Phase::Room, _) => lost(),
            (Phase::Main | Phase::Sync, _) if failed => fail("flush", error()),
            (Phase::Main | Phase::Sync, _) => {
                slot.synced += 1;
                self.sync(io, tag)
            }
            (Phase::Over, _) => Step::Over(Outcome::Done),
            (Phase::Range(i, done), _) if !failed => {
                let done = done + slot.piece;
                self.range(io, tag, i, done)
            }
            // Not every file system, or device under one, can give space up or zero a range by itself.
            (Phase::Range(i, done), _) if -result == libc::EOPNOTSUPP => match operation {
                // 5.2.6.2: a discard is advice.
                Operation::Discard { .. } => {
                    let done = done + slot.piece;
                    self.range(io, tag, i, done)
                }
                _ => self.write_zeros(io, tag, i, done),
            },
            (Phase::Range(..), _) => fail("fallocate", error()),
            (Phase::Zeros(..), _) if failed => fail("writing zeros", error()),
            (Phase::Zeros(i, done), _) => match whole {
                0 => fail("writing zeros", io::ErrorKind::WriteZero.into()),
                n => self.write_zeros(io, tag, i, done + u64::from(n)),
            },
        }
    }

    /// How many of the bytes that were read or written count: with a cipher, whole sectors do.
    fn whole(&self, result: i32) -> u32 {
        let n = result as u32;
        if L::CIPHERS { n - n % self.disk.granularity() } else { n }
    }

    /// Goes on with what had to wait, or was not begun.
    fn again(&mut self, io: &mut Io<'_>, tag: u32, phase: Phase) -> Step {
        match phase {
            Phase::Main => self.main(io, tag),
            Phase::Room => lost(),
            Phase::Range(i, done) => self.range(io, tag, i, done),
            Phase::Zeros(i, done) => self.write_zeros(io, tag, i, done),
            Phase::Sync => self.sync(io, tag),
            Phase::Over => Step::Over(Outcome::Done),
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

    /// A step outside of a completion: what is over by it is told at the next one.
    fn settle(&mut self, tag: u32, step: Step) {
        let Step::Over(outcome) = step else { return };
        assert!(matches!(outcome, Outcome::Done), "a request failed before it began");
        self.slots[tag as usize].phase = Some(Phase::Over);
        // Only what has workers has places where nothing is done.
        let Some(inbox) = self.layout.inbox() else { return lost() };
        inbox.put(Answer { tag, result: 0, buffer: None });
    }

    /// Gives a slot's bounce buffer to whoever waits for one.
    fn pass_bounce_on(&mut self, io: &mut Io<'_>, tag: u32) {
        let slot = &mut self.slots[tag as usize];
        let is_short = slot.through == Some(Through::Short);
        let Some(buffer) = slot.bounce.take() else { return };
        self.pool(is_short).give_back(buffer);
        // One that waited may find that it needs none any more.
        while let Some(next) = self.pool(is_short).woken() {
            let phase = self.slots[next as usize].phase.unwrap_or_else(lost);
            let step = self.again(io, next, phase);
            self.settle(next, step);
        }
    }

    fn pool(&mut self, is_short: bool) -> &mut Pool {
        if is_short { &mut self.short } else { &mut self.bounces }
    }

    /// Acts on the result of an operation of the request of `tag`.
    fn go_on(
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
            if let Some(share) = &self.share {
                share.end(weight_of(&operation));
            }
            finish(request, operation, outcome, chain);
        }
        slot.held.release();
        self.pass_bounce_on(io, tag);
        self.free.push(tag);
    }

    /// Waits for the next answers of workers.
    fn wait_for_answers(&self, io: &mut Io<'_>) {
        if let Some(inbox) = self.layout.inbox() {
            let poll = opcode::PollAdd::new(types::Fd(inbox.fd()), libc::POLLIN as u32).build();
            Self::push(io, ANSWERS, poll);
        }
    }

    /// Takes what workers have answered.
    #[cold]
    fn take_answers(
        &mut self,
        io: &mut Io<'_>,
        finish: &mut dyn FnMut(Request, Operation, Outcome, ChainView<'_>),
    ) {
        let Some(inbox) = self.layout.inbox() else { return lost() };
        inbox.quiet();
        while let Some(answer) = self.layout.inbox().and_then(Inbox::take) {
            if answer.buffer.is_some() {
                self.slots[answer.tag as usize].bounce = answer.buffer;
            }
            self.go_on(io, answer.tag, answer.result, finish);
            // The next piece may not need the buffer, and somebody else wait for it.
            if !self.slots[answer.tag as usize].bounced {
                self.pass_bounce_on(io, answer.tag);
            }
        }
        self.wait_for_answers(io);
    }
}

impl<L: Layout> Backend for UringBackend<L> {
    #[inline]
    fn has_room(&self) -> bool {
        self.share.as_ref().is_none_or(Share::has_room)
    }

    fn begin(&mut self, request: Request, operation: Operation, queue: &mut Queue, io: &mut Io<'_>) -> Begun {
        if let Some(outcome) = self.at_once(operation, &queue.chain()) {
            return Begun::Over(request, outcome);
        }
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
        if let Some(share) = &self.share {
            share.begin(weight_of(&operation));
        }
        slot.request = Some(request);
        slot.operation = Some(operation);
        slot.phase = Some(Phase::Main);
        slot.done = 0;
        slot.synced = 0;
        (slot.bounced, slot.brings_data) = (false, false);
        slot.through = if L::CIPHERS {
            Some(if is_within(operation, self.short.size()) { Through::Short } else { Through::Pieces })
        } else {
            let direct = self.traits.direct;
            (direct && is_misaligned(&queue.chain(), operation, self.traits.mem_align))
                .then_some(Through::Pieces)
        };
        queue.hold_chain(&mut slot.held);
        let step = match operation {
            Operation::Discard { .. } | Operation::WriteZeroes { .. } => self.range(io, tag, 0, 0),
            _ => self.main(io, tag),
        };
        self.settle(tag, step);
        Begun::Pending
    }

    fn complete(
        &mut self,
        io: &mut Io<'_>,
        tag: u32,
        result: i32,
        finish: &mut dyn FnMut(Request, Operation, Outcome, ChainView<'_>),
    ) {
        if L::HAS_WORKERS && tag == ANSWERS {
            return self.take_answers(io, finish);
        }
        self.go_on(io, tag, result, finish);
    }

    fn turn(
        &mut self,
        io: &mut Io<'_>,
        finish: &mut dyn FnMut(Request, Operation, Outcome, ChainView<'_>),
    ) -> usize {
        let Some((tag, result)) = self.memory.as_mut().and_then(Memory::take_piece) else { return 0 };
        self.go_on(io, tag, result, finish);
        1
    }

    fn prepare_sleep(&mut self, _: &mut Io<'_>) -> bool {
        self.memory.as_ref().is_some_and(Memory::has_piece)
    }

    #[inline]
    fn weight(&self, operation: &Operation) -> u32 {
        if L::CIPHERS && self.memory.is_some() {
            weight_by(memory::HEAVY, operation)
        } else {
            weight_of(operation)
        }
    }

    fn attach(&mut self, io: &mut Io<'_>) {
        self.share = self.disk.device().map(|device| Share::join(device, Arc::as_ptr(&self.disk).addr()));
        self.wait_for_answers(io);
    }

    fn detach(&mut self, io: &mut Io<'_>) {
        if L::HAS_WORKERS {
            let label = io.label(ANSWERS);
            io.uring().unwatch(label, label);
        }
    }

    fn uses_fixed_buffers(&self) -> bool {
        self.traits.direct && !L::CIPHERS
    }
}

fn fail(what: &'static str, error: io::Error) -> Step {
    Step::Over(Outcome::Failed(Failure::Io { what, error }))
}

/// A completion for a slot that has no request: our own mistake.
fn lost<T>() -> T {
    unreachable!("an operation completed that no request is waiting for")
}
