//! Counters for Prometheus that all daemons have. Names and labels are documented (docs/control.md), and stay as they are.

use std::fmt::{self, Debug};
use std::sync::Arc;

use poll_engine::engine::ReactorInfo;
use poll_engine::stats::{ERROR_KINDS, QueueStats, merge};
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric, MetricEncoder, NoLabelSet, text::encode};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::registry::{Registry, Unit};

/// How the text is marked.
pub const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// Upper bounds of the buckets of latencies, in seconds: by powers of two from 1 microsecond to 16 seconds.
const BOUNDS: usize = 25;

/// Of each queue.
type Count = (&'static str, &'static str, fn(&QueueStats) -> u64);
const COUNTS: [Count; 9] = [
    ("requests", "Requests completed", |q| q.requests.get()),
    ("polls", "Times the ring was looked at", |q| q.polls.get()),
    ("empty_polls", "Times the ring had nothing", |q| q.empty_polls.get()),
    ("kicks", "Notifications taken from the guest", |q| q.kicks.get()),
    ("kicks_dormant", "Notifications of rings that were left to them", |q| q.kicks_dormant.get()),
    ("signals", "Interrupts sent to the guest", |q| q.signals.get()),
    ("signals_suppressed", "Completions for which the guest wanted no interrupt", |q| {
        q.signals_suppressed.get()
    }),
    ("iotlb_misses", "Times the queue waited for a translation", |q| q.iotlb_misses.get()),
    ("limited", "Times that a limit had the queue wait", |q| q.limited.get()),
];
const BYTES: [Count; 2] = [
    ("read", "Bytes read by the guest", |q| q.bytes_read.get()),
    ("written", "Bytes written by the guest", |q| q.bytes_written.get()),
];
/// In nanoseconds; told in seconds.
const TIMES: [Count; 1] = [("limited", "Time that a limit had the queue wait", |q| q.limited_ns.get())];

/// All of them as text. Every name begins with `prefix`.
pub fn text(prefix: &str, collectors: Vec<Box<dyn Collector>>) -> String {
    let mut registry = Registry::with_prefix(prefix);
    for collector in collectors {
        registry.register_collector(collector);
    }
    let mut text = String::new();
    // Writing to a String does not fail.
    let _ = encode(&mut text, &registry);
    text
}

/// The queues of exports, each with its name; and the label for that, such as `disk`.
#[derive(Debug)]
pub struct Queues {
    /// The label.
    pub label: &'static str,
    /// Names and queues.
    pub all: Vec<(String, Vec<Arc<QueueStats>>)>,
}

impl Queues {
    fn counter<N: prometheus_client::encoding::EncodeCounterValue + Debug>(
        &self,
        encoder: &mut DescriptorEncoder<'_>,
        (name, help, unit): (&str, &str, Option<Unit>),
        of: impl Fn(&QueueStats) -> N,
    ) -> fmt::Result {
        let mut metric = encoder.encode_descriptor(name, help, unit.as_ref(), MetricType::Counter)?;
        for (key, queues) in &self.all {
            for (i, queue) in queues.iter().enumerate() {
                let labels = [(self.label, key.clone()), ("queue", i.to_string())];
                ConstCounter::new(of(queue)).encode(metric.encode_family(&labels)?)?;
            }
        }
        Ok(())
    }
}

impl Collector for Queues {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        for (name, help, of) in COUNTS {
            self.counter(&mut encoder, (name, help, None), of)?;
        }
        for (name, help, of) in BYTES {
            self.counter(&mut encoder, (name, help, Some(Unit::Bytes)), of)?;
        }
        for (name, help, of) in TIMES {
            self.counter(&mut encoder, (name, help, Some(Unit::Seconds)), |q| of(q) as f64 / 1e9)?;
        }
        let help = "Most requests ever in flight at once";
        let mut metric = encoder.encode_descriptor("in_flight_peak", help, None, MetricType::Gauge)?;
        for (key, queues) in &self.all {
            for (i, queue) in queues.iter().enumerate() {
                let labels = [(self.label, key.clone()), ("queue", i.to_string())];
                ConstGauge::new(queue.in_flight_peak.get()).encode(metric.encode_family(&labels)?)?;
            }
        }
        let mut metric = encoder.encode_descriptor("errors", "Errors by kind", None, MetricType::Counter)?;
        for (key, queues) in &self.all {
            for (kind, name) in ERROR_KINDS {
                let count: u64 = queues.iter().map(|q| q.errors(kind)).sum();
                let labels = [(self.label, key.clone()), ("kind", name.to_owned())];
                ConstCounter::new(count).encode(metric.encode_family(&labels)?)?;
            }
        }
        let help = "Time from taking a request to giving it back";
        let mut metric =
            encoder.encode_descriptor("latency", help, Some(&Unit::Seconds), MetricType::Histogram)?;
        for (key, queues) in &self.all {
            let latency = Latency(merge(queues.iter().map(|q| q.latency.counts())));
            latency.encode(metric.encode_family(&[(self.label, key.clone())])?)?;
        }
        Ok(())
    }
}

