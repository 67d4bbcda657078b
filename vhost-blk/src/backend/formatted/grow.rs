//! Making an image larger while it is in use. Guests hear of it when its tables have room for all of it, durably.
//!
//! At every moment in between the image is sound and as large as it was, or as it is to be: a table is written whole
//! before the header points to it, and the header says the new size last. What becomes part of the disk reads as zeros,
//! also where the image below is longer than the disk was.

use std::io;
use std::sync::PoisonError;
use std::sync::atomic::Ordering;

use imago::format::PreallocateMode;
use imago::{FormatAccess, ShallowMapping};

use super::allocate::Batch;
use super::chain::{self, ChainError};
use super::file::ImageFile;
use super::independence::StepError;
use super::worker::Image;
use super::{Format, Formatted};

impl Formatted {
    /// Makes the disk `size` bytes large, unless it is larger. The image has to be ours.
    pub fn grow(&self, size: u64) -> Result<(), StepError> {
        if self.format != Format::Qcow2 || self.how.read_only {
            return Err(StepError::Impossible("cannot be written to"));
        }
        let mut running = self.running();
        let running = self.opened_in(&mut running)?;
        let header = chain::header(&self.top()?)?;
        if header.version == 2 && (header.snapshots > 0 || running.shared.below > running.size()) {
            return Err(StepError::Impossible(
                "is of version 2 and has internal snapshots, or less than what is below it; make it version 3 first \
                 (qemu-img amend -o compat=1.1)",
            ));
        }
        if !header.allows(size) {
            return Err(StepError::Impossible("cannot be that large, with clusters of its size"));
        }
        let grown = running.workers.image().grow(size);
        grown.map_err(|e| ChainError::Io(self.path.clone(), e).into())
    }

    /// Bytes of its disk, if it runs.
    pub fn bytes(&self) -> Option<u64> {
        self.running().as_ref().map(|running| running.size())
    }
}

impl Image {
    fn grow(&self, size: u64) -> io::Result<()> {
        let access = self.access.write().unwrap_or_else(PoisonError::into_inner);
        let Some(access) = &*access else { return Err(io::ErrorKind::BrokenPipe.into()) };
        let shared = &self.shared;
        let old = shared.size();
        if size <= old {
            return Ok(());
        }
        self.guarded(|| {
            // A new L1 table is written whole: what it points to has to be there and counted.
            access.flush()?;
            if let Some(mut order) = shared.files[0].order() {
                order.may_free();
            }
            self.clear_tail(access, old)?;
            let covered = shared.below.min(size);
            if covered > old {
                access.resize_grow(covered, PreallocateMode::Zero)?;
                // As above.
                access.flush()?;
            }
            access.resize_grow(size, PreallocateMode::None)?;
            access.flush()?;
            shared.changed.fetch_add(1, Ordering::AcqRel);
            let mark = shared.changed.load(Ordering::Acquire);
            shared.files.iter().try_for_each(ImageFile::make_durable)?;
            shared.files[0].set_size(size)?;
            shared.synced.fetch_max(mark, Ordering::AcqRel);
            shared.table.grow(size.div_ceil(1 << shared.cluster_bits));
            shared.size.store(size, Ordering::Release);
            // The last cluster is a whole one now.
            self.note(access, old - 1, old)
        })
    }

    /// Has the last cluster hold zeros from the end of the disk on, where it holds anything of its own.
    fn clear_tail(&self, access: &FormatAccess<ImageFile>, end: u64) -> io::Result<()> {
        let cluster = 1u64 << self.shared.cluster_bits;
        let inside = end % cluster;
        if inside == 0 {
            return Ok(());
        }
        let start = end - inside;
        let look = || access.get_shallow_mapping(start, inside);
        if let (ShallowMapping::Raw { writable: false, .. } | ShallowMapping::Special { .. }, _) = look()? {
            self.copy(access, start..end, &mut Batch::default())?;
        }
        if let (ShallowMapping::Raw { storage, offset, .. }, _) = look()? {
            self.is_data(storage, offset, inside)?;
            let (from, len) = (offset + inside, cluster - inside);
            if storage.is_regular() { storage.put_zeros(from, len) } else { storage.zero(from, len, false) }?;
        }
        Ok(())
    }
}
