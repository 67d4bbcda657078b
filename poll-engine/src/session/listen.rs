//! Where front ends come from: a socket path, or a descriptor that was handed to us.

use std::fs;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{getsockopt, sockopt};

use super::handover::{Descriptors, HandoverError, ListenerState};

/// Whoever may connect may do everything: nobody but the owner.
const PRIVATE: u32 = 0o600;

/// Why no front end can connect.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    /// Somebody answers there.
    #[error("socket {0} is in use by a running process; stop it or choose another path")]
    InUse(PathBuf),
    /// The path is something else.
    #[error("{0} exists and is not a socket; remove it or choose another path")]
    NotASocket(PathBuf),
    /// The system says no.
    #[error("cannot listen on {path}: {error}")]
    Bind {
        /// The path.
        path: PathBuf,
        /// What the system said.
        error: io::Error,
    },
    /// The inherited descriptor is no Unix stream socket.
    #[error(
        "descriptor {fd} is not a Unix stream socket ({error}); pass one with --fd, listening or connected"
    )]
    BadFd {
        /// Its number.
        fd: i32,
        /// What the system said.
        error: io::Error,
    },
}

/// What waiting for a front end brought.
#[derive(Debug)]
pub enum Accepted {
    /// A front end.
    FrontEnd(UnixStream),
    /// Somebody in this process rang.
    Rung,
    /// There will be none any more.
    Never,
}

/// A source of connections.
#[derive(Debug)]
pub struct Listener {
    source: Source,
    /// The socket file we made, to be removed at the end if it is still ours.
    made: Option<(PathBuf, u64)>,
}

#[derive(Debug)]
enum Source {
    Listening(UnixListener),
    Connected(Option<UnixStream>),
}

impl Listener {
    /// Listens on `path`. A socket file that nobody answers on is replaced.
    pub fn bind(path: &Path) -> Result<Listener, ListenError> {
        Self::bind_with(path, None)
    }

    /// As [`bind`](Self::bind), for nobody but the user that this process runs as.
    pub fn bind_private(path: &Path) -> Result<Listener, ListenError> {
        Self::bind_mode(path, PRIVATE)
    }

    /// As [`bind`](Self::bind), with this mode of its file.
    pub fn bind_mode(path: &Path, mode: u32) -> Result<Listener, ListenError> {
        Self::bind_with(path, Some(&fs::Permissions::from_mode(mode)))
    }

    /// Listens in the place of whoever listens on `path`, once [`replace`](Self::replace) is called.
    pub fn bind_private_beside(path: &Path) -> Result<Listener, ListenError> {
        Self::bind_mode_beside(path, PRIVATE)
    }

