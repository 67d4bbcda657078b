//! Back ends beside each other: started afresh for every run, run in turn A B C A B C, compared pair by pair.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::str::FromStr;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::report::Summary;
use crate::{Load, front_end};

/// What to compare.
#[derive(Clone, Debug, clap::Args)]
pub struct Compare {
    /// A back end, as NAME=COMMAND; {socket} in the command is where it is to listen. The first is the reference
    #[arg(long, value_name = "NAME=COMMAND", required = true)]
    pub backend: Vec<Backend>,
    /// Times every back end is run
    #[arg(long, value_name = "N", default_value_t = 5)]
    pub rounds: usize,
    /// What each is driven with
    #[command(flatten)]
    pub load: Load,
}

/// A back end to start.
#[derive(Clone, Debug)]
pub struct Backend {
    name: String,
    command: String,
}

impl FromStr for Backend {
    type Err = String;

    fn from_str(s: &str) -> Result<Backend, String> {
        match s.split_once('=') {
            Some((name, command)) if command.contains("{socket}") => {
                Ok(Backend { name: name.into(), command: command.into() })
            }
            _ => Err("write NAME=COMMAND, with {socket} where the socket's path belongs".into()),
        }
    }
}

/// A started back end, killed when dropped.
struct Started {
    child: Child,
    socket: PathBuf,
}

impl Started {
    fn new(backend: &Backend, dir: &Path) -> Result<Started> {
        let socket = dir.join("socket");
        let command = backend.command.replace("{socket}", &socket.display().to_string());
        let mut words = command.split_whitespace();
        let program = words.next().context("an empty command")?;
        let child = Command::new(program).args(words).stdout(Stdio::null()).spawn();
        let child = child.with_context(|| format!("cannot start {program}"))?;
        let mut started = Started { child, socket };
        let begun = Instant::now();
        while !started.socket.exists() {
            if let Some(status) = started.child.try_wait()? {
                bail!("{} ended at once: {status}", backend.name);
            }
            if begun.elapsed() > Duration::from_secs(10) {
                bail!("{} does not listen on {}", backend.name, started.socket.display());
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        // Between binding and listening.
        std::thread::sleep(Duration::from_millis(100));
        Ok(started)
    }

    /// CPU seconds used so far by all threads: /proc/PID/task/TID/schedstat, first field, nanoseconds.
    fn cpu_seconds(&self) -> Result<f64> {
        let mut nanoseconds = 0;
        for task in std::fs::read_dir(format!("/proc/{}/task", self.child.id()))? {
            // A thread may end meanwhile.
            let Ok(stat) = std::fs::read_to_string(task?.path().join("schedstat")) else { continue };
            nanoseconds += stat.split_whitespace().next().and_then(|n| n.parse::<u64>().ok()).unwrap_or(0);
        }
        Ok(nanoseconds as f64 / 1e9)
    }
}

impl Drop for Started {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = std::fs::remove_file(&self.socket);
        // The kernel lets go of an io_uring's files, and their locks, a moment later.
        std::thread::sleep(Duration::from_millis(200));
    }
}

struct Sample {
    summary: Summary,
    cpu_us: f64,
}

/// Runs them all and prints a table.
pub fn compare(what: &Compare) -> Result<()> {
    let dir = std::env::temp_dir().join(format!("vbench-{}", std::process::id()));
    std::fs::create_dir(&dir)?;
    let outcome = measure(what, &dir);
    std::fs::remove_dir_all(&dir)?;
    print(what, &outcome?);
    Ok(())
}

fn measure(what: &Compare, dir: &Path) -> Result<Vec<Vec<Sample>>> {
    let mut samples: Vec<Vec<Sample>> = what.backend.iter().map(|_| Vec::new()).collect();
    for _ in 0..what.rounds {
        for (backend, samples) in what.backend.iter().zip(&mut samples) {
            let started = Started::new(backend, dir)?;
            let mut cpu = Vec::new();
            let jobs = front_end::run(&started.socket, &what.load, || cpu.push(started.cpu_seconds()));
            let jobs = jobs.with_context(|| format!("driving {}", backend.name))?;
            let summary = Summary::of(&jobs);
            let [before, after] =
                <[Result<f64>; 2]>::try_from(cpu).map_err(|_| anyhow::anyhow!("two marks"))?;
            let cpu_us = (after? - before?) * 1e6 / summary.requests.max(1) as f64;
            samples.push(Sample { summary, cpu_us });
        }
    }
    Ok(samples)
}

/// Minimum, median and maximum.
fn spread(mut values: Vec<f64>) -> [f64; 3] {
    values.sort_by(f64::total_cmp);
    let at = |i: usize| values.get(i).copied().unwrap_or(f64::NAN);
    [at(0), at(values.len() / 2), at(values.len().saturating_sub(1))]
}

fn print(what: &Compare, samples: &[Vec<Sample>]) {
    let load = &what.load;
    println!(
        "{:?} bs={} iodepth={} {} rounds of {:.1} s; min / median / max; ratios to {} of the same round",
        load.rw,
        load.bs,
        load.iodepth,
        what.rounds,
        load.runtime.as_secs_f64(),
        what.backend[0].name
    );
    println!(
        "{:<12} {:>30} {:>22} {:>22} {:>22} {:>19} {:>19} {:>19}",
        "back end", "IOPS", "p50 us", "p99 us", "CPU us/request", "IOPS ratio", "p50 ratio", "CPU ratio"
    );
    for (backend, own) in what.backend.iter().zip(samples) {
        let over = |of: fn(&Sample) -> f64| spread(own.iter().map(of).collect());
        let ratio = |of: fn(&Sample) -> f64| {
            spread(own.iter().zip(&samples[0]).map(|(a, b)| of(a) / of(b)).collect())
        };
        let cell = |[a, b, c]: [f64; 3], digits: usize| format!("{a:.digits$} / {b:.digits$} / {c:.digits$}");
        println!(
            "{:<12} {:>30} {:>22} {:>22} {:>22} {:>19} {:>19} {:>19}",
            backend.name,
            cell(over(|s| s.summary.iops), 0),
            cell(over(|s| s.summary.us(50.0)), 2),
            cell(over(|s| s.summary.us(99.0)), 2),
            cell(over(|s| s.cpu_us), 3),
            cell(ratio(|s| s.summary.iops), 2),
            cell(ratio(|s| s.summary.us(50.0)), 2),
            cell(ratio(|s| s.cpu_us), 2),
        );
    }
}
