//! Receive-side scaling.

use std::net::{Ipv4Addr, Ipv6Addr};

use proptest::collection::vec;
use proptest::prelude::*;
use vhost_net::header::HashReport;
use vhost_net::packet::Packet;
use vhost_net::rss::{BadRss, Hasher, Rss, TABLE, Toeplitz, hash_types};

use super::support::{Shape, shape};

/// Of "Verifying the RSS Hash Calculation" in Microsoft's documentation of network drivers, as are the vectors.
const KEY: [u8; 40] = [
    0x6d, 0x5a, 0x56, 0xda, 0x25, 0x5b, 0x0e, 0xc2, 0x41, 0x67, 0x25, 0x3d, 0x43, 0xa3, 0x8f, 0xb0, 0xd0,
    0xca, 0x2b, 0xcb, 0xae, 0x7b, 0x30, 0xb4, 0x77, 0xcb, 0x2d, 0xa3, 0x80, 0x30, 0xf2, 0x0c, 0x6a, 0x42,
    0xb7, 0x3b, 0xbe, 0xac, 0x01, 0xfa,
];

/// Destination and source, hash of the addresses, hash of addresses and ports.
type Vector<Address> = (Address, u16, Address, u16, u32, u32);
const IPV4: [Vector<[u8; 4]>; 5] = [
    ([161, 142, 100, 80], 1766, [66, 9, 149, 187], 2794, 0x323e_8fc2, 0x51cc_c178),
    ([65, 69, 140, 83], 4739, [199, 92, 111, 2], 14230, 0xd718_262a, 0xc626_b0ea),
    ([12, 22, 207, 184], 38024, [24, 19, 198, 95], 12898, 0xd2d0_a5de, 0x5c2b_394a),
    ([209, 142, 163, 6], 2217, [38, 27, 205, 30], 48228, 0x8298_9176, 0xafc7_327f),
    ([202, 188, 127, 2], 1303, [153, 39, 163, 191], 44251, 0x5d18_09c5, 0x10e8_28a2),
];
const IPV6: [Vector<&str>; 3] = [
    ("3ffe:2501:200:3::1", 1766, "3ffe:2501:200:1fff::7", 2794, 0x2cc1_8cd5, 0x4020_7d3d),
    ("ff02::1", 4739, "3ffe:501:8::260:97ff:fe40:efab", 14230, 0x0f0c_461c, 0xdde5_1bbf),
    (
        "fe80::200:f8ff:fe21:67cf",
        38024,
        "3ffe:1900:4545:3:200:f8ff:fe21:67cf",
        44251,
        0x4b61_e985,
        0x02d1_feef,
    ),
];

/// A frame from one address and port to another.
fn frame(tcp: bool, from: &[u8], to: &[u8], ports: [u16; 2], network_options: u8) -> Vec<u8> {
    let shape = Shape {
        tags: vec![],
        ipv6: from.len() == 16,
        tcp,
        network_options,
        tcp_options: 0,
        tcp_flags: 0,
        identification: 0,
        sequence: 0,
        ecn: 0,
        payload: vec![],
    };
    let mut frame = shape.build();
    let at = if from.len() == 16 { 22 } else { 26 };
    frame[at..at + from.len()].copy_from_slice(from);
    frame[at + from.len()..at + 2 * from.len()].copy_from_slice(to);
    let transport = shape.transport();
    frame[transport..transport + 2].copy_from_slice(&ports[0].to_be_bytes());
    frame[transport + 2..transport + 4].copy_from_slice(&ports[1].to_be_bytes());
    frame
}

fn report(types: u32, frame: &[u8]) -> HashReport {
    let packet = Packet::parse(frame, frame.len()).unwrap();
    Hasher::new(types, &KEY).report(&packet, &packet.layers())
}

