//! What is found in a frame.

use etherparse::{LinkSlice, NetSlice, SlicedPacket, TransportSlice};
use proptest::collection::vec;
use proptest::prelude::*;
use vhost_net::packet::{BadFrame, ETHERTYPE_VLAN, LARGEST, Network, PEEK, Packet, Tag};

use super::support::{FROM, Shape, TO, shape};

/// Holds what is found against what etherparse finds, as far as both look.
fn compare(frame: &[u8]) {
    let packet = Packet::parse(&frame[..frame.len().min(PEEK)], frame.len());
    let Ok(theirs) = SlicedPacket::from_ethernet(frame) else {
        // It may be broken behind where one looks; but it may not cost more than an error.
        let _ = packet.map(|p| (p.layers(), p.arp(), p.neighbour(&p.layers())));
        return;
    };
    let packet = packet.unwrap();
    // Used for second tags once, and no number of IEEE 802.1Q; to etherparse one all the same.
    if [12, 16, 20].iter().any(|&at| frame.get(at..at + 2) == Some(&[0x91, 0x00])) {
        return;
    }
    let Some(LinkSlice::Ethernet2(link)) = &theirs.link else { panic!("no Ethernet") };
    assert_eq!((packet.destination(), packet.source()), (link.destination(), link.source()));
    assert_eq!(packet.tag().map(Tag::vlan), theirs.vlan_ids().first().map(|v| v.value()));
    let layers = packet.layers();
    match &theirs.net {
        Some(NetSlice::Ipv4(ip)) => {
            assert_eq!(layers.network, Network::Ipv4);
            assert_eq!(packet.ipv4_source(&layers), Some(ip.header().source()));
            assert_eq!(layers.fragment, ip.is_payload_fragmented());
        }
        Some(NetSlice::Ipv6(ip)) if layers.whole => {
            assert_eq!(layers.network, Network::Ipv6);
            assert_eq!(packet.ipv6_source(&layers), Some(ip.header().source()));
            let behind = ip.payload().ip_number.0;
            // It does not look behind mobility, host identity and shim6.
            if !matches!(behind, 135 | 139 | 140) {
                assert_eq!(layers.fragment, ip.is_payload_fragmented());
                assert_eq!(layers.protocol, behind);
            }
        }
        Some(NetSlice::Ipv6(_)) => assert_eq!(layers.network, Network::Ipv6),
        Some(NetSlice::Arp(_)) => assert_eq!(layers.network, Network::Arp),
        None => {}
    }
    let ports = packet.ports(&layers);
    let payload = |tail: &[u8]| Some((tail.as_ptr() as usize - frame.as_ptr() as usize) as u16);
    match &theirs.transport {
        Some(TransportSlice::Tcp(tcp)) if layers.whole => {
            assert_eq!(ports, Some((tcp.source_port(), tcp.destination_port())));
            assert_eq!(layers.payload, payload(tcp.payload()));
        }
        Some(TransportSlice::Udp(udp)) if layers.whole => {
            assert_eq!(ports, Some((udp.source_port(), udp.destination_port())));
            assert_eq!(layers.payload, payload(udp.payload()));
        }
        _ => {}
    }
}

