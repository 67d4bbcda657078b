//! `vhost-net`: joins ports, starts reactors, serves sockets, obeys signals.

use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use daemon::{Place, Switch};
use poll_engine::device::features;
use poll_engine::engine::{Engine, EngineConfig};
use poll_engine::session::serve::Export;
use poll_engine::session::server::Server;
use poll_engine::stats::QueueStats;
use sd_notify::NotifyState;
use signal_hook::consts::{SIGINT, SIGTERM, SIGUSR1};
use signal_hook::iterator::Signals;
use tracing::info;
use vhost_net::cli::{Cli, UplinkPort};
use vhost_net::device::{Card, Joined, MTU_RANGE, NetDevice};
use vhost_net::hub::{Hub, Plan, Port};
use vhost_net::mac::MacAddr;
use vhost_net::outside::{HOST_OFFLOADS, Outside, host_features};
use vhost_net::pcap::{Capture, CaptureConfig};
use vhost_net::port::Uplink;
use vhost_net::port::af_packet::AfPacket;
use vhost_net::port::af_xdp::AfXdp;
use vhost_net::port::tap::Tap;
use vhost_net::port::tap::card::TapCard;
use vhost_net::report::{cycles, report, tap_report, uplink_report};
use vhost_net::shard::Shard;
use vhost_net::switch::fdb::{FdbConfig, MAX_PORTS};
use vhost_net::switch::{self, PortConfig, PortId};

fn main() -> ExitCode {
    daemon::main(run)
}

/// A port as asked for.
struct Wanted {
    name: String,
    place: Place,
    card: Card,
    wait: bool,
    rules: PortConfig,
    /// What it is joined to, if not to a hub.
    tap: Option<Arc<Tap>>,
}

/// A port being served.
struct Served {
    name: String,
    counted: Counted,
    stats: Vec<Arc<QueueStats>>,
    server: Server,
}

/// Where a port's packets are counted.
enum Counted {
    /// At the port of this number.
    Hub(Arc<Port>, u16),
    Tap(Arc<Tap>),
}

