//! Lost wake-ups: either side may sleep for ever when the other one's call is lost, which shows as a request that
//! never completes. One request at a time, so that every one of them is a chance.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use kickless_tests::daemon::{Daemon, Medium, Options};
use kickless_tests::scenario::{Guest, Load, Op, Plan, Platform, Wait};
use kickless_tests::scene::Scene;

use crate::{Wakeups, thousands};

/// Requests of a load; what is lost of the count when a run is killed.
const CHUNK: u64 = 20_000;
/// How often progress is printed.
const SAY: Duration = Duration::from_secs(10);

/// Runs it until the count or the time is reached.
pub fn run(what: &Wakeups) -> Result<()> {
    let mode = what.poll.name();
    let before = what.state.as_deref().map_or(Ok(0), |file| recall(file, mode))?;
    if before >= what.requests {
        let file = what.state.as_deref().unwrap_or(Path::new("")).display();
        println!(
            "wakeups, {mode}: all {} requests were done before; remove {file} to begin again",
            thousands(what.requests)
        );
        return Ok(());
    }
    let scene = Scene::new()?;
    let mut daemon = Options::default().poll(mode).spawn(&scene, "daemon", Medium::Null(1 << 30))?;
    let mut guest = Plan::new().disk(daemon.socket(), 1).boot(Platform::Bare, &scene)?;
    let begun = Instant::now();
    let mut said = begun;
    let (mut done, mut kicks, mut interrupts) = (before, 0, 0);
    println!(
        "wakeups, {mode}: {} of {} requests done before, one at a time, the guest sleeping in between",
        thousands(before),
        thousands(what.requests)
    );
    while done < what.requests && what.seconds.is_none_or(|limit| begun.elapsed().as_secs() < limit) {
        let chunk = CHUNK.min(what.requests - done);
        let load = Load::new(Op::Read).random().depth(1).wait(Wait::Sleep).seed(done + 1).requests(chunk);
        guest.start(&load)?;
        if let Some(stuck) = await_end(&mut *guest, chunk, Duration::from_secs(what.patience))? {
            return Err(lost(what, done - before + stuck, guest, &mut daemon));
        }
        let outcome = guest.finish()?;
        outcome.expect_clean()?;
        (done, kicks, interrupts) = (done + chunk, kicks + outcome.kicks, interrupts + outcome.interrupts);
        if let Some(file) = &what.state {
            keep(file, mode, done)?;
        }
        if said.elapsed() >= SAY {
            said = Instant::now();
            let rate = (done - before) as f64 / begun.elapsed().as_secs_f64();
            println!(
                "wakeups, {mode}: {} done, {} a second, {} to go",
                thousands(done),
                thousands(rate as u64),
                span((what.requests - done) as f64 / rate)
            );
        }
    }
    let seconds = begun.elapsed().as_secs_f64();
    guest.power_off()?;
    daemon.terminate()?;
    println!(
        "wakeups, {mode}: {} of {} requests done, {} of them now in {seconds:.0} s with {} notifications and {} \
         interrupts; none lost{}",
        thousands(done),
        thousands(what.requests),
        thousands(done - before),
        thousands(kicks),
        thousands(interrupts),
        if done < what.requests { "; the time is used up" } else { "" }
    );
    Ok(())
}

/// Waits for the end of a load; where it has stopped, if it has.
fn await_end(guest: &mut dyn Guest, requests: u64, patience: Duration) -> Result<Option<u64>> {
    let (mut last, mut since) = (0, Instant::now());
    loop {
        let now = guest.progress()?;
        if now >= requests {
            return Ok(None);
        }
        if now != last {
            (last, since) = (now, Instant::now());
        } else if since.elapsed() > patience {
            return Ok(Some(now));
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// What is known when nothing moves any more.
fn lost(what: &Wakeups, done: u64, mut guest: Box<dyn Guest>, daemon: &mut Daemon) -> anyhow::Error {
    let stats = daemon.stats().map_or_else(|error| format!("{error:#}"), |stats| stats.text().to_owned());
    let place = guest.bare().map_or_else(|error| error.to_string(), |bare| bare.host().stop());
    anyhow::anyhow!(
        "LOST WAKE-UP, --poll {}: after {} requests of this run, none completed for {} s\nvhost-blk:\n{stats}\n\
         guest:\n{place}",
        what.poll.name(),
        thousands(done),
        what.patience
    )
}

fn span(seconds: f64) -> String {
    let seconds = seconds as u64;
    if seconds < 120 { format!("{seconds} s") } else { format!("{} min", seconds.div_ceil(60)) }
}

/// The lines of a state file: a mode and its count each.
fn parse(text: &str) -> Result<Vec<(String, u64)>> {
    text.lines()
        .map(|line| {
            let (mode, count) = line.split_once(' ').context("no mode and count")?;
            Ok((mode.to_owned(), count.trim().parse().with_context(|| format!("{count:?}"))?))
        })
        .collect()
}

fn read(file: &Path) -> Result<Vec<(String, u64)>> {
    match fs::read_to_string(file) {
        Ok(text) => parse(&text).with_context(|| format!("{} is not a state file", file.display())),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => bail!("{}: {error}", file.display()),
    }
}

/// How many requests are done in a mode.
fn recall(file: &Path, mode: &str) -> Result<u64> {
    Ok(read(file)?.into_iter().find(|(known, _)| known == mode).map_or(0, |(_, count)| count))
}

/// Keeps the count of a mode, and those of the others as they are.
fn keep(file: &Path, mode: &str, count: u64) -> Result<()> {
    let mut counts = read(file)?;
    counts.retain(|(known, _)| known != mode);
    counts.push((mode.to_owned(), count));
    counts.sort();
    let lines: Vec<String> = counts.iter().map(|(mode, count)| format!("{mode} {count}\n")).collect();
    // Whole or not at all, whenever a run is killed.
    let next = file.with_extension("next");
    fs::write(&next, lines.concat())
        .and_then(|()| fs::rename(&next, file))
        .with_context(|| file.display().to_string())
}

#[cfg(test)]
mod tests {
    use super::{keep, recall};

    #[test]
    fn counts_are_kept_by_mode() -> anyhow::Result<()> {
        let dir = tempfile::tempdir()?;
        let file = dir.path().join("wakeups");
        assert_eq!(recall(&file, "event")?, 0);
        keep(&file, "event", 20_000)?;
        keep(&file, "adaptive", 7)?;
        keep(&file, "event", 40_000)?;
        assert_eq!((recall(&file, "event")?, recall(&file, "adaptive")?), (40_000, 7));
        std::fs::write(&file, "nonsense\n")?;
        assert!(recall(&file, "event").is_err());
        Ok(())
    }
}
