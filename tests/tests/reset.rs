//! Queues and devices that are reset with 64 requests in flight, on a file with io_uring: what was taken is finished
//! before the acknowledgement, and from then on not one byte of that guest memory is touched.
#![allow(clippy::unwrap_used)]

mod blk;
#[path = "../../poll-engine/tests/support/peer.rs"]
mod peer;

use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

use blk::{Front, OK, READ, Served, WRITE};
use kickless_tests::image::Image;
use kickless_tests::scene::Scene;
use nix::sys::eventfd::EventFd;
use peer::{FEATURES, Peer, eventfd, longs, words};
use poll_engine::device::features::{RING_PACKED, RING_RESET};
use poll_engine::memory::{MemoryMap, Ram};
use poll_engine::ring::RingConfig;
use poll_engine::ring::driver::{Buffer, DriverRing};

const ROUNDS: u64 = 1000;
const DEPTH: u64 = 64;
/// Three descriptors a request.
const RING: u16 = 256;
/// Bytes of one request, and of its place in memory with header and status.
const DATA: u32 = 8 << 10;
const PLACE: u64 = 12 << 10;

const DISK: u64 = 8 << 20;
const FILL: u8 = 0x77;
/// What memory holds that nobody may touch.
const CANARY: u8 = 0xa5;

/// A ring with its requests' memory: what is handed back, whole, by a reset.
struct Area {
    start: u64,
    len: u32,
    config: RingConfig,
    places: u64,
    map: Arc<MemoryMap>,
}

impl Area {
    fn new(ram: &mut Ram, features: u64) -> Area {
        let config = DriverRing::lay_out(ram, RING, features).unwrap();
        let places = ram.alloc(DEPTH * PLACE, 4096).unwrap();
        let start = config.desc_addr - ram.spec().user_addr + ram.spec().guest_addr;
        let len = (places + DEPTH * PLACE - start) as u32;
        Area { start, len, config, places, map: Arc::clone(ram.map()) }
    }

    fn fill(&self, byte: u8) {
        self.map.slice(self.start, self.len).unwrap().fill(byte);
    }

    fn get(&self, at: u64, len: u32) -> Vec<u8> {
        let mut bytes = vec![0; len as usize];
        assert_eq!(self.map.slice(at, len).unwrap().read(&mut bytes), bytes.len());
        bytes
    }

    fn expect_untouched(&self, round: u64) {
        let bytes = self.get(self.start, self.len);
        if let Some(at) = bytes.iter().position(|&b| b != CANARY) {
            panic!("round {round}: byte {at:#x} of {:#x} was written after the acknowledgement", self.len);
        }
    }

    /// Makes [`DEPTH`] requests available: reads of what the disk is filled with, and every fourth a write of the same.
    fn submit(&self, kick: &EventFd, round: u64) -> DriverRing {
        let mut driver = DriverRing::new(&self.config, &self.map).unwrap();
        for i in 0..DEPTH {
            let at = self.places + i * PLACE;
            let write = i % 4 == 3;
            let sector = (round * 37 + i * 131) % (DISK / 512 - u64::from(DATA / 512));
            let kind = if write { WRITE } else { READ };
            let header = [u64::from(kind).to_le_bytes(), sector.to_le_bytes()].concat();
            self.map.slice(at, 16).unwrap().write(&header);
            self.map.slice(at + 16, 1).unwrap().write(&[0xff]);
            if write {
                self.map.slice(at + 4096, DATA).unwrap().fill(FILL);
            }
            let buffers = [
                Buffer { addr: at, len: 16, writable: false },
                Buffer { addr: at + 4096, len: DATA, writable: !write },
                Buffer { addr: at + 16, len: 1, writable: true },
            ];
            driver.add(&buffers).unwrap();
        }
        if driver.publish() {
            kick.write(1).unwrap();
        }
        driver
    }

    /// Requests that have a status.
    fn answered(&self) -> u64 {
        (0..DEPTH).filter(|i| self.get(self.places + i * PLACE + 16, 1) != [0xff]).count() as u64
    }

    /// After the reset: what was given back is good, and nothing else has been begun.
    fn check(&self, driver: &mut DriverRing, round: u64) -> u64 {
        let mut done = 0;
        while driver.collect().is_some() {
            done += 1;
        }
        let mut good = 0;
        for i in 0..DEPTH {
            let at = self.places + i * PLACE;
            match self.get(at + 16, 1)[0] {
                OK => {
                    good += 1;
                    assert_eq!(self.get(at + 4096, DATA), vec![FILL; DATA as usize], "round {round}");
                }
                0xff => {}
                status => panic!("round {round}: status {status}"),
            }
        }
        assert_eq!(done, good, "round {round}: requests given back, and requests with a status");
        done
    }
}

/// How something is reset. Each returns when that is acknowledged, with the base if there is one.
#[derive(Clone, Copy, Debug)]
enum Reset {
    GetVringBase,
    Disable,
    Device,
    Status,
}

