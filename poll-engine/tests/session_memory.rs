//! Memory tables over the session: replaced, added to and taken from while a queue runs.
#![allow(clippy::unwrap_used)]

mod support;

use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use poll_engine::engine::pacing::Pacing;
use poll_engine::memory::{MemoryMap, Ram, RegionSpec};
use poll_engine::stats::ErrorKind;
use support::{Back, Guest, eventfd, longs, readable_within, region, until, words};

/// Somewhere that is in no region.
const FAR: u64 = 1 << 40;

fn spec(guest_addr: u64, size: u64, user_addr: u64, mmap_offset: u64) -> RegionSpec {
    RegionSpec { guest_addr, size, user_addr, mmap_offset }
}

#[test]
fn there_are_509_slots_and_not_one_more() {
    let back = Back::start(Pacing::Event);
    let mut peer = back.front();
    assert_eq!(peer.ask_number(36), 509);
    let mut guest = Guest::new(0);
    guest.start(&mut peer);
    let file = Ram::new(0, 4096, false).unwrap();
    let slot = |i: u64| spec(FAR + i * 8192, 4096, FAR + i * 8192, 0);
    for i in 1..509 {
        assert!(peer.add_region(&slot(i), file.fd().as_raw_fd()), "region {i}");
    }
    assert!(!peer.add_region(&slot(509), file.fd().as_raw_fd()), "510 regions");
    guest.round_trip();
    // Each of them translates; the last one here.
    let map = Arc::clone(file.map());
    assert!(peer.remove_region(&slot(7)));
    assert!(!peer.remove_region(&slot(7)), "twice");
    assert!(peer.add_region(&slot(509), file.fd().as_raw_fd()));
    guest.submit_at(slot(509).guest_addr, &map);
    guest.wait();
    guest.round_trip();
}

#[test]
fn regions_that_cannot_be_are_refused_and_change_nothing() {
    let back = Back::start(Pacing::Adaptive);
    let mut peer = back.front();
    let mut guest = Guest::new(0);
    guest.start(&mut peer);
    let own = guest.ram.spec();
    let file = Ram::new(0, 1 << 20, false).unwrap();
    let fd = file.fd().as_raw_fd();
    let refused = [
        spec(FAR, 0, FAR, 0),
        spec(u64::MAX - 4095, 8192, FAR, 0),
        spec(u64::MAX - 4095, 4096, FAR, 0),
        spec(FAR, 4096, u64::MAX - 100, 0),
        spec(FAR, 4096, FAR, u64::MAX - 4095),
        spec(FAR, u64::MAX, 1, 0),
        spec(FAR, 1 << 21, FAR, 0),    // longer than the file
        spec(FAR, 4096, FAR, 1 << 20), // behind its end
        spec(own.guest_addr, 4096, FAR, 0),
        spec(own.guest_addr + own.size - 1, 4096, FAR, 0),
        spec(own.guest_addr - 1, 2, FAR, 0),
        spec(FAR, 4096, own.user_addr + 4096, 0),
    ];
    for bad in refused {
        assert!(!peer.add_region(&bad, fd), "{bad:x?}");
        assert!(!peer.mem_table(&[guest.region(), (bad, fd)]), "{bad:x?}");
        guest.round_trip();
    }
    // An eventfd and a socket cannot be mapped, and without a descriptor there is nothing to map.
    let good = spec(FAR, 4096, FAR, 0);
    assert!(!peer.add_region(&good, eventfd().as_raw_fd()));
    assert!(!peer.add_region(&good, peer.stream.as_raw_fd()));
    assert!(!peer.ack(37, &[longs(&[0]), region(&good)].concat(), &[]));
    assert!(!peer.remove_region(&good));
    assert!(!peer.remove_region(&RegionSpec { size: own.size - 4096, ..own }));
    assert!(!peer.remove_region(&RegionSpec { user_addr: own.user_addr + 4096, ..own }));
    let mut short = words(&[2, 0]);
    short.extend(region(&good));
    assert!(!peer.ack(5, &short, &[fd, fd]), "two regions said, one given");
    guest.round_trip();
    // A file of its own may start anywhere, also in the middle of a page.
    assert!(peer.add_region(&spec(FAR, 4096, FAR, 100), fd));
    file.map().slice(100, 100).unwrap().fill(0);
    let there = Ram::new(FAR, 4096, false).unwrap();
    guest.submit_at(FAR, there.map());
    guest.wait();
    assert_eq!(back.stats[0].errors_total(), 0);
}

