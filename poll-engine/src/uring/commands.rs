//! An io_uring for a device's own commands (`IORING_OP_URING_CMD`), which are twice as large as a reactor's entries, and
//! may complete only when they are polled for. It belongs to one queue's handler, which looks at it in each round; the
//! reactor's own ring waits for it where the reactor sleeps.
#![allow(unsafe_code)] // submission entries carry raw addresses

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use io_uring::cqueue::Entry32;
use io_uring::register::Restriction;
use io_uring::squeue::Entry128;
use io_uring::{EnterFlags, IoUring, opcode};

use super::buffers::Buffers;
use super::{Completion, FixedBuffers, REGISTER_BUFFERS_UPDATE, locked_bytes};
use crate::confine;
use crate::memory::map::MemoryMap;
use crate::memory::slice::GuestSlice;

/// A ring for commands (Linux 5.19).
pub struct CommandRing {
    ring: IoUring<Entry128, Entry32>,
    polled: bool,
    queued: bool,
    /// Commands that will complete.
    outstanding: usize,
    buffers: Buffers,
}

impl CommandRing {
    /// Sets a ring up that carries out commands and nothing else, for one thread at a time. Completions of a `polled` one
    /// (`IORING_SETUP_IOPOLL`) interrupt nobody: somebody has to look for them.
    pub fn new(entries: u32, polled: bool) -> io::Result<CommandRing> {
        // Who adds a disk to a running daemon may make none.
        confine::make(move || CommandRing::set_up(entries, polled))?
    }

    fn set_up(entries: u32, polled: bool) -> io::Result<CommandRing> {
        let mut builder = IoUring::builder();
        builder.setup_r_disabled().dontfork();
        if polled {
            builder.setup_iopoll();
        } else {
            builder.setup_coop_taskrun().setup_taskrun_flag();
        }
        let ring = builder.build(entries)?;
        // Its entries are twice as large.
        let buffers = Buffers::new(&ring.submitter(), locked_bytes(2 * entries));
        let mut allowed = [
            Restriction::sqe_op(opcode::UringCmd80::CODE),
            Restriction::register_op(REGISTER_BUFFERS_UPDATE),
        ];
        ring.submitter().register_restrictions(&mut allowed)?;
        ring.submitter().register_enable_rings()?;
        Ok(CommandRing { ring, polled, queued: false, outstanding: 0, buffers })
    }

    /// Whether completions have to be polled for.
    pub fn is_polled(&self) -> bool {
        self.polled
    }

    /// Commands that have not been reaped.
    #[inline]
    pub fn outstanding(&self) -> usize {
        self.outstanding
    }

    /// Queues a command, making room by submitting when the ring is full.
    ///
    /// # Safety
    /// Everything the entry points to must stay valid until its completion has been reaped, and its descriptor until
    /// it has been submitted.
    #[inline]
    pub unsafe fn push(&mut self, entry: &Entry128) {
        self.outstanding += 1;
        self.queued = true;
        // SAFETY: passed on to our caller.
        while unsafe { self.ring.submission().push(entry) }.is_err() {
            self.enter(0);
        }
    }

    /// Hands queued commands to the kernel, and has it look for completions. No system call where there is nothing to do.
    #[inline]
    pub fn submit(&mut self) {
        if self.queued || self.outstanding > 0 && (self.polled || self.kernel_has_work()) {
            self.enter(0);
        }
    }

    fn kernel_has_work(&mut self) -> bool {
        let sq = self.ring.submission();
        sq.taskrun() || sq.cq_overflow()
    }

    /// Submits, and waits for a completion.
    pub fn wait(&mut self) {
        self.enter(1);
    }

    fn enter(&mut self, want: u32) {
        let queued = self.ring.submission().len() as u32;
        let flags = EnterFlags::GETEVENTS.bits();
        // SAFETY: no argument is passed; the entries were vouched for when pushed.
        let entered = unsafe { self.ring.submitter().enter::<libc::sigset_t>(queued, want, flags, None) };
        match entered {
            // EINTR: a signal. EAGAIN, EBUSY: out of memory, or completions must be reaped first; the next round does.
            Ok(_) => {}
            Err(e) if matches!(e.raw_os_error(), Some(libc::EINTR | libc::EAGAIN | libc::EBUSY)) => {}
            // Of the driver that was asked; what becomes of a command is said by its completion.
            Err(_) if self.polled => {}
            Err(e) => panic!("io_uring_enter: {e}"),
        }
        self.queued = !self.ring.submission().is_empty();
    }

    /// Takes a completion, if there is one.
    #[inline]
    pub fn reap(&mut self) -> Option<Completion> {
        let cqe = self.ring.completion().next()?;
        self.outstanding -= 1;
        Some(Completion { user_data: cqe.user_data(), result: cqe.result(), more: false })
    }

    /// Makes guest memory the registered buffers.
    pub fn sync_buffers(&mut self, mode: FixedBuffers, map: Option<&MemoryMap>) {
        self.buffers.sync(&self.ring.submitter(), mode, map.into_iter());
    }

    /// The registered buffer that holds all of `slice`.
    #[inline]
    pub fn fixed_buffer(&self, slice: &GuestSlice<'_>) -> Option<u16> {
        self.buffers.holding(slice)
    }
}

impl AsFd for CommandRing {
    /// Readable where there are completions.
    fn as_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the ring is open for as long as it is borrowed.
        unsafe { BorrowedFd::borrow_raw(self.ring.as_raw_fd()) }
    }
}

impl std::fmt::Debug for CommandRing {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("CommandRing")
            .field("polled", &self.polled)
            .field("outstanding", &self.outstanding)
            .finish_non_exhaustive()
    }
}
