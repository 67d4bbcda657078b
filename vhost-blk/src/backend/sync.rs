//! Files that are memory (tmpfs): the copy is all there is to wait for, so it is made at once.
//!
//! io_uring hands reads and writes of such files to worker threads, since their file systems have no non-blocking
//! path; a plain system call from the reactor costs less than half of that.
#![allow(unsafe_code)] // preadv and pwritev take addresses of guest memory

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;

use nix::fcntl::{FallocateFlags, fallocate};
use poll_engine::engine::queue::{Queue, Request};
use poll_engine::engine::reactor::Io;
use poll_engine::ring::chain::{ChainView, Slices};

use super::{Backend, Begun, Failure, Outcome};
use crate::disk::{Access, Disk};
use crate::request::{HEADER, Operation, Range, ranges};

/// Most iovecs of one call; longer requests take several.
const MAX_IOVECS: usize = 256;

/// Reads and writes files that are memory.
pub struct Copier {
    iovecs: Vec<libc::iovec>,
}

// SAFETY: the iovecs are filled, used and cleared within one call; between calls they point to nothing.
unsafe impl Send for Copier {}

/// The back end of one queue.
pub struct SyncBackend {
    file: File,
    disk: Arc<Disk>,
    ranges: Vec<Range>,
    copier: Copier,
}

impl SyncBackend {
    /// On `file`.
    pub fn new(file: File, disk: Arc<Disk>) -> SyncBackend {
        SyncBackend { file, disk, ranges: Vec::new(), copier: Copier::default() }
    }

    /// Discards and zeroes. Space that must stay reserved is reserved anew.
    fn clear(&mut self, operation: Operation, chain: &ChainView<'_>) -> Result<(), Failure> {
        ranges(chain, &self.disk, operation, &mut self.ranges)?;
        for range in &self.ranges {
            let (offset, len) = (range.offset as i64, range.len as i64);
            let keep = FallocateFlags::FALLOC_FL_KEEP_SIZE;
            let punched = fallocate(&self.file, FallocateFlags::FALLOC_FL_PUNCH_HOLE | keep, offset, len);
            let reserve = matches!(operation, Operation::WriteZeroes { .. }) && !range.unmap;
            let done = if reserve {
                punched.and_then(|()| fallocate(&self.file, keep, offset, len))
            } else {
                punched
            };
            done.map_err(|e| Failure::Io { what: "fallocate", error: e.into() })?;
        }
        Ok(())
    }
}

impl Default for Copier {
    fn default() -> Copier {
        Copier { iovecs: Vec::with_capacity(MAX_IOVECS) }
    }
}

impl Copier {
    /// Between the file, from `offset` on, and guest memory.
    pub fn transfer(
        &mut self,
        fd: RawFd,
        access: Access,
        mut offset: u64,
        mut slices: Slices<'_>,
    ) -> io::Result<()> {
        loop {
            let part = slices.by_ref().take(MAX_IOVECS);
            self.iovecs.clear();
            self.iovecs
                .extend(part.map(|s| libc::iovec { iov_base: s.host_addr().cast(), iov_len: s.len() }));
            let len: usize = self.iovecs.iter().map(|v| v.iov_len).sum();
            if len == 0 {
                return Ok(());
            }
            // SAFETY: the iovecs are guest slices of the chain at hand, whose map the queue holds during this call.
            unsafe { self.all(fd, access, offset, len)? };
            offset += len as u64;
        }
    }

    /// Between the file, from `offset` on, and bytes of our own.
    pub fn transfer_own(
        &mut self,
        fd: RawFd,
        access: Access,
        offset: u64,
        bytes: &mut [u8],
    ) -> io::Result<()> {
        self.iovecs.clear();
        self.iovecs.push(libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() });
        // SAFETY: the one iovec is what we have borrowed.
        unsafe { self.all(fd, access, offset, bytes.len()) }
    }

    /// All `left` bytes of the iovecs, which change on the way.
    ///
    /// # Safety
    /// The iovecs are memory that may be read, or written, during this call, of `left` bytes.
    unsafe fn all(&mut self, fd: RawFd, access: Access, mut offset: u64, mut left: usize) -> io::Result<()> {
        let mut first = 0;
        while left > 0 {
            let iovecs = &self.iovecs[first..];
            let count = iovecs.len() as i32;
            let (at, one) = (offset as i64, iovecs[0]);
            // SAFETY: as the caller says; `skip` leaves parts of the same memory.
            let n = unsafe {
                match (access, count) {
                    (Access::Read, 1) => libc::pread(fd, one.iov_base, one.iov_len, at),
                    (Access::Read, _) => libc::preadv(fd, iovecs.as_ptr(), count, at),
                    (Access::Write, 1) => libc::pwrite(fd, one.iov_base, one.iov_len, at),
                    (Access::Write, _) => libc::pwritev(fd, iovecs.as_ptr(), count, at),
                }
            };
            let n = match usize::try_from(n) {
                // The end of a file that has shrunk.
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(n) => n,
                Err(_) => match io::Error::last_os_error() {
                    e if e.kind() == io::ErrorKind::Interrupted => continue,
                    e => return Err(e),
                },
            };
            left -= n;
            offset += n as u64;
            first += skip(&mut self.iovecs[first..], n);
        }
        Ok(())
    }
}

/// Moves iovecs on by `n` bytes; returns how many of them are done with.
fn skip(iovecs: &mut [libc::iovec], mut n: usize) -> usize {
    for (i, v) in iovecs.iter_mut().enumerate() {
        if n < v.iov_len {
            v.iov_base = v.iov_base.wrapping_byte_add(n);
            v.iov_len -= n;
            return i;
        }
        n -= v.iov_len;
    }
    iovecs.len()
}

impl Backend for SyncBackend {
    fn begin(
        &mut self,
        request: Request,
        operation: Operation,
        queue: &mut Queue,
        _io: &mut Io<'_>,
    ) -> Begun {
        let (chain, fd) = (queue.chain(), self.file.as_raw_fd());
        let failed = |what| move |error| Failure::Io { what, error };
        let done = match operation {
            Operation::Read { offset, len } => {
                let into = chain.writable(0, len);
                self.copier.transfer(fd, Access::Read, offset, into).map_err(failed("read"))
            }
            Operation::Write { offset, len } => {
                let from = chain.readable(HEADER, len);
                self.copier.transfer(fd, Access::Write, offset, from).map_err(failed("write"))
            }
            Operation::Discard { .. } | Operation::WriteZeroes { .. } => self.clear(operation, &chain),
            // Nothing is more durable than memory on memory.
            Operation::Flush | Operation::GetId { .. } => Ok(()),
        };
        Begun::Over(request, done.map_or_else(Outcome::Failed, |()| Outcome::Done))
    }
}
