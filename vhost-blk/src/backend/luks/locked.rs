//! Memory for keys: never swapped out, in no core dump, wiped when it is given back.
#![allow(unsafe_code)] // pages of its own, as bytes

use std::fmt;
use std::io;
use std::num::NonZero;
use std::ptr::NonNull;

use nix::libc::c_void;
use nix::sys::mman::{MapFlags, MmapAdvise, ProtFlags, madvise, mlock, mmap_anonymous, munmap};
use zeroize::Zeroize;

/// Bytes in pages of their own.
pub struct Locked {
    at: NonNull<c_void>,
    len: usize,
}

// SAFETY: the pages belong to this value alone, whatever thread it is on.
unsafe impl Send for Locked {}
// SAFETY: shared, it is only read.
unsafe impl Sync for Locked {}

impl Locked {
    /// `len` bytes of zeros.
    ///
    /// # Errors
    /// No memory, or none that may be locked (`RLIMIT_MEMLOCK`).
    pub fn zeroed(len: usize) -> io::Result<Locked> {
        let size = NonZero::new(len).ok_or(io::ErrorKind::InvalidInput)?;
        let rights = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: new pages, wherever the kernel likes.
        let at = unsafe { mmap_anonymous(None, size, rights, MapFlags::MAP_PRIVATE) }?;
        // From here on, its drop unmaps them.
        let locked = Locked { at, len };
        // SAFETY: the pages just mapped, of which nobody else knows.
        unsafe {
            mlock(at, len)?;
            madvise(at, len, MmapAdvise::MADV_DONTDUMP)?;
        }
        Ok(locked)
    }

    /// All of it.
    pub fn bytes(&self) -> &[u8] {
        // SAFETY: `len` bytes are mapped for as long as this lives, and were zeros to begin with.
        unsafe { std::slice::from_raw_parts(self.at.as_ptr().cast(), self.len) }
    }

    /// All of it, to be written to.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `bytes`, and nobody else has it now.
        unsafe { std::slice::from_raw_parts_mut(self.at.as_ptr().cast(), self.len) }
    }
}

impl Drop for Locked {
    fn drop(&mut self) {
        self.bytes_mut().zeroize();
        // SAFETY: mapped by `zeroed`, used by nobody any more. Locks go with the pages.
        let _ = unsafe { munmap(self.at, self.len) };
    }
}

/// Never what is in it.
impl fmt::Debug for Locked {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "({} bytes)", self.len)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What the kernel says of the mapping around this address (proc(5), smaps).
    fn flags(of: &Locked) -> String {
        let smaps = std::fs::read_to_string("/proc/self/smaps").unwrap();
        let at = of.at.as_ptr().addr();
        let mut inside = false;
        for line in smaps.lines() {
            let range = line.split(' ').next().and_then(|range| range.split_once('-'));
            if let Some((Ok(from), Ok(to))) =
                range.map(|(from, to)| (usize::from_str_radix(from, 16), usize::from_str_radix(to, 16)))
            {
                inside = (from..to).contains(&at);
            } else if inside && line.starts_with("VmFlags:") {
                return line.to_owned() + " ";
            }
        }
        panic!("not mapped");
    }

    #[test]
    fn it_is_neither_swapped_nor_dumped_nor_shown() {
        let mut secret = Locked::zeroed(64).unwrap();
        secret.bytes_mut().copy_from_slice(&[b'q'; 64]);
        let flags = flags(&secret);
        assert!(flags.contains(" lo ") && flags.contains(" dd "), "{flags}");
        assert_eq!(format!("{secret:?}"), "(64 bytes)");
        assert!(Locked::zeroed(0).is_err());
    }
}