proptest! {
    #[test]
    fn finds_what_etherparse_finds(shape in shape(64)) {
        let frame = shape.build();
        compare(&frame);
        let packet = Packet::parse(&frame, frame.len()).unwrap();
        let layers = packet.layers();
        prop_assert_eq!(packet.destination(), TO);
        prop_assert_eq!(packet.source(), FROM);
        prop_assert_eq!(usize::from(layers.transport), shape.transport());
        prop_assert_eq!(layers.payload.map(usize::from), Some(shape.headers()));
    }

    #[test]
    fn a_frame_with_bytes_changed_is_never_worse_than_an_error(
        shape in shape(64),
        changes in vec((any::<prop::sample::Index>(), any::<u8>()), 0..6),
        cut in any::<prop::sample::Index>(),
    ) {
        let mut frame = shape.build();
        for (at, to) in changes {
            let at = at.index(frame.len());
            frame[at] = to;
        }
        compare(&frame);
        compare(&frame[..cut.index(frame.len() + 1)]);
    }

    #[test]
    fn random_bytes_never_panic(mut frame in vec(any::<u8>(), 0..300), kind in 0..4usize, len in 0..70_000usize) {
        if frame.len() >= 14 {
            let types = [[0x08, 0x00], [0x08, 0x06], [0x86, 0xdd], [0x81, 0x00]];
            frame[12..14].copy_from_slice(&types[kind]);
        }
        if let Ok(packet) = Packet::parse(&frame, len) {
            let layers = packet.layers();
            let seen = frame.len().min(len);
            prop_assert!(usize::from(layers.transport) <= seen);
            prop_assert!(layers.payload.is_none_or(|p| usize::from(p) <= seen));
            let _ = (packet.arp(), packet.neighbour(&layers), packet.ports(&layers), packet.tag());
        }
    }
}

#[test]
fn runts_and_giants_are_none() {
    for len in 0..14 {
        assert_eq!(Packet::parse(&vec![0; len], len).unwrap_err(), BadFrame::Runt);
    }
    let mut tagged = [0; 17];
    tagged[12..14].copy_from_slice(&ETHERTYPE_VLAN.to_be_bytes());
    assert_eq!(Packet::parse(&tagged, tagged.len()).unwrap_err(), BadFrame::Runt);
    assert_eq!(Packet::parse(&[0; PEEK], LARGEST + 1).unwrap_err(), BadFrame::TooLong);
    // What is there counts, even if there was more to look at.
    assert_eq!(Packet::parse(&[0; PEEK], 13).unwrap_err(), BadFrame::Runt);
    assert!(Packet::parse(&[0; PEEK], LARGEST).is_ok());
}

fn ethernet(ethertype: u16) -> Vec<u8> {
    let mut frame = [TO, FROM].concat();
    frame.extend(ethertype.to_be_bytes());
    frame
}

#[test]
fn arp_says_who_has_what() {
    let mut frame = ethernet(0x0806);
    frame.extend([0, 1, 8, 0, 6, 4, 0, 2]);
    frame.extend([2, 0, 0, 0, 0, 7, 10, 0, 0, 7, 2, 0, 0, 0, 0, 8, 10, 0, 0, 8]);
    let packet = Packet::parse(&frame, frame.len()).unwrap();
    let arp = packet.arp().unwrap();
    assert_eq!((arp.operation, arp.sender_mac, arp.sender_ip), (2, [2, 0, 0, 0, 0, 7], [10, 0, 0, 7]));
    assert_eq!((arp.target_mac, arp.target_ip), ([2, 0, 0, 0, 0, 8], [10, 0, 0, 8]));
    for broken in 14..20 {
        let mut frame = frame.clone();
        frame[broken] ^= 0x40;
        assert_eq!(Packet::parse(&frame, frame.len()).unwrap().arp(), None, "byte {broken}");
    }
    assert_eq!(Packet::parse(&frame, frame.len() - 1).unwrap().arp(), None);
}

/// A neighbour advertisement with these options.
fn advertisement(options: &[u8]) -> Vec<u8> {
    let mut frame = ethernet(0x86dd);
    frame.extend([0x60, 0, 0, 0, 0, (24 + options.len()) as u8, 58, 255]);
    frame.extend([0xfe; 16]);
    frame.extend([0xff; 16]);
    frame.extend([136, 0, 0, 0, 0x60, 0, 0, 0]);
    frame.extend([0xfd; 16]);
    frame.extend(options);
    frame
}