fn reset(peer: &mut Peer, how: Reset) -> Option<u32> {
    match how {
        Reset::GetVringBase => {
            let reply = peer.ask(11, &words(&[0, 0]));
            return Some(u32::from_ne_bytes(reply[4..].try_into().unwrap()));
        }
        Reset::Disable => assert!(peer.ack(18, &words(&[0, 0]), &[])),
        Reset::Device => assert!(peer.ack(34, &[], &[])),
        Reset::Status => {
            assert!(peer.ack(39, &longs(&[0]), &[]));
            assert_eq!(peer.ask_number(40), 0);
            assert!(peer.ack(39, &longs(&[15]), &[]));
        }
    }
    None
}

fn again_and_again(format: u64, args: &[&str], ways: &[Reset]) {
    let features = FEATURES | RING_RESET | format;
    let scene = Scene::new().unwrap();
    let image = Image::filled(&scene, "disk.img", DISK, FILL).unwrap();
    let beside = scene.path("beside.sock");
    let file = format!("--blk-file={}", image.path().display());
    let disk = format!("--disk=socket-path={},backend=ram:1M", beside.display());
    let served = Served::start(&scene, &[&[&*file, &*disk, "--queue-size=256"], args].concat());
    let mut neighbour = Front::connect(&beside, 1);

    let mut peer = Peer::new(UnixStream::connect(&served.socket).unwrap());
    peer.negotiate();
    assert!(peer.ack(2, &longs(&[features]), &[]));
    let mut ram = Ram::new(0x10_0000, 4 << 20, false).unwrap();
    // Two, in turn: while one is in use the other is watched.
    let areas = [Area::new(&mut ram, features), Area::new(&mut ram, features)];
    assert!(peer.mem_table(&[(ram.spec(), ram.fd().as_raw_fd())]));
    let (mut in_flight, mut cut_short, mut left, mut whole) = (0, 0, 0, 0);
    blk::beside(&mut neighbour.queues[0], |_| {
        for round in 0..ROUNDS {
            let (area, other) = (&areas[(round % 2) as usize], &areas[(round % 2 + 1) as usize % 2]);
            let (kick, call) = (eventfd(), eventfd());
            // Before anything is said of it: a queue that is still enabled starts with its kick descriptor.
            area.fill(0);
            peer.set_ring(0, &area.config, area.config.base);
            assert!(peer.ack(13, &longs(&[0]), &[call.as_raw_fd()]));
            assert!(peer.ack(12, &longs(&[0]), &[kick.as_raw_fd()]));
            assert!(peer.ack(18, &words(&[0, 1]), &[]));
            let mut driver = area.submit(&kick, round);
            // Mostly at once, and else somewhere on the way: up to half of them given back.
            let wait_for = if round % 4 == 3 { round / 4 % (DEPTH / 2) } else { 0 };
            peer::until("some requests", || area.answered() >= wait_for);
            let before = area.answered();
            whole += u64::from(before == 0);
            let base = reset(&mut peer, ways[(round % ways.len() as u64) as usize]);
            let done = area.check(&mut driver, round);
            if let (Some(base), 0) = (base, format) {
                assert_eq!(u64::from(base), done, "round {round}: taken, and given back");
            }
            in_flight += done - before;
            cut_short += u64::from(done > before);
            left += DEPTH - done;
            drop(driver);
            area.fill(CANARY);
            if round > 0 {
                other.expect_untouched(round);
            }
        }
    });
    std::thread::sleep(Duration::from_millis(200));
    areas[(ROUNDS as usize - 1) % 2].expect_untouched(ROUNDS);
    println!(
        "{whole} of {ROUNDS} resets had all {DEPTH} requests unanswered, {cut_short} of them some that were finished \
         first, {in_flight} in all; {left} were never taken"
    );
    assert!(whole > ROUNDS / 4, "only {whole} resets came before the first answer");
    assert!(cut_short > ROUNDS / 4, "only {cut_short} resets had anything in flight");
    let said = served.stats();
    assert!(!said.contains("\nerrors "), "{said}");
    drop((peer, neighbour));
    served.terminate();
}

#[test]
fn a_queue_a_thousand_times() {
    again_and_again(0, &["--direct=on", "--poll=adaptive"], &[Reset::GetVringBase, Reset::Disable]);
}

#[test]
fn a_packed_queue_a_thousand_times() {
    again_and_again(RING_PACKED, &["--direct=on", "--poll=event"], &[Reset::GetVringBase, Reset::Disable]);
}

#[test]
fn a_device_a_thousand_times() {
    again_and_again(0, &["--direct=on", "--poll=event"], &[Reset::Device, Reset::Status]);
}

#[test]
fn a_device_with_packed_queues_a_thousand_times() {
    again_and_again(RING_PACKED, &["--direct=on", "--poll=adaptive"], &[Reset::Device, Reset::Status]);
}
