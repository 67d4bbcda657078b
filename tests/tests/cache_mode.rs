//! The write-cache mode is never relaxed behind the back of a guest that may rely on it: not by resets, by sessions that
//! end, by a live upgrade or by the death of the daemon.
#![allow(clippy::unwrap_used)]

mod blk;
#[path = "takeover/chain.rs"]
mod chain;
#[path = "../../poll-engine/tests/support/peer.rs"]
mod peer;

use std::net::Shutdown;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;

use blk::{LIMIT, Served};
use chain::Chain;
use kickless_tests::image::{Image, MIB};
use kickless_tests::scene::Scene;
use nix::sys::eventfd::EventFd;
use nix::sys::signal::Signal;
use peer::{FEATURES, Peer, eventfd, longs, words};
use poll_engine::memory::Ram;
use poll_engine::ring::RingConfig;
use poll_engine::ring::driver::DriverRing;

const F_FLUSH: u64 = 1 << 9;
const F_CONFIG_WCE: u64 = 1 << 11;
const WRITEBACK: u32 = 32;
const THROUGH: u8 = 0;
const BACK: u8 = 1;

/// A front end as QEMU is one: memory, ring and record outlive the sessions.
struct Guest {
    peer: Peer,
    ram: Ram,
    config: RingConfig,
    kick: EventFd,
    record: Option<(Vec<u8>, OwnedFd)>,
}

impl Guest {
    fn connect(socket: &Path) -> Guest {
        let mut ram = Ram::new(0x10_0000, 1 << 20, false).unwrap();
        let config = DriverRing::lay_out(&mut ram, 16, FEATURES).unwrap();
        Guest { peer: session(socket), ram, config, kick: eventfd(), record: None }
    }

    fn reconnect(&mut self, socket: &Path) {
        // One front end at a time.
        let _gone = self.peer.stream.shutdown(Shutdown::Both);
        self.peer = session(socket);
    }

    /// Asks for a record of requests in flight, if there is none yet, and passes it on.
    fn record(&mut self) {
        let (spec, fd) = self.record.get_or_insert_with(|| {
            let wanted = [longs(&[0, 0]), words(&[1 | 16 << 16, 0])].concat();
            let (spec, fd) = self.peer.ask_fd(31, &wanted);
            (spec, fd.unwrap())
        });
        assert!(self.peer.ack(32, spec, &[fd.as_raw_fd()]));
    }

    fn start(&mut self) {
        assert!(self.peer.ack(2, &longs(&[FEATURES | F_FLUSH | F_CONFIG_WCE]), &[]));
        assert!(self.peer.mem_table(&[(self.ram.spec(), self.ram.fd().as_raw_fd())]));
        self.peer.set_ring(0, &self.config, 0);
        assert!(self.peer.ack(12, &longs(&[0]), &[self.kick.as_raw_fd()]));
        assert!(self.peer.ack(18, &words(&[0, 1]), &[]));
        assert!(self.peer.ack(39, &longs(&[15]), &[]));
    }

    fn mode(&mut self) -> u8 {
        let ask = [words(&[WRITEBACK, 1, 0]), vec![0xaa]].concat();
        self.peer.ask(24, &ask)[12]
    }

    fn choose(&mut self, mode: u8) {
        assert!(self.peer.ack(25, &[words(&[WRITEBACK, 1, 0]), vec![mode]].concat(), &[]));
    }

    /// `vhost_dev_stop`, as for QEMU's `stop`; or what a guest's reset makes it send.
    fn reset(&mut self, by: Reset) {
        self.peer.ask(11, &words(&[0, 0]));
        match by {
            Reset::Status => assert!(self.peer.ack(39, &longs(&[0]), &[])),
            Reset::Device => assert!(self.peer.ack(34, &[], &[])),
        }
    }
}

#[derive(Clone, Copy, Debug)]
enum Reset {
    Status,
    Device,
}

fn session(socket: &Path) -> Peer {
    let mut peer = Peer::new(UnixStream::connect(socket).unwrap());
    peer.negotiate();
    peer
}

fn image(scene: &Scene) -> (Image, String) {
    let image = Image::create(scene, "disk.img", MIB).unwrap();
    let arg = format!("--blk-file={}", image.path().display());
    (image, arg)
}

