//! Front ends that do what they must not: each costs itself its session, or not even that. On the same daemon and the
//! same reactor another disk goes on with verified I/O; the disk that was attacked serves the next front end; and no
//! descriptor, mapping or thread is left behind.
#![allow(clippy::unwrap_used)]

mod blk;
#[path = "../../poll-engine/tests/support/peer.rs"]
mod peer;

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::Duration;

use blk::{Front, Served};
use kickless_tests::image::Image;
use kickless_tests::scene::Scene;
use nix::fcntl::{FcntlArg, OFlag, SealFlag, fcntl};
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags};
use nix::sys::memfd::{MFdFlags, memfd_create};
use peer::{Peer, eventfd, longs, region, until, words};
use poll_engine::device::features;
use poll_engine::memory::{Ram, RegionSpec};
use poll_engine::ring::RingConfig;
use poll_engine::ring::driver::{Buffer, DriverRing};

/// The daemon with two disks.
struct Two {
    served: Served,
    beside: PathBuf,
    _scene: Scene,
}

impl Two {
    fn start(poll: &str) -> Two {
        let scene = Scene::new().unwrap();
        let image = Image::filled(&scene, "disk.img", 4 << 20, 0).unwrap();
        let beside = scene.path("beside.sock");
        let file = format!("--blk-file={}", image.path().display());
        let disk = format!("--disk=socket-path={},backend=ram:1M", beside.display());
        let served = Served::start(&scene, &[&file, &disk, &format!("--poll={poll}"), "--num-queues=2"]);
        Two { served, beside, _scene: scene }
    }

    fn connect(&self) -> Peer {
        Peer::new(UnixStream::connect(&self.served.socket).unwrap())
    }

    fn front(&self) -> Peer {
        let mut peer = self.connect();
        peer.negotiate();
        peer
    }

    /// The disk serves an honest front end.
    fn expect_served(&self) {
        Front::connect(&self.served.socket, 1).queues[0].verified_io(3, 4);
    }

    /// Descriptors, threads, and mappings of memory that front ends shared.
    fn holds(&self) -> [usize; 3] {
        let dir = format!("/proc/{}", self.served.process.pid());
        let count = |what: &str| std::fs::read_dir(format!("{dir}/{what}")).unwrap().count();
        let maps = std::fs::read_to_string(format!("{dir}/maps")).unwrap();
        [count("fd"), count("task"), maps.lines().filter(|l| l.contains("guest-ram")).count()]
    }

    /// Runs attacks beside a disk that must not notice, and counts what they leave.
    fn under(&self, attack: impl FnOnce(&Two)) {
        let mut neighbour = Front::connect(&self.beside, 1);
        self.expect_served();
        blk::beside(&mut neighbour.queues[0], |progress| {
            until("the last session's end", || self.holds()[2] == 2);
            let before = self.holds();
            attack(self);
            progress.more(5);
            self.expect_served();
            until("what sessions had to be given back", || {
                let now = self.holds();
                now.iter().zip(before).all(|(now, before)| *now <= before)
            });
        });
    }

    fn end(self) {
        self.served.terminate();
    }
}

/// A ring and a request's memory, of a front end that knows better.
struct Ring {
    ram: Ram,
    config: RingConfig,
    driver: DriverRing,
    data: u64,
}

impl Ring {
    fn new() -> Ring {
        let mut ram = Ram::new(0x10_0000, 2 << 20, false).unwrap();
        let config =
            DriverRing::lay_out(&mut ram, 64, features::EVENT_IDX | features::INDIRECT_DESC).unwrap();
        let data = ram.alloc(1 << 20, 4096).unwrap();
        let driver = DriverRing::new(&config, ram.map()).unwrap();
        Ring { ram, config, driver, data }
    }

    fn region(&self) -> (RegionSpec, RawFd) {
        (self.ram.spec(), self.ram.fd().as_raw_fd())
    }

    /// Started on queue 0, polled, with a read of `segments` scattered pages in it. It is not waited for.
    fn start(&mut self, peer: &mut Peer, segments: u64) {
        assert!(peer.mem_table(&[self.region()]));
        peer.set_ring(0, &self.config, 0);
        assert!(peer.ack(12, &longs(&[0x100]), &[]));
        assert!(peer.ack(18, &words(&[0, 1]), &[]));
        let mut buffers = vec![Buffer { addr: self.data, len: 16, writable: false }];
        let page = |i: u64| Buffer { addr: self.data + 4096 + 8192 * i, len: 512, writable: true };
        buffers.extend((0..segments).map(page));
        buffers.push(Buffer { addr: self.data + 16, len: 1, writable: true });
        self.driver.add(&buffers).unwrap();
        self.driver.publish();
    }
}

