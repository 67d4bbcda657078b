//! Messages that make no sense, memory that changes, front ends without a channel, and the dirty log.

use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use poll_engine::device::features;
use poll_engine::engine::pacing::Pacing;
use poll_engine::memory::{Ram, RegionSpec};
use poll_engine::session::wire::{F_LOG_ALL, VRING_F_LOG, protocol};

use crate::front::{
    ACCESS_FAIL, DATA, FrontEnd, INVALIDATE, IoQueue, MISS, PAGE, PROTOCOL, RO, RW, UPDATE, bytes, data,
    message, ring_iova,
};
use crate::support::{Back, FEATURES, Guest, LIMIT, QUEUES, longs, readable_within, until, words};

#[test]
fn hostile_messages_are_refused_and_change_nothing() {
    let back = Back::start(Pacing::Adaptive);
    // Before it is negotiated there is no IOTLB.
    let mut plain = back.front();
    assert!(!plain.ack(22, &message(0, PAGE, 0, RW, UPDATE), &[]));
    plain.expect_alive();
    drop(plain);
    let mut front = FrontEnd::new(&back);
    let mut queue = IoQueue::new(&mut front, 0);
    data(&mut front, DATA);
    queue.start(&mut front);
    queue.round_trip(&mut front, DATA);
    let user = front.ram.spec().user_addr;
    for (iova, size, user, perm, kind) in [
        (DATA, 0, user, RW, UPDATE),
        (0, 0, user, RW, UPDATE),
        (u64::MAX, 2, user, RW, UPDATE),
        (DATA, u64::MAX, user, RW, UPDATE),
        (DATA, PAGE, user, 0, UPDATE),
        (DATA, PAGE, user, 4, UPDATE),
        (DATA, PAGE, user, 0xff, UPDATE),
        (DATA, PAGE, user - 1, RW, UPDATE),
        (DATA, PAGE, user + (1 << 20) - 1, RW, UPDATE),
        (DATA, PAGE, u64::MAX, RW, UPDATE),
        (DATA, 1 << 21, user, RW, UPDATE),
        (5, 0, 0, 0, INVALIDATE),
        (u64::MAX, 2, 0, 0, INVALIDATE),
        (DATA, PAGE, user, RW, MISS),
        (DATA, PAGE, user, RW, ACCESS_FAIL),
        (DATA, PAGE, user, RW, 0),
        (DATA, PAGE, user, RW, 5),
        (DATA, PAGE, user, RW, 0xff),
    ] {
        assert!(!front.iotlb(iova, size, user, perm, kind), "{iova:#x} {size:#x} {user:#x} {perm} {kind}");
        queue.round_trip(&mut front, DATA);
    }
    front.asked.clear();
    queue.round_trip(&mut front, DATA);
    assert!(front.asked.is_empty(), "what was refused has changed something");
    assert!(!front.peer.ack(22, &message(0, 0, 0, 0, 0)[..25], &[]), "a short one");
    // Overlaps: the last word counts, a byte at a time.
    let [a, b] = [front.page(), front.page()];
    let map = Arc::clone(front.ram.map());
    map.slice(a, PAGE as u32).unwrap().fill(0xa);
    map.slice(b, PAGE as u32).unwrap().fill(0xb);
    assert!(front.update(DATA + 9 * PAGE, a, PAGE, RO));
    assert!(front.update(DATA + 9 * PAGE + 10, b + 10, 80, RO));
    queue.submit(&[(DATA + 9 * PAGE, 100)], &[(DATA + PAGE, 100)]);
    until("the request", || queue.driver.finished() > 0);
    queue.driver.collect().unwrap();
    let got = bytes(&map, front.table[&(DATA + PAGE)].0, 100);
    assert_eq!(got, [vec![0xa; 10], vec![0xb; 80], vec![0xa; 10]].concat());
    // More than anyone keeps; and with some of it forgotten, what is taken back still waits for what points there.
    for i in 0..3000 {
        assert!(front.update(DATA + (1000 + 2 * i) * PAGE, 0x10_0000, PAGE, RW));
    }
    queue.round_trip(&mut front, DATA);
    back.echo.hold.store(true, Ordering::Release);
    queue.submit(&[(DATA, 100)], &[(DATA + PAGE, 100)]);
    until("the request to be taken", || back.echo.held.load(Ordering::Acquire) == 1);
    for i in 0..5000 {
        assert!(front.update(DATA + (9000 + 2 * i) * PAGE, 0x10_0000, PAGE, RW));
    }
    front.peer.send(22, true, &message(DATA + PAGE, PAGE, 0, 0, INVALIDATE), &[]);
    assert!(!readable_within(&front.peer.stream, 100), "acknowledged with a request in flight");
    back.echo.open_gate();
    assert_eq!(front.peer.reply(22).unwrap(), longs(&[0]));
    until("the request", || queue.driver.finished() > 0);
    queue.driver.collect().unwrap();
    queue.round_trip(&mut front, DATA);
    // Nonsense on the channel costs the channel.
    queue.submit(&[(DATA, 100)], &[(0xdead_0000, 100)]);
    front.expect_asked(1);
    front.channel.write_all(&[0x5a; 64]).unwrap();
    until("the channel's end", || {
        matches!(front.channel.read(&mut [0; 64]), Ok(0) | Err(_)) && !readable_within(&queue.err, 0)
    });
    front.peer.expect_alive();
    assert_eq!(back.stats[0].errors_total(), 0);
}

