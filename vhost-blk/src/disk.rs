//! What all queues of one device share: size, geometry, write-cache mode, and where the bytes are.

use std::fs::File;
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
use tracing::{info, warn};

use poll_engine::memory::Ram;

use crate::backend::formatted::{ChainError, Formatted, StepError};
use crate::backend::luks::Volume;
use crate::backend::nvme::Namespace;
use crate::backend::rbd::RbdImage;
use crate::backend::write_log::WriteLog;
use crate::faults::Faults;
use crate::lock::{LockError, lock, outlast, release};
use crate::open::{FileTraits, OpenError};
use crate::share::Device;
use crate::throttle::Throttle;

/// A memento of write-through: every write is durable.
const MODE_WRITETHROUGH: u8 = 1;
/// A memento of write-back: writes are durable after a flush.
const MODE_WRITEBACK: u8 = 2;

/// Reading or writing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// From the disk.
    Read,
    /// To the disk.
    Write,
}

/// What the back end asks drivers to keep to; told in configuration space (virtio 1.3, 5.2.4).
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// `size_max`: bytes of one data segment.
    pub size_max: u32,
    /// `seg_max`: data segments of one request.
    pub seg_max: u32,
    /// Ranges of one discard or write-zeroes request.
    pub max_segments: u32,
    /// Sectors of one such range.
    pub max_range_sectors: u32,
}

/// Where the bytes are.
#[derive(Debug)]
pub enum Storage {
    /// A regular file or block device, and what it can do.
    File(File, FileTraits),
    /// An NVMe namespace, by commands of its own; and its block device, which it is known and locked by, and sized.
    Nvme(Arc<Namespace>, File, FileTraits),
    /// A file that holds a disk in a format of its own.
    Image(Arc<Formatted>),
    /// A file whose data are enciphered.
    Luks(Arc<Volume>),
    /// An image in a Ceph cluster.
    Rbd(Arc<RbdImage>),
    /// Memory, shared by all queues.
    Ram(Arc<Ram>),
    /// Nowhere: writes vanish, reads leave the guest's buffer as it is.
    Null,
}

/// A disk.
#[derive(Debug)]
pub struct Disk {
    storage: Storage,
    capacity: AtomicU64,
    /// Offsets and lengths of requests are multiples of this.
    granularity: u64,
    block_size: u32,
    read_only: bool,
    serial: String,
    limits: Limits,
    /// The mode that was configured.
    cache_writeback: bool,
    writeback: AtomicBool,
    /// Whether anybody knows the mode from this process.
    mode_told: AtomicBool,
    /// For what is said of it.
    path: PathBuf,
    /// Whether the image's lock is ours.
    locked: Mutex<bool>,
    throttle: Throttle,
    /// What it is on, if disks leave each other their share there.
    device: Option<Device>,
    faults: Option<Arc<Faults>>,
    write_log: Option<Arc<WriteLog>>,
}

/// How a disk is to be presented.
#[derive(Clone, Debug)]
pub struct DiskConfig {
    /// Logical block size in bytes: a power of two from 512 to 65536.
    pub block_size: u32,
    /// Refuse writes.
    pub read_only: bool,
    /// What `GET_ID` answers, at most 20 bytes.
    pub serial: String,
    /// Writes are durable only after a flush, until the guest says otherwise.
    pub writeback: bool,
    /// Largest ring a queue may have.
    pub ring_size: u16,
    /// Its image; empty if it has none.
    pub path: PathBuf,
    /// The image is not locked yet: it is another daemon's until the guest arrives.
    pub incoming: bool,
    /// What disks of a reactor have in flight together on a storage device, in requests; 0: whatever they like.
    pub shared_depth: u16,
}

impl Storage {
    /// The file that is locked, if there is one.
    pub fn file(&self) -> Option<(&File, FileTraits)> {
        match self {
            Storage::File(file, traits) | Storage::Nvme(_, file, traits) => Some((file, *traits)),
            Storage::Image(image) => Some((image.file(), image.traits())),
            Storage::Luks(volume) => Some((volume.file(), volume.traits())),
            Storage::Rbd(_) | Storage::Ram(_) | Storage::Null => None,
        }
    }

