//! What KVM counts of a CPU (`KVM_GET_STATS_FD`).
#![allow(unsafe_code)] // an ioctl that kvm-ioctls does not have

use std::collections::BTreeMap;
use std::fs::File;
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::fs::FileExt;

use anyhow::{Context, Result};
use kvm_bindings::kvm_stats_header;

mod ioctl {
    nix::ioctl_write_int_bad!(
        /// `KVM_GET_STATS_FD`.
        kvm_get_stats_fd,
        nix::request_code_none!(kvm_bindings::KVMIO, 0xce)
    );
}

/// `struct kvm_stats_desc` without its name: flags, exponent, size, offset, bucket size.
const DESC: usize = 16;

/// The statistics of one CPU. They can be read while it runs, and after.
#[derive(Debug)]
pub struct CpuStats {
    file: File,
    /// Names and offsets.
    fields: Vec<(String, u64)>,
}

impl CpuStats {
    /// Those of `vcpu`.
    pub fn of(vcpu: &impl AsRawFd) -> Result<CpuStats> {
        // SAFETY: the ioctl takes no argument and returns a descriptor of its own, which nobody else has.
        let file = unsafe {
            let fd = ioctl::kvm_get_stats_fd(vcpu.as_raw_fd(), 0).context("KVM_GET_STATS_FD (Linux 5.14)")?;
            File::from_raw_fd(fd)
        };
        let word = |at: u64| {
            let mut bytes = [0; 4];
            file.read_exact_at(&mut bytes, at)?;
            Ok::<_, std::io::Error>(u64::from(u32::from_ne_bytes(bytes)))
        };
        let at = |field: usize| field as u64;
        let name_size = word(at(std::mem::offset_of!(kvm_stats_header, name_size)))?;
        let count = word(at(std::mem::offset_of!(kvm_stats_header, num_desc)))?;
        let descriptors = word(at(std::mem::offset_of!(kvm_stats_header, desc_offset)))?;
        let data = word(at(std::mem::offset_of!(kvm_stats_header, data_offset)))?;
        let mut fields = Vec::new();
        for i in 0..count {
            let descriptor = descriptors + i * (DESC as u64 + name_size);
            let mut name = vec![0; name_size as usize];
            file.read_exact_at(&mut name, descriptor + DESC as u64)?;
            let name = name.split(|&b| b == 0).next().unwrap_or_default();
            fields.push((String::from_utf8_lossy(name).into_owned(), data + word(descriptor + 8)?));
        }
        Ok(CpuStats { file, fields })
    }

    /// All of them; of histograms the first number.
    pub fn read(&self) -> Result<BTreeMap<String, u64>> {
        let value = |(name, at): &(String, u64)| {
            let mut bytes = [0; 8];
            self.file.read_exact_at(&mut bytes, *at)?;
            Ok((name.clone(), u64::from_ne_bytes(bytes)))
        };
        self.fields.iter().map(value).collect()
    }
}
