//! Back ends as processes: started afresh, pinned, and gone without a trace.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use nix::sched::{CpuSet, sched_setaffinity};
use nix::unistd::Pid;
use tempfile::TempDir;

use super::matrix::Backend;

/// What stands for braces in commands.
#[derive(Clone, Debug)]
pub struct Places {
    /// `{bin}`: where this program and its siblings are.
    pub bin: PathBuf,
    /// `{cpu}`: CPUs of the back end as a list, and the same to pin it to.
    pub cpus: (String, Vec<usize>),
    /// `{image}`.
    pub image: Option<PathBuf>,
    /// `{spdk}`.
    pub spdk: Option<PathBuf>,
}

/// Whether a back end can be started.
#[derive(Debug, PartialEq, Eq)]
pub enum Found {
    /// It can.
    Yes,
    /// Its program is looked up in PATH and not there: a peer that is not installed.
    NotInstalled(String),
    /// Its program has a path and is not there: not built.
    Missing(String),
}

impl Places {
    fn words(&self, command: &str, [socket, socket2]: [&Path; 2]) -> Result<Vec<String>> {
        // Split first, so that a path with spaces stays one word.
        let words = shlex::split(command).context("a quote that is not closed")?;
        let image = self.image.as_deref().unwrap_or(Path::new(""));
        let spdk = self.spdk.as_deref().unwrap_or(Path::new(""));
        let fill = |word: String| {
            word.replace("{socket}", &socket.display().to_string())
                .replace("{socket2}", &socket2.display().to_string())
                .replace("{bin}", &self.bin.display().to_string())
                .replace("{dir}", &socket.parent().unwrap_or(Path::new("")).display().to_string())
                .replace("{image}", &image.display().to_string())
                .replace("{spdk}", &spdk.display().to_string())
                .replace("{cpu}", &self.cpus.0)
        };
        Ok(words.into_iter().map(fill).collect())
    }

    /// Looks for a back end's program, and for the one that `taskset` or the like would start.
    pub fn find(&self, backend: &Backend) -> Result<Found> {
        let Some(command) = &backend.command else {
            let socket = backend.socket.as_deref().unwrap_or(Path::new(""));
            let missing = || Found::Missing(format!("there is no socket {}", socket.display()));
            return Ok(if socket.exists() { Found::Yes } else { missing() });
        };
        if command.contains("{spdk}") {
            match &self.spdk {
                None => {
                    return Ok(Found::NotInstalled("give --spdk PROGRAM, the path of SPDK's vhost".into()));
                }
                Some(path) if !path.is_file() => {
                    return Ok(Found::Missing(format!("--spdk {} is no file", path.display())));
                }
                Some(_) => {}
            }
        }
        let words = self.words(command, [Path::new("socket"), Path::new("socket2")])?;
        let program = words.first().context("an empty command")?;
        // `taskset -c CPU PROGRAM` is found missing only when it runs, too late for a clear line.
        let wrapped = (program == "taskset").then(|| words.get(3)).flatten();
        for program in [Some(program), wrapped].into_iter().flatten() {
            if program.contains('/') {
                if !Path::new(program).exists() {
                    return Ok(Found::Missing(format!(
                        "{program} does not exist; if it is of this workspace: cargo build -p vbench -p vhost-blk"
                    )));
                }
            } else if !in_path(program) {
                return Ok(Found::NotInstalled(format!("{program} is not installed")));
            }
        }
        Ok(Found::Yes)
    }
}

fn in_path(program: &str) -> bool {
    std::env::var_os("PATH")
        .is_some_and(|path| std::env::split_paths(&path).any(|dir| dir.join(program).is_file()))
}

/// A started back end, killed when dropped, with a directory of its own.
#[derive(Debug)]
pub struct Started {
    child: Option<Child>,
    sockets: Vec<PathBuf>,
    dir: Option<TempDir>,
}

