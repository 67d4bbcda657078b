//! The memory table: regions the front end shares, mapped, and guest addresses translated to host slices.
//!
//! A [`MemoryMap`] is an immutable snapshot. A change makes a new one that shares the regions that stay; the old one
//! lives until its last [`MapHold`] is dropped, and only then is a removed region unmapped and acknowledged.
#![allow(unsafe_code)] // mmap, and addresses handed out to `slice` and `ring::layout`

use std::fs::File;
use std::os::fd::OwnedFd;
use std::ptr::NonNull;
use std::sync::Arc;

use crossbeam::sync::WaitGroup;
use nix::sys::statfs::{HUGETLBFS_MAGIC, fstatfs};
use serde::{Deserialize, Serialize};
use vm_memory::{FileOffset, MmapRegion};

use super::fault::Guard;
use super::slice::{GuestSlice, RawSlice};

/// Most regions a session may have: what QEMU's `VHOST_USER_MAX_RAM_SLOTS` on x86 (512) leaves, and what KVM offers.
pub const MAX_REGIONS: usize = 509;

/// What a front end or a guest can get wrong about memory.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// A region of no bytes, or one that wraps around an address space.
    #[error("memory region at guest address {guest_addr:#x} with size {size:#x} is empty or wraps around")]
    BadRegion {
        /// Guest-physical start.
        guest_addr: u64,
        /// Bytes.
        size: u64,
    },
    /// Two regions share guest-physical or front-end addresses.
    #[error("memory region at guest address {0:#x} overlaps another one")]
    Overlap(u64),
    /// More regions than [`MAX_REGIONS`].
    #[error("more than {MAX_REGIONS} memory regions")]
    TooMany,
    /// The region to remove is not in the table.
    #[error("no memory region at guest address {0:#x} with that size and front-end address")]
    Unknown(u64),
    /// The shared file cannot be mapped (too short, not a file, no room).
    #[error("cannot map the region at guest address {guest_addr:#x}: {reason}")]
    Map {
        /// Guest-physical start.
        guest_addr: u64,
        /// What the mapping said.
        reason: String,
    },
    /// The front end has truncated the file behind a region that is in use.
    #[error("the front end has taken shared memory away")]
    TakenAway,
    /// A guest address range that no region covers.
    #[error("guest address {addr:#x} with length {len:#x} is outside guest memory")]
    Outside {
        /// First address of the range.
        addr: u64,
        /// Bytes.
        len: u64,
    },
}

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

    fn overlaps(&self, other: &RegionSpec) -> bool {
        let cross = |a: u64, b: u64| a < b + other.size && b < a + self.size;
        cross(self.guest_addr, other.guest_addr) || cross(self.user_addr, other.user_addr)
    }
}

/// One mapped region; unmapped when the last map and the last ring that use it are gone.
#[derive(Debug)]
pub struct Region {
    spec: RegionSpec,
    host: NonNull<u8>,
    huge: bool,
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
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_SHARED | libc::MAP_NORESERVE,
        )
        .map_err(|e| fail(e.to_string()))?;
        // SAFETY: skip < len, so the address is inside the mapping just made.
        let host = NonNull::new(unsafe { mapping.as_ptr().add(skip as usize) })
            .ok_or_else(|| fail("mapped at address zero".into()))?;
        let guard = Guard::new(mapping.as_ptr().addr(), len)
            .ok_or_else(|| fail("this process has as many regions as it can watch over".into()))?;
        Ok(Region { spec, host, huge, guard, mapping })
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

/// What translation reads: 24 bytes a region, in guest-physical order.
#[derive(Clone, Copy, Debug)]
struct Span {
    guest_addr: u64,
    size: u64,
    host: *mut u8,
}

/// An immutable snapshot of guest memory.
#[derive(Debug, Default)]
pub struct MemoryMap {
    spans: Vec<Span>,
    regions: Vec<Arc<Region>>,
}

// SAFETY: spans are addresses of the regions kept beside them; see Region.
unsafe impl Send for MemoryMap {}
// SAFETY: as above.
unsafe impl Sync for MemoryMap {}

impl MemoryMap {
    /// A map of these regions, in any order.
    pub fn new(mut regions: Vec<Arc<Region>>) -> Result<MemoryMap, MemoryError> {
        if regions.len() > MAX_REGIONS {
            return Err(MemoryError::TooMany);
        }
        regions.sort_by_key(|r| r.spec.guest_addr);
        for (i, a) in regions.iter().enumerate() {
            if regions[..i].iter().any(|b| a.spec.overlaps(&b.spec)) {
                return Err(MemoryError::Overlap(a.spec.guest_addr));
            }
        }
        let spans = regions
            .iter()
            .map(|r| Span { guest_addr: r.spec.guest_addr, size: r.spec.size, host: r.host_addr() })
            .collect();
        Ok(MemoryMap { spans, regions })
    }

    /// Whether the front end has taken some of this memory away.
    pub fn has_faulted(&self) -> bool {
        self.regions.iter().any(|r| r.has_faulted())
    }

    /// The regions, in guest-physical order.
    pub fn regions(&self) -> &[Arc<Region>] {
        &self.regions
    }

    /// This map and one region more.
    pub fn with(&self, region: Region) -> Result<MemoryMap, MemoryError> {
        let mut regions = self.regions.clone();
        regions.push(Arc::new(region));
        MemoryMap::new(regions)
    }

