//! Ports that pause, and queues that move between reactors while frames flow.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use vhost_net::stats::{DROPS, Drop};

use crate::guest::{Back, Guest, mac};
use crate::peer::until;
use crate::{expect_nothing, frame, learn};

/// A frame that says which one it is.
fn numbered(to: usize, from: usize, number: u32) -> Vec<u8> {
    let mut frame = frame(mac(to), mac(from), None, 0, 100);
    frame[14..18].copy_from_slice(&number.to_le_bytes());
    frame
}

fn numbers(frames: &[Vec<u8>]) -> Vec<u32> {
    frames.iter().map(|frame| u32::from_le_bytes(frame[14..18].try_into().unwrap())).collect()
}

/// Frames from one port to another that went nowhere, as they are counted at both.
fn dropped(back: &Back, from: usize, to: usize) -> u64 {
    let drops = |why: Drop| {
        let (sender, receiver) = (back.hub.port(from), back.hub.port(to));
        let (tx, rx) = (sender.pairs.iter(), receiver.pairs.iter());
        tx.map(|pair| pair.tx_drops(why)).chain(rx.map(|pair| pair.rx_drops(why))).sum::<u64>()
    };
    DROPS.iter().map(|(why, _)| drops(*why)).sum()
}

/// The receiver is on the sender's reactor, or on another one.
#[test]
fn a_paused_port_is_as_a_guest_that_has_no_buffers() {
    for (reactor, wait) in [(0, false), (1, false), (0, true)] {
        let back = Back::start(&["", if wait { "wait=on" } else { "" }, ""], 1, 2);
        let mut guests: Vec<_> = (0..3).map(|at| back.guest(at, 1)).collect();
        learn(&mut guests);
        back.move_queues(1, 0..2, reactor);
        back.server(1).set_paused(true).unwrap();
        for n in 0..5 {
            guests[0].send(0, &numbered(1, 0, n));
            guests[1].send(0, &numbered(0, 1, n));
        }
        // Others are not paused with it.
        guests[2].send(0, &numbered(0, 2, 7));
        assert_eq!(numbers(&guests[0].await_frames(1)), [7], "taken from a paused guest");
        if wait {
            until("the sender to wait", || back.hub.port(0).pairs[0].tx_waits.get() > 0);
        } else {
            let no_buffers = || back.hub.port(1).pairs[0].rx_drops(Drop::NoBuffers);
            until("frames to be dropped", || no_buffers() == 5);
        }
        std::thread::sleep(Duration::from_millis(20));
        expect_nothing(&mut guests[1]);
        assert!(!guests[1].all_sent());
        assert_eq!(guests[0].all_sent(), !wait);
        back.server(1).set_paused(false).unwrap();
        assert_eq!(numbers(&guests[0].await_frames(5)), [0, 1, 2, 3, 4]);
        if wait {
            assert_eq!(numbers(&guests[1].await_frames(5)), [0, 1, 2, 3, 4]);
        }
        assert_eq!(dropped(&back, 0, 1), if wait { 0 } else { 5 });
        guests[0].send(0, &numbered(1, 0, 9));
        assert_eq!(numbers(&guests[1].await_frames(1)), [9]);
        until("all to be taken", || guests.iter_mut().all(Guest::all_sent));
    }
}

/// What goes to many does not wait for one of them that is paused.
#[test]
fn frames_to_many_pass_a_paused_port_by() {
    let back = Back::start(&["", "wait=on", ""], 1, 1);
    let mut guests: Vec<_> = (0..3).map(|at| back.guest(at, 1)).collect();
    back.server(1).set_paused(true).unwrap();
    let sent = frame(crate::BROADCAST, mac(0), None, 3, 60);
    guests[0].send(0, &sent);
    assert_eq!(guests[2].await_frames(1), [sent]);
    assert_eq!(back.hub.port(1).pairs[0].rx_drops(Drop::NoBuffers), 1);
    back.server(1).set_paused(false).unwrap();
    expect_nothing(&mut guests[1]);
}

struct Random(u64);

impl Random {
    fn below(&mut self, n: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (self.0 >> 33) as usize % n
    }
}

/// Every frame comes once and in order, or is counted.
#[test]
fn queues_move_while_frames_flow() {
    const REACTORS: usize = 3;
    const MOVES: usize = 300;
    let back = Back::start(&["", "wait=on"], 1, REACTORS);
    let mut guests: Vec<_> = (0..2).map(|at| back.guest(at, 1)).collect();
    learn(&mut guests);
    let before = [dropped(&back, 1, 0), dropped(&back, 0, 1)];
    let over = AtomicBool::new(false);
    let (mut sent, mut got, mut next) = ([0u32; 2], [0u64; 2], [0u32; 2]);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut random = Random(std::process::id().into());
            for _ in 0..MOVES {
                let (port, reactor) = (random.below(2), random.below(REACTORS));
                let queues = [0..1, 1..2, 0..2][random.below(3)].clone();
                back.move_queues(port, queues, reactor);
            }
            over.store(true, Ordering::Release);
        });
        let mut step = |more: bool| {
            for to in 0..2 {
                let from = 1 - to;
                if more && (guests[from].all_sent() || guests[to].got.is_empty()) {
                    let burst: Vec<_> = (0..8).map(|n| numbered(to, from, sent[to] + n)).collect();
                    guests[from].send_burst(0, &burst);
                    sent[to] += 8;
                }
                guests[to].receive();
                for number in numbers(&std::mem::take(&mut guests[to].got)) {
                    assert!(number >= next[to], "{number} after {}", next[to]);
                    (next[to], got[to]) = (number + 1, got[to] + 1);
                }
            }
            let lost = [dropped(&back, 1, 0), dropped(&back, 0, 1)];
            (0..2).all(|to| got[to] + lost[to] - before[to] == u64::from(sent[to]))
        };
        while !over.load(Ordering::Acquire) {
            step(true);
        }
        until("every frame to come or to be counted", || step(false));
    });
    println!("sent {sent:?}, received {got:?}");
    assert!(got.iter().all(|got| *got > MOVES as u64), "{got:?}");
    // What was learnt is known yet.
    assert_eq!(back.switch.fdb().dump().count(), 2);
}
