//! Opening an image with all the files that it names, and nothing else.

use std::fs::File;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use imago::format::builder::FormatDriverBuilder;
use imago::format::gate::ImplicitOpenGate;
use imago::qcow2::Qcow2;
use imago::raw::Raw;
use imago::vmdk::Vmdk;
use imago::{DenyImplicitOpenGate, FormatAccess, StorageOpenOptions};
use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
use tracing::warn;

use super::Format;
use super::file::ImageFile;
use super::header::{Header, Refused};
use super::order::Order;
use crate::backend::write_log::WriteLog;
use crate::lock::{LockError, lock, lock_beside};
use crate::open::{FileTraits, OpenError, is_same, open_file};

/// Most files of an image.
const MAX_FILES: usize = 64;
/// Bytes of a cluster where a format has none: what is looked up at a time.
const PLAIN_CLUSTER: u64 = 64 << 10;

/// Why an image cannot be used as what it is said to be.
#[derive(Debug, thiserror::Error)]
pub enum ChainError {
    /// One of its files cannot be opened or locked.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// It is not what it is said to be, or uses what is not known here.
    #[error("cannot use {0}: {1}")]
    Refused(PathBuf, Refused),
    /// `imago` does not take it.
    #[error("cannot use {0}: {1}")]
    Io(PathBuf, io::Error),
    /// It is below itself.
    #[error("cannot use {0}: it is part of an image twice; see what qemu-img info --backing-chain says")]
    Loop(PathBuf),
    /// Many files.
    #[error(
        "cannot use {0}: an image has at most {MAX_FILES} files; join some of them (qemu-img rebase, commit)"
    )]
    Long(PathBuf),
    /// A format that is not said, and not guessed.
    #[error(
        "cannot use {0}: it does not say which format its backing file {1} has; write it in (qemu-img rebase -u -F FORMAT \
         -b {1} {0})"
    )]
    BackingFormat(PathBuf, String),
    /// A format that is not known.
    #[error(
        "cannot use {0}: its backing file {1} is said to have the format {2}, which is none of raw, qcow2, vmdk"
    )]
    UnknownFormat(PathBuf, String, String),
    /// An external data file without a name.
    #[error(
        "cannot use {0}: it does not say where its data are; write it in (qemu-img amend -o data_file=FILE {0})"
    )]
    DataFile(PathBuf),
    /// Finer clusters than the file's blocks.
    #[error(
        "direct I/O on {path} needs blocks of {align} bytes, and the image has clusters of {cluster}; use --direct off"
    )]
    Cluster {
        /// The file.
        path: PathBuf,
        /// Bytes.
        align: u32,
        /// Bytes.
        cluster: u64,
    },
}

/// An open image.
pub struct Chain {
    /// Access to the whole.
    pub access: FormatAccess<ImageFile>,
    /// Its files, by number; the image itself is the first.
    pub files: Vec<ImageFile>,
    /// The file that data are written to.
    pub data: u8,
    /// Bytes of the disk below the image.
    pub below: u64,
    /// Bytes of a cluster of the image.
    pub cluster: u64,
    /// Nothing is written.
    pub read_only: bool,
}

/// How to open it.
#[derive(Clone, Debug)]
pub struct How {
    /// Refuse writes.
    pub read_only: bool,
    /// Bypass the page cache.
    pub direct: bool,
    /// Beside another process that has the same image.
    pub beside: bool,
    /// Where all that changes its files is to be written down.
    pub log: Option<Arc<WriteLog>>,
}

/// Files that an image names, open. Threads that serve guests may open none.
pub type Opened = Vec<(PathBuf, File, FileTraits)>;

/// The file for data, and the image below with its format.
type Named = (Option<ImageFile>, Option<(ImageFile, Format)>);

struct Opening<'a> {
    how: &'a How,
    files: Vec<ImageFile>,
    opened: &'a mut Opened,
    /// Bytes of the disk below the one that was opened last: in the end, below the image.
    below: u64,
    /// Whether they are to be ours.
    locks: bool,
}

/// Opens the image in `top`, which is locked already.
pub fn open(top: ImageFile, format: Format, how: &How, opened: &mut Opened) -> Result<Chain, ChainError> {
    let path = top.path().to_owned();
    let mut opening = Opening { how, files: vec![top.clone()], opened, below: 0, locks: true };
    // `imago` is not made for just any bytes, and neither may it end the process.
    let opened = catch_unwind(AssertUnwindSafe(|| opening.layer(top, format, !how.read_only)));
    let (access, data, cluster) =
        opened.unwrap_or_else(|_| Err(ChainError::Refused(path, Refused::Damaged("it makes no sense"))))?;
    let Opening { files, below, .. } = opening;
    Ok(Chain { access, files, data, below, cluster, read_only: how.read_only })
}

