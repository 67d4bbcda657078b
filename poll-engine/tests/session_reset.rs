//! The device status over the session, and what resets: the device, or one queue alone. And queues that break, or that
//! nobody can wake.
#![allow(clippy::unwrap_used)]

mod support;

use std::os::fd::AsRawFd;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use nix::sys::eventfd::EventFd;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
use poll_engine::device::features::RING_RESET;
use poll_engine::engine::pacing::Pacing;
use support::{Back, FEATURES, Guest, Peer, eventfd, longs, readable_within, until, words};

const ALL: [Pacing; 3] = [Pacing::Busy, Pacing::Adaptive, Pacing::Event];

fn set_status(peer: &mut Peer, bits: u64) -> u64 {
    assert!(peer.ack(39, &longs(&[bits]), &[]));
    peer.ask_number(40)
}

/// The order QEMU has: features with `FEATURES_OK`, rings, then `DRIVER_OK`.
#[test]
fn queues_wait_for_driver_ok() {
    for pacing in ALL {
        let back = Back::start(pacing);
        let mut peer = back.front();
        let mut guest = Guest::new(0);
        assert_eq!(set_status(&mut peer, 3 | 8), 11);
        guest.start(&mut peer);
        guest.submit();
        guest.kick.write(1).unwrap();
        std::thread::sleep(Duration::from_millis(20));
        assert_eq!(guest.driver.finished(), 0, "served before DRIVER_OK");
        assert_eq!(set_status(&mut peer, 3 | 8 | 4), 15);
        guest.wait();
        guest.round_trip();
    }
}

#[test]
fn features_ok_is_kept_only_for_features_that_were_taken() {
    let back = Back::start(Pacing::Adaptive);
    let mut peer = back.front();
    assert_eq!(set_status(&mut peer, 3), 3);
    assert!(!peer.ack(2, &longs(&[FEATURES | 1 << 50]), &[]));
    assert_eq!(set_status(&mut peer, 11), 3, "features that were refused");
    assert!(peer.ack(2, &longs(&[FEATURES]), &[]));
    assert_eq!(set_status(&mut peer, 11), 11);
    assert_eq!(set_status(&mut peer, 0), 0);
}

/// Breaks the ring of a running guest.
fn break_ring(guest: &mut Guest) {
    guest.driver.make_available(0xffff);
    guest.driver.publish();
    guest.kick.write(1).unwrap();
}

#[test]
fn a_broken_queue_asks_for_a_reset_and_gets_it() {
    for pacing in ALL {
        let back = Back::start(pacing);
        let mut peer = back.front();
        let (ours, theirs) =
            socketpair(AddressFamily::Unix, SockType::Stream, None, SockFlag::SOCK_CLOEXEC).unwrap();
        assert!(peer.ack(21, &[], &[theirs.as_raw_fd()]));
        let mut guest = Guest::new(0);
        guest.start(&mut peer);
        assert_eq!(set_status(&mut peer, 15), 15);
        guest.round_trip();
        break_ring(&mut guest);
        // 2.1.2: a notice of a configuration change, and the driver reads the status.
        assert!(readable_within(&ours, 5000), "{pacing:?}: no notice");
        let mut message = [0; 32];
        assert_eq!(nix::unistd::read(&ours, &mut message), Ok(12));
        assert_eq!(message[..12], words(&[2, 1, 0]));
        assert_eq!(peer.ask_number(40), 15 | 64);
        assert_eq!(set_status(&mut peer, 15), 15 | 64, "the driver cannot clear it");
        // Who asks to be told only now is told now.
        let err = eventfd();
        assert!(peer.ack(14, &longs(&[0]), &[err.as_raw_fd()]));
        assert!(readable_within(&err, 5000), "{pacing:?}: no error signal");
        assert!(err.read().is_ok());

        assert_eq!(set_status(&mut peer, 0), 0);
        assert_eq!(back.echo.resets.load(Ordering::Acquire), 1);
        let mut guest = Guest::new(0);
        assert_eq!(set_status(&mut peer, 11), 11);
        guest.start(&mut peer);
        assert_eq!(set_status(&mut peer, 15), 15);
        guest.round_trip();
        std::thread::sleep(Duration::from_millis(10));
        assert_eq!(peer.ask_number(40), 15, "{pacing:?}: an old break was told after the reset");
        // A ring that is nowhere is as bad, whether or not anybody wants an acknowledgement.
        let mut lost = Guest::new(1);
        lost.config.used_addr += 1 << 40;
        lost.describe(&mut peer, 0);
        lost.set_kick(&mut peer);
        peer.send(18, false, &words(&[1, 1]), &[]);
        assert_eq!(peer.ask_number(40), 15 | 64);
        guest.round_trip();
    }
}

