//! The memory table: regions the front end shares, mapped, and guest addresses translated to host slices.
//!
//! A [`MemoryMap`] is an immutable snapshot. A change makes a new one that shares the regions that stay; the old one
//! lives until its last [`MapHold`] is dropped, and only then is a removed region unmapped and acknowledged.
#![allow(unsafe_code)] // addresses handed out to `slice` and `ring::layout`

use std::ops::Range;
use std::ptr::NonNull;
use std::sync::Arc;

use super::hold::Hold;
use super::iotlb::{Access, Miss, Misses, each_missing};
pub use super::region::{Region, RegionSpec, RingAddress};
use super::slice::{GuestSlice, RawSlice};
use super::stitch::stitch;

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
    /// An I/O virtual address that is not translated, or not yet.
    #[error("I/O address {:#x} is not mapped for the device ({})", .0.iova, access_name(.0.access))]
    Miss(Miss),
    /// The front end has no translation for a ring.
    #[error("the ring is not mapped for the device")]
    RingUnmapped,
    /// A ring in scattered pages that cannot be mapped beside each other.
    #[error(
        "the ring at I/O address {0:#x} is in scattered pages of huge-page memory; \
         give the device a queue size of at most 256, or the guest memory in normal pages"
    )]
    Scattered(u64),
    /// A guest address range that no region covers.
    #[error("guest address {addr:#x} with length {len:#x} is outside guest memory")]
    Outside {
        /// First address of the range.
        addr: u64,
        /// Bytes.
        len: u64,
    },
}

fn access_name(access: Access) -> &'static str {
    match access {
        Access::READ => "reading",
        Access::WRITE => "writing",
        _ => "reading and writing",
    }
}

/// What translation reads: 32 bytes a region, or an interval of the IOTLB, in the order of the addresses that chains
/// name: guest-physical ones, or I/O virtual ones.
///
/// It has a size for each kind of access, of which one is 0 where only the other is permitted: an address is looked up
/// and the permission checked in one comparison.
#[derive(Clone, Copy, Debug)]
pub(super) struct Span {
    pub(super) addr: u64,
    pub(super) host: *mut u8,
    /// For reading, for writing.
    sizes: [u64; 2],
}

// SAFETY: an address, of which GuestSlice and the rings make use; see Region.
unsafe impl Send for Span {}

impl Span {
    const NOWHERE: Span = Span { addr: 0, host: std::ptr::null_mut(), sizes: [0; 2] };

    /// `size` bytes, which are not none.
    pub(super) fn new(addr: u64, host: *mut u8, size: u64, access: Access) -> Span {
        let allowed = |kind| if access.allows(kind) { size } else { 0 };
        Span { addr, host, sizes: [allowed(Access::READ), allowed(Access::WRITE)] }
    }

    pub(super) fn size(&self) -> u64 {
        self.sizes[0].max(self.sizes[1])
    }

    pub(super) fn access(&self) -> Access {
        match self.sizes {
            [_, 0] => Access::READ,
            [0, _] => Access::WRITE,
            _ => Access::BOTH,
        }
    }

    /// Bytes that may be accessed so.
    #[inline(always)]
    fn size_for(&self, access: Access) -> u64 {
        match access {
            Access::READ => self.sizes[0],
            Access::WRITE => self.sizes[1],
            _ => self.sizes[0].min(self.sizes[1]),
        }
    }

    pub(super) fn last(&self) -> u64 {
        self.addr + (self.size() - 1)
    }

    /// The part from `first` to `last`, which are inside.
    pub(super) fn part(&self, first: u64, last: u64) -> Span {
        let host = self.host.wrapping_add((first - self.addr) as usize);
        Span::new(first, host, last - first + 1, self.access())
    }

    /// This and `more` bytes behind it.
    pub(super) fn longer(&self, more: u64) -> Span {
        Span::new(self.addr, self.host, self.size() + more, self.access())
    }

    pub(super) fn host_range(&self) -> Range<usize> {
        self.host.addr()..self.host.addr() + self.size() as usize
    }

    /// Whether `next` begins where this ends, here as there.
    pub(super) fn goes_on_in(&self, next: &Span) -> bool {
        self.last().checked_add(1) == Some(next.addr)
            && self.host.wrapping_add(self.size() as usize) == next.host
    }
}

/// Translates the buffers of one chain, which are mostly in one region (or interval of the IOTLB): where the last was is
/// looked first.
#[derive(Clone, Copy)]
pub(crate) struct Locator<'m> {
    map: &'m MemoryMap,
    span: &'m Span,
}

