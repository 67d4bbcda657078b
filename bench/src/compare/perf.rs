//! Hardware counters of a back end's threads, where there are any; most virtual machines have none.

use std::fmt::Display;
use std::io;

use anyhow::{Result, anyhow};
use perf_event::events::Hardware;
use perf_event::{Builder, Counter};

use super::host;

const WHAT: [Hardware; 3] = [Hardware::CPU_CYCLES, Hardware::INSTRUCTIONS, Hardware::CACHE_MISSES];

/// Counters that run.
#[derive(Debug)]
pub struct Counters {
    threads: Vec<[Counter; 3]>,
}

/// Cycles, instructions and cache misses.
pub type Counts = [u64; 3];

impl Counters {
    /// Starts counting all threads of a process; fails with the reason where that is not possible.
    pub fn start(pid: u32) -> Result<Counters> {
        let mut threads = Vec::new();
        for task in host::threads(pid)? {
            let tid = task.file_name().and_then(|n| n.to_str()).and_then(|n| n.parse().ok());
            let Some(tid) = tid else { continue };
            let of_thread = |what: Hardware| open(what, tid);
            match (of_thread(WHAT[0]), of_thread(WHAT[1]), of_thread(WHAT[2])) {
                (Ok(a), Ok(b), Ok(c)) => threads.push([a, b, c]),
                (Err(e), ..) | (_, Err(e), _) | (.., Err(e)) => return Err(anyhow!(reason(&e))),
            }
        }
        for counter in threads.iter_mut().flatten() {
            counter.enable()?;
        }
        Ok(Counters { threads })
    }

    /// What was counted so far, over all threads.
    pub fn read(&mut self) -> Result<Counts> {
        let mut counts = Counts::default();
        for thread in &mut self.threads {
            for (counter, count) in thread.iter_mut().zip(&mut counts) {
                *count += counter.read()?;
            }
        }
        Ok(counts)
    }
}

/// With the kernel's part if that is allowed.
fn open(what: Hardware, tid: i32) -> io::Result<Counter> {
    let build = |kernel: bool| {
        let mut builder = Builder::new(what);
        builder.observe_pid(tid).any_cpu().exclude_kernel(!kernel).exclude_hv(true);
        builder.build()
    };
    build(true).or_else(|_| build(false))
}

fn reason(error: &io::Error) -> String {
    let why: &dyn Display = match error.kind() {
        io::ErrorKind::NotFound | io::ErrorKind::Unsupported => &"this machine has none",
        io::ErrorKind::PermissionDenied => &"not allowed (see /proc/sys/kernel/perf_event_paranoid)",
        _ => &"they cannot be opened",
    };
    format!("hardware counters: {why} ({error})")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_count_or_say_why_not() {
        match Counters::start(std::process::id()) {
            Ok(mut counters) => assert!(counters.read().unwrap()[1] > 0),
            Err(e) => assert!(e.to_string().starts_with("hardware counters: "), "{e}"),
        }
    }
}
