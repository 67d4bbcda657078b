//! What drivers say of packets, and what is not believed.

use proptest::collection::vec;
use proptest::prelude::*;
use vhost_net::features::{
    CSUM, GUEST_CSUM, GUEST_ECN, GUEST_TSO4, GUEST_TSO6, GUEST_USO4, GUEST_USO6, HASH_REPORT, HOST_ECN,
    HOST_TSO4, HOST_TSO6, HOST_USO,
};
use vhost_net::header::{
    BadHeader, F_DATA_VALID, F_NEEDS_CSUM, GSO_ECN, GSO_NONE, GSO_TCPV4, GSO_TCPV6, GSO_UDP_L4, Gso,
    HashReport, Offload, Partial, Segmenting, VnetHdr, Work, header_len,
};
use vhost_net::packet::Packet;

use super::support::{Shape, partial, shape};

const ALL: u64 = CSUM | HOST_TSO4 | HOST_TSO6 | HOST_ECN | HOST_USO;
const GUEST_ALL: u64 = GUEST_CSUM | GUEST_TSO4 | GUEST_TSO6 | GUEST_ECN | GUEST_USO4 | GUEST_USO6;

fn plain(ipv6: bool, tcp: bool, payload: usize) -> Shape {
    Shape {
        tags: vec![],
        ipv6,
        tcp,
        network_options: 0,
        tcp_options: 3,
        tcp_flags: 0x10,
        identification: 1,
        sequence: 1,
        ecn: 0,
        payload: vec![7; payload],
    }
}

/// What an honest driver says of a frame of that shape.
fn honest(shape: &Shape, gso_size: Option<u16>) -> VnetHdr {
    let gso_type = match (gso_size, shape.tcp, shape.ipv6) {
        (None, ..) => GSO_NONE,
        (_, true, false) => GSO_TCPV4,
        (_, true, true) => GSO_TCPV6,
        (_, false, _) => GSO_UDP_L4,
    };
    VnetHdr {
        flags: F_NEEDS_CSUM,
        gso_type,
        hdr_len: shape.headers() as u16,
        gso_size: gso_size.unwrap_or(0),
        csum_start: shape.transport() as u16,
        csum_offset: shape.csum_offset() as u16,
        num_buffers: 0,
    }
}

fn check(header: VnetHdr, frame: &[u8], features: u64) -> Result<Offload, BadHeader> {
    header.check(&Packet::parse(frame, frame.len()).unwrap(), features)
}

#[test]
fn bytes_are_those_of_the_specification() {
    let header = VnetHdr {
        flags: 1,
        gso_type: 0x84,
        hdr_len: 0x0302,
        gso_size: 0x0504,
        csum_start: 0x0706,
        csum_offset: 0x0908,
        num_buffers: 0x0b0a,
    };
    assert_eq!(header.to_bytes(), [1, 0x84, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]);
    assert_eq!(VnetHdr::from_bytes(&header.to_bytes()), header);
    let with_hash = header.to_bytes_with_hash(HashReport { value: 0x0403_0201, kind: 0x0605 });
    assert_eq!(with_hash[..12], header.to_bytes());
    assert_eq!(with_hash[12..], [1, 2, 3, 4, 5, 6, 0, 0]);
    assert_eq!((header_len(0), header_len(HASH_REPORT)), (12, 20));
}

#[test]
fn what_says_nothing_is_believed() {
    let frame = plain(false, true, 100).build();
    // Flags and fields that are the device's, and what is only a hint.
    for flags in [0, F_DATA_VALID, 4, 0xf8] {
        let header =
            VnetHdr { flags, hdr_len: 0xffff, num_buffers: 0xffff, csum_start: 0xffff, ..VnetHdr::default() };
        assert_eq!(check(header, &frame, 0), Ok(Offload::default()));
    }
}

