//! Anti-spoofing: which addresses a port may send from.
//!
//! With Ethernet addresses listed, a frame comes from one of them, and so does what ARP and neighbour discovery in it say.
//! With IP addresses or networks listed, IP and what ARP and neighbour discovery announce are of them too, and nothing
//! but ARP, RARP and IP passes, as anything else may have IP in it. Besides the listed addresses a guest needs: none at all (an ARP
//! probe, RFC 5227; DHCP; IPv6's duplicate detection), and the link-local one that is made of its Ethernet address
//! (RFC 4291, appendix A). What cannot be read whole in the part of the frame at hand does not pass.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;

use super::DropReason;
use crate::mac::MacAddr;
use crate::packet::{
    ETHERTYPE_ARP, ETHERTYPE_IPV4, ETHERTYPE_IPV6, ETHERTYPE_QINQ, ETHERTYPE_RARP, ETHERTYPE_VLAN, ICMPV6,
    Mac, Neighbour, Packet, UDP, is_extension,
};

/// What a port may send from.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct GuardConfig {
    /// Ethernet addresses; none: any.
    pub macs: Vec<MacAddr>,
    /// IP addresses and networks; none: any.
    pub ips: Vec<IpNet>,
    /// It may send router advertisements and redirects (RFC 4861).
    pub is_router: bool,
}

/// The guard of a port.
#[derive(Clone, Debug)]
pub struct Guard {
    macs: Box<[u64]>,
    ips: Box<[IpNet]>,
    is_router: bool,
}

fn link_local(mac: u64) -> Ipv6Addr {
    let (vendor, serial) = ((mac ^ 2 << 40) >> 24, mac & 0xff_ffff);
    Ipv6Addr::from(0xfe80 << 112 | u128::from(vendor) << 40 | 0xff_fe00_0000 | u128::from(serial))
}

fn is_mac(mac: Mac, other: u64) -> bool {
    MacAddr(mac).to_u64() == other
}

impl Guard {
    /// `None` when anything goes.
    pub fn new(config: &GuardConfig) -> Option<Guard> {
        let macs = config.macs.iter().map(|m| m.to_u64()).collect();
        let guard = Guard { macs, ips: config.ips.clone().into(), is_router: config.is_router };
        (!config.macs.is_empty() || !config.ips.is_empty()).then_some(guard)
    }

    /// Whether a frame may pass, of which at least [`PEEK`](crate::packet::PEEK) bytes are at hand.
    pub fn check(&self, packet: &Packet<'_>) -> Result<(), DropReason> {
        let src = MacAddr(packet.source()).to_u64();
        if !self.macs.is_empty() && !self.macs.contains(&src) {
            return Err(DropReason::GuardMac);
        }
        let is_stacked = packet.tags() > 1 || packet.tag().is_some_and(|tag| tag.tpid != ETHERTYPE_VLAN);
        match packet.ethertype() {
            _ if is_stacked && !self.ips.is_empty() => Err(DropReason::GuardProtocol),
            ETHERTYPE_IPV4 => self.ipv4(packet).ok_or(DropReason::GuardIp),
            ETHERTYPE_IPV6 => self.ipv6(src, packet),
            ETHERTYPE_ARP | ETHERTYPE_RARP => self.arp(src, packet).ok_or(DropReason::GuardArp),
            // Further tags than one looks behind.
            ETHERTYPE_VLAN | ETHERTYPE_QINQ => Err(DropReason::GuardProtocol),
            _ if !self.ips.is_empty() => Err(DropReason::GuardProtocol),
            _ => Ok(()),
        }
    }

    fn allows(&self, ip: impl Into<IpAddr>) -> bool {
        let ip = ip.into();
        self.ips.is_empty() || self.ips.iter().any(|net| net.contains(&ip))
    }

