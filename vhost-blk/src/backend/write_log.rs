//! All that changes the files of a disk, written down when it begins and when it ends, below formats and above the kernel:
//! what is durable at which moment, and what a [power cut](super::power_cut) may undo.
//!
//! ```text
//! magic │ head [payload] │ head [payload] ...        head: kind, file, id, offset, len, result (little-endian)
//! ```
//!
//! Each head is in the file before what it tells of is begun, or known to have ended by anybody else. So whoever looks how
//! long the log is when a flush has been answered knows that all before that is in it.

use std::collections::HashMap;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use tracing::error;

/// What a log begins with.
pub const MAGIC: [u8; 8] = *b"kwrites1";
/// Bytes of a head.
pub const HEAD_LEN: usize = 40;

/// What a head tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Kind {
    /// There is a file: its number, its size as `len`; the payload, of `result` bytes, is its name.
    File = 1,
    /// A write of the payload, of `len` bytes, begins.
    Write = 2,
    /// The same, and it is durable when it ends.
    DurableWrite = 3,
    /// A range is going to read as zeros.
    Zero = 4,
    /// The file is going to have `len` bytes.
    Resize = 5,
    /// All that has ended by now is durable when this has ended.
    Sync = 6,
    /// What has this id has ended: `result` is 0 or more, of a write its bytes; or a negated errno.
    End = 7,
}

impl Kind {
    /// By its number.
    pub fn of(number: u32) -> Option<Kind> {
        use Kind::{DurableWrite, End, File, Resize, Sync, Write, Zero};
        [File, Write, DurableWrite, Zero, Resize, Sync, End].into_iter().find(|&kind| kind as u32 == number)
    }
}

/// What is told of something.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Head {
    /// What it is.
    pub kind: Kind,
    /// Of which file.
    pub file: u32,
    /// Which change, counted from 1.
    pub id: u64,
    /// Where in the file.
    pub offset: u64,
    /// Bytes.
    pub len: u64,
    /// What came of it.
    pub result: i64,
}

impl Head {
    fn put(&self, into: &mut Vec<u8>) {
        into.extend((self.kind as u32).to_le_bytes());
        into.extend(self.file.to_le_bytes());
        for word in [self.id, self.offset, self.len, self.result as u64] {
            into.extend(word.to_le_bytes());
        }
    }

    /// Out of its bytes.
    pub fn parse(bytes: &[u8; HEAD_LEN]) -> Option<Head> {
        let word = |i: usize| u64::from_le_bytes(std::array::from_fn(|at| bytes[8 + 8 * i + at]));
        let half = |i: usize| u32::from_le_bytes(std::array::from_fn(|at| bytes[4 * i + at]));
        Some(Head {
            kind: Kind::of(half(0))?,
            file: half(1),
            id: word(0),
            offset: word(1),
            len: word(2),
            result: word(3) as i64,
        })
    }
}

/// Something that is going to be done to a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change<'a> {
    /// Bytes are written; `durable`: with `RWF_DSYNC`.
    Write {
        /// Where.
        offset: u64,
        /// What.
        bytes: &'a [u8],
        /// Durable when it has ended.
        durable: bool,
    },
    /// A hole is punched, or zeros are put there in another way; the file stays as long as it is.
    Zero {
        /// Where.
        offset: u64,
        /// How much.
        len: u64,
    },
    /// The file gets this size.
    Resize(u64),
    /// All that was done is made durable.
    Sync,
}

/// Why there is no log.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    /// It would overwrite something.
    #[error("cannot log writes to {0}: it exists; remove it or name another file")]
    Exists(PathBuf),
    /// The system says no.
    #[error("cannot log writes to {0}: {1}")]
    Io(PathBuf, io::Error),
}

#[derive(Debug)]
struct Inner {
    file: File,
    /// Device and inode of the files, by number.
    files: Vec<(u64, u64)>,
    descriptors: HashMap<RawFd, u32>,
    /// Changes begun.
    begun: u64,
    buffer: Vec<u8>,
    failed: bool,
}

/// A log that is being written.
#[derive(Debug)]
pub struct WriteLog {
    path: PathBuf,
    inner: Mutex<Inner>,
}

