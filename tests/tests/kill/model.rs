//! What the blocks of a disk may hold. Each block that is written says which it is and which write of it this is, under
//! a checksum; a block has one write at a time.

use std::ops::Range;

use anyhow::{Context, Result, bail, ensure};

/// Bytes of a block: the least that may not be torn.
pub const BLOCK: usize = 512;

/// What block `block` holds after write `seq` of it; nothing has been written by write 0.
fn content(block: u64, seq: u64) -> [u8; BLOCK] {
    let mut bytes = [0; BLOCK];
    if seq == 0 {
        return bytes;
    }
    bytes[..8].copy_from_slice(&block.to_le_bytes());
    bytes[8..16].copy_from_slice(&seq.to_le_bytes());
    // Every byte of a block depends on the write, so that a mixture of two is neither.
    for (i, byte) in bytes[16..BLOCK - 4].iter_mut().enumerate() {
        *byte =
            (seq.wrapping_mul(0x9e37_79b9).wrapping_add(block.wrapping_mul(31)) >> (i % 24)) as u8 ^ i as u8;
    }
    let sum = crc32c::crc32c(&bytes[..BLOCK - 4]);
    bytes[BLOCK - 4..].copy_from_slice(&sum.to_le_bytes());
    bytes
}

/// Which write of block `block` these bytes are.
fn write_of(block: u64, bytes: &[u8]) -> Result<u64> {
    if bytes.iter().all(|&b| b == 0) {
        return Ok(0);
    }
    let long = |at: usize| u64::from_le_bytes(std::array::from_fn(|i| bytes[at + i]));
    let (says, seq) = (long(0), long(8));
    ensure!(bytes == content(block, seq), "block {block} is torn (it says: block {says}, write {seq})");
    Ok(seq)
}

#[derive(Clone, Copy, Debug, Default)]
struct State {
    /// The last write that the driver has seen complete.
    done: u64,
    /// The write in flight.
    writing: Option<u64>,
}

/// A disk as the driver knows it.
#[derive(Debug)]
pub struct Model {
    blocks: Vec<State>,
    /// What is read while it is written may be torn: so it is in the page cache, which copies without a lock.
    pub may_tear: bool,
    pub writes: u64,
    pub reads: u64,
}

impl Model {
    pub fn new(blocks: usize) -> Model {
        Model { blocks: vec![State::default(); blocks], may_tear: false, writes: 0, reads: 0 }
    }

    /// Begins a write of these blocks: their bytes, or `None` if one of them is being written.
    pub fn begin_write(&mut self, range: Range<usize>) -> Option<Vec<u8>> {
        if self.blocks[range.clone()].iter().any(|b| b.writing.is_some()) {
            return None;
        }
        Some(
            range
                .flat_map(|i| {
                    let seq = self.blocks[i].done + 1;
                    self.blocks[i].writing = Some(seq);
                    content(i as u64, seq)
                })
                .collect(),
        )
    }

    pub fn end_write(&mut self, range: Range<usize>) {
        self.writes += 1;
        for block in &mut self.blocks[range] {
            block.done = block.writing.take().expect("completed twice");
        }
    }

    /// Begins a read of these blocks: the oldest writes it may see.
    pub fn begin_read(&self, range: Range<usize>) -> Vec<u64> {
        self.blocks[range].iter().map(|b| b.done).collect()
    }

    /// Checks what a read has brought: each block whole, none older than when it was begun, none never written.
    pub fn end_read(&mut self, range: Range<usize>, oldest: &[u64], bytes: &[u8]) -> Result<()> {
        self.reads += 1;
        for ((i, oldest), bytes) in range.zip(oldest).zip(bytes.chunks(BLOCK)) {
            let block = self.blocks[i];
            let written_meanwhile = block.writing.is_some() || block.done != *oldest;
            let seq = match write_of(i as u64, bytes) {
                Err(_) if self.may_tear && written_meanwhile => continue,
                seq => seq?,
            };
            let newest = block.writing.unwrap_or(block.done);
            if seq < *oldest {
                bail!(
                    "block {i} holds write {seq}, and write {oldest} had been completed: it was lost or undone"
                );
            }
            ensure!(seq <= newest, "block {i} holds write {seq}, and there were only {newest}");
        }
        Ok(())
    }
}

/// Whether the model finds what it is there for.
pub fn self_test() -> Result<()> {
    let mut model = Model::new(4);
    let begin = |model: &mut Model| model.begin_write(1..3).context("nothing is being written");
    let first = begin(&mut model)?;
    ensure!(model.begin_write(2..4).is_none(), "one write at a time");
    let zeros = vec![0; 2 * BLOCK];
    let oldest = model.begin_read(1..3);
    model.end_read(1..3, &oldest, &zeros)?;
    model.end_read(1..3, &oldest, &first)?;
    model.end_write(1..3);
    model.end_read(1..3, &oldest, &zeros)?;
    let oldest = model.begin_read(1..3);
    let finds = |model: &mut Model, range: Range<usize>, oldest: &[u64], bytes: &[u8], what: &str| {
        let error = model.end_read(range, oldest, bytes).err().map(|e| e.to_string()).unwrap_or_default();
        ensure!(error.contains(what), "{what}: not found ({error})");
        Ok(())
    };
    finds(&mut model, 1..3, &oldest, &zeros, "lost or undone")?;
    let second = begin(&mut model)?;
    let mut torn = second.clone();
    torn[100..200].copy_from_slice(&first[100..200]);
    finds(&mut model, 1..3, &oldest, &torn, "torn")?;
    // While it is being written, and no longer.
    model.may_tear = true;
    model.end_read(1..3, &oldest, &torn)?;
    model.end_write(1..3);
    let newest = model.begin_read(1..3);
    finds(&mut model, 1..3, &newest, &torn, "torn")?;
    ensure!(model.begin_write(1..3).is_some(), "nothing is being written");
    model.may_tear = false;
    model.end_read(1..3, &oldest, &second)?;
    finds(&mut model, 2..4, &[0, 0], &second, "torn")?;
    let from_nowhere = [content(1, 9), content(2, 9)].concat();
    finds(&mut model, 1..3, &oldest, &from_nowhere, "there were only")
}