    /// Another file by which the same is read and written, and which is locked as well: what is under way by it ends before
    /// its locks do.
    fn second(&self) -> Option<&File> {
        if let Storage::Nvme(namespace, ..) = self { Some(namespace.generic()) } else { None }
    }

    fn locked(&self) -> impl Iterator<Item = &File> {
        self.file().map(|(file, _)| file).into_iter().chain(self.second())
    }

    /// Bytes that a block of it has at least.
    pub fn least_block(&self) -> u32 {
        match self {
            Storage::Luks(volume) => volume.sector(),
            Storage::File(..)
            | Storage::Nvme(..)
            | Storage::Image(_)
            | Storage::Rbd(_)
            | Storage::Ram(_)
            | Storage::Null => 512,
        }
    }

    /// Whether ranges can be given up.
    pub fn discards(&self) -> bool {
        match self {
            Storage::Luks(volume) => volume.discards(),
            Storage::File(..)
            | Storage::Nvme(..)
            | Storage::Image(_)
            | Storage::Rbd(_)
            | Storage::Ram(_)
            | Storage::Null => true,
        }
    }
}

/// Why a disk is not ours.
#[derive(Debug, thiserror::Error)]
pub enum AcquireError {
    /// Somebody else has it.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// It is not what it was.
    #[error(transparent)]
    Image(#[from] ChainError),
}

impl Disk {
    /// A disk of `capacity` bytes in `storage`.
    pub fn new(storage: Storage, capacity: u64, config: &DiskConfig) -> Disk {
        let granularity = match &storage {
            Storage::File(_, traits) | Storage::Nvme(_, _, traits) => u64::from(traits.offset_align),
            Storage::Image(image) => u64::from(image.traits().offset_align),
            Storage::Luks(volume) => u64::from(volume.traits().offset_align.max(volume.sector())),
            Storage::Rbd(_) | Storage::Ram(_) | Storage::Null => 512,
        };
        // In memory, ranges are zeroed on the reactor: small ones, so that neighbours do not wait. For other files the
        // kernel does it, elsewhere.
        let on_reactor = match &storage {
            Storage::File(_, traits) => traits.in_memory,
            Storage::Image(_) | Storage::Luks(_) | Storage::Nvme(..) | Storage::Rbd(_) => false,
            Storage::Ram(_) | Storage::Null => true,
        };
        let max_range_sectors = if on_reactor { 1 << 13 } else { 1 << 22 };
        let limits = Limits {
            size_max: 1 << 20,
            // Header and status need a descriptor each.
            seg_max: u32::from(config.ring_size).saturating_sub(2).clamp(1, 126),
            max_segments: 32,
            max_range_sectors,
        };
        let depth = u32::from(config.shared_depth);
        let medium = storage.file().filter(|(_, traits)| depth > 0 && !traits.in_memory);
        let device = medium.map(|(file, _)| Device::of(file, depth));
        Disk {
            block_size: config.block_size.max(storage.least_block()),
            storage,
            device,
            capacity: AtomicU64::new(capacity),
            granularity,
            read_only: config.read_only,
            serial: config.serial.clone(),
            limits,
            cache_writeback: config.writeback,
            writeback: AtomicBool::new(config.writeback),
            mode_told: AtomicBool::new(false),
            path: config.path.clone(),
            locked: Mutex::new(!config.incoming),
            throttle: Throttle::default(),
            faults: None,
            write_log: None,
        }
    }

    /// With these faults, and with all that changes its files written down here.
    #[must_use]
    pub fn with_faults(self, faults: Option<Faults>, write_log: Option<Arc<WriteLog>>) -> Disk {
        let faults = faults.filter(Faults::strike).map(Arc::new);
        Disk { faults, write_log, ..self }
    }

    /// What is to go wrong with its requests on purpose.
    pub fn faults(&self) -> Option<&Arc<Faults>> {
        self.faults.as_ref()
    }

    /// Where all that changes its files is to be written down.
    pub fn write_log(&self) -> Option<&Arc<WriteLog>> {
        self.write_log.as_ref()
    }

    /// The image, for what is said of it.
    pub fn path(&self) -> &std::path::Path {
        &self.path
    }

