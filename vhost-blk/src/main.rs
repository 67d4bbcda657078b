//! `vhost-blk`: opens images, starts reactors, serves sockets, obeys signals.

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use anyhow::{Context, Result, bail};
use daemon::takeover::{self, Heir, Source};
use daemon::{Place, Switch};
use poll_engine::device::features;
use poll_engine::engine::{Engine, EngineConfig};
use poll_engine::session::serve::Export;
use poll_engine::session::server::Server;
use poll_engine::stats::QueueStats;
use poll_engine::takeover::give::Lot;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM, SIGUSR1};
use signal_hook::iterator::Signals;
use tracing::{info, warn};
use vhost_blk::cli::{Cli, Synthetic};
use vhost_blk::device::BlkDevice;
use vhost_blk::disk::Disk;
use vhost_blk::image::Image;
use vhost_blk::record::Recorder;
use vhost_blk::report::report;
use vhost_blk::takeover::{About, Medium, PROGRAM};

type Inherited = takeover::Inherited<About>;

fn main() -> ExitCode {
    daemon::main(run)
}

/// A disk as asked for.
struct Wanted {
    name: String,
    place: Place,
    file: Option<PathBuf>,
    synthetic: Option<Synthetic>,
    serial: String,
    read_only: bool,
    incoming: bool,
    record: Option<PathBuf>,
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
    daemon::init_log(&cli.log)?;
    let wanted = wanted(cli)?;
    daemon::raise_descriptor_limit();
    let keys: Vec<_> = wanted.iter().map(|w| w.place.key()).collect();
    takeover::run(&cli.upgrade, PROGRAM, &keys, |heir, inherited| serve(cli, wanted, heir, inherited))
}

/// Serves until told to stop.
fn serve(
    cli: &Cli,
    wanted: Vec<Wanted>,
    heir: &mut Heir,
    mut inherited: Vec<Option<Inherited>>,
) -> Result<()> {
    // Everything that can be wrong is found out before anybody can connect, or the other process stops.
    let places: Vec<_> = inherited.iter().map(|i| i.as_ref().map(|i| i.place)).collect();
    let disks = wanted.iter().zip(&mut inherited).map(|(w, i)| open_disk(w, cli, i.take()));
    let disks = disks.collect::<Result<Vec<_>>>()?;
    let recorders = wanted.iter().zip(&disks).map(|(w, d)| record(w, d, cli));
    let recorders = recorders.collect::<Result<Vec<_>>>()?;
    let engine = Arc::new(Engine::start(&engine_config(cli))?);
    // Before the sockets: whoever sees one may send signals.
    let mut signals = Signals::new([SIGTERM, SIGINT, SIGHUP, SIGUSR1]).context("cannot handle signals")?;
    let sources = wanted.iter().zip(places).map(|(w, inherited)| Source::of(&w.place, inherited));
    let sources = sources.collect::<Result<Vec<_>, _>>()?;
    let control = heir.listen()?;

    heir.ask()?;
    let left = Arc::new(AtomicUsize::new(wanted.len()));
    let (mut served, mut prepared) = (Vec::new(), Vec::new());
    for (((wanted, disk), recorder), source) in wanted.into_iter().zip(disks).zip(recorders).zip(sources) {
        let withheld = if cli.device.packed == Switch::Off { features::RING_PACKED } else { 0 };
        let device =
            BlkDevice::new(Arc::clone(&disk), cli.device.num_queues, cli.device.queue_size, recorder.clone());
        let device = Arc::new(device.without(withheld));
        let stats: Vec<_> = std::iter::repeat_with(Arc::default).take(cli.device.num_queues.into()).collect();
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
    let mut successor = heir.settle(control, || served.iter().map(lot).collect(), move || over.close());

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

fn engine_config(cli: &Cli) -> EngineConfig {
    EngineConfig {
        cpus: cli.cpus.clone().unwrap_or_default(),
        pacing: cli.poll,
        fixed_buffers: cli.device.fixed_buffers.into(),
        count_cycles: false,
    }
}

fn lot(s: &Served) -> Result<Lot> {
    let (about, fd) = About::disk(&s.disk)?;
    takeover::lot(s.key.clone(), &about, fd.into_iter().collect(), &s.server, Arc::clone(&s.device) as _)
}

fn wanted(cli: &Cli) -> Result<Vec<Wanted>> {
    let place = match (&cli.socket_path, cli.fd) {
        (Some(path), _) => Some(Place::Path(path.clone())),
        (None, Some(fd)) => Some(Place::Fd(fd)),
        (None, None) => None,
    };
    let mut all = Vec::new();
    match (place, cli.blk_file.is_some() || cli.backend.is_some()) {
        (Some(place), true) => all.push(Wanted {
            name: name_of(cli.blk_file.as_ref(), cli.backend),
            place,
            file: cli.blk_file.clone(),
            synthetic: cli.backend,
            serial: cli.device.serial.clone(),
            read_only: cli.device.read_only,
            incoming: cli.incoming,
            record: cli.record.clone(),
        }),
        (Some(_), false) => bail!("nothing to serve; name an image with --blk-file, or a --backend"),
        (None, true) => bail!("nowhere to serve it; name a socket with --socket-path, or pass one with --fd"),
        (None, false) if cli.record.is_some() => {
            bail!(
                "--record goes with --blk-file or --backend; write --disk ...,record=FILE for further disks"
            )
        }
        (None, false) => {}
    }
    all.extend(cli.disk.iter().map(|d| Wanted {
        name: name_of(d.blk_file.as_ref(), d.backend),
        place: Place::Path(d.socket_path.clone()),
        file: d.blk_file.clone(),
        synthetic: d.backend,
        serial: d.serial.clone(),
        read_only: d.read_only || cli.device.read_only,
        incoming: d.incoming || cli.incoming,
        record: d.record.clone(),
    }));
    if all.is_empty() {
        bail!("nothing to serve; give --socket-path and --blk-file (see --help)");
    }
    Ok(all)
}

fn name_of(file: Option<&PathBuf>, synthetic: Option<Synthetic>) -> String {
    match (file, synthetic) {
        (Some(path), _) => path.display().to_string(),
        (None, Some(Synthetic::Ram(_))) => "ram".into(),
        (None, _) => "null".into(),
    }
}

fn open_disk(wanted: &Wanted, cli: &Cli, other: Option<Inherited>) -> Result<Arc<Disk>> {
    let medium = match (&wanted.file, wanted.synthetic) {
        (Some(_), _) => Medium::File,
        (None, Some(Synthetic::Ram(size))) => Medium::Ram(size),
        (None, Some(Synthetic::Null(_))) => Medium::Null,
        (None, None) => bail!("a disk without an image"),
    };
    if let Some(other) = &other {
        let ours = About { medium, read_only: wanted.read_only };
        other.about.expect(&wanted.place.key(), ours)?;
    }
    let image = Image {
        file: wanted.file.as_deref(),
        synthetic: wanted.synthetic,
        serial: &wanted.serial,
        read_only: wanted.read_only,
        incoming: wanted.incoming,
        beside: other.and_then(|other| other.fds.into_iter().next()),
    };
    Ok(Arc::new(image.open(&cli.device)?))
}

fn record(wanted: &Wanted, disk: &Disk, cli: &Cli) -> Result<Option<Arc<Recorder>>> {
    let Some(path) = &wanted.record else { return Ok(None) };
    let recorder = Recorder::create(path, cli.device.num_queues, disk.capacity(), disk.block_size())?;
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
