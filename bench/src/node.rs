//! A device on the vDPA bus, through its `/dev/vhost-vdpa-N`: whoever has made it, a VDUSE process, a network card or the
//! kernel's simulators. The calls are the `vhost` crate's, but for one.
#![allow(unsafe_code)] // one ioctl

use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result, anyhow, bail, ensure};
use nix::errno::Errno;
use poll_engine::device::features;
use poll_engine::memory::{Ram, RegionSpec};
use poll_engine::ring::RingConfig;
use vhost::vdpa::VhostVdpa;
use vhost::vhost_kern::VhostKernFeatures;
use vhost::vhost_kern::vdpa::VhostKernVdpa;
use vhost::{VhostBackend, VringConfigData};
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::ioctl::ioctl_with_ref;

use crate::back_end::BackEnd;

/// `VIRTIO_ID_NET` and `VIRTIO_ID_BLOCK`.
pub const NET: u32 = 1;
/// See [`NET`].
pub const BLOCK: u32 = 2;

/// Device status (virtio 1.3, 2.1).
const ACKNOWLEDGE: u8 = 1;
const DRIVER: u8 = 2;
const DRIVER_OK: u8 = 4;
const FEATURES_OK: u8 = 8;

/// `VHOST_BACKEND_F_IOTLB_MSG_V2`.
const IOTLB_MSG_V2: u64 = 1 << 1;
/// `VHOST_SET_VRING_BASE`, whose number the crate has in 16 bits: a packed ring's takes 32.
const SET_VRING_BASE: u64 = 0x4008_af12;

/// `struct vhost_vring_state`.
#[repr(C)]
struct VringState {
    index: u32,
    num: u32,
}

/// The calls of the crate; it needs no memory of its own for them.
type Kernel = VhostKernVdpa<Arc<GuestMemoryMmap<()>>>;

/// An open node.
pub struct Node {
    kernel: Kernel,
    device: u32,
    /// What is mapped for the device.
    memory: Option<RegionSpec>,
}

/// Whether this is a node, and not a socket.
pub fn is_node(path: &Path) -> bool {
    std::fs::metadata(path).is_ok_and(|about| about.file_type().is_char_device())
}

impl Node {
    /// Opens one that must be of a `device` of this kind.
    pub fn open(path: &Path, device: u32) -> Result<Node> {
        let path_shown = path.display();
        let flags = nix::libc::O_CLOEXEC | nix::libc::O_NONBLOCK;
        let file = OpenOptions::new().read(true).write(true).custom_flags(flags).open(path);
        let file = file.map_err(|e| {
            anyhow!(match e.kind() {
                io::ErrorKind::ResourceBusy => format!("{path_shown} is in use by another process"),
                io::ErrorKind::PermissionDenied =>
                    format!("cannot open {path_shown}: {e}; run this as root, or give yourself access to it"),
                _ => format!("cannot open {path_shown}: {e}"),
            })
        })?;
        let kernel = Kernel::with(file, Arc::default(), 0);
        match kernel.get_device_id() {
            Ok(id) if id == device => Ok(Node { kernel, device, memory: None }),
            Ok(NET) => bail!("{path_shown} is a network card; vbench net drives those"),
            Ok(BLOCK) => bail!("{path_shown} is a disk; vbench run drives those"),
            Ok(id) => bail!("{path_shown} is a device of kind {id}, neither a disk nor a network card"),
            Err(e) => bail!("{path_shown} is no vhost-vdpa node: {e}"),
        }
    }

    fn add_status(&self, bit: u8) -> Result<()> {
        let status = self.kernel.get_status()? | bit;
        self.kernel.set_status(status)?;
        ensure!(self.kernel.get_status()? & bit != 0, "the device does not take status {status:#x}");
        Ok(())
    }
}

impl BackEnd for Node {
    fn needs(&self) -> (u64, &'static str) {
        (features::ACCESS_PLATFORM, "VIRTIO_F_ACCESS_PLATFORM")
    }

    fn offered(&mut self) -> Result<u64> {
        self.kernel.set_owner()?;
        self.kernel.set_status(0)?;
        self.add_status(ACKNOWLEDGE)?;
        self.add_status(DRIVER)?;
        Ok(self.kernel.get_features()?)
    }

    fn accept(&mut self, features: u64) -> Result<()> {
        let of_kernel = self.kernel.get_backend_features()?;
        ensure!(of_kernel & IOTLB_MSG_V2 != 0, "the kernel takes no mappings (no IOTLB_MSG_V2)");
        self.kernel.set_backend_features(IOTLB_MSG_V2)?;
        self.kernel.set_features(features)?;
        self.add_status(FEATURES_OK)
    }

    fn num_queues(&mut self) -> Result<u64> {
        Ok(match self.device {
            // Of pairs: further ones are there for drivers that ask for them in the control queue.
            NET => 1,
            _ => self.kernel.get_vqs_count()?.into(),
        })
    }

    fn config(&mut self, len: u32) -> Result<Vec<u8>> {
        let mut bytes = vec![0; len as usize];
        self.kernel.get_config(0, &mut bytes)?;
        Ok(bytes)
    }

    fn share(&mut self, ram: &Ram) -> Result<()> {
        let spec = ram.spec();
        let range = self.kernel.get_iova_range()?;
        let last = spec.guest_addr + (spec.size - 1);
        ensure!(
            range.first <= spec.guest_addr && last <= range.last,
            "the device reaches addresses {:#x} to {:#x} only, not {:#x} to {last:#x}",
            range.first,
            range.last,
            spec.guest_addr
        );
        self.kernel.dma_map(spec.guest_addr, spec.size, spec.user_addr as *const u8, false)?;
        self.memory = Some(spec);
        Ok(())
    }

    fn record(&mut self, _: u16, _: u16) -> Result<()> {
        bail!("requests in flight are recorded for vhost-user's front ends only; run without --inflight")
    }

    fn set_up(&mut self, index: usize, config: &RingConfig, (kick, call): &(EventFd, EventFd)) -> Result<()> {
        let most = self.kernel.get_vring_num()?;
        ensure!(config.size <= most.into(), "it has at most {most}");
        self.kernel.set_vring_num(index, config.size as u16)?;
        let base = VringState { index: index as u32, num: config.base };
        // SAFETY: the kernel reads a structure of this type, which lives until it returns.
        Errno::result(unsafe { ioctl_with_ref(&self.kernel, SET_VRING_BASE, &base) })?;
        // Of the device's address space, not of ours.
        let memory = self.memory.context("no memory is mapped")?;
        let iova = |addr: u64| addr - memory.user_addr + memory.guest_addr;
        let addresses = VringConfigData {
            queue_max_size: most,
            queue_size: config.size as u16,
            flags: 0,
            desc_table_addr: iova(config.desc_addr),
            used_ring_addr: iova(config.used_addr),
            avail_ring_addr: iova(config.avail_addr),
            log_addr: None,
        };
        self.kernel.set_vring_addr(index, &addresses)?;
        self.kernel.set_vring_call(index, call)?;
        self.kernel.set_vring_kick(index, kick)?;
        Ok(self.kernel.set_vring_enable(index, true)?)
    }

    fn start(&mut self) -> Result<()> {
        self.add_status(DRIVER_OK)
    }

    fn fd(&self) -> RawFd {
        self.kernel.as_raw_fd()
    }
}
