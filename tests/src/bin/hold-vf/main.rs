//! Holds a VF through VFIO, as a virtual machine would: `hold-vf GROUP ADDRESS`, until it is ended.

#![allow(unsafe_code)] // VFIO's ioctls
#![allow(missing_docs)] // functions that are made by macros

use std::fs::OpenOptions;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::time::Duration;

use anyhow::{Context, Result};
use nix::libc::c_char;

// include/uapi/linux/vfio.h: VFIO_TYPE ';', VFIO_BASE 100.
nix::ioctl_write_int_bad!(vfio_set_iommu, nix::request_code_none!(b';', 102));
nix::ioctl_write_ptr_bad!(vfio_group_set_container, nix::request_code_none!(b';', 104), i32);
nix::ioctl_write_ptr_bad!(vfio_group_get_device_fd, nix::request_code_none!(b';', 106), c_char);

const VFIO_TYPE1V2_IOMMU: i32 = 3;

fn main() -> Result<()> {
    let mut args = std::env::args().skip(1);
    let (group, address) = (args.next().context("GROUP")?, args.next().context("ADDRESS")?);
    let open = |path: String| OpenOptions::new().read(true).write(true).open(&path).context(path);
    let container = open("/dev/vfio/vfio".into())?;
    let group = open(format!("/dev/vfio/{group}"))?;
    let number = container.as_raw_fd();
    // SAFETY: the descriptors are open, and the kernel reads one number.
    unsafe { vfio_group_set_container(group.as_raw_fd(), &raw const number) }.context("container")?;
    // SAFETY: the descriptor is open; the argument is a number.
    unsafe { vfio_set_iommu(number, VFIO_TYPE1V2_IOMMU) }.context("IOMMU")?;
    let name = std::ffi::CString::new(address)?;
    // SAFETY: the descriptor is open, and the kernel reads a string that ends with NUL.
    let device = unsafe { vfio_group_get_device_fd(group.as_raw_fd(), name.as_ptr()) }.context("device")?;
    // SAFETY: the kernel has just made this descriptor for us.
    let _device = unsafe { OwnedFd::from_raw_fd(device) };
    println!("held");
    std::thread::sleep(Duration::from_secs(600));
    Ok(())
}
