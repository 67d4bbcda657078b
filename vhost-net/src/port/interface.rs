//! What the kernel says of a network interface (netdevice(7)).
#![allow(unsafe_code)] // ioctls

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use libc::{c_char, ifreq};
use nix::errno::Errno;
use nix::net::if_::if_nametoindex;

use super::{Link, UplinkError};
use crate::mac::MacAddr;

mod ioctl {
    use libc::ifreq;
    nix::ioctl_read_bad!(flags, libc::SIOCGIFFLAGS, ifreq);
    nix::ioctl_read_bad!(mtu, libc::SIOCGIFMTU, ifreq);
    nix::ioctl_read_bad!(hardware_address, libc::SIOCGIFHWADDR, ifreq);
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

/// An interface by its name, asked through any socket.
#[derive(Clone, Debug)]
pub struct Interface {
    name: String,
}

impl Interface {
    /// An interface of this name, whether it is there or not.
    pub fn new(name: &str) -> Interface {
        Interface { name: name.to_owned() }
    }

    /// The name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its index, if it is there and up.
    pub fn index_up(&self, socket: BorrowedFd<'_>) -> Result<u32, UplinkError> {
        let index = self.index().ok_or_else(|| UplinkError::Missing(self.name.clone()))?;
        match self.flags(socket) {
            Ok(flags) if flags & libc::IFF_UP != 0 => Ok(index),
            _ => Err(UplinkError::Down(self.name.clone())),
        }
    }

    /// Its index; another one if it was gone in between.
    pub fn index(&self) -> Option<u32> {
        if_nametoindex(self.name.as_str()).ok()
    }

    /// Its link.
    pub fn link(&self, socket: BorrowedFd<'_>) -> Link {
        let up = libc::IFF_UP | libc::IFF_RUNNING;
        let flags = self.flags(socket).unwrap_or(0);
        Link { up: flags & up == up, mtu: self.mtu(socket).unwrap_or(0) }
    }

    /// Its MAC address.
    pub fn mac(&self, socket: BorrowedFd<'_>) -> io::Result<MacAddr> {
        let mut request = self.request()?;
        // SAFETY: the request has a name, and is there to be filled in.
        unsafe { ioctl::hardware_address(socket.as_raw_fd(), &raw mut request) }?;
        // SAFETY: SIOCGIFHWADDR fills this member in.
        let address = unsafe { request.ifr_ifru.ifru_hwaddr };
        Ok(MacAddr(std::array::from_fn(|i| address.sa_data[i] as u8)))
    }

    fn flags(&self, socket: BorrowedFd<'_>) -> io::Result<i32> {
        let mut request = self.request()?;
        // SAFETY: the request has a name, and is there to be filled in.
        unsafe { ioctl::flags(socket.as_raw_fd(), &raw mut request) }?;
        // SAFETY: SIOCGIFFLAGS fills this member in.
        Ok(i32::from(unsafe { request.ifr_ifru.ifru_flags }))
    }

    fn mtu(&self, socket: BorrowedFd<'_>) -> io::Result<u32> {
        let mut request = self.request()?;
        // SAFETY: the request has a name, and is there to be filled in.
        unsafe { ioctl::mtu(socket.as_raw_fd(), &raw mut request) }?;
        // SAFETY: SIOCGIFMTU fills this member in.
        Ok(unsafe { request.ifr_ifru.ifru_mtu } as u32)
    }

    /// A request that names it.
    fn request(&self) -> io::Result<ifreq> {
        // SAFETY: plain numbers, for which zeros are valid.
        let mut request: ifreq = unsafe { std::mem::zeroed() };
        if self.name.len() >= request.ifr_name.len() {
            return Err(Errno::ENODEV.into());
        }
        for (to, byte) in request.ifr_name.iter_mut().zip(self.name.bytes()) {
            *to = byte as c_char;
        }
        Ok(request)
    }
}
