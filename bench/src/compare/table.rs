//! Tables: a row for each back end, minimum / median / maximum, ratios to the reference of the same round.

use std::fmt::Write;

use super::measure::{Results, Sample};
use super::spread::{Spread, ratios};

/// A table of one point.
#[derive(Clone, Debug)]
pub struct Table {
    /// What was run.
    pub title: String,
    /// Names of the columns.
    pub heads: Vec<String>,
    /// Rows of cells.
    pub rows: Vec<Vec<String>>,
    /// What there is to say about it.
    pub notes: Vec<String>,
}

struct Metric {
    head: &'static str,
    ratio: Option<&'static str>,
    digits: usize,
    /// Whether it belongs to the main table, not to the details.
    main: bool,
    /// Whether it is left out where nothing has it.
    optional: bool,
    of: fn(&Sample) -> Option<f64>,
}

const METRICS: [Metric; 14] = [
    Metric {
        head: "IOPS",
        ratio: Some("IOPS ratio"),
        digits: 0,
        main: true,
        optional: false,
        of: |s| Some(s.iops),
    },
    Metric { head: "Gbit/s", ratio: None, digits: 2, main: true, optional: true, of: |s| s.gbits },
    Metric { head: "lost %", ratio: None, digits: 3, main: true, optional: true, of: |s| s.loss_percent },
    Metric {
        head: "p50 us",
        ratio: Some("p50 ratio"),
        digits: 2,
        main: true,
        optional: false,
        of: |s| Some(s.latency_us[0]),
    },
    Metric {
        head: "p90 us",
        ratio: None,
        digits: 2,
        main: false,
        optional: false,
        of: |s| Some(s.latency_us[1]),
    },
    Metric {
        head: "p99 us",
        ratio: None,
        digits: 2,
        main: true,
        optional: false,
        of: |s| Some(s.latency_us[2]),
    },
    Metric {
        head: "p99.9 us",
        ratio: None,
        digits: 2,
        main: false,
        optional: false,
        of: |s| Some(s.latency_us[3]),
    },
    Metric {
        head: "max us",
        ratio: None,
        digits: 0,
        main: false,
        optional: false,
        of: |s| Some(s.latency_us[4]),
    },
    Metric {
        head: "CPU us/request",
        ratio: Some("CPU ratio"),
        digits: 3,
        main: true,
        optional: false,
        of: |s| s.cpu_us,
    },
    Metric {
        head: "sleeps/request",
        ratio: None,
        digits: 4,
        main: true,
        optional: false,
        of: |s| s.voluntary,
    },
    Metric {
        head: "preemptions/request",
        ratio: None,
        digits: 6,
        main: false,
        optional: false,
        of: |s| s.involuntary,
    },
    Metric {
        head: "cycles/request",
        ratio: None,
        digits: 0,
        main: false,
        optional: true,
        of: |s| s.counters.map(|c| c[0]),
    },
    Metric {
        head: "instructions/request",
        ratio: None,
        digits: 0,
        main: false,
        optional: true,
        of: |s| s.counters.map(|c| c[1]),
    },
    Metric {
        head: "cache misses/request",
        ratio: None,
        digits: 2,
        main: false,
        optional: true,
        of: |s| s.counters.map(|c| c[2]),
    },
];

/// The main table of a point, with ratios and notes.
pub fn main(results: &Results, point: usize) -> Table {
    Table { notes: notes(results, point), ..table(results, point, true) }
}

/// What does not fit into that.
pub fn details(results: &Results, point: usize) -> Table {
    table(results, point, false)
}

fn table(results: &Results, point: usize, main: bool) -> Table {
    let there = |m: &Metric| !m.optional || results.samples.iter().any(|s| (m.of)(s).is_some());
    let shown: Vec<&Metric> = METRICS.iter().filter(|m| m.main == main && there(m)).collect();
    let mut heads = vec!["back end"];
    heads.extend(shown.iter().map(|m| m.head));
    let with_ratio = || METRICS.iter().filter(|m| main && m.ratio.is_some());
    heads.extend(with_ratio().filter_map(|m| m.ratio));
    let kind = results.kind;
    let in_units = |head: &str| head.replace("IOPS", kind.rate()).replace("request", kind.unit());
    let heads = heads.into_iter().map(in_units).collect();
    let mut rows = Vec::new();
    for backend in &results.backends {
        let own = |metric: &Metric| values(results, point, &backend.name, metric);
        let cell = |spread: Option<Spread>, digits| spread.map_or("not available".into(), |s| s.text(digits));
        let runs = results.of(point, &backend.name).count();
        let partial = if runs < results.rounds {
            format!(" ({runs} of {} rounds)", results.rounds)
        } else {
            String::new()
        };
        let mut row = vec![format!("{}{partial}", backend.name)];
        let over = |m: &Metric| Spread::of(own(m).into_iter().map(|(_, v)| v));
        row.extend(shown.iter().map(|m| cell(over(m), m.digits)));
        for metric in with_ratio() {
            let reference = values(results, point, results.reference(), metric);
            row.push(cell(ratios(&own(metric), &reference), 2));
        }
        rows.push(row);
    }
    Table { title: results.points[point].title.clone(), heads, rows, notes: Vec::new() }
}

fn values(results: &Results, point: usize, backend: &str, metric: &Metric) -> Vec<(usize, f64)> {
    results.of(point, backend).filter_map(|s| Some((s.round, (metric.of)(s)?))).collect()
}

fn notes(results: &Results, point: usize) -> Vec<String> {
    let mut notes = Vec::new();
    for failure in results.failures.iter().filter(|f| f.point == Some(point)) {
        let round = failure.round.map_or(0, |r| r + 1);
        notes.push(format!("partial: {} failed in round {round}: {}", failure.backend, failure.error));
    }
    let mut trips = Vec::new();
    for round in 0..results.rounds {
        let of_round = results.samples.iter().filter(|s| s.point == point && s.round == round);
        if let Some(spread) = Spread::of(of_round.filter_map(|s| s.round_trip_ns)) {
            trips.push(format!("{:.0}", spread.median));
        }
    }
    if !trips.is_empty() {
        notes.push(format!("a cache line's round trip between the CPUs, ns by round: {}", trips.join(", ")));
    }
    for (round, why) in results.noisy_rounds(point) {
        notes.push(format!("round {} was noisy: {why}", round + 1));
    }
    notes
}

/// All tables for a terminal.
pub fn text(results: &Results) -> String {
    let mut out = String::new();
    // Writing to a string does not fail.
    let _ = writeln!(
        out,
        "{} rounds of {:.1} s; min / median / max; ratios to {} of the same round",
        results.rounds,
        results.runtime,
        results.reference()
    );
    for table in (0..results.points.len()).map(|point| main(results, point)) {
        let width = |column: usize| {
            let cells = table.rows.iter().map(|r| r[column].chars().count());
            cells.chain([table.heads[column].chars().count()]).max().unwrap_or(0)
        };
        let widths: Vec<usize> = (0..table.heads.len()).map(width).collect();
        let _ = writeln!(out, "\n{}", table.title);
        for row in std::iter::once(&table.heads).chain(&table.rows) {
            let _ = write!(out, "{:<1$}", row[0], widths[0]);
            for (cell, width) in row.iter().zip(&widths).skip(1) {
                let _ = write!(out, "  {cell:>width$}");
            }
            out.push('\n');
        }
        for note in &table.notes {
            let _ = writeln!(out, "  {note}");
        }
    }
    if let Some(why) = &results.no_counters {
        let _ = writeln!(out, "\ncycles, instructions and cache misses: not available: {why}");
    }
    out
}
