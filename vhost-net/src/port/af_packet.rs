//! An interface of the host as an uplink, through a packet socket (packet(7)): works on all of them, at the price of the
//! kernel's stack.
//!
//! ```text
//! interface ─► recvmmsg ─► buffers of the host ─► take          small frames ─► one buffer ─► sendmmsg ─► interface
//!                                                               large frames straight from the guest ─► sendmsg
//! ```
//!
//! The socket has a virtio-net header before each frame (`PACKET_VNET_HDR`), so frames of 64 KiB cross in one piece and
//! checksums are left to who can do them best. The kernel keeps the VLAN tag of a received frame beside it
//! (`PACKET_AUXDATA`): it is put back. What the host itself sends on the interface is not seen, and the host does not see
//! what is sent here: like macvtap, this joins guests to what is beyond the interface.
#![allow(unsafe_code)] // sockets: options and messages that no crate has

use std::io;
use std::mem::{self, MaybeUninit};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::ptr;

use crossbeam::channel::{Receiver, TryRecvError, bounded};
use libc::{c_int, iovec, mmsghdr, msghdr, sockaddr_ll, tpacket_auxdata};
use nix::errno::Errno;
use poll_engine::confine::{self, Role};
use poll_engine::memory::slice::GuestSlice;
use tracing::{info, warn};

use super::interface::{Interface, errno, join_promiscuous};
use super::outgoing::{Parts, Staged, is_small};
use super::{Counters, Link, Refused, Uplink, UplinkError};
use crate::features::{GUEST_CSUM, GUEST_ECN, GUEST_TSO4, GUEST_TSO6};
use crate::header::VnetHdr;
use crate::packet::{ETHERNET, ETHERTYPE_VLAN, LARGEST, TAG};

/// Frames received or sent in one system call.
const BATCH: usize = 32;
/// Bytes of the header on a packet socket, which has no `num_buffers`. In the machine's order, which is little-endian on
/// all that we run on.
const SHORT_HEADER: usize = 10;
/// Where a received frame begins: there is room for a tag in front of it.
const FRAME: usize = SHORT_HEADER + TAG;
/// Bytes of a buffer for a received frame.
const BUFFER: usize = (FRAME + LARGEST).next_multiple_of(64);
/// Bytes the kernel keeps for us at most, as far as it lets us.
const SOCKET_BUFFER: c_int = 8 << 20;

/// Room for the one control message that there is, aligned as it must be.
#[derive(Clone, Copy)]
#[repr(C, align(8))]
struct Control([u8; 64]);

/// A packet socket on an interface.
#[derive(Debug)]
pub struct AfPacket {
    socket: OwnedFd,
    interface: Interface,
    index: Option<u32>,
    /// An interface that is back, and whether the socket is bound to it again.
    rebound: Option<(u32, Receiver<Result<(), Errno>>)>,
    received: Vec<u8>,
    staged: Staged,
    counters: Counters,
}

impl AfPacket {
    /// Joins an interface, which must be there and up. It is set to be promiscuous until this is dropped.
    pub fn open(name: &str) -> Result<AfPacket, UplinkError> {
        let interface = Interface::new(name).map_err(|e| of_open(name, "open a socket", errno(&e)))?;
        if interface.index().is_none() {
            return Err(UplinkError::Missing(name.to_owned()));
        }
        let kind = libc::SOCK_RAW | libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC;
        // SAFETY: plain numbers in, a descriptor or -1 out. Protocol 0: nothing is received before `bind`.
        let socket = Errno::result(unsafe { libc::socket(libc::AF_PACKET, kind, 0) });
        let socket = socket.map_err(|e| of_open(name, "open a packet socket", e))?;
        // SAFETY: it was just opened, and nobody else has it.
        let socket = unsafe { OwnedFd::from_raw_fd(socket) };
        let index = interface.index_up()?;
        let port = AfPacket {
            socket,
            interface,
            index: Some(index),
            rebound: None,
            received: vec![0; BATCH * BUFFER],
            staged: Staged::new(BATCH),
            counters: Counters::default(),
        };
        port.prepare().map_err(|e| of_open(name, "prepare a packet socket", e))?;
        bind(port.socket.as_fd(), index).map_err(|e| of_open(name, "bind a packet socket", e))?;
        let link = port.interface.link();
        info!(
            "uplink {name}: packet socket, MTU {}, {}",
            link.mtu,
            if link.up { "link up" } else { "no carrier" }
        );
        Ok(port)
    }

