//! Images in a format of their own: qcow2, and VMDK to be read.
//!
//! ```text
//! request ─► table (where clusters are) ─► io_uring, straight from and to the file            cluster is known
//!                     └──► errand ─► worker (imago) ─► answer ─► eventfd ─► io_uring          anything else
//! ```
//!
//! A write that finds no place has a worker make room, and is written by io_uring then; only what is written over as a
//! whole, where something was, goes to a worker with its data.
//!
//! A cluster that may be written in place stays where it is for as long as the image is open: it is zeroed and discarded
//! in place, too. So a reactor may use what the table says without telling anybody, and only workers change it. What
//! workers have changed is in the image's file (in the kernel, that is) before it is answered: a process that is killed
//! loses nothing, one that takes over finds everything, and a flush has nothing to do but to sync files.

mod allocate;
mod chain;
mod create;
pub mod errand;
mod file;
mod flatten;
mod grow;
mod header;
mod independence;
mod order;
mod table;
mod worker;

use std::fs::File;
use std::os::fd::{AsRawFd, RawFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use clap::ValueEnum;
use serde::{Deserialize, Serialize};

pub use chain::ChainError;
use chain::{How, Opened};
pub use create::create;
use errand::{Errand, Inbox};
use file::ImageFile;
use independence::Independence;
pub use independence::{Flattening, StepError};
use table::{Entry, Table};
use tracing::warn;
use utoipa::ToSchema;
use worker::Workers;

use super::layout::{Layout, Place};
use super::write_log::WriteLog;
use crate::disk::Access;
use crate::lock::release;
use crate::open::FileTraits;

/// What the bytes of an image file mean.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Format {
    /// The disk's bytes as they are.
    #[default]
    Raw,
    /// QEMU's: thin, over another image, compressed, in any mixture.
    Qcow2,
    /// VMware's, for reading only.
    Vmdk,
    /// What cryptsetup makes of LUKS2: enciphered, by a key.
    Luks,
}

impl std::fmt::Display for Format {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Format::Raw => "raw",
            Format::Qcow2 => "qcow2",
            Format::Vmdk => "vmdk",
            Format::Luks => "luks",
        })
    }
}

/// An image in a format of its own.
#[derive(Debug)]
pub struct Formatted {
    format: Format,
    path: PathBuf,
    file: File,
    traits: FileTraits,
    how: How,
    /// Files that it names.
    opened: Mutex<Opened>,
    running: Mutex<Option<Arc<Running>>>,
    independence: Independence,
}

impl Formatted {
    /// The image in `file`. Nothing is read yet. All that changes its files goes into `log`, if there is one.
    pub fn new(
        format: Format,
        path: &Path,
        (file, traits): (File, FileTraits),
        (read_only, beside): (bool, bool),
        log: Option<Arc<WriteLog>>,
    ) -> Formatted {
        let how = How { read_only, direct: traits.direct, beside, log };
        Formatted {
            format,
            path: path.to_owned(),
            file,
            traits,
            how,
            opened: Mutex::default(),
            running: Mutex::new(None),
            independence: Independence::default(),
        }
    }

    /// Its format.
    pub fn format(&self) -> Format {
        self.format
    }

    /// The image's own file.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// What that can do.
    pub fn traits(&self) -> FileTraits {
        self.traits
    }

    fn top(&self) -> Result<ImageFile, ChainError> {
        let io = |e| ChainError::Io(self.path.clone(), e);
        let file = self.file.try_clone().map_err(io)?;
        ImageFile::new(0, &self.path, file, self.traits, self.how.log.clone()).map_err(io)
    }

    /// Bytes of the disk, while it may still be somebody else's.
    pub fn look(&self) -> Result<u64, ChainError> {
        if self.format != Format::Qcow2 {
            return Ok(self.run()?.size());
        }
        chain::look(&self.top()?, &self.how, &mut self.opened())
    }

    /// Has it run: read anew if it does not. It has to be ours.
    pub fn run(&self) -> Result<Arc<Running>, ChainError> {
        let mut running = self.running();
        self.forget_below(&mut running);
        self.opened_in(&mut running)
    }

    fn opened_in(&self, running: &mut Option<Arc<Running>>) -> Result<Arc<Running>, ChainError> {
        if let Some(running) = &*running {
            return Ok(Arc::clone(running));
        }
        let chain = chain::open(self.top()?, self.format, &self.how, &mut self.opened())?;
        let new = Arc::new(Running::new(chain).map_err(|e| ChainError::Io(self.path.clone(), e))?);
        *running = Some(Arc::clone(&new));
        Ok(new)
    }

    /// Makes durable what was written, and [rests](Self::rest).
    pub fn hand_over(&self) -> std::io::Result<()> {
        self.stop_flatten();
        let running = self.running().clone();
        running.map_or(Ok(()), |running| running.sync())?;
        self.rest();
        Ok(())
    }

    /// Forgets all that is known of it, which others may change from here on. No queue runs.
    pub fn rest(&self) {
        self.stop_flatten();
        *self.running() = None;
        for (path, file, _) in &*self.opened() {
            release(file).unwrap_or_else(|e| warn!("{} stays locked: {e}", path.display()));
        }
    }

