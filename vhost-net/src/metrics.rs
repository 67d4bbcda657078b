//! What this daemon has done: for Prometheus, and for views of it. Names and labels are documented (docs/control.md), and
//! stay as they are.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use control::common::Running;
use control::metrics::{self, Build, Gauges, Reactors};
use control::stats::{Export, QueueCounts};
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::registry::Unit;

use crate::hub::Hub;
use crate::mib::{self, Flow};
use crate::ports::Ports;
use crate::served::{Counted, Outer, Served};
use crate::stats::PairStats;

/// All of them as text.
pub fn text(ports: &Ports) -> String {
    let mut all: Vec<One> = ports
        .all()
        .iter()
        .map(|s| One {
            name: s.name.clone(),
            kind: s.kind(),
            switch: s.of_hub().and_then(|port| port.hub.name.clone()).unwrap_or_default(),
            flows: s.flows(),
            counters: s.counters(),
            limited: s.of_hub().map_or([0; 2], |port| limited(&port.own.pairs)),
            up: !s.spec().link_down,
            attached: s.server.is_attached(),
            paused: s.server.is_paused(),
        })
        .collect();
    all.extend(ports.uplinks().into_iter().map(|outer| One {
        name: outer.spec.name(),
        flows: outer.port.flows(),
        counters: outer.counters(),
        limited: limited(&outer.port.own.pairs),
        up: outer.is_up(),
        kind: "uplink",
        switch: outer.spec.switch.unwrap_or_default(),
        attached: false,
        paused: false,
    }));
    let each = |of: fn(&One) -> bool| all.iter().map(|port| (port.name.clone(), of(port).into())).collect();
    let gauges = vec![
        ("attached", "Whether a front end is connected", None, each(|port| port.attached)),
        ("paused", "Whether queues take nothing", None, each(|port| port.paused)),
        ("up", "Whether the link is up", None, each(|port| port.up)),
    ];
    let known = |hub: &Arc<Hub>| {
        let known = hub.switch.as_ref().map_or(0, |switch| switch.fdb().dump().count() as u64);
        (hub.name.clone().unwrap_or_default(), known)
    };
    let known = ports.hubs().iter().map(known).collect();
    metrics::text(
        "vhost_net",
        vec![
            Box::new(Build(env!("CARGO_PKG_VERSION"))),
            Box::new(Gauges { label: "port", all: gauges }),
            Box::new(All { ports: all, known }),
            Box::new(Reactors(ports.engine().list())),
        ],
    )
}

/// What is served, for views: a request is a packet, which a guest reads from its receive queues and writes to the others. An
/// uplink has a queue for what leaves by it and one for what comes in.
pub fn views(ports: &Ports) -> Vec<Export> {
    let export = |s: &Served| Export {
        name: s.name.clone(),
        switch: s.of_hub().and_then(|port| port.hub.name.clone()),
        attached: s.server.is_attached(),
        paused: s.server.is_paused(),
        queues: (0..)
            .zip(&s.stats)
            .map(|(queue, stats)| counts(s, queue, QueueCounts::of(queue, stats)))
            .collect(),
        drops: drops(s.counters()),
    };
    let uplink = |outer: Outer| {
        let [rx, tx] = outer.port.flows();
        let queues = [moved(0, &rx, QueueCounts::default()), moved(1, &tx, QueueCounts::default())];
        Export {
            name: outer.spec.name(),
            attached: outer.is_up(),
            paused: false,
            queues: queues.into(),
            drops: drops(outer.counters()),
            switch: outer.spec.switch,
        }
    };
    ports.all().iter().map(|s| export(s)).chain(ports.uplinks().into_iter().map(uplink)).collect()
}

/// Counters of packets that went nowhere.
fn drops(counters: Vec<(String, u64)>) -> BTreeMap<String, u64> {
    counters.into_iter().filter(|(name, _)| name.ends_with("_drops") || name.ends_with("_errors")).collect()
}

fn counts(s: &Served, queue: u16, all: QueueCounts) -> QueueCounts {
    let (at, way) = (usize::from(queue / 2), usize::from(queue % 2));
    match &s.counted {
        Counted::Hub(port) => port.own.pairs.get(at).map_or(all.clone(), |pair| {
            let flow = &mib::flows(std::slice::from_ref(pair), &[])[way];
            let (limited, limited_ns) =
                (pair.tx_limited.get() * way as u64, pair.tx_limited_ns.get() * way as u64);
            QueueCounts { limited, limited_ns, ..moved(queue, flow, all) }
        }),
        Counted::Tap(tap) => match tap.flows_of(at) {
            Some(flows) => moved(queue, &flows[way], all),
            None => all,
        },
    }
}