#[test]
fn memory_may_change_behind_the_translations() {
    let back = Back::start(Pacing::Adaptive);
    let mut front = FrontEnd::new(&back);
    let mut queue = IoQueue::new(&mut front, 0);
    data(&mut front, DATA);
    queue.start(&mut front);
    queue.round_trip(&mut front, DATA);
    // More memory, below: the regions get other numbers.
    let more = Ram::new(0x1000, 0x1_0000, false).unwrap();
    assert!(front.peer.add_region(&more.spec(), more.fd().as_raw_fd()));
    front.asked.clear();
    queue.round_trip(&mut front, DATA);
    let iova = DATA + 64 * PAGE;
    let user = more.spec().user_addr;
    assert!(front.iotlb(iova, PAGE, user, RW, UPDATE));
    more.map().slice(0x1000, 100).unwrap().fill(0x42);
    queue.submit(&[(iova, 100)], &[(DATA + PAGE, 100)]);
    until("the request", || queue.driver.finished() > 0);
    queue.driver.collect().unwrap();
    assert_eq!(bytes(front.ram.map(), front.table[&(DATA + PAGE)].0, 100), vec![0x42; 100]);
    assert!(front.asked.is_empty(), "{:x?}", front.asked);
    // Away again, and its translations with it; the ring, in memory that stays, goes on.
    assert!(front.peer.remove_region(&more.spec()));
    queue.round_trip(&mut front, DATA);
    assert!(front.asked.is_empty());
    queue.submit(&[(iova, 100)], &[(DATA + PAGE, 100)]);
    assert_eq!(front.expect_asked(1)[0].iova, iova);
    front.reply(1);
    assert!(readable_within(&queue.err, 5000));
    // The whole table anew: everything is asked for again.
    assert_eq!(queue.stop(&mut front), 4);
    let own: (RegionSpec, _) = (front.ram.spec(), front.ram.fd().as_raw_fd());
    queue.driver.collect();
    let mut queue = IoQueue::new(&mut front, 1);
    queue.start(&mut front);
    queue.round_trip(&mut front, DATA);
    front.asked.clear();
    assert!(front.peer.mem_table(&[own]));
    queue.round_trip(&mut front, DATA);
    assert_eq!(front.asked.len(), 5, "{:x?}", front.asked);
}

