//! What is done to frames in software, against `etherparse` and against plain code of the tests' own.

use etherparse::checksum::Sum16BitWords;
use etherparse::{NetSlice, SlicedPacket, TransportSlice};
use proptest::collection::vec;
use proptest::prelude::*;
use vhost_net::header::{Gso, Offload, Partial, Segmenting};
use vhost_net::offload::{Beginning, Segments, Sum, complete, segment};
use vhost_net::packet::{ETHERTYPE_VLAN, PEEK, Packet, Tag};

use super::support::{Shape, naive_sum, partial, shape};

const CWR: u8 = 0x80;
const FIN_PSH: u8 = 9;

/// The frame as a device has it: its first bytes, and the rest to be read.
fn seen(frame: &[u8]) -> (Packet<'_>, impl FnMut(usize, &mut [u8])) {
    let head = &frame[..frame.len().min(PEEK)];
    let read = move |at: usize, into: &mut [u8]| {
        assert!(at >= PEEK, "the first bytes are not read again");
        into.copy_from_slice(&frame[at..at + into.len()]);
    };
    (Packet::parse(head, frame.len()).unwrap(), read)
}

fn gso(shape: &Shape, size: u16) -> Gso {
    let kind = match (shape.tcp, shape.ipv6) {
        (true, false) => Segmenting::Tcp4,
        (true, true) => Segmenting::Tcp6,
        (false, false) => Segmenting::Udp4,
        (false, true) => Segmenting::Udp6,
    };
    Gso { kind, size, ecn: false, header_len: shape.headers() as u16 }
}

/// The segments that there should be, each built from nothing.
fn expected(shape: &Shape, size: usize) -> Vec<Vec<u8>> {
    let count = shape.payload.len().div_ceil(size);
    let cut = |(at, payload): (usize, &[u8])| {
        let without = if at == 0 { 0 } else { CWR } | if at + 1 == count { 0 } else { FIN_PSH };
        let segment = Shape {
            payload: payload.to_vec(),
            identification: shape.identification.wrapping_add(at as u16),
            sequence: shape.sequence.wrapping_add((at * size) as u32),
            tcp_flags: shape.tcp_flags & !without,
            ..shape.clone()
        };
        let (mut built, place) = (segment.build(), shape.transport() + shape.csum_offset());
        // Which of the two zeros TCP has is up to who sums.
        if built[place..place + 2] == [0, 0] {
            built[place..place + 2].fill(0xff);
        }
        built
    };
    shape.payload.chunks(size).enumerate().map(cut).collect()
}

/// All checksums of a frame are right, as etherparse sees it.
fn verify(frame: &[u8]) {
    let sliced = SlicedPacket::from_ethernet(frame).unwrap();
    let (mut pseudo, protocol) = match sliced.net.as_ref().unwrap() {
        NetSlice::Ipv4(ip) => {
            let header = ip.header().to_header();
            assert_eq!(header.calc_header_checksum(), header.header_checksum);
            let sum = Sum16BitWords::new();
            (sum.add_slice(&ip.header().source()).add_slice(&ip.header().destination()), header.protocol.0)
        }
        NetSlice::Ipv6(ip) => {
            let sum = Sum16BitWords::new();
            let sum = sum.add_slice(&ip.header().source()).add_slice(&ip.header().destination());
            (sum, ip.payload().ip_number.0)
        }
        NetSlice::Arp(_) => panic!("ARP"),
    };
    let whole = match sliced.transport.as_ref().unwrap() {
        TransportSlice::Tcp(tcp) => tcp.slice(),
        TransportSlice::Udp(udp) => udp.slice(),
        _ => panic!("neither TCP nor UDP"),
    };
    pseudo = pseudo.add_4bytes((whole.len() as u32).to_be_bytes()).add_2bytes([0, protocol]);
    assert_eq!(pseudo.add_slice(whole).ones_complement(), 0, "the checksum is wrong");
}

