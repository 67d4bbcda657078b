//! Traces: played on a disk, and looked at.

mod disk;
mod iolog;
mod plan;
mod player;
mod report;
mod summary;
mod trace;

use std::path::PathBuf;
use std::str::FromStr;

use anyhow::{Context, Result, bail};
use quanta::Clock;

use self::disk::Disk;
use self::player::Player;
use self::trace::Trace;

/// What to play where.
#[derive(Clone, Debug, clap::Args)]
pub struct Replay {
    /// A capture of vhost-blk --record, or an fio iolog of version 2 or 3
    #[arg(value_name = "TRACE")]
    trace: PathBuf,
    /// vhost-user-blk socket to connect to
    #[arg(long, value_name = "PATH")]
    socket_path: PathBuf,
    /// At its own speed (original), N times as fast, or as fast as the depth allows (max)
    #[arg(long, value_name = "original|max|N", default_value = "original")]
    speed: Speed,
    /// Queues to use; without: those of the trace, as far as the disk has them
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=256))]
    queues: Option<u16>,
    /// Most requests in flight on each queue
    #[arg(long, value_name = "N", default_value_t = 128, value_parser = clap::value_parser!(u16).range(1..=4096))]
    iodepth: u16,
    /// Write the result to a file as JSON, too
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

/// What to look at.
#[derive(Clone, Debug, clap::Args)]
pub struct Look {
    /// A capture of vhost-blk --record, or an fio iolog of version 2 or 3
    #[arg(value_name = "TRACE")]
    trace: PathBuf,
    /// Write it to a new file as an fio iolog of version 2, too
    #[arg(long, value_name = "FILE")]
    to_iolog: Option<PathBuf>,
}

/// How fast to play.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Speed {
    /// So many times as fast as recorded.
    Times(f64),
    /// As fast as the depth allows.
    Max,
}

impl FromStr for Speed {
    type Err = String;

    fn from_str(s: &str) -> Result<Speed, String> {
        match s {
            "original" => Ok(Speed::Times(1.0)),
            "max" => Ok(Speed::Max),
            _ => match s.parse::<f64>() {
                Ok(times) if times.is_finite() && times >= 1e-6 => Ok(Speed::Times(times)),
                _ => Err(format!("'{s}' is none of original, max, or a number of times such as 2 or 0.5")),
            },
        }
    }
}

impl Speed {
    /// When a request is to start that was recorded `at` these nanoseconds; `None` for at once.
    fn due(self, at: u64) -> Option<u64> {
        match self {
            Speed::Times(times) => Some((at as f64 / times) as u64),
            Speed::Max => None,
        }
    }
}

/// Plays a trace, prints what came of it; requests that failed are an error.
pub fn replay(what: &Replay) -> Result<()> {
    let trace = Trace::read(&what.trace)?;
    for note in &trace.notes {
        eprintln!("vbench: {}: {note}", what.trace.display());
    }
    if trace.lost > 0 {
        eprintln!("vbench: {}: {} requests were lost when recording", what.trace.display(), trace.lost);
    }
    let mut disk = Disk::connect(&what.socket_path, what.queues.unwrap_or(trace.queues()))?;
    let queues = what.queues.unwrap_or_else(|| trace.queues().min(disk.queues));
    if queues > disk.queues {
        bail!("{} has {} queues, fewer than --queues {queues}", what.socket_path.display(), disk.queues);
    }
    if queues < trace.queues() {
        eprintln!("vbench: {} queues of the trace are played on {queues}", trace.queues());
    }
    let (plans, skipped) = plan::plan(&trace, &disk.limits, queues);
    if let Some(line) = skipped.line() {
        eprintln!("vbench: {line}");
    }
    drop(trace);
    let players =
        plans.into_iter().enumerate().map(|(i, steps)| Player::new(&mut disk, i, steps, what.iodepth));
    let players = players.collect::<Result<Vec<_>>>()?;
    let clock = Clock::new();
    let zero = clock.raw();
    let played = std::thread::scope(|scope| {
        let clock = &clock;
        let threads: Vec<_> =
            players.into_iter().map(|p| scope.spawn(move || p.play(what.speed, clock, zero))).collect();
        let ended = threads
            .into_iter()
            .map(|t| t.join().map_err(|_| anyhow::anyhow!("a queue's thread panicked"))?);
        ended.collect::<Result<Vec<_>>>()
    })?;
    let sum = report::Sum::of(&played)?;
    sum.print(what, &skipped);
    if let Some(path) = &what.json {
        let text = format!("{}\n", sum.json(what, &skipped));
        std::fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))?;
    }
    match sum.first_error() {
        Some(first) => bail!("{} of {} requests failed; the first: {first}", sum.errors, sum.requests),
        None => Ok(()),
    }
}

/// Prints a summary, and writes the trace as an iolog if asked to.
pub fn look(what: &Look) -> Result<()> {
    let trace = Trace::read(&what.trace)?;
    print!("{}", summary::summary(&trace));
    if let Some(path) = &what.to_iolog {
        let (text, left_out) = iolog::write(&trace);
        let file = std::fs::File::create_new(path);
        let written = file.and_then(|mut f| std::io::Write::write_all(&mut f, text.as_bytes()));
        written.with_context(|| format!("cannot write {}", path.display()))?;
        if left_out > 0 {
            eprintln!(
                "vbench: {left_out} requests are not in the iolog: they failed, or fio has no action for them"
            );
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn speeds_are_words_or_numbers() {
        assert_eq!("original".parse(), Ok(Speed::Times(1.0)));
        assert_eq!("max".parse(), Ok(Speed::Max));
        assert_eq!("2.5".parse::<Speed>().unwrap().due(1000), Some(400));
        for bad in ["", "0", "-1", "fast", "NaN", "inf"] {
            assert!(bad.parse::<Speed>().is_err(), "{bad}");
        }
    }
}
