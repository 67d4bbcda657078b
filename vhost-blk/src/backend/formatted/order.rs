//! In which order the writes to a qcow2 image reach its storage, so that the image is sound at every moment in between: a
//! cluster is counted before it is pointed to, holds its data before it is pointed to, and is no longer pointed to before it
//! is uncounted. `imago` begins its writes in that order, but for two: entries of the top tables, which it writes at once.
//! They are held back here until what they point to is there and counted. A block of counts that has lower ones as well is
//! written with what they were, and as it is when nothing points any more to what it uncounts. And where a power cut may undo what comes first
//! and keep what comes second, the storage is flushed in between.

mod pointers;

use std::collections::{HashMap, HashSet};
use std::io;
use std::ops::Range;

use super::header::{Header, Metadata, OFFSET_MASK, entries};

/// What is done to the file.
pub trait Disk {
    /// Writes.
    fn write(&self, offset: u64, bytes: &[u8]) -> io::Result<()>;
    /// Reads.
    fn read(&self, range: Range<u64>) -> io::Result<Vec<u8>>;
    /// Makes all writes durable.
    fn sync(&self) -> io::Result<()>;
}

/// A kind of write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Data, or a table that nothing points to yet.
    Data,
    /// Reference counts.
    Counts,
    /// An L2 table.
    Mappings,
    /// Entries of the refcount table: held back.
    RefTable,
    /// Entries of the L1 table: held back.
    L1,
    /// The header.
    Header,
}

#[derive(Debug)]
struct HeldRefs {
    bytes: Vec<u8>,
    /// Refcount blocks that have to be written before: they count the new ones.
    after: Vec<u64>,
}

/// The order of the writes to one image.
#[derive(Debug)]
#[allow(clippy::struct_excessive_bools)] // each of its own meaning
pub struct Order {
    header: Header,
    metadata: Metadata,
    /// Offsets of refcount blocks.
    blocks: HashSet<u64>,
    /// Writes that a power cut may undo.
    data: bool,
    counts: bool,
    mappings: bool,
    /// Something may be uncounted, and used again, since all was durable.
    frees: bool,
    reftable: HashMap<u64, HeldRefs>,
    l1: HashMap<u64, Vec<u8>>,
    /// Refcount blocks as they are to be once all tables are written.
    lowered: HashMap<u64, Vec<u8>>,
}

fn holds(table: &Range<u64>, offset: u64) -> bool {
    table.contains(&offset)
}

impl Order {
    /// Of an image that is as its tables say.
    pub fn new(header: Header, metadata: Metadata) -> Order {
        Order {
            header,
            blocks: metadata.refblocks.iter().copied().filter(|&block| block != 0).collect(),
            metadata,
            data: false,
            counts: false,
            mappings: false,
            frees: false,
            reftable: HashMap::new(),
            l1: HashMap::new(),
            lowered: HashMap::new(),
        }
    }

    /// Whether the cluster at `offset` holds a table, or the header.
    pub fn is_metadata(&self, offset: u64) -> bool {
        self.metadata.all.contains(&(offset & !(self.header.cluster() - 1)))
    }

    /// What comes next may uncount clusters.
    pub fn may_free(&mut self) {
        self.frees = true;
    }

    fn kind(&self, offset: u64) -> Kind {
        match offset {
            _ if offset < self.header.cluster() => Kind::Header,
            _ if holds(&self.header.l1, offset) => Kind::L1,
            _ if holds(&self.header.reftable, offset) => Kind::RefTable,
            _ if self.blocks.contains(&offset) => Kind::Counts,
            _ if self.metadata.all.contains(&offset) => Kind::Mappings,
            _ => Kind::Data,
        }
    }

    fn is_dirty(&self) -> bool {
        self.data || self.counts || self.mappings
    }

    /// What was written is durable.
    pub fn synced(&mut self) {
        (self.data, self.counts, self.mappings, self.frees) = (false, false, false, false);
    }

    fn barrier(&mut self, disk: &impl Disk) -> io::Result<()> {
        if self.is_dirty() {
            disk.sync()?;
            // What may be uncounted may still be so after this.
            (self.data, self.counts, self.mappings) = (false, false, false);
        }
        Ok(())
    }

    /// Data are about to be written, or zeroed, other than by [`write`](Self::write).
    pub fn before_data(&mut self, disk: &impl Disk) -> io::Result<()> {
        // The cluster may have been another one's until a moment ago.
        if self.frees && self.mappings {
            self.barrier(disk)?;
        }
        self.data = true;
        Ok(())
    }

