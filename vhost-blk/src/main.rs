//! `vhost-blk`: opens images, starts reactors, serves sockets, obeys signals.

use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use anyhow::{Context, Result};
use control::server::{Api, bind};
use daemon::Place;
use daemon::confine::{CapabilitySet, Identity, Places};
use daemon::takeover::{self, Heir, Source, Successor};
use daemon::watchdog::Watchdog;
use poll_engine::engine::{Engine, EngineConfig};
use poll_engine::memory::userfault;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM, SIGUSR1};
use signal_hook::iterator::Signals;
use tracing::{info, warn};
use vhost_blk::api::router;
use vhost_blk::backend::luks;
use vhost_blk::cli::{Cli, Options};
use vhost_blk::clone::Base;
use vhost_blk::exports::{Exports, HandedOver, Wanted};
use vhost_blk::pool::Pools;
use vhost_blk::takeover::{About, PROGRAM};

type Inherited = takeover::Inherited<About>;

fn main() -> ExitCode {
    daemon::main(run)
}

fn run(cli: &Cli) -> Result<()> {
    if cli.print_capabilities {
        daemon::print_capabilities("block", &["read-only", "blk-file"]);
        return Ok(());
    }
    let named = cli.process.confine.enter()?;
    let options = &cli.options()?;
    let disks = options.disks();
    if cli.check {
        let (_, plan) = options.run.place(&options.near())?;
        let plan = plan.map_or_else(String::new, |plan| format!("; {plan}"));
        daemon::print(&format!("nothing is wrong, {} disks{plan}", disks.len()));
        return Ok(());
    }
    let cli = &cli.completed(options);
    let identity = cli.process.identity(named)?;
    daemon::log::init(&options.run.log)?;
    daemon::raise_descriptor_limit();
    let wanted =
        disks.into_iter().map(|spec| Wanted::new(spec, &options.device)).collect::<Result<Vec<_>>>()?;
    let keys: Vec<_> = wanted.iter().map(|w| w.place.key()).collect();
    takeover::run(&cli.process.upgrade, PROGRAM, &keys, |heir, inherited| {
        serve((cli, options), wanted, identity, heir, inherited)
    })
}

/// Serves until told to stop. The options may come from a file, and the socket of the API may be that of the process that
/// this one takes over from.
fn serve(
    (cli, options): (&Cli, &Options),
    wanted: Vec<Wanted>,
    identity: Option<Identity>,
    heir: &mut Heir,
    mut inherited: Vec<Option<Inherited>>,
) -> Result<()> {
    let is_heir = cli.process.upgrade.takeover.is_some();
    let confinement =
        cli.process.confine.threads(identity, &places(&wanted, cli, options), CapabilitySet::empty())?;
    if options.http.api.is_some() {
        // Volumes may come later, when code is loaded no more.
        luks::prepare();
    }
    // A guest that migrates may come before its memory, later.
    userfault::keep_device();
    for w in &wanted {
        w.make(Base::clone_to)?;
    }
    // Everything that can be wrong is found out before anybody can connect, or the other process stops.
    let places: Vec<_> = inherited.iter().map(|i| i.as_ref().map(|i| i.place)).collect();
    let disks =
        wanted.iter().zip(&mut inherited).map(|(w, i)| w.open(i.take())).collect::<Result<Vec<_>>>()?;
    let recorders = wanted.iter().zip(&disks).map(|(w, d)| w.record(d)).collect::<Result<Vec<_>>>()?;
    let engine = Arc::new(Engine::start(&engine_config(options)?)?);
    // Before the sockets: whoever sees one may send signals.
    let mut signals = Signals::new([SIGTERM, SIGINT, SIGHUP, SIGUSR1]).context("cannot handle signals")?;
    let sources = wanted.iter().zip(places).map(|(w, inherited)| Source::of(&w.place, inherited));
    let sources = sources.collect::<Result<Vec<_>, _>>()?;
    let control = heir.listen()?;
    let api =
        options.http.api.as_deref().map(|path| bind(path, options.http.api_mode, is_heir)).transpose()?;
    confinement.seal()?;

    heir.ask()?;
    let left = Arc::new(AtomicUsize::new(wanted.len()));
    let (mut ready, mut prepared) = (Vec::new(), Vec::new());
    for (((wanted, disk), recorder), source) in wanted.into_iter().zip(disks).zip(recorders).zip(sources) {
        let (export, one) = wanted.ready(disk, recorder, &engine);
        let (left, signals, stays) = (Arc::clone(&left), signals.handle(), api.is_some());
        let ended = move || {
            // A connected --fd has had its one front end. With the API, others may come.
            if left.fetch_sub(1, Ordering::AcqRel) == 1 && !stays {
                signals.close();
            }
        };
        prepared.push(heir.prepare(export, source, ended)?);
        ready.push(one);
    }
    let keys: Vec<Place> = ready.iter().map(|r| r.wanted.place.clone()).collect();
    let servers = heir.go(keys.iter().zip(prepared))?;
    let served = ready.into_iter().zip(servers).map(|(ready, server)| ready.served(server)).collect();
    let pools = Pools::start(&options.pool).context("cannot keep pools")?;
    let successor = Successor::default();
    let further = (pools, successor.clone());
    let exports =
        Arc::new(Exports::new(Arc::clone(&engine), options.clone(), cli.config.clone(), served, further));
    let api = api.map(|listener| Api::start(listener, router(Arc::clone(&exports)))).transpose();
    let mut api = api.context("cannot serve the API")?;
    if let (Some(api), Some(path), true) = (&mut api, &options.http.api, is_heir) {
        // Before the other process may leave, which takes its socket along unless ours is there.
        api.replace(path).unwrap_or_else(|e| warn!("the API stays on {}.new: {e}", path.display()));
    }
    let (over, estate) = (signals.handle(), Arc::clone(&exports));
    heir.settle(&successor, control, move || HandedOver(Arc::clone(&estate)), move || over.close());

    let watchdog = Watchdog::start(&engine, is_heir)?;
    for signal in signals.forever() {
        match signal {
            SIGHUP => exports.grow_all(),
            SIGUSR1 => daemon::print(&exports.report()),
            _ => break,
        }
    }
    drop(watchdog);
    successor.bid_farewell();
    info!("stopping: finishing what is in flight");
    // Those that still call are told so.
    exports.begin_stop();
    drop(api);
    drop(exports);
    drop(engine);
    successor.outcome()
}

/// Where something is done by name once all is open.
fn places(wanted: &[Wanted], cli: &Cli, options: &Options) -> Places {
    let sockets = wanted.iter().filter_map(|w| w.place.path()).chain(cli.process.upgrade.control.as_deref());
    let records = wanted.iter().filter_map(|w| w.record_path());
    let all = sockets.chain(records).chain(options.http.api.as_deref());
    let mut places = Places { sockets: all.map(Places::directory_of).collect(), ..Places::default() };
    if options.http.api.is_some() {
        // Disks that are added. Threads that guests have to do with stay without any files.
        places.for_api(&options.http.allow, cli.config.as_deref());
        places.read.extend(luks::credentials());
    }
    places
}

fn engine_config(options: &Options) -> Result<EngineConfig> {
    let (cpus, plan) = options.run.place(&options.near())?;
    if let Some(plan) = plan {
        info!("{plan}");
    }
    Ok(EngineConfig {
        cpus,
        pacing: options.run.poll,
        fixed_buffers: options.device.fixed_buffers.into(),
        ..EngineConfig::default()
    })
}