fn memfd(size: i64) -> OwnedFd {
    let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
    let fd = memfd_create(c"guest-ram", flags).unwrap();
    nix::unistd::ftruncate(&fd, size).unwrap();
    fd
}

fn again(fd: &OwnedFd, flags: OFlag) -> OwnedFd {
    let path = format!("/proc/self/fd/{}", fd.as_raw_fd());
    let read = !flags.contains(OFlag::O_WRONLY);
    File::options().read(read).write(!read).custom_flags(flags.bits()).open(path).unwrap().into()
}

fn sealed(seal: SealFlag) -> OwnedFd {
    let fd = memfd(1 << 20);
    fcntl(&fd, FcntlArg::F_ADD_SEALS(seal)).unwrap();
    fd
}

/// An epoll descriptor that is ready for ever.
fn epoll() -> OwnedFd {
    let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).unwrap();
    let event = eventfd();
    event.write(1).unwrap();
    epoll.add(&event, EpollEvent::new(EpollFlags::EPOLLIN, 0)).unwrap();
    epoll.0
}

/// Descriptors that are not what a front end says they are, with what they are.
fn zoo() -> Vec<(&'static str, OwnedFd)> {
    let memory = memfd(1 << 20);
    let (pipe, pipe_end) = nix::unistd::pipe().unwrap();
    let (socket, _) = UnixStream::pair().unwrap();
    vec![
        ("a pipe", pipe),
        ("a pipe's other end", pipe_end),
        ("a socket", socket.into()),
        ("a directory", File::open("/").unwrap().into()),
        ("a memfd to be read only", again(&memory, OFlag::O_RDONLY)),
        ("a memfd to be written only", again(&memory, OFlag::O_WRONLY)),
        ("a path", again(&memory, OFlag::O_PATH)),
        ("an epoll", epoll()),
        ("/dev/null", File::open("/dev/null").unwrap().into()),
        ("/proc/self/maps", File::open("/proc/self/maps").unwrap().into()),
    ]
}

const FAR: u64 = 1 << 40;

fn spec(guest_addr: u64, size: u64, user_addr: u64, mmap_offset: u64) -> RegionSpec {
    RegionSpec { guest_addr, size, user_addr, mmap_offset }
}

fn descriptors_that_are_not_what_they_claim(two: &Two) {
    let mut peer = two.front();
    let ring = Ring::new();
    assert!(peer.mem_table(&[ring.region()]));
    let mut memory = zoo();
    memory.push(("a memfd sealed against writing", sealed(SealFlag::F_SEAL_WRITE)));
    memory.push(("a memfd sealed against future writing", sealed(SealFlag::F_SEAL_FUTURE_WRITE)));
    memory.push(("an eventfd", eventfd().into()));
    memory.push(("a memfd too short", memfd(4096)));
    for (what, fd) in &memory {
        let there = spec(FAR, 1 << 20, FAR, 0);
        assert!(!peer.add_region(&there, fd.as_raw_fd()), "{what} as memory");
        assert!(!peer.mem_table(&[ring.region(), (there, fd.as_raw_fd())]), "{what} in a memory table");
    }
    // One that cannot shrink any more is the best of all.
    assert!(peer.add_region(&spec(FAR, 1 << 20, FAR, 0), sealed(SealFlag::F_SEAL_SHRINK).as_raw_fd()));
    let mut events = zoo();
    events.push(("a memfd", memfd(4096)));
    for (what, fd) in &events {
        for request in [12, 13, 14] {
            assert!(!peer.ack(request, &longs(&[0]), &[fd.as_raw_fd()]), "{what} in request {request}");
        }
        // As a channel for our own requests, whatever it is, it is only ever written to.
        peer.ack(21, &[], &[fd.as_raw_fd()]);
    }
    peer.expect_alive();
}

fn regions_that_cannot_be(two: &Two) {
    let mut peer = two.front();
    let ring = Ring::new();
    assert!(peer.mem_table(&[ring.region()]));
    let file = memfd(4 << 20);
    let own = ring.ram.spec();
    for bad in [
        spec(FAR, 0, FAR, 0),
        spec(u64::MAX - 4095, 8192, FAR, 0),
        spec(FAR, 4096, u64::MAX - 100, 0),
        spec(FAR, 4096, FAR, u64::MAX - 4095),
        spec(FAR, u64::MAX, 1, 0),
        spec(own.guest_addr + own.size - 1, 4096, FAR, 0),
        spec(FAR, 4096, own.user_addr + 4096, 0),
    ] {
        assert!(!peer.add_region(&bad, file.as_raw_fd()), "{bad:x?}");
    }
    let slot = |i: u64| spec(FAR + i * 8192, 4096, FAR + i * 8192, i % 4 * 4096);
    for i in 1..509 {
        assert!(peer.add_region(&slot(i), file.as_raw_fd()), "region {i}");
    }
    assert!(!peer.add_region(&slot(509), file.as_raw_fd()), "510 regions");
    // They are all gone with the session.
}

