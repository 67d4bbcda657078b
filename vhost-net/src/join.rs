//! Joins ports as the options ask for it: hubs, their switches, and uplinks.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use daemon::Switch;
use poll_engine::device::features;
use tracing::warn;

use crate::cli::Options;
use crate::hub::{Hub, Plan, Port};
use crate::outside::{HOST_OFFLOADS, host_features};
use crate::port::Uplink;
use crate::port::af_packet::AfPacket;
use crate::port::af_xdp::AfXdp;
use crate::port::interface::index_of;
use crate::port::tap::uplink::TapUplink;
use crate::seats::MAX_REACTORS;
use crate::spec::PortSpec;
use crate::switch::fdb::FdbConfig;
use crate::switch::{self, PortConfig};
use crate::switches::SwitchSpec;

/// How the ports are joined that have no tap.
pub fn plan(options: &Options) -> Plan {
    match (!options.switch.is_empty(), options.wire, options.loopback) {
        (true, ..) => Plan::Switch,
        (_, true, _) => Plan::Wire,
        (.., Some(plan)) => plan,
        // A hub without ports.
        _ => Plan::Discard,
    }
}

/// Opens all uplinks, in their order; `told` is the largest MTU that cards advise on the switch of this name.
pub fn open_uplinks(
    options: &Options,
    told: impl Fn(Option<&str>) -> Option<u16>,
) -> Result<Vec<Box<dyn Uplink>>> {
    options.uplink.iter().map(|spec| open_uplink(spec, told(spec.switch.as_deref()))).collect()
}

fn open_uplink(spec: &PortSpec, told: Option<u16>) -> Result<Box<dyn Uplink>> {
    let name = spec.interface().context("the uplink has no interface")?;
    let mut uplink: Box<dyn Uplink> = match (&spec.tap, &spec.af_xdp) {
        // One that is made has the cards' MTU.
        (Some(_), _) => Box::new(TapUplink::open(name, told.filter(|_| index_of(name).is_none()))?),
        (_, Some(_)) => Box::new(AfXdp::open(name, spec.queue.unwrap_or(0))?),
        _ => Box::new(AfPacket::open(name)?),
    };
    let has = uplink.link().mtu;
    if let Some(told) = told.filter(|told| u32::from(*told) > has) {
        warn!(
            "uplink {name} has an MTU of {has}, and guests are told {told}: what is longer does not leave by it; \
             ip link set {name} mtu {told}, or --mtu {has}"
        );
    }
    Ok(uplink)
}

/// A hub that no reactor has a shard of yet, and its uplink.
pub struct Joint {
    pub(crate) hub: Arc<Hub>,
    /// With the place of the reactor that is to have it.
    pub(crate) uplink: Option<(Box<dyn Uplink>, usize)>,
}

/// Joins ports that have no tap, each with its pairs of queues, and uplinks, all of them: a hub for each switch.
pub fn hubs(
    options: &Options,
    guests: &[(&PortSpec, u16)],
    uplinks: Vec<Box<dyn Uplink>>,
    reactors: usize,
) -> Result<Vec<Joint>> {
    if reactors > MAX_REACTORS {
        bail!("ports are joined on at most {MAX_REACTORS} reactors, not {reactors}: give fewer --cpus");
    }
    let mut uplinks: Vec<_> = options.uplink.iter().zip(uplinks).collect();
    let hub = |(at, switch): (usize, Option<&SwitchSpec>)| {
        let name = switch.and_then(|switch| switch.name.as_deref());
        let of = |port: &PortSpec| port.switch.as_deref() == name;
        let guests: Vec<_> = guests.iter().copied().filter(|(port, _)| of(port)).collect();
        let uplink = uplinks.iter().position(|(spec, _)| of(spec)).map(|at| uplinks.swap_remove(at));
        joint(options, switch, &guests, uplink, at % reactors)
    };
    Ok(options.joints().into_iter().enumerate().map(hub).collect())
}

fn joint(
    options: &Options,
    switch: Option<&SwitchSpec>,
    guests: &[(&PortSpec, u16)],
    uplink: Option<(&PortSpec, Box<dyn Uplink>)>,
    home: usize,
) -> Joint {
    let mut ports: Vec<_> =
        guests.iter().map(|(spec, pairs)| Port::new(spec.name(), *pairs, spec.wait)).collect();
    let mut rules: Vec<_> = guests.iter().map(|(spec, _)| spec.rules()).collect();
    let mut number = None;
    let uplink = uplink.map(|(spec, mut uplink)| {
        // The last port.
        number = u16::try_from(ports.len()).ok();
        ports.push(Port::uplink(spec.name(), home));
        rules.push(PortConfig { mtu: uplink.link().mtu, ..spec.rules() });
        uplink
    });
    let ports = ports.into_iter().map(Into::into).collect();
    let mut hub = match switch {
        Some(switch) => {
            let ageing = Some(Duration::from_secs(options.ageing(switch).into()));
            Hub::switched(switch::Switch::new(FdbConfig { ageing }, &rules, 0).into(), ports, 0)
        }
        None => Hub::new(plan(options), ports, 0),
    };
    hub.name = switch.and_then(|switch| switch.name.clone());
    hub.uplink = number;
    hub.withheld = withheld(options, uplink.as_deref());
    Joint { hub: hub.into(), uplink: uplink.map(|uplink| (uplink, home)) }
}

/// The last of the switches, without any ports.
pub fn newest(options: &Options) -> Joint {
    joint(options, options.switch.last(), &[], None, 0)
}

/// Features that cards do not offer, on a hub with this uplink or on none.
pub fn withheld(options: &Options, uplink: Option<&dyn Uplink>) -> u64 {
    let rings = if options.packed == Switch::Off { features::RING_PACKED } else { 0 };
    // What leaves by the uplink leaves as a guest has made it.
    rings | uplink.map_or(0, |u| HOST_OFFLOADS & !host_features(u.takes()))
}
