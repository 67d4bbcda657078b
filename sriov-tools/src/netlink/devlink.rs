//! devlink: modes and ports of embedded switches (include/uapi/linux/devlink.h), over generic netlink.

use netaddr::MacAddr;
use netlink_packet_core::{
    DecodeError, DefaultNla, Emitable, NLA_F_NESTED, Nla, NlasIterator, ParseableParametrized,
};
use netlink_packet_generic::ctrl::nlas::GenlCtrlAttrs;
use netlink_packet_generic::ctrl::{GenlCtrl, GenlCtrlCmd};
use netlink_packet_generic::{GenlFamily, GenlHeader, GenlMessage};
use netlink_sys::protocols::NETLINK_GENERIC;

use super::Connection;
use crate::host::{EswitchMode, Port, PortSet, Refused};
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

/// A message of the family: a command and its attributes.
#[derive(Clone, Debug)]
struct Message {
    command: u8,
    attributes: Vec<DefaultNla>,
}

impl GenlFamily for Message {
    fn family_name() -> &'static str {
        "devlink"
    }

    fn command(&self) -> u8 {
        self.command
    }

    fn version(&self) -> u8 {
        1
    }
}

impl Emitable for Message {
    fn buffer_len(&self) -> usize {
        self.attributes.as_slice().buffer_len()
    }

    fn emit(&self, buffer: &mut [u8]) {
        self.attributes.as_slice().emit(buffer);
    }
}

impl ParseableParametrized<[u8], GenlHeader> for Message {
    fn parse_with_param(bytes: &[u8], header: GenlHeader) -> Result<Message, DecodeError> {
        let attribute = |nla: Result<netlink_packet_core::NlaBuffer<&[u8]>, DecodeError>| {
            nla.map(|nla| DefaultNla::new(nla.kind(), nla.value().to_vec()))
        };
        let attributes = NlasIterator::new(bytes).map(attribute).collect::<Result<_, _>>()?;
        Ok(Message { command: header.cmd, attributes })
    }
}

impl Message {
    fn value(&self, kind: u16) -> Option<Vec<u8>> {
        value(&self.attributes, kind)
    }

    fn text(&self, kind: u16) -> Option<String> {
        Some(String::from_utf8_lossy(&self.value(kind)?).trim_end_matches('\0').to_owned())
    }

    fn u16(&self, kind: u16) -> Option<u16> {
        Some(u16::from_ne_bytes(self.value(kind)?.get(..2)?.try_into().ok()?))
    }

    fn address(&self) -> Option<PciAddr> {
        (self.text(ATTR_BUS_NAME)? == "pci").then(|| self.text(ATTR_DEV_NAME)?.parse().ok()).flatten()
    }
}

fn value(attributes: &[DefaultNla], kind: u16) -> Option<Vec<u8>> {
    let nla = attributes.iter().find(|nla| nla.kind() & !NLA_F_NESTED == kind)?;
    let mut bytes = vec![0; nla.value_len()];
    nla.emit_value(&mut bytes);
    Some(bytes)
}

fn attributes(bytes: &[u8]) -> Vec<DefaultNla> {
    NlasIterator::new(bytes).flatten().map(|nla| DefaultNla::new(nla.kind(), nla.value().to_vec())).collect()
}

fn text(kind: u16, text: &str) -> DefaultNla {
    DefaultNla::new(kind, [text.as_bytes(), b"\0"].concat())
}

fn device(pf: PciAddr) -> Vec<DefaultNla> {
    vec![text(ATTR_BUS_NAME, "pci"), text(ATTR_DEV_NAME, &pf.to_string())]
}

/// A connection to devlink.
pub struct Devlink {
    connection: Connection,
    family: u16,
}

impl Devlink {
    /// Opens it; none if this kernel has no devlink.
    pub fn open() -> Option<Devlink> {
        let mut connection = Connection::open(NETLINK_GENERIC).ok()?;
        let nlas = vec![GenlCtrlAttrs::FamilyName(Message::family_name().into())];
        let question = GenlMessage::from_payload(GenlCtrl { cmd: GenlCtrlCmd::GetFamily, nlas });
        let answers = connection.call(question).ok()?;
        let family =
            answers.into_iter().flat_map(|answer| answer.payload.nlas).find_map(|nla| match nla {
                GenlCtrlAttrs::FamilyId(id) => Some(id),
                _ => None,
            })?;
        Some(Devlink { connection, family })
    }

