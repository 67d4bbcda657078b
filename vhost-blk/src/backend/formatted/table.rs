//! Where the clusters of an image are, as far as that is known: looked up by reactors without a lock, filled by workers.
//!
//! ```text
//! cluster ─► directory (a word for each chunk of 512 clusters) ─► chunk (a word for each cluster)
//! ```
//!
//! A disk that grows has further parts of both. There is memory for a fixed number of chunks; whoever needs another one
//! takes the oldest. A reader that finds the word of the directory unchanged behind it has read an entry of the chunk that
//! it meant.
#![allow(unsafe_code)] // words that are atomic from now on

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};

/// Clusters of a chunk.
pub const CHUNK: u64 = 512;
/// Most chunks: 32 MiB, which is 256 GiB of clusters of 64 KiB.
const MAX_CHUNKS: usize = 8192;

/// What is known of a cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entry {
    /// Nothing yet.
    Unknown,
    /// A worker has to look each time: it is compressed, in pieces, or shared.
    Slow,
    /// It reads as zeros and is nowhere.
    Zeros,
    /// It is in a file.
    Data {
        /// Number of the file.
        file: u8,
        /// Where, a multiple of 512.
        offset: u64,
        /// Whether it may be written there; then it stays there.
        writable: bool,
    },
}

const KIND_BITS: u32 = 3;
const FILE_BITS: u32 = 8;
/// From here on there is no room for an offset.
const MAX_OFFSET: u64 = 1 << (64 - KIND_BITS - FILE_BITS + 9);

impl Entry {
    fn pack(self) -> u64 {
        match self {
            Entry::Data { file, offset, writable } if offset % 512 == 0 && offset < MAX_OFFSET => {
                let kind = if writable { 4 } else { 3 };
                kind | u64::from(file) << KIND_BITS | (offset >> 9) << (KIND_BITS + FILE_BITS)
            }
            Entry::Unknown => 0,
            Entry::Slow | Entry::Data { .. } => 1,
            Entry::Zeros => 2,
        }
    }

    fn unpack(word: u64) -> Entry {
        match word & ((1 << KIND_BITS) - 1) {
            0 => Entry::Unknown,
            2 => Entry::Zeros,
            kind @ (3 | 4) => Entry::Data {
                file: (word >> KIND_BITS) as u8,
                offset: word >> (KIND_BITS + FILE_BITS) << 9,
                writable: kind == 4,
            },
            _ => Entry::Slow,
        }
    }
}

type Chunk = Box<[AtomicU64; CHUNK as usize]>;

#[derive(Debug)]
struct Owners {
    /// Whose chunk each is: a position in the directory.
    of: Vec<usize>,
    /// The next to be taken.
    oldest: usize,
    /// How many were given out.
    given: u32,
}

/// Times that a disk may grow and have all of its places looked up here: each doubles them at least.
const MAX_GROWTHS: usize = 32;

/// The table of a disk as large as it was at first, or of what came to it.
#[derive(Debug)]
struct Part {
    first_place: usize,
    first_chunk: usize,
    /// 0, or the number of the giving out, and one more than the number of the chunk.
    directory: Box<[AtomicU64]>,
    chunks: Box<[OnceLock<Chunk>]>,
}

impl Part {
    fn new(first_place: usize, places: usize, first_chunk: usize, chunks: usize) -> Part {
        Part {
            first_place,
            first_chunk,
            directory: zeros(places),
            chunks: std::iter::repeat_with(OnceLock::new).take(chunks).collect(),
        }
    }
}

/// The table.
#[derive(Debug)]
pub struct Table {
    first: Part,
    further: [OnceLock<Part>; MAX_GROWTHS],
    max_chunks: usize,
    owners: Mutex<Owners>,
}

impl Table {
    /// For this many clusters.
    pub fn new(clusters: u64) -> Table {
        Table::with(clusters, MAX_CHUNKS)
    }

    fn with(clusters: u64, max_chunks: usize) -> Table {
        let places = clusters.div_ceil(CHUNK) as usize;
        Table {
            first: Part::new(0, places, 0, places.min(max_chunks)),
            further: [const { OnceLock::new() }; MAX_GROWTHS],
            max_chunks,
            owners: Mutex::new(Owners { of: Vec::new(), oldest: 0, given: 0 }),
        }
    }

