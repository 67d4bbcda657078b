//! The command line, where PVH leaves it.

use core::ffi::CStr;
use core::{ptr, slice};

/// `struct hvm_start_info` (xen/include/public/arch-x86/hvm/start_info.h): its first word, and where in it the
/// address of the command line is.
const START_MAGIC: u32 = 0x336e_c578;
const CMDLINE_PADDR: usize = 24;
/// Bytes a command line may have.
const LONGEST: usize = 4096;

/// The command line; empty where there is none.
pub fn of(start_info: usize) -> &'static str {
    let at = ptr::with_exposed_provenance::<u8>(start_info);
    if at.is_null() {
        return "";
    }
    // SAFETY: the loader left the structure there; nothing of it is written to.
    let line = unsafe {
        if at.cast::<u32>().read_unaligned() != START_MAGIC {
            return "";
        }
        let line = at.add(CMDLINE_PADDR).cast::<u64>().read_unaligned() as usize;
        if line == 0 {
            return "";
        }
        slice::from_raw_parts(ptr::with_exposed_provenance(line), LONGEST)
    };
    CStr::from_bytes_until_nul(line).ok().and_then(|line| line.to_str().ok()).unwrap_or("")
}

/// The number behind `key`.
pub fn value(line: &str, key: &str) -> Option<u64> {
    line.split_ascii_whitespace().find_map(|word| word.strip_prefix(key)).and_then(number)
}

/// Base address and interrupt line of each `virtio_mmio.device=SIZE@BASE:LINE`, as Linux takes it.
pub fn devices(line: &str) -> impl Iterator<Item = (usize, u32)> {
    line.split_ascii_whitespace().filter_map(|word| {
        let (_, place) = word.strip_prefix("virtio_mmio.device=")?.split_once('@')?;
        let mut parts = place.split(':');
        Some((number(parts.next()?)? as usize, number(parts.next()?)? as u32))
    })
}

fn number(text: &str) -> Option<u64> {
    match text.strip_prefix("0x") {
        Some(hex) => u64::from_str_radix(hex, 16).ok(),
        None => text.parse().ok(),
    }
}
