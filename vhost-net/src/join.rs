//! Joins ports as the options ask for it: the hub, its switch, and the uplink.

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
use crate::port::interface::exists;
use crate::port::tap::uplink::TapUplink;
use crate::seats::MAX_REACTORS;
use crate::spec::PortSpec;
use crate::switch::fdb::FdbConfig;
use crate::switch::{self, PortConfig};

/// How the ports are joined that have no tap.
pub fn plan(options: &Options) -> Plan {
    match (options.switch, options.wire, options.loopback) {
        (true, ..) => Plan::Switch,
        (_, true, _) => Plan::Wire,
        (.., Some(plan)) => plan,
        // A hub without ports.
        _ => Plan::Discard,
    }
}

/// Opens an uplink; `told` is the largest MTU that a card advises.
pub fn open_uplink(spec: &PortSpec, told: Option<u16>) -> Result<Box<dyn Uplink>> {
    let name = spec.interface().context("the uplink has no interface")?;
    let mut uplink: Box<dyn Uplink> = match (&spec.tap, &spec.af_xdp) {
        // One that is made has the cards' MTU.
        (Some(_), _) => Box::new(TapUplink::open(name, told.filter(|_| !exists(name)))?),
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

/// Joins ports that have no tap, each with its pairs of queues, and an uplink with its MTU.
pub fn hub(
    options: &Options,
    guests: &[(&PortSpec, u16)],
    uplink_mtu: Option<u32>,
    reactors: usize,
) -> Result<Hub> {
    if reactors > MAX_REACTORS {
        bail!("ports are joined on at most {MAX_REACTORS} reactors, not {reactors}: give fewer --cpus");
    }
    let ports = guests.iter().map(|(spec, pairs)| Port::new(spec.name(), *pairs, spec.wait));
    // The last port is the uplink's, on the first reactor.
    let ports = ports.chain(options.uplink.iter().map(|u| Port::uplink(u.name(), 0)));
    let ports = ports.map(Into::into).collect();
    Ok(match plan(options) {
        Plan::Switch => Hub::switched(switch(options, guests, uplink_mtu, reactors).into(), ports, reactors),
        plan => Hub::new(plan, ports, reactors),
    })
}

fn switch(
    options: &Options,
    guests: &[(&PortSpec, u16)],
    uplink_mtu: Option<u32>,
    reactors: usize,
) -> switch::Switch {
    let mut configs: Vec<_> = guests.iter().map(|(spec, _)| spec.rules()).collect();
    let outer = options.uplink.iter().zip(uplink_mtu);
    configs.extend(outer.map(|(spec, mtu)| PortConfig { mtu, ..spec.rules() }));
    let ageing = Some(Duration::from_secs(options.mac_ageing.into()));
    switch::Switch::new(FdbConfig { ageing }, &configs, reactors)
}

/// Features that cards do not offer.
pub fn withheld(options: &Options, uplink: Option<&dyn Uplink>) -> u64 {
    let rings = if options.packed == Switch::Off { features::RING_PACKED } else { 0 };
    // What leaves by the uplink leaves as a guest has made it.
    rings | uplink.map_or(0, |u| HOST_OFFLOADS & !host_features(u.takes()))
}