/// Front ends that negotiate `VIRTIO_F_ACCESS_PLATFORM` and have no channel know no IOTLB.
#[test]
fn without_a_channel_addresses_are_physical() {
    let back = Back::start(Pacing::Adaptive);
    let mut peer = back.connect();
    peer.send(3, false, &[], &[]);
    peer.send(16, false, &longs(&[PROTOCOL]), &[]);
    peer.send(2, false, &longs(&[FEATURES | features::ACCESS_PLATFORM]), &[]);
    let mut guest = Guest::new(0);
    guest.start(&mut peer);
    (0..10).for_each(|_| guest.round_trip());
    assert!(!peer.ack(22, &message(0, PAGE, guest.ram.spec().user_addr, RW, UPDATE), &[]));
    // A channel is what makes addresses I/O virtual ones: the queue starts anew, and its ring is asked for.
    let (mut channel, theirs) = UnixStream::pair().unwrap();
    channel.set_read_timeout(Some(LIMIT)).unwrap();
    peer.send(21, false, &[], &[theirs.as_raw_fd()]);
    let mut miss = [0; 44];
    channel.read_exact(&mut miss).unwrap();
    assert_eq!(miss[12..20], guest.config.desc_addr.to_ne_bytes());
    assert_eq!(guest.stop(&mut peer), 10);
    assert_eq!(u32::from(QUEUES), 2);
}

/// The pages that are marked in `log`; none is afterwards. The device is not writing.
fn take_marks(log: &Ram) -> BTreeSet<u64> {
    let marks = bytes(log.map(), 0, 4096);
    log.map().slice(0, 4096).unwrap().fill(0);
    let bits =
        |(i, byte): (u64, u8)| (0..8).filter(move |b| byte & 1 << b != 0).map(move |b| (8 * i + b) * PAGE);
    (0..).zip(marks).flat_map(bits).collect()
}

/// The dirty log is of guest-physical pages, wherever a driver behind a vIOMMU has them, its used ring among them.
#[test]
fn the_dirty_log_is_told_physical_pages() {
    let back = Back::start(Pacing::Busy);
    let mut front = FrontEnd::with(&back, PROTOCOL | protocol::LOG_SHMFD);
    let mut queue = IoQueue::new(&mut front, 0);
    let [_, into] = data(&mut front, DATA);
    let used = front.table[&ring_iova(0, 2)].0;
    queue.start(&mut front);
    queue.round_trip(&mut front, DATA);

    let log = Ram::new(0, 4096, false).unwrap();
    front.peer.send(6, false, &longs(&[4096, 0]), &[log.fd().as_raw_fd()]);
    assert_eq!(front.peer.reply(6), Some(longs(&[4096, 0])));
    assert!(front.peer.ack(2, &longs(&[FEATURES | features::ACCESS_PLATFORM | F_LOG_ALL]), &[]));
    // As QEMU has it: the log's address is the used ring's, an I/O virtual one.
    let c = queue.told;
    let addresses = longs(&[c.desc_addr, c.used_addr, c.avail_addr, c.used_addr]);
    assert!(front.peer.ack(9, &[words(&[0, VRING_F_LOG]), addresses].concat(), &[]));
    let round = |front: &mut FrontEnd, queue: &mut IoQueue| {
        take_marks(&log);
        queue.round_trip(front, DATA);
        // Stopped, it has told everything.
        let base = queue.stop(front);
        let marks = take_marks(&log);
        queue.start_logging(front, base);
        marks
    };
    assert_eq!(round(&mut front, &mut queue), BTreeSet::from([into, used]));
    // The same I/O address, and other memory.
    let elsewhere = front.page();
    assert!(front.invalidate(DATA + PAGE, PAGE));
    front.map(DATA + PAGE, elsewhere, RW);
    assert_eq!(round(&mut front, &mut queue), BTreeSet::from([elsewhere, used]));
}
