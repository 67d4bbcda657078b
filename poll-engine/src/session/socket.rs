//! A connected vhost-user socket: whole messages with their descriptors in, replies out. Waiting is interruptible and
//! goes on where it was, so that half a message holds up nobody.
#![allow(unsafe_code)] // descriptors arrive as numbers

use std::io::{self, IoSlice, IoSliceMut, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use nix::cmsg_space;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, recvmsg, sendmsg};

use super::wire::{HEADER_LEN, Header, MAX_FDS, Request, WireError};

/// Most descriptors the kernel takes with one message.
pub const SCM_MAX_FD: usize = 253;

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
    /// The device belongs to somebody else.
    #[error("queues cannot start: {0}")]
    Device(io::Error),
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
    /// Somebody in this process rang, or there is something else to see to.
    Rung,
}

/// What has come of a message that is not whole yet.
#[derive(Debug, Default)]
pub struct Partial {
    /// Header and payload, as far as they have come.
    pub bytes: Vec<u8>,
    /// Descriptors that came with them.
    pub fds: Vec<OwnedFd>,
}

/// One connection.
#[derive(Debug)]
pub struct Connection {
    stream: UnixStream,
    partial: Partial,
}

impl Connection {
    /// Wraps a connected stream.
    pub fn new(stream: UnixStream) -> io::Result<Connection> {
        Self::resume(stream, Partial::default())
    }

    /// Wraps a connected stream of whose next message `partial` has been read.
    pub fn resume(stream: UnixStream, partial: Partial) -> io::Result<Connection> {
        stream.set_nonblocking(false)?;
        stream.set_write_timeout(Some(WRITE_TIMEOUT))?;
        Ok(Connection { stream, partial })
    }

    /// The stream, and what has been read of its next message.
    pub fn parts(&self) -> (&UnixStream, &Partial) {
        (&self.stream, &self.partial)
    }

    /// Waits for a message, or for `bell` (an eventfd) to ring.
    pub fn receive(&mut self, bell: BorrowedFd<'_>) -> Result<Incoming, SocketError> {
        self.receive_or(bell, [None; 2], None)
    }

