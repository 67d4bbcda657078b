//! rtnetlink: interfaces, what they know of VFs, and routes.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::RawFd;

use netaddr::MacAddr;
use netlink::{Connection, Refused};
use netlink_packet_route::link::{
    LinkAttribute, LinkExtentMask, LinkFlags, LinkMessage, LinkVfInfo, VfInfo, VfInfoLinkState, VfInfoMac,
    VfInfoRate, VfInfoSpoofCheck, VfInfoTrust, VfLinkState, VfVlan, VfVlanInfo, VlanProtocol,
};
use netlink_packet_route::route::{RouteAttribute, RouteMessage};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use netlink_sys::protocols::NETLINK_ROUTE;

use crate::host::{Link, LinkState, Settings, VfSet, VlanProto};
use crate::pci::PciAddr;

/// An interface, with what only the kernel knows it by.
#[derive(Clone, Debug)]
pub struct RawLink {
    /// Its number.
    pub index: u32,
    /// Its name.
    pub name: String,
    /// The PCI function that it belongs to.
    pub parent: Option<PciAddr>,
    /// What else is known.
    pub link: Link,
}

/// A connection for questions of routing, in the caller's network namespace.
pub struct Route(Connection);

impl Route {
    /// Opens it.
    pub fn open() -> io::Result<Route> {
        Ok(Route(Connection::open(NETLINK_ROUTE)?))
    }

    /// All interfaces.
    pub fn links(&mut self) -> Result<Vec<RawLink>, Refused> {
        let mut message = LinkMessage::default();
        message.attributes.push(LinkAttribute::ExtMask(vec![LinkExtentMask::Vf, LinkExtentMask::SkipStats]));
        let answers = self.0.dump(RouteNetlinkMessage::GetLink(message))?;
        let link = |answer| match answer {
            RouteNetlinkMessage::NewLink(link) => Some(raw_link(link)),
            _ => None,
        };
        Ok(answers.into_iter().filter_map(link).collect())
    }

    /// The numbers of interfaces that default routes go out of.
    pub fn default_routes(&mut self) -> Result<Vec<u32>, Refused> {
        let mut out = Vec::new();
        for family in [AddressFamily::Inet, AddressFamily::Inet6] {
            let mut message = RouteMessage::default();
            message.header.address_family = family;
            for answer in self.0.dump(RouteNetlinkMessage::GetRoute(message))? {
                let RouteNetlinkMessage::NewRoute(route) = answer else { continue };
                if route.header.destination_prefix_length != 0 {
                    continue;
                }
                for attribute in &route.attributes {
                    match attribute {
                        RouteAttribute::Oif(index) => out.push(*index),
                        RouteAttribute::MultiPath(hops) => {
                            out.extend(hops.iter().map(|hop| hop.interface_index));
                        }
                        _ => {}
                    }
                }
            }
        }
        Ok(out)
    }

    /// Sets something of a VF.
    pub fn set_vf(&mut self, interface: &str, vf: u32, set: VfSet) -> Result<(), Refused> {
        let info = match set {
            VfSet::Mac(mac) => VfInfo::Mac(VfInfoMac::new(vf, &mac.0)),
            VfSet::Vlan(vlan, qos, proto) => {
                let proto = match proto {
                    VlanProto::Dot1Q => VlanProtocol::Ieee8021Q,
                    VlanProto::Dot1Ad => VlanProtocol::Ieee8021Ad,
                };
                VfInfo::VlanList(vec![VfVlan::Info(VfVlanInfo::new(vf, vlan.into(), qos.into(), proto))])
            }
            VfSet::Trust(on) => VfInfo::Trust(VfInfoTrust::new(vf, on)),
            VfSet::Spoofchk(on) => VfInfo::SpoofCheck(VfInfoSpoofCheck::new(vf, on)),
            VfSet::Rate(min, max) => VfInfo::Rate(VfInfoRate::new(vf, min, max)),
            VfSet::LinkState(state) => {
                let state = match state {
                    LinkState::Auto => VfLinkState::Auto,
                    LinkState::Enable => VfLinkState::Enable,
                    LinkState::Disable => VfLinkState::Disable,
                };
                VfInfo::LinkState(VfInfoLinkState::new(vf, state))
            }
        };
        let list = LinkAttribute::VfInfoList(vec![LinkVfInfo(vec![info])]);
        self.set(interface, |message| message.attributes.push(list))
    }

    /// Sets an interface up or down.
    pub fn set_up(&mut self, interface: &str, up: bool) -> Result<(), Refused> {
        self.set(interface, |message| {
            message.header.change_mask = LinkFlags::Up;
            message.header.flags = if up { LinkFlags::Up } else { LinkFlags::empty() };
        })
    }

    /// Moves an interface into another network namespace.
    pub fn set_namespace(&mut self, interface: &str, namespace: RawFd) -> Result<(), Refused> {
        self.set(interface, |message| message.attributes.push(LinkAttribute::NetNsFd(namespace)))
    }

