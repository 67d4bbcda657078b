//! Volumes of LUKS2, as `cryptsetup` makes them: a header with key slots, and sectors of AES-256-XTS behind it.
//!
//! ```text
//! key source ─► libcryptsetup on a copy of the header ─► the volume's key          as it is opened
//! request ─► buffer ◄─► guest memory, en- or deciphered ─► io_uring, or the file   from then on
//! ```
//!
//! libcryptsetup sees a copy of the header in memory: so it can write to nobody's image, needs no file by its name, and
//! a confined thread can open a volume. The image is read and written as any file, by the back end of those; what goes
//! into it and comes out of it passes through [`Ciphered`].

mod cipher;
mod header;
mod key;
pub(crate) mod library;
mod locked;
pub mod xts;

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use rustix::fs::{MemfdFlags, memfd_create};
use tracing::warn;

use self::cipher::Cipher;
use self::header::{Data, MAGIC, Unsupported};
pub use self::key::{KeyError, KeySource, credentials};
use self::library::{Device, Failed};
use self::locked::Locked;
use super::bounce::Bounce;
use super::layout::{Layout, Place};
use crate::disk::Access;
use crate::open::{FileTraits, OpenError, size_of};
use poll_engine::ring::chain::Slices;

/// Both copies of the largest header that there is.
const HEADERS: u64 = 8 << 20;
/// And the largest area of key slots behind them.
const SLOTS_END: u64 = HEADERS + (128 << 20);
/// Bytes of the header that are read at a time.
const PIECE: usize = 1 << 20;

/// Why a volume is not opened.
#[derive(Debug, thiserror::Error)]
#[error("cannot open the LUKS volume {}: {why}", .path.display())]
pub struct LuksError {
    path: PathBuf,
    why: Why,
}

/// Why.
#[derive(Debug, thiserror::Error)]
enum Why {
    #[error(transparent)]
    Read(#[from] io::Error),
    #[error("libcryptsetup is not there: {0}; install it (package libcryptsetup12), and start again")]
    Library(String),
    #[error(transparent)]
    Key(#[from] KeyError),
    #[error("it has no LUKS header; make one with cryptsetup luksFormat --type luks2, or say another format")]
    None,
    #[error("it is of LUKS1; convert it with cryptsetup convert --type luks2")]
    Old,
    #[error(
        "both copies of its header are damaged, or it is cut short: {0}; restore it from a backup (cryptsetup luksHeaderRestore)"
    )]
    Header(Failed),
    #[error(transparent)]
    Unsupported(#[from] Unsupported),
    #[error("its data are to begin at byte {0}, where it has ended; it was cut short")]
    Short(u64),
    #[error("its data begin at byte {offset}, and direct I/O needs a multiple of {align}; use --direct off")]
    Alignment { offset: u64, align: u32 },
    #[error("no key slot opens with this key: it is another one, or its slot is damaged")]
    Refused,
    #[error("its key slots cannot be used: {0}")]
    Slots(Failed),
    #[error("its key cannot be used: {0}")]
    VolumeKey(io::Error),
    #[error("cannot lock memory for its key: {0}; raise the limit (LimitMEMLOCK=, ulimit -l)")]
    Memory(io::Error),
}

/// Has all ready by which volumes are opened, before what makes that possible is given up; what is not there is told of by
/// whoever wants to open one.
pub fn prepare() {
    let _ = library::load();
}

/// An open volume.
#[derive(Debug)]
pub struct Volume {
    file: File,
    traits: FileTraits,
    data: Data,
    key: Locked,
}

impl Volume {
    /// The one in `file`, opened by this key. What its slots want to be computed takes its time and memory.
    pub fn open(
        path: &Path,
        (file, traits): (File, FileTraits),
        key: &KeySource,
        discards: bool,
    ) -> Result<Volume, LuksError> {
        let failed = |why| LuksError { path: path.to_owned(), why };
        let (mut data, key) = unlock(path, &file, key).map_err(failed)?;
        if traits.direct && !data.offset.is_multiple_of(traits.offset_align.into()) {
            return Err(failed(Why::Alignment { offset: data.offset, align: traits.offset_align }));
        }
        data.discards |= discards;
        let volume = Volume { file, traits, data, key };
        // Whether the key is one is found out now.
        volume.cipher().map_err(|e| failed(Why::VolumeKey(e)))?;
        match volume.size() {
            Ok(0) | Err(_) => Err(failed(Why::Short(volume.data.offset))),
            Ok(_) => Ok(volume),
        }
    }

    /// Its file.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// What that can do.
    pub fn traits(&self) -> FileTraits {
        self.traits
    }

    /// Where its data begin in the file, bytes.
    pub fn offset(&self) -> u64 {
        self.data.offset
    }

    /// Bytes that are enciphered together: what a guest has for a block is no less.
    pub fn sector(&self) -> u32 {
        self.data.sector
    }

    /// Whether space may be given up. Whoever reads the file sees where nothing is.
    pub fn discards(&self) -> bool {
        self.data.discards
    }

    /// Bytes of its data, as the file is now.
    pub fn size(&self) -> Result<u64, OpenError> {
        let there = size_of(self.file.as_fd())?.saturating_sub(self.data.offset);
        let size = match self.data.len {
            // Cut short, it is served for what is there; what is beyond fails by itself.
            Some(len) if len <= there => len,
            _ => there,
        };
        Ok(size - size % u64::from(self.data.sector))
    }

