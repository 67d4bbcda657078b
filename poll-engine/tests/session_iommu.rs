//! A device behind a vIOMMU: what it misses is asked for and waited for by its queue alone, what is permitted is kept
//! to, and what is taken back is not touched any more from the acknowledgement on.
#![allow(clippy::unwrap_used)]

mod support;

use std::collections::{BTreeMap, BTreeSet};
use std::io::{ErrorKind as Io, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use nix::sys::eventfd::EventFd;
use poll_engine::device::features;
use poll_engine::engine::pacing::Pacing;
use poll_engine::memory::{MemoryMap, Ram, RegionSpec};
use poll_engine::ring::RingConfig;
use poll_engine::ring::driver::{Buffer, DriverRing};
use poll_engine::session::wire::{F_LOG_ALL, VRING_F_LOG, protocol};
use poll_engine::stats::ErrorKind;
use support::{Back, FEATURES, LIMIT, Peer, QUEUES, eventfd, longs, readable_within, words};

const PAGE: u64 = 4096;
const RO: u8 = 1;
const WO: u8 = 2;
const RW: u8 = 3;
const MISS: u8 = 1;
const UPDATE: u8 = 2;
const INVALIDATE: u8 = 3;
const ACCESS_FAIL: u8 = 4;

const PROTOCOL: u64 = protocol::MQ
    | protocol::REPLY_ACK
    | protocol::BACKEND_REQ
    | protocol::CONFIG
    | protocol::CONFIGURE_MEM_SLOTS;

fn message(iova: u64, size: u64, user: u64, perm: u8, kind: u8) -> Vec<u8> {
    let mut payload = longs(&[iova, size, user]);
    payload.extend([perm, kind, 0, 0, 0, 0, 0, 0]);
    payload
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Asked {
    iova: u64,
    perm: u8,
    kind: u8,
    need_reply: bool,
}

/// A front end with a vIOMMU: memory in pages, and where the guest has mapped them.
struct FrontEnd {
    peer: Peer,
    channel: UnixStream,
    partial: Vec<u8>,
    ram: Ram,
    /// I/O page to guest-physical page and permission.
    table: BTreeMap<u64, (u64, u8)>,
    /// All that was asked, the latest last.
    asked: Vec<Asked>,
    replies: bool,
}

impl FrontEnd {
    /// Negotiated, with memory, and nothing mapped.
    fn new(back: &Back) -> FrontEnd {
        FrontEnd::with(back, PROTOCOL)
    }

    fn with(back: &Back, bits: u64) -> FrontEnd {
        let peer = back.connect();
        peer.send(3, false, &[], &[]);
        peer.send(16, false, &longs(&[bits]), &[]);
        let (channel, theirs) = UnixStream::pair().unwrap();
        channel.set_nonblocking(true).unwrap();
        peer.send(21, false, &[], &[theirs.as_raw_fd()]);
        peer.send(2, false, &longs(&[FEATURES | features::ACCESS_PLATFORM]), &[]);
        let ram = Ram::new(0x10_0000, 1 << 20, false).unwrap();
        let mut front = FrontEnd {
            peer,
            channel,
            partial: Vec::new(),
            ram,
            table: BTreeMap::new(),
            asked: Vec::new(),
            replies: bits & protocol::REPLY_ACK != 0,
        };
        let (spec, fd) = (front.ram.spec(), front.ram.fd().as_raw_fd());
        if front.replies {
            assert!(front.peer.mem_table(&[(spec, fd)]));
        } else {
            let payload = [words(&[1, 0]), support::region(&spec)].concat();
            front.peer.send(5, false, &payload, &[fd]);
        }
        front
    }

    fn page(&mut self) -> u64 {
        self.ram.alloc(PAGE, PAGE).unwrap()
    }

    fn map(&mut self, iova: u64, guest_addr: u64, perm: u8) {
        self.table.insert(iova, (guest_addr, perm));
    }

    fn iotlb(&mut self, iova: u64, size: u64, user: u64, perm: u8, kind: u8) -> bool {
        self.peer.ack(22, &message(iova, size, user, perm, kind), &[])
    }

    fn update(&mut self, iova: u64, guest_addr: u64, size: u64, perm: u8) -> bool {
        let user = self.ram.user_addr(guest_addr);
        self.iotlb(iova, size, user, perm, UPDATE)
    }

    fn invalidate(&mut self, iova: u64, size: u64) -> bool {
        self.iotlb(iova, size, 0, 0, INVALIDATE)
    }

    /// The next message on the channel.
    fn next(&mut self) -> Option<Asked> {
        let mut bytes = [0; 44];
        let have = self.partial.len();
        match self.channel.read(&mut bytes[have..]) {
            Ok(n) => self.partial.extend(&bytes[have..have + n]),
            Err(e) if e.kind() == Io::WouldBlock => return None,
            Err(e) => panic!("channel: {e}"),
        }
        if self.partial.len() < bytes.len() {
            return None;
        }
        let m = std::mem::take(&mut self.partial);
        let word = |at: usize| u32::from_ne_bytes(m[at..at + 4].try_into().unwrap());
        assert_eq!((word(0), word(4) & !8, word(8)), (1, 1, 32), "{m:x?}");
        let iova = u64::from_ne_bytes(m[12..20].try_into().unwrap());
        let asked = Asked { iova, perm: m[36], kind: m[37], need_reply: word(4) & 8 != 0 };
        self.asked.push(asked);
        Some(asked)
    }

    fn reply(&mut self, failed: u64) {
        self.channel.write_all(&[words(&[1, 5, 8]), longs(&[failed])].concat()).unwrap();
    }

    /// Answers all that is asked as the table has it. Returns how many questions that were.
    fn answer(&mut self) -> usize {
        let mut count = 0;
        while let Some(asked) = self.next() {
            if asked.kind != MISS {
                continue;
            }
            count += 1;
            assert_eq!(asked.need_reply, self.replies);
            let found = self.table.get(&(asked.iova & !(PAGE - 1))).copied();
            let found = found.filter(|(_, perm)| perm & asked.perm == asked.perm);
            if let Some((guest_addr, perm)) = found {
                assert!(self.update(asked.iova & !(PAGE - 1), guest_addr, PAGE, perm));
            }
            if self.replies {
                self.reply(u64::from(found.is_none()));
            }
        }
        count
    }

    fn until(&mut self, what: &str, mut probe: impl FnMut() -> bool) {
        let deadline = Instant::now() + LIMIT;
        while !probe() {
            assert!(Instant::now() < deadline, "{what}: not within {LIMIT:?}; asked {:x?}", self.asked);
            self.answer();
            std::thread::sleep(Duration::from_micros(200));
        }
    }

    /// Waits for so many further questions, and answers none.
    fn expect_asked(&mut self, count: usize) -> Vec<Asked> {
        let deadline = Instant::now() + LIMIT;
        let mut asked = Vec::new();
        while asked.len() < count {
            assert!(Instant::now() < deadline, "{count} questions, {asked:x?}");
            asked.extend(self.next());
        }
        asked
    }

    fn expect_silence(&mut self, for_how_long: Duration) {
        std::thread::sleep(for_how_long);
        let next = self.next();
        assert!(next.is_none(), "{next:x?}");
    }
}

/// A queue whose three parts are in pages of their own, anywhere.
struct IoQueue {
    index: u32,
    size: u16,
    /// By I/O virtual addresses, as the back end knows it, and by ours.
    told: RingConfig,
    driver: DriverRing,
    kick: EventFd,
    call: EventFd,
    err: EventFd,
    count: u8,
}

/// Where the parts of a queue's ring are, in I/O space.
fn ring_iova(index: u32, part: u64) -> u64 {
    0xffff_0000_0000_0000 + (u64::from(index) << 32) + (part << 24)
}

impl IoQueue {
    fn new(front: &mut FrontEnd, index: u32) -> IoQueue {
        let size = 16;
        let own =
            DriverRing::lay_out(&mut front.ram, size, features::EVENT_IDX | features::INDIRECT_DESC).unwrap();
        let to_guest = |user: u64| user - front.ram.user_addr(0x10_0000) + 0x10_0000;
        let parts = [own.desc_addr, own.avail_addr, own.used_addr].map(to_guest);
        for (part, (at, perm)) in (0..).zip(parts.into_iter().zip([RO, RO, RW])) {
            front.map(ring_iova(index, part), at & !(PAGE - 1), perm);
        }
        let told = RingConfig {
            desc_addr: ring_iova(index, 0),
            avail_addr: ring_iova(index, 1),
            used_addr: ring_iova(index, 2),
            ..own
        };
        let driver = DriverRing::new(&own, front.ram.map()).unwrap();
        let (kick, call, err) = (eventfd(), eventfd(), eventfd());
        IoQueue { index, size, told, driver, kick, call, err, count: 0 }
    }

    fn start_at(&self, front: &mut FrontEnd, base: u32) {
        let (peer, i) = (&front.peer, self.index);
        let c = &self.told;
        peer.send(8, false, &words(&[i, self.size.into()]), &[]);
        peer.send(10, false, &words(&[i, base]), &[]);
        let addresses = longs(&[c.desc_addr, c.used_addr, c.avail_addr, 0]);
        peer.send(9, false, &[words(&[i, 0]), addresses].concat(), &[]);
        peer.send(13, false, &longs(&[i.into()]), &[self.call.as_raw_fd()]);
        peer.send(14, false, &longs(&[i.into()]), &[self.err.as_raw_fd()]);
        peer.send(12, false, &longs(&[i.into()]), &[self.kick.as_raw_fd()]);
        peer.send(18, false, &words(&[i, 1]), &[]);
    }

    fn start(&self, front: &mut FrontEnd) {
        self.start_at(front, 0);
    }

    /// Again, with writes to the used ring logged.
    fn start_logging(&self, front: &mut FrontEnd, base: u32) {
        let (peer, i, c) = (&front.peer, self.index, &self.told);
        peer.send(10, false, &words(&[i, base]), &[]);
        let addresses = longs(&[c.desc_addr, c.used_addr, c.avail_addr, c.used_addr]);
        peer.send(9, false, &[words(&[i, VRING_F_LOG]), addresses].concat(), &[]);
        peer.send(12, false, &longs(&[i.into()]), &[self.kick.as_raw_fd()]);
    }

    fn stop(&self, front: &mut FrontEnd) -> u32 {
        let reply = front.peer.ask(11, &words(&[self.index, 0]));
        u32::from_ne_bytes(reply[4..].try_into().unwrap())
    }

    /// Makes a request available: `out` to read from, `into` to write to.
    fn submit(&mut self, out: &[(u64, u32)], into: &[(u64, u32)]) {
        let buffer = |writable: bool| move |&(addr, len): &(u64, u32)| Buffer { addr, len, writable };
        let buffers: Vec<Buffer> =
            out.iter().map(buffer(false)).chain(into.iter().map(buffer(true))).collect();
        self.driver.add(&buffers).unwrap();
        if self.driver.publish() {
            self.kick.write(1).unwrap();
        }
    }

    /// A round trip through two pages that are mapped at `iova` and behind it.
    fn round_trip(&mut self, front: &mut FrontEnd, iova: u64) {
        self.count = self.count.wrapping_add(1);
        let page = |front: &FrontEnd, iova: u64| front.table[&(iova & !(PAGE - 1))].0;
        let map = Arc::clone(front.ram.map());
        map.slice(page(front, iova), 100).unwrap().fill(self.count);
        self.submit(&[(iova, 100)], &[(iova + PAGE, 100)]);
        let driver = &mut self.driver;
        front.until("a request", || driver.finished() > 0);
        assert_eq!(self.driver.collect().map(|(_, len)| len), Some(100));
        assert_eq!(bytes(&map, page(front, iova + PAGE), 100), vec![self.count; 100]);
    }
}

fn bytes(map: &MemoryMap, at: u64, len: u32) -> Vec<u8> {
    let mut bytes = vec![0; len as usize];
    map.slice(at, len).unwrap().read(&mut bytes);
    bytes
}

/// Two pages side by side in I/O space, and anywhere in memory.
fn data(front: &mut FrontEnd, iova: u64) -> [u64; 2] {
    let (into, out) = (front.page(), front.page());
    front.map(iova, out, RO);
    front.map(iova + PAGE, into, RW);
    [out, into]
}

const DATA: u64 = 0x5_0000_0000;

#[test]
fn addresses_are_asked_for_once_and_rings_too() {
    for pacing in [Pacing::Busy, Pacing::Adaptive, Pacing::Event] {
        let back = Back::start(pacing);
        let mut front = FrontEnd::new(&back);
        let mut queue = IoQueue::new(&mut front, 0);
        data(&mut front, DATA);
        queue.start(&mut front);
        let ring = front.expect_asked(3);
        let wanted = [(0, RO), (1, RO), (2, RW)];
        for (asked, (part, perm)) in ring.iter().zip(wanted) {
            let miss = Asked { iova: ring_iova(0, part), perm, kind: MISS, need_reply: true };
            assert_eq!(*asked, miss);
        }
        front.peer.expect_alive();
        for part in 0..3 {
            let (page, perm) = front.table[&ring_iova(0, part)];
            assert!(front.update(ring_iova(0, part), page, PAGE, perm));
            front.reply(0);
        }
        // Both buffers are asked for at once.
        queue.submit(&[(DATA + 8, 100)], &[(DATA + PAGE, 100)]);
        let asked = front.expect_asked(2);
        assert_eq!((asked[0].iova, asked[0].perm), (DATA + 8, RO));
        assert_eq!((asked[1].iova, asked[1].perm), (DATA + PAGE, WO));
        for iova in [DATA, DATA + PAGE] {
            let (page, perm) = front.table[&iova];
            assert!(front.update(iova, page, PAGE, perm));
            front.reply(0);
        }
        support::until("the request", || queue.driver.finished() > 0);
        queue.driver.collect().unwrap();
        for _ in 0..50 {
            queue.round_trip(&mut front, DATA);
        }
        assert_eq!(front.asked.len(), 5, "{:x?}", front.asked);
        assert_eq!(back.stats[0].errors_total(), 0);
        assert_eq!(queue.stop(&mut front), 51);
    }
}

#[test]
fn a_front_end_without_acknowledgements_is_answered_all_the_same() {
    let back = Back::start(Pacing::Adaptive);
    let mut front = FrontEnd::with(&back, PROTOCOL & !protocol::REPLY_ACK);
    let mut queue = IoQueue::new(&mut front, 0);
    data(&mut front, DATA);
    queue.start(&mut front);
    (0..10).for_each(|_| queue.round_trip(&mut front, DATA));
    assert!(front.asked.iter().all(|a| !a.need_reply));
    assert!(front.invalidate(DATA, PAGE));
    queue.round_trip(&mut front, DATA);
    // Whether there is a translation cannot be told: it is asked again now and then, and waited for.
    queue.submit(&[(DATA + 64 * PAGE, 100)], &[(DATA + PAGE, 100)]);
    let first = front.expect_asked(1);
    front.expect_silence(Duration::from_millis(400));
    assert_eq!(front.expect_asked(1), first);
    let page = front.page();
    assert!(front.update(DATA + 64 * PAGE, page, PAGE, RO));
    support::until("the request", || queue.driver.finished() > 0);
}

#[test]
fn a_queue_that_waits_holds_up_no_other_and_asks_once() {
    for pacing in [Pacing::Busy, Pacing::Adaptive, Pacing::Event] {
        let back = Back::start(pacing);
        let mut front = FrontEnd::new(&back);
        let (mut slow, mut fast) = (IoQueue::new(&mut front, 0), IoQueue::new(&mut front, 1));
        data(&mut front, DATA);
        slow.start(&mut front);
        fast.start(&mut front);
        slow.round_trip(&mut front, DATA);
        fast.round_trip(&mut front, DATA);
        let lost = DATA + 64 * PAGE;
        slow.submit(&[(lost, 100)], &[(DATA + PAGE, 100)]);
        front.expect_asked(1);
        let polls = back.stats[0].polls.get();
        let silent = front.asked.len();
        for i in 0..500u32 {
            fast.round_trip(&mut front, DATA);
            if i % 100 == 0 {
                // A translation of something else is no reason to ask again.
                assert!(front.update(DATA + (100 + u64::from(i)) * PAGE, 0x10_0000, PAGE, RW));
            }
        }
        assert_eq!(front.asked.len(), silent, "{:x?}", front.asked);
        assert_eq!(back.stats[0].polls.get(), polls, "{pacing:?}: a queue that waits is looked at");
        assert_eq!(slow.driver.finished(), 0);
        // It can be stopped as it is; the chain was not consumed, and is taken the next time.
        assert_eq!(slow.stop(&mut front), 1);
        slow.start_at(&mut front, 1);
        let page = front.page();
        front.map(lost, page, RO);
        front.reply(0);
        let driver = &mut slow.driver;
        front.until("the request", || driver.finished() > 0);
        fast.round_trip(&mut front, DATA);
        assert_eq!(back.stats[0].errors_total() + back.stats[1].errors_total(), 0);
    }
}

#[test]
fn buffers_and_tables_go_on_in_scattered_pages() {
    let back = Back::start(Pacing::Adaptive);
    let mut front = FrontEnd::new(&back);
    let mut queue = IoQueue::new(&mut front, 0);
    let map = Arc::clone(front.ram.map());
    // Neighbours in I/O space are in reverse order in memory.
    let pages: Vec<u64> = (0..8).map(|_| front.page()).collect();
    for (i, &page) in (0..).zip(pages.iter().rev()) {
        front.map(DATA + i * PAGE, page, if i < 4 { RO } else { WO });
    }
    let at = |i: u64| pages[7 - i as usize];
    for i in 0..4 {
        map.slice(at(i), PAGE as u32).unwrap().fill(0x10 + i as u8);
    }
    queue.start(&mut front);
    // Three pages and a half, from the middle of a page.
    let len = 3 * PAGE as u32 + 100;
    queue.submit(&[(DATA + 2048, len)], &[(DATA + 4 * PAGE, len)]);
    let driver = &mut queue.driver;
    front.until("the request", || driver.finished() > 0);
    assert_eq!(queue.driver.collect().map(|(_, len)| len), Some(len));
    let sent: Vec<u8> = (0..4).flat_map(|i| bytes(&map, at(i), PAGE as u32)).collect();
    let got: Vec<u8> = (4..8).flat_map(|i| bytes(&map, at(i), PAGE as u32)).collect();
    assert_eq!(got[..len as usize], sent[2048..][..len as usize]);
    // A table that is cut by the end of a page, in the middle of a descriptor's neighbour.
    let [table, more] = [front.page(), front.page()];
    let iova = DATA + 32 * PAGE;
    front.map(iova, more, RO);
    front.map(iova + PAGE, table, RO);
    let last = more + PAGE - 16;
    let desc = |addr: u64, len: u32, flags: u16, next: u16| {
        [&addr.to_le_bytes()[..], &len.to_le_bytes(), &flags.to_le_bytes(), &next.to_le_bytes()].concat()
    };
    map.slice(last, 16).unwrap().write(&desc(DATA, 100, 1, 1));
    map.slice(table, 16).unwrap().write(&desc(DATA + 4 * PAGE, 100, 2, 0));
    let layout = queue.driver.split().unwrap();
    let indirect = vring::layout::Desc { addr: iova + PAGE - 16, len: 32, flags: 4, next: 0 };
    layout.set_desc(0, indirect);
    queue.driver.make_available(0);
    queue.driver.publish();
    queue.kick.write(1).unwrap();
    let driver = &mut queue.driver;
    front.until("the indirect request", || driver.finished() > 0);
    assert_eq!(queue.driver.collect(), Some((0, 100)));
    assert_eq!(bytes(&map, at(4), 100), vec![0x10; 100]);
    assert_eq!(back.stats[0].errors_total(), 0);
}

#[test]
fn permissions_are_kept_to_and_a_refusal_breaks_its_queue_alone() {
    // What is mapped at the page that a request writes to (or reads from), whether an answer comes at all, and
    // what is said on the channel after it.
    for (perm, is_read, fails) in [(RO, false, true), (WO, true, true), (RO, true, false), (WO, false, false)]
    {
        let back = Back::start(Pacing::Event);
        let mut front = FrontEnd::new(&back);
        let (mut bad, mut good) = (IoQueue::new(&mut front, 0), IoQueue::new(&mut front, 1));
        data(&mut front, DATA);
        bad.start(&mut front);
        good.start(&mut front);
        bad.round_trip(&mut front, DATA);
        good.round_trip(&mut front, DATA);
        let iova = DATA + 64 * PAGE;
        let page = front.page();
        let map = Arc::clone(front.ram.map());
        map.slice(page, PAGE as u32).unwrap().fill(0x77);
        assert!(front.update(iova, page, PAGE, perm));
        front.asked.clear();
        if is_read {
            bad.submit(&[(iova, 100)], &[(DATA + PAGE, 100)]);
        } else {
            bad.submit(&[(DATA, 100)], &[(iova, 100)]);
        }
        if !fails {
            support::until("the request", || bad.driver.finished() > 0);
            assert!(front.asked.is_empty());
            continue;
        }
        // It may have been widened since: that is asked before anything else.
        let wanted = if is_read { RO } else { WO };
        let asked = front.expect_asked(1)[0];
        assert_eq!((asked.iova, asked.perm, asked.kind), (iova, wanted, MISS));
        assert!(front.update(iova, page, PAGE, perm));
        let told = front.expect_asked(1)[0];
        assert_eq!(told, Asked { iova, perm: wanted, kind: ACCESS_FAIL, need_reply: false });
        assert!(readable_within(&bad.err, 5000), "the error descriptor stays silent");
        assert_eq!(back.stats[0].errors(ErrorKind::Memory), 1);
        front.reply(0);
        assert_eq!(bytes(&map, page, PAGE as u32), vec![0x77; PAGE as usize], "written all the same");
        (0..20).for_each(|_| good.round_trip(&mut front, DATA));
        assert_eq!(bad.stop(&mut front), 1, "the chain was not consumed");
        front.peer.expect_alive();
        // Wide enough, it is taken.
        assert!(front.update(iova, page, PAGE, RW));
        bad.start_at(&mut front, 1);
        let driver = &mut bad.driver;
        front.until("the request", || driver.finished() > 0);
    }
}

#[test]
fn a_negative_answer_breaks_the_queue_and_silence_does_not() {
    let back = Back::start(Pacing::Adaptive);
    let mut front = FrontEnd::new(&back);
    let (mut bad, mut good) = (IoQueue::new(&mut front, 0), IoQueue::new(&mut front, 1));
    data(&mut front, DATA);
    bad.start(&mut front);
    good.start(&mut front);
    bad.round_trip(&mut front, DATA);
    good.round_trip(&mut front, DATA);
    bad.submit(&[(DATA, 100)], &[(0xdead_0000, 100)]);
    front.expect_asked(1);
    // Answered wrongly: with other pages, with none of ours, and with a success that brought nothing.
    assert!(front.update(0xdead_1000, 0x10_0000, PAGE, RW));
    let outside = front.ram.spec().user_addr + front.ram.spec().size - 100;
    assert!(!front.iotlb(0xdead_0000, PAGE, outside, RW, UPDATE));
    front.reply(0);
    front.expect_silence(Duration::from_millis(400));
    assert!(!readable_within(&bad.err, 0));
    // It asks again in its own time.
    assert_eq!(front.expect_asked(1)[0].iova, 0xdead_0000);
    good.round_trip(&mut front, DATA);
    front.reply(1);
    assert!(readable_within(&bad.err, 5000));
    assert_eq!(back.stats[0].errors(ErrorKind::Memory), 1);
    (0..10).for_each(|_| good.round_trip(&mut front, DATA));
    assert_eq!(back.stats[1].errors_total(), 0);
    // A front end that leaves a queue waiting can go, and another come.
    good.submit(&[(DATA, 100)], &[(0xbeef_0000, 100)]);
    front.expect_asked(1);
    drop(front);
    let mut front = FrontEnd::new(&back);
    let mut queue = IoQueue::new(&mut front, 0);
    data(&mut front, DATA);
    queue.start(&mut front);
    queue.round_trip(&mut front, DATA);
}

#[test]
fn a_ring_that_is_not_mapped_can_be_stopped_refused_and_started() {
    let back = Back::start(Pacing::Adaptive);
    let mut front = FrontEnd::new(&back);
    let mut queue = IoQueue::new(&mut front, 0);
    data(&mut front, DATA);
    queue.start(&mut front);
    front.expect_asked(3);
    assert_eq!(queue.stop(&mut front), 0);
    (0..3).for_each(|_| front.reply(0));
    queue.start(&mut front);
    front.expect_asked(3);
    // The used ring may not be written: no start.
    let (page, _) = front.table[&ring_iova(0, 2)];
    front.reply(0);
    front.reply(0);
    assert!(front.update(ring_iova(0, 2), page, PAGE, RO));
    assert_eq!(front.expect_asked(1)[0].kind, ACCESS_FAIL);
    front.reply(0);
    front.peer.expect_alive();
    queue.submit(&[(DATA, 100)], &[(DATA + PAGE, 100)]);
    front.expect_silence(Duration::from_millis(50));
    assert_eq!(queue.driver.finished(), 0);
    assert_eq!(queue.stop(&mut front), 0);
    // And there is nothing at all.
    queue.start(&mut front);
    front.expect_asked(1);
    front.reply(1);
    front.peer.expect_alive();
    // A new kick descriptor is a new try.
    assert_eq!(queue.stop(&mut front), 0);
    queue.start(&mut front);
    let driver = &mut queue.driver;
    front.until("the request", || driver.finished() > 0);
}

#[test]
fn an_invalidation_waits_for_what_points_there_and_for_nothing_else() {
    for pacing in [Pacing::Event, Pacing::Adaptive] {
        let back = Back::start(pacing);
        let mut front = FrontEnd::new(&back);
        let (mut one, mut two) = (IoQueue::new(&mut front, 0), IoQueue::new(&mut front, 1));
        let [_, into] = data(&mut front, DATA);
        let other = DATA + 64 * PAGE;
        let [_, other_into] = data(&mut front, other);
        one.start(&mut front);
        two.start(&mut front);
        one.round_trip(&mut front, DATA);
        two.round_trip(&mut front, other);
        back.echo.hold.store(true, Ordering::Release);
        let map = Arc::clone(front.ram.map());
        one.submit(&[(DATA, 100)], &[(DATA + PAGE, 100)]);
        two.submit(&[(other, 100)], &[(other + PAGE, 100)]);
        support::until("requests to be taken", || back.echo.held.load(Ordering::Acquire) == 2);

        // Nothing in flight points here, nor into the page that is mapped beside it in memory.
        assert!(front.invalidate(other + 2 * PAGE, PAGE));
        assert!(front.update(other + 2 * PAGE, 0x10_0000, PAGE, RW));
        assert!(front.invalidate(other + 2 * PAGE, PAGE));

        front.peer.send(22, true, &message(DATA + PAGE, PAGE, 0, 0, INVALIDATE), &[]);
        assert!(!readable_within(&front.peer.stream, 150), "acknowledged with a request in flight");
        back.echo.open_gate();
        assert_eq!(front.peer.reply(22).unwrap(), longs(&[0]));
        assert!(one.driver.finished() > 0, "acknowledged before the driver could know");
        one.driver.collect().unwrap();
        support::until("the other request", || two.driver.finished() > 0);
        two.driver.collect().unwrap();
        assert_ne!(bytes(&map, other_into, 100), vec![0; 100]);

        // From the acknowledgement on the old page is somebody else's.
        map.slice(into, PAGE as u32).unwrap().fill(0xee);
        let new = front.page();
        front.map(DATA + PAGE, new, RW);
        (0..20).for_each(|_| one.round_trip(&mut front, DATA));
        assert_eq!(bytes(&map, into, PAGE as u32), vec![0xee; PAGE as usize], "the old page was touched");
        // The same by a translation in place of another, which is an invalidation as well.
        map.slice(new, PAGE as u32).unwrap().fill(0xdd);
        front.map(DATA + PAGE, into, RW);
        assert!(front.update(DATA + PAGE, into, PAGE, RW));
        (0..20).for_each(|_| one.round_trip(&mut front, DATA));
        assert_eq!(bytes(&map, new, PAGE as u32), vec![0xdd; PAGE as usize]);
    }
}

#[test]
fn a_slow_request_elsewhere_does_not_hold_an_invalidation_up() {
    let back = Back::start(Pacing::Adaptive);
    let mut front = FrontEnd::new(&back);
    let mut queue = IoQueue::new(&mut front, 0);
    data(&mut front, DATA);
    let other = DATA + 64 * PAGE;
    data(&mut front, other);
    queue.start(&mut front);
    queue.round_trip(&mut front, DATA);
    queue.round_trip(&mut front, other);
    back.echo.hold.store(true, Ordering::Release);
    queue.submit(&[(other, 100)], &[(other + PAGE, 100)]);
    support::until("the request to be taken", || back.echo.held.load(Ordering::Acquire) == 1);
    back.echo.hold.store(false, Ordering::Release);
    for _ in 0..20 {
        // What was mapped while it was taken, is not what it points to.
        assert!(front.invalidate(DATA, 2 * PAGE));
        queue.round_trip(&mut front, DATA);
    }
    assert_eq!(back.echo.held.load(Ordering::Acquire), 1);
    back.echo.open_gate();
    support::until("the slow request", || queue.driver.finished() > 0);
}

#[test]
fn an_invalidated_ring_is_left_alone_and_may_come_back_elsewhere() {
    for pacing in [Pacing::Busy, Pacing::Adaptive, Pacing::Event] {
        let back = Back::start(pacing);
        let mut front = FrontEnd::new(&back);
        let (mut queue, mut good) = (IoQueue::new(&mut front, 0), IoQueue::new(&mut front, 1));
        data(&mut front, DATA);
        queue.start(&mut front);
        good.start(&mut front);
        good.round_trip(&mut front, DATA);
        let map = Arc::clone(front.ram.map());
        let mut taken = 0;
        for part in [2, 0, 1, 2] {
            queue.round_trip(&mut front, DATA);
            taken += 1;
            // In flight when it is invalidated: it is answered first.
            back.echo.hold.store(true, Ordering::Release);
            queue.submit(&[(DATA, 100)], &[(DATA + PAGE, 100)]);
            support::until("the request to be taken", || back.echo.held.load(Ordering::Acquire) == 1);
            taken += 1;
            front.peer.send(22, true, &message(ring_iova(0, part), 16, 0, 0, INVALIDATE), &[]);
            assert!(!readable_within(&front.peer.stream, 100), "acknowledged with a request in flight");
            back.echo.open_gate();
            assert_eq!(front.peer.reply(22).unwrap(), longs(&[0]));
            assert!(queue.driver.finished() > 0);
            queue.driver.collect().unwrap();
            let old: Vec<u64> = (0..3).map(|p| front.table[&ring_iova(0, p)].0).collect();
            let before: Vec<_> = old.iter().map(|&at| bytes(&map, at, PAGE as u32)).collect();
            std::thread::sleep(Duration::from_millis(20));
            for (i, &at) in old.iter().enumerate() {
                assert!(bytes(&map, at, PAGE as u32) == before[i], "part {i} was touched");
            }
            // The other parts as well: they are to move.
            assert!(front.invalidate(ring_iova(0, 0), 3 << 24));
            // Moved, with all that is in it, to pages of other addresses; and poisoned where it was.
            let moved: Vec<u64> = (0..3).map(|_| front.page()).collect();
            for i in 0..3 {
                map.slice(moved[i], PAGE as u32).unwrap().write(&before[i]);
                map.slice(old[i], PAGE as u32).unwrap().fill(0xaa);
                let perm = front.table[&ring_iova(0, i as u64)].1;
                front.map(ring_iova(0, i as u64), moved[i], perm);
            }
            let [desc_addr, avail_addr, used_addr] = [0, 1, 2].map(|i: usize| front.ram.user_addr(moved[i]));
            let own = RingConfig { desc_addr, avail_addr, used_addr, base: taken, ..queue.told };
            queue.driver = DriverRing::new(&own, &map).unwrap();
            good.round_trip(&mut front, DATA);
            queue.round_trip(&mut front, DATA);
            taken += 1;
            for &at in &old {
                assert!(bytes(&map, at, PAGE as u32).iter().all(|&b| b == 0xaa), "the old ring was touched");
            }
        }
        assert_eq!(back.stats[0].errors_total(), 0);
        // And stopped while it is not mapped.
        assert!(front.invalidate(0, 0));
        assert_eq!(queue.stop(&mut front), taken);
        good.round_trip(&mut front, DATA);
    }
}

/// Pages of I/O space that requests are for.
const PAGES: u64 = 8;

/// Pages come and go under load, and what was taken back is never touched.
#[test]
fn invalidations_under_load_leave_retired_pages_alone() {
    for pacing in [Pacing::Adaptive, Pacing::Event] {
        let back = Back::start(pacing);
        let mut front = FrontEnd::new(&back);
        let mut queues = [IoQueue::new(&mut front, 0), IoQueue::new(&mut front, 1)];
        let mut spare: Vec<u64> = (0..16).map(|_| front.page()).collect();
        for i in 0..PAGES {
            let page = front.page();
            front.map(DATA + i * PAGE, page, RW);
        }
        for queue in &queues {
            queue.start(&mut front);
        }
        // Requests are held, and let go by somebody who knows nothing of all this.
        back.echo.hold.store(true, Ordering::Release);
        let stop = AtomicBool::new(false);
        let echo = &back.echo;
        std::thread::scope(|scope| {
            let _stopped = StopOnDrop(&stop);
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    echo.pulse();
                    std::thread::sleep(Duration::from_micros(300));
                }
            });
            let map = Arc::clone(front.ram.map());
            let mut random = 0x1234_5678_9abc_def1u64;
            let mut next = |below: u64| {
                random ^= random << 13;
                random ^= random >> 7;
                random ^= random << 17;
                random % below
            };
            let (mut done, mut pending, mut invalidated) = (0, [0; 2], 0);
            let deadline = Instant::now() + Duration::from_secs(20);
            while done < 1500 || invalidated < 150 {
                assert!(Instant::now() < deadline, "{done} requests, {invalidated} invalidations");
                front.answer();
                for (queue, pending) in queues.iter_mut().zip(&mut pending) {
                    while *pending < 6 {
                        let (out, into) = (DATA + next(PAGES) * PAGE, DATA + next(PAGES) * PAGE + 2048);
                        queue.submit(&[(out, 100)], &[(into, 100)]);
                        *pending += 1;
                    }
                    while let Some((_, len)) = queue.driver.collect() {
                        assert_eq!(len, 100);
                        *pending -= 1;
                        done += 1;
                    }
                }
                if next(4) == 0 {
                    invalidated += 1;
                    let first = next(PAGES);
                    let count = 1 + next(PAGES - first);
                    assert!(front.invalidate(DATA + first * PAGE, count * PAGE));
                    for i in first..first + count {
                        let old = front.table[&(DATA + i * PAGE)].0;
                        map.slice(old, PAGE as u32).unwrap().fill(0xc5);
                        let new = spare.swap_remove(next(spare.len() as u64) as usize);
                        // It has been nobody's until now.
                        let there = bytes(&map, new, PAGE as u32);
                        assert!(there.iter().all(|&b| b == 0xc5 || b == 0), "a retired page was written");
                        map.slice(new, PAGE as u32).unwrap().fill(0x11);
                        front.map(DATA + i * PAGE, new, RW);
                        spare.push(old);
                    }
                }
            }
            for &page in &spare {
                assert!(bytes(&map, page, PAGE as u32).iter().all(|&b| b == 0xc5 || b == 0));
            }
        });
        back.echo.open_gate();
        assert_eq!(back.stats[0].errors_total() + back.stats[1].errors_total(), 0);
        assert!(back.stats[0].iotlb_misses.get() > 20);
    }
}

struct StopOnDrop<'a>(&'a AtomicBool);

impl Drop for StopOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

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
    support::until("the request", || queue.driver.finished() > 0);
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
    support::until("the request to be taken", || back.echo.held.load(Ordering::Acquire) == 1);
    for i in 0..5000 {
        assert!(front.update(DATA + (9000 + 2 * i) * PAGE, 0x10_0000, PAGE, RW));
    }
    front.peer.send(22, true, &message(DATA + PAGE, PAGE, 0, 0, INVALIDATE), &[]);
    assert!(!readable_within(&front.peer.stream, 100), "acknowledged with a request in flight");
    back.echo.open_gate();
    assert_eq!(front.peer.reply(22).unwrap(), longs(&[0]));
    support::until("the request", || queue.driver.finished() > 0);
    queue.driver.collect().unwrap();
    queue.round_trip(&mut front, DATA);
    // Nonsense on the channel costs the channel.
    queue.submit(&[(DATA, 100)], &[(0xdead_0000, 100)]);
    front.expect_asked(1);
    front.channel.write_all(&[0x5a; 64]).unwrap();
    support::until("the channel's end", || {
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
    support::until("the request", || queue.driver.finished() > 0);
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
    let mut guest = support::Guest::new(0);
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
