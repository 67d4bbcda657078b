//! What a device takes along when its guest migrates (vhost-user, "Migrating back-end state"): a few bytes, to a pipe of
//! the front end's or from one.
//!
//! Nothing here waits. Whoever else has a pipe can make it block again, so bytes go through a pipe of our own by splice,
//! which can be told not to. A state is smaller than any pipe, and one that does not fit is an error.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use nix::fcntl::{OFlag, SpliceFFlags, splice};
use nix::sys::stat::{SFlag, fstat};
use nix::unistd::pipe2;

use crate::device::{Device, StateRefused};

/// Most bytes of a state. A pipe takes as many at least (`PIPE_BUF`).
const MAX_STATE: usize = 4096;

/// Which way the state goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// From us, at the source.
    Save,
    /// To us, at the destination.
    Load,
}

/// Why a device's state was not transferred.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// Another kind of file.
    #[error("the descriptor for the device's state is no pipe")]
    NotPipe,
    /// A pipe that is full, or that nobody reads from; or no pipe to be had.
    #[error("cannot transfer the device's state: {0}")]
    Pipe(#[from] nix::Error),
    /// More than any state of ours.
    #[error("a device's state of more than {MAX_STATE} bytes is none of this program's")]
    TooLong,
    /// The front end asks before it has closed its end.
    #[error("the front end has not yet sent all of the device's state")]
    Unfinished,
    /// It asks, and has begun no transfer.
    #[error("no transfer of the device's state was begun")]
    None,
    /// Its queues were started in between.
    #[error("the device's state came when its queues ran")]
    Running,
    /// What came is not the device's.
    #[error(transparent)]
    Refused(#[from] StateRefused),
}

/// A transfer, from its beginning until the front end asks how it went.
#[derive(Debug, Default)]
pub(super) enum Transfer {
    #[default]
    None,
    /// What has come so far.
    Loading(OwnedFd, Vec<u8>),
    Over(Result<(), StateError>),
}

impl Transfer {
    /// Writes the state, or begins to read it.
    pub(super) fn begin(
        direction: Direction,
        fd: OwnedFd,
        device: &dyn Device,
    ) -> Result<Transfer, StateError> {
        let kind = SFlag::from_bits_truncate(fstat(&fd)?.st_mode) & SFlag::S_IFMT;
        if kind != SFlag::S_IFIFO {
            return Err(StateError::NotPipe);
        }
        match direction {
            // The front end hears of it now, and again when it asks.
            Direction::Save => {
                write_all(&device.save_state().ok_or(StateError::None)?, fd.as_fd())?;
                Ok(Transfer::Over(Ok(())))
            }
            Direction::Load => Ok(Transfer::Loading(fd, Vec::new())),
        }
    }

    /// Where more of the state comes from.
    pub(super) fn awaited(&self) -> Option<BorrowedFd<'_>> {
        if let Transfer::Loading(fd, _) = self { Some(fd.as_fd()) } else { None }
    }

    /// Reads what has come; the device goes on with it when that is all.
    pub(super) fn attend(&mut self, device: &dyn Device, is_running: impl FnOnce() -> bool) {
        let Transfer::Loading(fd, bytes) = self else { return };
        let outcome = match read_some(fd.as_fd(), bytes) {
            Ok(false) => return,
            Ok(true) if is_running() => Err(StateError::Running),
            Ok(true) => device.load_state(bytes).map_err(StateError::from),
            Err(e) => Err(e),
        };
        // Whoever is still writing hears of it as well.
        *self = Transfer::Over(outcome);
    }

    /// How it went: asked once.
    pub(super) fn check(&mut self) -> Result<(), StateError> {
        match std::mem::take(self) {
            Transfer::None => Err(StateError::None),
            Transfer::Loading(..) => Err(StateError::Unfinished),
            Transfer::Over(outcome) => outcome,
        }
    }
}

fn write_all(state: &[u8], to: BorrowedFd<'_>) -> Result<(), StateError> {
    if state.len() > MAX_STATE {
        return Err(StateError::TooLong);
    }
    let (ours, write) = pipe2(OFlag::O_CLOEXEC)?;
    File::from(write).write_all(state).map_err(|_| nix::Error::last())?;
    let mut left = state.len();
    while left > 0 {
        left -= match splice(&ours, None, to, None, left, SpliceFFlags::SPLICE_F_NONBLOCK) {
            Err(nix::Error::EINTR) => 0,
            moved => moved?,
        };
    }
    Ok(())
}

/// Whether that is all.
fn read_some(from: BorrowedFd<'_>, bytes: &mut Vec<u8>) -> Result<bool, StateError> {
    let (read, ours) = pipe2(OFlag::O_CLOEXEC)?;
    let mut read = File::from(read);
    loop {
        let room = MAX_STATE + 1 - bytes.len();
        let moved = match splice(from, None, &ours, None, room, SpliceFFlags::SPLICE_F_NONBLOCK) {
            Ok(0) => return Ok(true),
            Ok(moved) => moved,
            Err(nix::Error::EINTR) => continue,
            Err(nix::Error::EAGAIN) => return Ok(false),
            Err(e) => return Err(e.into()),
        };
        let have = bytes.len();
        bytes.resize(have + moved, 0);
        read.read_exact(&mut bytes[have..]).map_err(|_| nix::Error::last())?;
        if bytes.len() > MAX_STATE {
            return Err(StateError::TooLong);
        }
    }
}
