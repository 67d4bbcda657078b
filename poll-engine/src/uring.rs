//! The io_uring of a reactor: its only way into the kernel while queues run, and its only place to sleep.
#![allow(unsafe_code)] // submission entries carry raw addresses

mod buffers;
pub mod commands;

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::time::Duration;

use io_uring::register::Restriction;
use io_uring::{EnterFlags, IoUring, opcode, squeue, types};
use tracing::info;

use self::buffers::Buffers;
use crate::memory::map::MemoryMap;
use crate::memory::slice::GuestSlice;
use crate::probes;

/// What a ring carries out, and nothing else: io_uring opens files and sockets as well, and no filter of system calls sees
/// that. With the ring, a thread that has lost its wits has only what is open.
const OPERATIONS: [u8; 12] = [
    opcode::Read::CODE,
    opcode::Write::CODE,
    opcode::Readv::CODE,
    opcode::Writev::CODE,
    opcode::ReadFixed::CODE,
    opcode::WriteFixed::CODE,
    opcode::Fsync::CODE,
    opcode::Fallocate::CODE,
    opcode::PollAdd::CODE,
    opcode::PollRemove::CODE,
    opcode::AsyncCancel::CODE,
    opcode::Timeout::CODE,
];
/// `IORING_REGISTER_BUFFERS_UPDATE`: guest memory comes and goes.
const REGISTER_BUFFERS_UPDATE: u8 = 16;

/// One completion, copied out of the ring before anything acts on it.
#[derive(Clone, Copy, Debug)]
pub struct Completion {
    /// What the submission was labelled with.
    pub user_data: u64,
    /// A count, or a negated errno.
    pub result: i32,
    /// A multishot operation goes on.
    pub more: bool,
}

/// Which guest memory is registered with io_uring. Registering pins it, so that the kernel need not look pages up for
/// each direct I/O; it also makes all of it resident and counts against the memlock limit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum FixedBuffers {
    /// Memory in huge pages, which is resident and unmovable anyway.
    #[default]
    Auto,
    /// All guest memory, as far as limits permit.
    On,
    /// None.
    Off,
}

/// An io_uring with its table of buffers. It has none of files: one that is registered stays open until the whole ring is
/// taken down, which the kernel does up to 0.1 s after the process was killed, and the next process waits for its locks.
pub struct Uring {
    ring: IoUring,
    queued: u32,
    /// Operations that will complete: while there are any, the kernel may have work for us to run.
    outstanding: usize,
    buffers: Buffers,
}

/// What the kernel locks for a ring of so many entries: submissions; completions, four times as many, with the indices.
pub(crate) fn locked_bytes(entries: u32) -> u64 {
    const PAGE: u64 = 4096;
    const HEAD: u64 = 512;
    let entries = u64::from(entries);
    (64 * entries).next_multiple_of(PAGE) + (HEAD + (4 * 16 + 4) * entries).next_multiple_of(PAGE)
}

impl Uring {
    /// Sets a ring up for the calling thread, which must be the only one to use it.
    pub fn new(entries: u32) -> io::Result<Uring> {
        let ring = Self::set_up(entries)?;
        let buffers = Buffers::new(&ring.submitter(), locked_bytes(entries));
        let operations = OPERATIONS.map(Restriction::sqe_op).into_iter();
        let mut allowed: Vec<_> =
            operations.chain([Restriction::register_op(REGISTER_BUFFERS_UPDATE)]).collect();
        ring.submitter().register_restrictions(&mut allowed)?;
        ring.submitter().register_enable_rings()?;
        Ok(Uring { ring, queued: 0, outstanding: 0, buffers })
    }

    fn set_up(entries: u32) -> io::Result<IoUring> {
        let builder = || {
            let mut b = IoUring::builder();
            b.setup_clamp().setup_cqsize(entries * 4).setup_r_disabled().dontfork();
            b
        };
        let wanted =
            builder().setup_single_issuer().setup_defer_taskrun().setup_taskrun_flag().build(entries);
        let deferred = match wanted {
            Ok(ring) => return Ok(ring),
            Err(e) => e,
        };
        info!(
            "io_uring: no deferred task work on this kernel ({deferred}; it came with Linux 6.1), using cooperative"
        );
        match builder().setup_coop_taskrun().setup_taskrun_flag().build(entries) {
            Ok(ring) => Ok(ring),
            Err(e) => {
                info!(
                    "io_uring: no cooperative task work either ({e}; it came with Linux 5.19), using plain rings"
                );
                builder().build(entries)
            }
        }
    }

    /// Queues a submission, making room by submitting when the ring is full.
    ///
    /// # Safety
    /// Everything the entry points to must stay valid until its completion has been reaped, and its descriptor until
    /// it has been submitted.
    #[inline]
    pub unsafe fn push(&mut self, entry: &squeue::Entry) {
        self.outstanding += 1;
        loop {
            // SAFETY: passed on to our caller.
            if unsafe { self.ring.submission().push(entry) }.is_ok() {
                self.queued += 1;
                return;
            }
            self.submit();
        }
    }

    /// As [`push`](Self::push), of two that are linked: a link does not reach from one submit to the next.
    ///
    /// # Safety
    /// The same, for both.
    pub unsafe fn push_linked(&mut self, first: squeue::Entry, second: squeue::Entry) {
        let entries = [first.flags(squeue::Flags::IO_LINK), second];
        self.outstanding += 2;
        loop {
            // SAFETY: passed on to our caller.
            if unsafe { self.ring.submission().push_multiple(&entries) }.is_ok() {
                self.queued += 2;
                return;
            }
            self.submit();
        }
    }

