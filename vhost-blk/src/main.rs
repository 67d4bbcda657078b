//! `vhost-blk`: opens images, starts reactors, serves sockets, obeys signals.

use std::io::{IsTerminal, Write};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use anyhow::{Context, Result, bail};
use clap::Parser;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use poll_engine::engine::{Engine, EngineConfig};
use poll_engine::memory::Ram;
use poll_engine::session::listen::Listener;
use poll_engine::session::serve::{Export, Server};
use poll_engine::stats::QueueStats;
use poll_engine::uring::FixedBuffers;
use sd_notify::NotifyState;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM, SIGUSR1};
use signal_hook::iterator::Signals;
use tracing::{info, warn};
use tracing_subscriber::EnvFilter;
use vhost_blk::cli::{CacheMode, Cli, Fixed, Switch, Synthetic};
use vhost_blk::device::BlkDevice;
use vhost_blk::disk::{Disk, DiskConfig, Storage};
use vhost_blk::open::open;
use vhost_blk::record::Recorder;
use vhost_blk::report::report;

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(e) => return usage(&e),
    };
    match run(&cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("vhost-blk: {e:#}");
            ExitCode::FAILURE
        }
    }
}

/// Help and version go out as they are; a mistake is one line, like every other error.
fn usage(error: &clap::Error) -> ExitCode {
    if !error.use_stderr() {
        error.exit();
    }
    let text = error.render().to_string();
    // The first paragraph says what is wrong; usage and hints follow behind an empty line.
    let what =
        text.lines().take_while(|line| !line.trim().is_empty()).map(str::trim).collect::<Vec<_>>().join(" ");
    eprintln!("vhost-blk: {} (see vhost-blk --help)", what.trim_start_matches("error: "));
    ExitCode::from(2)
}

/// Where a disk is served.
enum Place {
    Path(PathBuf),
    Fd(i32),
}

/// A disk as asked for.
struct Wanted {
    name: String,
    place: Place,
    file: Option<PathBuf>,
    synthetic: Option<Synthetic>,
    serial: String,
    read_only: bool,
    record: Option<PathBuf>,
}

/// A disk being served.
struct Served {
    name: String,
    disk: Arc<Disk>,
    stats: Vec<Arc<QueueStats>>,
    server: Server,
    /// After the server: with it gone, nothing is noted any more.
    recorder: Option<Arc<Recorder>>,
}