impl Started {
    /// Starts it and waits until it listens. `interrupted` gives up.
    pub fn new(backend: &Backend, places: &Places, interrupted: &AtomicBool) -> Result<Started> {
        let Some(command) = &backend.command else {
            let sockets = backend.socket.iter().chain(&backend.socket2).cloned().collect();
            return Ok(Started { child: None, sockets, dir: None });
        };
        let two = command.contains("{socket2}");
        let dir = tempfile::Builder::new().prefix("vbench-").tempdir()?;
        let mut sockets = vec![dir.path().join("socket"), dir.path().join("socket2")];
        let words = places.words(command, [&sockets[0], &sockets[1]])?;
        sockets.truncate(1 + usize::from(two));
        let (program, args) = words.split_first().context("an empty command")?;
        let mut command = Command::new(program);
        command.args(args).envs(&backend.env).stdin(Stdio::null()).stdout(Stdio::null());
        command.stderr(File::create(dir.path().join("stderr"))?);
        let child = on_cpus(&places.cpus.1, move || command.spawn())??;
        let mut started = Started { child: Some(child), sockets, dir: Some(dir) };
        let begun = Instant::now();
        while !started.sockets.iter().all(|s| s.exists()) {
            if let Some(how) = started.ended() {
                bail!("did not start: {how}");
            }
            if begun.elapsed() > Duration::from_secs(10) {
                bail!("does not listen on its socket after 10 s{}", started.last_words());
            }
            if interrupted.load(Ordering::Relaxed) {
                bail!("interrupted");
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        // Between binding and listening, or longer.
        let settle = backend.settle.and_then(|s| Duration::try_from_secs_f64(s).ok());
        std::thread::sleep(settle.unwrap_or(Duration::from_millis(100)));
        Ok(started)
    }

    /// Where it listens.
    pub fn sockets(&self) -> &[PathBuf] {
        &self.sockets
    }

    /// Its process, if it was started here.
    pub fn pid(&self) -> Option<u32> {
        self.child.as_ref().map(Child::id)
    }

    /// How it ended, if it has.
    pub fn ended(&mut self) -> Option<String> {
        let status = self.child.as_mut()?.try_wait().ok()??;
        Some(format!("{status}{}", self.last_words()))
    }

    /// The line of its standard error that says most: the first that calls itself an error, or the last.
    fn last_words(&self) -> String {
        let Some(dir) = &self.dir else { return String::new() };
        let text = std::fs::read(dir.path().join("stderr")).unwrap_or_default();
        let text = String::from_utf8_lossy(&text);
        let error = text.lines().find(|l| l.to_lowercase().contains("error"));
        let last = || text.lines().rev().find(|l| !l.trim().is_empty());
        error.or_else(last).map_or(String::new(), |l| format!(": {}", l.trim()))
    }
}

impl Drop for Started {
    fn drop(&mut self) {
        let Some(child) = &mut self.child else { return };
        // It may have ended by itself.
        let _ = child.kill();
        let _ = child.wait();
        // The kernel lets go of an io_uring's files, and their locks, a moment later.
        std::thread::sleep(Duration::from_millis(200));
    }
}

/// Does something in a thread that runs on these CPUs only, as do the threads and processes it starts.
pub fn on_cpus<T: Send + 'static>(cpus: &[usize], what: impl FnOnce() -> T + Send + 'static) -> Result<T> {
    spawn_on(cpus, what)?.join().map_err(|_| anyhow!("a thread panicked"))?
}

/// The same without waiting for it.
pub fn spawn_on<T: Send + 'static>(
    cpus: &[usize],
    what: impl FnOnce() -> T + Send + 'static,
) -> Result<std::thread::JoinHandle<Result<T>>> {
    let mut set = CpuSet::new();
    for cpu in cpus {
        set.set(*cpu)?;
    }
    let list = cpus.iter().map(ToString::to_string).collect::<Vec<_>>().join(",");
    Ok(std::thread::spawn(move || {
        sched_setaffinity(Pid::from_raw(0), &set).with_context(|| format!("cannot run on CPU {list}"))?;
        Ok(what())
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn places() -> Places {
        Places { bin: "/a b".into(), cpus: ("0".into(), vec![0]), image: None, spdk: None }
    }

    fn command(command: &str) -> Backend {
        Backend { name: "x".into(), command: Some(command.into()), ..Backend::default() }
    }

    #[test]
    fn spdk_runs_where_it_is_said_to_be() {
        let backend = Backend { command: Some("sh -c 'exec {spdk} -S {dir}'".into()), ..Backend::default() };
        let found = places().find(&backend).unwrap();
        assert!(matches!(found, Found::NotInstalled(why) if why.contains("--spdk PROGRAM")));
        let at = |path: &str| Places { spdk: Some(path.into()), ..places() };
        assert!(matches!(at("/nonexistent").find(&backend).unwrap(), Found::Missing(_)));
        assert_eq!(at("/bin/sh").find(&backend).unwrap(), Found::Yes);
        let sockets = [Path::new("/run/x/socket"), Path::new("/run/x/socket2")];
        let words = at("/bin/sh").words(backend.command.as_ref().unwrap(), sockets).unwrap();
        assert_eq!(words[2], "exec /bin/sh -S /run/x");
    }

    #[test]
    fn words_are_those_of_a_shell_and_paths_stay_whole() {
        let words = places().words(
            "{bin}/x --cpus {cpu} 'one word' s={socket} {socket2}",
            [Path::new("/s t"), Path::new("/u")],
        );
        assert_eq!(words.unwrap(), ["/a b/x", "--cpus", "0", "one word", "s=/s t", "/u"]);
    }

    #[test]
    fn not_installed_and_not_built_are_told_apart() {
        let found = |c: &str| places().find(&command(c)).unwrap();
        assert_eq!(found("sh {socket}"), Found::Yes);
        assert!(matches!(found("no-such-program {socket}"), Found::NotInstalled(_)));
        assert!(matches!(found("{bin}/vhost-blk {socket}"), Found::Missing(m) if m.contains("cargo build")));
        let wrapped = found("taskset -c {cpu} no-such-program {socket}");
        assert!(matches!(wrapped, Found::NotInstalled(m) if m.contains("no-such-program")));
    }

    #[test]
    fn one_that_ends_says_its_last_words_and_leaves_nothing() {
        let stop = AtomicBool::new(false);
        let e = Started::new(&command("sh -c 'echo oh no >&2; exit 3' {socket}"), &places(), &stop);
        let e = e.unwrap_err().to_string();
        assert!(e.contains("did not start") && e.contains('3') && e.contains("oh no"), "{e}");
        let mut started =
            Started::new(&command("sh -c 'touch $0; sleep 60' {socket}"), &places(), &stop).unwrap();
        assert_eq!(started.ended(), None);
        let (dir, pid) = (started.sockets()[0].parent().unwrap().to_owned(), started.pid().unwrap());
        drop(started);
        assert!(!dir.exists() && !Path::new(&format!("/proc/{pid}")).exists());
    }
}
