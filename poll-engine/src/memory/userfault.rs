//! Memory that comes after its guest: whoever touches a page that is not there yet waits until the front end has brought
//! it (userfaultfd(2), as post-copy migration uses it).
#![allow(unsafe_code)] // userfaultfd(2) and its ioctls

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::sync::OnceLock;

use linux_raw_sys::general::{
    UFFD_API, UFFD_FEATURE_MISSING_HUGETLBFS, UFFD_FEATURE_MISSING_SHMEM, UFFDIO_REGISTER_MODE_MISSING,
    uffdio_api, uffdio_range, uffdio_register,
};
use linux_raw_sys::ioctl::{UFFDIO_API, UFFDIO_REGISTER, UFFDIO_UNREGISTER, UFFDIO_WAKE};
use tracing::info;

use super::map::Region;

/// `USERFAULTFD_IOC_NEW` of /dev/userfaultfd.
const USERFAULTFD_IOC_NEW: libc::Ioctl = 0xaa00;
const FLAGS: libc::c_int = libc::O_CLOEXEC | libc::O_NONBLOCK;

/// A userfaultfd for faults in user and kernel mode: io_uring touches guest memory in the kernel.
#[derive(Debug)]
pub struct Userfault(OwnedFd);

/// `/dev/userfaultfd`, if it could be opened.
static DEVICE: OnceLock<Option<File>> = OnceLock::new();

/// Keeps the device open for later, when this process may open nothing any more.
pub fn keep_device() -> Option<&'static File> {
    let open = || File::options().read(true).write(true).open("/dev/userfaultfd").ok();
    DEVICE.get_or_init(open).as_ref()
}

/// Whether there are such things here. Says why not, once.
pub fn is_available() -> bool {
    static AVAILABLE: OnceLock<bool> = OnceLock::new();
    *AVAILABLE.get_or_init(|| match Userfault::new() {
        Ok(_) => true,
        Err(e) => {
            info!(
                "post-copy migration is not offered: no userfaultfd for faults in the kernel ({e}); \
                 it takes access to /dev/userfaultfd, vm.unprivileged_userfaultfd=1, or CAP_SYS_PTRACE without a sandbox"
            );
            false
        }
    })
}

impl Userfault {
    /// A new one, which watches nothing.
    pub fn new() -> io::Result<Userfault> {
        let new = Userfault(open()?);
        let mut api = uffdio_api {
            api: UFFD_API.into(),
            features: u64::from(UFFD_FEATURE_MISSING_SHMEM | UFFD_FEATURE_MISSING_HUGETLBFS),
            ioctls: 0,
        };
        new.ioctl(UFFDIO_API, &mut api)?;
        Ok(new)
    }

    /// Has whoever touches a missing page of this region wait, from now on.
    pub(super) fn register(&self, region: &Region) -> io::Result<()> {
        let mode = u64::from(UFFDIO_REGISTER_MODE_MISSING);
        self.ioctl(UFFDIO_REGISTER, &mut uffdio_register { range: range(region), mode, ioctls: 0 })
    }

    /// The reverse of [`register`](Self::register). Whoever waits goes on, with zeros where nothing is.
    pub(super) fn unregister(&self, region: &Region) -> io::Result<()> {
        self.ioctl(UFFDIO_UNREGISTER, &mut range(region))
    }

    /// Has whoever waits for a page of this region look again.
    pub(super) fn wake(&self, region: &Region) -> io::Result<()> {
        self.ioctl(UFFDIO_WAKE, &mut range(region))
    }

    fn ioctl<T>(&self, request: u32, argument: &mut T) -> io::Result<()> {
        // SAFETY: the callers pass the structure that the request takes, which changes no memory but that: it arms ranges of
        // guest memory, which is accessed as what others may change at any time.
        let done = unsafe { libc::ioctl(self.0.as_raw_fd(), request.into(), std::ptr::from_mut(argument)) };
        if done < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }
}

impl AsFd for Userfault {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

fn range(region: &Region) -> uffdio_range {
    let pages = region.pages();
    uffdio_range { start: pages.start as u64, len: pages.len() as u64 }
}

fn open() -> io::Result<OwnedFd> {
    // SAFETY: the call takes flags only.
    let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, FLAGS) };
    if fd >= 0 {
        // SAFETY: the kernel has just made it for us.
        return Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) });
    }
    let refused = io::Error::last_os_error();
    // Those who may not make the call may have been given the device.
    let Some(device) = keep_device() else { return Err(refused) };
    // SAFETY: the request takes flags only.
    let fd = unsafe { libc::ioctl(device.as_raw_fd(), USERFAULTFD_IOC_NEW, FLAGS) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: as above.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}
