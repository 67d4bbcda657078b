//! Results in words, much as testpmd and pktgen print them, and as JSON.

use std::fmt::Write;
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result};
use hdrhistogram::Histogram;
use poll_engine::device::features;
use serde_json::{Value, json};

use super::Negotiated;
use super::search::Trial;
use super::session::net_features::{MQ, MRG_RXBUF};
use super::spec::NetSpec;
use super::tally::{Side, Tally};
use crate::spec::Rate;

/// All that a run was.
#[derive(Debug)]
pub struct Report {
    /// What it was to do.
    pub spec: Arc<NetSpec>,
    /// What was negotiated with each back end.
    pub negotiated: Vec<Negotiated>,
    /// The trials of a search.
    pub trials: Vec<Trial>,
    /// What was counted: of a search, in the best trial.
    pub tally: Option<Tally>,
    /// Why it ended before its time, or is no success.
    pub failure: Option<String>,
}

const PERCENTILES: [f64; 6] = [50.0, 90.0, 99.0, 99.9, 99.99, 99.999];

impl Report {
    /// Of a run that has not begun.
    pub fn new(spec: &Arc<NetSpec>) -> Report {
        let (negotiated, trials) = (Vec::new(), Vec::new());
        Report { spec: Arc::clone(spec), negotiated, trials, tally: None, failure: None }
    }

    /// Keeps a trial. It is printed when all is over, with standard output left to JSON if that goes there.
    pub fn trial(&mut self, trial: Trial) {
        self.trials.push(trial);
    }

    /// Prints it, or writes it, or both.
    pub fn write(&self, json: Option<&Path>) -> Result<()> {
        let text = || format!("{:#}\n", self.json());
        match json {
            Some(path) if path == Path::new("-") => print!("{}", text()),
            Some(path) => {
                std::fs::write(path, text()).with_context(|| format!("cannot write {}", path.display()))?;
                self.print();
            }
            None => self.print(),
        }
        Ok(())
    }

    fn print(&self) {
        // What could not even begin has said so.
        if self.negotiated.is_empty() {
            return;
        }
        println!("{}", self.title());
        for trial in &self.trials {
            let sum = trial.tally.sum();
            println!(
                "  trial: {} offered, {} arrived, lost {:.4} %: {}",
                pps(trial.rate),
                pps(trial.tally.rate(sum.received_in_time)),
                sum.loss_percent(),
                if trial.passed { "passes" } else { "fails" }
            );
        }
        if let Some(tally) = &self.tally {
            print!("{}", text(&self.spec, tally));
        }
        if self.failure.is_some() {
            println!("partial result: the run did not end as it should");
        }
    }

    /// What is sent and how, in one line.
    fn title(&self) -> String {
        let (load, base) = (&self.spec.load, &self.spec.base);
        let on = |bit: u64| if self.negotiated.iter().all(|n| n.used & bit != 0) { "on" } else { "off" };
        let rate = match (self.spec.rate(), load.iodepth) {
            (Rate::Open { rate, poisson }, _) => {
                format!("{}{} arrive", pps(rate), if poisson { " (poisson)" } else { "" })
            }
            (Rate::Closed(rate), _) => format!("at most {}", pps(rate)),
            (Rate::Full, Some(depth)) => format!("iodepth {depth}"),
            (Rate::Full, None) => "as fast as it goes".into(),
        };
        format!(
            "{}: size {}, {rate}, {} queue pair{}, {} flow{}, ring {} {}, burst {}, {}, mrg_rxbuf {}, event_idx {}, {}",
            self.spec.direction.name(),
            load.size.text(),
            load.queue_pairs,
            if load.queue_pairs == 1 { "" } else { "s" },
            load.flows,
            if load.flows == 1 { "" } else { "s" },
            load.ring_size,
            if base.packed { "packed" } else { "split" },
            load.burst,
            if base.indirect { "indirect" } else { "direct" },
            on(MRG_RXBUF),
            on(features::EVENT_IDX),
            if base.interrupt { "interrupt" } else { "poll" }
        )
    }

