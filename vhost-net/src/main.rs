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
use vhost_net::cli::Cli;
use vhost_net::device::{Card, NetDevice};
use vhost_net::hub::{Hub, Plan, Port};
use vhost_net::mac::MacAddr;
use vhost_net::report::{cycles, report};
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
}

/// A port being served.
struct Served {
    port: Arc<Port>,
    stats: Vec<Arc<QueueStats>>,
    server: Server,
}

fn run(cli: &Cli) -> Result<()> {
    if cli.print_capabilities {
        println!("{}", serde_json::json!({ "type": "net", "features": [] }));
        return Ok(());
    }
    daemon::init_log(&cli.log)?;
    let wanted = wanted(cli)?;
    let plan = plan(cli, wanted.len())?;
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
    let ports = wanted.iter().map(|w| Arc::new(Port::new(w.name.clone(), w.card.pairs, w.wait)));
    let (ports, reactors) = (ports.collect(), engine.reactors());
    let hub = Arc::new(match plan {
        Plan::Switch => Hub::switched(Arc::new(switch(cli, &wanted, reactors)?), ports, reactors),
        _ => Hub::new(plan, ports, reactors),
    });
    let listeners = wanted.iter().map(|w| w.place.listen()).collect::<Result<Vec<_>, _>>()?;
    let shards = (0..engine.reactors()).map(|reactor| {
        let shard = Shard::new(Arc::clone(&hub), reactor);
        engine.add_station(reactor, Box::new(shard)).context("cannot start a shard")
    });
    let shards = shards.collect::<Result<Vec<_>>>()?;

    let withheld = if cli.packed == Switch::Off { features::RING_PACKED } else { 0 };
    let left = Arc::new(AtomicUsize::new(wanted.len()));
    let mut served = Vec::new();
    for (index, (wanted, listener)) in wanted.into_iter().zip(listeners).enumerate() {
        let device = Arc::new(NetDevice::new(wanted.card, Arc::clone(&hub), index, withheld));
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
        info!("serving {}", wanted.name);
        served.push(Served { port: Arc::clone(&hub.ports[index]), stats, server });
    }
    // Nobody to notify is the usual case.
    let _ = sd_notify::notify(&[NotifyState::Ready]);

    for signal in signals.forever() {
        if signal == SIGUSR1 {
            let switched = |at: usize| hub.switch.as_ref().map(|switch| switch.counters(PortId(at as u16)));
            let mut text: String = (0..)
                .zip(&served)
                .map(|(at, s)| report(&s.port, &s.stats, &switched(at).unwrap_or_default()))
                .collect();
            if cli.record_core_cycles {
                text += &cycles(engine.stats(), &hub.ports);
            }
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
    Ok(())
}

fn plan(cli: &Cli, ports: usize) -> Result<Plan> {
    match (cli.loopback, cli.wire, ports) {
        _ if cli.switch => Ok(Plan::Switch),
        (Some(plan), _, _) => Ok(plan),
        (None, true, 2) => Ok(Plan::Wire),
        (None, true, n) => {
            bail!("a wire has two ends, and there are {n} ports; name two with --socket-path and --port")
        }
        (None, false, _) => {
            bail!("nothing to join the ports to; give --switch, --wire or --loopback (see --help)")
        }
    }
}

/// The switch that joins these ports.
fn switch(cli: &Cli, wanted: &[Wanted], reactors: usize) -> Result<switch::Switch> {
    let mut configs: Vec<PortConfig> = vec![];
    for w in wanted {
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
    if configs.len() > MAX_PORTS {
        bail!("a switch has at most {MAX_PORTS} ports, not {}", configs.len());
    }
    let ageing = Some(Duration::from_secs(cli.mac_ageing.into()));
    Ok(switch::Switch::new(FdbConfig { ageing }, &configs, reactors))
}

fn wanted(cli: &Cli) -> Result<Vec<Wanted>> {
    let card = |mac, mtu| Card { mac, mtu, pairs: cli.num_queue_pairs, ring_size: cli.queue_size };
    let first = match (&cli.socket_path, cli.fd) {
        (Some(path), _) => Some(Place::Path(path.clone())),
        (None, Some(fd)) => Some(Place::Fd(fd)),
        (None, None) => None,
    };
    let mut all: Vec<_> = first
        .map(|place| Wanted {
            name: place.key(),
            place,
            card: card(cli.mac, cli.mtu),
            wait: false,
            rules: PortConfig::default(),
        })
        .into_iter()
        .collect();
    all.extend(cli.port.iter().map(|p| {
        let place = Place::Path(p.socket_path.clone());
        let name = p.name.clone().unwrap_or_else(|| place.key());
        Wanted { name, place, card: card(p.mac, p.mtu.or(cli.mtu)), wait: p.wait, rules: p.rules.clone() }
    }));
    if let Some(w) = all.iter().find(|w| w.rules.has_rules() && !cli.switch) {
        bail!("port {}: rules for its packets need --switch", w.name);
    }
    if all.is_empty() {
        bail!("nothing to serve; give --socket-path or --port (see --help)");
    }
    Ok(all)
}
