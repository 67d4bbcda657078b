//! Packets for ports whose queues are on another reactor, as when one guest uses more queues than another. They are copied
//! once more, into memory of ours, so that each reactor has its own guests' rings and nobody waits for another.

use crossbeam::queue::ArrayQueue;
use poll_engine::engine::station::Waker;
use poll_engine::ring::chain::ChainView;

use crate::hub::Port;
use crate::tx::Head;

/// Most packets on their way to one reactor.
pub const PARCELS: usize = 256;

/// One packet.
#[derive(Debug, Default)]
pub struct Parcel {
    /// The port it is for.
    pub port: usize,
    /// Which of those that have had its number.
    pub serial: u64,
    /// The pair of queues that it came from.
    pub pair: usize,
    /// What was decided on.
    pub head: Head,
    /// The sender's chain.
    pub bytes: Vec<u8>,
}

/// The way to one reactor.
#[derive(Debug)]
pub struct Chute {
    waker: Waker,
    full: ArrayQueue<Parcel>,
    free: ArrayQueue<Parcel>,
}

impl Chute {
    /// To the reactor that this wakes.
    pub fn new(waker: Waker) -> Chute {
        let free = ArrayQueue::new(PARCELS);
        // Their memory comes with the first packet that is in each, and stays.
        (0..PARCELS).for_each(|_| _ = free.push(Parcel::default()));
        Chute { waker, full: ArrayQueue::new(PARCELS), free }
    }

    /// Sends a packet; false if too many are on their way.
    pub fn send(&self, port: (usize, &Port), pair: usize, head: &Head, chain: &ChainView<'_>) -> bool {
        self.pass(port, pair, head, |bytes| {
            bytes.resize(chain.readable_len() as usize, 0);
            chain.readable(0, u32::MAX).read(bytes);
        })
    }

    /// The same, of a frame that is in memory of ours.
    pub fn send_frame(&self, port: (usize, &Port), pair: usize, head: &Head, frame: &[u8]) -> bool {
        self.pass(port, pair, head, |bytes| {
            bytes.clear();
            bytes.extend_from_slice(frame);
        })
    }

    fn pass(
        &self,
        (at, port): (usize, &Port),
        pair: usize,
        head: &Head,
        fill: impl FnOnce(&mut Vec<u8>),
    ) -> bool {
        let Some(mut parcel) = self.free.pop() else { return false };
        (parcel.port, parcel.serial, parcel.pair) = (at, port.serial, pair);
        parcel.head.clone_from(head);
        fill(&mut parcel.bytes);
        let sent = self.full.push(parcel).is_ok();
        self.waker.wake();
        sent
    }

    /// The next packet, to be [given back](Self::give_back).
    #[inline]
    pub fn receive(&self) -> Option<Parcel> {
        if self.full.is_empty() { None } else { self.full.pop() }
    }

    /// Whether one is there.
    pub fn has_parcel(&self) -> bool {
        !self.full.is_empty()
    }

    /// Makes room for another.
    pub fn give_back(&self, parcel: Parcel) {
        let _ = self.free.push(parcel);
    }
}
