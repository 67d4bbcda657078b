//! Queues over the session: started, stopped, gone on with, and given other descriptors while they run.
#![allow(clippy::unwrap_used)]

mod support;

use std::os::fd::AsRawFd;
use std::sync::atomic::Ordering;
use std::time::Duration;

use poll_engine::engine::pacing::Pacing;
use poll_engine::stats::ErrorKind;
use support::{Back, Guest, eventfd, longs, readable_within, until, words};

const ALL: [Pacing; 3] = [Pacing::Busy, Pacing::Adaptive, Pacing::Event];

#[test]
fn a_stopped_queue_says_where_it_was_and_goes_on_from_there() {
    for pacing in ALL {
        let back = Back::start(pacing);
        let mut peer = back.front();
        let mut guest = Guest::new(0);
        guest.start(&mut peer);
        let mut base = 0;
        for round in 1..=4 {
            (0..round * 5).for_each(|_| guest.round_trip());
            base += round * 5;
            assert_eq!(guest.stop(&mut peer), base);
            assert_eq!(guest.stop(&mut peer), base, "and again");
            // What comes while it is stopped is for later.
            guest.submit();
            std::thread::sleep(Duration::from_millis(10));
            assert_eq!(guest.driver.finished(), 0);
            guest.describe(&mut peer, base);
            guest.set_kick(&mut peer);
            guest.wait();
            base += 1;
        }
    }
}

#[test]
fn a_base_near_the_end_of_numbers_is_a_base() {
    let back = Back::start(Pacing::Adaptive);
    let mut peer = back.front();
    let mut guest = Guest::new(0);
    let config = poll_engine::ring::RingConfig { base: 0xfffe, ..guest.config };
    guest.driver.split().unwrap().set_avail_idx(0xfffe);
    guest.driver.split().unwrap().set_used_idx(0xfffd);
    guest.driver = poll_engine::ring::driver::DriverRing::new(&config, guest.ram.map()).unwrap();
    assert!(peer.mem_table(&[guest.region()]));
    guest.describe(&mut peer, 0xfffe);
    guest.set_kick(&mut peer);
    guest.enable(&mut peer, true);
    (0..5).for_each(|_| guest.round_trip());
    assert_eq!(guest.stop(&mut peer), 3);
}

#[test]
fn stopping_finishes_what_is_in_flight_and_takes_nothing_more() {
    for pacing in ALL {
        let back = Back::start(pacing);
        let mut peer = back.front();
        let mut guest = Guest::new(1);
        guest.start(&mut peer);
        back.echo.hold.store(true, Ordering::Release);
        (0..3).for_each(|_| guest.submit());
        until("requests to be taken", || back.echo.held.load(Ordering::Acquire) == 3);
        peer.send(11, false, &words(&[1, 0]), &[]);
        assert!(!readable_within(&peer.stream, 50), "stopped with requests in flight");
        guest.submit();
        back.echo.open_gate();
        assert_eq!(peer.reply(11).unwrap(), words(&[1, 3]));
        (0..3).for_each(|_| guest.wait());
        assert_eq!(guest.driver.finished(), 0);
        // The same when it is disabled, or the front end goes away; a request is never lost.
        guest.describe(&mut peer, 3);
        guest.set_kick(&mut peer);
        guest.wait();
        back.echo.hold.store(true, Ordering::Release);
        guest.submit();
        until("the request to be taken", || back.echo.held.load(Ordering::Acquire) == 1);
        drop(peer);
        std::thread::sleep(Duration::from_millis(20));
        back.echo.open_gate();
        guest.wait();
        back.front().expect_alive();
    }
}

/// The order QEMU has: kick descriptor, kick, enable.
#[test]
fn a_kick_before_the_queue_is_enabled_is_not_lost() {
    for pacing in ALL {
        let back = Back::start(pacing);
        let mut peer = back.front();
        let mut guest = Guest::new(0);
        assert!(peer.mem_table(&[guest.region()]));
        guest.describe(&mut peer, 0);
        guest.submit();
        guest.set_kick(&mut peer);
        guest.kick.write(1).unwrap();
        std::thread::sleep(Duration::from_millis(20));
        assert_eq!(guest.driver.finished(), 0, "served before it was enabled");
        guest.enable(&mut peer, true);
        guest.wait();
        // Disabled, it rests; enabled again, it goes on.
        guest.enable(&mut peer, false);
        guest.submit();
        std::thread::sleep(Duration::from_millis(20));
        assert_eq!(guest.driver.finished(), 0);
        guest.enable(&mut peer, true);
        guest.wait();
        guest.round_trip();
    }
}

