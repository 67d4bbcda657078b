//! A network namespace of a test's own: nothing of the host's network is seen or changed, and nothing stays behind.

use std::fs::File;
use std::path::Path;
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::sched::{CloneFlags, setns};

use crate::process::{self, Process, find_program};
use crate::scene::Scene;
use crate::wait;

/// The namespace lasts as long as a process that only sleeps in it.
#[derive(Debug)]
pub struct Netns {
    holder: Process,
}

impl Netns {
    /// Why there can be none, if so.
    pub fn missing_needs() -> Option<String> {
        for (program, package) in
            [("unshare", "util-linux"), ("nsenter", "util-linux"), ("ip", "iproute2"), ("tcpdump", "tcpdump")]
        {
            if find_program(program).is_none() {
                return Some(format!("{program} is not installed (apt-get install {package})"));
            }
        }
        match process::run("unshare", &["--net", "true"]) {
            Ok((0, _)) => None,
            _ => Some("network namespaces take root (CAP_SYS_ADMIN)".to_owned()),
        }
    }

    /// Makes one, with its loopback interface up.
    pub fn new(scene: &Scene, name: &str) -> Result<Netns> {
        let unshare = Path::new("unshare");
        let args = ["--net", "sleep", "3600"].map(str::to_owned);
        let mut holder = Process::spawn(scene, name, unshare, &args)?;
        let id = |pid: &str| std::fs::read_link(format!("/proc/{pid}/ns/net")).ok();
        let pid = holder.pid().to_string();
        wait::until("a network namespace", Duration::from_secs(10), || {
            ensure!(holder.poll_exit()?.is_none(), "unshare --net: {}", holder.stderr_tail());
            Ok((id(&pid) != id("self")).then_some(()))
        })?;
        let netns = Netns { holder };
        netns.check("ip link set lo up")?;
        Ok(netns)
    }

    /// The process that has it, as `ip link set DEVICE netns PID` wants it.
    pub fn pid(&self) -> String {
        self.holder.pid().to_string()
    }

    /// The words before those of a command that is to run in it.
    pub fn enter(&self) -> [String; 3] {
        ["nsenter".to_owned(), format!("--net=/proc/{}/ns/net", self.pid()), "--".to_owned()]
    }

    /// Runs a shell command in it, fails unless it exits with 0, and returns its output.
    pub fn check(&self, command: &str) -> Result<String> {
        let [nsenter, net, end] = self.enter();
        let (code, output) = process::run(&nsenter, &[&net, &end, "sh", "-c", command])?;
        ensure!(code == 0, "`{command}` in a network namespace: exit code {code}\n{output}");
        Ok(output.trim_end().to_owned())
    }

    /// Runs `act` on a thread that is in it.
    pub fn within<T: Send + 'static>(
        &self,
        act: impl FnOnce() -> Result<T> + Send + 'static,
    ) -> Result<JoinHandle<Result<T>>> {
        let namespace = File::open(format!("/proc/{}/ns/net", self.pid()))?;
        let thread = move || {
            setns(namespace, CloneFlags::CLONE_NEWNET).context("setns")?;
            act()
        };
        Ok(std::thread::Builder::new().spawn(thread)?)
    }

    /// Starts a shell command in it; standard output goes to `name-out.log` of the scene.
    pub fn start(&self, scene: &Scene, name: &str, command: &str) -> Result<Process> {
        let [nsenter, rest @ ..] = self.enter();
        let args: Vec<String> = rest
            .into_iter()
            .chain(["sh", "-c"].map(str::to_owned))
            .chain([format!("exec {command}")])
            .collect();
        Process::spawn(scene, name, Path::new(&nsenter), &args)
    }
}
