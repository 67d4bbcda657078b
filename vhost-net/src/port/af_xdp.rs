//! A queue of an interface as an uplink, around the kernel's stack (AF_XDP, Documentation/networking/af_xdp.rst).
//!
//! Frames come and go through memory that is shared with the kernel, or with the network card itself where its driver
//! can do that ("zero copy"): that is tried first. There are no offloads here: what is sent must be whole frames of at
//! most the MTU, checksums and all.
//!
//! One uplink has one queue. What the card puts into its other queues goes to the kernel as ever, so the card is to be
//! given one queue, or rules (`ethtool -L`, `ethtool -N`).
#![allow(unsafe_code)] // frames in memory that is shared with the kernel

use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::ptr;

use crossbeam::channel::{Receiver, TryRecvError, bounded};
use nix::errno::Errno;
use poll_engine::confine::{self, Role};
use poll_engine::memory::slice::GuestSlice;
use tracing::{info, warn};
use xdp::error::SocketError;
use xdp::nic::NicIndex;
use xdp::slab::{HeapSlab, Slab};
use xdp::socket::{XdpSocket, XdpSocketBuilder};
use xdp::umem::{FrameSize, UmemCfgBuilder};
use xdp::{CompletionRing, FillRing, RingConfigBuilder, RxRing, TxRing, Umem};

use super::interface::{Interface, errno, promiscuous};
use super::xdp_program::{Mode, Program};
use super::{Counters, Link, Refused, Uplink, UplinkError};
use crate::header::{F_NEEDS_CSUM, GSO_NONE, VnetHdr};
use crate::packet::ETHERNET;

/// Frames that memory is shared for.
const FRAMES: u32 = 4096;
/// Those of them that wait to be received into.
const RECEIVE: u32 = 2048;
/// Frames taken or handed over at a time.
const BATCH: usize = 64;
/// Times that the kernel is asked to go on sending, 32 frames each time it has to copy.
const KICKS: usize = 1 + BATCH / 32;

/// An AF_XDP socket on a queue of an interface.
pub struct AfXdp {
    // Dropped in this order: the program first, the shared memory last.
    program: Program,
    socket: XdpSocket,
    received: RxRing,
    fill: FillRing,
    sent: TxRing,
    completed: CompletionRing,
    /// Frames on their way to `take`, and frames that wait to be sent.
    inward: HeapSlab,
    outward: HeapSlab,
    umem: Umem,
    /// Keeps the interface promiscuous.
    _promiscuous: OwnedFd,
    interface: Interface,
    index: u32,
    queue: u32,
    /// Frames handed over to be sent that have not come back.
    under_way: usize,
    /// Frames taken from those to be received into that have not been put back.
    owed: usize,
    gone: bool,
    /// The one in its place, when the interface is back.
    next: Option<Receiver<Result<AfXdp, UplinkError>>>,
    /// It was said why that cannot be used.
    told: bool,
    zero_copy: bool,
    counters: Counters,
    /// Drops that the kernel had counted for this socket before.
    missed: u64,
}

// SAFETY: what is not Send in it are the addresses of frames in `umem`, which goes along.
unsafe impl Send for AfXdp {}

