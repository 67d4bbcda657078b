//! Daemons by the hundred.

use std::fs::{self, File};
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use kickless_tests::daemon::Kind;
use kickless_tests::image::Image;
use kickless_tests::scene::Scene;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::front::{Front, QUEUES};

const LIMIT: Duration = Duration::from_secs(60);

/// A daemon on the socket that all of them have.
pub struct Daemon {
    child: Child,
    socket: PathBuf,
    log: PathBuf,
}

impl Daemon {
    pub fn start(scene: &Scene, image: &Image, args: &[&str]) -> Result<Daemon> {
        let program = Kind::VhostBlk.program().context("vhost-blk is not built: cargo build -p vhost-blk")?;
        Daemon::start_program(&program, scene, image, args, &[])
    }

    /// Starts `program` with variables of its own in its environment.
    pub fn start_program(
        program: &std::path::Path,
        scene: &Scene,
        image: &Image,
        args: &[&str],
        env: &[(&str, &str)],
    ) -> Result<Daemon> {
        let (socket, log) = (scene.path("disk.sock"), scene.path("daemon.log"));
        let child = Command::new("setpriv")
            .args(["--pdeathsig", "KILL", "--"])
            .arg(program)
            .arg(format!("--socket-path={}", socket.display()))
            .arg(format!("--blk-file={}", image.path().display()))
            .arg(format!("--num-queues={QUEUES}"))
            .args(args)
            .envs(env.iter().copied())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(File::create(&log)?)
            .spawn()
            .context("setpriv (package util-linux)")?;
        Ok(Daemon { child, socket, log })
    }

    /// Connects `front` as soon as there is somebody to connect to; false when the daemon was killed meanwhile.
    pub fn connect(&mut self, front: &mut Front) -> Result<bool> {
        let deadline = Instant::now() + LIMIT;
        loop {
            // Nobody but a killer ends it.
            match (front.connect(&self.socket), self.child.try_wait()?) {
                (Ok(()), _) => return Ok(true),
                (Err(_), Some(status)) if status.signal() == Some(Signal::SIGKILL as i32) => {
                    return Ok(false);
                }
                (Err(e), Some(status)) => bail!("the daemon has ended: {status}: {e:#}\n{}", self.log()),
                (Err(e), None) => ensure!(Instant::now() < deadline, "no session: {e:#}\n{}", self.log()),
            }
            std::thread::sleep(Duration::from_micros(300));
        }
    }

    /// Waits for the end, which must be by SIGKILL.
    pub fn expect_killed(&mut self) -> Result<()> {
        let status = self.child.wait()?;
        ensure!(status.signal() == Some(Signal::SIGKILL as i32), "{status}\n{}", self.log());
        ensure!(!self.log().contains("panicked"), "{}", self.log());
        Ok(())
    }

    pub fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Kills a daemon after a while. To be joined before the daemon is reaped.
pub struct Killer(JoinHandle<()>);

impl Killer {
    pub fn after(daemon: &Daemon, delay: Duration) -> Killer {
        let pid = Pid::from_raw(daemon.child.id() as i32);
        Killer(std::thread::spawn(move || {
            std::thread::sleep(delay);
            // One that has ended by itself is found out by whoever waits for it.
            let _ = kill(pid, Signal::SIGKILL);
        }))
    }

    pub fn join(self) {
        self.0.join().expect("the killer");
    }
}
