//! Statistics as text: a line for each port, one for each pair of queues that has moved anything, one for each reason
//! why packets went nowhere.

use std::fmt::Write;
use std::sync::Arc;

use poll_engine::engine::ReactorStats;
use poll_engine::stats::QueueStats;

use crate::hub::{Hub, Port};
use crate::mib;
use crate::port::tap::Tap;
use crate::stats::{DROPS, PairStats};
use crate::switch::PortId;

/// Column heads.
const HEAD: &str = "pair      rx-packets           rx-bytes      tx-packets           tx-bytes   rx-drops   tx-drops   tx-waits    kicks  signals";

/// The report of one port with its queues' counters and those of the switch that it is a port of.
pub fn report(port: &Port, queues: &[Arc<QueueStats>], switched: &[(&str, u64)]) -> String {
    let mut out = format!("port {} {} pairs\n{HEAD}\n", port.name, port.pairs.len());
    for (i, pair) in port.pairs.iter().enumerate() {
        line(&mut out, &i.to_string(), std::slice::from_ref(pair), &queues[2 * i..2 * i + 2]);
    }
    line(&mut out, "all", &port.pairs, queues);
    for (why, name) in DROPS {
        let rx: u64 = port.pairs.iter().map(|p| p.rx_drops(why)).sum();
        let tx: u64 = port.pairs.iter().map(|p| p.tx_drops(why)).sum();
        if rx + tx > 0 {
            // Writing to a String does not fail.
            let _ = writeln!(out, "drops {name} rx {rx} tx {tx}");
        }
    }
    for (name, n) in switched.iter().filter(|(_, n)| *n > 0) {
        let _ = writeln!(out, "switch {name} {n}");
    }
    out += &mib::lines(mib::flows(&port.pairs, switched));
    out += &mib::queue_lines(&port.pairs, &DROPS);
    out
}

/// The cycles of each reactor, and of all of them for each packet that was taken.
pub fn cycles<'a>(reactors: impl Iterator<Item = &'a ReactorStats>, ports: &[Arc<Port>]) -> String {
    let mut out = String::new();
    let mut all = 0;
    for (i, reactor) in reactors.enumerate() {
        let (rounds, busy) = (reactor.busy_rounds.get(), reactor.busy_cycles.get());
        all += busy;
        let _ = writeln!(out, "reactor {i} busy-rounds {rounds} busy-cycles {busy}");
    }
    let packets: u64 = ports.iter().flat_map(|p| &p.pairs).map(|p| p.tx_packets.get()).sum();
    let each = all as f64 / packets.max(1) as f64;
    let _ = writeln!(out, "busy-cycles per packet {each:.1}");
    out
}

/// The report of the uplink at port number `port`: what it has counted itself, from its own point of view, and the switch.
pub fn uplink_report(name: &str, hub: &Hub, port: usize) -> String {
    let (link, c) = hub.outside.latest();
    let state = if link.up { "up" } else { "down" };
    let mut out = format!("uplink {name} {state} mtu {}\n", link.mtu);
    let counters = [
        ("rx_packets", c.rx_packets),
        ("rx_bytes", c.rx_bytes),
        ("rx_missed_errors", c.rx_missed_errors),
        ("rx_length_errors", c.rx_length_errors),
        ("rx_errors", c.rx_errors),
        ("tx_packets", c.tx_packets),
        ("tx_bytes", c.tx_bytes),
        ("tx_fifo_errors", c.tx_fifo_errors),
        ("tx_carrier_errors", c.tx_carrier_errors),
        ("tx_length_errors", c.tx_length_errors),
        ("tx_errors", c.tx_errors),
    ];
    for (counter, n) in counters {
        let _ = writeln!(out, "{counter} {n}");
    }
    let switched = hub.switch.as_ref().map(|s| s.counters(PortId(port as u16))).unwrap_or_default();
    for (counter, n) in switched.iter().filter(|(_, n)| *n > 0) {
        let _ = writeln!(out, "switch {counter} {n}");
    }
    for (why, counter) in DROPS {
        let (rx, tx) = (hub.port(port).pairs[0].rx_drops(why), hub.port(port).pairs[0].tx_drops(why));
        if rx + tx > 0 {
            let _ = writeln!(out, "drops {counter} rx {rx} tx {tx}");
        }
    }
    out += &mib::lines(mib::flows(&hub.port(port).pairs, &switched));
    out
}

/// The report of a port that is joined to a tap: what has been counted, under the names of `ethtool -S`.
pub fn tap_report(name: &str, tap: &Tap) -> String {
    let mut out = format!("port {name} tap {} {} pairs\n", tap.name(), tap.pairs());
    for (counter, count) in tap.counters() {
        let _ = writeln!(out, "{counter} {count}");
    }
    out += &mib::lines(tap.flows());
    out
}

fn line(out: &mut String, name: &str, pairs: &[PairStats], queues: &[Arc<QueueStats>]) {
    let sum = |of: fn(&PairStats) -> u64| pairs.iter().map(of).sum::<u64>();
    let drops = |of: fn(&PairStats, crate::stats::Drop) -> u64| {
        pairs.iter().map(|p| DROPS.iter().map(|&(why, _)| of(p, why)).sum::<u64>()).sum::<u64>()
    };
    let _ = writeln!(
        out,
        "{name:<5} {:>14} {:>18} {:>15} {:>18} {:>10} {:>10} {:>10} {:>8} {:>8}",
        sum(|p| p.rx_packets.get()),
        sum(|p| p.rx_bytes.get()),
        sum(|p| p.tx_packets.get()),
        sum(|p| p.tx_bytes.get()),
        drops(PairStats::rx_drops),
        drops(PairStats::tx_drops),
        sum(|p| p.tx_waits.get()),
        queues.iter().map(|q| q.kicks.get()).sum::<u64>(),
        queues.iter().map(|q| q.signals.get()).sum::<u64>(),
    );
}