    /// This map without the region that the front end describes. The file offset is not compared: the protocol says
    /// it is of no meaning in a removal.
    pub fn without(&self, spec: &RegionSpec) -> Result<MemoryMap, MemoryError> {
        let gone = |r: &Arc<Region>| {
            let s = &r.spec;
            (s.guest_addr, s.user_addr, s.size) == (spec.guest_addr, spec.user_addr, spec.size)
        };
        if !self.regions.iter().any(gone) {
            return Err(MemoryError::Unknown(spec.guest_addr));
        }
        MemoryMap::new(self.regions.iter().filter(|r| !gone(r)).cloned().collect())
    }

    #[inline(always)]
    fn span(&self, addr: u64) -> Option<&Span> {
        // A guest has a handful of regions, nearly always; the scan is cheaper than the search up to there.
        if self.spans.len() <= 8 {
            return self.spans.iter().find(|s| addr.wrapping_sub(s.guest_addr) < s.size);
        }
        let after = self.spans.partition_point(|s| s.guest_addr <= addr);
        self.spans[..after].last().filter(|s| addr - s.guest_addr < s.size)
    }

    /// Appends the host slices behind `len` bytes at guest-physical `addr`: one, or more where the range runs on from
    /// one region into the next.
    #[inline(always)] // once a descriptor
    pub(crate) fn translate(&self, addr: u64, len: u32, out: &mut Vec<RawSlice>) -> Result<(), MemoryError> {
        let outside = || MemoryError::Outside { addr, len: u64::from(len) };
        let span = self.span(addr).ok_or_else(outside)?;
        let offset = addr - span.guest_addr;
        if u64::from(len) <= span.size - offset {
            // SAFETY: offset < span.size, inside the mapping.
            out.push(RawSlice { host: unsafe { span.host.add(offset as usize) }, len });
            return Ok(());
        }
        self.translate_across(addr, len, out).ok_or_else(outside)
    }

    #[cold]
    fn translate_across(&self, mut addr: u64, mut len: u32, out: &mut Vec<RawSlice>) -> Option<()> {
        while len > 0 {
            let span = self.span(addr)?;
            let offset = addr - span.guest_addr;
            let n = u64::from(len).min(span.size - offset) as u32;
            // SAFETY: offset < span.size, inside the mapping.
            out.push(RawSlice { host: unsafe { span.host.add(offset as usize) }, len: n });
            len -= n;
            addr = addr.checked_add(u64::from(n))?;
        }
        Some(())
    }

    /// The bytes at guest-physical `addr` up to the end of the region, at most `len`. `None` outside of memory.
    #[inline]
    pub fn slice(&self, addr: u64, len: u32) -> Option<GuestSlice<'_>> {
        let span = self.span(addr)?;
        let offset = addr - span.guest_addr;
        let len = u64::from(len).min(span.size - offset) as u32;
        // SAFETY: offset < span.size and offset + len <= span.size, inside a mapping that self keeps.
        Some(unsafe { RawSlice { host: span.host.add(offset as usize), len }.in_map(self) })
    }

    /// The guest-physical address of a host address inside one of the regions, however it was found: the way back for
    /// the dirty log, which knows no other addresses.
    pub fn guest_addr(&self, host: *const u8) -> Option<u64> {
        let at = host.addr() as u64;
        let offset = |s: &Span| at.wrapping_sub(s.host.addr() as u64);
        self.spans.iter().find(|s| offset(s) < s.size).map(|s| s.guest_addr + offset(s))
    }

    /// Where a ring part of `len` bytes lies, given as vhost-user gives it: a front-end address, or an I/O virtual one
    /// when `VIRTIO_F_ACCESS_PLATFORM` is negotiated, which without a vIOMMU is the guest-physical address (QEMU
    /// keeps sending front-end addresses then). It must lie within one region.
    pub fn ring_address(
        &self,
        addr: u64,
        len: u64,
        access_platform: bool,
    ) -> Result<RingAddress, MemoryError> {
        let within = |start: u64, size: u64| {
            addr >= start && size.checked_sub(addr - start).is_some_and(|rest| len <= rest)
        };
        let by_user = self.regions.iter().find(|r| within(r.spec.user_addr, r.spec.size));
        let (region, offset) = match by_user {
            Some(r) => (r, addr - r.spec.user_addr),
            None if access_platform => {
                let r = self.regions.iter().find(|r| within(r.spec.guest_addr, r.spec.size));
                let r = r.ok_or(MemoryError::Outside { addr, len })?;
                (r, addr - r.spec.guest_addr)
            }
            None => return Err(MemoryError::Outside { addr, len }),
        };
        // SAFETY: offset + len <= region size, inside the mapping that the Arc keeps.
        let host = unsafe { region.host.add(offset as usize) };
        Ok(RingAddress { host, region: Arc::clone(region) })
    }
}

/// A user's hold on a snapshot: cloned into each request that points into it. When the last clone of a queue's hold is
/// gone, whoever changed the memory table may tell the front end so.
#[derive(Clone, Debug)]
pub struct MapHold(Arc<(Arc<MemoryMap>, WaitGroup)>);

impl MapHold {
    /// A hold on `map`; `released` is dropped with the last clone.
    ///
    /// One per queue, so that the count is touched by one reactor only.
    pub fn new(map: Arc<MemoryMap>, released: WaitGroup) -> MapHold {
        MapHold(Arc::new((map, released)))
    }

    /// The snapshot.
    #[inline]
    pub fn map(&self) -> &MemoryMap {
        &self.0.0
    }
}
