//! A port that is served, from what is asked for to what its packets are counted by; and uplinks.

use std::ops::Range;
use std::sync::{Arc, Mutex};

use anyhow::{Context, Result};
use control::moving::Movable;
use daemon::Place;
use poll_engine::confine::{self, Role};
use poll_engine::device::Device;
use poll_engine::engine::Engine;
use poll_engine::session::serve::Export;
use poll_engine::session::server::{AskError, Server};
use poll_engine::stats::QueueStats;
use tracing::info;

use crate::captured::Captured;
use crate::cli::Options;
use crate::device::{Card, Joined, MTU_RANGE, NetDevice};
use crate::hub::{Hub, Port};
use crate::mib::{self, Flow};
use crate::port::tap::Tap;
use crate::port::tap::card::TapCard;
use crate::report::{report, tap_report, uplink_report};
use crate::seats::locked;
use crate::spec::PortSpec;
use crate::stats::DROPS;
use crate::switch::{PortConfig, PortId};

/// A port as asked for, and what is open of it.
#[derive(Debug)]
pub struct Wanted {
    /// What it is known by.
    pub name: String,
    /// Where it is to be served.
    pub place: Place,
    /// As it is asked for.
    pub spec: PortSpec,
    /// What its guest sees.
    pub card: Card,
    /// What it is joined to, if not to a hub.
    pub tap: Option<Arc<Tap>>,
}

