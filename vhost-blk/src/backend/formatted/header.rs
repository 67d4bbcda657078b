//! The header of a qcow2 image and its two top tables, checked before anything relies on them (QEMU's
//! docs/interop/qcow2.txt, whose names these are). Whoever made the image is trusted with the names in it, not with its
//! numbers: nothing here or later reserves memory for more than the limits that QEMU has, too.

use std::collections::HashSet;
use std::ops::Range;

const MAGIC: u32 = 0x5146_49fb;
/// Bytes of the header of version 2, and of version 3 at least.
const V2_LEN: usize = 72;
const V3_LEN: usize = 104;
/// Sizes of the tables, bytes.
const MAX_L1: u64 = 32 << 20;
pub const MAX_REFTABLE: u64 = 8 << 20;
/// No disk is larger.
const MAX_SIZE: u64 = 1 << 60;
const MAX_NAME: usize = 1023;

const DIRTY: u64 = 1 << 0;
const CORRUPT: u64 = 1 << 1;
const EXTERNAL_DATA: u64 = 1 << 2;
/// `autoclear_features`: the data file is a raw image of the disk.
const RAW_EXTERNAL: u64 = 1 << 1;

const EXTENSION_END: u32 = 0;
const EXTENSION_BACKING_FORMAT: u32 = 0xe279_2aca;
const EXTENSION_DATA_FILE: u32 = 0x4441_5441;

/// Where the header says where the name of the image below is, and how long it is: zeros for none.
pub const BACKING_NAME: Range<usize> = 8..20;

/// Where it says how large the disk is.
pub const SIZE: Range<u64> = 24..32;

/// Of an entry of the L1 table or the refcount table: where the table is.
pub const OFFSET_MASK: u64 = 0x00ff_ffff_ffff_fe00;

/// Why an image is not used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// Another format, whatever its name says.
    #[error("it is no qcow2 image; say what it is with --format")]
    Magic,
    /// A number that cannot be.
    #[error("it is damaged: {0}; see what qemu-img check says")]
    Damaged(&'static str),
    /// Something that is not done here.
    #[error("it {0}")]
    Unsupported(&'static str),
}

use Refused::{Damaged, Unsupported};

/// What a header says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// 2 or 3.
    pub version: u32,
    /// Bytes of a cluster are two to the power of this.
    pub cluster_bits: u32,
    /// Bytes of the disk.
    pub size: u64,
    /// The image below.
    pub backing_file: Option<String>,
    /// Its format.
    pub backing_format: Option<String>,
    /// Whether the data are in another file.
    pub has_data_file: bool,
    /// Its name, if that is said.
    pub data_file: Option<String>,
    /// Whether that is to be a raw image of the disk.
    pub data_file_is_raw: bool,
    /// Internal snapshots.
    pub snapshots: u32,
    /// Where the L1 table is, bytes.
    pub l1: Range<u64>,
    /// Where the refcount table is, bytes.
    pub reftable: Range<u64>,
    /// Clusters counted by a refcount block.
    pub refblock_clusters: u64,
}

fn be32(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_be_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

fn be64(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_be_bytes(bytes.get(at..at + 8)?.try_into().ok()?))
}

/// The words of a table.
pub fn entries(table: &[u8]) -> impl Iterator<Item = u64> {
    table.chunks_exact(8).map(|word| u64::from_be_bytes(std::array::from_fn(|i| word[i])))
}

fn text(bytes: &[u8]) -> Result<String, Refused> {
    let text = String::from_utf8(bytes.to_vec()).map_err(|_| Damaged("a file name is no UTF-8"))?;
    if text.is_empty() || text.contains('\0') {
        return Err(Damaged("a file name is empty or holds a NUL"));
    }
    Ok(text)
}

/// Entries of the L1 table of a disk: an L2 table fills a cluster.
fn l1_entries_for(size: u64, cluster: u64) -> u64 {
    size.div_ceil(cluster * (cluster / 8))
}

impl Header {
    /// Whether the disk may be this large.
    pub fn allows(&self, size: u64) -> bool {
        size <= MAX_SIZE && l1_entries_for(size, self.cluster()) * 8 <= MAX_L1
    }

    /// Bytes of the cluster that holds the header, as the header itself says.
    pub fn cluster_size(start: &[u8]) -> Result<u64, Refused> {
        if be32(start, 0) != Some(MAGIC) {
            return Err(Refused::Magic);
        }
        match be32(start, 20) {
            Some(bits @ 9..=21) => Ok(1 << bits),
            _ => Err(Damaged("its clusters have an impossible size")),
        }
    }

