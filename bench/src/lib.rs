//! `vbench`: drives vhost-user-blk and vhost-user-net sockets, and devices of the vDPA bus, from the driver's side of the
//! ring; disks with fio's vocabulary.

mod back_end;
mod ceiling;
mod compare;
mod control;
mod cut;
mod drive;
mod event;
mod fio_json;
mod floor;
mod front_end;
mod human;
mod job;
mod jobfile;
mod measure;
mod net;
mod node;
mod options;
mod outcome;
mod pace;
mod plain;
mod probe;
mod replay;
mod report;
mod requests;
mod run;
mod spec;
mod units;
mod verify;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Result;
use clap::{ArgAction, CommandFactory, Parser, Subcommand, ValueEnum};

/// Load generator for vhost-user sockets and vhost-vdpa nodes.
#[derive(Debug, Parser)]
#[command(name = "vbench", version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Drive one vhost-user-blk socket, or a disk's /dev/vhost-vdpa-N, and report rates and latencies
    Run(run::Run),
    /// Drive one vhost-user-net socket, a card's /dev/vhost-vdpa-N, or two ports of a switch, and report packet rates, losses and latencies
    Net(Box<net::Net>),
    /// Measure the generator itself, against a ring that is served in this process
    Ceiling(ceiling::Ceiling),
    /// Run several back ends in turn under the same load and print their ratios
    #[command(mut_arg("runtime", |a| a.default_value("2")), mut_arg("ramp_time", |a| a.default_value("0.3")))]
    Compare(Box<compare::Compare>),
    /// Play a trace on a vhost-user-blk socket: a capture of vhost-blk --record, or an fio iolog
    Replay(replay::Replay),
    /// Print what is in a trace, or write it as an fio iolog
    Trace(replay::Look),
    /// Make of an image what a power cut may leave of it, by a log of vhost-blk --fault log-writes
    Cut(cut::Cut),
    /// Serve a null disk by a loop without any checks: the limit to measure back ends against
    Floor {
        /// Socket to listen on
        #[arg(long, value_name = "PATH")]
        socket_path: PathBuf,
        /// CPU to run on
        #[arg(long, value_name = "CPU")]
        cpu: Option<usize>,
        /// Copy the data of requests from and to 1 GiB of memory, as a RAM disk does
        #[arg(long)]
        copy: bool,
    },
    /// Serve a null disk written with the vhost-user-backend and virtio-queue crates: a peer to measure beside
    Plain {
        /// Socket to listen on
        #[arg(long, value_name = "PATH")]
        socket_path: PathBuf,
        /// Request queues to offer
        #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=64))]
        num_queues: u16,
        /// CPU to run on
        #[arg(long, value_name = "CPU")]
        cpu: Option<usize>,
    },
    /// Serve a network card by a loop without any checks, or a wire between two: the limit to measure beside
    FloorNet(net::floor::FloorNet),
    /// Serve a network card written with the vhost-user-backend and virtio-queue crates: a peer to measure beside
    PlainNet(net::plain::PlainNet),
    /// Measure what a request is made of on this machine: a cache line to another CPU and back, a copy, entries into
    /// the kernel, the cipher of LUKS volumes
    Probe(probe::Probe),
}

/// What to drive a back end with; names and meanings are fio's.
#[derive(Clone, Debug, clap::Args)]
#[allow(clippy::struct_excessive_bools)] // options
pub struct Load {
    /// Access pattern
    #[arg(long, value_enum, default_value_t = Pattern::Randread)]
    pub rw: Pattern,
    /// Percentage of reads in randrw and rw
    #[arg(long, value_name = "PERCENT", default_value_t = 50, value_parser = clap::value_parser!(u8).range(0..=100))]
    pub rwmixread: u8,
    /// Bytes of a request (such as 4k)
    #[arg(long, value_name = "SIZE", default_value = "4k", value_parser = size)]
    pub bs: u32,
    /// Requests in flight for each job
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub iodepth: u16,
    /// Jobs: one thread with one queue each
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub numjobs: u16,
    /// Requests that arrive a second for each job, whatever the back end does; latency counts from the arrival
    /// (default: the next when one is finished)
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..1 << 30))]
    pub arrival_rate: Option<u64>,
    /// Flush after every N writes
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    pub fsync: Option<u64>,
    /// none: writes are durable when flushed; dsync (or sync): each before it is answered
    #[arg(long, value_name = "KIND", default_value = "none", action = ArgAction::Set, value_parser = units::sync)]
    pub sync: bool,
    /// Seconds to measure
    #[arg(long, value_name = "SECONDS", default_value = "5", value_parser = seconds)]
    pub runtime: Duration,
    /// Seconds to run before measuring
    #[arg(long, value_name = "SECONDS", default_value = "1", value_parser = seconds)]
    pub ramp_time: Duration,
    /// CPU of the first job, the next for the next and so on
    #[arg(long, value_name = "CPU")]
    pub cpu: Option<usize>,
    /// Use indirect descriptors
    #[arg(long)]
    pub indirect: bool,
    /// Do without the event index, which is used where it is offered
    #[arg(long)]
    pub no_event_idx: bool,
    /// Use packed rings
    #[arg(long)]
    pub packed: bool,
    /// Have requests answered in order, which back ends offer that cannot help it
    #[arg(long)]
    pub in_order: bool,
    /// Have the back end record its requests in flight, for the next one should it be killed
    #[arg(long)]
    pub inflight: bool,
}

