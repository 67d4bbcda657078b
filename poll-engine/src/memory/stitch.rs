//! Rings behind an IOMMU: a driver may allocate a ring whose pages lie anywhere, since they are neighbours by their I/O
//! addresses. A ring is used at one host address, so such pages are mapped once more, side by side.
#![allow(unsafe_code)] // mmap over a mapping of our own

use std::os::fd::AsRawFd;

use vm_memory::{FileOffset, MmapRegion};

use super::map::{MemoryError, MemoryMap, Region, Span};

const PAGE: usize = 4096;

/// Maps `pieces` of the memory one after the other; they are to be found from the first one's first byte on.
pub(super) fn stitch(pieces: &[Span], memory: &MemoryMap) -> Result<Region, MemoryError> {
    let [first, ..] = pieces else { return Err(MemoryError::Outside { addr: 0, len: 0 }) };
    let iova = first.addr;
    let scattered = || MemoryError::Scattered(iova);
    let fail = |reason: String| MemoryError::Map { guest_addr: iova, reason };
    let skip = first.host.addr() % PAGE;
    let len = pieces.iter().map(|p| p.size() as usize).sum::<usize>();
    let whole = (skip + len).next_multiple_of(PAGE);
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    let mapping =
        MmapRegion::<()>::build(None, whole, libc::PROT_NONE, flags).map_err(|e| fail(e.to_string()))?;
    let mut done = 0;
    for (i, piece) in pieces.iter().enumerate() {
        let region = memory.find_host(&piece.host_range()).ok_or_else(scattered)?;
        let (file, offset) = region.file_at(piece.host).ok_or_else(scattered)?;
        if region.is_late() {
            // Not to be found by way of another mapping.
            for at in (0..piece.size() as usize).step_by(PAGE) {
                // SAFETY: inside the span, which is inside a region that is mapped; what is read does not matter.
                unsafe { piece.host.add(at).read_volatile() };
            }
        }
        // All but the first begin with a page, all but the last end with one.
        let before = if i == 0 { skip } else { 0 };
        let bytes = before + piece.size() as usize;
        let is_last = i + 1 == pieces.len();
        let offset = offset.checked_sub(before as u64).ok_or_else(scattered)?;
        if region.is_huge() || !offset.is_multiple_of(PAGE as u64) || !(is_last || bytes.is_multiple_of(PAGE))
        {
            return Err(scattered());
        }
        let bytes = bytes.next_multiple_of(PAGE);
        // SAFETY: done + bytes <= whole, so this replaces pages of the mapping made above, which nobody knows yet; it is
        // unmapped as a whole when the mapping is dropped.
        let mapped = unsafe {
            libc::mmap(
                mapping.as_ptr().add(done).cast(),
                bytes,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED | libc::MAP_FIXED | libc::MAP_NORESERVE,
                file.file().as_raw_fd(),
                offset as libc::off_t,
            )
        };
        if mapped == libc::MAP_FAILED {
            return Err(fail(std::io::Error::last_os_error().to_string()));
        }
        done += bytes;
    }
    let from = memory.find_host(&first.host_range()).ok_or_else(scattered)?;
    Region::stitched(first, from, skip, mapping).ok_or_else(scattered)
}

/// Where a host address inside a mapping is in its file.
pub(super) fn offset_in(mapping: &MmapRegion, host: *const u8) -> Option<(&FileOffset, u64)> {
    let file = mapping.file_offset()?;
    let offset = host.addr().checked_sub(mapping.as_ptr().addr())?;
    Some((file, file.start() + offset as u64))
}
