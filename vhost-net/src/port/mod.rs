//! What a device can be joined to besides another guest.
//!
//! An [`Uplink`] is where a switch meets the rest of the network: it gives frames in buffers of the host, and takes them
//! scattered over a guest's memory. [`af_packet`] works on any interface, [`af_xdp`] goes around the kernel's stack, a
//! [`tap`] is the host itself.

pub mod af_packet;
pub mod af_xdp;
pub mod interface;
mod outgoing;
pub mod tap;
mod xdp_program;

use std::io;
use std::os::fd::BorrowedFd;

use poll_engine::engine::reactor::Io;
use poll_engine::memory::slice::GuestSlice;
use thiserror::Error;

use crate::header::VnetHdr;

/// Why an uplink cannot be had: one line, with the way out.
#[derive(Debug, Error)]
pub enum UplinkError {
    /// There is no such interface.
    #[error(
        "there is no network interface '{0}' here: see `ip link`, and whether this is the right network namespace"
    )]
    Missing(String),
    /// The interface is down.
    #[error("network interface '{0}' is down: `ip link set {0} up`")]
    Down(String),
    /// A right is missing.
    #[error(
        "may not open {what} on '{name}': run as root, or give the program {capability} (setcap or AmbientCapabilities)"
    )]
    Permission {
        /// The interface.
        name: String,
        /// The kind of socket.
        what: &'static str,
        /// The rights that it takes.
        capability: &'static str,
    },
    /// The kernel or the driver does not have it.
    #[error("{what} is not to be had on '{name}' ({why}): {instead}")]
    Unsupported {
        /// The interface.
        name: String,
        /// The kind of socket.
        what: &'static str,
        /// What the kernel said.
        why: io::Error,
        /// What to do.
        instead: &'static str,
    },
    /// Anything else.
    #[error("{what} on '{name}': {why}")]
    Other {
        /// The interface.
        name: String,
        /// What was being done.
        what: &'static str,
        /// What the kernel said.
        why: io::Error,
    },
}

/// Why a frame was not sent. It was counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refused {
    /// There is no room at the moment: it may be tried again.
    Full,
    /// The link is down, or the interface is gone.
    Down,
    /// It is longer than the link takes, or in more parts than the kernel does.
    TooLong,
    /// The kernel does not like it.
    Bad,
}

/// The state of a link.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Link {
    /// The interface is there, up, and has a carrier.
    pub up: bool,
    /// Bytes of the largest packet without segmentation, without its Ethernet header.
    pub mtu: u32,
}

/// What has happened on an uplink.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Frames received.
    pub rx_packets: u64,
    /// Their bytes.
    pub rx_bytes: u64,
    /// Frames that the kernel had no room for.
    pub rx_missed_errors: u64,
    /// Frames longer than any can be, or less than an Ethernet header.
    pub rx_length_errors: u64,
    /// Reads that failed.
    pub rx_errors: u64,
    /// Frames sent.
    pub tx_packets: u64,
    /// Their bytes.
    pub tx_bytes: u64,
    /// Frames that found no room.
    pub tx_fifo_errors: u64,
    /// Frames that found no link.
    pub tx_carrier_errors: u64,
    /// Frames that were too long, or in too many parts.
    pub tx_length_errors: u64,
    /// Frames that the kernel refused.
    pub tx_errors: u64,
}

impl Counters {
    fn received(&mut self, len: usize) {
        self.rx_packets += 1;
        self.rx_bytes += len as u64;
    }

    fn sent(&mut self, len: usize) {
        self.tx_packets += 1;
        self.tx_bytes += len as u64;
    }

    fn refused(&mut self, why: Refused) -> Refused {
        let counter = match why {
            Refused::Full => &mut self.tx_fifo_errors,
            Refused::Down => &mut self.tx_carrier_errors,
            Refused::TooLong => &mut self.tx_length_errors,
            Refused::Bad => &mut self.tx_errors,
        };
        *counter += 1;
        why
    }
}

/// The tag under which an uplink hears that its descriptor is readable.
pub const READABLE: u32 = 0;
/// The first tag of its own operations.
pub const FIRST_TAG: u32 = 2;

/// A way out of the switch. It lives on one reactor.
pub trait Uplink: Send {
    /// Receives at most `most` frames. Each goes to `take` with what its header says of checksum and segmentation;
    /// returns how many. Never waits.
    fn receive(&mut self, most: usize, take: &mut dyn FnMut(&VnetHdr, &[u8])) -> usize;

    /// Sends a frame of `len` bytes: `head`, then `rest` of a guest's memory, of which nothing is used after this
    /// returns. `header` must ask for what the uplink [takes](Self::takes) only. Frames may wait for
    /// [`flush`](Self::flush).
    fn send(
        &mut self,
        header: &VnetHdr,
        len: usize,
        head: &[u8],
        rest: &mut dyn Iterator<Item = GuestSlice<'_>>,
    ) -> Result<(), Refused>;

    /// Hands over what was sent: to be called at the end of each round.
    fn flush(&mut self);

    /// Begins what goes through the reactor's io_uring, under labels from [`FIRST_TAG`] on: called after each
    /// [`flush`](Self::flush).
    fn submit(&mut self, _: &mut Io<'_>) {}

    /// An operation of that kind has come to this; or the [descriptor](Self::descriptor) is [`READABLE`].
    fn complete(&mut self, _tag: u32, _result: i32) {}

    /// Operations that are still to complete.
    fn in_flight(&self) -> usize {
        0
    }

    /// There is something to be received or begun, which no completion will tell of.
    fn has_work(&self) -> bool {
        false
    }

    /// Offloads that frames may be sent with, as the feature bits of a driver that takes them (`GUEST_*`).
    fn takes(&self) -> u64;

    /// Readable when there are frames to receive.
    fn descriptor(&self) -> BorrowedFd<'_>;

    /// Asks the kernel for the state of the link, and comes back to an interface that was gone. Not for every round.
    fn link(&mut self) -> Link;

    /// What has happened.
    fn counters(&mut self) -> Counters;
}