    fn prepare(&self) -> Result<(), Errno> {
        let one: c_int = 1;
        self.set(libc::SOL_PACKET, libc::PACKET_VNET_HDR, &one)?;
        self.set(libc::SOL_PACKET, libc::PACKET_AUXDATA, &one)?;
        // Linux 4.20; what went out is skipped by its type before that.
        let _ = self.set(libc::SOL_PACKET, libc::PACKET_IGNORE_OUTGOING, &one);
        // Those that go beyond the limit need CAP_NET_ADMIN.
        for (forced, plain) in
            [(libc::SO_RCVBUFFORCE, libc::SO_RCVBUF), (libc::SO_SNDBUFFORCE, libc::SO_SNDBUF)]
        {
            self.set(libc::SOL_SOCKET, forced, &SOCKET_BUFFER)
                .or_else(|_| self.set(libc::SOL_SOCKET, plain, &SOCKET_BUFFER))?;
        }
        Ok(())
    }

    /// Has the socket bound to an interface that is back, by a thread that may.
    fn rebind(&mut self, index: u32) -> io::Result<()> {
        let socket = self.socket.try_clone()?;
        let (tell, told) = bounded(1);
        confine::post("uplink-return", Role::Opener, move || {
            let _ = tell.send(bind(socket.as_fd(), index));
        })?;
        self.rebound = Some((index, told));
        Ok(())
    }

    /// What has become of that, if anything has.
    fn hear(&mut self) {
        let Some((index, told)) = &self.rebound else { return };
        let name = self.interface.name();
        match told.try_recv() {
            Err(TryRecvError::Empty) => return,
            Ok(Ok(())) => {
                info!("uplink {name}: the interface is back");
                self.index = Some(*index);
            }
            Ok(Err(why)) => warn!("uplink {name}: cannot be bound again: {why}"),
            // Which that thread has said.
            Err(TryRecvError::Disconnected) => {}
        }
        self.rebound = None;
    }

    fn set<T>(&self, level: c_int, option: c_int, value: &T) -> Result<(), Errno> {
        let len = size_of::<T>() as libc::socklen_t;
        // SAFETY: the kernel reads `len` bytes of `value`.
        let set = unsafe {
            libc::setsockopt(self.socket.as_raw_fd(), level, option, ptr::from_ref(value).cast(), len)
        };
        Errno::result(set).map(drop)
    }

    /// One system call's worth of frames.
    fn receive_batch(&mut self, most: usize, take: &mut dyn FnMut(&VnetHdr, &[u8])) -> usize {
        // SAFETY: plain numbers and null pointers, for which zeros are valid.
        let mut messages: [mmsghdr; BATCH] = unsafe { mem::zeroed() };
        let mut vectors = [const { MaybeUninit::<[iovec; 2]>::uninit() }; BATCH];
        let mut controls = [Control([0; 64]); BATCH];
        // SAFETY: as above.
        let mut addresses: [sockaddr_ll; BATCH] = unsafe { mem::zeroed() };
        let most = most.min(BATCH);
        for (at, buffer) in self.received.chunks_exact_mut(BUFFER).take(most).enumerate() {
            let (header, frame) = buffer.split_at_mut(FRAME);
            let part = |bytes: &mut [u8]| iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() };
            let vector = vectors[at].write([part(&mut header[..SHORT_HEADER]), part(frame)]);
            let message = &mut messages[at].msg_hdr;
            message.msg_iov = vector.as_mut_ptr();
            message.msg_iovlen = 2;
            message.msg_control = (&raw mut controls[at]).cast();
            message.msg_controllen = size_of::<Control>();
            message.msg_name = (&raw mut addresses[at]).cast();
            message.msg_namelen = size_of::<sockaddr_ll>() as libc::socklen_t;
        }
        // SAFETY: the first `most` messages point to buffers, vectors, addresses and control bytes that live on to the
        // end of this function and have the lengths given.
        let count = unsafe {
            libc::recvmmsg(self.socket.as_raw_fd(), messages.as_mut_ptr(), most as u32, 0, ptr::null_mut())
        };
        // Nothing there, or the interface has gone down: `link` will tell.
        let count = usize::try_from(count).unwrap_or(0);
        for at in 0..count {
            if addresses[at].sll_pkttype == libc::PACKET_OUTGOING {
                continue;
            }
            let message = &messages[at];
            let tag = tag_of(&message.msg_hdr);
            let buffer = &mut self.received[at * BUFFER..(at + 1) * BUFFER];
            let len = (message.msg_len as usize).saturating_sub(SHORT_HEADER);
            if len < ETHERNET || message.msg_hdr.msg_flags & libc::MSG_TRUNC != 0 {
                self.counters.rx_length_errors += 1;
                continue;
            }
            let mut header = [0; 12];
            header[..SHORT_HEADER].copy_from_slice(&buffer[..SHORT_HEADER]);
            let mut header = VnetHdr::from_bytes(&header);
            let mut begin = FRAME;
            if let Some((tpid, tci)) = tag {
                begin -= TAG;
                buffer.copy_within(FRAME..FRAME + 12, begin);
                buffer[begin + 12..begin + 14].copy_from_slice(&tpid.to_be_bytes());
                buffer[begin + 14..begin + 16].copy_from_slice(&tci.to_be_bytes());
                header.csum_start = header.csum_start.saturating_add(TAG as u16);
                header.hdr_len = header.hdr_len.saturating_add(TAG as u16);
            }
            let frame = &buffer[begin..FRAME + len];
            self.counters.received(frame.len());
            take(&header, frame);
        }
        count
    }

    /// Sends one frame from where it is.
    fn send_large(
        &mut self,
        header: &VnetHdr,
        head: &[u8],
        rest: &mut dyn Iterator<Item = GuestSlice<'_>>,
    ) -> Result<(), Refused> {
        self.flush();
        let header = header.to_bytes();
        let Some(mut parts) = Parts::new(&header[..SHORT_HEADER], head, rest) else {
            return Err(self.counters.refused(Refused::TooLong));
        };
        let sent = parts.read_by(|vectors, count| {
            // SAFETY: plain numbers and null pointers, for which zeros are valid.
            let mut message: msghdr = unsafe { mem::zeroed() };
            (message.msg_iov, message.msg_iovlen) = (vectors, count);
            // SAFETY: the vectors are as many, of bytes that the kernel only reads, before this returns.
            unsafe { libc::sendmsg(self.socket.as_raw_fd(), &raw const message, libc::MSG_DONTWAIT) }
        });
        match sent {
            Ok(_) => {
                self.counters.sent(parts.len - SHORT_HEADER);
                Ok(())
            }
            Err(why) => Err(self.counters.refused(refused(errno(&why)))),
        }
    }
}

