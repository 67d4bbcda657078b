//! Messages with descriptors between two processes: a header that keeps its form for ever, JSON, and as many
//! descriptors as it takes.
//!
//! ```text
//! "kickless" │ format u32 │ bytes of JSON u32 │ descriptors u32 │ one byte for each 250 descriptors │ JSON
//! ```

use std::io::{self, IoSlice};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{ControlMessage, MsgFlags, getsockopt, sendmsg, sockopt};
use nix::unistd::geteuid;
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::{FORMAT, TakeoverError};
use crate::session::socket::receive_with_fds;

const MAGIC: &[u8; 8] = b"kickless";
const HEADER: usize = 20;
/// Descriptors that go with one byte: the kernel takes up to 253.
const BATCH: usize = 250;
/// Longest JSON taken: a session with 256 queues and 509 regions is a tenth of it.
const MAX_JSON: u32 = 16 << 20;
/// Most descriptors taken with one message.
const MAX_FDS: u32 = 4096;

/// One end of a connection between two processes that trust each other.
#[derive(Debug)]
pub struct Channel {
    stream: UnixStream,
    /// What goes into each header, and is expected in each.
    format: u32,
}

impl Channel {
    /// Over this stream.
    pub fn new(stream: UnixStream) -> io::Result<Channel> {
        Self::with_format(stream, FORMAT)
    }

    /// With another format in each header, and no other taken.
    pub fn with_format(stream: UnixStream, format: u32) -> io::Result<Channel> {
        stream.set_nonblocking(true)?;
        Ok(Channel { stream, format })
    }

    /// Fails unless our user, or root, is at the other end. `or_we` says whether any may be, if we are root.
    pub fn expect_user(&self, or_we: bool) -> Result<(), TakeoverError> {
        let theirs = getsockopt(&self.stream, sockopt::PeerCredentials).map_err(io::Error::from)?.uid();
        let ours = geteuid().as_raw();
        if theirs == ours || theirs == 0 || (or_we && ours == 0) {
            return Ok(());
        }
        Err(TakeoverError::Peer { theirs, ours })
    }

