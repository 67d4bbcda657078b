//! Packet sockets.

use etherparse::PacketBuilder;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use vhost_net::features::{CSUM, HOST_ECN, HOST_TSO4};
use vhost_net::header::{F_NEEDS_CSUM, GSO_TCPV4, VnetHdr};
use vhost_net::packet::Packet;
use vhost_net::port::af_packet::AfPacket;
use vhost_net::port::{Link, Refused, Uplink, UplinkError};

use super::Test;
use super::pair::{drop_rights, frame, ip, is_quiet, make, receive, send, until};

pub const TESTS: &[Test] = &[
    ("af_packet::frames_cross_both_ways_as_they_are", frames_cross_both_ways_as_they_are),
    ("af_packet::a_large_segment_crosses_in_one_piece", a_large_segment_crosses_in_one_piece),
    ("af_packet::tags_stay_in_the_frame", tags_stay_in_the_frame),
    (
        "af_packet::frames_that_the_link_does_not_take_are_counted",
        frames_that_the_link_does_not_take_are_counted,
    ),
    ("af_packet::an_interface_may_go_and_come_back", an_interface_may_go_and_come_back),
    ("af_packet::what_is_wrong_is_said_with_the_way_out", what_is_wrong_is_said_with_the_way_out),
    ("af_packet::readable_when_there_is_a_frame", readable_when_there_is_a_frame),
];

fn both() -> (AfPacket, AfPacket) {
    make();
    (AfPacket::open("near").unwrap(), AfPacket::open("far").unwrap())
}

fn frames_cross_both_ways_as_they_are() {
    let (mut near, mut far) = both();
    let plain = VnetHdr::default();
    let lens = [14, 15, 60, 64, 200, 1514, 1000].into_iter().cycle().take(100);
    let sent: Vec<Vec<u8>> = lens.enumerate().map(|(i, len)| frame(len, i)).collect();
    for (at, frame) in sent.iter().enumerate() {
        send(&mut near, &plain, frame, 64, 1 + at * 17).unwrap();
        send(&mut far, &plain, frame, 14, 400).unwrap();
    }
    near.flush();
    far.flush();
    for port in [&mut far, &mut near] {
        let seen: Vec<Vec<u8>> = receive(port, sent.len()).into_iter().map(|(_, frame)| frame).collect();
        assert_eq!(seen.len(), sent.len());
        assert!(seen == sent, "frames differ, or their order does");
        // Not what it sent itself.
        assert!(is_quiet(port));
        let (counters, bytes) = (port.counters(), sent.iter().map(Vec::len).sum::<usize>() as u64);
        assert_eq!((counters.rx_packets, counters.rx_bytes), (100, bytes));
        assert_eq!((counters.tx_packets, counters.tx_bytes), (100, bytes));
        assert_eq!(counters.rx_missed_errors + counters.tx_errors + counters.tx_fifo_errors, 0);
    }
    // Nor what others on this host send.
    let mut other = AfPacket::open("near").unwrap();
    send(&mut other, &plain, &frame(100, 0), 64, 100).unwrap();
    other.flush();
    assert_eq!(receive(&mut far, 1).len(), 1);
    assert!(is_quiet(&mut near));
}

/// TCP over IPv4, with a partial checksum.
pub fn segment(payload: usize) -> (VnetHdr, Vec<u8>) {
    let builder = PacketBuilder::ethernet2([2, 0, 0, 0, 0, 8], [2, 0, 0, 0, 0, 9])
        .ipv4([10, 0, 0, 1], [10, 0, 0, 2], 64)
        .tcp(1, 2, 3, 4);
    let mut frame = Vec::new();
    builder.write(&mut frame, &(0..payload).map(|i| (i * 11) as u8).collect::<Vec<_>>()).unwrap();
    let header = VnetHdr {
        flags: F_NEEDS_CSUM,
        gso_type: GSO_TCPV4,
        hdr_len: 54,
        gso_size: 1448,
        csum_start: 34,
        csum_offset: 16,
        num_buffers: 1,
    };
    (header, frame)
}

fn a_large_segment_crosses_in_one_piece() {
    let (mut near, mut far) = both();
    let (header, large) = segment(65_000);
    // In parts of a page, and in more parts than the kernel takes at once.
    send(&mut near, &header, &large, 192, 4096).unwrap();
    assert_eq!(send(&mut near, &header, &large, 192, 100), Err(Refused::TooLong));
    // A checksum alone, of a frame that is copied.
    let (header, small) = segment(900);
    let header = VnetHdr { gso_type: 0, gso_size: 0, hdr_len: 0, ..header };
    send(&mut near, &header, &small, 60, 10).unwrap();
    near.flush();
    let seen = receive(&mut far, 2);
    assert_eq!(seen.len(), 2);
    assert!(seen[0].1 == large && seen[1].1 == small);
    assert_eq!((seen[0].0.gso_type, seen[0].0.gso_size, seen[0].0.flags), (GSO_TCPV4, 1448, F_NEEDS_CSUM));
    assert_eq!((seen[1].0.gso_type, seen[1].0.flags), (0, F_NEEDS_CSUM));
    // What the kernel says of them holds against the packet as what a driver says would have to.
    for (header, frame) in &seen {
        let packet = Packet::parse(frame, frame.len()).unwrap();
        let offload = header.check(&packet, CSUM | HOST_TSO4 | HOST_ECN).unwrap();
        assert_eq!(offload.csum.map(|c| (c.start, c.offset)), Some((34, 16)));
    }
    assert_eq!((near.counters().tx_packets, near.counters().tx_length_errors), (2, 1));
}

