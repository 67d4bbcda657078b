//! The dirty log of the real daemon under load, against a model: a front end that copies memory as QEMU does while a
//! guest migrates ends with the memory that the guest has, and is told of no page that was not written.
#![allow(clippy::unwrap_used)]
#![allow(unsafe_code)] // takes bits of a log that another process sets

mod blk;

use std::collections::BTreeSet;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};

use blk::{Front, LIMIT, Lane, OK, RAM_SIZE, RAM_START, READ, RING, Served, WRITE};
use kickless_tests::image::{Image, MIB};
use kickless_tests::scene::Scene;
use kickless_tests::wait;
use poll_engine::device::features;
use poll_engine::memory::log::LOG_PAGE;
use poll_engine::memory::{MemoryMap, Ram};
use poll_engine::ring::driver::Buffer;
use poll_engine::ring::{RingConfig, RingFormat};
use poll_engine::session::wire::{F_LOG_ALL, VRING_F_LOG};
use vhost::{VhostBackend, VhostUserDirtyLogRegion};

const FORMATS: [u64; 2] = [0, features::RING_PACKED];
const DISK: u64 = 2 * MIB;
/// Requests in flight; each has three descriptors at least.
const DEPTH: u64 = 12;

/// xorshift64*: repeats from its seed.
struct Rng(u64);

impl Rng {
    fn below(&mut self, n: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) % n
    }
}

/// Where requests have their parts: nothing that the device writes shares a page with anything the driver writes.
#[derive(Clone, Copy)]
struct Areas {
    /// A header each, written by the driver.
    headers: u64,
    /// What writes take their data from: the device only reads it.
    source: u64,
    /// Where reads go.
    target: u64,
    /// A status byte each, in a page of its own.
    statuses: u64,
}

const SOURCE: u64 = MIB;
const TARGET: u64 = 2 * MIB;

impl Areas {
    fn new(ram: &mut Ram) -> Areas {
        let mut page = |bytes| ram.alloc(bytes, LOG_PAGE).unwrap();
        let areas = Areas {
            headers: page(LOG_PAGE),
            source: page(SOURCE),
            target: page(TARGET),
            statuses: page(DEPTH * LOG_PAGE),
        };
        let mut rng = Rng(99);
        for at in (0..SOURCE).step_by(8) {
            let word = rng.below(u64::MAX).to_le_bytes();
            ram.map().slice(areas.source + at, 8).unwrap().write(&word);
        }
        areas
    }

    /// A random read or write in slot `slot`: its buffers.
    fn request(&self, map: &MemoryMap, rng: &mut Rng, slot: u64) -> Vec<Buffer> {
        let sectors = 1 + rng.below(32);
        let len = 512 * sectors as u32;
        let reads = rng.below(3) > 0;
        let sector = rng.below(DISK / 512 - sectors);
        let mut header = [if reads { READ } else { WRITE }.to_le_bytes(), [0; 4]].concat();
        header.extend(sector.to_le_bytes());
        let at = self.headers + 16 * slot;
        map.slice(at, 16).unwrap().write(&header);
        let mut buffers = vec![Buffer { addr: at, len: 16, writable: false }];
        // In one piece, or in two that need not follow each other.
        let cut = if rng.below(2) == 0 { 0 } else { 512 * rng.below(sectors) as u32 };
        for len in [cut, len - cut].into_iter().filter(|&len| len > 0) {
            let (start, size) = if reads { (self.target, TARGET) } else { (self.source, SOURCE) };
            let addr = start + 512 * rng.below((size - u64::from(len)) / 512);
            buffers.push(Buffer { addr, len, writable: reads });
        }
        buffers.push(Buffer { addr: self.statuses + slot * LOG_PAGE, len: 1, writable: true });
        buffers
    }
}

/// Keeps requests in flight until told to stop; what is unanswered then stays so. The lane comes back with the slots
/// that are in flight, by their heads, as it was given.
fn load(
    mut lane: Lane,
    mut busy: Vec<(u16, u64)>,
    areas: Areas,
    seed: u64,
    stop: &AtomicBool,
    done: &AtomicU64,
) -> (Lane, Vec<(u16, u64)>) {
    let mut rng = Rng(seed);
    let mut free: Vec<u64> = (0..DEPTH).filter(|slot| busy.iter().all(|b| b.1 != *slot)).collect();
    while !stop.load(Ordering::Acquire) {
        while let Some(slot) = free.pop() {
            let buffers = areas.request(&lane.map, &mut rng, slot);
            busy.push((lane.driver.add(&buffers).unwrap(), slot));
        }
        lane.publish();
        collect(&mut lane, areas, &mut busy, &mut free, done);
        std::thread::yield_now();
    }
    (lane, busy)
}

