//! In-flight tracking: which requests a queue has taken and not yet shown as used, kept in memory that the front end
//! holds on to, so that the next back end finishes what a killed one had begun (vhost-user, "Inflight I/O tracking").
//!
//! The record only has to outlive the process, not the machine, so the order of its steps is the order of our stores:
//! a process that is killed has done all of its stores up to some instruction, and none behind it.
//!
//! The front end may write whatever it likes into this memory. So everything is read once, when a ring is activated,
//! and checked; a running ring writes to it and never reads.
#![allow(unsafe_code)] // records at raw addresses in memory that is shared

mod memento;
pub(super) mod packed;

use std::fs::File;
use std::os::fd::OwnedFd;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU64, Ordering};

use serde::{Deserialize, Serialize};

use super::{RingError, RingFormat};
use crate::fault_point::pass;
use crate::memory::map::{MemoryError, MemoryMap, Region, RegionSpec, RingAddress};

pub use memento::{MAX_MEMENTO, Memento};

/// The only version of the layout there is; 0 is memory that nobody has used yet.
const VERSION: u16 = 1;
/// Regions begin at multiples of this, as DPDK and libvhost-user place them: the memory may have been theirs.
const REGION_ALIGN: u64 = 64;

/// Bytes of `QueueRegionSplit` without its entries.
const SPLIT_HEADER: u64 = 16;
/// Bytes of `DescStateSplit`. Header and entries are such that no entry lies in two cache lines.
const SPLIT_ENTRY: u64 = 16;
/// Bytes of `QueueRegionPacked` without its entries.
const PACKED_HEADER: u64 = 32;
/// Bytes of `DescStatePacked`.
const PACKED_ENTRY: u64 = 32;

/// Bytes of the region of a queue of `queue_size` descriptors, up to where the next one begins.
fn region_bytes(format: RingFormat, queue_size: u16) -> u64 {
    let n = u64::from(queue_size);
    let bytes = match format {
        RingFormat::Split => SPLIT_HEADER + SPLIT_ENTRY * n,
        RingFormat::Packed => PACKED_HEADER + PACKED_ENTRY * n,
    };
    bytes.next_multiple_of(REGION_ALIGN)
}

/// `VhostUserInflight`: where the record lies in a file, and for which queues it is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct InflightSpec {
    /// Bytes.
    pub mmap_size: u64,
    /// Where it begins in the file.
    pub mmap_offset: u64,
    /// Number of queues.
    pub num_queues: u16,
    /// Descriptors of the largest of them.
    pub queue_size: u16,
}

impl InflightSpec {
    /// The size of a record that is made for these queues.
    #[must_use]
    pub fn sized(self, format: RingFormat) -> InflightSpec {
        InflightSpec { mmap_size: self.regions_bytes(format) + memento::BYTES, mmap_offset: 0, ..self }
    }

    /// What a record must have at least, for these queues.
    pub fn regions_bytes(self, format: RingFormat) -> u64 {
        region_bytes(format, self.queue_size) * u64::from(self.num_queues)
    }
}

/// The record of a device's queues, mapped. A front end that truncates it is survived as with guest memory.
#[derive(Clone, Debug)]
pub struct InflightMemory {
    map: Arc<MemoryMap>,
    spec: InflightSpec,
}

impl InflightMemory {
    /// Maps the record that `spec` describes out of the file behind `fd`.
    pub fn map(spec: InflightSpec, fd: OwnedFd) -> Result<InflightMemory, MemoryError> {
        let at =
            RegionSpec { guest_addr: 0, size: spec.mmap_size, user_addr: 0, mmap_offset: spec.mmap_offset };
        let map = MemoryMap::new(vec![Arc::new(Region::map(at, fd)?)])?;
        Ok(InflightMemory { map: Arc::new(map), spec })
    }

    /// What it was mapped from.
    pub fn source(&self) -> (InflightSpec, Option<&File>) {
        (self.spec, self.map.regions().first().and_then(|region| region.file()))
    }

    /// Forgets what was in flight in any queue: the device has been reset, and it is nobody's any more.
    pub fn forget(&self, format: RingFormat) -> Result<(), MemoryError> {
        for index in 0..self.spec.num_queues {
            self.queue(index, format)?.iter().for_each(QueueRegion::forget);
        }
        Ok(())
    }

    /// Where a device with rings of this format leaves its memento; `None`: other back ends make no room for one.
    pub fn memento(&self, format: RingFormat) -> Option<Memento> {
        Memento::at(&self.map, self.spec.regions_bytes(format), self.spec.mmap_size)
    }

