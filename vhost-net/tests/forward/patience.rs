//! Packets for a port that has them wait, while its guest is not there.

use std::sync::atomic::Ordering;
use std::time::Duration;

use vhost_net::hub::Plan;
use vhost_net::stats::Drop;
use vhost_net::switch::PortId;

use crate::guest::{Back, Guest, mac};
use crate::peer::until;
use crate::{BROADCAST, expect_nothing, frame, learn};

/// How often packets of the first guest had to wait.
fn waits(back: &Back) -> u64 {
    back.hub.ports()[0].pairs.iter().map(|pair| pair.tx_waits.get()).sum()
}

/// Takes the second guest away.
fn part_with(back: &Back, guests: &mut Vec<Guest>) {
    drop(guests.remove(1));
    until("the guest to be gone", || back.hub.ports()[1].running.load(Ordering::SeqCst) == 0);
}

#[test]
fn packets_wait_for_a_guest_that_comes_back() {
    for (plan, reactors) in [(Plan::Switch, 1), (Plan::Switch, 2), (Plan::Wire, 1)] {
        let ports: &[&str] = if plan == Plan::Switch { &["", "wait", ""] } else { &["", "wait"] };
        let back = Back::start_as(plan, ports, 2, reactors, None, None);
        let mut guests: Vec<_> = (0..ports.len()).map(|at| back.guest(at, 2)).collect();
        if plan == Plan::Switch {
            learn(&mut guests);
        }
        for pair in [0, 1] {
            part_with(&back, &mut guests);
            let before = waits(&back);
            let mut sent: Vec<_> = (0..50).map(|n| frame(mac(1), mac(0), None, n, 60)).collect();
            sent.push(frame(BROADCAST, mac(0), None, 99, 60));
            guests[0].send_burst(pair, &sent);
            until("the sender to wait", || waits(&back) > before);
            assert!(!guests[0].all_sent());
            guests.insert(1, back.guest(1, 2));
            assert_eq!(guests[1].await_frames(sent.len()), sent);
            if plan == Plan::Switch {
                assert_eq!(guests[2].await_frames(1), sent[50..]);
                assert_eq!(back.drops(1, "drops"), 0);
            }
        }
        guests.iter_mut().for_each(expect_nothing);
        for port in back.hub.ports().iter() {
            assert!(port.pairs.iter().all(|p| p.rx_drops(Drop::LinkDown) + p.tx_drops(Drop::LinkDown) == 0));
        }
    }
}

#[test]
fn packets_wait_for_a_guest_that_is_still_to_come() {
    let back = Back::start(&["", "wait"], 1, 1);
    let mut first = back.guest(0, 1);
    let sent = [mac(1), BROADCAST].map(|to| frame(to, mac(0), None, 1, 60));
    first.send_burst(0, &sent);
    until("the sender to wait", || waits(&back) > 0);
    assert_eq!(back.guest(1, 1).await_frames(2), sent);
}

#[test]
fn packets_do_not_wait_for_ever() {
    for plan in [Plan::Switch, Plan::Wire] {
        let back = Back::start_patient(plan, &["", "wait"], 1, 1, None, None, Duration::from_millis(100));
        let mut guests: Vec<_> = (0..2).map(|at| back.guest(at, 1)).collect();
        if plan == Plan::Switch {
            learn(&mut guests);
        }
        part_with(&back, &mut guests);
        let sent: Vec<_> = (0..50).map(|n| frame(mac(1), mac(0), None, n, 60)).collect();
        guests[0].send_burst(0, &sent);
        until("all to be taken", || guests[0].all_sent());
        assert!(waits(&back) > 0, "they have waited before");
        if plan == Plan::Switch {
            until("the port to go down", || !back.switch.is_up(PortId(1)));
        }
        // It comes back all the same.
        guests.push(back.guest(1, 1));
        guests[0].send(0, &sent[0]);
        assert_eq!(guests[1].await_frames(1), sent[..1]);
    }
}

/// A guest that the administrator has cut off is not waited for.
#[test]
fn nobody_waits_for_a_link_that_is_down() {
    let back = Back::start(&["", "wait"], 1, 1);
    let mut guests: Vec<_> = (0..2).map(|at| back.guest(at, 1)).collect();
    learn(&mut guests);
    back.hub.set_link(1, false);
    guests[0].send(0, &frame(mac(1), mac(0), None, 1, 60));
    until("it to be taken", || guests[0].all_sent());
    assert_eq!(waits(&back), 0);
}