impl Served {
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
        println!("{}", serde_json::json!({ "type": "net", "features": [] }));
        return Ok(());
    }
    daemon::init_log(&cli.log)?;
    let wanted = wanted(cli)?;
    let plan = plan(cli, wanted.iter().filter(|w| w.tap.is_none()).count())?;
    let capture = capture(cli, &wanted)?;
    let mut uplink = cli.uplink.as_ref().map(open_uplink).transpose()?;
    daemon::raise_descriptor_limit();
    let config = EngineConfig {
        cpus: cli.cpus.clone().unwrap_or_default(),
        pacing: cli.poll,
        count_cycles: cli.record_core_cycles,
        ..EngineConfig::default()
    };
    let engine = Arc::new(Engine::start(&config)?);
    // Before the sockets: whoever sees one may send signals.
    let mut signals = Signals::new([SIGTERM, SIGINT, SIGUSR1]).context("cannot handle signals")?;
    let ports = wanted.iter().filter(|w| w.tap.is_none());
    let ports = ports.map(|w| Arc::new(Port::new(w.name.clone(), w.card.pairs, w.wait)));
    let (mut ports, reactors): (Vec<_>, _) = (ports.collect(), engine.reactors());
    let out = ports.len();
    // The last port is the uplink's, on the first reactor.
    ports.extend(cli.uplink.iter().map(|u| Arc::new(Port::uplink(u.interface.clone(), 0))));
    let hub = Arc::new(match plan {
        Plan::Switch => {
            let outer = cli.uplink.as_ref().zip(uplink.as_mut().map(|u| u.link().mtu));
            Hub::switched(Arc::new(switch(cli, &wanted, outer, reactors)?), ports, reactors)
        }
        _ => Hub::new(plan, ports, reactors),
    });
    hub.connect(&engine);
    let listeners = wanted.iter().map(|w| w.place.listen()).collect::<Result<Vec<_>, _>>()?;
    let withheld = if cli.packed == Switch::Off { features::RING_PACKED } else { 0 };
    // What leaves by the uplink leaves as a guest has made it.
    let withheld = withheld | uplink.as_ref().map_or(0, |u| HOST_OFFLOADS & !host_features(u.takes()));
    let shards = (0..engine.reactors()).map(|reactor| {
        let mut shard = Shard::new(Arc::clone(&hub), reactor);
        if let Some(uplink) = uplink.take_if(|_| reactor == 0) {
            shard = shard.with_outside(Outside::new(out, uplink));
        }
        engine.add_station(reactor, Box::new(shard)).context("cannot start a shard")
    });
    let shards = shards.collect::<Result<Vec<_>>>()?;

    let left = Arc::new(AtomicUsize::new(wanted.len()));
    let mut served = Vec::new();
    let mut ports = (0..).zip(&hub.ports);
    for (index, (wanted, listener)) in (0..).zip(wanted.into_iter().zip(listeners)) {
        let (joined, counted) = if let Some(tap) = wanted.tap {
            let capture = capture.as_ref().map(|capture| (Arc::clone(capture), index));
            (Joined::Tap(TapCard::new(Arc::clone(&tap), capture)), Counted::Tap(tap))
        } else {
            let (number, port) = ports.next().context("a port of the hub is missing")?;
            let joined = Joined::Hub(Arc::clone(&hub), number.into());
            (joined, Counted::Hub(Arc::clone(port), number))
        };
        let device = Arc::new(NetDevice::new(wanted.card, joined, withheld));
        let stats: Vec<_> =
            std::iter::repeat_with(Arc::default).take(2 * usize::from(wanted.card.pairs)).collect();
        let (name, engine) = (wanted.name.clone(), Arc::clone(&engine));
        let export = Export { name, device, stats: stats.clone(), engine };
        let (left, signals) = (Arc::clone(&left), signals.handle());
        let ended = move || {
            // A connected --fd has had its one front end.
            if left.fetch_sub(1, Ordering::AcqRel) == 1 {
                signals.close();
            }
        };
        let server = Server::start(export, listener, ended).context("cannot start a control thread")?;
        if let Counted::Tap(tap) = &counted {
            tap.on_gone(server.config_notifier());
        }
        info!("serving {}", wanted.name);
        served.push(Served { name: wanted.name, counted, stats, server });
    }
    if let Some(capture) = &capture {
        capture.keep();
    }
    // Nobody to notify is the usual case.
    let _ = sd_notify::notify(&[NotifyState::Ready]);

    for signal in signals.forever() {
        if signal == SIGUSR1 {
            let text = statistics(cli, &served, &hub, &engine, capture.as_deref());
            daemon::print(&text);
        } else {
            break;
        }
    }
    let _ = sd_notify::notify(&[NotifyState::Stopping]);
    info!("stopping: finishing what is in flight");
    // All at once, then each awaited by its drop.
    for s in &served {
        s.server.begin_stop();
    }
    drop(served);
    drop(shards);
    drop(engine);
    drop(capture);
    Ok(())
}

fn statistics(cli: &Cli, served: &[Served], hub: &Hub, engine: &Engine, capture: Option<&Capture>) -> String {
    let mut text: String = served.iter().map(|s| s.report(hub)).collect();
    if let Some(uplink) = &cli.uplink {
        // The last port.
        text += &uplink_report(&uplink.interface, hub, hub.ports.len() - 1);
    }
    if cli.record_core_cycles {
        text += &cycles(engine.stats(), &hub.ports);
    }
    if let Some(capture) = capture {
        text += &capture.line();
        text.push('\n');
    }
    text
}

/// The capture that was asked for, with an interface for each port.
fn capture(cli: &Cli, wanted: &[Wanted]) -> Result<Option<Arc<Capture>>> {
    let Some(path) = &cli.pcap else { return Ok(None) };
    if let Some(port) = wanted.iter().find(|w| w.tap.is_none()) {
        bail!("--pcap captures ports that are joined to a tap, and {} is not", port.name);
    }
    let names: Vec<&str> = wanted.iter().map(|w| w.name.as_str()).collect();
    let config = CaptureConfig { snaplen: cli.pcap_snaplen, filter: cli.pcap_filter.clone() };
    Ok(Some(Arc::new(Capture::create(path, &names, config)?)))
}

fn plan(cli: &Cli, ports: usize) -> Result<Plan> {
    match (cli.loopback, cli.wire, ports) {
        _ if cli.switch => Ok(Plan::Switch),
        // A hub without ports.
        (None, false, 0) => Ok(Plan::Discard),
        (Some(plan), _, _) => Ok(plan),
        (None, true, 2) => Ok(Plan::Wire),
        (None, true, n) => {
            bail!("a wire has two ends, and there are {n} ports; name two with --socket-path and --port")
        }
        (None, false, _) => {
            bail!("nothing to join the ports to; give --switch, --wire, --loopback or --tap (see --help)")
        }
    }
}

