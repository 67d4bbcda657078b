//! One block queue: takes requests, hands them to the back end, writes status bytes and used lengths.

use std::sync::Arc;
use std::time::Duration;

use poll_engine::device::QueueHandler;
use poll_engine::engine::queue::{BUDGET, Queue, Request};
use poll_engine::engine::reactor::Io;
use poll_engine::memory::map::MemoryMap;
use poll_engine::ring::chain::ChainView;
use poll_engine::stats::ErrorKind;
use poll_engine::uring::FixedBuffers;

use crate::backend::{Backend, Begun, Failure, Outcome};
use crate::disk::Disk;
use crate::record::tap::Tap;
use crate::request::{ID_LEN, Invalid, Operation, STATUS_OK, parse};
use crate::throttle::Gate;

/// What a queue may begin in a round, in weights: as many small requests as the engine has a queue take, and half a
/// megabyte or one request of large ones, which a reactor that copies them is busy with for some ten microseconds.
const ROUND: u32 = BUDGET as u32;

/// The handler of one queue over one kind of back end.
#[derive(Debug)]
pub struct BlkQueue<B> {
    disk: Arc<Disk>,
    backend: B,
    /// Where requests are noted, when they are.
    tap: Option<Tap>,
    gate: Gate,
    /// There was no room for more: there is when something of this reactor is over.
    crowded: bool,
}

impl<B: Backend> BlkQueue<B> {
    /// A queue of `disk`, recorded by `tap`.
    pub fn new(disk: Arc<Disk>, backend: B, tap: Option<Tap>) -> BlkQueue<B> {
        BlkQueue { disk, backend, tap, gate: Gate::default(), crowded: false }
    }

    #[inline]
    fn one(
        &mut self,
        request: Request,
        asked: Result<Operation, Invalid>,
        queue: &mut Queue,
        io: &mut Io<'_>,
    ) {
        let (request, written) = match asked {
            Ok(operation @ Operation::GetId { len }) => {
                if let Some(tap) = &mut self.tap {
                    tap.note(&self.disk, &queue.chain(), request.since(), operation, STATUS_OK);
                }
                (request, self.get_id(&queue.chain(), len))
            }
            Ok(operation) => match self.backend.begin(request, operation, queue, io) {
                Begun::Pending => return,
                Begun::Over(request, outcome) => {
                    if let Some(tap) = &mut self.tap {
                        tap.note(&self.disk, &queue.chain(), request.since(), operation, status_of(&outcome));
                    }
                    (request, finish(queue, &queue.chain(), operation, outcome))
                }
            },
            Err(e) => {
                queue.count_error(e.kind(), &e);
                if let Some(tap) = &mut self.tap {
                    tap.note_refused(&queue.chain(), request.since(), e.status());
                }
                (request, set_status(&queue.chain(), e.status(), 0))
            }
        };
        queue.complete(request, written);
    }

    /// As [`poll`](QueueHandler::poll), where others may have to wait for this disk, or this one has limits: a request that
    /// is not to be begun now stays in the ring, and those behind it.
    #[inline(never)]
    fn poll_shared(&mut self, queue: &mut Queue, io: &mut Io<'_>) -> usize {
        // What an earlier back end had begun is under way.
        let begun = queue.has_resubmits();
        let throttle = self.disk.throttle();
        let limited = !begun && (throttle.is_on() || self.gate.is_closed());
        let now = if limited { throttle.now() } else { 0 };
        if limited && !self.gate.opens(throttle, now) {
            return 0;
        }
        self.crowded = !begun && !self.backend.has_room();
        if self.crowded {
            return 0;
        }
        let ready = queue.ready();
        let (mut taken, mut left) = (0, ROUND);
        while taken < ready && left > 0 {
            if taken > 0 && !begun && !self.backend.has_room() {
                self.crowded = true;
                break;
            }
            let Some(request) = queue.take() else { break };
            let asked = parse(&queue.chain(), &self.disk);
            if let (Ok(operation), true) = (&asked, limited)
                && !self.gate.passes(operation, self.disk.throttle(), now, queue.stats())
            {
                queue.untake(request);
                break;
            }
            left = left.saturating_sub(asked.as_ref().map_or(1, |operation| self.backend.weight(operation)));
            self.one(request, asked, queue, io);
            taken += 1;
        }
        usize::from(taken)
    }

    /// Ends what the back end has found to be over; how much that was.
    #[inline]
    fn turn(&mut self, queue: &mut Queue, io: &mut Io<'_>) -> usize {
        let mut found = false;
        self.backend.turn(io, &mut |request, operation, outcome, chain| {
            if !std::mem::replace(&mut found, true) {
                queue.mark_reaped();
            }
            end(&self.disk, &mut self.tap, queue, (request, operation, outcome), &chain);
        })
    }

