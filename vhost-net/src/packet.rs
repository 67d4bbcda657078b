//! What is to be known of a frame, out of the first bytes of it: addresses, VLAN tags, and where the headers are.
//!
//! ```text
//! 0   6   12              l3                    transport   payload
//! |dst|src|tag tag ethertype|IPv4 or IPv6, options|TCP or UDP|
//! ```
//!
//! Those bytes are copied out of the guest's memory once, and what is decided is decided on the copy. [`Packet::parse`]
//! looks at Ethernet only, which is all that forwarding needs; [`Packet::layers`] goes on from there. A guest may have
//! written anything: nothing is read outside the bytes given, and each loop has a bound.

use thiserror::Error;

/// Bytes of a frame to copy out and look at: two VLAN tags, IPv4 and TCP with all options, and some to spare for IPv6.
pub const PEEK: usize = 192;
/// Bytes of an Ethernet header without tags.
pub const ETHERNET: usize = 14;
/// Bytes of a VLAN tag.
pub const TAG: usize = 4;
/// Tags that are looked behind.
const TAGS: usize = 2;
/// Bytes of the largest frame: 65589 (virtio 1.3, 5.1.6.3) with tags.
pub const LARGEST: usize = ETHERNET + 40 + 65535 + TAGS * TAG;
/// IPv6 extension headers that are looked behind.
const EXTENSIONS: usize = 8;

/// EtherType of IPv4.
pub const ETHERTYPE_IPV4: u16 = 0x0800;
/// EtherType of ARP.
pub const ETHERTYPE_ARP: u16 = 0x0806;
/// EtherType of RARP.
pub const ETHERTYPE_RARP: u16 = 0x8035;
/// EtherType of IPv6.
pub const ETHERTYPE_IPV6: u16 = 0x86dd;
/// EtherType of a customer's VLAN tag (IEEE 802.1Q).
pub const ETHERTYPE_VLAN: u16 = 0x8100;
/// EtherType of a service's VLAN tag (IEEE 802.1ad).
pub const ETHERTYPE_QINQ: u16 = 0x88a8;

/// Protocol number of ICMP.
pub const ICMP: u8 = 1;
/// Protocol number of IPv4 in IP.
pub const IPIP: u8 = 4;
/// Protocol number of TCP.
pub const TCP: u8 = 6;
/// Protocol number of UDP.
pub const UDP: u8 = 17;
/// Protocol number of IPv6 in IP.
pub const IPV6: u8 = 41;
/// Protocol number of GRE.
pub const GRE: u8 = 47;
/// Protocol number of ICMPv6.
pub const ICMPV6: u8 = 58;

const ROUTING: u8 = 43;
const FRAGMENT: u8 = 44;
const AUTHENTICATION: u8 = 51;
const OPTIONS: u8 = 60;

/// Whether a header of IPv6 is one that others follow: hop-by-hop options, routing, fragment, authentication, destination
/// options, mobility, host identity, shim6.
#[inline]
pub fn is_extension(protocol: u8) -> bool {
    matches!(protocol, 0 | ROUTING | FRAGMENT | AUTHENTICATION | OPTIONS | 135 | 139 | 140)
}

/// A MAC address.
pub type Mac = [u8; 6];

/// Why what came is no frame.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum BadFrame {
    /// Not even an Ethernet header and the tags that it says it has.
    #[error("the frame is shorter than its Ethernet header")]
    Runt,
    /// Longer than any frame can be.
    #[error("the frame is longer than {LARGEST} bytes")]
    TooLong,
}

/// The outermost VLAN tag.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tag {
    /// `ETHERTYPE_VLAN` or `ETHERTYPE_QINQ`.
    pub tpid: u16,
    /// Priority (3 bits), drop eligible (1) and VLAN (12).
    pub tci: u16,
}

impl Tag {
    /// The VLAN; 0 is a tag for priority alone.
    pub fn vlan(self) -> u16 {
        self.tci & 0xfff
    }
}

/// What lies behind the Ethernet header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Network {
    /// IPv4.
    Ipv4,
    /// IPv6.
    Ipv6,
    /// ARP.
    Arp,
    /// Something else.
    Other,
    /// IPv4 or IPv6 by its EtherType, but its header is none, or not all there.
    Malformed,
}