    /// There are this many clusters now.
    pub fn grow(&self, clusters: u64) {
        // One at a time.
        let _owners = self.owners.lock().unwrap_or_else(PoisonError::into_inner);
        let last = self.parts().last().unwrap_or(&self.first);
        let (places, chunks) =
            (last.first_place + last.directory.len(), last.first_chunk + last.chunks.len());
        let needed = clusters.div_ceil(CHUNK) as usize;
        if needed <= places {
            return;
        }
        let more = (needed - places).max(places);
        let part = Part::new(places, more, chunks, more.min(self.max_chunks - chunks));
        // Where there are none left, a worker looks each time.
        if let Some(free) = self.further.iter().find(|part| part.get().is_none()) {
            free.get_or_init(|| part);
        }
    }

    fn parts(&self) -> impl Iterator<Item = &Part> {
        std::iter::once(&self.first).chain(self.further.iter().map_while(OnceLock::get))
    }

    #[inline]
    fn word(&self, place: usize) -> Option<&AtomicU64> {
        self.first.directory.get(place).or_else(|| self.later_word(place))
    }

    #[cold]
    fn later_word(&self, place: usize) -> Option<&AtomicU64> {
        self.parts().find_map(|part| part.directory.get(place.checked_sub(part.first_place)?))
    }

    #[inline]
    fn slot(&self, number: usize) -> Option<&OnceLock<Chunk>> {
        self.first.chunks.get(number).or_else(|| self.later_slot(number))
    }

    #[cold]
    fn later_slot(&self, number: usize) -> Option<&OnceLock<Chunk>> {
        self.parts().find_map(|part| part.chunks.get(number.checked_sub(part.first_chunk)?))
    }

    /// What is known of a cluster.
    #[inline]
    pub fn get(&self, cluster: u64) -> Entry {
        let Some(place) = self.word((cluster / CHUNK) as usize) else { return Entry::Unknown };
        let word = place.load(Ordering::Acquire);
        let chunk = (word as u32 as usize).checked_sub(1).and_then(|i| self.slot(i)?.get());
        let Some(chunk) = chunk else { return Entry::Unknown };
        let entry = chunk[(cluster % CHUNK) as usize].load(Ordering::Acquire);
        // Somebody else's entry was written after the word was taken back, and who sees the former sees the latter.
        if place.load(Ordering::Relaxed) == word { Entry::unpack(entry) } else { Entry::Unknown }
    }

    /// This is where a cluster is from now on.
    pub fn set(&self, cluster: u64, entry: Entry) {
        let place = (cluster / CHUNK) as usize;
        let mut owners = self.owners.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(word) = self.word(place) else { return };
        let is = word.load(Ordering::Relaxed);
        let number = if is == 0 { self.give_out(&mut owners, place, word) } else { is as u32 as usize - 1 };
        self.chunk(number)[(cluster % CHUNK) as usize].store(entry.pack(), Ordering::Release);
    }

    fn chunk(&self, number: usize) -> &Chunk {
        let slot = self.slot(number).unwrap_or_else(|| unreachable!("chunk {number} was given out"));
        slot.get_or_init(|| Box::new([const { AtomicU64::new(0) }; CHUNK as usize]))
    }

    fn give_out(&self, owners: &mut Owners, place: usize, word: &AtomicU64) -> usize {
        let chunks = self.parts().map(|part| part.chunks.len()).sum();
        let number = if owners.of.len() < chunks {
            owners.of.push(place);
            owners.of.len() - 1
        } else {
            let number = owners.oldest;
            owners.oldest = (number + 1) % chunks;
            let former = std::mem::replace(&mut owners.of[number], place);
            if let Some(former) = self.word(former) {
                former.store(0, Ordering::Relaxed);
            }
            for entry in self.chunk(number).iter() {
                entry.store(0, Ordering::Release);
            }
            number
        };
        // With what it holds: a reader that sees the word sees the chunk.
        self.chunk(number);
        owners.given = owners.given.wrapping_add(1);
        word.store(u64::from(owners.given) << 32 | (number as u64 + 1), Ordering::Release);
        number
    }
}

/// So many zeros, which take no memory before they are written to: a directory is as large as a disk is said to be, and
/// saying so costs nothing.
fn zeros(len: usize) -> Box<[AtomicU64]> {
    // The allocator gives out zeroed pages for this, untouched.
    let words = Box::into_raw(vec![0u64; len].into_boxed_slice());
    // SAFETY: the pointer is that of a box, which nobody else has. An `AtomicU64` has the size and the bit validity of a
    // `u64`, and on targets that have one of the same alignment (checked below) a box of it has the same layout.
    unsafe { Box::from_raw(words as *mut [AtomicU64]) }
}

