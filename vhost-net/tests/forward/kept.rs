//! What a driver has asked for through its control queue outlives the process that it has asked.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use vhost_net::control::{FEATURES, queue_index};
use vhost_net::features::{HASH_REPORT, MQ, MRG_RXBUF, RSS};
use vhost_net::mac::MacAddr;

use crate::guest::{Guest, mac};
use crate::peer::words;
use crate::{BROADCAST, frame};

const PAIRS: u16 = 2;
const CARD: u64 = MRG_RXBUF | MQ | FEATURES & !(RSS | HASH_REPORT);
const NEW: MacAddr = MacAddr([2, 0, 0, 0, 0, 9]);

/// A switch of two ports, which is killed when the test is over.
struct Daemon {
    child: Child,
    dir: tempfile::TempDir,
}

impl Drop for Daemon {
    fn drop(&mut self) {
        self.end(Signal::SIGKILL);
    }
}

impl Daemon {
    fn start() -> Daemon {
        let dir = tempfile::tempdir().unwrap();
        let daemon = Daemon { child: spawn(dir.path(), &[]), dir };
        daemon.await_sockets();
        daemon
    }

    fn socket(&self, at: usize) -> PathBuf {
        self.dir.path().join(format!("port{at}"))
    }

    fn await_sockets(&self) {
        await_that("the sockets", || (0..2).all(|at| self.socket(at).exists()));
    }

    fn end(&mut self, signal: Signal) {
        let _ = kill(Pid::from_raw(self.child.id() as i32), signal);
        let _ = self.child.wait();
    }

    /// Ends it by this signal, and starts another one.
    fn restart(&mut self, signal: Signal) {
        self.end(signal);
        (0..2).for_each(|at| drop(std::fs::remove_file(self.socket(at))));
        self.child = spawn(self.dir.path(), &[]);
        self.await_sockets();
    }

    /// Has another one take over from it.
    fn upgrade(&mut self) {
        let control = self.dir.path().join("control");
        // The old one is what is killed if anything fails; the new one ends with its end.
        let mut next = spawn(self.dir.path(), &[&format!("--takeover={}", control.display())]);
        await_that("the old daemon to go", || {
            let refused = next.try_wait().unwrap();
            assert!(refused.is_none(), "{}", self.log());
            self.child.try_wait().unwrap().is_some()
        });
        let old = std::mem::replace(&mut self.child, next);
        assert!({ old }.wait().unwrap().success(), "{}", self.log());
        await_that("the control socket", || !control.with_extension("new").exists() && control.exists());
        assert!(self.child.try_wait().unwrap().is_none(), "{}", self.log());
    }

    fn log(&self) -> String {
        std::fs::read_to_string(self.dir.path().join("log")).unwrap()
    }

    /// Guests at both ports, of which the second has a control queue.
    fn guests(&self) -> [Guest; 2] {
        let sender = Guest::connect(&self.socket(0), 0, PAIRS, (MRG_RXBUF | MQ, None), 64);
        [sender, self.controlled()]
    }

    fn controlled(&self) -> Guest {
        let control = queue_index(CARD, PAIRS);
        Guest::connect_keeping(&self.socket(1), 1, PAIRS, (CARD, control), 32, Some(2 * PAIRS + 1))
    }
}

fn spawn(dir: &Path, more: &[&str]) -> Child {
    let port = |at: usize| format!("--port=socket-path={}/port{at},mac={}", dir.display(), mac(at));
    let log = File::options().append(true).create(true).open(dir.join("log")).unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_vhost-net"));
    command.args(["--switch", "--poll=event", "--num-queue-pairs=2", &port(0), &port(1)]);
    command.arg(format!("--control={}/control", dir.display())).args(more).stderr(log);
    command.spawn().unwrap()
}