#[test]
fn a_reset_turns_the_cache_off_but_never_on() {
    for by in [Reset::Status, Reset::Device] {
        let scene = Scene::new().unwrap();
        let (_image, arg) = image(&scene);
        let served = Served::start(&scene, &[&arg]);
        let mut guest = Guest::connect(&served.socket);
        assert_eq!(guest.mode(), BACK, "to begin with");
        guest.start();
        guest.reset(by);
        guest.start();
        assert_eq!(guest.mode(), BACK, "{by:?}");
        guest.choose(THROUGH);
        guest.reset(by);
        guest.start();
        assert_eq!(guest.mode(), THROUGH, "{by:?}");
        guest.choose(BACK);
        assert_eq!(guest.mode(), BACK, "the guest may turn it on again");
        drop(guest);
        served.terminate();

        let served = Served::start(&scene, &[&arg, "--cache=writethrough"]);
        let mut guest = Guest::connect(&served.socket);
        assert_eq!(guest.mode(), THROUGH, "as configured");
        guest.start();
        guest.choose(BACK);
        assert_eq!(guest.mode(), BACK);
        guest.reset(by);
        assert_eq!(guest.mode(), THROUGH, "{by:?}");
    }
}

#[test]
fn sessions_end_and_the_mode_stays() {
    let scene = Scene::new().unwrap();
    let (_image, arg) = image(&scene);
    let served = Served::start(&scene, &[&arg]);
    let mut guest = Guest::connect(&served.socket);
    assert_eq!(guest.mode(), BACK);
    guest.start();
    guest.reconnect(&served.socket);
    guest.start();
    assert_eq!(guest.mode(), BACK, "told by this daemon in another session");
    guest.choose(THROUGH);
    guest.reconnect(&served.socket);
    guest.start();
    assert_eq!(guest.mode(), THROUGH);
    drop(guest);
    served.terminate();
}

#[test]
fn a_live_upgrade_takes_the_mode_along() {
    let scene = Scene::new().unwrap();
    let (_image, arg) = image(&scene);
    let socket = scene.path("disk.sock");
    let mut chain = Chain::start(&scene, &[arg, format!("--socket-path={}", socket.display())]);
    let mut guest = Guest::connect(&socket);
    assert_eq!(guest.mode(), BACK);
    guest.start();
    chain.upgrade(&[]);
    assert_eq!(guest.mode(), BACK);
    guest.choose(THROUGH);
    chain.upgrade(&[]);
    guest.reset(Reset::Status);
    guest.start();
    assert_eq!(guest.mode(), THROUGH);
    guest.reconnect(&socket);
    guest.start();
    assert_eq!(guest.mode(), THROUGH);
    drop(guest);
    chain.terminate();
}

/// Another daemon after `kill -9`.
fn next(scene: &Scene, mut served: Served, arg: &str) -> Served {
    served.process.signal(Signal::SIGKILL).unwrap();
    served.process.wait_exit(LIMIT).unwrap();
    // Or it would be taken for the next one's.
    std::fs::remove_file(&served.socket).unwrap();
    Served::start(scene, &[arg])
}

#[test]
fn the_mode_survives_the_daemon_in_the_record() {
    let scene = Scene::new().unwrap();
    let (_image, arg) = image(&scene);
    let mut served = Served::start(&scene, &[&arg]);
    let mut guest = Guest::connect(&served.socket);
    assert_eq!(guest.mode(), BACK);
    guest.record();
    guest.start();
    for mode in [BACK, THROUGH, BACK] {
        guest.choose(mode);
        served = next(&scene, served, &arg);
        guest.reconnect(&served.socket);
        guest.record();
        guest.start();
        assert_eq!(guest.mode(), mode);
    }
    // A reset in between is of no consequence either.
    guest.choose(THROUGH);
    guest.reset(Reset::Status);
    served = next(&scene, served, &arg);
    guest.reconnect(&served.socket);
    guest.record();
    guest.start();
    assert_eq!(guest.mode(), THROUGH);
    drop(guest);
    served.terminate();
}

#[test]
fn without_a_record_a_guest_that_goes_on_gets_write_through() {
    let scene = Scene::new().unwrap();
    let (_image, arg) = image(&scene);
    let mut served = Served::start(&scene, &[&arg]);
    let mut guest = Guest::connect(&served.socket);
    assert_eq!(guest.mode(), BACK);
    guest.start();
    guest.choose(THROUGH);
    for _ in 0..2 {
        served = next(&scene, served, &arg);
        guest.reconnect(&served.socket);
        guest.start();
        assert_eq!(guest.mode(), THROUGH, "it may have chosen that");
        assert!(served.process.stderr().contains("going on with write-through"));
    }
    // One that asks relies on the answer, and so does one that says what it wants.
    served = next(&scene, served, &arg);
    guest.reconnect(&served.socket);
    assert_eq!(guest.mode(), BACK);
    guest.start();
    assert_eq!(guest.mode(), BACK);
    served = next(&scene, served, &arg);
    guest.reconnect(&served.socket);
    guest.choose(BACK);
    guest.start();
    assert_eq!(guest.mode(), BACK);
    drop(guest);
    served.terminate();
}