    /// ARP (RFC 826) and RARP (RFC 903) for IPv4 on Ethernet: who sends is who it says.
    fn arp(&self, src: u64, packet: &Packet<'_>) -> Option<()> {
        const REQUEST: u16 = 1;
        const REVERSE_REQUEST: u16 = 3;
        let arp = packet.arp().filter(|arp| is_mac(arp.sender_mac, src))?;
        let ip = Ipv4Addr::from(arp.sender_ip);
        let is_allowed = if packet.ethertype() == ETHERTYPE_ARP {
            self.allows(ip) || ip.is_unspecified() && arp.operation == REQUEST
        } else {
            arp.operation == REVERSE_REQUEST && (self.allows(ip) || ip.is_unspecified())
        };
        is_allowed.then_some(())
    }

    fn ipv4(&self, packet: &Packet<'_>) -> Option<()> {
        if self.ips.is_empty() {
            return Some(());
        }
        let layers = packet.layers();
        let from = Ipv4Addr::from(packet.ipv4_source(&layers)?);
        let is_allowed = if from.is_unspecified() {
            // A client that has no address yet (RFC 2131, 4.1): in one piece, from port 68 to 67.
            layers.protocol == UDP && packet.ports(&layers) == Some((68, 67))
        } else {
            self.allows(from)
        };
        is_allowed.then_some(())
    }

    fn ipv6(&self, src: u64, packet: &Packet<'_>) -> Result<(), DropReason> {
        let layers = packet.layers();
        let from = packet.ipv6_source(&layers).map(Ipv6Addr::from).ok_or(DropReason::GuardIp)?;
        let is_unspecified = from.is_unspecified();
        if !is_unspecified && !self.allows_ipv6(src, from) {
            return Err(DropReason::GuardIp);
        }
        let begins = layers.fragment && !layers.later;
        if !layers.whole || begins && is_extension(layers.protocol) {
            // What is behind there may be neighbour discovery.
            return Err(DropReason::GuardNd);
        }
        if layers.protocol == ICMPV6 && !layers.later {
            // In pieces it is none (RFC 6980).
            return match packet.icmpv6(&layers) {
                Some(133..=137) => packet
                    .neighbour(&layers)
                    .filter(|message| self.allows_neighbour(src, is_unspecified, message))
                    .map_or(Err(DropReason::GuardNd), |_| Ok(())),
                Some(_) => Ok(()),
                None => Err(DropReason::GuardNd),
            };
        }
        if is_unspecified && !self.ips.is_empty() { Err(DropReason::GuardIp) } else { Ok(()) }
    }

    fn allows_ipv6(&self, src: u64, ip: Ipv6Addr) -> bool {
        self.allows(ip) || ip == link_local(src)
    }

