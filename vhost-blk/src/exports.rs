//! The disks that a daemon serves, and what can be changed of them while it runs.

mod images;

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use control::common::Running;
use control::moving::{Movable, Placed, expect_none_paused, move_away};
use control::refused::{Changes, Refused};
use control::saved::Reactors;
use daemon::takeover::{self, Inherited, Successor};
use daemon::{Place, Switch, path_key};
use poll_engine::device::features;
use poll_engine::engine::Engine;
use poll_engine::engine::pacing::Pacing;
use poll_engine::session::serve::Export;
use poll_engine::session::server::Server;
use poll_engine::stats::QueueStats;
use poll_engine::takeover::give::{Estate, Lot};
use tracing::{info, warn};

use crate::backend::formatted::Formatted;
use crate::check::beside;
use crate::cli::{DeviceOptions, Options, parse_size};
use crate::clone::Base;
use crate::device::BlkDevice;
use crate::disk::{Disk, Storage};
use crate::image::Image;
use crate::limits::Limits;
use crate::metrics;
use crate::open::passed;
use crate::pool::Pools;
use crate::record::Recorder;
use crate::report::report;
use crate::saved::saved;
use crate::spec::DiskSpec;
use crate::takeover::About;

/// How long a disk that is removed may take to finish what is in flight, before its removal is said to be under way.
const DRAIN: Duration = Duration::from_secs(30);
/// How often to look meanwhile.
const LOOK: Duration = Duration::from_millis(2);

fn conflict(e: &anyhow::Error) -> Refused {
    e.into()
}

/// A disk as asked for.
#[derive(Debug)]
pub struct Wanted {
    /// What it is called in the log.
    pub name: String,
    /// Where it is to be served.
    pub place: Place,
    spec: DiskSpec,
    device: DeviceOptions,
}

impl Wanted {
    /// By this, where `all` holds for what it does not say.
    pub fn new(spec: DiskSpec, all: &DeviceOptions) -> Result<Wanted> {
        let place = spec.place().context("a disk without a socket")?;
        Ok(Wanted { name: spec.title(), place, device: spec.device(all), spec })
    }

    /// Has `make` make its image, if that is a clone which is not there; whether it was.
    pub fn make(&self, make: impl FnOnce(&Base, &Path) -> Result<()>) -> Result<bool> {
        let (Some(base), Some(path)) = (&self.spec.clone_of, &self.spec.blk_file) else { return Ok(false) };
        // A guest that migrates brings its own.
        if self.spec.incoming {
            return Ok(false);
        }
        if path.try_exists().with_context(|| format!("cannot look for {}", path.display()))? {
            base.expect_below(path)?;
            return Ok(false);
        }
        make(base, path)?;
        info!("{} is a new clone of {base}", path.display());
        Ok(true)
    }

    /// What it is made of, beside another process that has it.
    pub fn open(&self, other: Option<Inherited<About>>) -> Result<Arc<Disk>> {
        let Wanted { spec, device, place, .. } = self;
        let medium = spec.medium().context("a disk without an image")?;
        if let Some(other) = &other {
            other.about.expect(&place.key(), About { medium, read_only: device.read_only })?;
        }
        let image = Image {
            file: spec.blk_file.as_deref(),
            format: spec.format(),
            synthetic: spec.backend,
            serial: &device.serial,
            read_only: device.read_only,
            incoming: spec.incoming,
            key: spec.key_source(),
            discards: spec.allow_discards,
            beside: other.and_then(|other| other.fds.into_iter().next()),
        };
        Ok(Arc::new(image.open(device)?))
    }

    /// Where its requests are to be recorded.
    pub fn record_path(&self) -> Option<&Path> {
        self.spec.record.as_deref()
    }

    /// Its record, if there is to be one.
    pub fn record(&self, disk: &Disk) -> Result<Option<Arc<Recorder>>> {
        let Some(path) = &self.spec.record else { return Ok(None) };
        recorder(path, &self.name, self.device.num_queues, disk).map(Some)
    }

