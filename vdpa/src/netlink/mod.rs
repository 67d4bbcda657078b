//! The generic netlink family `vdpa` (`linux/vdpa.h`): devices on the vDPA bus, and who makes them.
//!
//! [`show`] says what was heard as iproute2's `vdpa` does.

pub mod show;

use std::io;

use netlink_packet_core::{
    DecodeError, DefaultNla, Emitable, NLM_F_ACK, NLM_F_DUMP, NLM_F_REQUEST, NetlinkDeserializable,
    NetlinkHeader, NetlinkMessage, NetlinkPayload, NetlinkSerializable, Nla, NlasIterator,
    ParseableParametrized,
};
use netlink_packet_generic::ctrl::nlas::GenlCtrlAttrs;
use netlink_packet_generic::ctrl::{GenlCtrl, GenlCtrlCmd};
use netlink_packet_generic::{GenlFamily, GenlHeader, GenlMessage};
use netlink_sys::protocols::NETLINK_GENERIC;
use netlink_sys::{Socket, SocketAddr};

/// `enum vdpa_command`.
mod command {
    pub const MGMTDEV_GET: u8 = 2;
    pub const DEV_NEW: u8 = 3;
    pub const DEV_DEL: u8 = 4;
    pub const DEV_GET: u8 = 5;
    pub const DEV_CONFIG_GET: u8 = 6;
    pub const DEV_VSTATS_GET: u8 = 7;
}

/// `enum vdpa_attr`.
pub mod attr {
    /// String.
    pub const MGMTDEV_BUS_NAME: u16 = 1;
    /// String.
    pub const MGMTDEV_DEV_NAME: u16 = 2;
    /// 64 bits, one for each `VIRTIO_ID_*`.
    pub const MGMTDEV_SUPPORTED_CLASSES: u16 = 3;
    /// String.
    pub const DEV_NAME: u16 = 4;
    /// 32 bits: `VIRTIO_ID_*`.
    pub const DEV_ID: u16 = 5;
    /// 32 bits.
    pub const DEV_VENDOR_ID: u16 = 6;
    /// 32 bits.
    pub const DEV_MAX_VQS: u16 = 7;
    /// 16 bits.
    pub const DEV_MAX_VQ_SIZE: u16 = 8;
    /// Six bytes.
    pub const DEV_NET_CFG_MACADDR: u16 = 10;
    /// 16 bits.
    pub const DEV_NET_STATUS: u16 = 11;
    /// 16 bits.
    pub const DEV_NET_CFG_MAX_VQP: u16 = 12;
    /// 16 bits.
    pub const DEV_NET_CFG_MTU: u16 = 13;
    /// 64 bits.
    pub const DEV_NEGOTIATED_FEATURES: u16 = 14;
    /// 32 bits.
    pub const DEV_MGMTDEV_MAX_VQS: u16 = 15;
    /// 64 bits: what the management device can make.
    pub const DEV_SUPPORTED_FEATURES: u16 = 16;
    /// 32 bits.
    pub const DEV_QUEUE_INDEX: u16 = 17;
    /// String; a value follows.
    pub const DEV_VENDOR_ATTR_NAME: u16 = 18;
    /// 64 bits.
    pub const DEV_VENDOR_ATTR_VALUE: u16 = 19;
}

/// Why the bus does not do what is asked of it.
#[derive(Debug, thiserror::Error)]
pub enum NetlinkError {
    /// No such family.
    #[error(
        "this kernel has no vDPA bus: load the module with modprobe vdpa (the kernel needs CONFIG_VDPA, which Debian's have \
         from 6.12 on)"
    )]
    NoBus,
    /// Not privileged.
    #[error("cannot {0}: the kernel wants CAP_NET_ADMIN for that; run this as root")]
    Denied(String),
    /// The kernel refuses.
    #[error("cannot {0}: {1}")]
    Refused(String, io::Error),
    /// The socket.
    #[error("netlink: {0}")]
    Socket(#[from] io::Error),
    /// What came makes no sense.
    #[error("netlink: {0}")]
    Decode(#[from] DecodeError),
}

/// A message of the family.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Message {
    command: u8,
    attributes: Vec<DefaultNla>,
}

impl GenlFamily for Message {
    fn family_name() -> &'static str {
        "vdpa"
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
        let attributes = NlasIterator::new(bytes).map(|nla| {
            let nla = nla?;
            Ok(DefaultNla::new(nla.kind(), nla.value().to_vec()))
        });
        Ok(Message { command: header.cmd, attributes: attributes.collect::<Result<_, DecodeError>>()? })
    }
}