    /// Writes, or holds it back.
    pub fn write(&mut self, disk: &impl Disk, offset: u64, bytes: &[u8]) -> io::Result<()> {
        match self.kind(offset) {
            Kind::Data => self.before_data(disk)?,
            Kind::Counts => {
                // What is shared with a snapshot is counted less when a table is copied, too.
                if self.frees || self.header.snapshots > 0 || self.lowered.contains_key(&offset) {
                    let before = disk.read(offset..offset + bytes.len() as u64)?;
                    let highest = self.highest(&before, bytes);
                    disk.write(offset, &highest)?;
                    if highest == bytes {
                        self.lowered.remove(&offset);
                    } else {
                        self.lowered.insert(offset, bytes.to_vec());
                    }
                } else {
                    disk.write(offset, bytes)?;
                }
                self.counts = true;
                for held in self.reftable.values_mut() {
                    held.after.retain(|&block| block != offset);
                }
                return Ok(());
            }
            Kind::Mappings => {
                self.release_reftable(disk, false)?;
                if self.data || self.counts {
                    self.barrier(disk)?;
                }
                disk.write(offset, bytes)?;
                self.mappings = true;
                return Ok(());
            }
            Kind::RefTable => {
                self.hold_reftable(offset, bytes);
                return Ok(());
            }
            Kind::L1 => {
                for entry in entries(bytes) {
                    self.metadata.all.insert(entry & OFFSET_MASK);
                }
                self.l1.insert(offset, bytes.to_vec());
                return Ok(());
            }
            Kind::Header => return self.write_header(disk, offset, bytes),
        }
        disk.write(offset, bytes)
    }

    fn hold_reftable(&mut self, offset: u64, bytes: &[u8]) {
        let cluster = self.header.cluster();
        let first = ((offset - self.header.reftable.start) / 8) as usize;
        let mut after = Vec::new();
        for (i, entry) in entries(bytes).enumerate() {
            let block = entry & OFFSET_MASK;
            let number = first + i;
            if self.metadata.refblocks.len() <= number {
                self.metadata.refblocks.resize(number + 1, 0);
            }
            if block != 0 && self.metadata.refblocks[number] != block {
                self.metadata.refblocks[number] = block;
                self.metadata.all.insert(block);
                self.blocks.insert(block);
                let counted_by = (block / cluster / self.header.refblock_clusters) as usize;
                // One that counts itself was written with that.
                if let Some(&by) = self.metadata.refblocks.get(counted_by)
                    && counted_by != number
                {
                    after.push(by);
                }
            }
        }
        let held = self.reftable.entry(offset).or_insert(HeldRefs { bytes: Vec::new(), after: Vec::new() });
        held.bytes = bytes.to_vec();
        held.after.append(&mut after);
    }

    /// Writes the entries of the refcount table whose blocks are counted, or all of them.
    fn release_reftable(&mut self, disk: &impl Disk, all: bool) -> io::Result<()> {
        let ready = |held: &HeldRefs| all || held.after.is_empty();
        let offsets: Vec<_> = self.reftable.iter().filter(|(_, h)| ready(h)).map(|(&o, _)| o).collect();
        if offsets.is_empty() {
            return Ok(());
        }
        self.barrier(disk)?;
        for offset in offsets {
            if let Some(held) = self.reftable.get(&offset) {
                disk.write(offset, &held.bytes)?;
                self.counts = true;
                self.reftable.remove(&offset);
            }
        }
        Ok(())
    }

    /// All tables have been written: what points to them may be.
    pub fn release(&mut self, disk: &impl Disk) -> io::Result<()> {
        self.release_reftable(disk, true)?;
        if !self.l1.is_empty() {
            self.barrier(disk)?;
        }
        let offsets: Vec<_> = self.l1.keys().copied().collect();
        for offset in offsets {
            if let Some(bytes) = self.l1.get(&offset) {
                disk.write(offset, bytes)?;
                self.mappings = true;
                self.l1.remove(&offset);
            }
        }
        if !self.lowered.is_empty() {
            self.barrier(disk)?;
        }
        let offsets: Vec<_> = self.lowered.keys().copied().collect();
        for offset in offsets {
            if let Some(bytes) = self.lowered.get(&offset) {
                disk.write(offset, bytes)?;
                self.counts = true;
                self.lowered.remove(&offset);
            }
        }
        Ok(())
    }

    /// Of two blocks of counts the higher ones.
    fn highest(&self, a: &[u8], b: &[u8]) -> Vec<u8> {
        let bits = (self.header.cluster() * 8 / self.header.refblock_clusters) as usize;
        if bits >= 8 {
            let pairs = a.chunks(bits / 8).zip(b.chunks(bits / 8));
            return pairs.flat_map(|(a, b)| a.max(b)).copied().collect();
        }
        let mask = (1u8 << bits) - 1;
        let of = |a: u8, b: u8| (0..8).step_by(bits).map(move |at| (a & mask << at).max(b & mask << at));
        a.iter().zip(b).map(|(&a, &b)| of(a, b).fold(0, |all, one| all | one)).collect()
    }
}

#[cfg(test)]
pub(super) mod tests {
    use std::cell::RefCell;

    use super::*;

    pub const C: u64 = 65536;

    #[derive(Default)]
    pub struct Log {
        pub done: RefCell<Vec<String>>,
        pub table: Vec<u8>,
        /// What was written last.
        pub last: RefCell<Vec<u8>>,
    }

    impl Disk for Log {
        fn write(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
            *self.last.borrow_mut() = bytes.to_vec();
            let at = if offset < C { format!("w{offset}") } else { format!("w{}", offset / C) };
            self.done.borrow_mut().push(at);
            Ok(())
        }

