//! The back end under test, as a process.

use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::Signal;

use crate::image::Image;
use crate::process::{self, Process};
use crate::scene::Scene;
use crate::stats::Stats;
use crate::wait;

/// How long the daemon may take to come up, to answer a signal and to go away.
const LIMIT: Duration = Duration::from_secs(15);

/// Which program serves the disks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// The daemon of this workspace.
    VhostBlk,
    /// QEMU's `qemu-storage-daemon`: a second opinion when a test fails (`KICKLESS_BACKEND=qsd`).
    Qsd,
}

impl Kind {
    /// What the environment asks for.
    pub fn from_env() -> Self {
        match std::env::var("KICKLESS_BACKEND").as_deref() {
            Ok("qsd") => Self::Qsd,
            _ => Self::VhostBlk,
        }
    }

    /// The program, if it is there.
    pub fn program(self) -> Option<PathBuf> {
        if self == Self::Qsd {
            return process::find_program("qemu-storage-daemon");
        }
        process::built("vhost-blk")
    }
}

/// What is behind a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Storage {
    /// The image.
    File,
    /// Nothing: requests succeed and that is all (`vhost-blk` only). As large as the image.
    Null,
    /// Memory of the daemon (`vhost-blk` only). As large as the image.
    Ram,
}

/// How to start a back end.
#[derive(Debug, Clone)]
pub struct Options {
    kind: Kind,
    storage: Storage,
    poll: &'static str,
    read_only: bool,
    block_size: u32,
    direct: bool,
    args: Vec<String>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            kind: Kind::from_env(),
            storage: Storage::File,
            poll: "adaptive",
            read_only: false,
            block_size: 512,
            direct: true,
            args: Vec::new(),
        }
    }
}

impl Options {
    /// Sets the polling mode.
    #[must_use]
    pub fn poll(mut self, mode: &'static str) -> Self {
        self.poll = mode;
        self
    }

    /// Sets what is behind the disk.
    #[must_use]
    pub fn storage(mut self, storage: Storage) -> Self {
        self.storage = storage;
        self
    }

    /// Makes the disk read-only.
    #[must_use]
    pub fn read_only(mut self) -> Self {
        self.read_only = true;
        self
    }

    /// Sets the logical block size.
    #[must_use]
    pub fn block_size(mut self, bytes: u32) -> Self {
        self.block_size = bytes;
        self
    }

    /// Goes through the host's page cache instead of using direct I/O.
    #[must_use]
    pub fn buffered(mut self) -> Self {
        self.direct = false;
        self
    }

    /// Adds arguments of `vhost-blk` that have no counterpart in other back ends.
    #[must_use]
    pub fn args(mut self, args: &[&str]) -> Self {
        self.args.extend(args.iter().map(|&arg| arg.to_owned()));
        self
    }

    /// Starts the back end with four queues and waits until it can be connected to. Its socket is `name.sock`.
    pub fn spawn(&self, scene: &Scene, name: &str, image: &Image) -> Result<Daemon> {
        let socket = scene.path(&format!("{name}.sock"));
        let args = match self.kind {
            Kind::VhostBlk => {
                let mut args = vec![format!("--socket-path={}", socket.display())];
                args.push(format!("--{}", self.disk(image)?));
                args.extend(self.vhost_blk_args(&[image]));
                args
            }
            Kind::Qsd => self.qsd_args(&socket, image.path()),
        };
        self.start(scene, name, vec![socket], &args)
    }

    /// Starts `vhost-blk` with a disk for each image, each at a socket of its own.
    pub fn spawn_many(&self, scene: &Scene, name: &str, images: &[&Image]) -> Result<Daemon> {
        ensure!(self.kind == Kind::VhostBlk, "several disks in one process are an option of vhost-blk");
        let sockets: Vec<PathBuf> =
            (0..images.len()).map(|i| scene.path(&format!("{name}-{i}.sock"))).collect();
        let mut args = Vec::new();
        for (socket, image) in sockets.iter().zip(images) {
            args.push(format!("--disk=socket-path={},{}", socket.display(), self.disk(image)?));
        }
        args.extend(self.vhost_blk_args(images));
        self.start(scene, name, sockets, &args)
    }