/// The ways in which a front end takes a queue down.
#[derive(Clone, Copy, Debug)]
enum Route {
    /// QEMU's `vhost_virtqueue_stop`.
    GetVringBase,
    /// `SET_VRING_ENABLE` with 0.
    Disable,
    /// Both, as crosvm and Cloud Hypervisor do.
    Both,
}

#[test]
fn a_queue_is_reset_alone_and_begins_anew() {
    for (pacing, route) in ALL.into_iter().zip([Route::GetVringBase, Route::Disable, Route::Both]) {
        let back = Back::start(pacing);
        let mut peer = back.front();
        assert_ne!(peer.ask_number(1) & RING_RESET, 0);
        assert!(peer.ack(2, &longs(&[FEATURES | RING_RESET]), &[]));
        let mut other = Guest::new(1);
        for round in 0..5 {
            // Elsewhere in the same memory, of another size, from 0 on: all that 2.6.1.1 leaves to the driver.
            let mut guest = Guest::with_ring(0, 8 << round);
            assert!(peer.mem_table(&[guest.region(), other.region()]));
            guest.describe(&mut peer, 0);
            guest.set_kick(&mut peer);
            guest.enable(&mut peer, true);
            if round == 0 {
                other.describe(&mut peer, 0);
                other.set_kick(&mut peer);
                other.enable(&mut peer, true);
            }
            (0..20).for_each(|_| guest.round_trip());
            other.round_trip();
            // With a request in flight, which is finished before the reset is over.
            back.echo.hold.store(true, Ordering::Release);
            guest.submit();
            until("the request to be taken", || back.echo.held.load(Ordering::Acquire) == 1);
            let (request, payload) = match route {
                Route::GetVringBase => (11, words(&[0, 0])),
                Route::Disable | Route::Both => (18, words(&[0, 0])),
            };
            peer.send(request, true, &payload, &[]);
            assert!(!readable_within(&peer.stream, 20), "{route:?}: over with a request in flight");
            back.echo.open_gate();
            peer.reply(request).unwrap();
            if matches!(route, Route::Both) {
                assert_eq!(guest.stop(&mut peer), 21);
            }
            guest.wait();
            guest.submit();
            other.round_trip();
            assert_eq!(guest.driver.finished(), 0, "{route:?}: a queue that was reset goes on");
        }
        assert_eq!(other.stop(&mut peer), 10);
        assert_eq!((back.stats[0].errors_total(), back.stats[1].errors_total()), (0, 0));
    }
}

/// A reset queue that was broken works again; the device still says that it would like a reset.
#[test]
fn resetting_a_broken_queue_mends_it() {
    let back = Back::start(Pacing::Adaptive);
    let mut peer = back.front();
    let mut guest = Guest::new(0);
    guest.start(&mut peer);
    let err = eventfd();
    assert!(peer.ack(14, &longs(&[0]), &[err.as_raw_fd()]));
    for _ in 0..3 {
        break_ring(&mut guest);
        assert!(readable_within(&err, 5000), "no error signal");
        assert!(err.read().is_ok());
        guest.stop(&mut peer);
        guest = Guest::new(0);
        guest.start(&mut peer);
        guest.round_trip();
    }
}