fn run(cli: &Cli) -> Result<()> {
    if cli.print_capabilities {
        println!("{}", serde_json::json!({ "type": "block", "features": ["read-only", "blk-file"] }));
        return Ok(());
    }
    let filter = EnvFilter::try_new(&cli.log).with_context(|| format!("--log '{}' is no filter", cli.log))?;
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .with_target(false)
        .init();
    let wanted = wanted(cli)?;
    raise_descriptor_limit();

    // Everything that can be wrong is found out before anybody can connect.
    let disks = wanted.iter().map(|w| open_disk(w, cli)).collect::<Result<Vec<_>>>()?;
    let mut recorders =
        wanted.iter().zip(&disks).map(|(w, d)| record(w, d, cli)).collect::<Result<Vec<_>>>()?;
    let engine = Arc::new(Engine::start(&EngineConfig {
        cpus: cli.cpus.clone().unwrap_or_default(),
        pacing: cli.poll,
        fixed_buffers: match cli.fixed_buffers {
            Fixed::Auto => FixedBuffers::Auto,
            Fixed::On => FixedBuffers::On,
            Fixed::Off => FixedBuffers::Off,
        },
    })?);
    // Before the sockets: whoever sees one may send signals.
    let mut signals = Signals::new([SIGTERM, SIGINT, SIGHUP, SIGUSR1]).context("cannot handle signals")?;
    let listeners = wanted.iter().map(|w| Ok(listen(&w.place)?)).collect::<Result<Vec<_>>>()?;
    let left = Arc::new(AtomicUsize::new(wanted.len()));
    recorders.iter_mut().flatten().for_each(Recorder::keep);

    let mut served = Vec::new();
    for (((wanted, disk), recorder), listener) in wanted.into_iter().zip(disks).zip(recorders).zip(listeners)
    {
        let recorder = recorder.map(Arc::new);
        let device = BlkDevice::new(Arc::clone(&disk), cli.num_queues, cli.queue_size, recorder.clone());
        let stats: Vec<_> = std::iter::repeat_with(Arc::default).take(cli.num_queues.into()).collect();
        let (name, engine) = (wanted.name.clone(), Arc::clone(&engine));
        let export = Export { name, device: Arc::new(device), stats: stats.clone(), engine };
        let (left, signals) = (Arc::clone(&left), signals.handle());
        let ended = move || {
            // A connected --fd has had its one front end.
            if left.fetch_sub(1, Ordering::AcqRel) == 1 {
                signals.close();
            }
        };
        let server = Server::start(export, listener, ended).context("cannot start a control thread")?;
        info!("serving {}, {} bytes", wanted.name, disk.capacity());
        served.push(Served { name: wanted.name, disk, stats, server, recorder });
    }
    // Nobody to notify is the usual case.
    let _ = sd_notify::notify(&[NotifyState::Ready]);

    for signal in signals.forever() {
        match signal {
            SIGHUP => grow(&served),
            SIGUSR1 => print_statistics(&served),
            _ => break,
        }
    }
    let _ = sd_notify::notify(&[NotifyState::Stopping]);
    info!("stopping: finishing what is in flight");
    // All at once, then each awaited by its drop.
    for s in &served {
        s.server.begin_stop();
    }
    drop(served);
    drop(engine);
    Ok(())
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
            serial: cli.serial.clone(),
            read_only: cli.read_only,
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
        read_only: d.read_only || cli.read_only,
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

fn open_disk(wanted: &Wanted, cli: &Cli) -> Result<Arc<Disk>> {
    let (storage, capacity) = match (&wanted.file, wanted.synthetic) {
        (Some(path), _) => {
            let (file, traits, size) =
                open(path, wanted.read_only, cli.direct == Switch::On, cli.block_size)?;
            (Storage::File(file, traits), size)
        }
        (None, Some(Synthetic::Ram(size))) => {
            let ram = Ram::new(0, size, false)
                .with_context(|| format!("cannot get {size} bytes for a RAM disk"))?;
            (Storage::Ram(Arc::new(ram)), size)
        }
        (None, Some(Synthetic::Null(size))) => (Storage::Null, size),
        (None, None) => bail!("a disk without an image"),
    };
    if !capacity.is_multiple_of(u64::from(cli.block_size)) {
        bail!("{} bytes are no multiple of --block-size {}; choose another size", capacity, cli.block_size);
    }
    Ok(Arc::new(Disk::new(
        storage,
        capacity,
        &DiskConfig {
            block_size: cli.block_size,
            read_only: wanted.read_only,
            serial: wanted.serial.clone(),
            writeback: cli.cache == CacheMode::Writeback,
            ring_size: cli.queue_size,
        },
    )))
}

fn record(wanted: &Wanted, disk: &Disk, cli: &Cli) -> Result<Option<Recorder>> {
    let Some(path) = &wanted.record else { return Ok(None) };
    let recorder = Recorder::create(path, cli.num_queues, disk.capacity(), disk.block_size())?;
    info!("recording the requests to {} in {}", wanted.name, path.display());
    Ok(Some(recorder))
}

fn listen(place: &Place) -> Result<Listener, poll_engine::session::listen::ListenError> {
    match place {
        Place::Path(path) => Listener::bind(path),
        Place::Fd(fd) => Listener::inherited(*fd),
    }
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
    // Whoever asked may have closed the pipe.
    let mut out = std::io::stdout().lock();
    let _ = writeln!(out, "{text}").and_then(|()| out.flush());
}

/// Guests bring descriptors: regions, kicks and calls. Take what the administrator allows.
fn raise_descriptor_limit() {
    if let Ok((_, hard)) = getrlimit(Resource::RLIMIT_NOFILE) {
        let _ = setrlimit(Resource::RLIMIT_NOFILE, hard, hard);
    }
}
