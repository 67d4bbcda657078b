//! Hosts in directories, out of files in `trees/`.

#![allow(dead_code)] // each test uses what it needs

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use sriov_tools::apply::{Applier, ApplyError};
use sriov_tools::file::Wanted;
use sriov_tools::host::dir::DirHost;
use sriov_tools::host::{Elsewhere, EswitchMode, Facts, Host, PortSet, Process, Refused, VfSet};
use sriov_tools::pci::PciAddr;
use sriov_tools::plan::{Plan, Step, plan};
use sriov_tools::state::{self, State};
use tempfile::TempDir;

/// All there are.
pub const TREES: [&str; 9] =
    ["recorded", "nic", "no-iommu", "dual-port", "bnxt", "nvme", "gpu", "switchdev", "shared-group"];

/// A host in a directory that goes when this is dropped.
pub struct Tree {
    pub dir: TempDir,
    pub host: Arc<DirHost>,
}

impl Tree {
    pub fn new(name: &str) -> Tree {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("tests/trees/{name}.tree"));
        let text = fs::read_to_string(&path).unwrap();
        let dir =
            tempfile::tempdir_in(if Path::new("/dev/shm").is_dir() { "/dev/shm" } else { "/tmp" }).unwrap();
        unpack(&text, dir.path());
        let host = Arc::new(DirHost::new(dir.path()));
        Tree { dir, host }
    }

    pub fn state(&self) -> State {
        state::read(&*self.host).unwrap().0
    }

    pub fn plan(&self, toml: &str) -> Plan {
        plan(&self.state(), &toml::from_str::<Wanted>(toml).unwrap())
            .unwrap_or_else(|wrong| panic!("{wrong:?}"))
    }

    pub fn wrong(&self, toml: &str) -> String {
        let wrong = plan(&self.state(), &toml::from_str::<Wanted>(toml).unwrap()).unwrap_err();
        wrong.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ")
    }

    pub fn apply(&self, toml: &str) {
        self.reach(&toml::from_str::<Wanted>(toml).unwrap());
    }

    pub fn reach(&self, wanted: &Wanted) {
        let before = self.state();
        let steps = plan(&before, wanted).unwrap_or_else(|wrong| panic!("{wrong:?}")).steps;
        run(self.host.clone(), &before, &steps).unwrap_or_else(|e| panic!("{e}"));
    }
}

pub fn run(host: Arc<dyn Host>, before: &State, steps: &[Step]) -> Result<(), Box<ApplyError>> {
    let (limit, every) = (Duration::from_secs(60), Duration::from_millis(50));
    Applier { host, limit, every, say: Box::new(|_| {}) }.run(before, steps)
}

/// Sections are directories; `name = text`, `name -> target` and `name/` are in them.
fn unpack(text: &str, to: &Path) {
    let mut section = to.to_owned();
    let parent = |path: &Path| fs::create_dir_all(path.parent().unwrap()).unwrap();
    for line in text.lines().filter(|line| !line.starts_with('#')) {
        if let Some(dir) = line.strip_prefix('[').and_then(|line| line.strip_suffix(']')) {
            section = to.join(dir);
            fs::create_dir_all(&section).unwrap();
        } else if let Some((name, target)) = line.split_once(" -> ") {
            parent(&section.join(name));
            symlink(target, section.join(name)).unwrap();
        } else if let Some((name, text)) = line.split_once(" = ") {
            parent(&section.join(name));
            fs::write(section.join(name), format!("{text}\n")).unwrap();
        } else {
            fs::create_dir_all(section.join(line.strip_suffix('/').expect(line))).unwrap();
        }
    }
}

/// When a write fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// Nothing has happened.
    Before,
    /// It has happened all the same.
    After,
    /// It succeeds, but an address that is set is another one afterwards: what the driver had before a reset.
    Address,
}

/// A host whose `n`-th write fails, counted from 0.
pub struct Faulty {
    pub inner: Arc<DirHost>,
    pub n: usize,
    pub fault: Fault,
    pub errno: i32,
    pub count: AtomicUsize,
}

impl Faulty {
    fn change(&self, change: impl FnOnce() -> Result<(), Refused>) -> Result<(), Refused> {
        let fails = self.count.fetch_add(1, Ordering::Relaxed) == self.n;
        if fails && self.fault == Fault::Before {
            return Err(Refused::errno(self.errno));
        }
        change()?;
        if fails && self.fault == Fault::After { Err(Refused::errno(self.errno)) } else { Ok(()) }
    }
}

impl Host for Faulty {
    fn sysfs(&self) -> &Path {
        self.inner.sysfs()
    }

    fn facts(&self) -> std::io::Result<Facts> {
        self.inner.facts()
    }

    fn holders(&self) -> std::collections::BTreeMap<u32, Vec<Process>> {
        self.inner.holders()
    }

    fn write(&self, path: &str, text: &str) -> Result<(), Refused> {
        self.change(|| self.inner.write(path, text))
    }

    fn set_vf(&self, interface: &str, vf: u32, set: VfSet) -> Result<(), Refused> {
        let set = match set {
            VfSet::Mac(_) if self.fault == Fault::Address => VfSet::Mac("52:54:00:00:00:99".parse().unwrap()),
            set => set,
        };
        self.change(|| self.inner.set_vf(interface, vf, set))
    }

    fn set_up(&self, interface: &str, up: bool) -> Result<(), Refused> {
        self.change(|| self.inner.set_up(interface, up))
    }

    fn wait_link(&self, interface: &str) {
        self.inner.wait_link(interface);
    }

    fn set_eswitch(&self, pf: PciAddr, mode: EswitchMode) -> Result<(), Refused> {
        self.change(|| self.inner.set_eswitch(pf, mode))
    }

    fn set_port(&self, pf: PciAddr, port: u32, set: PortSet) -> Result<(), Refused> {
        self.change(|| self.inner.set_port(pf, port, set))
    }

    fn load_module(&self, name: &str) -> Result<(), Refused> {
        self.inner.load_module(name)
    }

    fn reclaim(&self, lost: &Elsewhere) -> Result<(), Refused> {
        self.change(|| self.inner.reclaim(lost))
    }
}
