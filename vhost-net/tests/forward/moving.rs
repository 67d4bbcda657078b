//! Ports that pause, and queues that move between reactors while frames flow.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use poll_engine::engine::reactor::Io;
use poll_engine::engine::station::{Queues, Station};
use vhost_net::features::{CTRL_RX, CTRL_VQ, MRG_RXBUF};
use vhost_net::hub::HubError;
use vhost_net::mac::MacAddr;
use vhost_net::seats::MAX_REACTORS;
use vhost_net::stats::{DROPS, Drop};

use crate::guest::{Back, Guest, mac};
use crate::peer::until;
use crate::{expect_nothing, frame, learn};

/// Frames that are sent together.
const BURST: u32 = 24;

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

/// Frames go both ways between two ports, of which the second one has senders wait, until this has returned. Each comes once and
/// in order, or is counted.
fn frames_flow_while(back: &Back, guests: &mut [Guest], change: impl FnOnce() + Send) {
    let before = [dropped(back, 1, 0), dropped(back, 0, 1)];
    let over = AtomicBool::new(false);
    let (mut sent, mut got, mut next) = ([0u32; 2], [0u64; 2], [0u32; 2]);
    std::thread::scope(|scope| {
        let changes = scope.spawn(|| {
            let done = std::panic::catch_unwind(std::panic::AssertUnwindSafe(change));
            over.store(true, Ordering::Release);
            done
        });
        let mut step = |more: bool| {
            for to in 0..2 {
                let from = 1 - to;
                if more && guests[from].all_sent() {
                    let burst: Vec<_> = (0..BURST).map(|n| numbered(to, from, sent[to] + n)).collect();
                    guests[from].send_burst(0, &burst);
                    sent[to] += BURST;
                }
                guests[to].receive();
                for number in numbers(&std::mem::take(&mut guests[to].got)) {
                    assert!(number >= next[to], "{number} after {}", next[to]);
                    (next[to], got[to]) = (number + 1, got[to] + 1);
                }
            }
            let lost = [dropped(back, 1, 0), dropped(back, 0, 1)];
            (0..2).all(|to| got[to] + lost[to] - before[to] == u64::from(sent[to]))
        };
        while !over.load(Ordering::Acquire) {
            step(true);
        }
        changes.join().unwrap().unwrap_or_else(|e| std::panic::resume_unwind(e));
        until("every frame to come or to be counted", || step(false));
    });
    println!("sent {sent:?}, received {got:?}");
    assert!(got.iter().all(|got| *got > 100), "{got:?}");
}

#[test]
fn queues_move_while_frames_flow() {
    const REACTORS: usize = 3;
    let back = Back::start(&["", "wait=on"], 1, REACTORS);
    let mut guests: Vec<_> = (0..2).map(|at| back.guest(at, 1)).collect();
    learn(&mut guests);
    frames_flow_while(&back, &mut guests, || {
        let mut random = Random(std::process::id().into());
        for _ in 0..300 {
            let (port, reactor) = (random.below(2), random.below(REACTORS));
            let queues = [0..1, 1..2, 0..2][random.below(3)].clone();
            back.move_queues(port, queues, reactor);
        }
    });
    // The switch does not take a move for a guest that has gone.
    assert_eq!(back.switch.fdb().dump().count(), 2);
}

#[test]
fn reactors_come_and_go_while_frames_flow() {
    let back = Back::start(&["", "wait=on"], 1, 1);
    let mut guests: Vec<_> = (0..2).map(|at| back.guest(at, 1)).collect();
    learn(&mut guests);
    frames_flow_while(&back, &mut guests, || {
        let mut random = Random(std::process::id().into());
        let mut reactors = vec![0];
        for _ in 0..200 {
            match random.below(3) {
                0 if reactors.len() < 4 => reactors.push(back.add_reactor()),
                1 if reactors.len() > 1 => back.retire(reactors.swap_remove(random.below(reactors.len()))),
                _ => {
                    let reactor = reactors[random.below(reactors.len())];
                    back.move_queues(random.below(2), 0..2, reactor);
                }
            }
        }
    });
    assert_eq!(back.switch.fdb().dump().count(), 2);
}