impl AfXdp {
    /// Joins a queue of an interface, which must be there and up, and have no XDP program yet.
    pub fn open(name: &str, queue: u32) -> Result<AfXdp, UplinkError> {
        let interface = Interface::new(name).map_err(|e| of_open(name, "open a socket", errno(&e)))?;
        let index = interface.index().ok_or_else(|| UplinkError::Missing(name.to_owned()))?;
        let promiscuous = promiscuous(index).map_err(|why| of_open(name, "open a packet socket", why))?;
        interface.index_up()?;
        if let Ok(queues) = NicIndex::new(index).queue_counts()
            && queues.rx_count() > 1
        {
            let count = queues.rx_count();
            warn!("uplink {name}: of {count} queues only {queue} is ours: `ethtool -L {name} combined 1`");
        }
        let (program, mode) =
            Program::attach(index).map_err(|why| of_open(name, "attach an XDP program", why))?;
        // The one without copies first.
        let attempt = bound(index, queue, true).map(|bound| (bound, true));
        let attempt = attempt.or_else(|_| bound(index, queue, false).map(|bound| (bound, false)));
        let (bound, zero_copy) = attempt.map_err(|(what, why)| of_open(name, what, why))?;
        let Bound { socket, received, fill, sent, completed, umem } = bound;
        let mut port = AfXdp {
            program,
            socket,
            received,
            fill,
            sent,
            completed,
            inward: HeapSlab::with_capacity(BATCH),
            outward: HeapSlab::with_capacity(BATCH),
            umem,
            _promiscuous: promiscuous,
            interface,
            index,
            queue,
            under_way: 0,
            owed: RECEIVE as usize,
            gone: false,
            next: None,
            told: false,
            zero_copy,
            counters: Counters::default(),
            missed: 0,
        };
        port.refill();
        let socket = port.descriptor();
        port.program.give(queue, socket).map_err(|why| of_open(name, "give the socket its queue", why))?;
        let copies = if zero_copy { "zero copy" } else { "copy mode: the driver has no zero copy" };
        let place = if mode == Mode::Driver { "in the driver" } else { "generic: the driver has no XDP" };
        info!("uplink {name}: AF_XDP on queue {queue}, {copies}, XDP {place}");
        Ok(port)
    }

    /// Whether the card itself reads and writes the frames.
    pub fn is_zero_copy(&self) -> bool {
        self.zero_copy
    }

    /// Gives the kernel frames to receive into for those taken.
    fn refill(&mut self) {
        // SAFETY: the shared memory is dropped after the socket.
        self.owed -= unsafe { self.fill.enqueue(&mut self.umem, self.owed) };
    }

    /// Takes back what was sent.
    fn reap(&mut self) {
        let done = self.completed.dequeue(&mut self.umem, self.under_way);
        self.under_way -= done;
    }

    /// Has the kernel send what it was given.
    fn kick(&self) -> Result<(), Errno> {
        for _ in 0..KICKS {
            // SAFETY: nothing is sent but what is in the ring.
            let sent = unsafe {
                libc::sendto(self.socket.as_raw_fd(), ptr::null(), 0, libc::MSG_DONTWAIT, ptr::null(), 0)
            };
            match Errno::result(sent) {
                // There is more than it does at a time.
                Err(Errno::EAGAIN) => {}
                Ok(_) | Err(Errno::EBUSY | Errno::ENOBUFS | Errno::EINTR) => return Ok(()),
                Err(why) => return Err(why),
            }
        }
        Ok(())
    }
}

impl Uplink for AfXdp {
    fn receive(&mut self, most: usize, take: &mut dyn FnMut(&VnetHdr, &[u8])) -> usize {
        let mut done = 0;
        while done < most {
            // SAFETY: the packets go back into the shared memory below, before anything else.
            let count = unsafe { self.received.recv(&self.umem, &mut Limit(&mut self.inward, most - done)) };
            while let Some(packet) = self.inward.pop_back() {
                let frame: &[u8] = &packet;
                if frame.len() < ETHERNET {
                    self.counters.rx_length_errors += 1;
                } else {
                    self.counters.received(frame.len());
                    take(&VnetHdr::default(), frame);
                }
                self.umem.free_packet(packet);
            }
            self.owed += count;
            done += count;
            if count == 0 {
                break;
            }
        }
        if self.owed > 0 {
            self.refill();
        }
        done
    }

