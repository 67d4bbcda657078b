//! This machine.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use nix::fcntl::{Flock, FlockArg};
use nix::sched::{CloneFlags, setns};

use super::{Busy, Elsewhere, EswitchMode, Facts, Host, PortSet, Process, Refused, VfSet};
use crate::netlink::devlink::Devlink;
use crate::netlink::route::{RawLink, Route};
use crate::pci::PciAddr;
use crate::state::DEVICES;
use crate::{sysfs, vfio};

/// How long an interface that was set up is given for its link to come up.
const LINK_LIMIT: Duration = Duration::from_secs(10);

/// Held by whoever changes something.
const LOCK: &str = "/run/sriov.lock";

/// This machine.
#[derive(Debug, Default)]
pub struct RealHost {
    /// A program that writes to a file of sysfs in our place: called with the file and the text. A write that waits in the
    /// kernel cannot be ended, nor can the process it is made by.
    pub writer: Option<(PathBuf, String)>,
    /// Held while something is changed; the writer inherits it.
    lock: Option<Flock<File>>,
    /// Whose VFs are being made or removed by us.
    writing: Mutex<Option<PciAddr>>,
}

impl RealHost {
    /// Makes sure that nobody else changes anything meanwhile.
    pub fn lock(&mut self) -> io::Result<()> {
        let file = OpenOptions::new().create(true).truncate(false).write(true).open(LOCK)?;
        let lock = Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|(_, errno)| errno)?;
        // Kept over exec: a write that goes on after us is still a change.
        nix::fcntl::fcntl(&*lock, nix::fcntl::FcntlArg::F_SETFD(nix::fcntl::FdFlag::empty()))?;
        self.lock = Some(lock);
        Ok(())
    }

    fn busy(&self) -> Busy {
        if self.lock.is_none() {
            let free =
                File::open(LOCK).map_or(true, |file| Flock::lock(file, FlockArg::LockSharedNonblock).is_ok());
            return if free { Busy::Nothing } else { Busy::Theirs };
        }
        self.writing.lock().unwrap_or_else(PoisonError::into_inner).map_or(Busy::Nothing, Busy::Ours)
    }
}

/// Has another program write to a file of sysfs.
fn write_apart(program: &Path, command: &str, path: &Path, text: &str) -> Result<(), Refused> {
    let child = Command::new(program)
        .arg(command)
        .arg(path)
        .arg(text)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()?
        .wait()?;
    match child.code() {
        Some(0) => Ok(()),
        // It exits with the error number.
        Some(errno) => Err(Refused::errno(errno)),
        None => Err(io::Error::other(format!("the writer has been ended: {child}")).into()),
    }
}

/// Writes to a file of sysfs, as [`RealHost::writer`] is to; the error number, or 0.
pub fn write_file(path: &Path, text: &str) -> i32 {
    match put(path, text) {
        Ok(()) => 0,
        Err(e) => e.raw_os_error().unwrap_or(nix::libc::EIO),
    }
}

fn put(path: &Path, text: &str) -> io::Result<()> {
    // One write: each is an order of its own.
    let written = OpenOptions::new().write(true).open(path)?.write(text.as_bytes())?;
    if written == text.len() { Ok(()) } else { Err(io::Error::other("not all of it was taken")) }
}

impl Host for RealHost {
    fn sysfs(&self) -> &Path {
        Path::new("/sys")
    }

    fn facts(&self) -> io::Result<Facts> {
        let mut route = Route::open()?;
        let said = |refused: Refused| io::Error::other(format!("rtnetlink: {refused}"));
        let links = route.links().map_err(said)?;
        let routes = route.default_routes().map_err(said)?;
        let mut facts = Facts { busy: self.busy(), holders: self.holders(), ..Facts::default() };
        for RawLink { index, name, link, .. } in links {
            if routes.contains(&index) {
                facts.default_routes.push(name.clone());
            }
            facts.links.insert(name, link);
        }
        if let Ok(meta) = fs::metadata("/") {
            facts.root_disk = functions_under(meta.dev());
        }
        facts.mounts = mounts();
        if let Some(mut devlink) = Devlink::open() {
            for pf in sysfs::names(&self.sysfs().join(DEVICES)).iter().filter_map(|name| name.parse().ok()) {
                // One that has no embedded switch says so.
                if self.sysfs().join(DEVICES).join(pf_file(pf)).exists()
                    && let Ok(Some(mode)) = devlink.eswitch(pf)
                {
                    facts.eswitch.insert(pf, mode);
                }
            }
            facts.ports = devlink.ports().unwrap_or_default();
        }
        facts.elsewhere = elsewhere();
        Ok(facts)
    }

