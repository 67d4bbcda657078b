//! The generic netlink family `vdpa` (`linux/vdpa.h`): devices on the vDPA bus, and who makes them.
//!
//! [`show`] says what was heard as iproute2's `vdpa` does.

pub mod show;

use netlink::generic::{self, Attributes, Generic, text};
use netlink::{Connection, Refused};
use netlink_packet_core::DefaultNla;

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
    Refused(String, Refused),
    /// There is no asking it.
    #[error("netlink: {0}")]
    Socket(Refused),
}

fn refused(what: &str) -> impl Fn(Refused) -> NetlinkError {
    move |e| match e.error.raw_os_error() {
        Some(libc::EPERM) => NetlinkError::Denied(what.into()),
        _ => NetlinkError::Refused(what.into(), e),
    }
}

/// The family.
#[derive(Clone, Debug)]
struct Family;

impl generic::Family for Family {
    const NAME: &'static str = "vdpa";
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
pub struct Bus(Generic<Family>);

impl Bus {
    /// Finds the family.
    pub fn open() -> Result<Bus, NetlinkError> {
        Generic::open().map_err(NetlinkError::Socket)?.map(Bus).ok_or(NetlinkError::NoBus)
    }

    /// Over this connection.
    pub fn over(connection: Connection) -> Result<Bus, NetlinkError> {
        Generic::over(connection).map_err(NetlinkError::Socket)?.map(Bus).ok_or(NetlinkError::NoBus)
    }

    fn request(
        &mut self,
        command: u8,
        attributes: Vec<DefaultNla>,
        what: &str,
    ) -> Result<Vec<Attributes>, NetlinkError> {
        self.0.call(command, attributes).map_err(refused(what))
    }

    /// One of something, or all.
    fn get(
        &mut self,
        command: u8,
        kind: u16,
        name: Option<&str>,
        what: &str,
    ) -> Result<Vec<Attributes>, NetlinkError> {
        match name {
            Some(name) => self.request(command, vec![text(kind, name)], &format!("{what} {name}")),
            None => self.0.dump(command, vec![]).map_err(refused(what)),
        }
    }

    /// Management devices: all, or this one.
    pub fn mgmtdevs(&mut self, name: Option<&str>) -> Result<Vec<Attributes>, NetlinkError> {
        let Some((bus, device)) = name.and_then(|name| name.split_once('/')) else {
            return self.get(command::MGMTDEV_GET, attr::MGMTDEV_DEV_NAME, name, "show management device");
        };
        let attributes = vec![text(attr::MGMTDEV_BUS_NAME, bus), text(attr::MGMTDEV_DEV_NAME, device)];
        self.request(command::MGMTDEV_GET, attributes, &format!("show management device {bus}/{device}"))
    }

    /// Devices: all, or this one.
    pub fn devices(&mut self, name: Option<&str>) -> Result<Vec<Attributes>, NetlinkError> {
        self.get(command::DEV_GET, attr::DEV_NAME, name, "show device")
    }

    /// Whether there is a device of this name.
    pub fn has(&mut self, name: &str) -> Result<bool, NetlinkError> {
        Ok(self.devices(None)?.iter().any(|d| d.text(attr::DEV_NAME).as_deref() == Some(name)))
    }

    /// Configuration space: of all devices, or of this one.
    pub fn config(&mut self, name: Option<&str>) -> Result<Vec<Attributes>, NetlinkError> {
        self.get(command::DEV_CONFIG_GET, attr::DEV_NAME, name, "show configuration")
    }

    /// What a device counts for a queue.
    pub fn statistics(&mut self, name: &str, queue: u32) -> Result<Vec<Attributes>, NetlinkError> {
        let index = DefaultNla::new(attr::DEV_QUEUE_INDEX, queue.to_ne_bytes().to_vec());
        let what = format!("show statistics of {name}, queue {queue}");
        self.request(command::DEV_VSTATS_GET, vec![text(attr::DEV_NAME, name), index], &what)
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
        self.request(command::DEV_NEW, attributes, &format!("add {name} to the vDPA bus")).map(drop)
    }

    /// Takes a device from the bus, and waits until its driver has let go of it.
    pub fn delete(&mut self, name: &str) -> Result<(), NetlinkError> {
        let what = format!("take {name} from the vDPA bus");
        self.request(command::DEV_DEL, vec![text(attr::DEV_NAME, name)], &what).map(drop)
    }
}