/// As QEMU before 8.0 does it for a network card with several pairs of queues.
#[test]
fn what_is_added_twice_is_there_until_it_is_removed_twice() {
    let back = Back::start(Pacing::Event);
    let mut peer = back.front();
    let mut guest = Guest::new(0);
    guest.start(&mut peer);
    let file = Ram::new(FAR, 4096, false).unwrap();
    let fd = file.fd().as_raw_fd();
    for _ in 0..3 {
        assert!(peer.add_region(&file.spec(), fd));
    }
    assert!(!peer.add_region(&RegionSpec { mmap_offset: 4096, ..file.spec() }, fd), "another one");
    for _ in 0..2 {
        assert!(peer.remove_region(&file.spec()));
        guest.submit_at(FAR, file.map());
        guest.wait();
    }
    assert_eq!(back.stats[0].errors_total(), 0);
    assert!(peer.remove_region(&file.spec()));
    assert!(!peer.remove_region(&file.spec()), "once more");
    // A table of memory is all there is.
    assert!(peer.add_region(&file.spec(), fd) && peer.add_region(&file.spec(), fd));
    assert!(peer.mem_table(&[guest.region()]));
    assert!(!peer.remove_region(&file.spec()), "of another map");
    guest.round_trip();
}

#[test]
fn a_removal_waits_for_the_requests_in_that_memory() {
    for pacing in [Pacing::Event, Pacing::Adaptive] {
        let back = Back::start(pacing);
        let mut peer = back.front();
        let mut guest = Guest::new(0);
        let err = eventfd();
        guest.start(&mut peer);
        assert!(peer.ack(14, &longs(&[0]), &[err.as_raw_fd()]));
        let more = Ram::new(FAR, 1 << 20, false).unwrap();
        assert!(peer.add_region(&more.spec(), more.fd().as_raw_fd()));
        let map: Arc<MemoryMap> = Arc::clone(more.map());
        back.echo.hold.store(true, Ordering::Release);
        guest.submit_at(FAR, &map);
        until("the request to be taken", || back.echo.held.load(Ordering::Acquire) == 1);

        peer.send(38, true, &[longs(&[0]), region(&more.spec())].concat(), &[]);
        assert!(!readable_within(&peer.stream, 150), "acknowledged with a request in flight");
        assert_eq!(guest.driver.finished(), 0);
        back.echo.open_gate();
        assert_eq!(peer.reply(38).unwrap(), longs(&[0]));
        guest.wait();
        let mut bytes = [0; 100];
        map.slice(FAR + 256, 100).unwrap().read(&mut bytes);
        assert_eq!(bytes, [1; 100], "not answered into the memory it named");
        guest.round_trip();

        // From now on it is outside.
        guest.submit_at(FAR, &map);
        assert!(readable_within(&err, 5000), "the error descriptor stays silent");
        assert_eq!(back.stats[0].errors(ErrorKind::Memory), 1);
        // Two were answered; the broken one was not taken.
        assert_eq!(guest.stop(&mut peer), 2);
        peer.expect_alive();
    }
}

#[test]
fn memory_comes_and_goes_while_requests_do() {
    let back = Back::start(Pacing::Adaptive);
    let mut peer = back.front();
    let mut guest = Guest::new(0);
    guest.start(&mut peer);
    let more = Ram::new(FAR, 1 << 20, false).unwrap();
    let stream = peer.stream.try_clone().unwrap();
    let (requests, stop) = (AtomicUsize::new(0), AtomicBool::new(false));
    std::thread::scope(|scope| {
        let changes = scope.spawn(|| {
            let mut peer = support::Peer::new(stream);
            let mut changes = 0;
            while changes < 100 || (requests.load(Ordering::Relaxed) < 100 && !stop.load(Ordering::Relaxed)) {
                assert!(peer.add_region(&more.spec(), more.fd().as_raw_fd()));
                assert!(peer.remove_region(&more.spec()));
                changes += 2;
            }
        });
        let _stopped = StopOnDrop(&stop);
        while !changes.is_finished() {
            guest.round_trip();
            requests.fetch_add(1, Ordering::Relaxed);
        }
    });
    // The whole table again, and the ring's own memory gone for good.
    assert!(peer.mem_table(&[guest.region()]));
    guest.round_trip();
    assert!(peer.remove_region(&guest.ram.spec()));
    std::thread::sleep(Duration::from_millis(20));
    peer.expect_alive();
    assert_eq!(back.stats[0].errors_total(), 1);
}

/// The scope waits for its threads, also when an assertion ends it.
struct StopOnDrop<'a>(&'a AtomicBool);

impl Drop for StopOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

#[test]
fn memory_can_be_used_as_soon_as_it_is_acknowledged() {
    for pacing in [Pacing::Busy, Pacing::Adaptive, Pacing::Event] {
        let back = Back::start(pacing);
        let mut peer = back.front();
        let mut guest = Guest::new(0);
        guest.start(&mut peer);
        let more = Ram::new(FAR, 1 << 20, false).unwrap();
        let map: Arc<MemoryMap> = Arc::clone(more.map());
        for _ in 0..200 {
            assert!(peer.add_region(&more.spec(), more.fd().as_raw_fd()));
            guest.submit_at(FAR, &map);
            guest.wait();
            assert!(peer.remove_region(&more.spec()));
        }
        assert_eq!(back.stats[0].errors_total(), 0, "{pacing:?}");
    }
}