    /// 5.2.6: "the device ID string is a NUL-padded ASCII string up to 20 bytes long".
    fn get_id(&self, chain: &ChainView<'_>, len: u32) -> u32 {
        let mut id = [0; ID_LEN];
        let serial = self.disk.serial().as_bytes();
        let n = serial.len().min(ID_LEN);
        id[..n].copy_from_slice(&serial[..n]);
        let written = chain.writable(0, len).write(&id) as u32;
        set_status(chain, STATUS_OK, written)
    }
}

impl<B: Backend> QueueHandler for BlkQueue<B> {
    fn attach(&mut self, io: &mut Io<'_>) {
        self.backend.attach(io);
    }

    #[inline]
    fn poll(&mut self, queue: &mut Queue, io: &mut Io<'_>) -> usize {
        let taken = if !B::IS_FREE || self.disk.throttle().is_on() || self.gate.is_closed() {
            self.poll_shared(queue, io)
        } else {
            let ready = queue.ready();
            for _ in 0..ready {
                let Some(request) = queue.take() else { break };
                let asked = parse(&queue.chain(), &self.disk);
                self.one(request, asked, queue, io);
            }
            ready.into()
        };
        let ended = self.turn(queue, io);
        if let Some(tap) = &mut self.tap {
            tap.pass_on_now();
        }
        taken + ended
    }

    fn go_on(&mut self, queue: &mut Queue, io: &mut Io<'_>) -> usize {
        self.turn(queue, io)
    }

    fn complete(&mut self, queue: &mut Queue, io: &mut Io<'_>, tag: u32, result: i32) {
        self.backend.complete(io, tag, result, &mut |request, operation, outcome, chain| {
            end(&self.disk, &mut self.tap, queue, (request, operation, outcome), &chain);
        });
    }

    fn prepare_sleep(&mut self, io: &mut Io<'_>) -> bool {
        self.backend.prepare_sleep(io)
    }

    fn detach(&mut self, io: &mut Io<'_>) {
        self.backend.detach(io);
    }

    fn wants_chains(&self) -> bool {
        !self.gate.is_closed() && !self.crowded
    }

    fn longest_sleep(&self) -> Option<Duration> {
        self.gate.longest_sleep(self.disk.throttle().now())
    }

    fn uses_fixed_buffers(&self) -> bool {
        self.backend.uses_fixed_buffers()
    }

    fn register_memory(&mut self, mode: FixedBuffers, map: &MemoryMap) {
        self.backend.register_memory(mode, map);
    }
}

/// Gives a request back whose chain was held.
#[inline]
fn end(
    disk: &Disk,
    tap: &mut Option<Tap>,
    queue: &mut Queue,
    (request, operation, outcome): (Request, Operation, Outcome),
    chain: &ChainView<'_>,
) {
    if let Some(tap) = tap {
        tap.note(disk, chain, request.since(), operation, status_of(&outcome));
        tap.pass_on(queue.reaped());
    }
    let written = finish(queue, chain, operation, outcome);
    queue.complete_held(request, written, chain);
}

/// Writes the status and returns the used length; counts bytes and errors.
#[inline]
fn finish(queue: &Queue, chain: &ChainView<'_>, operation: Operation, outcome: Outcome) -> u32 {
    let stats = queue.stats();
    match (outcome, operation) {
        (Outcome::Done, Operation::Read { len, .. }) => {
            stats.bytes_read.add(u64::from(len));
            set_status(chain, STATUS_OK, len)
        }
        (Outcome::Done, Operation::Write { len, .. }) => {
            stats.bytes_written.add(u64::from(len));
            set_status(chain, STATUS_OK, 0)
        }
        (Outcome::Done, _) => set_status(chain, STATUS_OK, 0),
        (Outcome::Failed(failure), _) => {
            let status = failure.status();
            let kind = match &failure {
                Failure::Invalid(e) => e.kind(),
                Failure::Io { .. } | Failure::OnPurpose => ErrorKind::Io,
            };
            queue.count_error(kind, &failure);
            set_status(chain, status, 0)
        }
    }
}

/// The status byte for an outcome.
#[inline]
fn status_of(outcome: &Outcome) -> u8 {
    match outcome {
        Outcome::Done => STATUS_OK,
        Outcome::Failed(failure) => failure.status(),
    }
}

/// Writes the status byte behind `data` bytes that were written from the chain's first writable byte on. Returns the
/// used length, which counts only an unbroken run of written bytes from the start (2.7.8.2).
#[inline]
fn set_status(chain: &ChainView<'_>, status: u8, data: u32) -> u32 {
    let Some(byte) = chain.last_writable() else { return 0 };
    byte.write_byte(status);
    let at = chain.writable_len() - 1;
    if data == at { data + 1 } else { data }
}
