//! An NVMe namespace by its generic character device (`/dev/ngXnY`): what it is, what it takes, and whether this process may
//! give it commands.
#![allow(unsafe_code)] // ioctls that take pointers, and one read by a ring

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::thread::Builder;

use io_uring::{opcode, types};
use poll_engine::confine::{self, Role};
use poll_engine::uring::commands::CommandRing;

use super::command::{Ask, Command, Status};
use crate::backend::bounce::Bounce;

/// `NVME_URING_CMD_IO`, and `NVME_URING_CMD_IO_VEC`.
pub(super) const URING_CMD_IO: u32 = nix::request_code_readwrite!(b'N', 0x80, 72) as u32;
pub(super) const URING_CMD_IO_VEC: u32 = nix::request_code_readwrite!(b'N', 0x81, 72) as u32;

nix::ioctl_none_bad!(namespace_id, nix::request_code_none!(b'N', 0x40));
nix::ioctl_readwrite!(admin_command, b'N', 0x41, Command);

/// Bytes of an Identify data structure, and of a page of the controller's.
const PAGE: usize = 4096;
/// Most entries of a ring; its completions, twice as many, may overflow without being lost.
const MAX_ENTRIES: u32 = 1024;

/// Why a namespace is not given commands.
#[derive(Debug, thiserror::Error)]
pub enum NoCommands {
    /// What it is formatted with has no place in a disk, whichever way it is used.
    #[error(
        "{path} is formatted with {bytes} bytes of metadata for each block, which no virtio disk has; use another \
         namespace, or format it without (nvme format --lbaf)"
    )]
    Metadata {
        /// The device.
        path: PathBuf,
        /// Of each block.
        bytes: u16,
    },
    /// As a block device it can be used all the same.
    #[error("{0}")]
    Here(String),
}

/// A generic character device, and the block device of the same namespace.
#[derive(Debug)]
pub struct Found {
    path: PathBuf,
    /// The block device.
    pub block: PathBuf,
    /// In sysfs, what the kernel limits requests of the block device to.
    queue: PathBuf,
    /// How its controllers are reached.
    transports: Vec<String>,
}

/// The namespace whose generic character device `path` is, if it is one: the kernel says so, whatever its name.
pub fn find(path: &Path) -> Option<Found> {
    let meta = fs::metadata(path).ok().filter(|meta| meta.file_type().is_char_device())?;
    let (major, minor) = (rustix::fs::major(meta.rdev()), rustix::fs::minor(meta.rdev()));
    let node = fs::canonicalize(format!("/sys/dev/char/{major}:{minor}")).ok()?;
    let class = fs::canonicalize(node.join("subsystem")).ok()?;
    if class.file_name()? != "nvme-generic" {
        return None;
    }
    // The block device lies beside it: below the controller, or below the subsystem if there may be several.
    let name = format!("nvme{}", node.file_name()?.to_str()?.strip_prefix("ng")?);
    let above = node.parent()?;
    let transport = |controller: PathBuf| fs::read_to_string(controller.join("transport")).ok();
    let below = fs::read_dir(above).ok()?.flatten().filter_map(|entry| transport(entry.path()));
    let transports = transport(above.to_owned()).into_iter().chain(below);
    Some(Found {
        path: path.to_owned(),
        block: Path::new("/dev").join(&name),
        queue: above.join(&name).join("queue"),
        transports: transports.map(|t| t.trim().to_owned()).collect(),
    })
}

/// What commands may ask for.
#[derive(Clone, Copy, Debug)]
pub struct Takes {
    /// Bytes of a block, as a power of two.
    pub block_shift: u32,
    /// Most bytes that one command reads or writes.
    pub max_bytes: u32,
    /// Most blocks that one Write Zeroes names; 0 if there is no such command.
    pub max_zero_blocks: u32,
    /// Whether Write Zeroes may give the space up.
    pub zero_unmaps: bool,
    /// Most blocks that one range of Dataset Management names; 0 if there is no such command.
    pub max_deallocate_blocks: u32,
}

/// A namespace that this process may give commands.
#[derive(Debug)]
pub struct Namespace {
    generic: File,
    nsid: u32,
    takes: Takes,
    polled: bool,
    /// For queues that start: threads that serve guests make none.
    rings: Mutex<Vec<CommandRing>>,
}

/// What one identify command says.
fn identify(generic: &File, nsid: u32, what: u32) -> io::Result<Bounce> {
    let mut data = Bounce::zeros(PAGE);
    let addr = data.bytes_mut().as_mut_ptr().addr() as u64;
    let mut command = Command::identify(nsid, what).with_data(addr, PAGE as u32);
    // SAFETY: the kernel writes a page to the address, which is a buffer of one, and the result into the command.
    let status = unsafe { admin_command(generic.as_raw_fd(), &raw mut command) }?;
    if status != 0 { Err(io::Error::other(Status(status).to_string())) } else { Ok(data) }
}