impl Uplink for AfPacket {
    fn receive(&mut self, most: usize, take: &mut dyn FnMut(&VnetHdr, &[u8])) -> usize {
        let mut done = 0;
        while done < most {
            let batch = BATCH.min(most - done);
            let count = self.receive_batch(batch, take);
            done += count;
            if count < batch {
                break;
            }
        }
        done
    }

    fn send(
        &mut self,
        header: &VnetHdr,
        len: usize,
        head: &[u8],
        rest: &mut dyn Iterator<Item = GuestSlice<'_>>,
    ) -> Result<(), Refused> {
        if !is_small(header, len) {
            return self.send_large(header, head, rest);
        }
        if self.staged.is_full() {
            self.flush();
        }
        let is_staged = self.staged.push(&header.to_bytes()[..SHORT_HEADER], head, rest);
        if is_staged { Ok(()) } else { Err(self.counters.refused(Refused::TooLong)) }
    }

    fn flush(&mut self) {
        let total = self.staged.len();
        let mut first = 0;
        while first < total {
            // SAFETY: plain numbers and null pointers, for which zeros are valid.
            let mut messages: [mmsghdr; BATCH] = unsafe { mem::zeroed() };
            let mut vectors = [const { MaybeUninit::<iovec>::uninit() }; BATCH];
            for at in first..total {
                let frame = self.staged.frame(at);
                let vector = iovec { iov_base: frame.as_ptr().cast_mut().cast(), iov_len: frame.len() };
                messages[at].msg_hdr.msg_iov = vectors[at].write(vector);
                messages[at].msg_hdr.msg_iovlen = 1;
            }
            let count = (total - first) as u32;
            // SAFETY: the messages from `first` on point to vectors and bytes that live on and are only read.
            let sent = unsafe {
                libc::sendmmsg(
                    self.socket.as_raw_fd(),
                    messages[first..].as_mut_ptr(),
                    count,
                    libc::MSG_DONTWAIT,
                )
            };
            let sent = match Errno::result(sent) {
                Ok(sent) => sent as usize,
                Err(why) => {
                    // The first one was refused; those behind it have their turn, unless there is no room.
                    let why = refused(why);
                    let lost = if why == Refused::Full { total - first } else { 1 };
                    for _ in 0..lost {
                        self.counters.refused(why);
                    }
                    first += lost;
                    continue;
                }
            };
            for at in first..first + sent {
                self.counters.sent(self.staged.frame(at).len() - SHORT_HEADER);
            }
            first += sent;
        }
        self.staged.clear();
    }