    fn holders(&self) -> BTreeMap<u32, Vec<Process>> {
        vfio::holders(Path::new("/proc"), self.sysfs())
    }

    fn write(&self, path: &str, text: &str) -> Result<(), Refused> {
        let full = self.sysfs().join(path);
        let function = path.strip_prefix(DEVICES).and_then(|path| path.strip_suffix("/sriov_numvfs"));
        let (Some(function), Some((program, command))) = (function, &self.writer) else {
            return Ok(put(&full, text)?);
        };
        let writing = |function| *self.writing.lock().unwrap_or_else(PoisonError::into_inner) = function;
        writing(function.trim_start_matches('/').parse().ok());
        let written = write_apart(program, command, &full, text);
        writing(None);
        written
    }

    fn set_vf(&self, interface: &str, vf: u32, set: VfSet) -> Result<(), Refused> {
        Route::open()?.set_vf(interface, vf, set)
    }

    fn set_up(&self, interface: &str, up: bool) -> Result<(), Refused> {
        Route::open()?.set_up(interface, up)
    }

    fn wait_link(&self, interface: &str) {
        // Not `operstate`, which the kernel brings up to date later.
        let carrier = self.sysfs().join("class/net").join(interface).join("carrier");
        let deadline = Instant::now() + LINK_LIMIT;
        // Without a cable it never comes; what depends on it says so then.
        while Instant::now() < deadline
            && matches!(sysfs::text(&carrier), Ok(Some(carrier)) if carrier == "0")
        {
            thread::sleep(Duration::from_millis(50));
        }
    }

    fn set_eswitch(&self, pf: PciAddr, mode: EswitchMode) -> Result<(), Refused> {
        devlink()?.set_eswitch(pf, mode)
    }

    fn set_port(&self, pf: PciAddr, port: u32, set: PortSet) -> Result<(), Refused> {
        devlink()?.set_port(pf, port, set)
    }

    fn load_module(&self, name: &str) -> Result<(), Refused> {
        let output = Command::new("modprobe").arg("--").arg(name).output()?;
        if output.status.success() {
            return Ok(());
        }
        let said = String::from_utf8_lossy(&output.stderr).trim().replace('\n', " ");
        Err(io::Error::other(if said.is_empty() { output.status.to_string() } else { said }).into())
    }

    fn reclaim(&self, lost: &Elsewhere) -> Result<(), Refused> {
        let here = File::open("/proc/self/ns/net")?;
        within(Path::new(&lost.namespace), || {
            Route::open()?.set_namespace(&lost.interface, here.as_raw_fd())
        })?
    }
}

fn pf_file(pf: PciAddr) -> String {
    format!("{pf}/sriov_totalvfs")
}

fn devlink() -> Result<Devlink, Refused> {
    Devlink::open().ok_or_else(|| io::Error::other("this kernel has no devlink").into())
}

/// Does something in another network namespace, on a thread that ends there.
fn within<T: Send>(namespace: &Path, what: impl FnOnce() -> T + Send) -> io::Result<T> {
    let file = File::open(namespace)?;
    let enter = || {
        setns(&file, CloneFlags::CLONE_NEWNET)?;
        Ok(what())
    };
    thread::scope(|scope| scope.spawn(enter).join()).map_err(|_| io::Error::other("the thread has ended"))?
}

/// Interfaces of PCI functions in other network namespaces, as far as we may look.
fn elsewhere() -> Vec<Elsewhere> {
    let mut all = Vec::new();
    for (path, process) in vfio::namespaces(Path::new("/proc"), Path::new("/run/netns")) {
        let Ok(Ok(links)) = within(&path, || Route::open()?.links()) else { continue };
        all.extend(links.into_iter().filter_map(|link| {
            Some(Elsewhere {
                address: link.parent?,
                interface: link.name,
                namespace: path.display().to_string(),
                process: process.clone(),
            })
        }));
    }
    all
}

