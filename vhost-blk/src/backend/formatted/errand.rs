//! What a reactor has the workers of an image do, and how it hears of it.

use std::os::fd::{AsFd, AsRawFd, RawFd};

use crossbeam::queue::ArrayQueue;
use nix::sys::eventfd::{EfdFlags, EventFd};

use crate::backend::bounce::Bounce;

/// Something to be done with a range of the disk.
#[derive(Debug)]
pub struct Errand {
    /// For whom.
    pub tag: u32,
    /// Where.
    pub offset: u64,
    /// Bytes.
    pub len: u64,
    /// What.
    pub what: What,
}

/// What is to be done.
pub enum What {
    /// Read into the buffer.
    Read(Bounce),
    /// Have it be where it can be written in place, as much of it as can be without its data. The answer is [`IN_PLACE`]
    /// or [`WANTS_DATA`].
    MakeRoom,
    /// Write what is in the buffer.
    Write {
        /// The data.
        buffer: Bounce,
        /// They are to be durable before this is answered.
        durable: bool,
    },
    /// Have it read as zeros.
    Zero {
        /// Its space may be given up.
        unmap: bool,
    },
    /// Give its space up, if that is easily done.
    Discard,
}

impl std::fmt::Debug for What {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            What::Read(_) => "read",
            What::MakeRoom => "make room",
            What::Write { .. } => "write",
            What::Zero { .. } => "write zeros",
            What::Discard => "discard",
        })
    }
}

impl What {
    /// The buffer, if there is one.
    pub fn into_buffer(self) -> Option<Bounce> {
        match self {
            What::Read(buffer) | What::Write { buffer, .. } => Some(buffer),
            What::MakeRoom | What::Zero { .. } | What::Discard => None,
        }
    }
}

/// What room was made for can be written in place, or the beginning of it.
pub const IN_PLACE: i32 = 0;
/// It cannot: a worker has to write the data.
pub const WANTS_DATA: i32 = 1;

/// What became of an errand.
pub struct Answer {
    /// For whom.
    pub tag: u32,
    /// Bytes, or what is said of room, or a negated errno.
    pub result: i32,
    /// The errand's buffer.
    pub buffer: Option<Bounce>,
}

/// Where the answers to a queue's errands come to.
#[derive(Debug)]
pub struct Inbox {
    answers: ArrayQueue<Answer>,
    bell: EventFd,
}

impl std::fmt::Debug for Answer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}: {}", self.tag, self.result)
    }
}

impl Inbox {
    /// For a queue with `ring_size` slots, each of which has one errand at a time.
    pub fn new(ring_size: u16) -> std::io::Result<Inbox> {
        let bell = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?;
        Ok(Inbox { answers: ArrayQueue::new(ring_size.max(1).into()), bell })
    }

    /// Readable when there are answers.
    pub fn fd(&self) -> RawFd {
        self.bell.as_fd().as_raw_fd()
    }

    /// Before looking for answers: those that come from here on are told anew.
    pub fn quiet(&self) {
        // Nothing to read is nothing to be quiet about.
        let _ = self.bell.read();
    }

    /// Takes an answer out, if there is one.
    pub fn take(&self) -> Option<Answer> {
        self.answers.pop()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.answers.is_empty()
    }

    /// Puts an answer in.
    pub fn put(&self, answer: Answer) {
        let room = self.answers.push(answer);
        assert!(room.is_ok(), "more answers than slots");
        // The counter cannot be full.
        let _ = self.bell.write(1);
    }
}