    fn cipher(&self) -> io::Result<Cipher> {
        Cipher::new(self.key.bytes(), self.data.sector, self.data.first)
    }
}

/// What the header says, and the volume's key.
fn unlock(path: &Path, file: &File, key: &KeySource) -> Result<(Data, Locked), Why> {
    library::load().map_err(Why::Library)?;
    let size = size_of(file.as_fd()).map_err(|e| Why::Read(io::Error::other(e)))?;
    let copy = File::from(memfd_create("luks", MemfdFlags::CLOEXEC).map_err(io::Error::from)?);
    copy.set_len(size)?;
    copy_to(file, &copy, 0, HEADERS.min(size))?;
    let mut begin = [0; 8];
    let len = copy.read_at(&mut begin, 0)?;
    if begin[..len].starts_with(&MAGIC) && begin[6..] == [0, 1] {
        return Err(Why::Old);
    }
    let mut device = Device::of(&copy).map_err(Why::Slots)?;
    if let Err(e) = device.load() {
        return Err(if has_header(&copy, HEADERS.min(size))? { Why::Header(e) } else { Why::None });
    }
    let data = Data::parse(&device.json().map_err(Why::Header)?)?;
    let bits = 8 * device.volume_key_size().map_err(Why::Header)?;
    if bits != 8 * xts::KEY as u32 {
        return Err(Unsupported::KeySize(bits).into());
    }
    if data.offset >= size {
        return Err(Why::Short(data.offset));
    }
    if differs(file, &copy)? {
        warn!(
            "{}: one of the two copies of its LUKS header is damaged, and the other one is used; cryptsetup repair mends it",
            path.display()
        );
    }
    copy_to(file, &copy, HEADERS.min(size), SLOTS_END.min(data.offset))?;
    let key = key.read()?;
    let mut volume_key = Locked::zeroed(xts::KEY).map_err(Why::Memory)?;
    device.volume_key(key.bytes(), volume_key.bytes_mut()).map_err(|e| match e.error.raw_os_error() {
        Some(libc::EPERM) => Why::Refused,
        _ => Why::Slots(e),
    })?;
    Ok((data, volume_key))
}

/// Pieces of a file from `from` to `to`, each with its place.
fn pieces(
    file: &File,
    from: u64,
    to: u64,
    mut each: impl FnMut(u64, &[u8]) -> io::Result<()>,
) -> io::Result<()> {
    // Aligned, as direct I/O wants it.
    let mut buffer = Bounce::zeros(PIECE);
    let mut at = from;
    while at < to {
        let n = file.read_at(buffer.bytes_mut(), at)?.min((to - at) as usize);
        if n == 0 {
            break;
        }
        each(at, &buffer.bytes()[..n])?;
        at += n as u64;
    }
    Ok(())
}

fn copy_to(file: &File, copy: &File, from: u64, to: u64) -> io::Result<()> {
    pieces(
        file,
        from,
        to,
        |at, bytes| if bytes.iter().all(|&b| b == 0) { Ok(()) } else { copy.write_all_at(bytes, at) },
    )
}

/// Whether there is anything of a header: the first copy, or the second, which is where a header of some size ends.
fn has_header(copy: &File, size: u64) -> io::Result<bool> {
    let mut found = false;
    let second: [u8; 6] = std::array::from_fn(|i| MAGIC[if i < 4 { 3 - i } else { i }]);
    pieces(copy, 0, size, |_, bytes| {
        found |= bytes.chunks(4096).any(|at| at.starts_with(&MAGIC) || at.starts_with(&second));
        Ok(())
    })?;
    Ok(found)
}

/// Whether libcryptsetup has mended a header in the copy.
fn differs(file: &File, copy: &File) -> io::Result<bool> {
    // Bytes of a header, at its byte 8 (2.2).
    let mut len = [0; 8];
    copy.read_exact_at(&mut len, 8)?;
    let both = u64::from_be_bytes(len).saturating_mul(2).min(HEADERS);
    let mut differs = false;
    let mut theirs = vec![0; PIECE];
    pieces(file, 0, both, |at, bytes| {
        copy.read_exact_at(&mut theirs[..bytes.len()], at)?;
        differs |= theirs[..bytes.len()] != *bytes;
        Ok(())
    })?;
    Ok(differs)
}

/// Data of a volume, as the queue of a reactor has them.
pub struct Ciphered {
    file: File,
    in_memory: bool,
    offset: u64,
    cipher: Cipher,
}

impl Ciphered {
    /// Of this volume.
    pub fn new(volume: &Volume) -> io::Result<Ciphered> {
        Ok(Ciphered {
            file: volume.file.try_clone()?,
            in_memory: volume.traits.in_memory,
            offset: volume.data.offset,
            cipher: volume.cipher()?,
        })
    }

    /// The file that they are in.
    pub fn file(&self) -> &File {
        &self.file
    }
}

impl Layout for Ciphered {
    const BOUNCE_PAGES: usize = 32;
    const HAS_WORKERS: bool = false;
    const CIPHERS: bool = true;

    #[inline]
    fn place(&self, _: Access, offset: u64, len: u32) -> Place {
        Place::File { fd: self.file.as_raw_fd(), offset: self.offset + offset, len }
    }

    fn is_in_memory(&self) -> bool {
        self.in_memory
    }

    fn flush_fd(&self, index: usize) -> Option<RawFd> {
        (index == 0).then(|| self.file.as_raw_fd())
    }

    #[inline]
    fn encipher(&mut self, offset: u64, data: Slices<'_>, into: &mut [u8]) {
        self.cipher.encipher(offset, data, into);
    }

    fn encipher_zeros(&mut self, offset: u64, into: &mut [u8]) {
        self.cipher.encipher_zeros(offset, into);
    }

    #[inline]
    fn decipher(&mut self, offset: u64, from: &mut [u8], data: Slices<'_>) {
        self.cipher.decipher(offset, from, data);
    }
}
