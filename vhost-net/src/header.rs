//! What comes before every packet in a ring: `struct virtio_net_hdr` (virtio 1.3, 5.1.6).
//!
//! [`VnetHdr`] is what a driver said, [`VnetHdr::check`] holds it against the packet, and [`Offload`] is what of it can
//! be relied upon. What is let through may be written where it says without harm: a checksum lands in the checksum
//! field of a transport header, or behind it, so never in an address that the switch has looked at.

use thiserror::Error;

use crate::features::{
    CSUM, GUEST_CSUM, GUEST_ECN, GUEST_TSO4, GUEST_TSO6, GUEST_USO4, GUEST_USO6, HASH_REPORT, HOST_ECN,
    HOST_TSO4, HOST_TSO6, HOST_USO,
};
use crate::packet::{GRE, ICMP, ICMPV6, IPIP, IPV6, Layers, Network, Packet, TCP, UDP};

/// Bytes of the header with VERSION_1.
pub const HEADER: usize = 12;
/// Bytes of the header with HASH_REPORT.
pub const HEADER_WITH_HASH: usize = 20;

/// `VIRTIO_NET_HDR_F_NEEDS_CSUM`: the checksum is partial.
pub const F_NEEDS_CSUM: u8 = 1;
/// `VIRTIO_NET_HDR_F_DATA_VALID`: the checksum was found right. The device says so only.
pub const F_DATA_VALID: u8 = 2;

/// `VIRTIO_NET_HDR_GSO_NONE`: not to be segmented.
pub const GSO_NONE: u8 = 0;
/// `VIRTIO_NET_HDR_GSO_TCPV4`.
pub const GSO_TCPV4: u8 = 1;
/// `VIRTIO_NET_HDR_GSO_TCPV6`.
pub const GSO_TCPV6: u8 = 4;
/// `VIRTIO_NET_HDR_GSO_UDP_L4`: UDP, each segment with a header of its own.
pub const GSO_UDP_L4: u8 = 5;
/// `VIRTIO_NET_HDR_GSO_ECN`, a bit beside those: TCP has CWR set.
pub const GSO_ECN: u8 = 0x80;

/// Least payload of a TCP segment: Linux's `TCP_MIN_GSO_SIZE`, the smallest MSS less the most options. Without a bound
/// one frame would make 65,000.
pub const TCP_SEGMENT_MIN: u16 = 8;
/// Most segments of a UDP packet: Linux's `UDP_MAX_SEGMENTS`.
pub const UDP_SEGMENTS_MAX: usize = 128;

/// Where TCP has its checksum.
const TCP_CSUM: u16 = 16;
/// Where UDP has its checksum.
const UDP_CSUM: u16 = 6;
/// Where ICMP and ICMPv6 have it.
const ICMP_CSUM: u16 = 2;

/// Bytes of the header that these features make.
pub fn header_len(features: u64) -> usize {
    if features & HASH_REPORT == 0 { HEADER } else { HEADER_WITH_HASH }
}

/// `struct virtio_net_hdr`, as it was said: nothing in it is checked.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct VnetHdr {
    /// `F_*`.
    pub flags: u8,
    /// `GSO_*`.
    pub gso_type: u8,
    /// Bytes of all headers, of packets to be segmented. A hint.
    pub hdr_len: u16,
    /// Bytes of payload of each segment.
    pub gso_size: u16,
    /// Where in the packet checksumming begins.
    pub csum_start: u16,
    /// Where, from there, the checksum belongs.
    pub csum_offset: u16,
    /// Receive buffers that the packet is spread over. Unused on transmit.
    pub num_buffers: u16,
}

/// What `hash_value` and `hash_report` say of a received packet (5.1.6.4.5).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct HashReport {
    /// The hash.
    pub value: u32,
    /// `VIRTIO_NET_HASH_REPORT_*`: over which fields; 0 is none.
    pub kind: u16,
}

impl HashReport {
    /// What a header has of it behind the rest.
    pub fn to_bytes(self) -> [u8; HEADER_WITH_HASH - HEADER] {
        let [v0, v1, v2, v3] = self.value.to_le_bytes();
        let [k0, k1] = self.kind.to_le_bytes();
        [v0, v1, v2, v3, k0, k1, 0, 0]
    }
}