#[test]
fn each_lie_has_its_name() {
    let tcp4 = plain(false, true, 5000);
    let (frame, good) = (partial(&tcp4), honest(&tcp4, Some(1000)));
    let transport = good.csum_start;
    let csum = Some(Partial { start: transport, offset: 16 });
    let gso = Some(Gso { kind: Segmenting::Tcp4, size: 1000, ecn: false, header_len: tcp4.headers() as u16 });
    assert_eq!(check(good, &frame, ALL), Ok(Offload { csum, gso }));

    let no_gso = VnetHdr { gso_type: GSO_NONE, ..good };
    for (what, header, features, why) in [
        ("no CSUM", no_gso, ALL & !CSUM, BadHeader::CsumNotNegotiated),
        ("sum half behind the end", VnetHdr { csum_start: 5049, ..no_gso }, ALL, BadHeader::CsumOutside),
        (
            "sum far behind",
            VnetHdr { csum_start: 0xffff, csum_offset: 0xffff, ..no_gso },
            ALL,
            BadHeader::CsumOutside,
        ),
        ("onto the MAC", VnetHdr { csum_start: 0, csum_offset: 6, ..no_gso }, ALL, BadHeader::CsumMisplaced),
        (
            "onto the IP address",
            VnetHdr { csum_start: 14, csum_offset: 12, ..no_gso },
            ALL,
            BadHeader::CsumMisplaced,
        ),
        ("onto a port", VnetHdr { csum_offset: 0, ..no_gso }, ALL, BadHeader::CsumMisplaced),
        ("into the payload", VnetHdr { csum_start: 100, ..no_gso }, ALL, BadHeader::CsumMisplaced),
        ("no TSO4", good, ALL & !HOST_TSO4, BadHeader::GsoNotNegotiated),
        ("UFO", VnetHdr { gso_type: 3, ..good }, ALL, BadHeader::GsoType),
        ("no type", VnetHdr { gso_type: 2, ..good }, ALL, BadHeader::GsoType),
        ("all types", VnetHdr { gso_type: 0x7f, ..good }, ALL, BadHeader::GsoType),
        ("ECN", VnetHdr { gso_type: GSO_TCPV4 | GSO_ECN, ..good }, ALL & !HOST_ECN, BadHeader::GsoEcn),
        ("ECN alone", VnetHdr { gso_type: GSO_ECN, ..good }, ALL, BadHeader::GsoEcn),
        ("ECN of UDP", VnetHdr { gso_type: GSO_UDP_L4 | GSO_ECN, ..good }, ALL, BadHeader::GsoEcn),
        ("no NEEDS_CSUM", VnetHdr { flags: 0, ..good }, ALL, BadHeader::GsoWithoutCsum),
        ("size 0", VnetHdr { gso_size: 0, ..good }, ALL, BadHeader::GsoSize),
        ("size 7", VnetHdr { gso_size: 7, ..good }, ALL, BadHeader::GsoSize),
        ("TCPv6 of IPv4", VnetHdr { gso_type: GSO_TCPV6, ..good }, ALL, BadHeader::GsoNotOfPacket),
        ("UDP of TCP", VnetHdr { gso_type: GSO_UDP_L4, ..good }, ALL, BadHeader::GsoNotOfPacket),
    ] {
        assert_eq!(check(header, &frame, features), Err(why), "{what}");
        assert!(BadHeader::ALL.contains(&why));
    }
}

#[test]
fn segmentation_wants_headers_that_are_there() {
    let tcp4 = plain(false, true, 5000);
    let good = honest(&tcp4, Some(1000));
    let broken = |at: usize, to: u8| {
        let mut frame = partial(&tcp4);
        frame[at] = to;
        check(good, &frame, ALL)
    };
    assert_eq!(broken(34 + 12, 0x40), Err(BadHeader::GsoNotOfPacket), "a TCP header of 16 bytes");
    assert_eq!(broken(20, 0x20), Err(BadHeader::CsumMisplaced), "a fragment");
    assert_eq!(broken(14, 0x44), Err(BadHeader::CsumMisplaced), "an IPv4 header of 16 bytes");
    assert_eq!(broken(12, 0x12), Err(BadHeader::CsumMisplaced), "not IP");
    assert_eq!(broken(23, 132), Err(BadHeader::CsumMisplaced), "SCTP");
    // Headers beyond what one looks at.
    let frame = partial(&tcp4);
    let short = Packet::parse(&frame[..50], frame.len()).unwrap();
    assert_eq!(good.check(&short, ALL), Err(BadHeader::GsoNotOfPacket));
}

#[test]
fn one_segment_is_not_segmented() {
    let shape = plain(true, true, 1000);
    let frame = partial(&shape);
    let csum = Some(Partial { start: 54, offset: 16 });
    assert_eq!(check(honest(&shape, Some(1000)), &frame, ALL), Ok(Offload { csum, gso: None }));
    assert!(check(honest(&shape, Some(999)), &frame, ALL).unwrap().gso.is_some());
}

#[test]
fn udp_makes_128_segments_at_most() {
    let shape = plain(false, false, 12_800);
    let frame = partial(&shape);
    assert_eq!(check(honest(&shape, Some(99)), &frame, ALL), Err(BadHeader::GsoSize));
    assert!(check(honest(&shape, Some(100)), &frame, ALL).unwrap().gso.is_some());
}

