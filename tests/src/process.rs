//! Child processes that are never left behind.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::scene::{Scene, tail};
use crate::wait;

/// A child process with its output in files of the [`Scene`]; killed on drop, and by the kernel should the test
/// itself be killed.
#[derive(Debug)]
pub struct Process {
    name: String,
    child: Child,
    stdout: PathBuf,
    stderr: PathBuf,
    status: Option<ExitStatus>,
}

impl Process {
    /// Starts `program`; standard error goes to `name.log`, standard output to `name-out.log`.
    pub fn spawn(scene: &Scene, name: &str, program: &Path, args: &[String]) -> Result<Self> {
        let stdout = scene.fresh_log(&format!("{name}-out"));
        let stderr = scene.fresh_log(name);
        let child = Command::new("setpriv")
            .args(["--pdeathsig", "KILL", "--"])
            .arg(program)
            .args(args)
            .stdin(Stdio::null())
            .stdout(File::create(&stdout)?)
            .stderr(File::create(&stderr)?)
            .spawn()
            .context("setpriv (package util-linux)")?;
        Ok(Self { name: name.to_owned(), child, stdout, stderr, status: None })
    }

    /// The process id.
    pub fn pid(&self) -> Pid {
        Pid::from_raw(self.child.id() as i32)
    }

    /// Sends a signal.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        kill(self.pid(), signal).with_context(|| format!("{signal} to {}", self.name))
    }

    /// The exit status, if the process has ended.
    pub fn poll_exit(&mut self) -> Result<Option<ExitStatus>> {
        if self.status.is_none() {
            self.status = self.child.try_wait()?;
        }
        Ok(self.status)
    }

    /// Waits for the end of the process.
    pub fn wait_exit(&mut self, limit: Duration) -> Result<ExitStatus> {
        let what = format!("end of {}", self.name);
        wait::until(&what, limit, || self.poll_exit())
    }

    /// Kills the process with `SIGKILL` and reaps it.
    pub fn kill9(&mut self) -> Result<()> {
        if self.poll_exit()?.is_none() {
            self.child.kill()?;
            self.status = Some(self.child.wait()?);
        }
        Ok(())
    }

    /// All of standard output so far.
    pub fn stdout(&self) -> String {
        read_lossy(&self.stdout)
    }

    /// All of standard error so far.
    pub fn stderr(&self) -> String {
        read_lossy(&self.stderr)
    }

    /// The end of standard error, for messages.
    pub fn stderr_tail(&self) -> String {
        tail(&self.stderr, 12)
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.kill9();
    }
}

fn read_lossy(path: &Path) -> String {
    String::from_utf8_lossy(&fs::read(path).unwrap_or_default()).into_owned()
}

/// Runs a host command to its end and returns its exit code and its output, both streams together.
pub fn run(program: &str, args: &[&str]) -> Result<(i32, String)> {
    let output = Command::new("timeout").arg("60").arg(program).args(args).output().context("timeout")?;
    let mut text = String::from_utf8_lossy(&output.stdout).into_owned();
    text.push_str(&String::from_utf8_lossy(&output.stderr));
    Ok((output.status.code().unwrap_or(-1), text))
}

/// A program of this workspace, if it is built: in `KICKLESS_BIN_DIR`, or else where cargo has built the one that asks.
pub fn built(name: &str) -> Option<PathBuf> {
    let dir = elsewhere().or_else(beside)?;
    Some(dir.join(name)).filter(|path| path.is_file())
}

/// As [`built`], of a program that is always built with optimisation.
pub fn optimised(name: &str) -> Option<PathBuf> {
    let dir = elsewhere().or_else(|| Some(beside()?.parent()?.join("release")))?;
    Some(dir.join(name)).filter(|path| path.is_file())
}

/// Copies a program to where it is to be run from. By another process: what this one has open for writing, a child that
/// another thread starts meanwhile has as well, and nobody may run it for so long.
pub fn copy(program: &Path, to: &Path) -> Result<()> {
    let status = Command::new("cp").arg(program).arg(to).status().context("cp")?;
    ensure!(status.success(), "cp {} {}: {status}", program.display(), to.display());
    Ok(())
}

fn elsewhere() -> Option<PathBuf> {
    std::env::var_os("KICKLESS_BIN_DIR").map(PathBuf::from)
}

/// Where cargo puts the programs of the profile that this one is built with.
fn beside() -> Option<PathBuf> {
    let exe = std::env::current_exe().ok()?;
    let dir = exe.parent()?;
    // Tests are in a directory of their own.
    Some(if dir.ends_with("deps") { dir.parent()?.to_owned() } else { dir.to_owned() })
}

/// Why the programs have no fault points: they are in debug builds only.
pub fn no_fault_points() -> Option<String> {
    let are_there = cfg!(debug_assertions) && elsewhere().is_none();
    (!are_there)
        .then(|| "fault points are in debug builds: run without --release and KICKLESS_BIN_DIR".to_owned())
}

/// Looks a program up in `PATH` and the system's administration directories.
pub fn find_program(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(["/usr/sbin", "/sbin"].map(PathBuf::from))
        .map(|dir| dir.join(name))
        .find(|candidate| candidate.is_file())
}
