//! The vDPA bus in sysfs: which driver a device has, what has become of it, and the size of its bounce buffer.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use clap::ValueEnum;

const DEVICES: &str = "/sys/bus/vdpa/devices";
const DRIVERS: &str = "/sys/bus/vdpa/drivers";
const PROBE: &str = "/sys/bus/vdpa/drivers_probe";

/// How long a driver may take to make something of a device.
const APPEAR: Duration = Duration::from_secs(20);

/// A driver of the bus.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Driver {
    /// The host's own virtio drivers: /dev/vdX, or a network interface.
    Virtio,
    /// /dev/vhost-vdpa-N, for a virtual machine or a container.
    Vhost,
}

impl Driver {
    /// Its module.
    pub fn module(self) -> &'static str {
        match self {
            Driver::Virtio => "virtio_vdpa",
            Driver::Vhost => "vhost_vdpa",
        }
    }
}

/// Why a device has not become what it is to be.
#[derive(Debug, thiserror::Error)]
pub enum SysfsError {
    /// No such driver.
    #[error("there is no driver {0} on the vDPA bus: load the module with modprobe {0}")]
    NoDriver(&'static str),
    /// It does not come.
    #[error("{0} has not come up with {1} within {APPEAR:?}; the kernel's log (dmesg) may say why")]
    NotUp(String, &'static str),
    /// An older kernel.
    #[error("the bounce buffer of this kernel has one size ({0} is missing): --bounce-size needs Linux 6.4")]
    NoBounceSize(PathBuf),
    /// A file.
    #[error("{0}: {1}")]
    Io(PathBuf, io::Error),
}

fn write(path: &Path, text: &str) -> Result<(), SysfsError> {
    fs::write(path, text).map_err(|e| SysfsError::Io(path.to_owned(), e))
}

fn device(name: &str) -> PathBuf {
    Path::new(DEVICES).join(name)
}

/// The driver that a device has.
pub fn driver_of(name: &str) -> Option<String> {
    let link = fs::read_link(device(name).join("driver")).ok()?;
    Some(link.file_name()?.to_string_lossy().into_owned())
}

/// Gives a device to `driver`, and not to another one that takes any.
pub fn bind(name: &str, driver: Driver) -> Result<(), SysfsError> {
    let module = driver.module();
    if !Path::new(DRIVERS).join(module).exists() {
        return Err(SysfsError::NoDriver(module));
    }
    write(&device(name).join("driver_override"), module)?;
    match driver_of(name) {
        Some(has) if has == module => return Ok(()),
        Some(has) => write(&Path::new(DRIVERS).join(has).join("unbind"), name)?,
        None => {}
    }
    write(Path::new(PROBE), name)
}

/// What a driver has made of a device: a node, or the name of an interface.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// `/dev/vdX` or `/dev/vhost-vdpa-N`.
    Node(PathBuf),
    /// A network interface.
    Interface(String),
}

impl std::fmt::Display for Outcome {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Outcome::Node(path) => path.display().fmt(f),
            Outcome::Interface(name) => name.fmt(f),
        }
    }
}

impl Outcome {
    /// Whether somebody uses it: a mounted file system, an open device; and where we may not ask. Of interfaces that cannot be
    /// said.
    pub fn is_in_use(&self) -> bool {
        let Outcome::Node(path) = self else { return false };
        let opened = OpenOptions::new().read(true).custom_flags(libc::O_EXCL | libc::O_NONBLOCK).open(path);
        opened.is_err_and(|e| matches!(e.raw_os_error(), Some(libc::EBUSY | libc::EACCES | libc::EPERM)))
    }
}

fn entries(path: &Path) -> impl Iterator<Item = String> {
    fs::read_dir(path).into_iter().flatten().flatten().filter_map(|e| e.file_name().into_string().ok())
}

/// What has become of a device so far.
pub fn outcome(name: &str) -> Option<Outcome> {
    let device = device(name);
    for entry in entries(&device) {
        if entry.starts_with("vhost-vdpa") {
            return Some(Outcome::Node(Path::new("/dev").join(entry)))
                .filter(|o| matches!(o, Outcome::Node(p) if p.exists()));
        }
        if !entry.starts_with("virtio") {
            continue;
        }
        if let Some(disk) = entries(&device.join(&entry).join("block")).next() {
            return Some(Outcome::Node(Path::new("/dev").join(disk)))
                .filter(|o| matches!(o, Outcome::Node(p) if p.exists()));
        }
        if let Some(interface) = entries(&device.join(&entry).join("net")).next() {
            return Some(Outcome::Interface(interface));
        }
    }
    None
}

/// Waits for what becomes of a device.
pub fn wait_for_outcome(name: &str, driver: Driver) -> Result<Outcome, SysfsError> {
    let deadline = Instant::now() + APPEAR;
    loop {
        if let Some(outcome) = outcome(name) {
            return Ok(outcome);
        }
        if Instant::now() >= deadline {
            return Err(SysfsError::NotUp(name.into(), driver.module()));
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Says how large the bounce buffer is to be, in bytes: before a device goes to the bus.
pub fn set_bounce_size(name: &str, bytes: u64) -> Result<(), SysfsError> {
    set_bounce_size_of(&Path::new("/sys/class/vduse").join(name), bytes)
}

fn set_bounce_size_of(device: &Path, bytes: u64) -> Result<(), SysfsError> {
    let path = device.join("bounce_size");
    let file = File::options().write(true).open(&path);
    let outcome = file.and_then(|mut file| io::Write::write_all(&mut file, bytes.to_string().as_bytes()));
    outcome.map_err(|e| match e.kind() {
        io::ErrorKind::NotFound => SysfsError::NoBounceSize(path),
        _ => SysfsError::Io(path, e),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bounce_buffers_of_older_kernels_have_one_size() {
        let dir = tempfile::tempdir().unwrap();
        let refused = set_bounce_size_of(dir.path(), 1 << 23).unwrap_err().to_string();
        assert!(refused.contains("--bounce-size needs Linux 6.4"), "{refused}");
        fs::write(dir.path().join("bounce_size"), "").unwrap();
        set_bounce_size_of(dir.path(), 1 << 23).unwrap();
        assert_eq!(fs::read_to_string(dir.path().join("bounce_size")).unwrap(), "8388608");
    }
}
