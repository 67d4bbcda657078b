//! A file of an image, as `imago` reads and writes it: with its descriptor, for reactors to use as well, and, if it holds a
//! qcow2 image that is written to, in the right [order](super::order).
#![allow(unsafe_code)] // imago has whoever reads and writes promise alignment

use std::fmt;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use imago::io_buffers::{IoBuffer, IoVector, IoVectorMut};
use imago::storage::PreallocateMode;
use imago::storage::drivers::CommonStorageHelper;
use imago::{Storage, StorageExt};
use nix::fcntl::{FallocateFlags, fallocate};
use poll_engine::fault_point;

use super::order::{Disk, Order};
use crate::backend::write_log::{Change, WriteLog};
use crate::open::{FileTraits, size_of};

/// The file itself.
struct Inner {
    number: u8,
    path: PathBuf,
    file: File,
    traits: FileTraits,
    size: AtomicU64,
    is_regular: bool,
    helper: CommonStorageHelper,
    order: OnceLock<Mutex<Order>>,
    /// Something was written that is not durable.
    written: AtomicBool,
    log: Option<Arc<WriteLog>>,
}

impl Inner {
    /// Does something to the file, written down if that is wanted.
    fn logged<T>(&self, change: Change<'_>, act: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
        fault_point::pass("image-changes");
        match &self.log {
            Some(log) => log.around(self.file.as_raw_fd(), change, act),
            None => act(),
        }
    }

    fn sync(&self) -> io::Result<()> {
        self.logged(Change::Sync, || self.file.sync_data())
    }

    /// Zeroes a range in one of the ways of fallocate(2).
    fn clear(&self, how: FallocateFlags, offset: u64, len: u64) -> io::Result<()> {
        let how = how | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        self.logged(Change::Zero { offset, len }, || {
            Ok(fallocate(&self.file, how, offset as i64, len as i64)?)
        })
    }

    fn resize(&self, len: u64) -> io::Result<()> {
        self.logged(Change::Resize(len), || self.file.set_len(len))
    }
}

/// A file of an image. Clones are the same file.
#[derive(Clone)]
pub struct ImageFile(Arc<Inner>);

impl ImageFile {
    /// File number `number` of an image. All that changes it goes into `log`, if there is one.
    pub fn new(
        number: u8,
        path: &Path,
        file: File,
        traits: FileTraits,
        log: Option<Arc<WriteLog>>,
    ) -> io::Result<ImageFile> {
        let size = size_of(file.as_fd()).map_err(io::Error::other)?;
        let is_regular = file.metadata()?.is_file();
        if let Some(log) = &log {
            log.know(&file, path)?;
        }
        Ok(ImageFile(Arc::new(Inner {
            number,
            path: path.to_owned(),
            file,
            traits,
            size: size.into(),
            is_regular,
            helper: CommonStorageHelper::default(),
            order: OnceLock::new(),
            written: AtomicBool::new(false),
            log,
        })))
    }

    /// Its number.
    pub fn number(&self) -> u8 {
        self.0.number
    }

    /// Its name.
    pub fn path(&self) -> &Path {
        &self.0.path
    }

    /// The open file.
    pub fn file(&self) -> &File {
        &self.0.file
    }

    /// What it can do.
    pub fn traits(&self) -> FileTraits {
        self.0.traits
    }

    /// Whether it is a file, which can have holes.
    pub fn is_regular(&self) -> bool {
        self.0.is_regular
    }

    /// Bytes.
    pub fn len(&self) -> u64 {
        self.0.size.load(Ordering::Relaxed)
    }

    /// Reads a range; what is behind the end is zeros.
    pub fn bytes(&self, range: Range<u64>) -> io::Result<Vec<u8>> {
        let len = usize::try_from(range.end.saturating_sub(range.start)).map_err(io::Error::other)?;
        let mut bytes = vec![0; len];
        self.read(&mut bytes, range.start)?;
        Ok(bytes)
    }

    /// Writes the block that the file begins with, past any order.
    pub fn put_header(&self, block: &[u8]) -> io::Result<()> {
        Disk::write(&Raw(&self.0), 0, block)
    }

    /// From here on it is written to in this order.
    pub fn keep_order(&self, order: Order) {
        assert!(self.0.order.set(Mutex::new(order)).is_ok(), "one order");
    }

