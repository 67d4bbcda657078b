//! Sessions one after another leave nothing behind. Alone in its process, which it counts the descriptors of.
#![allow(clippy::unwrap_used)]

mod support;

use poll_engine::engine::pacing::Pacing;
use support::{Back, Guest, until, words};

fn count(dir: &str) -> usize {
    std::fs::read_dir(dir).unwrap().count()
}

fn mappings() -> usize {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    maps.lines().filter(|line| line.contains("guest-ram")).count()
}

#[test]
fn three_hundred_sessions_leave_no_descriptor_thread_or_mapping() {
    let back = Back::start(Pacing::Event);
    let mut before = None;
    for i in 0..300 {
        let mut peer = back.front();
        let mut guest = Guest::new(i % 2);
        guest.start(&mut peer);
        guest.round_trip();
        match i % 4 {
            // Left running, stopped, in the middle of a message, and after a refusal.
            0 => {}
            1 => assert_eq!(guest.stop(&mut peer), 1),
            2 => peer.send_bytes(&words(&[5, 1, 72, 2, 0]), &[std::os::fd::AsRawFd::as_raw_fd(&guest.call)]),
            _ => assert!(!peer.ack(37, &[0; 40], &[std::os::fd::AsRawFd::as_raw_fd(&guest.call)])),
        }
        drop((peer, guest));
        if i == 10 {
            back.front().expect_alive();
            before = Some((count("/proc/self/fd"), count("/proc/self/task"), mappings()));
        }
    }
    // The last one may still be on its way out, as one was when counting before.
    back.front().expect_alive();
    let before = before.unwrap();
    let now = || (count("/proc/self/fd"), count("/proc/self/task"), mappings());
    until("what sessions used to be given back", || {
        let now = now();
        now.0 <= before.0 && now.1 <= before.1 && now.2 <= before.2
    });
}
