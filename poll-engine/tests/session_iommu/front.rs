//! A front end with a vIOMMU, and queues behind it.

use std::collections::BTreeMap;
use std::io::{ErrorKind as Io, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::sys::eventfd::EventFd;
use poll_engine::device::features;
use poll_engine::memory::{MemoryMap, Ram};
use poll_engine::ring::RingConfig;
use poll_engine::ring::driver::{Buffer, DriverRing};
use poll_engine::session::wire::{VRING_F_LOG, protocol};

use crate::support::{Back, FEATURES, LIMIT, Peer, eventfd, longs, region, words};

pub const PAGE: u64 = 4096;
pub const RO: u8 = 1;
pub const WO: u8 = 2;
pub const RW: u8 = 3;
pub const MISS: u8 = 1;
pub const UPDATE: u8 = 2;
pub const INVALIDATE: u8 = 3;
pub const ACCESS_FAIL: u8 = 4;

pub const PROTOCOL: u64 = protocol::MQ
    | protocol::REPLY_ACK
    | protocol::BACKEND_REQ
    | protocol::CONFIG
    | protocol::CONFIGURE_MEM_SLOTS;

pub fn message(iova: u64, size: u64, user: u64, perm: u8, kind: u8) -> Vec<u8> {
    let mut payload = longs(&[iova, size, user]);
    payload.extend([perm, kind, 0, 0, 0, 0, 0, 0]);
    payload
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Asked {
    pub iova: u64,
    pub perm: u8,
    pub kind: u8,
    pub need_reply: bool,
}

/// A front end with a vIOMMU: memory in pages, and where the guest has mapped them.
pub struct FrontEnd {
    pub peer: Peer,
    pub channel: UnixStream,
    pub partial: Vec<u8>,
    pub ram: Ram,
    /// I/O page to guest-physical page and permission.
    pub table: BTreeMap<u64, (u64, u8)>,
    /// All that was asked, the latest last.
    pub asked: Vec<Asked>,
    pub replies: bool,
}

impl FrontEnd {
    /// Negotiated, with memory, and nothing mapped.
    pub fn new(back: &Back) -> FrontEnd {
        FrontEnd::with(back, PROTOCOL)
    }

    pub fn with(back: &Back, bits: u64) -> FrontEnd {
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
            let payload = [words(&[1, 0]), region(&spec)].concat();
            front.peer.send(5, false, &payload, &[fd]);
        }
        front
    }

    pub fn page(&mut self) -> u64 {
        self.ram.alloc(PAGE, PAGE).unwrap()
    }

    pub fn map(&mut self, iova: u64, guest_addr: u64, perm: u8) {
        self.table.insert(iova, (guest_addr, perm));
    }

    pub fn iotlb(&mut self, iova: u64, size: u64, user: u64, perm: u8, kind: u8) -> bool {
        self.peer.ack(22, &message(iova, size, user, perm, kind), &[])
    }

    pub fn update(&mut self, iova: u64, guest_addr: u64, size: u64, perm: u8) -> bool {
        let user = self.ram.user_addr(guest_addr);
        self.iotlb(iova, size, user, perm, UPDATE)
    }

    pub fn invalidate(&mut self, iova: u64, size: u64) -> bool {
        self.iotlb(iova, size, 0, 0, INVALIDATE)
    }

    /// The next message on the channel.
    pub fn next(&mut self) -> Option<Asked> {
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

    pub fn reply(&mut self, failed: u64) {
        self.channel.write_all(&[words(&[1, 5, 8]), longs(&[failed])].concat()).unwrap();
    }

    /// Answers all that is asked as the table has it. Returns how many questions that were.
    pub fn answer(&mut self) -> usize {
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

    pub fn until(&mut self, what: &str, mut probe: impl FnMut() -> bool) {
        let deadline = Instant::now() + LIMIT;
        while !probe() {
            assert!(Instant::now() < deadline, "{what}: not within {LIMIT:?}; asked {:x?}", self.asked);
            self.answer();
            std::thread::sleep(Duration::from_micros(200));
        }
    }

    /// Waits for so many further questions, and answers none.
    pub fn expect_asked(&mut self, count: usize) -> Vec<Asked> {
        let deadline = Instant::now() + LIMIT;
        let mut asked = Vec::new();
        while asked.len() < count {
            assert!(Instant::now() < deadline, "{count} questions, {asked:x?}");
            asked.extend(self.next());
        }
        asked
    }

    pub fn expect_silence(&mut self, for_how_long: Duration) {
        std::thread::sleep(for_how_long);
        let next = self.next();
        assert!(next.is_none(), "{next:x?}");
    }
}

/// A queue whose three parts are in pages of their own, anywhere.
pub struct IoQueue {
    pub index: u32,
    pub size: u16,
    /// By I/O virtual addresses, as the back end knows it, and by ours.
    pub told: RingConfig,
    pub driver: DriverRing,
    pub kick: EventFd,
    pub call: EventFd,
    pub err: EventFd,
    pub count: u8,
}

/// Where the parts of a queue's ring are, in I/O space.
pub fn ring_iova(index: u32, part: u64) -> u64 {
    0xffff_0000_0000_0000 + (u64::from(index) << 32) + (part << 24)
}

impl IoQueue {
    pub fn new(front: &mut FrontEnd, index: u32) -> IoQueue {
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

    pub fn start_at(&self, front: &mut FrontEnd, base: u32) {
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

    pub fn start(&self, front: &mut FrontEnd) {
        self.start_at(front, 0);
    }

    /// Again, with writes to the used ring logged.
    pub fn start_logging(&self, front: &mut FrontEnd, base: u32) {
        let (peer, i, c) = (&front.peer, self.index, &self.told);
        peer.send(10, false, &words(&[i, base]), &[]);
        let addresses = longs(&[c.desc_addr, c.used_addr, c.avail_addr, c.used_addr]);
        peer.send(9, false, &[words(&[i, VRING_F_LOG]), addresses].concat(), &[]);
        peer.send(12, false, &longs(&[i.into()]), &[self.kick.as_raw_fd()]);
    }

    pub fn stop(&self, front: &mut FrontEnd) -> u32 {
        let reply = front.peer.ask(11, &words(&[self.index, 0]));
        u32::from_ne_bytes(reply[4..].try_into().unwrap())
    }

    /// Makes a request available: `out` to read from, `into` to write to.
    pub fn submit(&mut self, out: &[(u64, u32)], into: &[(u64, u32)]) {
        let buffer = |writable: bool| move |&(addr, len): &(u64, u32)| Buffer { addr, len, writable };
        let buffers: Vec<Buffer> =
            out.iter().map(buffer(false)).chain(into.iter().map(buffer(true))).collect();
        self.driver.add(&buffers).unwrap();
        if self.driver.publish() {
            self.kick.write(1).unwrap();
        }
    }

    /// A round trip through two pages that are mapped at `iova` and behind it.
    pub fn round_trip(&mut self, front: &mut FrontEnd, iova: u64) {
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

pub fn bytes(map: &MemoryMap, at: u64, len: u32) -> Vec<u8> {
    let mut bytes = vec![0; len as usize];
    map.slice(at, len).unwrap().read(&mut bytes);
    bytes
}

/// Two pages side by side in I/O space, and anywhere in memory.
pub fn data(front: &mut FrontEnd, iova: u64) -> [u64; 2] {
    let (into, out) = (front.page(), front.page());
    front.map(iova, out, RO);
    front.map(iova + PAGE, into, RW);
    [out, into]
}

pub const DATA: u64 = 0x5_0000_0000;
