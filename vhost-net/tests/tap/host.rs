//! The host's side: a network namespace of the test's own, and the tap as a packet socket sees it.
#![allow(unsafe_code)] // packet sockets

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::sched::{CloneFlags, unshare};
use nix::sys::socket::{AddressFamily, SockFlag, SockProtocol, SockType, socket};
use vhost_net::port::tap::{Tap, TapError};

/// What is waited for comes within this.
pub const LIMIT: Duration = Duration::from_secs(60);
/// Bytes of the header of packet sockets: `struct virtio_net_hdr` without `num_buffers`.
pub const HEADER: usize = 10;

pub const HOST_MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];
pub const GUEST_MAC: [u8; 6] = [2, 0, 0, 0, 0, 2];
/// An ethertype for experiments (IEEE 802).
pub const EXPERIMENT: [u8; 2] = [0x88, 0xb5];

/// Why there can be no taps in a namespace here.
pub fn missing() -> Option<String> {
    let made = std::thread::spawn(|| unshare(CloneFlags::CLONE_NEWNET)).join().unwrap();
    if let Err(e) = made {
        return Some(format!("no network namespace: {e} (needs root)"));
    }
    if let Err(e) = std::fs::OpenOptions::new().read(true).write(true).open("/dev/net/tun") {
        return Some(format!("no /dev/net/tun: {e}"));
    }
    let ip = Command::new("ip").arg("-V").output();
    ip.is_err().then(|| "no ip: scripts/setup.sh installs it".into())
}

/// Runs `test` in a namespace of its own, where no interface speaks unasked.
pub fn in_namespace(test: fn()) {
    let thread = std::thread::spawn(move || {
        unshare(CloneFlags::CLONE_NEWNET).unwrap();
        for which in ["all", "default"] {
            let _ = std::fs::write(format!("/proc/sys/net/ipv6/conf/{which}/disable_ipv6"), "1");
        }
        test();
    });
    if let Err(panic) = thread.join() {
        std::panic::resume_unwind(panic);
    }
}

/// `ip` with these words; its output.
pub fn ip(words: &str) -> String {
    let out = Command::new("ip").args(words.split(' ')).output().unwrap();
    assert!(out.status.success(), "ip {words}: {}", String::from_utf8_lossy(&out.stderr));
    String::from_utf8(out.stdout).unwrap()
}

/// A packet socket on one interface.
pub struct Host {
    socket: OwnedFd,
}

impl Host {
    pub fn on(name: &str) -> Host {
        let (kind, flags) = (SockType::Raw, SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK);
        let socket = socket(AddressFamily::Packet, kind, flags, SockProtocol::EthAll).unwrap();
        let index = nix::net::if_::if_nametoindex(name).unwrap();
        // SAFETY: plain numbers, for which zeros are valid.
        let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
        address.sll_family = libc::AF_PACKET as u16;
        address.sll_protocol = (libc::ETH_P_ALL as u16).to_be();
        address.sll_ifindex = index as i32;
        let (on, buffer) = (1i32, 8i32 << 20);
        let fd = socket.as_raw_fd();
        // SAFETY: the arguments outlive the calls and are as long as is said.
        unsafe {
            let set = |level, name, value: &i32| {
                assert_eq!(libc::setsockopt(fd, level, name, std::ptr::from_ref(value).cast(), 4), 0);
            };
            set(libc::SOL_PACKET, libc::PACKET_VNET_HDR, &on);
            set(libc::SOL_SOCKET, libc::SO_RCVBUFFORCE, &buffer);
            set(libc::SOL_SOCKET, libc::SO_SNDBUFFORCE, &buffer);
            let len = size_of::<libc::sockaddr_ll>() as u32;
            assert_eq!(libc::bind(fd, (&raw const address).cast(), len), 0, "{}", io::Error::last_os_error());
        }
        Host { socket }
    }

    /// Sends a frame to the guest.
    pub fn send(&self, header: [u8; HEADER], frame: &[u8]) {
        let bytes = [&header, frame].concat();
        nix::sys::socket::send(self.socket.as_raw_fd(), &bytes, nix::sys::socket::MsgFlags::empty()).unwrap();
    }

    /// The next frame of the guest's, if there is one; frames that are not its own are left out.
    pub fn receive(&self) -> Option<([u8; HEADER], Vec<u8>)> {
        let mut bytes = vec![0; 80 << 10];
        loop {
            let n = nix::unistd::read(&self.socket, &mut bytes).ok()?;
            let frame = &bytes[HEADER..n];
            if frame[6..12] == GUEST_MAC {
                return Some((bytes[..HEADER].try_into().unwrap(), frame.to_vec()));
            }
        }
    }

    pub fn wait(&self) -> ([u8; HEADER], Vec<u8>) {
        let mut got = None;
        until("a frame at the host", || {
            got = self.receive();
            got.is_some()
        });
        got.unwrap()
    }
}

/// The tap, as soon as who had it has let go of it: the kernel closes the files of an io_uring a moment later.
pub fn open_tap() -> Arc<Tap> {
    let mut tap = None;
    until("tap that is free", || match Tap::open("kl0", 1, None) {
        Err(TapError::Busy(..)) => false,
        opened => {
            tap = Some(opened.unwrap());
            true
        }
    });
    tap.unwrap()
}

/// Waits for it.
pub fn until(what: &str, mut is: impl FnMut() -> bool) {
    let end = Instant::now() + LIMIT;
    while !is() {
        assert!(Instant::now() < end, "no {what} within {LIMIT:?}");
        std::thread::sleep(Duration::from_micros(50));
    }
}

/// A frame of `len` bytes from one to the other, whose bytes follow from `seed`.
pub fn frame(from: [u8; 6], to: [u8; 6], len: usize, seed: u32) -> Vec<u8> {
    let mut bytes = [&to[..], &from, &EXPERIMENT].concat();
    let mut state = seed.wrapping_mul(2_654_435_761) | 1;
    while bytes.len() < len {
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        bytes.push(state as u8);
    }
    bytes.truncate(len);
    bytes
}

/// A descriptor attached to the tap (or tun) of this name, as another program makes it.
pub fn attached(name: &str, flags: i32) -> OwnedFd {
    let tun: OwnedFd =
        std::fs::OpenOptions::new().read(true).write(true).open("/dev/net/tun").unwrap().into();
    // SAFETY: plain numbers, for which zeros are valid; the request outlives the call.
    unsafe {
        let mut request: libc::ifreq = std::mem::zeroed();
        name.bytes().zip(&mut request.ifr_name).for_each(|(byte, to)| *to = byte as libc::c_char);
        request.ifr_ifru.ifru_flags = flags as libc::c_short;
        let done = libc::ioctl(tun.as_raw_fd(), libc::TUNSETIFF, &raw const request);
        assert_eq!(done, 0, "{name}: {}", io::Error::last_os_error());
    }
    tun
}
