//! What the kernel says of a network interface, and what it is told (netdevice(7)).
#![allow(unsafe_code)] // ioctls

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use libc::{c_char, c_int, c_short, ifreq};
use nix::errno::Errno;
use nix::net::if_::if_nametoindex;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};

use super::{Link, UplinkError};
use crate::mac::MacAddr;

mod ioctl {
    use libc::ifreq;
    nix::ioctl_read_bad!(flags, libc::SIOCGIFFLAGS, ifreq);
    nix::ioctl_write_ptr_bad!(set_flags, libc::SIOCSIFFLAGS, ifreq);
    nix::ioctl_read_bad!(mtu, libc::SIOCGIFMTU, ifreq);
    nix::ioctl_write_ptr_bad!(set_mtu, libc::SIOCSIFMTU, ifreq);
    nix::ioctl_read_bad!(hardware_address, libc::SIOCGIFHWADDR, ifreq);
    nix::ioctl_read_bad!(index, libc::SIOCGIFINDEX, ifreq);
}

/// Has an interface receive what is for others as well, until the packet socket is closed.
pub fn join_promiscuous(socket: BorrowedFd<'_>, index: u32) -> Result<(), Errno> {
    let membership = libc::packet_mreq {
        mr_ifindex: index as libc::c_int,
        mr_type: libc::PACKET_MR_PROMISC as u16,
        mr_alen: 0,
        mr_address: [0; 8],
    };
    let len = size_of::<libc::packet_mreq>() as libc::socklen_t;
    let (fd, value) = (socket.as_raw_fd(), (&raw const membership).cast());
    // SAFETY: the kernel reads `len` bytes of the membership.
    let set = unsafe { libc::setsockopt(fd, libc::SOL_PACKET, libc::PACKET_ADD_MEMBERSHIP, value, len) };
    Errno::result(set).map(drop)
}

/// A packet socket that receives nothing, and keeps an interface promiscuous.
pub fn promiscuous(index: u32) -> Result<OwnedFd, Errno> {
    // SAFETY: plain numbers in, a descriptor or -1 out. Protocol 0: nothing is received.
    let socket =
        Errno::result(unsafe { libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, 0) })?;
    // SAFETY: it was just opened, and nobody else has it.
    let socket = unsafe { OwnedFd::from_raw_fd(socket) };
    join_promiscuous(socket.as_fd(), index)?;
    Ok(socket)
}

/// A request that names an interface; refused if none can have that name.
pub(super) fn request(name: &str) -> io::Result<ifreq> {
    // SAFETY: plain numbers, for which zeros are valid.
    let mut request: ifreq = unsafe { std::mem::zeroed() };
    let bytes = name.as_bytes();
    let is_name = !bytes.is_empty() && bytes.len() < libc::IFNAMSIZ && name != "." && name != "..";
    if !is_name || bytes.iter().any(|b| matches!(b, b'/' | b':') || !b.is_ascii_graphic()) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    for (to, &byte) in request.ifr_name.iter_mut().zip(bytes) {
        *to = byte as c_char;
    }
    Ok(request)
}

/// Whether an interface can have this name.
pub fn is_name(name: &str) -> bool {
    request(name).is_ok()
}

/// The index of the interface of this name, which no other one ever has, if there is one.
pub fn index_of(name: &str) -> Option<u32> {
    if_nametoindex(name).ok()
}

/// An interface by its name, to be asked about and changed.
#[derive(Debug)]
pub struct Interface {
    name: String,
    /// Of any family: one is needed to ask.
    socket: OwnedFd,
}

impl Interface {
    /// An interface of this name, whether it is there or not.
    pub fn new(name: &str) -> io::Result<Interface> {
        let socket = socket(AddressFamily::Unix, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)?;
        Ok(Interface { name: name.to_owned(), socket })
    }

    /// The name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its index, if it is there and up.
    pub fn index_up(&self) -> Result<u32, UplinkError> {
        let index = self.index().ok_or_else(|| UplinkError::Missing(self.name.clone()))?;
        match self.is_up() {
            Ok(true) => Ok(index),
            _ => Err(UplinkError::Down(self.name.clone())),
        }
    }

    /// Its index; another one if it was gone in between.
    pub fn index(&self) -> Option<u32> {
        // By the socket that is open: who asks may be a thread that opens none.
        let mut request = request(&self.name).ok()?;
        // SAFETY: the request has a name, and is there to be filled in.
        unsafe { ioctl::index(self.fd(), &raw mut request) }.ok()?;
        // SAFETY: SIOCGIFINDEX fills this member in.
        u32::try_from(unsafe { request.ifr_ifru.ifru_ifindex }).ok()
    }

    /// Its link.
    pub fn link(&self) -> Link {
        let up = libc::IFF_UP | libc::IFF_RUNNING;
        let flags = self.flags().map_or(0, |(_, flags)| flags);
        Link { up: flags & up == up, mtu: self.mtu().unwrap_or(0) }
    }

    /// Its MAC address.
    pub fn mac(&self) -> io::Result<MacAddr> {
        let mut request = request(&self.name)?;
        // SAFETY: the request has a name, and is there to be filled in.
        unsafe { ioctl::hardware_address(self.fd(), &raw mut request) }?;
        // SAFETY: SIOCGIFHWADDR fills this member in.
        let address = unsafe { request.ifr_ifru.ifru_hwaddr };
        Ok(MacAddr(std::array::from_fn(|i| address.sa_data[i] as u8)))
    }

    /// Whether the administrator has it up.
    pub fn is_up(&self) -> io::Result<bool> {
        Ok(self.flags()?.1 & libc::IFF_UP != 0)
    }

    /// Sets it up.
    pub fn set_up(&self) -> io::Result<()> {
        let (mut request, flags) = self.flags()?;
        request.ifr_ifru.ifru_flags = (flags | libc::IFF_UP) as c_short;
        // SAFETY: the request is whole.
        unsafe { ioctl::set_flags(self.fd(), &raw const request)? };
        Ok(())
    }

    /// Bytes of its largest packet, without an Ethernet header.
    pub fn mtu(&self) -> io::Result<u32> {
        let mut request = request(&self.name)?;
        // SAFETY: the request has a name, and is there to be filled in.
        unsafe { ioctl::mtu(self.fd(), &raw mut request) }?;
        // SAFETY: SIOCGIFMTU fills this member in.
        Ok(unsafe { request.ifr_ifru.ifru_mtu } as u32)
    }

    /// Changes that.
    pub fn set_mtu(&self, mtu: u32) -> io::Result<()> {
        let mut request = request(&self.name)?;
        request.ifr_ifru.ifru_mtu = mtu as c_int;
        // SAFETY: the request is whole.
        unsafe { ioctl::set_mtu(self.fd(), &raw const request)? };
        Ok(())
    }

    fn flags(&self) -> io::Result<(ifreq, c_int)> {
        let mut request = request(&self.name)?;
        // SAFETY: the request has a name, and is there to be filled in.
        unsafe { ioctl::flags(self.fd(), &raw mut request) }?;
        Ok((request, flags_of(&request)))
    }

    fn fd(&self) -> c_int {
        self.socket.as_raw_fd()
    }
}

/// The flags that the kernel has filled in.
pub(super) fn flags_of(request: &ifreq) -> c_int {
    // SAFETY: a plain number, whatever was filled in.
    c_int::from(unsafe { request.ifr_ifru.ifru_flags } as u16)
}

/// What the kernel said.
pub(super) fn errno(why: &io::Error) -> Errno {
    Errno::from_raw(why.raw_os_error().unwrap_or(libc::EINVAL))
}