    /// Ready to be served: what a server needs, and what becomes of it then.
    pub fn ready(
        self,
        disk: Arc<Disk>,
        recorder: Option<Arc<Recorder>>,
        engine: &Arc<Engine>,
    ) -> (Export, Ready) {
        let DeviceOptions { num_queues, queue_size, packed, .. } = self.device;
        let withheld = if packed == Switch::Off { features::RING_PACKED } else { 0 };
        let device = BlkDevice::new(Arc::clone(&disk), num_queues, queue_size, recorder.clone());
        let device = Arc::new(device.without(withheld));
        let stats: Vec<_> = std::iter::repeat_with(Arc::default).take(num_queues.into()).collect();
        let (name, engine) = (self.name.clone(), Arc::clone(engine));
        let export = Export { name, device: Arc::clone(&device) as _, stats: stats.clone(), engine };
        (export, Ready { wanted: self, disk, device, stats, recorder })
    }
}

fn recorder(path: &Path, name: &str, num_queues: u16, disk: &Disk) -> Result<Arc<Recorder>> {
    let recorder = Recorder::create(path, num_queues, disk.capacity(), disk.block_size())?;
    info!("recording the requests to {name} in {}", path.display());
    Ok(Arc::new(recorder))
}

/// A disk that is about to be served.
#[derive(Debug)]
pub struct Ready {
    /// As it was asked for.
    pub wanted: Wanted,
    disk: Arc<Disk>,
    device: Arc<BlkDevice>,
    stats: Vec<Arc<QueueStats>>,
    recorder: Option<Arc<Recorder>>,
}

impl Ready {
    /// It is, by this server.
    pub fn served(self, server: Arc<Server>) -> Served {
        let Ready { wanted, disk, device, stats, recorder } = self;
        info!("serving {}, {} bytes", wanted.name, disk.capacity());
        if let Some(recorder) = &recorder {
            recorder.keep();
        }
        let (key, place) = (wanted.spec.key(), wanted.place);
        let socket = place.key();
        Served {
            name: wanted.name,
            key,
            place,
            socket,
            disk,
            stats,
            server,
            device,
            is_read_only: wanted.device.read_only,
            spec: Mutex::new(wanted.spec),
            recorder: Mutex::new(recorder),
        }
    }
}

/// A disk being served.
#[derive(Debug)]
pub struct Served {
    /// What it is called in the log.
    pub name: String,
    /// What it is known by.
    pub key: String,
    /// Where it is served.
    pub place: Place,
    /// The same, as one name.
    socket: String,
    /// What all queues share.
    pub disk: Arc<Disk>,
    /// Counters, one a queue.
    pub stats: Vec<Arc<QueueStats>>,
    /// What serves it.
    pub server: Arc<Server>,
    /// Whether writes are refused.
    pub is_read_only: bool,
    device: Arc<BlkDevice>,
    spec: Mutex<DiskSpec>,
    /// After the server: with it gone, nothing is noted any more.
    recorder: Mutex<Option<Arc<Recorder>>>,
}

impl Served {
    /// Whether it has this for one of the keys by which no two disks may have the same.
    fn has(&self, key: &str, is: &str) -> bool {
        match key {
            "socket-path" => self.socket == is,
            "name" => self.key == is,
            _ => locked(&self.spec).record.as_deref().is_some_and(|path| path_key(path) == is),
        }
    }

    /// As it is asked for now.
    pub fn spec(&self) -> DiskSpec {
        locked(&self.spec).clone()
    }

    /// Its image, if that has a format of its own.
    pub fn image(&self) -> Option<&Formatted> {
        match self.disk.storage() {
            Storage::Image(image) => Some(image),
            Storage::File(..)
            | Storage::Luks(_)
            | Storage::Nvme(..)
            | Storage::Rbd(_)
            | Storage::Ram(_)
            | Storage::Null => None,
        }
    }

    fn lot(&self) -> Result<Lot> {
        let (about, fd) = About::disk(&self.disk)?;
        let fds = fd.into_iter().collect();
        takeover::lot(self.place.key(), &about, fds, &self.server, Arc::clone(&self.device) as _)
    }

    fn report(&self) -> String {
        let record = locked(&self.recorder).as_ref().map(|r| r.line() + "\n").unwrap_or_default();
        let waits = self.disk.waits().map(|(waiting, stalls)| {
            format!("cluster {waiting} requests waiting, {stalls} times without an answer\n")
        });
        report(&self.name, self.disk.capacity(), &self.stats) + &waits.unwrap_or_default() + &record
    }

