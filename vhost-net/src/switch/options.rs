//! What a port of a switch is to be, as text: a key and a value each.

use std::fmt::Display;
use std::net::IpAddr;
use std::str::FromStr;
use std::time::Duration;

use daemon::on_off;
use ipnet::IpNet;

use super::PortConfig;
use super::vlan::{Vlan, VlanSet, parse_vid};

/// The keys, for people.
pub const KEYS: &str = "vlan, trunk, native, guard, ip, router, isolated, flood-unknown, max-macs, tx-bps, tx-pps, rx-bps, \
                        rx-pps, burst-ms, broadcast-pps, multicast-pps, unknown-pps";

/// A number with a suffix of a thousand, a million or a thousand million.
fn number<T: TryFrom<u64>>(key: &str, value: &str) -> Result<T, String> {
    let (digits, factor) = match value.strip_suffix(['k', 'M', 'G']) {
        Some(digits) if value.ends_with('k') => (digits, 1_000),
        Some(digits) if value.ends_with('M') => (digits, 1_000_000),
        Some(digits) => (digits, 1_000_000_000),
        None => (value, 1),
    };
    let n = digits.parse().ok().and_then(|n: u64| n.checked_mul(factor)).filter(|&n| n > 0);
    n.and_then(|n| n.try_into().ok())
        .ok_or(format!("{key}={value}: write a number above 0, such as 500k, 10M or 1G"))
}

fn parse<T: FromStr<Err: Display>>(key: &str, value: &str) -> Result<T, String> {
    value.parse().map_err(|e| format!("{key}={value}: {e}"))
}

impl PortConfig {
    /// Sets what `key` names. False if there is no such key. From the guest's point of view: `tx` is what it sends.
    pub fn set(&mut self, key: &str, value: &str) -> Result<bool, String> {
        match key {
            "vlan" => self.vlan = Vlan::Access(parse_vid(value)?),
            // Commas end a key's value.
            "trunk" => {
                let allowed: VlanSet = parse(key, &value.replace('+', ","))?;
                let native = match self.vlan {
                    Vlan::Trunk { native: Some(native @ 1..), .. } => Some(native),
                    _ => None,
                };
                self.vlan = Vlan::Trunk { native, allowed };
            }
            "native" => match &mut self.vlan {
                Vlan::Trunk { native, .. } => *native = Some(parse_vid(value)?),
                Vlan::Access(_) => return Err("native= goes with trunk=, not with vlan=".into()),
            },
            "guard" => self.is_guarded = on_off(key, value)?,
            "ip" => {
                let net = value.parse().or_else(|_| value.parse::<IpAddr>().map(IpNet::from));
                let wrong = |_| format!("{key}={value}: write an address or a network, such as 10.0.0.0/24");
                self.guard.ips.push(net.map_err(wrong)?);
            }
            "router" => self.guard.is_router = on_off(key, value)?,
            "isolated" => self.is_isolated = on_off(key, value)?,
            "flood-unknown" => self.floods_unknown = on_off(key, value)?,
            "max-macs" => self.max_addresses = number(key, value)?,
            "tx-bps" => self.ingress.bits = Some(number(key, value)?),
            "tx-pps" => self.ingress.packets = Some(number(key, value)?),
            "rx-bps" => self.egress.bits = Some(number(key, value)?),
            "rx-pps" => self.egress.packets = Some(number(key, value)?),
            "burst-ms" => {
                let burst = Some(Duration::from_millis(number(key, value)?));
                (self.ingress.burst, self.egress.burst) = (burst, burst);
            }
            "broadcast-pps" => self.storm.broadcast = Some(number(key, value)?),
            "multicast-pps" => self.storm.multicast = Some(number(key, value)?),
            "unknown-pps" => self.storm.unknown = Some(number(key, value)?),
            _ => return Ok(false),
        }
        Ok(true)
    }

    /// Whether any rule was asked for, which needs a switch.
    pub fn has_rules(&self) -> bool {
        *self != PortConfig { name: self.name.clone(), mtu: self.mtu, ..PortConfig::default() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::switch::limit::Rate;

    fn port(text: &str) -> Result<PortConfig, String> {
        let mut port = PortConfig::default();
        for pair in text.split(',').filter(|pair| !pair.is_empty()) {
            let (key, value) = pair.split_once('=').unwrap();
            if !port.set(key, value)? {
                return Err(format!("unknown {key}"));
            }
        }
        Ok(port)
    }

    #[test]
    fn ports_are_read_key_by_key() {
        assert!(!port("").unwrap().has_rules());
        assert_eq!(port("vlan=5").unwrap().vlan, Vlan::Access(5));
        let allowed: VlanSet = "5,10-12".parse().unwrap();
        for text in ["trunk=5+10-12,native=7", "native=7,trunk=5+10-12"] {
            assert_eq!(port(text).unwrap().vlan, Vlan::Trunk { native: Some(7), allowed: allowed.clone() });
        }
        assert_eq!(port("trunk=5+10-12").unwrap().vlan, Vlan::Trunk { native: None, allowed });
        let limited = port("tx-bps=10M,tx-pps=3k,rx-bps=1G,burst-ms=5").unwrap();
        let burst = Some(Duration::from_millis(5));
        assert_eq!(limited.ingress, Rate { packets: Some(3000), bits: Some(10_000_000), burst });
        assert_eq!(limited.egress, Rate { packets: None, bits: Some(1_000_000_000), burst });
        let guarded = port("guard=on,ip=10.0.0.1,ip=2001:db8::/64").unwrap();
        assert_eq!(guarded.guard.ips, ["10.0.0.1/32".parse().unwrap(), "2001:db8::/64".parse().unwrap()]);
        assert!(guarded.is_guarded && guarded.has_rules());
    }

    #[test]
    fn what_is_no_value_is_said_with_its_key() {
        for bad in [
            "vlan=0",
            "vlan=4095",
            "trunk=5-",
            "vlan=5,native=6",
            "tx-bps=0",
            "tx-bps=1T",
            "tx-pps=-1",
            "ip=10.0.0",
            "guard=1",
            "max-macs=5G",
            "x=1",
        ] {
            assert!(port(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn every_key_is_listed() {
        for key in KEYS.split(", ") {
            let values = ["on", "5", "10.0.0.1"];
            assert!(values.iter().any(|v| PortConfig::default().set(key, v) == Ok(true)), "{key}");
        }
    }
}
