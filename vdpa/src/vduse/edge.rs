//! The system calls of VDUSE, and nothing else: the place where a test puts a kernel of its own.
#![allow(unsafe_code)] // ioctl

use std::fmt::Debug;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

/// An open `/dev/vduse/control` or `/dev/vduse/NAME`. All calls are made without waiting.
pub trait Edge: Debug + Send + Sync {
    /// `ioctl(2)` with a structure that is as long as its number says, at least.
    fn ioctl(&self, number: u64, structure: &mut [u8]) -> io::Result<()>;

    /// The same, for one that returns a descriptor.
    fn ioctl_fd(&self, number: u64, structure: &mut [u8]) -> io::Result<OwnedFd>;

    /// `read(2)`.
    fn read(&self, into: &mut [u8]) -> io::Result<usize>;

    /// `write(2)`.
    fn write(&self, bytes: &[u8]) -> io::Result<usize>;

    /// To wait for with `poll(2)`.
    fn fd(&self) -> BorrowedFd<'_>;
}

/// The kernel.
#[derive(Debug)]
pub struct Kernel(pub OwnedFd);

impl Kernel {
    fn call(&self, number: u64, structure: &mut [u8]) -> io::Result<i32> {
        let size = number >> 16 & 0x3fff;
        if (structure.len() as u64) < size {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        // SAFETY: the kernel writes no more than the size that is in the number, which the structure has. (It reads bytes
        // behind that for two of the calls, as many as the structure says; `Node` and `Control` put them there.)
        let result = unsafe { libc::ioctl(self.0.as_raw_fd(), number, structure.as_mut_ptr()) };
        if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
    }
}

impl Edge for Kernel {
    fn ioctl(&self, number: u64, structure: &mut [u8]) -> io::Result<()> {
        self.call(number, structure).map(drop)
    }

    fn ioctl_fd(&self, number: u64, structure: &mut [u8]) -> io::Result<OwnedFd> {
        let fd = self.call(number, structure)?;
        // SAFETY: a descriptor that the kernel has just made for us, and that nobody else knows.
        Ok(unsafe { OwnedFd::from_raw_fd(fd) })
    }

    fn read(&self, into: &mut [u8]) -> io::Result<usize> {
        Ok(nix::unistd::read(&self.0, into)?)
    }

    fn write(&self, bytes: &[u8]) -> io::Result<usize> {
        Ok(nix::unistd::write(&self.0, bytes)?)
    }

    fn fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