    /// The region of queue `index`; `None` when the record has none, and the queue goes untracked.
    pub fn queue(&self, index: u16, format: RingFormat) -> Result<Option<QueueRegion>, MemoryError> {
        if index >= self.spec.num_queues {
            return Ok(None);
        }
        let bytes = region_bytes(format, self.spec.queue_size);
        let at = self.map.ring_address(bytes * u64::from(index), bytes, false)?;
        if !at.host.addr().get().is_multiple_of(8) {
            return Err(MemoryError::Map { guest_addr: 0, reason: "its offset is no multiple of 8".into() });
        }
        Ok(Some(QueueRegion {
            at,
            map: Arc::clone(&self.map),
            desc_num: self.spec.queue_size,
            base_is_known: false,
        }))
    }
}

/// The region of one queue, not looked at yet.
#[derive(Debug)]
pub struct QueueRegion {
    at: RingAddress,
    map: Arc<MemoryMap>,
    /// Entries.
    desc_num: u16,
    /// The front end has been told where the queue has stopped.
    base_is_known: bool,
}

impl QueueRegion {
    /// Makes it one that nobody has used.
    fn forget(&self) {
        // SAFETY: the version is at 8 in the region of either format, which is aligned to 8 and kept mapped; access is
        // atomic.
        let version: &AtomicU16 = unsafe { self.at.host.add(8).cast().as_ref() };
        version.store(0, Ordering::Release);
    }

    /// The front end knows where the ring stands: it has been told so in this session. Otherwise the region knows better.
    #[must_use]
    pub fn with_known_base(self, base_is_known: bool) -> QueueRegion {
        QueueRegion { base_is_known, ..self }
    }
}

/// What a ring has of chains in flight.
#[derive(Debug)]
pub(super) struct Kept<R> {
    /// The record, if the front end keeps one.
    pub(super) record: Option<R>,
    /// Chains that an earlier back end had taken, to be taken again, the first one last: heads of a split ring, entries of
    /// the record of a packed one.
    pub(super) again: Vec<u16>,
}

impl<R> Default for Kept<R> {
    fn default() -> Kept<R> {
        Kept { record: None, again: Vec::new() }
    }
}

impl<R: AsRef<QueueRegion>> Kept<R> {
    /// How many chains are to be taken again.
    #[inline]
    pub(super) fn resubmits(&self) -> u16 {
        self.again.len() as u16
    }

    /// Whether the front end has taken the memory of the record away.
    pub(super) fn has_faulted(&self) -> bool {
        self.record.as_ref().is_some_and(|record| record.as_ref().map.has_faulted())
    }
}

impl AsRef<QueueRegion> for SplitInflight {
    fn as_ref(&self) -> &QueueRegion {
        &self.region
    }
}

/// A split queue's region, `QueueRegionSplit`:
///
/// ```text
///   0 features u64 | 8 version u16 | 10 desc_num u16 | 12 last_batch_head u16 | 14 used_idx u16
///   16 + 16 i:  0 inflight u8 | 6 next u16 | 8 counter u64
/// ```
#[derive(Debug)]
pub(super) struct SplitInflight {
    base: NonNull<u8>,
    size: u16,
    /// The global counter: what the next chain taken gets.
    counter: u64,
    last_batch_head: u16,
    /// Heads completed since used_idx was raised.
    batch: Vec<u16>,
    region: QueueRegion,
}

// SAFETY: an address in a mapping that `region` keeps; access is atomic, and allows for the front end writing meanwhile.
unsafe impl Send for SplitInflight {}

impl SplitInflight {
    /// Takes the region up for a ring of `size` descriptors whose used index is `used_idx`. Tells the heads to be served
    /// again, those taken first last; `None` if the region is new and says nothing about the ring.
    pub(super) fn recover(
        region: QueueRegion,
        size: u16,
        used_idx: u16,
    ) -> Result<(SplitInflight, Option<Vec<u16>>), RingError> {
        let bad = |what| Err(RingError::BadInflight(what));
        if size > region.desc_num {
            return bad("it has fewer entries than the ring has descriptors");
        }
        let base = region.at.host;
        let batch = Vec::with_capacity(size.into());
        let mut this = SplitInflight { base, size, counter: 0, last_batch_head: 0, batch, region };
        let left = match this.half(8).load(Ordering::Relaxed) {
            0 => None,
            VERSION => Some(this.left(used_idx)?),
            _ => return bad("its version is unknown"),
        };
        pass("recover-begins");
        // Not in use before all of it is right.
        this.half(10).store(this.region.desc_num, Ordering::Relaxed);
        this.half(14).store(used_idx, Ordering::Release);
        this.half(8).store(VERSION, Ordering::Release);
        Ok((this, left))
    }