    /// Neighbour discovery (RFC 4861, 4): the addresses that it announces are the sender's own.
    fn allows_neighbour(&self, src: u64, is_unspecified: bool, message: &Neighbour) -> bool {
        const ROUTER_SOLICITATION: u8 = 133;
        const ROUTER_ADVERTISEMENT: u8 = 134;
        const SOLICITATION: u8 = 135;
        const ADVERTISEMENT: u8 = 136;
        let owns_target = || message.target.is_some_and(|ip| self.allows_ipv6(src, Ipv6Addr::from(ip)));
        let is_allowed = match message.kind {
            ROUTER_SOLICITATION => true,
            ROUTER_ADVERTISEMENT => self.is_router,
            // Without a source it is duplicate detection, and takes the address from whoever has it.
            SOLICITATION => !is_unspecified || owns_target(),
            ADVERTISEMENT => owns_target(),
            // Redirects are about others' addresses.
            _ => return self.is_router,
        };
        is_allowed && message.whole && message.link_layer.is_none_or(|mac| is_mac(mac, src))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OWN: u64 = 0x5254_0000_0001;
    const OTHER: u64 = 0x5254_0000_0002;
    const GUARDED: [&str; 3] = ["10.0.0.1/32", "10.9.0.0/16", "2001:db8::1/128"];

    fn guard(ips: &[&str], is_router: bool) -> Guard {
        let ips = ips.iter().map(|ip| ip.parse().unwrap()).collect();
        Guard::new(&GuardConfig { macs: vec![MacAddr::from_u64(OWN)], ips, is_router }).unwrap()
    }

    const IPV4: u16 = ETHERTYPE_IPV4;
    const IPV6: u16 = ETHERTYPE_IPV6;
    const ARP: u16 = ETHERTYPE_ARP;
    const RARP: u16 = ETHERTYPE_RARP;

    fn verdict(g: &Guard, src: u64, ethertype: u16, payload: &[u8]) -> Result<(), DropReason> {
        let header = [[0xff; 6], MacAddr::from_u64(src).0].concat();
        let frame = [&header[..], &ethertype.to_be_bytes(), payload].concat();
        Packet::parse(&frame, frame.len()).map_or(Err(DropReason::Runt), |packet| g.check(&packet))
    }

    fn arp(operation: u8, mac: u64, ip: [u8; 4]) -> Vec<u8> {
        let mut packet = vec![0, 1, 8, 0, 6, 4, 0, operation];
        packet.extend(MacAddr::from_u64(mac).0);
        packet.extend(ip);
        packet.extend([0; 10]);
        packet
    }

    fn ipv4(from: [u8; 4], protocol: u8, ports: [u8; 4]) -> Vec<u8> {
        let mut packet = vec![0x45, 0, 0, 28, 0, 0, 0, 0, 64, protocol, 0, 0];
        packet.extend(from);
        packet.extend([10, 0, 0, 9]);
        packet.extend(ports);
        packet.extend([0; 4]);
        packet
    }

    fn ipv6(from: &str, next: u8, payload: &[u8]) -> Vec<u8> {
        let mut packet = vec![0x60, 0, 0, 0, 0, payload.len() as u8, next, 255];
        packet.extend(from.parse::<Ipv6Addr>().unwrap().octets());
        packet.extend("ff02::1".parse::<Ipv6Addr>().unwrap().octets());
        packet.extend(payload);
        packet
    }

    /// A message of neighbour discovery with a target and one option.
    fn nd(kind: u8, target: &str, option: (u8, u64)) -> Vec<u8> {
        let mut message = vec![kind, 0, 0, 0, 0, 0, 0, 0];
        match kind {
            133 => {}
            134 => message.extend([0; 8]),
            _ => message.extend(target.parse::<Ipv6Addr>().unwrap().octets()),
        }
        message.extend([option.0, 1]);
        message.extend(MacAddr::from_u64(option.1).0);
        message
    }

    #[test]
    fn every_frame_comes_from_an_address_of_the_port() {
        let g = guard(&[], false);
        assert_eq!(verdict(&g, OWN, 0x88cc, &[]), Ok(()));
        assert_eq!(verdict(&g, OTHER, 0x88cc, &[]), Err(DropReason::GuardMac));
        assert!(Guard::new(&GuardConfig::default()).is_none());
    }

    #[test]
    fn arp_says_nothing_but_the_ports_addresses() {
        let check = |g: &Guard, packet: &[u8]| verdict(g, OWN, ARP, packet).is_ok();
        let g = guard(&GUARDED, false);
        for operation in [1, 2] {
            assert!(check(&g, &arp(operation, OWN, [10, 0, 0, 1])));
            assert!(check(&g, &arp(operation, OWN, [10, 9, 3, 4])));
            assert!(!check(&g, &arp(operation, OWN, [10, 0, 0, 2])));
            assert!(!check(&g, &arp(operation, OTHER, [10, 0, 0, 1])));
        }
        assert!(check(&g, &arp(1, OWN, [0; 4])), "a probe");
        assert!(!check(&g, &arp(2, OWN, [0; 4])), "no probe");
        for len in 0..28 {
            assert!(!check(&g, &arp(1, OWN, [10, 0, 0, 1])[..len]), "cut at {len}");
        }
        // Without a list of IP addresses the Ethernet address is still the sender's.
        let any = guard(&[], false);
        assert!(check(&any, &arp(2, OWN, [1, 2, 3, 4])) && !check(&any, &arp(2, OTHER, [1, 2, 3, 4])));
        // What announces a guest that has moved.
        assert_eq!(verdict(&g, OWN, RARP, &arp(3, OWN, [0; 4])), Ok(()));
        assert_eq!(verdict(&g, OWN, RARP, &arp(4, OWN, [0; 4])), Err(DropReason::GuardArp));
    }

    #[test]
    fn ipv4_comes_from_the_ports_addresses_or_asks_for_one() {
        let g = guard(&GUARDED, false);
        let check = |packet: &[u8]| verdict(&g, OWN, IPV4, packet).is_ok();
        assert!(check(&ipv4([10, 0, 0, 1], 6, [0; 4])));
        assert!(!check(&ipv4([10, 0, 0, 2], 6, [0; 4])));
        let dhcp = ipv4([0; 4], 17, [0, 68, 0, 67]);
        assert!(check(&dhcp));
        assert!(!check(&ipv4([0; 4], 17, [0, 67, 0, 68])) && !check(&ipv4([0; 4], 6, [0, 68, 0, 67])));
        let mut fragment = dhcp.clone();
        fragment[6] = 0x20;
        assert!(!check(&fragment));
        for len in 0..20 {
            assert!(!check(&ipv4([10, 0, 0, 1], 6, [0; 4])[..len]), "cut at {len}");
        }
        assert!(!check(&dhcp[..23]));
    }

    #[test]
    fn nothing_hides_behind_what_the_guard_does_not_know() {
        let g = guard(&GUARDED, false);
        for ethertype in [0x8100, 0x88a8, 0x8847, 0x8864, 0x0100, 0] {
            assert_eq!(
                verdict(&g, OWN, ethertype, &[0; 60]),
                Err(DropReason::GuardProtocol),
                "{ethertype:#x}"
            );
        }
        // With Ethernet addresses only, ARP is looked at behind two tags, and a third one does not pass.
        let any = guard(&[], false);
        let tagged = |mac| [vec![0, 7, 8, 6], arp(2, mac, [1, 2, 3, 4])].concat();
        assert_eq!(verdict(&any, OWN, 0x8100, &tagged(OWN)), Ok(()));
        assert_eq!(verdict(&any, OWN, 0x88a8, &tagged(OTHER)), Err(DropReason::GuardArp));
        let twice = |mac| [vec![0, 7, 0x81, 0], tagged(mac)].concat();
        assert_eq!(verdict(&any, OWN, 0x8100, &twice(OWN)), Ok(()));
        assert_eq!(verdict(&any, OWN, 0x8100, &twice(OTHER)), Err(DropReason::GuardArp));
        assert_eq!(verdict(&g, OWN, 0x8100, &twice(OWN)), Err(DropReason::GuardProtocol));
        let thrice = [vec![0, 7, 0x81, 0], twice(OWN)].concat();
        assert_eq!(verdict(&any, OWN, 0x8100, &thrice), Err(DropReason::GuardProtocol));
        assert_eq!(verdict(&any, OWN, 0x8100, &[0, 7, 8]), Err(DropReason::Runt));
    }

    #[test]
    fn ipv6_comes_from_the_ports_addresses() {
        let g = guard(&GUARDED, false);
        let check = |packet: &[u8]| verdict(&g, OWN, IPV6, packet);
        assert_eq!(check(&ipv6("2001:db8::1", 17, &[0; 8])), Ok(()));
        assert_eq!(check(&ipv6("2001:db8::2", 17, &[0; 8])), Err(DropReason::GuardIp));
        assert_eq!(check(&ipv6("fe80::5054:ff:fe00:1", 17, &[0; 8])), Ok(()), "made of its Ethernet address");
        assert_eq!(check(&ipv6("fe80::5054:ff:fe00:2", 17, &[0; 8])), Err(DropReason::GuardIp));
        assert_eq!(check(&ipv6("::", 17, &[0; 8])), Err(DropReason::GuardIp));
        for len in 0..40 {
            assert_eq!(check(&ipv6("2001:db8::1", 59, &[])[..len]), Err(DropReason::GuardIp), "cut at {len}");
        }
    }

    #[test]
    fn neighbour_discovery_announces_nothing_but_the_ports_addresses() {
        let g = guard(&GUARDED, false);
        let check = |packet: &[u8]| verdict(&g, OWN, IPV6, packet).is_ok();
        let (own, other) = ("2001:db8::1", "2001:db8::2");
        assert!(check(&ipv6(own, 58, &nd(136, own, (2, OWN)))));
        assert!(!check(&ipv6(own, 58, &nd(136, other, (2, OWN)))));
        assert!(!check(&ipv6(own, 58, &nd(136, own, (2, OTHER)))));
        assert!(check(&ipv6(own, 58, &nd(135, other, (1, OWN)))), "it may ask for anybody");
        assert!(!check(&ipv6(own, 58, &nd(135, other, (1, OTHER)))));
        assert!(check(&ipv6("::", 58, &nd(135, own, (14, OWN)))), "duplicate detection of its own");
        assert!(!check(&ipv6("::", 58, &nd(135, other, (14, OWN)))), "and of somebody else's");
        assert!(
            check(&ipv6(own, 58, &nd(133, own, (1, OWN))))
                && !check(&ipv6(own, 58, &nd(133, own, (1, OTHER))))
        );
        for router in [134, 137] {
            let packet = ipv6(own, 58, &nd(router, own, (1, OWN)));
            assert!(
                !check(&packet) && verdict(&guard(&GUARDED, true), OWN, IPV6, &packet).is_ok(),
                "{router}"
            );
        }
        let echo = ipv6(own, 58, &[128, 0, 0, 0, 0, 0, 0, 1]);
        assert!(check(&echo));
        let mut endless = nd(136, own, (14, OWN));
        endless[25] = 0;
        assert!(!check(&ipv6(own, 58, &endless)), "an option of no length");
        // Without a list of IP addresses its own link-layer address is still the only one it announces.
        let any = guard(&[], false);
        assert!(verdict(&any, OWN, IPV6, &ipv6(other, 58, &nd(136, other, (2, OWN)))).is_ok());
        assert!(verdict(&any, OWN, IPV6, &ipv6(other, 58, &nd(136, other, (2, OTHER)))).is_err());
    }

    #[test]
    fn extension_headers_hide_nothing() {
        let g = guard(&GUARDED, false);
        let check = |packet: &[u8]| verdict(&g, OWN, IPV6, packet);
        let own = "2001:db8::1";
        let (good, bad) = (nd(136, own, (2, OWN)), nd(136, "2001:db8::2", (2, OWN)));
        for next in [0u8, 43, 60] {
            let behind = |message: &[u8]| [&[58, 0, 0, 0, 0, 0, 0, 0], message].concat();
            assert_eq!(check(&ipv6(own, next, &behind(&good))), Ok(()), "{next}");
            assert_eq!(check(&ipv6(own, next, &behind(&bad))), Err(DropReason::GuardNd), "{next}");
        }
        let fragment = |offset: u8, message: &[u8]| [&[58, 0, 0, offset | 1, 0, 0, 0, 0], message].concat();
        // RFC 6980: in pieces it is none; and the rest of what has not passed is nothing.
        assert_eq!(check(&ipv6(own, 44, &fragment(0, &good))), Err(DropReason::GuardNd));
        assert_eq!(check(&ipv6(own, 44, &fragment(8, &bad))), Ok(()));
        assert_eq!(check(&ipv6(own, 44, &fragment(0, &[128, 0, 0, 0]))), Ok(()));
        // The first of several, with what comes next in the others.
        let split = [&[60, 0, 0, 1, 0, 0, 0, 0, 58, 0, 0, 0, 0, 0, 0, 0], &good[..]].concat();
        assert_eq!(check(&ipv6(own, 44, &split)), Err(DropReason::GuardNd));
        let long: Vec<u8> = [60u8, 0, 0, 0, 0, 0, 0, 0].repeat(20);
        assert_eq!(check(&ipv6(own, 60, &long)), Err(DropReason::GuardNd), "more than anybody sends");
        assert_eq!(check(&ipv6(own, 60, &[58, 9])), Err(DropReason::GuardNd), "beyond what is at hand");
        let mut longer = ipv6(own, 58, &good);
        longer[5] += 8;
        assert_eq!(check(&longer), Err(DropReason::GuardNd), "an option that is not at hand");
        let padded = [ipv6(own, 58, &good), vec![0; 9]].concat();
        assert_eq!(check(&padded), Ok(()));
    }
}