    fn send(
        &mut self,
        header: &VnetHdr,
        _: usize,
        head: &[u8],
        rest: &mut dyn Iterator<Item = GuestSlice<'_>>,
    ) -> Result<(), Refused> {
        if header.gso_type != GSO_NONE || header.flags & F_NEEDS_CSUM != 0 {
            return Err(self.counters.refused(Refused::Bad));
        }
        if self.gone {
            return Err(self.counters.refused(Refused::Down));
        }
        if self.outward.available() == 0 {
            self.flush();
        }
        // Frames that are owed to the receiving side are not for sending.
        if self.outward.available() == 0 || self.umem.allocatable() <= self.owed {
            return Err(self.counters.refused(Refused::Full));
        }
        // SAFETY: the packet goes back into the shared memory, or to the kernel.
        let Some(mut packet) = (unsafe { self.umem.alloc() }) else {
            return Err(self.counters.refused(Refused::Full));
        };
        let mut fits = packet.append(head).is_ok();
        for slice in rest {
            let at = packet.len();
            fits = fits && i32::try_from(slice.len()).is_ok_and(|len| packet.adjust_tail(len).is_ok());
            if !fits {
                break;
            }
            slice.read(&mut packet[at..]);
        }
        if !fits {
            self.umem.free_packet(packet);
            return Err(self.counters.refused(Refused::TooLong));
        }
        let len = packet.len();
        if self.outward.push_front(packet).is_some() {
            unreachable!("there was room");
        }
        self.counters.sent(len);
        Ok(())
    }

    fn flush(&mut self) {
        if self.under_way > 0 {
            self.reap();
        }
        if !self.outward.is_empty() {
            // All of them or none: those that find no room wait for the next time.
            // SAFETY: the shared memory is dropped after the socket.
            self.under_way += unsafe { self.sent.send(&mut self.outward) };
        }
        if self.under_way > 0
            && let Err(why) = self.kick()
            && matches!(why, Errno::ENETDOWN | Errno::ENXIO | Errno::ENODEV)
        {
            self.counters.tx_carrier_errors += 1;
        }
    }

    fn takes(&self) -> u64 {
        0
    }

    fn descriptor(&self) -> BorrowedFd<'_> {
        // SAFETY: the socket is open for as long as it is borrowed.
        unsafe { BorrowedFd::borrow_raw(self.socket.as_raw_fd()) }
    }

    fn link(&mut self) -> Link {
        let index = self.interface.index();
        if index != Some(self.index) || self.gone {
            let name = self.interface.name().to_owned();
            if !self.gone {
                self.gone = true;
                warn!("uplink {name}: the interface is gone; the link is down until it is back");
            }
            match self.next.as_ref().map(Receiver::try_recv) {
                Some(Err(TryRecvError::Empty)) => {}
                Some(Ok(Ok(new))) => {
                    let counters = self.counters;
                    *self = AfXdp { counters, ..new };
                }
                outcome => {
                    // One that is there and not up yet will be.
                    if let Some(Ok(Err(why))) = outcome
                        && !matches!(why, UplinkError::Missing(_) | UplinkError::Down(_))
                        && !std::mem::replace(&mut self.told, true)
                    {
                        warn!("uplink {name} is there again and cannot be used: {why}; trying on");
                    }
                    self.next = index.and_then(|_| reopen(name, self.queue));
                }
            }
        }
        let mut link = self.interface.link();
        link.up &= !self.gone;
        link
    }

    fn counters(&mut self) -> Counters {
        if let Ok(statistics) = self.socket.statistics() {
            let missed =
                statistics.rx_dropped + statistics.rx_ring_full + statistics.rx_fill_ring_empty_descs;
            self.counters.rx_missed_errors += missed - self.missed;
            self.missed = missed;
        }
        self.counters
    }
}

/// Has a thread that may open an interface do so.
fn reopen(name: String, queue: u32) -> Option<Receiver<Result<AfXdp, UplinkError>>> {
    let (tell, told) = bounded(1);
    let open = move || drop(tell.send(AfXdp::open(&name, queue)));
    confine::post("uplink-return", Role::Opener, open).ok().map(|()| told)
}

/// A slab that takes only so many more.
struct Limit<'a>(&'a mut HeapSlab, usize);

