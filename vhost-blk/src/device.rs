//! The block device's face to the engine: features, configuration space, queues (virtio 1.3, 5.2.3 to 5.2.5).

use std::io;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use poll_engine::device::{ConfigRefused, Device, QueueHandler, StateRefused};
use poll_engine::engine::placement::topology::{SYSFS, node_of_file};
use poll_engine::engine::wanted::WantedOn;
use poll_engine::ring::inflight::Memento;

use crate::backend::Backend;
use crate::backend::fault::Faulty;
use crate::backend::formatted::Mapped;
use crate::backend::layout::{Layout, Logged, Plain};
use crate::backend::luks::Ciphered;
use crate::backend::null::Null;
use crate::backend::nvme::NvmeBackend;
use crate::backend::ram::RamBackend;
use crate::backend::rbd::RbdBackend;
use crate::backend::sync::SyncBackend;
use crate::backend::uring::UringBackend;
use crate::disk::{Disk, Storage};
use crate::open::FileTraits;
use crate::queue::BlkQueue;
use crate::record::Recorder;
use crate::record::tap::Tap;

/// `VIRTIO_BLK_F_SIZE_MAX`: segments have a largest size.
pub const F_SIZE_MAX: u64 = 1 << 1;
/// `VIRTIO_BLK_F_SEG_MAX`: requests have a largest number of segments.
pub const F_SEG_MAX: u64 = 1 << 2;
/// `VIRTIO_BLK_F_RO`: the disk is read-only.
pub const F_RO: u64 = 1 << 5;
const F_BLK_SIZE: u64 = 1 << 6;
/// `VIRTIO_BLK_F_FLUSH`: there is a cache that can be flushed.
pub const F_FLUSH: u64 = 1 << 9;
const F_TOPOLOGY: u64 = 1 << 10;
const F_CONFIG_WCE: u64 = 1 << 11;
const F_MQ: u64 = 1 << 12;
/// `VIRTIO_BLK_F_DISCARD`: ranges can be discarded.
pub const F_DISCARD: u64 = 1 << 13;
/// `VIRTIO_BLK_F_WRITE_ZEROES`: ranges can be zeroed.
pub const F_WRITE_ZEROES: u64 = 1 << 14;

/// Bytes of `struct virtio_blk_config` up to and with the write-zeroes fields.
pub const CONFIG_LEN: usize = 60;
/// What a guest takes along: this, the version, and the write-cache mode (1 is write-back).
const STATE: [u8; 4] = *b"kblk";
const STATE_VERSION: u8 = 1;

/// Offset of the `writeback` byte, the only writable one.
const CONFIG_WRITEBACK: u32 = 32;

/// A disk offered as a virtio device.
#[derive(Debug)]
pub struct BlkDevice {
    disk: Arc<Disk>,
    num_queues: u16,
    ring_size: u16,
    recorder: Mutex<Option<Arc<Recorder>>>,
    withheld: u64,
    node: Option<usize>,
    wanted_on: WantedOn,
    /// Where the mode is left to the next process.
    memento: Mutex<Option<Memento>>,
}

impl BlkDevice {
    /// `disk` with this many queues of at most this size, its requests captured by `recorder`.
    pub fn new(
        disk: Arc<Disk>,
        num_queues: u16,
        ring_size: u16,
        recorder: Option<Arc<Recorder>>,
    ) -> BlkDevice {
        let (recorder, wanted_on) = (Mutex::new(recorder), WantedOn::default());
        let memento = Mutex::default();
        let node = node_of_file(SYSFS.as_ref(), disk.path());
        BlkDevice { disk, num_queues, ring_size, recorder, withheld: 0, node, wanted_on, memento }
    }

    /// Has these queues on this reactor when they start next.
    pub fn want_on(&self, queues: Range<u16>, reactor: usize) {
        self.wanted_on.set(queues, reactor);
    }

    /// Has queues that start from now on captured by this one, or by none.
    pub fn set_recorder(&self, recorder: Option<Arc<Recorder>>) {
        *self.recorder.lock().unwrap_or_else(PoisonError::into_inner) = recorder;
    }

    /// Without these features of the engine.
    #[must_use]
    pub fn without(self, features: u64) -> BlkDevice {
        BlkDevice { withheld: features, ..self }
    }

    /// Leaves the mode to the process that comes after this one if it is killed.
    fn leave_mode(&self) {
        let memento = self.memento.lock().unwrap_or_else(PoisonError::into_inner);
        memento.iter().for_each(|memento| memento.write(&[self.disk.mode_memento()]));
    }

