//! A packet into a guest's receive buffers (virtio 1.3, 5.1.6.4).

use poll_engine::engine::queue::{Queue, Request};
use poll_engine::memory::GuestSlice;
use poll_engine::ring::chain::{ChainView, HeldChain, Slices};

use crate::header::{HEADER, HashReport};
use crate::tx::{GLANCE, Glance, Head};

/// Most receive buffers that a packet is spread over: 64 KiB in buffers of a page.
pub const MAX_BUFFERS: usize = 64;

/// Why a packet is not received.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refused {
    /// The driver has not made enough buffers available: not now.
    NoBuffers,
    /// It does not fit into what the driver makes available.
    TooLong,
    /// The ring is broken.
    Broken,
}

/// What a guest's receive queues expect.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Form {
    /// Bytes of the header.
    pub header: usize,
    /// A packet may be spread over buffers (`VIRTIO_NET_F_MRG_RXBUF`).
    pub mergeable: bool,
    /// What a header with a hash says.
    pub hash: HashReport,
}

/// Bytes of a packet behind its head.
pub trait Rest {
    /// Moves the next bytes into `to`, all of it unless there are no more.
    fn fill(&mut self, to: GuestSlice<'_>);
}

/// A sender's bytes.
pub trait Sent {
    /// Some of them, by their place among all.
    fn part(&self, offset: u32, len: u32) -> impl Rest;
}

impl Sent for ChainView<'_> {
    #[inline]
    fn part(&self, offset: u32, len: u32) -> impl Rest {
        InChain::new(self.readable(offset, len))
    }
}

impl Sent for [u8] {
    fn part(&self, offset: u32, len: u32) -> impl Rest {
        let from = self.get(offset as usize..).unwrap_or_default();
        &from[..from.len().min(len as usize)]
    }
}

/// In a sender's chain.
#[derive(Debug)]
pub struct InChain<'a> {
    slices: Slices<'a>,
    part: Option<GuestSlice<'a>>,
}

impl<'a> InChain<'a> {
    /// These.
    #[inline]
    pub fn new(slices: Slices<'a>) -> InChain<'a> {
        InChain { slices, part: None }
    }
}

impl Rest for InChain<'_> {
    #[inline]
    fn fill(&mut self, mut to: GuestSlice<'_>) {
        while !to.is_empty() {
            let Some(part) = self.part.take().or_else(|| self.slices.next()) else { return };
            let n = part.copy_to(&to);
            to = to.part(n, usize::MAX);
            if n < part.len() {
                self.part = Some(part.part(n, usize::MAX));
            }
        }
    }
}

/// In memory of our own.
impl Rest for &[u8] {
    #[inline]
    fn fill(&mut self, to: GuestSlice<'_>) {
        let n = to.write(self);
        *self = &self[n..];
    }
}

/// Buffers taken for a packet that needs more than one.
#[derive(Debug, Default)]
pub struct Spread {
    taken: Vec<(Request, u32)>,
    chains: Vec<HeldChain>,
}

impl Spread {
    /// Room for the largest packet.
    pub fn new() -> Spread {
        let chains = std::iter::repeat_with(HeldChain::default).take(MAX_BUFFERS).collect();
        Spread { taken: Vec::with_capacity(MAX_BUFFERS), chains }
    }
}

/// Copies a packet of which no more is to be known than a glance has told, straight from one guest's buffer into another
/// guest's buffer: all of it, unless the sender has more of it in further buffers. False, and nothing was copied, without
/// room for it all.
#[inline(always)] // once a packet of a burst
pub fn copy(packet: &Glance, sent: GuestSlice<'_>, to: GuestSlice<'_>) -> bool {
    const HEAD: usize = HEADER + GLANCE;
    let len = packet.len_in_ring() as usize;
    if to.len() < len {
        return false;
    }
    // What the sender's header says besides is nobody's concern.
    let _ = to.write_array::<HEADER>([0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0]);
    let _ = to.part(HEADER, GLANCE).write_array(packet.bytes());
    sent.part(HEAD, usize::MAX).copy_to(&to.part(HEAD, len - HEAD));
    true
}

