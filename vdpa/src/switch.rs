//! `vdpactl serve net` without a tap of the card's own: cards of the host's on the switch of `vhost-net`, with those of
//! virtual machines, and an uplink.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use daemon::confine::{Identity, Places};
use poll_engine::device::Device;
use poll_engine::engine::Engine;
use poll_engine::session::serve::Export;
use poll_engine::session::server::Server;
use poll_engine::stats::QueueStats;
use poll_engine::uring::FixedBuffers;
use tracing::info;
use vhost_net::check::check;
use vhost_net::cli::Options;
use vhost_net::device::{CONFIG_LEN, Card, Joined, NetDevice};
use vhost_net::hub::Hub;
use vhost_net::hubs::RunningHub;
use vhost_net::join;
use vhost_net::report::{report, uplink_report};
use vhost_net::spec::PortSpec;
use vhost_net::switch::PortId;
use vhost_net::switches::SwitchSpec;
use vhost_net::witness::Witness;

use crate::cli::ServeNet;
use crate::confine;
use crate::serve::{Service, engine, serve};
use crate::served::{Served, Wanted};
use crate::vduse::node::{DIRECTORY, ID_NET};

/// What `vhost-net` would be told. A card on the bus has its node there for a socket: all that is checked of ports holds for
/// such cards as well.
fn options(cli: &ServeNet) -> Result<Options> {
    let first = cli.name.iter().map(|name| PortSpec {
        name: Some(name.clone()),
        mac: cli.mac,
        ..PortSpec::default()
    });
    let ports = first.chain(cli.port.iter().cloned()).map(|port| {
        let mtu = port.mtu.or(cli.mtu);
        let place =
            port.place().is_none().then(|| port.name.as_ref().map(|name| Path::new(DIRECTORY).join(name)));
        PortSpec { socket_path: place.flatten().or(port.socket_path.clone()), mtu, ..port }
    });
    let options = Options {
        switch: vec![SwitchSpec::default()],
        port: ports.collect(),
        uplink: cli.uplink.clone().into_iter().collect(),
        mac_ageing: Some(cli.mac_ageing),
        mtu: cli.mtu,
        num_queue_pairs: cli.num_queue_pairs,
        queue_size: cli.queue_size,
        packed: cli.packed,
        ..Options::default()
    };
    check(&options)?;
    if let Some(port) = options.port.iter().find(|port| port.has_tap()) {
        bail!(
            "port {}: a card on the switch has no tap of its own; leave tap out, or use --tap alone",
            port.name()
        );
    }
    match (options.port.as_slice(), options.uplink.as_slice()) {
        ([_], []) => {
            bail!("one card alone has nobody to talk to: give --tap, an --uplink, or a further --port")
        }
        _ => Ok(options),
    }
}

/// Where the sockets are, of cards that virtual machines use.
fn sockets(options: &Options) -> Vec<PathBuf> {
    let ports = options.port.iter().filter(|port| name_on_bus(port).is_none());
    ports.filter_map(|port| port.socket_path.as_deref()).map(Places::directory_of).collect()
}

/// The name on the bus, of a card that is there.
fn name_on_bus(port: &PortSpec) -> Option<&str> {
    port.name.as_deref().filter(|name| port.socket_path.as_deref() == Some(&*Path::new(DIRECTORY).join(name)))
}

/// Cards on a switch.
struct Switched {
    hub: Arc<Hub>,
    uplink: Option<String>,
    /// Those on the bus, in their order there.
    cards: Vec<Arc<NetDevice>>,
    /// Names and counters of those that virtual machines use.
    sockets: Vec<(String, Vec<Arc<QueueStats>>)>,
}

impl Service for Switched {
    fn begun(&self, served: &[Served]) {
        for (device, card) in served.iter().zip(&self.cards) {
            card.on_change(device.config_notifier());
        }
    }

    fn report(&self, served: &[Served]) -> String {
        let on_bus = served.iter().map(|device| (device.name(), device.stats()));
        let all = on_bus.chain(self.sockets.iter().map(|(name, stats)| (name.as_str(), stats.as_slice())));
        let all: Vec<_> = all.collect();
        let mut text = String::new();
        for (number, port) in (0..).zip(self.hub.ports().iter()) {
            if let Some((_, stats)) = all.iter().find(|(name, _)| *name == port.name) {
                let switched = self.hub.switch.as_ref().map(|switch| switch.counters(PortId(number)));
                text += &report(port, stats, &switched.unwrap_or_default());
            }
        }
        if let Some(name) = &self.uplink {
            // The last port.
            text += &uplink_report(name, &self.hub, self.hub.ports().len() - 1);
        }
        text
    }
}

