//! Counters for Prometheus. Names and labels are documented (docs/control.md), and stay as they are.

use std::fmt;
use std::sync::Arc;

use control::common::Running;
use poll_engine::stats::{ERROR_KINDS, QueueStats};
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric, MetricEncoder, NoLabelSet, text::encode};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::registry::{Registry, Unit};

use crate::exports::{Exports, Served};

/// Upper bounds of the buckets of latencies, in seconds: by powers of two from 1 microsecond to 16 seconds.
const BOUNDS: usize = 25;

/// All of them as text.
pub fn text(exports: &Exports) -> String {
    let mut registry = Registry::with_prefix("vhost_blk");
    registry.register_collector(Box::new(Disks(exports.all())));
    registry.register_collector(Box::new(Reactors(
        exports.engine().list().iter().map(|r| (r.number, r.queues as u64)).collect(),
    )));
    let mut text = String::new();
    // Writing to a String does not fail.
    let _ = encode(&mut text, &registry);
    text
}

#[derive(Debug)]
struct Disks(Vec<Arc<Served>>);

#[derive(Debug)]
struct Reactors(Vec<(usize, u64)>);

type Count = (&'static str, &'static str, Option<Unit>, fn(&QueueStats) -> u64);

type Now = (&'static str, &'static str, Option<Unit>, fn(&Served) -> u64);

/// Of each queue.
const COUNTS: [Count; 8] = [
    ("requests", "Requests completed", None, |q| q.requests.get()),
    ("read", "Bytes read by the guest", Some(Unit::Bytes), |q| q.bytes_read.get()),
    ("written", "Bytes written by the guest", Some(Unit::Bytes), |q| q.bytes_written.get()),
    ("polls", "Times the ring was looked at", None, |q| q.polls.get()),
    ("empty_polls", "Times the ring had nothing", None, |q| q.empty_polls.get()),
    ("kicks", "Notifications taken from the guest", None, |q| q.kicks.get()),
    ("signals", "Interrupts sent to the guest", None, |q| q.signals.get()),
    ("iotlb_misses", "Times the queue waited for a translation", None, |q| q.iotlb_misses.get()),
];

impl Collector for Disks {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        for (name, help, unit, of) in &COUNTS {
            let mut metric = encoder.encode_descriptor(name, help, unit.as_ref(), MetricType::Counter)?;
            for s in &self.0 {
                for (i, queue) in s.stats.iter().enumerate() {
                    let labels = [("disk", s.key.clone()), ("queue", i.to_string())];
                    ConstCounter::new(of(queue)).encode(metric.encode_family(&labels)?)?;
                }
            }
        }
        let mut metric = encoder.encode_descriptor("errors", "Errors by kind", None, MetricType::Counter)?;
        for s in &self.0 {
            for (kind, name) in ERROR_KINDS {
                let count: u64 = s.stats.iter().map(|q| q.errors(kind)).sum();
                let labels = [("disk", s.key.clone()), ("kind", name.to_owned())];
                ConstCounter::new(count).encode(metric.encode_family(&labels)?)?;
            }
        }
        let now: [Now; 3] = [
            ("capacity", "Size of the disk", Some(Unit::Bytes), |s| s.disk.capacity()),
            ("attached", "Whether a front end is connected", None, |s| s.server.is_attached().into()),
            ("paused", "Whether queues take no requests", None, |s| s.server.is_paused().into()),
        ];
        for (name, help, unit, of) in &now {
            let mut metric = encoder.encode_descriptor(name, help, unit.as_ref(), MetricType::Gauge)?;
            for s in &self.0 {
                ConstGauge::new(of(s)).encode(metric.encode_family(&[("disk", s.key.clone())])?)?;
            }
        }
        let help = "Time from taking a request to giving it back";
        let mut metric =
            encoder.encode_descriptor("latency", help, Some(&Unit::Seconds), MetricType::Histogram)?;
        for s in &self.0 {
            let latency = Latency(poll_engine::stats::merge(s.stats.iter().map(|q| q.latency.counts())));
            latency.encode(metric.encode_family(&[("disk", s.key.clone())])?)?;
        }
        Ok(())
    }
}

impl Collector for Reactors {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let mut metric =
            encoder.encode_descriptor("reactor_queues", "Queues that run on it", None, MetricType::Gauge)?;
        for (number, queues) in &self.0 {
            ConstGauge::new(*queues).encode(metric.encode_family(&[("reactor", number.to_string())])?)?;
        }
        Ok(())
    }
}

/// What was counted, as (nanoseconds at most, how often), in buckets of a sixteenth.
struct Latency(Vec<(u64, u64)>);

impl EncodeMetric for Latency {
    fn encode(&self, mut encoder: MetricEncoder<'_>) -> Result<(), fmt::Error> {
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