    /// Hands queued submissions to the kernel and runs its deferred work, without waiting. No system call when there
    /// is nothing to do.
    #[inline]
    pub fn submit(&mut self) {
        if self.queued > 0 || (self.outstanding > 0 && self.kernel_has_work()) {
            self.enter(0);
        }
    }

    fn kernel_has_work(&mut self) -> bool {
        let sq = self.ring.submission();
        sq.taskrun() || sq.cq_overflow()
    }

    /// Submissions not yet handed to the kernel.
    #[inline]
    pub fn queued(&self) -> u32 {
        self.queued
    }

    /// Submits, and sleeps until there is at least one completion (or a signal), at most for `limit` if there is one.
    pub fn wait(&mut self, limit: Option<Duration>) {
        if !self.ring.completion().is_empty() {
            return;
        }
        probes::sleep();
        self.wait_for(limit);
        probes::wake();
    }

    fn wait_for(&mut self, limit: Option<Duration>) {
        let Some(limit) = limit else { return self.enter(1) };
        probes::submit(self.queued);
        let time = types::Timespec::from(limit);
        let args = types::SubmitArgs::new().timespec(&time);
        let entered = self.ring.submitter().submit_with_args(1, &args);
        self.entered(entered);
    }

    fn enter(&mut self, want: u32) {
        let queued = self.ring.submission().len() as u32;
        probes::submit(queued);
        // GETEVENTS always: deferred completions are only run by an enter that asks for them.
        let flags = EnterFlags::GETEVENTS.bits();
        // SAFETY: no argument is passed; the entries were vouched for when pushed.
        let entered = unsafe { self.ring.submitter().enter::<libc::sigset_t>(queued, want, flags, None) };
        self.entered(entered);
    }

    #[inline]
    fn entered(&mut self, entered: io::Result<usize>) {
        match entered {
            Ok(_) => {}
            // ETIME: the limit of a wait. EINTR: a signal. EAGAIN, EBUSY: out of memory, or completions must be reaped
            // first; both come right by reaping and trying again, which the reactor's next round does.
            Err(e)
                if matches!(
                    e.raw_os_error(),
                    Some(libc::ETIME | libc::EINTR | libc::EAGAIN | libc::EBUSY)
                ) => {}
            // Anything else is a mistake of ours in the arguments.
            Err(e) => panic!("io_uring_enter: {e}"),
        }
        self.queued = self.ring.submission().len() as u32;
    }

    /// Appends all completions to `into`.
    #[inline]
    pub fn reap(&mut self, into: &mut Vec<Completion>) {
        if self.outstanding == 0 {
            return;
        }
        for cqe in self.ring.completion() {
            let more = io_uring::cqueue::more(cqe.flags());
            self.outstanding -= usize::from(!more);
            into.push(Completion { user_data: cqe.user_data(), result: cqe.result(), more });
        }
    }

    /// Makes the registered buffers those of `maps`: regions that are new are registered, those gone are released.
    pub fn sync_buffers<'a>(&mut self, mode: FixedBuffers, maps: impl Iterator<Item = &'a MemoryMap>) {
        self.buffers.sync(&self.ring.submitter(), mode, maps);
    }

    /// The registered buffer that holds all of `slice`.
    #[inline]
    pub fn fixed_buffer(&self, slice: &GuestSlice<'_>) -> Option<u16> {
        self.buffers.holding(slice)
    }

    /// Watches `fd` for readability until cancelled: a completion for every wake-up of it.
    pub fn watch(&mut self, fd: BorrowedFd<'_>, user_data: u64) {
        let poll = opcode::PollAdd::new(types::Fd(fd.as_raw_fd()), libc::POLLIN as u32).multi(true).build();
        // SAFETY: the entry points to nothing; `submit` follows while the descriptor is borrowed.
        unsafe { self.push(&poll.user_data(user_data)) };
        self.enter(0);
    }

    /// Ends a watch, completing it with an error.
    pub fn unwatch(&mut self, user_data: u64, own_user_data: u64) {
        let cancel = opcode::PollRemove::new(user_data).build().user_data(own_user_data);
        // SAFETY: the entry points to nothing.
        unsafe { self.push(&cancel) };
        self.enter(0);
    }

    /// Cancels an operation with this label that has not been completed, with the next submit.
    pub fn cancel(&mut self, user_data: u64, own_user_data: u64) {
        let cancel = opcode::AsyncCancel::new(user_data).build().user_data(own_user_data);
        // SAFETY: the entry points to nothing.
        unsafe { self.push(&cancel) };
    }

    /// Signals an eventfd with the next submit. Going through the ring, a descriptor that its peer has filled or made
    /// blocking cannot hold this thread up.
    pub fn signal(&mut self, fd: BorrowedFd<'_>, user_data: u64) {
        static ONE: u64 = 1;
        let write = opcode::Write::new(types::Fd(fd.as_raw_fd()), std::ptr::from_ref(&ONE).cast(), 8).build();
        // SAFETY: ONE is static. The descriptor belongs to a queue of this reactor, which submits before it lets any
        // queue or descriptor go.
        unsafe { self.push(&write.user_data(user_data)) };
    }
}