    /// The order, if there is one.
    pub fn order(&self) -> Option<MutexGuard<'_, Order>> {
        Some(self.0.order.get()?.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Has the header say how large the disk is, durably.
    pub fn set_size(&self, size: u64) -> io::Result<()> {
        let block = self.0.traits.offset_align.into();
        match self.order() {
            Some(mut order) => order.set_size(&Raw(&self.0), block, size),
            None => Err(io::ErrorKind::Unsupported.into()),
        }
    }

    /// Makes all durable that was written.
    pub fn make_durable(&self) -> io::Result<()> {
        if !self.0.written.swap(false, Ordering::Relaxed) {
            return Ok(());
        }
        let synced = self.0.sync();
        match (&synced, self.order()) {
            (Ok(()), Some(mut order)) => order.synced(),
            (Ok(()), None) => {}
            (Err(_), _) => self.0.written.store(true, Ordering::Relaxed),
        }
        synced
    }

    /// Has a range be zeros, which take no space, whether it was there or not.
    pub fn put_zeros(&self, offset: u64, len: u64) -> io::Result<()> {
        let (end, is) = (offset + len, self.len());
        if offset < is {
            self.zero(offset, end.min(is) - offset, true)?;
        } else if let Some(mut order) = self.order() {
            order.before_data(&Raw(&self.0))?;
        }
        if end > is {
            self.0.written.store(true, Ordering::Relaxed);
            self.0.resize(end)?;
            self.0.size.fetch_max(end, Ordering::Relaxed);
        }
        Ok(())
    }

    /// Punches a hole, or zeroes a range in another way that leaves it in place.
    pub fn zero(&self, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
        if let Some(mut order) = self.order() {
            order.before_data(&Raw(&self.0))?;
        }
        self.0.written.store(true, Ordering::Relaxed);
        let how =
            if unmap { FallocateFlags::FALLOC_FL_PUNCH_HOLE } else { FallocateFlags::FALLOC_FL_ZERO_RANGE };
        self.0.clear(how, offset, len)
    }
}

/// The file without any order.
struct Raw<'a>(&'a Inner);

impl Disk for Raw<'_> {
    fn write(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        let align = self.0.traits.mem_align as usize;
        if bytes.as_ptr().addr().is_multiple_of(align) {
            return self.put(offset, bytes);
        }
        let mut buffer = IoBuffer::new(bytes.len(), align)?;
        buffer.as_mut().into_slice().copy_from_slice(bytes);
        self.put(offset, buffer.as_ref().into_slice())
    }

    fn read(&self, range: Range<u64>) -> io::Result<Vec<u8>> {
        // Tables are whole clusters, which are whole blocks.
        let len = (range.end - range.start) as usize;
        let mut buffer = IoBuffer::new(len, self.0.traits.mem_align as usize)?;
        self.get(range.start, buffer.as_mut().into_slice())?;
        Ok(buffer.as_ref().into_slice().to_vec())
    }

    fn sync(&self) -> io::Result<()> {
        self.0.sync()
    }
}

impl Raw<'_> {
    fn put(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.0.written.store(true, Ordering::Relaxed);
        let change = Change::Write { offset, bytes, durable: false };
        self.0.logged(change, || self.0.file.write_all_at(bytes, offset))?;
        self.0.size.fetch_max(offset + bytes.len() as u64, Ordering::Relaxed);
        Ok(())
    }

    /// Reads, and zeros behind the end.
    fn get(&self, mut offset: u64, mut bytes: &mut [u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            match self.0.file.read_at(bytes, offset) {
                Ok(n) => {
                    offset += n as u64;
                    bytes = &mut bytes[n..];
                    // Direct I/O does not go on from an odd end.
                    if n == 0 || offset >= self.0.size.load(Ordering::Relaxed) {
                        bytes.fill(0);
                        return Ok(());
                    }
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }
}

impl Storage for ImageFile {
    fn mem_align(&self) -> usize {
        self.0.traits.mem_align as usize
    }

    fn req_align(&self) -> usize {
        if self.0.traits.direct { self.0.traits.offset_align as usize } else { 1 }
    }

    fn size(&self) -> io::Result<u64> {
        Ok(self.len())
    }

    fn resolve_relative_path<P: AsRef<Path>>(&self, relative: P) -> io::Result<PathBuf> {
        Ok(self.0.path.parent().unwrap_or(Path::new("")).join(relative))
    }

    fn get_filename(&self) -> Option<PathBuf> {
        Some(self.0.path.clone())
    }

    unsafe fn pure_readv(&self, buffers: IoVectorMut<'_>, mut offset: u64) -> io::Result<()> {
        for mut part in buffers.into_inner() {
            Raw(&self.0).get(offset, &mut part)?;
            offset += part.len() as u64;
        }
        Ok(())
    }

    unsafe fn pure_writev(&self, buffers: IoVector<'_>, mut offset: u64) -> io::Result<()> {
        let raw = Raw(&self.0);
        let mut order = self.order();
        for part in buffers.into_inner() {
            match &mut order {
                Some(order) => order.write(&raw, offset, &part)?,
                None => raw.put(offset, &part)?,
            }
            offset += part.len() as u64;
        }
        Ok(())
    }

    unsafe fn pure_write_zeroes(&self, offset: u64, length: u64) -> io::Result<()> {
        self.put_zeros(offset, length)
    }

    fn flush(&self) -> io::Result<()> {
        match self.order() {
            Some(mut order) => order.release(&Raw(&self.0)),
            None => Ok(()),
        }
    }

    fn sync(&self) -> io::Result<()> {
        self.make_durable()
    }

    unsafe fn invalidate_cache(&self) -> io::Result<()> {
        Ok(())
    }

    fn get_storage_helper(&self) -> &CommonStorageHelper {
        &self.0.helper
    }

    fn resize(&self, new_size: u64, _: PreallocateMode) -> io::Result<()> {
        // A data file may be longer than its disk.
        if new_size > self.len() {
            self.0.written.store(true, Ordering::Relaxed);
            self.0.resize(new_size)?;
            self.0.size.store(new_size, Ordering::Relaxed);
        }
        Ok(())
    }
}

impl fmt::Debug for ImageFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0.path.display())
    }
}

impl fmt::Display for ImageFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0.path.display())
    }
}