    /// Reads the header out of the image's first cluster. The image file has `file_size` bytes.
    pub fn parse(cluster: &[u8], file_size: u64) -> Result<Header, Refused> {
        let cluster_size = Header::cluster_size(cluster)?;
        let short = Damaged("its header is cut short");
        let word = |at| be32(cluster, at).ok_or(short.clone());
        let long = |at| be64(cluster, at).ok_or(short.clone());
        let version = word(4)?;
        let (incompatible, autoclear, refcount_order, header_length) = match version {
            2 => (0, 0, 4, V2_LEN),
            3 => (long(72)?, long(88)?, word(96)?, word(100)? as usize),
            _ => return Err(Unsupported("is of a version that is not known; only 2 and 3 are")),
        };
        if header_length < if version == 2 { V2_LEN } else { V3_LEN } || header_length % 8 != 0 {
            return Err(Damaged("its header has an impossible length"));
        }
        Header::check_features(incompatible, word(32)?)?;
        if refcount_order > 6 {
            return Err(Damaged("its reference counts have an impossible width"));
        }
        let cluster_bits = cluster_size.trailing_zeros();
        let size = long(24)?;
        if size == 0 || size > MAX_SIZE {
            return Err(Damaged("its disk is empty or impossibly large"));
        }
        let table = |offset: u64, len: u64, max: u64, what: &'static str| {
            let end = offset.checked_add(len);
            let inside = end.is_some_and(|end| end <= file_size.next_multiple_of(cluster_size));
            let sound = offset != 0 && offset.is_multiple_of(cluster_size) && len <= max && inside;
            if sound { Ok(offset..offset + len) } else { Err(Damaged(what)) }
        };
        let l1_entries = u64::from(word(36)?);
        if l1_entries < l1_entries_for(size, cluster_size) {
            return Err(Damaged("its L1 table is too short for the disk"));
        }
        let l1 = table(long(40)?, l1_entries * 8, MAX_L1, "its L1 table cannot be where it is said to be")?;
        let reftable_len = u64::from(word(56)?) * cluster_size;
        let reftable = table(
            long(48)?,
            reftable_len,
            MAX_REFTABLE,
            "its refcount table cannot be where it is said to be",
        )?;
        if reftable.is_empty() {
            return Err(Damaged("it has no refcount table"));
        }
        let mut header = Header {
            version,
            cluster_bits,
            size,
            backing_file: None,
            backing_format: None,
            has_data_file: incompatible & EXTERNAL_DATA != 0,
            data_file: None,
            data_file_is_raw: autoclear & RAW_EXTERNAL != 0,
            snapshots: word(60)?,
            l1,
            reftable,
            refblock_clusters: (cluster_size * 8) >> refcount_order,
        };
        header.read_names(cluster, header_length)?;
        Ok(header)
    }

    fn check_features(incompatible: u64, crypt_method: u32) -> Result<(), Refused> {
        if incompatible & CORRUPT != 0 {
            return Err(Unsupported("is marked corrupt; repair it first (qemu-img check -r all)"));
        }
        if incompatible & DIRTY != 0 {
            return Err(Unsupported(
                "was not closed by whoever wrote it last; repair it first (qemu-img check -r all)",
            ));
        }
        if incompatible & !EXTERNAL_DATA != 0 {
            return Err(Unsupported(
                "uses extended L2 entries or another compression than zlib, which are not known here; convert it \
                 (qemu-img convert -O qcow2)",
            ));
        }
        if crypt_method != 0 {
            return Err(Unsupported("is encrypted, which is not known here; convert it (qemu-img convert)"));
        }
        Ok(())
    }

    fn read_names(&mut self, cluster: &[u8], header_length: usize) -> Result<(), Refused> {
        let short = Damaged("its header is cut short");
        let offset = be64(cluster, 8).ok_or(short.clone())?;
        if offset != 0 {
            let len = be32(cluster, 16).ok_or(short.clone())? as usize;
            let name = usize::try_from(offset).ok().filter(|_| len <= MAX_NAME);
            let name = name.and_then(|at| cluster.get(at..at.checked_add(len)?));
            self.backing_file = Some(text(name.ok_or(Damaged("the name of its backing file is too long"))?)?);
        }
        let mut at = header_length;
        loop {
            let (Some(kind), Some(len)) = (be32(cluster, at), be32(cluster, at + 4)) else {
                return Err(Damaged("its header extensions do not end"));
            };
            if kind == EXTENSION_END {
                return Ok(());
            }
            let content = cluster.get(at + 8..at + 8 + len as usize);
            let content = content.ok_or(Damaged("a header extension is too long"))?;
            match kind {
                EXTENSION_BACKING_FORMAT => self.backing_format = Some(text(content)?),
                EXTENSION_DATA_FILE => self.data_file = Some(text(content)?),
                _ => {}
            }
            at += 8 + (len as usize).next_multiple_of(8);
        }
    }

    /// Bytes of a cluster.
    pub fn cluster(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// Checks that the tables below the top ones are where tables can be, and nothing where something else is.
    pub fn check_tables(&self, l1: &[u8], reftable: &[u8], file_size: u64) -> Result<Metadata, Refused> {
        let cluster = self.cluster();
        let mut all = HashSet::from([0]);
        for table in [&self.l1, &self.reftable] {
            let mut at = table.start;
            while at < table.end {
                if !all.insert(at) {
                    return Err(Damaged("its tables overlap"));
                }
                at += cluster;
            }
        }
        let mut take = |entry: u64, reserved: u64| {
            let offset = entry & OFFSET_MASK;
            if entry & reserved != 0 || !offset.is_multiple_of(cluster) || offset >= file_size {
                return Err(Damaged("a table cannot be where it is said to be"));
            }
            if offset != 0 && !all.insert(offset) {
                return Err(Damaged("its tables overlap"));
            }
            Ok(offset)
        };
        let refblocks = entries(reftable).map(|e| take(e, !OFFSET_MASK)).collect::<Result<Vec<_>, _>>()?;
        for entry in entries(l1) {
            take(entry, 0x7f00_0000_0000_01ff)?;
        }
        Ok(Metadata { all, refblocks })
    }

    /// Checks that what holds tables is counted, so that nobody gives it out as free. `read` reads from the image.
    pub fn check_counts<E: From<Refused>>(
        &self,
        metadata: &Metadata,
        read: impl Fn(Range<u64>) -> Result<Vec<u8>, E>,
    ) -> Result<(), E> {
        let uncounted = || E::from(Damaged("a table is not counted"));
        let mut clusters: Vec<_> = metadata.all.iter().map(|offset| offset / self.cluster()).collect();
        clusters.sort_unstable();
        let bits = self.cluster() * 8 / self.refblock_clusters;
        for together in clusters.chunk_by(|a, b| a / self.refblock_clusters == b / self.refblock_clusters) {
            let number = together[0] / self.refblock_clusters;
            let block = usize::try_from(number).ok().and_then(|number| metadata.refblocks.get(number));
            let block = block.copied().filter(|&block| block != 0).ok_or_else(uncounted)?;
            // From the first that is needed to the last.
            let first = together[0] % self.refblock_clusters * bits / 8;
            let last = together[together.len() - 1] % self.refblock_clusters * bits;
            let counts = read(block + first..block + (last + bits).div_ceil(8))?;
            for cluster in together {
                let bit = cluster % self.refblock_clusters * bits - first * 8;
                let byte = (bit / 8) as usize;
                let is_counted = if bits < 8 {
                    counts[byte] >> (bit % 8) & ((1 << bits) - 1) != 0
                } else {
                    counts[byte..byte + bits as usize / 8].iter().any(|&b| b != 0)
                };
                if !is_counted {
                    return Err(uncounted());
                }
            }
        }
        Ok(())
    }
}

