//! Which of two processes serves: an eventfd that holds a 1, and whoever reads it has won. The kernel gives it to one
//! reader, and to nobody else ever after, whatever either process does or when it dies.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use nix::sys::eventfd::{EfdFlags, EventFd};

/// The right to serve, to be taken once by one of two processes.
#[derive(Debug)]
pub struct Baton(OwnedFd);

impl Baton {
    /// One that nobody has taken.
    pub fn new() -> io::Result<Baton> {
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        Ok(Baton(EventFd::from_value_and_flags(1, flags)?.into()))
    }

    /// The other end of one that was passed to us.
    pub fn received(fd: OwnedFd) -> Baton {
        Baton(fd)
    }

    /// Takes it: true for exactly one caller in all processes.
    pub fn take(&self) -> bool {
        loop {
            match nix::unistd::read(&self.0, &mut [0; 8]) {
                Ok(n) => return n == 8,
                Err(nix::Error::EINTR) => {}
                Err(_) => return false,
            }
        }
    }
}

impl AsFd for Baton {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_of_many_takes_it() {
        for _ in 0..100 {
            let baton = Baton::new().unwrap();
            let other = Baton::received(baton.as_fd().try_clone_to_owned().unwrap());
            let won = std::thread::scope(|s| {
                let threads = [&baton, &other, &baton, &other].map(|b| s.spawn(|| b.take()));
                threads.map(|t| t.join().unwrap()).iter().filter(|won| **won).count()
            });
            assert_eq!(won, 1);
            assert!(!other.take() && !baton.take());
        }
    }
}
