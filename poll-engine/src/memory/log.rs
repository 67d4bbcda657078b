//! The dirty log: which guest pages the device has written, told to the front end while it migrates the guest
//! (vhost-user, "Migration"). One bit for each page of guest-physical memory, in memory that the front end shares and
//! clears as it goes, so bits are set atomically, after the bytes they speak of and before the driver hears of them.
#![allow(unsafe_code)] // atomic access to mapped memory

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};

use super::map::{MemoryError, MemoryMap, Region, RegionSpec};
use super::slice::GuestSlice;

/// `VHOST_LOG_PAGE`: bytes that a bit stands for, whatever pages the host or the guest has.
pub const LOG_PAGE: u64 = 4096;

/// Why a dirty log cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    /// No bytes, or an offset that no file has.
    #[error("a dirty log of {size} bytes at offset {offset:#x} is empty or wraps around")]
    Empty {
        /// Bytes.
        size: u64,
        /// Where it begins in the shared file.
        offset: u64,
    },
    /// The shared file cannot be mapped.
    #[error("cannot map the dirty log: {0}")]
    Map(String),
    /// It has no bit for some of the guest's memory.
    #[error("a dirty log of {size} bytes ends below guest address {end:#x}: pages behind it would be lost")]
    Short {
        /// Bytes.
        size: u64,
        /// One past the last guest-physical address.
        end: u64,
    },
}

/// A mapped dirty log.
#[derive(Debug)]
pub struct DirtyLog {
    region: Region,
    /// Somebody wrote a page that has no bit.
    overrun: AtomicBool,
}

impl DirtyLog {
    /// Maps the log of `size` bytes that begins at `offset` in the file behind `fd`.
    pub fn map(fd: OwnedFd, offset: u64, size: u64) -> Result<DirtyLog, LogError> {
        let spec = RegionSpec { guest_addr: 0, size, user_addr: 0, mmap_offset: offset };
        let region = Region::map(spec, fd).map_err(|e| match e {
            MemoryError::BadRegion { .. } => LogError::Empty { size, offset },
            MemoryError::Map { reason, .. } => LogError::Map(reason),
            other => LogError::Map(other.to_string()),
        })?;
        Ok(DirtyLog { region, overrun: AtomicBool::new(false) })
    }

    /// The region that it was mapped from.
    pub fn region(&self) -> &Region {
        &self.region
    }

    /// Whether there is a bit for every page of `map`.
    pub fn check_covers(&self, map: &MemoryMap) -> Result<(), LogError> {
        let end = map.regions().iter().map(|r| r.spec().guest_addr + r.spec().size).max().unwrap_or(0);
        let size = self.region.spec().size;
        if end.div_ceil(LOG_PAGE).div_ceil(8) > size { Err(LogError::Short { size, end }) } else { Ok(()) }
    }

    /// Marks the pages of `len` bytes at guest-physical `addr`, which have just been written. Pages that the log has no
    /// bit for are left out (see [`take_overrun`](Self::take_overrun)).
    pub fn mark(&self, addr: u64, len: u64) {
        if len == 0 {
            return;
        }
        let pages = self.region.spec().size.saturating_mul(8);
        let first = addr / LOG_PAGE;
        let end = addr.saturating_add(len - 1) / LOG_PAGE + 1;
        if end > pages {
            self.overrun.store(true, Ordering::Relaxed);
        }
        let mut page = first;
        let end = end.min(pages);
        while page < end {
            // All bits of one byte at once.
            let here = (end - page).min(8 - page % 8);
            let bits = (((1u16 << here) - 1) as u8) << (page % 8);
            let byte = self.byte(page / 8);
            // Released, so that who takes the bit finds the bytes. No look first to save the write: what was read may
            // be on its way to being cleared.
            byte.fetch_or(bits, Ordering::AcqRel);
            page += here;
        }
    }

    /// Marks the pages of a slice of `map`.
    #[inline]
    pub(crate) fn mark_slice(&self, map: &MemoryMap, slice: &GuestSlice<'_>) {
        if let Some(addr) = map.guest_addr(slice.host_addr()) {
            self.mark(addr, slice.len() as u64);
        }
    }

    fn byte(&self, index: u64) -> &AtomicU8 {
        debug_assert!(index < self.region.spec().size);
        // SAFETY: the index is below the region's size (the callers' loop ends at its last page), the region is mapped
        // while self lives, and a byte is always aligned. Nothing but atomics of ours touches it; the front end may
        // write it at any moment, which atomics allow for.
        unsafe { AtomicU8::from_ptr(self.region.host_addr().add(index as usize)) }
    }

    /// Whether a page was written that the log has no bit for, since this was last asked: the front end's mistake,
    /// and its migration's end.
    pub fn take_overrun(&self) -> bool {
        self.overrun.load(Ordering::Relaxed) && self.overrun.swap(false, Ordering::Relaxed)
    }

    /// Whether the front end has taken the log's memory away.
    pub fn has_faulted(&self) -> bool {
        self.region.has_faulted()
    }
}