/// How a packet is to be segmented.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Segmenting {
    /// TCP over IPv4.
    Tcp4,
    /// TCP over IPv6.
    Tcp6,
    /// UDP over IPv4.
    Udp4,
    /// UDP over IPv6.
    Udp6,
}

/// A checksum that is partial: the sum of the pseudo header is where the checksum belongs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Partial {
    /// Where in the packet checksumming begins.
    pub start: u16,
    /// Where, from there, the checksum belongs.
    pub offset: u16,
}

/// A packet that is to be segmented: it is larger than one segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Gso {
    /// How.
    pub kind: Segmenting,
    /// Bytes of payload of each segment but the last. Not 0.
    pub size: u16,
    /// TCP has CWR set, as far as the driver says.
    pub ecn: bool,
    /// Bytes of the headers, the transport header included. Found in the packet, not believed.
    pub header_len: u16,
}

/// What is left to be done with a packet by whom it goes to. It was held against the packet.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Offload {
    /// The checksum.
    pub csum: Option<Partial>,
    /// Segmentation; the checksum is partial then.
    pub gso: Option<Gso>,
}

/// What has to be done in software for one that does not take an [`Offload`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Work {
    /// Nothing: it takes the packet as it is.
    Nothing,
    /// The checksum is to be completed.
    Checksum,
    /// The packet is to be cut into segments, checksums and all.
    Segment,
}

/// What a driver said of a packet that is not so.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq, Hash)]
pub enum BadHeader {
    /// NEEDS_CSUM without the feature.
    #[error("NEEDS_CSUM without VIRTIO_NET_F_CSUM")]
    CsumNotNegotiated,
    /// The checksum is not inside the packet.
    #[error("csum_start and csum_offset are outside of the packet")]
    CsumOutside,
    /// The checksum is where no transport protocol has one.
    #[error("csum_start and csum_offset are not those of a checksum")]
    CsumMisplaced,
    /// A type of segmentation that there is none of.
    #[error("gso_type is unknown")]
    GsoType,
    /// A type of segmentation without its feature.
    #[error("gso_type is of an offload that was not negotiated")]
    GsoNotNegotiated,
    /// The ECN bit without the feature, or without TCP.
    #[error("gso_type has the ECN bit without VIRTIO_NET_F_HOST_ECN, or without TCP")]
    GsoEcn,
    /// Segmentation without NEEDS_CSUM.
    #[error("gso_type without NEEDS_CSUM")]
    GsoWithoutCsum,
    /// Segments of no or hardly any payload.
    #[error("gso_size is 0, or makes too many segments")]
    GsoSize,
    /// The packet is none of that type, or its headers are not all there.
    #[error("gso_type is not the packet's")]
    GsoNotOfPacket,
}

impl BadHeader {
    /// All of them.
    pub const ALL: [BadHeader; 9] = [
        BadHeader::CsumNotNegotiated,
        BadHeader::CsumOutside,
        BadHeader::CsumMisplaced,
        BadHeader::GsoType,
        BadHeader::GsoNotNegotiated,
        BadHeader::GsoEcn,
        BadHeader::GsoWithoutCsum,
        BadHeader::GsoSize,
        BadHeader::GsoNotOfPacket,
    ];

    /// Name of a counter.
    pub fn name(self) -> &'static str {
        match self {
            BadHeader::CsumNotNegotiated => "csum_not_negotiated",
            BadHeader::CsumOutside => "csum_outside",
            BadHeader::CsumMisplaced => "csum_misplaced",
            BadHeader::GsoType => "gso_type",
            BadHeader::GsoNotNegotiated => "gso_not_negotiated",
            BadHeader::GsoEcn => "gso_ecn",
            BadHeader::GsoWithoutCsum => "gso_without_csum",
            BadHeader::GsoSize => "gso_size",
            BadHeader::GsoNotOfPacket => "gso_not_of_packet",
        }
    }
}