impl Wanted {
    /// Opens what a port is joined to. A card that is joined to a tap has its MTU and as many pairs of queues.
    pub fn open(spec: PortSpec, options: &Options) -> Result<Wanted> {
        let tap = match (&spec.tap, spec.tap_fds.as_slice()) {
            (Some(name), _) => {
                // Over the API by a thread that may.
                let (name, pairs, mtu) = (name.clone(), options.num_queue_pairs, spec.mtu);
                Some(confine::have(Role::Opener, move || Tap::open(&name, pairs, mtu))??)
            }
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

    /// Ready to be served: what a server needs, and what becomes of it then. `port` is what it is of a hub, if it is none of a
    /// tap's; `withheld` the features that are not offered with a tap; and `captured` its number in the capture, if there is one.
    pub fn ready(
        mut self,
        engine: &Arc<Engine>,
        port: Option<HubPort>,
        withheld: u64,
        captured: Option<(&Captured, u32)>,
    ) -> Result<(Export, Ready)> {
        let (joined, counted, withheld) = if let Some(tap) = self.tap.take() {
            let capture = captured.map(|(captured, index)| (captured.capture(), index));
            (Joined::Tap(TapCard::new(Arc::clone(&tap), capture)), Counted::Tap(tap), withheld)
        } else {
            let port = port.context("a port of a hub is missing")?;
            let withheld = port.hub.withheld;
            (Joined::Hub(Arc::clone(&port.hub), port.number.into()), Counted::Hub(port), withheld)
        };
        let device = Arc::new(NetDevice::new(self.card, joined, withheld));
        if self.spec.link_down {
            device.set_link(false).with_context(|| format!("port {}: its link", self.name))?;
        }
        let stats: Vec<_> = std::iter::repeat_with(Arc::default).take(device.num_queues().into()).collect();
        let (name, engine) = (self.name.clone(), Arc::clone(engine));
        let export = Export { name, device: Arc::clone(&device) as _, stats: stats.clone(), engine };
        Ok((export, Ready { wanted: self, counted, stats, device }))
    }
}

/// A port of a hub.
#[derive(Clone, Debug)]
pub struct HubPort {
    /// What joins it to others.
    pub hub: Arc<Hub>,
    /// Its number there.
    pub number: u16,
    /// What is counted of it.
    pub own: Arc<Port>,
}

impl HubPort {
    /// The one of this number.
    ///
    /// # Panics
    /// If there never was one.
    pub fn new(hub: Arc<Hub>, number: u16) -> HubPort {
        let own = hub.port(number.into());
        HubPort { hub, number, own }
    }

    fn switched(&self) -> Vec<(&'static str, u64)> {
        self.hub.switch.as_ref().map(|switch| switch.counters(PortId(self.number))).unwrap_or_default()
    }

    /// What has gone out by it, to a guest if it has one, and what has come in.
    pub fn flows(&self) -> [Flow; 2] {
        mib::flows(&self.own.pairs, &self.switched())
    }

    /// The drops of its queues by reason, and the switch's.
    fn counters(&self) -> Vec<(String, u64)> {
        let pairs = &self.own.pairs;
        let own = DROPS.iter().flat_map(|&(why, name)| {
            let sum = |rx: bool| {
                pairs.iter().map(|p| if rx { p.rx_drops(why) } else { p.tx_drops(why) }).sum::<u64>()
            };
            [(format!("rx_{name}_drops"), sum(true)), (format!("tx_{name}_drops"), sum(false))]
        });
        let waits = pairs.iter().map(|p| p.tx_waits.get()).sum();
        let switched = self.switched().into_iter().map(|(name, n)| (format!("switch_{name}"), n));
        own.chain([("tx_waits".to_owned(), waits)]).chain(switched).collect()
    }

    /// Has it be what is asked for now, if it is a switch's; its MTU stays.
    pub fn set_rules(&self, spec: &PortSpec) {
        let Some(switch) = &self.hub.switch else { return };
        let was = switch.rules(PortId(self.number));
        let rules = PortConfig { mtu: was.mtu, ..spec.rules() };
        if rules != was {
            info!("port {}: other rules from now on", rules.name);
            self.hub.set_rules(self.number.into(), rules);
        }
    }
}

/// A switch's port to an interface of the host's.
#[derive(Clone, Debug)]
pub struct Outer {
    /// As it is asked for now.
    pub spec: PortSpec,
    /// What it is of its hub.
    pub port: HubPort,
}

impl Outer {
    /// Whether its interface has a link.
    pub fn is_up(&self) -> bool {
        self.port.hub.outside.latest().0.up
    }

    /// As those of a port.
    pub fn counters(&self) -> Vec<(String, u64)> {
        those_above_zero(self.port.counters())
    }

    /// Statistics as text.
    pub fn report(&self) -> String {
        uplink_report(&self.spec.name(), &self.port.hub, self.port.number.into())
    }
}

fn those_above_zero(mut all: Vec<(String, u64)>) -> Vec<(String, u64)> {
    all.retain(|(_, n)| *n > 0);
    all
}

/// Where a port's packets are counted.
#[derive(Debug)]
pub enum Counted {
    /// At a port of a hub.
    Hub(HubPort),
    /// At its tap.
    Tap(Arc<Tap>),
}

/// A port that is about to be served.
#[derive(Debug)]
pub struct Ready {
    /// As it was asked for.
    pub wanted: Wanted,
    counted: Counted,
    stats: Vec<Arc<QueueStats>>,
    device: Arc<NetDevice>,
}

impl Ready {
    /// It is, by this server.
    pub fn served(self, server: Arc<Server>) -> Served {
        let Ready { wanted: Wanted { name, place, spec, card, .. }, counted, stats, device } = self;
        if let Counted::Tap(tap) = &counted {
            tap.on_change(server.config_notifier());
        }
        device.on_change(server.config_notifier());
        if spec.link_down {
            server.set_link(false);
        }
        info!("serving {name}");
        Served { name, place, card, counted, stats, server, device, spec: Mutex::new(spec) }
    }
}

/// A port being served.
#[derive(Debug)]
pub struct Served {
    /// What it is known by.
    pub name: String,
    /// Where it is served.
    pub place: Place,
    /// What its guest sees.
    pub card: Card,
    /// Where its packets are counted.
    pub counted: Counted,
    /// Counters of its queues.
    pub stats: Vec<Arc<QueueStats>>,
    /// What serves it.
    pub server: Arc<Server>,
    /// What its guest has.
    pub device: Arc<NetDevice>,
    spec: Mutex<PortSpec>,
}

impl Movable for Served {
    fn key(&self) -> &str {
        &self.name
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

    fn restart(&self) -> Result<(), AskError> {
        let restart = || self.server.restart_queues();
        match &self.counted {
            Counted::Hub(port) => port.hub.while_restarting(port.number.into(), restart),
            Counted::Tap(_) => restart(),
        }
    }
}

impl Served {
    /// As it is asked for now.
    pub fn spec(&self) -> PortSpec {
        locked(&self.spec).clone()
    }

    /// What it is of a hub, if it is none of a tap's.
    pub fn of_hub(&self) -> Option<&HubPort> {
        match &self.counted {
            Counted::Hub(port) => Some(port),
            Counted::Tap(_) => None,
        }
    }

    /// What it is joined to.
    pub fn kind(&self) -> &'static str {
        match &self.counted {
            Counted::Hub(port) => port.hub.plan.name(),
            Counted::Tap(_) => "tap",
        }
    }

    /// What has gone to its guest, and what has come from it.
    pub fn flows(&self) -> [Flow; 2] {
        match &self.counted {
            Counted::Hub(port) => port.flows(),
            Counted::Tap(tap) => tap.flows(),
        }
    }

    /// Its counters by the names that `ethtool -S` and the switch have for them, those that are zero left out.
    pub fn counters(&self) -> Vec<(String, u64)> {
        those_above_zero(match &self.counted {
            Counted::Hub(port) => port.counters(),
            Counted::Tap(tap) => tap.counters(),
        })
    }

    /// Has the link up or down, and the guest see it.
    fn set_link(&self, up: bool) -> Result<()> {
        if self.device.set_link(up)? {
            self.server.set_link(up);
            info!("port {}: its link is {}", self.name, if up { "up" } else { "down" });
        }
        Ok(())
    }

    /// Is what is asked for now, as far as that can change.
    pub fn change(&self, spec: &PortSpec) -> Result<()> {
        if let Counted::Hub(port) = &self.counted {
            port.set_rules(spec);
        }
        self.set_link(!spec.link_down).with_context(|| format!("port {}: its link", self.name))?;
        locked(&self.spec).clone_from(spec);
        Ok(())
    }

    /// Statistics as text.
    pub fn report(&self) -> String {
        match &self.counted {
            Counted::Hub(port) => report(&port.own, &self.stats, &port.switched()),
            Counted::Tap(tap) => tap_report(&self.name, tap),
        }
    }
}
