//! The back end of one queue of an RBD image. librbd reads and writes guest memory on threads of its own, and these tell an
//! inbox what has become of each request: a reactor that is awake looks into it in each round, one that sleeps waits for its
//! eventfd.
#![allow(unsafe_code)] // the library is given addresses of guest memory

use std::io;
use std::sync::Arc;

use io_uring::{opcode, types};
use poll_engine::engine::queue::{Queue, Request};
use poll_engine::engine::reactor::Io;
use poll_engine::ring::chain::{ChainView, HeldChain};

use super::ffi::{Ask, Token};
use super::image::RbdImage;
use crate::backend::formatted::errand::Inbox;
use crate::backend::uring::slot::data;
use crate::backend::{Backend, Begun, Failure, Outcome};
use crate::disk::{Access, Disk};
use crate::request::{Operation, Range, ranges};

/// The tag of the wait for answers; the ring has no slot of this number.
const ANSWERS: u32 = u32::MAX;

/// A request under way, and what it holds until it is over.
#[derive(Default)]
struct Slot {
    request: Option<Request>,
    operation: Option<Operation>,
    held: HeldChain,
    iovecs: Vec<libc::iovec>,
    ranges: Vec<Range>,
    /// The range at hand.
    range: usize,
}

// SAFETY: the iovecs are addresses kept for the library, not used by us; they point into memory that `held` of the same slot
// keeps alive, whatever thread that is on.
unsafe impl Send for Slot {}

/// The back end.
pub struct RbdBackend {
    image: Arc<RbdImage>,
    disk: Arc<Disk>,
    inbox: Arc<Inbox>,
    /// For each slot, where it stays.
    tokens: Box<[Token]>,
    slots: Vec<Slot>,
    free: Vec<u32>,
    /// Requests that were over before the library was asked.
    over: Vec<(u32, Outcome)>,
    /// The reactor's ring waits for answers.
    watching: bool,
}