/// A part of a ring in the log: the guest-physical address that writes to it are told under.
#[derive(Clone, Debug)]
pub struct LoggedPart {
    /// Where to tell.
    pub log: Arc<DirtyLog>,
    /// Guest-physical address of the part's first byte (`log_guest_addr` for the used ring).
    pub guest_addr: u64,
}

impl LoggedPart {
    /// Marks `len` bytes at `offset` in the part, which have just been written.
    #[cold]
    pub fn wrote(&self, offset: u64, len: u64) {
        self.log.mark(self.guest_addr.saturating_add(offset), len);
    }
}

/// What a queue logs, and where.
#[derive(Clone, Debug)]
pub struct QueueLog {
    /// The log.
    pub log: Arc<DirtyLog>,
    /// Log what is written to buffers (`VHOST_F_LOG_ALL`).
    pub data: bool,
    /// Log what is written to the ring (`VHOST_VRING_F_LOG`), the used ring from this guest-physical address on.
    pub used: Option<u64>,
    /// Signalled when the driver is shown something, if the front end wants to hear of it (`SET_LOG_FD`).
    pub call: Option<Arc<OwnedFd>>,
}

impl QueueLog {
    /// How the ring's part for the device is logged.
    pub fn used_part(&self) -> Option<LoggedPart> {
        self.used.map(|guest_addr| LoggedPart { log: Arc::clone(&self.log), guest_addr })
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::memory::Ram;
    use proptest::prelude::*;

    fn log(offset: u64, size: u64) -> (DirtyLog, Ram) {
        let file = Ram::new(0, offset + size + 64, false).unwrap();
        (DirtyLog::map(file.fd().try_clone_to_owned().unwrap(), offset, size).unwrap(), file)
    }

    #[test]
    fn hostile_logs_are_refused() {
        let file = Ram::new(0, 1 << 16, false).unwrap();
        let fd = || file.fd().try_clone_to_owned().unwrap();
        assert!(matches!(DirtyLog::map(fd(), 0, 0), Err(LogError::Empty { .. })));
        assert!(matches!(DirtyLog::map(fd(), u64::MAX - 8, 64), Err(LogError::Empty { .. })));
        assert!(
            matches!(DirtyLog::map(fd(), 0, (1 << 16) + 1), Err(LogError::Map(_))),
            "longer than its file"
        );
        assert!(matches!(DirtyLog::map(fd(), 1 << 17, 64), Err(LogError::Map(_))), "behind its file");
        let eventfd = nix::sys::eventfd::EventFd::new().unwrap();
        assert!(matches!(DirtyLog::map(eventfd.into(), 0, 64), Err(LogError::Map(_))), "nothing to map");
        let sealed =
            nix::sys::memfd::memfd_create(c"log", nix::sys::memfd::MFdFlags::MFD_ALLOW_SEALING).unwrap();
        nix::unistd::ftruncate(&sealed, 4096).unwrap();
        nix::fcntl::fcntl(&sealed, nix::fcntl::FcntlArg::F_ADD_SEALS(nix::fcntl::SealFlag::F_SEAL_WRITE))
            .unwrap();
        assert!(matches!(DirtyLog::map(sealed, 0, 64), Err(LogError::Map(_))), "not writable");
    }

    #[test]
    fn a_log_has_a_bit_for_every_page_or_is_short() {
        let memory = Ram::new(0x10_0000, 9 * LOG_PAGE, false).unwrap();
        let pages = 0x10_0000 / LOG_PAGE + 9;
        assert!(log(0, pages.div_ceil(8)).0.check_covers(memory.map()).is_ok());
        assert!(matches!(
            log(0, pages.div_ceil(8) - 1).0.check_covers(memory.map()),
            Err(LogError::Short { end: 0x10_9000, .. })
        ));
    }

    proptest! {
        #[test]
        fn marks_are_those_of_a_model(
            offset in 0u64..5000,
            size in 1u64..64,
            writes in prop::collection::vec((0u64..(64 << 15) + 9000, 0u64..40_000), 1..20),
        ) {
            let (log, file) = log(offset, size);
            let mut model = vec![0u8; size as usize];
            let mut overrun = false;
            for (addr, len) in writes {
                log.mark(addr, len);
                for page in (addr..addr + len).map(|a| a / LOG_PAGE) {
                    match model.get_mut((page / 8) as usize) {
                        Some(byte) => *byte |= 1 << (page % 8),
                        None => overrun = true,
                    }
                }
            }
            let mut all = vec![0; (offset + size + 64) as usize];
            file.map().slice(0, all.len() as u32).unwrap().read(&mut all);
            let (before, rest) = all.split_at(offset as usize);
            prop_assert_eq!(&rest[..size as usize], &model[..]);
            prop_assert!(before.iter().chain(&rest[size as usize..]).all(|&b| b == 0), "outside of the log");
            prop_assert_eq!(log.take_overrun(), overrun);
            log.mark(u64::MAX, 1);
            log.mark(u64::MAX - 5, u64::MAX);
        }
    }
}
