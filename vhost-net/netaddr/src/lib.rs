//! Ethernet addresses.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// An Ethernet address, in the order of transmission; text in files.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct MacAddr(pub [u8; 6]);

/// What is no Ethernet address.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("'{0}' is no Ethernet address (write one such as 52:54:00:12:34:56)")]
pub struct NotAMac(String);

impl MacAddr {
    /// All stations.
    pub const BROADCAST: MacAddr = MacAddr([0xff; 6]);

    /// As a number, the first octet the highest of 48 bits.
    #[inline]
    pub fn to_u64(self) -> u64 {
        let mut bytes = [0; 8];
        bytes[2..].copy_from_slice(&self.0);
        u64::from_be_bytes(bytes)
    }

    /// From the low 48 bits of a number.
    #[inline]
    pub fn from_u64(number: u64) -> MacAddr {
        let mut mac = MacAddr::default();
        mac.0.copy_from_slice(&number.to_be_bytes()[2..]);
        mac
    }

    /// Whether it stands for several stations (IEEE 802-2014, 8.2.2).
    #[inline]
    pub const fn is_group(self) -> bool {
        self.0[0] & 1 != 0
    }

    /// Whether a station can have it: it is not of a group, and not zero.
    #[inline]
    pub fn is_station(self) -> bool {
        !self.is_group() && self.to_u64() != 0
    }
}

impl fmt::Display for MacAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [first, rest @ ..] = self.0;
        write!(f, "{first:02x}")?;
        rest.iter().try_for_each(|octet| write!(f, ":{octet:02x}"))
    }
}

impl FromStr for MacAddr {
    type Err = NotAMac;

    fn from_str(s: &str) -> Result<MacAddr, NotAMac> {
        let not = || NotAMac(s.into());
        let octet = |o: &str| match o.as_bytes() {
            [a, b] if a.is_ascii_hexdigit() && b.is_ascii_hexdigit() => u8::from_str_radix(o, 16).ok(),
            _ => None,
        };
        let octets: Option<Vec<u8>> = s.split(':').map(octet).collect();
        Ok(MacAddr(octets.and_then(|o| o.try_into().ok()).ok_or_else(not)?))
    }
}

impl TryFrom<String> for MacAddr {
    type Error = NotAMac;

    fn try_from(s: String) -> Result<MacAddr, NotAMac> {
        s.parse()
    }
}

impl From<MacAddr> for String {
    fn from(mac: MacAddr) -> String {
        mac.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_and_number_are_the_same_address() {
        let mac: MacAddr = "52:54:00:12:34:fF".parse().unwrap();
        assert_eq!(mac, MacAddr([0x52, 0x54, 0, 0x12, 0x34, 0xff]));
        assert_eq!(mac.to_string(), "52:54:00:12:34:ff");
        assert_eq!(mac.to_u64(), 0x5254_0012_34ff);
        assert_eq!(MacAddr::from_u64(mac.to_u64()), mac);
        for bad in ["", "52:54:00:12:34", "52:54:00:12:34:56:78", "+2:54:00:12:34:56", "5:54:0:12:34:56"] {
            assert!(bad.parse::<MacAddr>().is_err(), "{bad}");
        }
    }

    #[test]
    fn groups_and_zero_are_no_stations() {
        assert!(MacAddr([0x52, 0, 0, 0, 0, 1]).is_station());
        assert!(!MacAddr::BROADCAST.is_station() && !MacAddr::default().is_station());
        assert!(MacAddr([1, 0, 0x5e, 0, 0, 1]).is_group());
    }
}