fn descriptors_without_end(two: &Two) {
    let event = eventfd();
    let many = |n: usize| vec![event.as_raw_fd(); n];
    for n in [33, 64, 253] {
        let mut peer = two.front();
        peer.send_bytes(&words(&[17, 1, 0]), &many(n));
        peer.expect_hung_up();
    }
    // A few with every byte; with requests that want none; with half a message that never ends.
    let mut peer = two.front();
    for byte in words(&[17, 1, 0]) {
        peer.send_bytes(&[byte], &many(2));
    }
    peer.reply(17).unwrap();
    for request in [1, 15, 17, 36, 40] {
        peer.send(request, false, &[], &many(32));
        peer.reply(request).unwrap();
    }
    for request in [5, 12, 21, 37] {
        peer.ack(request, &[0; 40], &many(5));
        peer.expect_alive();
    }
    for byte in [8, 0, 0] {
        peer.send_bytes(&[byte], &many(10));
    }
}

fn messages_cut_short(two: &Two) {
    let event = eventfd();
    let whole = [words(&[37, 9, 40]), longs(&[0]), region(&spec(FAR, 4096, FAR, 0))].concat();
    for cut in 1..whole.len() {
        two.front().send_bytes(&whole[..cut], &[event.as_raw_fd()]);
    }
    // Half a message, and no more of it: only its own session waits.
    let waiting = two.front();
    waiting.send_bytes(&whole[..20], &[event.as_raw_fd()]);
    std::thread::sleep(Duration::from_millis(50));
    drop(waiting);
    // Noise, and numbers that are none.
    for header in [[1, 0, 0], [1, 5, 0], [1, 1, 4097], [5, 1, u32::MAX], [u32::MAX; 3]] {
        let mut peer = two.front();
        peer.send_bytes(&words(&header), &[]);
        peer.expect_hung_up();
    }
}

/// A front end that asks and asks and reads no answer: the daemon's end fills up.
fn answers_that_nobody_reads(two: &Two) {
    let mut peer = two.front();
    peer.stream.set_nonblocking(true).unwrap();
    let question = words(&[1, 1, 0]).repeat(1000);
    let mut sent = 0;
    while let Ok(n) = peer.stream.write(&question) {
        sent += n;
        // In step with the daemon, so that it is the answers that fill up.
        std::thread::sleep(Duration::from_millis(1));
        assert!(sent < 1 << 30, "answers without end");
    }
    let _ = peer.stream.read(&mut [0; 100]);
}

fn memory_taken_away(two: &Two) {
    for shrink_first in [true, false] {
        for (to, segments) in [(0, 1), (4096, 60), (1 << 20, 30)] {
            let mut peer = two.front();
            let mut ring = Ring::new();
            if shrink_first {
                // Between the table and the ring: it is found missing when the ring starts.
                assert!(peer.mem_table(&[ring.region()]));
                peer.set_ring(0, &ring.config, 0);
                assert!(peer.ack(12, &longs(&[0x100]), &[]));
                nix::unistd::ftruncate(ring.ram.fd(), to).unwrap();
                peer.ack(18, &words(&[0, 1]), &[]);
            } else {
                ring.start(&mut peer, segments);
                nix::unistd::ftruncate(ring.ram.fd(), to).unwrap();
            }
            peer.expect_alive();
            // And given back, as if nothing had been.
            nix::unistd::ftruncate(ring.ram.fd(), 2 << 20).unwrap();
            peer.expect_alive();
        }
    }
    assert!(two.served.errors("memory") > 0, "not one fault was met");
}

/// Sessions of which each does something and goes, in the middle of it as well.
fn sessions_in_a_row(two: &Two, count: u32) {
    for i in 0..count {
        let mut peer = two.connect();
        match i % 8 {
            0 => {}
            1 => peer.send_bytes(&[1], &[]),
            2..=6 => peer.send(1, false, &[], &[]),
            _ => {
                peer.negotiate();
                let mut ring = Ring::new();
                ring.start(&mut peer, 1);
            }
        }
    }
}

/// Random numbers that come again with the same seed (SplitMix64).
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }

    /// A number as front ends get them wrong: small, at an edge, or any.
    fn number(&mut self) -> u64 {
        match self.below(8) {
            0..=3 => self.below(4),
            4 => 1 << self.below(64),
            5 => (1 << self.below(64)) - 1,
            6 => [0x10_0000, FAR, 4096, 1 << 20, 256, 0x100][self.below(6) as usize],
            _ => self.next(),
        }
    }
}