    fn running(&self) -> MutexGuard<'_, Option<Arc<Running>>> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn opened(&self) -> MutexGuard<'_, Opened> {
        self.opened.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// An image in use.
#[derive(Debug)]
pub struct Running {
    shared: Arc<Shared>,
    workers: Workers,
}

/// What reactors and workers have of it.
#[derive(Debug)]
struct Shared {
    files: Vec<ImageFile>,
    /// The file that data are written to.
    data: u8,
    size: AtomicU64,
    /// Bytes of the disk below.
    below: u64,
    cluster_bits: u32,
    read_only: bool,
    table: Table,
    /// How often tables were written, and how often before the last sync.
    changed: AtomicU64,
    synced: AtomicU64,
    /// A worker has failed in a way that says nothing of the state it has left: nothing is changed any more.
    broken: AtomicBool,
    /// A failure was told.
    told: AtomicBool,
}

impl Running {
    fn new(chain: chain::Chain) -> std::io::Result<Running> {
        let size = chain.access.size();
        let cluster_bits = chain.cluster.trailing_zeros();
        let shared = Arc::new(Shared {
            files: chain.files,
            data: chain.data,
            size: size.into(),
            below: chain.below,
            cluster_bits,
            read_only: chain.read_only,
            table: Table::new(size.div_ceil(chain.cluster)),
            changed: AtomicU64::new(0),
            synced: AtomicU64::new(0),
            broken: AtomicBool::new(false),
            told: AtomicBool::new(false),
        });
        let workers = Workers::start(chain.access, Arc::clone(&shared))?;
        Ok(Running { shared, workers })
    }

    /// Bytes of the disk.
    pub fn size(&self) -> u64 {
        self.shared.size()
    }

    /// Makes everything durable that was written.
    pub fn sync(&self) -> std::io::Result<()> {
        self.shared.files.iter().try_for_each(ImageFile::make_durable)
    }
}

/// Most clusters that are looked up at once.
const MAX_TOGETHER: u32 = 1024;

/// An image as the queue of a reactor has it.
pub struct Mapped {
    image: Arc<Running>,
    inbox: Arc<Inbox>,
    in_memory: bool,
}

impl Mapped {
    /// For a queue with `ring_size` slots.
    pub fn new(image: Arc<Running>, ring_size: u16) -> std::io::Result<Mapped> {
        let in_memory = image.shared.files.iter().all(|file| file.traits().in_memory);
        Ok(Mapped { image, inbox: Arc::new(Inbox::new(ring_size)?), in_memory })
    }
}

/// What is to be done about a cluster.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Way {
    File(u8, u64),
    Zeros,
    Elsewhere,
}

impl Shared {
    fn size(&self) -> u64 {
        self.size.load(Ordering::Acquire)
    }

    fn way(&self, access: Access, cluster: u64) -> Way {
        match self.table.get(cluster) {
            Entry::Data { file, offset, writable } if writable || access == Access::Read => {
                Way::File(file, offset)
            }
            Entry::Zeros => Way::Zeros,
            _ => Way::Elsewhere,
        }
    }

    #[inline]
    fn place(&self, access: Access, offset: u64, len: u32) -> Place {
        let size = 1u64 << self.cluster_bits;
        let mut cluster = offset >> self.cluster_bits;
        let first = self.way(access, cluster);
        let inside = offset & (size - 1);
        let mut together = size - inside;
        let mut looks = 1;
        while together < u64::from(len) && looks < MAX_TOGETHER {
            cluster += 1;
            looks += 1;
            let follows = match (first, self.way(access, cluster)) {
                (Way::File(a, at), Way::File(b, next)) => a == b && at + inside + together == next,
                (a, b) => a == b,
            };
            if !follows {
                break;
            }
            together += size;
        }
        let len = together.min(len.into()) as u32;
        match first {
            Way::File(file, at) => match self.files.get(usize::from(file)) {
                Some(file) => Place::File { fd: file.file().as_raw_fd(), offset: at + inside, len },
                None => Place::Elsewhere(len),
            },
            Way::Zeros => Place::Zeros(len),
            Way::Elsewhere => Place::Elsewhere(len),
        }
    }
}

impl Layout for Mapped {
    const BOUNCE_PAGES: usize = 256;
    const HAS_WORKERS: bool = true;

    fn place(&self, access: Access, offset: u64, len: u32) -> Place {
        self.image.shared.place(access, offset, len)
    }

    fn is_in_memory(&self) -> bool {
        self.in_memory
    }

    fn flush_fd(&self, index: usize) -> Option<RawFd> {
        let shared = &self.image.shared;
        // Data first: what is in the image itself points to them.
        let number = match (index, shared.data) {
            (0, data) => data,
            (1, 1..) => 0,
            _ => return None,
        };
        shared.files.get(usize::from(number)).map(|f| f.file().as_raw_fd())
    }

    fn flush_mark(&self) -> u64 {
        self.image.shared.changed.load(Ordering::Acquire)
    }

    fn flushed(&self, mark: u64) {
        self.image.shared.synced.fetch_max(mark, Ordering::Release);
    }

    fn is_behind(&self) -> bool {
        let shared = &self.image.shared;
        shared.synced.load(Ordering::Acquire) < shared.changed.load(Ordering::Acquire)
    }

    fn send(&self, errand: Errand) {
        self.image.workers.send(errand, &self.inbox);
    }

    fn inbox(&self) -> Option<&Inbox> {
        Some(&self.inbox)
    }
}