    fn start(&self, scene: &Scene, name: &str, sockets: Vec<PathBuf>, args: &[String]) -> Result<Daemon> {
        for socket in &sockets {
            let _ = std::fs::remove_file(socket);
        }
        let program = self.kind.program().context("no back end to test")?;
        let mut process = Process::spawn(scene, name, &program, args)?;
        wait::until("the daemon's socket", LIMIT, || {
            if let Some(status) = process.poll_exit()? {
                bail!("the daemon has ended at once ({status}): {}", process.stderr_tail());
            }
            let there = |path: &PathBuf| std::fs::metadata(path).is_ok_and(|m| m.file_type().is_socket());
            Ok(sockets.iter().all(there).then_some(()))
        })?;
        Ok(Daemon { process, sockets })
    }

    /// What is behind a disk, as an option.
    fn disk(&self, image: &Image) -> Result<String> {
        let size = || std::fs::metadata(image.path()).map(|meta| meta.len());
        Ok(match self.storage {
            Storage::File => format!("blk-file={}", image.path().display()),
            Storage::Null => format!("backend=null:{}", size()?),
            Storage::Ram => format!("backend=ram:{}", size()?),
        })
    }

    fn vhost_blk_args(&self, images: &[&Image]) -> Vec<String> {
        // Not every file system that scratch directories are on takes direct I/O.
        let direct = self.direct && images.iter().all(|image| image.takes_direct_io());
        let mut args = vec![
            format!("--direct={}", if direct { "on" } else { "off" }),
            "--num-queues=4".to_owned(),
            "--queue-size=256".to_owned(),
            format!("--poll={}", self.poll),
        ];
        if self.read_only {
            args.push("--read-only".to_owned());
        }
        if self.block_size != 512 {
            args.push(format!("--block-size={}", self.block_size));
        }
        args.extend(self.args.iter().cloned());
        args
    }

    fn qsd_args(&self, socket: &Path, image: &Path) -> Vec<String> {
        let (writable, read_only) = if self.read_only { ("off", "on") } else { ("on", "off") };
        vec![
            "--blockdev".to_owned(),
            format!(
                "driver=file,node-name=f,filename={},cache.direct=off,discard=unmap,read-only={read_only}",
                image.display()
            ),
            "--export".to_owned(),
            format!(
                "type=vhost-user-blk,id=e,node-name=f,addr.type=unix,addr.path={},writable={writable},\
                 num-queues=4,logical-block-size={}",
                socket.display(),
                self.block_size
            ),
        ]
    }
}

/// A running back end; killed on drop.
#[derive(Debug)]
pub struct Daemon {
    process: Process,
    sockets: Vec<PathBuf>,
}

impl Daemon {
    /// The socket front ends connect to; the first, if there are several.
    pub fn socket(&self) -> &Path {
        &self.sockets[0]
    }

    /// The sockets, one a disk.
    pub fn sockets(&self) -> &[PathBuf] {
        &self.sockets
    }

    /// Asks for the statistics: `SIGUSR1`, upon which the daemon prints lines that end with an empty one.
    pub fn stats(&mut self) -> Result<Stats> {
        let before = self.process.stdout().len();
        self.process.signal(Signal::SIGUSR1)?;
        wait::until("the daemon's statistics", LIMIT, || {
            self.expect_alive()?;
            let text = self.process.stdout();
            Ok(text
                .get(before..)
                .and_then(|new| new.split_once("\n\n"))
                .map(|(report, _)| Stats::new(report)))
        })
    }

    /// Has the daemon look at the size of its image again: `SIGHUP`.
    pub fn sighup(&self) -> Result<()> {
        self.process.signal(Signal::SIGHUP)
    }

    /// Fails if the daemon has ended.
    pub fn expect_alive(&mut self) -> Result<()> {
        match self.process.poll_exit()? {
            Some(status) => bail!("the daemon has ended ({status}): {}", self.process.stderr_tail()),
            None => Ok(()),
        }
    }

    /// Sends `SIGTERM` and expects the daemon to end well, and to have had no panic on the way.
    pub fn terminate(mut self) -> Result<()> {
        self.expect_alive()?;
        self.process.signal(Signal::SIGTERM)?;
        let status = self.process.wait_exit(LIMIT)?;
        ensure!(status.success(), "the daemon: {status}\n{}", self.process.stderr_tail());
        let said = self.process.stderr();
        ensure!(!said.contains("panicked"), "a thread of the daemon has panicked:\n{said}");
        Ok(())
    }

    /// Kills the daemon with `SIGKILL`.
    pub fn kill9(mut self) -> Result<()> {
        self.process.kill9()
    }
}
