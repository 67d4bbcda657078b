//! Storage in memory: one copy between guest and disk, at once. For measuring, and for scratch disks.

use std::sync::Arc;

use poll_engine::engine::queue::{Queue, Request};
use poll_engine::engine::reactor::Io;
use poll_engine::memory::{GuestSlice, Ram};
use poll_engine::ring::chain::{ChainView, Slices};

use super::{Backend, Begun, Outcome};
use crate::disk::Disk;
use crate::request::{HEADER, Operation, Range, ranges};

/// The RAM back end.
#[derive(Debug)]
pub struct RamBackend {
    ram: Arc<Ram>,
    disk: Arc<Disk>,
    ranges: Vec<Range>,
}

impl RamBackend {
    /// On memory that all queues share.
    pub fn new(ram: Arc<Ram>, disk: Arc<Disk>) -> RamBackend {
        RamBackend { ram, disk, ranges: Vec::new() }
    }

    /// Pairs guest slices with the pieces of the disk from `offset` on.
    fn each(&self, mut offset: u64, slices: Slices<'_>, act: impl Fn(GuestSlice<'_>, GuestSlice<'_>)) {
        for guest in slices {
            // The parser has checked the range against the disk's size, which is the memory's.
            if let Some(disk) = self.ram.map().slice(offset, guest.len() as u32) {
                act(guest, disk);
            }
            offset += guest.len() as u64;
        }
    }

    fn zero(&mut self, chain: &ChainView<'_>, operation: Operation) -> Outcome {
        if let Err(e) = ranges(chain, &self.disk, operation, &mut self.ranges) {
            return Outcome::Failed(e.into());
        }
        for range in &self.ranges {
            if let Some(slice) = self.ram.map().slice(range.offset, range.len as u32) {
                slice.fill(0);
            }
        }
        Outcome::Done
    }
}

impl Backend for RamBackend {
    #[inline]
    fn begin(
        &mut self,
        request: Request,
        operation: Operation,
        queue: &mut Queue,
        _io: &mut Io<'_>,
    ) -> Begun {
        let chain = queue.chain();
        let outcome = match operation {
            Operation::Read { offset, len } => {
                self.each(offset, chain.writable(0, len), |guest, disk| {
                    disk.copy_to(&guest);
                });
                Outcome::Done
            }
            Operation::Write { offset, len } => {
                self.each(offset, chain.readable(HEADER, len), |guest, disk| {
                    guest.copy_to(&disk);
                });
                Outcome::Done
            }
            Operation::Discard { .. } | Operation::WriteZeroes { .. } => self.zero(&chain, operation),
            Operation::Flush | Operation::GetId { .. } => Outcome::Done,
        };
        Begun::Over(request, outcome)
    }
}
