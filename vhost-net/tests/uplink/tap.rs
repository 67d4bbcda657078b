//! Guests on a switch that is joined to a tap, and the host at the other end of it.

use vhost_net::features::{CSUM, GUEST_CSUM, GUEST_TSO4, HOST_TSO4, MRG_RXBUF};
use vhost_net::header::{GSO_TCPV4, VnetHdr};
use vhost_net::mac::MacAddr;
use vhost_net::port::Uplink;
use vhost_net::port::af_packet::AfPacket;
use vhost_net::port::tap::uplink::TapUplink;

use crate::Test;
use crate::af_packet::segment;
use crate::guest::{Back, Guest, mac};
use crate::pair::{ip, is_quiet, receive, until};
use crate::switched::{FAR, UPLINK, frame, move_about, send, talk};

pub const TESTS: &[Test] = &[
    ("tap::guests_talk_to_the_host", guests_talk_to_the_host),
    ("tap::segments_of_64_kib_cross_in_one_piece", segments_of_64_kib_cross_in_one_piece),
    ("tap::frames_keep_their_order", frames_keep_their_order),
    ("tap::it_moves_when_its_reactor_ends", it_moves),
    ("tap::the_link_goes_and_comes_back", the_link_goes_and_comes_back),
];

fn guests_talk_to_the_host() {
    for reactors in [1, 2] {
        talk(Box::new(TapUplink::open("kl0", None).unwrap()), "kl0", reactors);
    }
}

fn it_moves() {
    move_about(Box::new(TapUplink::open("kl0", None).unwrap()), "kl0");
}

fn started(features: u64) -> (Back, Guest, AfPacket) {
    let uplink = TapUplink::open("kl0", None).unwrap();
    let back = Back::start_with(&["", ""], 1, 1, Some(Box::new(uplink)));
    let guest = back.guest_with(0, 1, MRG_RXBUF | features);
    until(|| back.switch.is_up(UPLINK));
    let far = AfPacket::open("kl0").unwrap();
    (back, guest, far)
}

/// A frame of TCP over IPv4 that is to be cut up, from one to the other.
fn large(dst: MacAddr, src: MacAddr, payload: usize) -> (VnetHdr, Vec<u8>) {
    let (header, mut frame) = segment(payload);
    frame[..6].copy_from_slice(&dst.0);
    frame[6..12].copy_from_slice(&src.0);
    (header, frame)
}

fn segments_of_64_kib_cross_in_one_piece() {
    let (back, mut guest, mut far) = started(CSUM | HOST_TSO4 | GUEST_CSUM | GUEST_TSO4);
    // The latter is what the kernel has at most.
    for payload in [3000, 65_535 - 54] {
        let (header, sent) = large(FAR, mac(0), payload);
        guest.send_raw(0, &[&header.to_bytes()[..], &sent].concat());
        let (said, got) = receive(&mut far, 1).remove(0);
        assert!(got == sent, "{} bytes for {}", got.len(), sent.len());
        assert_eq!((said.gso_type, said.gso_size, said.flags & 1), (GSO_TCPV4, 1448, 1));
        let (header, sent) = large(mac(0), FAR, payload);
        far.send(&header, sent.len(), &sent, &mut std::iter::empty()).unwrap();
        let (said, got) = guest.await_offload();
        assert!(got == sent, "{} bytes for {}", got.len(), sent.len());
        assert_eq!((said.gso_type, said.gso_size, said.flags & 1), (GSO_TCPV4, 1448, 1));
    }
    // One that does not take that gets what it takes.
    let mut plain = back.guest_with(1, 1, MRG_RXBUF);
    plain.send(0, &frame(MacAddr::BROADCAST, mac(1), 1, 60));
    receive(&mut far, 1);
    let (header, sent) = large(mac(1), FAR, 14_480);
    far.send(&header, sent.len(), &sent, &mut std::iter::empty()).unwrap();
    let frames = plain.await_frames(10);
    assert!(frames.iter().all(|frame| frame.len() == 1502), "{:?}", frames.iter().map(Vec::len));
}

/// Small ones, which wait for each other, among large ones, which do not.
fn frames_keep_their_order() {
    let (_back, mut guest, mut far) = started(CSUM | HOST_TSO4 | GUEST_CSUM | GUEST_TSO4);
    let (mut random, mut sent) = (7u32, 0);
    for round in 0..150 {
        let batch: Vec<_> = (0..8)
            .map(|n| {
                random = random.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                let len = (random >> 16) as usize;
                let (header, mut out) = match (round / 50 + len % 4) % 4 {
                    0 => large(FAR, mac(0), 1500 + len % 18_000),
                    _ => (VnetHdr::default(), frame(FAR, mac(0), n, 60 + len % 1455)),
                };
                let number = ((round * 8) as u32 + u32::from(n)).to_be_bytes();
                let at = out.len() - 4;
                out[at..].copy_from_slice(&number);
                (header, out)
            })
            .collect();
        for (header, out) in &batch {
            guest.send_raw(0, &[&header.to_bytes()[..], out].concat());
        }
        for ((_, got), (_, out)) in receive(&mut far, batch.len()).iter().zip(&batch) {
            assert!(got == out, "frame {sent} of {} bytes has become one of {}", out.len(), got.len());
            sent += 1;
        }
        let back: Vec<_> = batch
            .into_iter()
            .map(|(header, mut out)| {
                out[..6].copy_from_slice(&mac(0).0);
                out[6..12].copy_from_slice(&FAR.0);
                far.send(&header, out.len(), &out, &mut std::iter::empty()).unwrap();
                out
            })
            .collect();
        far.flush();
        for out in back {
            let (_, got) = guest.await_offload();
            assert!(got == out, "a frame of {} bytes has become one of {}", out.len(), got.len());
        }
    }
    assert!(is_quiet(&mut far));
}

fn the_link_goes_and_comes_back() {
    let (back, mut guest, mut far) = started(0);
    ip("link set kl0 down");
    until(|| !back.switch.is_up(UPLINK));
    ip("link set kl0 up");
    until(|| back.switch.is_up(UPLINK));
    let hello = frame(MacAddr::BROADCAST, mac(0), 1, 60);
    until(|| {
        guest.send(0, &hello);
        far.receive(1, &mut |_, got| assert_eq!(got, hello)) > 0
    });
    send(&mut far, &frame(mac(0), FAR, 2, 90));
    guest.await_frames(1);
    // One that is deleted and made anew.
    ip("link delete kl0");
    until(|| !back.switch.is_up(UPLINK));
    ip("tuntap add kl0 mode tap vnet_hdr");
    ip("link set kl0 up");
    until(|| back.switch.is_up(UPLINK));
    let mut far = AfPacket::open("kl0").unwrap();
    until(|| {
        guest.send(0, &hello);
        far.receive(1, &mut |_, got| assert_eq!(got, hello)) > 0
    });
    // The first may be lost while all are on their way back.
    until(|| {
        send(&mut far, &frame(mac(0), FAR, 3, 90));
        guest.receive();
        !guest.got.is_empty()
    });
    drop(back);
    ip("link delete kl0");
}
