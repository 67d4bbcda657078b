//! What a session is, to be taken up by another process: a state in numbers and words, and descriptors.
//!
//! A control thread is asked to park by a [`Freeze`]: it stops between two requests of the front end (what has come of a
//! third is part of the state), then stops its queues and gives a [`Snapshot`], then leaves, or goes on as if nothing had
//! happened.

pub(super) mod served;

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::time::Instant;

use crossbeam::channel::{Receiver, RecvTimeoutError, Sender, bounded};
use serde::{Deserialize, Serialize};

use super::logging::Logging;
use super::repeats::Repeats;
use super::state::SessionState;
use crate::memory::RegionSpec;
use crate::memory::map::MemoryError;
use crate::ring::inflight::InflightSpec;

/// Why a session is not handed over, or not taken up.
#[derive(Debug, thiserror::Error)]
pub enum HandoverError {
    /// It takes too long.
    #[error("did not {0} in time")]
    Late(&'static str),
    /// The control thread has ended: there is nothing to hand over any more.
    #[error("its control thread has ended")]
    Ended,
    /// Descriptors do not fit the state.
    #[error("the state names descriptor {0}, which did not come with it")]
    Descriptor(u32),
    /// The front end has agreed on what is not offered here.
    #[error(
        "its front end has negotiated features {0:#x}, which this process does not offer; keep the options, or disconnect it first"
    )]
    Features(u64),
    /// The front end uses more than there is here.
    #[error(
        "its front end uses {what} {used}, and {most} is the most here; keep the options, or disconnect it first"
    )]
    Limit {
        /// Of what.
        what: &'static str,
        /// By the front end.
        used: u64,
        /// Here.
        most: u64,
    },
    /// The device looks different.
    #[error("its guest would see another device: {0}; keep the options, or disconnect it first")]
    Device(String),
    /// A queue cannot run here.
    #[error("{0}")]
    Queue(String),
    /// The dirty log cannot be mapped.
    #[error("{0}")]
    Log(String),
    /// Guest memory cannot be mapped.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// The system says no.
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// The descriptor of a snapshot that has this place in the list of all.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FdIndex(u32);

/// The descriptors of a snapshot.
#[derive(Debug, Default)]
pub struct Descriptors(Vec<Option<OwnedFd>>);

impl Descriptors {
    /// Adds a copy of `fd`.
    pub fn put(&mut self, fd: BorrowedFd<'_>) -> io::Result<FdIndex> {
        self.0.push(Some(fd.try_clone_to_owned()?));
        Ok(FdIndex(self.0.len() as u32 - 1))
    }

    /// As [`put`](Self::put), of what may not be there.
    pub fn put_opt(&mut self, fd: Option<impl AsFd>) -> io::Result<Option<FdIndex>> {
        fd.map(|fd| self.put(fd.as_fd())).transpose()
    }

    /// Takes one out, once.
    pub fn take(&mut self, at: FdIndex) -> Result<OwnedFd, HandoverError> {
        let slot = self.0.get_mut(at.0 as usize).and_then(Option::take);
        slot.ok_or(HandoverError::Descriptor(at.0))
    }

    /// As [`take`](Self::take), of what may not be there.
    pub fn take_opt(&mut self, at: Option<FdIndex>) -> Result<Option<OwnedFd>, HandoverError> {
        at.map(|at| self.take(at)).transpose()
    }
}

/// A control thread's state.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ServerState {
    /// Where front ends come from.
    pub listener: ListenerState,
    /// The front end that is connected.
    pub session: Option<ServedState>,
}

/// Where front ends come from.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ListenerState {
    /// The socket; a connected one that has been accepted is there no more.
    pub fd: Option<FdIndex>,
    /// Whether it is one that listens.
    pub listening: bool,
    /// The socket file to remove at the end, and its inode.
    pub made: Option<(PathBuf, u64)>,
}

/// A session, with all that belongs to it.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ServedState {
    /// The front end's socket.
    pub stream: FdIndex,
    /// What has come of its next message.
    pub partial: Vec<u8>,
    /// Descriptors that came with that.
    pub partial_fds: Vec<FdIndex>,
    /// What was negotiated, and the queues.
    pub session: SessionState,
    /// Configuration space as the guest has seen it last.
    pub config: Vec<u8>,
    /// What the device needs besides.
    #[serde(default)]
    pub state: Option<Vec<u8>>,
    /// Guest memory.
    pub regions: Vec<(RegionSpec, FdIndex)>,
    /// The queues' descriptors.
    pub slots: Vec<SlotState>,
    /// The record of requests in flight.
    pub inflight: InflightState,
    /// The dirty log.
    pub log: Option<(RegionSpec, FdIndex)>,
    /// What is signalled when pages were marked there.
    pub log_call: Option<FdIndex>,
    /// What each queue logs.
    pub logging: Vec<Logging>,
    /// The channel for our own requests.
    pub backend_channel: Option<FdIndex>,
    /// What is to come on it.
    pub iommu: IommuState,
    /// Mistakes of the front end that were logged.
    pub complaints: u32,
    /// Memory that was added again, and how often.
    #[serde(default)]
    pub repeats: Repeats,
}

