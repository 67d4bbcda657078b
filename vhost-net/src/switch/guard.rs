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
use super::ethernet::{ARP, IPV4, IPV6, RARP, is_tpid};
use crate::mac::MacAddr;

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

/// Tags below the outer one that are looked behind.
const INNER_TAGS: usize = 1;
/// Extension headers of IPv6 that are looked behind.
const EXTENSIONS: usize = 8;
const ICMPV6: u8 = 58;
const UDP: u8 = 17;

fn link_local(mac: u64) -> Ipv6Addr {
    let (vendor, serial) = ((mac ^ 2 << 40) >> 24, mac & 0xff_ffff);
    Ipv6Addr::from(0xfe80 << 112 | u128::from(vendor) << 40 | 0xff_fe00_0000 | u128::from(serial))
}

fn field<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
    bytes.get(at..)?.first_chunk().copied()
}

fn is_mac(bytes: &[u8], at: usize, mac: u64) -> bool {
    field(bytes, at).is_some_and(|m| MacAddr(m).to_u64() == mac)
}

impl Guard {
    /// `None` when anything goes.
    pub fn new(config: &GuardConfig) -> Option<Guard> {
        let macs = config.macs.iter().map(|m| m.to_u64()).collect();
        let guard = Guard { macs, ips: config.ips.clone().into(), is_router: config.is_router };
        (!config.macs.is_empty() || !config.ips.is_empty()).then_some(guard)
    }

    /// Whether a frame from `src` may pass. `ethertype` is what `packet` is: what comes behind the outer tag, as far as
    /// it is at hand.
    #[inline]
    pub fn check(&self, src: u64, mut ethertype: u16, mut packet: &[u8]) -> Result<(), DropReason> {
        if !self.macs.is_empty() && !self.macs.contains(&src) {
            return Err(DropReason::GuardMac);
        }
        for _ in 0..INNER_TAGS {
            if is_tpid(ethertype) && self.ips.is_empty() {
                ethertype = field(packet, 2).map(u16::from_be_bytes).ok_or(DropReason::GuardProtocol)?;
                packet = &packet[4..];
            }
        }
        match ethertype {
            IPV4 => self.ipv4(packet).ok_or(DropReason::GuardIp),
            IPV6 => self.ipv6(src, packet),
            ARP | RARP => self.arp(src, ethertype, packet).ok_or(DropReason::GuardArp),
            _ if is_tpid(ethertype) || !self.ips.is_empty() => Err(DropReason::GuardProtocol),
            _ => Ok(()),
        }
    }

    fn allows(&self, ip: impl Into<IpAddr>) -> bool {
        let ip = ip.into();
        self.ips.is_empty() || self.ips.iter().any(|net| net.contains(&ip))
    }

    /// ARP (RFC 826) and RARP (RFC 903) for IPv4 on Ethernet: who sends is who it says.
    fn arp(&self, src: u64, ethertype: u16, packet: &[u8]) -> Option<()> {
        const ETHERNET_IPV4: [u8; 6] = [0, 1, 8, 0, 6, 4];
        const REQUEST: u16 = 1;
        const REVERSE_REQUEST: u16 = 3;
        let operation = u16::from_be_bytes(field(packet, 6)?);
        let is_right = packet.starts_with(&ETHERNET_IPV4) && packet.len() >= 28 && is_mac(packet, 8, src);
        let ip = Ipv4Addr::from(field::<4>(packet, 14)?);
        let asks = operation == if ethertype == ARP { REQUEST } else { REVERSE_REQUEST };
        let is_allowed = match ethertype {
            ARP => self.allows(ip) || ip.is_unspecified() && asks,
            _ => asks && (self.allows(ip) || ip.is_unspecified()),
        };
        (is_right && is_allowed).then_some(())
    }

