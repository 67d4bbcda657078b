//! A session goes on in another back end, as in a live upgrade: at any byte of a message, and while a guest migrates.
#![allow(clippy::unwrap_used)]

mod support;

use std::os::fd::AsRawFd;
use std::time::Duration;

use poll_engine::engine::pacing::Pacing;
use poll_engine::memory::Ram;
use poll_engine::memory::log::LOG_PAGE;
use poll_engine::session::wire::{F_LOG_ALL, VRING_F_LOG};
use support::{Back, FEATURES, Guest, eventfd, longs, readable_within, until, words};

/// A message with a descriptor and an answer: cut behind each of its bytes, which one back end has read and the next has
/// not. The descriptor comes with the first byte.
#[test]
fn a_message_may_be_in_two_halves() {
    let mut back = Back::start(Pacing::Adaptive);
    let mut peer = back.front();
    let mut guest = Guest::new(0);
    guest.start(&mut peer);
    guest.round_trip();
    let message = [words(&[13, 1 | 1 << 3, 8]), longs(&[guest.index.into()])].concat();
    let mut halves = 0;
    for cut in 1..message.len() {
        let call = eventfd();
        peer.send_bytes(&message[..cut], &[call.as_raw_fd()]);
        // It is read as soon as the thread runs; if not, the next one reads all of it.
        std::thread::sleep(Duration::from_millis(2));
        let (next, partial) = back.hand_over([Pacing::Adaptive, Pacing::Event, Pacing::Busy][cut % 3]);
        back = next;
        assert!(partial == cut || partial == 0, "{partial} of {cut} bytes");
        halves += usize::from(partial == cut);
        guest.round_trip();
        peer.send_bytes(&message[cut..], &[]);
        assert_eq!(peer.reply(13), Some(longs(&[0])), "cut behind {cut}");
        guest.call = call;
        guest.driver.set_interrupts(true);
        guest.submit();
        assert!(readable_within(&guest.call, 5000), "the descriptor of a message cut behind {cut}");
        guest.wait();
    }
    assert!(halves > message.len() / 2, "{halves} messages were really in two halves");
    guest.stop(&mut peer);
    peer.expect_alive();
}

fn marked(log: &Ram, addr: u64) -> bool {
    let mut byte = [0];
    let page = addr / LOG_PAGE;
    log.map().slice(page / 8, 1).unwrap().read(&mut byte);
    byte[0] & 1 << (page % 8) != 0
}

/// While a guest migrates, writes are logged before, after and across: what the new one writes is marked in the log of the
/// old one, the ring's among it, and so is what it wrote before it was told to log nothing more.
#[test]
fn the_dirty_log_goes_along() {
    for pacing in [Pacing::Busy, Pacing::Adaptive, Pacing::Event] {
        let mut back = Back::start(pacing);
        let mut peer = back.front();
        let mut guest = Guest::new(0);
        guest.start(&mut peer);
        let (log, log_call) = (Ram::new(0, 1 << 16, false).unwrap(), eventfd());
        peer.send(6, false, &longs(&[1 << 16, 0]), &[log.fd().as_raw_fd()]);
        assert_eq!(peer.reply(6), Some(longs(&[1 << 16, 0])));
        assert!(peer.ack(7, &[], &[log_call.as_raw_fd()]), "SET_LOG_FD");
        let clear = || log.map().slice(0, 1 << 16).unwrap().fill(0);
        let switch = |peer: &mut support::Peer, on: bool, used: u64, guest: &Guest| {
            assert!(peer.ack(2, &longs(&[FEATURES | if on { F_LOG_ALL } else { 0 }]), &[]));
            let (c, flags) = (&guest.config, if on { VRING_F_LOG } else { 0 });
            let addresses = longs(&[c.desc_addr, c.used_addr, c.avail_addr, used]);
            assert!(peer.ack(9, &[words(&[guest.index, flags]), addresses].concat(), &[]));
        };
        let used = guest.used();
        switch(&mut peer, true, used, &guest);
        for _ in 0..3 {
            guest.round_trip();
            assert!(marked(&log, guest.data), "before the hand-over");
            clear();
            back = back.hand_over(pacing).0;
            until("what starting a ring writes", || marked(&log, used));
            clear();
            guest.round_trip();
            assert!(marked(&log, guest.data), "a buffer, after the hand-over");
            until("the used index", || marked(&log, used));
            assert!(!marked(&log, guest.data + LOG_PAGE), "a page that nobody wrote");
            assert!(readable_within(&log_call, 5000), "nobody is told of marks");
            let _ = log_call.read();
        }
        switch(&mut peer, false, used, &guest);
        clear();
        back = back.hand_over(pacing).0;
        guest.round_trip();
        assert!(!marked(&log, guest.data) && !marked(&log, used), "{pacing:?}: logged when it was over");
        guest.stop(&mut peer);
        drop(back);
    }
}
