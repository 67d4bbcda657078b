//! What the header says of where the top tables are, and of the size of the disk: each is written when what it speaks of is
//! there, and counted.

use std::io;
use std::ops::Range;

use super::super::header::{MAX_REFTABLE, OFFSET_MASK, SIZE, entries};
use super::{Disk, Order};

/// A field of the header, in what is written at `offset`.
fn field<const N: usize>(offset: u64, bytes: &[u8], at: u64) -> Option<[u8; N]> {
    let from = usize::try_from(at.checked_sub(offset)?).ok()?;
    bytes.get(from..from + N)?.try_into().ok()
}

/// Where the refcount table is said to be, and how many clusters it has.
fn reftable_of(offset: u64, bytes: &[u8]) -> Option<(u64, u32)> {
    Some((u64::from_be_bytes(field(offset, bytes, 48)?), u32::from_be_bytes(field(offset, bytes, 56)?)))
}

/// Where the L1 table is said to be.
fn l1_of(offset: u64, bytes: &[u8]) -> Option<Range<u64>> {
    let count = u32::from_be_bytes(field(offset, bytes, 36)?);
    let start = u64::from_be_bytes(field(offset, bytes, 40)?);
    Some(start..start + u64::from(count) * 8)
}

impl Order {
    /// Writes to the header; what is said of the size of the disk is left to [`set_size`](Self::set_size).
    pub(super) fn write_header(&mut self, disk: &impl Disk, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.expect_pointers(offset, bytes)?;
        let mut bytes = bytes.to_vec();
        if field::<8>(offset, &bytes, SIZE.start).is_some() {
            let from = (SIZE.start - offset) as usize;
            bytes[from..from + 8].copy_from_slice(&self.header.size.to_be_bytes());
        }
        if let Some(moved) = l1_of(offset, &bytes).filter(|l1| *l1 != self.header.l1) {
            // `imago` has counted it, but not written that.
            self.count(disk, moved)?;
        }
        self.barrier(disk)?;
        disk.write(offset, &bytes)?;
        disk.sync()?;
        self.adopt_pointers(disk, offset, &bytes)
    }

    /// Has the header say how large the disk is, by writing the first `block` bytes. All else is written already, and
    /// nothing held back.
    pub fn set_size(&mut self, disk: &impl Disk, block: u64, size: u64) -> io::Result<()> {
        self.barrier(disk)?;
        let mut bytes = disk.read(0..block)?;
        bytes[SIZE.start as usize..SIZE.end as usize].copy_from_slice(&size.to_be_bytes());
        disk.write(0, &bytes)?;
        disk.sync()?;
        self.header.size = size;
        Ok(())
    }

    /// Fails if what is written to the header is none: in an image that does not count it, it is given out as free.
    fn expect_pointers(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        match reftable_of(offset, bytes) {
            Some((start, clusters))
                if start == 0
                    || !start.is_multiple_of(self.header.cluster())
                    || clusters == 0
                    || u64::from(clusters) * self.header.cluster() > MAX_REFTABLE =>
            {
                Err(io::Error::other("the image is damaged, its header is used for data; see qemu-img check"))
            }
            _ => Ok(()),
        }
    }

    /// Has clusters be counted, once each, in the file already.
    fn count(&mut self, disk: &impl Disk, clusters: Range<u64>) -> io::Result<()> {
        let cluster = self.header.cluster();
        // Blocks that are not pointed to yet, and that others count, come first.
        let held = self.reftable.values().filter(|held| !held.after.is_empty());
        let blocks: Vec<_> = held.flat_map(|held| entries(&held.bytes)).map(|e| e & OFFSET_MASK).collect();
        for block in blocks.into_iter().filter(|&block| block != 0) {
            self.count_by(disk, &[block / cluster])?;
        }
        self.release_reftable(disk, true)?;
        let numbers: Vec<_> = (clusters.start / cluster..clusters.end.div_ceil(cluster)).collect();
        let counted = self.header.refblock_clusters;
        numbers.chunk_by(|a, b| a / counted == b / counted).try_for_each(|part| self.count_by(disk, part))
    }

    /// Counts clusters of one refcount block.
    fn count_by(&mut self, disk: &impl Disk, numbers: &[u64]) -> io::Result<()> {
        let (cluster, counted) = (self.header.cluster(), self.header.refblock_clusters);
        let block = usize::try_from(numbers[0] / counted).ok().and_then(|n| self.metadata.refblocks.get(n));
        let Some(&block) = block.filter(|&&block| block != 0) else {
            return Err(io::Error::other("a new table is in no refcount block"));
        };
        let mut bytes = disk.read(block..block + cluster)?;
        let bits = (cluster * 8 / counted) as usize;
        let mut is_changed = false;
        for number in numbers {
            let first = (number % counted) as usize * bits;
            // Big endian; where several are in a byte, from the lowest bit on.
            let (byte, one) =
                if bits < 8 { (first / 8, 1 << (first % 8)) } else { (first / 8 + bits / 8 - 1, 1) };
            if bytes[byte] & one == 0 {
                bytes[byte] |= one;
                is_changed = true;
            }
        }
        if is_changed {
            disk.write(block, &bytes)?;
            self.counts = true;
        }
        Ok(())
    }

