//! What a device leaves to the process that comes after this one if it is killed, behind the regions of the queues:
//!
//! ```text
//!   0 current u64: length, and in bit 32 which half | 64 one half | 64 + 2048 the other
//! ```

use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::memory::GuestSlice;
use crate::memory::map::MemoryMap;

/// Most bytes of a memento.
pub const MAX_MEMENTO: usize = 2048;
const HALVES: u64 = 64;
/// Bytes of all this.
pub(super) const BYTES: u64 = HALVES + 2 * MAX_MEMENTO as u64;

/// A place for a few bytes that outlives the process. The front end may write there whatever it likes.
#[derive(Clone, Debug)]
pub struct Memento {
    map: Arc<MemoryMap>,
    /// Where it begins in the map, and in this process.
    at: u64,
    current: NonNull<u8>,
}

// SAFETY: an address in a mapping that `map` keeps; access is atomic, and allows for the front end writing meanwhile.
unsafe impl Send for Memento {}

impl Memento {
    /// At this place of a record of so many bytes, if there is room.
    pub(super) fn at(map: &Arc<MemoryMap>, at: u64, size: u64) -> Option<Memento> {
        if at.checked_add(BYTES)? > size {
            return None;
        }
        let current = map.ring_address(at, 8, false).ok()?.host;
        // A front end chooses where the record begins in its file.
        current.addr().get().is_multiple_of(8).then(|| Memento { map: Arc::clone(map), at, current })
    }

    /// What was left there; empty if nothing.
    pub fn read(&self) -> Vec<u8> {
        let current = self.current().load(Ordering::Acquire);
        let mut bytes = vec![0; (current as u32 as usize).min(MAX_MEMENTO)];
        let read = self.half(current >> 32 & 1, bytes.len()).map_or(0, |half| half.read(&mut bytes));
        bytes.truncate(read);
        bytes
    }

    /// Leaves these bytes there instead, [`MAX_MEMENTO`] at most: a process that is killed has left them, or the others.
    pub fn write(&self, bytes: &[u8]) {
        assert!(bytes.len() <= MAX_MEMENTO, "a memento of {} bytes", bytes.len());
        let half = self.current().load(Ordering::Relaxed) >> 32 & 1 ^ 1;
        if let Some(at) = self.half(half, bytes.len()) {
            at.write(bytes);
            self.current().store(half << 32 | bytes.len() as u64, Ordering::Release);
        }
    }

    fn half(&self, half: u64, len: usize) -> Option<GuestSlice<'_>> {
        self.map.slice(self.at + HALVES + half * MAX_MEMENTO as u64, len as u32)
    }

    fn current(&self) -> &AtomicU64 {
        // SAFETY: the address was found to be aligned and in the map (see `at`), which is kept; access is atomic.
        unsafe { self.current.cast().as_ref() }
    }
}
