//! Memory that its owner takes away: a front end that truncates the file behind a region makes every access to it a
//! SIGBUS. The fault is caught, the region is replaced by zeros of our own, and it is marked, so that its queues can be
//! stopped; nobody else notices.
#![allow(unsafe_code)] // a signal handler, and mmap from inside it

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Once;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU64, AtomicUsize, Ordering};

use nix::sys::memfd::{MFdFlags, memfd_create};
use vm_memory::FileOffset;

/// Most regions of this process: a full table for each of 257 guests. A region beyond these is refused; one that was
/// used unguarded could end the process. 4 MiB, of which only what is used is ever touched.
const SLOTS: usize = 1 << 17;

const PAGE: usize = 4096;

struct Slot {
    /// First address; 0 when free.
    start: AtomicUsize,
    len: AtomicUsize,
    /// Where the memory begins in its file.
    offset: AtomicU64,
    /// 0, or, once we have taken the memory away ourselves, its file's descriptor and 1.
    taken: AtomicI32,
    faulted: AtomicBool,
}

static TABLE: [Slot; SLOTS] = [const {
    Slot {
        start: AtomicUsize::new(0),
        len: AtomicUsize::new(0),
        offset: AtomicU64::new(0),
        taken: AtomicI32::new(0),
        faulted: AtomicBool::new(false),
    }
}; SLOTS];

/// Slots ever used: what the handler has to look through.
static USED: AtomicUsize = AtomicUsize::new(0);
/// Faults caught since the process began.
static FAULTS: AtomicUsize = AtomicUsize::new(0);

/// Faults caught since the process began: a change is the sign to look for a region that [`Guard::has_faulted`].
#[inline]
pub fn faults() -> usize {
    FAULTS.load(Ordering::Relaxed)
}

/// A guarded range of addresses; dropped before they are unmapped.
#[derive(Debug)]
pub struct Guard(usize);

impl Guard {
    /// Guards `len` bytes at `start`, a whole mapping. `None` when as many are guarded as can be.
    pub fn new(start: usize, len: usize) -> Option<Guard> {
        static INSTALL: Once = Once::new();
        INSTALL.call_once(install);
        let claim =
            |slot: &Slot| slot.start.compare_exchange(0, start, Ordering::AcqRel, Ordering::Relaxed).is_ok();
        let i = TABLE.iter().position(claim)?;
        TABLE[i].faulted.store(false, Ordering::Relaxed);
        TABLE[i].taken.store(0, Ordering::Relaxed);
        TABLE[i].len.store(len, Ordering::Release);
        USED.fetch_max(i + 1, Ordering::AcqRel);
        Some(Guard(i))
    }

    /// Takes the memory away ourselves, the whole mapping, which is of `file`: the kernel's accesses to it fail from now
    /// on, I/O that is under way included, and those of our threads find a page of it at a time: as it is in the file, or
    /// zeros where the file has nothing. Never zeros for I/O on pages that nobody else touches: those would get into a
    /// disk.
    pub(super) fn take_away(&self, file: &FileOffset) -> io::Result<()> {
        let slot = &TABLE[self.0];
        let nothing = memfd_create(c"taken", MFdFlags::MFD_CLOEXEC)?;
        slot.offset.store(file.start(), Ordering::Relaxed);
        slot.taken.store(file.file().as_raw_fd() + 1, Ordering::Release);
        let (start, len) = (slot.start.load(Ordering::Acquire), slot.len.load(Ordering::Acquire));
        // Behind the end of a file, every access is SIGBUS, or EFAULT in the kernel.
        // SAFETY: the range is a whole mapping of the Region that owns this guard.
        unsafe { map_over(start, len, libc::MAP_SHARED, nothing.as_raw_fd(), 0)? };
        slot.faulted.store(true, Ordering::Release);
        FAULTS.fetch_add(1, Ordering::AcqRel);
        Ok(())
    }

    /// Whether some of the memory was found to be gone.
    pub fn has_faulted(&self) -> bool {
        TABLE[self.0].faulted.load(Ordering::Acquire)
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        TABLE[self.0].len.store(0, Ordering::Release);
        TABLE[self.0].start.store(0, Ordering::Release);
    }
}

fn install() {
    // SAFETY: the handler keeps to async-signal-safe calls (signal-safety(7)): atomics, mmap, sigaction.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction =
            on_sigbus as extern "C" fn(i32, *mut libc::siginfo_t, *mut libc::c_void) as usize;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_NODEFER | libc::SA_ONSTACK;
        libc::sigemptyset(&raw mut action.sa_mask);
        let installed = libc::sigaction(libc::SIGBUS, &raw const action, std::ptr::null_mut());
        assert_eq!(installed, 0, "SIGBUS can be handled");
    }
}

extern "C" fn on_sigbus(_signal: i32, info: *mut libc::siginfo_t, _context: *mut libc::c_void) {
    // SAFETY: the kernel passes a valid siginfo to an SA_SIGINFO handler.
    let at = unsafe { (*info).si_addr() }.addr();
    if !replace(at) {
        // Not guest memory: a fault of our own, which is to end the process as it always would.
        // SAFETY: as in `install`; the instruction is then run again and faults again.
        unsafe {
            libc::signal(libc::SIGBUS, libc::SIG_DFL);
        }
    }
}

/// Puts zeros in the place of the region that `at` faulted in; false when that is no guarded memory. All of the region:
/// page by page, a guest could have it cut into more mappings than a process may have.
fn replace(at: usize) -> bool {
    let used = USED.load(Ordering::Acquire);
    for slot in &TABLE[..used] {
        let (start, len) = (slot.start.load(Ordering::Acquire), slot.len.load(Ordering::Acquire));
        if start == 0 || at.wrapping_sub(start) >= len {
            continue;
        }
        let zeros = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        let fd = slot.taken.load(Ordering::Acquire) - 1;
        let page = at & !(PAGE - 1);
        // SAFETY: the ranges are in the mapping that a Region owns and that only Regions touch; whatever points into it
        // finds other memory there from now on.
        let mapped = unsafe {
            let one = (fd >= 0).then(|| {
                let offset =
                    slot.offset.load(Ordering::Relaxed) as libc::off_t + (page - start) as libc::off_t;
                if libc::lseek(fd, offset, libc::SEEK_DATA) == offset
                    && map_over(page, PAGE, libc::MAP_SHARED, fd, offset).is_ok()
                {
                    return Ok(());
                }
                map_over(page, PAGE, zeros, -1, 0)
            });
            one.filter(Result::is_ok).unwrap_or_else(|| map_over(start, len, zeros, -1, 0))
        };
        slot.faulted.store(true, Ordering::Release);
        FAULTS.fetch_add(1, Ordering::AcqRel);
        return mapped.is_ok();
    }
    false
}

/// # Safety
/// The range must be memory that may become other memory.
unsafe fn map_over(at: usize, len: usize, kind: i32, fd: RawFd, offset: libc::off_t) -> io::Result<()> {
    let at = std::ptr::without_provenance_mut(at);
    let (protection, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_FIXED | libc::MAP_NORESERVE);
    // SAFETY: the caller vouches for the range.
    let mapped = unsafe { libc::mmap(at, len, protection, kind | flags, fd, offset) };
    if mapped == libc::MAP_FAILED { Err(io::Error::last_os_error()) } else { Ok(()) }
}
