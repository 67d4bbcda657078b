//! An RBD image that is open: its size, what is waiting for its cluster, and who is told that it has grown.

use std::io;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::thread::Builder;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::getpid;
use poll_engine::confine::{self, Role};
use tracing::{info, warn};

use super::address::Address;
use super::ffi::{Cluster, Image};

/// How often to look whether the cluster answers.
const LOOK: Duration = Duration::from_secs(1);
/// How long it may leave requests without any answer before that is told.
const PATIENCE: Duration = Duration::from_secs(5);

/// Why an image is not opened.
#[derive(Debug, thiserror::Error)]
pub enum RbdError {
    /// It is no name of one.
    #[error("{0}")]
    Name(String),
    /// A snapshot stays as it is.
    #[error("{0} is a snapshot, which nobody can write to; use --read-only, or name the image itself")]
    Snapshot(String),
    /// What was tried last.
    #[error("{path}: cannot {what}: {error}")]
    Failed {
        /// The image.
        path: String,
        /// What was tried.
        what: &'static str,
        /// What the library said.
        error: io::Error,
    },
    /// The library's threads would have to begin with rights that are given up.
    #[error(
        "{0}: a daemon that has given up its rights cannot reach a cluster; name the image when the daemon starts, or \
         start it with --sandbox off"
    )]
    Confined(String),
}

/// An image that is open.
#[derive(Debug)]
pub struct RbdImage {
    image: Image,
    path: String,
    watch: Mutex<Option<u64>>,
    waits: Arc<Waits>,
}

/// Requests that the cluster has, and how it answers.
#[derive(Debug, Default)]
pub(super) struct Waits {
    begun: AtomicU64,
    ended: AtomicU64,
    /// Times that it has not answered for long.
    stalls: AtomicU64,
    is_stalled: AtomicBool,
}

impl Waits {
    pub fn begin(&self) {
        self.begun.fetch_add(1, Ordering::Relaxed);
    }

    pub fn end(&self) {
        self.ended.fetch_add(1, Ordering::Relaxed);
    }

    fn counts(&self) -> (u64, u64) {
        let ended = self.ended.load(Ordering::Relaxed);
        (self.begun.load(Ordering::Relaxed).saturating_sub(ended), self.stalls.load(Ordering::Relaxed))
    }
}

/// Tells when the cluster does not answer, and when it does again, for as long as the image is open.
fn look_after(path: &str, waits: &Weak<Waits>) {
    let (mut seen, mut since) = (0, Instant::now());
    loop {
        std::thread::sleep(LOOK);
        let Some(waits) = waits.upgrade() else { return };
        let (waiting, _) = waits.counts();
        let ended = waits.ended.load(Ordering::Relaxed);
        if waiting == 0 || ended != seen {
            if waits.is_stalled.swap(false, Ordering::Relaxed) {
                info!("{path}: the cluster answers again, after {} s", since.elapsed().as_secs());
            }
            (seen, since) = (ended, Instant::now());
        } else if since.elapsed() >= PATIENCE && !waits.is_stalled.swap(true, Ordering::Relaxed) {
            waits.stalls.fetch_add(1, Ordering::Relaxed);
            warn!(
                "{path}: {waiting} requests wait, and the cluster has not answered for {} s (see ceph -s); they go on \
                 when it does",
                PATIENCE.as_secs()
            );
        }
    }
}

/// As somebody does who wants us to look whether images have grown.
fn grown() {
    let _ = kill(getpid(), Signal::SIGHUP);
}

impl RbdImage {
    /// Opens the image that `path` is the address of.
    pub fn open(path: &Path, read_only: bool) -> Result<RbdImage, RbdError> {
        let address = Address::of(path).map_err(RbdError::Name)?;
        let path = path.display().to_string();
        if address.snapshot.is_some() && !read_only {
            return Err(RbdError::Snapshot(path));
        }
        if confine::is_sealed() {
            return Err(RbdError::Confined(path));
        }
        // All threads of the library have what the one that connects has left.
        let (name, builder) = (path.clone(), Builder::new().name("rbd-open".into()));
        let (tell, told) = crossbeam::channel::bounded(1);
        let opened = confine::spawn(builder, Role::Cluster, move || {
            let _ = tell.send(connect(&name, &address, read_only));
        });
        let failed = |what, error| RbdError::Failed { path: path.clone(), what, error };
        let thread = opened.map_err(|e| failed("start a thread", e))?;
        let image = told.recv().unwrap_or_else(|_| Err(failed("open", io::ErrorKind::Other.into())));
        let _ = thread.join();
        let image = image?;
        if !read_only && !image.has_exclusive_lock().unwrap_or(false) {
            warn!(
                "{path} has no exclusive lock, so nothing keeps other clients from writing to it (rbd feature enable \
                 ... exclusive-lock)"
            );
        }
        let waits = Arc::new(Waits::default());
        let (name, of_thread) = (path.clone(), Arc::downgrade(&waits));
        let builder = Builder::new().name("rbd-waits".into());
        confine::spawn(builder, Role::Worker, move || look_after(&name, &of_thread))
            .map_err(|e| failed("start a thread", e))?;
        Ok(RbdImage { image, path, watch: Mutex::new(None), waits })
    }

    /// The image, as librbd has it.
    pub(super) fn image(&self) -> &Image {
        &self.image
    }

    pub(super) fn counter(&self) -> &Waits {
        &self.waits
    }

    /// Requests that wait for the cluster now, and how often it has not answered for long.
    pub fn waits(&self) -> (u64, u64) {
        self.waits.counts()
    }

    /// Bytes.
    pub fn size(&self) -> io::Result<u64> {
        self.image.size()
    }

    /// Has the program look for growth (`SIGHUP`) whenever somebody changes the image, from now on.
    pub fn watch(&self) {
        let mut watch = self.watch.lock().unwrap_or_else(PoisonError::into_inner);
        if watch.is_none() {
            match self.image.watch(grown) {
                Ok(id) => *watch = Some(id),
                Err(e) => warn!("{}: a resize is only seen with SIGHUP: {e}", self.path),
            }
        }
    }

    /// Makes all that was written visible to others.
    pub fn flush(&self) -> io::Result<()> {
        self.image.flush()
    }
}

impl Drop for RbdImage {
    fn drop(&mut self) {
        if let Some(id) = self.watch.lock().unwrap_or_else(PoisonError::into_inner).take() {
            self.image.unwatch(id);
        }
    }
}

fn connect(path: &str, address: &Address, read_only: bool) -> Result<Image, RbdError> {
    let failed = |what| move |error| RbdError::Failed { path: path.to_owned(), what, error };
    let cluster = Cluster::new(address.id.as_deref()).map_err(failed("make a client"))?;
    cluster.read_conf(address.conf.as_deref()).map_err(failed("read the cluster's configuration"))?;
    // A cache of librbd's dies with the process, and the guest may go on with the next one: what it was told is written
    // must be with the cluster, whether it was flushed or not.
    cluster.set("rbd_cache", "false").map_err(failed("set rbd_cache"))?;
    for (option, value) in &address.options {
        cluster.set(option, value).map_err(failed("set an option of Ceph's"))?;
    }
    cluster.connect().map_err(failed("reach the cluster"))?;
    let pool = cluster.pool(&address.pool, &address.namespace).map_err(failed("open the pool"))?;
    let snapshot = address.snapshot.as_deref();
    pool.image(&address.image, snapshot, read_only).map_err(failed("open the image"))
}
