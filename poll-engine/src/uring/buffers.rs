//! Guest memory that is registered with an io_uring.
#![allow(unsafe_code)] // registration takes raw buffers

use std::sync::Arc;

use io_uring::Submitter;
use tracing::{info, warn};

use super::FixedBuffers;
use crate::memory::map::{MemoryMap, Region};
use crate::memory::shortfall::{locked, memlock_limit};
use crate::memory::slice::GuestSlice;

/// Registered pieces of guest memory a ring can hold.
const SLOTS: u32 = 1024;
/// io_uring takes fixed buffers of up to 1 GiB each.
const PIECE: u64 = 1 << 30;

#[derive(Debug)]
struct Piece {
    host: usize,
    len: usize,
    slot: u32,
    region: Arc<Region>,
}

/// A ring's table of buffers.
#[derive(Debug)]
pub(super) struct Buffers {
    free: Vec<u32>,
    pieces: Vec<Piece>,
    refused: bool,
    /// The limit as it was before rights were given up, of which asking is one.
    memlock: Option<u64>,
    /// Bytes that the ring itself has locked.
    own: u64,
}

impl Buffers {
    /// An empty table, in a ring that has none yet and has locked `own` bytes.
    pub fn new(submitter: &Submitter<'_>, own: u64) -> Buffers {
        let free = match submitter.register_buffers_sparse(SLOTS) {
            Ok(()) => (0..SLOTS).rev().collect(),
            Err(e) => {
                info!("io_uring takes no registered buffers here ({e}); guest memory is used unregistered");
                Vec::new()
            }
        };
        Buffers { free, pieces: Vec::new(), refused: false, memlock: memlock_limit(), own }
    }

    /// Makes the registered buffers those of `maps`: regions that are new are registered, those gone are released.
    pub fn sync<'a>(
        &mut self,
        submitter: &Submitter<'_>,
        mode: FixedBuffers,
        maps: impl Iterator<Item = &'a MemoryMap>,
    ) {
        if mode == FixedBuffers::Off || (self.free.is_empty() && self.pieces.is_empty()) {
            return;
        }
        let mut wanted: Vec<Arc<Region>> = Vec::new();
        for region in maps.flat_map(MemoryMap::regions) {
            let eligible = mode == FixedBuffers::On || region.is_huge();
            if eligible && !wanted.iter().any(|w| Arc::ptr_eq(w, region)) {
                wanted.push(Arc::clone(region));
            }
        }
        let pieces = std::mem::take(&mut self.pieces);
        for piece in pieces {
            if wanted.iter().any(|w| Arc::ptr_eq(w, &piece.region)) {
                self.pieces.push(piece);
            } else {
                self.release(submitter, piece.slot);
            }
        }
        let needed = self.own + wanted.iter().map(|region| region.spec().size).sum::<u64>();
        for region in wanted {
            if !self.pieces.iter().any(|p| Arc::ptr_eq(&p.region, &region)) {
                self.register(submitter, &region, needed);
            }
        }
    }

    /// `needed` bytes have to be locked in all.
    fn register(&mut self, submitter: &Submitter<'_>, region: &Arc<Region>, needed: u64) {
        let size = region.spec().size;
        let mut at = 0;
        while at < size && !self.refused {
            let Some(slot) = self.free.pop() else { return };
            let len = (size - at).min(PIECE) as usize;
            let host = region.host_addr().wrapping_add(at as usize);
            let iov = libc::iovec { iov_base: host.cast(), iov_len: len };
            // SAFETY: the range is inside the region's mapping, which the Arc in `pieces` keeps until released.
            match unsafe { submitter.register_buffers_update(slot, &[iov], None) } {
                Ok(()) => {
                    self.pieces.push(Piece { host: host.addr(), len, slot, region: Arc::clone(region) });
                }
                Err(e) => {
                    // Not worth trying again and again: the limit will not move by itself.
                    self.refused = true;
                    self.free.push(slot);
                    let how = match e.raw_os_error() {
                        Some(libc::ENOMEM) => {
                            format!(": for each reactor of the guest {}", locked(needed, self.memlock))
                        }
                        _ => String::new(),
                    };
                    warn!("guest memory stays unregistered with io_uring, and is slower ({e}){how}");
                }
            }
            at += len as u64;
        }
    }

    fn release(&mut self, submitter: &Submitter<'_>, slot: u32) {
        let none = libc::iovec { iov_base: std::ptr::null_mut(), iov_len: 0 };
        // SAFETY: an empty buffer takes the slot; the kernel keeps the old one until operations on it have completed.
        match unsafe { submitter.register_buffers_update(slot, &[none], None) } {
            Ok(()) => self.free.push(slot),
            Err(e) => warn!("registered buffer {slot} not released: {e}"),
        }
    }

    /// The registered buffer that holds all of `slice`.
    #[inline]
    pub fn holding(&self, slice: &GuestSlice<'_>) -> Option<u16> {
        let start = slice.host_addr().addr();
        let inside = |p: &&Piece| start.checked_sub(p.host).is_some_and(|off| off + slice.len() <= p.len);
        self.pieces.iter().find(inside).map(|p| p.slot as u16)
    }
}