fn open_uplink(uplink: &UplinkPort) -> Result<Box<dyn Uplink>> {
    let UplinkPort { interface, xdp_queue, .. } = uplink;
    Ok(match *xdp_queue {
        Some(queue) => Box::new(AfXdp::open(interface, queue)?),
        None => Box::new(AfPacket::open(interface)?),
    })
}

/// The switch that joins these ports, and an uplink with its MTU.
fn switch(
    cli: &Cli,
    wanted: &[Wanted],
    uplink: Option<(&UplinkPort, u32)>,
    reactors: usize,
) -> Result<switch::Switch> {
    let mut configs: Vec<PortConfig> = vec![];
    for w in wanted.iter().filter(|w| w.tap.is_none()) {
        if configs.iter().any(|c| c.name == w.name) {
            bail!("two ports are called {}; give each a name of its own", w.name);
        }
        let mut config = PortConfig { name: w.name.clone(), ..w.rules.clone() };
        if let Some(mtu) = w.card.mtu {
            config.mtu = mtu.into();
        }
        if config.is_guarded {
            let mac = w.card.mac.with_context(|| format!("port {}: guard=on needs its mac=", w.name))?;
            config.guard.macs = vec![MacAddr(mac)];
        }
        configs.push(config);
    }
    configs.extend(uplink.map(|(u, mtu)| PortConfig { name: u.interface.clone(), mtu, ..u.rules.clone() }));
    if configs.len() > MAX_PORTS {
        bail!("a switch has at most {MAX_PORTS} ports, not {}", configs.len());
    }
    let ageing = Some(Duration::from_secs(cli.mac_ageing.into()));
    Ok(switch::Switch::new(FdbConfig { ageing }, &configs, reactors))
}

fn wanted(cli: &Cli) -> Result<Vec<Wanted>> {
    let first = match (&cli.socket_path, cli.fd) {
        (Some(path), _) => Some(Place::Path(path.clone())),
        (None, Some(fd)) => Some(Place::Fd(fd)),
        (None, None) => None,
    };
    let mut all = Vec::new();
    if let Some(place) = first {
        let tap = match (&cli.tap, cli.tap_fds.as_slice()) {
            (Some(name), _) => Some(Tap::open(name, cli.num_queue_pairs, cli.mtu)?),
            (None, []) => None,
            (None, numbers) => Some(Tap::inherit_numbers(numbers, cli.mtu)?),
        };
        let card = card(cli, cli.mac, cli.mtu, tap.as_deref());
        let rules = PortConfig::default();
        all.push(Wanted { name: place.key(), place, card, wait: false, rules, tap });
    } else if cli.tap.is_some() || !cli.tap_fds.is_empty() {
        bail!("a tap needs a port: give --socket-path (see --help)");
    }
    for port in &cli.port {
        let mtu = port.mtu.or(cli.mtu);
        let tap = port.tap.as_ref().map(|name| Tap::open(name, cli.num_queue_pairs, mtu)).transpose()?;
        let place = Place::Path(port.socket_path.clone());
        let name = port.name.clone().unwrap_or_else(|| place.key());
        let card = card(cli, port.mac, mtu, tap.as_deref());
        all.push(Wanted { name, place, card, wait: port.wait, rules: port.rules.clone(), tap });
    }
    let has_rules = |w: &&Wanted| w.rules.has_rules() && (!cli.switch || w.tap.is_some());
    if let Some(w) = all.iter().find(has_rules) {
        bail!("port {}: rules for its packets need --switch, and no tap of its own", w.name);
    }
    if all.is_empty() {
        bail!("nothing to serve; give --socket-path or --port (see --help)");
    }
    Ok(all)
}

/// A card; one that is joined to a tap has its MTU and as many pairs of queues.
fn card(cli: &Cli, mac: Option<[u8; 6]>, mtu: Option<u16>, tap: Option<&Tap>) -> Card {
    let of_tap = tap.and_then(|tap| u16::try_from(tap.mtu()).ok()).filter(|mtu| MTU_RANGE.contains(mtu));
    let pairs = tap.map_or(cli.num_queue_pairs, Tap::pairs);
    Card { mac, mtu: mtu.or(of_tap), pairs, ring_size: cli.queue_size }
}
