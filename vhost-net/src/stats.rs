//! Counters of a port, from the point of view of the guest's network card: received is what the guest gets.

use std::sync::atomic::{AtomicU64, Ordering};

use poll_engine::stats::Counter;

use crate::tx::Glance;

/// Why a packet went nowhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(usize)]
pub enum Drop {
    /// The receiver had no buffers.
    NoBuffers,
    /// It does not fit into the receiver's buffers.
    TooLong,
    /// The receiver's link is down, or its queues do not run.
    LinkDown,
    /// What the guest sent is no packet.
    Malformed,
    /// Its header asks for what was not agreed on, or lies.
    BadHeader,
    /// There is nowhere for it to go.
    NoDestination,
    /// The receiver's driver does not want it: it has said so through the control queue.
    Filtered,
}

/// Names of [`Drop`], in order.
pub const DROPS: [(Drop, &str); 7] = [
    (Drop::NoBuffers, "no_buffers"),
    (Drop::TooLong, "too_long"),
    (Drop::LinkDown, "link_down"),
    (Drop::Malformed, "malformed"),
    (Drop::BadHeader, "bad_header"),
    (Drop::NoDestination, "no_destination"),
    (Drop::Filtered, "filtered"),
];

/// Packets to more than one, of all that went one way.
#[derive(Debug, Default)]
pub struct Groups {
    /// To groups, without those to all.
    pub multicast: Counter,
    /// To all.
    pub broadcast: Counter,
}

impl Groups {
    /// Counts packets that begin with this, if they are to more than one.
    #[inline]
    pub fn count(&self, packet: &[u8], packets: u64) {
        if packet.first().is_some_and(|first| first & 1 != 0) {
            self.count_group(packet, packets);
        }
    }

    /// Counts packets, which may all be between the same addresses.
    #[inline]
    pub fn count_run(&self, packets: &[Option<Glance>], are_alike: bool) {
        let (first, count) = if are_alike { (1, packets.len() as u64) } else { (packets.len(), 1) };
        packets.iter().flatten().take(first).for_each(|packet| self.count(&packet.bytes(), count));
    }

    #[cold]
    fn count_group(&self, packet: &[u8], packets: u64) {
        let is_to_all = packet.get(..6) == Some(&[0xff; 6]);
        if is_to_all { &self.broadcast } else { &self.multicast }.add(packets);
    }
}

/// What a queue pair has moved, on one reactor.
#[derive(Debug, Default)]
pub struct PairStats {
    /// Packets the guest was given.
    pub rx_packets: Counter,
    /// Their bytes, without virtio headers.
    pub rx_bytes: Counter,
    /// Those of them that were not to one.
    pub rx_groups: Groups,
    /// Packets the guest has sent.
    pub tx_packets: Counter,
    /// Their bytes.
    pub tx_bytes: Counter,
    /// Those of them that were not to one.
    pub tx_groups: Groups,
    /// Packets for the guest that it did not get.
    rx_drops: [Counter; DROPS.len()],
    /// Packets for the guest that came to a reactor which its queue had left.
    missed: AtomicU64,
    /// Packets of the guest that went nowhere.
    tx_drops: [Counter; DROPS.len()],
    /// Times a packet of the guest had to wait for buffers of its receiver.
    pub tx_waits: Counter,
    /// Times the port's rate limit had a packet of the guest wait.
    pub tx_limited: Counter,
    /// For how many nanoseconds in all.
    pub tx_limited_ns: Counter,
}

impl PairStats {
    /// Counts a packet for the guest that it did not get.
    pub fn drop_rx(&self, why: Drop) {
        self.rx_drops[why as usize].add(1);
    }

    /// Counts a packet for the guest that came to where its queue was and is no more: anybody may, as counters of the pair
    /// are another reactor's by now.
    #[cold]
    pub fn miss_rx(&self) {
        self.missed.fetch_add(1, Ordering::Relaxed);
    }

    /// Counts a packet of the guest that went nowhere.
    pub fn drop_tx(&self, why: Drop) {
        self.tx_drops[why as usize].add(1);
    }

    /// Packets for the guest that it did not get, for this reason.
    pub fn rx_drops(&self, why: Drop) -> u64 {
        let missed = if why == Drop::LinkDown { self.missed.load(Ordering::Relaxed) } else { 0 };
        self.rx_drops[why as usize].get() + missed
    }

    /// Packets of the guest that went nowhere, for this reason.
    pub fn tx_drops(&self, why: Drop) -> u64 {
        self.tx_drops[why as usize].get()
    }
}
