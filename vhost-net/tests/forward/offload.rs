//! Guests that leave checksums and segmentation to others, and guests that do not take that.

use std::net::Ipv4Addr;

use etherparse::{NetSlice, PacketBuilder, SlicedPacket, TransportSlice};
use vhost_net::features::{CSUM, GUEST_CSUM, GUEST_TSO4, HOST_TSO4, MRG_RXBUF};
use vhost_net::header::VnetHdr;
use vhost_net::stats::Drop;

use crate::guest::{Back, mac};
use crate::peer::until;

const NEEDS_CSUM: u8 = 1;
const TCPV4: u8 = 1;

/// TCP over IPv4 whose checksum is that of the pseudo header, as drivers leave it.
pub fn partial(payload: &[u8]) -> Vec<u8> {
    let (from, to) = ([10, 0, 0, 1], [10, 0, 0, 2]);
    let builder = PacketBuilder::ethernet2(mac(0).0, mac(1).0).ipv4(from, to, 64).tcp(1000, 2000, 7, 4096);
    let mut frame = vec![];
    builder.write(&mut frame, payload).unwrap();
    let words = [from, to].concat().chunks(2).map(|w| u32::from(w[0]) << 8 | u32::from(w[1])).sum::<u32>();
    let mut sum = words + 6 + 20 + payload.len() as u32;
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    frame[50..52].copy_from_slice(&(sum as u16).to_be_bytes());
    // To everybody.
    frame[..6].fill(0xff);
    frame[6..12].copy_from_slice(&mac(0).0);
    frame
}

pub fn header(gso_size: u16) -> VnetHdr {
    VnetHdr {
        flags: NEEDS_CSUM,
        gso_type: if gso_size > 0 { TCPV4 } else { 0 },
        hdr_len: 54,
        gso_size,
        csum_start: 34,
        csum_offset: 16,
        num_buffers: 0,
    }
}

pub fn with(header: VnetHdr, frame: &[u8]) -> Vec<u8> {
    [&header.to_bytes()[..], frame].concat()
}

/// The payload and the sequence number of a frame that is right in every checksum.
fn tcp(frame: &[u8]) -> (Vec<u8>, u32) {
    let sliced = SlicedPacket::from_ethernet(frame).unwrap();
    let (Some(NetSlice::Ipv4(ip)), Some(TransportSlice::Tcp(tcp))) = (sliced.net, sliced.transport) else {
        panic!("no TCP: {frame:x?}");
    };
    let header = ip.header().to_header();
    assert_eq!(header.header_checksum, header.calc_header_checksum());
    assert_eq!(header.destination, Ipv4Addr::new(10, 0, 0, 2).octets());
    let sum = tcp.to_header().calc_checksum_ipv4(&header, tcp.payload()).unwrap();
    assert_eq!(tcp.checksum(), sum);
    (tcp.payload().to_vec(), tcp.sequence_number())
}

/// One sender, and behind the other ports: who takes everything, who takes partial checksums, who takes nothing, and who
/// takes nothing and has a tag on it.
#[test]
fn each_receiver_gets_what_it_takes() {
    let back = Back::start(&["vlan=5", "vlan=5", "vlan=5", "vlan=5", "trunk=5"], 1, 1);
    let sends = MRG_RXBUF | CSUM | HOST_TSO4;
    let mut sender = back.guest_with(0, 1, sends);
    let mut all = back.guest_with(1, 1, MRG_RXBUF | GUEST_CSUM | GUEST_TSO4);
    let mut sums = back.guest_with(2, 1, MRG_RXBUF | GUEST_CSUM);
    let mut nothing = [back.guest_with(3, 1, 0), back.guest_with(4, 1, MRG_RXBUF)];

    for len in [0, 1, 73, 74, 75, 1000, 1900, 5001usize] {
        let payload: Vec<u8> = (0..len).map(|i| (i * 7 % 251) as u8).collect();
        let frame = partial(&payload);
        // In one piece where it is large, as a guest without that feature would have it in a buffer.
        let gso_size = if len > 1900 { 1400 } else { 0 };
        sender.send_raw(0, &with(header(gso_size), &frame));
        let expected = VnetHdr { hdr_len: if gso_size > 0 { 54 } else { 0 }, ..header(gso_size) };
        let (got, same) = all.await_offload();
        assert_eq!(VnetHdr { num_buffers: 0, ..got }, expected);
        assert_eq!(same, frame);
        let segments = if gso_size > 0 { len.div_ceil(1400) } else { 1 };
        if gso_size == 0 {
            let (got, same) = sums.await_offload();
            assert_eq!(VnetHdr { num_buffers: 0, ..got }, expected);
            assert_eq!(same, frame);
        } else {
            let frames = sums.await_frames(segments);
            assert_eq!(frames.concat().len(), frame.len() + (segments - 1) * 54);
        }
        for (guest, tag) in nothing.iter_mut().zip([0, 4]) {
            let mut sequence = 7;
            let mut bytes = vec![];
            for frame in guest.await_frames(segments) {
                assert_eq!(frame[12..14], if tag > 0 { [0x81, 0] } else { [8, 0] });
                let (payload, at) = tcp(&frame);
                assert_eq!(at, sequence);
                sequence += payload.len() as u32;
                bytes.extend(payload);
            }
            assert_eq!(bytes, payload);
        }
    }
}

#[test]
fn headers_that_lie_go_nowhere() {
    let back = Back::start(&["", ""], 1, 1);
    let mut sender = back.guest_with(0, 1, MRG_RXBUF | CSUM | HOST_TSO4);
    let mut receiver = back.guest(1, 1);
    let frame = partial(&[1; 3000]);
    let lies = [
        VnetHdr { csum_start: 4000, ..header(0) },
        VnetHdr { csum_start: 33, ..header(0) },
        VnetHdr { csum_offset: u16::MAX, ..header(0) },
        VnetHdr { gso_size: 0, ..header(1) },
        VnetHdr { flags: 0, ..header(1000) },
        VnetHdr { gso_type: 4, ..header(1000) },
        VnetHdr { gso_type: 5, ..header(1000) },
        VnetHdr { gso_type: 0x81, ..header(1000) },
        VnetHdr { gso_type: 77, ..header(1000) },
    ];
    for lie in lies {
        sender.send_raw(0, &with(lie, &frame));
    }
    // UDP that says it is TCP.
    let mut udp = frame.clone();
    udp[23] = 17;
    sender.send_raw(0, &with(header(1000), &udp));
    until("all to be taken", || sender.all_sent());
    assert_eq!(back.hub.ports()[0].pairs[0].tx_drops(Drop::BadHeader), lies.len() as u64 + 1);
    receiver.receive();
    assert!(receiver.got.is_empty());
    // A header length that lies is a hint that nobody took.
    sender.send_raw(0, &with(VnetHdr { hdr_len: 0, ..header(1000) }, &frame));
    assert_eq!(receiver.await_frames(3).iter().map(|f| tcp(f).0.len()).sum::<usize>(), 3000);
}