    fn message(&self, command: u8, attributes: Vec<DefaultNla>) -> GenlMessage<Message> {
        let mut message = GenlMessage::from_payload(Message { command, attributes });
        message.set_resolved_family_id(self.family);
        message
    }

    /// The mode of a function's embedded switch.
    pub fn eswitch(&mut self, pf: PciAddr) -> Result<Option<EswitchMode>, Refused> {
        let answers = self.connection.call(self.message(CMD_ESWITCH_GET, device(pf)))?;
        Ok(answers.iter().find_map(|answer| match answer.payload.u16(ATTR_ESWITCH_MODE)? {
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
        self.connection.call(self.message(CMD_ESWITCH_SET, attributes)).map(drop)
    }

    /// All ports of PCI functions.
    pub fn ports(&mut self) -> Result<Vec<Port>, Refused> {
        let answers = self.connection.dump(self.message(CMD_PORT_GET, Vec::new()))?;
        Ok(answers.iter().filter_map(|answer| port(&answer.payload)).collect())
    }

    /// Sets something of the function behind a port.
    pub fn set_port(&mut self, pf: PciAddr, index: u32, set: PortSet) -> Result<(), Refused> {
        let function = match set {
            PortSet::Mac(mac) => DefaultNla::new(FUNCTION_ATTR_HW_ADDR, mac.0.to_vec()),
            PortSet::Active(active) => DefaultNla::new(FUNCTION_ATTR_STATE, vec![u8::from(active)]),
        };
        let mut bytes = vec![0; function.buffer_len()];
        function.emit(&mut bytes);
        let mut attributes = device(pf);
        attributes.push(DefaultNla::new(ATTR_PORT_INDEX, index.to_ne_bytes().to_vec()));
        attributes.push(DefaultNla::new(ATTR_PORT_FUNCTION | NLA_F_NESTED, bytes));
        self.connection.call(self.message(CMD_PORT_SET, attributes)).map(drop)
    }
}

fn port(message: &Message) -> Option<Port> {
    let function = attributes(&message.value(ATTR_PORT_FUNCTION).unwrap_or_default());
    let mac = value(&function, FUNCTION_ATTR_HW_ADDR).and_then(|bytes| Some(MacAddr(bytes.try_into().ok()?)));
    Some(Port {
        pf: message.address()?,
        index: u32::from_ne_bytes(message.value(ATTR_PORT_INDEX)?.try_into().ok()?),
        flavour: match message.u16(ATTR_PORT_FLAVOUR) {
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
        vf: message.u16(ATTR_PORT_PCI_VF_NUMBER).map(u32::from),
        interface: message.text(ATTR_PORT_NETDEV_NAME),
        mac: mac.filter(|mac| mac.is_station()),
        active: value(&function, FUNCTION_ATTR_STATE).and_then(|state| Some(*state.first()? == 1)),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_port_of_a_vf() {
        let mac = DefaultNla::new(FUNCTION_ATTR_HW_ADDR, vec![0x52, 0x54, 0, 0, 0, 9]);
        let mut function = vec![0; mac.buffer_len()];
        mac.emit(&mut function);
        let mut attributes = device("0000:03:00.0".parse().unwrap());
        attributes.extend([
            DefaultNla::new(ATTR_PORT_INDEX, 131_072_u32.to_ne_bytes().to_vec()),
            DefaultNla::new(ATTR_PORT_FLAVOUR, 4_u16.to_ne_bytes().to_vec()),
            DefaultNla::new(ATTR_PORT_PCI_VF_NUMBER, 1_u16.to_ne_bytes().to_vec()),
            text(ATTR_PORT_NETDEV_NAME, "eth0_1"),
            DefaultNla::new(ATTR_PORT_FUNCTION | NLA_F_NESTED, function),
        ]);
        let message = Message { command: CMD_PORT_GET, attributes };
        let mut bytes = vec![0; message.buffer_len()];
        message.emit(&mut bytes);
        let header = GenlHeader { cmd: CMD_PORT_GET, version: 1 };
        let port = port(&Message::parse_with_param(&bytes, header).unwrap()).unwrap();
        assert_eq!((port.flavour.as_str(), port.vf, port.index), ("pcivf", Some(1), 131_072));
        assert_eq!(port.interface.as_deref(), Some("eth0_1"));
        assert_eq!(port.mac, Some("52:54:00:00:00:09".parse().unwrap()));
    }
}
