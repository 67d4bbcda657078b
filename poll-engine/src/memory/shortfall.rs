//! What to say when memory is short: how much is needed, and how to have it.

use std::fs;
use std::path::Path;

use nix::sys::resource::{Resource, getrlimit};

const MIB: u64 = 1 << 20;

/// How many bytes this process may lock, if there is a limit and it may be known.
pub fn memlock_limit() -> Option<u64> {
    getrlimit(Resource::RLIMIT_MEMLOCK).ok().map(|(soft, _)| soft).filter(|&soft| soft != libc::RLIM_INFINITY)
}

/// The limit of locked memory is `limit`, and `needed` bytes have to be locked.
pub fn locked(needed: u64, limit: Option<u64>) -> String {
    let mib = needed.div_ceil(MIB);
    let now = limit.map_or_else(String::new, |limit| format!(" and is {} KiB", limit >> 10));
    format!(
        "the memlock limit has to be {mib} MiB{now}: set LimitMEMLOCK={mib}M in the unit, or ulimit -l {}",
        mib * 1024
    )
}

/// There are not enough huge pages of `page` bytes for `needed` bytes; `root` is where sysfs is.
pub fn huge_pages(root: &Path, needed: u64, page: u64) -> String {
    let pages = needed.div_ceil(page);
    let dir = format!("kernel/mm/hugepages/hugepages-{}kB", page >> 10);
    let number = |name: &str| -> Option<u64> {
        fs::read_to_string(root.join(&dir).join(name)).ok()?.trim().parse().ok()
    };
    let counts = (number("nr_hugepages"), number("free_hugepages"), number("resv_hugepages"));
    let needs = format!("it needs {pages} huge pages of {} KiB", page >> 10);
    let (Some(all), Some(free), Some(promised)) = counts else { return needs };
    let free = free.saturating_sub(promised);
    format!(
        "{needs} and {free} are free: echo {} > /sys/{dir}/nr_hugepages",
        all + pages.saturating_sub(free)
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_are_those_that_are_needed() {
        assert_eq!(
            locked(MIB + 1, Some(64 << 10)),
            "the memlock limit has to be 2 MiB and is 64 KiB: set LimitMEMLOCK=2M in the unit, or ulimit -l 2048"
        );
        assert_eq!(
            locked(4 * MIB, None),
            "the memlock limit has to be 4 MiB: set LimitMEMLOCK=4M in the unit, or ulimit -l 4096"
        );
        let root = tempfile::tempdir().unwrap();
        assert_eq!(huge_pages(root.path(), 5 * MIB, 2 * MIB), "it needs 3 huge pages of 2048 KiB");
        let dir = root.path().join("kernel/mm/hugepages/hugepages-2048kB");
        fs::create_dir_all(&dir).unwrap();
        for (name, count) in [("nr_hugepages", 10), ("free_hugepages", 4), ("resv_hugepages", 3)] {
            fs::write(dir.join(name), format!("{count}\n")).unwrap();
        }
        assert_eq!(
            huge_pages(root.path(), 5 * MIB, 2 * MIB),
            "it needs 3 huge pages of 2048 KiB and 1 are free: \
             echo 12 > /sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages"
        );
    }
}
