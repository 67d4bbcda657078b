//! devlink: modes and ports of embedded switches (include/uapi/linux/devlink.h), over generic netlink.

use netaddr::MacAddr;
use netlink::Refused;
use netlink::generic::{self, Attributes, Generic, nested, text};
use netlink_packet_core::DefaultNla;

use crate::host::{EswitchMode, Port, PortSet};
use crate::pci::PciAddr;

const CMD_PORT_GET: u8 = 5;
const CMD_PORT_SET: u8 = 6;
const CMD_ESWITCH_GET: u8 = 29;
const CMD_ESWITCH_SET: u8 = 30;

const ATTR_BUS_NAME: u16 = 1;
const ATTR_DEV_NAME: u16 = 2;
const ATTR_PORT_INDEX: u16 = 3;
const ATTR_PORT_NETDEV_NAME: u16 = 7;
const ATTR_ESWITCH_MODE: u16 = 25;
const ATTR_PORT_FLAVOUR: u16 = 77;
const ATTR_PORT_PCI_VF_NUMBER: u16 = 128;
const ATTR_PORT_FUNCTION: u16 = 145;
const FUNCTION_ATTR_HW_ADDR: u16 = 1;
const FUNCTION_ATTR_STATE: u16 = 2;

/// The family.
#[derive(Clone, Debug)]
struct Family;

impl generic::Family for Family {
    const NAME: &'static str = "devlink";
}

fn address(of: &Attributes) -> Option<PciAddr> {
    (of.text(ATTR_BUS_NAME)? == "pci").then(|| of.text(ATTR_DEV_NAME)?.parse().ok()).flatten()
}

fn device(pf: PciAddr) -> Vec<DefaultNla> {
    vec![text(ATTR_BUS_NAME, "pci"), text(ATTR_DEV_NAME, &pf.to_string())]
}

/// A connection to devlink.
pub struct Devlink(Generic<Family>);

impl Devlink {
    /// Opens it; none if this kernel has no devlink.
    pub fn open() -> Option<Devlink> {
        Generic::open().ok()?.map(Devlink)
    }

    /// The mode of a function's embedded switch.
    pub fn eswitch(&mut self, pf: PciAddr) -> Result<Option<EswitchMode>, Refused> {
        let answers = self.0.call(CMD_ESWITCH_GET, device(pf))?;
        Ok(answers.iter().find_map(|answer| match answer.number(ATTR_ESWITCH_MODE)? {
            0 => Some(EswitchMode::Legacy),
            1 => Some(EswitchMode::Switchdev),
            _ => None,
        }))
    }

    /// Sets it.
    pub fn set_eswitch(&mut self, pf: PciAddr, mode: EswitchMode) -> Result<(), Refused> {
        let mode = u16::from(mode == EswitchMode::Switchdev);
        let mut attributes = device(pf);
        attributes.push(DefaultNla::new(ATTR_ESWITCH_MODE, mode.to_ne_bytes().to_vec()));
        self.0.call(CMD_ESWITCH_SET, attributes).map(drop)
    }

    /// All ports of PCI functions.
    pub fn ports(&mut self) -> Result<Vec<Port>, Refused> {
        Ok(self.0.dump(CMD_PORT_GET, Vec::new())?.iter().filter_map(port).collect())
    }

    /// Sets something of the function behind a port.
    pub fn set_port(&mut self, pf: PciAddr, index: u32, set: PortSet) -> Result<(), Refused> {
        self.0.call(CMD_PORT_SET, port_set(pf, index, set)).map(drop)
    }
}

/// What `devlink port function set` sends.
fn port_set(pf: PciAddr, index: u32, set: PortSet) -> Vec<DefaultNla> {
    let function = match set {
        PortSet::Mac(mac) => DefaultNla::new(FUNCTION_ATTR_HW_ADDR, mac.0.to_vec()),
        PortSet::Active(active) => DefaultNla::new(FUNCTION_ATTR_STATE, vec![u8::from(active)]),
    };
    let mut attributes = device(pf);
    attributes.push(DefaultNla::new(ATTR_PORT_INDEX, index.to_ne_bytes().to_vec()));
    attributes.push(nested(ATTR_PORT_FUNCTION, &[function]));
    attributes
}

fn port(message: &Attributes) -> Option<Port> {
    let function = message.nested(ATTR_PORT_FUNCTION);
    let mac = function.value(FUNCTION_ATTR_HW_ADDR).and_then(|bytes| Some(MacAddr(bytes.try_into().ok()?)));
    let number = |of: &Attributes, kind| of.number(kind).and_then(|n| u32::try_from(n).ok());
    Some(Port {
        pf: address(message)?,
        index: number(message, ATTR_PORT_INDEX)?,
        flavour: match message.number(ATTR_PORT_FLAVOUR) {
            Some(0) => "physical",
            Some(1) => "cpu",
            Some(2) => "dsa",
            Some(3) => "pcipf",
            Some(4) => "pcivf",
            Some(5) => "virtual",
            Some(7) => "pcisf",
            _ => "other",
        }
        .into(),
        vf: number(message, ATTR_PORT_PCI_VF_NUMBER),
        interface: message.text(ATTR_PORT_NETDEV_NAME),
        mac: mac.filter(|mac| mac.is_station()),
        active: function.number(FUNCTION_ATTR_STATE).map(|state| state == 1),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use netlink_packet_core::Emitable;

    #[test]
    fn what_is_set_behind_a_port_are_these_bytes() {
        let device = [
            &[8, 0, 1, 0][..],
            b"pci\0",
            &[17, 0, 2, 0],
            b"0000:03:00.0\0\0\0\0",
            &[8, 0, 3, 0, 255, 255, 0, 0],
        ];
        for (set, function) in [
            (
                PortSet::Mac("52:54:00:00:00:09".parse().unwrap()),
                &[16, 0, 145, 0x80, 10, 0, 1, 0, 0x52, 0x54, 0, 0, 0, 9, 0, 0][..],
            ),
            (PortSet::Active(true), &[12, 0, 145, 0x80, 5, 0, 2, 0, 1, 0, 0, 0]),
        ] {
            let attributes = port_set("0000:03:00.0".parse().unwrap(), 65535, set);
            let mut bytes = vec![0; attributes.as_slice().buffer_len()];
            attributes.as_slice().emit(&mut bytes);
            assert_eq!(bytes, [&device.concat(), function].concat());
        }
    }

    #[test]
    fn a_port_of_a_vf() {
        let function = [DefaultNla::new(FUNCTION_ATTR_HW_ADDR, vec![0x52, 0x54, 0, 0, 0, 9])];
        let mut attributes = device("0000:03:00.0".parse().unwrap());
        attributes.extend([
            DefaultNla::new(ATTR_PORT_INDEX, 131_072_u32.to_ne_bytes().to_vec()),
            DefaultNla::new(ATTR_PORT_FLAVOUR, 4_u16.to_ne_bytes().to_vec()),
            DefaultNla::new(ATTR_PORT_PCI_VF_NUMBER, 1_u16.to_ne_bytes().to_vec()),
            text(ATTR_PORT_NETDEV_NAME, "eth0_1"),
            nested(ATTR_PORT_FUNCTION, &function),
        ]);
        let port = port(&Attributes::new(attributes)).unwrap();
        assert_eq!((port.flavour.as_str(), port.vf, port.index), ("pcivf", Some(1), 131_072));
        assert_eq!(port.interface.as_deref(), Some("eth0_1"));
        assert_eq!(port.mac, Some("52:54:00:00:00:09".parse().unwrap()));
    }
}
