//! Making requests: which one is next, whether it may go, and how it is laid into guest memory and the ring.

use nix::errno::Errno;
use poll_engine::ring::driver::Buffer;

use super::{Job, Slot, Source};
use crate::requests::{Op, Request};
use crate::verify;

impl Job {
    /// The next request, and when its latency begins, if one is due.
    #[inline(always)]
    fn next(&mut self, now: u64) -> Option<(Request, u64)> {
        if !matches!(self.source, Source::Work) || self.held.is_some() {
            return self.next_to_verify(now);
        }
        if self.requests.flush_is_due() {
            // Of no rate: it comes with the writes before it.
            return Some((self.requests.flush(), now));
        }
        if self.bytes_left == 0 || self.ios_left == 0 {
            return None;
        }
        let since = self.pacer.take(now)?;
        let request = self.requests.next();
        self.bytes_left = self.bytes_left.saturating_sub(u64::from(request.len));
        self.ios_left -= 1;
        Some((request, since))
    }

    /// What only a job that verifies has: requests that were held back, and reading back.
    #[cold]
    fn next_to_verify(&mut self, now: u64) -> Option<(Request, u64)> {
        if let Some((request, since)) = self.held.take() {
            return Some((request, if self.open { since } else { now }));
        }
        match &mut self.source {
            Source::ReadBack(rest) => Some((rest.next()?, now)),
            Source::Work => None,
        }
    }

    /// Adds the next request to the ring, if it is due and there is room.
    #[inline(always)]
    pub(super) fn send_next(&mut self, now: u64) -> bool {
        let Some(&index) = self.free.last() else { return false };
        let Some((request, since)) = self.next(now) else { return false };
        if let Some(ledger) = &mut self.result.ledger {
            let conflicts = |s: &Slot| {
                let writes = [s.request.op, request.op].contains(&Op::Write);
                s.busy && writes && s.request.overlaps(&request)
            };
            if self.slots.iter().any(conflicts) {
                // Which of them comes first would be the back end's choice.
                self.held = Some((request, since));
                return false;
            }
            if request.op == Op::Write {
                ledger.forget(&request);
            }
        }
        let Some(head) = self.add(index, &request) else {
            self.fail(Errno::ENOSPC, "the ring is full".into());
            return false;
        };
        self.free.pop();
        self.by_head[usize::from(head)] = index;
        let slot = &mut self.slots[usize::from(index)];
        (slot.busy, slot.request, slot.since) = (true, request, since);
        if self.open && self.measuring.is_some() {
            self.result.side(request.op).waits.add((now - since) as f64);
        }
        true
    }

    #[inline(always)]
    fn add(&mut self, index: u16, request: &Request) -> Option<u16> {
        let slot = &mut self.slots[usize::from(index)];
        // In halves, each stored whole before it is copied: a load of what lies in several stores waits for all of
        // them, and before them for every line that the back end's CPU has.
        let header = self.map.slice(slot.header, 16)?;
        header.part(0, 8).write(&u64::from(request.op as u32).to_le_bytes());
        header.part(8, 8).write(&(request.offset / 512).to_le_bytes());
        self.map.slice(slot.status, 1)?.write_byte(0xff);
        if request.op == Op::Write && self.result.ledger.is_some() {
            let block = &mut self.scratch[..request.len as usize];
            slot.written = verify::fill(block, request.offset, self.seeds.next());
            self.map.slice(slot.data, request.len)?.write(block);
        }
        let header = Buffer { addr: slot.header, len: 16, writable: false };
        let data = Buffer { addr: slot.data, len: request.len, writable: request.op == Op::Read };
        let status = Buffer { addr: slot.status, len: 1, writable: true };
        let buffers = match request.op {
            Op::Flush => &[header, status][..],
            Op::Read | Op::Write => &[header, data, status],
        };
        if self.spec.indirect {
            self.ring.add_indirect(&self.map, slot.table, buffers)
        } else {
            self.ring.add(buffers)
        }
    }
}
