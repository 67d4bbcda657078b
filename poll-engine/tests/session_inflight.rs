//! The record of requests in flight over the session: another back end finishes what one had begun, and what a front
//! end may send costs its own session or queue.
#![allow(clippy::unwrap_used)]

mod support;

use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::atomic::Ordering;

use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::unistd::ftruncate;
use poll_engine::engine::pacing::Pacing;
use poll_engine::ring::RingFormat;
use poll_engine::ring::inflight::InflightSpec;
use poll_engine::stats::ErrorKind;
use support::{Back, Guest, Peer, QUEUES, eventfd, longs, readable_within, until, words};

const ALL: [Pacing; 3] = [Pacing::Busy, Pacing::Adaptive, Pacing::Event];

fn payload(spec: &InflightSpec) -> Vec<u8> {
    let halves = [spec.num_queues, spec.queue_size].map(u16::to_ne_bytes).concat();
    [longs(&[spec.mmap_size, spec.mmap_offset]), halves, vec![0; 4]].concat()
}

/// Asks for a record of all queues.
fn get(peer: &mut Peer) -> (InflightSpec, OwnedFd) {
    let wanted = InflightSpec { num_queues: QUEUES, queue_size: 16, ..InflightSpec::default() };
    let (reply, fd) = peer.ask_fd(31, &payload(&wanted));
    let spec = wanted.sized(RingFormat::Split);
    assert_eq!(reply, payload(&spec), "as long as QEMU wants it");
    assert!(spec.mmap_size >= 2 * (16 + 16 * 16));
    (spec, fd.unwrap())
}

fn set(peer: &mut Peer, spec: &InflightSpec, fd: &OwnedFd) -> bool {
    peer.ack(32, &payload(spec), &[fd.as_raw_fd()])
}

/// Starts the guest's queue as QEMU does after the death of a back end: where the used ring ends.
fn start(guest: &Guest, peer: &mut Peer) {
    assert!(peer.mem_table(&[guest.region()]));
    guest.describe(peer, guest.driver.split().unwrap().used_idx().into());
    guest.set_kick(peer);
    guest.enable(peer, true);
}

#[test]
fn another_back_end_finishes_what_one_had_begun() {
    for pacing in ALL {
        let first = Back::start(pacing);
        let mut peer = first.front();
        let mut guest = Guest::new(1);
        let (spec, fd) = get(&mut peer);
        assert!(set(&mut peer, &spec, &fd));
        start(&guest, &mut peer);
        (0..20).for_each(|_| guest.round_trip());
        first.echo.hold.store(true, Ordering::Release);
        (0..5).for_each(|_| guest.submit());
        until("5 requests in flight", || first.echo.held.load(Ordering::Acquire) == 5);

        // The first back end is as good as dead: it holds what it has, and is not kicked any more.
        let second = Back::start(pacing);
        let mut peer = second.front();
        (guest.kick, guest.call) = (eventfd(), eventfd());
        assert!(set(&mut peer, &spec, &fd));
        start(&guest, &mut peer);
        (0..5).for_each(|_| guest.wait());
        assert!(readable_within(&guest.call, 1000), "an interrupt for what was finished");
        assert_eq!(guest.stop(&mut peer), 25);
    }
}

/// A queue that is stopped before it has taken all that was in flight finishes that first.
#[test]
fn stopping_finishes_what_another_back_end_had_begun() {
    let first = Back::start(Pacing::Adaptive);
    let mut peer = first.front();
    let mut guest = Guest::new(0);
    let (spec, fd) = get(&mut peer);
    assert!(set(&mut peer, &spec, &fd));
    start(&guest, &mut peer);
    first.echo.hold.store(true, Ordering::Release);
    (0..8).for_each(|_| guest.submit());
    until("8 requests in flight", || first.echo.held.load(Ordering::Acquire) == 8);
    for _ in 0..50 {
        let second = Back::start(Pacing::Event);
        let mut peer = second.front();
        let copy = memfd_create(c"copy", MFdFlags::MFD_CLOEXEC).unwrap();
        let mut bytes = vec![0; spec.mmap_size as usize];
        nix::sys::uio::pread(&fd, &mut bytes, 0).unwrap();
        nix::sys::uio::pwrite(&copy, &bytes, 0).unwrap();
        guest.driver.split().unwrap().set_used_idx(0);
        assert!(set(&mut peer, &spec, &copy));
        start(&guest, &mut peer);
        assert_eq!(guest.stop(&mut peer), 8);
        assert_eq!(guest.driver.split().unwrap().used_idx(), 8);
    }
}