#[test]
fn hashes_are_microsofts() {
    let vectors4 = IPV4.map(|(to, dp, from, sp, two, four)| {
        let octets = |a: [u8; 4]| Ipv4Addr::from(a).octets().to_vec();
        (octets(to), dp, octets(from), sp, two, four, [1, 2, 3])
    });
    let vectors6 = IPV6.map(|(to, dp, from, sp, two, four)| {
        let octets = |a: &str| a.parse::<Ipv6Addr>().unwrap().octets().to_vec();
        (octets(to), dp, octets(from), sp, two, four, [4, 5, 6])
    });
    for (to, dp, from, sp, two, four, [ip, tcp, udp]) in vectors4.into_iter().chain(vectors6) {
        let of = |value, kind| HashReport { value, kind };
        let input = [&from[..], &to, &sp.to_be_bytes(), &dp.to_be_bytes()].concat();
        assert_eq!(Toeplitz::new(&KEY).hash(&input), four);
        let (tcp_frame, udp_frame) =
            (frame(true, &from, &to, [sp, dp], 0), frame(false, &from, &to, [sp, dp], 0));
        assert_eq!(report(hash_types::ALL, &tcp_frame), of(four, tcp));
        assert_eq!(report(hash_types::ALL, &udp_frame), of(four, udp));
        // Only what is enabled.
        let only_ip = hash_types::IPV4 | hash_types::IPV6;
        assert_eq!(report(only_ip, &tcp_frame), of(two, ip));
        assert_eq!(report(only_ip | hash_types::TCPV4 | hash_types::TCPV6, &udp_frame), of(two, ip));
        assert_eq!(report(hash_types::UDPV4 | hash_types::UDPV6, &tcp_frame), of(0, 0));
        assert_eq!(report(0, &tcp_frame), of(0, 0));
    }
}

#[test]
fn extension_headers_have_types_of_their_own() {
    // One of destination options: without a home address it is the source that counts.
    let plain = frame(true, &[3; 16], &[5; 16], [1, 2], 0);
    let extended = frame(true, &[3; 16], &[5; 16], [1, 2], 2);
    let all = report(hash_types::ALL, &plain);
    assert_eq!((all.kind, report(hash_types::ALL, &extended)), (5, HashReport { kind: 8, ..all }));
    let without = hash_types::ALL & !hash_types::TCP_EX;
    assert_eq!(
        report(without, &extended).kind,
        7,
        "addresses with extension headers come before TCP without"
    );
    let without = without & !hash_types::IP_EX;
    assert_eq!(report(without, &extended), all);
}

#[test]
fn home_address_and_routing_header_are_hashed_instead() {
    let mut frame = frame(false, &[0x22; 16], &[0x33; 16], [53, 99], 0);
    let direct = report(hash_types::ALL, &frame);
    // The same two in extension headers.
    let udp = frame.split_off(54);
    frame[20] = 60;
    frame[22..54].fill(0x11);
    frame.extend([43, 2, 1, 2, 0, 0, 201, 16]);
    frame.extend([0x22; 16]);
    frame.extend([17, 2, 2, 1, 0, 0, 0, 0]);
    frame.extend([0x33; 16]);
    frame.extend(udp);
    assert_eq!(report(hash_types::ALL, &frame), HashReport { kind: 9, ..direct });
    assert_ne!(report(hash_types::UDPV6, &frame).value, direct.value);
}

/// A command, of a table of queues.
fn command(types: u32, table: &[u16], unclassified: u16, transmit: u16, key: &[u8]) -> Vec<u8> {
    let mut bytes = types.to_le_bytes().to_vec();
    bytes.extend((table.len() as u16 - 1).to_le_bytes());
    bytes.extend(unclassified.to_le_bytes());
    bytes.extend(table.iter().flat_map(|q| q.to_le_bytes()));
    bytes.extend(transmit.to_le_bytes());
    bytes.push(key.len() as u8);
    bytes.extend(key);
    bytes
}

#[test]
fn packets_go_where_the_table_says() {
    let table: Vec<u16> = (0..128).map(|i| i % 3).collect();
    let rss = Rss::from_rss_config(&command(hash_types::TCPV4, &table, 3, 4, &KEY), 4).unwrap();
    assert_eq!(rss.transmit_queues, 4);
    for (to, dp, from, sp, _, four) in IPV4 {
        let tcp = frame(true, &from, &to, [sp, dp], 0);
        let packet = Packet::parse(&tcp, tcp.len()).unwrap();
        let queue = (four % 128 % 3) as u16;
        assert_eq!(rss.place(&packet, &packet.layers()), (queue, HashReport { value: four, kind: 2 }));
        let udp = frame(false, &from, &to, [sp, dp], 0);
        let packet = Packet::parse(&udp, udp.len()).unwrap();
        assert_eq!(rss.place(&packet, &packet.layers()), (3, HashReport::default()));
    }
}