fn segments(frame: &[u8], gso: Gso) -> Vec<Vec<u8>> {
    let (packet, read) = seen(frame);
    let mut out = Vec::new();
    segment(&packet, gso, read, |headers, payload| out.push([headers, &frame[payload]].concat())).unwrap();
    out
}

proptest! {
    #[test]
    fn sums_are_the_same_however_they_are_cut(bytes in vec(any::<u8>(), 0..5000), cuts in vec(any::<prop::sample::Index>(), 0..6)) {
        let mut cuts: Vec<usize> = cuts.iter().map(|c| c.index(bytes.len() + 1)).collect();
        cuts.extend([0, bytes.len()]);
        cuts.sort_unstable();
        let mut sum = Sum::default();
        cuts.windows(2).for_each(|w| sum.add(&bytes[w[0]..w[1]]));
        prop_assert_eq!(sum.folded(), naive_sum(&bytes));
        prop_assert_eq!(sum.checksum(), Sum16BitWords::new().add_slice(&bytes).to_ones_complement_with_no_zero().to_be());
    }

    #[test]
    fn a_completed_checksum_is_the_right_one(shape in shape(6000)) {
        let mut frame = partial(&shape);
        let csum = Partial { start: shape.transport() as u16, offset: shape.csum_offset() as u16 };
        let (packet, read) = seen(&frame);
        let sum = complete(&packet, csum, read);
        frame[csum.place()..csum.place() + 2].copy_from_slice(&sum.to_be_bytes());
        verify(&frame);
    }

    #[test]
    fn segments_are_those_that_would_be_built(shape in shape(6000), size in 1..1500u16) {
        let out = segments(&partial(&shape), gso(&shape, size));
        let expected = expected(&shape, size.into());
        prop_assert_eq!(out.len(), expected.len());
        for (ours, theirs) in out.iter().zip(&expected) {
            verify(ours);
            prop_assert!(ours == theirs, "{:?}\n{:?}", ours, theirs);
        }
        // Put together again they are what they were cut from.
        let again: Vec<u8> = out.iter().flat_map(|s| &s[shape.headers()..]).copied().collect();
        prop_assert_eq!(again, shape.payload);
    }

    #[test]
    fn segments_with_partial_checksums_can_be_completed(shape in shape(3000), size in 100..1500u16) {
        let frame = partial(&shape);
        let (packet, _) = seen(&frame);
        let mut cut = Segments::new(&packet, gso(&shape, size)).unwrap();
        let csum = Partial { start: shape.transport() as u16, offset: shape.csum_offset() as u16 };
        for expected in expected(&shape, size.into()) {
            let payload = cut.next_payload().unwrap();
            let mut segment = cut.next_headers(None).to_vec();
            segment.extend(&frame[payload]);
            let (packet, read) = seen(&segment);
            let sum = complete(&packet, csum, read);
            segment[csum.place()..csum.place() + 2].copy_from_slice(&sum.to_be_bytes());
            prop_assert_eq!(segment, expected);
        }
        prop_assert!(cut.next_payload().is_none() && cut.next_headers(None).is_empty());
    }

    #[test]
    fn frames_of_random_bytes_are_never_worse_than_nothing(
        shape in shape(600),
        changes in vec((any::<prop::sample::Index>(), any::<u8>()), 0..8),
        size in 0..2000u16,
        header_len in any::<Option<u8>>(),
        other in any::<(bool, bool)>(),
    ) {
        let mut frame = partial(&shape);
        for (at, to) in changes {
            let at = at.index(frame.len());
            frame[at] = to;
        }
        let Ok(packet) = Packet::parse(&frame[..frame.len().min(PEEK)], frame.len()) else { return Ok(()) };
        let mut gso = gso(&shape, size);
        if size % 2 == 0 {
            gso.kind = super::offload::gso(&Shape { ipv6: other.0, tcp: other.1, ..shape.clone() }, size).kind;
        }
        gso.header_len = header_len.map_or(gso.header_len, u16::from);
        let mut total = 0;
        let _ = segment(&packet, gso, |_, into| into.fill(0), |headers, payload| total += headers.len().min(1) * payload.len());
        prop_assert!(total <= frame.len());
    }

    #[test]
    fn tags_come_and_go(shape in shape(300), tci in any::<u16>()) {
        let frame = partial(&shape);
        let tag = Tag { tpid: ETHERTYPE_VLAN, tci };
        let apply = |b: &Beginning, frame: &[u8]| [b.bytes(), &frame[b.skip()..]].concat();
        let (packet, _) = seen(&frame);
        let push = Beginning::push(&packet, tag);
        let tagged = apply(&push, &frame);
        let (packet, _) = seen(&tagged);
        prop_assert_eq!(packet.tag(), Some(tag));
        prop_assert_eq!(&tagged[16..], &frame[12..]);
        let other = Tag { tci: !tci, ..tag };
        let replaced = apply(&Beginning::replace(&packet, other), &tagged);
        prop_assert_eq!(seen(&replaced).0.tag(), Some(other));
        let pop = Beginning::pop(&packet);
        prop_assert_eq!(apply(&pop, &tagged), frame);
        // The offload moves along, and back again.
        let csum = Some(Partial { start: shape.transport() as u16, offset: 16 });
        let offload = Offload { csum, gso: Some(gso(&shape, 500)) };
        let moved = push.offload(offload);
        prop_assert_eq!(usize::from(moved.csum.unwrap().start), shape.transport() + 4);
        prop_assert_eq!(usize::from(moved.gso.unwrap().header_len), shape.headers() + 4);
        prop_assert_eq!(pop.offload(moved), offload);
        prop_assert_eq!(Beginning::replace(&packet, other).offload(moved), moved);
    }
}

