//! A guest that comes before its memory (post-copy), below a VM: the front end is ours, and brings each page late and in
//! any order, or never.
#![allow(clippy::unwrap_used)]
#![allow(unsafe_code)] // takes a userfaultfd and wakes who waits on it

mod blk;
#[path = "../../poll-engine/tests/support/peer.rs"]
mod peer;

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{IoSliceMut, Read};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use blk::{Front, Served};
use kickless_tests::image::Image;
use kickless_tests::net;
use kickless_tests::runner::{self, Test};
use kickless_tests::scene::Scene;
use nix::fcntl::{FallocateFlags, fallocate};
use nix::sys::eventfd::EventFd;
use nix::sys::signal::Signal;
use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};
use peer::{Peer, eventfd, longs, readable_within, region, until, words};
use poll_engine::device::features;
use poll_engine::memory::{Ram, RegionSpec, userfault};
use poll_engine::ring::RingConfig;
use poll_engine::ring::driver::{Buffer, DriverRing};
use poll_engine::session::wire::{F_PROTOCOL_FEATURES, protocol};

const PAGE: u64 = 4096;
const BLOCK: u32 = 4 * PAGE as u32;
const BLOCKS: u64 = 8;
const ADVISE: u32 = 28;
const LISTEN: u32 = 29;
const END: u32 = 30;

nix::ioctl_read!(
    /// `UFFDIO_WAKE`.
    uffdio_wake, 0xaa, 0x02, [u64; 2]
);

fn missing() -> Option<String> {
    (!userfault::is_available()).then(|| "userfaultfd is not permitted here".to_owned())
}

/// The daemon with two disks on one reactor.
struct Two {
    served: Served,
    beside: PathBuf,
    image: Option<Image>,
    is_ram: bool,
    _scene: Scene,
}

impl Two {
    /// The first one is on `backend`, or on an image of 0xee.
    fn start(backend: &str) -> Two {
        let scene = Scene::new().unwrap();
        let image = (backend == "file").then(|| Image::filled(&scene, "disk.img", 8 << 20, 0xee).unwrap());
        let beside = scene.path("beside.sock");
        let disk = format!("--disk=socket-path={},backend=ram:1M", beside.display());
        let first = match &image {
            Some(image) => format!("--blk-file={}", image.path().display()),
            None if backend.starts_with('/') => format!("--blk-file={backend}"),
            None => format!("--backend={backend}"),
        };
        let served = Served::start(&scene, &[&first, &disk]);
        Two { served, beside, image, is_ram: backend.starts_with("ram"), _scene: scene }
    }

    fn connect(&self) -> Peer {
        Peer::new(UnixStream::connect(&self.served.socket).unwrap())
    }

    /// Connected and negotiated.
    fn front(&self) -> Peer {
        let mut peer = self.connect();
        peer.send(3, false, &[], &[]);
        peer.send(2, false, &longs(&[F_PROTOCOL_FEATURES | features::VERSION_1]), &[]);
        let all = protocol::REPLY_ACK | protocol::PAGEFAULT | protocol::CONFIGURE_MEM_SLOTS | protocol::MQ;
        assert_eq!(peer.ask_number(15) & all, all);
        peer.send(16, false, &longs(&[all]), &[]);
        peer
    }

    /// Told that its guest comes before its memory.
    fn listening(&self) -> (Peer, File) {
        let mut peer = self.front();
        let faults = advise(&mut peer).expect("a userfaultfd");
        assert!(peer.ack(LISTEN, &[], &[]));
        (peer, faults)
    }

    fn expect_served(&self) {
        Front::connect(&self.served.socket, 1).queues[0].verified_io(3, 4);
    }

    /// Descriptors, threads, and mappings of memory that front ends shared.
    fn holds(&self) -> [usize; 3] {
        let dir = format!("/proc/{}", self.served.process.pid());
        let count = |what: &str| std::fs::read_dir(format!("{dir}/{what}")).unwrap().count();
        let maps = std::fs::read_to_string(format!("{dir}/maps")).unwrap();
        let shared = |l: &&str| l.contains("guest-ram") || l.contains("memfd:taken");
        [count("fd"), count("task"), maps.lines().filter(shared).count()]
    }

