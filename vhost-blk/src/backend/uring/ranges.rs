//! Discards and write-zeroes, range by range.

use io_uring::{opcode, types};
use poll_engine::engine::reactor::Io;

use super::slot::Phase;
use super::{Outcome, Step, UringBackend};
use crate::backend::formatted::errand::{Errand, What};
use crate::backend::layout::{Layout, Place};
use crate::backend::write_log::Change;
use crate::disk::Access;
use crate::request::Operation;

/// Bytes of zeros written at a time where the file system has no better way.
pub(in crate::backend) const ZEROS: usize = 64 << 10;

#[repr(C, align(4096))]
pub(in crate::backend) struct Zeros(pub [u8; ZEROS]);

/// Zeros to be written.
pub(in crate::backend) static ZERO: Zeros = Zeros([0; ZEROS]);

/// Most bytes that a worker zeroes or discards at a time.
const MAX_ERRAND: u32 = 64 << 20;

impl<L: Layout> UringBackend<L> {
    /// Goes on at byte `done` of range `i` of a discard or write-zeroes request, or ends the request behind the last.
    pub(super) fn range(&mut self, io: &mut Io<'_>, tag: u32, mut i: usize, mut done: u64) -> Step {
        loop {
            let write_through = self.write_through();
            let slot = &mut self.slots[tag as usize];
            let Some(range) = slot.ranges.get(i).copied() else {
                if write_through {
                    slot.phase = Some(Phase::Sync);
                    return self.sync(io, tag);
                }
                return Step::Over(Outcome::Done);
            };
            if done >= range.len {
                (i, done) = (i + 1, 0);
                continue;
            }
            slot.phase = Some(Phase::Range(i, done));
            let discards = matches!(slot.operation, Some(Operation::Discard { .. }));
            if L::CIPHERS && !discards {
                // What reads as zeros is none in the file.
                return self.write_zeros(io, tag, i, done);
            }
            let left = (range.len - done).min(u64::from(!(ZEROS as u32 - 1))) as u32;
            match self.layout.place(Access::Write, range.offset + done, left) {
                Place::File { fd, offset, len } => {
                    slot.piece = len.into();
                    let give_up_space = range.unmap || discards;
                    let mode =
                        if give_up_space { libc::FALLOC_FL_PUNCH_HOLE } else { libc::FALLOC_FL_ZERO_RANGE };
                    let entry = opcode::Fallocate::new(types::Fd(fd), len.into())
                        .offset(offset)
                        .mode(mode | libc::FALLOC_FL_KEEP_SIZE)
                        .build();
                    self.log(tag, types::Fd(fd), Change::Zero { offset, len: len.into() });
                    Self::push(io, tag, entry);
                    return Step::Going;
                }
                Place::Zeros(n) => done += u64::from(n),
                Place::Elsewhere(n) => {
                    let n = n.min(MAX_ERRAND);
                    slot.piece = n.into();
                    let offset = range.offset + done;
                    let what = if discards { What::Discard } else { What::Zero { unmap: range.unmap } };
                    self.layout.send(Errand { tag, offset, len: n.into(), what });
                    return Step::Going;
                }
            }
        }
    }

    /// As [`range`](Self::range), by writing zeros.
    pub(super) fn write_zeros(&mut self, io: &mut Io<'_>, tag: u32, i: usize, done: u64) -> Step {
        let slot = &mut self.slots[tag as usize];
        let range = slot.ranges[i];
        let most = if L::CIPHERS { self.bounces.size() } else { ZEROS as u32 };
        let n = (range.len - done.min(range.len)).min(most.into()) as u32;
        let place =
            if n == 0 { Place::Zeros(0) } else { self.layout.place(Access::Write, range.offset + done, n) };
        let Place::File { fd, offset, len } = place else { return self.range(io, tag, i, done) };
        slot.phase = Some(Phase::Zeros(i, done));
        let fd = types::Fd(fd);
        let (from, change);
        if L::CIPHERS {
            if slot.bounce.is_none() {
                slot.bounce = self.bounces.take(tag);
            }
            let Some(buffer) = &mut slot.bounce else { return Step::Going };
            let bytes = &mut buffer.bytes_mut()[..len as usize];
            self.layout.encipher_zeros(range.offset + done, bytes);
            if let Some(memory) = &mut self.memory {
                memory.transfer_piece(tag, fd.0, Access::Write, offset, bytes);
                return Step::Going;
            }
            from = bytes.as_ptr();
            change = Change::Write { offset, bytes, durable: false };
        } else {
            from = ZERO.0.as_ptr();
            change = Change::Zero { offset, len: len.into() };
        }
        if let Some(log) = self.layout.write_log() {
            slot.logged = log.begin(fd.0, change);
        }
        let entry = opcode::Write::new(fd, from, len).offset(offset).build();
        Self::push(io, tag, entry);
        Step::Going
    }
}
