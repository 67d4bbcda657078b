//! What threads hand things over with. The files that do it take their primitives from here, so that the model checker
//! can run these very files on primitives of its own (`poll-engine/model`).

use std::io;
use std::os::fd::{AsFd, BorrowedFd};

use nix::sys::eventfd::{EfdFlags, EventFd};

pub(crate) use crossbeam::channel::{Receiver, Sender, unbounded};
pub(crate) use crossbeam::sync::WaitGroup;
pub(crate) use std::sync::Arc;
pub(crate) use std::sync::atomic::{AtomicBool, Ordering, fence};

/// A non-blocking eventfd to wake one thread with.
#[derive(Debug)]
pub struct Bell(EventFd);

impl Bell {
    /// A silent one.
    pub fn new() -> io::Result<Bell> {
        Ok(Bell(EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?))
    }

    /// Wakes whoever waits for [`fd`](Self::fd) to be readable, now or when it next waits.
    pub fn ring(&self) {
        // A counter that is full (nobody ever reads it) has rung often enough.
        let _ = self.0.write(1);
    }

    /// Silences it. What it rang for is to be looked at afterwards, or a ring in between is lost.
    pub fn heard(&self) {
        let _ = self.0.read();
    }

    /// The descriptor to wait for.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