impl VnetHdr {
    /// The header in `bytes`.
    #[inline]
    pub fn from_bytes(bytes: &[u8; HEADER]) -> VnetHdr {
        let word = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        VnetHdr {
            flags: bytes[0],
            gso_type: bytes[1],
            hdr_len: word(2),
            gso_size: word(4),
            csum_start: word(6),
            csum_offset: word(8),
            num_buffers: word(10),
        }
    }

    /// The header as bytes.
    #[inline]
    pub fn to_bytes(&self) -> [u8; HEADER] {
        let mut bytes = [0; HEADER];
        [bytes[0], bytes[1]] = [self.flags, self.gso_type];
        let words = [self.hdr_len, self.gso_size, self.csum_start, self.csum_offset, self.num_buffers];
        for (to, word) in bytes[2..].chunks_exact_mut(2).zip(words) {
            to.copy_from_slice(&word.to_le_bytes());
        }
        bytes
    }

    /// The header as bytes, with a hash.
    #[inline]
    pub fn to_bytes_with_hash(&self, hash: HashReport) -> [u8; HEADER_WITH_HASH] {
        let mut bytes = [0; HEADER_WITH_HASH];
        bytes[..HEADER].copy_from_slice(&self.to_bytes());
        bytes[HEADER..].copy_from_slice(&hash.to_bytes());
        bytes
    }

    /// Holds what a driver with these features said of a packet it transmits against the packet.
    ///
    /// `hdr_len` and `num_buffers` are not looked at, nor are flags that are the device's to set (5.1.6.2).
    #[inline]
    pub fn check(&self, packet: &Packet<'_>, features: u64) -> Result<Offload, BadHeader> {
        if self.flags & F_NEEDS_CSUM == 0 && self.gso_type == GSO_NONE {
            return Ok(Offload::default());
        }
        self.check_offload(packet, features)
    }

    fn check_offload(&self, packet: &Packet<'_>, features: u64) -> Result<Offload, BadHeader> {
        self.negotiated(features)?;
        if self.flags & F_NEEDS_CSUM == 0 {
            return Err(BadHeader::GsoWithoutCsum);
        }
        let csum = Partial { start: self.csum_start, offset: self.csum_offset };
        if csum.place() + 2 > packet.len() {
            return Err(BadHeader::CsumOutside);
        }
        let layers = packet.layers();
        if !csum.is_of(&layers) {
            return Err(BadHeader::CsumMisplaced);
        }
        let gso = if self.gso_type == GSO_NONE { None } else { self.gso(packet.len(), &layers, csum)? };
        Ok(Offload { csum: Some(csum), gso })
    }

    /// Whether it asks for what was negotiated only.
    fn negotiated(&self, features: u64) -> Result<(), BadHeader> {
        let needed = match self.gso_type & !GSO_ECN {
            GSO_NONE => 0,
            GSO_TCPV4 => HOST_TSO4,
            GSO_TCPV6 => HOST_TSO6,
            GSO_UDP_L4 => HOST_USO,
            _ => return Err(BadHeader::GsoType),
        };
        if features & needed != needed {
            return Err(BadHeader::GsoNotNegotiated);
        }
        let tcp = needed & (HOST_TSO4 | HOST_TSO6) != 0;
        if self.gso_type & GSO_ECN != 0 && (!tcp || features & HOST_ECN == 0) {
            return Err(BadHeader::GsoEcn);
        }
        if self.flags & F_NEEDS_CSUM != 0 && features & CSUM == 0 {
            return Err(BadHeader::CsumNotNegotiated);
        }
        Ok(())
    }

    /// How a packet of `len` bytes is to be segmented. Not at all if it is one segment, as with Linux.
    fn gso(&self, len: usize, layers: &Layers, csum: Partial) -> Result<Option<Gso>, BadHeader> {
        let kind = Segmenting::of(layers).filter(|kind| kind.gso_type() == self.gso_type & !GSO_ECN);
        let (Some(kind), Some(header_len)) = (kind, layers.payload) else {
            return Err(BadHeader::GsoNotOfPacket);
        };
        // Not the checksum of a packet inside of this one.
        if csum.start != layers.transport {
            return Err(BadHeader::CsumMisplaced);
        }
        let payload = len.saturating_sub(header_len.into());
        let size = usize::from(self.gso_size);
        let least =
            if kind.is_tcp() { TCP_SEGMENT_MIN.into() } else { payload.div_ceil(UDP_SEGMENTS_MAX).max(1) };
        if size < least {
            return Err(BadHeader::GsoSize);
        }
        let ecn = self.gso_type & GSO_ECN != 0;
        Ok((payload > size).then_some(Gso { kind, size: self.gso_size, ecn, header_len }))
    }
}

