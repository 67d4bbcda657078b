//! A device's state through the session: saved by one, loaded by another, and whatever a front end may get wrong about
//! it costs the transfer alone.
#![allow(clippy::unwrap_used)]

mod support;

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::time::{Duration, Instant};

use nix::fcntl::OFlag;
use nix::unistd::{pipe, pipe2};
use poll_engine::engine::pacing::Pacing;
use poll_engine::session::wire::protocol;
use support::{Back, Guest, Peer, eventfd, longs, until, words};

const SAVE: u32 = 0;
const LOAD: u32 = 1;
/// No descriptor comes back: the front end's is used.
const TAKEN: u64 = 1 << 8;
const REFUSED: u64 = TAKEN | 1;

fn back(state: Option<&[u8]>) -> Back {
    let back = Back::start(Pacing::Busy);
    *back.echo.state.lock().unwrap() = state.map(<[u8]>::to_vec);
    back
}

fn front(back: &Back) -> Peer {
    let mut peer = back.front();
    let bits = peer.ask_number(15);
    assert_ne!(bits & protocol::DEVICE_STATE, 0);
    let bits = protocol::REPLY_ACK | protocol::CONFIG | protocol::DEVICE_STATE;
    peer.send(16, false, &longs(&[bits]), &[]);
    peer
}

fn transfer(peer: &mut Peer, direction: u32, fds: &[RawFd]) -> u64 {
    // Answered whether or not an acknowledgement is asked for.
    peer.send(42, direction == LOAD, &words(&[direction, 0]), fds);
    u64::from_ne_bytes(peer.reply(42).expect("an answer").try_into().unwrap())
}

fn save(peer: &mut Peer) -> Vec<u8> {
    let (read, write) = pipe().unwrap();
    assert_eq!(transfer(peer, SAVE, &[write.as_raw_fd()]), TAKEN);
    drop(write);
    let mut state = Vec::new();
    File::from(read).read_to_end(&mut state).unwrap();
    assert_eq!(peer.ask_number(43), 0);
    state
}

/// What the back end says of it in the end.
fn load(peer: &mut Peer, state: &[u8]) -> u64 {
    let mut write = begin_load(peer);
    write.write_all(state).unwrap();
    drop(write);
    peer.ask_number(43)
}

fn begin_load(peer: &mut Peer) -> File {
    let (read, write) = pipe2(OFlag::O_CLOEXEC).unwrap();
    assert_eq!(transfer(peer, LOAD, &[read.as_raw_fd()]), TAKEN);
    File::from(write)
}

fn state_of(back: &Back) -> Vec<u8> {
    back.echo.state.lock().unwrap().clone().unwrap()
}

#[test]
fn one_saves_and_another_loads() {
    for len in [0, 1, 4092] {
        let state = [&b"echo"[..], &vec![7; len]].concat();
        let (here, there) = (back(Some(&state)), back(Some(b"echo other")));
        let (mut source, mut destination) = (front(&here), front(&there));
        let mut guest = Guest::new(0);
        guest.start(&mut source);
        guest.round_trip();
        let base = guest.stop(&mut source);
        assert_eq!(save(&mut source), state);
        assert_eq!(load(&mut destination, &state), 0);
        assert_eq!(state_of(&there), state);
        assert!(destination.mem_table(&[guest.region()]));
        guest.describe(&mut destination, base);
        guest.set_kick(&mut destination);
        guest.enable(&mut destination, true);
        guest.round_trip();
        // Or the migration fails, and it goes on here.
        assert_eq!(save(&mut source), state, "as often as wanted");
        source.expect_alive();
    }
}

#[test]
fn in_pieces_and_read_before_anybody_asks() {
    let back = back(Some(b"echo"));
    let mut peer = front(&back);
    let mut write = begin_load(&mut peer);
    for piece in ["ec", "ho", " in", " pieces"] {
        write.write_all(piece.as_bytes()).unwrap();
        std::thread::sleep(Duration::from_millis(5));
    }
    drop(write);
    until("the state", || state_of(&back) == b"echo in pieces");
    assert_eq!(peer.ask_number(43), 0);
    assert_eq!(peer.ask_number(43), 1, "asked once");
}

#[test]
fn what_is_no_state_is_refused_and_changes_nothing() {
    let back = back(Some(b"echo mine"));
    let mut peer = front(&back);
    for (what, state) in [("nothing", &b""[..]), ("another device's", b"fish"), ("cut short", b"ech")] {
        assert_eq!(load(&mut peer, state), 1, "{what}");
    }
    assert_eq!(load(&mut peer, &[b'e'; 4097]), 1, "too long");
    assert_eq!(state_of(&back), b"echo mine");
    // Asked before it is all there; what comes then is nobody's.
    let mut write = begin_load(&mut peer);
    write.write_all(b"echo late").unwrap();
    assert_eq!(peer.ask_number(43), 1);
    assert!(write.write_all(b"r").is_err(), "the back end has let go");
    assert_eq!(state_of(&back), b"echo mine");
    assert_eq!(load(&mut peer, b"echo in time"), 0);
}

