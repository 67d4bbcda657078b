//! From the guest to the tap: each chain is one write, of a header that was checked and copied and of the guest's frame
//! where it lies.
//!
//! Writes never wait (`RWF_NOWAIT`): the kernel carries each out while it is submitted, so their order is that of the
//! ring, and so is that of their completions.
#![allow(unsafe_code)] // submissions carry addresses of guest memory, headers and iovecs

use std::io;
use std::os::fd::AsRawFd;

use io_uring::{opcode, types};
use poll_engine::device::QueueHandler;
use poll_engine::engine::queue::{Queue, Request};
use poll_engine::engine::reactor::Io;
use poll_engine::ring::chain::{ChainView, HeldChain};
use poll_engine::stats::ErrorKind;

use super::counters::TransmitDrop;
use super::{Pair, Running};
use crate::header::{BadHeader, F_NEEDS_CSUM, GSO_NONE, HEADER, Offload, VnetHdr, header_len};
use crate::packet::{ETHERNET, LARGEST, PEEK, Packet};
use crate::pcap::{Direction, Probe};

/// Most iovecs of one write (`UIO_MAXIOV`), without that of the header.
const MAX_PIECES: usize = 1023;
/// Iovecs that a slot has room for from the start: a frame of 64 KiB in pages.
const USUAL_PIECES: usize = 20;

/// A frame on its way.
struct Slot {
    request: Option<Request>,
    held: HeldChain,
    header: [u8; HEADER],
    iovecs: Vec<libc::iovec>,
    len: u32,
    /// Whom it is to.
    destination: [u8; 6],
    is_over: bool,
}

// SAFETY: the iovecs are addresses kept for the kernel, not used by us; they point to the header of the same slot and into
// memory that its `held` keeps alive, whatever thread that is on.
unsafe impl Send for Slot {}

/// The handler of a transmit queue.
pub struct Transmit {
    to: Running,
    features: u64,
    header_len: usize,
    /// In the order of the ring: `count` are in use, from `first` on, round the end.
    slots: Box<[Slot]>,
    first: usize,
    count: usize,
    probe: Option<Probe>,
}

impl Transmit {
    pub(super) fn new(to: Running, features: u64, ring_size: u16) -> Transmit {
        let slot = || Slot {
            request: None,
            held: HeldChain::default(),
            header: [0; HEADER],
            iovecs: Vec::with_capacity(USUAL_PIECES),
            len: 0,
            destination: [0; 6],
            is_over: false,
        };
        let slots = std::iter::repeat_with(slot).take(ring_size.into()).collect();
        Transmit { to, features, header_len: header_len(features), slots, first: 0, count: 0, probe: None }
    }

    /// Notes frames in a capture, if there is one.
    #[must_use]
    pub fn captured(self, probe: Option<Probe>) -> Transmit {
        Transmit { probe, ..self }
    }

    fn pair(&self) -> &Pair {
        self.to.pair()
    }

    #[inline]
    fn place(&self, nth: usize) -> usize {
        let at = self.first + nth;
        if at < self.slots.len() { at } else { at - self.slots.len() }
    }

    /// Begins to send the chain taken last.
    #[inline]
    fn send(&mut self, request: Request, queue: &mut Queue, io: &mut Io<'_>) {
        // The ring lets no more chains be in flight than it has descriptors, and there is a slot for each.
        let tag = self.place(self.count);
        self.count += 1;
        let slot = &mut self.slots[tag];
        slot.request = Some(request);
        slot.is_over = false;
        let begun = prepare(slot, queue, self.features, self.header_len);
        if let Err(why) = begun {
            self.refuse(tag, &why, queue);
            return;
        }
        if let (Some(probe), Some(chain)) = (&mut self.probe, slot.held.view()) {
            let header = VnetHdr::from_bytes(&slot.header);
            probe.note(Direction::Outbound, &header, slot.len as usize, |at, into| {
                chain.readable((self.header_len + at) as u32, into.len() as u32).read(into)
            });
        }
        let (iovecs, n) = (slot.iovecs.as_ptr(), slot.iovecs.len() as u32);
        let fd = types::Fd(self.to.tun().as_raw_fd());
        let write = opcode::Writev::new(fd, iovecs, n).rw_flags(libc::RWF_NOWAIT).build();
        let write = write.user_data(io.label(tag as u32));
        // SAFETY: the iovecs, the header and the chain that they point to stay in the slot, which has its place on the heap
        // and is not used again before the completion with its tag. The descriptor is open for as long as the handler is,
        // which outlives what is pending (`QueueHandler::detach`).
        unsafe { io.uring().push(&write) };
    }

    #[cold]
    fn refuse(&mut self, tag: usize, why: &Refused, queue: &mut Queue) {
        queue.count_error(ErrorKind::Malformed, why);
        self.pair().transmit.dropped(why.counted());
        self.slots[tag].is_over = true;
        self.give_back(queue);
    }