    /// Does something beside a disk that must not notice; nothing may be left of it.
    fn beside(&self, what: impl FnOnce(&Two)) {
        let mut neighbour = Front::connect(&self.beside, 1);
        self.expect_served();
        blk::beside(&mut neighbour.queues[0], |progress| {
            // The neighbour's memory and its disk, and ours if that is memory as well.
            until("the last session's end", || self.holds()[2] == 2 + usize::from(self.is_ram));
            let before = self.holds();
            what(self);
            progress.more(5);
            self.expect_served();
            until("what sessions had to be given back", || {
                self.holds().iter().zip(before).all(|(now, before)| *now <= before)
            });
        });
    }
}

fn advise(peer: &mut Peer) -> Option<File> {
    peer.send(ADVISE, false, &[], &[]);
    let mut header = [0; 12];
    let mut space = nix::cmsg_space!(RawFd);
    let mut parts = [IoSliceMut::new(&mut header)];
    let fd = peer.stream.as_raw_fd();
    let got = recvmsg::<()>(fd, &mut parts, Some(&mut space), MsgFlags::MSG_CMSG_CLOEXEC).unwrap();
    let sent = got.cmsgs().unwrap().find_map(|c| match c {
        ControlMessageOwned::ScmRights(fds) => fds.first().copied(),
        _ => None,
    });
    assert_eq!((got.bytes, &header[..]), (12, &words(&[ADVISE, 5, 0])[..]));
    // SAFETY: the kernel has just made it for us.
    sent.map(|fd| File::from(unsafe { OwnedFd::from_raw_fd(fd) }))
}

/// Memory that is to come late: all of it is here, and nothing in the file that is shared.
struct Late {
    spec: RegionSpec,
    file: File,
    content: Vec<u8>,
    /// Where the daemon has it.
    there: u64,
    missing: BTreeSet<u64>,
}

impl Late {
    fn take_out(ram: &Ram) -> Late {
        let spec = ram.spec();
        let file = File::from(ram.fd().try_clone_to_owned().unwrap());
        let mut content = vec![0; spec.size as usize];
        file.read_exact_at(&mut content, 0).unwrap();
        let hole = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        fallocate(&file, hole, 0, spec.size as i64).unwrap();
        Late { spec, file, content, there: 0, missing: (0..spec.size / PAGE).collect() }
    }

    /// Brings a page, and wakes who waits for it.
    fn bring(&mut self, page: u64, faults: &File) {
        let at = page * PAGE;
        if self.missing.remove(&page) {
            let bytes = &self.content[at as usize..(at + PAGE) as usize];
            self.file.write_all_at(bytes, at).unwrap();
        }
        let mut range = [self.there + at, PAGE];
        // SAFETY: it wakes threads.
        unsafe { uffdio_wake(faults.as_raw_fd(), &raw mut range).unwrap() };
    }
}

/// The front end's thread that brings pages.
struct Pager {
    memory: Arc<Mutex<Vec<Late>>>,
    faults: Arc<File>,
    stop: Arc<AtomicBool>,
    /// Returns how many pages it was asked for.
    thread: Option<JoinHandle<usize>>,
}

impl Pager {
    fn start(faults: File) -> Pager {
        let (memory, faults) = (Arc::<Mutex<Vec<Late>>>::default(), Arc::new(faults));
        let stop = Arc::new(AtomicBool::new(false));
        let all = (Arc::clone(&memory), Arc::clone(&faults), Arc::clone(&stop));
        let thread = std::thread::spawn(move || {
            let (memory, faults, stop) = all;
            let (mut seed, mut asked, mut waiting) = (88_172_645_463_325_252u64, 0, Vec::new());
            while !stop.load(Ordering::Acquire) || !waiting.is_empty() {
                readable_within(&*faults, 2);
                let mut message = [0; 32];
                while (&*faults).read(&mut message).is_ok_and(|n| n == 32) {
                    assert_eq!(message[0], 0x12, "a page fault");
                    waiting.push(u64::from_ne_bytes(message[16..24].try_into().unwrap()));
                    asked += 1;
                }
                std::thread::sleep(Duration::from_micros(500));
                seed ^= seed << 13;
                seed ^= seed >> 7;
                seed ^= seed << 17;
                let mut memory = memory.lock().unwrap();
                if !waiting.is_empty() {
                    let addr = waiting.swap_remove(seed as usize % waiting.len());
                    let inside = |l: &&mut Late| addr >= l.there && addr - l.there < l.spec.size;
                    let late = memory.iter_mut().find(inside).expect("a fault where memory is");
                    late.bring((addr - late.there) / PAGE, &faults);
                }
                // One that nobody has asked for.
                if let Some(late) = memory.first_mut()
                    && seed.is_multiple_of(8)
                {
                    let pages = late.spec.size / PAGE;
                    late.bring(seed / 8 % pages, &faults);
                }
            }
            asked
        });
        Pager { memory, faults, stop, thread: Some(thread) }
    }

