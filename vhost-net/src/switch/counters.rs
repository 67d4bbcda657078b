//! Why frames are dropped, and how often, by port.

use poll_engine::stats::Counter;

macro_rules! reasons {
    ($($(#[$doc:meta])* $reason:ident = $name:literal,)*) => {
        /// Why a frame is not forwarded.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[repr(usize)]
        pub enum DropReason { $($(#[$doc])* $reason,)* }

        impl DropReason {
            /// Each of them.
            pub const ALL: &[DropReason] = &[$(DropReason::$reason,)*];

            /// Its counter's name, in the manner of `ethtool -S`: those that begin with `tx_` are counted where the frame
            /// would have left, the others where it came from. Both are from the switch's point of view.
            pub fn name(self) -> &'static str {
                match self { $(DropReason::$reason => $name,)* }
            }
        }
    };
}

reasons! {
    /// The port it comes from is down.
    LinkDown = "rx_link_down_drops",
    /// Shorter than an Ethernet header.
    Runt = "rx_runt_drops",
    /// From an address that no station has.
    BadSource = "rx_bad_source_drops",
    /// To 01:80:c2:00:00:0x, which bridges do not forward (802.1Q-2022, table 8-1): spanning tree, pause, LACP, LLDP.
    ReservedGroup = "rx_reserved_group_drops",
    /// In a VLAN that the port is not in.
    VlanIngress = "rx_vlan_drops",
    /// From an Ethernet address that is not the port's.
    GuardMac = "rx_guard_mac_drops",
    /// ARP of an address that is not the port's.
    GuardArp = "rx_guard_arp_drops",
    /// From an IP address that is not the port's.
    GuardIp = "rx_guard_ip_drops",
    /// Neighbour discovery of an address that is not the port's, or of a router.
    GuardNd = "rx_guard_nd_drops",
    /// A protocol that no guard knows.
    GuardProtocol = "rx_guard_protocol_drops",
    /// More than the port may send.
    RateLimit = "rx_rate_limit_drops",
    /// More to all than the port may send.
    BroadcastStorm = "rx_broadcast_storm_drops",
    /// More to groups than the port may send.
    MulticastStorm = "rx_multicast_storm_drops",
    /// More to unknown addresses than the port may send.
    UnknownStorm = "rx_unknown_storm_drops",
    /// To one behind the port that it comes from.
    SamePort = "rx_same_port_drops",
    /// The port it is for is down.
    EgressDown = "tx_link_down_drops",
    /// From one isolated port to another.
    Isolated = "tx_isolated_drops",
    /// In a VLAN that the port it is for is not in.
    VlanEgress = "tx_vlan_drops",
    /// Without its tag it would seem to be in another VLAN.
    VlanStacked = "tx_vlan_stacked_drops",
    /// Longer than the port's MTU.
    TooLong = "tx_mtu_drops",
    /// More than the port may get.
    EgressRateLimit = "tx_rate_limit_drops",
}

/// The counters of one port on one reactor, which alone writes them.
#[derive(Debug, Default)]
pub struct PortCounters {
    drops: [Counter; DropReason::ALL.len()],
    /// Addresses learnt from the port.
    pub learnt: Counter,
    /// Addresses that were behind another port before.
    pub moved: Counter,
    /// Addresses not learnt, because the port has as many as it may have or the table is full.
    pub not_learnt: Counter,
}

impl PortCounters {
    /// Counts a frame dropped.
    #[inline]
    pub fn dropped(&self, reason: DropReason) {
        self.drops[reason as usize].add(1);
    }

    /// Frames dropped for a reason.
    pub fn drops(&self, reason: DropReason) -> u64 {
        self.drops[reason as usize].get()
    }

    /// All counters with their names.
    pub fn named(&self) -> impl Iterator<Item = (&'static str, u64)> {
        let learning = [
            ("fdb_learnt", self.learnt.get()),
            ("fdb_moved", self.moved.get()),
            ("fdb_not_learnt", self.not_learnt.get()),
        ];
        DropReason::ALL.iter().map(|&r| (r.name(), self.drops(r))).chain(learning)
    }
}
