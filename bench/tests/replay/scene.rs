//! What the tests of recording and replaying share: programs that end, a daemon of the same build, captures.
#![allow(clippy::unwrap_used, dead_code)] // each test program needs a part

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tempfile::TempDir;
use vhost_blk::record::format::{HEADER_LEN, Header, Kind, RECORD_LEN, Record};

pub const LIMIT: Duration = Duration::from_secs(30);
pub const VBENCH: &str = env!("CARGO_BIN_EXE_vbench");

pub fn until(what: &str, mut done: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !done() {
        assert!(begun.elapsed() < LIMIT, "{what} did not happen in {LIMIT:?}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Runs a program to its end, which must come.
pub fn run(command: &mut Command) -> Output {
    let child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let pid = Pid::from_raw(child.id() as i32);
    let (tell, hear) = std::sync::mpsc::channel::<()>();
    let waiter = std::thread::spawn(move || {
        // Whoever waits has an end, too.
        if hear.recv_timeout(LIMIT * 2) == Err(std::sync::mpsc::RecvTimeoutError::Timeout) {
            let _ = kill(pid, Signal::SIGKILL);
        }
    });
    let output = child.wait_with_output().unwrap();
    drop(tell);
    waiter.join().unwrap();
    output
}

pub fn vbench(args: &[&str]) -> Output {
    run(Command::new(VBENCH).args(args))
}

pub fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

pub fn succeed(output: &Output) -> String {
    assert!(output.status.success(), "{}{}", text(&output.stdout), text(&output.stderr));
    text(&output.stdout)
}

/// The daemon of the same build, killed when the test is over.
pub struct Daemon {
    child: Child,
    pub socket: PathBuf,
    out: PathBuf,
    log: PathBuf,
}

impl Daemon {
    pub fn start(dir: &Path, name: &str, args: &[&str]) -> Daemon {
        let program = Path::new(VBENCH).with_file_name("vhost-blk");
        assert!(program.exists(), "{} is not built; run cargo build first", program.display());
        let [socket, out, log] = ["socket", "out", "log"].map(|end| dir.join(format!("{name}.{end}")));
        let child = Command::new(program)
            .arg("--socket-path")
            .arg(&socket)
            .args(args)
            .stdout(fs::File::create(&out).unwrap())
            .stderr(fs::File::create(&log).unwrap())
            .spawn()
            .unwrap();
        let mut daemon = Daemon { child, socket, out, log };
        until("serving", || {
            assert!(
                daemon.child.try_wait().unwrap().is_none(),
                "{}",
                fs::read_to_string(&daemon.log).unwrap()
            );
            // Said when it listens.
            fs::read_to_string(&daemon.log).unwrap().contains("serving ")
        });
        daemon
    }

    pub fn socket(&self) -> &str {
        self.socket.to_str().unwrap()
    }

    pub fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.child.id() as i32), signal).unwrap();
    }

    /// The report of SIGUSR1.
    pub fn report(&self) -> String {
        let before = fs::read_to_string(&self.out).unwrap().len();
        self.signal(Signal::SIGUSR1);
        let mut said = String::new();
        until("a report", || {
            said = fs::read_to_string(&self.out).unwrap().split_off(before);
            said.ends_with("\n\n")
        });
        said
    }

    pub fn end(mut self, signal: Signal) {
        self.signal(signal);
        until("the end", || self.child.try_wait().unwrap().is_some());
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

pub fn capture(path: &Path) -> (Header, Vec<Record>) {
    let bytes = fs::read(path).unwrap();
    let (whole, rest) = bytes[HEADER_LEN..].as_chunks::<RECORD_LEN>();
    assert!(rest.is_empty(), "{} bytes behind the last record", rest.len());
    let records = whole.iter().map(|r| Record::from_bytes(r).unwrap()).collect();
    (Header::from_bytes(&bytes).unwrap(), records)
}

/// The requests of each queue, in the order of their times, and that nothing else is in the capture but its end.
pub type Requests = BTreeMap<u8, Vec<(Kind, u64, u32, u8)>>;

pub fn requests(path: &Path) -> Requests {
    let (_, mut records) = capture(path);
    let end = records.pop().unwrap();
    assert_eq!(end.kind, Kind::End);
    records.sort_by_key(|r| r.time);
    let mut all = Requests::new();
    for r in records {
        assert!(!matches!(r.kind, Kind::Lost | Kind::End), "{r:?}");
        all.entry(r.queue).or_default().push((r.kind, r.sector, r.len, r.status));
    }
    all
}

/// A number behind a word of the report's line `record`, or of the table's line `all`.
pub fn recorded(report: &str) -> u64 {
    let line = report.lines().find(|l| l.starts_with("record ")).unwrap();
    assert!(line.ends_with(" written, 0 lost"), "{line}");
    line.split_whitespace().rev().nth(3).unwrap().parse().unwrap()
}

pub fn completed(report: &str) -> u64 {
    let line = report.lines().find(|l| l.starts_with("all ")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

pub struct Scene {
    pub dir: TempDir,
}

impl Scene {
    pub fn new() -> Scene {
        Scene { dir: tempfile::tempdir().unwrap() }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn name(&self, name: &str) -> String {
        self.path(name).to_str().unwrap().to_owned()
    }

    /// A daemon that records to a file of its own name.
    pub fn recording(&self, name: &str, args: &[&str]) -> Daemon {
        let record = self.name(&format!("{name}.capture"));
        Daemon::start(self.dir.path(), name, &[&["--record", &record], args].concat())
    }

    /// Plays an iolog at full speed, one request at a time, on a recorded disk.
    pub fn played(&self, name: &str, iolog: &str, args: &[&str]) -> (Output, Requests) {
        let trace = self.path(&format!("{name}.iolog"));
        fs::write(&trace, iolog).unwrap();
        let daemon = self.recording(name, args);
        let trace = trace.to_str().unwrap();
        let output =
            vbench(&["replay", "--socket-path", daemon.socket(), "--speed", "max", "--iodepth", "1", trace]);
        daemon.end(Signal::SIGTERM);
        (output, requests(&self.path(&format!("{name}.capture"))))
    }
}

pub const IOLOG: &str = "fio version 2 iolog\nd add\nd open\nd read 0 4096\nd write 8192 512\nd sync 0 0\nd read 512 1536\n\
                     d write 65536 2097152\nd trim 4096 4096\nd datasync 0 0\nd trim 0 16777216\nd close\n";
