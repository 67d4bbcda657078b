//! Opening an image: what it is, how large, what alignment direct I/O wants, and whether it is ours.

use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, OFlags, StatxFlags, statx};
use rustix::process::{PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};

use crate::lock::{LockError, lock, lock_beside};

/// Why an image cannot be used. Each names the file and what to do.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// Missing, forbidden, a directory.
    #[error("cannot open {path}{how}: {error}")]
    Open {
        /// The file.
        path: PathBuf,
        /// What was tried and what else could be.
        how: &'static str,
        /// What the system said.
        error: io::Error,
    },
    /// Neither file nor block device.
    #[error("{0} is neither a regular file nor a block device")]
    Kind(PathBuf),
    /// Nothing in it.
    #[error("{0} is empty; give it a size, for example with truncate -s 10G")]
    Empty(PathBuf),
    /// A size that the guest could not address whole.
    #[error(
        "{path} has {size} bytes, no multiple of the block size {block_size}; resize it or change --block-size"
    )]
    Size {
        /// The file.
        path: PathBuf,
        /// Bytes.
        size: u64,
        /// Bytes.
        block_size: u32,
    },
    /// The block size is finer than direct I/O allows.
    #[error("direct I/O on {path} needs blocks of {align} bytes; use --block-size {align} or --direct off")]
    Alignment {
        /// The file.
        path: PathBuf,
        /// Bytes.
        align: u32,
    },
    /// Somebody else uses it.
    #[error("cannot use {path}: {error}")]
    Lock {
        /// The file.
        path: PathBuf,
        /// Who.
        error: LockError,
    },
    /// The process that we take over from serves something else under that name.
    #[error(
        "{0} is not the image that the running process serves here (it was moved or replaced); name that one, or stop the running process first"
    )]
    Other(PathBuf),
    /// Its size cannot be read.
    #[error("cannot read the size: {0}")]
    Stat(#[from] io::Error),
}

/// `TMPFS_MAGIC` of statfs(2).
const TMPFS_MAGIC: i64 = 0x0102_1994;

/// What an open image can do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FileTraits {
    /// Opened with `O_DIRECT`.
    pub direct: bool,
    /// On a file system that keeps its files in memory (tmpfs).
    pub in_memory: bool,
    /// Alignment of buffers in memory, bytes.
    pub mem_align: u32,
    /// Alignment of file offsets and lengths, bytes.
    pub offset_align: u32,
}

/// Bytes of a regular file or block device.
pub fn size_of(fd: BorrowedFd<'_>) -> Result<u64, OpenError> {
    let mut file = File::from(fd.try_clone_to_owned()?);
    Ok(file.seek(SeekFrom::End(0))?)
}

/// Whose an image is when it is opened.
#[derive(Clone, Copy, Debug)]
pub enum Owner<'a> {
    /// Ours, by its lock.
    Us,
    /// Ours beside the process that we take over from: this is its opening of the same image, with its locks.
    Beside(&'a File),
    /// Another daemon's, until the guest arrives: it is not locked yet.
    Another,
}

/// Opens the image at `path` for a disk with blocks of `block_size` bytes, and locks it if it is to be ours; its size
/// comes with it.
pub fn open(
    path: &Path,
    read_only: bool,
    direct: bool,
    block_size: u32,
    owner: Owner<'_>,
) -> Result<(File, FileTraits, u64), OpenError> {
    let (file, traits) = match passed(path) {
        Some(number) => open_by(path, read_only, direct, |flags| adopt(number, read_only, flags))?,
        None => open_file(path, read_only, direct)?,
    };
    let size = size_of(file.as_fd())?;
    if !size.is_multiple_of(u64::from(block_size)) {
        return Err(OpenError::Size { path: path.to_owned(), size, block_size });
    }
    if traits.offset_align > block_size {
        return Err(OpenError::Alignment { path: path.to_owned(), align: traits.offset_align });
    }
    own(path, &file, read_only, owner)?;
    Ok((file, traits, size))
}

/// Locks an open image if it is to be ours.
pub fn own(path: &Path, file: &File, read_only: bool, owner: Owner<'_>) -> Result<(), OpenError> {
    match owner {
        Owner::Us => lock(file, !read_only),
        Owner::Beside(theirs) if is_same(file, theirs)? => lock_beside(file, !read_only),
        Owner::Beside(_) => return Err(OpenError::Other(path.to_owned())),
        Owner::Another => Ok(()),
    }
    .map_err(|error| OpenError::Lock { path: path.to_owned(), error })
}

/// As [`own`], another file by which the same disk is read and written.
pub fn own_too(path: &Path, file: &File, read_only: bool, owner: Owner<'_>) -> Result<(), OpenError> {
    match owner {
        Owner::Us => lock(file, !read_only),
        Owner::Beside(_) => lock_beside(file, !read_only),
        Owner::Another => Ok(()),
    }
    .map_err(|error| OpenError::Lock { path: path.to_owned(), error })
}

/// The number of a descriptor that this process was started with, if that is what `path` names: `/dev/fd/N`.
pub fn passed(path: &Path) -> Option<i32> {
    path.to_str()?.strip_prefix("/dev/fd/")?.parse().ok()
}

