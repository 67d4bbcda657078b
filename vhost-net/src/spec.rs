//! A port as it is asked for: by `--port` and `--uplink` as a list of keys and values, and in a file as a table.

use std::net::IpAddr;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use daemon::said::from_keys;
use daemon::{Place, from_text, on_off};
use ipnet::IpNet;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::device::MTU_RANGE;
use crate::mac::MacAddr;
use crate::switch::PortConfig;
use crate::switch::guard::GuardConfig;
use crate::switch::limit::{Rate, StormRates};
use crate::switch::vlan::{Vlan, VlanSet, parse_vid};

/// One `--port` or `[[port]]`, or an `--uplink` or `[uplink]`. From the guest's point of view: `tx` is what it sends.
#[allow(clippy::struct_excessive_bools)] // keys, each by itself
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, ToSchema)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct PortSpec {
    /// Where to listen.
    #[schema(value_type = String)]
    pub socket_path: Option<PathBuf>,
    /// Or what was inherited for that.
    #[serde(deserialize_with = "some_fd")]
    #[schema(value_type = i32)]
    pub fd: Option<i32>,
    /// For people.
    pub name: Option<String>,
    /// The name of its switch, if that has one.
    pub switch: Option<String>,
    /// The card's address.
    #[serde(deserialize_with = "some_mac")]
    #[schema(value_type = String, example = "52:54:00:12:34:56")]
    pub mac: Option<[u8; 6]>,
    /// The MTU it advises.
    #[serde(deserialize_with = "some_mtu")]
    #[schema(value_type = u16, minimum = 68, maximum = 65521)]
    pub mtu: Option<u16>,
    /// Packets for it wait for its buffers.
    #[serde(deserialize_with = "switched")]
    pub wait: bool,
    /// Its link is down.
    #[serde(rename = "link", deserialize_with = "is_down")]
    #[schema(value_type = String, pattern = "^(up|down)$")]
    pub link_down: bool,
    /// The tap that it is joined to, or that the uplink is.
    pub tap: Option<String>,
    /// Or the queues of one that are inherited.
    #[serde(deserialize_with = "numbers")]
    pub tap_fds: Vec<i32>,

    /// An uplink by packet sockets: any interface.
    pub af_packet: Option<String>,
    /// An uplink around the kernel's stack.
    pub af_xdp: Option<String>,
    /// Which queue of that.
    #[serde(deserialize_with = "some_queue")]
    #[schema(value_type = u32)]
    pub queue: Option<u32>,

    /// An access port of this VLAN.
    #[serde(deserialize_with = "some_vid")]
    #[schema(value_type = u16, minimum = 1, maximum = 4094)]
    pub vlan: Option<u16>,
    /// A trunk of these.
    #[serde(deserialize_with = "some_vlans")]
    #[schema(value_type = String, example = "5,10-19")]
    pub trunk: Option<VlanSet>,
    /// The one of a trunk that has no tag.
    #[serde(deserialize_with = "some_vid")]
    #[schema(value_type = u16, minimum = 1, maximum = 4094)]
    pub native: Option<u16>,
    /// It may send from its card's own address only.
    #[serde(deserialize_with = "switched")]
    pub guard: bool,
    /// It may send from these only.
    #[serde(deserialize_with = "nets")]
    #[schema(value_type = Vec<String>)]
    pub ip: Vec<IpNet>,
    /// It may send router advertisements and redirects.
    #[serde(deserialize_with = "switched")]
    pub router: bool,
    /// Sends nothing to other isolated ports.
    #[serde(deserialize_with = "switched")]
    pub isolated: bool,
    /// Gets frames to addresses that nobody knows.
    #[serde(deserialize_with = "some_switched")]
    #[schema(value_type = bool)]
    pub flood_unknown: Option<bool>,
    /// Most addresses learnt from it.
    #[serde(deserialize_with = "some_count")]
    #[schema(value_type = u64, minimum = 1)]
    pub max_macs: Option<u64>,
    /// Bits a second.
    #[serde(deserialize_with = "some_count")]
    #[schema(value_type = u64, minimum = 1)]
    pub tx_bps: Option<u64>,
    /// Packets a second.
    #[serde(deserialize_with = "some_count")]
    #[schema(value_type = u64, minimum = 1)]
    pub tx_pps: Option<u64>,
    /// Bits a second.
    #[serde(deserialize_with = "some_count")]
    #[schema(value_type = u64, minimum = 1)]
    pub rx_bps: Option<u64>,
    /// Packets a second.
    #[serde(deserialize_with = "some_count")]
    #[schema(value_type = u64, minimum = 1)]
    pub rx_pps: Option<u64>,
    /// How long it may be over these.
    #[serde(deserialize_with = "some_count")]
    #[schema(value_type = u64, minimum = 1)]
    pub burst_ms: Option<u64>,
    /// To all, a second.
    #[serde(deserialize_with = "some_count")]
    #[schema(value_type = u64, minimum = 1)]
    pub broadcast_pps: Option<u64>,
    /// To groups, a second.
    #[serde(deserialize_with = "some_count")]
    #[schema(value_type = u64, minimum = 1)]
    pub multicast_pps: Option<u64>,
    /// To addresses that nobody knows, a second.
    #[serde(deserialize_with = "some_count")]
    #[schema(value_type = u64, minimum = 1)]
    pub unknown_pps: Option<u64>,
}