fn collect(lane: &mut Lane, areas: Areas, busy: &mut Vec<(u16, u64)>, free: &mut Vec<u64>, done: &AtomicU64) {
    while let Some((head, _)) = lane.driver.collect() {
        let at = busy.iter().position(|b| b.0 == head).expect("an answer to a request that was made");
        let slot = busy.swap_remove(at).1;
        assert_eq!(lane.get(areas.statuses + slot * LOG_PAGE, 1), [OK]);
        free.push(slot);
        done.fetch_add(1, Ordering::AcqRel);
    }
}

/// A log as the front end sees it.
struct Log(Ram);

impl Log {
    /// Large enough for all memory, and a page more.
    fn new() -> Log {
        Log(Ram::new(0, ((RAM_START + RAM_SIZE) / LOG_PAGE).div_ceil(8) + 4096, false).unwrap())
    }

    fn region(&self) -> VhostUserDirtyLogRegion {
        // Not at the beginning of its file: the offset counts.
        let (mmap_size, mmap_offset) = (self.0.spec().size - 1000, 1000);
        VhostUserDirtyLogRegion { mmap_size, mmap_offset, mmap_handle: self.0.fd().as_raw_fd() }
    }

    /// The pages that are marked, by number; none is afterwards.
    fn take(&self) -> BTreeSet<u64> {
        let size = self.0.spec().size - 1000;
        let bytes = self.0.map().slice(1000, size as u32).unwrap();
        let mut pages = BTreeSet::new();
        for i in 0..size {
            // SAFETY: a byte inside the slice, which the map keeps; both processes only use atomics on it.
            let bits = unsafe { AtomicU8::from_ptr(bytes.host_addr().add(i as usize)) };
            let bits = bits.swap(0, Ordering::AcqRel);
            pages.extend((0..8).filter(|b| bits & 1 << b != 0).map(|b| 8 * i + b));
        }
        pages
    }
}

fn switch(front: &Front, index: usize, on: bool, used: u64, addresses: &vhost::VringConfigData) {
    // The order of QEMU (hw/virtio/vhost.c, vhost_dev_set_log).
    front.session.set_features(front.features | if on { F_LOG_ALL } else { 0 }).unwrap();
    let flags = if on { VRING_F_LOG } else { 0 };
    let addresses = vhost::VringConfigData { flags, log_addr: on.then_some(used), ..*addresses };
    front.session.set_vring_addr(index, &addresses).unwrap();
}

fn pages(addr: u64, len: u64) -> std::ops::RangeInclusive<u64> {
    addr / LOG_PAGE..=(addr + len - 1) / LOG_PAGE
}

fn memory(map: &MemoryMap) -> Vec<u8> {
    let mut all = vec![0; RAM_SIZE as usize];
    map.slice(RAM_START, RAM_SIZE as u32).unwrap().read(&mut all);
    all
}

fn bytes_of(page: u64) -> std::ops::Range<usize> {
    let offset = (page * LOG_PAGE - RAM_START) as usize;
    offset..offset + LOG_PAGE as usize
}

fn copy(map: &MemoryMap, pages: &BTreeSet<u64>, to: &mut [u8]) {
    for &page in pages {
        map.slice(page * LOG_PAGE, LOG_PAGE as u32).unwrap().read(&mut to[bytes_of(page)]);
    }
}

/// The pages of a ring that the device writes: those that the driver writes as well, and the others.
fn ring_pages(front: &Front, lane: &Lane) -> [BTreeSet<u64>; 2] {
    let format = RingConfig::new(RING.into(), [0; 3], front.features).format;
    let (descs, _, device) = format.bytes(RING);
    let shared = match format {
        RingFormat::Split => BTreeSet::new(),
        RingFormat::Packed => pages(physical(front, lane.addresses.desc_table_addr), descs).collect(),
    };
    [shared, pages(physical(front, lane.addresses.used_ring_addr), device).collect()]
}

