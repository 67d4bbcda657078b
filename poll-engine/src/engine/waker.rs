//! What wakes a reactor from another thread.

use crate::sync::{Arc, AtomicBool, Bell, Ordering, fence};

/// Wakes a reactor from another thread, for what its station finds in [`Station::prepare_sleep`](super::station::Station::prepare_sleep).
#[derive(Clone, Debug)]
pub struct Waker {
    bell: Arc<Bell>,
    asleep: Arc<AtomicBool>,
}

impl Waker {
    pub(super) fn new(bell: Arc<Bell>) -> Waker {
        Waker { bell, asleep: Arc::new(AtomicBool::new(false)) }
    }

    /// What was handed over before this is seen by the reactor: it looks before it sleeps, or is woken. No system call
    /// while it is awake.
    #[inline]
    pub fn wake(&self) {
        fence(Ordering::SeqCst);
        if self.asleep.load(Ordering::Relaxed) && self.asleep.swap(false, Ordering::Relaxed) {
            self.bell.ring();
        }
    }

    /// From here on whoever hands something over rings the bell. What there is must be looked at afterwards.
    pub(super) fn lie_down(&self) {
        self.asleep.store(true, Ordering::Relaxed);
        fence(Ordering::SeqCst);
    }

    pub(super) fn get_up(&self) {
        self.asleep.store(false, Ordering::Relaxed);
    }
}
