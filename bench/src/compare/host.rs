//! What the kernel counts: for a process, and for the machine around it.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use serde::Serialize;

/// What a process has used up, over all its threads.
#[derive(Clone, Copy, Debug, Default)]
pub struct Usage {
    /// Nanoseconds on a CPU.
    pub cpu_ns: u64,
    /// Times it gave a CPU up.
    pub voluntary: u64,
    /// Times a CPU was taken from it.
    pub involuntary: u64,
}

impl Usage {
    /// Reads /proc/PID/task/*/{schedstat,status}.
    pub fn of(pid: u32) -> Result<Usage> {
        let mut usage = Usage::default();
        for task in threads(pid)? {
            // A thread may end meanwhile.
            let Ok(stat) = std::fs::read_to_string(task.join("schedstat")) else { continue };
            let Ok(status) = std::fs::read_to_string(task.join("status")) else { continue };
            usage.cpu_ns += first_number(&stat);
            for line in status.lines() {
                if let Some(n) = line.strip_prefix("voluntary_ctxt_switches:") {
                    usage.voluntary += first_number(n);
                } else if let Some(n) = line.strip_prefix("nonvoluntary_ctxt_switches:") {
                    usage.involuntary += first_number(n);
                }
            }
        }
        Ok(usage)
    }
}

/// The threads of a process, as directories below /proc.
pub fn threads(pid: u32) -> Result<Vec<PathBuf>> {
    let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).context("the back end has ended")?;
    Ok(tasks.filter_map(|t| t.ok().map(|t| t.path())).collect())
}

fn first_number(text: &str) -> u64 {
    text.split_whitespace().next().and_then(|n| n.parse().ok()).unwrap_or(0)
}

/// The machine's CPUs at one moment: the first line of /proc/stat.
#[derive(Clone, Copy, Debug)]
pub struct Cpus {
    at: Instant,
    busy: u64,
    steal: u64,
}

/// USER_HZ, which the kernel's interface fixes at 100 for what it says in /proc/stat.
const TICK: f64 = 0.01;

impl Cpus {
    /// Reads it now.
    pub fn now() -> Result<Cpus> {
        Cpus::parse(&std::fs::read_to_string("/proc/stat")?).context("/proc/stat has another form")
    }

    fn parse(text: &str) -> Option<Cpus> {
        let numbers: Vec<u64> = text
            .lines()
            .next()?
            .strip_prefix("cpu ")?
            .split_whitespace()
            .filter_map(|n| n.parse().ok())
            .collect();
        // user nice system idle iowait irq softirq steal; the time of guests is in user already.
        let &[user, nice, system, _, _, irq, softirq, steal] = numbers.get(..8)? else { return None };
        Some(Cpus { at: Instant::now(), busy: user + nice + system + irq + softirq, steal })
    }
}

/// How much went on beside a measurement.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Quiet {
    /// Load average of the last minute.
    pub load: f64,
    /// CPU time of others, as a part of one CPU.
    pub others: Option<f64>,
    /// Time the hypervisor gave to others, as a part of one CPU.
    pub steal: f64,
    /// Why it was not quiet; empty when it was.
    pub noise: Vec<String>,
}

impl Quiet {
    /// What happened between two looks, of which `ours` were nanoseconds of our own. Unknown where a back end was
    /// not started here.
    pub fn between(before: &Cpus, now: &Cpus, ours: Option<u64>) -> Result<Quiet> {
        let seconds = now.at.duration_since(before.at).as_secs_f64();
        let busy = now.busy.saturating_sub(before.busy) as f64 * TICK;
        let steal = now.steal.saturating_sub(before.steal) as f64 * TICK;
        Ok(Quiet::judge(load_average()?, seconds, busy, steal, ours.map(|n| n as f64 / 1e9)))
    }

    fn judge(load: f64, seconds: f64, busy: f64, steal: f64, ours: Option<f64>) -> Quiet {
        let mut noise = Vec::new();
        let others = ours.map(|ours| (busy - ours).max(0.0));
        // Ticks are counted, not measured: a few of them are no news.
        if let Some(others) = others.filter(|o| *o > (seconds * 0.1).max(4.0 * TICK)) {
            noise.push(format!("others took {:.0} % of a CPU", others / seconds * 100.0));
        }
        if steal > (seconds * 0.02).max(2.0 * TICK) {
            noise.push(format!("the hypervisor took {:.0} % of a CPU", steal / seconds * 100.0));
        }
        Quiet { load, others: others.map(|o| o / seconds), steal: steal / seconds, noise }
    }