/// Polled, by a reactor that naps: it answers at once, and does not spin for ever.
#[test]
fn a_queue_without_a_kick_descriptor_is_polled_without_spinning() {
    for pacing in [Pacing::Event, Pacing::Adaptive] {
        let back = Back::start(pacing);
        let mut peer = back.front();
        let (mut polled, mut kicked) = (Guest::new(0), Guest::new(1));
        assert!(peer.mem_table(&[polled.region(), kicked.region()]));
        for guest in [&polled, &kicked] {
            guest.describe(&mut peer, 0);
        }
        assert!(peer.ack(12, &longs(&[0x100]), &[]));
        kicked.set_kick(&mut peer);
        polled.enable(&mut peer, true);
        kicked.enable(&mut peer, true);
        for _ in 0..50 {
            std::thread::sleep(Duration::from_millis(1));
            // Its eventfd is not the back end's: nothing but polling finds this.
            polled.round_trip();
            kicked.round_trip();
        }
        // A nap of 100 us and the looks after it, against a look every 20 ns or so.
        let (start, before) = (Instant::now(), back.stats[0].polls.get());
        std::thread::sleep(Duration::from_millis(300));
        let (looks, of) = (back.stats[0].polls.get() - before, start.elapsed());
        assert!(looks > 100, "{pacing:?}: only {looks} looks in {of:?}");
        assert!(u128::from(looks) < of.as_micros() * 2, "{pacing:?}: idle, {looks} looks in {of:?}");
        // And with a kick again it sleeps soundly.
        polled.set_kick(&mut peer);
        (0..10).for_each(|_| polled.round_trip());
        assert_eq!(polled.stop(&mut peer), 60);
    }
}

/// A write to an eventfd that is full and blocking waits in a kernel thread of its own. A front end that never reads
/// must not be able to pile these up, neither while its queue runs nor behind it.
#[test]
fn a_full_and_blocking_call_descriptor_costs_next_to_nothing() {
    let back = Back::start(Pacing::Adaptive);
    let threads = || std::fs::read_dir("/proc/self/task").unwrap().count();
    let before = threads();
    let mut peer = back.front();
    let mut guest = Guest::new(0);
    guest.start(&mut peer);
    let call = EventFd::from_flags(nix::sys::eventfd::EfdFlags::EFD_CLOEXEC).unwrap();
    call.write(u64::MAX - 1).unwrap();
    assert!(peer.ack(13, &longs(&[0]), &[call.as_raw_fd()]));
    let signalled = back.stats[0].signals.get();
    for _ in 0..200 {
        guest.round_trip();
        // One by one, or the writes would be as few as the rounds.
        std::thread::sleep(Duration::from_micros(200));
    }
    assert!(back.stats[0].signals.get() - signalled <= 8, "{} writes", back.stats[0].signals.get());
    assert!(threads() <= before + 16, "{} threads, {before} before", threads());
    // Read, it rings again for what was owed.
    assert_eq!(call.read(), Ok(u64::MAX - 1));
    assert!(readable_within(&call, 5000), "the signal that was owed");
    until("what was owed", || {
        readable_within(&call, 1) && call.read().is_ok() && !readable_within(&call, 50)
    });
    call.write(u64::MAX - 1).unwrap();
    for _ in 0..20 {
        guest.round_trip();
    }
    assert_eq!(guest.stop(&mut peer), 220);
    drop(peer);
    back.front().expect_alive();
    until("the kernel's threads to end", || threads() <= before + 1);
    // What still waited was cancelled, or it would come through now.
    assert_eq!(call.read(), Ok(u64::MAX - 1));
    assert!(!readable_within(&call, 100), "a write outlived its queue");
}
