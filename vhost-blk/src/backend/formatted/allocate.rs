//! Making room before it is written to: clusters that read as zeros are allocated many at a time, as zeros, so that
//! reactors write to them by themselves from then on; what is held below, packed or shared is copied first.
//!
//! A cluster is zeros in the file, durably, before a table points to it. So a guest finds in it what it has held or what
//! was written, whenever the power fails. In a file such zeros are holes, which take no space.

use std::io;
use std::ops::Range;

use imago::{FormatAccess, Mapping};

use super::file::ImageFile;
use super::worker::{Image, stretches};

/// Bytes that are allocated together, and where they follow those that were allocated last, most.
const AHEAD: u64 = 4 << 20;
const MAX_AHEAD: u64 = 128 << 20;
/// Most clusters that are.
const MAX_CLUSTERS: u64 = 2048;

/// How much to allocate: more, the longer a guest writes one after the other.
#[derive(Debug, Default)]
pub(super) struct Ahead {
    /// Where the last ended.
    end: u64,
    bytes: u64,
    /// The last followed the one before, and what follows it is not allocated yet.
    goes_on: bool,
}

impl Ahead {
    /// The part of the disk around `at` that is to be allocated as far as it is zeros.
    fn window(&mut self, at: u64, cluster: u64, size: u64) -> Range<u64> {
        let most = MAX_CLUSTERS * cluster;
        let least = AHEAD.min(most);
        let start = at / least * least;
        self.goes_on = start == self.end && start > 0;
        self.bytes = if start == self.end { (self.bytes * 2).min(MAX_AHEAD.min(most)) } else { least };
        // Clusters may be larger than all that.
        self.end = (start + self.bytes.max(cluster)).min(size);
        start / cluster * cluster..self.end
    }
}

impl Ahead {
    /// Where a guest that writes one after the other will be next, once each time.
    pub(super) fn take_next(&mut self, size: u64) -> Option<u64> {
        std::mem::take(&mut self.goes_on).then_some(self.end).filter(|&end| end < size)
    }
}

/// What a batch of errands does beside what each asks for.
#[derive(Debug, Default)]
pub(super) struct Batch {
    /// It may uncount clusters.
    pub frees: bool,
    /// What it has allocated.
    pub made: Vec<Range<u64>>,
}

impl Image {
    /// Has a range be where it can be written in place: as much of it, from its start on, as can be without its data.
    pub(super) fn make_room(
        &self,
        access: &FormatAccess<ImageFile>,
        range: Range<u64>,
        ahead: &mut Ahead,
        batch: &mut Batch,
    ) -> io::Result<()> {
        let cluster = 1u64 << self.shared.cluster_bits;
        let mut at = range.start;
        while at < range.end {
            let (mapping, len) = access.get_mapping(at, range.end - at)?;
            let start = at / cluster * cluster;
            let next = (start + cluster).min(self.shared.size());
            at = match mapping {
                _ if len == 0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                Mapping::Raw { storage, offset, writable: true, .. } => {
                    self.is_data(storage, offset, len)?;
                    at + len
                }
                // A device has no holes.
                _ if !self.shared.files[usize::from(self.shared.data)].is_regular() => return Ok(()),
                // What it holds need not be copied to be written over.
                Mapping::Raw { .. } | Mapping::Special { .. } if at == start && next <= range.end => {
                    return Ok(());
                }
                Mapping::Zero { .. } => {
                    let zeros = self.zeros_around(access, start..next, ahead)?;
                    if zeros.is_empty() {
                        self.copy(access, start..next, batch)?;
                        next
                    } else if self.fill(access, zeros.clone(), batch)? {
                        zeros.end
                    } else {
                        return Ok(());
                    }
                }
                _ => {
                    self.copy(access, start..next, batch)?;
                    next
                }
            };
        }
        Ok(())
    }