    /// As [`bind_private_beside`](Self::bind_private_beside), with this mode.
    pub fn bind_mode_beside(path: &Path, mode: u32) -> Result<Listener, ListenError> {
        let path = with_suffix(path);
        // Of an earlier attempt.
        let _ = fs::remove_file(&path);
        let fail = |error| ListenError::Bind { path: path.clone(), error };
        let listener = UnixListener::bind(&path).map_err(fail)?;
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).map_err(fail)?;
        let inode = fs::symlink_metadata(&path).map_err(fail)?.ino();
        Self::listening(listener, Some((path.clone(), inode))).map_err(fail)
    }

    /// Takes the place on `path` that it was bound beside.
    pub fn replace(&mut self, path: &Path) -> Result<(), ListenError> {
        if let Some((made, _)) = &mut self.made {
            fs::rename(&made, path).map_err(|error| ListenError::Bind { path: path.to_owned(), error })?;
            path.clone_into(made);
        }
        Ok(())
    }

    /// Whether it can be set aside.
    pub(super) fn has_path(&self) -> bool {
        self.made.is_some()
    }

    /// Has the socket where nobody looks for it, or back at its path. An inherited one stays.
    pub(super) fn set_aside(&mut self, is_aside: bool) -> io::Result<()> {
        const ASIDE: &str = ".unplugged";
        let Some((made, _)) = &mut self.made else { return Ok(()) };
        let name = made.as_os_str().to_os_string();
        let own = name.as_encoded_bytes().strip_suffix(ASIDE.as_bytes()).map(std::ffi::OsStr::from_bytes);
        let to = match (own, is_aside) {
            (Some(own), false) => PathBuf::from(own),
            (None, true) => {
                let mut aside = name;
                aside.push(ASIDE);
                PathBuf::from(aside)
            }
            _ => return Ok(()),
        };
        fs::rename(&made, &to)?;
        *made = to;
        Ok(())
    }

    fn bind_with(path: &Path, permissions: Option<&fs::Permissions>) -> Result<Listener, ListenError> {
        let fail = |error| ListenError::Bind { path: path.to_owned(), error };
        if let Ok(meta) = fs::symlink_metadata(path) {
            if !meta.file_type().is_socket() {
                return Err(ListenError::NotASocket(path.to_owned()));
            }
            match UnixStream::connect(path) {
                Err(e) if e.kind() == io::ErrorKind::ConnectionRefused => {
                    fs::remove_file(path).map_err(fail)?;
                }
                Err(e) => return Err(fail(e)),
                Ok(_) => return Err(ListenError::InUse(path.to_owned())),
            }
        }
        let listener = bind_listening(path, permissions).map_err(fail)?;
        let inode = fs::symlink_metadata(path).map_err(fail)?.ino();
        Self::listening(listener, Some((path.to_owned(), inode))).map_err(fail)
    }

    /// Uses an inherited socket: one that listens serves one front end after another, a connected one serves its own.
    pub fn inherited(number: i32) -> Result<Listener, ListenError> {
        let fail = |error: io::Error| ListenError::BadFd { fd: number, error };
        let fd: OwnedFd = super::socket::inherit(number).map_err(fail)?;
        let listens = getsockopt(&fd, sockopt::AcceptConn).map_err(|e| fail(e.into()))?;
        if listens {
            Self::listening(UnixListener::from(fd), None).map_err(fail)
        } else {
            Ok(Listener { source: Source::Connected(Some(UnixStream::from(fd))), made: None })
        }
    }

    fn listening(listener: UnixListener, made: Option<(PathBuf, u64)>) -> io::Result<Listener> {
        listener.set_nonblocking(true)?;
        Ok(Listener { source: Source::Listening(listener), made })
    }

    /// The socket file that we made.
    pub fn path(&self) -> Option<&Path> {
        self.made.as_ref().map(|(path, _)| path.as_path())
    }

    /// The socket itself, if it listens: for whoever accepts in a way of its own.
    pub fn socket(&self) -> io::Result<UnixListener> {
        match &self.source {
            Source::Listening(listener) => listener.try_clone(),
            Source::Connected(_) => Err(io::ErrorKind::InvalidInput.into()),
        }
    }

    /// What another process needs to go on in our place.
    pub fn save(&self, fds: &mut Descriptors) -> io::Result<ListenerState> {
        let Listener { source, made } = self;
        let (fd, listening) = match source {
            Source::Listening(listener) => (Some(fds.put(listener.as_fd())?), true),
            Source::Connected(stream) => (fds.put_opt(stream.as_ref())?, false),
        };
        Ok(ListenerState { fd, listening, made: made.clone() })
    }

    /// The listener of another process. The socket file stays that one's until [`own`](Self::own).
    pub fn restore(state: &ListenerState, fds: &mut Descriptors) -> Result<Listener, HandoverError> {
        let ListenerState { fd, listening, made: _ } = state;
        let fd = fds.take_opt(*fd)?;
        match (fd, listening) {
            (Some(fd), true) => Ok(Self::listening(UnixListener::from(fd), None)?),
            (fd, _) => Ok(Listener { source: Source::Connected(fd.map(UnixStream::from)), made: None }),
        }
    }

    /// Makes the socket file ours to remove, or nobody's.
    pub fn own(&mut self, made: Option<(PathBuf, u64)>) {
        self.made = made;
    }

    /// Waits for the next front end, or for `bell` (an eventfd) to ring.
    pub fn accept(&mut self, bell: BorrowedFd<'_>) -> io::Result<Accepted> {
        let listener = match &mut self.source {
            Source::Connected(stream) => {
                return Ok(stream.take().map_or(Accepted::Never, Accepted::FrontEnd));
            }
            Source::Listening(listener) => listener,
        };
        loop {
            let mut waits =
                [PollFd::new(listener.as_fd(), PollFlags::POLLIN), PollFd::new(bell, PollFlags::POLLIN)];
            match poll(&mut waits, PollTimeout::NONE) {
                Ok(_) | Err(nix::Error::EINTR) => {}
                Err(e) => return Err(e.into()),
            }
            if waits[1].any().unwrap_or(false) {
                return Ok(Accepted::Rung);
            }
            match listener.accept() {
                Ok((stream, _)) => return Ok(Accepted::FrontEnd(stream)),
                // Nobody, or a peer that left between connecting and being accepted.
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
                Err(e) if matches!(e.raw_os_error(), Some(libc::ECONNABORTED | libc::EINTR)) => {}
                Err(e) => return Err(e),
            }
        }
    }
}

/// Binds so that the path appears only when the socket listens, with these permissions: whoever waits for it to appear
/// may connect at once.
fn bind_listening(path: &Path, permissions: Option<&fs::Permissions>) -> io::Result<UnixListener> {
    let permit = |path: &Path| permissions.map_or(Ok(()), |p| fs::set_permissions(path, p.clone()));
    let name = with_suffix(path);
    match UnixListener::bind(&name) {
        Ok(listener) => match permit(&name).and_then(|()| fs::rename(&name, path)) {
            Ok(()) => Ok(listener),
            Err(e) => {
                let _ = fs::remove_file(&name);
                Err(e)
            }
        },
        // Too long a name with the addition, or one that is taken: the plain way, with a gap between bind and listen.
        Err(_) => UnixListener::bind(path).and_then(|listener| permit(path).map(|()| listener)),
    }
}

fn with_suffix(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".new");
    name.into()
}

impl Drop for Listener {
    fn drop(&mut self) {
        if let Some((path, inode)) = &self.made
            && fs::symlink_metadata(path).is_ok_and(|meta| meta.ino() == *inode)
        {
            // Nothing to be done about one that cannot be removed; the next start replaces it.
            let _ = fs::remove_file(path);
        }
    }
}