/// Keeps its reactor from turning until it is let go on.
struct Keeper {
    holds: Arc<AtomicBool>,
    has: Arc<AtomicBool>,
}

impl Station for Keeper {
    fn poll(&mut self, _: &mut Queues<'_>, _: &mut Io<'_>) -> usize {
        self.has.store(true, Ordering::Release);
        until("the reactor to be let go on", || !self.holds.load(Ordering::Acquire));
        0
    }
}

/// A transmit queue moves to the reactor of its receiver, where more of its frames wait than are taken in at once.
#[test]
fn what_was_on_its_way_comes_before_what_is_sent_next() {
    let back = Back::start(&["", ""], 1, 2);
    let mut guests: Vec<_> = (0..2).map(|at| back.guest(at, 1)).collect();
    learn(&mut guests);
    back.move_queues(0, 0..2, 1);
    let (holds, has) = (Arc::new(AtomicBool::new(true)), Arc::new(AtomicBool::new(false)));
    let keeper = Keeper { holds: Arc::clone(&holds), has: Arc::clone(&has) };
    let station = back.engine().add_station(0, Box::new(keeper)).unwrap();
    until("the reactor to be kept", || has.load(Ordering::Acquire));
    guests[0].send_burst(0, &(0..60).map(|n| numbered(1, 0, n)).collect::<Vec<_>>());
    until("frames to be on their way", || guests[0].all_sent());
    std::thread::scope(|scope| {
        let moving = scope.spawn(|| back.move_queues(0, 1..2, 0));
        until("the queue to leave", || !back.runs(0, 1));
        guests[0].send_burst(0, &(60..64).map(|n| numbered(1, 0, n)).collect::<Vec<_>>());
        // So that it is about to start when the reactor turns again.
        std::thread::sleep(Duration::from_millis(50));
        holds.store(false, Ordering::Release);
        moving.join().unwrap();
    });
    assert_eq!(numbers(&guests[1].await_frames(64)), (0..64).collect::<Vec<_>>());
    drop(station);
}

/// Numbers of reactors are never used again, their places are.
#[test]
fn there_is_room_for_as_many_reactors_as_have_a_bit() {
    let back = Back::start(&["", ""], 1, 1);
    let mut guests: Vec<_> = (0..2).map(|at| back.guest(at, 1)).collect();
    learn(&mut guests);
    let rest: Vec<_> = (1..MAX_REACTORS).map(|_| back.add_reactor()).collect();
    assert_eq!(back.hub.reserve(back.engine()).unwrap_err(), HubError::NoSeat);
    let last = *rest.last().unwrap();
    back.move_queues(1, 0..2, last);
    guests[0].send(0, &numbered(1, 0, 1));
    assert_eq!(numbers(&guests[1].await_frames(1)), [1]);
    back.retire(0);
    assert_eq!(back.add_reactor(), MAX_REACTORS);
    back.move_queues(0, 0..2, MAX_REACTORS);
    guests[1].send(0, &numbered(0, 1, 2));
    assert_eq!(numbers(&guests[0].await_frames(1)), [2]);
    for number in rest {
        back.retire(number);
    }
    guests[1].send(0, &numbered(0, 1, 3));
    assert_eq!(numbers(&guests[0].await_frames(1)), [3]);
}

/// What a driver has asked for is so on a reactor that comes later.
#[test]
fn a_reactor_that_comes_knows_what_drivers_have_asked_for() {
    let back = Back::start(&["", ""], 1, 1);
    let mut guests = [back.guest(0, 1), back.guest_with(1, 1, MRG_RXBUF | CTRL_VQ | CTRL_RX)];
    learn(&mut guests);
    // Nothing but what is for its own address.
    assert_eq!(guests[1].command(&[0, 0, 0]), 0);
    back.move_queues(1, 0..2, back.add_reactor());
    let other = frame(MacAddr([1, 0, 0, 0, 0, 7]), mac(0), None, 1, 60);
    guests[0].send(0, &other);
    until("the frame to be dropped", || back.hub.port(1).pairs[0].rx_drops(Drop::Filtered) == 1);
    guests[0].send(0, &numbered(1, 0, 1));
    assert_eq!(numbers(&guests[1].await_frames(1)), [1]);
}