/// The keys of limits.
pub const LIMITS: [&str; 8] =
    ["tx-bps", "tx-pps", "rx-bps", "rx-pps", "burst-ms", "broadcast-pps", "multicast-pps", "unknown-pps"];

/// What is to be kept to of a port's rates. From the guest's point of view: `tx` is what it sends. What is not there is not
/// limited.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct PortLimits {
    /// Bits a second, also with k, M or G behind.
    #[serde(deserialize_with = "some_count", skip_serializing_if = "Option::is_none")]
    #[schema(value_type = u64, minimum = 1)]
    pub tx_bps: Option<u64>,
    /// Packets a second.
    #[serde(deserialize_with = "some_count", skip_serializing_if = "Option::is_none")]
    #[schema(value_type = u64, minimum = 1)]
    pub tx_pps: Option<u64>,
    /// Bits a second.
    #[serde(deserialize_with = "some_count", skip_serializing_if = "Option::is_none")]
    #[schema(value_type = u64, minimum = 1)]
    pub rx_bps: Option<u64>,
    /// Packets a second.
    #[serde(deserialize_with = "some_count", skip_serializing_if = "Option::is_none")]
    #[schema(value_type = u64, minimum = 1)]
    pub rx_pps: Option<u64>,
    /// How long it may be over these, in milliseconds.
    #[serde(deserialize_with = "some_count", skip_serializing_if = "Option::is_none")]
    #[schema(value_type = u64, minimum = 1)]
    pub burst_ms: Option<u64>,
    /// To all, a second.
    #[serde(deserialize_with = "some_count", skip_serializing_if = "Option::is_none")]
    #[schema(value_type = u64, minimum = 1)]
    pub broadcast_pps: Option<u64>,
    /// To groups, a second.
    #[serde(deserialize_with = "some_count", skip_serializing_if = "Option::is_none")]
    #[schema(value_type = u64, minimum = 1)]
    pub multicast_pps: Option<u64>,
    /// To addresses that nobody knows, a second.
    #[serde(deserialize_with = "some_count", skip_serializing_if = "Option::is_none")]
    #[schema(value_type = u64, minimum = 1)]
    pub unknown_pps: Option<u64>,
}

impl PortLimits {
    /// In the order of [`LIMITS`].
    pub fn all(&self) -> [Option<u64>; LIMITS.len()] {
        let PortLimits {
            tx_bps,
            tx_pps,
            rx_bps,
            rx_pps,
            burst_ms,
            broadcast_pps,
            multicast_pps,
            unknown_pps,
        } = *self;
        [tx_bps, tx_pps, rx_bps, rx_pps, burst_ms, broadcast_pps, multicast_pps, unknown_pps]
    }
}

from_text! {
    some_fd: Option<i32> = |s| number(s).map(Some);
    some_queue: Option<u32> = |s| number(s).map(Some);
    some_mac: Option<[u8; 6]> = |s| mac(s).map(Some);
    some_mtu: Option<u16> = |s| mtu(s).map(Some);
    some_vid: Option<u16> = |s| parse_vid(s).map(Some);
    some_vlans: Option<VlanSet> = |s| s.replace('+', ",").parse().map(Some);
    some_count: Option<u64> = |s| count(s).map(Some);
    some_switched: Option<bool> = |s| on_off(s).map(Some);
    switched: bool = on_off;
    is_down: bool = link;
    numbers: Vec<i32> = |s| s.split('+').map(number).collect::<Result<_, _>>();
    nets: Vec<IpNet> = |s| s.split('+').map(net).collect::<Result<_, _>>();
}

impl FromStr for PortSpec {
    type Err = String;

    fn from_str(s: &str) -> Result<PortSpec, String> {
        from_keys(s)
    }
}

impl PortSpec {
    /// Where its front ends come from, if that is said.
    pub fn place(&self) -> Option<Place> {
        match (&self.socket_path, self.fd) {
            (Some(path), _) => Some(Place::Path(path.clone())),
            (None, Some(fd)) => Some(Place::Fd(fd)),
            (None, None) => None,
        }
    }

    /// What it is called.
    pub fn name(&self) -> String {
        let interface = || self.interface().map(str::to_owned);
        let name = self.name.clone().or_else(|| self.place().map(|place| place.key())).or_else(interface);
        name.unwrap_or_default()
    }

