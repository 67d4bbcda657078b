//! Guests on a switch that is joined to an interface, and somebody at the other end of the wire.

use vhost_net::header::VnetHdr;
use vhost_net::mac::MacAddr;
use vhost_net::port::Uplink;
use vhost_net::port::af_packet::AfPacket;
use vhost_net::port::af_xdp::AfXdp;
use vhost_net::switch::PortId;

use crate::Test;
use crate::guest::{Back, mac};
use crate::pair;

pub const TESTS: &[Test] = &[
    ("switched::guests_talk_to_the_outside_by_packet_sockets", packet),
    ("switched::guests_talk_to_the_outside_around_the_stack", xdp),
    ("switched::the_link_goes_and_comes_back", link),
];

pub const FAR: MacAddr = MacAddr([2, 0, 0, 0, 0, 9]);
pub const UPLINK: PortId = PortId(2);

pub fn frame(dst: MacAddr, src: MacAddr, fill: u8, len: usize) -> Vec<u8> {
    let mut frame = [dst.0, src.0].concat();
    frame.extend([0x88, 0xb5]);
    frame.resize(len, fill);
    frame
}

pub fn send(far: &mut AfPacket, frame: &[u8]) {
    far.send(&VnetHdr::default(), frame.len(), frame, &mut std::iter::empty()).unwrap();
    far.flush();
}

fn packet() {
    for reactors in [1, 2] {
        pair::make();
        talk(Box::new(AfPacket::open("near").unwrap()), "far", reactors);
        pair::ip("link del near");
    }
}

fn xdp() {
    pair::make();
    talk(Box::new(AfXdp::open("near", 0).unwrap()), "far", 1);
}

pub fn talk(uplink: Box<dyn Uplink>, far: &str, reactors: usize) {
    let back = Back::start_with(&["", ""], 2, reactors, Some(uplink));
    let mut far = AfPacket::open(far).unwrap();
    let mut guests = [back.guest(0, 2), back.guest(1, 2)];
    pair::until(|| back.switch.is_up(UPLINK));
    // Nobody knows anybody yet: to all.
    let hello = frame(MacAddr::BROADCAST, mac(0), 1, 60);
    guests[0].send(0, &hello);
    assert_eq!(guests[1].await_frames(1)[0], hello);
    assert_eq!(pair::receive(&mut far, 1)[0].1, hello);
    for (round, len) in [60, 127, 128, 129, 700, 1514].into_iter().enumerate() {
        let at = round % 2;
        // In, to one guest and no other.
        let inward = frame(mac(at), FAR, round as u8, len);
        if round == 1 {
            // From its first frame on, this one is known by its address.
            guests[1].send(1, &frame(MacAddr::BROADCAST, mac(1), 7, 60));
            guests[0].await_frames(1);
            pair::receive(&mut far, 1);
        }
        send(&mut far, &inward);
        assert_eq!(guests[at].await_frames(1), [inward]);
        // Out, from either pair of queues, to nobody else.
        let outward = frame(FAR, mac(at), 0x80 | round as u8, len);
        guests[at].send(round / 2 % 2, &outward);
        assert_eq!(pair::receive(&mut far, 1)[0].1, outward);
    }
    for guest in &mut guests {
        guest.receive();
        assert!(guest.got.is_empty(), "guest {} got {:x?}", guest.at, guest.got);
    }
    assert!(pair::is_quiet(&mut far));
    let out = &back.hub.ports[2].pairs[0];
    assert_eq!((out.rx_packets.get(), out.tx_packets.get()), (8, 6));
}

fn link() {
    pair::make();
    let back = Back::start_with(&["", ""], 1, 1, Some(Box::new(AfPacket::open("near").unwrap())));
    let mut guests = [back.guest(0, 1), back.guest(1, 1)];
    pair::until(|| back.switch.is_up(UPLINK));
    pair::ip("link set far down");
    pair::until(|| !back.switch.is_up(UPLINK));
    // Guests go on.
    let hello = frame(MacAddr::BROADCAST, mac(0), 1, 60);
    guests[0].send(0, &hello);
    assert_eq!(guests[1].await_frames(1)[0], hello);
    pair::ip("link set far up");
    pair::until(|| back.switch.is_up(UPLINK));
    let mut far = AfPacket::open("far").unwrap();
    guests[0].send(0, &hello);
    assert_eq!(pair::receive(&mut far, 1)[0].1, hello);
}
