//! Checksums in what is written, and what was written where.
//!
//! A written block begins with magic (8 bytes), offset (8), seed (8), length (4) and the crc32c (4) of all other bytes
//! of the block; what follows is random by the seed. Numbers are little-endian.

use std::collections::BTreeMap;
use std::fmt;

use crate::requests::{Op, Random, Request};

const MAGIC: &[u8; 8] = b"vbench\x01\n";
const CRC_AT: usize = 28;
const HEADER: usize = 32;

/// What was written to a place last.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Written {
    /// Bytes.
    pub len: u32,
    /// Seed of the block.
    pub seed: u64,
    /// Its checksum.
    pub crc: u32,
}

/// A block that is not what was written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mismatch {
    /// First byte of the block.
    pub offset: u64,
    expected: u32,
    found: u32,
    why: String,
}

impl fmt::Display for Mismatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Mismatch { offset, expected, found, why } = self;
        write!(
            f,
            "wrong data at offset {offset}: crc32c expected {expected:#010x}, found {found:#010x} ({why})"
        )
    }
}

fn crc(block: &[u8]) -> u32 {
    crc32c::crc32c_append(crc32c::crc32c(&block[..CRC_AT]), &block[HEADER..])
}

fn u64_at(block: &[u8], at: usize) -> u64 {
    block.get(at..at + 8).and_then(|b| b.try_into().ok()).map_or(0, u64::from_le_bytes)
}

/// Makes the block for `offset` (at least a sector) and says what to expect of it.
pub fn fill(block: &mut [u8], offset: u64, seed: u64) -> Written {
    let len = block.len() as u32;
    block[..8].copy_from_slice(MAGIC);
    block[8..16].copy_from_slice(&offset.to_le_bytes());
    block[16..24].copy_from_slice(&seed.to_le_bytes());
    block[24..CRC_AT].copy_from_slice(&len.to_le_bytes());
    let mut random = Random::new(seed);
    for word in block[HEADER..].chunks_exact_mut(8) {
        word.copy_from_slice(&random.next().to_le_bytes());
    }
    let crc = crc(block);
    block[CRC_AT..HEADER].copy_from_slice(&crc.to_le_bytes());
    Written { len, seed, crc }
}

/// What lies where on the disk, as far as this run has written it.
#[derive(Clone, Debug, Default)]
pub struct Ledger(BTreeMap<u64, Written>);

impl Ledger {
    /// Forgets the blocks that a write overlaps, before it is sent: until it is finished, either may be found.
    pub fn forget(&mut self, request: &Request) {
        self.forget_range(request.offset, request.offset + u64::from(request.len));
    }

    /// Forgets all blocks with a byte between two offsets.
    pub fn forget_range(&mut self, start: u64, end: u64) {
        // Blocks do not overlap each other, so looking back can stop at the first that ends before.
        while let Some((&at, block)) = self.0.range(..end).next_back() {
            if at + u64::from(block.len) <= start {
                break;
            }
            self.0.remove(&at);
        }
    }

    /// Notes a finished write.
    pub fn record(&mut self, offset: u64, written: Written) {
        self.0.insert(offset, written);
    }

    /// The blocks that lie between two offsets.
    pub fn within(&self, start: u64, end: u64) -> Ledger {
        let inside = self.0.range(start..end).filter(|(at, w)| *at + u64::from(w.len) <= end);
        Ledger(inside.map(|(at, w)| (*at, *w)).collect())
    }

    /// Takes over what another job has written.
    pub fn merge(&mut self, other: Ledger) {
        for (offset, written) in other.0 {
            self.forget(&Request { offset, len: written.len, op: Op::Write });
            self.0.insert(offset, written);
        }
    }

    /// Everything that can be read back, in order of place.
    pub fn reads(&self) -> Vec<Request> {
        self.0.iter().map(|(&offset, w)| Request { offset, len: w.len, op: Op::Read }).collect()
    }

    /// Checks all blocks that lie within what was read.
    pub fn check(&self, offset: u64, data: &[u8]) -> Result<(), Mismatch> {
        let end = offset + data.len() as u64;
        for (&at, written) in self.0.range(offset..end) {
            if at + u64::from(written.len) <= end {
                let from = (at - offset) as usize;
                written.check(at, &data[from..from + written.len as usize])?;
            }
        }
        Ok(())
    }
}

impl Written {
    fn check(&self, offset: u64, block: &[u8]) -> Result<(), Mismatch> {
        let actual = crc(block);
        let stored = block[CRC_AT..HEADER].try_into().map_or(0, u32::from_le_bytes);
        if (actual, stored) == (self.crc, self.crc) {
            return Ok(());
        }
        let (there, seed) = (u64_at(block, 8), u64_at(block, 16));
        let (found, why) = if &block[..8] != MAGIC {
            (actual, "there is no header".into())
        } else if actual == self.crc {
            (stored, "the checksum itself was changed".into())
        } else if actual != stored {
            (actual, format!("the header says {stored:#010x}"))
        } else if there != offset {
            (actual, format!("it is the block of offset {there}"))
        } else {
            (actual, format!("it is another write: seed {seed:#x}, not {:#x}", self.seed))
        };
        Err(Mismatch { offset, expected: self.crc, found, why })
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn block(offset: u64, seed: u64) -> (Vec<u8>, Written) {
        let mut block = vec![0; 4096];
        let written = fill(&mut block, offset, seed);
        (block, written)
    }

    #[test]
    fn every_byte_counts() {
        let (mut block, written) = block(8192, 7);
        let mut ledger = Ledger::default();
        ledger.record(8192, written);
        assert_eq!(ledger.check(8192, &block), Ok(()));
        for at in [0, 8, 16, 24, 28, 31, 32, 100, 4095] {
            block[at] ^= 1;
            let wrong = ledger.check(8192, &block).unwrap_err();
            assert_eq!((wrong.offset, wrong.expected), (8192, written.crc), "byte {at}");
            assert_ne!(wrong.found, wrong.expected, "byte {at}");
            block[at] ^= 1;
        }
        // crc32c of "123456789" (RFC 3720 and everywhere).
        assert_eq!(crc32c::crc32c(b"123456789"), 0xe306_9283);
    }

    #[test]
    fn whole_blocks_in_the_wrong_place_are_told_apart() {
        let mut ledger = Ledger::default();
        ledger.record(4096, block(4096, 2).1);
        let said = |data: &[u8]| ledger.check(4096, data).unwrap_err().to_string();
        assert!(said(&block(8192, 2).0).contains("it is the block of offset 8192"));
        assert!(said(&block(4096, 1).0).contains("it is another write: seed 0x1, not 0x2"));
        assert!(said(&[0; 4096]).starts_with("wrong data at offset 4096: crc32c expected 0x"));
        assert!(said(&[0; 4096]).contains("there is no header"));
    }

    #[test]
    fn only_what_was_written_last_is_expected() {
        let mut ledger = Ledger::default();
        let (first, second) = (block(0, 1).1, block(4096, 2).1);
        ledger.record(0, first);
        ledger.record(4096, second);
        ledger.record(65536, block(65536, 3).1);
        // One write across the end of the first and the start of the second.
        ledger.forget(&Request { offset: 2048, len: 4096, op: Op::Write });
        assert_eq!(ledger.reads(), [Request { offset: 65536, len: 4096, op: Op::Read }]);
        // A read that holds a part of a block says nothing about it.
        assert_eq!(ledger.check(65536, &[0; 512]), Ok(()));
        assert!(ledger.check(61440, &[0; 8192]).is_err());
    }
}