    /// All that was taken, as a part of one CPU.
    pub fn taken(&self) -> f64 {
        self.others.unwrap_or(0.0) + self.steal
    }

    /// Looks for half a second, while nothing of ours runs.
    pub fn look() -> Result<Quiet> {
        let before = Cpus::now()?;
        std::thread::sleep(Duration::from_millis(500));
        Quiet::between(&before, &Cpus::now()?, Some(0))
    }
}

fn load_average() -> Result<f64> {
    let text = std::fs::read_to_string("/proc/loadavg")?;
    text.split_whitespace().next().and_then(|n| n.parse().ok()).context("/proc/loadavg has another form")
}

/// What figures were measured on. No name of a host.
#[derive(Clone, Debug, Serialize)]
pub struct Machine {
    /// Model of the CPUs.
    pub cpu: String,
    /// Number of CPUs this process may use.
    pub cpus: usize,
    /// Whether a hypervisor is below.
    pub hypervisor: bool,
    /// Release of the kernel.
    pub kernel: String,
    /// Load averages at the start.
    pub loadavg: String,
    /// MiB of memory.
    pub memory_mib: u64,
}

impl Machine {
    /// This one.
    pub fn this(cpus: usize) -> Machine {
        let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
        let cpuinfo = read("/proc/cpuinfo");
        let field = |name: &str| {
            let line = cpuinfo.lines().find(|l| l.starts_with(name));
            line.and_then(|l| l.split_once(':')).map(|(_, v)| v.trim().to_owned())
        };
        let meminfo = read("/proc/meminfo");
        let memory = meminfo.lines().find_map(|l| l.strip_prefix("MemTotal:")).map_or(0, first_number);
        Machine {
            cpu: field("model name").unwrap_or_else(|| "unknown".into()),
            cpus,
            hypervisor: field("flags").is_some_and(|f| f.split(' ').any(|f| f == "hypervisor")),
            kernel: read("/proc/sys/kernel/osrelease").trim().into(),
            loadavg: read("/proc/loadavg").split_whitespace().take(3).collect::<Vec<_>>().join(" "),
            memory_mib: memory / 1024,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn idle_and_waiting_are_not_busy() {
        let cpus = Cpus::parse("cpu  1 2 3 1000 2000 4 5 6 7 8\ncpu0 1 1 1\n").unwrap();
        assert_eq!((cpus.busy, cpus.steal), (15, 6));
        assert!(Cpus::parse("cpu  1 2 3").is_none());
    }

    #[test]
    fn noise_is_what_neither_we_nor_the_counting_of_ticks_explain() {
        let noise = |busy, steal, ours| Quiet::judge(0.0, 2.0, busy, steal, ours).noise;
        assert!(noise(4.1, 0.01, Some(4.0)).is_empty());
        assert!(noise(3.9, 0.0, Some(4.0)).is_empty());
        assert!(noise(4.5, 0.0, Some(4.0))[0].contains("25 % of a CPU"));
        assert!(noise(4.0, 0.5, Some(4.0))[0].contains("hypervisor"));
        // Of a back end that was not started here, the time is unknown.
        assert!(noise(4.0, 0.0, None).is_empty());
    }

    #[test]
    fn a_thread_that_spins_and_sleeps_is_seen() {
        let me = std::process::id();
        let before = Usage::of(me).unwrap();
        let begun = Instant::now();
        while begun.elapsed() < Duration::from_millis(30) {
            std::hint::spin_loop();
        }
        std::thread::sleep(Duration::from_millis(1));
        let after = Usage::of(me).unwrap();
        assert!(after.cpu_ns > before.cpu_ns && after.voluntary > before.voluntary);
        let machine = Machine::this(2);
        assert!(!machine.kernel.is_empty() && machine.memory_mib > 0);
    }
}
