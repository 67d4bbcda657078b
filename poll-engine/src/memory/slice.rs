//! A run of guest bytes at a host address: the only way device code reads or writes guest memory.
#![allow(unsafe_code)] // raw access to memory that another party writes at the same time

use std::marker::PhantomData;
use std::ops::Range;
use std::ptr;

pub use vring::layout::{prefetch, prefetch_write};

use super::map::MemoryMap;

/// A host address and a length inside one mapped region, without the map that keeps it alive.
///
/// Plain numbers: only [`MemoryMap::translate`] makes one, and only the owner of that map turns it back into a
/// [`GuestSlice`].
#[derive(Clone, Copy, Debug)]
pub(crate) struct RawSlice {
    pub(super) host: *mut u8,
    pub(super) len: u32,
}

// SAFETY: a RawSlice is an address; every access goes through a GuestSlice, which borrows the live map.
unsafe impl Send for RawSlice {}

impl RawSlice {
    pub(crate) const NONE: RawSlice = RawSlice { host: ptr::null_mut(), len: 0 };

    pub(crate) fn len(self) -> u32 {
        self.len
    }

    /// Whether there is no byte, as in [`NONE`](Self::NONE): no chain has such a buffer.
    #[inline]
    pub(crate) fn is_none(self) -> bool {
        self.len == 0
    }

    #[inline]
    pub(crate) fn host_addr(self) -> *mut u8 {
        self.host
    }

    /// Asks the CPU to fetch the cache lines of the first `len` bytes, to be read or to be written.
    #[inline]
    pub(crate) fn prefetch_lines(self, len: u32, write: bool) {
        prefetch_lines(self.host, self.len.min(len) as usize, write);
    }

    pub(crate) fn host_range(self) -> Range<usize> {
        self.host.addr()..self.host.addr() + self.len as usize
    }

    /// Ties the address back to the map it came from.
    ///
    /// # Safety
    /// `self` must have been made by `map`, or by a map that shares the same region objects.
    #[inline]
    pub(crate) unsafe fn in_map(self, _map: &MemoryMap) -> GuestSlice<'_> {
        GuestSlice { host: self.host, len: self.len, _map: PhantomData }
    }
}

/// A run of guest memory, valid as long as the memory map it was translated by.
///
/// The guest may write the same bytes at any moment, so nothing here hands out a reference: bytes are copied in or
/// out, and what was copied is what counts.
#[derive(Clone, Copy, Debug)]
pub struct GuestSlice<'m> {
    host: *mut u8,
    len: u32,
    _map: PhantomData<&'m MemoryMap>,
}

impl<'m> GuestSlice<'m> {
    /// Length in bytes.
    #[inline]
    pub fn len(&self) -> usize {
        self.len as usize
    }

    /// Whether the slice holds no byte.
    #[inline]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The host address, for handing to the kernel (`iovec`, io_uring). Valid while the map lives.
    #[inline]
    pub fn host_addr(&self) -> *mut u8 {
        self.host
    }