/// `vdpactl serve net` on a switch.
pub(crate) fn serve_net(cli: &ServeNet, identity: Option<Identity>) -> Result<()> {
    let options = options(cli)?;
    let told = options.port.iter().filter_map(|port| port.mtu).max();
    let uplinks = join::open_uplinks(&options, |_| told)?;
    let opens = !uplinks.is_empty();
    let confined = confine::threads(&cli.common, identity, cli.driver, sockets(&options), opens)?;
    let engine = engine(&cli.common, FixedBuffers::Off, &options.near())?;
    let guests: Vec<_> = options.port.iter().map(|port| (port, cli.num_queue_pairs)).collect();
    let joints = join::hubs(&options, &guests, uplinks, engine.reactors())?;
    let hubs = joints.into_iter().map(|joint| RunningHub::start(joint, &engine, &|_| Witness::default()));
    let hubs = hubs.collect::<Result<Vec<_>>>()?;
    let hub = hubs.first().map(|running| Arc::clone(&running.hub)).context("there is no switch")?;

    let uplink = options.uplink.first().map(PortSpec::name);
    let mut switched = Switched { hub: Arc::clone(&hub), uplink, cards: vec![], sockets: vec![] };
    let (mut on_bus, mut servers) = (vec![], vec![]);
    for (number, port) in options.port.iter().enumerate() {
        let card =
            Card { mac: port.mac, mtu: port.mtu, pairs: cli.num_queue_pairs, ring_size: cli.queue_size };
        let device = Arc::new(NetDevice::new(card, Joined::Hub(Arc::clone(&hub), number), hub.withheld));
        if port.link_down {
            device.set_link(false)?;
        }
        if let Some(name) = name_on_bus(port) {
            switched.cards.push(Arc::clone(&device));
            on_bus.push(Wanted {
                name: name.into(),
                id: ID_NET,
                device,
                config_len: CONFIG_LEN,
                common: &cli.common,
                engine: Arc::clone(&engine),
            });
        } else {
            let (server, stats) = listen(port, &device, &engine)?;
            switched.sockets.push((port.name(), stats));
            servers.push(server);
        }
    }
    let outcome = serve(on_bus, cli.driver, &switched, &confined);
    servers.iter().for_each(Server::begin_stop);
    drop(servers);
    drop(hubs);
    outcome
}

/// Serves a card to whatever virtual machine connects.
fn listen(
    port: &PortSpec,
    device: &Arc<NetDevice>,
    engine: &Arc<Engine>,
) -> Result<(Server, Vec<Arc<QueueStats>>)> {
    let place = port.place().context("a port without name and socket-path")?;
    let stats: Vec<Arc<QueueStats>> =
        std::iter::repeat_with(Arc::default).take(device.num_queues().into()).collect();
    let export = Export {
        name: port.name(),
        device: Arc::clone(device) as _,
        stats: stats.clone(),
        engine: Arc::clone(engine),
    };
    let server = Server::start(export, place.listen()?, || ()).context("cannot start a control thread")?;
    device.on_change(server.config_notifier());
    if port.link_down {
        server.set_link(false);
    }
    info!("serving {}", port.name());
    Ok((server, stats))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::{Cli, Command, Serve};
    use clap::Parser;

    fn wanted(args: &str) -> Result<Options> {
        let line = ["vdpactl", "serve", "net"].into_iter().chain(args.split_whitespace());
        let Command::Serve(Serve::Net(net)) = Cli::try_parse_from(line)?.command else { bail!("not net") };
        options(&net)
    }

    #[test]
    fn cards_are_on_the_bus_by_their_names_and_others_at_sockets() {
        let all = wanted(
            "--name a --mtu 1400 --port name=b,vlan=5,mtu=1500 --port socket-path=/s,name=c --uplink tap=t",
        );
        let all = all.unwrap();
        let on_bus: Vec<_> = all.port.iter().map(name_on_bus).collect();
        assert_eq!(on_bus, [Some("a"), Some("b"), None]);
        assert_eq!(all.port.iter().map(|p| p.mtu).collect::<Vec<_>>(), [Some(1400), Some(1500), Some(1400)]);
    }

    #[test]
    fn what_cannot_be_joined_is_said() {
        for (args, why) in [
            ("--name a", "nobody to talk to"),
            ("--name a --port name=a", "a"),
            ("--name a --port tap=t,name=b", "tap"),
            ("--name a --port mtu=1400", "socket-path is missing"),
            ("--name a --uplink queue=1", "uplink"),
            ("--name a --tap t --uplink tap=u", "cannot be used with"),
            ("--tap t", "--name"),
            ("--mac 52:54:00:00:00:01 --port name=a --port name=b", "--name"),
            ("", "--name"),
        ] {
            let said = wanted(args).unwrap_err().to_string();
            assert!(said.contains(why), "{args}: {said}");
        }
    }
}