        fn read(&self, _: Range<u64>) -> io::Result<Vec<u8>> {
            Ok(self.table.clone())
        }

        fn sync(&self) -> io::Result<()> {
            self.done.borrow_mut().push("sync".into());
            Ok(())
        }
    }

    impl Log {
        pub fn take(&self) -> String {
            std::mem::take(&mut *self.done.borrow_mut()).join(" ")
        }
    }

    /// Header, refcount table, a block of it, the L1 table and one L2 table.
    pub fn order() -> Order {
        let header = Header {
            version: 3,
            cluster_bits: 16,
            size: 1 << 40,
            backing_file: None,
            backing_format: None,
            has_data_file: false,
            data_file: None,
            data_file_is_raw: false,
            snapshots: 0,
            l1: 3 * C..4 * C,
            reftable: C..2 * C,
            refblock_clusters: 32768,
        };
        let metadata = Metadata { all: (0..5).map(|i| i * C).collect(), refblocks: vec![2 * C] };
        Order::new(header, metadata)
    }

    pub fn table(entries: &[u64]) -> Vec<u8> {
        entries.iter().flat_map(|e| e.to_be_bytes()).collect()
    }

    #[test]
    fn data_and_counts_are_durable_before_they_are_pointed_to() {
        let (log, mut order) = (Log::default(), order());
        for cluster in [9, 10, 2, 4, 4] {
            order.write(&log, cluster * C, &[]).unwrap();
        }
        assert_eq!(log.take(), "w9 w10 w2 sync w4 w4");
        // Nothing is uncounted: the next may follow at once.
        order.write(&log, 11 * C, &[]).unwrap();
        order.write(&log, 2 * C, &[]).unwrap();
        assert_eq!(log.take(), "w11 w2");
    }

    #[test]
    fn what_is_used_again_is_not_pointed_to_any_more() {
        let (log, mut order) = (Log::default(), order());
        order.may_free();
        order.write(&log, 4 * C, &[]).unwrap();
        order.write(&log, 9 * C, &[]).unwrap();
        assert_eq!(log.take(), "w4 sync w9");
    }

    #[test]
    fn counts_are_lower_when_nothing_points_there_any_more() {
        let log = Log { table: vec![0, 2, 0, 1, 1, 0], ..Log::default() };
        let mut order = order();
        order.may_free();
        order.write(&log, 2 * C, &[0, 1, 0, 2, 0, 255]).unwrap();
        order.write(&log, 3 * C, &table(&[7 * C])).unwrap();
        order.write(&log, 4 * C, &[]).unwrap();
        order.release(&log).unwrap();
        order.release(&log).unwrap();
        assert_eq!(log.take(), "w2 sync w4 sync w3 sync w2");
        assert_eq!(order.highest(&log.table, &[0, 1, 0, 2, 0, 255]), [0, 2, 0, 2, 1, 0]);
        // None is lower.
        order.write(&log, 2 * C, &[0, 2, 0, 1, 1, 1]).unwrap();
        order.release(&log).unwrap();
        assert_eq!(log.take(), "w2");
        order.header.refblock_clusters = C * 8 / 2;
        assert_eq!(order.highest(&[0b11_00_10_01], &[0b01_01_11_00]), [0b11_01_11_01]);
    }

    #[test]
    fn a_new_l2_table_is_pointed_to_last() {
        let (log, mut order) = (Log::default(), order());
        order.write(&log, 7 * C, &[]).unwrap(); // the table, empty
        order.write(&log, 3 * C + 8, &table(&[(1 << 63) | (7 * C)])).unwrap();
        order.write(&log, 8 * C, &[]).unwrap(); // data
        order.write(&log, 2 * C, &[]).unwrap();
        order.write(&log, 7 * C, &[]).unwrap(); // the table, full
        assert_eq!(log.take(), "w7 w8 w2 sync w7");
        assert!(order.is_metadata(7 * C + 100));
        order.release(&log).unwrap();
        order.release(&log).unwrap();
        assert_eq!(log.take(), "sync w3");
    }

    #[test]
    fn a_new_refcount_block_is_pointed_to_when_it_is_counted() {
        let (log, mut order) = (Log::default(), order());
        // In a hole that the first block counts.
        order.write(&log, 20 * C, &[]).unwrap();
        order.write(&log, C + 8, &table(&[20 * C])).unwrap();
        order.write(&log, 4 * C, &[]).unwrap();
        assert_eq!(log.take(), "w20 sync w4", "not pointed to before it is counted");
        order.write(&log, 2 * C, &[]).unwrap();
        order.write(&log, 20 * C, &[]).unwrap();
        order.write(&log, 4 * C, &[]).unwrap();
        assert_eq!(log.take(), "w2 w20 sync w1 sync w4");
        // One that counts itself.
        order.write(&log, 65536 * C, &[]).unwrap();
        order.write(&log, C + 16, &table(&[65536 * C])).unwrap();
        order.write(&log, 4 * C, &[]).unwrap();
        assert_eq!(log.take(), "w65536 sync w1 sync w4");
        order.release(&log).unwrap();
        assert_eq!(log.take(), "");
    }
}
