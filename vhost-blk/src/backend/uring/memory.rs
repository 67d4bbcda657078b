//! What there is nothing to wait for: zeros, and files that are memory, which plain system calls read and write at once.
//!
//! With a cipher, a request of up to a piece is done as it is begun. Longer ones go on with one in each round of the reactor,
//! so that it is not they for which neighbours wait.

use std::io;
use std::os::fd::RawFd;

use poll_engine::ring::chain::{ChainView, Slices};

use super::UringBackend;
use super::slot::data;
use crate::backend::bounce::Bounce;
use crate::backend::layout::{Layout, Place};
use crate::backend::sync::Copier;
use crate::backend::{Failure, Outcome};
use crate::disk::Access;
use crate::request::Operation;

/// Bytes of a request with a cipher that weigh as much as one request more: with these, a disk at depth 256 leaves its
/// neighbours twice the p99 that they have alone (docs/performance.md).
pub(super) const HEAVY: u32 = 8 << 10;

/// Bytes that are en- or deciphered together, in a buffer that a cache of the first level may hold.
const CHUNK: u32 = 32 << 10;

/// How files in memory are read and written.
#[derive(Default)]
pub(super) struct Memory {
    copier: Copier,
    /// Where a cipher works on what is done as it is begun.
    buffer: Option<Bounce>,
    /// Most bytes of that.
    longest: u32,
    /// Whose piece has been read or written, and what came of it.
    piece: Option<(u32, i32)>,
}

impl Memory {
    /// As it is, or with a cipher, for pieces of so many bytes.
    pub fn new(ciphered: Option<u32>) -> Memory {
        Memory {
            buffer: ciphered.map(|_| Bounce::zeros(CHUNK as usize)),
            longest: ciphered.unwrap_or(u32::MAX),
            ..Memory::default()
        }
    }

    /// Reads or writes a piece of the request of `tag`, of which there is one at a time, since there is one buffer for them.
    pub fn transfer_piece(&mut self, tag: u32, fd: RawFd, access: Access, offset: u64, bytes: &mut [u8]) {
        let result = match self.copier.transfer_own(fd, access, offset, bytes) {
            Ok(()) => bytes.len() as i32,
            Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => 0,
            Err(e) => -e.raw_os_error().unwrap_or(libc::EIO),
        };
        assert!(self.piece.replace((tag, result)).is_none(), "two pieces at a time");
    }

    /// Whose piece it is to go on with.
    #[inline]
    pub fn take_piece(&mut self) -> Option<(u32, i32)> {
        self.piece.take()
    }

    /// Whether there is one.
    pub fn has_piece(&self) -> bool {
        self.piece.is_some()
    }
}

impl<L: Layout> UringBackend<L> {
    /// Whether a flush has nothing to do: nothing is more durable than memory on memory, and only images have tables, too.
    pub(super) fn is_durable(&self) -> bool {
        L::CIPHERS && self.memory.is_some()
    }

    /// Does what there is nothing to wait for. What does not lie together goes the long way.
    #[inline]
    pub(super) fn at_once(&mut self, operation: Operation, chain: &ChainView<'_>) -> Option<Outcome> {
        let (access, what, offset, len) = match operation {
            Operation::Read { offset, len } => (Access::Read, "read", offset, len),
            Operation::Write { offset, len } if self.memory.is_some() => {
                (Access::Write, "write", offset, len)
            }
            Operation::Flush if self.is_durable() => return Some(Outcome::Done),
            _ => return None,
        };
        match (self.layout.place(access, offset, len), &mut self.memory) {
            (Place::Zeros(n), _) if n == len && access == Access::Read => {
                chain.writable(0, len).for_each(|s| s.fill(0));
                Some(Outcome::Done)
            }
            (Place::File { fd, offset: at, len: n }, Some(memory)) if n == len && n <= memory.longest => {
                let Memory { copier, buffer, .. } = memory;
                let done = if let Some(buffer) = buffer {
                    (0..len).step_by(CHUNK as usize).try_for_each(|done| {
                        let n = CHUNK.min(len - done);
                        let (data, bytes) =
                            (data(chain, access, done, n), &mut buffer.bytes_mut()[..n as usize]);
                        let (at, offset) = (at + u64::from(done), offset + u64::from(done));
                        ciphered(&mut self.layout, copier, (fd, access, at), (offset, data), bytes)
                    })
                } else {
                    copier.transfer(fd, access, at, data(chain, access, 0, len))
                };
                let failed = |error| Outcome::Failed(Failure::Io { what, error });
                Some(done.map_or_else(failed, |()| Outcome::Done))
            }
            _ => None,
        }
    }
}

/// Between a file and guest memory, through a buffer: guests never have a chance to change what has been half deciphered.
#[inline]
fn ciphered<L: Layout>(
    layout: &mut L,
    copier: &mut Copier,
    (fd, access, at): (RawFd, Access, u64),
    (offset, data): (u64, Slices<'_>),
    bytes: &mut [u8],
) -> io::Result<()> {
    if access == Access::Write {
        layout.encipher(offset, data, bytes);
        return copier.transfer_own(fd, access, at, bytes);
    }
    copier.transfer_own(fd, access, at, bytes)?;
    layout.decipher(offset, bytes, data);
    Ok(())
}
