//! The new process's side.

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use super::baton::Baton;
use super::channel::Channel;
use super::give::Program;
use super::{Answer, Request, TakeoverError};
use crate::fault_point;
use crate::session::handover::Snapshot;

/// How long the running process may take to greet, and to receive what it is told. It may be busy with another one.
const GREETING: Duration = Duration::from_secs(10);
/// How long it may take to come to a rest and to send everything: more than it allows itself.
const SEND: Duration = Duration::from_secs(40);

/// Something that the running process serves.
#[derive(Debug)]
pub struct Offered {
    /// Where it is served.
    pub key: String,
    /// What its device has to say about itself.
    pub about: serde_json::Value,
    /// The descriptors that go with it.
    pub fds: Vec<OwnedFd>,
}

/// A connection to the running process. Dropped before the baton is taken, it leaves the running process to go on.
#[derive(Debug)]
pub struct Taker {
    channel: Channel,
    exports: usize,
}

impl Taker {
    /// Greets the process that listens at `path`; what it serves comes back. It goes on serving.
    pub fn connect(path: &Path, program: Program) -> Result<(Taker, Vec<Offered>), TakeoverError> {
        let stream = UnixStream::connect(path)
            .map_err(|error| TakeoverError::Connect { path: path.to_owned(), error })?;
        let channel = Channel::new(stream)?;
        // Root knows whose process it names.
        channel.expect_user(true)?;
        let until = Instant::now() + GREETING;
        let (name, version) = (program.name.to_owned(), program.version.to_owned());
        fault_point::pass("taker-begins");
        unless_gone(channel.send(&Request::Hello { program: name, version }, &[], until))?;
        let exports = match channel.receive(until, "greet")?.0 {
            Answer::Hello { program: theirs, exports, .. } if theirs == program.name => exports,
            Answer::Hello { program: theirs, .. } => {
                return Err(TakeoverError::Program { theirs, ours: program.name.into() });
            }
            other => return Err(unexpected(other)),
        };
        let mut offered = Vec::new();
        for _ in 0..exports {
            match channel.receive(until, "say what it serves")? {
                (Answer::Export { key, about }, fds) => offered.push(Offered { key, about, fds }),
                (other, _) => return Err(unexpected(other)),
            }
        }
        fault_point::pass("taker-greeted");
        Ok((Taker { channel, exports: offered.len() }, offered))
    }

    /// Has the running process stop: the states of what it serves, in the order of what it offered, and the baton, which
    /// is to be taken before any of them is used.
    pub fn ask(&self) -> Result<(Vec<Snapshot>, Baton), TakeoverError> {
        let until = Instant::now() + SEND;
        unless_gone(self.channel.send(&Request::Ready, &[], until))?;
        fault_point::pass("taker-asked");
        let mut snapshots = Vec::new();
        for _ in 0..self.exports {
            match self.channel.receive(until, "stop")? {
                (Answer::Server(state), fds) => snapshots.push(Snapshot::received(*state, fds)),
                (other, _) => return Err(unexpected(other)),
            }
        }
        match self.channel.receive(until, "send everything")? {
            (Answer::Baton, mut fds) if fds.len() == 1 => {
                fault_point::pass("taker-has-all");
                Ok((snapshots, Baton::received(fds.remove(0))))
            }
            (other, _) => Err(unexpected(other)),
        }
    }

    /// Takes the baton, once nothing can fail any more: this process serves from here on.
    pub fn seize(&self, baton: Baton) -> Result<(), TakeoverError> {
        fault_point::pass("taker-prepared");
        let won = baton.take();
        drop(baton);
        if !won {
            return Err(TakeoverError::TooLate);
        }
        fault_point::pass("taker-has-baton");
        Ok(())
    }

    /// Says that this process serves. The other one may be gone; if not, it leaves when this is dropped: after this process
    /// has taken its place on the control socket.
    pub fn running(&self) {
        fault_point::pass("taker-serves");
        let _ = self.channel.send(&Request::Running, &[], Instant::now() + GREETING);
        fault_point::pass("taker-said");
    }

    /// Says why this process will not, and leaves the other one to it.
    pub fn give_up(self, why: &str) {
        let _ = self.channel.send(&Request::Failed(why.to_owned()), &[], Instant::now() + GREETING);
    }
}

/// Whoever refuses without having listened has said why, which is still there to be received.
fn unless_gone(sent: Result<(), TakeoverError>) -> Result<(), TakeoverError> {
    match sent {
        Err(TakeoverError::Gone) => Ok(()),
        sent => sent,
    }
}

fn unexpected(answer: Answer) -> TakeoverError {
    match answer {
        Answer::Refused(why) => TakeoverError::Refused(why),
        other => TakeoverError::Protocol(format!("{other:?} at this place")),
    }
}
