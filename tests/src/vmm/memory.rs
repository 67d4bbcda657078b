//! Guest memory: regions in memfds, which back ends map as well.
#![allow(unsafe_code)] // KVM is told host addresses

use std::ffi::CStr;
use std::fs::File;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::VmFd;
use nix::sys::memfd::{MFdFlags, memfd_create};
use vhost::VhostUserMemoryRegionInfo;
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{
    FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap,
};

/// What guest memory is made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Backing {
    /// Pages of 4 KiB.
    #[default]
    Pages,
    /// Pages of 2 MiB, of which the host must have some (`/proc/sys/vm/nr_hugepages`).
    HugePages,
}

/// The memory of one virtual machine.
#[derive(Debug, Default)]
pub struct Memory {
    map: GuestMemoryMmap,
    /// Start of the region in each slot of KVM, by slot; slots are used again.
    slots: Vec<Option<u64>>,
}

impl Memory {
    /// All of it, for reading and writing.
    pub fn map(&self) -> &GuestMemoryMmap {
        &self.map
    }

    /// Gives the guest `size` bytes at `start`.
    pub fn add(
        &mut self,
        vm: &VmFd,
        start: u64,
        size: u64,
        backing: Backing,
    ) -> Result<VhostUserMemoryRegionInfo> {
        let flags = match backing {
            Backing::Pages => MFdFlags::MFD_CLOEXEC,
            Backing::HugePages => MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_HUGETLB | MFdFlags::MFD_HUGE_2MB,
        };
        let name: &CStr = c"guest-memory";
        let file = File::from(memfd_create(name, flags).context("memfd")?);
        file.set_len(size)?;
        // SAFETY: the file is new, nothing else is mapped of it.
        let mapping = MmapRegionBuilder::new(size as usize)
            .with_file_offset(FileOffset::new(file, 0))
            .with_mmap_prot(nix::libc::PROT_READ | nix::libc::PROT_WRITE)
            .with_mmap_flags(nix::libc::MAP_SHARED | nix::libc::MAP_NORESERVE)
            .build()
            .context("guest memory cannot be mapped")?;
        let region =
            Arc::new(GuestRegionMmap::new(mapping, GuestAddress(start)).context("memory beyond 2^64")?);
        let map = self.map.insert_region(Arc::clone(&region)).context("guest memory overlaps")?;
        let slot = self.slots.iter().position(Option::is_none).unwrap_or_else(|| {
            self.slots.push(None);
            self.slots.len() - 1
        });
        set_slot(vm, slot, start, size, region.as_ptr() as u64)?;
        self.slots[slot] = Some(start);
        self.map = map;
        Ok(info(&region))
    }

    /// Takes the region at `start` away again. Back ends have let go of it before.
    pub fn remove(&mut self, vm: &VmFd, start: u64) -> Result<()> {
        let slot = self.slots.iter().position(|&s| s == Some(start)).context("no such memory region")?;
        let region = self.map.find_region(GuestAddress(start)).context("no such memory region")?;
        let size = region.len();
        set_slot(vm, slot, start, 0, 0)?;
        self.slots[slot] = None;
        self.map = self.map.remove_region(GuestAddress(start), size)?.0;
        Ok(())
    }

    /// What back ends are told of the region at `start`.
    pub fn describe(&self, start: u64) -> Result<VhostUserMemoryRegionInfo> {
        let region = self.map.find_region(GuestAddress(start)).context("no such memory region")?;
        ensure!(region.start_addr().0 == start, "no memory region begins at {start:#x}");
        Ok(info(region))
    }

    /// What back ends are told.
    pub fn describe_all(&self) -> Vec<VhostUserMemoryRegionInfo> {
        self.map.iter().map(info).collect()
    }
}

fn info(region: &GuestRegionMmap) -> VhostUserMemoryRegionInfo {
    VhostUserMemoryRegionInfo {
        guest_phys_addr: region.start_addr().0,
        memory_size: region.len(),
        userspace_addr: region.as_ptr() as u64,
        mmap_offset: 0,
        mmap_handle: region.file_offset().map_or(-1, |file| file.file().as_raw_fd()),
    }
}

/// KVM takes a slot away when its size is 0.
fn set_slot(vm: &VmFd, slot: usize, start: u64, size: u64, host: u64) -> Result<()> {
    let region = kvm_userspace_memory_region {
        slot: slot as u32,
        flags: 0,
        guest_phys_addr: start,
        memory_size: size,
        userspace_addr: host,
    };
    // SAFETY: the mapping is page-aligned, as long as `size`, and kept until the slot is taken away or the machine,
    // which owns both, is gone.
    unsafe { vm.set_user_memory_region(region) }.context("KVM_SET_USER_MEMORY_REGION")
}
