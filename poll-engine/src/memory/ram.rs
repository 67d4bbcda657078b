//! Memory of our own in the form of guest memory: what a driver of ours shares with a device, and what a RAM disk keeps.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use nix::fcntl::{FallocateFlags, fallocate};
use nix::sys::memfd::{MFdFlags, memfd_create};

use super::map::{MemoryError, MemoryMap, Region, RegionSpec};
use super::shortfall;
use crate::engine::placement::topology::SYSFS;

/// One memfd, mapped here and ready to be shared.
#[derive(Debug)]
pub struct Ram {
    fd: OwnedFd,
    map: Arc<MemoryMap>,
    spec: RegionSpec,
    next: u64,
}

impl Ram {
    /// `size` bytes at guest-physical `guest_addr`. Front-end addresses are our own host addresses, as with QEMU.
    pub fn new(guest_addr: u64, size: u64, huge: bool) -> Result<Ram, MemoryError> {
        let fail = |e: nix::Error| MemoryError::Map { guest_addr, reason: e.to_string() };
        let flags = if huge { MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_HUGETLB } else { MFdFlags::MFD_CLOEXEC };
        let fd = memfd_create(c"guest-ram", flags).map_err(fail)?;
        nix::unistd::ftruncate(&fd, size as i64).map_err(fail)?;
        if huge {
            // All of them now: one that is missing later is a fault.
            let page = nix::sys::statfs::fstatfs(&fd).map_err(fail)?.block_size() as u64;
            let short = |e: nix::Error| MemoryError::Map {
                guest_addr,
                reason: format!("{e}; {}", shortfall::huge_pages(SYSFS.as_ref(), size, page)),
            };
            fallocate(&fd, FallocateFlags::empty(), 0, size as i64).map_err(short)?;
        }
        Self::shared(guest_addr, size, fd)
    }

    /// As [`new`](Self::new), in a memfd that somebody else has made.
    pub fn shared(guest_addr: u64, size: u64, fd: OwnedFd) -> Result<Ram, MemoryError> {
        let copy =
            |fd: &OwnedFd| fd.try_clone().map_err(|e| MemoryError::Map { guest_addr, reason: e.to_string() });
        let spec = RegionSpec { guest_addr, size, user_addr: 0, mmap_offset: 0 };
        let region = Region::map(spec, copy(&fd)?)?.at_host_addr();
        let spec = *region.spec();
        let map = Arc::new(MemoryMap::new(vec![Arc::new(region)])?);
        Ok(Ram { fd, map, spec, next: guest_addr })
    }

    /// The region as a front end describes it.
    pub fn spec(&self) -> RegionSpec {
        self.spec
    }

    /// The memfd.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// The memory, for writing and reading.
    pub fn map(&self) -> &Arc<MemoryMap> {
        &self.map
    }

    /// Sets `size` bytes aside at a multiple of `align` (a power of two) and returns their guest-physical address;
    /// `None` when the memory is used up.
    pub fn alloc(&mut self, size: u64, align: u64) -> Option<u64> {
        let at = self.next.checked_next_multiple_of(align)?;
        let end = at.checked_add(size)?;
        if end > self.spec.guest_addr + self.spec.size {
            return None;
        }
        self.next = end;
        Some(at)
    }

    /// The front end's address of a guest-physical one.
    pub fn user_addr(&self, guest_addr: u64) -> u64 {
        guest_addr - self.spec.guest_addr + self.spec.user_addr
    }
}