/// A queue whose handler has nothing to do with chains, as a receive queue without packets, gives back what another back
/// end had begun: it stops at once, and the next start serves all of it.
#[test]
fn stopping_gives_back_what_nobody_has_a_use_for() {
    let first = Back::start(Pacing::Adaptive);
    let mut peer = first.front();
    let mut guest = Guest::new(0);
    let (spec, fd) = get(&mut peer);
    assert!(set(&mut peer, &spec, &fd));
    start(&guest, &mut peer);
    (0..3).for_each(|_| guest.round_trip());
    first.echo.hold.store(true, Ordering::Release);
    (0..8).for_each(|_| guest.submit());
    until("8 requests in flight", || first.echo.held.load(Ordering::Acquire) == 8);
    for pacing in ALL {
        let second = Back::start(pacing);
        second.echo.idle.store(true, Ordering::Release);
        let mut peer = second.front();
        assert!(set(&mut peer, &spec, &fd));
        start(&guest, &mut peer);
        assert_eq!(guest.stop(&mut peer), 3, "none of the 8 is taken");
        assert_eq!(guest.driver.finished(), 0);
        // Nothing of it is in flight any more, for whoever comes next.
        let mut record = vec![0; spec.mmap_size as usize];
        nix::sys::uio::pread(&fd, &mut record, 0).unwrap();
        assert!((0..16).all(|i| record[16 + 16 * i] == 0), "said to be in flight");
    }
    let last = Back::start(Pacing::Event);
    let mut peer = last.front();
    (guest.kick, guest.call) = (eventfd(), eventfd());
    assert!(set(&mut peer, &spec, &fd));
    start(&guest, &mut peer);
    (0..8).for_each(|_| guest.wait());
    assert_eq!(guest.stop(&mut peer), 11);
}

/// Stopped, started again, by turns with the record it had and with a new one, and reset.
#[test]
fn a_record_goes_through_stops_and_resets() {
    let back = Back::start(Pacing::Adaptive);
    let mut peer = back.front();
    let mut guest = Guest::new(0);
    let (mut spec, mut fd) = get(&mut peer);
    for round in 0..10u32 {
        assert!(set(&mut peer, &spec, &fd));
        start(&guest, &mut peer);
        (0..7).for_each(|_| guest.round_trip());
        // Set while the queue runs, it changes over.
        if round % 3 == 0 {
            (spec, fd) = get(&mut peer);
            assert!(set(&mut peer, &spec, &fd));
            (0..7).for_each(|_| guest.round_trip());
        }
        guest.enable(&mut peer, false);
        guest.submit();
        guest.enable(&mut peer, true);
        guest.wait();
        assert_eq!(guest.stop(&mut peer), u32::from(guest.driver.split().unwrap().used_idx()));
    }
    assert!(peer.ack(34, &[], &[]), "RESET_DEVICE");
    let mut other = Guest::at(0, 0x77_0000);
    start(&other, &mut peer);
    (0..20).for_each(|_| other.round_trip());
}

