//! The write-cache mode of a disk goes with its guest from one daemon to the other.
#![allow(clippy::unwrap_used)]

mod blk;
#[path = "../../poll-engine/tests/support/peer.rs"]
mod peer;

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::Path;

use blk::Served;
use kickless_tests::scene::Scene;
use nix::unistd::pipe;
use peer::{Peer, longs, words};
use poll_engine::session::wire::protocol;

/// Offset of the `writeback` byte in configuration space.
const WRITEBACK: u32 = 32;

fn front(socket: &Path) -> Peer {
    let mut peer = Peer::new(UnixStream::connect(socket).unwrap());
    peer.negotiate();
    let bits = peer.ask_number(15);
    assert_ne!(bits & protocol::DEVICE_STATE, 0);
    peer.send(16, false, &longs(&[bits]), &[]);
    peer
}

fn mode(peer: &mut Peer) -> u8 {
    let reply = peer.ask(24, &[words(&[WRITEBACK, 1, 0]), vec![0]].concat());
    reply[12]
}

fn set_mode(peer: &mut Peer, mode: u8) {
    assert!(peer.ack(25, &[words(&[WRITEBACK, 1, 0]), vec![mode]].concat(), &[]));
}

fn save(peer: &mut Peer) -> Vec<u8> {
    let (read, write) = pipe().unwrap();
    peer.send(42, false, &words(&[0, 0]), &[write.as_raw_fd()]);
    assert_eq!(peer.reply(42).unwrap(), longs(&[0x100]));
    drop(write);
    let mut state = Vec::new();
    File::from(read).read_to_end(&mut state).unwrap();
    assert_eq!(peer.ask_number(43), 0);
    state
}

fn load(peer: &mut Peer, state: &[u8]) -> bool {
    let (read, write) = pipe().unwrap();
    peer.send(42, false, &words(&[1, 0]), &[read.as_raw_fd()]);
    assert_eq!(peer.reply(42).unwrap(), longs(&[0x100]));
    File::from(write).write_all(state).unwrap();
    peer.ask_number(43) == 0
}

#[test]
fn the_write_cache_mode_arrives_with_the_guest() {
    let scenes = [Scene::new().unwrap(), Scene::new().unwrap()];
    let daemons = scenes.each_ref().map(|scene| Served::start(scene, &["--backend=ram:1M"]));
    let mut fronts = daemons.each_ref().map(|served| front(&served.socket));
    let [here, there] = &mut fronts;
    assert_eq!((mode(here), mode(there)), (1, 1));
    set_mode(here, 0);
    let state = save(here);
    assert!(load(there, &state));
    assert_eq!((mode(here), mode(there)), (0, 0), "it is where it was, too");
    // And back on, the other way.
    set_mode(there, 1);
    let state = save(there);
    assert!(load(here, &state));
    assert_eq!(mode(here), 1);

    // Whatever is no such state is refused, and changes nothing.
    set_mode(here, 0);
    let mut broken: Vec<Vec<u8>> = (0..state.len()).map(|len| state[..len].to_vec()).collect();
    broken.push([&state[..], &[0]].concat());
    for at in 0..state.len() {
        let mut state = state.clone();
        state[at] ^= 0x82;
        broken.push(state);
    }
    for state in broken {
        assert!(!load(here, &state), "{state:?}");
        assert_eq!(mode(here), 0, "{state:?}");
    }
    drop(fronts);
    let [here, there] = daemons;
    assert!(here.process.stderr().contains("version"), "{}", here.process.stderr());
    here.terminate();
    there.terminate();
}