impl Message {
    /// The values of an attribute, which there may be several of.
    pub fn all(&self, kind: u16) -> impl Iterator<Item = Vec<u8>> {
        self.attributes.iter().filter(move |a| a.kind() == kind).map(|a| {
            let mut value = vec![0; a.value_len()];
            a.emit_value(&mut value);
            value
        })
    }

    /// A number of up to 64 bits.
    pub fn number(&self, kind: u16) -> Option<u64> {
        self.all(kind).next().and_then(|value| number(&value))
    }

    /// A string.
    pub fn string(&self, kind: u16) -> Option<String> {
        self.all(kind).next().map(|value| string(&value))
    }
}

fn number(value: &[u8]) -> Option<u64> {
    Some(match value.len() {
        1 => value[0].into(),
        2 => u16::from_ne_bytes(value.try_into().ok()?).into(),
        4 => u32::from_ne_bytes(value.try_into().ok()?).into(),
        8 => u64::from_ne_bytes(value.try_into().ok()?),
        _ => return None,
    })
}

fn string(value: &[u8]) -> String {
    String::from_utf8_lossy(value).trim_end_matches('\0').to_owned()
}

fn text(kind: u16, value: &str) -> DefaultNla {
    DefaultNla::new(kind, [value.as_bytes(), &[0]].concat())
}

/// What a network device is to have, for management devices that can give it.
#[derive(Clone, Copy, Debug, Default)]
pub struct NetOptions {
    /// Its address.
    pub mac: Option<[u8; 6]>,
    /// Its MTU.
    pub mtu: Option<u16>,
    /// Pairs of queues.
    pub max_pairs: Option<u16>,
}

/// The bus.
#[derive(Debug)]
pub struct Bus {
    socket: Socket,
    family: u16,
    sequence: u32,
}

impl Bus {
    /// Finds the family.
    pub fn open() -> Result<Bus, NetlinkError> {
        let mut socket = Socket::new(NETLINK_GENERIC)?;
        socket.bind_auto()?;
        let mut bus = Bus { socket, family: 0, sequence: 0 };
        let name = GenlCtrlAttrs::FamilyName("vdpa".into());
        let ask = GenlMessage::from_payload(GenlCtrl { cmd: GenlCtrlCmd::GetFamily, nlas: vec![name] });
        let answers = match bus.ask(ask, NLM_F_ACK)? {
            Ok(answers) => answers,
            Err(e) if e.raw_os_error() == Some(libc::ENOENT) => return Err(NetlinkError::NoBus),
            Err(e) => return Err(e.into()),
        };
        let id = answers.iter().flat_map(|m| &m.payload.nlas).find_map(|nla| match nla {
            GenlCtrlAttrs::FamilyId(id) => Some(*id),
            _ => None,
        });
        bus.family = id.ok_or(NetlinkError::NoBus)?;
        Ok(bus)
    }

    /// Sends a request, and collects what comes back. The inner error is the kernel's.
    fn ask<T>(&mut self, message: T, flags: u16) -> Result<io::Result<Vec<T>>, NetlinkError>
    where
        T: NetlinkSerializable + NetlinkDeserializable + std::fmt::Debug,
    {
        self.sequence += 1;
        let mut header = NetlinkHeader::default();
        header.flags = NLM_F_REQUEST | flags;
        header.sequence_number = self.sequence;
        let mut packet = NetlinkMessage::new(header, NetlinkPayload::InnerMessage(message));
        packet.finalize();
        let mut bytes = vec![0; packet.buffer_len()];
        packet.serialize(&mut bytes);
        self.socket.send_to(&bytes, &SocketAddr::new(0, 0), 0)?;
        let mut all = vec![];
        loop {
            let (bytes, _) = self.socket.recv_from_full()?;
            let mut rest = bytes.as_slice();
            while !rest.is_empty() {
                let packet = NetlinkMessage::<T>::deserialize(rest)?;
                let len = (packet.header.length as usize).next_multiple_of(4).clamp(16, rest.len().max(16));
                rest = rest.get(len..).unwrap_or_default();
                if packet.header.sequence_number != self.sequence {
                    continue;
                }
                match packet.payload {
                    NetlinkPayload::InnerMessage(message) => all.push(message),
                    NetlinkPayload::Error(e) if e.code.is_some() => return Ok(Err(e.to_io())),
                    NetlinkPayload::Done(_) | NetlinkPayload::Error(_) => return Ok(Ok(all)),
                    _ => {}
                }
            }
        }
    }

