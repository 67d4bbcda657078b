//! Back ends to run `vbench` against: the real one, and one that goes wrong on purpose.
#![allow(dead_code)] // each test program uses its part

use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use poll_engine::device::{ConfigRefused, Device, QueueHandler};
use poll_engine::engine::queue::Queue;
use poll_engine::engine::reactor::Io;
use poll_engine::engine::{Engine, EngineConfig};
use poll_engine::ring::chain::ChainView;
use poll_engine::session::listen::Listener;
use poll_engine::session::serve::Export;
use poll_engine::session::server::Server;
use serde_json::Value;
use vhost_blk::device::F_FLUSH;
use vhost_blk::request::T_FLUSH;

/// For whatever is waited for.
pub const LIMIT: Duration = Duration::from_secs(60);

/// What a run of `vbench` was.
pub struct Outcome {
    pub status: ExitStatus,
    pub out: String,
    pub err: String,
}

impl Outcome {
    /// Its exit code.
    pub fn code(&self) -> i32 {
        self.status.code().unwrap_or(-1)
    }

    /// Its standard output as JSON.
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.out).unwrap_or_else(|e| panic!("{e}: {}\n{}", self.out, self.err))
    }

    /// Passes the outcome on if it was a success.
    #[track_caller]
    pub fn good(self) -> Outcome {
        assert_eq!(self.code(), 0, "{}\n{}", self.out, self.err);
        assert_eq!(self.err, "");
        self
    }

    /// Checks that it failed with one line that holds `what`.
    #[track_caller]
    pub fn bad(self, code: i32, what: &str) -> Outcome {
        assert_eq!(self.code(), code, "{}\n{}", self.out, self.err);
        assert_eq!(self.err.lines().count(), 1, "{}", self.err);
        assert!(self.err.contains(what), "{}", self.err);
        self
    }
}

/// A started `vbench`, killed when dropped.
pub struct Started(Option<Child>);

impl Started {
    pub fn new(args: &[&str]) -> Started {
        let mut command = Command::new(env!("CARGO_BIN_EXE_vbench"));
        Started(Some(command.args(args).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()))
    }

    /// Waits for its end.
    pub fn end(mut self) -> Outcome {
        let begun = Instant::now();
        while self.0.as_mut().unwrap().try_wait().unwrap().is_none() {
            assert!(begun.elapsed() < LIMIT, "vbench does not end");
            std::thread::sleep(Duration::from_millis(10));
        }
        let output = self.0.take().unwrap().wait_with_output().unwrap();
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
        Outcome { status: output.status, out: text(output.stdout), err: text(output.stderr) }
    }
}

