//! `vhost-net`: joins ports, starts reactors, serves sockets, obeys signals.

use std::collections::HashMap;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use anyhow::{Context, Result, bail};
use control::server::{Api, bind};
use daemon::Place;
use daemon::confine::{CapabilitySet, Identity, Mode, Places};
use daemon::takeover::{self, Heir, Inherited, Source, Successor};
use daemon::watchdog::Watchdog;
use poll_engine::engine::{Engine, EngineConfig};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM, SIGUSR1};
use signal_hook::iterator::Signals;
use tracing::{info, warn};
use vhost_net::api::router;
use vhost_net::captured::{Captured, OfHub, Wish};
use vhost_net::cli::{Cli, Options};
use vhost_net::hubs::RunningHub;
use vhost_net::join;
use vhost_net::pcap::{CaptureConfig, SNAPLEN};
use vhost_net::ports::{HandedOver, Ports, Setting, witness};
use vhost_net::served::{HubPort, Wanted};
use vhost_net::spec::PortSpec;
use vhost_net::takeover::{About, PROGRAM};

fn main() -> ExitCode {
    daemon::main(run)
}

fn run(cli: &Cli) -> Result<()> {
    if cli.print_capabilities {
        daemon::print_capabilities("net", &[]);
        return Ok(());
    }
    let named = cli.process.confine.enter()?;
    let options = &cli.options()?;
    if cli.check {
        let (_, plan) = options.run.place(&options.near())?;
        let plan = plan.map_or_else(String::new, |plan| format!("; {plan}"));
        daemon::print(&format!("nothing is wrong, {} ports{plan}", options.ports().len()));
        return Ok(());
    }
    let cli = &cli.completed(options);
    let identity = cli.process.identity(named)?;
    daemon::log::init(&options.run.log)?;
    let wanted =
        options.ports().into_iter().map(|spec| Wanted::open(spec, options)).collect::<Result<Vec<_>>>()?;
    let plan = join::plan(options);
    if let (Some(_), Some(w)) = (&cli.process.upgrade.control, wanted.iter().find(|w| w.tap.is_some())) {
        bail!("{}: a port that is joined to a tap cannot be handed over; leave --control out", w.name);
    }
    let uplink = options.uplink.iter().find_map(|uplink| uplink.tap.as_ref());
    if let (Some(_), Some(tap)) = (&cli.process.upgrade.control, uplink) {
        bail!("uplink {tap}: a tap cannot be handed over; leave --control out, or use af-packet");
    }
    daemon::raise_descriptor_limit();
    let keys: Vec<_> = wanted.iter().map(|w| w.place.key()).collect();
    takeover::run(&cli.process.upgrade, PROGRAM, &keys, |heir, inherited| {
        for (key, other) in keys.iter().zip(&inherited) {
            other.as_ref().map_or(Ok(()), |other: &Inherited<About>| other.about.expect(key, plan.into()))?;
        }
        let places = inherited.iter().map(|i| i.as_ref().map(|i| i.place));
        serve((cli, options), wanted, identity.as_ref(), heir, places)
    })
}

