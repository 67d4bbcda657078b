//! Many frames at once go where each would have gone by itself, in their order.

use vhost_net::mac::MacAddr;
use vhost_net::stats::Drop;

use crate::guest::{Back, mac};
use crate::peer::until;
use crate::{BROADCAST, expect_nothing, frame, learn};

/// Numbers that look random, the same in each run.
struct Random(u64);

impl Random {
    fn below(&mut self, n: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as usize % n
    }
}

/// To one, to another, to all, to nobody known, with and without tags, too short to be frames, and too long for a buffer:
/// runs of each, of all lengths.
#[test]
fn each_frame_of_a_burst_goes_where_it_would_have_gone_alone() {
    // The last one gets frames without a tag with one.
    let back = Back::start(&["vlan=5", "vlan=5", "trunk=5-6"], 1, 1);
    let mut guests: Vec<_> = (0..3).map(|at| back.guest(at, 1)).collect();
    guests[1].send(0, &frame(BROADCAST, mac(1), None, 0, 60));
    guests[2].send(0, &frame(BROADCAST, mac(2), Some(5), 0, 60));
    for (guest, frames) in guests.iter_mut().zip([2, 1, 1]) {
        guest.await_frames(frames);
    }
    let mut random = Random(1);
    let (mut kind, mut number) = (0, 0u8);
    for _ in 0..60 {
        let mut burst = vec![];
        let mut expected = [vec![], vec![]];
        // Half of a ring, as some need two buffers.
        for _ in 0..=random.below(24) {
            if random.below(3) == 0 {
                kind = random.below(6);
            }
            number = number.wrapping_add(1);
            let most = [2900, 150, 150, 150][random.below(4)];
            let len = 14 + random.below(most);
            let to = [mac(1), mac(2), BROADCAST, MacAddr([2, 0, 0, 0, 0, 9]), mac(1), mac(1)][kind];
            let sent = frame(to, mac(0), None, number, len);
            match kind {
                // No frame, and one in a VLAN that its sender is not in.
                4 => burst.push(sent[..13].to_vec()),
                5 => burst.push(frame(to, mac(0), Some(6), number, 64)),
                _ => {
                    if to != mac(2) {
                        expected[0].push(sent.clone());
                    }
                    if to != mac(1) {
                        expected[1].push(frame(to, mac(0), Some(5), number, len + 4));
                    }
                    burst.push(sent);
                }
            }
        }
        guests[0].send_burst(0, &burst);
        for (guest, expected) in guests[1..].iter_mut().zip(&expected) {
            assert_eq!(guest.await_frames(expected.len()), *expected);
        }
        until("the burst to be taken", || guests[0].all_sent());
        guests.iter_mut().for_each(expect_nothing);
    }
    for guest in &guests {
        guest.check_memory(3);
    }
    assert!(back.drops(0, "rx_vlan") > 20);
    let own = &back.hub.ports()[0].pairs[0];
    assert!(own.tx_drops(Drop::Malformed) > 20);
    assert_eq!(back.hub.ports()[1].pairs[0].rx_drops(Drop::NoBuffers), 0);
}

/// A receiver that the sender waits for gets all of them, however few buffers it has at a time; one that is not waited for
/// loses those that it has none for, and no other.
#[test]
fn a_burst_waits_where_its_receiver_has_no_more_buffers() {
    let back = Back::start(&["", "wait", ""], 1, 1);
    let mut sender = back.guest(0, 1);
    let mut slow = [back.idle_guest(1, 1), back.idle_guest(2, 1)];
    for at in [1, 2] {
        slow[at - 1].send(0, &frame(BROADCAST, mac(at), None, 0, 60));
        sender.await_frames(1);
    }
    let frames =
        |to| -> Vec<_> { (0..30).map(|i| frame(mac(to), mac(0), None, i, 60 + usize::from(i))).collect() };
    let waits = frames(1);
    sender.send_burst(0, &waits);
    until("the sender to wait", || back.hub.ports()[0].pairs[0].tx_waits.get() > 0);
    let map = std::sync::Arc::clone(&slow[0].map);
    // Each is given back once it was received.
    (0..3).for_each(|_| slow[0].rx[0].offer(&map));
    assert_eq!(slow[0].await_frames(waits.len()), waits);
    let map = std::sync::Arc::clone(&slow[1].map);
    (0..12).for_each(|_| slow[1].rx[0].offer(&map));
    let lost = frames(2);
    // Nothing of it is received before all was sent, so that no buffer comes back.
    sender.send_burst(0, &lost);
    until("the burst to be taken", || sender.all_sent());
    assert_eq!(slow[1].await_frames(12), lost[..12]);
    expect_nothing(&mut slow[1]);
    let theirs = &back.hub.ports()[2].pairs[0];
    // What the other has sent to all was the first that it lost.
    assert_eq!((theirs.rx_packets.get(), theirs.rx_drops(Drop::NoBuffers)), (12, 18 + 1));
    assert_eq!(back.hub.ports()[0].pairs[0].tx_packets.get(), 60);
}

#[test]
fn bursts_cross_in_both_directions() {
    for reactors in [1, 2] {
        let back = Back::start(&["", "", ""], 2, reactors);
        let mut guests: Vec<_> = (0..3).map(|at| back.guest(at, 2)).collect();
        learn(&mut guests);
        for round in 0..20u8 {
            let frames = |from: usize, to: usize| -> Vec<_> {
                (0..20).map(|i| frame(mac(to), mac(from), None, round ^ i, 64 + usize::from(i))).collect()
            };
            let pair = usize::from(round % 2);
            for (from, to) in [(0, 1), (1, 2), (2, 0)] {
                guests[from].send_burst(pair, &frames(from, to));
            }
            for (from, to) in [(0, 1), (1, 2), (2, 0)] {
                assert_eq!(guests[to].await_frames(20), frames(from, to));
            }
        }
        guests.iter_mut().for_each(expect_nothing);
    }
}