/// Opens all files of a qcow2 image that may be somebody else's still: bytes of its disk.
pub fn look(top: &ImageFile, how: &How, opened: &mut Opened) -> Result<u64, ChainError> {
    let mut opening = Opening { how, files: vec![top.clone()], opened, below: 0, locks: false };
    opening.below(top, !how.read_only)?;
    Ok(header(top)?.size)
}

/// The header of a qcow2 image, which may be somebody else's.
pub fn header(file: &ImageFile) -> Result<Header, ChainError> {
    let io = |e| ChainError::Io(file.path().to_owned(), e);
    let refused = |e| ChainError::Refused(file.path().to_owned(), e);
    let cluster = Header::cluster_size(&file.bytes(0..512).map_err(io)?).map_err(refused)?;
    Header::parse(&file.bytes(0..cluster).map_err(io)?, file.len()).map_err(refused)
}

/// Which format the image `name`, below the one at `path`, is said to have.
pub fn backing_format(path: &Path, name: &str, header: &Header) -> Result<Format, ChainError> {
    match header.backing_format.as_deref() {
        None => Err(ChainError::BackingFormat(path.to_owned(), name.to_owned())),
        Some("raw" | "file") => Ok(Format::Raw),
        Some("qcow2") => Ok(Format::Qcow2),
        Some("vmdk") => Ok(Format::Vmdk),
        Some(other) => Err(ChainError::UnknownFormat(path.to_owned(), name.to_owned(), other.to_owned())),
    }
}

/// Why counts cannot be checked, or what is wrong with them.
enum Counts {
    Io(io::Error),
    Refused(Refused),
}

impl From<Refused> for Counts {
    fn from(refused: Refused) -> Counts {
        Counts::Refused(refused)
    }
}