impl Slab for Limit<'_> {
    fn available(&self) -> usize {
        self.0.available().min(self.1)
    }

    fn len(&self) -> usize {
        self.0.len()
    }

    fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    fn push_front(&mut self, packet: xdp::Packet) -> Option<xdp::Packet> {
        self.0.push_front(packet)
    }

    fn pop_back(&mut self) -> Option<xdp::Packet> {
        self.0.pop_back()
    }
}

/// A socket that is bound, with what it shares with the kernel.
struct Bound {
    socket: XdpSocket,
    received: RxRing,
    fill: FillRing,
    sent: TxRing,
    completed: CompletionRing,
    umem: Umem,
}

type Failed = (&'static str, Errno);

fn bound(index: u32, queue: u32, zero_copy: bool) -> Result<Bound, Failed> {
    let of_config = |what| move |_| (what, Errno::EINVAL);
    let config =
        UmemCfgBuilder { frame_size: FrameSize::FourK, frame_count: FRAMES, ..UmemCfgBuilder::default() };
    let config = config.build().map_err(of_config("lay out shared memory"))?;
    let umem = Umem::map(config).map_err(|why| ("map shared memory", errno(&why)))?;
    let mut builder = XdpSocketBuilder::new().map_err(|why| of_socket(&why))?;
    let rings = RingConfigBuilder {
        rx_count: RECEIVE,
        fill_count: RECEIVE,
        tx_count: FRAMES - RECEIVE,
        completion_count: FRAMES - RECEIVE,
    };
    let rings = rings.build().map_err(of_config("lay out rings"))?;
    let (rings, mut flags) = builder.build_rings(&umem, rings).map_err(|why| of_socket(&why))?;
    if zero_copy {
        flags.force_zerocopy();
    } else {
        flags.force_copy();
    }
    let socket = builder.bind(NicIndex::new(index), queue, flags).map_err(|why| of_socket(&why))?;
    let (Some(received), Some(sent)) = (rings.rx_ring, rings.tx_ring) else {
        return Err(("make rings", Errno::EINVAL));
    };
    Ok(Bound { socket, received, fill: rings.fill_ring, sent, completed: rings.completion_ring, umem })
}

fn of_socket(why: &SocketError) -> Failed {
    match why {
        SocketError::SocketCreation(why) => ("open an AF_XDP socket", errno(why)),
        SocketError::SetSockOpt { inner, .. } | SocketError::GetSockOpt { inner, .. } => {
            ("share memory with the kernel", errno(inner))
        }
        SocketError::RingMap { inner, .. } => ("map a ring", errno(inner)),
        SocketError::Bind(why) => ("bind an AF_XDP socket", errno(why)),
    }
}

fn of_open(name: &str, what: &'static str, why: Errno) -> UplinkError {
    let unsupported =
        |name, instead| UplinkError::Unsupported { name, what: "AF_XDP", why: why.into(), instead };
    let name = name.to_owned();
    match why {
        Errno::EPERM | Errno::EACCES => UplinkError::Permission {
            name,
            what: "an AF_XDP socket",
            capability: "CAP_NET_RAW, CAP_NET_ADMIN and CAP_BPF",
        },
        Errno::EAFNOSUPPORT | Errno::ENOSYS => {
            unsupported(name, "the kernel needs CONFIG_XDP_SOCKETS; use a packet socket")
        }
        Errno::EBUSY | Errno::EEXIST => {
            unsupported(name, "it has another XDP program or socket: see `ip link show` and `bpftool net`")
        }
        Errno::ENOBUFS | Errno::ENOMEM => {
            unsupported(name, "too little memory may be locked: raise LimitMEMLOCK (`ulimit -l`)")
        }
        Errno::EOPNOTSUPP | Errno::EINVAL | Errno::ERANGE => {
            unsupported(name, "is its MTU 3500 or less, and the queue one it has? else use a packet socket")
        }
        Errno::ENODEV | Errno::ENXIO => UplinkError::Missing(name),
        Errno::ENETDOWN => UplinkError::Down(name),
        _ => UplinkError::Other { name, what, why: why.into() },
    }
}