fn tags_stay_in_the_frame() {
    let (mut near, mut far) = both();
    let (header, plain) = segment(3000);
    let mut tagged = plain[..12].to_vec();
    tagged.extend([0x81, 0x00, 0x60, 0x2a]);
    tagged.extend(&plain[12..]);
    let header = VnetHdr { csum_start: 38, hdr_len: 58, ..header };
    send(&mut near, &header, &tagged, 192, 1000).unwrap();
    let mut twice = frame(100, 3);
    twice[12..22].copy_from_slice(&[0x88, 0xa8, 0, 7, 0x81, 0, 0, 8, 0x88, 0xb5]);
    send(&mut near, &VnetHdr::default(), &twice, 192, 1000).unwrap();
    near.flush();
    let seen = receive(&mut far, 2);
    assert_eq!(seen.len(), 2);
    assert!(seen[0].1 == tagged && seen[1].1 == twice);
    assert_eq!((seen[0].0.csum_start, seen[0].0.gso_size), (38, 1448));
    let packet = Packet::parse(&tagged, tagged.len()).unwrap();
    assert!(seen[0].0.check(&packet, CSUM | HOST_TSO4).unwrap().gso.is_some());
}

fn frames_that_the_link_does_not_take_are_counted() {
    let (mut near, mut far) = both();
    let plain = VnetHdr::default();
    let good = frame(100, 1);
    // Between two that are good: it is lost alone.
    send(&mut near, &plain, &good, 64, 1000).unwrap();
    send(&mut near, &plain, &frame(1600, 2), 64, 1000).unwrap();
    send(&mut near, &plain, &good, 64, 1000).unwrap();
    near.flush();
    assert_eq!(send(&mut near, &plain, &frame(4000, 2), 64, 1000), Err(Refused::TooLong));
    // A header that is a lie, if it came this far.
    let (header, large) = segment(3000);
    let lie = VnetHdr { csum_start: 60_000, ..header };
    assert_eq!(send(&mut near, &lie, &large, 64, 1000), Err(Refused::Bad));
    assert_eq!(receive(&mut far, 2).len(), 2);
    assert!(is_quiet(&mut far));
    ip("link set near down");
    assert_eq!(send(&mut near, &header, &large, 64, 1000), Err(Refused::Down));
    let counters = near.counters();
    assert_eq!((counters.tx_packets, counters.tx_length_errors), (2, 2));
    assert_eq!((counters.tx_errors, counters.tx_carrier_errors), (1, 1));
}

fn an_interface_may_go_and_come_back() {
    let (mut near, far) = both();
    until(|| near.link() == Link { up: true, mtu: 1500 });
    drop(far);
    ip("link set far down");
    until(|| !near.link().up);
    ip("link set far mtu 9000");
    ip("link set near mtu 9000");
    ip("link set far up");
    until(|| near.link() == Link { up: true, mtu: 9000 });
    ip("link del near");
    assert!(!near.link().up);
    assert!(is_quiet(&mut near));
    make();
    until(|| near.link().up);
    let mut far = AfPacket::open("far").unwrap();
    send(&mut far, &VnetHdr::default(), &frame(100, 1), 14, 50).unwrap();
    far.flush();
    assert_eq!(receive(&mut near, 1).len(), 1);
}

fn what_is_wrong_is_said_with_the_way_out() {
    make();
    let why = AfPacket::open("nowhere").unwrap_err();
    assert!(matches!(why, UplinkError::Missing(_)) && why.to_string().contains("ip link"), "{why}");
    let why = AfPacket::open("a name that is far too long").unwrap_err();
    assert!(matches!(why, UplinkError::Missing(_)), "{why}");
    ip("link set near down");
    let why = AfPacket::open("near").unwrap_err();
    assert!(why.to_string().contains("`ip link set near up`"), "{why}");
    drop_rights();
    let why = AfPacket::open("near").unwrap_err();
    assert!(why.to_string().contains("CAP_NET_RAW"), "{why}");
}

fn readable_when_there_is_a_frame() {
    let (mut near, mut far) = both();
    let ready = |port: &AfPacket, wait: u16| {
        let mut fds = [PollFd::new(port.descriptor(), PollFlags::POLLIN)];
        poll(&mut fds, PollTimeout::from(wait)).unwrap() == 1
    };
    assert!(!ready(&near, 0));
    send(&mut far, &VnetHdr::default(), &frame(100, 1), 14, 50).unwrap();
    assert!(!ready(&near, 0), "it waits to be flushed");
    far.flush();
    assert!(ready(&near, 5000));
    assert_eq!(receive(&mut near, 1).len(), 1);
    assert!(!ready(&near, 0));
}