/// What a front end with a vIOMMU owes us.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct IommuState {
    /// Acknowledgements of misses.
    pub owed: u32,
    /// What has come of the next.
    pub reply: Vec<u8>,
}

/// The record of requests in flight.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub enum InflightState {
    /// The front end does not ask for one.
    Off,
    /// In this file.
    On(InflightSpec, FdIndex),
    /// The front end has one that cannot be used.
    Lost,
}

/// The descriptors of a queue.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SlotState {
    /// Kick.
    pub kick: Option<FdIndex>,
    /// Call.
    pub call: Option<FdIndex>,
    /// Error.
    pub err: Option<FdIndex>,
}

/// The whole of it.
#[derive(Debug)]
pub struct Snapshot {
    pub(super) state: ServerState,
    pub(super) fds: Descriptors,
}

impl Snapshot {
    /// One that came from another process.
    pub fn received(state: ServerState, fds: Vec<OwnedFd>) -> Snapshot {
        Snapshot { state, fds: Descriptors(fds.into_iter().map(Some).collect()) }
    }

    /// State and descriptors, to be sent.
    pub fn into_parts(self) -> (ServerState, Vec<OwnedFd>) {
        (self.state, self.fds.0.into_iter().flatten().collect())
    }
}

enum Step {
    Stop,
    Leave,
    StartOver,
}

/// What becomes of a control thread that was parked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Then {
    /// It goes on as before.
    GoOn,
    /// It leaves everything to another process.
    Leave,
    /// It ends its session, of which another process may have served a part, and waits for the next front end.
    StartOver,
}

enum Told {
    Parked,
    Stopped(io::Result<Box<Snapshot>>),
}

/// A hold on a control thread. Dropped, it lets the thread go on as before.
#[derive(Debug)]
pub struct Freeze {
    step: Sender<Step>,
    told: Receiver<Told>,
}

/// The control thread's end of a [`Freeze`].
#[derive(Debug)]
pub(super) struct Parking {
    step: Receiver<Step>,
    told: Sender<Told>,
}

impl Freeze {
    pub(super) fn new() -> (Freeze, Parking) {
        let (step, steps) = bounded(2);
        let (tell, told) = bounded(2);
        (Freeze { step, told }, Parking { step: steps, told: tell })
    }

    fn wait(&self, until: Instant, what: &'static str) -> Result<Told, HandoverError> {
        self.told.recv_deadline(until).map_err(|e| match e {
            RecvTimeoutError::Timeout => HandoverError::Late(what),
            RecvTimeoutError::Disconnected => HandoverError::Ended,
        })
    }

    /// Waits until the thread rests between two requests. Queues run.
    pub fn wait_parked(&self, until: Instant) -> Result<(), HandoverError> {
        self.wait(until, "come to a rest between two requests of its front end").map(|_| ())
    }

    /// Has queues stop, once parked.
    pub fn stop(&self) {
        // An ended thread is noticed by whoever waits for it.
        let _ = self.step.send(Step::Stop);
    }

    /// The state, once all queues have finished what was in flight.
    pub fn snapshot(&self, until: Instant) -> Result<Snapshot, HandoverError> {
        match self.wait(until, "finish the requests in flight")? {
            Told::Stopped(snapshot) => Ok(*snapshot?),
            Told::Parked => Err(HandoverError::Ended),
        }
    }

    /// Has the thread end, and leave everything to the process that has the snapshot.
    pub fn leave(self) {
        let _ = self.step.send(Step::Leave);
    }

    /// Has the thread end its session, as if this process had died and were started again: the one that had the snapshot
    /// is dead, and how much of the session it has served is known to the guest and its record of requests in flight alone.
    pub fn start_over(self) {
        let _ = self.step.send(Step::StartOver);
    }
}

impl Parking {
    /// Does as it is told, and makes the snapshot by `save` when told to.
    pub(super) fn follow(self, mut save: impl FnMut() -> io::Result<Snapshot>) -> Then {
        // Whoever has given up is noticed by the step that does not come.
        let _ = self.told.send(Told::Parked);
        loop {
            match self.step.recv() {
                Ok(Step::Stop) => {
                    let _ = self.told.send(Told::Stopped(save().map(Box::new)));
                }
                Ok(Step::Leave) => return Then::Leave,
                Ok(Step::StartOver) => return Then::StartOver,
                Err(_) => return Then::GoOn,
            }
        }
    }
}
