//! The network back end under test, as a process.

use std::path::PathBuf;

use anyhow::{Context, Result, bail};

use crate::daemon::Daemon;
use crate::netns::Netns;
use crate::process;
use crate::scene::Scene;
use crate::testpmd;

/// Which program serves the network cards.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// The daemon of this workspace.
    VhostNet,
    /// DPDK's testpmd, a wire between two ports: a second opinion when a test fails (`KICKLESS_NET_BACKEND=testpmd`).
    Testpmd,
}

impl Kind {
    /// What the environment asks for.
    pub fn from_env() -> Self {
        match std::env::var("KICKLESS_NET_BACKEND").as_deref() {
            Ok("testpmd") => Self::Testpmd,
            _ => Self::VhostNet,
        }
    }

    /// The program, if it is there.
    pub fn program(self) -> Option<PathBuf> {
        match self {
            Self::VhostNet => process::built("vhost-net"),
            Self::Testpmd => testpmd::program(),
        }
    }
}

/// Why there is no back end, if so.
pub fn missing_needs() -> Option<String> {
    let missing = Kind::from_env().program().is_none();
    missing.then(|| "no vhost-net: run cargo build, or set KICKLESS_BIN_DIR".to_owned())
}

/// How to start a back end.
#[derive(Debug, Clone)]
pub struct Options {
    kind: Kind,
    ports: usize,
    queues: usize,
    /// How ports are joined.
    join: &'static str,
    poll: &'static str,
    /// More of each `--port`, and of the first.
    port_keys: &'static str,
    control: bool,
    first_keys: &'static str,
    /// Said in a file.
    file: bool,
    args: Vec<String>,
}

impl Options {
    /// A wire between two ports.
    pub fn wire() -> Self {
        Self {
            kind: Kind::from_env(),
            ports: 2,
            queues: 4,
            join: "--wire",
            poll: "adaptive",
            port_keys: "",
            control: false,
            first_keys: "",
            file: false,
            args: Vec::new(),
        }
    }

    /// A switch with two ports that nothing tells apart.
    pub fn switch() -> Self {
        Self { join: "--switch", ..Self::wire() }
    }

    /// One port that sends packets back, with their addresses swapped. Ours, whatever else is tested.
    pub fn echo() -> Self {
        Self { kind: Kind::VhostNet, ports: 1, join: "--loopback=echo", ..Self::wire() }
    }

    /// Sets the polling mode.
    #[must_use]
    pub fn poll(mut self, mode: &'static str) -> Self {
        self.poll = mode;
        self
    }

    /// Has packets wait for buffers of their receiver.
    #[must_use]
    pub fn lossless(mut self) -> Self {
        self.port_keys = ",wait";
        self
    }

    /// Has the first port be more than the others: `tap=NAME`.
    #[must_use]
    pub fn first(mut self, keys: &'static str) -> Self {
        self.first_keys = keys;
        self
    }

    /// Has `vhost-net` read all this from a file, which can be changed.
    #[must_use]
    pub fn in_file(mut self) -> Self {
        self.file = self.kind == Kind::VhostNet;
        self
    }

    /// Changes the file, with further lines for each port, and has the daemon read it again; false without one.
    pub fn change(&self, daemon: &Daemon, ports: &[&str]) -> Result<bool> {
        if self.file {
            self.write_file(daemon.sockets(), ports)?;
            daemon.sighup()?;
        }
        Ok(self.file)
    }

    fn write_file(&self, sockets: &[PathBuf], ports: &[&str]) -> Result<PathBuf> {
        let path = sockets.first().context("no port")?.with_extension("toml");
        let (join, pairs) = (self.join.trim_start_matches('-'), self.queues);
        let begin = format!("{join} = true\npoll = '{}'\nnum-queue-pairs = {pairs}\n", self.poll);
        let port = |(i, socket): (usize, &PathBuf)| {
            let (mac, lines) = (i + 1, ports.get(i).unwrap_or(&""));
            let socket = socket.display();
            format!("[[port]]\nsocket-path = '{socket}'\nmac = '52:54:00:00:00:0{mac}'\n{lines}\n")
        };
        let text: String = std::iter::once(begin).chain(sockets.iter().enumerate().map(port)).collect();
        std::fs::write(&path, text)?;
        Ok(path)
    }

