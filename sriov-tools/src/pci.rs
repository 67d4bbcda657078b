//! Addresses of PCI functions: the only names that stay the same between boots.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Domain, bus, device and function, written as Linux does: `0000:01:10.0`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct PciAddr {
    /// Domain; more than 16 bits below some host bridges (VMD).
    pub domain: u32,
    /// Bus.
    pub bus: u8,
    /// Device, 5 bits.
    pub device: u8,
    /// Function, 3 bits.
    pub function: u8,
}

/// What is no PCI address.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("'{0}' is no PCI address (write one such as 0000:01:00.0)")]
pub struct NotAnAddress(String);

impl PciAddr {
    /// The address `by` routing IDs further on, as SR-IOV counts VFs (PCI Express 6.0, 9.2.1.2); none beyond the domain.
    pub fn offset(self, by: u32) -> Option<PciAddr> {
        let id = u32::from(self.bus) << 8 | u32::from(self.device) << 3 | u32::from(self.function);
        let id = u16::try_from(id.checked_add(by)?).ok()?;
        let [bus, devfn] = id.to_be_bytes();
        Some(PciAddr { domain: self.domain, bus, device: devfn >> 3, function: devfn & 7 })
    }
}

impl fmt::Display for PciAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = format!("{:04x}:{:02x}:{:02x}.{}", self.domain, self.bus, self.device, self.function);
        f.pad(&text)
    }
}

impl FromStr for PciAddr {
    type Err = NotAnAddress;

    /// With or without the domain, as lspci prints them.
    fn from_str(s: &str) -> Result<PciAddr, NotAnAddress> {
        let parse = || {
            let hex = |s: &str, most: usize| {
                let fits = (1..=most).contains(&s.len()) && s.bytes().all(|b| b.is_ascii_hexdigit());
                fits.then(|| u32::from_str_radix(s, 16).ok()).flatten()
            };
            let (front, function) = s.rsplit_once('.')?;
            let (front, device) = front.rsplit_once(':')?;
            let (domain, bus) = front.rsplit_once(':').unwrap_or(("0", front));
            let (device, function) = (hex(device, 2)?, hex(function, 1)?);
            (device < 32 && function < 8).then_some(())?;
            Some(PciAddr {
                domain: hex(domain, 8)?,
                bus: hex(bus, 2)? as u8,
                device: device as u8,
                function: function as u8,
            })
        };
        parse().ok_or_else(|| NotAnAddress(s.into()))
    }
}

impl TryFrom<String> for PciAddr {
    type Error = NotAnAddress;

    fn try_from(s: String) -> Result<PciAddr, NotAnAddress> {
        s.parse()
    }
}

impl From<PciAddr> for String {
    fn from(address: PciAddr) -> String {
        address.to_string()
    }
}

/// What a function is, by its class code (PCI Code and ID Assignment Specification).
pub fn class_name(class: u32) -> &'static str {
    match (class >> 16, class >> 8 & 0xff) {
        (0x01, 0x08) => "nvme",
        (0x01, _) => "storage",
        (0x02, 0x07) | (0x0c, 0x06) => "infiniband",
        (0x02, _) => "network",
        (0x03, _) => "gpu",
        (0x0b, _) => "coprocessor",
        (0x10, _) => "crypto",
        (0x12, _) => "accelerator",
        _ => "other",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_as_linux_and_lspci_write_them() {
        let address: PciAddr = "0000:01:10.2".parse().unwrap();
        assert_eq!(address, PciAddr { domain: 0, bus: 1, device: 0x10, function: 2 });
        assert_eq!(address.to_string(), "0000:01:10.2");
        assert_eq!("01:10.2".parse(), Ok(address));
        assert_eq!("10000:e1:00.0".parse::<PciAddr>().unwrap().to_string(), "10000:e1:00.0");
        for bad in ["", "1", "01:10", "01:20.0", "01:10.8", "0000:101:10.0", "+1:10.0", "01:10.0 ", "eth0"] {
            assert!(bad.parse::<PciAddr>().is_err(), "{bad}");
        }
    }

    #[test]
    fn vfs_go_on_into_the_next_bus() {
        let pf: PciAddr = "0000:01:00.1".parse().unwrap();
        assert_eq!(pf.offset(0x80).unwrap().to_string(), "0000:01:10.1");
        assert_eq!(pf.offset(0x100).unwrap().to_string(), "0000:02:00.1");
        assert_eq!(pf.offset(0xffff), None);
    }
}