impl WriteLog {
    /// Makes the file, which must not exist. It goes away again if nothing is ever changed.
    pub fn create(path: &Path) -> Result<WriteLog, LogError> {
        let failed = |e: io::Error| match e.kind() {
            io::ErrorKind::AlreadyExists => LogError::Exists(path.into()),
            _ => LogError::Io(path.into(), e),
        };
        let mut file = OpenOptions::new().append(true).create_new(true).open(path).map_err(failed)?;
        file.write_all(&MAGIC).map_err(failed)?;
        let inner = Inner {
            file,
            files: Vec::new(),
            descriptors: HashMap::new(),
            begun: 0,
            buffer: Vec::new(),
            failed: false,
        };
        Ok(WriteLog { path: path.into(), inner: Mutex::new(inner) })
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes through this descriptor are going to be ones of the file at `path`.
    pub fn know(&self, file: &File, path: &Path) -> io::Result<()> {
        let meta = file.metadata()?;
        let identity = (meta.dev(), meta.ino());
        let mut inner = self.inner();
        let known = inner.files.iter().position(|&known| known == identity);
        let number = known.unwrap_or(inner.files.len()) as u32;
        if known.is_none() {
            inner.files.push(identity);
            let name = path.as_os_str().as_encoded_bytes();
            let (len, result) = (meta.len(), name.len() as i64);
            let head = Head { kind: Kind::File, file: number, id: 0, offset: 0, len, result };
            self.put(&mut inner, head, name);
        }
        inner.descriptors.insert(file.as_raw_fd(), number);
        Ok(())
    }

    /// A change of the file of this descriptor is going to begin; what [`end`](Self::end) wants to know of it.
    pub fn begin(&self, fd: RawFd, change: Change<'_>) -> u64 {
        let mut inner = self.inner();
        let Some(&file) = inner.descriptors.get(&fd) else { return 0 };
        inner.begun += 1;
        let id = inner.begun;
        let (kind, offset, len, bytes) = match change {
            Change::Write { offset, bytes, durable } => {
                let kind = if durable { Kind::DurableWrite } else { Kind::Write };
                (kind, offset, bytes.len() as u64, bytes)
            }
            Change::Zero { offset, len } => (Kind::Zero, offset, len, &[][..]),
            Change::Resize(len) => (Kind::Resize, 0, len, &[][..]),
            Change::Sync => (Kind::Sync, 0, 0, &[][..]),
        };
        self.put(&mut inner, Head { kind, file, id, offset, len, result: 0 }, bytes);
        id
    }

    /// It has ended: bytes, or a negated errno.
    pub fn end(&self, id: u64, result: i64) {
        if id != 0 {
            let head = Head { kind: Kind::End, file: 0, id, offset: 0, len: 0, result };
            self.put(&mut self.inner(), head, &[]);
        }
    }

    /// Does what is written down around it.
    pub fn around<T>(
        &self,
        fd: RawFd,
        change: Change<'_>,
        act: impl FnOnce() -> io::Result<T>,
    ) -> io::Result<T> {
        let id = self.begin(fd, change);
        let done = act();
        let bytes = if let Change::Write { bytes, .. } = change { bytes.len() as i64 } else { 0 };
        let failed = |e: &io::Error| -i64::from(e.raw_os_error().unwrap_or(libc::EIO));
        self.end(id, done.as_ref().map_or_else(failed, |_| bytes));
        done
    }

    fn put(&self, inner: &mut Inner, head: Head, payload: &[u8]) {
        if inner.failed {
            return;
        }
        inner.buffer.clear();
        head.put(&mut inner.buffer);
        inner.buffer.extend(payload);
        if let Err(e) = inner.file.write_all(&inner.buffer) {
            inner.failed = true;
            error!(
                "{}: no more writes are logged, and what is logged is good up to here: {e}",
                self.path.display()
            );
        }
    }
}

impl Drop for WriteLog {
    fn drop(&mut self) {
        if self.inner().begun == 0 {
            // Not in the way of the next start. Somebody else may have removed it.
            let _ = fs::remove_file(&self.path);
        }
    }
}
