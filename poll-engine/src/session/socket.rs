//! A connected vhost-user socket: whole messages with their descriptors in, replies out. Waiting is interruptible, so
//! that half a message, or a peer that does not read, holds up nobody but its own session, and not its end.
#![allow(unsafe_code)] // descriptors arrive as numbers

use std::io::{self, IoSliceMut, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use nix::cmsg_space;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};

use super::wire::{HEADER_LEN, Header, MAX_FDS, Request, WireError};

/// How long a peer may leave a reply unread.
const WRITE_TIMEOUT: Duration = Duration::from_secs(10);

/// Why a session's socket cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    /// The peer is gone, in the middle of a message.
    #[error("the front end went away in the middle of a message")]
    Truncated,
    /// More descriptors than any message has.
    #[error("more than {MAX_FDS} descriptors with one message")]
    TooManyFds,
    /// Not vhost-user.
    #[error(transparent)]
    Wire(#[from] WireError),
    /// A refusal that the protocol has no reply for.
    #[error("request {0} was refused and has no other way to say so")]
    Refused(u32),
    /// The socket fails.
    #[error("vhost-user socket: {0}")]
    Io(#[from] io::Error),
}

/// What waiting on the socket brought.
#[derive(Debug)]
pub enum Incoming {
    /// A whole message.
    Message(Header, Result<Request, WireError>, Vec<OwnedFd>),
    /// The peer closed the connection between messages.
    Closed,
    /// Somebody in this process rang.
    Rung,
}

/// One connection.
#[derive(Debug)]
pub struct Connection {
    stream: UnixStream,
}

impl Connection {
    /// Wraps a connected stream.
    pub fn new(stream: UnixStream) -> io::Result<Connection> {
        stream.set_nonblocking(false)?;
        stream.set_write_timeout(Some(WRITE_TIMEOUT))?;
        Ok(Connection { stream })
    }

    /// Waits for a message, or for `bell` (an eventfd) to ring before one has begun.
    pub fn receive(
        &self,
        bell: BorrowedFd<'_>,
        stopping: impl Fn() -> bool,
    ) -> Result<Incoming, SocketError> {
        let mut fds = Vec::new();
        let mut header = [0; HEADER_LEN];
        match self.fill(&mut header, &mut fds, bell, true, &stopping)? {
            Filled::All => {}
            Filled::None => return Ok(Incoming::Closed),
            Filled::Rung => return Ok(Incoming::Rung),
        }
        let header = Header::decode(header)?;
        let mut payload = vec![0; header.size];
        if let Filled::None | Filled::Rung = self.fill(&mut payload, &mut fds, bell, false, &stopping)? {
            return Err(SocketError::Truncated);
        }
        Ok(Incoming::Message(header, Request::decode(header.request, &payload), fds))
    }

    /// Sends a whole reply.
    pub fn send(&self, bytes: &[u8]) -> io::Result<()> {
        (&self.stream).write_all(bytes)
    }

    fn fill(
        &self,
        mut into: &mut [u8],
        fds: &mut Vec<OwnedFd>,
        bell: BorrowedFd<'_>,
        mut at_start: bool,
        stopping: &impl Fn() -> bool,
    ) -> Result<Filled, SocketError> {
        while !into.is_empty() {
            if stopping() {
                return Ok(Filled::Rung);
            }
            let mut waits =
                [PollFd::new(self.stream.as_fd(), PollFlags::POLLIN), PollFd::new(bell, PollFlags::POLLIN)];
            // Once a message has begun the bell is kept for after it: only a request to stop cuts it short, for which
            // the wait ends now and then.
            let (of, timeout) = if at_start { (2, PollTimeout::NONE) } else { (1, PollTimeout::from(100u8)) };
            match poll(&mut waits[..of], timeout) {
                Ok(_) => {}
                Err(nix::Error::EINTR) => continue,
                Err(e) => return Err(io::Error::from(e).into()),
            }
            let [readable, rung] = waits.map(|w| w.any().unwrap_or(false));
            if rung {
                return Ok(Filled::Rung);
            }
            if !readable {
                continue;
            }
            let n = self.receive_some(into, fds)?;
            if n == 0 {
                return if at_start { Ok(Filled::None) } else { Err(SocketError::Truncated) };
            }
            into = &mut into[n..];
            at_start = false;
        }
        Ok(Filled::All)
    }

    fn receive_some(&self, into: &mut [u8], fds: &mut Vec<OwnedFd>) -> Result<usize, SocketError> {
        let mut space = cmsg_space!([RawFd; MAX_FDS]);
        let mut parts = [IoSliceMut::new(into)];
        let flags = MsgFlags::MSG_CMSG_CLOEXEC;
        let message = match recvmsg::<()>(self.stream.as_raw_fd(), &mut parts, Some(&mut space), flags) {
            Ok(message) => message,
            Err(nix::Error::ECONNRESET) => return Ok(0),
            Err(e) => return Err(io::Error::from(e).into()),
        };
        for control in message.cmsgs().map_err(io::Error::from)? {
            if let ControlMessageOwned::ScmRights(raw) = control {
                // SAFETY: the kernel has just made these descriptors for us; nobody else knows them.
                fds.extend(raw.into_iter().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }));
            }
        }
        if fds.len() > MAX_FDS || message.flags.contains(MsgFlags::MSG_CTRUNC) {
            return Err(SocketError::TooManyFds);
        }
        Ok(message.bytes)
    }
}

enum Filled {
    All,
    None,
    Rung,
}

/// Takes over a descriptor this process inherited, by its number.
pub fn inherit(fd: RawFd) -> io::Result<OwnedFd> {
    if fd < 0 {
        return Err(io::Error::from_raw_os_error(libc::EBADF));
    }
    // SAFETY: fcntl on any number is harmless; it tells whether the number is an open descriptor.
    if unsafe { libc::fcntl(fd, libc::F_SETFD, libc::FD_CLOEXEC) } < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: it is open, and the command line has given it to us: nothing else in this process uses it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}