/// Where an image has its tables.
#[derive(Clone, Debug, Default)]
pub struct Metadata {
    /// Offsets of the clusters of all tables, and of the header.
    pub all: HashSet<u64>,
    /// Offsets of the refcount blocks by number; 0 where there is none.
    pub refblocks: Vec<u64>,
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn put(bytes: &mut [u8], at: usize, value: &[u8]) {
        bytes[at..at + value.len()].copy_from_slice(value);
    }

    /// An image of 1 GiB with clusters of 64 KiB, its header only.
    fn sound() -> Vec<u8> {
        let mut b = vec![0; 65536];
        for (at, word) in [(0, MAGIC), (4, 3), (20, 16), (36, 2), (56, 1), (96, 4), (100, 104)] {
            put(&mut b, at, &word.to_be_bytes());
        }
        for (at, long) in [(24, 1 << 30), (40, 3 << 16), (48, 1u64 << 16)] {
            put(&mut b, at, &long.to_be_bytes());
        }
        b
    }

    const FILE: u64 = 4 << 16;

    fn with(at: usize, value: &[u8]) -> Result<Header, Refused> {
        let mut b = sound();
        put(&mut b, at, value);
        Header::parse(&b, FILE)
    }

    #[test]
    fn a_sound_header_is_read() {
        let header = Header::parse(&sound(), FILE).unwrap();
        assert_eq!((header.size, header.cluster(), header.l1), (1 << 30, 65536, 0x30000..0x30010));
        assert_eq!((header.reftable, header.refblock_clusters), (0x10000..0x20000, 32768));
        assert_eq!((header.backing_file, header.has_data_file, header.data_file), (None, false, None));
    }