/// An inherited descriptor, as opening its file with these flags would have it. Nothing is opened.
fn adopt(number: i32, read_only: bool, flags: i32) -> io::Result<File> {
    let own = pidfd_open(rustix::process::getpid(), PidfdFlags::empty())?;
    let file = File::from(pidfd_getfd(own, number, PidfdGetfdFlags::empty())?);
    let has = rustix::fs::fcntl_getfl(&file)?;
    let wanted = if read_only { OFlags::RDONLY } else { OFlags::RDWR };
    let mode = has & OFlags::RWMODE;
    if mode != OFlags::RDWR && mode != wanted {
        return Err(io::Error::from_raw_os_error(libc::EACCES));
    }
    rustix::fs::fcntl_setfl(&file, has | OFlags::from_bits_retain(flags as u32))?;
    Ok(file)
}

/// Opens a file or block device that holds a disk or a part of one; it is not locked.
pub fn open_file(path: &Path, read_only: bool, direct: bool) -> Result<(File, FileTraits), OpenError> {
    open_by(path, read_only, direct, |flags| {
        OpenOptions::new().read(true).write(!read_only).custom_flags(flags).open(path)
    })
}

fn open_by(
    path: &Path,
    read_only: bool,
    direct: bool,
    with: impl Fn(i32) -> io::Result<File>,
) -> Result<(File, FileTraits), OpenError> {
    // O_NONBLOCK keeps a named pipe from holding us up; files and block devices do not care.
    let file = with(libc::O_NONBLOCK).map_err(|error| {
        let denied = matches!(error.raw_os_error(), Some(libc::EACCES | libc::EROFS | libc::EPERM));
        let how = if denied && !read_only { " for writing (use --read-only to only read it)" } else { "" };
        OpenError::Open { path: path.to_owned(), how, error }
    })?;
    let kind = file.metadata()?.file_type();
    if !kind.is_file() && !kind.is_block_device() {
        return Err(OpenError::Kind(path.to_owned()));
    }
    if size_of(file.as_fd())? == 0 {
        return Err(OpenError::Empty(path.to_owned()));
    }
    // Device nodes lie on a tmpfs too; what they stand for does not.
    let in_memory =
        kind.is_file() && rustix::fs::fstatfs(&file).map_err(io::Error::from)?.f_type == TMPFS_MAGIC;
    if in_memory {
        // A time that nobody asks for costs a read of it with each request. Only its owner may leave it alone.
        let _ = rustix::fs::fcntl_setfl(&file, OFlags::NOATIME | OFlags::NONBLOCK);
    }
    let buffered = FileTraits { direct: false, in_memory, mem_align: 1, offset_align: 512 };
    let (file, traits) = match (direct && !in_memory).then(|| with(libc::O_DIRECT)) {
        None => (file, buffered),
        // No direct I/O on this file system: it keeps the data in memory anyway, or has no better way.
        Some(Err(e)) if e.raw_os_error() == Some(libc::EINVAL) => {
            tracing::info!("{}: no direct I/O here, using the page cache", path.display());
            (file, buffered)
        }
        Some(Err(error)) => {
            return Err(OpenError::Open { path: path.to_owned(), how: " with O_DIRECT", error });
        }
        Some(Ok(direct)) => {
            // Who asks whether the file is open elsewhere must not find this.
            drop(file);
            let traits = direct_traits(&direct)?;
            (direct, traits)
        }
    };
    Ok((file, traits))
}

/// Whether two open files are the same one.
pub fn is_same(a: &File, b: &File) -> io::Result<bool> {
    // A device may have several names.
    let identity = |file: &File| {
        let meta = file.metadata()?;
        let device = meta.file_type().is_block_device();
        io::Result::Ok(if device { (meta.rdev(), 0, true) } else { (meta.dev(), meta.ino(), false) })
    };
    Ok(identity(a)? == identity(b)?)
}

/// What direct I/O wants, as the kernel says (`STATX_DIOALIGN`, Linux 6.1); a page where it does not say.
fn direct_traits(file: &File) -> Result<FileTraits, OpenError> {
    let stat = statx(file, c"", AtFlags::EMPTY_PATH, StatxFlags::DIOALIGN).map_err(io::Error::from)?;
    let said = stat.stx_mask & StatxFlags::DIOALIGN.bits() != 0 && stat.stx_dio_offset_align > 0;
    let (mem_align, offset_align) = match said {
        true => (stat.stx_dio_mem_align.max(1), stat.stx_dio_offset_align.max(512)),
        false if file.metadata()?.file_type().is_block_device() => (4096, logical_block_size(file)),
        false => (4096, 4096),
    };
    Ok(FileTraits { direct: true, in_memory: false, mem_align, offset_align })
}

/// `BLKSSZGET` without an ioctl: sysfs has it for every block device.
fn logical_block_size(file: &File) -> u32 {
    let Ok(meta) = file.metadata() else { return 4096 };
    let dev = meta.rdev();
    let base = format!("/sys/dev/block/{}:{}", rustix::fs::major(dev), rustix::fs::minor(dev));
    // A partition has its queue one level up.
    let read = |path: String| std::fs::read_to_string(path).ok()?.trim().parse().ok();
    read(format!("{base}/queue/logical_block_size"))
        .or_else(|| read(format!("{base}/../queue/logical_block_size")))
        .unwrap_or(4096)
}
