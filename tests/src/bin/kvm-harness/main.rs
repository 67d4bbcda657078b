//! `kvm-harness`: what is measured and shown with bare-metal guests under KVM, outside of the tests.

mod demo;
mod latency;
mod wakeups;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Result, ensure};
use clap::{Parser, Subcommand, ValueEnum};
use kickless_tests::daemon::Kind;
use kickless_tests::scenario::Platform;

/// Bare-metal guests under KVM on disks of vhost-blk.
///
/// The daemon is looked for beside this program, the guest among the optimised ones (both in KICKLESS_BIN_DIR, if that is
/// set). Where there is no KVM, it says so and
/// ends well.
#[derive(Debug, Parser)]
#[command(name = "kvm-harness", version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Boot several guests on one vhost-blk process, load them all at once, and print what they saw
    Demo(Demo),
    /// Measure what the virtual machine adds to a request: the same load with and without one, in turn
    Latency(Latency),
    /// Look for lost wake-ups: one request at a time, with a guest that sleeps in between
    Wakeups(Wakeups),
}

/// Several guests at once.
#[derive(Debug, clap::Args)]
pub struct Demo {
    /// Guests, each with one CPU and a disk of its own
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = clap::value_parser!(u16).range(1..=256))]
    pub guests: u16,
    /// Seconds of random reads
    #[arg(long, value_name = "SECONDS", default_value_t = 5, value_parser = clap::value_parser!(u64).range(1..=3600))]
    pub seconds: u64,
    /// Requests in flight of each guest
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=64))]
    pub depth: u32,
    /// How vhost-blk waits for requests
    #[arg(long, value_name = "MODE", default_value = "adaptive")]
    pub poll: Poll,
}

/// With and without a virtual machine.
#[derive(Debug, clap::Args)]
pub struct Latency {
    /// Times each of the two is run
    #[arg(long, value_name = "N", default_value_t = 11, value_parser = clap::value_parser!(u32).range(1..))]
    pub rounds: u32,
    /// Requests of a round
    #[arg(long, value_name = "N", default_value_t = 200_000, value_parser = clap::value_parser!(u32).range(1..=3_000_000))]
    pub requests: u32,
    /// CPU of vhost-blk
    #[arg(long, value_name = "CPU", default_value_t = 0)]
    pub device_cpu: usize,
    /// CPU of the driver
    #[arg(long, value_name = "CPU", default_value_t = 1)]
    pub driver_cpu: usize,
}

/// One request after the other.
#[derive(Debug, clap::Args)]
pub struct Wakeups {
    /// How vhost-blk waits for requests
    #[arg(long, value_name = "MODE", default_value = "adaptive")]
    pub poll: Poll,
    /// Requests in all
    #[arg(long, value_name = "N", default_value_t = 1_000_000, value_parser = clap::value_parser!(u64).range(1..))]
    pub requests: u64,
    /// File that keeps how many are done, for a later run to go on from
    #[arg(long, value_name = "FILE")]
    pub state: Option<PathBuf>,
    /// Stop after so many seconds, finished or not
    #[arg(long, value_name = "SECONDS")]
    pub seconds: Option<u64>,
    /// Seconds without progress that count as a lost wake-up
    #[arg(long, value_name = "SECONDS", default_value_t = 60, value_parser = clap::value_parser!(u64).range(1..))]
    pub patience: u64,
}

/// `--poll` of vhost-blk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Poll {
    /// Never sleeps.
    Busy,
    /// Spins a while first.
    Adaptive,
    /// Sleeps at once.
    Event,
}

impl Poll {
    /// As `vhost-blk` calls it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Busy => "busy",
            Self::Adaptive => "adaptive",
            Self::Event => "event",
        }
    }
}

/// Minimum, median and maximum.
pub fn spread(mut values: Vec<f64>) -> [f64; 3] {
    values.sort_by(f64::total_cmp);
    let at = |i: usize| values.get(i).copied().unwrap_or(f64::NAN);
    [at(0), at(values.len() / 2), at(values.len().saturating_sub(1))]
}

/// With thousands apart, as people read them.
pub fn thousands(n: u64) -> String {
    let digits = n.to_string();
    let mut out = String::new();
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            out.push(',');
        }
        out.push(digit);
    }
    out
}

fn run(command: &Command) -> Result<()> {
    ensure!(Kind::VhostBlk.program().is_some(), "there is no vhost-blk beside this program; build it");
    match command {
        Command::Demo(demo) => demo::run(demo),
        Command::Latency(latency) => latency::run(latency),
        Command::Wakeups(wakeups) => wakeups::run(wakeups),
    }
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    if let Some(reason) = Platform::Bare.missing_needs() {
        println!("kvm-harness: skipped: {reason}");
        return ExitCode::SUCCESS;
    }
    match run(&cli.command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("kvm-harness: {error:#}");
            ExitCode::FAILURE
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{spread, thousands};

    #[test]
    fn figures_read_well() {
        assert_eq!(
            [0, 999, 1000, 1_234_567].map(thousands),
            ["0", "999", "1,000", "1,234,567"].map(str::to_owned)
        );
        assert_eq!(spread(vec![3.0, 1.0, 2.0]).map(|value| value as u32), [1, 2, 3]);
    }
}
