//! `vhost-net`: joins ports, starts reactors, serves sockets, obeys signals.

use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use anyhow::{Context, Result, bail};
use daemon::Place;
use daemon::confine::{CapabilitySet, Identity};
use daemon::takeover::{self, Heir, Inherited, Source};
use daemon::watchdog::Watchdog;
use poll_engine::device::Device;
use poll_engine::engine::{Engine, EngineConfig};
use poll_engine::session::serve::Export;
use poll_engine::session::server::Server;
use poll_engine::stats::QueueStats;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM, SIGUSR1};
use signal_hook::iterator::Signals;
use tracing::{info, warn};
use vhost_net::cli::{Cli, Options};
use vhost_net::device::{Card, Joined, MTU_RANGE, NetDevice};
use vhost_net::hub::{Hub, Plan, Port};
use vhost_net::join;
use vhost_net::outside::Outside;
use vhost_net::pcap::{Capture, CaptureConfig, SNAPLEN};
use vhost_net::port::Uplink;
use vhost_net::port::tap::Tap;
use vhost_net::port::tap::card::TapCard;
use vhost_net::reload::{Reload, reload};
use vhost_net::report::{cycles, report, tap_report, uplink_report};
use vhost_net::shard::Shard;
use vhost_net::spec::PortSpec;
use vhost_net::switch::{PortConfig, PortId};
use vhost_net::takeover::{About, PROGRAM};
use vhost_net::witness::Witness;

fn main() -> ExitCode {
    daemon::main(run)
}

/// A port as asked for, and what is open of it.
struct Wanted {
    name: String,
    place: Place,
    spec: PortSpec,
    card: Card,
    /// What it is joined to, if not to a hub.
    tap: Option<Arc<Tap>>,
}

/// A port being served.
struct Served {
    name: String,
    counted: Counted,
    stats: Vec<Arc<QueueStats>>,
    server: Arc<Server>,
    place: Place,
    device: Arc<NetDevice>,
}

/// Where a port's packets are counted.
enum Counted {
    /// At the port of this number.
    Hub(Arc<Port>, u16),
    Tap(Arc<Tap>),
}

impl Served {
    /// Has the link up or down, and the guest see it.
    fn set_link(&self, up: bool) -> Result<()> {
        if self.device.set_link(up)? {
            self.server.set_link(up);
            info!("port {}: its link is {}", self.name, if up { "up" } else { "down" });
        }
        Ok(())
    }

    /// Is what is asked for now, as far as that can change.
    fn change(&self, spec: &PortSpec, hub: &Hub) {
        if let Counted::Hub(_, number) = &self.counted {
            set_rules(hub, *number, spec);
        }
        if let Err(e) = self.set_link(!spec.link_down) {
            warn!("port {}: its link: {e:#}", self.name);
        }
    }

    fn report(&self, hub: &Hub) -> String {
        match &self.counted {
            Counted::Hub(port, number) => {
                let switched = hub.switch.as_ref().map(|switch| switch.counters(PortId(*number)));
                report(port, &self.stats, &switched.unwrap_or_default())
            }
            Counted::Tap(tap) => tap_report(&self.name, tap),
        }
    }
}

fn run(cli: &Cli) -> Result<()> {
    if cli.print_capabilities {
        daemon::print_capabilities("net", &[]);
        return Ok(());
    }
    let identity = cli.confine.enter()?;
    let options = &cli.options()?;
    if cli.check {
        daemon::print(&format!("nothing is wrong, {} ports", options.ports().len()));
        return Ok(());
    }
    daemon::init_log(&options.log)?;
    let wanted = options.ports().into_iter().map(|spec| open(spec, options)).collect::<Result<Vec<_>>>()?;
    let plan = join::plan(options);
    if let (Some(_), Some(w)) = (&cli.upgrade.control, wanted.iter().find(|w| w.tap.is_some())) {
        bail!("{}: a port that is joined to a tap cannot be handed over; leave --control out", w.name);
    }
    let uplink = options.uplink.as_ref().and_then(|uplink| uplink.tap.as_ref());
    if let (Some(_), Some(tap)) = (&cli.upgrade.control, uplink) {
        bail!("uplink {tap}: a tap cannot be handed over; leave --control out, or use af-packet");
    }
    daemon::raise_descriptor_limit();
    let keys: Vec<_> = wanted.iter().map(|w| w.place.key()).collect();
    takeover::run(&cli.upgrade, PROGRAM, &keys, |heir, inherited| {
        for (key, other) in keys.iter().zip(&inherited) {
            other.as_ref().map_or(Ok(()), |other: &Inherited<About>| other.about.expect(key, plan.into()))?;
        }
        let places = inherited.iter().map(|i| i.as_ref().map(|i| i.place));
        serve((cli, options), wanted, (plan, identity), heir, places)
    })
}