    /// Makes the image ours before its first queue runs, if it is not yet: it may have been another daemon's until now.
    pub fn acquire(&self) -> Result<(), AcquireError> {
        self.acquire_file()?;
        match &self.storage {
            Storage::Image(image) => drop(image.run()?),
            // From here on the program hears signals.
            Storage::Rbd(image) => image.watch(),
            _ => {}
        }
        Ok(())
    }

    fn acquire_file(&self) -> Result<(), OpenError> {
        let Some((file, traits)) = self.storage.file() else { return Ok(()) };
        let mut locked = self.locked.lock().unwrap_or_else(PoisonError::into_inner);
        if *locked {
            return Ok(());
        }
        for file in self.storage.locked() {
            lock(file, !self.read_only)
                .map_err(|error| OpenError::Lock { path: self.path.clone(), error })?;
        }
        *locked = true;
        info!("{} is locked again: its guest runs here", self.path.display());
        if !traits.direct && !traits.in_memory {
            // What the page cache has of it may be from before another host wrote to it.
            posix_fadvise(file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED)
                .unwrap_or_else(|e| warn!("{}: the page cache may be stale: {e}", self.path.display()));
        }
        Ok(())
    }

    /// Waits for the end of all that another process, which has died, had begun.
    pub fn reclaim(&self) -> Result<(), OpenError> {
        // What is done in memory ends with the thread that does it.
        if let Storage::Image(image) = &self.storage {
            // It may have been changed there.
            image.rest();
        }
        let mut files = self.storage.locked();
        let outlasted = files.try_for_each(outlast);
        outlasted.map_err(|error| OpenError::Lock { path: self.path.clone(), error })
    }

    /// Makes everything written visible to whoever takes the image over, and gives up its lock. Where the former fails
    /// the lock stays, so that nobody goes on with less than was written.
    pub fn hand_over(&self) {
        if let Storage::Rbd(image) = &self.storage {
            // Its lock goes to whoever writes next, by way of the cluster.
            return image.flush().unwrap_or_else(|e| warn!("{}: {e}", self.path.display()));
        }
        let Some((file, _)) = self.storage.file() else { return };
        let mut locked = self.locked.lock().unwrap_or_else(PoisonError::into_inner);
        if !*locked {
            return;
        }
        let rests = match &self.storage {
            Storage::Image(image) => image.hand_over(),
            _ => Ok(()),
        };
        let done = rests
            .and_then(|()| file.sync_data())
            .map_err(LockError::from)
            .and_then(|()| self.storage.locked().try_for_each(release));
        match done {
            Ok(()) => {
                *locked = false;
                info!("{} is unlocked: its guest may go on elsewhere", self.path.display());
            }
            Err(e) => warn!("{} stays locked, its guest cannot go on elsewhere: {e}", self.path.display()),
        }
    }

    /// What keeps it to its limits.
    #[inline]
    pub fn throttle(&self) -> &Throttle {
        &self.throttle
    }

    /// The storage device that it shares with others of a reactor, if it does.
    pub fn device(&self) -> Option<Device> {
        self.device
    }

    /// Requests that wait for a cluster of other machines, and how often it has not answered for long; if it is in one.
    pub fn waits(&self) -> Option<(u64, u64)> {
        if let Storage::Rbd(image) = &self.storage { Some(image.waits()) } else { None }
    }

    /// Where the bytes are.
    pub fn storage(&self) -> &Storage {
        &self.storage
    }

    /// Size in bytes.
    pub fn capacity(&self) -> u64 {
        self.capacity.load(Ordering::Relaxed)
    }

    /// Whether a request may touch these bytes.
    #[inline]
    pub fn contains(&self, offset: u64, len: u64) -> bool {
        let aligned = (offset | len) & (self.granularity - 1) == 0;
        aligned && offset.checked_add(len).is_some_and(|end| end <= self.capacity())
    }

    /// What offsets and lengths of requests are multiples of, bytes.
    #[inline]
    pub fn granularity(&self) -> u32 {
        self.granularity as u32
    }

    /// Logical block size in bytes.
    pub fn block_size(&self) -> u32 {
        self.block_size
    }

    /// Whether a guest may discard ranges.
    pub fn discards(&self) -> bool {
        !self.read_only && self.storage.discards()
    }