fn await_that(what: &str, mut is_so: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(60);
    while !is_so() {
        assert!(Instant::now() < deadline, "{what}: not within a minute");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Another address, nothing but what is to it or to all, VLAN 7, and both queues.
fn ask(guest: &mut Guest) {
    for bytes in [&[&[1, 1][..], &NEW.0].concat()[..], &[0, 0, 0], &[2, 0, 7, 0], &[4, 0, 2, 0]] {
        assert_eq!(guest.command(bytes), 0);
    }
}

fn address(guest: &mut Guest) -> MacAddr {
    let space = guest.peer.ask(24, &[words(&[0, 6, 0]), vec![0; 6]].concat());
    MacAddr(space[12..].try_into().unwrap())
}

/// Fails unless what was asked for is done, or nothing was asked for.
fn expect(daemon: &Daemon, [sender, guest]: &mut [Guest; 2], asked: bool) {
    assert_eq!(address(guest), if asked { NEW } else { mac(1) }, "{}", daemon.log());
    let to = |to, vid| frame(to, mac(0), vid, 1, 60);
    let all = [to(NEW, None), to(mac(1), None), to(NEW, Some(7)), to(NEW, Some(8)), to(BROADCAST, None)];
    let wanted: Vec<_> = all
        .iter()
        .enumerate()
        .filter(|(i, _)| !asked || [0, 2, 4].contains(i))
        .map(|(_, f)| f.clone())
        .collect();
    guest.queues.clear();
    for pair in 0..PAIRS.into() {
        sender.send_burst(pair, &all);
        assert_eq!(guest.await_frames(wanted.len()), wanted);
    }
    // Of one pair, where the driver has not said that it uses the other.
    assert_eq!(guest.queues.contains(&1), asked);
}

/// A guest whose port is not there yet sends nothing that comes.
fn settle([sender, guest]: &mut [Guest; 2]) {
    let hello = frame(BROADCAST, mac(0), None, 0, 60);
    let deadline = Instant::now() + Duration::from_secs(60);
    while guest.got.is_empty() {
        assert!(Instant::now() < deadline, "nothing arrives");
        sender.send(0, &hello);
        await_that("it to be sent", || sender.all_sent());
        std::thread::sleep(Duration::from_millis(5));
        guest.receive();
    }
    // As many as were sent have come now, for they come in order.
    let last = frame(BROADCAST, mac(0), None, 0xff, 60);
    sender.send(0, &last);
    await_that("the last", || {
        guest.receive();
        guest.got.last() == Some(&last)
    });
    (guest.got, guest.headers) = Default::default();
}

#[test]
fn what_was_asked_for_is_so_after_an_upgrade() {
    let mut daemon = Daemon::start();
    let mut guests = daemon.guests();
    settle(&mut guests);
    expect(&daemon, &mut guests, false);
    daemon.upgrade();
    settle(&mut guests);
    expect(&daemon, &mut guests, false);
    ask(&mut guests[1]);
    for _ in 0..2 {
        daemon.upgrade();
        settle(&mut guests);
        expect(&daemon, &mut guests, true);
    }
    // And is no more after a reset, here and there.
    assert!(guests[1].peer.ack(34, &[], &[]));
    assert_eq!(address(&mut guests[1]), mac(1));
    daemon.upgrade();
    assert_eq!(address(&mut guests[1]), mac(1));
}

#[test]
fn what_was_asked_for_is_so_after_a_kill_if_the_front_end_keeps_the_record() {
    let mut daemon = Daemon::start();
    let mut guests = daemon.guests();
    settle(&mut guests);
    ask(&mut guests[1]);
    for signal in [Signal::SIGKILL, Signal::SIGKILL, Signal::SIGTERM] {
        daemon.restart(signal);
        guests[0] = Guest::connect(&daemon.socket(0), 0, PAIRS, (MRG_RXBUF | MQ, None), 64);
        guests[1].reconnect(&daemon.socket(1));
        settle(&mut guests);
        expect(&daemon, &mut guests, true);
    }
    // Not with another record, nor after a reset.
    drop(guests);
    let mut guests = daemon.guests();
    settle(&mut guests);
    expect(&daemon, &mut guests, false);
    ask(&mut guests[1]);
    assert!(guests[1].peer.ack(34, &[], &[]));
    daemon.restart(Signal::SIGKILL);
    guests[1].reconnect(&daemon.socket(1));
    assert_eq!(address(&mut guests[1]), mac(1));
}
