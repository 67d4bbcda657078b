//! Waiting on descriptors that crates give out as numbers only.
#![allow(unsafe_code)] // borrows such descriptors for a system call

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::time::Duration;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, ppoll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::time::TimeSpec;

/// Told when a job has ended.
#[derive(Debug)]
pub struct Done(EventFd);

impl Done {
    /// Not told yet.
    pub fn new() -> nix::Result<Done> {
        Ok(Done(EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?))
    }

    /// A job has ended.
    pub fn tell(&self) {
        // A counter that is full has been told.
        let _ = self.0.write(1);
    }
}

/// Waits until `done` is told, a socket is hung up, or for so long; returns which sockets are hung up.
pub fn hung_up(sockets: impl Iterator<Item = RawFd>, done: &Done, wait: Duration) -> nix::Result<Vec<bool>> {
    let mut fds: Vec<_> = sockets
        .map(|fd| {
            // SAFETY: the sockets are those of sessions that the caller keeps while it waits.
            PollFd::new(unsafe { BorrowedFd::borrow_raw(fd) }, PollFlags::empty())
        })
        .collect();
    fds.push(PollFd::new(done.0.as_fd(), PollFlags::POLLIN));
    match ppoll(&mut fds, Some(TimeSpec::from_duration(wait)), None) {
        Ok(_) | Err(Errno::EINTR) => {}
        Err(e) => return Err(e),
    }
    let up = PollFlags::POLLHUP | PollFlags::POLLERR;
    let told = fds.pop().and_then(|fd| fd.revents()).is_some_and(|e| !e.is_empty());
    let gone = fds.iter().map(|fd| fd.revents().is_some_and(|e| e.intersects(up))).collect();
    if told {
        let _ = done.0.read();
    }
    Ok(gone)
}

/// Sleeps until the call is there, and takes it, or for so long.
pub fn sleep(call: &vmm_sys_util::eventfd::EventFd, wait: Option<Duration>) {
    // SAFETY: the descriptor is the eventfd's, which is borrowed for longer than this call.
    let fd = unsafe { BorrowedFd::borrow_raw(call.as_raw_fd()) };
    let timeout = wait.map(TimeSpec::from_duration);
    if ppoll(&mut [PollFd::new(fd, PollFlags::POLLIN)], timeout, None).is_ok_and(|n| n > 0) {
        let _ = call.read();
    }
}