    /// The part from `offset` on, at most `len` bytes long; empty when `offset` is past the end.
    #[inline]
    #[must_use]
    pub fn part(&self, offset: usize, len: usize) -> GuestSlice<'m> {
        let offset = offset.min(self.len());
        let len = len.min(self.len() - offset);
        // SAFETY: offset <= self.len, so the address stays inside (or one past) the same mapped run.
        GuestSlice { host: unsafe { self.host.add(offset) }, len: len as u32, _map: PhantomData }
    }

    /// Copies guest bytes out, up to the shorter of the two lengths; returns how many.
    #[inline]
    pub fn read(&self, into: &mut [u8]) -> usize {
        let n = into.len().min(self.len());
        // SAFETY: n bytes are inside the mapped run and inside `into`; guest memory never overlaps a Rust slice. A
        // concurrent guest write can tear the copy, which is then just other bytes.
        unsafe { ptr::copy_nonoverlapping(self.host, into.as_mut_ptr(), n) };
        n
    }

    /// Copies bytes into guest memory, up to the shorter of the two lengths; returns how many.
    #[inline]
    pub fn write(&self, from: &[u8]) -> usize {
        let n = from.len().min(self.len());
        // SAFETY: as in `read`, with the direction turned round.
        unsafe { ptr::copy_nonoverlapping(from.as_ptr(), self.host, n) };
        n
    }

    /// Writes the first byte, if there is one.
    #[inline]
    pub fn write_byte(&self, byte: u8) {
        if self.len > 0 {
            // SAFETY: the first byte is mapped.
            unsafe { ptr::write_volatile(self.host, byte) };
        }
    }

    /// Copies into another slice, up to the shorter of the two lengths; returns how many bytes.
    #[inline]
    pub fn copy_to(&self, other: &GuestSlice<'_>) -> usize {
        let n = self.len().min(other.len());
        // SAFETY: n bytes are inside both mapped runs, which may overlap.
        unsafe {
            match n {
                #[cfg(target_arch = "x86_64")]
                16..=64 => copy_small(self.host, other.host, n),
                _ => ptr::copy(self.host, other.host, n),
            }
        };
        n
    }

    /// Sets every byte of the slice.
    #[inline]
    pub fn fill(&self, byte: u8) {
        // SAFETY: the whole run is mapped and writable.
        unsafe { ptr::write_bytes(self.host, byte, self.len()) };
    }

    /// Reads the first 16 bytes, each of them once, as two little-endian numbers: headers and descriptors, which the
    /// guest may rewrite while we look (the compiler must not read them a second time). `None` when the slice is
    /// shorter.
    #[inline]
    pub fn read_pair_once(&self) -> Option<[u64; 2]> {
        if self.len < 16 {
            return None;
        }
        if self.host.addr().is_multiple_of(8) {
            #[allow(clippy::cast_ptr_alignment)] // checked just above
            let words = self.host.cast::<u64>();
            // SAFETY: 16 bytes are mapped (checked above) and 8-byte aligned.
            return Some(unsafe {
                [u64::from_le(ptr::read_volatile(words)), u64::from_le(ptr::read_volatile(words.add(1)))]
            });
        }
        let mut pair = [0; 2];
        for i in 0..16 {
            // SAFETY: i < 16 <= len.
            let byte = unsafe { ptr::read_volatile(self.host.add(i)) };
            pair[i / 8] |= u64::from(byte) << (8 * (i % 8));
        }
        Some(pair)
    }

    /// Copies the first `N` bytes out, in as few loads as there can be; `None` when the slice is shorter.
    #[inline]
    pub fn read_array<const N: usize>(&self) -> Option<[u8; N]> {
        if self.len() < N {
            return None;
        }
        let mut bytes = [0; N];
        // SAFETY: N bytes are inside the mapped run. As in `read`, what was copied is what counts.
        unsafe { ptr::copy_nonoverlapping(self.host, bytes.as_mut_ptr(), N) };
        Some(bytes)
    }

    /// Writes the first `N` bytes, in as few stores as there can be; false when the slice is shorter.
    #[inline]
    pub fn write_array<const N: usize>(&self, bytes: [u8; N]) -> bool {
        if self.len() < N {
            return false;
        }
        // SAFETY: N bytes are inside the mapped run.
        unsafe { ptr::copy_nonoverlapping(bytes.as_ptr(), self.host, N) };
        true
    }

    /// Asks the CPU to fetch the first cache line.
    #[inline]
    pub fn prefetch(&self) {
        prefetch(self.host);
    }

    /// Asks the CPU to fetch every cache line of the slice, to be read or to be written.
    #[inline]
    pub fn prefetch_lines(&self, write: bool) {
        prefetch_lines(self.host, self.len(), write);
    }

    /// Asks the CPU to fetch the first cache line, to be written.
    #[inline]
    pub fn prefetch_write(&self) {
        prefetch_write(self.host);
    }
}

/// Copies `n` bytes, as those of a small packet, without a call.
///
/// # Safety
/// `n` is from 16 to 64, and so many bytes are there to read and to write. They may overlap.
#[cfg(target_arch = "x86_64")]
#[inline(always)] // that is what it is for
unsafe fn copy_small(from: *const u8, to: *mut u8, n: usize) {
    use std::arch::x86_64::{_mm_loadu_si128, _mm_storeu_si128};
    // What is behind 32 bytes, or the same bytes again; from the end as from the start.
    let far = if n > 32 { 16 } else { 0 };
    let places = [0, far, n - 16 - far, n - 16];
    // SAFETY: each place is at most n - 16. All is read before anything is written.
    unsafe {
        let parts = places.map(|at| _mm_loadu_si128(from.add(at).cast()));
        places.into_iter().zip(parts).for_each(|(at, part)| _mm_storeu_si128(to.add(at).cast(), part));
    }
}

#[inline]
fn prefetch_lines(host: *const u8, len: usize, write: bool) {
    const LINE: usize = 64;
    let before = host.addr() % LINE;
    for at in (0..before + len).step_by(LINE) {
        let line = host.wrapping_sub(before).wrapping_add(at);
        if write {
            prefetch_write(line);
        } else {
            prefetch(line);
        }
    }
}

#[cfg(test)]
pub(super) fn tests_read(host: *const u8, len: usize) -> Vec<u8> {
    // SAFETY: tests give addresses of mappings that they keep.
    (0..len).map(|i| unsafe { host.add(i).read_volatile() }).collect()
}