type Finish<'a> = &'a mut dyn FnMut(Request, Operation, Outcome, ChainView<'_>);

impl RbdBackend {
    /// On this image, with room for `ring_size` requests.
    pub fn new(image: Arc<RbdImage>, disk: Arc<Disk>, ring_size: u16) -> io::Result<RbdBackend> {
        let (size, inbox) = (u32::from(ring_size), Arc::new(Inbox::new(ring_size)?));
        let token = |tag| Token { inbox: Arc::clone(&inbox), tag };
        Ok(RbdBackend {
            image,
            disk,
            tokens: (0..size).map(token).collect(),
            inbox,
            slots: std::iter::repeat_with(Slot::default).take(size as usize).collect(),
            free: (0..size).rev().collect(),
            over: Vec::with_capacity(size as usize),
            watching: false,
        })
    }

    /// Asks for the first, or next, part of a request; what became of it, if that was the last one.
    fn go(&mut self, tag: u32) -> Option<Outcome> {
        let slot = &mut self.slots[tag as usize];
        let mut transfer = |access, len| {
            let Some(chain) = slot.held.view() else { return lost() };
            slot.iovecs.clear();
            let slices = data(&chain, access, 0, len);
            slot.iovecs
                .extend(slices.map(|s| libc::iovec { iov_base: s.host_addr().cast(), iov_len: s.len() }));
        };
        let ask = match slot.operation {
            Some(Operation::Read { offset, len }) => {
                transfer(Access::Read, len);
                Ask::Read(&slot.iovecs, offset)
            }
            Some(Operation::Write { offset, len }) => {
                transfer(Access::Write, len);
                Ask::Write(&slot.iovecs, offset)
            }
            Some(Operation::Flush) => Ask::Flush,
            Some(operation @ (Operation::Discard { .. } | Operation::WriteZeroes { .. })) => {
                let Some(range) = slot.ranges.get(slot.range) else { return Some(Outcome::Done) };
                match operation {
                    Operation::Discard { .. } => Ask::Discard(range.offset, range.len),
                    _ => Ask::Zero(range.offset, range.len, range.unmap),
                }
            }
            _ => return lost(),
        };
        self.image.counter().begin();
        // SAFETY: the slot keeps the chain, with the guest memory that is named, and the iovecs, unchanged, until the answer
        // with this tag; the tokens stay where they are for as long as this back end, which outlives what is pending
        // (`QueueHandler::detach`).
        match unsafe { self.image.image().ask(ask, &self.tokens[tag as usize]) } {
            Ok(()) => None,
            Err(error) => {
                self.image.counter().end();
                Some(failed(slot.operation, error))
            }
        }
    }

    /// Acts on what became of a part of a request.
    fn step(&mut self, tag: u32, result: i32) -> Option<Outcome> {
        self.image.counter().end();
        let slot = &mut self.slots[tag as usize];
        if result < 0 {
            return Some(failed(slot.operation, io::Error::from_raw_os_error(-result)));
        }
        match slot.operation {
            Some(Operation::Read { len, .. }) if result as u32 != len => {
                // The end of an image that has shrunk.
                Some(failed(slot.operation, io::ErrorKind::UnexpectedEof.into()))
            }
            Some(Operation::Discard { .. } | Operation::WriteZeroes { .. }) => {
                slot.range += 1;
                self.go(tag)
            }
            _ => Some(Outcome::Done),
        }
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

    fn is_idle(&self) -> bool {
        self.free.len() == self.slots.len()
    }
}

impl Backend for RbdBackend {
    fn begin(&mut self, request: Request, operation: Operation, queue: &mut Queue, _: &mut Io<'_>) -> Begun {
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
        slot.range = 0;
        queue.hold_chain(&mut slot.held);
        if let Some(outcome) = self.go(tag) {
            self.over.push((tag, outcome));
        }
        Begun::Pending
    }

    fn turn(&mut self, _: &mut Io<'_>, finish: Finish<'_>) -> usize {
        if self.is_idle() {
            return 0;
        }
        let mut ended = 0;
        while let Some((tag, outcome)) = self.over.pop() {
            ended += 1;
            self.end(tag, outcome, finish);
        }
        while let Some(answer) = self.inbox.take() {
            ended += 1;
            if let Some(outcome) = self.step(answer.tag, answer.result) {
                self.end(answer.tag, outcome, finish);
            }
        }
        ended
    }

    fn complete(&mut self, io: &mut Io<'_>, tag: u32, _: i32, finish: Finish<'_>) {
        assert_eq!(tag, ANSWERS, "an operation completed that nothing is waiting for");
        self.watching = false;
        self.turn(io, finish);
    }

    fn prepare_sleep(&mut self, io: &mut Io<'_>) -> bool {
        if self.is_idle() {
            return false;
        }
        self.inbox.quiet();
        if !self.over.is_empty() || !self.inbox.is_empty() {
            return true;
        }
        if !self.watching {
            self.watching = true;
            let poll = opcode::PollAdd::new(types::Fd(self.inbox.fd()), libc::POLLIN as u32).build();
            let poll = poll.user_data(io.label(ANSWERS));
            // SAFETY: the entry points to nothing, and the inbox is open until the queue has stopped and this was cancelled.
            unsafe { io.uring().push(&poll) };
        }
        false
    }

    fn detach(&mut self, io: &mut Io<'_>) {
        if self.watching {
            let label = io.label(ANSWERS);
            io.uring().unwatch(label, label);
        }
    }
}

#[cold]
fn failed(operation: Option<Operation>, error: io::Error) -> Outcome {
    let what = match operation {
        Some(Operation::Read { .. }) => "read",
        Some(Operation::Write { .. }) => "write",
        Some(Operation::Flush) => "flush",
        Some(Operation::Discard { .. }) => "discard",
        _ => "write zeroes",
    };
    Outcome::Failed(Failure::Io { what, error })
}

/// An answer for a slot that has no request: our own mistake.
fn lost<T>() -> T {
    unreachable!("an answer came that no request is waiting for")
}
