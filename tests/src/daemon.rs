//! The back end under test, as a process.

use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::Signal;
use nix::unistd::Pid;

use crate::image::Image;
use crate::process::{self, Process};
use crate::scene::Scene;
use crate::stats::Stats;
use crate::wait;

/// How long the daemon may take to come up, to answer a signal and to go away. This and the other limits of the harness
/// are there to end what hangs: where storage or processors are busy with others, all takes many times what it usually
/// does, and is right all the same.
const LIMIT: Duration = Duration::from_secs(75);

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
#[derive(Debug, Clone, Copy)]
pub enum Medium<'a> {
    /// An image.
    Image(&'a Image),
    /// An image that is no file, by its name.
    Named(&'a str),
    /// Memory of this many bytes.
    Ram(u64),
    /// Nothing, said to be of this many bytes.
    Null(u64),
}

impl<'a> From<&'a Image> for Medium<'a> {
    fn from(image: &'a Image) -> Self {
        Self::Image(image)
    }
}

impl Medium<'_> {
    /// As `vhost-blk` wants it, on its command line and in the list of a further disk.
    fn vhost_blk_key(self) -> String {
        match self {
            Self::Image(image) => format!("blk-file={}", image.path().display()),
            Self::Named(name) => format!("blk-file={name}"),
            Self::Ram(bytes) => format!("backend=ram:{bytes}"),
            Self::Null(bytes) => format!("backend=null:{bytes}"),
        }
    }

    fn takes_direct_io(self) -> bool {
        match self {
            Self::Image(image) => image.takes_direct_io(),
            Self::Named(_) | Self::Ram(_) | Self::Null(_) => true,
        }
    }
}

/// How to start a back end.
#[derive(Debug, Clone)]
pub struct Options {
    kind: Kind,
    poll: &'static str,
    read_only: bool,
    block_size: u32,
    queue_size: u16,
    direct: bool,
    control: bool,
    args: Vec<String>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            kind: Kind::from_env(),
            poll: "adaptive",
            read_only: false,
            block_size: 512,
            queue_size: 256,
            direct: true,
            control: false,
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

    /// Sets the size of the largest ring.
    #[must_use]
    pub fn queue_size(mut self, descriptors: u16) -> Self {
        self.queue_size = descriptors;
        self
    }

    /// Goes through the host's page cache instead of using direct I/O.
    #[must_use]
    pub fn buffered(mut self) -> Self {
        self.direct = false;
        self
    }

    /// Has others able to take over from it: [`Daemon::upgrade`].
    #[must_use]
    pub fn upgradable(mut self) -> Self {
        self.control = true;
        self
    }

    /// Adds arguments of `vhost-blk` that have no counterpart in other back ends.
    #[must_use]
    pub fn args(mut self, args: &[&str]) -> Self {
        self.args.extend(args.iter().map(|&arg| arg.to_owned()));
        self
    }