fn word(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

impl Found {
    /// A limit of the block device.
    fn limit(&self, name: &str) -> Option<u64> {
        fs::read_to_string(self.queue.join(name)).ok()?.trim().parse().ok()
    }

    /// Opens it for `queues` queues with rings of `ring_size`, and tries whether commands pass.
    pub fn open(&self, read_only: bool, queues: u16, ring_size: u16) -> Result<Namespace, NoCommands> {
        let here = |what: &str, error: &dyn std::fmt::Display| NoCommands::Here(format!("{what}: {error}"));
        // While no path is there, the kernel keeps what is asked of the block device, and fails commands.
        if let Some(other) = self.transports.iter().find(|t| *t != "pcie") {
            return Err(NoCommands::Here(format!(
                "it is reached by {other}, and only the block device waits for a path that is lost"
            )));
        }
        let mut options = OpenOptions::new();
        options.read(true).write(!read_only).custom_flags(libc::O_NONBLOCK);
        let generic = options.open(&self.path).map_err(|e| here("cannot open it", &e))?;
        // SAFETY: it takes no argument.
        let nsid =
            unsafe { namespace_id(generic.as_raw_fd()) }.map_err(|e| here("NVME_IOCTL_ID", &e))? as u32;
        let controller = identify(&generic, 0, 1).map_err(|e| here("cannot identify the controller", &e))?;
        let namespace = identify(&generic, nsid, 0).map_err(|e| here("cannot identify the namespace", &e))?;
        let takes = self.takes(controller.bytes(), namespace.bytes())?;
        let entries = u32::from(ring_size).clamp(8, MAX_ENTRIES);
        let rings = |polled| -> io::Result<Vec<CommandRing>> {
            (0..queues.max(1)).map(|_| CommandRing::new(entries, polled)).collect()
        };
        let mut polls = self.limit("io_poll") == Some(1) && polls_everything();
        let mut opened = rings(polls);
        if polls && (opened.is_err() || try_out(&generic, nsid, &takes, read_only, true).is_err()) {
            polls = false;
            opened = rings(false);
        }
        let opened = opened.map_err(|e| here("no io_uring for commands (Linux 5.19)", &e))?;
        if !polls {
            try_out(&generic, nsid, &takes, read_only, false).map_err(NoCommands::Here)?;
        }
        Ok(Namespace { generic, nsid, takes, polled: polls, rings: Mutex::new(opened) })
    }

    fn takes(&self, controller: &[u8], namespace: &[u8]) -> Result<Takes, NoCommands> {
        // Formatted LBA Size: an index of four bits, and two more.
        let format = usize::from(namespace[26] & 0xf | (namespace[26] & 0x60) >> 1);
        let format = &namespace[128 + 4 * format..][..4];
        let (metadata, block_shift) = (word(format, 0), u32::from(format[2]));
        if metadata != 0 {
            return Err(NoCommands::Metadata { path: self.path.clone(), bytes: metadata });
        }
        if !(9..=16).contains(&block_shift) {
            return Err(NoCommands::Here(format!("blocks of 2^{block_shift} bytes")));
        }
        // Maximum Data Transfer Size: a power of two of the smallest page.
        let mdts = if controller[77] == 0 { u64::MAX } else { (PAGE as u64) << controller[77].min(20) };
        // A page of memory may be a segment of its own, and one is cut in two.
        let segments = self.limit("max_segments").unwrap_or(33).saturating_sub(1).max(1) * PAGE as u64;
        let kernel = self.limit("max_hw_sectors_kb").unwrap_or(128) << 10;
        let bytes = mdts.min(segments).min(kernel).min(1 << 20) >> block_shift << block_shift;
        let bytes = bytes.max(1 << block_shift);
        let supported = word(controller, 520);
        let blocks = |bit: u16, name: &str, most: u64| {
            let bytes = self.limit(name).filter(|_| supported & bit != 0).unwrap_or(0);
            (bytes >> block_shift).min(most) as u32
        };
        Ok(Takes {
            block_shift,
            max_bytes: bytes as u32,
            max_zero_blocks: blocks(1 << 3, "write_zeroes_max_bytes", 1 << 16),
            zero_unmaps: namespace[33] & 1 << 3 != 0,
            max_deallocate_blocks: blocks(1 << 2, "discard_max_bytes", u32::MAX.into()),
        })
    }
}

/// Whether the kernel looks for the end of commands without data as well (Linux 6.4); before, it waits for an interrupt that
/// polled queues do not have.
fn polls_everything() -> bool {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(|n| n.parse().unwrap_or(0));
    (numbers.next(), numbers.next()) >= (Some(6_u32), Some(4_u32))
}

/// Reads a block and flushes, with the rights that a thread which serves guests has left.
fn try_out(generic: &File, nsid: u32, takes: &Takes, read_only: bool, polled: bool) -> Result<(), String> {
    let generic = generic.try_clone().map_err(|e| e.to_string())?;
    let bytes = 1 << takes.block_shift;
    let mut ring = CommandRing::new(8, polled).map_err(|e| format!("no io_uring for commands: {e}"))?;
    let mut act = move || {
        let mut data = Bounce::zeros(bytes);
        let addr = data.bytes_mut().as_mut_ptr().addr() as u64;
        let read = Command::new(nsid, Ask::Read { first: 0, blocks: 1 }).with_data(addr, bytes as u32);
        let flush = Command::new(nsid, Ask::Flush);
        // Only who may write may flush.
        for command in [Some(read), (!read_only).then_some(flush)].into_iter().flatten() {
            let fd = types::Fd(generic.as_raw_fd());
            let entry = opcode::UringCmd80::new(fd, URING_CMD_IO).cmd(command.bytes()).build();
            // SAFETY: the buffer lives until the completion is there, which is waited for; so does the descriptor.
            unsafe { ring.push(&entry) };
            let result = loop {
                ring.wait();
                if let Some(completion) = ring.reap() {
                    break completion.result;
                }
            };
            match result {
                0 => {}
                status @ 1.. => return Err(Status(status).to_string()),
                errno if -errno == libc::EACCES => {
                    return Err("only with CAP_SYS_ADMIN, which no thread that serves guests has: Linux before 6.2, or a \
                                controller without a log of the effects of commands"
                        .into());
                }
                errno => return Err(io::Error::from_raw_os_error(-errno).to_string()),
            }
        }
        Ok(())
    };
    let (tell, told) = crossbeam::channel::bounded(1);
    let builder = Builder::new().name("nvme-probe".into());
    let thread = confine::spawn(builder, Role::Reactor, move || {
        let _ = tell.send(act());
    });
    let thread = thread.map_err(|e| e.to_string())?;
    let said = told.recv().unwrap_or_else(|_| Err("the thread that tried has ended".into()));
    let _ = thread.join();
    said
}

impl Namespace {
    /// Its generic character device.
    pub fn generic(&self) -> &File {
        &self.generic
    }

    /// Its number.
    pub fn nsid(&self) -> u32 {
        self.nsid
    }

    /// What commands may ask for.
    pub fn takes(&self) -> Takes {
        self.takes
    }

    /// Whether completions are polled for.
    pub fn is_polled(&self) -> bool {
        self.polled
    }

    /// A ring for a queue that starts.
    pub fn take_ring(&self) -> io::Result<CommandRing> {
        let mut rings = self.rings.lock().unwrap_or_else(PoisonError::into_inner);
        rings.pop().ok_or_else(|| io::Error::other("more queues than rings for NVMe commands"))
    }

    /// The ring of a queue that has stopped.
    pub fn give_ring(&self, ring: CommandRing) {
        self.rings.lock().unwrap_or_else(PoisonError::into_inner).push(ring);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found() -> Found {
        let (path, block) = (PathBuf::from("/dev/ng9n9"), PathBuf::from("/dev/nvme9n9"));
        Found { path, block, queue: PathBuf::from("/nowhere"), transports: Vec::new() }
    }

    #[test]
    fn other_devices_are_none() {
        assert!(find(Path::new("/dev/null")).is_none());
        assert!(find(Path::new("/dev/ng9n9")).is_none());
        assert!(find(Path::new("/")).is_none());
    }

    #[test]
    fn formats_and_limits_are_found() {
        let (mut controller, mut namespace) = (vec![0; PAGE], vec![0; PAGE]);
        (controller[77], controller[520]) = (5, 0b1100);
        // The 17th format: four low bits, and one high.
        namespace[26] = 0x21;
        namespace[128 + 4 * 17 + 2] = 12;
        namespace[33] = 1 << 3;
        let takes = found().takes(&controller, &namespace).unwrap();
        assert_eq!((takes.block_shift, takes.max_bytes, takes.zero_unmaps), (12, 128 << 10, true));
        // What the kernel does not name has no limit that is known, so it is not used.
        assert_eq!((takes.max_zero_blocks, takes.max_deallocate_blocks), (0, 0));
        controller[77] = 2;
        assert_eq!(found().takes(&controller, &namespace).unwrap().max_bytes, 16 << 10);
        namespace[128 + 4 * 17] = 8;
        let metadata = found().takes(&controller, &namespace);
        assert!(matches!(metadata, Err(NoCommands::Metadata { bytes: 8, .. })));
        namespace[128 + 4 * 17] = 0;
        namespace[128 + 4 * 17 + 2] = 0;
        assert!(matches!(found().takes(&controller, &namespace), Err(NoCommands::Here(_))));
    }
}
