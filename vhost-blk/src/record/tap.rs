//! The reactor's side of a capture: notes what a queue has answered. No allocation, lock or system call.

use std::sync::Arc;

use poll_engine::clock::Clock;
use poll_engine::ring::chain::ChainView;

use super::format::{Kind, MAX_56};
use super::ring::{NoteRing, Producer};
use crate::disk::Disk;
use crate::request::{
    HEADER, Operation, Range, SECTOR, T_DISCARD, T_IN, T_OUT, T_WRITE_ZEROES, kind_and_sector, ranges,
};

/// Room for the ranges of one request.
const MAX_RANGES: usize = 32;

/// What a queue writes its notes to.
#[derive(Debug)]
pub struct Tap {
    ring: Arc<NoteRing>,
    producer: Producer,
    clock: Clock,
    ranges: Vec<Range>,
}

/// Kind, status and sector as the second word of a record.
#[inline]
fn pack(kind: Kind, status: u8, sector: u64) -> u64 {
    sector.min(MAX_56) | u64::from(kind as u8 | status << 4) << 56
}

impl Tap {
    pub(super) fn new(ring: Arc<NoteRing>) -> Tap {
        let producer = Producer::new(&ring);
        Tap { ring, producer, clock: Clock::new(), ranges: Vec::with_capacity(MAX_RANGES) }
    }

    /// Notes a request that was taken at `since` and is answered with `status`; its chain must still be held.
    #[inline]
    pub fn note(&mut self, disk: &Disk, chain: &ChainView<'_>, since: u64, operation: Operation, status: u8) {
        let (kind, sector, len) = match operation {
            Operation::Read { offset, len } => (Kind::Read, offset / SECTOR, len),
            Operation::Write { offset, len } => (Kind::Write, offset / SECTOR, len),
            Operation::Flush => (Kind::Flush, 0, 0),
            Operation::GetId { len } => (Kind::GetId, 0, len),
            Operation::Discard { .. } | Operation::WriteZeroes { .. } => {
                return self.note_ranges(disk, chain, since, operation, status);
            }
        };
        if self.producer.reserve(&self.ring, 1) {
            self.producer.put(&self.ring, since, pack(kind, status, sector), len);
        }
    }

    /// Reads the ranges from the chain once more. A guest that has changed them since spoils its own capture only.
    fn note_ranges(
        &mut self,
        disk: &Disk,
        chain: &ChainView<'_>,
        since: u64,
        operation: Operation,
        status: u8,
    ) {
        // With a range that does not fit, what came before it is there.
        let _ = ranges(chain, disk, operation, &mut self.ranges);
        let first = self.ranges.first().copied().unwrap_or(Range { offset: 0, len: 0, unmap: false });
        let kind = match operation {
            Operation::Discard { .. } => Kind::Discard,
            _ if first.unmap => Kind::WriteZeroesUnmap,
            _ => Kind::WriteZeroes,
        };
        // All of a request or nothing.
        if !self.producer.reserve(&self.ring, self.ranges.len().max(1) as u64) {
            return;
        }
        self.producer.put(&self.ring, since, pack(kind, status, first.offset / SECTOR), first.len as u32);
        for range in self.ranges.iter().skip(1) {
            let what = pack(Kind::Range, status, range.offset / SECTOR);
            self.producer.put(&self.ring, since, what, range.len as u32);
        }
    }

    /// Notes a request that was refused without being carried out.
    #[cold]
    pub fn note_refused(&mut self, chain: &ChainView<'_>, since: u64, status: u8) {
        let data_in = chain.writable_len().saturating_sub(1);
        let data_out = chain.readable_len().saturating_sub(HEADER);
        let (kind, sector, len) = match kind_and_sector(chain) {
            Some((T_IN, sector)) => (Kind::Read, sector, data_in),
            Some((T_OUT, sector)) => (Kind::Write, sector, data_out),
            Some((T_DISCARD, _)) => (Kind::Discard, 0, 0),
            Some((T_WRITE_ZEROES, _)) => (Kind::WriteZeroes, 0, 0),
            Some((other, _)) => (Kind::Other, u64::from(other), data_in.max(data_out)),
            None => (Kind::Other, MAX_56, data_in.max(data_out)),
        };
        if self.producer.reserve(&self.ring, 1) {
            self.producer.put(&self.ring, since, pack(kind, status, sector), len);
        }
    }

    /// Passes on what was noted; it was over at `until`.
    #[inline]
    pub fn pass_on(&mut self, until: u64) {
        if self.producer.has_unshown() {
            self.producer.show(&self.ring, until);
        }
    }

    /// Passes on what was noted; it is over now.
    #[inline]
    pub fn pass_on_now(&mut self) {
        if self.producer.has_unshown() {
            self.producer.show(&self.ring, self.clock.raw());
        }
    }
}