impl Drop for Started {
    fn drop(&mut self) {
        if let Some(child) = &mut self.0 {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// Runs `vbench` to its end.
pub fn vbench(args: &[&str]) -> Outcome {
    Started::new(args).end()
}

/// Waits for a back end that was just started.
pub fn until_listening(socket: &Path) {
    let begun = Instant::now();
    while !std::fs::metadata(socket).is_ok_and(|m| m.file_type().is_socket()) {
        assert!(begun.elapsed() < LIMIT, "nobody listens on {}", socket.display());
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// A real daemon, killed when dropped.
pub struct Daemon {
    child: Child,
    pub socket: String,
    pub dir: tempfile::TempDir,
}

impl Daemon {
    pub fn start(args: &[&str]) -> Daemon {
        let program = Path::new(env!("CARGO_BIN_EXE_vbench")).with_file_name("vhost-blk");
        assert!(program.exists(), "vhost-blk is not built beside vbench: cargo build -p vhost-blk");
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("s");
        let mut command = Command::new(program);
        command.args(args).arg("--log=error").arg("--socket-path").arg(&socket);
        let child = command.stderr(Stdio::null()).spawn().unwrap();
        let daemon = Daemon { child, socket: socket.to_str().unwrap().to_owned(), dir };
        until_listening(&socket);
        daemon
    }

    /// A disk of memory.
    pub fn ram() -> Daemon {
        Daemon::start(&["--backend=ram:64M", "--num-queues=4"])
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// A job file.
    pub fn file(&self, name: &str, text: &str) -> String {
        let path = self.path(name);
        std::fs::write(&path, text).unwrap();
        path.to_str().unwrap().to_owned()
    }

    pub fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What goes wrong.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// Nothing.
    None,
    /// One bit of a read's data is another.
    Corrupt,
    /// Writes are answered and not done.
    Lose,
    /// Reads have an error status.
    Refuse,
    /// No answer to reads.
    Silent,
    /// No status is written.
    NoStatus,
}

/// A disk of 1 MiB that shows its fault at one offset only.
pub struct Faulty {
    fault: Fault,
    at: u64,
    bytes: Arc<Mutex<Vec<u8>>>,
    asked: Arc<Asked>,
}

/// What drivers asked of it.
#[derive(Default)]
struct Asked {
    features: AtomicU64,
    flushes: AtomicU64,
}

/// Keeps it running.
pub struct Serving {
    pub socket: String,
    _server: Server,
    pub dir: tempfile::TempDir,
    asked: Arc<Asked>,
}

impl Serving {
    /// The features of its last queue, and how many flushes there were since this was last asked.
    pub fn asked(&self) -> (u64, u64) {
        (self.asked.features.load(Ordering::Relaxed), self.asked.flushes.swap(0, Ordering::Relaxed))
    }
}

pub const DISK: usize = 1 << 20;

impl Faulty {
    pub fn serve(fault: Fault, at: u64) -> Serving {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("s");
        let engine = Arc::new(Engine::start(&EngineConfig::default()).unwrap());
        let device =
            Arc::new(Faulty { fault, at, bytes: Arc::new(Mutex::new(vec![0; DISK])), asked: Arc::default() });
        let asked = Arc::clone(&device.asked);
        let export = Export { name: "faulty".into(), device, stats: vec![Arc::default()], engine };
        let server = Server::start(export, Listener::bind(&socket).unwrap(), || {}).unwrap();
        Serving { socket: socket.to_str().unwrap().to_owned(), _server: server, dir, asked }
    }
}

impl Device for Faulty {
    fn features(&self) -> u64 {
        F_FLUSH
    }
    fn num_queues(&self) -> u16 {
        1
    }
    fn max_ring_size(&self) -> u16 {
        256
    }
    fn read_config(&self, offset: u32, into: &mut [u8]) {
        let sectors = (DISK as u64 / 512).to_le_bytes();
        for (i, byte) in into.iter_mut().enumerate() {
            *byte = sectors.get(offset as usize + i).copied().unwrap_or(0);
        }
    }
    fn write_config(&self, offset: u32, bytes: &[u8]) -> Result<(), ConfigRefused> {
        Err(ConfigRefused { offset, end: offset + bytes.len() as u32 })
    }
    fn start_queue(&self, _: u16, features: u64, _: u16) -> std::io::Result<Box<dyn QueueHandler>> {
        self.asked.features.store(features, Ordering::Relaxed);
        let (bytes, asked) = (Arc::clone(&self.bytes), Arc::clone(&self.asked));
        Ok(Box::new(Handler { fault: self.fault, at: self.at, bytes, asked }))
    }
    fn reset(&self) {}
}

struct Handler {
    fault: Fault,
    at: u64,
    bytes: Arc<Mutex<Vec<u8>>>,
    asked: Arc<Asked>,
}

impl Handler {
    /// Bytes written, or nothing for no answer.
    fn serve(&self, chain: &ChainView<'_>) -> Option<u32> {
        let mut header = [0; 16];
        chain.readable(0, 16).read(&mut header);
        if u32::from(header[0]) == T_FLUSH {
            self.asked.flushes.fetch_add(1, Ordering::Relaxed);
        }
        let offset = u64::from_le_bytes(header[8..].try_into().unwrap()) * 512;
        let (write, at) = (header[0] == 1, offset as usize);
        let is = |fault| self.fault == fault && offset == self.at;
        let mut disk = self.bytes.lock().unwrap();
        let mut status = 0;
        let len = if write {
            let len = chain.readable_len() - 16;
            let mut data = vec![0; len as usize];
            chain.readable(16, len).read(&mut data);
            if !is(Fault::Lose) {
                disk[at..at + data.len()].copy_from_slice(&data);
            }
            0
        } else {
            let len = chain.writable_len() - 1;
            let mut data = disk[at..at + len as usize].to_vec();
            if is(Fault::Corrupt) {
                data[100] ^= 4;
            }
            if is(Fault::Refuse) {
                status = 1;
            }
            if is(Fault::Silent) {
                return None;
            }
            chain.writable(0, len).write(&data);
            len
        };
        if !is(Fault::NoStatus) {
            chain.writable(len, 1).write(&[status]);
        }
        Some(len + 1)
    }
}

impl QueueHandler for Handler {
    fn attach(&mut self, _: &mut Io<'_>) {}
    fn poll(&mut self, queue: &mut Queue, _: &mut Io<'_>) -> usize {
        let ready = queue.ready();
        for _ in 0..ready {
            let Some(request) = queue.take() else { break };
            let written = self.serve(&queue.chain());
            // Its session cannot end before every request is answered; this process does.
            let Some(written) = written else {
                std::mem::forget(request);
                continue;
            };
            queue.complete(request, written);
        }
        ready.into()
    }
    fn complete(&mut self, _: &mut Queue, _: &mut Io<'_>, _: u32, _: i32) {}
    fn detach(&mut self, _: &mut Io<'_>) {}
}
