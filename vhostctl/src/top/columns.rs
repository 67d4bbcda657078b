//! The columns of the table of exports: what they are called, how wide they are, what they sort by and what they show.

use std::cmp::Ordering;

use super::Line;
use crate::rates::{ExportNow, Rates};

/// A column.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Column {
    Name,
    Iops,
    Received,
    Sent,
    Read,
    Written,
    P50,
    P99,
    P999,
    Dropped,
    Errors,
    Limited,
    Requests,
    Kicks,
    Signals,
    Peak,
}

/// All of them for disks, as they stand; those at the end only where there is room.
pub const DISKS: [Column; 13] = [
    Column::Name,
    Column::Iops,
    Column::Read,
    Column::Written,
    Column::P50,
    Column::P99,
    Column::P999,
    Column::Errors,
    Column::Limited,
    Column::Requests,
    Column::Kicks,
    Column::Signals,
    Column::Peak,
];

/// The same for ports.
pub const PORTS: [Column; 12] = [
    Column::Name,
    Column::Iops,
    Column::Received,
    Column::Sent,
    Column::Read,
    Column::Written,
    Column::Dropped,
    Column::Errors,
    Column::Limited,
    Column::Requests,
    Column::Kicks,
    Column::Signals,
];

/// Those of what a program serves.
pub fn columns(program: &str) -> &'static [Column] {
    if is_net(program) { &PORTS } else { &DISKS }
}

/// Whether it serves ports, whose requests are packets.
pub fn is_net(program: &str) -> bool {
    program == "vhost-net"
}

/// The least that a name gets.
pub const NAME: u16 = 12;

impl Column {
    pub fn title(self, is_net: bool) -> &'static str {
        match self {
            Column::Iops if is_net => "PPS",
            Column::Read if is_net => "RXbit/s",
            Column::Written if is_net => "TXbit/s",
            Column::Errors if is_net => "DROPS",
            Column::Requests if is_net => "PACKETS",
            Column::Received => "RX/s",
            Column::Sent => "TX/s",
            Column::Dropped => "DROP/s",
            Column::Name => "NAME",
            Column::Iops => "IOPS",
            Column::Read => "READ/s",
            Column::Written => "WRITE/s",
            Column::P50 => "P50",
            Column::P99 => "P99",
            Column::P999 => "P99.9",
            Column::Errors => "ERRORS",
            Column::Limited => "LIMIT",
            Column::Requests => "REQUESTS",
            Column::Kicks => "KICKS/s",
            Column::Signals => "IRQS/s",
            Column::Peak => "PEAK",
        }
    }

    /// With the space before it; a mark for the order has room.
    pub fn width(self) -> u16 {
        match self {
            Column::Name => NAME,
            Column::Iops
            | Column::Received
            | Column::Sent
            | Column::Dropped
            | Column::P50
            | Column::P99
            | Column::P999
            | Column::Limited
            | Column::Peak => 8,
            Column::Read | Column::Written | Column::Errors | Column::Kicks | Column::Signals => 9,
            Column::Requests => 10,
        }
    }

    /// The one so many places further among these, round all.
    pub fn next(self, by: isize, all: &[Column]) -> Column {
        let at = all.iter().position(|c| *c == self).unwrap_or(0) as isize;
        all[(at + by).rem_euclid(all.len() as isize) as usize]
    }

    pub fn compare(self, a: &ExportNow, b: &ExportNow) -> Ordering {
        let by = |of: fn(&Rates) -> f64| of(&a.rates).total_cmp(&of(&b.rates));
        match self {
            // As other columns have the most at their top, so this one has the first.
            Column::Name => b.name.cmp(&a.name),
            Column::Iops => by(|r| r.iops),
            Column::Received => by(|r| r.ways[0]),
            Column::Sent => by(|r| r.ways[1]),
            Column::Dropped => by(|r| r.dropped),
            Column::Read => by(|r| r.read),
            Column::Written => by(|r| r.written),
            Column::P50 => a.rates.percentiles.map(|p| p[0]).cmp(&b.rates.percentiles.map(|p| p[0])),
            Column::P99 => a.rates.percentiles.map(|p| p[1]).cmp(&b.rates.percentiles.map(|p| p[1])),
            Column::P999 => a.rates.percentiles.map(|p| p[2]).cmp(&b.rates.percentiles.map(|p| p[2])),
            Column::Errors => a.rates.errors.0.cmp(&b.rates.errors.0),
            Column::Limited => by(|r| r.limited),
            Column::Requests => a.rates.requests.cmp(&b.rates.requests),
            Column::Kicks => by(|r| r.kicks),
            Column::Signals => by(|r| r.signals),
            Column::Peak => a.rates.peak.cmp(&b.rates.peak),
        }
    }

    /// What stands in a line.
    pub fn cell(self, line: &Line<'_>, is_unfolded: bool, is_net: bool) -> String {
        let rates = line.rates();
        let amount = |bytes: f64| short(if is_net { 8.0 * bytes } else { bytes });
        let time = |i: usize| rates.percentiles.map_or("-".into(), |p| time(p[i]));
        match self {
            Column::Name => match line {
                Line::Export(export) => {
                    format!("{} {}", if is_unfolded { '\u{25be}' } else { '\u{25b8}' }, export.label())
                }
                Line::Queue(queue) => match queue.reactor {
                    Some(reactor) => format!("  \u{2514} {} on r{reactor}", queue.queue),
                    None => format!("  \u{2514} {} stopped", queue.queue),
                },
                Line::Drops(drops) => drops.reason.clone(),
            },
            Column::Received => short(rates.ways[0]),
            Column::Sent => short(rates.ways[1]),
            Column::Dropped => short(rates.dropped),
            Column::Iops => short(rates.iops),
            Column::Read => amount(rates.read),
            Column::Written => amount(rates.written),
            Column::P50 => time(0),
            Column::P99 => time(1),
            Column::P999 => time(2),
            Column::Errors => short(rates.errors.0 as f64),
            Column::Limited => percent(rates.limited),
            Column::Requests => short(rates.requests as f64),
            Column::Kicks => short(rates.kicks),
            Column::Signals => short(rates.signals),
            Column::Peak => rates.peak.to_string(),
        }
    }
}

/// A number in at most six characters: `999`, `12.3k`, `1.23M`.
pub fn short(n: f64) -> String {
    let (mut n, mut unit) = (n, "");
    for next in ["k", "M", "G", "T", "P"] {
        // What would be rounded to four digits is one of the next unit.
        if n < 999.5 {
            break;
        }
        (n, unit) = (n / 1000.0, next);
    }
    digits(n, unit)
}

/// Nanoseconds in at most six characters: `85.0us`, `1.20ms`.
pub fn time(ns: u64) -> String {
    let (mut n, mut unit) = (ns as f64, "ns");
    for next in ["us", "ms", "s"] {
        if n < 999.5 {
            break;
        }
        (n, unit) = (n / 1000.0, next);
    }
    digits(n, unit)
}

/// Three digits, and no fraction of what comes in whole numbers.
fn digits(n: f64, unit: &str) -> String {
    let places = match n {
        _ if unit.is_empty() || unit == "ns" || n >= 99.95 => 0,
        n if n >= 9.995 => 1,
        _ => 2,
    };
    format!("{n:.places$}{unit}")
}

/// A share; nothing for none at all, and never 100% for less.
pub fn percent(share: f64) -> String {
    match share * 100.0 {
        p if p <= 0.0 => "-".into(),
        p if p < 0.5 => "<1%".into(),
        p if p < 99.95 => format!("{:.0}%", p.min(99.0)),
        _ => "100%".into(),
    }
}