#[test]
fn a_checksum_inside_of_a_tunnel_is_let_through() {
    // VXLAN: the inner packet's checksum, behind UDP.
    let shape = plain(false, false, 200);
    let header = VnetHdr { csum_start: 100, csum_offset: 16, ..honest(&shape, None) };
    let csum = Some(Partial { start: 100, offset: 16 });
    assert_eq!(check(header, &shape.build(), ALL), Ok(Offload { csum, gso: None }));
    // But segmentation is of the outer packet, so the checksum is, too.
    let header = VnetHdr { gso_type: GSO_UDP_L4, gso_size: 100, ..header };
    assert_eq!(check(header, &shape.build(), ALL), Err(BadHeader::CsumMisplaced));
}

proptest! {
    #[test]
    fn honest_drivers_are_believed(shape in shape(3000), gso_size in prop::option::of(8..1500u16)) {
        let frame = partial(&shape);
        let gso_size = gso_size.filter(|s| shape.tcp || shape.payload.len() <= usize::from(*s) * 128);
        let offload = check(honest(&shape, gso_size), &frame, ALL).unwrap();
        let gso = gso_size.filter(|s| shape.payload.len() > usize::from(*s));
        prop_assert_eq!(offload.gso.map(|g| g.size), gso);
        // What is handed on says the same again.
        let header = VnetHdr { num_buffers: 0, ..offload.header() };
        if gso.is_some() {
            prop_assert_eq!(header, honest(&shape, gso_size));
        }
        prop_assert_eq!(check(header, &frame, ALL), Ok(offload));
    }

    /// Whatever is believed lies inside the packet, and behind everything that a switch looks at.
    #[test]
    fn lies_are_never_worse_than_an_error(
        shape in shape(300),
        bytes in any::<[u8; 12]>(),
        near in any::<bool>(),
        features in any::<u64>(),
        changes in vec((any::<prop::sample::Index>(), any::<u8>()), 0..4),
    ) {
        let mut frame = partial(&shape);
        for (at, to) in changes {
            let at = at.index(frame.len());
            frame[at] = to;
        }
        let mut header = VnetHdr::from_bytes(&bytes);
        if near {
            // Half a lie.
            header = VnetHdr { flags: header.flags, gso_size: header.gso_size, ..honest(&shape, Some(100)) };
        }
        let Ok(packet) = Packet::parse(&frame, frame.len()) else { return Ok(()) };
        if let Ok(offload) = header.check(&packet, features) {
            let layers = packet.layers();
            if let Some(csum) = offload.csum {
                prop_assert!(csum.place() + 2 <= frame.len());
                prop_assert!(csum.start >= layers.transport);
                prop_assert!(features & CSUM != 0);
            }
            if let Some(gso) = offload.gso {
                prop_assert!(offload.csum.is_some() && gso.size >= 1);
                prop_assert_eq!(Some(gso.header_len), layers.payload);
                prop_assert!((usize::from(gso.header_len) + usize::from(gso.size)) < frame.len());
            }
        }
    }
}

#[test]
fn work_is_what_the_driver_does_not_take() {
    let csum = Some(Partial { start: 34, offset: 16 });
    let offload = |kind, ecn| Offload { csum, gso: Some(Gso { kind, size: 1000, ecn, header_len: 54 }) };
    assert_eq!(Offload::default().work(0), Work::Nothing);
    assert_eq!(Offload { csum, gso: None }.work(0), Work::Checksum);
    assert_eq!(Offload { csum, gso: None }.work(GUEST_CSUM), Work::Nothing);
    for (kind, feature) in [
        (Segmenting::Tcp4, GUEST_TSO4),
        (Segmenting::Tcp6, GUEST_TSO6),
        (Segmenting::Udp4, GUEST_USO4),
        (Segmenting::Udp6, GUEST_USO6),
    ] {
        assert_eq!(offload(kind, false).work(GUEST_CSUM | feature), Work::Nothing, "{kind:?}");
        assert_eq!(offload(kind, false).work(GUEST_ALL & !feature), Work::Segment, "{kind:?}");
    }
    assert_eq!(offload(Segmenting::Tcp4, true).work(GUEST_ALL & !GUEST_ECN), Work::Segment);
    assert_eq!(offload(Segmenting::Tcp4, true).work(GUEST_ALL), Work::Nothing);
}
