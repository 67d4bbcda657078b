//! What outlives a process that serves a device, in a directory of the device's own: its lock, what the kernel was told
//! that the device is, and the record of requests in flight. It need not outlive the machine.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use nix::fcntl::{FcntlArg, fcntl};
use poll_engine::ring::RingFormat;
use poll_engine::ring::inflight::{InflightMemory, InflightSpec};
use serde::{Deserialize, Serialize};

/// Where the directories of devices are, unless told otherwise.
pub const ROOT: &str = "/run/kickless-vdpa";

/// Why the state of a device cannot be kept.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// It is another's.
    #[error(
        "{name} is served by process {pid}; choose another --name, or stop it with vdpactl detach {name}"
    )]
    Served {
        /// The device.
        name: String,
        /// Who.
        pid: i32,
    },
    /// Files.
    #[error("cannot keep the state of the device in {0}: {1} (see --state-dir)")]
    Io(PathBuf, io::Error),
    /// The kernel has a device that we know nothing of.
    #[error(
        "{0} is a device of an earlier process, of which no record is left: requests in flight would be lost; \
         vdpactl detach {0} takes it away"
    )]
    Unknown(String),
    /// The kernel has a device that is another one.
    #[error(
        "{name} was made with another {what}; start it as before, or take it away with vdpactl detach {name}"
    )]
    Differs {
        /// The device.
        name: String,
        /// What is not the same.
        what: &'static str,
    },
    /// The record.
    #[error(
        "the record of requests in flight of {0} cannot be used: {1}; vdpactl detach {0} takes the device away"
    )]
    Record(String, String),
}

/// What the kernel was told that a device is, and cannot be asked for again.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct About {
    /// `VIRTIO_ID_*`.
    pub device_id: u32,
    /// What it offers.
    pub features: u64,
    /// Number of queues.
    pub num_queues: u16,
    /// Their largest size.
    pub queue_size: u16,
    /// Bytes of configuration space.
    pub config_len: usize,
}

/// The directory of a device that we serve.
#[derive(Debug)]
pub struct State {
    name: String,
    directory: PathBuf,
    /// The record of requests in flight. Whoever wants it later may open nothing by name any more.
    inflight: File,
    /// Locked while we are there. POSIX forgets such a lock when any descriptor of the file is closed: there is one.
    _lock: File,
}

fn lock_record(kind: i32) -> libc::flock {
    libc::flock { l_type: kind as i16, l_whence: libc::SEEK_SET as i16, l_start: 0, l_len: 0, l_pid: 0 }
}

/// Who serves the device `name`, if anybody does.
pub fn owner(root: &Path, name: &str) -> Option<i32> {
    let lock = File::open(root.join(name).join("lock")).ok()?;
    let mut record = lock_record(libc::F_WRLCK);
    fcntl(&lock, FcntlArg::F_GETLK(&mut record)).ok()?;
    (record.l_type != libc::F_UNLCK as i16 && record.l_pid > 0).then_some(record.l_pid)
}

/// Forgets a device that nobody serves.
pub fn forget(root: &Path, name: &str) {
    let _ = fs::remove_dir_all(root.join(name));
}

/// The devices that have a directory.
pub fn names(root: &Path) -> Vec<String> {
    let entries = fs::read_dir(root).into_iter().flatten().flatten();
    entries.filter_map(|e| e.file_name().into_string().ok()).collect()
}

impl State {
    /// Claims the device `name`.
    pub fn claim(root: &Path, name: &str) -> Result<State, StateError> {
        let directory = root.join(name);
        let fail = |e: io::Error| StateError::Io(directory.clone(), e);
        fs::create_dir_all(&directory).map_err(fail)?;
        let mut options = OpenOptions::new();
        // It may be the directory of a user who must not lead us elsewhere.
        options.read(true).write(true).create(true).truncate(false).custom_flags(libc::O_NOFOLLOW);
        let lock = options.open(directory.join("lock")).map_err(fail)?;
        match fcntl(&lock, FcntlArg::F_SETLK(&lock_record(libc::F_WRLCK))) {
            Ok(_) => {
                let inflight = options.open(directory.join("inflight")).map_err(fail)?;
                Ok(State { name: name.into(), directory, inflight, _lock: lock })
            }
            Err(nix::Error::EAGAIN | nix::Error::EACCES) => {
                // Not by `owner`: closing its descriptor would be harmless here, for the lock is not ours.
                Err(StateError::Served { name: name.into(), pid: owner(root, name).unwrap_or(0) })
            }
            Err(e) => Err(fail(e.into())),
        }
    }

    /// Begins with a new device: what there was of another one is forgotten.
    pub fn begin(&self, about: &About) -> Result<(), StateError> {
        let fail = |e: io::Error| StateError::Io(self.directory.clone(), e);
        let bytes =
            [RingFormat::Split, RingFormat::Packed].map(|format| Self::spec(about).sized(format).mmap_size);
        let cleared = self.inflight.set_len(0);
        cleared.and_then(|()| self.inflight.set_len(bytes[0].max(bytes[1]))).map_err(fail)?;
        // Last: with it the rest is there.
        let about = serde_json::to_vec(about).map_err(|e| fail(e.into()))?;
        let new = self.directory.join("about.new");
        let _ = fs::remove_file(&new);
        let written =
            OpenOptions::new().write(true).create_new(true).open(&new).and_then(|mut f| f.write_all(&about));
        written.and_then(|()| fs::rename(&new, self.about_path())).map_err(fail)
    }

    /// Goes on with the device of an earlier process, which must be this one.
    pub fn resume(&self, about: &About) -> Result<(), StateError> {
        let name = self.name.clone();
        let theirs =
            fs::read(self.about_path()).ok().and_then(|bytes| serde_json::from_slice::<About>(&bytes).ok());
        let Some(theirs) = theirs else { return Err(StateError::Unknown(name)) };
        let what = match (about, &theirs) {
            (a, b) if a == b => return Ok(()),
            (a, b) if a.device_id != b.device_id => "kind of device",
            (a, b) if a.num_queues != b.num_queues => "number of queues",
            (a, b) if a.queue_size != b.queue_size => "queue size",
            _ => "set of features (options such as --read-only and --packed)",
        };
        Err(StateError::Differs { name, what })
    }

    /// The record of requests in flight, for rings of this format.
    pub fn record(&self, about: &About, format: RingFormat) -> Result<InflightMemory, StateError> {
        let fail = |why: String| StateError::Record(self.name.clone(), why);
        let file = self.inflight.try_clone().map_err(|e| fail(e.to_string()))?;
        InflightMemory::map(Self::spec(about).sized(format), OwnedFd::from(file))
            .map_err(|e| fail(e.to_string()))
    }

    /// The device is gone.
    pub fn remove(self) {
        let _ = fs::remove_dir_all(&self.directory);
    }

    fn spec(about: &About) -> InflightSpec {
        let About { num_queues, queue_size, .. } = *about;
        InflightSpec { num_queues, queue_size, ..InflightSpec::default() }
    }

    fn about_path(&self) -> PathBuf {
        self.directory.join("about.json")
    }
}