#[test]
fn the_largest_frame_is_cut() {
    for ipv6 in [false, true] {
        let shape = Shape {
            tags: vec![7, 8],
            ipv6,
            tcp: true,
            network_options: 0,
            tcp_options: 3,
            tcp_flags: 0x98 | 1,
            identification: 0xfffe,
            sequence: u32::MAX - 3000,
            ecn: 2,
            payload: (0..65_535 - 20 - 32).map(|i| (i * 7) as u8).collect(),
        };
        let out = segments(&partial(&shape), gso(&shape, 1448));
        assert_eq!(out, expected(&shape, 1448));
        for segment in &out {
            verify(segment);
        }
    }
}

#[test]
fn a_sum_of_zero_is_said_as_ones() {
    let mut sum = Sum::default();
    sum.add(&[0xff, 0xff]);
    assert_eq!((sum.folded(), sum.checksum()), (0xffff, 0xffff));
}

#[test]
fn frames_are_cut_as_what_they_are_only() {
    for (ipv6, tcp) in [(false, false), (false, true), (true, false), (true, true)] {
        let of = |ipv6, tcp| Shape {
            tags: vec![],
            ipv6,
            tcp,
            network_options: 0,
            tcp_options: 0,
            tcp_flags: 0,
            identification: 0,
            sequence: 0,
            ecn: 0,
            payload: vec![1; 100],
        };
        let shape = of(ipv6, tcp);
        let frame = partial(&shape);
        let (packet, _) = seen(&frame);
        let right = gso(&shape, 10);
        for (other_ipv6, other_tcp) in [(false, false), (false, true), (true, false), (true, true)] {
            let kind = gso(&of(other_ipv6, other_tcp), 10).kind;
            let is_cut = Segments::new(&packet, Gso { kind, ..right }).is_some();
            assert_eq!(is_cut, kind == right.kind, "{kind:?} of {:?}", right.kind);
        }
        assert!(Segments::new(&packet, Gso { size: 0, ..right }).is_none());
        assert!(Segments::new(&packet, Gso { header_len: right.header_len + 1, ..right }).is_none());
    }
}