    /// Gives back what is over, in order.
    #[inline]
    fn give_back(&mut self, queue: &mut Queue) {
        while self.count > 0 && self.slots[self.first].is_over {
            let slot = &mut self.slots[self.first];
            if let (Some(request), Some(chain)) = (slot.request.take(), slot.held.view()) {
                queue.complete_held(request, 0, &chain);
            }
            slot.held.release();
            self.first = self.place(1);
            self.count -= 1;
        }
    }

    #[cold]
    fn failed(&self, result: i32, queue: &Queue) {
        let why = self.to.tap.why_not_sent(-result);
        self.pair().transmit.dropped(why);
        match why {
            TransmitDrop::Refused => {
                let error = io::Error::from_raw_os_error(-result);
                queue.count_error(ErrorKind::Io, &format_args!("tap {}: {error}", self.to.tap.name));
            }
            TransmitDrop::Down => {
                let name = &self.to.tap.name;
                queue.count_error(
                    ErrorKind::Io,
                    &format_args!("tap {name} is down, so frames are dropped: ip link set {name} up"),
                );
            }
            _ => {}
        }
    }
}

/// Why a frame is not even tried.
#[derive(Debug, thiserror::Error)]
enum Refused {
    #[error("a chain of {0} bytes holds no frame")]
    Short(u32),
    #[error("a frame of {0} bytes")]
    Long(u32),
    #[error("a frame in more than {MAX_PIECES} pieces")]
    Pieces,
    #[error(transparent)]
    Header(#[from] BadHeader),
}

impl Refused {
    fn counted(&self) -> TransmitDrop {
        match self {
            Refused::Short(_) => TransmitDrop::Short,
            Refused::Long(_) | Refused::Pieces => TransmitDrop::TooLong,
            Refused::Header(_) => TransmitDrop::Header,
        }
    }
}

/// Holds the chain taken last in `slot`, with its header checked and copied and its frame as iovecs.
#[inline]
fn prepare(slot: &mut Slot, queue: &mut Queue, features: u64, header_len: usize) -> Result<(), Refused> {
    slot.iovecs.clear();
    queue.hold_chain(&mut slot.held);
    let Some(chain) = slot.held.view() else { unreachable!("the chain was held just now") };
    let all = chain.readable_len();
    let len = all.saturating_sub(header_len as u32);
    if (len as usize) < ETHERNET {
        return Err(Refused::Short(all));
    }
    if len as usize > LARGEST {
        return Err(Refused::Long(len));
    }
    slot.len = len;
    chain.readable(header_len as u32, 6).read(&mut slot.destination);
    slot.header = checked_header(&chain, header_len, len, features)?.header().to_bytes();
    slot.iovecs.push(libc::iovec { iov_base: (&raw mut slot.header).cast(), iov_len: HEADER });
    for piece in chain.readable(header_len as u32, len) {
        if slot.iovecs.len() > MAX_PIECES {
            return Err(Refused::Pieces);
        }
        slot.iovecs.push(libc::iovec { iov_base: piece.host_addr().cast(), iov_len: piece.len() });
    }
    Ok(())
}

/// What the guest leaves to be done with a frame of `len` bytes. The kernel holds that against the frame once more, which
/// the guest may have changed by then.
#[inline]
fn checked_header(
    chain: &ChainView<'_>,
    header_len: usize,
    len: u32,
    features: u64,
) -> Result<Offload, Refused> {
    let mut header = [0; HEADER];
    chain.readable(0, HEADER as u32).read(&mut header);
    let header = VnetHdr::from_bytes(&header);
    if header.flags & F_NEEDS_CSUM == 0 && header.gso_type == GSO_NONE {
        return Ok(Offload::default());
    }
    let mut head = [0; PEEK];
    let n = chain.readable(header_len as u32, len.min(PEEK as u32)).read(&mut head);
    let packet = Packet::parse(&head[..n], len as usize).map_err(|_| Refused::Short(len))?;
    Ok(header.check(&packet, features)?)
}

impl QueueHandler for Transmit {
    fn attach(&mut self, _: &mut Io<'_>) {}

    #[inline]
    fn poll(&mut self, queue: &mut Queue, io: &mut Io<'_>) -> usize {
        let ready = queue.ready();
        for _ in 0..ready {
            let Some(request) = queue.take() else { break };
            self.send(request, queue, io);
        }
        ready.into()
    }

    fn complete(&mut self, queue: &mut Queue, _: &mut Io<'_>, tag: u32, result: i32) {
        let slot = &mut self.slots[tag as usize];
        slot.is_over = true;
        if result < 0 {
            self.failed(result, queue);
        } else {
            let (len, destination) = (u64::from(slot.len), slot.destination);
            queue.stats().bytes_written.add(len);
            self.pair().transmit.passed(&destination, len);
        }
        self.give_back(queue);
    }

    fn detach(&mut self, _: &mut Io<'_>) {}
}