#[test]
fn a_sleeping_queue_is_woken_by_every_first_kick() {
    let back = Back::start(Pacing::Event);
    let mut peer = back.front();
    let mut guest = Guest::new(0);
    guest.start(&mut peer);
    for i in 0..200 {
        if i % 10 == 0 {
            std::thread::sleep(Duration::from_millis(2));
        }
        guest.round_trip();
    }
    assert!(back.stats[0].kicks.get() > 0);
    // Interrupts: one is sent for the next request after asking, and none after declining.
    guest.driver.set_interrupts(false);
    let _ = guest.call.read();
    guest.round_trip();
    std::thread::sleep(Duration::from_millis(20));
    assert!(guest.call.read().is_err());
    assert!(!guest.driver.set_interrupts(true));
    guest.submit();
    assert!(readable_within(&guest.call, 5000));
}

#[test]
fn descriptors_may_change_while_the_queue_runs() {
    for pacing in ALL {
        let back = Back::start(pacing);
        let mut peer = back.front();
        let mut guest = Guest::new(0);
        guest.start(&mut peer);
        guest.round_trip();
        assert!(readable_within(&guest.call, 5000));
        let _ = guest.call.read();
        let call = eventfd();
        assert!(peer.ack(13, &longs(&[0]), &[call.as_raw_fd()]));
        guest.round_trip();
        assert!(readable_within(&call, 5000), "the new call descriptor stays silent");
        assert!(guest.call.read().is_err(), "the old one rings");
        // None at all: the driver polls.
        assert!(peer.ack(13, &longs(&[0x100]), &[]));
        guest.round_trip();
        // A new kick descriptor; the old one is dead.
        let kick = std::mem::replace(&mut guest.kick, eventfd());
        guest.set_kick(&mut peer);
        drop(kick);
        (0..10).for_each(|_| guest.round_trip());
        // And without one the queue is polled.
        assert!(peer.ack(12, &longs(&[0x100]), &[]));
        (0..10).for_each(|_| {
            std::thread::sleep(Duration::from_millis(1));
            guest.round_trip();
        });
        assert_eq!(guest.stop(&mut peer), 23);
    }
}

/// The interrupt may have gone to a descriptor that nobody listened to, and the driver has nothing more to ask for.
#[test]
fn a_new_call_descriptor_makes_good_for_an_interrupt_that_was_lost() {
    for pacing in ALL {
        let back = Back::start(pacing);
        let mut peer = back.front();
        let mut guest = Guest::new(0);
        guest.start(&mut peer);
        guest.round_trip();
        assert!(readable_within(&guest.call, 5000));
        let _ = guest.call.read();
        for _ in 0..3 {
            let call = eventfd();
            assert!(peer.ack(13, &longs(&[0]), &[call.as_raw_fd()]));
            assert!(readable_within(&call, 5000), "{pacing:?}: the driver waits for ever");
            // Once.
            let _ = call.read();
            assert!(!readable_within(&call, 20), "{pacing:?}: it rings and rings");
        }
        guest.round_trip();
    }
}

/// A pipe whose writer is gone is readable for ever.
#[test]
fn a_pipe_is_no_kick_descriptor() {
    let back = Back::start(Pacing::Event);
    let mut peer = back.front();
    let mut guest = Guest::new(0);
    guest.start(&mut peer);
    let (read, write) = nix::unistd::pipe().unwrap();
    for request in [12, 13, 14] {
        assert!(!peer.ack(request, &longs(&[1]), &[read.as_raw_fd()]));
        assert!(!peer.ack(request, &longs(&[1]), &[write.as_raw_fd()]));
    }
    drop(write);
    guest.round_trip();
}

#[test]
fn a_broken_queue_rings_and_its_neighbour_goes_on() {
    let back = Back::start(Pacing::Event);
    let mut peer = back.front();
    let (mut bad, mut good) = (Guest::new(0), Guest::new(1));
    let err = eventfd();
    assert!(peer.mem_table(&[bad.region(), good.region()]));
    for guest in [&bad, &good] {
        guest.describe(&mut peer, 0);
        guest.set_kick(&mut peer);
        guest.enable(&mut peer, true);
    }
    assert!(peer.ack(14, &longs(&[0]), &[err.as_raw_fd()]));
    bad.round_trip();
    good.round_trip();
    bad.driver.make_available(0xffff);
    bad.driver.publish();
    bad.kick.write(1).unwrap();
    assert!(readable_within(&err, 5000));
    assert_eq!(back.stats[0].errors(ErrorKind::Ring), 1);
    (0..50).for_each(|_| good.round_trip());
    assert_eq!(bad.stop(&mut peer), 1, "the chain that broke it was not consumed");
    assert_eq!(good.stop(&mut peer), 51);
}

#[test]
fn a_ring_outside_of_memory_is_refused_when_it_starts() {
    let back = Back::start(Pacing::Adaptive);
    let mut peer = back.front();
    let guest = Guest::new(0);
    // No memory table yet: there is nothing to find the ring in.
    guest.describe(&mut peer, 0);
    guest.set_kick(&mut peer);
    assert!(!peer.ack(18, &words(&[0, 1]), &[]));
    peer.expect_alive();
    assert!(peer.mem_table(&[guest.region()]));
    let mut guest = guest;
    guest.set_kick(&mut peer);
    guest.round_trip();
}
