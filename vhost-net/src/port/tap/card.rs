//! A network card that is joined to a tap.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use poll_engine::device::QueueHandler;

use super::Tap;
use crate::announce::announcement;
use crate::mac::MacAddr;
use crate::pcap::Capture;

/// The tap, and what of the card is its own.
#[derive(Debug)]
pub struct TapCard {
    tap: Arc<Tap>,
    /// Where to note frames, and as which interface.
    capture: Mutex<Option<(Arc<Capture>, u32)>>,
    link: AtomicBool,
}

impl TapCard {
    /// Joined to `tap`, whose frames are noted in a capture as those of this interface.
    pub fn new(tap: Arc<Tap>, capture: Option<(Arc<Capture>, u32)>) -> TapCard {
        TapCard { tap, capture: Mutex::new(capture), link: AtomicBool::new(true) }
    }

    /// Has frames noted there from now on, by queues that start.
    pub fn set_capture(&self, capture: Option<(Arc<Capture>, u32)>) {
        *self.capture.lock().unwrap_or_else(PoisonError::into_inner) = capture;
    }

    /// The tap.
    pub fn tap(&self) -> &Arc<Tap> {
        &self.tap
    }

    /// Whether the link is up: the administrator has it so, and there is a tap.
    pub fn is_up(&self) -> bool {
        self.link.load(Ordering::Relaxed) && !self.tap.is_gone()
    }

    /// Sets the link up or down at both ends.
    pub fn set_link(&self, up: bool) -> io::Result<()> {
        self.tap.set_carrier(up)?;
        self.link.store(up, Ordering::Relaxed);
        Ok(())
    }

    /// Tells those behind the tap that this station is on this side of it now.
    pub fn announce(&self, mac: MacAddr) {
        self.tap.inject(&announcement(mac));
    }

    /// Makes the handler of a queue: of receiveq1, transmitq1, receiveq2 and so on (5.1.2).
    pub fn start_queue(
        &self,
        index: u16,
        features: u64,
        ring_size: u16,
    ) -> io::Result<Box<dyn QueueHandler>> {
        let pair = index / 2;
        self.tap.negotiated(features)?;
        let capture = self.capture.lock().unwrap_or_else(PoisonError::into_inner);
        let probe = capture.as_ref().map(|(capture, interface)| capture.probe(*interface));
        Ok(if index.is_multiple_of(2) {
            Box::new(self.tap.receive(pair, features, ring_size)?.captured(probe))
        } else {
            Box::new(self.tap.transmit(pair, features, ring_size)?.captured(probe))
        })
    }
}
