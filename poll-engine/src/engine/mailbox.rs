//! The one way into a running reactor: messages from control threads, and a bell that wakes it.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crossbeam::channel::{Receiver, Sender, unbounded};
use nix::sys::eventfd::{EfdFlags, EventFd};

/// The sending end, for any thread.
#[derive(Debug)]
pub(super) struct Postbox<M> {
    messages: Sender<M>,
    full: Arc<AtomicBool>,
    bell: EventFd,
}

/// The receiving end, owned by the reactor.
#[derive(Debug)]
pub(super) struct Mailbox<M> {
    messages: Receiver<M>,
    full: Arc<AtomicBool>,
    bell: OwnedFd,
}

/// A connected pair.
pub(super) fn mailbox<M>() -> std::io::Result<(Postbox<M>, Mailbox<M>)> {
    let (tx, rx) = unbounded();
    let bell = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?;
    let full = Arc::new(AtomicBool::new(false));
    let receiver =
        Mailbox { messages: rx, full: Arc::clone(&full), bell: bell.as_fd().try_clone_to_owned()? };
    Ok((Postbox { messages: tx, full, bell }, receiver))
}

impl<M> Postbox<M> {
    /// Posts a message; false when the reactor is gone.
    pub(super) fn post(&self, message: M) -> bool {
        let posted = self.messages.send(message).is_ok();
        self.full.store(true, Ordering::Release);
        // A counter that is full (nobody ever reads it) has rung often enough.
        let _ = self.bell.write(1);
        posted
    }
}

impl<M> Mailbox<M> {
    /// Whether there is something to take: one load, for every round of the reactor.
    #[inline]
    pub(super) fn has_mail(&self) -> bool {
        self.full.load(Ordering::Relaxed)
    }

    /// All messages at hand.
    pub(super) fn take(&self) -> Vec<M> {
        // Cleared first: a message posted from here on sets it again.
        self.full.store(false, Ordering::SeqCst);
        self.messages.try_iter().collect()
    }

    pub(super) fn bell(&self) -> BorrowedFd<'_> {
        self.bell.as_fd()
    }
}