/// No end of data, and a writer that waits for its reader: it is told, and nobody waits for it.
#[test]
fn endless_data_ends() {
    let back = back(Some(b"echo"));
    let mut peer = front(&back);
    let mut write = begin_load(&mut peer);
    let writer = std::thread::spawn(move || {
        let from = Instant::now();
        while write.write_all(&[b'e'; 1 << 13]).is_ok() {
            assert!(from.elapsed() < support::LIMIT, "somebody reads all of it");
        }
    });
    writer.join().unwrap();
    assert_eq!(peer.ask_number(43), 1);
    // One that never ends, and another that takes its place, and one that is given up.
    let _open = begin_load(&mut peer);
    assert_eq!(load(&mut peer, b"echo next"), 0);
    let _open = begin_load(&mut peer);
    drop(peer);
    assert_eq!(state_of(&back), b"echo next");
    front(&back).expect_alive();
}

#[test]
fn nobody_is_waited_for() {
    let back = back(Some(&[b'e'; 4096]));
    let mut peer = front(&back);
    let (read, write) = pipe().unwrap();
    drop(read);
    assert_eq!(transfer(&mut peer, SAVE, &[write.as_raw_fd()]), REFUSED, "nobody reads");
    assert_eq!(peer.ask_number(43), 1);
    // Full, and it would block.
    let (_read, write) = pipe().unwrap();
    let filler = write.as_fd().try_clone_to_owned().unwrap();
    nix::fcntl::fcntl(&filler, nix::fcntl::FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).unwrap();
    while nix::unistd::write(&filler, &[0; 4096]).is_ok() {}
    nix::fcntl::fcntl(&filler, nix::fcntl::FcntlArg::F_SETFL(OFlag::empty())).unwrap();
    assert_eq!(transfer(&mut peer, SAVE, &[write.as_raw_fd()]), REFUSED, "nobody reads, and all is full");
    peer.expect_alive();
}

#[test]
fn what_does_not_belong_is_refused() {
    let back = back(Some(b"echo"));
    let mut peer = front(&back);
    let (read, write) = pipe().unwrap();
    let event = eventfd();
    let file = tempfile::tempfile().unwrap();
    let (socket, _other) = std::os::unix::net::UnixStream::pair().unwrap();
    assert_eq!(peer.ask_number(43), 1, "nothing was begun");
    for direction in [SAVE, LOAD] {
        for fd in [event.as_raw_fd(), file.as_raw_fd(), socket.as_raw_fd()] {
            assert_eq!(transfer(&mut peer, direction, &[fd]), REFUSED);
        }
        assert_eq!(transfer(&mut peer, direction, &[]), REFUSED);
        assert_eq!(transfer(&mut peer, direction, &[read.as_raw_fd(), write.as_raw_fd()]), REFUSED);
    }
    assert_eq!(transfer(&mut peer, SAVE, &[read.as_raw_fd()]), REFUSED, "the wrong end");
    transfer(&mut peer, LOAD, &[write.as_raw_fd()]);
    assert_eq!(peer.ask_number(43), 1, "the wrong end");
    let odd: [&[u8]; 4] = [&words(&[2, 0]), &words(&[0, 1]), &words(&[0]), &words(&[0, 0, 0])];
    for payload in odd {
        peer.send(42, false, payload, &[write.as_raw_fd()]);
        assert_eq!(peer.reply(42).unwrap(), longs(&[REFUSED]));
    }
    // While a queue runs, and one that is started in between.
    let guest = Guest::new(0);
    let mut late = begin_load(&mut peer);
    guest.start(&mut peer);
    assert_eq!(transfer(&mut peer, SAVE, &[write.as_raw_fd()]), REFUSED);
    late.write_all(b"echo late").unwrap();
    drop(late);
    assert_eq!(peer.ask_number(43), 1);
    guest.stop(&mut peer);
    assert_eq!(state_of(&back), b"echo");
    drop::<OwnedFd>(write);
    assert_eq!(save(&mut peer), b"echo");
}

#[test]
fn a_device_without_state_does_not_offer_it() {
    let back = back(None);
    let mut peer = back.front();
    assert_eq!(peer.ask_number(15) & protocol::DEVICE_STATE, 0);
    let (_read, write) = pipe().unwrap();
    assert_eq!(transfer(&mut peer, SAVE, &[write.as_raw_fd()]), REFUSED);
    assert_eq!(peer.ask_number(43), 1);
    peer.send(16, true, &longs(&[protocol::REPLY_ACK | protocol::DEVICE_STATE]), &[]);
    assert_eq!(peer.reply(16).unwrap(), longs(&[1]));
}