/// Where the headers of a frame are. Offsets count from its first byte.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(clippy::struct_excessive_bools)] // each of its own meaning
pub struct Layers {
    /// What lies behind the Ethernet header.
    pub network: Network,
    /// Where that is.
    pub l3: u16,
    /// Protocol number of the header at `transport`. Of IPv6, an extension header's if not all of them were seen.
    pub protocol: u8,
    /// Where the network header ends, IPv4's options and IPv6's extension headers with it.
    pub transport: u16,
    /// Where the payload of TCP or UDP begins, if their header was there whole.
    pub payload: Option<u16>,
    /// It is a fragment; no transport header is looked for in those.
    pub fragment: bool,
    /// It is a fragment, and not the first one.
    pub later: bool,
    /// IPv6 has extension headers.
    pub extended: bool,
    /// All headers of IP were seen; not so if there are more, or longer ones, than one looks behind.
    pub whole: bool,
    /// Where the source address is: of IPv6, the home address if there is one (5.1.6.4.3.4).
    pub source: u16,
    /// Where the destination address is: of IPv6, that of routing header type 2 if there is one (5.1.6.4.3.4).
    pub destination: u16,
}

/// An ARP or RARP packet, of IPv4 over Ethernet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Arp {
    /// 1 to ask, 2 to answer; of RARP 3 and 4.
    pub operation: u16,
    /// Who says so.
    pub sender_mac: Mac,
    /// Which address they say is theirs.
    pub sender_ip: [u8; 4],
    /// Who is asked or told.
    pub target_mac: Mac,
    /// Whose address is asked for.
    pub target_ip: [u8; 4],
}

/// A packet of IPv6 neighbour discovery (RFC 4861).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Neighbour {
    /// ICMPv6 type: 133 and 134 router solicitation and advertisement, 135 and 136 those of neighbours, 137 redirect.
    pub kind: u8,
    /// The target of 135, 136 and 137.
    pub target: Option<[u8; 16]>,
    /// The source or target link-layer address option.
    pub link_layer: Option<Mac>,
    /// All of it, options too, was seen, and is as it should be: addresses at most once.
    pub whole: bool,
}

/// A frame by its first bytes.
#[derive(Clone, Copy, Debug)]
pub struct Packet<'a> {
    head: &'a [u8],
    len: u32,
    ethertype: u16,
    l3: u16,
}

impl<'a> Packet<'a> {
    /// The frame of `len` bytes that begins with `head`, which is as much of it as there is to look at.
    #[inline]
    pub fn parse(head: &'a [u8], len: usize) -> Result<Packet<'a>, BadFrame> {
        if len > LARGEST {
            return Err(BadFrame::TooLong);
        }
        let head = head.get(..len).unwrap_or(head);
        let mut l3 = ETHERNET;
        let mut ethertype = word(head, l3 - 2).ok_or(BadFrame::Runt)?;
        for _ in 0..TAGS {
            if ethertype != ETHERTYPE_VLAN && ethertype != ETHERTYPE_QINQ {
                break;
            }
            l3 += TAG;
            ethertype = word(head, l3 - 2).ok_or(BadFrame::Runt)?;
        }
        Ok(Packet { head, len: len as u32, ethertype, l3: l3 as u16 })
    }

    /// The bytes that there are to look at.
    pub fn head(&self) -> &'a [u8] {
        self.head
    }

    /// Bytes of the whole frame.
    #[expect(clippy::len_without_is_empty, reason = "no frame is empty")]
    pub fn len(&self) -> usize {
        self.len as usize
    }

    /// Where it goes to.
    #[inline]
    pub fn destination(&self) -> Mac {
        bytes(self.head, 0).unwrap_or_default()
    }

    /// Where it says it comes from.
    #[inline]
    pub fn source(&self) -> Mac {
        bytes(self.head, 6).unwrap_or_default()
    }

    /// It goes to a group: multicast, of which broadcast is one.
    #[inline]
    pub fn to_group(&self) -> bool {
        self.head.first().is_some_and(|b| b & 1 != 0)
    }

    /// It goes to everybody.
    #[inline]
    pub fn to_all(&self) -> bool {
        self.destination() == [0xff; 6]
    }

    /// The outermost VLAN tag.
    #[inline]
    pub fn tag(&self) -> Option<Tag> {
        if usize::from(self.l3) == ETHERNET {
            return None;
        }
        Some(Tag { tpid: word(self.head, 12)?, tci: word(self.head, 14)? })
    }

    /// Tags that were looked behind.
    #[inline]
    pub fn tags(&self) -> usize {
        (usize::from(self.l3) - ETHERNET) / TAG
    }