impl<'m> Locator<'m> {
    /// The host slice behind `len` bytes at `addr`, to be written or to be read; `None` unless it is one, and for no bytes.
    #[inline(always)] // once a descriptor
    pub(crate) fn whole(&mut self, addr: u64, len: u32, write: bool) -> Option<RawSlice> {
        let kind = usize::from(write);
        if addr.wrapping_sub(self.span.addr) >= self.span.sizes[kind] {
            self.span = self.map.span_of_kind(addr, kind)?;
        }
        let offset = addr.wrapping_sub(self.span.addr);
        // No bytes wrap around to more than there are.
        if u64::from(len).wrapping_sub(1) >= self.span.sizes[kind] - offset {
            return None;
        }
        // SAFETY: offset < span.size, inside the mapping.
        Some(RawSlice { host: unsafe { self.span.host.add(offset as usize) }, len })
    }

    pub(crate) fn map(&self) -> &'m MemoryMap {
        self.map
    }
}

/// An immutable snapshot of guest memory.
#[derive(Debug, Default)]
pub struct MemoryMap {
    spans: Vec<Span>,
    regions: Vec<Arc<Region>>,
    /// With an IOTLB: where misses are posted. The spans are its intervals then.
    misses: Option<Arc<Misses>>,
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
        let span = |r: &Arc<Region>| Span::new(r.spec.guest_addr, r.host_addr(), r.spec.size, Access::BOTH);
        let spans = regions.iter().map(span).collect();
        Ok(MemoryMap { spans, regions, misses: None })
    }

    /// The same memory by I/O virtual addresses: `spans` point into its regions.
    pub(super) fn translated(&self, spans: Vec<Span>, misses: Arc<Misses>) -> MemoryMap {
        MemoryMap { spans, regions: self.regions.clone(), misses: Some(misses) }
    }

    /// Where misses are posted, if addresses are I/O virtual ones.
    pub fn misses(&self) -> Option<&Arc<Misses>> {
        self.misses.as_ref()
    }

    /// Host address of `size` bytes at a front-end address, if one region has them all.
    pub(super) fn find_user(&self, user_addr: u64, size: u64) -> Option<*mut u8> {
        let inside = |r: &Region| {
            user_addr >= r.spec.user_addr
                && r.spec.size.checked_sub(user_addr - r.spec.user_addr).is_some_and(|rest| size <= rest)
        };
        let region = self.regions.iter().find(|r| inside(r))?;
        Some(region.host_addr().wrapping_add((user_addr - region.spec.user_addr) as usize))
    }

    /// The region that holds all of a range of host addresses.
    pub(super) fn find_host(&self, range: &Range<usize>) -> Option<&Arc<Region>> {
        let inside = |r: &Region| {
            let start = r.host_addr().addr();
            start <= range.start && range.end <= start + r.spec.size as usize
        };
        self.regions.iter().find(|r| inside(r))
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
    pub fn with(&self, region: impl Into<Arc<Region>>) -> Result<MemoryMap, MemoryError> {
        let mut regions = self.regions.clone();
        regions.push(region.into());
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
    fn find(&self, addr: u64, size: impl Fn(&Span) -> u64) -> Option<&Span> {
        // A guest has a handful of regions, nearly always; the scan is cheaper than the search up to there.
        if self.spans.len() <= 8 {
            return self.spans.iter().find(|s| addr.wrapping_sub(s.addr) < size(s));
        }
        let after = self.spans.partition_point(|s| s.addr <= addr);
        self.spans[..after].last().filter(|s| addr - s.addr < size(s))
    }

    pub(super) fn span(&self, addr: u64, access: Access) -> Option<&Span> {
        self.find(addr, |s| s.size_for(access))
    }

    #[inline(never)] // how chains are walked is in registers
    fn span_of_kind(&self, addr: u64, kind: usize) -> Option<&Span> {
        self.find(addr, |s| s.sizes[kind])
    }

    /// Whether `addr` is translated for `access`.
    pub fn allows(&self, addr: u64, access: Access) -> bool {
        self.span(addr, access).is_some()
    }

    /// Whether `addr` is translated, for whatever it may be.
    pub fn knows(&self, addr: u64) -> bool {
        self.allows(addr, Access::READ) || self.allows(addr, Access::WRITE)
    }

    /// Why `len` bytes at `addr` cannot be translated.
    #[cold]
    pub(crate) fn absent(&self, addr: u64, len: u64, access: Access) -> MemoryError {
        let mut first = None;
        if self.misses.is_some() {
            each_missing(self, addr, len, access, |miss| {
                first = Some(miss);
                false
            });
        }
        first.map_or(MemoryError::Outside { addr, len }, MemoryError::Miss)
    }

    /// Where each of the buffers of a chain lies.
    #[inline]
    pub(crate) fn locate(&self) -> Locator<'_> {
        Locator { map: self, span: self.spans.first().unwrap_or(&Span::NOWHERE) }
    }

    /// Appends the host slices behind `len` bytes at `addr`: more than one where the range runs on from one region (or
    /// interval of the IOTLB) into the next.
    #[cold]
    pub(crate) fn translate(
        &self,
        mut addr: u64,
        mut len: u32,
        access: Access,
        out: &mut Vec<RawSlice>,
    ) -> Result<(), MemoryError> {
        let absent = self.absent(addr, len.into(), access);
        loop {
            let Some(span) = self.span(addr, access) else { return Err(absent) };
            let offset = addr - span.addr;
            let n = u64::from(len).min(span.size() - offset) as u32;
            // SAFETY: offset < span.size, inside the mapping.
            out.push(RawSlice { host: unsafe { span.host.add(offset as usize) }, len: n });
            len -= n;
            if len == 0 {
                return Ok(());
            }
            let Some(next) = addr.checked_add(u64::from(n)) else { return Err(absent) };
            addr = next;
        }
    }

    /// The bytes at `addr` up to the end of the region (or interval of the IOTLB), at most `len`. `None` outside of
    /// memory, and where the device may not read.
    #[inline]
    pub fn slice(&self, addr: u64, len: u32) -> Option<GuestSlice<'_>> {
        let span = self.find(addr, |s| s.sizes[0])?;
        let offset = addr - span.addr;
        let len = u64::from(len).min(span.sizes[0] - offset) as u32;
        // SAFETY: offset < span.size and offset + len <= span.size, inside a mapping that self keeps.
        Some(unsafe { RawSlice { host: span.host.add(offset as usize), len }.in_map(self) })
    }

    /// The guest-physical address of one that chains name.
    pub fn physical(&self, addr: u64) -> Option<u64> {
        let span = self.span(addr, Access::READ).or_else(|| self.span(addr, Access::WRITE))?;
        self.guest_addr(span.host.wrapping_add((addr - span.addr) as usize))
    }

    /// The guest-physical address of a host address inside one of the regions, however it was found: the way back for
    /// the dirty log, which knows no other addresses.
    pub fn guest_addr(&self, host: *const u8) -> Option<u64> {
        let at = host.addr() as u64;
        let offset = |r: &Region| at.wrapping_sub(r.host_addr().addr() as u64);
        let region = self.regions.iter().find(|r| offset(r) < r.spec.size);
        region.map(|r| r.spec.guest_addr + offset(r))
    }

    /// Where a ring part of `len` bytes lies, given as vhost-user gives it: with an IOTLB an I/O virtual address, and
    /// without a front-end address. Front ends without an IOTLB that negotiate `VIRTIO_F_ACCESS_PLATFORM` all the same
    /// may also give a guest-physical address. It must lie within one region, or in translated pages.
    pub fn ring_address(
        &self,
        addr: u64,
        len: u64,
        access_platform: bool,
    ) -> Result<RingAddress, MemoryError> {
        if self.misses.is_some() {
            return self.translated_ring_address(addr, len);
        }
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

    fn translated_ring_address(&self, addr: u64, len: u64) -> Result<RingAddress, MemoryError> {
        let outside = MemoryError::Outside { addr, len };
        let last = len.checked_sub(1).and_then(|rest| addr.checked_add(rest)).ok_or(outside)?;
        let mut pieces: Vec<Span> = Vec::new();
        let mut at = addr;
        loop {
            let span = self.span(at, Access::READ).or_else(|| self.span(at, Access::WRITE));
            let span = span.ok_or_else(|| self.absent(addr, len, Access::READ))?;
            let piece = span.part(at, span.last().min(last));
            match pieces.last_mut() {
                Some(p) if p.goes_on_in(&piece) => *p = p.longer(piece.size()),
                _ => pieces.push(piece),
            }
            if piece.last() == last {
                break;
            }
            at = piece.last() + 1;
        }
        if let [whole] = pieces.as_slice()
            && let (Some(region), Some(host)) =
                (self.find_host(&whole.host_range()), NonNull::new(whole.host))
        {
            return Ok(RingAddress { host, region: Arc::clone(region) });
        }
        let region = Arc::new(stitch(&pieces, self)?);
        Ok(RingAddress { host: region.host, region })
    }
}

/// A hold on a snapshot.
pub type MapHold = Hold<MemoryMap>;
