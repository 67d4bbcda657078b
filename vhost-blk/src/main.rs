//! `vhost-blk`: opens images, starts reactors, serves sockets, obeys signals.

use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use anyhow::{Context, Result};
use daemon::confine::{CapabilitySet, Identity, Places};
use daemon::takeover::{self, Heir, Source};
use daemon::{Place, Switch};
use poll_engine::device::features;
use poll_engine::engine::{Engine, EngineConfig};
use poll_engine::memory::userfault;
use poll_engine::session::serve::Export;
use poll_engine::session::server::Server;
use poll_engine::stats::QueueStats;
use poll_engine::takeover::give::Lot;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM, SIGUSR1};
use signal_hook::iterator::Signals;
use tracing::{info, warn};
use vhost_blk::cli::{Cli, DeviceOptions, Options};
use vhost_blk::device::BlkDevice;
use vhost_blk::disk::Disk;
use vhost_blk::image::Image;
use vhost_blk::record::Recorder;
use vhost_blk::report::report;
use vhost_blk::spec::DiskSpec;
use vhost_blk::takeover::{About, PROGRAM};

type Inherited = takeover::Inherited<About>;

fn main() -> ExitCode {
    daemon::main(run)
}

/// A disk as asked for.
struct Wanted {
    name: String,
    place: Place,
    spec: DiskSpec,
    device: DeviceOptions,
}

/// A disk being served.
struct Served {
    name: String,
    key: String,
    disk: Arc<Disk>,
    stats: Vec<Arc<QueueStats>>,
    server: Arc<Server>,
    device: Arc<BlkDevice>,
    /// After the server: with it gone, nothing is noted any more.
    recorder: Option<Arc<Recorder>>,
}

fn run(cli: &Cli) -> Result<()> {
    if cli.print_capabilities {
        daemon::print_capabilities("block", &["read-only", "blk-file"]);
        return Ok(());
    }
    let identity = cli.confine.enter()?;
    let options = &cli.options()?;
    let wanted = options.disks();
    if cli.check {
        daemon::print(&format!("nothing is wrong, {} disks", wanted.len()));
        return Ok(());
    }
    daemon::init_log(&options.log)?;
    daemon::raise_descriptor_limit();
    let places = wanted.iter().map(|w| w.place().context("a disk without a socket"));
    let places = places.collect::<Result<Vec<_>>>()?;
    let keys: Vec<_> = places.iter().map(Place::key).collect();
    takeover::run(&cli.upgrade, PROGRAM, &keys, |heir, inherited| {
        let wanted = wanted.into_iter().zip(places).map(|(spec, place)| Wanted {
            device: spec.device(&options.device),
            name: spec.title(),
            spec,
            place,
        });
        serve((cli, options), wanted.collect(), identity, heir, inherited)
    })
}