    #[test]
    fn names_are_read() {
        let mut b = sound();
        put(&mut b, 104, &EXTENSION_BACKING_FORMAT.to_be_bytes());
        put(&mut b, 108, &3u32.to_be_bytes());
        put(&mut b, 112, b"raw");
        put(&mut b, 8, &0x200u64.to_be_bytes());
        put(&mut b, 16, &4u32.to_be_bytes());
        put(&mut b, 0x200, b"base");
        let header = Header::parse(&b, FILE).unwrap();
        assert_eq!(header.backing_file.as_deref(), Some("base"));
        assert_eq!(header.backing_format.as_deref(), Some("raw"));
    }

    #[test]
    fn what_is_not_known_or_cannot_be_is_refused() {
        let long = |n: u64| n.to_be_bytes();
        let word = |n: u32| n.to_be_bytes();
        assert_eq!(with(0, b"RAW"), Err(Refused::Magic));
        for (at, value) in [(72, DIRTY), (72, CORRUPT), (72, 1 << 3), (72, 1 << 4), (72, 1 << 40)] {
            assert!(matches!(with(at, &long(value)), Err(Unsupported(_))), "{at} {value:#x}");
        }
        assert!(matches!(with(32, &word(2)), Err(Unsupported(_))));
        assert!(matches!(with(4, &word(1)), Err(Unsupported(_))));
        for (at, value) in [(24, 0), (24, u64::MAX), (40, 0), (40, 513), (40, 4 << 16), (48, u64::MAX)] {
            assert!(matches!(with(at, &long(value)), Err(Damaged(_))), "{at} {value:#x}");
        }
        for (at, value) in [
            (20, 8),
            (20, 22),
            (20, u32::MAX),
            (36, 1),
            (36, u32::MAX),
            (56, 0),
            (56, u32::MAX),
            (96, 7),
            (100, 0),
        ] {
            assert!(matches!(with(at, &word(value)), Err(Damaged(_))), "{at} {value:#x}");
        }
    }

    #[test]
    fn tables_keep_apart() {
        let header = Header::parse(&sound(), FILE).unwrap();
        let table = |entries: &[u64]| entries.iter().flat_map(|e| e.to_be_bytes()).collect::<Vec<_>>();
        let file = 8 << 16;
        let check = |l1: &[u64], refs: &[u64]| header.check_tables(&table(l1), &table(refs), file);
        let copied = 1 << 63;
        let sound = check(&[copied | 5 << 16, 0], &[2 << 16]).unwrap();
        assert_eq!((sound.all.len(), sound.refblocks), (5, vec![2 << 16]));
        for (l1, refs) in [
            ([5 << 16, 5 << 16], [2 << 16]),
            ([1 << 16, 0], [2 << 16]),
            ([3 << 16, 0], [2 << 16]),
            ([5 << 16, 0], [5 << 16]),
            ([(5 << 16) + 512, 0], [2 << 16]),
            ([9 << 16, 0], [2 << 16]),
            ([5 << 16 | 1, 0], [2 << 16]),
        ] {
            assert!(check(&l1, &refs).is_err(), "{l1:x?} {refs:x?}");
        }
    }

    proptest! {
        #[test]
        fn no_header_makes_it_panic(at in 0..200usize, bytes in prop::collection::vec(any::<u8>(), 1..24), file: u64) {
            let mut b = sound();
            put(&mut b, at, &bytes);
            let _ = Header::parse(&b, file);
            let _ = Header::parse(&b[..at], file);
        }
    }
}