/// The guest-physical address of one of ours.
fn physical(front: &Front, user: u64) -> u64 {
    let spec = front.ram.spec();
    user - spec.user_addr + spec.guest_addr
}

#[allow(clippy::too_many_lines)] // one migration, from beginning to end
fn log_is_complete_and_exact(args: &[&str], format: u64) {
    let scene = Scene::new().unwrap();
    let served = Served::start(&scene, args);
    let mut front = Front::with(&served.socket, 1, format);
    let lane = front.queues.remove(0);
    let map = Arc::clone(front.ram.map());
    let areas = Areas::new(&mut front.ram);
    let used = physical(&front, lane.addresses.used_ring_addr);
    let [shared_pages, used_pages] = ring_pages(&front, &lane);
    let ring_pages: BTreeSet<u64> = shared_pages.union(&used_pages).copied().collect();
    let written: BTreeSet<u64> = pages(areas.target, TARGET)
        .chain(pages(areas.statuses, DEPTH * LOG_PAGE))
        .chain(ring_pages.iter().copied())
        .collect();
    let addresses = lane.addresses;

    // A migration: requests are in flight when it begins and when it ends.
    let (stop, done) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
    let (their_stop, their_done) = (Arc::clone(&stop), Arc::clone(&done));
    let worker = std::thread::spawn(move || load(lane, Vec::new(), areas, 1, &their_stop, &their_done));
    let after = |n: u64| {
        let target = done.load(Ordering::Acquire) + n;
        wait::until("the load", LIMIT, || Ok((done.load(Ordering::Acquire) >= target).then_some(())))
            .unwrap();
    };
    after(200);
    let mut log = Log::new();
    front.session.set_log_base(0, Some(log.region())).unwrap();
    switch(&front, 0, true, used, &addresses);
    let mut there = memory(&map);
    let mut marked = BTreeSet::new();
    for round in 0..30 {
        after(20);
        if round % 10 == 5 {
            // As when memory was added: a new log, and the old one is of no use to anybody afterwards.
            let next = Log::new();
            front.session.set_log_base(0, Some(next.region())).unwrap();
            let last = std::mem::replace(&mut log, next).take();
            copy(&map, &last, &mut there);
            marked.extend(last);
        }
        let dirty = log.take();
        assert!(!dirty.is_empty(), "requests were answered, and no page was written");
        copy(&map, &dirty, &mut there);
        marked.extend(dirty);
    }
    let base = front.base(0);
    let last = log.take();
    copy(&map, &last, &mut there);
    marked.extend(last);
    stop.store(true, Ordering::Release);
    let (mut lane, mut busy) = worker.join().unwrap();
    // What the driver writes is known from elsewhere.
    copy(&map, &shared_pages, &mut there);
    assert_eq!(
        marked.difference(&written).collect::<Vec<_>>(),
        Vec::<&u64>::new(),
        "not written, yet marked"
    );
    let here = memory(&map);
    for &page in &written {
        let range = bytes_of(page);
        assert!(here[range.clone()] == there[range], "page {page:#x} is another one at the destination");
    }

    // The queue goes on where it was, and what was left over is answered.
    let restart = |lane: &Lane, base: u32| {
        front.set_base(0, base);
        front.session.set_vring_kick(0, &lane.kick).unwrap();
    };
    restart(&lane, base);
    let mut free = Vec::new();
    let mut answered = |lane: &mut Lane, busy: &mut Vec<(u16, u64)>| {
        wait::until("answers", LIMIT, || {
            collect(lane, areas, busy, &mut free, &done);
            Ok(busy.is_empty().then_some(()))
        })
        .unwrap();
    };
    answered(&mut lane, &mut busy);

    // Round by round with nothing in flight in between: what changed is marked, and what is marked was to be written.
    let mut rng = Rng(7);
    for _ in 0..40 {
        let base = front.session.get_vring_base(0).unwrap();
        log.take();
        let before = memory(&map);
        restart(&lane, base);
        let mut allowed = ring_pages.clone();
        for slot in 0..=rng.below(4) {
            let buffers = areas.request(&map, &mut rng, slot);
            allowed
                .extend(buffers.iter().filter(|b| b.writable).flat_map(|b| pages(b.addr, u64::from(b.len))));
            busy.push((lane.driver.add(&buffers).unwrap(), slot));
        }
        lane.publish();
        answered(&mut lane, &mut busy);
        let base = front.base(0);
        let dirty = log.take();
        let after = memory(&map);
        for &page in &written {
            let range = bytes_of(page);
            assert!(
                after[range.clone()] == before[range] || dirty.contains(&page),
                "page {page:#x} went unnoticed"
            );
        }
        assert_eq!(dirty.difference(&allowed).collect::<Vec<_>>(), Vec::<&u64>::new(), "marked for nothing");
        restart(&lane, base);
    }

    // Off again: nobody is told anything.
    switch(&front, 0, false, used, &addresses);
    log.take();
    let buffers = areas.request(&map, &mut rng, 0);
    busy.push((lane.driver.add(&buffers).unwrap(), 0));
    lane.publish();
    answered(&mut lane, &mut busy);
    front.session.get_vring_base(0).unwrap();
    assert_eq!(log.take(), BTreeSet::new(), "logged while logging is off");
    assert_eq!(served.errors("memory"), 0);
    drop((front, lane));
    served.terminate();
}

