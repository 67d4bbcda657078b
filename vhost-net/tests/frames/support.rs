//! Frames, built by `etherparse`.

use etherparse::{
    IpHeaders, IpNumber, Ipv4Extensions, Ipv4Header, Ipv4Options, Ipv6Extensions, Ipv6Header,
    Ipv6RawExtHeader, Ipv6RoutingExtensions, PacketBuilder, TcpHeader, VlanId,
};
use proptest::collection::vec;
use proptest::prelude::*;

/// A frame of TCP or UDP.
#[derive(Clone, Debug)]
pub struct Shape {
    pub tags: Vec<u16>,
    pub ipv6: bool,
    pub tcp: bool,
    /// IPv4 options or an IPv6 extension header, 4 bytes each unit.
    pub network_options: u8,
    pub tcp_options: u8,
    pub tcp_flags: u8,
    pub identification: u16,
    pub sequence: u32,
    pub ecn: u8,
    pub payload: Vec<u8>,
}

pub const FROM: [u8; 6] = [2, 0, 0, 0, 0, 1];
pub const TO: [u8; 6] = [2, 0, 0, 0, 0, 2];

/// Any of them, with up to `most` bytes of payload.
pub fn shape(most: usize) -> impl Strategy<Value = Shape> {
    (
        (vec(0..4096u16, 0..=2), any::<bool>(), any::<bool>(), 0..=10u8, 0..=10u8),
        (any::<u8>(), any::<u16>(), any::<u32>(), 0..4u8, vec(any::<u8>(), 0..=most)),
    )
        .prop_map(|((tags, ipv6, tcp, network_options, tcp_options), rest)| {
            let (tcp_flags, identification, sequence, ecn, payload) = rest;
            Shape {
                tags,
                ipv6,
                tcp,
                network_options,
                tcp_options,
                tcp_flags,
                identification,
                sequence,
                ecn,
                payload,
            }
        })
}

impl Shape {
    fn ip(&self) -> IpHeaders {
        let options = usize::from(self.network_options);
        if self.ipv6 {
            let source = std::array::from_fn(|i| 0x20 + i as u8);
            let header =
                Ipv6Header { traffic_class: self.ecn, hop_limit: 64, source, ..Ipv6Header::default() };
            let mut extensions = Ipv6Extensions::default();
            let padded = vec![0; 6 + options / 2 * 8];
            let extension = Ipv6RawExtHeader::new_raw(IpNumber::TCP, &padded).unwrap();
            match options % 4 {
                1 => extensions.hop_by_hop_options = Some(extension),
                2 => extensions.destination_options = Some(extension),
                3 => {
                    extensions.hop_by_hop_options = Some(extension.clone());
                    // With no segments left: the destination is the one in the header.
                    extensions.routing =
                        Some(Ipv6RoutingExtensions { routing: extension, final_destination_options: None });
                }
                _ => {}
            }
            IpHeaders::Ipv6(header, extensions)
        } else {
            let mut header = Ipv4Header::new(0, 64, IpNumber::TCP, [10, 1, 2, 3], [10, 4, 5, 6]).unwrap();
            header.identification = self.identification;
            header.ecn = etherparse::IpEcn::try_new(self.ecn).unwrap();
            // No-operation options.
            header.options = Ipv4Options::try_from(&vec![1; options * 4][..]).unwrap();
            IpHeaders::Ipv4(header, Ipv4Extensions::default())
        }
    }

    /// The frame, with all checksums.
    pub fn build(&self) -> Vec<u8> {
        let builder = PacketBuilder::ethernet2(FROM, TO);
        let id = |tag: u16| VlanId::try_new(tag).unwrap();
        let builder = match self.tags[..] {
            [] => builder.ip(self.ip()),
            [one] => builder.single_vlan(id(one)).ip(self.ip()),
            [one, two, ..] => builder.double_vlan(id(one), id(two)).ip(self.ip()),
        };
        let mut bytes = Vec::new();
        if self.tcp {
            let mut tcp = TcpHeader::new(443, 50_000, self.sequence, 1000);
            [tcp.fin, tcp.syn, tcp.rst, tcp.psh, tcp.ack, tcp.urg, tcp.ece, tcp.cwr] =
                std::array::from_fn(|bit| self.tcp_flags >> bit & 1 != 0);
            tcp.set_options_raw(&vec![1; usize::from(self.tcp_options) * 4]).unwrap();
            builder.tcp_header(tcp).write(&mut bytes, &self.payload).unwrap();
        } else {
            builder.udp(53, 4000).write(&mut bytes, &self.payload).unwrap();
        }
        bytes
    }

    /// Bytes before the payload.
    pub fn headers(&self) -> usize {
        self.build().len() - self.payload.len()
    }

    /// Where TCP or UDP begins.
    pub fn transport(&self) -> usize {
        let header = if self.tcp { 20 + usize::from(self.tcp_options) * 4 } else { 8 };
        self.headers() - header
    }

    /// Where, from there, the checksum is.
    pub fn csum_offset(&self) -> usize {
        if self.tcp { 16 } else { 6 }
    }
}

/// An unsigned sum of 16 bits in ones' complement (RFC 1071), byte by byte.
pub fn naive_sum(bytes: &[u8]) -> u16 {
    let mut sum = 0u32;
    for (at, byte) in bytes.iter().enumerate() {
        sum += u32::from(*byte) << if at % 2 == 0 { 8 } else { 0 };
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}

/// The frame with the sum of the pseudo header where its checksum was, as a driver with `VIRTIO_NET_F_CSUM` leaves it.
pub fn partial(shape: &Shape) -> Vec<u8> {
    let mut bytes = shape.build();
    let (transport, place) = (shape.transport(), shape.transport() + shape.csum_offset());
    let l3 = 14 + shape.tags.len() * 4;
    let addresses = if shape.ipv6 { l3 + 8..l3 + 40 } else { l3 + 12..l3 + 20 };
    let mut pseudo = bytes[addresses].to_vec();
    pseudo.extend(((bytes.len() - transport) as u32).to_be_bytes());
    pseudo.extend([0, 0, 0, if shape.tcp { 6 } else { 17 }]);
    let sum = naive_sum(&pseudo);
    bytes[place..place + 2].copy_from_slice(&sum.to_be_bytes());
    bytes
}