#[test]
fn a_neighbour_says_who_it_is_once() {
    let option = [2, 1, 2, 0, 0, 0, 0, 9];
    let seen = |options: &[u8], less: usize| {
        let frame = advertisement(options);
        let packet = Packet::parse(&frame, frame.len() - less).unwrap();
        packet.neighbour(&packet.layers()).unwrap()
    };
    let found = seen(&option, 0);
    assert_eq!((found.kind, found.target, found.whole), (136, Some([0xfd; 16]), true));
    assert_eq!(found.link_layer, Some([2, 0, 0, 0, 0, 9]));
    assert!(seen(&[], 0).whole);
    assert!(!seen(&[option, option].concat(), 0).whole, "two addresses");
    assert!(!seen(&[2, 0, 2, 0, 0, 0, 0, 9], 0).whole, "an option of no length");
    assert!(!seen(&[2, 2, 2, 0, 0, 0, 0, 9], 0).whole, "an option longer than the packet");
    assert!(!seen(&option, 1).whole, "a packet cut short");
    assert!(!seen(&[14; 4], 0).whole, "half an option");
}

/// IPv6 with so many destination options headers of 8 bytes.
fn extended(count: usize) -> Vec<u8> {
    let mut frame = ethernet(0x86dd);
    frame.extend([0x60, 0, 0, 0, 0, 0, if count == 0 { 17 } else { 60 }, 64]);
    frame.extend([0x11; 32]);
    for left in (0..count).rev() {
        frame.extend([if left == 0 { 17 } else { 60 }, 0, 1, 4, 0, 0, 0, 0]);
    }
    frame.extend([0, 53, 0, 99, 0, 8, 0, 0]);
    frame
}

#[test]
fn ipv6_headers_are_followed_a_bounded_way() {
    for count in 0..=12 {
        let frame = extended(count);
        let packet = Packet::parse(&frame, frame.len()).unwrap();
        let layers = packet.layers();
        assert_eq!(layers.whole, count <= 8, "{count}");
        assert_eq!(packet.ports(&layers), (count <= 8).then_some((53, 99)), "{count}");
        assert_eq!(layers.extended, count > 0);
    }
    // Headers that do not end where one looks.
    let frame = extended(8);
    assert!(!Packet::parse(&frame[..100], frame.len()).unwrap().layers().whole);
}

#[test]
fn home_address_and_routing_header_are_found() {
    let mut frame = ethernet(0x86dd);
    frame.extend([0x60, 0, 0, 0, 0, 0, 60, 64]);
    frame.extend([0x11; 32]);
    // Padding of 4 bytes, then the home address (RFC 6275, 6.3).
    frame.extend([43, 2, 1, 2, 0, 0, 201, 16]);
    frame.extend([0x22; 16]);
    // Routing header type 2 (RFC 6275, 6.4).
    frame.extend([17, 2, 2, 1, 0, 0, 0, 0]);
    frame.extend([0x33; 16]);
    frame.extend([0, 53, 0, 99, 0, 8, 0, 0]);
    let packet = Packet::parse(&frame, frame.len()).unwrap();
    let layers = packet.layers();
    let at = |at: u16| &frame[usize::from(at)..usize::from(at) + 16];
    assert_eq!((at(layers.source), at(layers.destination)), (&[0x22; 16][..], &[0x33; 16][..]));
    assert_eq!(packet.ipv6_source(&layers), Some([0x11; 16]));
    assert_eq!(packet.ports(&layers), Some((53, 99)));
}

#[test]
fn fragments_have_no_transport_header() {
    let shape = Shape {
        tags: vec![],
        ipv6: false,
        tcp: false,
        network_options: 0,
        tcp_options: 0,
        tcp_flags: 0,
        identification: 1,
        sequence: 0,
        ecn: 0,
        payload: vec![0; 32],
    };
    // Offset or more fragments; not "don't fragment".
    for (flags, fragment) in [([0x20, 0], true), ([0, 1], true), ([0x1f, 0], true), ([0x40, 0], false)] {
        let mut frame = shape.build();
        frame[20..22].copy_from_slice(&flags);
        let packet = Packet::parse(&frame, frame.len()).unwrap();
        let layers = packet.layers();
        assert_eq!((layers.fragment, packet.ports(&layers).is_none()), (fragment, fragment), "{flags:?}");
    }
}