    fn request(
        &mut self,
        command: u8,
        flags: u16,
        attributes: Vec<DefaultNla>,
        what: &str,
    ) -> Result<Vec<Message>, NetlinkError> {
        let header = GenlHeader { cmd: command, version: 1 };
        let message = GenlMessage::new(header, Message { command, attributes }, self.family);
        match self.ask(message, flags | NLM_F_ACK)? {
            Ok(answers) => Ok(answers.into_iter().map(|m| m.payload).collect()),
            Err(e) if e.raw_os_error() == Some(libc::EPERM) => Err(NetlinkError::Denied(what.into())),
            Err(e) => Err(NetlinkError::Refused(what.into(), e)),
        }
    }

    /// One of something, or all.
    fn get(
        &mut self,
        command: u8,
        kind: u16,
        name: Option<&str>,
        what: &str,
    ) -> Result<Vec<Message>, NetlinkError> {
        match name {
            Some(name) => self.request(command, 0, vec![text(kind, name)], &format!("{what} of {name}")),
            None => self.request(command, NLM_F_DUMP, vec![], what),
        }
    }

    /// Management devices: all, or this one.
    pub fn mgmtdevs(&mut self, name: Option<&str>) -> Result<Vec<Message>, NetlinkError> {
        let Some((bus, device)) = name.and_then(|name| name.split_once('/')) else {
            return self.get(
                command::MGMTDEV_GET,
                attr::MGMTDEV_DEV_NAME,
                name,
                "show the management device",
            );
        };
        let attributes = vec![text(attr::MGMTDEV_BUS_NAME, bus), text(attr::MGMTDEV_DEV_NAME, device)];
        self.request(
            command::MGMTDEV_GET,
            0,
            attributes,
            &format!("show the management device {bus}/{device}"),
        )
    }

    /// Devices: all, or this one.
    pub fn devices(&mut self, name: Option<&str>) -> Result<Vec<Message>, NetlinkError> {
        self.get(command::DEV_GET, attr::DEV_NAME, name, "show the device")
    }

    /// Whether there is a device of this name.
    pub fn has(&mut self, name: &str) -> Result<bool, NetlinkError> {
        Ok(self.devices(None)?.iter().any(|d| d.string(attr::DEV_NAME).as_deref() == Some(name)))
    }

    /// Configuration space: of all devices, or of this one.
    pub fn config(&mut self, name: Option<&str>) -> Result<Vec<Message>, NetlinkError> {
        self.get(command::DEV_CONFIG_GET, attr::DEV_NAME, name, "show the configuration")
    }

    /// What a device counts for a queue.
    pub fn statistics(&mut self, name: &str, queue: u32) -> Result<Vec<Message>, NetlinkError> {
        let index = DefaultNla::new(attr::DEV_QUEUE_INDEX, queue.to_ne_bytes().to_vec());
        let what = format!("show the statistics of {name}, queue {queue}");
        self.request(command::DEV_VSTATS_GET, 0, vec![text(attr::DEV_NAME, name), index], &what)
    }

    /// Makes a device. With VDUSE that is putting one on the bus that has been made.
    pub fn add(&mut self, name: &str, mgmtdev: &str, net: NetOptions) -> Result<(), NetlinkError> {
        let (bus, device) =
            mgmtdev.split_once('/').map_or((None, mgmtdev), |(bus, device)| (Some(bus), device));
        let mut attributes: Vec<_> = bus.map(|bus| text(attr::MGMTDEV_BUS_NAME, bus)).into_iter().collect();
        attributes.extend([text(attr::MGMTDEV_DEV_NAME, device), text(attr::DEV_NAME, name)]);
        let half = |kind, value: u16| DefaultNla::new(kind, value.to_ne_bytes().to_vec());
        attributes.extend(net.mac.map(|mac| DefaultNla::new(attr::DEV_NET_CFG_MACADDR, mac.to_vec())));
        attributes.extend(net.mtu.map(|mtu| half(attr::DEV_NET_CFG_MTU, mtu)));
        attributes.extend(net.max_pairs.map(|pairs| half(attr::DEV_NET_CFG_MAX_VQP, pairs)));
        self.request(command::DEV_NEW, 0, attributes, &format!("add {name} to the vDPA bus")).map(drop)
    }

    /// Takes a device from the bus, and waits until its driver has let go of it.
    pub fn delete(&mut self, name: &str) -> Result<(), NetlinkError> {
        let what = format!("take {name} from the vDPA bus");
        self.request(command::DEV_DEL, 0, vec![text(attr::DEV_NAME, name)], &what).map(drop)
    }
}
