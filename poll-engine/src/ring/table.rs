//! Indirect tables in guest memory, of either ring format.

use super::RingError;
use super::layout::{DESC_SIZE, indirect_pair};
use crate::memory::iotlb::Access;
use crate::memory::map::{MemoryError, MemoryMap};
use crate::memory::slice::GuestSlice;

/// Indirect tables may be at least this long however small the ring is: QEMU takes 1024 (`VIRTQUEUE_MAX_SIZE`) from
/// anyone, so there are drivers that rely on it.
pub(super) const MIN_CHAIN_LIMIT: u32 = 1024;

/// More than a `next` of 16 bits can name are no table; Linux's vhost refuses them, too.
const MAX_ENTRIES: u32 = 1 << 16;

/// An indirect table.
pub(super) struct Table<'a> {
    map: &'a MemoryMap,
    addr: u64,
    len: u32,
    /// The table, if it lies in one region.
    whole: Option<GuestSlice<'a>>,
}

impl<'a> Table<'a> {
    /// The table at `addr`; none of its descriptors is read yet.
    #[inline]
    pub(super) fn new(map: &'a MemoryMap, addr: u64, len: u32) -> Result<Table<'a>, RingError> {
        if len == 0 || !len.is_multiple_of(DESC_SIZE) || len / DESC_SIZE > MAX_ENTRIES {
            return Err(RingError::BadTable(len));
        }
        let whole = map.slice(addr, len).filter(|s| s.len() == len as usize);
        Ok(Table { map, addr, len, whole })
    }

    /// Number of descriptors.
    #[inline]
    pub(super) fn entries(&self) -> u32 {
        self.len / DESC_SIZE
    }

    /// The two halves of descriptor `index`, each byte read once.
    #[inline]
    pub(super) fn read(&self, index: u16) -> Result<[u64; 2], RingError> {
        match &self.whole {
            Some(slice) => indirect_pair(slice, index).ok_or(RingError::BadTable(self.len)),
            None => self.read_across(index),
        }
    }

    /// A descriptor of a table that runs from one region into the next.
    #[cold]
    fn read_across(&self, index: u16) -> Result<[u64; 2], RingError> {
        let offset = u64::from(index) * u64::from(DESC_SIZE);
        let beyond = MemoryError::Outside { addr: self.addr, len: offset };
        let mut at = self.addr.checked_add(offset).ok_or(beyond)?;
        let mut bytes = [0; DESC_SIZE as usize];
        let mut done = 0;
        while done < bytes.len() {
            let left = (bytes.len() - done) as u32;
            let absent = || self.map.absent(at, left.into(), Access::READ);
            let n = self.map.slice(at, left).ok_or_else(absent)?.read(&mut bytes[done..]);
            done += n;
            at += n as u64;
        }
        let half = |at: usize| u64::from_le_bytes(std::array::from_fn(|i| bytes[at + i]));
        Ok([half(0), half(8)])
    }
}