/// Serves until told to stop; ports with a place are those of another process. With a file, its options may change.
fn serve(
    (cli, options): (&Cli, &Options),
    wanted: Vec<Wanted>,
    identity: Option<&Identity>,
    heir: &mut Heir,
    inherited: impl Iterator<Item = Option<usize>>,
) -> Result<()> {
    let opens = opens(&wanted, options);
    let places = places(&wanted, cli, options);
    let confinement = cli.process.confine.threads(identity.cloned(), &places, CapabilitySet::empty())?;
    let told = |switch: Option<&str>| {
        let on = wanted.iter().filter(|w| w.spec.switch.as_deref() == switch);
        on.filter_map(|w| w.card.mtu).max()
    };
    let uplinks = join::open_uplinks(options, told)?;
    let captured = capture(options, &wanted)?;
    // Before the sockets: whoever sees one may send signals.
    let mut signals = Signals::new([SIGTERM, SIGINT, SIGHUP, SIGUSR1]).context("cannot handle signals")?;
    let sources = wanted.iter().zip(inherited).map(|(w, inherited)| Source::of(&w.place, inherited));
    let sources = sources.collect::<Result<Vec<_>, _>>()?;
    let control = heir.listen()?;
    let api = options
        .http
        .api
        .as_deref()
        .map(|path| bind(path, options.http.api_mode, heir.is_one()))
        .transpose()?;
    let (cpus, plan) = options.run.place(&options.near())?;
    if let Some(plan) = plan {
        info!("{plan}");
    }
    let config = EngineConfig {
        cpus,
        pacing: options.run.poll,
        count_cycles: options.record_core_cycles,
        ..EngineConfig::default()
    };
    let engine = Arc::new(Engine::start(&config)?);
    let joints = join::hubs(options, &guests(&wanted), uplinks, engine.reactors())?;
    let hubs = joints
        .into_iter()
        .map(|joint| RunningHub::start(joint, &engine, &|hub| witness(captured.as_ref(), hub)));
    let hubs = hubs.collect::<Result<Vec<_>>>()?;
    let withheld = join::withheld(options, None);
    confinement.seal()?;

    heir.ask()?;
    let left = Arc::new(AtomicUsize::new(wanted.len()));
    let (mut prepared, mut ready) = (Vec::new(), Vec::new());
    let numbers = of_hubs(&wanted);
    for (index, ((wanted, number), source)) in (0..).zip(wanted.into_iter().zip(numbers).zip(sources)) {
        let hub = hubs.iter().map(|running| &running.hub).find(|hub| hub.name == wanted.spec.switch);
        let port = hub.zip(number).map(|(hub, (_, number))| HubPort::new(Arc::clone(hub), number));
        let (export, one) = wanted.ready(&engine, port, withheld, captured.as_ref().map(|c| (c, index)))?;
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
    if let Some(captured) = &captured {
        captured.capture().keep();
    }
    let successor = Successor::default();
    let setting = Setting {
        engine: Arc::clone(&engine),
        plan: join::plan(options),
        withheld,
        file: cli.config.clone(),
        successor: successor.clone(),
        opens: opens || cli.process.confine.mode() == Mode::Off,
    };
    let ports = Arc::new(Ports::new(setting, options.clone(), served, captured, hubs));
    let api = api.map(|listener| Api::start(listener, router(Arc::clone(&ports)))).transpose();
    let mut api = api.context("cannot serve the API")?;
    if let (Some(api), Some(path), true) = (&mut api, &options.http.api, heir.is_one()) {
        // Before the other process may leave, which takes its socket along unless ours is there.
        api.replace(path).unwrap_or_else(|e| warn!("the API stays on {}.new: {e}", path.display()));
    }
    let (over, estate) = (signals.handle(), Arc::clone(&ports));
    heir.settle(&successor, control, move || HandedOver(Arc::clone(&estate)), move || over.close());

    let watchdog = Watchdog::start(&engine, heir.is_one())?;
    for signal in signals.forever() {
        match signal {
            SIGHUP => ports.read_again(),
            SIGUSR1 => daemon::print(&ports.report()),
            _ => break,
        }
    }
    drop(watchdog);
    successor.bid_farewell();
    info!("stopping: finishing what is in flight");
    // Those that still call are told so.
    ports.begin_stop();
    drop(api);
    drop(ports);
    drop(engine);
    successor.outcome()
}

/// Whether it is joined to an interface of the host's: one that was gone is opened again.
fn opens(wanted: &[Wanted], options: &Options) -> bool {
    !options.uplink.is_empty() || wanted.iter().any(|w| w.tap.is_some())
}

/// Where something is done by name once all is open.
fn places(wanted: &[Wanted], cli: &Cli, options: &Options) -> Places {
    let sockets = wanted.iter().filter_map(|w| w.place.path()).chain(cli.process.upgrade.control.as_deref());
    let own = sockets.chain(options.http.api.as_deref()).chain(options.pcap.as_deref());
    let mut places = Places { sockets: own.map(Places::directory_of).collect(), ..Places::default() };
    if opens(wanted, options) {
        places.devices.push(PathBuf::from("/dev/net"));
    }
    // It is read again.
    places.read.extend(cli.config.as_deref().map(Places::directory_of));
    if options.http.api.is_some() {
        places.for_api(&options.http.allow, cli.config.as_deref());
    }
    places
}

/// The capture that was asked for, with an interface for each port.
fn capture(options: &Options, wanted: &[Wanted]) -> Result<Option<Captured>> {
    let Some(file) = options.pcap.clone() else { return Ok(None) };
    let filter = options.pcap_filter.clone().unwrap_or_default();
    let config = CaptureConfig { snaplen: options.pcap_snaplen.unwrap_or(SNAPLEN), filter };
    let mut ports: Vec<_> = wanted.iter().map(|w| w.name.clone()).zip(of_hubs(wanted)).collect();
    for uplink in &options.uplink {
        // The last port of its hub.
        let number = wanted.iter().filter(|w| w.tap.is_none() && w.spec.switch == uplink.switch).count();
        ports.push((uplink.name(), Some((uplink.switch.clone(), u16::try_from(number)?))));
    }
    Captured::begin(Wish { file, config }, ports.into_iter()).map(Some)
}

/// The hubs of ports, by the names of switches, and their numbers there.
fn of_hubs(wanted: &[Wanted]) -> Vec<Option<OfHub>> {
    let mut next: HashMap<Option<String>, u16> = HashMap::new();
    let mut number = |w: &Wanted| {
        let next = next.entry(w.spec.switch.clone()).or_default();
        *next += 1;
        (w.spec.switch.clone(), *next - 1)
    };
    wanted.iter().map(|w| w.tap.is_none().then(|| number(w))).collect()
}

/// Ports of hubs, with their pairs of queues.
fn guests(wanted: &[Wanted]) -> Vec<(&PortSpec, u16)> {
    wanted.iter().filter(|w| w.tap.is_none()).map(|w| (&w.spec, w.card.pairs)).collect()
}