    /// The refcount table and the L1 table may have moved.
    fn adopt_pointers(&mut self, disk: &impl Disk, offset: u64, bytes: &[u8]) -> io::Result<()> {
        if let Some(moved) = l1_of(offset, bytes).filter(|l1| *l1 != self.header.l1) {
            // It was written whole, and nothing is held back while it moves.
            self.l1.clear();
            let from = std::mem::replace(&mut self.header.l1, moved.clone());
            self.replace_table(from, moved);
        }
        let Some((start, clusters)) = reftable_of(offset, bytes) else { return Ok(()) };
        let moved = start..start + u64::from(clusters) * self.header.cluster();
        if moved != self.header.reftable {
            // It was written whole, with all that it points to.
            self.reftable.clear();
            self.metadata.refblocks = entries(&disk.read(moved.clone())?).map(|e| e & OFFSET_MASK).collect();
            self.blocks = self.metadata.refblocks.iter().copied().filter(|&block| block != 0).collect();
            self.metadata.all.extend(&self.blocks);
            let from = std::mem::replace(&mut self.header.reftable, moved.clone());
            self.replace_table(from, moved);
        }
        Ok(())
    }

    /// A table is where there was none, and no more where it was.
    fn replace_table(&mut self, from: Range<u64>, to: Range<u64>) {
        let cluster = self.header.cluster() as usize;
        for at in from.step_by(cluster) {
            self.metadata.all.remove(&at);
        }
        self.metadata.all.extend(to.step_by(cluster));
    }
}

#[cfg(test)]
mod tests {
    use super::super::Kind;
    use super::super::tests::{C, Log, order, table};

    /// Version, size of the disk, and so on, up to the size of the refcount table.
    fn header(size: u64, l1: u64, l1_entries: u32) -> Vec<u8> {
        let mut header = vec![0; 60];
        header[24..32].copy_from_slice(&size.to_be_bytes());
        header[36..40].copy_from_slice(&l1_entries.to_be_bytes());
        header[40..48].copy_from_slice(&l1.to_be_bytes());
        header[48..56].copy_from_slice(&C.to_be_bytes());
        header[56..].copy_from_slice(&1u32.to_be_bytes());
        header
    }

    #[test]
    fn data_are_no_header() {
        let (log, mut order) = (Log::default(), order());
        for bytes in [vec![0; 512], vec![0xff; 512]] {
            assert!(order.write(&log, 0, &bytes).is_err());
        }
        assert_eq!(log.take(), "");
    }

    #[test]
    fn an_l1_table_that_moves_is_followed() {
        let (log, mut order) = (Log { table: vec![0; C as usize], ..Log::default() }, order());
        order.write(&log, 31 * C, &table(&[(1 << 63) | (4 * C), 0])).unwrap();
        order.write(&log, 0, &header(1 << 40, 31 * C, 16384)).unwrap();
        assert_eq!(log.take(), "w31 w2 sync w0 sync", "counted before it is pointed to");
        assert_eq!(
            [3, 31, 32, 4].map(|c| order.kind(c * C)),
            [Kind::Data, Kind::L1, Kind::L1, Kind::Mappings]
        );
        assert!(!order.is_metadata(3 * C) && order.is_metadata(32 * C + 512));
        // What it points to is held back as before.
        order.write(&log, 31 * C + 8, &table(&[(1 << 63) | (9 * C)])).unwrap();
        assert_eq!(log.take(), "");
        order.release(&log).unwrap();
        assert_eq!(log.take(), "w31");
    }

    #[test]
    fn clusters_are_counted_once() {
        let (log, mut order) = (Log { table: vec![0; C as usize], ..Log::default() }, order());
        order.header.refblock_clusters = C * 8;
        let bits = |log: &Log| log.last.borrow()[..3].to_vec();
        order.count(&log, 6 * C..10 * C).unwrap();
        assert_eq!((log.take().as_str(), bits(&log)), ("w2", vec![0b1100_0000, 0b11, 0]));
        order.header.refblock_clusters = C / 2;
        order.count(&log, C..2 * C).unwrap();
        assert_eq!((log.take().as_str(), log.last.borrow()[..5].to_vec()), ("w2", vec![0, 0, 0, 1, 0]));
        // Those that are are left alone.
        let log = Log { table: vec![0xff; C as usize], ..Log::default() };
        order.count(&log, C..2 * C).unwrap();
        assert_eq!(log.take(), "");
    }

    #[test]
    fn the_size_of_the_disk_is_written_last() {
        let (log, mut order) = (Log { table: vec![0; 512], ..Log::default() }, order());
        let size = |log: &Log| u64::from_be_bytes(log.last.borrow()[24..32].try_into().unwrap());
        order.write(&log, 0, &header(1 << 41, 3 * C, 8192)).unwrap();
        assert_eq!((log.take().as_str(), size(&log)), ("w0 sync", 1 << 40));
        order.write(&log, 4 * C, &[]).unwrap();
        order.set_size(&log, 512, 1 << 41).unwrap();
        assert_eq!((log.take().as_str(), size(&log)), ("w4 sync w0 sync", 1 << 41));
        order.write(&log, 0, &header(1 << 42, 3 * C, 8192)).unwrap();
        assert_eq!(size(&log), 1 << 41);
    }

    #[test]
    fn a_refcount_table_that_moves_is_followed() {
        let log = Log { table: table(&[2 * C, 30 * C]), ..Log::default() };
        let mut order = order();
        order.write(&log, 31 * C, &[]).unwrap();
        let mut pointer = vec![0; 12];
        pointer[..8].copy_from_slice(&(31 * C).to_be_bytes());
        pointer[8..].copy_from_slice(&1u32.to_be_bytes());
        order.write(&log, 48, &pointer).unwrap();
        assert_eq!(log.take(), "w31 sync w48 sync");
        assert_eq!(
            [1, 2, 30, 31].map(|c| order.kind(c * C)),
            [Kind::Data, Kind::Counts, Kind::Counts, Kind::RefTable]
        );
    }
}
