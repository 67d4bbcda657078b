//! What came of a replay, in words and as JSON.

use anyhow::{Context, Result};
use hdrhistogram::Histogram;
use serde_json::{Value, json};

use super::plan::Skipped;
use super::player::Played;
use super::{Replay, Speed};

/// Percentiles that are told.
const PERCENTILES: [(&str, f64); 5] =
    [("p50", 50.0), ("p90", 90.0), ("p99", 99.0), ("p99.9", 99.9), ("max", 100.0)];

/// The sum of all queues.
pub struct Sum {
    /// Requests finished.
    pub requests: u64,
    /// Requests that failed.
    pub errors: u64,
    bytes: u64,
    seconds: f64,
    held_up: u64,
    latency: Histogram<u64>,
    lateness: Histogram<u64>,
    first_error: Option<String>,
}

impl Sum {
    /// Adds queues up.
    pub fn of(all: &[Played]) -> Result<Sum> {
        let first = all.first().context("a replay has at least one queue")?;
        let mut latency = Histogram::new_from(&first.latency);
        let mut lateness = Histogram::new_from(&first.lateness);
        for played in all {
            latency.add(&played.latency)?;
            lateness.add(&played.lateness)?;
        }
        let sum = |of: fn(&Played) -> u64| all.iter().map(of).sum();
        Ok(Sum {
            requests: sum(|p| p.requests),
            errors: sum(|p| p.errors),
            bytes: sum(|p| p.bytes),
            seconds: all.iter().map(|p| p.took).max().unwrap_or(0) as f64 / 1e9,
            held_up: sum(|p| p.held_up),
            latency,
            lateness,
            first_error: all.iter().find_map(|p| p.first_error.clone()),
        })
    }

    /// The first request of any queue that failed.
    pub fn first_error(&self) -> Option<&str> {
        self.first_error.as_deref()
    }

    fn iops(&self) -> f64 {
        self.requests as f64 / self.seconds.max(1e-9)
    }

    /// A line each for what was done, latency and lateness.
    pub fn print(&self, what: &Replay, skipped: &Skipped) {
        let speed = match what.speed {
            Speed::Max => "full speed".into(),
            Speed::Times(times) => format!("{times} times the recorded speed"),
        };
        println!(
            "{} requests at {speed} in {:.3} s: {:.0} IOPS, {:.1} MiB/s, {} errors, {} skipped",
            self.requests,
            self.seconds,
            self.iops(),
            self.bytes as f64 / self.seconds.max(1e-9) / f64::from(1 << 20),
            self.errors,
            skipped.total(),
        );
        let line =
            |h: &Histogram<u64>| PERCENTILES.map(|(name, p)| format!("{name}={:.2}", us(h, p))).join(" ");
        println!("latency us {}", line(&self.latency));
        if what.speed != Speed::Max {
            println!(
                "lateness us {}; {} requests were held up by --iodepth {}",
                line(&self.lateness),
                self.held_up,
                what.iodepth
            );
        }
    }

    /// The same for programs.
    pub fn json(&self, what: &Replay, skipped: &Skipped) -> Value {
        let spread = |h: &Histogram<u64>| -> Value {
            PERCENTILES
                .into_iter()
                .map(|(name, p)| (name.to_owned(), json!(us(h, p))))
                .collect::<serde_json::Map<_, _>>()
                .into()
        };
        let (speed, lateness) = match what.speed {
            Speed::Max => (json!("max"), Value::Null),
            Speed::Times(times) => (json!(times), spread(&self.lateness)),
        };
        json!({
            "speed": speed, "iodepth": what.iodepth, "requests": self.requests, "seconds": self.seconds,
            "iops": self.iops(), "bytes": self.bytes, "errors": self.errors, "held_up": self.held_up,
            "skipped": skipped.reasons().collect::<std::collections::BTreeMap<_, _>>(),
            "latency_us": spread(&self.latency), "lateness_us": lateness,
        })
    }
}

fn us(histogram: &Histogram<u64>, percent: f64) -> f64 {
    histogram.value_at_percentile(percent) as f64 / 1000.0
}