    /// Whether writes are refused.
    #[inline]
    pub fn is_read_only(&self) -> bool {
        self.read_only
    }

    /// The serial number.
    pub fn serial(&self) -> &str {
        &self.serial
    }

    /// What drivers are to keep to.
    #[inline]
    pub fn limits(&self) -> Limits {
        self.limits
    }

    /// Whether the write cache is on, as the guest last set it.
    #[inline]
    pub fn writeback(&self) -> bool {
        self.writeback.load(Ordering::Relaxed)
    }

    /// The mode, for somebody who will rely on it.
    pub fn tell_writeback(&self) -> bool {
        self.mode_told.store(true, Ordering::Relaxed);
        self.writeback()
    }

    /// Whether the write cache is on to begin with.
    pub fn default_writeback(&self) -> bool {
        self.cache_writeback
    }

    /// The guest turns the write cache on or off.
    pub fn set_writeback(&self, on: bool) {
        self.writeback.store(on, Ordering::Relaxed);
        self.mode_told.store(true, Ordering::Relaxed);
    }

    /// A reset turns the cache off if it was so to begin with, and never on. Virtio 1.3, 5.2.5: "The cache mode after reset
    /// can be either writeback or writethrough", and a driver reads it. But QEMU answers from what it has read or written
    /// last, also after a reset, and resets us when its machine is only stopped: a guest that believes the cache is off
    /// does not flush.
    pub fn reset_writeback(&self) {
        self.writeback.fetch_and(self.cache_writeback, Ordering::Relaxed);
    }

    /// A queue is about to run that keeps to the mode. Whoever was never told it by us knows it from an earlier process,
    /// and may have turned the cache off there.
    pub fn settle_writeback(&self) {
        if !self.mode_told.swap(true, Ordering::Relaxed) && self.writeback.swap(false, Ordering::Relaxed) {
            info!(
                "{}: its front end knows the write-cache mode from an earlier process; going on with write-through",
                self.path.display()
            );
        }
    }

    /// The mode as the next process is to find it.
    pub fn mode_memento(&self) -> u8 {
        if self.writeback() { MODE_WRITEBACK } else { MODE_WRITETHROUGH }
    }

    /// The mode as another process has left it. It turns the cache on only when nothing better is known.
    pub fn recall_mode(&self, memento: u8) {
        match memento {
            MODE_WRITETHROUGH => self.set_writeback(false),
            MODE_WRITEBACK if !self.mode_told.load(Ordering::Relaxed) => self.set_writeback(true),
            _ => {}
        }
    }

    /// Goes on with the size and the write cache that a guest has seen of the same disk in another process. A file that
    /// has grown meanwhile is looked at when [`grow`](Self::grow) is called.
    pub fn adopt(&self, capacity: u64, writeback: bool) {
        self.capacity.store(capacity, Ordering::Relaxed);
        self.set_writeback(writeback);
    }

    /// Makes an image in a format of its own this large. [`grow`](Self::grow) takes the new size over.
    pub fn grow_image(&self, image: &Formatted, size: u64) -> Result<(), StepError> {
        // It stays ours meanwhile.
        let locked = self.locked.lock().unwrap_or_else(PoisonError::into_inner);
        if !*locked {
            return Err(StepError::Impossible(
                "is not here: its guest has gone elsewhere, or has not come yet; grow it there",
            ));
        }
        image.grow(size)
    }

    /// Looks whether the file has grown, and takes the new size over; the new size, if so. A file that has shrunk keeps
    /// its size: requests beyond its end fail one by one.
    pub fn grow(&self) -> Result<Option<u64>, OpenError> {
        let size = match &self.storage {
            Storage::File(file, _) | Storage::Nvme(_, file, _) => crate::open::size_of(file.as_fd())?,
            Storage::Luks(volume) => volume.size()?,
            Storage::Rbd(image) => image.size()?,
            // Nobody else may resize it while it is ours.
            Storage::Image(image) => image.bytes().unwrap_or(0),
            Storage::Ram(_) | Storage::Null => return Ok(None),
        };
        let size = size - size % u64::from(self.block_size);
        if size <= self.capacity() {
            return Ok(None);
        }
        self.capacity.store(size, Ordering::Relaxed);
        Ok(Some(size))
    }
}