    /// Brings all the rest; how many pages it was asked for.
    fn finish(mut self) -> usize {
        self.stop.store(true, Ordering::Release);
        let asked = self.thread.take().unwrap().join().unwrap();
        for late in self.memory.lock().unwrap().iter_mut() {
            while let Some(&page) = late.missing.first() {
                late.bring(page, &self.faults);
            }
        }
        asked
    }
}

/// How the front end tells of memory.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Tell {
    Table,
    Slots,
}

/// Tells of memory that comes late. The daemon's addresses are those of the reply.
fn tell(peer: &mut Peer, how: Tell, late: &mut Late) {
    let fd = [late.file.as_raw_fd()];
    let (request, head) = if how == Tell::Table { (5, words(&[1, 0])) } else { (37, longs(&[0])) };
    let sent = [head, region(&late.spec)].concat();
    peer.send(request, false, &sent, &fd);
    let reply = peer.reply(request).expect("where it is mapped");
    assert_eq!((reply.len(), &reply[..24]), (sent.len(), &sent[..24]));
    assert_eq!(reply[32..], sent[32..]);
    late.there = u64::from_ne_bytes(reply[24..32].try_into().unwrap());
    assert!(late.there != 0 && late.there.is_multiple_of(PAGE));
}

fn acknowledge(peer: &mut Peer, number: u32) {
    peer.send(number, false, &longs(&[0]), &[]);
}

/// A guest's ring, and memory for requests that are prepared before it moves.
struct Guest {
    ram: Ram,
    config: RingConfig,
    driver: DriverRing,
    headers: u64,
    statuses: u64,
    source: u64,
    target: u64,
    kick: EventFd,
    call: EventFd,
}

fn pattern(block: u64) -> Vec<u8> {
    (0..u64::from(BLOCK))
        .map(|i| (i.wrapping_mul(31) ^ (i >> 8) ^ block.wrapping_mul(73)) as u8 | 1)
        .collect()
}

impl Guest {
    fn new() -> Guest {
        Guest::with(0)
    }

    /// With a ring as these features have it.
    fn with(ring: u64) -> Guest {
        let mut ram = Ram::new(0x10_0000, 4 << 20, false).unwrap();
        let config = DriverRing::lay_out(&mut ram, 64, features::VERSION_1 | ring).unwrap();
        let mut alloc = |bytes| ram.alloc(bytes, PAGE).unwrap();
        let (headers, statuses) = (alloc(2 * BLOCKS * PAGE), alloc(2 * BLOCKS * PAGE));
        let (source, target) = (alloc(BLOCKS * u64::from(BLOCK)), alloc(BLOCKS * u64::from(BLOCK)));
        let driver = DriverRing::new(&config, ram.map()).unwrap();
        let guest = Guest {
            ram,
            config,
            driver,
            headers,
            statuses,
            source,
            target,
            kick: eventfd(),
            call: eventfd(),
        };
        for block in 0..BLOCKS {
            for (i, kind) in [(block, blk::WRITE), (BLOCKS + block, blk::READ)] {
                let mut header = [kind.to_le_bytes(), [0; 4]].concat();
                header.extend((block * u64::from(BLOCK) / 512).to_le_bytes());
                guest.put(headers + i * PAGE, &header);
                guest.put(statuses + i * PAGE, &[0xff]);
            }
            guest.put(source + block * u64::from(BLOCK), &pattern(block));
        }
        guest
    }

    fn put(&self, at: u64, bytes: &[u8]) {
        assert_eq!(self.ram.map().slice(at, bytes.len() as u32).unwrap().write(bytes), bytes.len());
    }

    fn add(&mut self, request: u64, data: u64) {
        self.driver
            .add(&[
                Buffer { addr: self.headers + request * PAGE, len: 16, writable: false },
                Buffer { addr: data, len: BLOCK, writable: request >= BLOCKS },
                Buffer { addr: self.statuses + request * PAGE, len: 1, writable: true },
            ])
            .unwrap();
    }

    fn add_writes(&mut self) {
        (0..BLOCKS).for_each(|block| self.add(block, self.source + block * u64::from(BLOCK)));
        self.driver.publish();
    }

