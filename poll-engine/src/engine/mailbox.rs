//! The one way into a running reactor: messages from control threads, and a bell that wakes it.

use crate::sync::{Arc, AtomicBool, Bell, Ordering, Receiver, Sender, unbounded};

/// The sending end, for any thread.
#[derive(Debug)]
pub(super) struct Postbox<M> {
    messages: Sender<M>,
    full: Arc<AtomicBool>,
    bell: Arc<Bell>,
}

/// The receiving end, owned by the reactor.
#[derive(Debug)]
pub(super) struct Mailbox<M> {
    messages: Receiver<M>,
    full: Arc<AtomicBool>,
    bell: Arc<Bell>,
}

/// A connected pair.
pub(super) fn mailbox<M>() -> std::io::Result<(Postbox<M>, Mailbox<M>)> {
    let (tx, rx) = unbounded();
    let bell = Arc::new(Bell::new()?);
    let full = Arc::new(AtomicBool::new(false));
    let receiver = Mailbox { messages: rx, full: Arc::clone(&full), bell: Arc::clone(&bell) };
    Ok((Postbox { messages: tx, full, bell }, receiver))
}

impl<M> Postbox<M> {
    /// Posts a message; false when the reactor is gone.
    pub(super) fn post(&self, message: M) -> bool {
        let posted = self.messages.send(message).is_ok();
        // A swap on either side: the flag is one thing after the other for both, however weak the machine.
        self.full.swap(true, Ordering::Release);
        self.bell.ring();
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
        // Cleared first: a message posted from here on sets it again. By a swap, which sees the messages of all who
        // have set it up to here; a mere store could clear the flag of a message that is not visible yet.
        self.full.swap(false, Ordering::AcqRel);
        self.messages.try_iter().collect()
    }

    /// The bell, for others to ring.
    pub(super) fn shared_bell(&self) -> Arc<Bell> {
        Arc::clone(&self.bell)
    }

    /// What wakes the reactor. It is never silenced: each ring is one event to whoever watches it.
    pub(super) fn bell(&self) -> &Bell {
        &self.bell
    }
}
