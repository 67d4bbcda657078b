//! Taking answers: collected in batches, counted, and compared where the job verifies.

use std::mem;

use nix::errno::Errno;

use super::{Job, NONE};
use crate::measure::SAMPLE;
use crate::requests::{Op, Request};

/// Finished requests looked at at once.
const BATCH: usize = 32;

impl Job {
    /// Collects finished requests; false if one of them was not in flight.
    #[inline(always)]
    pub(super) fn collect(&mut self, finished: usize) -> bool {
        let now = self.now();
        let mut left = finished;
        while left > 0 {
            let mut batch = [NONE; BATCH];
            let batch = &mut batch[..left.min(BATCH)];
            left -= batch.len();
            for index in batch.iter_mut() {
                let Some((head, _)) = self.ring.collect() else { return false };
                *index =
                    self.by_head.get_mut(usize::from(head)).map_or(NONE, |slot| mem::replace(slot, NONE));
                let Some(slot) = self.slots.get(usize::from(*index)) else { return false };
                // The back end's CPU has these lines: their misses overlap.
                if let Some(status) = self.map.slice(slot.status, 1) {
                    status.prefetch_write();
                }
            }
            for &index in &*batch {
                self.answered(index, now);
            }
        }
        if self.measuring.is_some() {
            self.result.collected.add(finished, 1);
            if now - self.sampled >= SAMPLE.as_nanos() as u64 {
                let seconds = (now - self.sampled) as f64 / 1e9;
                self.result.read.sample(seconds);
                self.result.write.sample(seconds);
                self.sampled = now;
            }
        }
        true
    }

    /// The request in a slot is finished.
    #[inline(always)]
    fn answered(&mut self, index: u16, now: u64) {
        let slot = &mut self.slots[usize::from(index)];
        slot.busy = false;
        let (request, since) = (slot.request, slot.since);
        // The memory around it is our own: read at once, not byte by byte.
        let around = self.map.slice(slot.status, 16).and_then(|at| at.read_pair_once());
        let status = around.map_or(0xff, |[low, _]| low as u8);
        self.free.push(index);
        self.finished += 1;
        if status != 0 {
            self.refused(&request, status);
            return;
        }
        if self.measuring.is_some() {
            self.result.side(request.op).count(request.len, now.saturating_sub(since));
        }
        if self.result.ledger.is_some() {
            self.verify(index);
        }
    }

    fn refused(&mut self, request: &Request, status: u8) {
        let meaning = match status {
            1 => "VIRTIO_BLK_S_IOERR",
            2 => "VIRTIO_BLK_S_UNSUPP",
            0xff => "none was written",
            _ => "unknown",
        };
        let what = match (request.op, request.op.name()) {
            (Op::Flush, name) => format!("a {name}"),
            (_, name) => format!("a {name} of {} bytes at offset {}", request.len, request.offset),
        };
        let message = format!("{what} failed with status {status} ({meaning})");
        self.fail(Errno::EIO, message);
    }

    fn verify(&mut self, index: u16) {
        let slot = &self.slots[usize::from(index)];
        let Some(ledger) = &mut self.result.ledger else { return };
        match slot.request.op {
            Op::Read => {}
            Op::Write => return ledger.record(slot.request.offset, slot.written),
            Op::Flush => return,
        }
        let block = &mut self.scratch[..slot.request.len as usize];
        if let Some(at) = self.map.slice(slot.data, slot.request.len) {
            at.read(block);
        }
        if let Err(wrong) = ledger.check(slot.request.offset, block) {
            self.fail(Errno::EILSEQ, wrong.to_string());
        }
    }
}