impl Segmenting {
    /// How a packet can be segmented at all, by what it is.
    pub fn of(layers: &Layers) -> Option<Segmenting> {
        match (layers.network, layers.protocol) {
            (Network::Ipv4, TCP) => Some(Segmenting::Tcp4),
            (Network::Ipv6, TCP) => Some(Segmenting::Tcp6),
            (Network::Ipv4, UDP) => Some(Segmenting::Udp4),
            (Network::Ipv6, UDP) => Some(Segmenting::Udp6),
            _ => None,
        }
    }

    /// TCP rather than UDP.
    pub fn is_tcp(self) -> bool {
        matches!(self, Segmenting::Tcp4 | Segmenting::Tcp6)
    }

    /// Over IPv6 rather than IPv4.
    pub fn is_ipv6(self) -> bool {
        matches!(self, Segmenting::Tcp6 | Segmenting::Udp6)
    }

    /// The `gso_type`.
    pub fn gso_type(self) -> u8 {
        match self {
            Segmenting::Tcp4 => GSO_TCPV4,
            Segmenting::Tcp6 => GSO_TCPV6,
            Segmenting::Udp4 | Segmenting::Udp6 => GSO_UDP_L4,
        }
    }

    /// Feature bit of a driver that takes it.
    fn guest_feature(self) -> u64 {
        match self {
            Segmenting::Tcp4 => GUEST_TSO4,
            Segmenting::Tcp6 => GUEST_TSO6,
            Segmenting::Udp4 => GUEST_USO4,
            Segmenting::Udp6 => GUEST_USO6,
        }
    }
}

impl Partial {
    /// Where in the packet the checksum belongs.
    pub fn place(self) -> usize {
        usize::from(self.start) + usize::from(self.offset)
    }

    /// Whether that is the checksum of the transport header, or behind a header that packets travel in.
    fn is_of(self, layers: &Layers) -> bool {
        if !matches!(layers.network, Network::Ipv4 | Network::Ipv6) || !layers.whole || layers.fragment {
            return false;
        }
        if self.start > layers.transport {
            return matches!(layers.protocol, UDP | GRE | IPIP | IPV6);
        }
        let offset = match layers.protocol {
            TCP => TCP_CSUM,
            UDP => UDP_CSUM,
            ICMP | ICMPV6 => ICMP_CSUM,
            _ => return false,
        };
        self.start == layers.transport && self.offset == offset
    }
}

impl Offload {
    /// The header by which a packet is handed on with this left to be done, for one buffer.
    #[inline]
    pub fn header(&self) -> VnetHdr {
        let mut header = VnetHdr { num_buffers: 1, ..VnetHdr::default() };
        if let Some(csum) = self.csum {
            header.flags = F_NEEDS_CSUM;
            [header.csum_start, header.csum_offset] = [csum.start, csum.offset];
        }
        if let Some(gso) = self.gso {
            header.gso_type = gso.kind.gso_type() | if gso.ecn { GSO_ECN } else { 0 };
            [header.gso_size, header.hdr_len] = [gso.size, gso.header_len];
        }
        header
    }

    /// What is to be done before a driver with these features gets the packet.
    #[inline]
    pub fn work(&self, features: u64) -> Work {
        if self.csum.is_none() {
            return Work::Nothing;
        }
        if let Some(gso) = self.gso {
            let needed = GUEST_CSUM | gso.kind.guest_feature() | if gso.ecn { GUEST_ECN } else { 0 };
            return if features & needed == needed { Work::Nothing } else { Work::Segment };
        }
        if features & GUEST_CSUM == 0 { Work::Checksum } else { Work::Nothing }
    }
}