    /// Looks whether the image has grown, and tells the guest.
    fn grow(&self) -> Result<()> {
        if let Some(size) = self.disk.grow()? {
            info!("{} has grown to {size} bytes", self.name);
            self.server.config_changed();
        }
        Ok(())
    }
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// All of them.
pub struct Exports {
    engine: Arc<Engine>,
    options: Options,
    file: Option<PathBuf>,
    served: Mutex<Vec<Arc<Served>>>,
    pools: Pools,
    flattening: Mutex<Vec<JoinHandle<()>>>,
    successor: Successor,
    changes: Changes,
}

impl Exports {
    /// These, by `options`, which come from `file` if there is one; `successor` may take over.
    pub fn new(
        engine: Arc<Engine>,
        options: Options,
        file: Option<PathBuf>,
        served: Vec<Served>,
        (pools, successor): (Pools, Successor),
    ) -> Exports {
        Exports {
            engine,
            options,
            file,
            pools,
            successor,
            flattening: Mutex::default(),
            served: Mutex::new(served.into_iter().map(Arc::new).collect()),
            changes: Changes::default(),
        }
    }

    /// All, in their order.
    pub fn all(&self) -> Vec<Arc<Served>> {
        locked(&self.served).clone()
    }

    /// The file that the options come from.
    pub fn file(&self) -> Option<&Path> {
        self.file.as_deref()
    }

    /// The one of this key.
    pub fn find(&self, key: &str) -> Result<Arc<Served>, Refused> {
        let found = locked(&self.served).iter().find(|s| s.key == key).cloned();
        found.ok_or_else(|| {
            Refused::Missing(format!("there is no disk {key}; GET /v1/disks lists those there are"))
        })
    }

    /// Statistics as text.
    pub fn report(&self) -> String {
        self.all().iter().map(|s| s.report()).collect()
    }

    /// Looks whether images have grown, and tells the guests.
    pub fn grow_all(&self) {
        for s in self.all() {
            s.grow().unwrap_or_else(|e| warn!("{}: {e:#}", s.name));
        }
    }

    /// Serves one more.
    pub fn add(&self, spec: DiskSpec) -> Result<Arc<Served>, Refused> {
        let _change = self.changes.begin()?;
        let others = self.all();
        let is_taken = |key: &str, is: &str| others.iter().any(|s| s.has(key, is));
        let wrong = |(key, why)| Refused::Wrong(key, why);
        beside(&spec, &self.options.device, is_taken).map_err(|wrong_is| match wrong_is {
            // What others have is no mistake of its own.
            (Some("socket-path" | "name" | "record"), why) if why.starts_with("two disks") => {
                Refused::Conflict(why)
            }
            other => wrong(other),
        })?;
        if spec.fd.is_some() {
            return Err(Refused::Wrong(
                Some("fd"),
                "a running daemon inherits nothing; give a socket-path".into(),
            ));
        }
        if spec.key_fd.is_some() {
            return Err(Refused::Wrong(
                Some("key-fd"),
                "a running daemon inherits nothing; give a key-file or a key-credential".into(),
            ));
        }
        if spec.blk_file.as_deref().is_some_and(|path| passed(path).is_some()) {
            return Err(Refused::Wrong(
                Some("blk-file"),
                "a running daemon inherits nothing; give an image by its name".into(),
            ));
        }
        let image = spec.blk_file.clone();
        let wanted = Wanted::new(spec, &self.options.device).map_err(|e| conflict(&e))?;
        let made = wanted.make(|base, path| self.pools.clone_to(base, path)).map_err(|e| conflict(&e))?;
        let begin = || -> Result<Served> {
            let disk = wanted.open(None)?;
            let recorder = wanted.record(&disk)?;
            let listener = wanted.place.listen()?;
            let (export, ready) = wanted.ready(disk, recorder, &self.engine);
            let server = Server::start(export, listener, || {}).context("cannot start a control thread")?;
            Ok(ready.served(Arc::new(server)))
        };
        let begun = begin().inspect_err(|_| {
            if let (true, Some(path)) = (made, &image) {
                let _ = std::fs::remove_file(path);
            }
        });
        let served = Arc::new(begun.map_err(|e| conflict(&e))?);
        locked(&self.served).push(Arc::clone(&served));
        Ok(served)
    }