    /// What the last back end has left (heads, latest first): the batch whose end it did not write down is finished, the rest is to be served
    /// again in the order it was taken.
    fn left(&mut self, used_idx: u16) -> Result<Vec<u16>, RingError> {
        let bad = |what| Err(RingError::BadInflight(what));
        if self.word(0).load(Ordering::Relaxed) != 0 {
            return bad("it uses features that are unknown");
        }
        if self.half(10).load(Ordering::Relaxed) != self.region.desc_num {
            return bad("its number of entries is not the one announced");
        }
        let batch = used_idx.wrapping_sub(self.half(14).load(Ordering::Relaxed));
        let mut taken: Vec<(u64, u16)> = (0..self.size)
            .filter(|&i| self.inflight(i).load(Ordering::Relaxed) != 0)
            .map(|i| (self.counter_of(i).load(Ordering::Relaxed), i))
            .collect();
        if batch > self.size && !taken.is_empty() {
            return bad("its used index is not near that of the ring");
        }
        let mut head = self.half(12).load(Ordering::Relaxed);
        // With nothing in flight there is nothing to clear, and the list may be that of another ring.
        let finished = if taken.is_empty() { 0 } else { batch };
        for _ in 0..finished {
            if head >= self.size {
                return bad("its list of used descriptors leads out of the table");
            }
            taken.retain(|&(_, i)| i != head);
            self.inflight(head).store(0, Ordering::Release);
            head = self.next(head).load(Ordering::Relaxed);
        }
        // Latest first, counting on from there; a counter that comes round does so far apart.
        let newest = taken
            .iter()
            .map(|&(counter, _)| counter)
            .reduce(|a, b| if b.wrapping_sub(a) < u64::MAX / 2 { b } else { a });
        self.counter = newest.map_or(0, |n| n.wrapping_add(1));
        taken.sort_by_key(|&(counter, _)| self.counter.wrapping_sub(counter));
        Ok(taken.into_iter().map(|(_, head)| head).collect())
    }

    /// A chain has been taken from the ring.
    #[inline]
    pub(super) fn taken(&mut self, head: u16) {
        pass("take-begins");
        self.counter_of(head).store(self.counter, Ordering::Relaxed);
        pass("take-counter");
        self.counter = self.counter.wrapping_add(1);
        self.inflight(head).store(1, Ordering::Release);
        pass("take-inflight");
    }

    /// A chain has gone back to the available ring.
    #[inline]
    pub(super) fn untaken(&mut self, head: u16) {
        self.inflight(head).store(0, Ordering::Release);
        pass("untake-inflight");
    }

    /// A chain has been put into the used ring, where the driver does not see it yet.
    #[inline]
    pub(super) fn completed(&mut self, head: u16) {
        pass("complete-used-ring");
        self.next(head).store(self.last_batch_head, Ordering::Relaxed);
        pass("complete-next");
        self.last_batch_head = head;
        self.half(12).store(head, Ordering::Release);
        pass("complete-last-batch-head");
        self.batch.push(head);
    }

    /// The used index has been raised: the driver sees all that was completed.
    #[inline]
    pub(super) fn published(&mut self, used_idx: u16) {
        pass("publish-used-idx");
        for i in 0..self.batch.len() {
            self.inflight(self.batch[i]).store(0, Ordering::Release);
            pass("publish-clear");
        }
        self.batch.clear();
        pass("publish-cleared");
        self.half(14).store(used_idx, Ordering::Release);
        pass("publish-noted");
    }

    #[inline]
    fn half(&self, offset: usize) -> &AtomicU16 {
        debug_assert!(offset < SPLIT_HEADER as usize);
        // SAFETY: an even offset inside the header of a region that is aligned to 8 and kept mapped; access is atomic.
        unsafe { self.base.add(offset).cast().as_ref() }
    }

    #[inline]
    fn word(&self, offset: usize) -> &AtomicU64 {
        debug_assert!(offset < SPLIT_HEADER as usize);
        // SAFETY: as for `half`, with an offset that is a multiple of 8.
        unsafe { self.base.add(offset).cast().as_ref() }
    }

    #[inline]
    fn entry(&self, head: u16) -> NonNull<u8> {
        assert!(head < self.size);
        // SAFETY: the region has an entry for each descriptor of the ring (see `recover`).
        unsafe { self.base.add((SPLIT_HEADER + SPLIT_ENTRY * u64::from(head)) as usize) }
    }

    #[inline]
    fn inflight(&self, head: u16) -> &AtomicU8 {
        // SAFETY: the first byte of an entry; access is atomic.
        unsafe { self.entry(head).cast().as_ref() }
    }

    #[inline]
    fn next(&self, head: u16) -> &AtomicU16 {
        // SAFETY: at 6 in an entry that is aligned to 8; access is atomic.
        unsafe { self.entry(head).add(6).cast().as_ref() }
    }

    #[inline]
    fn counter_of(&self, head: u16) -> &AtomicU64 {
        // SAFETY: at 8 in an entry that is aligned to 8; access is atomic.
        unsafe { self.entry(head).add(8).cast().as_ref() }
    }
}
