//! What the kernel is asked about taps: one function for each ioctl (linux/if_tun.h).
#![allow(unsafe_code)] // ioctls

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use libc::{c_int, c_short, ifreq};
use nix::fcntl::{OFlag, open};
use nix::sys::stat::Mode;

use crate::port::interface::{flags_of, request};

mod ioctl {
    use libc::{c_int, ifreq};
    nix::ioctl_write_ptr_bad!(tun_set_iff, libc::TUNSETIFF, ifreq);
    nix::ioctl_read_bad!(tun_get_iff, libc::TUNGETIFF, ifreq);
    nix::ioctl_write_int_bad!(tun_set_offload, libc::TUNSETOFFLOAD);
    nix::ioctl_write_ptr_bad!(tun_set_vnet_hdr_sz, libc::TUNSETVNETHDRSZ, c_int);
    nix::ioctl_write_ptr_bad!(tun_set_vnet_le, libc::TUNSETVNETLE, c_int);
    nix::ioctl_write_ptr_bad!(tun_set_queue, libc::TUNSETQUEUE, ifreq);
    nix::ioctl_write_ptr_bad!(tun_set_carrier, libc::TUNSETCARRIER, c_int);
}

fn name_of(request: &ifreq) -> String {
    let bytes = request.ifr_name.iter().take_while(|&&c| c != 0);
    bytes.map(|&c| char::from(c as u8)).collect()
}

/// A descriptor that can be attached to a tap.
pub(super) fn open_tun() -> io::Result<OwnedFd> {
    Ok(open("/dev/net/tun", OFlag::O_RDWR | OFlag::O_CLOEXEC | OFlag::O_NONBLOCK, Mode::empty())?)
}

/// Attaches `tun` to the interface of this name, which is made if there is none; the name that it has.
pub(super) fn attach(tun: BorrowedFd<'_>, name: &str, flags: c_int) -> io::Result<String> {
    let mut request = request(name)?;
    request.ifr_ifru.ifru_flags = flags as c_short;
    // SAFETY: the request is whole; the kernel writes into it, which the macro's const pointer does not say, so it goes
    // there as a pointer made from a mutable reference.
    unsafe { ioctl::tun_set_iff(tun.as_raw_fd(), &raw mut request)? };
    Ok(name_of(&request))
}

/// A descriptor that this process was started with, closed when a program is executed.
pub(super) fn passed(number: i32) -> Option<OwnedFd> {
    // Standard input, output and error stay what they are.
    if number <= libc::STDERR_FILENO {
        return None;
    }
    // SAFETY: only its flags are set; a number that is no descriptor's is an error.
    if unsafe { libc::fcntl(number, libc::F_SETFD, libc::FD_CLOEXEC) } != 0 {
        return None;
    }
    // SAFETY: it is open, as was seen just now, and was passed to us: whoever starts this program says so, once.
    Some(unsafe { OwnedFd::from_raw_fd(number) })
}

/// The interface that `tun` is attached to, and the flags (`IFF_TAP`, ...) that it was attached with.
pub(super) fn attached(tun: BorrowedFd<'_>) -> io::Result<(String, c_int)> {
    // SAFETY: plain numbers, for which zeros are valid.
    let mut request: ifreq = unsafe { std::mem::zeroed() };
    // SAFETY: the request is whole.
    unsafe { ioctl::tun_get_iff(tun.as_raw_fd(), &raw mut request)? };
    Ok((name_of(&request), flags_of(&request)))
}

/// What the kernel may leave to whoever reads (`TUN_F_*`).
pub(super) fn set_offload(tun: BorrowedFd<'_>, offload: u32) -> io::Result<()> {
    // SAFETY: the argument is a number.
    unsafe { ioctl::tun_set_offload(tun.as_raw_fd(), offload as c_int)? };
    Ok(())
}

/// Has packets come with headers of `len` bytes in virtio's byte order.
pub(super) fn set_header(tun: BorrowedFd<'_>, len: usize) -> io::Result<()> {
    let (len, little) = (len as c_int, 1);
    // SAFETY: the arguments are numbers that outlive the calls.
    unsafe {
        ioctl::tun_set_vnet_hdr_sz(tun.as_raw_fd(), &raw const len)?;
        ioctl::tun_set_vnet_le(tun.as_raw_fd(), &raw const little)?;
    }
    Ok(())
}

/// Has the kernel use this queue of a tap, or no more.
pub(super) fn use_queue(tun: BorrowedFd<'_>, on: bool) -> io::Result<()> {
    // SAFETY: plain numbers, for which zeros are valid.
    let mut request: ifreq = unsafe { std::mem::zeroed() };
    request.ifr_ifru.ifru_flags = if on { libc::IFF_ATTACH_QUEUE } else { libc::IFF_DETACH_QUEUE } as c_short;
    // SAFETY: the request is whole.
    unsafe { ioctl::tun_set_queue(tun.as_raw_fd(), &raw const request)? };
    Ok(())
}

/// Plugs the tap's cable in or out.
pub(super) fn set_carrier(tun: BorrowedFd<'_>, on: bool) -> io::Result<()> {
    let on = c_int::from(on);
    // SAFETY: the argument is a number that outlives the call.
    unsafe { ioctl::tun_set_carrier(tun.as_raw_fd(), &raw const on)? };
    Ok(())
}

/// Has the descriptor `old` be another one for what `new` is, whoever uses it.
pub(super) fn replace(new: BorrowedFd<'_>, old: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: both are open, and stay so; whoever has `old` goes on with the new file, which is of the same kind.
    let done = unsafe { libc::dup3(new.as_raw_fd(), old.as_raw_fd(), libc::O_CLOEXEC) };
    nix::errno::Errno::result(done)?;
    Ok(())
}