    fn add_read(&mut self, block: u64, into: u64) {
        self.add(BLOCKS + block, into);
        self.driver.publish();
        self.kick.write(1).unwrap();
    }

    /// All but the ring's start, which the daemon may have to wait for memory to do.
    fn describe(&self, peer: &mut Peer) {
        peer.set_ring(0, &self.config, self.config.base);
        assert!(peer.ack(13, &longs(&[0]), &[self.call.as_raw_fd()]));
        assert!(peer.ack(12, &longs(&[0]), &[self.kick.as_raw_fd()]));
    }

    /// Waits for requests without looking at memory that has not come.
    fn wait(&mut self, mut requests: u64) {
        let deadline = Instant::now() + blk::LIMIT;
        while requests > 0 {
            assert!(Instant::now() < deadline, "{requests} requests are not answered");
            if readable_within(&self.call, 100) {
                self.call.read().unwrap();
                while self.driver.finished() > 0 && self.driver.collect().is_some() {
                    requests -= 1;
                }
            }
        }
    }

    fn expect_read(&self, from: &Ram, at: u64, block: u64) {
        let mut bytes = vec![0; BLOCK as usize];
        from.map().slice(at, BLOCK).unwrap().read(&mut bytes);
        assert!(bytes == pattern(block), "block {block} is not what was written");
        let mut status = [0xff];
        self.ram.map().slice(self.statuses + (BLOCKS + block) * PAGE, 1).unwrap().read(&mut status);
        assert_eq!(status, [blk::OK]);
    }
}

fn comes_before_its_memory(backend: &str, how: Tell, ring: u64) {
    let two = Two::start(backend);
    two.beside(|two| {
        let (mut peer, faults) = two.listening();
        peer.send(2, false, &longs(&[F_PROTOCOL_FEATURES | features::VERSION_1 | ring]), &[]);
        let mut guest = Guest::with(ring);
        guest.add_writes();
        let mut late = Late::take_out(&guest.ram);
        tell(&mut peer, how, &mut late);
        let pager = Pager::start(faults);
        pager.memory.lock().unwrap().push(late);
        acknowledge(&mut peer, if how == Tell::Table { 5 } else { 37 });
        guest.describe(&mut peer);
        assert!(peer.ack(18, &words(&[0, 1]), &[]));
        guest.wait(BLOCKS);
        let target = guest.target;
        for block in 0..BLOCKS / 2 {
            guest.add_read(block, target + block * u64::from(BLOCK));
        }
        guest.wait(BLOCKS / 2);

        // Memory that is added while the guest runs, at first with nothing in it as well.
        let more = Ram::new(0x4000_0000, 1 << 20, false).unwrap();
        let mut late = Late::take_out(&more);
        tell(&mut peer, Tell::Slots, &mut late);
        pager.memory.lock().unwrap().push(late);
        acknowledge(&mut peer, 37);
        // Nothing has changed: QEMU says so under no number.
        acknowledge(&mut peer, 0);
        peer.expect_alive();
        for block in BLOCKS / 2..BLOCKS {
            guest.add_read(block, more.spec().guest_addr + block * u64::from(BLOCK));
        }
        guest.wait(BLOCKS / 2);
        let asked = pager.finish();
        // What each request has a page of its own for, at least half of which nobody brought unasked.
        assert!(asked > 2 * BLOCKS as usize, "{asked} pages were asked for");
        assert_eq!(peer.ask(END, &[]), longs(&[0]));
        for block in 0..BLOCKS / 2 {
            guest.expect_read(&guest.ram, target + block * u64::from(BLOCK), block);
        }
        for block in BLOCKS / 2..BLOCKS {
            guest.expect_read(&more, more.spec().guest_addr + block * u64::from(BLOCK), block);
        }
        // Nobody brings pages any more, and nobody has to.
        guest.add_read(0, target);
        guest.wait(1);
        assert_eq!(peer.ask(END, &[]), longs(&[1]), "it has ended");
        let packed = guest.driver.next_position().map(|at| u32::from(at.bits()) * 0x1_0001);
        assert_eq!(peer.ask(11, &words(&[0, 0])), words(&[0, packed.unwrap_or(2 * BLOCKS as u32 + 1)]));
        if let Some(image) = &two.image {
            for block in 0..BLOCKS {
                let there = image.read(block * u64::from(BLOCK), BLOCK as usize).unwrap();
                assert!(there == pattern(block), "block {block} of the image");
            }
        }
    });
    assert_eq!(two.served.errors("memory") + two.served.errors("io"), 0);
    two.served.terminate();
}