/// Counts of a queue that has moved these packets.
fn moved(queue: u16, flow: &Flow, all: QueueCounts) -> QueueCounts {
    let is_rx = queue.is_multiple_of(2);
    let [read, written] = if is_rx { [flow.octets, 0] } else { [0, flow.octets] };
    QueueCounts { queue, requests: flow.packets.iter().sum(), read, written, ..all }
}

#[derive(Debug)]
struct One {
    name: String,
    /// What it is joined to.
    kind: &'static str,
    /// The name of its switch; one without a name has an empty one, which is as no label.
    switch: String,
    flows: [Flow; 2],
    counters: Vec<(String, u64)>,
    /// How often, and for how many nanoseconds in all, a limit had its sender wait.
    limited: [u64; 2],
    up: bool,
    attached: bool,
    paused: bool,
}

/// What a limit has had a port's sender wait.
fn limited(pairs: &[PairStats]) -> [u64; 2] {
    let sum = |of: fn(&PairStats) -> u64| pairs.iter().map(of).sum();
    [sum(|pair| pair.tx_limited.get()), sum(|pair| pair.tx_limited_ns.get())]
}

#[derive(Debug)]
struct All {
    ports: Vec<One>,
    /// Addresses, by the names of switches.
    known: Vec<(String, u64)>,
}

type Count = (&'static str, &'static str, Option<Unit>, fn(&Flow) -> u64);

/// Of each way of a port.
const COUNTS: [Count; 3] = [
    ("traffic", "Bytes with Ethernet headers, to the guest (rx) and from it (tx)", Some(Unit::Bytes), |f| {
        f.octets
    }),
    ("discards", "Packets that were dropped although nothing was wrong with them", None, |f| f.discards),
    ("bad_packets", "Packets that something was wrong with", None, |f| f.errors),
];

impl Collector for All {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let help = "Packets, to the guest (rx) and from it (tx)";
        let mut metric = encoder.encode_descriptor("packets", help, None, MetricType::Counter)?;
        for port in &self.ports {
            for (way, flow) in ["rx", "tx"].into_iter().zip(&port.flows) {
                for (cast, n) in ["unicast", "multicast", "broadcast"].into_iter().zip(flow.packets) {
                    let labels = [("port", port.name.as_str()), ("way", way), ("cast", cast)];
                    ConstCounter::new(n).encode(metric.encode_family(&labels)?)?;
                }
            }
        }
        for (name, help, unit, of) in &COUNTS {
            let mut metric = encoder.encode_descriptor(name, help, unit.as_ref(), MetricType::Counter)?;
            for port in &self.ports {
                for (way, flow) in ["rx", "tx"].into_iter().zip(&port.flows) {
                    let labels = [("port", port.name.as_str()), ("way", way)];
                    ConstCounter::new(of(flow)).encode(metric.encode_family(&labels)?)?;
                }
            }
        }
        let help = "Times that a limit had packets of the guest wait";
        let mut metric = encoder.encode_descriptor("limited", help, None, MetricType::Counter)?;
        for port in &self.ports {
            ConstCounter::new(port.limited[0])
                .encode(metric.encode_family(&[("port", port.name.as_str())])?)?;
        }
        let help = "Time that a limit had packets of the guest wait";
        let unit = Some(&Unit::Seconds);
        let mut metric = encoder.encode_descriptor("limited", help, unit, MetricType::Counter)?;
        for port in &self.ports {
            let seconds = ConstCounter::new(port.limited[1] as f64 / 1e9);
            seconds.encode(metric.encode_family(&[("port", port.name.as_str())])?)?;
        }
        let help = "Counters of the statistics, by name";
        let mut metric = encoder.encode_descriptor("counter", help, None, MetricType::Counter)?;
        for port in &self.ports {
            for (name, n) in &port.counters {
                let labels = [("port", port.name.as_str()), ("counter", name.as_str())];
                ConstCounter::new(*n).encode(metric.encode_family(&labels)?)?;
            }
        }
        let help = "1, for what a port is joined to";
        let mut metric = encoder.encode_descriptor("port_info", help, None, MetricType::Gauge)?;
        for port in &self.ports {
            let labels = [("port", port.name.as_str()), ("kind", port.kind), ("switch", &port.switch)];
            ConstGauge::new(1u64).encode(metric.encode_family(&labels)?)?;
        }
        let help = "Addresses that the switch has learnt";
        let mut metric = encoder.encode_descriptor("addresses", help, None, MetricType::Gauge)?;
        for (switch, known) in &self.known {
            ConstGauge::new(*known).encode(metric.encode_family(&[("switch", switch.as_str())])?)?;
        }
        Ok(())
    }
}
