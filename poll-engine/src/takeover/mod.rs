//! Live upgrade: a running process hands its sessions to another one, and guests notice a pause.
//!
//! ```text
//!   new process ([`take`])                              running process ([`give`], a thread of its own)
//!     Hello ───────────────────────────────────────────►  same user? same format?
//!     ◄──────────────────────────── Hello, Export each     what is served, with locked images
//!     checks its options, opens images, starts reactors   (guests are served)
//!     Ready ───────────────────────────────────────────►  parks every session between two requests
//!                                                          stops every queue, what is in flight is finished
//!     ◄───────────────────────────── Server each, Baton    states and descriptors
//!     maps guest memory, prepares queues
//!     takes the baton: from here on it serves
//!     starts the queues
//!     Running ─────────────────────────────────────────►  leaves
//! ```
//!
//! Whoever holds the [`baton`] serves, and only one of the two can take it: the new one when it is ready, or the old one
//! when the new one fails, dies or takes too long. Until then the new one has touched nothing that is shared: it has
//! neither read from a socket nor written to guest memory, so the old one goes on as if nothing had happened. An old one
//! that dies after it has sent everything has lost nothing either.
//!
//! A new one that dies between taking the baton and `Running` may have served requests, and read from sockets. The old one
//! makes sure that it is dead and that nothing that it had begun still runs, and then starts over: sessions end as by a
//! crash, and front ends that connect again find it. If it cannot be sure, it leaves, as it does when the other one lives
//! and says nothing; then the next daemon recovers.
//!
//! [`channel`] carries the messages. Both sides check the [`FORMAT`] of each, so that programs that do not know each
//! other's state refuse each other before anything has stopped.

pub mod baton;
pub mod channel;
pub mod give;
pub mod take;

use std::io;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::session::handover::{HandoverError, ServerState};

/// Number of the form that messages and states have. To be raised when any of them changes.
pub const FORMAT: u32 = 1;

/// What the new process says.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub enum Request {
    /// To begin with.
    Hello {
        /// Name of the program.
        program: String,
        /// Its version, for the log.
        version: String,
    },
    /// Everything is checked and started: stop serving, and send all.
    Ready,
    /// It serves.
    Running,
    /// It will not.
    Failed(String),
}

/// What the running process says.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub enum Answer {
    /// To begin with.
    Hello {
        /// Name of the program.
        program: String,
        /// Its version, for the log.
        version: String,
        /// How many [`Answer::Export`] follow.
        exports: u32,
    },
    /// One of those that are served. Descriptors come with it.
    Export {
        /// Where it is served.
        key: String,
        /// What the device has to say about itself.
        about: serde_json::Value,
    },
    /// The state of one server, in the order of the exports. Its descriptors come with it.
    Server(Box<ServerState>),
    /// Those were all. The baton comes with it.
    Baton,
    /// No, or no more: the running process goes on.
    Refused(String),
}

/// Why sessions are not handed over.
#[derive(Debug, thiserror::Error)]
pub enum TakeoverError {
    /// Nobody there.
    #[error(
        "cannot reach a running process at {path}: {error}; it must have been started with --control {path}, or start without --takeover"
    )]
    Connect {
        /// The socket.
        path: PathBuf,
        /// What the system said.
        error: io::Error,
    },
    /// The other process belongs to somebody else.
    #[error(
        "the process at the other end runs as user {theirs}, this one as {ours}; run both as the same user"
    )]
    Peer {
        /// Their user id.
        theirs: u32,
        /// Ours.
        ours: u32,
    },
    /// The other process is of another age.
    #[error(
        "the other process hands over in format {theirs}, this one in format {ours}; upgrade by a restart instead"
    )]
    Format {
        /// Theirs.
        theirs: u32,
        /// Ours.
        ours: u32,
    },
    /// The other process is something else.
    #[error("the process at the other end is {theirs}, not {ours}")]
    Program {
        /// Theirs.
        theirs: String,
        /// Ours.
        ours: String,
    },
    /// Not what we speak at all.
    #[error("the other end does not speak the hand-over protocol ({0})")]
    Protocol(String),
    /// It says no.
    #[error("the running process refuses: {0}")]
    Refused(String),
    /// The new process says no.
    #[error("the new process gives up: {0}")]
    Failed(String),
    /// No answer in time.
    #[error("the other process did not {0} in time")]
    Late(&'static str),
    /// The connection broke.
    #[error("the other process has gone away")]
    Gone,
    /// A session cannot be handed over.
    #[error("{0}: {1}")]
    Session(String, HandoverError),
    /// The new one has taken over and died before it was heard of.
    #[error(
        "the new process died in taking over; front ends must connect again, and resume what was in flight by their record"
    )]
    Died,
    /// The other one was faster.
    #[error("the running process has gone on by itself: this one was too slow, or has failed")]
    TooLate,
    /// The system says no.
    #[error("hand-over socket: {0}")]
    Io(#[from] io::Error),
}