    fn config(&self) -> [u8; CONFIG_LEN] {
        let disk = &self.disk;
        let limits = disk.limits();
        let mut c = [0; CONFIG_LEN];
        let mut put = |at: usize, bytes: &[u8]| c[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, &(disk.capacity() / 512).to_le_bytes());
        put(8, &limits.size_max.to_le_bytes());
        put(12, &limits.seg_max.to_le_bytes());
        put(20, &disk.block_size().to_le_bytes());
        // Topology: physical_block_exp and alignment_offset 0, min_io_size one block, opt_io_size none in particular.
        put(26, &1u16.to_le_bytes());
        put(CONFIG_WRITEBACK as usize, &[u8::from(disk.writeback())]);
        put(34, &self.num_queues.to_le_bytes());
        let block_sectors = disk.block_size() / 512;
        put(36, &limits.max_range_sectors.to_le_bytes());
        put(40, &limits.max_segments.to_le_bytes());
        put(44, &block_sectors.to_le_bytes());
        put(48, &limits.max_range_sectors.to_le_bytes());
        put(52, &limits.max_segments.to_le_bytes());
        put(56, &[1]);
        c
    }
}

impl Device for BlkDevice {
    fn features(&self) -> u64 {
        let common = F_SIZE_MAX | F_SEG_MAX | F_BLK_SIZE | F_TOPOLOGY | F_FLUSH | F_CONFIG_WCE | F_MQ;
        let writes = if self.disk.is_read_only() { F_RO } else { F_WRITE_ZEROES };
        common | writes | if self.disk.discards() { F_DISCARD } else { 0 }
    }

    fn completes_in_order(&self) -> bool {
        if self.disk.faults().is_some() || self.disk.write_log().is_some() {
            return false;
        }
        // What is done while a request is taken is done in order; the kernel finishes what it is given as it likes.
        match self.disk.storage() {
            Storage::Null | Storage::Ram(_) => true,
            Storage::File(_, traits) => traits.in_memory,
            Storage::Image(_) | Storage::Luks(_) | Storage::Nvme(..) | Storage::Rbd(_) => false,
        }
    }

    fn withheld_features(&self) -> u64 {
        self.withheld
    }

    fn num_queues(&self) -> u16 {
        self.num_queues
    }

    fn max_ring_size(&self) -> u16 {
        self.ring_size
    }

    fn read_config(&self, offset: u32, into: &mut [u8]) {
        let config = self.config();
        let from = config.get(offset as usize..).unwrap_or_default();
        let n = from.len().min(into.len());
        into[..n].copy_from_slice(&from[..n]);
        into[n..].fill(0);
        let writeback = (CONFIG_WRITEBACK as usize).checked_sub(offset as usize);
        if let Some(byte) = writeback.and_then(|at| into.get_mut(at)) {
            *byte = self.disk.tell_writeback().into();
        }
    }

    fn write_config(&self, offset: u32, bytes: &[u8]) -> Result<(), ConfigRefused> {
        match (offset, bytes) {
            (CONFIG_WRITEBACK, [mode @ 0..=1]) => {
                self.disk.set_writeback(*mode == 1);
                self.leave_mode();
                Ok(())
            }
            _ => Err(ConfigRefused { offset, end: offset.saturating_add(bytes.len() as u32) }),
        }
    }

    fn adopt_config(&self, config: &[u8]) -> Result<(), String> {
        let ours = self.config();
        let theirs = config.get(..CONFIG_LEN).ok_or("its configuration space is shorter")?;
        let differs = |at: std::ops::Range<usize>| ours[at.clone()] != theirs[at];
        // Behind the capacity, and around the writeback byte.
        let fixed = [
            (20..24, "--block-size"),
            (34..36, "--num-queues"),
            (12..16, "--queue-size"),
            (8..CONFIG_WRITEBACK as usize, "its geometry or a limit"),
            (CONFIG_WRITEBACK as usize + 1..CONFIG_LEN, "its geometry or a limit"),
        ];
        if let Some((_, what)) = fixed.into_iter().find(|(at, _)| differs(at.clone())) {
            return Err(format!("{what} differs"));
        }
        let sectors = u64::from_le_bytes(std::array::from_fn(|i| theirs[i]));
        let is_fixed = matches!(self.disk.storage(), Storage::Ram(_) | Storage::Null);
        if is_fixed && sectors != self.disk.capacity() / 512 {
            return Err("the size of --backend differs".into());
        }
        self.disk.adopt(sectors * 512, theirs[CONFIG_WRITEBACK as usize] == 1);
        Ok(())
    }

    fn save_state(&self) -> Option<Vec<u8>> {
        Some([&STATE[..], &[STATE_VERSION, self.disk.writeback().into()]].concat())
    }

    fn load_state(&self, state: &[u8]) -> Result<(), StateRefused> {
        match state.strip_prefix(&STATE) {
            Some([STATE_VERSION, mode @ 0..=1]) => {
                self.disk.set_writeback(*mode == 1);
                Ok(())
            }
            Some([version, ..]) if *version != STATE_VERSION => Err(StateRefused(format!(
                "it has version {version} and this program knows {STATE_VERSION}: use the same release at both ends"
            ))),
            Some(_) => Err(StateRefused("it is cut short or damaged".into())),
            None => Err(StateRefused(format!("its {} bytes are no disk's", state.len()))),
        }
    }