const _: () = assert!(align_of::<AtomicU64>() == align_of::<u64>());

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicBool;

    use proptest::prelude::*;

    use super::*;

    fn data(file: u8, offset: u64, writable: bool) -> Entry {
        Entry::Data { file, offset, writable }
    }

    proptest! {
        #[test]
        fn entries_come_back(file: u8, sector in 0..MAX_OFFSET >> 9, writable: bool) {
            let entry = data(file, sector << 9, writable);
            prop_assert_eq!(Entry::unpack(entry.pack()), entry);
        }
    }

    #[test]
    fn what_has_no_room_is_slow() {
        for entry in [data(1, MAX_OFFSET, true), data(1, 513, true), Entry::Slow] {
            assert_eq!(Entry::unpack(entry.pack()), Entry::Slow);
        }
        for entry in [Entry::Unknown, Entry::Zeros] {
            assert_eq!(Entry::unpack(entry.pack()), entry);
        }
    }

    #[test]
    fn the_oldest_chunk_makes_room() {
        let table = Table::with(4 * CHUNK, 2);
        let at = |chunk: u64| chunk * CHUNK + 7;
        for chunk in 0..2 {
            table.set(at(chunk), Entry::Zeros);
        }
        table.set(at(2), data(3, 512, true));
        assert_eq!(table.get(at(0)), Entry::Unknown);
        assert_eq!(table.get(at(1)), Entry::Zeros);
        assert_eq!(table.get(at(2)), data(3, 512, true));
        table.set(at(0), Entry::Slow);
        assert_eq!(table.get(at(0)), Entry::Slow);
        assert_eq!((table.get(at(1)), table.get(at(0) + 1)), (Entry::Unknown, Entry::Unknown));
        // Beyond the disk there is nothing to know.
        table.set(4 * CHUNK, Entry::Zeros);
        assert_eq!(table.get(4 * CHUNK), Entry::Unknown);
    }

    #[test]
    fn a_disk_that_grows_has_room_for_all_of_it() {
        let table = Table::with(2 * CHUNK, 8);
        let (mut clusters, mut known) = (2 * CHUNK, Vec::new());
        for growth in 0..3 {
            table.set(clusters, Entry::Zeros);
            assert_eq!(table.get(clusters), Entry::Unknown, "beyond the disk");
            let cluster = clusters - 1;
            table.set(cluster, data(growth, cluster * 512, true));
            known.push((cluster, data(growth, cluster * 512, true)));
            clusters += CHUNK * u64::from(growth + 1) * 2;
            table.grow(clusters);
            table.grow(clusters - 1);
            for &(cluster, entry) in &known {
                assert_eq!(table.get(cluster), entry);
            }
            assert_eq!(table.get(clusters - 1), Entry::Unknown);
        }
        // As many chunks as there may be, and no more: the oldest makes room.
        for chunk in 0..12 {
            table.set(chunk * CHUNK, Entry::Zeros);
        }
        let found = (0..12).filter(|chunk| table.get(chunk * CHUNK) == Entry::Zeros).count();
        assert_eq!(found, 8);
    }

    #[test]
    fn a_reader_never_sees_another_clusters_entry() {
        // Every cluster has one place, and two chunks have to do for eight.
        let table = Table::with(8 * CHUNK, 2);
        let over = AtomicBool::new(false);
        std::thread::scope(|s| {
            let readers: Vec<_> = (0..2)
                .map(|first| {
                    let (table, over) = (&table, &over);
                    s.spawn(move || {
                        let (mut cluster, mut found) = (first, 0u32);
                        while !over.load(Ordering::Relaxed) {
                            cluster = (cluster * 5 + 17) % (8 * CHUNK);
                            match table.get(cluster) {
                                Entry::Unknown => {}
                                entry => {
                                    assert_eq!(entry, data(0, cluster * 512, true));
                                    found += 1;
                                }
                            }
                        }
                        found
                    })
                })
                .collect();
            for round in 0..40_000 {
                let cluster = round * 311 % (8 * CHUNK);
                table.set(cluster, data(0, cluster * 512, true));
            }
            over.store(true, Ordering::Relaxed);
            let found: u32 = readers.into_iter().map(|r| r.join().unwrap()).sum();
            println!("{found} entries read");
        });
    }
}