    #[inline]
    fn ipv4(&self, packet: &[u8]) -> Option<()> {
        if self.ips.is_empty() {
            return Some(());
        }
        let header: &[u8; 20] = packet.first_chunk()?;
        let from = Ipv4Addr::from(field::<4>(header, 12)?);
        let is_whole = header[0] >> 4 == 4 && header[0] & 0xf >= 5;
        let is_allowed = if from.is_unspecified() {
            // A client that has no address yet (RFC 2131, 4.1): in one piece, from port 68 to 67.
            let is_fragment = u16::from_be_bytes([header[6], header[7]]) & 0x3fff != 0;
            let ports = field(packet, 4 * usize::from(header[0] & 0xf))?;
            header[9] == UDP && !is_fragment && ports == [0, 68, 0, 67]
        } else {
            self.allows(from)
        };
        (is_whole && is_allowed).then_some(())
    }

    #[inline]
    fn ipv6(&self, src: u64, packet: &[u8]) -> Result<(), DropReason> {
        let header: &[u8; 40] = packet.first_chunk().ok_or(DropReason::GuardIp)?;
        let from = Ipv6Addr::from(field::<16>(header, 8).ok_or(DropReason::GuardIp)?);
        let is_unspecified = from.is_unspecified();
        if header[0] >> 4 != 6 || !(is_unspecified || self.allows_ipv6(src, from)) {
            return Err(DropReason::GuardIp);
        }
        // What comes behind the packet pads the frame.
        let end = 40 + usize::from(u16::from_be_bytes([header[4], header[5]]));
        let payload = packet.get(40..end).unwrap_or(&packet[40..]);
        match upper_layer(header[6], payload).ok_or(DropReason::GuardNd)? {
            Upper::Icmp { message, is_fragment } => {
                let is_whole = !is_fragment && packet.len() >= end;
                self.neighbours(src, is_unspecified, message, is_whole).ok_or(DropReason::GuardNd)
            }
            Upper::Other if is_unspecified && !self.ips.is_empty() => Err(DropReason::GuardIp),
            Upper::Other => Ok(()),
        }
    }

    fn allows_ipv6(&self, src: u64, ip: Ipv6Addr) -> bool {
        self.allows(ip) || ip == link_local(src)
    }

    /// Neighbour discovery (RFC 4861, 4): the addresses that it announces are the sender's own.
    fn neighbours(&self, src: u64, is_unspecified: bool, message: &[u8], is_whole: bool) -> Option<()> {
        const ROUTER_SOLICITATION: u8 = 133;
        const ROUTER_ADVERTISEMENT: u8 = 134;
        const SOLICITATION: u8 = 135;
        const ADVERTISEMENT: u8 = 136;
        const REDIRECT: u8 = 137;
        let owns_target =
            || field::<16>(message, 8).is_some_and(|ip| self.allows_ipv6(src, Ipv6Addr::from(ip)));
        let (options, is_allowed) = match *message.first()? {
            ROUTER_SOLICITATION => (8, true),
            ROUTER_ADVERTISEMENT => (16, self.is_router),
            // Without a source it is duplicate detection, and takes the address from whoever has it.
            SOLICITATION => (24, !is_unspecified || owns_target()),
            ADVERTISEMENT => (24, owns_target()),
            REDIRECT => return self.is_router.then_some(()),
            _ => return Some(()),
        };
        (is_allowed && is_whole && are_own(message.get(options..)?, src)).then_some(())
    }
}

/// Whether the link-layer addresses in these options (RFC 4861, 4.6.1) are `src`.
fn are_own(mut options: &[u8], src: u64) -> bool {
    while let [kind, words, ..] = *options {
        if matches!(kind, 1 | 2) && (words != 1 || !is_mac(options, 2, src)) {
            return false;
        }
        match options.get(8 * usize::from(words)..) {
            Some(rest) if words > 0 => options = rest,
            _ => return false,
        }
    }
    options.is_empty()
}

enum Upper<'a> {
    Icmp { message: &'a [u8], is_fragment: bool },
    Other,
}