    /// Serves this one no more, once what is in flight is finished.
    pub fn remove(&self, key: &str, force: bool) -> Result<(), Refused> {
        let _change = self.changes.begin()?;
        let served = self.find(key)?;
        if force {
            served.server.begin_stop();
        } else if !served.server.begin_stop_unattached() {
            return Err(Refused::Conflict(format!(
                "a front end is connected to {key}; detach the disk from its guest first, or force it"
            )));
        }
        let until = Instant::now() + DRAIN;
        while !served.server.has_ended() {
            if Instant::now() > until {
                return Err(Refused::Conflict(format!(
                    "{key} serves nobody any more, but what is in flight is not finished after {DRAIN:?}; see what keeps its \
                     storage from answering, and remove it again"
                )));
            }
            std::thread::sleep(LOOK);
        }
        if let Place::Path(path) = &served.place {
            // Its control thread may remove sockets only where there were some at the start.
            let is_socket = std::fs::symlink_metadata(path).is_ok_and(|meta| meta.file_type().is_socket());
            if is_socket && let Err(e) = std::fs::remove_file(path) {
                warn!("{} is left behind: {e}", path.display());
            }
        }
        locked(&self.served).retain(|s| s.key != key);
        info!("{} is served no more", served.name);
        Ok(())
    }

    /// Looks whether its image has grown; makes a file that large first, if a size is given.
    pub fn grow(&self, key: &str, size: Option<&str>) -> Result<Arc<Served>, Refused> {
        let _change = self.changes.begin()?;
        let served = self.find(key)?;
        if matches!(served.disk.storage(), Storage::Ram(_) | Storage::Null) {
            return Err(Refused::Conflict(format!(
                "{key} is no image: what is in memory stays as large as it is"
            )));
        }
        if let Some(size) = size {
            let size = parse_size(size).map_err(|why| Refused::Wrong(Some("size"), why))?;
            let has = served.disk.capacity();
            if size < has {
                let why = format!("{key} has {has} bytes, and a disk never shrinks; give a larger size");
                return Err(Refused::Wrong(Some("size"), why));
            }
            match served.disk.storage() {
                Storage::File(file, _) | Storage::Nvme(_, file, _) => grow_file(&served, Some(file), size)?,
                // With what is before its data.
                Storage::Luks(volume) => {
                    grow_file(&served, Some(volume.file()), size.saturating_add(volume.offset()))?;
                }
                Storage::Rbd(_) => grow_file(&served, None, size)?,
                Storage::Image(image) => images::grow(&served, image, size)?,
                Storage::Ram(_) | Storage::Null => {}
            }
        }
        served.grow().map_err(|e| conflict(&e))?;
        Ok(served)
    }

    /// Has its queues take no requests, or take them again.
    pub fn set_paused(&self, key: &str, paused: bool) -> Result<Arc<Served>, Refused> {
        let _change = self.changes.begin()?;
        let served = self.find(key)?;
        served.set_paused(paused)?;
        Ok(served)
    }

    /// Moves a queue, or all of them, to a reactor.
    pub fn place(&self, key: &str, at: Placed) -> Result<Arc<Served>, Refused> {
        let _change = self.changes.begin()?;
        let served = self.find(key)?;
        served.place(&self.engine, at)?;
        Ok(served)
    }

    /// Begins to record its requests to a new file, or ends it.
    pub fn set_record(&self, key: &str, path: Option<&Path>) -> Result<Arc<Served>, Refused> {
        let _change = self.changes.begin()?;
        let served = self.find(key)?;
        let new = match path {
            None => None,
            Some(_) if locked(&served.recorder).is_some() => {
                return Err(Refused::Conflict(format!("{key} is recorded already; end that first")));
            }
            Some(path) => {
                let recorder = recorder(path, &served.name, served.stats.len() as u16, &served.disk);
                Some(recorder.map_err(|e| conflict(&e))?)
            }
        };
        served.device.set_recorder(new.clone());
        served.server.restart_queues()?;
        if let Some(recorder) = &new {
            recorder.keep();
        }
        locked(&served.spec).record = path.map(Path::to_owned);
        // The last one that has it: what is noted yet is written by its drop.
        *locked(&served.recorder) = new;
        Ok(served)
    }