    /// Sends a message, with copies of these descriptors, before `until`.
    pub fn send(
        &self,
        message: &impl Serialize,
        fds: &[BorrowedFd<'_>],
        until: Instant,
    ) -> Result<(), TakeoverError> {
        let json = serde_json::to_vec(message).map_err(|e| TakeoverError::Protocol(e.to_string()))?;
        let mut head = MAGIC.to_vec();
        for n in [self.format, json.len() as u32, fds.len() as u32] {
            head.extend(n.to_ne_bytes());
        }
        self.send_all(&head, &[], until)?;
        for batch in fds.chunks(BATCH) {
            let raw: Vec<RawFd> = batch.iter().map(AsRawFd::as_raw_fd).collect();
            self.send_all(&[0], &raw, until)?;
        }
        self.send_all(&json, &[], until)
    }

    fn send_all(&self, mut bytes: &[u8], fds: &[RawFd], until: Instant) -> Result<(), TakeoverError> {
        let rights = [ControlMessage::ScmRights(fds)];
        let rights = if fds.is_empty() { &[][..] } else { &rights[..] };
        while !bytes.is_empty() {
            let parts = [IoSlice::new(bytes)];
            // Descriptors go with single bytes, so they cannot be sent twice by a rest.
            match sendmsg::<()>(self.stream.as_raw_fd(), &parts, rights, MsgFlags::MSG_NOSIGNAL, None) {
                Ok(n) => bytes = &bytes[n..],
                Err(nix::Error::EAGAIN) => self.wait(PollFlags::POLLOUT, until, "take what it was sent")?,
                Err(nix::Error::EINTR) => {}
                Err(nix::Error::EPIPE | nix::Error::ECONNRESET) => return Err(TakeoverError::Gone),
                Err(e) => return Err(io::Error::from(e).into()),
            }
        }
        Ok(())
    }

    /// Receives a message and its descriptors before `until`; `what` is what the other process is to do by then.
    pub fn receive<M: DeserializeOwned>(
        &self,
        until: Instant,
        what: &'static str,
    ) -> Result<(M, Vec<OwnedFd>), TakeoverError> {
        let mut fds = Vec::new();
        let mut head = [0; HEADER];
        self.fill(&mut head, &mut fds, until, what)?;
        let number = |at: usize| u32::from_ne_bytes(std::array::from_fn(|i| head[at + i]));
        if &head[..8] != MAGIC {
            return Err(TakeoverError::Protocol("a header that is none".into()));
        }
        let (theirs, len, count) = (number(8), number(12), number(16));
        if theirs != self.format {
            return Err(TakeoverError::Format { theirs, ours: self.format });
        }
        if len > MAX_JSON || count > MAX_FDS {
            return Err(TakeoverError::Protocol(format!("{len} bytes with {count} descriptors")));
        }
        self.fill(&mut vec![0; (count as usize).div_ceil(BATCH)], &mut fds, until, what)?;
        let mut json = vec![0; len as usize];
        self.fill(&mut json, &mut fds, until, what)?;
        if fds.len() != count as usize {
            return Err(TakeoverError::Protocol(format!(
                "{} of {count} descriptors have come; is the limit of open files (ulimit -n) too low?",
                fds.len()
            )));
        }
        let message = serde_json::from_slice(&json).map_err(|e| TakeoverError::Protocol(e.to_string()))?;
        Ok((message, fds))
    }

    fn fill(
        &self,
        mut into: &mut [u8],
        fds: &mut Vec<OwnedFd>,
        until: Instant,
        what: &'static str,
    ) -> Result<(), TakeoverError> {
        while !into.is_empty() {
            match receive_with_fds(self.stream.as_fd(), into, fds, MAX_FDS as usize) {
                Ok(0) => return Err(TakeoverError::Gone),
                Ok(n) => into = &mut into[n..],
                Err(e) => match e.raw_os_error() {
                    Some(libc::EAGAIN) => self.wait(PollFlags::POLLIN, until, what)?,
                    Some(libc::EINTR) => {}
                    Some(libc::ECONNRESET) => return Err(TakeoverError::Gone),
                    _ => return Err(e.into()),
                },
            }
        }
        Ok(())
    }

    fn wait(&self, events: PollFlags, until: Instant, what: &'static str) -> Result<(), TakeoverError> {
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(TakeoverError::Late(what));
        }
        // Rounded up: a poll that returns early would be repeated without end in the last millisecond.
        let timeout = PollTimeout::try_from(left + Duration::from_millis(1)).unwrap_or(PollTimeout::MAX);
        match poll(&mut [PollFd::new(self.stream.as_fd(), events)], timeout) {
            Ok(_) | Err(nix::Error::EINTR) => Ok(()),
            Err(e) => Err(io::Error::from(e).into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn soon() -> Instant {
        Instant::now() + Duration::from_secs(5)
    }

    fn pair() -> (Channel, Channel, UnixStream) {
        let (a, b) = UnixStream::pair().unwrap();
        let raw = a.try_clone().unwrap();
        (Channel::new(a).unwrap(), Channel::new(b).unwrap(), raw)
    }

    #[test]
    fn messages_of_any_size_keep_their_descriptors() {
        for (bytes, count) in [(0usize, 0usize), (5, 1), (1 << 20, 250), (100, 251), (9, 600)] {
            let (a, b, _) = pair();
            let text = "x".repeat(bytes);
            let file = std::fs::File::open("/dev/null").unwrap();
            let sent = text.clone();
            let sender = std::thread::spawn(move || a.send(&sent, &vec![file.as_fd(); count], soon()));
            let (got, fds): (String, _) = b.receive(soon(), "send").unwrap();
            sender.join().unwrap().unwrap();
            assert_eq!((got, fds.len()), (text, count));
            assert!(matches!(b.receive::<String>(soon(), "send"), Err(TakeoverError::Gone)));
        }
    }

    #[test]
    fn what_is_not_ours_is_refused_and_waiting_ends() {
        let refused = |bytes: &[u8]| {
            let (_a, b, mut raw) = pair();
            raw.write_all(bytes).unwrap();
            b.receive::<String>(Instant::now() + Duration::from_millis(30), "speak").unwrap_err()
        };
        let head = |format: u32, len: u32, fds: u32| {
            [&MAGIC[..], &[format, len, fds].map(u32::to_ne_bytes).concat()].concat()
        };
        assert!(matches!(refused(b"GET / HTTP/1.1\r\n\r\n....."), TakeoverError::Protocol(_)));
        assert!(matches!(refused(&head(FORMAT + 1, 2, 0)), TakeoverError::Format { ours: FORMAT, .. }));
        assert!(matches!(refused(&head(FORMAT, u32::MAX, 0)), TakeoverError::Protocol(_)));
        assert!(matches!(refused(&head(FORMAT, 2, u32::MAX)), TakeoverError::Protocol(_)));
        assert!(matches!(refused(&head(FORMAT, 2, 0)), TakeoverError::Late("speak")));
        assert!(matches!(
            refused(&[head(FORMAT, 2, 1), b"\0\"\"".to_vec()].concat()),
            TakeoverError::Protocol(_)
        ));
        assert!(matches!(
            refused(&[head(FORMAT, 2, 0), b"{}".to_vec()].concat()),
            TakeoverError::Protocol(_)
        ));
        // A peer that takes nothing.
        let (a, _b, _) = pair();
        let much = "x".repeat(8 << 20);
        let late = a.send(&much, &[], Instant::now() + Duration::from_millis(30));
        assert!(matches!(late, Err(TakeoverError::Late(_))));
    }
}