    fn takes(&self) -> u64 {
        // UDP segmentation came to packet sockets with Linux 6.2; there is no way to ask.
        GUEST_CSUM | GUEST_TSO4 | GUEST_TSO6 | GUEST_ECN
    }

    fn descriptor(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    fn link(&mut self) -> Link {
        self.hear();
        let index = self.interface.index();
        if index != self.index && self.rebound.is_none() {
            let was_there = self.index.take().is_some();
            match index {
                None if was_there => {
                    let name = self.interface.name();
                    warn!("uplink {name}: the interface is gone; the link is down until it is back");
                }
                None => {}
                Some(index) => {
                    if let Err(e) = self.rebind(index) {
                        warn!("uplink {}: cannot be bound again: {e}", self.interface.name());
                    }
                }
            }
        }
        let mut link = self.interface.link();
        link.up &= self.index.is_some();
        link
    }

    fn counters(&mut self) -> Counters {
        // SAFETY: plain numbers, for which zeros are valid.
        let mut statistics: libc::tpacket_stats = unsafe { mem::zeroed() };
        let mut len = size_of::<libc::tpacket_stats>() as libc::socklen_t;
        let fd = self.socket.as_raw_fd();
        // SAFETY: the kernel writes at most `len` bytes. It counts from zero again after each time.
        let got = unsafe {
            libc::getsockopt(
                fd,
                libc::SOL_PACKET,
                libc::PACKET_STATISTICS,
                (&raw mut statistics).cast(),
                &raw mut len,
            )
        };
        if got == 0 {
            self.counters.rx_missed_errors += u64::from(statistics.tp_drops);
        }
        self.counters
    }
}

/// Has a socket receive from an interface, all that comes by there.
fn bind(socket: BorrowedFd<'_>, index: u32) -> Result<(), Errno> {
    let address = sockaddr_ll {
        sll_family: libc::AF_PACKET as u16,
        sll_protocol: (libc::ETH_P_ALL as u16).to_be(),
        sll_ifindex: index as c_int,
        sll_hatype: 0,
        sll_pkttype: 0,
        sll_halen: 0,
        sll_addr: [0; 8],
    };
    let len = size_of::<sockaddr_ll>() as libc::socklen_t;
    // SAFETY: the address is a whole `sockaddr_ll` of that length.
    let bound = unsafe { libc::bind(socket.as_raw_fd(), (&raw const address).cast(), len) };
    Errno::result(bound)?;
    join_promiscuous(socket, index)
}

/// The VLAN tag that the kernel took out of a frame: TPID and TCI.
fn tag_of(message: &msghdr) -> Option<(u16, u16)> {
    // SAFETY: the kernel has filled in the control bytes, and set their length.
    let control = unsafe { libc::CMSG_FIRSTHDR(message).as_ref() }?;
    if control.cmsg_level != libc::SOL_PACKET || control.cmsg_type != libc::PACKET_AUXDATA {
        return None;
    }
    // SAFETY: a message of this type holds a `tpacket_auxdata`, which need not be aligned.
    let data = unsafe { libc::CMSG_DATA(control).cast::<tpacket_auxdata>().read_unaligned() };
    if data.tp_status & libc::TP_STATUS_VLAN_VALID == 0 {
        return None;
    }
    let has_tpid = data.tp_status & libc::TP_STATUS_VLAN_TPID_VALID != 0;
    Some((if has_tpid { data.tp_vlan_tpid } else { ETHERTYPE_VLAN }, data.tp_vlan_tci))
}

/// Why the kernel does not send a frame.
fn refused(why: Errno) -> Refused {
    match why {
        Errno::EAGAIN | Errno::ENOBUFS | Errno::ENOMEM => Refused::Full,
        Errno::ENETDOWN | Errno::ENXIO | Errno::ENODEV => Refused::Down,
        Errno::EMSGSIZE => Refused::TooLong,
        _ => Refused::Bad,
    }
}

fn of_open(name: &str, what: &'static str, why: Errno) -> UplinkError {
    let name = name.to_owned();
    match why {
        Errno::EPERM | Errno::EACCES => {
            UplinkError::Permission { name, what: "a packet socket", capability: "CAP_NET_RAW" }
        }
        Errno::EAFNOSUPPORT => UplinkError::Unsupported {
            name,
            what: "AF_PACKET",
            why: io::Error::from(why),
            instead: "the kernel needs CONFIG_PACKET (`modprobe af_packet`), or use a tap",
        },
        Errno::ENODEV | Errno::ENXIO => UplinkError::Missing(name),
        Errno::ENETDOWN => UplinkError::Down(name),
        _ => UplinkError::Other { name, what, why: why.into() },
    }
}