#[test]
fn commands_that_make_no_sense_are_refused() {
    let why = |bytes: &[u8]| Rss::from_rss_config(bytes, 4).unwrap_err();
    assert_eq!(why(&command(0x200, &[0], 0, 1, &KEY)), BadRss::HashTypes);
    assert_eq!(why(&command(1, &[0; 3], 0, 1, &KEY)), BadRss::Table);
    assert_eq!(why(&command(1, &[0; 2 * TABLE], 0, 1, &KEY)), BadRss::Table);
    assert_eq!(why(&command(1, &[0, 4], 0, 1, &KEY)), BadRss::Queue);
    assert_eq!(why(&command(1, &[0, 3], 4, 1, &KEY)), BadRss::Queue);
    assert_eq!(why(&command(1, &[0, 0x8000], 0, 1, &KEY)), BadRss::Queue);
    assert_eq!(why(&command(1, &[0, 3], 0, 0, &KEY)), BadRss::Queue);
    assert_eq!(why(&command(1, &[0, 3], 0, 5, &KEY)), BadRss::Queue);
    assert_eq!(why(&command(1, &[0], 0, 1, &[1; 41])), BadRss::Key);
    assert_eq!(why(&command(1, &[0], 0, 1, &[])), BadRss::Key);
    assert!(Rss::from_rss_config(&command(0, &[0], 0, 1, &[]), 4).is_ok());
    let good = command(1, &[0, 1, 2, 3], 0, 1, &KEY);
    for len in 0..good.len() {
        assert_eq!(why(&good[..len]), BadRss::Length, "{len}");
    }
    assert_eq!(why(&[good, vec![0]].concat()), BadRss::Length);

    let mut config = hash_types::ALL.to_le_bytes().to_vec();
    config.extend([0; 8]);
    config.push(40);
    config.extend(KEY);
    let tcp = frame(true, &IPV4[0].2, &IPV4[0].0, [IPV4[0].3, IPV4[0].1], 0);
    let packet = Packet::parse(&tcp, tcp.len()).unwrap();
    let report = Hasher::from_hash_config(&config).unwrap().report(&packet, &packet.layers());
    assert_eq!(report.value, IPV4[0].5);
    for len in 0..config.len() {
        assert_eq!(Hasher::from_hash_config(&config[..len]).unwrap_err(), BadRss::Length, "{len}");
    }
}

/// The definition, bit by bit.
fn naive(key: &[u8], input: &[u8]) -> u32 {
    let bit = |bytes: &[u8], at: usize| bytes.get(at / 8).is_some_and(|b| b & (0x80 >> (at % 8)) != 0);
    let mut hash = 0;
    for at in (0..input.len() * 8).filter(|at| bit(input, *at)) {
        for i in 0..32 {
            hash ^= u32::from(bit(key, at + i)) << (31 - i);
        }
    }
    hash
}

proptest! {
    #[test]
    fn hashes_are_those_of_the_definition(key in vec(any::<u8>(), 0..=40), input in vec(any::<u8>(), 0..=36)) {
        prop_assert_eq!(Toeplitz::new(&key).hash(&input), naive(&key, &input));
    }

    #[test]
    fn random_commands_and_packets_are_never_worse_than_an_error(
        bytes in vec(any::<u8>(), 0..400),
        shape in shape(40),
        change in any::<(prop::sample::Index, u8)>(),
    ) {
        let _ = Hasher::from_hash_config(&bytes);
        let _ = Rss::from_rss_config(&bytes, 4);
        let mut frame = shape.build();
        let at = change.0.index(frame.len());
        frame[at] = change.1;
        if let Ok(packet) = Packet::parse(&frame, frame.len()) {
            let rss = Rss::from_rss_config(&command(hash_types::ALL, &[0, 1, 2, 3], 0, 1, &KEY), 4).unwrap();
            prop_assert!(rss.place(&packet, &packet.layers()).0 < 4);
        }
    }
}
