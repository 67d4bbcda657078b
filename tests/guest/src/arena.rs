//! Guest memory that devices see, handed out piece by piece.

use core::ptr::{self, NonNull};

/// Memory that an order brought, from `next` to `end`.
pub struct Arena {
    next: usize,
    end: usize,
}

impl Arena {
    /// `size` bytes at `start`. Identity mapping ends at 4 GiB, and so does what is used.
    pub fn new(start: u64, size: u64) -> Arena {
        let limit = 1 << 32;
        let next = start.clamp(1, limit) as usize;
        Arena { next, end: start.saturating_add(size).min(limit) as usize }
    }

    /// Bytes that nobody else has.
    pub fn take(&mut self, len: usize, align: usize) -> Option<Piece> {
        let at = self.next.next_multiple_of(align);
        let end = at.checked_add(len).filter(|&end| end <= self.end)?;
        self.next = end;
        Some(Piece { at: NonNull::new(ptr::with_exposed_provenance_mut(at))?, len })
    }
}

/// A run of guest memory. A device may write it at any moment, so bytes are copied in and out.
#[derive(Clone, Copy)]
pub struct Piece {
    at: NonNull<u8>,
    len: usize,
}

// SAFETY: an address in memory that all CPUs map alike; each piece is used by one of them at a time.
unsafe impl Send for Piece {}

impl Piece {
    /// The guest-physical address, which is also the virtual one.
    pub fn address(&self) -> u64 {
        self.at.addr().get() as u64
    }

    /// The address as a pointer, valid for the length that was asked for.
    pub fn pointer(&self) -> NonNull<u8> {
        self.at
    }

    /// Writes at an offset.
    #[inline]
    pub fn put<T: Copy>(&self, offset: usize, value: T) {
        assert!(offset + size_of::<T>() <= self.len, "beyond the piece");
        // SAFETY: inside the piece, which is ours.
        unsafe { self.at.add(offset).cast::<T>().write_unaligned(value) };
    }

    /// Reads an integer at an offset, aligned or not.
    #[inline]
    pub fn get<T: Copy + Default>(&self, offset: usize) -> T {
        assert!(offset + size_of::<T>() <= self.len, "beyond the piece");
        // SAFETY: inside the piece; callers read integers, which any bytes are.
        unsafe { self.at.add(offset).cast::<T>().read_unaligned() }
    }

    /// Clears all of it.
    pub fn clear(&self) {
        // SAFETY: the whole piece is ours.
        unsafe { self.at.write_bytes(0, self.len) };
    }
}
