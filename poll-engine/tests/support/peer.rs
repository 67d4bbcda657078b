//! A raw front end, which can say anything. Also for the tests of the daemons, which include this file.
#![allow(dead_code)] // each test program uses its part

use std::io::{IoSlice, IoSliceMut, Read};
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, recvmsg, sendmsg};
use poll_engine::device::features;
use poll_engine::memory::RegionSpec;
use poll_engine::ring::RingConfig;
use poll_engine::session::wire::{F_PROTOCOL_FEATURES, protocol};

pub const LIMIT: Duration = Duration::from_secs(60);

/// Polls `probe` until it is true; fails after [`LIMIT`].
pub fn until(what: &str, mut probe: impl FnMut() -> bool) {
    let deadline = Instant::now() + LIMIT;
    while !probe() {
        assert!(Instant::now() < deadline, "{what}: not within {LIMIT:?}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

pub fn eventfd() -> EventFd {
    EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK).unwrap()
}

pub fn readable_within(fd: &impl AsFd, ms: u16) -> bool {
    poll(&mut [PollFd::new(fd.as_fd(), PollFlags::POLLIN)], ms).unwrap() > 0
}

pub fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|w| w.to_ne_bytes()).collect()
}

pub fn longs(longs: &[u64]) -> Vec<u8> {
    longs.iter().flat_map(|w| w.to_ne_bytes()).collect()
}

pub const FEATURES: u64 =
    F_PROTOCOL_FEATURES | features::VERSION_1 | features::INDIRECT_DESC | features::EVENT_IDX;

/// A raw front end.
pub struct Peer {
    pub stream: UnixStream,
}

impl Peer {
    pub fn new(stream: UnixStream) -> Peer {
        stream.set_read_timeout(Some(LIMIT)).unwrap();
        Peer { stream }
    }

    pub fn send_bytes(&self, bytes: &[u8], fds: &[RawFd]) {
        assert_eq!(self.try_send(bytes, fds), Ok(bytes.len()));
    }

    /// As a front end that expects to be hung up on.
    pub fn try_send(&self, bytes: &[u8], fds: &[RawFd]) -> nix::Result<usize> {
        let rights = [ControlMessage::ScmRights(fds)];
        let control = if fds.is_empty() { &[][..] } else { &rights[..] };
        let fd = self.stream.as_raw_fd();
        sendmsg::<()>(fd, &[IoSlice::new(bytes)], control, MsgFlags::MSG_NOSIGNAL, None)
    }

    pub fn send(&self, request: u32, need_reply: bool, payload: &[u8], fds: &[RawFd]) {
        let flags = 1 | u32::from(need_reply) << 3;
        let mut message = words(&[request, flags, payload.len() as u32]);
        message.extend(payload);
        self.send_bytes(&message, fds);
    }

    /// The payload of the next reply, which must be to `request`. `None` when the back end has hung up.
    pub fn reply(&mut self, request: u32) -> Option<Vec<u8>> {
        let mut header = [0; 12];
        match self.stream.read_exact(&mut header) {
            Ok(()) => {}
            Err(e) if matches!(e.kind(), std::io::ErrorKind::WouldBlock) => {
                panic!("no reply to request {request}")
            }
            Err(_) => return None,
        }
        assert_eq!(header[..8], words(&[request, 5]), "reply to {request}");
        let mut payload = vec![0; u32::from_ne_bytes(header[8..].try_into().unwrap()) as usize];
        self.stream.read_exact(&mut payload).unwrap();
        Some(payload)
    }

    /// A request with a reply of its own.
    pub fn ask(&mut self, request: u32, payload: &[u8]) -> Vec<u8> {
        self.send(request, false, payload, &[]);
        self.reply(request).expect("a reply")
    }

    pub fn ask_number(&mut self, request: u32) -> u64 {
        u64::from_ne_bytes(self.ask(request, &[]).try_into().unwrap())
    }

