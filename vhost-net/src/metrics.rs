//! What this daemon has done: for Prometheus, and for views of it. Names and labels are documented (docs/control.md), and
//! stay as they are.

use std::collections::BTreeMap;
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

use crate::mib::{self, Flow};
use crate::ports::{Counted, Ports, Served};
use crate::stats::PairStats;

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
            limited: match &s.counted {
                Counted::Hub(port, _) => limited(&port.pairs),
                Counted::Tap(_) => [0; 2],
            },
            up: !s.spec().link_down,
            attached: s.server.is_attached(),
            paused: s.server.is_paused(),
        })
        .collect();
    all.extend(ports.uplink().map(|(spec, number)| {
        let (flows, counters) = ports.uplink_counts(number);
        let limited = limited(&hub.port(number.into()).pairs);
        let up = hub.outside.latest().0.up;
        One { name: spec.name(), flows, counters, limited, up, attached: false, paused: false }
    }));
    let each = |of: fn(&One) -> bool| all.iter().map(|port| (port.name.clone(), of(port).into())).collect();
    let gauges = vec![
        ("attached", "Whether a front end is connected", None, each(|port| port.attached)),
        ("paused", "Whether queues take nothing", None, each(|port| port.paused)),
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

/// What is served, for views: a request is a packet, which a guest reads from its receive queues and writes to the others. An
/// uplink has a queue for what leaves by it and one for what comes in.
pub fn views(ports: &Ports) -> Vec<Export> {
    let hub = ports.hub();
    let export = |s: &Served| Export {
        name: s.name.clone(),
        attached: s.server.is_attached(),
        paused: s.server.is_paused(),
        queues: (0..)
            .zip(&s.stats)
            .map(|(queue, stats)| counts(s, queue, QueueCounts::of(queue, stats)))
            .collect(),
        drops: drops(s.counters(hub)),
    };
    let uplink = ports.uplink().map(|(spec, number)| {
        let ([rx, tx], counters) = ports.uplink_counts(number);
        let queues = [moved(0, &rx, QueueCounts::default()), moved(1, &tx, QueueCounts::default())];
        let attached = hub.outside.latest().0.up;
        Export { name: spec.name(), attached, paused: false, queues: queues.into(), drops: drops(counters) }
    });
    ports.all().iter().map(|s| export(s)).chain(uplink).collect()
}

/// Counters of packets that went nowhere.
fn drops(counters: Vec<(String, u64)>) -> BTreeMap<String, u64> {
    counters.into_iter().filter(|(name, _)| name.ends_with("_drops") || name.ends_with("_errors")).collect()
}

fn counts(s: &Served, queue: u16, all: QueueCounts) -> QueueCounts {
    let (at, way) = (usize::from(queue / 2), usize::from(queue % 2));
    match &s.counted {
        Counted::Hub(port, _) => port.pairs.get(at).map_or(all.clone(), |pair| {
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
        let help = "Addresses that the switch has learnt";
        let metric = encoder.encode_descriptor("addresses", help, None, MetricType::Gauge)?;
        ConstGauge::new(self.known).encode(metric)
    }
}