    fn json(&self) -> Value {
        let (load, base) = (&self.spec.load, &self.spec.base);
        let mut options = json!({
            "direction": self.spec.direction.name(),
            "socket_path": self.spec.sockets,
            "size": load.size.text(),
            "frame_bytes": load.size.kinds.iter().map(|k| k.size).collect::<Vec<_>>(),
            "flows": load.flows,
            "queue_pairs": load.queue_pairs,
            "ring": if base.packed { "packed" } else { "split" },
            "ring_size": load.ring_size,
            "burst": load.burst,
            "iodepth": load.iodepth,
            "rate_pps": load.rate_pps,
            "arrival_rate": base.arrival_rate,
            "verify": format!("{:?}", load.verify).to_lowercase(),
            "indirect": base.indirect,
            "completion": if base.interrupt { "interrupt" } else { "poll" },
            "hugepages": base.hugepages,
            "server": self.spec.server,
            "max_loss": load.max_loss,
        });
        if let Some(first) = self.negotiated.first() {
            options["mrg_rxbuf"] = (first.used & MRG_RXBUF != 0).into();
            options["event_idx"] = (first.used & features::EVENT_IDX != 0).into();
            options["mq"] = (first.used & MQ != 0).into();
        }
        let features: Vec<_> = self
            .negotiated
            .iter()
            .map(|n| json!({ "offered": format!("{:#x}", n.offered), "used": format!("{:#x}", n.used) }))
            .collect();
        let trials: Vec<_> = self
            .trials
            .iter()
            .map(
                |t| json!({ "rate_pps": t.rate, "passed": t.passed, "result": result(&self.spec, &t.tally) }),
            )
            .collect();
        let mut all = json!({
            "vbench version": env!("CARGO_PKG_VERSION"),
            "options": options,
            "features": features,
            "result": self.tally.as_ref().map(|t| result(&self.spec, t)),
        });
        if !trials.is_empty() {
            all["trials"] = trials.into();
        }
        if let Some(failure) = &self.failure {
            all["partial"] = true.into();
            all["partial_reason"] = failure.as_str().into();
        }
        all
    }
}

/// What each direction was, and the sum.
fn result(spec: &NetSpec, tally: &Tally) -> Value {
    let directions: Vec<_> = paths(spec)
        .map(|(name, from, to)| {
            let (sent, arrived) = (&tally.sides[from], &tally.sides[to]);
            json!({
                "name": name,
                "sent": sent.sent,
                "unsent": sent.unsent,
                "tx_pps": tally.rate(sent.sent),
                "tx_bps": tally.rate(sent.sent_bytes * 8),
                "received": arrived.received,
                "rx_pps": tally.rate(arrived.received_in_time),
                "rx_bps": tally.rate(arrived.received_bytes_in_time * 8),
                "lost": spec.direction.returns().then(|| lost(sent, arrived)),
                "reordered": arrived.reordered,
                "duplicates": arrived.duplicates,
                "corrupt": arrived.corrupt,
                "foreign": arrived.foreign,
                "latency_ns": latency(&arrived.latency),
            })
        })
        .collect();
    let sum = tally.sum();
    json!({
        "seconds": tally.seconds,
        "tx_pps": tally.rate(sum.sent),
        "rx_pps": tally.rate(sum.received_in_time),
        "tx_bps": tally.rate(sum.sent_bytes * 8),
        "rx_bps": tally.rate(sum.received_bytes_in_time * 8),
        "sent": sum.sent,
        "unsent": sum.unsent,
        "received": sum.received,
        "lost": spec.direction.returns().then(|| sum.lost()),
        "loss_percent": spec.direction.returns().then(|| sum.loss_percent()),
        "reordered": sum.reordered,
        "duplicates": sum.duplicates,
        "corrupt": sum.corrupt,
        "foreign": sum.foreign,
        "latency_ns": latency(&sum.latency),
        "first_corrupt": sum.first_corrupt.as_deref().map(hex),
        "cpu_ns_per_packet": cpu_ns(tally),
        "usr_seconds": tally.cost.user,
        "sys_seconds": tally.cost.system,
        "kicks": tally.kicks,
        "directions": directions,
        "error": tally.failure.as_ref().map_or(0, |f| f.errno),
    })
}

