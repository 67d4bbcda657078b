//! Guests that send frames to each other through the switch, from the driver's side of their rings.

#[path = "../../../poll-engine/tests/support/peer.rs"]
mod peer;

mod burst;
mod capture;
mod control;
mod guest;
mod kept;
mod live;
mod loopback;
mod moving;
mod offload;
mod patience;

use std::time::{Duration, Instant};

use guest::{Back, Guest, mac};
use peer::until;
use vhost_net::mac::MacAddr;
use vhost_net::switch::PortId;

/// (from, tag) to (to, tag) each.
type Row = ((usize, Option<u16>), &'static [(usize, Option<u16>)]);

const BROADCAST: MacAddr = MacAddr::BROADCAST;

/// A frame of `len` bytes whose payload is of one byte.
fn frame(dst: MacAddr, src: MacAddr, vid: Option<u16>, fill: u8, len: usize) -> Vec<u8> {
    let mut frame = [dst.0, src.0].concat();
    frame.extend(vid.into_iter().flat_map(|vid| [0x81, 0, (vid >> 8) as u8, vid as u8]));
    frame.extend([0x88, 0xb5]);
    frame.resize(len, fill);
    frame
}

/// Nothing has come to a guest, after everybody has been heard.
fn expect_nothing(guest: &mut Guest) {
    guest.receive();
    assert!(guest.got.is_empty(), "guest {} got {:x?}", guest.at, guest.got);
}

fn learn(guests: &mut [Guest]) {
    for at in 0..guests.len() {
        guests[at].send(0, &frame(BROADCAST, mac(at), None, 0, 60));
        for (_, other) in guests.iter_mut().enumerate().filter(|(i, _)| *i != at) {
            other.await_frames(1);
        }
    }
}

#[test]
fn a_frame_comes_to_whom_it_is_for_whole_and_alone() {
    let back = Back::start(&["", "", ""], 1, 1);
    let mut guests: Vec<_> = (0..3).map(|at| back.guest(at, 1)).collect();
    learn(&mut guests);
    for len in [14, 59, 60, 115, 116, 127, 128, 129, 141, 1514, 2000] {
        for (from, to) in [(0, 1), (1, 2), (2, 0), (0, 2)] {
            let sent = frame(mac(to), mac(from), None, len as u8, len);
            guests[from].send(0, &sent);
            assert_eq!(guests[to].await_frames(1), [sent]);
        }
    }
    guests.iter_mut().for_each(expect_nothing);
    assert_eq!(back.switch.fdb().dump().count(), 3);
}

/// Two access ports of one VLAN, one of another, a trunk, two isolated ones, and one that knows nothing of VLANs. Broadcast
/// from each, with several tags, arrives where the rules let it, tagged as they say. Nobody's memory gets anywhere else.
#[test]
fn frames_reach_only_where_rules_let_them() {
    let rules =
        ["vlan=5", "vlan=5", "vlan=6", "trunk=6,native=5", "vlan=6,isolated=on", "vlan=6,isolated=on"];
    for reactors in [1, 2] {
        let back = Back::start(&rules, 2, reactors);
        let mut guests: Vec<_> = (0..rules.len()).map(|at| back.guest(at, 2)).collect();
        let table: [Row; 8] = [
            ((0, None), &[(1, None), (3, None)]),
            ((0, Some(6)), &[]),
            ((1, Some(5)), &[]),
            ((2, None), &[(3, Some(6)), (4, None), (5, None)]),
            ((3, None), &[(0, None), (1, None)]),
            ((3, Some(6)), &[(2, None), (4, None), (5, None)]),
            ((3, Some(7)), &[]),
            ((4, None), &[(2, None), (3, Some(6))]),
        ];
        for round in 0..40 {
            let ((from, vid), to) = table[round % table.len()];
            let (pair, fill, len) = (round / 2 % 2, round as u8, 60 + 37 * round);
            guests[from]
                .send(pair, &frame(BROADCAST, mac(from), vid, fill, len + if vid.is_some() { 4 } else { 0 }));
            for &(at, vid) in to {
                let len = len + if vid.is_some() { 4 } else { 0 };
                assert_eq!(
                    guests[at].await_frames(1),
                    [frame(BROADCAST, mac(from), vid, fill, len)],
                    "to {at}"
                );
            }
            until("the frame to be taken", || guests[from].all_sent());
        }
        for guest in &mut guests {
            expect_nothing(guest);
            guest.check_memory(rules.len());
        }
        assert_eq!(back.drops(0, "rx_vlan") + back.drops(1, "rx_vlan") + back.drops(3, "rx_vlan"), 15);
    }
}

#[test]
fn a_guest_that_is_gone_is_forgotten_and_comes_back() {
    let back = Back::start(&["", "", ""], 1, 1);
    let mut guests: Vec<_> = (0..3).map(|at| back.guest(at, 1)).collect();
    learn(&mut guests);
    drop(guests.remove(1));
    until("the port to go down", || !back.switch.is_up(PortId(1)));
    assert_eq!(back.switch.fdb().entries(PortId(1)), 0);
    // Nobody knows where it is, so that everybody is asked.
    let sent = frame(mac(1), mac(0), None, 1, 100);
    guests[0].send(0, &sent);
    assert_eq!(guests[1].await_frames(1), [sent.as_slice()]);
    let mut again = back.guest(1, 1);
    guests[0].send(0, &sent);
    assert_eq!(again.await_frames(1), [sent.as_slice()]);
    // Down by the administrator's will: neither comes anything in nor goes out.
    back.hub.set_link(1, false);
    again.send(0, &frame(BROADCAST, mac(1), None, 2, 60));
    until("the frame to be taken", || again.all_sent());
    guests[0].send(0, &sent);
    until("the frame to be taken", || guests[0].all_sent());
    expect_nothing(&mut again);
    assert_eq!(back.drops(1, "rx_link_down"), 1);
    back.hub.set_link(1, true);
    guests[0].send(0, &sent);
    assert_eq!(again.await_frames(1), [sent]);
}

#[test]
fn what_is_no_frame_costs_its_sender_only() {
    let back = Back::start(&["guard=on,ip=10.0.0.1", "", ""], 1, 1);
    let mut guests: Vec<_> = (0..3).map(|at| back.guest(at, 1)).collect();
    for len in 1..26 {
        guests[1].send_raw(0, &vec![0xff; len]);
    }
    // Another's address, an address that nobody has, a group that bridges do not forward, and IP of somebody else.
    let mut ip = frame(BROADCAST, mac(0), None, 0, 60);
    ip[12..15].copy_from_slice(&[8, 0, 0x45]);
    for bad in [frame(BROADCAST, mac(1), None, 0, 60), frame(BROADCAST, mac(0), None, 0, 60), ip.clone()] {
        guests[0].send(0, &bad);
    }
    guests[1].send(0, &frame(BROADCAST, BROADCAST, None, 0, 60));
    guests[1].send(0, &frame(MacAddr([1, 0x80, 0xc2, 0, 0, 2]), mac(1), None, 0, 60));
    until("all to be taken", || guests[0].all_sent() && guests[1].all_sent());
    guests.iter_mut().for_each(expect_nothing);
    let names = ["rx_guard_mac", "rx_guard_protocol", "rx_guard_ip"];
    assert_eq!(names.map(|name| back.drops(0, name)), [1, 1, 1]);
    assert_eq!(back.drops(1, "rx_bad_source") + back.drops(1, "rx_reserved_group"), 2);
    ip[26..30].copy_from_slice(&[10, 0, 0, 1]);
    guests[0].send(0, &ip);
    assert_eq!(guests[1].await_frames(1), [ip.as_slice()]);
    assert_eq!(guests[2].await_frames(1), [ip]);
}

#[test]
fn a_receiver_without_buffers_loses_its_frames_or_has_the_sender_wait() {
    let back = Back::start(&["", "wait", ""], 1, 1);
    let mut sender = back.guest(0, 1);
    let mut slow = [back.idle_guest(1, 1), back.idle_guest(2, 1)];
    for at in [1, 2] {
        slow[at - 1].send(0, &frame(BROADCAST, mac(at), None, 0, 60));
        sender.await_frames(1);
    }
    let lost = frame(mac(2), mac(0), None, 1, 60);
    sender.send(0, &lost);
    until("the frame to be dropped", || sender.all_sent());
    let no_buffers = back.hub.ports()[2].pairs[0].rx_drops(vhost_net::stats::Drop::NoBuffers);
    assert_eq!(no_buffers, 2, "this one, and what the other has sent to all");
    let (first, second) = (frame(mac(1), mac(0), None, 2, 60), frame(mac(1), mac(0), None, 3, 60));
    sender.send(0, &first);
    sender.send(0, &second);
    until("the sender to wait", || back.hub.ports()[0].pairs[0].tx_waits.get() > 0);
    let map = std::sync::Arc::clone(&slow[0].map);
    (0..4).for_each(|_| slow[0].rx[0].offer(&map));
    assert_eq!(slow[0].await_frames(2), [first, second]);
}

#[test]
fn a_rate_limit_holds_a_guest_back_and_loses_nothing() {
    let back = Back::start(&["tx-pps=500,burst-ms=20", ""], 1, 1);
    let mut guests: Vec<_> = (0..2).map(|at| back.guest(at, 1)).collect();
    let begun = Instant::now();
    for i in 0..60 {
        guests[0].send(0, &frame(BROADCAST, mac(0), None, i, 60));
    }
    let got = guests[1].await_frames(60);
    assert_eq!(got.iter().map(|f| f[20]).collect::<Vec<_>>(), (0..60).collect::<Vec<_>>());
    // Eleven at once, and the others 2 ms apart.
    assert!(begun.elapsed() >= Duration::from_millis(96), "{:?}", begun.elapsed());
    assert_eq!(back.drops(0, "drops"), 0);
}

/// Queues are stopped and started while frames come and go on both sides.
#[test]
fn rings_are_reset_under_load() {
    for reactors in [1, 2] {
        let back = Back::start(&["", "", ""], 2, reactors);
        let mut guests: Vec<_> = (0..3).map(|at| back.guest(at, 2)).collect();
        learn(&mut guests);
        for round in 0..12u8 {
            let (from, to, pair) =
                (usize::from(round) % 2, 1 - usize::from(round) % 2, usize::from(round / 2) % 2);
            for _ in 0..20 {
                guests[from].send(pair, &frame(mac(to), mac(from), None, round, 200));
            }
            // While they are on their way: the third guest is another one from here on.
            guests.pop();
            guests.push(back.guest(2, 2));
            guests[2].send(pair, &frame(BROADCAST, mac(2), None, round, 64));
            until("all to have come", || {
                guests.iter_mut().for_each(Guest::receive);
                guests[to].got.iter().filter(|f| f.len() == 200).count() == 20
                    && guests[..2].iter().all(|g| g.got.iter().any(|f| f.len() == 64))
            });
            for guest in &mut guests {
                guest.got.clear();
                guest.headers.clear();
            }
        }
        for guest in &guests {
            guest.check_memory(3);
        }
    }
}

/// One guest sends from queues on two reactors, the other has queues on one only.
#[test]
fn frames_cross_to_the_reactor_where_the_receiver_is() {
    let back = Back::start(&["", ""], 2, 2);
    let (mut sender, mut receiver) = (back.guest(0, 2), back.guest(1, 1));
    for round in 0..300u16 {
        let sent = frame(BROADCAST, mac(0), None, round as u8, 60 + usize::from(round) * 5);
        sender.send(usize::from(round % 2), &sent);
        assert_eq!(receiver.await_frames(1), [sent], "round {round}");
    }
    receiver.send(0, &frame(mac(0), mac(1), None, 0, 60));
    sender.await_frames(1);
    receiver.check_memory(2);
}