fn image(dir: &Path) -> (tempfile::TempDir, String) {
    let dir = tempfile::tempdir_in(dir).unwrap();
    let path = dir.path().join("disk.img");
    std::fs::File::create(&path).unwrap().set_len(DISK).unwrap();
    let file = format!("--blk-file={}", path.display());
    (dir, file)
}

#[test]
fn of_io_uring_with_direct_io() {
    let scene = Scene::new().unwrap();
    let image = Image::create(&scene, "disk.img", DISK).unwrap();
    let file = format!("--blk-file={}", image.path().display());
    for format in FORMATS {
        let args = [&file, "--direct=on", "--fixed-buffers=on", "--poll=adaptive"];
        log_is_complete_and_exact(&args, format);
    }
}

#[test]
fn of_io_uring_through_the_page_cache() {
    let scene = Scene::new().unwrap();
    let image = Image::create(&scene, "disk.img", DISK).unwrap();
    let file = format!("--blk-file={}", image.path().display());
    for format in FORMATS {
        log_is_complete_and_exact(&[&file, "--direct=off", "--poll=event"], format);
    }
}

#[test]
fn of_a_file_in_memory() {
    let (_dir, file) = image(Path::new("/dev/shm"));
    for format in FORMATS {
        log_is_complete_and_exact(&[&file, "--poll=busy"], format);
    }
}

#[test]
fn of_memory() {
    for format in FORMATS {
        log_is_complete_and_exact(&["--backend=ram:2M", "--poll=adaptive"], format);
    }
}