    /// The clusters from, to and around one that read as zeros; none if it does not itself, as a whole.
    fn zeros_around(
        &self,
        access: &FormatAccess<ImageFile>,
        cluster: Range<u64>,
        ahead: &mut Ahead,
    ) -> io::Result<Range<u64>> {
        let size = 1u64 << self.shared.cluster_bits;
        let window = ahead.window(cluster.start, size, self.shared.size());
        let (mut zeros, mut is_over) = (window.start..window.start, false);
        stretches(access, window.start, window.end, |at, len, mapping| {
            if matches!(mapping, Mapping::Zero { .. }) {
                if zeros.end < at && !is_over {
                    zeros = at..at;
                }
                if zeros.end == at {
                    zeros.end = at + len;
                }
            } else if zeros.end > cluster.start {
                is_over = true;
            }
            Ok(())
        })?;
        let end = if zeros.end == self.shared.size() { zeros.end } else { zeros.end / size * size };
        let zeros = zeros.start.next_multiple_of(size)..end;
        let has_it = zeros.start <= cluster.start && cluster.end <= zeros.end;
        Ok(if has_it { zeros } else { 0..0 })
    }

    /// Allocates clusters, as zeros; false where the file cannot have any.
    fn fill(
        &self,
        access: &FormatAccess<ImageFile>,
        zeros: Range<u64>,
        batch: &mut Batch,
    ) -> io::Result<bool> {
        let mut at = zeros.start;
        while at < zeros.end {
            let mapping = access.prepare_data_mapping(at, zeros.end - at, true)?;
            let len = mapping.length();
            if !mapping.is_nonblocking() {
                let whole = len.next_multiple_of(1 << self.shared.cluster_bits);
                match mapping.storage().put_zeros(mapping.offset(), whole) {
                    Err(e) if e.kind() == io::ErrorKind::Unsupported => return Ok(false),
                    put => put?,
                }
            }
            access.commit_data_mapping(mapping)?;
            batch.made.push(at..at + len);
            at += len;
        }
        Ok(true)
    }

    /// Copies a cluster to where it may be written.
    pub(super) fn copy(
        &self,
        access: &FormatAccess<ImageFile>,
        cluster: Range<u64>,
        batch: &mut Batch,
    ) -> io::Result<()> {
        self.prepare(access, cluster.start, cluster.end, &mut batch.frees)?;
        let mapping = access.prepare_data_mapping(cluster.start, cluster.end - cluster.start, false)?;
        access.commit_data_mapping(mapping)?;
        batch.made.push(cluster);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    #[test]
    fn more_is_allocated_the_longer_a_guest_writes_on() {
        let mut ahead = Ahead::default();
        let mut window = |at| ahead.window(at, 65536, 1000 * MIB);
        assert_eq!(window(17 * MIB + 5), 16 * MIB..20 * MIB);
        for (start, end) in [(20, 28), (28, 44), (44, 76), (76, 140), (140, 268), (268, 396)] {
            assert_eq!(window(start * MIB), start * MIB..end * MIB);
        }
        // Somewhere else; and at the end.
        assert_eq!(window(500 * MIB), 500 * MIB..504 * MIB);
        assert_eq!(window(999 * MIB + 512), 996 * MIB..1000 * MIB);
        assert_eq!(ahead.take_next(1000 * MIB), None);
        ahead.window(600 * MIB, 65536, 1000 * MIB);
        ahead.window(604 * MIB, 65536, 1000 * MIB);
        assert_eq!((ahead.take_next(1000 * MIB), ahead.take_next(1000 * MIB)), (Some(612 * MIB), None));
    }

    #[test]
    fn a_window_is_whole_clusters_and_not_too_many() {
        let mut ahead = Ahead::default();
        assert_eq!(ahead.window(5 * MIB + 512, 512, 1 << 40), 5 * MIB..6 * MIB);
        assert_eq!(ahead.window(5 * MIB, 2 * MIB, 7 * MIB), 4 * MIB..7 * MIB);
        assert_eq!(ahead.window(9 * MIB, 2 * MIB, 1 << 40), 8 * MIB..12 * MIB);
    }
}
