//! Where the key of a volume comes from. It is taken as it is, byte for byte, as `cryptsetup --key-file` takes it: a line end
//! counts.
#![allow(unsafe_code)] // a descriptor that was inherited

use std::env;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::path::PathBuf;

use super::locked::Locked;

/// Most bytes of a key: all of it is locked in memory, of which a service often has 8 MiB to lock.
const MAX: usize = 1 << 20;
/// The first buffer for one.
const FIRST: usize = 4096;
/// Where systemd puts credentials (systemd.exec(5)).
const CREDENTIALS: &str = "CREDENTIALS_DIRECTORY";

/// Where a key is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum KeySource {
    /// In a file.
    File(PathBuf),
    /// Behind a descriptor that was inherited, up to its end.
    Fd(i32),
    /// In a credential of the service.
    Credential(String),
}

/// Why there is no key.
#[derive(Debug, thiserror::Error)]
pub enum KeyError {
    /// It cannot be read.
    #[error("cannot read its key from {from}: {error}")]
    Read {
        /// Where it is.
        from: String,
        /// What the system said.
        error: io::Error,
    },
    /// Not started by systemd with credentials.
    #[error("there is no credential {0}: this service has none (see LoadCredential= in systemd.exec)")]
    NoCredentials(String),
    /// Nothing in it.
    #[error("its key in {0} is empty")]
    Empty(String),
    /// Too much in it.
    #[error("its key in {0} has more than {MAX} bytes")]
    Long(String),
    /// No memory for it.
    #[error("cannot lock memory for its key: {0}; raise the limit (LimitMEMLOCK=, ulimit -l)")]
    Memory(io::Error),
}

/// The directory of credentials, if there is one.
pub fn credentials() -> Option<PathBuf> {
    env::var_os(CREDENTIALS).filter(|dir| !dir.is_empty()).map(PathBuf::from)
}

impl KeySource {
    fn name(&self) -> String {
        match self {
            KeySource::File(path) => path.display().to_string(),
            KeySource::Fd(fd) => format!("descriptor {fd}"),
            KeySource::Credential(name) => format!("credential {name}"),
        }
    }

    fn open(&self) -> Result<File, KeyError> {
        let failed = |error| KeyError::Read { from: self.name(), error };
        match self {
            KeySource::File(path) => File::open(path).map_err(failed),
            KeySource::Credential(name) => {
                let dir = credentials().ok_or_else(|| KeyError::NoCredentials(name.clone()))?;
                File::open(dir.join(name)).map_err(failed)
            }
            KeySource::Fd(fd) => inherited(*fd).map(File::from).map_err(failed),
        }
    }

    /// The key.
    pub fn read(&self) -> Result<Key, KeyError> {
        let mut file = self.open()?;
        let mut buffer = Locked::zeroed(FIRST).map_err(KeyError::Memory)?;
        let mut len = 0;
        loop {
            if len == buffer.bytes().len() {
                if len >= MAX {
                    return Err(KeyError::Long(self.name()));
                }
                let mut larger = Locked::zeroed(2 * len).map_err(KeyError::Memory)?;
                larger.bytes_mut()[..len].copy_from_slice(buffer.bytes());
                buffer = larger;
            }
            match file.read(&mut buffer.bytes_mut()[len..]) {
                Ok(0) if len == 0 => return Err(KeyError::Empty(self.name())),
                Ok(0) => return Ok(Key { buffer, len }),
                Ok(n) => len += n,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(KeyError::Read { from: self.name(), error }),
            }
        }
    }
}

/// A descriptor that was inherited for this, which is closed after it.
fn inherited(fd: i32) -> io::Result<OwnedFd> {
    if fd < 0 {
        return Err(io::Error::from_raw_os_error(libc::EBADF));
    }
    // SAFETY: not -1, and only asked whether it is open.
    nix::fcntl::fcntl(unsafe { BorrowedFd::borrow_raw(fd) }, nix::fcntl::FcntlArg::F_GETFD)?;
    if fd <= io::stderr().as_raw_fd() {
        // Others count on those.
        // SAFETY: open, as was just asked.
        return unsafe { BorrowedFd::borrow_raw(fd) }.try_clone_to_owned();
    }
    // SAFETY: open, and by its number handed to us for this alone.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// A key.
#[derive(Debug)]
pub struct Key {
    buffer: Locked,
    len: usize,
}

impl Key {
    /// Its bytes.
    pub fn bytes(&self) -> &[u8] {
        &self.buffer.bytes()[..self.len]
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::fd::IntoRawFd;

    use super::*;

    #[test]
    fn a_key_is_all_that_is_there() {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        let source = KeySource::File(file.path().to_owned());
        assert!(matches!(source.read(), Err(KeyError::Empty(_))));
        file.write_all(b"one\ntwo\n").unwrap();
        assert_eq!(source.read().unwrap().bytes(), b"one\ntwo\n");
        assert!(!format!("{:?}", source.read().unwrap()).contains("one"));
        let long = vec![7; 3 * FIRST + 1];
        file.write_all(&long).unwrap();
        assert_eq!(source.read().unwrap().bytes().len(), 8 + long.len());
        file.as_file().set_len(MAX as u64 + 1).unwrap();
        assert!(matches!(source.read(), Err(KeyError::Long(_))));
    }

    #[test]
    fn a_descriptor_is_read_to_its_end_and_closed() {
        let (from, to) = nix::unistd::pipe().unwrap();
        File::from(to).write_all(b"secret").unwrap();
        let fd = from.into_raw_fd();
        assert_eq!(KeySource::Fd(fd).read().unwrap().bytes(), b"secret");
        assert!(matches!(KeySource::Fd(999).read(), Err(KeyError::Read { .. })));
        assert!(matches!(KeySource::Fd(-1).read(), Err(KeyError::Read { .. })));
    }
}
