//! Network cards to run `vbench net` against, and what it says.
#![allow(dead_code)] // each test program uses its part

use std::fs::File;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

use super::peer::{LIMIT, Outcome, Started, vbench};

/// A started back end with one socket or two, killed when dropped.
pub struct Nic {
    child: Child,
    dir: tempfile::TempDir,
    pub sockets: Vec<String>,
}

impl Nic {
    /// Starts a program; `args` gives its arguments for its sockets.
    pub fn start(program: &str, ports: usize, args: impl FnOnce(&[String]) -> Vec<String>) -> Nic {
        let nic = Nic::connecting(program, ports, args);
        nic.listening();
        // Between binding and listening.
        std::thread::sleep(Duration::from_millis(50));
        nic
    }

    /// Waits until it does something.
    fn until(&self, what: &str, does: impl Fn() -> bool) {
        let begun = Instant::now();
        while !does() {
            assert!(begun.elapsed() < LIMIT, "it does not {what}: {}", self.said());
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Waits until it listens.
    pub fn listening(&self) {
        self.until("listen", || self.sockets.iter().all(|s| std::fs::exists(s).unwrap()));
    }

    /// Waits until it has said something.
    pub fn until_said(&self, text: &str) {
        self.until(text, || self.said().contains(text));
    }

    /// The same of one that does not listen.
    pub fn connecting(program: &str, ports: usize, args: impl FnOnce(&[String]) -> Vec<String>) -> Nic {
        let dir = tempfile::tempdir().unwrap();
        let path = |i: usize| dir.path().join(format!("s{i}")).to_str().unwrap().to_owned();
        let sockets: Vec<_> = (0..ports).map(path).collect();
        let said = File::create(dir.path().join("said")).unwrap();
        let mut command = Command::new(program);
        command.args(args(&sockets)).stdin(Stdio::null());
        command.stdout(said.try_clone().unwrap()).stderr(said);
        Nic { child: command.spawn().unwrap(), dir, sockets }
    }

    /// One of vbench's own.
    pub fn own(kind: &str, ports: usize, more: &[&str]) -> Nic {
        let args = |sockets: &[String]| own_args(kind, sockets, more);
        Nic::start(env!("CARGO_BIN_EXE_vbench"), ports, args)
    }

    pub fn floor(ports: usize) -> Nic {
        Nic::own("floor-net", ports, &[])
    }

    pub fn plain(ports: usize, more: &[&str]) -> Nic {
        Nic::own("plain-net", ports, more)
    }

    /// What it has written.
    pub fn said(&self) -> String {
        std::fs::read_to_string(self.dir.path().join("said")).unwrap_or_default()
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// Runs `vbench net` on all of its sockets.
    pub fn drive(&self, args: &[&str]) -> Outcome {
        self.listening();
        drive(&self.sockets, args)
    }

    /// The result of a run that is a success.
    #[track_caller]
    pub fn good(&self, args: &[&str]) -> Value {
        self.drive(&[args, &["--json"]].concat()).good().json()["result"].clone()
    }

    /// Runs with so many packets from each port, none of which may be lost, late, there twice or wrong.
    #[track_caller]
    pub fn lossless(&self, packets: u64, args: &[&str]) -> Value {
        let n = packets.to_string();
        let result = self.good(&[args, &["--packets", &n]].concat());
        for direction in result["directions"].as_array().unwrap() {
            let count = |name: &str| direction[name].as_u64().unwrap();
            let counts =
                ["sent", "received", "lost", "reordered", "duplicates", "corrupt", "foreign"].map(count);
            assert_eq!(counts, [packets, packets, 0, 0, 0, 0, 0], "{args:?}: {direction}");
            assert_eq!(direction["latency_ns"]["N"], packets, "{args:?}");
        }
        result
    }
}

pub fn own_args(kind: &str, sockets: &[String], more: &[&str]) -> Vec<String> {
    let mut args = vec![kind.to_owned()];
    args.extend(sockets.iter().flat_map(|s| ["--socket-path".to_owned(), s.clone()]));
    args.extend(more.iter().map(ToString::to_string));
    args
}

/// Runs `vbench net`.
pub fn drive(sockets: &[String], args: &[&str]) -> Outcome {
    let mut all = vec!["net"];
    all.extend(sockets.iter().flat_map(|s| ["--socket-path", s]));
    all.extend(args);
    vbench(&all)
}

/// Runs `vbench net --server`, with a back end that is started when it listens.
pub fn connected(args: &[&str], back_end: impl FnOnce(String) -> Nic) -> Outcome {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("front");
    let name = socket.to_str().unwrap();
    let run = Started::new(&[&["net", "--server", "--socket-path", name], args].concat());
    let begun = Instant::now();
    while !socket.exists() {
        assert!(begun.elapsed() < LIMIT, "it does not listen");
        std::thread::sleep(Duration::from_millis(10));
    }
    let _nic = back_end(name.to_owned());
    let outcome = run.end();
    assert!(!socket.exists(), "the socket is left behind");
    outcome
}

impl Drop for Nic {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
