//! The guest's end of the shared pages.

use core::ptr::{self, NonNull};
use core::sync::atomic::{AtomicUsize, Ordering};

use kickless_guest::{DeviceInfo, EVENT_PORT, Mailbox, Order, Report, event, state};

use crate::cpu;

static ADDRESS: AtomicUsize = AtomicUsize::new(0);

/// The shared pages, once their address is known.
pub fn shared() -> Option<NonNull<Mailbox>> {
    NonNull::new(ptr::with_exposed_provenance_mut(ADDRESS.load(Ordering::Relaxed)))
}

/// Handle of the CPU that takes the orders.
pub struct Inbox(NonNull<Mailbox>);

impl Inbox {
    /// Uses the pages at `address`.
    pub fn open(address: usize) -> Option<Inbox> {
        ADDRESS.store(address, Ordering::Relaxed);
        shared().map(Inbox)
    }

    fn pages(&self) -> &Mailbox {
        // SAFETY: the harness keeps the pages there; fields that both sides write are atomics, the others are only
        // touched through raw pointers below, by one side at a time (given and answered say whose turn it is).
        unsafe { self.0.as_ref() }
    }

    /// Says that orders are taken from now on.
    pub fn up(&self, cpus: u32) {
        self.pages().cpus.store(cpus, Ordering::Relaxed);
        self.pages().state.store(state::UP, Ordering::Release);
    }

    /// The next order, when there is one.
    pub fn wait(&self) -> (u32, Order) {
        let pages = self.pages();
        loop {
            let given = pages.given.load(Ordering::Acquire);
            if given != pages.answered.load(Ordering::Relaxed) {
                // SAFETY: our turn; the harness wrote the order before it raised the number.
                return (given, unsafe { (&raw const pages.order).read_volatile() });
            }
            cpu::port_write(EVENT_PORT, event::IDLE);
            core::hint::spin_loop();
        }
    }

    /// Shows what is known of a device.
    pub fn show_device(&self, index: usize, info: &DeviceInfo) {
        // SAFETY: the index is checked; the harness reads devices between orders.
        unsafe {
            let devices = (&raw mut (*self.0.as_ptr()).device).cast::<DeviceInfo>();
            if index < kickless_guest::MAX_DEVICES {
                devices.add(index).write_volatile(*info);
            }
        }
    }

    /// Answers order `number`.
    pub fn answer(&self, number: u32, report: &Report) {
        // SAFETY: our turn still.
        unsafe { (&raw mut (*self.0.as_ptr()).report).write_volatile(*report) };
        self.pages().answered.store(number, Ordering::Release);
    }
}

/// Whether the harness wants the load at hand to come to its end.
pub fn is_told_to_stop() -> bool {
    shared().is_some_and(|pages| {
        // SAFETY: atomics in the shared pages.
        let (stop, given) = unsafe { (&(*pages.as_ptr()).stop, &(*pages.as_ptr()).given) };
        stop.load(Ordering::Relaxed) == given.load(Ordering::Relaxed)
    })
}

/// Counts completed requests where they can be watched.
pub fn progress(requests: u64) {
    if let Some(pages) = shared() {
        // SAFETY: an atomic in the shared pages.
        let progress = unsafe { &(*pages.as_ptr()).progress };
        if progress.fetch_add(requests, Ordering::Relaxed) == 0 {
            cpu::port_write(EVENT_PORT, event::FIRST_REQUEST);
        }
    }
}