    /// EtherType behind the tags; that of a tag if there are more than one looks behind.
    #[inline]
    pub fn ethertype(&self) -> u16 {
        self.ethertype
    }

    /// Where the headers are.
    pub fn layers(&self) -> Layers {
        let nothing = Layers {
            network: Network::Malformed,
            l3: self.l3,
            protocol: 0,
            transport: self.l3,
            payload: None,
            fragment: false,
            later: false,
            extended: false,
            whole: false,
            source: self.l3,
            destination: self.l3,
        };
        match self.ethertype {
            ETHERTYPE_IPV4 => self.ipv4(nothing),
            ETHERTYPE_IPV6 => self.ipv6(nothing),
            ETHERTYPE_ARP => Some(Layers { network: Network::Arp, ..nothing }),
            _ => Some(Layers { network: Network::Other, ..nothing }),
        }
        .unwrap_or(nothing)
    }

    /// RFC 791, 3.1.
    fn ipv4(&self, nothing: Layers) -> Option<Layers> {
        let l3 = usize::from(self.l3);
        let fixed: [u8; 20] = bytes(self.head, l3)?;
        let header = usize::from(fixed[0] & 0xf) * 4;
        if fixed[0] >> 4 != 4 || header < 20 || l3 + header > self.head.len() {
            return None;
        }
        let transport = l3 + header;
        // More fragments, or an offset.
        let place = u16::from_be_bytes([fixed[6], fixed[7]]) & 0x3fff;
        let fragment = place != 0;
        let protocol = fixed[9];
        Some(Layers {
            network: Network::Ipv4,
            protocol,
            transport: transport as u16,
            payload: if fragment { None } else { self.payload(protocol, transport) },
            fragment,
            later: place & 0x1fff != 0,
            whole: true,
            source: (l3 + 12) as u16,
            destination: (l3 + 16) as u16,
            ..nothing
        })
    }

    /// RFC 8200, 3 and 4.
    fn ipv6(&self, nothing: Layers) -> Option<Layers> {
        let l3 = usize::from(self.l3);
        let fixed: [u8; 40] = bytes(self.head, l3)?;
        if fixed[0] >> 4 != 6 {
            return None;
        }
        let mut layers = Layers {
            network: Network::Ipv6,
            protocol: fixed[6],
            source: (l3 + 8) as u16,
            destination: (l3 + 24) as u16,
            ..nothing
        };
        let mut at = l3 + 40;
        layers.whole = self.extensions(&mut layers, &mut at).is_some();
        layers.transport = at as u16;
        if layers.whole && !layers.fragment {
            layers.payload = self.payload(layers.protocol, at);
        }
        Some(layers)
    }

    /// Goes behind the extension headers, from `at` on. None if there is more of them than can be seen.
    fn extensions(&self, layers: &mut Layers, at: &mut usize) -> Option<()> {
        for _ in 0..=EXTENSIONS {
            let (kind, here) = (layers.protocol, *at);
            if !is_extension(kind) {
                return Some(());
            }
            let [next, len]: [u8; 2] = bytes(self.head, here)?;
            let len = usize::from(len);
            let len = match kind {
                FRAGMENT => 8,
                AUTHENTICATION => (len + 2) * 4,
                _ => (len + 1) * 8,
            };
            let header = self.head.get(here..here + len)?;
            layers.extended = true;
            match kind {
                // RFC 6275, 6.4: type 2, one segment left or none, one address.
                ROUTING if len == 24 && header[2] == 2 => layers.destination = (here + 8) as u16,
                OPTIONS => {
                    if let Some(address) = home_address(header) {
                        layers.source = (here + address) as u16;
                    }
                }
                // An atomic fragment (RFC 6946) is a whole packet.
                FRAGMENT => {
                    let place = u16::from_be_bytes([header[2], header[3]]);
                    (layers.fragment, layers.later) = (place & 0xfff9 != 0, place & 0xfff8 != 0);
                }
                _ => {}
            }
            layers.protocol = next;
            *at = here + len;
            if layers.fragment {
                return Some(());
            }
        }
        None
    }

    /// Where the payload of TCP or UDP begins whose header is at `transport`.
    fn payload(&self, protocol: u8, transport: usize) -> Option<u16> {
        let header = match protocol {
            TCP => usize::from(self.head.get(transport + 12)? >> 4) * 4,
            UDP => 8,
            _ => return None,
        };
        let least = if protocol == TCP { 20 } else { 8 };
        let payload = transport + header;
        (header >= least && payload <= self.head.len()).then_some(payload as u16)
    }

