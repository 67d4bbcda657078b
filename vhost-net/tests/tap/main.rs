//! The tap port between a driver of ours and the host's network, in a network namespace: needs root.
#![allow(clippy::unwrap_used)]

mod capture;
mod errors;
mod guest;
mod host;
mod trouble;

use std::net::UdpSocket;
use std::sync::Arc;
use std::time::Duration;

use libtest_mimic::{Arguments, Completion, Trial};
use poll_engine::device::features as ring;
use poll_engine::engine::pacing::Pacing;
use vhost_net::features::{CSUM, GUEST_CSUM, GUEST_TSO4, HOST_TSO4, MRG_RXBUF};
use vhost_net::header::{HEADER, VnetHdr};
use vhost_net::packet::Packet;
use vhost_net::port::tap::Tap;

use guest::{Guest, engine};
use host::{GUEST_MAC, HOST_MAC, Host, frame, in_namespace, ip, open_tap, until};

/// Frames on their way at once: fewer than a tap's queue holds.
const WINDOW: usize = 64;
const PLAIN: [u8; host::HEADER] = [0; host::HEADER];

type Test = (&'static str, fn());

/// What reads captures.
const WITNESSED: Test = ("a_capture_is_what_tcpdump_sees", capture::tcpdump);

const TESTS: &[Test] = &[
    ("frames_cross_both_ways_as_they_are", frames_cross_both_ways_as_they_are),
    ("frames_of_every_length_keep_their_order", frames_of_every_length_keep_their_order),
    ("segments_of_64_kib_cross_in_one_piece", segments_of_64_kib_cross_in_one_piece),
    ("what_the_guest_does_not_take_undone_is_done", what_the_guest_does_not_take_undone_is_done),
    ("checksums_left_undone_are_right_for_the_host", checksums_left_undone_are_right_for_the_host),
    ("several_queues_carry_flows_and_stopped_ones_none", several_queues_carry_flows_and_stopped_ones_none),
    ("what_was_there_before_stays_and_what_was_made_goes", errors::what_was_there_before_stays),
    ("taps_that_do_not_fit_are_refused_with_a_way_out", errors::taps_that_do_not_fit_are_refused),
    ("a_tap_that_somebody_else_opened_is_taken_over", errors::inherited),
    ("a_tap_that_is_deleted_ends_quietly", trouble::deleted),
    ("a_tap_that_is_made_anew_goes_on", trouble::made_anew),
    ("a_wake_up_for_what_somebody_else_has_read_is_no_end", trouble::robbed),
    ("a_tap_that_this_user_may_not_use_is_said_so", errors::not_permitted),
    ("a_daemon_without_rights_says_what_to_do", errors::daemon_without_rights),
    ("a_guest_without_buffers_loses_nothing_and_nothing_spins", trouble::without_buffers),
    ("too_few_buffers_for_a_segment_are_waited_for", trouble::too_few_buffers),
    ("a_queue_that_waits_for_frames_stops_at_once", trouble::stops_at_once),
    ("headers_that_lie_cost_their_frame_only", trouble::lies),
    ("what_waited_for_another_guest_is_not_given_to_one_that_does_not_take_it", trouble::another_guest),
    ("receive_buffers_that_are_too_small_come_back", trouble::small_buffers),
];

fn main() -> std::process::ExitCode {
    let args = Arguments::from_args();
    let missing = host::missing();
    let trials = TESTS.iter().chain([&WITNESSED]).map(|&(name, test)| {
        let missing = missing.clone().or_else(|| (name == WITNESSED.0).then(capture::missing).flatten());
        Trial::ignorable_test(name, move || match missing {
            Some(reason) if std::env::var_os("KICKLESS_REQUIRE_TAP").is_some() => Err(reason.into()),
            Some(reason) => Ok(Completion::ignored_with(reason)),
            None => {
                in_namespace(test);
                Ok(Completion::Completed)
            }
        })
    });
    libtest_mimic::run(&args, trials.collect()).exit_code()
}

fn frames_cross_both_ways_as_they_are() {
    for (format, pacing) in
        [(0, Pacing::Event), (ring::RING_PACKED, Pacing::default()), (ring::IN_ORDER, Pacing::Busy)]
    {
        let tap = open_tap();
        let (engine, host) = (engine(pacing), Host::on("kl0"));
        let mut guest = Guest::on(&tap, &engine, format | MRG_RXBUF, 256, 1600);
        guest.post(200);
        for round in 0..300 {
            let out = frame(GUEST_MAC, HOST_MAC, 14 + round * 5, round as u32);
            guest.send([0; HEADER], &out, round);
            assert_eq!(host.wait(), (PLAIN, out), "frame {round}");
            let back = frame(HOST_MAC, GUEST_MAC, 1514 - round * 5, round as u32);
            host.send(PLAIN, &back);
            let (header, got) = guest.wait();
            assert_eq!(got, back, "frame {round}");
            assert_eq!(VnetHdr::from_bytes(&header), VnetHdr { num_buffers: 1, ..VnetHdr::default() });
            guest.post(1);
        }
        for (first, at) in [(0xff, 2), (0x01, 1)] {
            for _ in 0..at {
                guest.send([0; HEADER], &frame(GUEST_MAC, [first; 6], 100, 0), 14);
                host.wait();
            }
            host.send(PLAIN, &frame(HOST_MAC, [first; 6], 100, 0));
            guest.wait();
        }
        guest.stop();
        let counters = tap.counters();
        assert!(counters.contains(&("rx_queue_0_packets".into(), 302)), "{counters:?}");
        assert!(counters.contains(&("tx_queue_0_packets".into(), 303)), "{counters:?}");
        assert_eq!(tap.flows().map(|flow| flow.packets), [[300, 1, 1], [300, 1, 2]]);
        assert!(counters.iter().all(|(name, n)| *n == 0 || !name.ends_with("drops")), "{counters:?}");
    }
}

/// TCP over IPv4 from one to the other, its checksum partial.
fn segments(from: [u8; 6], to: [u8; 6], payload: usize) -> Vec<u8> {
    let addresses =
        if from == HOST_MAC { ([10, 9, 0, 1], [10, 9, 0, 2]) } else { ([10, 9, 0, 2], [10, 9, 0, 1]) };
    let builder = etherparse::PacketBuilder::ethernet2(from, to)
        .ipv4(addresses.0, addresses.1, 64)
        .tcp(40_000, 5201, 1, 65_000);
    let body = frame(from, to, payload + 14, payload as u32).split_off(14);
    let mut bytes = Vec::new();
    builder.write(&mut bytes, &body).unwrap();
    let sum = pseudo_sum(&bytes);
    bytes[34 + 16..34 + 18].copy_from_slice(&sum.to_be_bytes());
    bytes
}

/// The sum of the pseudo header of an IPv4 packet, which is where the checksum belongs while that is partial.
fn pseudo_sum(frame: &[u8]) -> u16 {
    let len = (frame.len() - 34) as u32;
    let words = frame[26..34].chunks(2).map(|w| u32::from(u16::from_be_bytes([w[0], w[1]])));
    let mut sum = words.sum::<u32>() + u32::from(frame[23]) + (len >> 16) + (len & 0xffff);
    while sum >> 16 != 0 {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}

/// The header of such a packet.
fn tso(size: u16) -> VnetHdr {
    VnetHdr {
        flags: 1,
        gso_type: 1,
        hdr_len: 54,
        gso_size: size,
        csum_start: 34,
        csum_offset: 16,
        num_buffers: 0,
    }
}

fn short(header: &VnetHdr) -> [u8; host::HEADER] {
    header.to_bytes()[..host::HEADER].try_into().unwrap()
}

/// Lengths of all kinds mixed, over buffers of a size that makes most of them need several, in both formats and with buffers
/// used in order.
fn frames_of_every_length_keep_their_order() {
    for (format, buffer_len) in [(0, 600), (ring::RING_PACKED, 1526), (ring::IN_ORDER, 4096), (0, 70_000)] {
        let tap = open_tap();
        let (engine, host) = (engine(Pacing::Busy), Host::on("kl0"));
        let features = format | MRG_RXBUF | GUEST_CSUM | GUEST_TSO4;
        let mut guest = Guest::on(&tap, &engine, features, 256, buffer_len);
        guest.post(256);
        let (mut sent, mut got) = (Vec::new(), 0);
        let mut random = 7u32;
        while got < 1500 {
            while sent.len() < 1500 && sent.len() - got < WINDOW {
                random = random.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                let mode = sent.len() / 100 % 3;
                let bytes = match (random >> 24, mode) {
                    (0..20, 0 | 1) | (_, 2) => {
                        let len = 5000 + (random >> 8) as usize % 60_000;
                        let bytes = segments(HOST_MAC, GUEST_MAC, len);
                        host.send(short(&tso(1448)), &bytes);
                        bytes
                    }
                    _ => {
                        let len = 60 + (random >> 8) as usize % 1400;
                        let bytes = frame(HOST_MAC, GUEST_MAC, len, random);
                        host.send(PLAIN, &bytes);
                        bytes
                    }
                };
                sent.push(bytes);
            }
            let (header, bytes) = guest.wait();
            assert!(
                bytes == sent[got],
                "frame {got} of {} bytes is not that of {}",
                bytes.len(),
                sent[got].len()
            );
            let gso_type = VnetHdr::from_bytes(&header).gso_type;
            assert_eq!(gso_type, u8::from(sent[got].len() > 1514), "frame {got}");
            got += 1;
            guest.post(256);
        }
        guest.stop();
    }
}

fn segments_of_64_kib_cross_in_one_piece() {
    let tap = Tap::open("kl0", 1, None).unwrap();
    let (engine, host) = (engine(Pacing::Event), Host::on("kl0"));
    let all = MRG_RXBUF | CSUM | GUEST_CSUM | GUEST_TSO4 | HOST_TSO4;
    // With mergeable buffers and without.
    for (features, buffer_len) in [(all, 1526), (all & !MRG_RXBUF, 65_562 + 12)] {
        let mut guest = Guest::on(&tap, &engine, features, 128, buffer_len);
        guest.post(128);
        // The second is what the kernel's own segments have at most.
        for payload in [65_000, 65_535 - 54, 3000] {
            let out = segments(GUEST_MAC, HOST_MAC, payload);
            guest.send(tso(1448).to_bytes(), &out, 54);
            let (header, got) = host.wait();
            assert!(got == out, "{} bytes for {}", got.len(), out.len());
            assert_eq!(header[..2], [1, 1], "the host sees a segment to be cut, its checksum partial");
            let back = segments(HOST_MAC, GUEST_MAC, payload);
            host.send(short(&tso(1400)), &back);
            let (header, got) = guest.wait();
            assert!(got == back, "{} bytes for {}", got.len(), back.len());
            let header = VnetHdr::from_bytes(&header);
            assert_eq!((header.flags, header.gso_type, header.gso_size), (1, 1, 1400));
            assert_eq!((header.csum_start, header.csum_offset), (34, 16));
            guest.post(128);
        }
        guest.stop();
    }
}

/// Without offloads of the guest's, the host's kernel segments and completes checksums.
fn what_the_guest_does_not_take_undone_is_done() {
    let tap = Tap::open("kl0", 1, None).unwrap();
    let (engine, host) = (engine(Pacing::Event), Host::on("kl0"));
    let mut guest = Guest::on(&tap, &engine, MRG_RXBUF, 256, 2048);
    guest.post(256);
    host.send(short(&tso(1448)), &segments(HOST_MAC, GUEST_MAC, 10_000));
    let mut payload = 0;
    while payload < 10_000 {
        let (header, bytes) = guest.wait();
        let header = VnetHdr::from_bytes(&header);
        assert_eq!((header.flags, header.gso_type), (0, 0));
        let packet = etherparse::SlicedPacket::from_ethernet(&bytes).unwrap();
        let (Some(etherparse::NetSlice::Ipv4(v4)), Some(etherparse::TransportSlice::Tcp(tcp))) =
            (packet.net, packet.transport)
        else {
            panic!("no segment")
        };
        let right = tcp.to_header().calc_checksum_ipv4(&v4.header().to_header(), tcp.payload()).unwrap();
        assert_eq!(tcp.checksum(), right);
        assert!(tcp.payload().len() <= 1448);
        payload += tcp.payload().len();
    }
    assert_eq!(payload, 10_000);
    guest.stop();
}

/// UDP from the guest to 10.9.0.1, port 7000, its checksum right, partial or wrong.
fn datagram(body: &[u8]) -> Vec<u8> {
    let builder = etherparse::PacketBuilder::ethernet2(GUEST_MAC, HOST_MAC)
        .ipv4([10, 9, 0, 2], [10, 9, 0, 1], 64)
        .udp(9, 7000);
    let mut bytes = Vec::new();
    builder.write(&mut bytes, body).unwrap();
    bytes
}

fn checksums_left_undone_are_right_for_the_host() {
    let tap = Tap::open("kl0", 1, None).unwrap();
    ip("link set kl0 address 02:00:00:00:00:01");
    ip("addr add 10.9.0.1/24 dev kl0");
    ip("neigh add 10.9.0.2 lladdr 02:00:00:00:00:02 dev kl0");
    let engine = engine(Pacing::Event);
    let mut guest = Guest::on(&tap, &engine, MRG_RXBUF | CSUM | GUEST_CSUM, 64, 2048);
    guest.post(64);
    let socket = UdpSocket::bind("10.9.0.1:7000").unwrap();
    socket.set_read_timeout(Some(host::LIMIT)).unwrap();
    let mut into = [0; 100];
    // Partial: the kernel takes it as right.
    let mut bytes = datagram(b"partial");
    let sum = pseudo_sum(&bytes);
    bytes[40..42].copy_from_slice(&sum.to_be_bytes());
    let header = VnetHdr { flags: 1, csum_start: 34, csum_offset: 6, ..VnetHdr::default() };
    guest.send(header.to_bytes(), &bytes, 20);
    let n = socket.recv(&mut into).unwrap();
    assert_eq!(&into[..n], b"partial");
    // The same without the header is wrong and is dropped; the one behind it arrives.
    guest.send([0; HEADER], &bytes, 20);
    guest.send([0; HEADER], &datagram(b"whole"), 20);
    let n = socket.recv(&mut into).unwrap();
    assert_eq!(&into[..n], b"whole");
    // The host leaves it to the guest.
    socket.send_to(b"to the guest", "10.9.0.2:9").unwrap();
    let (header, bytes) = guest.wait();
    let header = VnetHdr::from_bytes(&header);
    assert_eq!((header.flags, header.csum_start, header.csum_offset), (1, 34, 6));
    assert!(bytes.ends_with(b"to the guest"));
    assert!(Packet::parse(&bytes, bytes.len()).is_ok());
    guest.stop();
}

fn several_queues_carry_flows_and_stopped_ones_none() {
    let tap = Tap::open("kl0", 2, None).unwrap();
    let (engine, host) = (engine(Pacing::Event), Host::on("kl0"));
    let mut guests = [0, 1].map(|pair| Guest::on_pair(pair, &tap, &engine, MRG_RXBUF, 256, 1600));
    for (at, guest) in guests.iter_mut().enumerate() {
        guest.post(256);
        let out = frame(GUEST_MAC, HOST_MAC, 200, at as u32);
        guest.send([0; HEADER], &out, 14);
        assert_eq!(host.wait().1, out);
    }
    let flow = |port: u16| {
        let builder = etherparse::PacketBuilder::ethernet2(HOST_MAC, GUEST_MAC)
            .ipv4([10, 9, 0, 1], [10, 9, 0, 2], 64)
            .udp(port, 7000);
        let mut bytes = Vec::new();
        builder.write(&mut bytes, b"flow").unwrap();
        bytes
    };
    let arrive = |guests: &mut [Guest; 2]| {
        let mut counts = [0, 0];
        (0..100).for_each(|n| host.send(PLAIN, &flow(1000 + n)));
        until("all flows", || {
            for (guest, count) in guests.iter_mut().zip(&mut counts) {
                while guest.receive().is_some() {
                    *count += 1;
                }
            }
            counts[0] + counts[1] == 100
        });
        counts
    };
    let counts = arrive(&mut guests);
    assert!(counts[0] > 0 && counts[1] > 0, "{counts:?}");
    // The driver goes over to one pair (`ethtool -L`).
    guests[1].stop();
    std::thread::sleep(Duration::from_millis(100));
    assert_eq!(arrive(&mut guests), [100, 0]);
    guests[1].start(&tap, &engine);
    guests[1].post(256);
    let counts = arrive(&mut guests);
    assert!(counts[0] > 0 && counts[1] > 0, "{counts:?}");
    let _: &Arc<Tap> = &tap;
}
