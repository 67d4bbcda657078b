//! Making an image independent of those below it, while it is in use: what is only there is copied up, piece by piece, and
//! at the end its header forgets them.
//!
//! A cluster that is only below is written by nobody but workers, and while a piece is copied there are none at work. So
//! whatever guests do meanwhile comes before or after.

use std::io;
use std::ops::Range;
use std::sync::PoisonError;
use std::sync::atomic::Ordering;

use imago::{FormatAccess, Mapping, ShallowMapping};

use super::file::ImageFile;
use super::header::{BACKING_NAME, Header};
use super::worker::{Image, stretches};
use crate::backend::bounce::Bounce;

/// Bytes looked at in one piece, in whole clusters.
const PIECE: u64 = 1 << 20;

impl Image {
    /// Copies up what a piece of the disk from `start` on has only below; where the next one begins.
    pub(super) fn copy_up(&self, start: u64) -> io::Result<u64> {
        let access = self.access.write().unwrap_or_else(PoisonError::into_inner);
        let Some(access) = &*access else { return Err(io::ErrorKind::BrokenPipe.into()) };
        let cluster = 1 << self.shared.cluster_bits;
        let end = (start + PIECE.max(cluster)).min(self.shared.size());
        self.guarded(|| {
            let mut buffer = Bounce::zeros((end - start) as usize);
            let mut at = start;
            while at < end {
                let next = (at + cluster).min(end);
                if is_below(access, at..next)? {
                    let bytes = &mut buffer.bytes_mut()[..(next - at) as usize];
                    access.read(&mut *bytes, at)?;
                    access.write(&*bytes, at)?;
                }
                at = next;
            }
            access.flush()?;
            self.shared.changed.fetch_add(1, Ordering::AcqRel);
            self.note(access, start, end)
        })?;
        Ok(end)
    }
}

/// Whether a cluster has data that are only below. Where there is nothing at all, it reads as zeros by itself, too.
fn is_below(access: &FormatAccess<ImageFile>, cluster: Range<u64>) -> io::Result<bool> {
    let (mapping, _) = access.get_shallow_mapping(cluster.start, cluster.end - cluster.start)?;
    if !matches!(mapping, ShallowMapping::Indirect { .. }) {
        return Ok(false);
    }
    let mut is_there = false;
    stretches(access, cluster.start, cluster.end, |_, _, mapping| {
        is_there |= !matches!(mapping, Mapping::Zero { .. });
        Ok(())
    })?;
    Ok(is_there)
}

/// Has the header name no image below any more, durably. Nothing else is open for writing, and all else is durable.
pub(super) fn forget_below(image: &ImageFile) -> io::Result<()> {
    // The whole of a block, which storage writes at once or not at all.
    let block = u64::from(image.traits().offset_align);
    let mut start = image.bytes(0..block)?;
    start[BACKING_NAME].fill(0);
    image.put_header(&start)?;
    image.make_durable()
}

/// Why an image cannot be made independent.
pub(super) fn obstacle(header: &Header) -> Option<&'static str> {
    (header.snapshots > 0).then_some(
        "has internal snapshots, which need what is below it as well; remove them first (qemu-img snapshot -d)",
    )
}
