//! CPU lists and pinning.

use std::collections::BTreeSet;
use std::str::FromStr;

use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::unistd::Pid;

/// CPUs in the kernel's list format: `0`, `1,3`, `2-5`, `0-3,8`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CpuList(pub Vec<usize>);

impl FromStr for CpuList {
    type Err = String;

    fn from_str(s: &str) -> Result<CpuList, String> {
        let number = |n: &str| {
            n.trim()
                .parse::<usize>()
                .map_err(|_| format!("'{n}' is no CPU number (write a list such as 0,2-3)"))
        };
        let mut cpus = BTreeSet::new();
        for part in s.split(',') {
            let (first, last) = match part.split_once('-') {
                Some((a, b)) => (number(a)?, number(b)?),
                None => (number(part)?, number(part)?),
            };
            if last < first || last >= CpuSet::count() {
                return Err(format!("'{part}' is no range of CPUs"));
            }
            cpus.extend(first..=last);
        }
        Ok(CpuList(cpus.into_iter().collect()))
    }
}

/// CPUs this process may run on.
pub fn usable_cpus() -> nix::Result<Vec<usize>> {
    let set = sched_getaffinity(Pid::from_raw(0))?;
    Ok((0..CpuSet::count()).filter(|&cpu| set.is_set(cpu).unwrap_or(false)).collect())
}

/// Pins the calling thread.
pub fn pin_to(cpu: usize) -> nix::Result<()> {
    let mut set = CpuSet::new();
    set.set(cpu)?;
    sched_setaffinity(Pid::from_raw(0), &set)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_are_read_as_the_kernel_writes_them() {
        assert_eq!("0".parse(), Ok(CpuList(vec![0])));
        assert_eq!("3,1".parse(), Ok(CpuList(vec![1, 3])));
        assert_eq!("0-2,8".parse(), Ok(CpuList(vec![0, 1, 2, 8])));
        for bad in ["", "x", "2-1", "1,,2", "-", "99999999"] {
            assert!(bad.parse::<CpuList>().is_err(), "{bad}");
        }
    }
}
