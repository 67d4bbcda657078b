//! What a tap's queues count. Nothing is dropped without a reason that has a name.

use poll_engine::stats::Counter;

use crate::mib::Flow;
use crate::stats::Groups;

/// Why something is dropped.
pub trait Reason: Copy + 'static {
    /// All there are, with their names, in order.
    const ALL: &'static [(Self, &'static str)];

    /// Its place among them.
    fn index(self) -> usize;
}

/// Why a frame from the tap does not reach the guest, or a buffer is not used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReceiveDrop {
    /// Longer than a buffer of the guest's, or than all of them together.
    TooLong,
    /// Read, but the queue was stopped before the guest had buffers for it.
    NoBuffer,
    /// No frame but a buffer: it has not even room for a header.
    SmallBuffer,
    /// It came with something left undone that the guest does not take: from before the guest said so.
    Offload,
    /// The kernel could not write it to the guest's buffers.
    Failed,
}

impl Reason for ReceiveDrop {
    const ALL: &'static [(ReceiveDrop, &'static str)] = &[
        (ReceiveDrop::TooLong, "length_drops"),
        (ReceiveDrop::NoBuffer, "no_buffer_drops"),
        (ReceiveDrop::SmallBuffer, "small_buffer_errors"),
        (ReceiveDrop::Offload, "offload_drops"),
        (ReceiveDrop::Failed, "failed_drops"),
    ];

    fn index(self) -> usize {
        self as usize
    }
}

/// Why a frame of the guest's does not reach the tap.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TransmitDrop {
    /// Not even a whole header, or nothing but that.
    Short,
    /// Longer than any frame, or in more pieces than the kernel takes.
    TooLong,
    /// The header does not fit the frame, or asks for what was not negotiated.
    Header,
    /// The interface is down.
    Down,
    /// The interface has been deleted.
    Gone,
    /// The kernel's queue is full.
    Full,
    /// The kernel refuses it.
    Refused,
}

impl Reason for TransmitDrop {
    const ALL: &'static [(TransmitDrop, &'static str)] = &[
        (TransmitDrop::Short, "short_drops"),
        (TransmitDrop::TooLong, "length_drops"),
        (TransmitDrop::Header, "header_drops"),
        (TransmitDrop::Down, "link_down_drops"),
        (TransmitDrop::Gone, "gone_drops"),
        (TransmitDrop::Full, "full_drops"),
        (TransmitDrop::Refused, "refused_drops"),
    ];

    fn index(self) -> usize {
        self as usize
    }
}

/// The counters of one queue, in one direction.
#[derive(Debug)]
pub struct Way<R> {
    /// Frames that got through.
    pub packets: Counter,
    /// Their bytes, without virtio headers.
    pub bytes: Counter,
    /// Those of them that were not to one.
    pub groups: Groups,
    /// Times that a frame had to wait for the other side.
    pub waits: Counter,
    drops: Vec<Counter>,
    reasons: std::marker::PhantomData<fn(R)>,
}

impl<R: Reason> Default for Way<R> {
    fn default() -> Self {
        let (packets, bytes, groups, waits) = Default::default();
        let drops = R::ALL.iter().map(|_| Counter::default()).collect();
        Way { packets, bytes, groups, waits, drops, reasons: std::marker::PhantomData }
    }
}

impl<R: Reason> Way<R> {
    /// Counts a frame to this address that got through.
    #[inline]
    pub fn passed(&self, destination: &[u8], bytes: u64) {
        self.groups.count(destination, 1);
        self.packets.add(1);
        self.bytes.add(bytes);
    }

    /// Counts one that did not.
    pub fn dropped(&self, why: R) {
        self.drops[why.index()].add(1);
    }

    /// How many were dropped for this reason.
    pub fn drops(&self, why: R) -> u64 {
        self.drops[why.index()].get()
    }

    /// What an interface counts of it. Errors are what `is_error` says.
    pub(super) fn flow(&self, is_error: impl Fn(R) -> bool) -> Flow {
        let (groups, octets) = ([self.groups.multicast.get(), self.groups.broadcast.get()], self.bytes.get());
        let mut flow = Flow::new(self.packets.get(), groups, octets);
        for (why, _) in R::ALL {
            *if is_error(*why) { &mut flow.errors } else { &mut flow.discards } += self.drops(*why);
        }
        flow
    }

    pub(super) fn list(&self, prefix: &str, into: &mut Vec<(String, u64)>) {
        let common = [
            ("packets", &self.packets),
            ("bytes", &self.bytes),
            ("multicast", &self.groups.multicast),
            ("broadcast", &self.groups.broadcast),
            ("waits", &self.waits),
        ];
        let drops = R::ALL.iter().zip(&self.drops).map(|((_, name), counter)| (*name, counter));
        into.extend(
            common.into_iter().chain(drops).map(|(name, counter)| (format!("{prefix}{name}"), counter.get())),
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn in_order<R: Reason>() -> bool {
        R::ALL.iter().enumerate().all(|(at, (reason, _))| reason.index() == at)
    }

    #[test]
    fn every_reason_has_the_name_at_its_place() {
        assert!(in_order::<ReceiveDrop>() && in_order::<TransmitDrop>());
        let way = Way::<TransmitDrop>::default();
        way.dropped(TransmitDrop::Header);
        let mut all = Vec::new();
        way.list("tx_queue_0_", &mut all);
        assert!(all.contains(&("tx_queue_0_header_drops".into(), 1)), "{all:?}");
        assert_eq!(all.iter().map(|(_, n)| n).sum::<u64>(), 1);
    }
}