/// A gauge: name, help, unit, and the exports' names with their values.
pub type Gauge = (&'static str, &'static str, Option<Unit>, Vec<(String, u64)>);

/// Gauges of exports.
#[derive(Debug)]
pub struct Gauges {
    /// The label.
    pub label: &'static str,
    /// The gauges.
    pub all: Vec<Gauge>,
}

impl Collector for Gauges {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        for (name, help, unit, values) in &self.all {
            let mut metric = encoder.encode_descriptor(name, help, unit.as_ref(), MetricType::Gauge)?;
            for (key, value) in values {
                ConstGauge::new(*value).encode(metric.encode_family(&[(self.label, key.clone())])?)?;
            }
        }
        Ok(())
    }
}

/// The version of the program.
#[derive(Debug)]
pub struct Build(pub &'static str);

impl Collector for Build {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let help = "1, for the version of the program";
        let mut metric = encoder.encode_descriptor("build_info", help, None, MetricType::Gauge)?;
        ConstGauge::new(1u64).encode(metric.encode_family(&[("version", self.0)])?)
    }
}

/// Reactors.
#[derive(Debug)]
pub struct Reactors(pub Vec<ReactorInfo>);

impl Collector for Reactors {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let mut metric =
            encoder.encode_descriptor("reactor_queues", "Queues that run on it", None, MetricType::Gauge)?;
        for r in &self.0 {
            let labels = [("reactor", r.number.to_string())];
            ConstGauge::new(r.queues as u64).encode(metric.encode_family(&labels)?)?;
        }
        let help = "Queues of it that have had nothing for a while and are left to their kicks";
        let mut metric =
            encoder.encode_descriptor("reactor_queues_dormant", help, None, MetricType::Gauge)?;
        for r in &self.0 {
            let labels = [("reactor", r.number.to_string())];
            ConstGauge::new(r.dormant as u64).encode(metric.encode_family(&labels)?)?;
        }
        let help = "Time of reactors by what they did";
        let mut metric =
            encoder.encode_descriptor("reactor", help, Some(&Unit::Seconds), MetricType::Counter)?;
        for r in &self.0 {
            let states = [("busy", r.spent.busy), ("idle", r.spent.idle), ("asleep", r.spent.asleep)];
            for (state, time) in states {
                let labels = [("reactor", r.number.to_string()), ("state", state.to_owned())];
                ConstCounter::new(time.as_secs_f64()).encode(metric.encode_family(&labels)?)?;
            }
        }
        Ok(())
    }
}

/// What was counted, as (nanoseconds at most, how often), in buckets of a sixteenth.
struct Latency(Vec<(u64, u64)>);

impl EncodeMetric for Latency {
    fn encode(&self, mut encoder: MetricEncoder<'_>) -> fmt::Result {
        let bound = |i: usize| 1000u64 << i;
        let mut buckets: Vec<(f64, u64)> = (0..BOUNDS).map(|i| (bound(i) as f64 / 1e9, 0)).collect();
        buckets.push((f64::INFINITY, 0));
        for (ns, n) in &self.0 {
            let at = (0..BOUNDS).find(|&i| *ns <= bound(i)).unwrap_or(BOUNDS);
            buckets[at].1 += n;
        }
        let count = self.0.iter().map(|(_, n)| n).sum();
        // By the upper ends of the buckets that were counted in: up to a sixteenth more than it was.
        let sum: f64 = self.0.iter().map(|(ns, n)| *ns as f64 * *n as f64 / 1e9).sum();
        encoder.encode_histogram::<NoLabelSet>(sum, count, &buckets, None)
    }

    fn metric_type(&self) -> MetricType {
        MetricType::Histogram
    }
}