/// A guest under load goes to and fro between two daemons, with nothing of its memory but what was copied, and with
/// requests that nobody has taken. Packed rings pass through the end of the ring in between: their base tells by 32 bits
/// where both sides are.
#[test]
fn guests_arrive_with_what_was_copied() {
    for format in FORMATS {
        let dir = tempfile::tempdir_in("/dev/shm").unwrap();
        let path = dir.path().join("disk.img");
        std::fs::File::create(&path).unwrap().set_len(DISK).unwrap();
        let file = format!("--blk-file={}", path.display());
        let scenes = [Scene::new().unwrap(), Scene::new().unwrap()];
        let daemons = [
            Served::start(&scenes[0], &[&file, "--poll=adaptive"]),
            Served::start(&scenes[1], &[&file, "--poll=adaptive", "--incoming"]),
        ];
        let mut front = Front::with(&daemons[0].socket, 1, format);
        let mut lane = front.queues.remove(0);
        let map = Arc::clone(front.ram.map());
        let areas = Areas::new(&mut front.ram);
        let addresses = lane.addresses;
        let used = physical(&front, addresses.used_ring_addr);
        let [shared, used_pages] = ring_pages(&front, &lane);
        let devices: BTreeSet<u64> = pages(areas.target, TARGET)
            .chain(pages(areas.statuses, DEPTH * LOG_PAGE))
            .chain(used_pages)
            .collect();
        let drivers: BTreeSet<u64> = pages(areas.headers, LOG_PAGE)
            .chain(pages(physical(&front, addresses.avail_ring_addr), LOG_PAGE))
            .chain(pages(physical(&front, addresses.desc_table_addr), LOG_PAGE))
            .chain(shared)
            .collect();
        let (mut busy, mut left, mut halves) = (Vec::new(), 0, BTreeSet::new());
        let mut hops = 0;
        while hops < 6 || (format != 0 && halves.len() < 2) {
            hops += 1;
            assert!(hops < 60, "the ring ends at {halves:x?} only");
            let log = Log::new();
            front.session.set_log_base(0, Some(log.region())).unwrap();
            switch(&front, 0, true, used, &addresses);
            let (stop, done) = (AtomicBool::new(false), AtomicU64::new(0));
            let mut there = vec![0; 0];
            let mut base = 0;
            (lane, busy) = std::thread::scope(|scope| {
                let worker = scope.spawn(|| load(lane, busy, areas, hops, &stop, &done));
                there = memory(&map);
                for round in 1..6 {
                    let enough = || Ok((done.load(Ordering::Acquire) >= 15 * round).then_some(()));
                    wait::until("the load", LIMIT, enough).unwrap();
                    copy(&map, &log.take(), &mut there);
                }
                base = front.base(0);
                stop.store(true, Ordering::Release);
                worker.join().unwrap()
            });
            copy(&map, &log.take(), &mut there);
            copy(&map, &drivers, &mut there);
            left += busy.len();
            halves.insert([base as u16 & 0x8000, (base >> 16) as u16 & 0x8000]);
            let here = memory(&map);
            for page in devices.iter().map(|&page| bytes_of(page)) {
                assert!(here[page.clone()] == there[page.clone()], "{page:x?} is another one there");
            }
            // Elsewhere is other memory: what was not copied is not there.
            let Front { session, ram, .. } = front;
            drop(session);
            map.slice(RAM_START, RAM_SIZE as u32).unwrap().write(&there);
            let next = &daemons[hops as usize % 2];
            front = Front::arriving(&next.socket, format, ram, vec![(lane, base)]);
            lane = front.queues.remove(0);
        }
        assert!(left > 0, "nothing was in flight at any time");
        let (mut free, done) = (Vec::new(), AtomicU64::new(0));
        lane.publish();
        wait::until("answers", LIMIT, || {
            collect(&mut lane, areas, &mut busy, &mut free, &done);
            Ok(busy.is_empty().then_some(()))
        })
        .unwrap();
        lane.verified_io(1, 7);
        drop((front, lane));
        for daemon in daemons {
            assert_eq!(daemon.errors("memory"), 0);
            daemon.terminate();
        }
    }
}

/// A log that the front end takes away stops the queues that use it; the guest beside it goes on.
#[test]
fn a_log_that_is_taken_away() {
    let scene = Scene::new().unwrap();
    let beside = scene.path("beside.sock");
    let disk = format!("--disk=socket-path={},backend=ram:1M", beside.display());
    let served = Served::start(&scene, &["--backend=ram:1M", &disk, "--poll=busy"]);
    let mut victim = Front::connect(&served.socket, 1);
    let mut other = Front::connect(&beside, 1);
    let log = Log::new();
    victim.session.set_log_base(0, Some(log.region())).unwrap();
    let addresses = victim.queues[0].addresses;
    let spec = victim.ram.spec();
    switch(&victim, 0, true, addresses.used_ring_addr - spec.user_addr + spec.guest_addr, &addresses);
    victim.queues[0].verified_io(0, 1);
    assert!(!log.take().is_empty());
    nix::unistd::ftruncate(log.0.fd(), 0).unwrap();
    let lane = &mut victim.queues[0];
    let area = lane.area;
    lane.put(area, &[0; 16]);
    lane.driver.add(&[
        Buffer { addr: area, len: 16, writable: false },
        Buffer { addr: area + 4096, len: 1, writable: true },
    ]);
    lane.publish();
    wait::until("the error to be counted", LIMIT, || Ok((served.errors("memory") > 0).then_some(())))
        .unwrap();
    wait::until("the error descriptor", LIMIT, || Ok(lane.err.read().ok())).unwrap();
    for seed in 3..10 {
        other.queues[0].verified_io(u64::from(seed), seed);
    }
    drop(victim);
    Front::connect(&served.socket, 1).queues[0].verified_io(5, 6);
    served.terminate();
}