/// Serves until told to stop.
fn serve(
    (cli, options): (&Cli, &Options),
    wanted: Vec<Wanted>,
    identity: Option<Identity>,
    heir: &mut Heir,
    mut inherited: Vec<Option<Inherited>>,
) -> Result<()> {
    let confinement = cli.confine.threads(identity, &places(&wanted, cli), CapabilitySet::empty())?;
    // A guest that migrates may come before its memory, later.
    userfault::keep_device();
    // Everything that can be wrong is found out before anybody can connect, or the other process stops.
    let places: Vec<_> = inherited.iter().map(|i| i.as_ref().map(|i| i.place)).collect();
    let disks = wanted.iter().zip(&mut inherited).map(|(w, i)| open_disk(w, i.take()));
    let disks = disks.collect::<Result<Vec<_>>>()?;
    let recorders = wanted.iter().zip(&disks).map(|(w, d)| record(w, d));
    let recorders = recorders.collect::<Result<Vec<_>>>()?;
    let engine = Arc::new(Engine::start(&engine_config(options))?);
    // Before the sockets: whoever sees one may send signals.
    let mut signals = Signals::new([SIGTERM, SIGINT, SIGHUP, SIGUSR1]).context("cannot handle signals")?;
    let sources = wanted.iter().zip(places).map(|(w, inherited)| Source::of(&w.place, inherited));
    let sources = sources.collect::<Result<Vec<_>, _>>()?;
    let control = heir.listen()?;
    confinement.seal()?;

    heir.ask()?;
    let left = Arc::new(AtomicUsize::new(wanted.len()));
    let (mut served, mut prepared) = (Vec::new(), Vec::new());
    for (((wanted, disk), recorder), source) in wanted.into_iter().zip(disks).zip(recorders).zip(sources) {
        let DeviceOptions { num_queues, queue_size, packed, .. } = wanted.device;
        let withheld = if packed == Switch::Off { features::RING_PACKED } else { 0 };
        let device = BlkDevice::new(Arc::clone(&disk), num_queues, queue_size, recorder.clone());
        let device = Arc::new(device.without(withheld));
        let stats: Vec<_> = std::iter::repeat_with(Arc::default).take(num_queues.into()).collect();
        let (name, engine) = (wanted.name.clone(), Arc::clone(&engine));
        let export = Export { name, device: Arc::clone(&device) as _, stats: stats.clone(), engine };
        let (left, signals) = (Arc::clone(&left), signals.handle());
        let ended = move || {
            // A connected --fd has had its one front end.
            if left.fetch_sub(1, Ordering::AcqRel) == 1 {
                signals.close();
            }
        };
        prepared.push(heir.prepare(export, source, ended)?);
        served.push((wanted, disk, stats, device, recorder));
    }
    let servers = heir.go(served.iter().map(|(wanted, ..)| &wanted.place).zip(prepared))?;
    let served = served.into_iter().zip(servers).map(|((wanted, disk, stats, device, recorder), server)| {
        info!("serving {}, {} bytes", wanted.name, disk.capacity());
        if let Some(recorder) = &recorder {
            recorder.keep();
        }
        Served { name: wanted.name, key: wanted.place.key(), disk, stats, server, device, recorder }
    });
    let served: Vec<_> = served.collect();
    let over = signals.handle();
    let mut successor =
        heir.settle(control, || served.iter().map(lot).collect::<Result<Vec<_>>>(), move || over.close());

    for signal in signals.forever() {
        match signal {
            SIGHUP => grow(&served),
            SIGUSR1 => print_statistics(&served),
            _ => break,
        }
    }
    successor.bid_farewell();
    info!("stopping: finishing what is in flight");
    // All at once, then each awaited by its drop.
    for s in &served {
        s.server.begin_stop();
    }
    drop(served);
    drop(engine);
    successor.outcome()
}

/// Where something is done by name once all is open.
fn places(wanted: &[Wanted], cli: &Cli) -> Places {
    let sockets = wanted.iter().filter_map(|w| w.place.path()).chain(cli.upgrade.control.as_deref());
    let records = wanted.iter().filter_map(|w| w.spec.record.as_deref());
    Places { sockets: sockets.chain(records).map(Places::directory_of).collect(), ..Places::default() }
}

fn engine_config(options: &Options) -> EngineConfig {
    EngineConfig {
        cpus: options.cpus.clone().unwrap_or_default(),
        pacing: options.poll,
        fixed_buffers: options.device.fixed_buffers.into(),
        count_cycles: false,
    }
}

fn lot(s: &Served) -> Result<Lot> {
    let (about, fd) = About::disk(&s.disk)?;
    takeover::lot(s.key.clone(), &about, fd.into_iter().collect(), &s.server, Arc::clone(&s.device) as _)
}

fn open_disk(wanted: &Wanted, other: Option<Inherited>) -> Result<Arc<Disk>> {
    let Wanted { spec, device, place, .. } = wanted;
    let medium = spec.medium().context("a disk without an image")?;
    if let Some(other) = &other {
        other.about.expect(&place.key(), About { medium, read_only: device.read_only })?;
    }
    let image = Image {
        file: spec.blk_file.as_deref(),
        synthetic: spec.backend,
        serial: &device.serial,
        read_only: device.read_only,
        incoming: spec.incoming,
        beside: other.and_then(|other| other.fds.into_iter().next()),
    };
    Ok(Arc::new(image.open(device)?))
}

fn record(wanted: &Wanted, disk: &Disk) -> Result<Option<Arc<Recorder>>> {
    let Some(path) = &wanted.spec.record else { return Ok(None) };
    let recorder = Recorder::create(path, wanted.device.num_queues, disk.capacity(), disk.block_size())?;
    info!("recording the requests to {} in {}", wanted.name, path.display());
    Ok(Some(Arc::new(recorder)))
}

fn grow(served: &[Served]) {
    for s in served {
        match s.disk.grow() {
            Ok(Some(size)) => {
                info!("{} has grown to {size} bytes", s.name);
                s.server.config_changed();
            }
            Ok(None) => {}
            Err(e) => warn!("{}: {e}", s.name),
        }
    }
}

fn print_statistics(served: &[Served]) {
    let of = |s: &Served| {
        let record = s.recorder.as_ref().map(|r| r.line() + "\n").unwrap_or_default();
        report(&s.name, s.disk.capacity(), &s.stats) + &record
    };
    let text: String = served.iter().map(of).collect();
    daemon::print(&text);
}