/// One session: what an honest front end says, then messages of the right form with wrong numbers, and of wrong form.
fn random_session(two: &Two, pool: &[OwnedFd], seed: u64) {
    let random = &mut Random(seed);
    let mut peer = two.connect();
    let mut ring = Ring::new();
    if random.below(8) > 0 {
        peer.negotiate();
        let all = peer.ask_number(15);
        peer.send(16, false, &longs(&[all & (random.next() | random.next())]), &[]);
    }
    if random.below(4) > 0 && peer.try_send(&[], &[]).is_ok() {
        // Without answers: REPLY_ACK may not be agreed on.
        let (spec, fd) = ring.region();
        peer.send(5, false, &[words(&[1, 0]), region(&spec)].concat(), &[fd]);
        let c = &ring.config;
        for (request, payload) in [
            (8, words(&[0, c.size])),
            (9, [words(&[0, 0]), longs(&[c.desc_addr, c.used_addr, c.avail_addr, 0])].concat()),
            (12, longs(&[0x100])),
            (18, words(&[0, 1])),
        ] {
            peer.send(request, false, &payload, &[]);
        }
        ring.driver.add(&[Buffer { addr: ring.data, len: 64, writable: true }]).unwrap();
        ring.driver.publish();
    }
    for _ in 0..random.below(40) {
        let request = if random.below(10) == 0 { random.next() as u32 } else { random.below(48) as u32 };
        let long = [8, 8, 8, 40, 40, 16, 12, 32, 72, 0][random.below(10) as usize];
        let mut payload: Vec<u8> = match random.below(4) {
            // Two numbers of 32 bits, as many requests have them.
            0 => (0..long / 4).flat_map(|_| (random.number() as u32).to_ne_bytes()).collect(),
            1 if long >= 40 => [longs(&[1]), region(&ring.ram.spec())].concat(),
            _ => (0..long / 8).flat_map(|_| random.number().to_ne_bytes()).collect(),
        };
        if random.below(8) == 0 {
            payload.truncate(random.below(payload.len() as u64 + 1) as usize);
        }
        let said = if random.below(16) == 0 { random.number() as u32 } else { payload.len() as u32 };
        let flags =
            if random.below(16) == 0 { random.next() as u32 } else { 1 | (random.below(2) as u32) << 3 };
        let fds: Vec<RawFd> = (0..random.below(4))
            .map(|_| pool[random.below(pool.len() as u64) as usize].as_raw_fd())
            .collect();
        let fds = if random.below(2) == 0 { &[][..] } else { &fds };
        let message = [words(&[request, flags, said]), payload].concat();
        if peer.try_send(&message, fds).is_err() {
            break;
        }
    }
}

/// As many as `KICKLESS_FUZZ_SESSIONS` says, from `KICKLESS_FUZZ_SEED` on.
fn random_sessions(two: &Two) {
    let from = |name: &str, else_: u64| std::env::var(name).map_or(else_, |n| n.parse().unwrap());
    let seed = from("KICKLESS_FUZZ_SEED", 1);
    let mut pool: Vec<OwnedFd> = zoo().into_iter().map(|(_, fd)| fd).collect();
    pool.extend((0..6).map(|_| OwnedFd::from(eventfd())));
    pool.extend((0..4).map(|_| memfd(1 << 20)));
    for i in 0..from("KICKLESS_FUZZ_SESSIONS", 600) {
        // The last one named is the one that did it.
        std::fs::write(two.served.socket.with_extension("seed"), format!("{}", seed + i)).unwrap();
        random_session(two, &pool, seed + i);
    }
}

type Attack = fn(&Two);

const ATTACKS: &[(&str, Attack)] = &[
    ("descriptors that are not what they claim", descriptors_that_are_not_what_they_claim),
    ("regions that cannot be", regions_that_cannot_be),
    ("descriptors without end", descriptors_without_end),
    ("messages cut short", messages_cut_short),
    ("answers that nobody reads", answers_that_nobody_reads),
    ("memory taken away", memory_taken_away),
];

fn all_attacks(poll: &str) {
    let two = Two::start(poll);
    for (what, attack) in ATTACKS {
        let begun = std::time::Instant::now();
        two.under(attack);
        println!("{poll}: {what}, {:?}", begun.elapsed());
    }
    two.end();
}

#[test]
fn attacks_on_a_spinning_reactor() {
    all_attacks("adaptive");
}

#[test]
fn attacks_on_a_sleeping_reactor() {
    all_attacks("event");
}

#[test]
fn random_messages_on_a_sleeping_reactor() {
    let two = Two::start("event");
    two.under(random_sessions);
    two.end();
}

#[test]
fn ten_thousand_sessions_in_a_row() {
    let two = Two::start("event");
    two.under(|two| sessions_in_a_row(two, 10_000));
    two.end();
}