    /// The interface of an uplink.
    pub fn interface(&self) -> Option<&str> {
        [&self.tap, &self.af_packet, &self.af_xdp].into_iter().find_map(Option::as_deref)
    }

    /// Whether it is joined to a tap and nothing else.
    pub fn has_tap(&self) -> bool {
        self.tap.is_some() || !self.tap_fds.is_empty()
    }

    /// What it is limited to.
    pub fn limits(&self) -> PortLimits {
        PortLimits {
            tx_bps: self.tx_bps,
            tx_pps: self.tx_pps,
            rx_bps: self.rx_bps,
            rx_pps: self.rx_pps,
            burst_ms: self.burst_ms,
            broadcast_pps: self.broadcast_pps,
            multicast_pps: self.multicast_pps,
            unknown_pps: self.unknown_pps,
        }
    }

    /// The same, with these limits.
    #[must_use]
    pub fn with_limits(&self, limits: PortLimits) -> PortSpec {
        let PortLimits {
            tx_bps,
            tx_pps,
            rx_bps,
            rx_pps,
            burst_ms,
            broadcast_pps,
            multicast_pps,
            unknown_pps,
        } = limits;
        let limited = PortSpec { tx_bps, tx_pps, rx_bps, rx_pps, burst_ms, ..self.clone() };
        PortSpec { broadcast_pps, multicast_pps, unknown_pps, ..limited }
    }

    /// What it is to a switch.
    pub fn rules(&self) -> PortConfig {
        let default = PortConfig::default();
        let vlan = match (self.vlan, &self.trunk) {
            (Some(vid), _) => Vlan::Access(vid),
            (None, Some(allowed)) => Vlan::Trunk { native: self.native, allowed: allowed.clone() },
            (None, None) => default.vlan,
        };
        let burst = self.burst_ms.map(Duration::from_millis);
        let macs = self.mac.filter(|_| self.guard).map(MacAddr);
        PortConfig {
            name: self.name(),
            vlan,
            guard: GuardConfig {
                macs: macs.into_iter().collect(),
                ips: self.ip.clone(),
                is_router: self.router,
            },
            ingress: Rate { packets: self.tx_pps, bits: self.tx_bps, burst },
            egress: Rate { packets: self.rx_pps, bits: self.rx_bps, burst },
            storm: StormRates {
                broadcast: self.broadcast_pps,
                multicast: self.multicast_pps,
                unknown: self.unknown_pps,
            },
            is_isolated: self.isolated,
            floods_unknown: self.flood_unknown.unwrap_or(default.floods_unknown),
            mtu: self.mtu.map_or(default.mtu, u32::from),
            max_addresses: self
                .max_macs
                .map_or(default.max_addresses, |most| most.try_into().unwrap_or(u32::MAX)),
        }
    }

    /// Whether any rule was asked for, which needs a switch.
    pub fn has_rules(&self) -> bool {
        let PortConfig { name, mtu, .. } = self.rules();
        self.guard || self.rules() != PortConfig { name, mtu, ..PortConfig::default() }
    }
}

fn number<T: FromStr>(s: &str) -> Result<T, String> {
    s.parse().map_err(|_| format!("'{s}' is no number of a descriptor or queue"))
}

/// A number above zero, with a suffix of a thousand, a million or a thousand million.
fn count(s: &str) -> Result<u64, String> {
    let (digits, factor) = match s.strip_suffix(['k', 'M', 'G']) {
        Some(digits) if s.ends_with('k') => (digits, 1_000),
        Some(digits) if s.ends_with('M') => (digits, 1_000_000),
        Some(digits) => (digits, 1_000_000_000),
        None => (s, 1),
    };
    let n = digits.parse().ok().and_then(|n: u64| n.checked_mul(factor)).filter(|&n| n > 0);
    n.ok_or(format!("'{s}' is no number above 0, such as 500k, 10M or 1G"))
}

fn net(s: &str) -> Result<IpNet, String> {
    let net = s.parse().or_else(|_| s.parse::<IpAddr>().map(IpNet::from));
    net.map_err(|_| format!("'{s}' is no address and no network, such as 10.0.0.0/24"))
}

/// Whether a link is down.
fn link(s: &str) -> Result<bool, String> {
    match s {
        "up" => Ok(false),
        "down" => Ok(true),
        _ => Err(format!("'{s}' is neither up nor down")),
    }
}

/// An MTU that a card can have.
pub fn mtu(s: &str) -> Result<u16, String> {
    let (least, most) = (MTU_RANGE.start(), MTU_RANGE.end());
    s.parse()
        .ok()
        .filter(|n| MTU_RANGE.contains(n))
        .ok_or(format!("an MTU is a number from {least} to {most}"))
}

