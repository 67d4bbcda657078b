//! A region of memory that the front end shares, mapped, and places for rings inside it.
#![allow(unsafe_code)] // mmap

use std::fs::File;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use nix::sys::statfs::{HUGETLBFS_MAGIC, fstatfs};
use serde::{Deserialize, Serialize};
use vm_memory::{FileOffset, MmapRegion};

use super::fault::Guard;
use super::iotlb::Access;
use super::map::{MemoryError, Span};
use super::stitch::offset_in;
use super::userfault::Userfault;

/// One region as the front end describes it (vhost-user: "Memory regions description").
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RegionSpec {
    /// Guest-physical start.
    pub guest_addr: u64,
    /// Bytes.
    pub size: u64,
    /// The same memory's address in the front end, in which ring addresses are given.
    pub user_addr: u64,
    /// Where the region starts in the shared file.
    pub mmap_offset: u64,
}

impl RegionSpec {
    fn check(&self) -> Result<(), MemoryError> {
        let fits = |start: u64| start.checked_add(self.size).is_some();
        if self.size == 0 || !fits(self.guest_addr) || !fits(self.user_addr) || !fits(self.mmap_offset) {
            return Err(MemoryError::BadRegion { guest_addr: self.guest_addr, size: self.size });
        }
        Ok(())
    }

    pub(super) fn overlaps(&self, other: &RegionSpec) -> bool {
        let cross = |a: u64, b: u64| a < b + other.size && b < a + self.size;
        cross(self.guest_addr, other.guest_addr) || cross(self.user_addr, other.user_addr)
    }
}

/// One mapped region; unmapped when the last map and the last ring that use it are gone.
#[derive(Debug)]
pub struct Region {
    pub(super) spec: RegionSpec,
    pub(super) host: NonNull<u8>,
    huge: bool,
    /// Pages may be missing, and come when they are touched.
    late: AtomicBool,
    /// Before the mapping: it is given up first.
    guard: Guard,
    mapping: MmapRegion,
}

// SAFETY: the region is an address range owned by its mapping; access is by copies through GuestSlice or by the
// volatile and atomic accessors of vring::layout, both of which allow for concurrent writers.
unsafe impl Send for Region {}
// SAFETY: as above.
unsafe impl Sync for Region {}

impl Region {
    /// Maps `spec` out of the file behind `fd`, shared, readable and writable.
    pub fn map(spec: RegionSpec, fd: OwnedFd) -> Result<Region, MemoryError> {
        Region::map_for(Access::BOTH, spec, fd)
    }

    /// As [`map`](Self::map), for memory that may be for reading only: then nothing may be written through a
    /// [`Span`] of it. What is for writing only cannot be mapped on Linux.
    pub fn map_for(access: Access, spec: RegionSpec, fd: OwnedFd) -> Result<Region, MemoryError> {
        spec.check()?;
        let fail = |reason: String| MemoryError::Map { guest_addr: spec.guest_addr, reason };
        let file = File::from(fd);
        // Touching a page behind the end of a file is SIGBUS.
        if file.metadata().is_ok_and(|meta| meta.is_file() && meta.len() < spec.mmap_offset + spec.size) {
            return Err(fail("the file ends before it".into()));
        }
        let (page, huge) = match fstatfs(&file) {
            Ok(fs) if fs.filesystem_type() == HUGETLBFS_MAGIC => (fs.block_size() as u64, true),
            _ => (4096, false),
        };
        // mmap wants an offset of whole pages (of huge ones on hugetlbfs); the region may start inside one.
        let start = spec.mmap_offset & !(page - 1);
        let skip = spec.mmap_offset - start;
        let len = if huge { (skip + spec.size).next_multiple_of(page) } else { skip + spec.size };
        let len = usize::try_from(len).map_err(|e| fail(e.to_string()))?;
        let mapping = MmapRegion::<()>::build(
            Some(FileOffset::new(file, start)),
            len,
            if access.allows(Access::WRITE) { libc::PROT_READ | libc::PROT_WRITE } else { libc::PROT_READ },
            libc::MAP_SHARED | libc::MAP_NORESERVE,
        )
        .map_err(|e| fail(e.to_string()))?;
        // SAFETY: skip < len, so the address is inside the mapping just made.
        let host = NonNull::new(unsafe { mapping.as_ptr().add(skip as usize) })
            .ok_or_else(|| fail("mapped at address zero".into()))?;
        let guard = Guard::new(mapping.as_ptr().addr(), len)
            .ok_or_else(|| fail("this process has as many regions as it can watch over".into()))?;
        Ok(Region { spec, host, huge, late: AtomicBool::new(false), guard, mapping })
    }

