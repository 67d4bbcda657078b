//! The cluster, while a test needs it.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU16, Ordering};

use anyhow::{Context, Result, ensure};
use kickless_tests::process;
use kickless_tests::scene::Scene;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// What is missing, if something is.
pub fn missing() -> Option<String> {
    if process::find_program("ceph-osd").is_none() {
        return Some("no Ceph: see scripts/rbd-test.sh".into());
    }
    let daemon = process::built("vhost-blk")?;
    let args = ["--socket-path=/nowhere/s", "--blk-file=rbd:a/b:conf=/nowhere/c"];
    let said = Command::new(daemon).args(args).output().ok()?.stderr;
    let lacks = String::from_utf8_lossy(&said).contains("built without Ceph");
    lacks.then(|| "vhost-blk is built without RBD: run make rbd-test".into())
}

/// A cluster of one node; gone when it is dropped.
pub struct Cluster {
    directory: PathBuf,
}

fn script() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../scripts/rbd-cluster.sh")
}

impl Cluster {
    pub fn up(scene: &Scene) -> Result<Cluster> {
        // Those that were there before may not have let go of their ports.
        static PORT: AtomicU16 = AtomicU16::new(0);
        let port = 16700 + (std::process::id() % 200) as u16 + 200 * PORT.fetch_add(1, Ordering::Relaxed);
        let cluster = Cluster { directory: scene.path("ceph") };
        let mut up = Command::new(script());
        let said = up.arg("up").arg(&cluster.directory).arg(port.to_string()).output()?;
        ensure!(said.status.success(), "{}", String::from_utf8_lossy(&said.stderr));
        Ok(cluster)
    }

    /// The name of an image, for the daemon.
    pub fn name(&self, image: &str) -> String {
        format!("rbd:rbd/{image}:id=disk:conf={}", self.directory.join("ceph.conf").display())
    }

    /// What `rbd` says.
    pub fn rbd(&self, args: &str) -> Result<Vec<u8>> {
        self.rbd_with(&args.split(' ').collect::<Vec<_>>())
    }

    /// The same, by arguments that may have spaces in them.
    pub fn rbd_with(&self, args: &[&str]) -> Result<Vec<u8>> {
        let conf = self.directory.join("ceph.conf");
        let mut rbd = Command::new("timeout");
        let said = rbd.args(["60", "rbd", "--conf"]).arg(conf).args(args).output().context("rbd")?;
        ensure!(said.status.success(), "rbd {}: {}", args.join(" "), String::from_utf8_lossy(&said.stderr));
        Ok(said.stdout)
    }

    /// All bytes of an image.
    pub fn bytes(&self, image: &str) -> Result<Vec<u8>> {
        self.rbd(&format!("export --no-progress rbd/{image} -"))
    }

    /// Has the OSD stand still, or go on.
    pub fn osd(&self, signal: Signal) -> Result<()> {
        let pid = std::fs::read_to_string(self.directory.join("osd.0.pid"))?;
        Ok(kill(Pid::from_raw(pid.trim().parse()?), signal)?)
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        let _ = self.osd(Signal::SIGCONT);
        let _ = Command::new(script()).arg("down").arg(&self.directory).status();
    }
}