impl Opening<'_> {
    fn layer(
        &mut self,
        file: ImageFile,
        format: Format,
        writable: bool,
    ) -> Result<(FormatAccess<ImageFile>, u8, u64), ChainError> {
        let (path, number) = (file.path().to_owned(), file.number());
        let io = |e| ChainError::Io(path.clone(), e);
        match format {
            Format::Raw => {
                let raw = Raw::open_image(file, writable).map_err(io)?;
                Ok((FormatAccess::new(raw), number, PLAIN_CLUSTER))
            }
            Format::Vmdk => {
                let vmdk = Vmdk::<ImageFile>::builder(file).write(false).open(Extents(self)).map_err(io)?;
                Ok((FormatAccess::new(vmdk), number, PLAIN_CLUSTER))
            }
            Format::Qcow2 => self.qcow2(file, writable),
            // No part of an image, as yet; one by itself is `backend::luks`.
            Format::Luks => {
                Err(ChainError::UnknownFormat(path.clone(), path.display().to_string(), format.to_string()))
            }
        }
    }

    fn qcow2(
        &mut self,
        file: ImageFile,
        writable: bool,
    ) -> Result<(FormatAccess<ImageFile>, u8, u64), ChainError> {
        let path = file.path().to_owned();
        let io = |e| ChainError::Io(path.clone(), e);
        let refused = |e| ChainError::Refused(path.clone(), e);
        let header = header(&file)?;
        let cluster = header.cluster();
        let tables = [&header.l1, &header.reftable].map(|range| file.bytes(range.clone()));
        let [l1, reftable] = tables;
        let metadata =
            header.check_tables(&l1.map_err(io)?, &reftable.map_err(io)?, file.len()).map_err(refused)?;
        if writable {
            header.check_counts(&metadata, |range| file.bytes(range).map_err(Counts::Io)).map_err(
                |e| match e {
                    Counts::Io(e) => io(e),
                    Counts::Refused(e) => refused(e),
                },
            )?;
        }
        let (data, backing) = self.named(&path, &header, writable)?;
        let backing = match backing {
            Some((below, format)) => Some(self.layer(below, format, false)?.0),
            None => None,
        };
        self.below = backing.as_ref().map_or(0, FormatAccess::size);
        for file in [Some(&file), data.as_ref()].into_iter().flatten() {
            let align = file.traits().offset_align;
            if file.traits().direct && u64::from(align) > cluster {
                return Err(ChainError::Cluster { path: file.path().to_owned(), align, cluster });
            }
        }
        if writable {
            if header.data_file_is_raw {
                warn!(
                    "{}: its data file does not stay a raw image of the disk; read it by the qcow2 image from now on",
                    path.display()
                );
            }
            file.keep_order(Order::new(header, metadata));
        }
        let number = data.as_ref().unwrap_or(&file).number();
        let image = Qcow2::<ImageFile>::builder(file)
            .write(writable)
            .backing(backing)
            .data_file(data)
            .open(DenyImplicitOpenGate::default())
            .map_err(io)?;
        Ok((FormatAccess::new(image), number, cluster))
    }

    /// Opens the files that a header names: for data, and the image below with its format.
    fn named(&mut self, path: &Path, header: &Header, writable: bool) -> Result<Named, ChainError> {
        let data = match &header.data_file {
            _ if !header.has_data_file => None,
            None => return Err(ChainError::DataFile(path.to_owned())),
            Some(name) => Some(self.file(&beside(path, name), writable)?),
        };
        let Some(name) = &header.backing_file else { return Ok((data, None)) };
        let path = path.to_owned();
        let format = backing_format(&path, name, header)?;
        Ok((data, Some((self.file(&beside(&path, name), false)?, format))))
    }

    /// Opens all that is below an image, and its data file.
    fn below(&mut self, file: &ImageFile, writable: bool) -> Result<(), ChainError> {
        let (_, backing) = self.named(file.path(), &header(file)?, writable)?;
        match backing {
            Some((below, Format::Qcow2)) => self.below(&below, false),
            _ => Ok(()),
        }
    }

    /// Opens a further file and locks it.
    fn file(&mut self, path: &Path, writable: bool) -> Result<ImageFile, ChainError> {
        if self.files.len() == MAX_FILES {
            return Err(ChainError::Long(path.to_owned()));
        }
        let known = self.opened.iter().find(|(p, ..)| p == path);
        let is_known = known.is_some();
        let (file, traits) = if let Some((_, file, traits)) = known {
            (file.try_clone().map_err(OpenError::Stat)?, *traits)
        } else {
            // What is below is the same for all that are over it: the page cache has it once for all of them. Nobody may
            // write to it meanwhile, so that it is never old.
            let (file, traits) = open_file(path, !writable, self.how.direct && writable)?;
            let top = self.files[0].traits();
            if traits.offset_align > top.offset_align || traits.mem_align > top.mem_align {
                // Requests are aligned as the image wants them.
                open_file(path, !writable, false)?
            } else {
                (file, traits)
            }
        };
        for other in &self.files {
            if is_same(&file, other.file()).map_err(OpenError::Stat)? {
                return Err(ChainError::Loop(path.to_owned()));
            }
        }
        let locked = match (self.locks, writable && self.how.beside) {
            (false, _) => Ok(()),
            // The process that we take over from holds the same lock.
            (true, true) => lock_beside(&file, true),
            (true, false) => lock(&file, writable),
        };
        locked.map_err(|error: LockError| OpenError::Lock { path: path.to_owned(), error })?;
        if is_known && self.locks && writable && !traits.direct && !traits.in_memory {
            // What the page cache has of it may be from before another host wrote to it.
            posix_fadvise(&file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED)
                .unwrap_or_else(|e| warn!("{}: the page cache may be stale: {e}", path.display()));
        }
        if !is_known {
            self.opened.push((path.to_owned(), file.try_clone().map_err(OpenError::Stat)?, traits));
        }
        let number = self.files.len() as u8;
        let log = if writable { self.how.log.clone() } else { None };
        let file = ImageFile::new(number, path, file, traits, log)
            .map_err(|e| ChainError::Io(path.to_owned(), e))?;
        self.files.push(file.clone());
        Ok(file)
    }
}

/// The path of a file that the image at `path` names.
pub fn beside(path: &Path, name: &str) -> PathBuf {
    path.parent().unwrap_or(Path::new("")).join(name)
}

/// The extents of a VMDK image.
struct Extents<'a, 'b>(&'a mut Opening<'b>);

impl ImplicitOpenGate<ImageFile> for Extents<'_, '_> {
    fn open_format<F: FormatDriverBuilder<ImageFile>>(
        &mut self,
        _: F,
    ) -> io::Result<FormatAccess<ImageFile>> {
        Err(io::Error::other("it names another image"))
    }

    fn open_storage(&mut self, options: StorageOpenOptions) -> io::Result<ImageFile> {
        let path = options.get_filename().ok_or(io::ErrorKind::InvalidInput)?;
        self.0.file(path, false).map_err(io::Error::other)
    }
}