    fn acquire(&self) -> io::Result<()> {
        self.disk.acquire().map_err(io::Error::other)
    }

    fn hand_over(&self) {
        self.disk.hand_over();
    }

    fn reclaim(&self) -> io::Result<()> {
        self.disk.reclaim().map_err(io::Error::other)
    }

    fn start_queue(&self, index: u16, features: u64, ring_size: u16) -> io::Result<Box<dyn QueueHandler>> {
        let disk = Arc::clone(&self.disk);
        // 5.2.5.1: a driver that does not know FLUSH never flushes; one that does expects a cache, or sets the mode if it
        // has CONFIG_WCE as well.
        let cache = match (features & F_FLUSH != 0, features & F_CONFIG_WCE != 0) {
            (false, _) => Cache::Fixed(false),
            (true, false) => Cache::Fixed(disk.default_writeback()),
            (true, true) => Cache::AsConfigured,
        };
        if cache == Cache::AsConfigured && disk.storage().file().is_some() {
            disk.settle_writeback();
        }
        self.leave_mode();
        let recorder = self.recorder.lock().unwrap_or_else(PoisonError::into_inner);
        let tap = recorder.as_ref().and_then(|r| r.tap(index));
        let start = Start { disk: Arc::clone(&disk), index, ring_size, cache, tap };
        Ok(match disk.storage() {
            Storage::Null => start.on(Null),
            Storage::Rbd(image) => {
                start.on(RbdBackend::new(Arc::clone(image), Arc::clone(&disk), ring_size)?)
            }
            Storage::Ram(ram) => start.on(RamBackend::new(Arc::clone(ram), Arc::clone(&disk))),
            // What is done at once is not what a log is for.
            Storage::File(file, traits) if traits.in_memory && disk.write_log().is_none() => {
                start.on(SyncBackend::new(file.try_clone()?, Arc::clone(&disk)))
            }
            Storage::File(file, traits) => {
                let layout = Plain(file.try_clone()?);
                if let Some(log) = disk.write_log() {
                    log.know(&layout.0, disk.path())?;
                }
                start.on_files(layout, *traits)
            }
            Storage::Nvme(namespace, ..) => {
                start.on(NvmeBackend::new(Arc::clone(namespace), Arc::clone(&disk), cache, ring_size)?)
            }
            Storage::Luks(volume) => {
                let layout = Ciphered::new(volume)?;
                if let Some(log) = disk.write_log() {
                    log.know(layout.file(), disk.path())?;
                }
                start.on_files(layout, volume.traits())
            }
            Storage::Image(image) => {
                let layout = Mapped::new(image.run().map_err(io::Error::other)?, ring_size)?;
                start.on_files(layout, image.traits())
            }
        })
    }

    fn reactor(&self, index: u16) -> Option<usize> {
        self.wanted_on.of(index)
    }

    fn node(&self) -> Option<usize> {
        self.node
    }

    fn reset(&self) {
        self.disk.reset_writeback();
    }

    fn keep(&self, memento: Option<Memento>) {
        let left = memento.as_ref().map(Memento::read);
        self.disk.recall_mode(left.and_then(|bytes| bytes.first().copied()).unwrap_or(0));
        *self.memento.lock().unwrap_or_else(PoisonError::into_inner) = memento;
    }
}

/// A queue that is about to run, but for its back end.
struct Start {
    disk: Arc<Disk>,
    index: u16,
    ring_size: u16,
    cache: Cache,
    tap: Option<Tap>,
}

impl Start {
    fn on_files<L: Layout>(self, layout: L, traits: FileTraits) -> Box<dyn QueueHandler> {
        let (disk, cache, ring_size) = (Arc::clone(&self.disk), self.cache, self.ring_size);
        match disk.write_log().map(Arc::clone) {
            Some(log) => self.on(UringBackend::new(Logged(layout, log), traits, disk, cache, ring_size)),
            None => self.on(UringBackend::new(layout, traits, disk, cache, ring_size)),
        }
    }

    fn on<B: Backend>(self, backend: B) -> Box<dyn QueueHandler> {
        let Start { disk, index, ring_size, tap, .. } = self;
        let Some(faults) = disk.faults().map(Arc::clone) else {
            return Box::new(BlkQueue::new(disk, backend, tap));
        };
        // Each queue has its own.
        let seed = faults.seed.map_or_else(|| fastrand::u64(..), |seed| seed.wrapping_add(index.into()));
        let faulty = Faulty::new(backend, faults, seed, ring_size);
        Box::new(BlkQueue::new(disk, faulty, tap))
    }
}

/// Which write-cache mode a queue keeps to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cache {
    /// What configuration space says at the time.
    AsConfigured,
    /// Write-back, or write-through.
    Fixed(bool),
}