fn hex(bytes: &[u8]) -> String {
    let mut text = String::new();
    for byte in bytes {
        // Writing to a string does not fail.
        let _ = write!(text, "{byte:02x}");
    }
    text
}

fn lost(sent: &Side, arrived: &Side) -> u64 {
    sent.sent.saturating_sub(arrived.received + arrived.corrupt)
}

fn latency(histogram: &Histogram<u64>) -> Value {
    let percentiles = PERCENTILES.map(|p| (format!("{p}"), histogram.value_at_percentile(p).into()));
    json!({
        "N": histogram.len(),
        "min": histogram.min(),
        "max": histogram.max(),
        "mean": histogram.mean(),
        "stddev": histogram.stdev(),
        "percentile": serde_json::Map::from_iter(percentiles),
    })
}

/// CPU time of the generator's threads for each packet that was sent or arrived.
fn cpu_ns(tally: &Tally) -> f64 {
    let sum = tally.sum();
    let packets = sum.sent.max(sum.received_in_time);
    (tally.cost.user + tally.cost.system) * 1e9 / packets.max(1) as f64
}

/// Directions: a name, from where and to where.
fn paths(spec: &NetSpec) -> impl Iterator<Item = (&'static str, usize, usize)> {
    let direction = spec.direction;
    let all = if direction.ports() == 1 { vec![direction.name()] } else { vec!["A to B", "B to A"] };
    let of = move |(from, name)| (name, from, direction.to(from));
    let sent = move |from: usize| direction.ports() == 1 || direction.sends(from);
    all.into_iter().enumerate().filter(move |(from, _)| sent(*from)).map(of)
}

/// The result in a few lines.
fn text(spec: &NetSpec, tally: &Tally) -> String {
    let mut out = String::new();
    for (name, from, to) in paths(spec) {
        let (sent, arrived) = (&tally.sides[from], &tally.sides[to]);
        let _ = write!(out, "  {name}:");
        if spec.direction.sends(from) {
            let bits = tally.rate(sent.sent_bytes * 8);
            let _ = write!(out, " TX {} {:.3} Gbit/s,", pps(tally.rate(sent.sent)), bits / 1e9);
        }
        if spec.direction == super::Direction::Transmit {
            let _ = writeln!(out, " sent {}", sent.sent);
            continue;
        }
        let bits = tally.rate(arrived.received_bytes_in_time * 8);
        let _ = writeln!(out, " RX {} {:.3} Gbit/s", pps(tally.rate(arrived.received_in_time)), bits / 1e9);
        if !spec.direction.returns() {
            let _ = writeln!(out, "    packets {}", arrived.received + arrived.foreign);
            continue;
        }
        let gone = lost(sent, arrived);
        let _ = writeln!(
            out,
            "    sent {}, unsent {}, lost {gone} ({:.4} %), reordered {}, duplicates {}, corrupt {}, foreign {}",
            sent.sent,
            sent.unsent,
            gone as f64 * 100.0 / sent.sent.max(1) as f64,
            arrived.reordered,
            arrived.duplicates,
            arrived.corrupt,
            arrived.foreign
        );
        let us = |ns: u64| format!("{:.2}", ns as f64 / 1000.0);
        let at = PERCENTILES.map(|p| format!("p{p} {}", us(arrived.latency.value_at_percentile(p))));
        let (min, max) = (us(arrived.latency.min()), us(arrived.latency.max()));
        let _ = writeln!(out, "    latency us: min {min}, {}, max {max}", at.join(", "));
    }
    let _ = writeln!(
        out,
        "  generator: {:.1} ns of CPU time per packet, kicks {}, {:.2} s measured",
        cpu_ns(tally),
        tally.kicks,
        tally.seconds
    );
    out
}

/// A rate of packets.
pub fn pps(rate: f64) -> String {
    match rate {
        1e6.. => format!("{:.3} Mpps", rate / 1e6),
        1e4.. => format!("{:.2} kpps", rate / 1e3),
        _ => format!("{rate:.0} pps"),
    }
}