    /// A ring's pages side by side: `mapping`, in which `first` begins after `skip` bytes.
    pub(super) fn stitched(first: &Span, from: &Region, skip: usize, mapping: MmapRegion) -> Option<Region> {
        let guest_addr = from.spec.guest_addr + (first.host.addr() - from.host_addr().addr()) as u64;
        let len = mapping.size();
        let host = NonNull::new(mapping.as_ptr().wrapping_add(skip))?;
        let guard = Guard::new(mapping.as_ptr().addr(), len)?;
        let spec = RegionSpec { guest_addr, size: (len - skip) as u64, user_addr: 0, mmap_offset: 0 };
        Some(Region { spec, host, huge: false, late: AtomicBool::new(false), guard, mapping })
    }

    /// The file behind a host address inside the region, and where in it that is.
    pub(super) fn file_at(&self, host: *const u8) -> Option<(&FileOffset, u64)> {
        offset_in(&self.mapping, host)
    }

    /// The region with its host address as the front-end address, for memory of our own.
    pub(super) fn at_host_addr(mut self) -> Region {
        self.spec.user_addr = self.host_addr().addr() as u64;
        self
    }

    /// As the front end described it.
    pub fn spec(&self) -> &RegionSpec {
        &self.spec
    }

    /// Whether the front end has taken some of this memory away.
    pub fn has_faulted(&self) -> bool {
        self.guard.has_faulted()
    }

    /// Has whoever touches a missing page wait for the front end to bring it.
    pub fn come_late(&self, faults: &Userfault) -> std::io::Result<()> {
        let pages = self.pages();
        // A huge page would be there as a whole, with zeros for what has not come. Without such pages it is refused.
        // SAFETY: advice about a mapping of our own, which changes no byte.
        unsafe {
            libc::madvise(self.mapping.as_ptr().cast(), pages.len(), libc::MADV_NOHUGEPAGE);
        }
        faults.register(self)?;
        self.late.store(true, Ordering::Release);
        Ok(())
    }

    /// All pages have come. Whoever still waits for one finds zeros.
    pub fn has_come(&self, faults: &Userfault) -> std::io::Result<()> {
        self.late.store(false, Ordering::Release);
        faults.unregister(self)
    }

    /// Takes the memory away from everybody, those included who wait for its pages: see
    /// [`Guard`](super::fault::Guard). The queues that use it break.
    pub fn give_up(&self, faults: &Userfault) -> std::io::Result<()> {
        let file = self.mapping.file_offset().ok_or(std::io::ErrorKind::Unsupported)?;
        self.guard.take_away(file)?;
        faults.wake(self)
    }

    /// Whether pages may be missing that only come when they are touched here.
    pub(super) fn is_late(&self) -> bool {
        self.late.load(Ordering::Acquire)
    }

    /// The whole mapping, in pages.
    pub(super) fn pages(&self) -> Range<usize> {
        let start = self.mapping.as_ptr().addr();
        start..start + self.mapping.size().next_multiple_of(4096)
    }

    /// Whether the memory is in huge pages (hugetlbfs), which are never swapped or moved.
    pub fn is_huge(&self) -> bool {
        self.huge
    }

    /// The file it is in, to be shared with another process.
    pub fn file(&self) -> Option<&File> {
        self.mapping.file_offset().map(FileOffset::file)
    }

    /// Host address of the region's first byte.
    pub fn host_addr(&self) -> *mut u8 {
        self.host.as_ptr()
    }
}

/// A place for a ring inside one region: a host address with the region kept alive.
#[derive(Clone, Debug)]
pub struct RingAddress {
    pub(crate) host: NonNull<u8>,
    pub(crate) region: Arc<Region>,
}

impl RingAddress {
    /// Its guest-physical address, whichever way it was given.
    pub fn guest_addr(&self) -> u64 {
        let spec = self.region.spec();
        spec.guest_addr + (self.host.addr().get() - self.region.host_addr().addr()) as u64
    }
}

// SAFETY: an address whose mapping is kept by the Arc; vring::layout says how it is accessed.
unsafe impl Send for RingAddress {}