/// A card's address as people write it.
pub fn mac(s: &str) -> Result<[u8; 6], String> {
    let mac: MacAddr = s.replace('-', ":").parse().map_err(|e: netaddr::NotAMac| e.to_string())?;
    if mac.is_group() {
        return Err(format!("'{s}' is a group's address, not a card's"));
    }
    if !mac.is_station() {
        return Err("a card's address is not zero".into());
    }
    Ok(mac.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn port(text: &str) -> Result<PortSpec, String> {
        text.parse()
    }

    #[test]
    fn addresses_are_six_bytes_of_one_card() {
        assert_eq!(mac("52:54:00:12:34:5f"), Ok([0x52, 0x54, 0, 0x12, 0x34, 0x5f]));
        for bad in [
            "",
            "52:54:00:12:34",
            "52:54:00:12:34:56:78",
            "53:54:00:12:34:56",
            "5:54:00:12:34:56",
            "00:00:00:00:00:00",
        ] {
            assert!(mac(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn ports_are_lists_of_keys_and_values() {
        let spec = port("socket-path=/s,name=a,wait,mtu=9000,tap=t0,link=down,tap-fds=5+6,fd=7").unwrap();
        assert_eq!((spec.name(), spec.wait, spec.mtu), ("a".into(), true, Some(9000)));
        assert_eq!((spec.tap.as_deref(), spec.tap_fds.as_slice()), (Some("t0"), &[5, 6][..]));
        assert!(spec.link_down && !spec.has_rules());
        assert_eq!(port("socket-path=/s").unwrap().name(), "/s");
    }

    #[test]
    fn rules_are_what_the_keys_say() {
        let rules = |text| port(text).unwrap().rules();
        assert!(port("vlan=5").unwrap().has_rules() && port("burst-ms=5").unwrap().has_rules());
        assert!(!port("mac=52:54:00:00:00:01,name=a,mtu=1500").unwrap().has_rules());
        assert_eq!(rules("vlan=5").vlan, Vlan::Access(5));
        let allowed: VlanSet = "5,10-12".parse().unwrap();
        for text in ["trunk=5+10-12,native=7", "native=7,trunk=5,trunk=10-12"] {
            assert_eq!(rules(text).vlan, Vlan::Trunk { native: Some(7), allowed: allowed.clone() });
        }
        assert_eq!(rules("trunk=5+10-12").vlan, Vlan::Trunk { native: None, allowed });
        let limited = rules("tx-bps=10M,tx-pps=3k,rx-bps=1G,burst-ms=5,flood-unknown=off,max-macs=7");
        let burst = Some(Duration::from_millis(5));
        assert_eq!(limited.ingress, Rate { packets: Some(3000), bits: Some(10_000_000), burst });
        assert_eq!(limited.egress, Rate { packets: None, bits: Some(1_000_000_000), burst });
        assert_eq!((limited.floods_unknown, limited.max_addresses), (false, 7));
        let guarded = rules("guard=on,mac=52:54:00:00:00:01,ip=10.0.0.1,ip=2001:db8::/64").guard;
        assert_eq!(guarded.ips, ["10.0.0.1/32".parse().unwrap(), "2001:db8::/64".parse().unwrap()]);
        assert_eq!(guarded.macs, [MacAddr([0x52, 0x54, 0, 0, 0, 1])]);
        assert_eq!(rules("mac=52:54:00:00:00:01").guard.macs, [], "only with guard=on");
    }

    #[test]
    fn a_table_says_the_same() {
        let list = "socket-path=/s,trunk=5+10-12,native=7,tx-bps=10M,ip=10.0.0.1,ip=fd00::/64,guard,queue=2";
        let table = "socket-path = '/s'\ntrunk = [5, '10-12']\nnative = 7\ntx-bps = 10_000_000\n\
                     ip = ['10.0.0.1', 'fd00::/64']\nguard = true\nqueue = 2";
        assert_eq!(toml::from_str::<PortSpec>(table).unwrap(), port(list).unwrap());
    }

    #[test]
    fn what_is_no_value_is_said_with_its_key() {
        for bad in [
            "vlan=0",
            "vlan=4095",
            "trunk=5-",
            "mtu=1",
            "link=on",
            "wait=maybe",
            "tx-bps=0",
            "tx-bps=1T",
            "tx-pps=-1",
            "ip=10.0.0",
            "guard=1",
            "max-macs=5T",
            "fd=x",
            "queue=-1",
        ] {
            let (key, _) = bad.split_once('=').unwrap();
            let said = port(bad).unwrap_err();
            assert!(said.starts_with(&format!("{key}: ")), "{bad}: {said}");
        }
        assert!(port("x=1").unwrap_err().contains("unknown field `x`"));
        assert!(port("").is_err());
    }
}