/// File systems on PCI functions, and where they are mounted.
fn mounts() -> BTreeMap<PciAddr, Vec<String>> {
    let mut all: BTreeMap<PciAddr, Vec<String>> = BTreeMap::new();
    let text = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    for line in text.lines() {
        let mut words = line.split(' ');
        let (Some(source), Some(place)) = (words.next(), words.next()) else { continue };
        if !source.starts_with('/') {
            continue;
        }
        let Ok(meta) = fs::metadata(source) else { continue };
        for function in functions_under(meta.rdev()) {
            all.entry(function).or_default().push(place.to_owned());
        }
    }
    all
}

/// The PCI functions that a block device is on, through device mapper, RAID and multipath.
fn functions_under(dev: u64) -> Vec<PciAddr> {
    let name = format!("{}:{}", nix::sys::stat::major(dev), nix::sys::stat::minor(dev));
    let mut found = Vec::new();
    if let Ok(device) = Path::new("/sys/dev/block").join(name).canonicalize() {
        functions_of_block(&device, 0, &mut found);
    }
    found.sort();
    found.dedup();
    found
}

fn functions_of_block(device: &Path, depth: u32, found: &mut Vec<PciAddr>) {
    // The function is one of the directories that the device is in; behind bridges the last one.
    if let Some(address) = device.iter().filter_map(|part| part.to_str()?.parse().ok()).next_back() {
        found.push(address);
        return;
    }
    if depth == 8 {
        return;
    }
    // A partition's slaves are its disk's.
    for slaves in [device.join("slaves"), device.join("../slaves")] {
        for slave in sysfs::names(&slaves) {
            if let Ok(device) = slaves.join(slave).canonicalize() {
                functions_of_block(&device, depth + 1, found);
            }
        }
    }
    // An NVMe disk of several controllers belongs to their subsystem, which has a link to each.
    for parent in device.ancestors().filter(|dir| dir.join("subsysnqn").exists()) {
        for controller in sysfs::names(parent).iter().filter(|name| name.starts_with("nvme")) {
            if let Ok(controller) = parent.join(controller).canonicalize()
                && controller != *parent
                && !controller.starts_with(parent)
            {
                functions_of_block(&controller, depth + 1, found);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    /// Disks of each kind, each with the functions that it is on.
    #[test]
    fn disks_are_on_functions() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().canonicalize().unwrap();
        let make = |path: &str| {
            let path = root.join(path);
            fs::create_dir_all(&path).unwrap();
            path
        };
        let link = |device: &Path, to: &Path, name: &str| {
            fs::create_dir_all(device).unwrap();
            symlink(to, device.join(name)).unwrap();
        };
        let disk = make("pci0000:00/0000:00:01.0/0000:03:00.0/nvme/nvme0/nvme0n1/nvme0n1p2");
        let sata = make("pci0000:00/0000:00:1f.2/ata1/host0/block/sda");
        // A RAID of both, and a logical volume on a partition of that.
        let part = make("virtual/block/md0/md0p1");
        link(&root.join("virtual/block/md0/slaves"), &disk, "nvme0n1p2");
        link(&root.join("virtual/block/md0/slaves"), &sata, "sda");
        let volume = make("virtual/block/dm-0");
        link(&volume.join("slaves"), &part, "md0p1");
        // A disk of two controllers.
        let shared = make("virtual/nvme-subsystem/nvme-subsys1/nvme1n1");
        let subsystem = shared.parent().unwrap();
        fs::write(subsystem.join("subsysnqn"), "nqn\n").unwrap();
        for (name, function) in [("nvme1", "0000:04:00.0"), ("nvme2", "0000:05:00.0")] {
            link(subsystem, &make(&format!("pci0000:00/{function}/nvme/{name}")), name);
        }
        for (device, functions) in [
            (&disk, &["0000:03:00.0"][..]),
            (&sata, &["0000:00:1f.2"]),
            (&part, &["0000:00:1f.2", "0000:03:00.0"]),
            (&volume, &["0000:00:1f.2", "0000:03:00.0"]),
            (&shared, &["0000:04:00.0", "0000:05:00.0"]),
            (&make("virtual/block/loop0"), &[]),
        ] {
            let mut found = Vec::new();
            functions_of_block(device, 0, &mut found);
            found.sort();
            let found: Vec<_> = found.iter().map(ToString::to_string).collect();
            assert_eq!(found, functions, "{}", device.display());
        }
    }
}