    /// A request whose reply comes with a descriptor, if it has one.
    pub fn ask_fd(&mut self, request: u32, payload: &[u8]) -> (Vec<u8>, Option<OwnedFd>) {
        self.send(request, false, payload, &[]);
        let mut header = [0; 12];
        let mut space = nix::cmsg_space!(RawFd);
        let mut parts = [IoSliceMut::new(&mut header)];
        let fd = self.stream.as_raw_fd();
        let got = recvmsg::<()>(fd, &mut parts, Some(&mut space), MsgFlags::MSG_CMSG_CLOEXEC).unwrap();
        let rights = got.cmsgs().unwrap().find_map(|c| match c {
            ControlMessageOwned::ScmRights(fds) => fds.first().copied(),
            _ => None,
        });
        // A copy of its own, by way of /proc, needs nothing unsafe.
        let file = rights.map(|fd| {
            let path = format!("/proc/self/fd/{fd}");
            let file = std::fs::File::options().read(true).write(true).open(path).unwrap();
            nix::unistd::close(fd).unwrap();
            OwnedFd::from(file)
        });
        assert_eq!((got.bytes, &header[..8]), (12, &words(&[request, 5])[..]));
        let mut payload = vec![0; u32::from_ne_bytes(header[8..].try_into().unwrap()) as usize];
        self.stream.read_exact(&mut payload).unwrap();
        (payload, file)
    }

    /// A request with an acknowledgement: whether it was a good one.
    pub fn ack(&mut self, request: u32, payload: &[u8], fds: &[RawFd]) -> bool {
        self.send(request, true, payload, fds);
        self.reply(request).expect("an acknowledgement") == longs(&[0])
    }

    pub fn negotiate(&mut self) {
        self.send(3, false, &[], &[]);
        self.send(2, false, &longs(&[FEATURES]), &[]);
        let all = protocol::MQ
            | protocol::LOG_SHMFD
            | protocol::REPLY_ACK
            | protocol::BACKEND_REQ
            | protocol::CONFIG
            | protocol::INFLIGHT_SHMFD
            | protocol::RESET_DEVICE
            | protocol::CONFIGURE_MEM_SLOTS
            | protocol::STATUS;
        assert_eq!(self.ask_number(15) & all, all);
        self.send(16, false, &longs(&[all]), &[]);
    }

    pub fn expect_hung_up(&mut self) {
        let got = self.stream.read(&mut [0; 1]);
        let reset = |e: &std::io::Error| e.kind() == std::io::ErrorKind::ConnectionReset;
        assert!(matches!(&got, Ok(0)) || got.as_ref().is_err_and(reset), "the session goes on: {got:?}");
    }

    /// The session still answers.
    pub fn expect_alive(&mut self) {
        assert!(self.ask_number(17) > 0);
    }

    pub fn mem_table(&mut self, regions: &[(RegionSpec, RawFd)]) -> bool {
        let mut payload = words(&[regions.len() as u32, 0]);
        payload.extend(regions.iter().flat_map(|(spec, _)| region(spec)));
        self.ack(5, &payload, &regions.iter().map(|(_, fd)| *fd).collect::<Vec<_>>())
    }

    pub fn add_region(&mut self, spec: &RegionSpec, fd: RawFd) -> bool {
        self.ack(37, &[longs(&[0]), region(spec)].concat(), &[fd])
    }

    /// Size, base and place of ring `i`.
    pub fn set_ring(&mut self, i: u32, config: &RingConfig, base: u32) {
        assert!(self.ack(8, &words(&[i, config.size]), &[]));
        assert!(self.ack(10, &words(&[i, base]), &[]));
        let addresses = longs(&[config.desc_addr, config.used_addr, config.avail_addr, 0]);
        assert!(self.ack(9, &[words(&[i, 0]), addresses].concat(), &[]));
    }

    pub fn remove_region(&mut self, spec: &RegionSpec) -> bool {
        self.ack(38, &[longs(&[0]), region(spec)].concat(), &[])
    }
}

pub fn region(spec: &RegionSpec) -> Vec<u8> {
    longs(&[spec.guest_addr, spec.size, spec.user_addr, spec.mmap_offset])
}