/// What is behind the extension headers (RFC 8200, 4). `None` when that cannot be seen.
fn upper_layer(mut next: u8, mut bytes: &[u8]) -> Option<Upper<'_>> {
    const HOP_BY_HOP: u8 = 0;
    const ROUTING: u8 = 43;
    const FRAGMENT: u8 = 44;
    const AUTHENTICATION: u8 = 51;
    const DESTINATION: u8 = 60;
    let mut is_fragment = false;
    for _ in 0..=EXTENSIONS {
        let len = match next {
            ICMPV6 => return Some(Upper::Icmp { message: bytes, is_fragment }),
            HOP_BY_HOP | ROUTING | DESTINATION => 8 * (1 + usize::from(*bytes.get(1)?)),
            AUTHENTICATION => 4 * (2 + usize::from(*bytes.get(1)?)),
            FRAGMENT if u16::from_be_bytes(field(bytes, 2)?) & 0xfff8 != 0 => return Some(Upper::Other),
            FRAGMENT => {
                is_fragment = true;
                8
            }
            _ => return Some(Upper::Other),
        };
        next = *bytes.first()?;
        bytes = bytes.get(len..)?;
    }
    None
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
        assert_eq!(g.check(OWN, 0x88cc, &[]), Ok(()));
        assert_eq!(g.check(OTHER, 0x88cc, &[]), Err(DropReason::GuardMac));
        assert!(Guard::new(&GuardConfig::default()).is_none());
    }

    #[test]
    fn arp_says_nothing_but_the_ports_addresses() {
        let check = |g: &Guard, packet: &[u8]| g.check(OWN, ARP, packet).is_ok();
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
        assert_eq!(g.check(OWN, RARP, &arp(3, OWN, [0; 4])), Ok(()));
        assert_eq!(g.check(OWN, RARP, &arp(4, OWN, [0; 4])), Err(DropReason::GuardArp));
    }

    #[test]
    fn ipv4_comes_from_the_ports_addresses_or_asks_for_one() {
        let g = guard(&GUARDED, false);
        let check = |packet: &[u8]| g.check(OWN, IPV4, packet).is_ok();
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
            assert_eq!(g.check(OWN, ethertype, &[0; 60]), Err(DropReason::GuardProtocol), "{ethertype:#x}");
        }
        // With Ethernet addresses only, ARP is looked at behind a second tag, and a third one does not pass.
        let any = guard(&[], false);
        let tagged = |mac| [vec![0, 7, 8, 6], arp(2, mac, [1, 2, 3, 4])].concat();
        assert_eq!(any.check(OWN, 0x8100, &tagged(OWN)), Ok(()));
        assert_eq!(any.check(OWN, 0x88a8, &tagged(OTHER)), Err(DropReason::GuardArp));
        assert_eq!(any.check(OWN, 0x8100, &[0, 7, 0x81, 0, 0, 8, 8, 6]), Err(DropReason::GuardProtocol));
        assert_eq!(any.check(OWN, 0x8100, &[0, 7, 8]), Err(DropReason::GuardProtocol));
    }

    #[test]
    fn ipv6_comes_from_the_ports_addresses() {
        let g = guard(&GUARDED, false);
        let check = |packet: &[u8]| g.check(OWN, IPV6, packet);
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
        let check = |packet: &[u8]| g.check(OWN, IPV6, packet).is_ok();
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
            assert!(!check(&packet) && guard(&GUARDED, true).check(OWN, IPV6, &packet).is_ok(), "{router}");
        }
        let echo = ipv6(own, 58, &[128, 0, 0, 0, 0, 0, 0, 1]);
        assert!(check(&echo));
        let mut endless = nd(136, own, (14, OWN));
        endless[25] = 0;
        assert!(!check(&ipv6(own, 58, &endless)), "an option of no length");
        // Without a list of IP addresses its own link-layer address is still the only one it announces.
        let any = guard(&[], false);
        assert!(any.check(OWN, IPV6, &ipv6(other, 58, &nd(136, other, (2, OWN)))).is_ok());
        assert!(any.check(OWN, IPV6, &ipv6(other, 58, &nd(136, other, (2, OTHER)))).is_err());
    }

    #[test]
    fn extension_headers_hide_nothing() {
        let g = guard(&GUARDED, false);
        let check = |packet: &[u8]| g.check(OWN, IPV6, packet);
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