#[test]
fn records_that_do_not_fit_are_refused() {
    let back = Back::start(Pacing::Adaptive);
    let mut peer = back.front();
    let (good, fd) = get(&mut peer);
    for wanted in [
        InflightSpec { num_queues: 0, ..good },
        InflightSpec { num_queues: QUEUES + 1, ..good },
        InflightSpec { queue_size: 0, ..good },
        InflightSpec { queue_size: 32769, ..good },
    ] {
        let (reply, fd) = peer.ask_fd(31, &payload(&wanted));
        assert_eq!((reply, fd.is_none()), (payload(&InflightSpec::default()), true));
        assert!(!set(&mut peer, &wanted, &memory(&good)));
    }
    let fds = [fd.as_raw_fd(), fd.as_raw_fd()];
    assert!(!peer.ack(32, &payload(&good), &[]));
    assert!(!peer.ack(32, &payload(&good), &fds));
    assert!(!set(
        &mut peer,
        &InflightSpec { mmap_size: good.regions_bytes(RingFormat::Split) - 1, ..good },
        &fd
    ));
    assert!(!peer.ack(32, &payload(&good)[..19], &fds[..1]));
    peer.expect_alive();

    // Those that are found out when they are mapped leave the session without a record that it can trust.
    let (pipe, _end) = nix::unistd::pipe().unwrap();
    for (spec, fd) in [
        (InflightSpec { mmap_size: u64::MAX, ..good }, &fd),
        (InflightSpec { mmap_size: 1 << 62, ..good }, &fd),
        (InflightSpec { mmap_offset: u64::MAX - 4095, ..good }, &fd),
        (InflightSpec { mmap_offset: 4096, ..good }, &fd),
        (good, &pipe),
    ] {
        assert!(!set(&mut peer, &spec, fd), "{spec:?}");
        let guest = Guest::new(0);
        assert!(peer.mem_table(&[guest.region()]));
        guest.enable(&mut peer, false);
        guest.describe(&mut peer, 0);
        guest.set_kick(&mut peer);
        assert!(!peer.ack(18, &words(&[0, 1]), &[]), "a queue without the record that was meant for it");
        guest.stop(&mut peer);
        peer.expect_alive();
    }
    assert!(set(&mut peer, &good, &fd));
    let mut guest = Guest::new(0);
    start(&guest, &mut peer);
    guest.round_trip();
}

/// Memory for a record that is not sealed.
fn memory(spec: &InflightSpec) -> OwnedFd {
    let memory = memfd_create(c"record", MFdFlags::MFD_CLOEXEC).unwrap();
    ftruncate(&memory, spec.mmap_size as i64).unwrap();
    memory
}

#[test]
fn a_record_of_nonsense_costs_its_queue() {
    let back = Back::start(Pacing::Adaptive);
    let mut peer = back.front();
    let (spec, fd) = get(&mut peer);
    let region = spec.regions_bytes(RingFormat::Split) / 2;
    // Queue 0 gets a version from the future; queue 1 claims that descriptors are in flight that nobody made available.
    nix::sys::uio::pwrite(&fd, &7u16.to_ne_bytes(), 8).unwrap();
    nix::sys::uio::pwrite(&fd, &[1, 0, 16, 0], region as i64 + 8).unwrap();
    nix::sys::uio::pwrite(&fd, &[1], region as i64 + 16).unwrap();
    assert!(set(&mut peer, &spec, &fd));
    let guests = [Guest::new(0), Guest::new(1)];
    assert!(peer.mem_table(&[guests[0].region(), guests[1].region()]));
    for guest in &guests {
        guest.describe(&mut peer, 0);
        guest.set_kick(&mut peer);
    }
    assert!(!peer.ack(18, &words(&[0, 1]), &[]));
    assert!(peer.ack(18, &words(&[1, 1]), &[]));
    until("queue 1 to break", || back.stats[1].errors(ErrorKind::Ring) > 0);
    peer.expect_alive();
    // And it is stopped as any other.
    guests[1].stop(&mut peer);
}

/// The front end truncates the record under running queues.
#[test]
fn a_record_that_is_taken_away_costs_its_queue() {
    let back = Back::start(Pacing::Adaptive);
    let mut peer = back.front();
    let spec = InflightSpec { num_queues: 1, queue_size: 16, ..InflightSpec::default() };
    let spec = spec.sized(RingFormat::Split);
    let fd = memory(&spec);
    assert!(set(&mut peer, &spec, &fd));
    let (mut victim, mut other) = (Guest::new(0), Guest::new(1));
    assert!(peer.mem_table(&[victim.region(), other.region()]));
    for guest in [&victim, &other] {
        guest.describe(&mut peer, 0);
        guest.set_kick(&mut peer);
        guest.enable(&mut peer, true);
    }
    victim.round_trip();
    ftruncate(fd.as_fd(), 0).unwrap();
    victim.submit();
    until("the error to be counted", || back.stats[0].errors(ErrorKind::Memory) > 0);
    (0..20).for_each(|_| other.round_trip());
    victim.stop(&mut peer);
    peer.expect_alive();
}