/// The same for chains that may be of several buffers; of the receiver's, the first one is to have room.
#[cold]
pub fn copy_chain(packet: &Glance, from: &ChainView<'_>, to: &ChainView<'_>) -> bool {
    let (Some(sent), Some(to)) = (from.first_readable(), to.first_writable()) else { return false };
    let len = packet.len_in_ring() as usize;
    if !copy(packet, sent, to) {
        return false;
    }
    if sent.len() < len {
        InChain::new(from.readable(sent.len() as u32, u32::MAX)).fill(to.part(sent.len(), len - sent.len()));
    }
    true
}

/// Puts a packet into the next receive buffer or buffers: its head, and what is behind that in the sender's chain.
#[inline]
pub fn deliver(
    rx: &mut Queue,
    form: Form,
    head: &mut Head,
    mut rest: impl Rest,
    spread: &mut Spread,
) -> Result<(), Refused> {
    if !rx.has_chain() {
        return Err(if rx.is_broken() { Refused::Broken } else { Refused::NoBuffers });
    }
    let Some(request) = rx.take() else { return Err(Refused::Broken) };
    let chain = rx.chain();
    head.make_received(form.header, form.hash);
    let (len, whole) = (head.len(), head.is_whole());
    if chain.writable_len() >= len {
        let bytes = head.bytes(1);
        let mut to = chain.writable(0, len);
        // One buffer for all of it is what there is nearly always.
        match to.next() {
            Some(first) if first.len() >= bytes.len() => {
                first.write(bytes);
                if !whole {
                    rest.fill(first.part(bytes.len(), usize::MAX));
                    to.for_each(|slice| rest.fill(slice));
                }
            }
            _ => {
                chain.writable(0, len).write(bytes);
                chain.writable(bytes.len() as u32, len).for_each(|slice| rest.fill(slice));
            }
        }
        rx.complete(request, len);
        return Ok(());
    }
    if !form.mergeable || (chain.writable_len() as usize) < HEADER {
        // It is the driver's to take: what it has made available is not what it has agreed to.
        rx.untake(request);
        return Err(Refused::TooLong);
    }
    scatter(rx, request, head, rest, spread)
}

/// Spreads a packet over as many buffers as it needs, or gives them all back.
#[cold]
fn scatter(
    rx: &mut Queue,
    first: Request,
    head: &mut Head,
    mut rest: impl Rest,
    spread: &mut Spread,
) -> Result<(), Refused> {
    let mut left = head.len();
    let mut taken = Some(first);
    let refused = loop {
        let request = match taken.take() {
            Some(request) => request,
            None if spread.taken.len() == MAX_BUFFERS => break Some(Refused::TooLong),
            None if !rx.has_chain() => break Some(Refused::NoBuffers),
            None => match rx.take() {
                Some(request) => request,
                None => break Some(Refused::Broken),
            },
        };
        let room = rx.chain().writable_len().min(left);
        let held = &mut spread.chains[spread.taken.len()];
        rx.hold_chain(held);
        spread.taken.push((request, room));
        left -= room;
        if left == 0 {
            break None;
        }
        if room == 0 {
            break Some(Refused::TooLong);
        }
    };
    if let Some(refused) = refused {
        while let Some((request, _)) = spread.taken.pop() {
            spread.chains[spread.taken.len()].release();
            rx.untake(request);
        }
        return Err(refused);
    }
    let count = spread.taken.len();
    let bytes = head.bytes(count as u16);
    let mut done = 0;
    for ((request, len), held) in spread.taken.drain(..).zip(&mut spread.chains) {
        if let Some(chain) = held.view() {
            let mut at = 0;
            if done < bytes.len() {
                at = chain.writable(0, len).write(&bytes[done..]);
                done += at;
            }
            chain.writable(at as u32, len - at as u32).for_each(|slice| rest.fill(slice));
            rx.complete_held(request, len, &chain);
        }
        held.release();
    }
    Ok(())
}