fn a_file_is_served_before_its_memory() {
    comes_before_its_memory("file", Tell::Table, 0);
}

/// Each part of a packed ring is read and written by the device, and comes late as well.
fn a_packed_ring_comes_after_its_guest() {
    comes_before_its_memory("file", Tell::Table, features::RING_PACKED);
    comes_before_its_memory("ram:8M", Tell::Slots, features::RING_PACKED | features::EVENT_IDX);
}

fn a_ram_disk_is_served_before_its_memory() {
    comes_before_its_memory("ram:8M", Tell::Slots, 0);
}

fn a_file_without_direct_io_is_served_before_its_memory() {
    let file = tempfile::NamedTempFile::new_in("/dev/shm").unwrap();
    file.as_file().set_len(8 << 20).unwrap();
    comes_before_its_memory(file.path().to_str().unwrap(), Tell::Slots, 0);
}

/// What a front end brings before it stops.
#[derive(Clone, Copy, Debug)]
enum Brings {
    Nothing,
    /// All but what is to be written to the disk.
    NoData,
}

/// A front end that brings too little. It does not wait for any answer to the ring's start.
fn too_little(two: &Two, brings: Brings) -> (Peer, File, Guest, Late) {
    let (mut peer, faults) = two.listening();
    let mut guest = Guest::new();
    guest.add_writes();
    let mut late = Late::take_out(&guest.ram);
    tell(&mut peer, Tell::Table, &mut late);
    acknowledge(&mut peer, 5);
    if let Brings::NoData = brings {
        let first = (guest.source - guest.ram.spec().guest_addr) / PAGE;
        (0..first).for_each(|page| late.bring(page, &faults));
    }
    guest.describe(&mut peer);
    peer.send(18, false, &words(&[0, 1]), &[]);
    assert!(readable_within(&faults, 5000), "{brings:?}: nobody waits for a page");
    std::thread::sleep(Duration::from_millis(100));
    (peer, faults, guest, late)
}

fn a_front_end_that_brings_nothing_and_leaves_holds_up_nobody() {
    for backend in ["file", "ram:8M"] {
        let two = Two::start(backend);
        two.beside(|two| {
            for brings in [Brings::Nothing, Brings::NoData] {
                let (peer, faults, guest, _late) = too_little(two, brings);
                drop(peer);
                // The userfaultfd is still open here, and nobody reads it.
                two.expect_served();
                drop((faults, guest));
            }
        });
        if let Some(image) = &two.image {
            // What was to be written there never came: it is not zeros either. (The last test wrote to sector 3.)
            image.expect_fill(4 * 512, 8 * BLOCK as usize - 4 * 512, 0xee).unwrap();
        }
        two.served.terminate();
    }
}

fn a_front_end_that_brings_nothing_and_stays_does_not_keep_the_daemon() {
    let mut two = Two::start("file");
    let (peer, faults, guest, late) = too_little(&two, Brings::NoData);
    two.served.process.signal(Signal::SIGTERM).unwrap();
    // It is given ten seconds.
    let status = two.served.process.wait_exit(Duration::from_secs(60)).unwrap();
    assert!(status.success(), "{status}\n{}", two.served.process.stderr());
    two.image.as_ref().unwrap().expect_fill(0, 8 * BLOCK as usize, 0xee).unwrap();
    drop((peer, faults, guest, late));
}