    /// Starts the back end with one disk of four queues and waits until it can be connected to. Its socket is
    /// `name.sock`.
    pub fn spawn<'a>(&self, scene: &Scene, name: &str, disk: impl Into<Medium<'a>> + Copy) -> Result<Daemon> {
        self.spawn_many(scene, name, &[disk])
    }

    /// Starts one back end with several disks of four queues each, on the sockets `name.sock`, `name-1.sock`, ...
    pub fn spawn_many<'a>(
        &self,
        scene: &Scene,
        name: &str,
        disks: &[impl Into<Medium<'a>> + Copy],
    ) -> Result<Daemon> {
        let mut served = Vec::new();
        for (i, &disk) in disks.iter().enumerate() {
            let socket =
                scene.path(&if i == 0 { format!("{name}.sock") } else { format!("{name}-{i}.sock") });
            let _ = std::fs::remove_file(&socket);
            served.push((socket, disk.into()));
        }
        ensure!(!served.is_empty(), "a back end without a disk");
        let program = self.kind.program().context("no back end to test")?;
        let mut args = match self.kind {
            Kind::VhostBlk => self.vhost_blk_args(&served),
            Kind::Qsd => self.qsd_args(&served)?,
        };
        let control = self.control.then(|| scene.path(&format!("{name}.control")));
        args.extend(control.iter().map(|path| format!("--control={}", path.display())));
        let sockets = served.into_iter().map(|(socket, _)| socket).collect();
        Daemon::start(scene, name, program, args, sockets, control)
    }

    fn vhost_blk_args(&self, disks: &[(PathBuf, Medium<'_>)]) -> Vec<String> {
        // Not every file system that scratch directories are on takes direct I/O.
        let direct = self.direct && disks.iter().all(|(_, disk)| disk.takes_direct_io());
        let mut args = vec![
            format!("--direct={}", if direct { "on" } else { "off" }),
            "--num-queues=4".to_owned(),
            format!("--queue-size={}", self.queue_size),
            format!("--poll={}", self.poll),
        ];
        for (i, (socket, disk)) in disks.iter().enumerate() {
            let (socket, disk) = (socket.display(), disk.vhost_blk_key());
            if i == 0 {
                args.extend([format!("--socket-path={socket}"), format!("--{disk}")]);
            } else {
                args.push(format!("--disk=socket-path={socket},{disk}"));
            }
        }
        if self.read_only {
            args.push("--read-only".to_owned());
        }
        if self.block_size != 512 {
            args.push(format!("--block-size={}", self.block_size));
        }
        args.extend(self.args.iter().cloned());
        args
    }

    fn qsd_args(&self, disks: &[(PathBuf, Medium<'_>)]) -> Result<Vec<String>> {
        let (writable, read_only) = if self.read_only { ("off", "on") } else { ("on", "off") };
        let mut args = Vec::new();
        for (i, (socket, disk)) in disks.iter().enumerate() {
            let node = match disk {
                Medium::Image(image) => format!(
                    "driver=file,node-name=f{i},filename={},cache.direct=off,discard=unmap,read-only={read_only}",
                    image.path().display()
                ),
                Medium::Null(bytes) => format!("driver=null-co,node-name=f{i},size={bytes}"),
                Medium::Ram(_) => bail!("qemu-storage-daemon has no disks of memory"),
                Medium::Named(name) => bail!("{name} is for vhost-blk only"),
            };
            let export = format!(
                "type=vhost-user-blk,id=e{i},node-name=f{i},addr.type=unix,addr.path={},writable={writable},\
                 num-queues=4,logical-block-size={}",
                socket.display(),
                self.block_size
            );
            args.extend(["--blockdev".to_owned(), node, "--export".to_owned(), export]);
        }
        Ok(args)
    }
}

/// A running back end; killed on drop.
#[derive(Debug)]
pub struct Daemon {
    process: Process,
    sockets: Vec<PathBuf>,
    control: Option<PathBuf>,
    program: PathBuf,
    args: Vec<String>,
}

impl Daemon {
    /// Starts a program that is going to listen on these sockets, and waits until it does.
    pub(crate) fn start(
        scene: &Scene,
        name: &str,
        program: PathBuf,
        args: Vec<String>,
        sockets: Vec<PathBuf>,
        control: Option<PathBuf>,
    ) -> Result<Daemon> {
        let mut process = Process::spawn(scene, name, &program, &args)?;
        // The control socket is there before anybody is heard on it.
        let all: Vec<&PathBuf> = sockets.iter().chain(&control).collect();
        wait::until("the daemon's sockets", LIMIT, || {
            if let Some(status) = process.poll_exit()? {
                bail!("the daemon has ended at once ({status}): {}", process.stderr_tail());
            }
            let there =
                |socket: &&PathBuf| std::fs::metadata(socket).is_ok_and(|meta| meta.file_type().is_socket());
            Ok(all.iter().all(there).then_some(()))
        })?;
        Ok(Daemon { process, sockets, control, program, args })
    }

    /// The process id.
    pub fn pid(&self) -> Pid {
        self.process.pid()
    }

    /// The socket front ends connect to, that of the first disk or port.
    pub fn socket(&self) -> &Path {
        &self.sockets[0]
    }

    /// The sockets of all disks or ports.
    pub fn sockets(&self) -> &[PathBuf] {
        &self.sockets
    }

    /// Asks for the statistics: `SIGUSR1`, upon which the daemon prints lines for each disk,
    /// and an empty one after the last.
    pub fn stats(&mut self) -> Result<Stats> {
        self.stats_within(LIMIT)
    }

    fn stats_within(&mut self, limit: Duration) -> Result<Stats> {
        let before = self.process.stdout().len();
        self.process.signal(Signal::SIGUSR1)?;
        wait::until("the daemon's statistics", limit, || {
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

    /// How often the daemon has said this.
    pub fn times_said(&self, what: &str) -> usize {
        self.process.stderr().matches(what).count()
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

    /// Has another daemon with the same options, or these in their place, take over from this one while guests run. This one must
    /// leave in good order; the other one is in its place then.
    pub fn upgrade(&mut self, scene: &Scene, further: &[&str]) -> Result<()> {
        let control = self.control.as_ref().context("not one to take over from")?;
        let mut args = self.args.clone();
        let option = |arg: &str| arg.split_once('=').map(|(name, _)| name.to_owned());
        args.retain(|arg| option(arg).is_none() || !further.iter().any(|new| option(new) == option(arg)));
        args.extend(further.iter().map(|&arg| arg.to_owned()));
        args.push(format!("--takeover={}", control.display()));
        let next = Process::spawn(scene, "upgraded", &self.program, &args)?;
        let mut old = std::mem::replace(&mut self.process, next);
        let status = old.wait_exit(LIMIT).with_context(|| self.process.stderr_tail())?;
        let said = old.stderr();
        ensure!(
            status.success() && said.contains("handed over") && !said.contains("panicked"),
            "the old daemon: {status}\n{said}\nthe new one:\n{}",
            self.process.stderr_tail()
        );
        // It is heard on the control socket only when it is in place.
        let beside = control.with_extension("control.new");
        wait::until("the control socket", LIMIT, || Ok((!beside.exists()).then_some(())))?;
        self.expect_alive()
    }

    /// Kills the daemon with `SIGKILL` and starts it again, at the same sockets.
    pub fn kill_and_restart(&mut self, scene: &Scene) -> Result<()> {
        self.process.kill9()?;
        self.sockets.iter().try_for_each(std::fs::remove_file)?;
        let (program, args) = (self.program.clone(), self.args.clone());
        *self = Daemon::start(scene, "restarted", program, args, self.sockets.clone(), self.control.clone())?;
        Ok(())
    }

    /// Kills the daemon with `SIGKILL`.
    pub fn kill9(mut self) -> Result<()> {
        self.process.kill9()
    }
}

/// One that has not been ended in any way is there because something has failed: what it has counted goes into its log,
/// which the test's message ends with.
impl Drop for Daemon {
    fn drop(&mut self) {
        if matches!(self.process.poll_exit(), Ok(None)) {
            let _ = self.stats_within(Duration::from_secs(1));
        }
    }
}