    fn set(&mut self, interface: &str, what: impl FnOnce(&mut LinkMessage)) -> Result<(), Refused> {
        let mut message = LinkMessage::default();
        message.attributes.push(LinkAttribute::IfName(interface.into()));
        what(&mut message);
        self.0.call(RouteNetlinkMessage::SetLink(message)).map(drop)
    }
}

fn mac(bytes: &[u8]) -> Option<MacAddr> {
    Some(MacAddr(bytes.get(..6)?.try_into().ok()?))
}

fn raw_link(message: LinkMessage) -> RawLink {
    let mut raw =
        RawLink { index: message.header.index, name: String::new(), parent: None, link: Link::default() };
    raw.link.up = message.header.flags.contains(LinkFlags::Up);
    for attribute in message.attributes {
        match attribute {
            LinkAttribute::IfName(name) => raw.name = name,
            LinkAttribute::Address(bytes) => raw.link.mac = mac(&bytes).filter(|_| bytes.len() == 6),
            LinkAttribute::ParentDevName(name) => raw.parent = name.parse().ok(),
            LinkAttribute::VfInfoList(list) => {
                raw.link.vfs = list.into_iter().filter_map(vf).collect::<BTreeMap<_, _>>();
            }
            _ => {}
        }
    }
    raw
}

fn vf(info: LinkVfInfo) -> Option<(u32, Settings)> {
    let mut index = None;
    let mut settings = Settings::default();
    let mut tx_rate = None;
    for info in info.0 {
        match info {
            VfInfo::Mac(i) => (index, settings.mac) = (Some(i.vf_id), mac(&i.mac)),
            // The older attribute, without the kind of tag.
            VfInfo::Vlan(i) if settings.vlan.is_none() => {
                (settings.vlan, settings.qos) = (Some(i.vlan_id as u16), Some(i.qos as u8));
            }
            VfInfo::VlanList(list) => {
                if let Some(VfVlan::Info(i)) = list.into_iter().next() {
                    let proto = match i.protocol {
                        VlanProtocol::Ieee8021Ad => VlanProto::Dot1Ad,
                        _ => VlanProto::Dot1Q,
                    };
                    (settings.vlan, settings.qos) = (Some(i.vlan_id as u16), Some(i.qos as u8));
                    settings.proto = Some(proto);
                }
            }
            VfInfo::Trust(i) => settings.trust = Some(i.enabled),
            VfInfo::SpoofCheck(i) => settings.spoofchk = Some(i.enabled),
            VfInfo::Rate(i) => {
                (settings.min_rate, settings.max_rate) = (Some(i.min_tx_rate), Some(i.max_tx_rate));
            }
            VfInfo::TxRate(i) => tx_rate = Some(i.rate),
            VfInfo::LinkState(i) => {
                settings.link_state = match i.state {
                    VfLinkState::Auto => Some(LinkState::Auto),
                    VfLinkState::Enable => Some(LinkState::Enable),
                    VfLinkState::Disable => Some(LinkState::Disable),
                    _ => None,
                }
            }
            _ => {}
        }
    }
    settings.max_rate = settings.max_rate.or(tx_rate);
    Some((index?, settings))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn interfaces_of_this_machine_can_be_read() {
        let links = Route::open().unwrap().links().unwrap();
        let lo = links.iter().find(|link| link.name == "lo").expect("every namespace has lo");
        assert_eq!(lo.parent, None);
        Route::open().unwrap().default_routes().unwrap();
    }

    #[test]
    fn a_refusal_has_the_kernels_reason() {
        let refused = Route::open().unwrap().set_up("no-such-link", true).unwrap_err();
        let errno = refused.error.raw_os_error();
        assert!(matches!(errno, Some(nix::libc::ENODEV | nix::libc::EPERM)), "{refused}");
    }

    #[test]
    fn attributes_of_a_vf_are_settings() {
        let info = LinkVfInfo(vec![
            VfInfo::Mac(VfInfoMac::new(3, &[0x52, 0x54, 0, 0, 0, 3])),
            VfInfo::VlanList(vec![VfVlan::Info(VfVlanInfo::new(3, 7, 2, VlanProtocol::Ieee8021Ad))]),
            VfInfo::Rate(VfInfoRate::new(3, 10, 100)),
            VfInfo::Trust(VfInfoTrust::new(3, true)),
            VfInfo::LinkState(VfInfoLinkState::new(3, VfLinkState::Disable)),
        ]);
        let (index, s) = vf(info).unwrap();
        assert_eq!((index, s.vlan, s.qos, s.proto), (3, Some(7), Some(2), Some(VlanProto::Dot1Ad)));
        assert_eq!((s.min_rate, s.max_rate, s.trust, s.spoofchk), (Some(10), Some(100), Some(true), None));
        assert_eq!(s.link_state, Some(LinkState::Disable));
    }
}