    /// Waits for a message, or for `bell` (an eventfd) to ring, one of `also` to be readable, or `limit` to be over. What has come
    /// of a message by then is kept for the next call.
    pub fn receive_or(
        &mut self,
        bell: BorrowedFd<'_>,
        also: [Option<BorrowedFd<'_>>; 2],
        limit: Option<Duration>,
    ) -> Result<Incoming, SocketError> {
        let limit = limit.map_or(PollTimeout::NONE, |l| PollTimeout::try_from(l).unwrap_or(PollTimeout::MAX));
        loop {
            let missing = match self.partial.bytes.first_chunk() {
                None => HEADER_LEN - self.partial.bytes.len(),
                Some(&header) => {
                    let header = Header::decode(header)?;
                    match HEADER_LEN + header.size - self.partial.bytes.len() {
                        0 => {
                            let Partial { bytes, fds } = std::mem::take(&mut self.partial);
                            let request = Request::decode(header.request, &bytes[HEADER_LEN..]);
                            return Ok(Incoming::Message(header, request, fds));
                        }
                        missing => missing,
                    }
                }
            };
            let mut waits = [self.stream.as_fd(), bell, also[0].unwrap_or(bell), also[1].unwrap_or(bell)]
                .map(|fd| PollFd::new(fd, PollFlags::POLLIN));
            match poll(&mut waits, limit) {
                Ok(0) => return Ok(Incoming::Rung),
                Ok(_) => {}
                Err(nix::Error::EINTR) => continue,
                Err(e) => return Err(io::Error::from(e).into()),
            }
            let [readable, rung @ ..] = waits.map(|w| w.any().unwrap_or(false));
            if rung.contains(&true) {
                return Ok(Incoming::Rung);
            }
            if readable && self.receive_some(missing)? == 0 {
                let partial = &self.partial;
                let between = partial.bytes.is_empty() && partial.fds.is_empty();
                return if between { Ok(Incoming::Closed) } else { Err(SocketError::Truncated) };
            }
        }
    }

    /// Sends a whole reply, and a descriptor with it.
    pub fn send(&self, bytes: &[u8], fd: Option<BorrowedFd<'_>>) -> io::Result<()> {
        let Some(fd) = fd else { return (&self.stream).write_all(bytes) };
        let fds = [fd.as_raw_fd()];
        let control = [ControlMessage::ScmRights(&fds)];
        let parts = [IoSlice::new(bytes)];
        let sent = loop {
            match sendmsg::<()>(self.stream.as_raw_fd(), &parts, &control, MsgFlags::MSG_NOSIGNAL, None) {
                Err(nix::Error::EINTR) => {}
                outcome => break outcome?,
            }
        };
        // The descriptor has gone with the first byte.
        (&self.stream).write_all(&bytes[sent..])
    }

    fn receive_some(&mut self, most: usize) -> Result<usize, SocketError> {
        let Partial { bytes, fds } = &mut self.partial;
        let have = bytes.len();
        bytes.resize(have + most, 0);
        let received = receive_with_fds(self.stream.as_fd(), &mut bytes[have..], fds, MAX_FDS);
        bytes.truncate(have + *received.as_ref().unwrap_or(&0));
        match received {
            Ok(n) => Ok(n),
            Err(e) if e.raw_os_error() == Some(libc::ECONNRESET) => Ok(0),
            Err(e) if e.raw_os_error() == Some(libc::EMSGSIZE) => Err(SocketError::TooManyFds),
            Err(e) => Err(e.into()),
        }
    }
}

/// Receives some bytes, and appends the descriptors that come with them to `fds`; `EMSGSIZE` when those are more than
/// `most_fds` in all, at most 253 of one message.
pub fn receive_with_fds(
    socket: BorrowedFd<'_>,
    into: &mut [u8],
    fds: &mut Vec<OwnedFd>,
    most_fds: usize,
) -> io::Result<usize> {
    let mut space = cmsg_space!([RawFd; SCM_MAX_FD]);
    let mut parts = [IoSliceMut::new(into)];
    let flags = MsgFlags::MSG_CMSG_CLOEXEC;
    let message = recvmsg::<()>(socket.as_raw_fd(), &mut parts, Some(&mut space), flags)?;
    for control in message.cmsgs()? {
        if let ControlMessageOwned::ScmRights(raw) = control {
            // SAFETY: the kernel has just made these descriptors for us; nobody else knows them.
            fds.extend(raw.into_iter().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }));
        }
    }
    if fds.len() > most_fds || message.flags.contains(MsgFlags::MSG_CTRUNC) {
        return Err(io::Error::from_raw_os_error(libc::EMSGSIZE));
    }
    Ok(message.bytes)
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

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::eventfd::{EfdFlags, EventFd};
    use nix::sys::socket::{ControlMessage, sendmsg};
    use std::io::IoSlice;

    #[test]
    fn half_a_message_is_kept_and_can_be_gone_on_with_by_another_connection() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let bell = EventFd::from_flags(EfdFlags::EFD_NONBLOCK).unwrap();
        // SET_VRING_KICK of queue 1, with its descriptor, cut in the payload.
        let message = [[12u32, 1, 8].map(u32::to_ne_bytes).concat(), 1u64.to_ne_bytes().to_vec()].concat();
        let rights = [ControlMessage::ScmRights(&[bell.as_fd().as_raw_fd()])];
        let first = [IoSlice::new(&message[..15])];
        sendmsg::<()>(theirs.as_raw_fd(), &first, &rights, MsgFlags::empty(), None).unwrap();
        let mut connection = Connection::new(ours.try_clone().unwrap()).unwrap();
        // The bell comes first when both are there.
        for have in [0, 15] {
            bell.write(1).unwrap();
            if have > 0 {
                let mut waits = [PollFd::new(ours.as_fd(), PollFlags::POLLIN)];
                assert_eq!(poll(&mut waits, 5000u16).unwrap(), 1);
                assert_eq!(connection.receive_some(HEADER_LEN).unwrap(), HEADER_LEN);
                assert_eq!(connection.receive_some(8).unwrap(), 3);
            }
            assert!(matches!(connection.receive(bell.as_fd()).unwrap(), Incoming::Rung));
            bell.read().unwrap();
            assert_eq!((connection.partial.bytes.len(), connection.partial.fds.len()), (have, have / 15));
        }
        let Connection { stream, partial } = connection;
        let mut connection = Connection::resume(stream, partial).unwrap();
        theirs.write_all(&message[15..]).unwrap();
        match connection.receive(bell.as_fd()).unwrap() {
            Incoming::Message(header, Ok(Request::SetVringKick { index: 1, has_fd: true }), fds) => {
                assert_eq!((header.request, fds.len()), (12, 1));
            }
            other => panic!("{other:?}"),
        }
    }
}
