//! What changes while guests talk: rules of ports, where stations are, how long packets may be.

use poll_engine::session::wire::protocol;
use vhost_net::announce::announcement;
use vhost_net::mac::MacAddr;
use vhost_net::switch::PortId;
use vhost_net::switch::vlan::Vlan;

use crate::guest::{Back, Guest, mac};
use crate::peer::{longs, until};
use crate::{BROADCAST, expect_nothing, frame};

fn guests(back: &Back, n: usize) -> Vec<Guest> {
    (0..n).map(|at| back.guest(at, 1)).collect()
}

#[test]
fn rules_that_change_hold_for_the_next_frame() {
    for reactors in [1, 2] {
        let back = Back::start(&["vlan=5", "vlan=5", "vlan=6"], 1, reactors);
        let mut all = guests(&back, 3);
        for (vid, to) in [(5, 1), (6, 2), (5, 1)] {
            let mut rules = back.switch.rules(PortId(0));
            rules.vlan = Vlan::Access(vid);
            back.hub.set_rules(0, rules);
            assert_eq!(
                back.switch.fdb().entries(PortId(0)),
                0,
                "what was learnt in another VLAN is forgotten"
            );
            let sent = frame(BROADCAST, mac(0), None, vid as u8, 60);
            all[0].send(0, &sent);
            assert_eq!(all[to].await_frames(1), [sent]);
        }
        all.iter_mut().for_each(expect_nothing);
    }
}

/// Protocol features for a network device, besides those of every device.
fn negotiate(guest: &mut Guest) {
    let offered = guest.peer.ask_number(15);
    let wanted = protocol::MQ | protocol::REPLY_ACK | protocol::RARP | protocol::NET_MTU;
    assert_eq!(offered & wanted, wanted);
    guest.peer.send(16, false, &longs(&[wanted]), &[]);
}

fn payload(mac: MacAddr) -> Vec<u8> {
    [&mac.0[..], &[0; 2]].concat()
}

#[test]
fn a_guest_that_has_migrated_is_announced() {
    for reactors in [1, 2] {
        let back = Back::start(&["vlan=5", "vlan=5", "trunk=5+6", "vlan=6"], 1, reactors);
        let mut all = guests(&back, 4);
        assert!(!all[0].peer.ack(19, &payload(mac(0)), &[]), "not negotiated");
        negotiate(&mut all[0]);
        for _ in 0..3 {
            assert!(all[0].peer.ack(19, &payload(mac(0)), &[]));
            let said = announcement(mac(0));
            assert_eq!(all[1].await_frames(1), [said]);
            let tagged = [&said[..12], &[0x81, 0, 0, 5], &said[12..]].concat();
            assert_eq!(all[2].await_frames(1), [tagged]);
        }
        let found = back.switch.fdb().lookup(back.switch.fdb().key(5, mac(0).to_u64()));
        assert_eq!(found, Some(PortId(0)), "it was learnt");
        // An address that nobody has goes nowhere, and the session goes on.
        assert!(all[0].peer.ack(19, &payload(BROADCAST), &[]));
        assert_eq!(back.drops(0, "rx_bad_source"), 1);
        all.iter_mut().for_each(expect_nothing);
    }
}

#[test]
fn no_packet_is_longer_than_the_front_end_says() {
    let back = Back::start(&["", ""], 1, 1);
    let mut all = guests(&back, 2);
    assert!(!all[1].peer.ack(20, &longs(&[1400]), &[]), "not negotiated");
    negotiate(&mut all[1]);
    let long = frame(BROADCAST, mac(0), None, 1, 1414);
    all[0].send(0, &long);
    assert_eq!(all[1].await_frames(1), std::slice::from_ref(&long));
    for wrong in [0, 67, 65522, u64::MAX] {
        assert!(!all[1].peer.ack(20, &longs(&[wrong]), &[]), "{wrong}");
    }
    assert!(all[1].peer.ack(20, &longs(&[1399]), &[]));
    all[0].send(0, &long);
    until("the frame to be dropped", || back.drops(1, "tx_mtu") == 1);
    let fits = frame(BROADCAST, mac(0), None, 2, 1413);
    all[0].send(0, &fits);
    assert_eq!(all[1].await_frames(1), [fits]);
}

#[test]
fn a_front_end_that_shows_no_link_is_hung_up_on_while_it_is_down() {
    let back = Back::start(&["", ""], 1, 1);
    let mut all = guests(&back, 2);
    // One that does not read configuration space.
    negotiate(&mut all[0]);
    (0..2).for_each(|at| back.server(at).set_link(false));
    all[0].peer.expect_hung_up();
    all[1].peer.expect_alive();
    until("the socket to go", || !back.socket(0).exists());
    assert!(back.socket(1).exists());
    back.server(0).set_link(true);
    until("the socket to come back", || back.socket(0).exists());
    all[0] = back.guest(0, 1);
    let sent = frame(BROADCAST, mac(0), None, 1, 60);
    all[0].send(0, &sent);
    assert_eq!(all[1].await_frames(1), [sent]);
}

/// Others talk on meanwhile, with queues on each reactor.
#[test]
fn ports_come_and_go() {
    for reactors in [1, 2] {
        let mut back = Back::start(&["vlan=1", "vlan=1"], 2, reactors);
        let mut old: Vec<_> = (0..2).map(|at| back.guest(at, 2)).collect();
        for round in 0..6u8 {
            let reaches = round % 2 == 0;
            let at = back.add(if reaches { "vlan=1" } else { "vlan=5" });
            assert_eq!(at, 2, "the number of the one before");
            let counted = back.hub.port(at).pairs.iter().map(|pair| pair.tx_packets.get()).sum::<u64>();
            assert_eq!((counted, back.drops(at, "rx_")), (0, 0));
            let mut new = back.guest(at, 2);
            for pair in 0..2 {
                let (sent, other) =
                    (frame(BROADCAST, mac(at), None, round, 90), frame(BROADCAST, mac(0), None, round, 80));
                new.send(pair, &sent);
                if reaches {
                    assert_eq!(old[0].await_frames(1), [sent.as_slice()]);
                    assert_eq!(old[1].await_frames(1), [sent]);
                    // To it alone, from the other reactor if there is one.
                    let own = frame(mac(at), mac(1), None, round, 100);
                    old[1].send(1 - pair, &own);
                    assert_eq!(new.await_frames(1), [own]);
                }
                old[0].send(pair, &other);
                assert_eq!(old[1].await_frames(1), [other.as_slice()]);
                if reaches {
                    assert_eq!(new.await_frames(1), [other]);
                }
            }
            until("all to be taken", || new.all_sent() && old.iter_mut().all(Guest::all_sent));
            expect_nothing(&mut new);
            assert_eq!(back.drops(at, "rx_vlan"), 0);
            drop(new);
            back.remove(at);
            assert_eq!(back.switch.fdb().entries(PortId(2)), 0);
            // Everybody is asked for it, and nobody has it.
            let lost = frame(mac(at), mac(0), None, round, 70);
            old[0].send(0, &lost);
            assert_eq!(old[1].await_frames(1), [lost]);
        }
        old.iter_mut().for_each(expect_nothing);
    }
}
