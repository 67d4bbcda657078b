//! The dirty log as a front end switches it: while requests are in flight, with nothing stopped, and never on memory
//! that is no log.
#![allow(clippy::unwrap_used)]

mod support;

use std::os::fd::{AsRawFd, RawFd};
use std::sync::atomic::Ordering;

use nix::sys::eventfd::EventFd;
use poll_engine::engine::pacing::Pacing;
use poll_engine::memory::Ram;
use poll_engine::memory::log::LOG_PAGE;
use poll_engine::session::wire::{F_LOG_ALL, VRING_F_LOG};
use poll_engine::stats::ErrorKind;
use support::{Back, FEATURES, Guest, Peer, eventfd, longs, readable_within, until, words};

/// Bytes of a log that covers all guests here.
const SIZE: u64 = 1 << 16;

fn log() -> Ram {
    Ram::new(0, SIZE, false).unwrap()
}

fn set_base(peer: &mut Peer, size: u64, offset: u64, fd: RawFd) -> Option<Vec<u8>> {
    peer.send(6, false, &longs(&[size, offset]), &[fd]);
    peer.reply(6)
}

fn switch(peer: &mut Peer, guest: &Guest, on: bool) {
    assert!(peer.ack(2, &longs(&[FEATURES | if on { F_LOG_ALL } else { 0 }]), &[]));
    let c = &guest.config;
    let log = guest.used();
    let addresses = longs(&[c.desc_addr, c.used_addr, c.avail_addr, log]);
    let flags = if on { VRING_F_LOG } else { 0 };
    assert!(peer.ack(9, &[words(&[guest.index, flags]), addresses].concat(), &[]));
}

fn marked(log: &Ram, addr: u64) -> bool {
    let page = addr / LOG_PAGE;
    let mut byte = [0];
    log.map().slice(page / 8, 1).unwrap().read(&mut byte);
    byte[0] & 1 << (page % 8) != 0
}

fn clear(log: &Ram) {
    log.map().slice(0, SIZE as u32).unwrap().fill(0);
}

#[test]
fn switched_while_a_request_is_in_flight() {
    for pacing in [Pacing::Busy, Pacing::Event] {
        let back = Back::start(pacing);
        let mut peer = back.front();
        let mut guest = Guest::new(0);
        guest.start(&mut peer);
        guest.round_trip();
        back.echo.hold.store(true, Ordering::Release);
        guest.submit();
        until("a held request", || back.echo.held.load(Ordering::Acquire) == 1);

        let log = log();
        let reply = set_base(&mut peer, SIZE, 0, log.fd().as_raw_fd()).unwrap();
        assert_eq!(reply, longs(&[SIZE, 0]), "as Cloud Hypervisor expects it");
        // Acknowledged with the request still held: nothing was drained, so nothing was stopped.
        switch(&mut peer, &guest, true);
        assert!(!marked(&log, guest.data), "nothing was written yet");
        back.echo.open_gate();
        guest.wait();
        assert!(marked(&log, guest.data), "a request from before the log");
        until("the used index", || marked(&log, guest.used()));
        assert!(!marked(&log, guest.data + LOG_PAGE));

        // A new log: the old one hears of nothing any more.
        let next = self::log();
        assert_eq!(set_base(&mut peer, SIZE, 0, next.fd().as_raw_fd()), Some(longs(&[SIZE, 0])));
        clear(&log);
        guest.round_trip();
        assert!(marked(&next, guest.data) && !marked(&log, guest.data));

        switch(&mut peer, &guest, false);
        clear(&next);
        guest.round_trip();
        assert_eq!(guest.stop(&mut peer), 4);
        assert!(!marked(&next, guest.data) && !marked(&next, guest.used()), "off");
    }
}

#[test]
fn a_queue_that_stops_has_told_everything() {
    let back = Back::start(Pacing::Busy);
    let mut peer = back.front();
    let mut guest = Guest::new(0);
    guest.start(&mut peer);
    let log = log();
    set_base(&mut peer, SIZE, 0, log.fd().as_raw_fd()).unwrap();
    switch(&mut peer, &guest, true);
    back.echo.hold.store(true, Ordering::Release);
    guest.submit();
    until("a held request", || back.echo.held.load(Ordering::Acquire) == 1);
    clear(&log);
    back.echo.open_gate();
    assert_eq!(guest.stop(&mut peer), 1);
    assert!(marked(&log, guest.data) && marked(&log, guest.used()));
    // Started again, by the same session: it still logs.
    clear(&log);
    guest.set_kick(&mut peer);
    guest.wait();
    guest.round_trip();
    assert!(marked(&log, guest.data));
}

