//! Guests on a switch that is joined to an interface, and somebody at the other end of the wire.

use pcap_file::pcapng::{Block, PcapNgReader};
use vhost_net::header::VnetHdr;
use vhost_net::mac::MacAddr;
use vhost_net::pcap::{Capture, CaptureConfig};
use vhost_net::port::Uplink;
use vhost_net::port::af_packet::AfPacket;
use vhost_net::port::af_xdp::AfXdp;
use vhost_net::stats::DROPS;
use vhost_net::switch::PortId;

use crate::Test;
use crate::guest::{Back, mac};
use crate::pair;

pub const TESTS: &[Test] = &[
    ("switched::guests_talk_to_the_outside_by_packet_sockets", packet),
    ("switched::guests_talk_to_the_outside_around_the_stack", xdp),
    ("switched::the_link_goes_and_comes_back", link),
    ("switched::the_uplink_moves_when_its_reactor_ends", moves),
    ("switched::a_capture_has_what_crosses_the_uplink", captured),
    ("switched::guests_that_are_told_a_larger_mtu_are_warned_of", larger_mtu),
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

fn moves() {
    pair::make();
    move_about(Box::new(AfPacket::open("near").unwrap()), "far");
    pair::ip("link del near");
    pair::make();
    move_about(Box::new(AfXdp::open("near", 0).unwrap()), "far");
}

/// With frames on their way in both directions at each move.
pub fn move_about(uplink: Box<dyn Uplink>, far: &str) {
    let back = Back::start_with(&["", "wait=on"], 1, 1, Some(uplink));
    let mut far = AfPacket::open(far).unwrap();
    let mut guests = [back.guest(0, 1), back.guest(1, 1)];
    pair::until(|| back.switch.is_up(UPLINK));
    guests[0].send(0, &frame(MacAddr::BROADCAST, mac(0), 1, 60));
    guests[1].await_frames(1);
    pair::receive(&mut far, 1);
    send(&mut far, &frame(MacAddr::BROADCAST, FAR, 1, 60));
    for guest in &mut guests {
        guest.await_frames(1);
    }
    let dropped = |from: usize, to: usize| {
        let (from, to) = (back.hub.port(from), back.hub.port(to));
        let drops = |why| from.pairs[0].tx_drops(why) + to.pairs[0].rx_drops(why);
        DROPS.iter().map(|(why, _)| drops(*why)).sum::<u64>() as usize
    };
    let mut at = 0;
    for round in 0..20u8 {
        const SENT: usize = 8;
        let new = back.add_reactor();
        if round % 2 == 0 {
            // Then it is not where the uplink is.
            back.move_queues(0, 0..2, new);
        }
        let before = [dropped(0, 2), dropped(2, 0)];
        for n in 0..SENT {
            send(&mut far, &frame(mac(0), FAR, round, 60 + n));
            guests[0].send(0, &frame(FAR, mac(0), round, 60 + n));
        }
        back.retire(at);
        at = new;
        let (mut inward, mut outward) = (vec![], vec![]);
        pair::until(|| {
            guests[0].receive();
            inward.append(&mut guests[0].got);
            far.receive(SENT, &mut |_, frame| outward.push(frame.to_vec()));
            let lost = [dropped(0, 2) - before[0], dropped(2, 0) - before[1]];
            outward.len() + lost[0] == SENT && inward.len() + lost[1] == SENT
        });
        // Each once, and in order.
        for frames in [&inward, &outward] {
            assert!(frames.iter().is_sorted_by(|a, b| a.len() < b.len()), "round {round}: {frames:x?}");
        }
        let last = frame(FAR, mac(0), round, 200);
        guests[0].send(0, &last);
        assert_eq!(pair::receive(&mut far, 1)[0].1, last);
        let last = frame(mac(0), FAR, round, 200);
        send(&mut far, &last);
        assert_eq!(guests[0].await_frames(1), [last]);
    }
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
    let out = &back.hub.ports()[2].pairs[0];
    assert_eq!((out.rx_packets.get(), out.tx_packets.get()), (8, 6));
}

/// What comes in is outbound at its interface, as what a guest sends is at the guest's.
fn captured() {
    use pcap_file::pcapng::blocks::enhanced_packet::EnhancedPacketOption::Flags;
    pair::make();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("capture");
    let capture = Capture::create(&path, &["a", "near"], CaptureConfig::default()).unwrap();
    capture.keep();
    let uplink: Box<dyn Uplink> = Box::new(AfPacket::open("near").unwrap());
    let back = Back::start_captured(&[""], 1, 1, Some(uplink), Some(&capture));
    let mut far = AfPacket::open("far").unwrap();
    let mut guest = back.guest(0, 1);
    pair::until(|| back.switch.is_up(PortId(1)));
    let hello = frame(MacAddr::BROADCAST, mac(0), 1, 60);
    guest.send(0, &hello);
    assert_eq!(pair::receive(&mut far, 1)[0].1, hello);
    let inward = frame(mac(0), FAR, 2, 1514);
    send(&mut far, &inward);
    assert_eq!(guest.await_frames(1), std::slice::from_ref(&inward));
    drop(back);
    drop(capture);
    let mut seen = vec![];
    let mut reader = PcapNgReader::new(std::fs::File::open(&path).unwrap()).unwrap();
    while let Some(block) = reader.next_block() {
        let Block::EnhancedPacket(packet) = block.unwrap() else { continue };
        let way =
            packet.options.iter().find_map(|o| if let Flags(flags) = o { Some(flags & 3) } else { None });
        seen.push((packet.interface_id, way.unwrap(), packet.data.to_vec()));
    }
    let (inbound, outbound) = (1, 2);
    for (interface, way, bytes) in
        [(0, outbound, &hello), (1, inbound, &hello), (1, outbound, &inward), (0, inbound, &inward)]
    {
        let is_it = |(i, w, b): &&(u32, u32, Vec<u8>)| (*i, *w, b) == (interface, way, bytes);
        assert_eq!(seen.iter().filter(is_it).count(), 1, "interface {interface}, way {way}");
    }
}

fn larger_mtu() {
    use std::io::{BufRead, BufReader};
    pair::make();
    let dir = tempfile::tempdir().unwrap();
    let port = format!("--port=socket-path={}", dir.path().join("a").display());
    let mut child = std::process::Command::new(env!("CARGO_BIN_EXE_vhost-net"))
        .args(["--switch", "--mtu=9000", "--uplink=af-packet=near", &port])
        .stderr(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let lines = BufReader::new(child.stderr.take().unwrap()).lines().map_while(Result::ok);
    let said: Vec<String> = lines.take_while(|line| !line.contains("serving ")).collect();
    child.kill().unwrap();
    child.wait().unwrap();
    let warning = "uplink near has an MTU of 1500, and guests are told 9000: what is longer does not leave by it; \
                   ip link set near mtu 9000, or --mtu 1500";
    assert_eq!(said.iter().filter(|line| line.contains(warning)).count(), 1, "{said:?}");
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