/// Serves until told to stop; ports with a place are those of another process. With a file, its options may change.
fn serve(
    (cli, options): (&Cli, &Options),
    wanted: Vec<Wanted>,
    (plan, identity): (Plan, Option<Identity>),
    heir: &mut Heir,
    places: impl Iterator<Item = Option<usize>>,
) -> Result<()> {
    let mut uplink = open_uplink(options, &wanted)?;
    let capture = capture(options, &wanted)?;
    // Before the sockets: whoever sees one may send signals.
    let mut signals = Signals::new([SIGTERM, SIGINT, SIGHUP, SIGUSR1]).context("cannot handle signals")?;
    let sources = wanted.iter().zip(places).map(|(w, inherited)| Source::of(&w.place, inherited));
    let sources = sources.collect::<Result<Vec<_>, _>>()?;
    let control = heir.listen()?;
    // Interfaces that were gone are opened again.
    let keep = CapabilitySet::NET_ADMIN | CapabilitySet::NET_RAW;
    cli.confine.seal_coarsely(identity.as_ref(), keep)?;
    let config = EngineConfig {
        cpus: options.cpus.clone().unwrap_or_default(),
        pacing: options.poll,
        count_cycles: options.record_core_cycles,
        ..EngineConfig::default()
    };
    let engine = Arc::new(Engine::start(&config)?);
    let uplink_mtu = uplink.as_mut().map(|u| u.link().mtu);
    let hub = Arc::new(join::hub(options, &guests(&wanted), uplink_mtu, engine.reactors()));
    // The last port.
    let out = hub.ports().len().saturating_sub(1);
    hub.connect(&engine);
    let withheld = join::withheld(options, uplink.as_deref());
    let shards = (0..engine.reactors()).map(|reactor| {
        let witness = witness(capture.as_deref(), &wanted);
        let mut shard = Shard::new(Arc::clone(&hub), reactor).with_witness(witness);
        if let Some(uplink) = uplink.take_if(|_| reactor == 0) {
            shard = shard.with_outside(Outside::new(out, uplink));
        }
        engine.add_station(reactor, Box::new(shard)).context("cannot start a shard")
    });
    let shards = shards.collect::<Result<Vec<_>>>()?;

    heir.ask()?;
    let left = Arc::new(AtomicUsize::new(wanted.len()));
    let (mut prepared, mut ready) = (Vec::new(), Vec::new());
    let all = hub.ports();
    let mut ports = (0..).zip(all.iter());
    for (index, (mut wanted, source)) in (0..).zip(wanted.into_iter().zip(sources)) {
        let (joined, counted) = if let Some(tap) = wanted.tap.take() {
            let capture = capture.as_ref().map(|capture| (Arc::clone(capture), index));
            (Joined::Tap(TapCard::new(Arc::clone(&tap), capture)), Counted::Tap(tap))
        } else {
            let (number, port) = ports.next().context("a port of the hub is missing")?;
            let joined = Joined::Hub(Arc::clone(&hub), number.into());
            (joined, Counted::Hub(Arc::clone(port), number))
        };
        let device = Arc::new(NetDevice::new(wanted.card, joined, withheld));
        if wanted.spec.link_down {
            device.set_link(false).with_context(|| format!("port {}: its link", wanted.name))?;
        }
        let stats: Vec<_> = std::iter::repeat_with(Arc::default).take(device.num_queues().into()).collect();
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
        ready.push((wanted, counted, stats, device));
    }
    let servers = heir.go(ready.iter().map(|(wanted, ..)| &wanted.place).zip(prepared))?;
    let mut served = Vec::new();
    for ((Wanted { name, place, spec, .. }, counted, stats, device), server) in ready.into_iter().zip(servers)
    {
        if let Counted::Tap(tap) = &counted {
            tap.on_change(server.config_notifier());
        }
        device.on_change(server.config_notifier());
        if spec.link_down {
            server.set_link(false);
        }
        info!("serving {name}");
        served.push(Served { name, counted, stats, server, place, device });
    }
    if let Some(capture) = &capture {
        capture.keep();
    }
    let about = About::from(plan);
    let lot =
        |s: &Served| takeover::lot(s.place.key(), &about, vec![], &s.server, Arc::clone(&s.device) as _);
    let over = signals.handle();
    let mut successor =
        heir.settle(control, || served.iter().map(lot).collect::<Result<Vec<_>>>(), move || over.close());

    let watchdog = Watchdog::start(&engine, heir.is_one())?;
    obey(&mut signals, (cli.config.as_deref(), options), &served, &hub, &engine, capture.as_deref());
    drop(watchdog);
    successor.bid_farewell();
    info!("stopping: finishing what is in flight");
    // All at once, then each awaited by its drop.
    for s in &served {
        s.server.begin_stop();
    }
    drop(served);
    drop(shards);
    drop(engine);
    drop(capture);
    successor.outcome()
}

/// What signals ask for, until one ends it.
fn obey(
    signals: &mut Signals,
    (file, options): (Option<&Path>, &Options),
    served: &[Served],
    hub: &Hub,
    engine: &Engine,
    capture: Option<&Capture>,
) {
    let mut options = options.clone();
    for signal in signals.forever() {
        match (signal, file) {
            (SIGUSR1, _) => {
                let text = statistics(&options, served, hub, engine, capture);
                daemon::print(&text);
            }
            (SIGHUP, Some(path)) => read_again(path, &mut options, served, hub),
            (SIGHUP, None) => warn!("SIGHUP: there is no --config to be read again"),
            _ => break,
        }
    }
}