    /// Sets the number of queue pairs that each port offers.
    #[must_use]
    pub fn queues(mut self, pairs: usize) -> Self {
        self.queues = pairs;
        self
    }

    /// Sets the number of ports.
    #[must_use]
    pub fn ports(mut self, ports: usize) -> Self {
        self.ports = ports;
        self
    }

    /// Has others able to take over from it: [`Daemon::upgrade`].
    #[must_use]
    pub fn upgradable(mut self) -> Self {
        self.control = true;
        self
    }

    /// Adds arguments of `vhost-net` that have no counterpart in other back ends.
    #[must_use]
    pub fn args(mut self, args: &[&str]) -> Self {
        self.args.extend(args.iter().map(|&arg| arg.to_owned()));
        self
    }

    /// Starts the back end and waits until it can be connected to. Its sockets are `name-0.sock`, `name-1.sock`, ...
    pub fn spawn(&self, scene: &Scene, name: &str) -> Result<Daemon> {
        self.spawn_with(scene, name, None)
    }

    /// The same in a network namespace.
    pub fn spawn_in(&self, scene: &Scene, name: &str, netns: &Netns) -> Result<Daemon> {
        self.spawn_with(scene, name, Some(netns))
    }

    fn spawn_with(&self, scene: &Scene, name: &str, netns: Option<&Netns>) -> Result<Daemon> {
        let sockets: Vec<PathBuf> =
            (0..self.ports).map(|port| scene.path(&format!("{name}-{port}.sock"))).collect();
        for socket in &sockets {
            let _ = std::fs::remove_file(socket);
        }
        let mut program = self.kind.program().context("no back end to test")?;
        let mut args = match self.kind {
            Kind::VhostNet if self.file => {
                vec![format!("--config={}", self.write_file(&sockets, &[])?.display())]
            }
            Kind::VhostNet => self.vhost_net_args(&sockets),
            Kind::Testpmd => self.testpmd_args(&sockets)?,
        };
        let control = self.control.then(|| scene.path(&format!("{name}.control")));
        args.extend(control.iter().map(|path| format!("--control={}", path.display())));
        if let Some(netns) = netns {
            let [nsenter, rest @ ..] = netns.enter();
            args = rest.into_iter().chain([program.display().to_string()]).chain(args).collect();
            program = nsenter.into();
        }
        Daemon::start(scene, name, program, args, sockets, control)
    }

    fn vhost_net_args(&self, sockets: &[PathBuf]) -> Vec<String> {
        let poll = format!("--poll={}", self.poll);
        let mut args = vec![self.join.to_owned(), poll, format!("--num-queue-pairs={}", self.queues)];
        // Addresses as QEMU's guests have them, for those of other front ends.
        let port = |(i, socket): (usize, &PathBuf)| {
            let (path, last, keys) = (socket.display(), i + 1, self.port_keys);
            let first = if i == 0 && !self.first_keys.is_empty() {
                format!(",{}", self.first_keys)
            } else {
                String::new()
            };
            format!("--port=socket-path={path},mac=52:54:00:00:00:0{last}{keys}{first}")
        };
        args.extend(sockets.iter().enumerate().map(port));
        args.extend(self.args.iter().cloned());
        args
    }

    fn testpmd_args(&self, sockets: &[PathBuf]) -> Result<Vec<String>> {
        if sockets.len() != 2 || !self.args.is_empty() {
            bail!("testpmd is a wire between two ports");
        }
        let device = |(i, socket): (usize, &PathBuf)| {
            format!("net_vhost{i},iface={},queues={}", socket.display(), self.queues)
        };
        let devices: Vec<String> = sockets.iter().enumerate().map(device).collect();
        let queues = [format!("--rxq={}", self.queues), format!("--txq={}", self.queues)];
        Ok(testpmd::args(&devices, "io", &[&queues[0], &queues[1]]))
    }
}