/// Access patterns.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Pattern {
    /// Random reads.
    Randread,
    /// Random writes.
    Randwrite,
    /// Sequential reads.
    Read,
    /// Sequential writes.
    Write,
    /// Random, mixed.
    Randrw,
    /// Sequential, mixed.
    Rw,
}

impl Pattern {
    /// At random places.
    pub fn random(self) -> bool {
        matches!(self, Pattern::Randread | Pattern::Randwrite | Pattern::Randrw)
    }

    /// Has reads.
    pub fn reads(self) -> bool {
        !matches!(self, Pattern::Randwrite | Pattern::Write)
    }

    /// Has writes.
    pub fn writes(self) -> bool {
        !matches!(self, Pattern::Randread | Pattern::Read)
    }
}

fn size(s: &str) -> Result<u32, String> {
    let (digits, unit) = match s.strip_suffix(['k', 'K']) {
        Some(digits) => (digits, 1024),
        None => s.strip_suffix(['m', 'M']).map_or((s, 1), |digits| (digits, 1 << 20)),
    };
    let bytes = digits.parse::<u32>().ok().and_then(|n| n.checked_mul(unit));
    let fits = |n: &u32| *n > 0 && n.is_multiple_of(512) && *n <= 1 << 20;
    bytes.filter(fits).ok_or_else(|| format!("'{s}' is no multiple of 512 bytes up to 1m"))
}

fn seconds(s: &str) -> Result<Duration, String> {
    let seconds: f64 = s.parse().map_err(|_| format!("'{s}' is no number of seconds"))?;
    Duration::try_from_secs_f64(seconds).map_err(|e| e.to_string())
}

/// Help and version go out as they are; a mistake is one line, like every other error.
fn usage(error: &clap::Error) -> ExitCode {
    if !error.use_stderr() {
        error.exit();
    }
    let text = error.render().to_string();
    // The first paragraph says what is wrong; usage and hints follow behind an empty line.
    let what: Vec<_> = text.lines().take_while(|line| !line.trim().is_empty()).map(str::trim).collect();
    eprintln!("vbench: {} (see vbench --help)", what.join(" ").trim_start_matches("error: "));
    ExitCode::from(2)
}

/// Its command line, for manual pages and completions.
pub fn command() -> clap::Command {
    Cli::command()
}

/// The program.
pub fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(e) => return usage(&e),
    };
    let outcome = match &cli.command {
        Command::Run(run) => return run::run(run),
        Command::Net(what) => return net::net(what),
        Command::Ceiling(what) => ceiling::ceiling(what),
        Command::Compare(what) => compare::compare(what),
        Command::Floor { socket_path, cpu, copy } => floor::serve(socket_path, *cpu, *copy),
        Command::Plain { socket_path, num_queues, cpu } => plain::serve(socket_path, *num_queues, *cpu),
        Command::FloorNet(what) => net::floor::serve(what),
        Command::PlainNet(what) => net::plain::serve(what),
        Command::Probe(what) => probe::probe(what),
        Command::Replay(what) => replay::replay(what),
        Command::Trace(what) => replay::look(what),
        Command::Cut(what) => cut::run(what),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("vbench: {e:#}");
            ExitCode::FAILURE
        }
    }
}
