//! What this daemon has done: for Prometheus, and for views of it. Names and labels are documented (docs/control.md), and
//! stay as they are.

use std::fmt;

use control::common::Running;
use control::metrics::{self, Build, Gauges, Reactors};
use control::stats::{Export, QueueCounts};
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::registry::Unit;

use crate::mib::Flow;
use crate::ports::{Counted, Ports, Served};

/// All of them as text.
pub fn text(ports: &Ports) -> String {
    let hub = ports.hub();
    let mut all: Vec<One> = ports
        .all()
        .iter()
        .map(|s| One {
            name: s.name.clone(),
            flows: s.flows(hub),
            counters: s.counters(hub),
            up: !s.spec().link_down,
            attached: s.server.is_attached(),
        })
        .collect();
    all.extend(ports.uplink().map(|(spec, number)| {
        let (flows, counters) = ports.uplink_counts(number);
        One { name: spec.name(), flows, counters, up: hub.outside.latest().0.up, attached: false }
    }));
    let each = |of: fn(&One) -> bool| all.iter().map(|port| (port.name.clone(), of(port).into())).collect();
    let gauges = vec![
        ("attached", "Whether a front end is connected", None, each(|port| port.attached)),
        ("up", "Whether the link is up", None, each(|port| port.up)),
    ];
    let known = hub.switch.as_ref().map_or(0, |switch| switch.fdb().dump().count() as u64);
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

/// What is served, for views: a request is a packet, which a guest reads from its receive queues and writes to the others.
pub fn views(ports: &Ports) -> Vec<Export> {
    let export = |s: &Served| Export {
        name: s.name.clone(),
        attached: s.server.is_attached(),
        paused: false,
        queues: (0..)
            .zip(&s.stats)
            .map(|(queue, stats)| counts(s, queue, QueueCounts::of(queue, stats)))
            .collect(),
    };
    ports.all().iter().map(|s| export(s)).collect()
}

fn counts(s: &Served, queue: u16, all: QueueCounts) -> QueueCounts {
    // A tap counts by itself.
    let Counted::Hub(port, _) = &s.counted else { return all };
    match port.pairs.get(usize::from(queue / 2)) {
        Some(pair) if queue.is_multiple_of(2) => {
            QueueCounts { requests: pair.rx_packets.get(), read: pair.rx_bytes.get(), ..all }
        }
        Some(pair) => QueueCounts { requests: pair.tx_packets.get(), written: pair.tx_bytes.get(), ..all },
        None => all,
    }
}

#[derive(Debug)]
struct One {
    name: String,
    flows: [Flow; 2],
    counters: Vec<(String, u64)>,
    up: bool,
    attached: bool,
}

#[derive(Debug)]
struct All {
    ports: Vec<One>,
    known: u64,
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
        let help = "Counters of the statistics, by name";
        let mut metric = encoder.encode_descriptor("counter", help, None, MetricType::Counter)?;
        for port in &self.ports {
            for (name, n) in &port.counters {
                let labels = [("port", port.name.as_str()), ("counter", name.as_str())];
                ConstCounter::new(*n).encode(metric.encode_family(&labels)?)?;
            }
        }
        let help = "Addresses that the switch has learnt";
        let metric = encoder.encode_descriptor("addresses", help, None, MetricType::Gauge)?;
        ConstGauge::new(self.known).encode(metric)
    }
}