#[test]
fn the_front_end_can_have_itself_told() {
    let back = Back::start(Pacing::Event);
    let mut peer = back.front();
    let mut guest = Guest::new(0);
    guest.start(&mut peer);
    let (log, call) = (log(), eventfd());
    set_base(&mut peer, SIZE, 0, log.fd().as_raw_fd()).unwrap();
    assert!(peer.ack(7, &[], &[call.as_raw_fd()]));
    guest.round_trip();
    assert!(!readable_within(&call, 50), "told of pages while nothing is logged");
    switch(&mut peer, &guest, true);
    guest.round_trip();
    assert!(readable_within(&call, 5000));
    assert!(!peer.ack(7, &[], &[log.fd().as_raw_fd()]), "no eventfd");
    peer.expect_alive();
}

#[test]
fn without_a_log_there_is_nothing_to_write_to() {
    // QEMU sets the features and starts the rings first when a guest that migrates starts its driver.
    let back = Back::start(Pacing::Busy);
    let mut peer = back.front();
    let mut guest = Guest::new(0);
    switch(&mut peer, &guest, true);
    guest.start(&mut peer);
    guest.round_trip();
    switch(&mut peer, &guest, true);
    let log = log();
    set_base(&mut peer, SIZE, 0, log.fd().as_raw_fd()).unwrap();
    guest.round_trip();
    assert!(marked(&log, guest.data));
}

/// A front end that believes that its guest's writes are logged must not go on when they are not.
#[test]
fn what_is_no_log_ends_the_session() {
    let back = Back::start(Pacing::Busy);
    let file = log();
    let pipe = nix::unistd::pipe().unwrap();
    let event: EventFd = eventfd();
    let cases = [
        ("no bytes", 0, 0, file.fd().as_raw_fd()),
        ("behind the end", SIZE, 1, file.fd().as_raw_fd()),
        ("far behind the end", SIZE, 1 << 40, file.fd().as_raw_fd()),
        ("wraps around", SIZE, u64::MAX - 4096, file.fd().as_raw_fd()),
        ("too large for any file", u64::MAX, 0, file.fd().as_raw_fd()),
        ("a pipe", SIZE, 0, pipe.0.as_raw_fd()),
        ("an eventfd", SIZE, 0, event.as_raw_fd()),
        ("shorter than memory", 4, 0, file.fd().as_raw_fd()),
    ];
    for (what, size, offset, fd) in cases {
        let mut peer = back.front();
        let mut guest = Guest::new(0);
        guest.start(&mut peer);
        guest.round_trip();
        assert_eq!(set_base(&mut peer, size, offset, fd), None, "{what}");
        peer.expect_hung_up();
    }
    // No descriptor, two of them, and a payload that is an address of some process.
    for (payload, fds) in [
        (longs(&[SIZE, 0]), vec![]),
        (longs(&[SIZE, 0]), vec![file.fd().as_raw_fd(); 2]),
        (longs(&[SIZE]), vec![file.fd().as_raw_fd()]),
    ] {
        let mut peer = back.front();
        peer.send(6, false, &payload, &fds);
        peer.expect_hung_up();
    }
    let mut peer = back.front();
    Guest::new(0).start(&mut peer);
    peer.expect_alive();
}

#[test]
fn pages_behind_the_log_are_counted_and_left_out() {
    let back = Back::start(Pacing::Busy);
    let mut peer = back.front();
    // The log comes before the memory, and is too short for it.
    let log = log();
    let guest_addr = SIZE * 8 * LOG_PAGE;
    set_base(&mut peer, SIZE, 0, log.fd().as_raw_fd()).unwrap();
    let mut guest = Guest::at(0, guest_addr);
    switch(&mut peer, &guest, true);
    guest.start(&mut peer);
    switch(&mut peer, &guest, true);
    guest.round_trip();
    until("the error to be counted", || back.stats[0].errors(ErrorKind::Memory) > 0);
    guest.round_trip();
    let mut bytes = vec![0; SIZE as usize];
    log.map().slice(0, SIZE as u32).unwrap().read(&mut bytes);
    assert!(bytes.iter().all(|&b| b == 0));
}