fn messages_out_of_order_cost_their_session_only() {
    let two = Two::start("ram:8M");
    two.beside(|two| {
        // Listening without advice.
        let mut peer = two.front();
        assert!(!peer.ack(LISTEN, &[], &[]));
        assert_eq!(peer.ask(END, &[]), longs(&[1]));
        peer.expect_alive();
        // Advice that was not negotiated.
        let mut peer = two.connect_after(peer);
        peer.negotiate();
        assert!(advise(&mut peer).is_none());
        peer.expect_alive();
        // Advice again; then again while listening.
        let mut peer = two.connect_after(peer);
        peer.send(2, false, &longs(&[F_PROTOCOL_FEATURES | features::VERSION_1]), &[]);
        peer.send(
            16,
            false,
            &longs(&[protocol::REPLY_ACK | protocol::PAGEFAULT | protocol::CONFIGURE_MEM_SLOTS]),
            &[],
        );
        assert!(advise(&mut peer).is_some() && advise(&mut peer).is_some());
        assert!(peer.ack(LISTEN, &[], &[]));
        assert!(advise(&mut peer).is_none());
        assert!(!peer.ack(LISTEN, &[], &[]));
        // No acknowledgement: the memory is not there for the ring.
        let mut guest = Guest::new();
        guest.add_writes();
        let mut late = Late::take_out(&guest.ram);
        tell(&mut peer, Tell::Slots, &mut late);
        guest.describe(&mut peer);
        assert!(!peer.ack(18, &words(&[0, 1]), &[]));
        peer.expect_alive();
        // The wrong one.
        peer.send(37, false, &longs(&[1]), &[]);
        peer.expect_hung_up();
        // Removed before it was acknowledged, and added again.
        drop(peer);
        let (mut peer, _faults) = two.listening();
        tell(&mut peer, Tell::Slots, &mut late);
        assert!(peer.remove_region(&late.spec));
        assert!(!peer.remove_region(&late.spec));
        tell(&mut peer, Tell::Slots, &mut late);
        acknowledge(&mut peer, 38);
        assert!(peer.remove_region(&late.spec));
        assert_eq!(peer.ask(END, &[]), longs(&[0]));
        assert_eq!(peer.ask(END, &[]), longs(&[1]));
        peer.expect_alive();
        // Listening too late.
        let mut peer = two.front_after(peer);
        assert!(peer.mem_table(&[(guest.ram.spec(), guest.ram.fd().as_raw_fd())]));
        assert!(advise(&mut peer).is_some());
        peer.send(LISTEN, false, &[], &[]);
        peer.expect_hung_up();
    });
    two.served.terminate();
}

impl Two {
    fn connect_after(&self, last: Peer) -> Peer {
        drop(last);
        self.connect()
    }

    fn front_after(&self, last: Peer) -> Peer {
        drop(last);
        self.front()
    }
}

fn a_switch_does_not_offer_it() {
    let scene = Scene::new().unwrap();
    let daemon = net::Options::switch().spawn(&scene, "switch").unwrap();
    let mut peer = Peer::new(UnixStream::connect(&daemon.sockets()[0]).unwrap());
    let offered = peer.ask_number(15);
    assert!(offered & protocol::REPLY_ACK != 0 && offered & protocol::PAGEFAULT == 0, "{offered:#x}");
    drop(peer);
    daemon.terminate().unwrap();
}

fn it_is_offered_where_it_is_possible() {
    let two = Two::start("ram:8M");
    let offered = two.connect().ask_number(15) & protocol::PAGEFAULT != 0;
    assert_eq!(offered, userfault::is_available());
    two.served.terminate();
}

const ANYWHERE: &[(&str, fn())] = &[
    ("it_is_offered_where_it_is_possible", it_is_offered_where_it_is_possible),
    ("a_switch_does_not_offer_it", a_switch_does_not_offer_it),
];

const TESTS: &[(&str, fn())] = &[
    ("a_file_is_served_before_its_memory", a_file_is_served_before_its_memory),
    ("a_packed_ring_comes_after_its_guest", a_packed_ring_comes_after_its_guest),
    ("a_ram_disk_is_served_before_its_memory", a_ram_disk_is_served_before_its_memory),
    (
        "a_file_without_direct_io_is_served_before_its_memory",
        a_file_without_direct_io_is_served_before_its_memory,
    ),
    (
        "a_front_end_that_brings_nothing_and_leaves_holds_up_nobody",
        a_front_end_that_brings_nothing_and_leaves_holds_up_nobody,
    ),
    (
        "a_front_end_that_brings_nothing_and_stays_does_not_keep_the_daemon",
        a_front_end_that_brings_nothing_and_stays_does_not_keep_the_daemon,
    ),
    ("messages_out_of_order_cost_their_session_only", messages_out_of_order_cost_their_session_only),
];

fn main() -> ExitCode {
    let test = |&(name, body): &(&str, fn()), needs: fn() -> Option<String>| Test {
        name: name.to_owned(),
        needs: Box::new(needs),
        run: Box::new(move |_| {
            body();
            Ok(None)
        }),
    };
    let anywhere = ANYWHERE.iter().map(|one| test(one, || None));
    let tests = TESTS.iter().map(|one| test(one, missing)).chain(anywhere);
    runner::run(tests.collect(), "KICKLESS_REQUIRE_USERFAULTFD")
}
