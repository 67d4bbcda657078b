//! What an interface counts, by the names of RFC 2863 (`ifXTable`, `ifTable`): of a port, its guest's card, so that "in" is
//! what the guest gets; of an uplink, what the switch sends there.

use std::fmt::Write;

use crate::stats::{Drop, PairStats};
use crate::switch::counters::DropReason;

/// One way.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Flow {
    /// Packets to one, to groups, and to all.
    pub packets: [u64; 3],
    /// Their bytes, with Ethernet headers.
    pub octets: u64,
    /// Packets that were dropped although nothing was wrong with them.
    pub discards: u64,
    /// Packets that something was wrong with.
    pub errors: u64,
}

impl Flow {
    /// Of so many packets, and what of them was to groups and to all.
    pub fn new(packets: u64, [multicast, broadcast]: [u64; 2], octets: u64) -> Flow {
        // Counters are read one after the other while they move.
        let to_one = packets.saturating_sub(multicast + broadcast);
        Flow { packets: [to_one, multicast, broadcast], octets, ..Flow::default() }
    }
}

impl std::iter::Sum for Flow {
    fn sum<I: Iterator<Item = Flow>>(all: I) -> Flow {
        all.fold(Flow::default(), |a, b| Flow {
            packets: std::array::from_fn(|i| a.packets[i] + b.packets[i]),
            octets: a.octets + b.octets,
            discards: a.discards + b.discards,
            errors: a.errors + b.errors,
        })
    }
}

/// Both ways of a port's queues: to the guest, and from it, with what a switch has dropped.
pub fn flows(pairs: &[PairStats], switched: &[(&str, u64)]) -> [Flow; 2] {
    let way = |pair: &PairStats, rx: bool| {
        let (packets, bytes, groups) = if rx {
            (&pair.rx_packets, &pair.rx_bytes, &pair.rx_groups)
        } else {
            (&pair.tx_packets, &pair.tx_bytes, &pair.tx_groups)
        };
        let drops = |why| if rx { pair.rx_drops(why) } else { pair.tx_drops(why) };
        let mut flow =
            Flow::new(packets.get(), [groups.multicast.get(), groups.broadcast.get()], bytes.get());
        flow.discards =
            [Drop::NoBuffers, Drop::TooLong, Drop::LinkDown, Drop::NoDestination].map(drops).iter().sum();
        flow.errors = [Drop::Malformed, Drop::BadHeader].map(drops).iter().sum();
        flow
    };
    let mut flows = [true, false].map(|rx| pairs.iter().map(|pair| way(pair, rx)).sum::<Flow>());
    for (name, n) in switched {
        // The switch's point of view is the other one.
        if DropReason::ALL.iter().any(|why| why.name() == *name) {
            flows[usize::from(name.starts_with("rx_"))].discards += n;
        }
    }
    flows
}

/// Lines, each a name and a number.
pub fn lines([rx, tx]: [Flow; 2]) -> String {
    let mut out = String::new();
    for (way, flow) in [("In", rx), ("Out", tx)] {
        let [one, group, all] = flow.packets;
        for (name, n) in [("Ucast", one), ("Multicast", group), ("Broadcast", all)] {
            // Writing to a String does not fail.
            let _ = writeln!(out, "ifHC{way}{name}Pkts {n}");
        }
        let Flow { octets, discards, errors, .. } = flow;
        let _ = writeln!(out, "ifHC{way}Octets {octets}\nif{way}Discards {discards}\nif{way}Errors {errors}");
    }
    out
}

/// The counters of a port's queues in the manner of `ethtool -S`.
pub fn queue_lines(pairs: &[PairStats], drops: &[(Drop, &str)]) -> String {
    let mut out = String::new();
    for (at, pair) in pairs.iter().enumerate() {
        for (way, packets, bytes, groups) in [
            ("rx", &pair.rx_packets, &pair.rx_bytes, &pair.rx_groups),
            ("tx", &pair.tx_packets, &pair.tx_bytes, &pair.tx_groups),
        ] {
            let counters = [
                ("packets", packets),
                ("bytes", bytes),
                ("multicast", &groups.multicast),
                ("broadcast", &groups.broadcast),
            ];
            for (name, counter) in counters {
                let _ = writeln!(out, "{way}_queue_{at}_{name} {}", counter.get());
            }
            for &(why, name) in drops {
                let n = if way == "rx" { pair.rx_drops(why) } else { pair.tx_drops(why) };
                let _ = writeln!(out, "{way}_queue_{at}_{name}_drops {n}");
            }
        }
        let _ = writeln!(out, "tx_queue_{at}_waits {}", pair.tx_waits.get());
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_packet_is_counted_once() {
        let pair = PairStats::default();
        pair.rx_packets.add(10);
        pair.rx_bytes.add(1000);
        pair.rx_groups.count(&[1, 0, 0x5e, 0, 0, 1, 2], 2);
        pair.rx_groups.count(&[0xff; 14], 3);
        pair.rx_groups.count(&[2, 0xff, 0xff, 0xff, 0xff, 0xff], 1);
        pair.drop_rx(Drop::NoBuffers);
        pair.drop_tx(Drop::Malformed);
        let switched = [("rx_runt_drops", 4), ("tx_mtu_drops", 5), ("fdb_learnt", 6)];
        let [rx, tx] = flows(&[pair], &switched);
        assert_eq!(rx, Flow { packets: [5, 2, 3], octets: 1000, discards: 1 + 5, errors: 0 });
        assert_eq!(tx, Flow { packets: [0; 3], octets: 0, discards: 4, errors: 1 });
        let text = lines([rx, tx]);
        let said = "ifHCInUcastPkts 5\nifHCInMulticastPkts 2\nifHCInBroadcastPkts 3\nifHCInOctets 1000\n\
                    ifInDiscards 6\nifInErrors 0\nifHCOutUcastPkts 0\n";
        assert!(text.starts_with(said), "{text}");
        assert!(text.ends_with("ifOutDiscards 4\nifOutErrors 1\n"), "{text}");
    }
}