    /// Keeps it to other limits from now on.
    pub fn set_limits(&self, key: &str, limits: Limits) -> Result<Arc<Served>, Refused> {
        let _change = self.changes.begin()?;
        let served = self.find(key)?;
        served.disk.throttle().set(limits);
        locked(&served.spec).limit = Some(limits);
        info!("{} is kept to other limits from now on", served.name);
        Ok(served)
    }

    /// Begins to stop, all at once; each is awaited by its drop.
    pub fn begin_stop(&self) {
        self.changes.stop();
        for s in self.all() {
            s.server.begin_stop();
        }
        self.end_flattening();
    }
}

impl Movable for Served {
    fn key(&self) -> &str {
        &self.key
    }

    fn stats(&self) -> &[Arc<QueueStats>] {
        &self.stats
    }

    fn server(&self) -> &Server {
        &self.server
    }

    fn want_on(&self, queues: Range<u16>, reactor: usize) {
        self.device.want_on(queues, reactor);
    }
}

impl Running for Exports {
    fn engine(&self) -> &Engine {
        &self.engine
    }

    fn add_reactor(&self, cpu: Option<usize>) -> Result<(), Refused> {
        let _change = self.changes.begin()?;
        self.engine.add_reactor(cpu)?;
        Ok(())
    }

    fn retire(&self, number: usize) -> Result<(), Refused> {
        let _change = self.changes.begin()?;
        let retiring = move_away(&self.engine, self.engine.retire(number)?, || self.all())?;
        retiring.finish();
        Ok(())
    }

    fn set_pacing(&self, pacing: Pacing) -> Result<(), Refused> {
        let _change = self.changes.begin()?;
        self.engine.set_pacing(pacing);
        info!("reactors wait by {pacing:?} from now on");
        Ok(())
    }

    fn save(&self) -> Result<PathBuf, Refused> {
        let _change = self.changes.begin()?;
        let Some(path) = &self.file else {
            return Err(Refused::Conflict(
                "there is no file to save to; start the daemon with --config".into(),
            ));
        };
        let specs: Vec<_> = self.all().iter().map(|s| s.spec()).collect();
        saved(path, &specs, &Reactors::of(&self.engine)).map_err(|e| conflict(&e))?;
        info!("what has changed is saved to {}", path.display());
        Ok(path.clone())
    }

    fn expect_successor(&self) -> Result<PathBuf, Refused> {
        let _change = self.changes.begin()?;
        self.successor.expect_beside(self.options.http.api.as_deref()).map_err(|e| conflict(&e))
    }

    fn metrics(&self) -> String {
        metrics::text(self)
    }

    fn exports(&self) -> Vec<control::stats::Export> {
        metrics::views(self)
    }
}

/// Makes a file this long.
fn grow_file(served: &Served, file: Option<&File>, len: u64) -> Result<(), Refused> {
    let key = &served.key;
    let file = file.filter(|file| file.metadata().is_ok_and(|meta| meta.is_file()));
    let Some(file) = file.filter(|_| !served.is_read_only) else {
        let why =
            format!("{key} is no file that may be written; resize it yourself, and call without a size");
        return Err(Refused::Conflict(why));
    };
    let grown = file.metadata().and_then(|meta| if meta.len() < len { file.set_len(len) } else { Ok(()) });
    grown.map_err(|e| Refused::Conflict(format!("{key} cannot be made {len} bytes large: {e}")))
}

/// What is there when a newer process takes over.
pub struct HandedOver(pub Arc<Exports>);

impl Estate for HandedOver {
    fn with(&self, give: &mut dyn FnMut(&[Lot])) -> io::Result<()> {
        let _change = self.0.changes.wait();
        let served = self.0.all();
        served.iter().filter_map(|s| s.image()).for_each(Formatted::stop_flatten);
        expect_none_paused(&served)?;
        let lots = served.iter().map(|s| s.lot()).collect::<Result<Vec<_>>>().map_err(io::Error::other)?;
        give(&lots);
        Ok(())
    }
}