/// Does what a file asks for now.
fn read_again(path: &Path, options: &mut Options, served: &[Served], hub: &Hub) {
    let wanted = Options::read(path).map_err(|e| format!("{e:#}"));
    let Reload { options: new, refused } = match wanted.and_then(|wanted| reload(options, &wanted)) {
        Ok(reload) => reload,
        Err(e) => return warn!("{e}; nothing was changed"),
    };
    for why in refused {
        warn!("{}: {why}: start it anew for that", path.display());
    }
    for (port, spec) in served.iter().zip(new.ports()) {
        port.change(&spec, hub);
    }
    if let Some(uplink) = &new.uplink {
        // The last port.
        set_rules(hub, hub.ports().len() as u16 - 1, uplink);
    }
    *options = new;
    info!("{} was read again", path.display());
}

/// Has a port of the switch be what is asked for now; its MTU stays.
fn set_rules(hub: &Hub, number: u16, spec: &PortSpec) {
    let Some(switch) = &hub.switch else { return };
    let was = switch.rules(PortId(number));
    let rules = PortConfig { mtu: was.mtu, ..spec.rules() };
    if rules != was {
        info!("port {}: other rules from now on", rules.name);
        hub.set_rules(number.into(), rules);
    }
}

fn statistics(
    options: &Options,
    served: &[Served],
    hub: &Hub,
    engine: &Engine,
    capture: Option<&Capture>,
) -> String {
    let mut text: String = served.iter().map(|s| s.report(hub)).collect();
    if let Some(uplink) = &options.uplink {
        // The last port.
        text += &uplink_report(&uplink.name(), hub, hub.ports().len() - 1);
    }
    if options.record_core_cycles {
        text += &cycles(engine.stats().iter().map(|s| &**s), &hub.ports());
    }
    if let Some(capture) = capture {
        text += &capture.line();
        text.push('\n');
    }
    text
}

/// The capture that was asked for, with an interface for each port.
fn capture(options: &Options, wanted: &[Wanted]) -> Result<Option<Arc<Capture>>> {
    let Some(path) = &options.pcap else { return Ok(None) };
    let uplink = options.uplink.as_ref().map(PortSpec::name);
    let names: Vec<&str> = wanted.iter().map(|w| w.name.as_str()).chain(uplink.as_deref()).collect();
    let filter = options.pcap_filter.clone().unwrap_or_default();
    let config = CaptureConfig { snaplen: options.pcap_snaplen.unwrap_or(SNAPLEN), filter };
    Ok(Some(Arc::new(Capture::create(path, &names, config)?)))
}

/// Who notes packets of the hub's ports, which are those without a tap among the capture's, and the uplink behind all.
fn witness(capture: Option<&Capture>, wanted: &[Wanted]) -> Witness {
    let of_hub = wanted.iter().map(|w| w.tap.is_none()).chain([true]);
    let ports = (0..).zip(of_hub).filter_map(|(number, is_of_hub)| is_of_hub.then_some(number)).collect();
    capture.map(|capture| Witness::new(capture.probe(0), ports)).unwrap_or_default()
}

fn open_uplink(options: &Options, wanted: &[Wanted]) -> Result<Option<Box<dyn Uplink>>> {
    let told = wanted.iter().filter_map(|w| w.card.mtu).max();
    options.uplink.as_ref().map(|spec| join::open_uplink(spec, told)).transpose()
}

/// Ports of the hub, with their pairs of queues.
fn guests(wanted: &[Wanted]) -> Vec<(&PortSpec, u16)> {
    wanted.iter().filter(|w| w.tap.is_none()).map(|w| (&w.spec, w.card.pairs)).collect()
}

/// Opens what a port is joined to. A card that is joined to a tap has its MTU and as many pairs of queues.
fn open(spec: PortSpec, options: &Options) -> Result<Wanted> {
    let tap = match (&spec.tap, spec.tap_fds.as_slice()) {
        (Some(name), _) => Some(Tap::open(name, options.num_queue_pairs, spec.mtu)?),
        (None, []) => None,
        (None, numbers) => Some(Tap::inherit_numbers(numbers, spec.mtu)?),
    };
    let place = spec.place().with_context(|| format!("port {}: nowhere to listen", spec.name()))?;
    let of_tap = tap.as_ref().and_then(|tap| u16::try_from(tap.mtu()).ok());
    let mtu = spec.mtu.or(of_tap.filter(|mtu| MTU_RANGE.contains(mtu)));
    let pairs = tap.as_ref().map_or(options.num_queue_pairs, |tap| tap.pairs());
    let card = Card { mac: spec.mac, mtu, pairs, ring_size: options.queue_size };
    Ok(Wanted { name: spec.name(), place, spec, card, tap })
}