    /// The ARP or RARP packet, if it is one of IPv4 over Ethernet and all there (RFC 826, RFC 903).
    pub fn arp(&self) -> Option<Arp> {
        let arp: [u8; 28] = bytes(self.head, usize::from(self.l3))?;
        if !matches!(self.ethertype, ETHERTYPE_ARP | ETHERTYPE_RARP) || arp[..6] != [0, 1, 8, 0, 6, 4] {
            return None;
        }
        Some(Arp {
            operation: word(&arp, 6)?,
            sender_mac: bytes(&arp, 8)?,
            sender_ip: bytes(&arp, 14)?,
            target_mac: bytes(&arp, 18)?,
            target_ip: bytes(&arp, 24)?,
        })
    }

    /// The source address of IPv4, as its header has it.
    pub fn ipv4_source(&self, layers: &Layers) -> Option<[u8; 4]> {
        if layers.network == Network::Ipv4 { bytes(self.head, usize::from(layers.l3) + 12) } else { None }
    }

    /// The source address of IPv6, as its header has it.
    pub fn ipv6_source(&self, layers: &Layers) -> Option<[u8; 16]> {
        if layers.network == Network::Ipv6 { bytes(self.head, usize::from(layers.l3) + 8) } else { None }
    }

    /// Source and destination port, of TCP and UDP.
    pub fn ports(&self, layers: &Layers) -> Option<(u16, u16)> {
        layers.payload?;
        let at = usize::from(layers.transport);
        Some((word(self.head, at)?, word(self.head, at + 2)?))
    }

    /// The type of an ICMPv6 message, if one begins here.
    pub fn icmpv6(&self, layers: &Layers) -> Option<u8> {
        let begins =
            layers.network == Network::Ipv6 && layers.whole && layers.protocol == ICMPV6 && !layers.later;
        if begins { self.head.get(usize::from(layers.transport)).copied() } else { None }
    }

    /// The packet of neighbour discovery, if it is one (RFC 4861, 4).
    pub fn neighbour(&self, layers: &Layers) -> Option<Neighbour> {
        let kind = self.icmpv6(layers).filter(|_| !layers.fragment)?;
        let at = usize::from(layers.transport);
        // Where options begin.
        let fixed = match kind {
            133 => 8,
            134 => 16,
            135 | 136 => 24,
            137 => 40,
            _ => return None,
        };
        let target = if fixed >= 24 { bytes(self.head, at + 8) } else { None };
        let mut found = Neighbour { kind, target, link_layer: None, whole: false };
        // Where IPv6 says that it ends, what follows being padding.
        let end = usize::from(layers.l3) + 40 + usize::from(word(self.head, usize::from(layers.l3) + 4)?);
        let mut here = at + fixed;
        while here < end {
            let Some([option, units]) = bytes(self.head, here) else { return Some(found) };
            let len = usize::from(units) * 8;
            if len == 0 || here + len > end || here + len > self.head.len() {
                return Some(found);
            }
            if matches!(option, 1 | 2) {
                // Which of two is taken would be up to who reads it; and Ethernet's are of one unit.
                if found.link_layer.is_some() || units != 1 {
                    return Some(found);
                }
                found.link_layer = bytes(self.head, here + 2);
            }
            here += len;
        }
        found.whole = here == end && end <= self.head.len();
        Some(found)
    }
}

/// Where in a destination options header the home address is (RFC 6275, 6.3).
fn home_address(header: &[u8]) -> Option<usize> {
    const PAD1: u8 = 0;
    const HOME_ADDRESS: u8 = 201;
    let mut at = 2;
    while at < header.len() {
        if header[at] == PAD1 {
            at += 1;
            continue;
        }
        let len = usize::from(*header.get(at + 1)?);
        if header[at] == HOME_ADDRESS && len == 16 && at + 18 <= header.len() {
            return Some(at + 2);
        }
        at += 2 + len;
    }
    None
}

/// `N` bytes at `at`.
#[inline]
fn bytes<const N: usize>(from: &[u8], at: usize) -> Option<[u8; N]> {
    from.get(at..)?.first_chunk().copied()
}

/// 16 bits in network order at `at`.
#[inline]
fn word(from: &[u8], at: usize) -> Option<u16> {
    bytes(from, at).map(u16::from_be_bytes)
}
