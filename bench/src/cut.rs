//! `vbench cut`: an image as it may be after a power cut, by a log of all that was written to it.

use std::fs::OpenOptions;
use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use clap::Args;
use fastrand::Rng;
use vhost_blk::backend::power_cut::Writes;

/// What was logged, what is to become of it, and when.
#[derive(Debug, Args)]
pub struct Cut {
    /// A log of `vhost-blk --fault log-writes=FILE`
    log: PathBuf,
    /// A copy of the file as it was before the log began, to be made what a power cut leaves; without one, say what is in
    /// the log
    copy: Option<PathBuf>,
    /// Which of the files in the log that is
    #[arg(long, value_name = "N", default_value_t = 0)]
    number: usize,
    /// When, in bytes of the log (without: at random)
    #[arg(long, value_name = "BYTES")]
    at: Option<u64>,
    /// What random numbers begin with (without: something else each time)
    #[arg(long, value_name = "N")]
    seed: Option<u64>,
}

/// Does it.
pub fn run(cut: &Cut) -> Result<()> {
    let name = cut.log.display();
    let writes = Writes::read(&cut.log).with_context(|| format!("cannot use {name}"))?;
    let Some(copy) = &cut.copy else {
        for (number, file) in writes.files().iter().enumerate() {
            println!("file {number}: {}, {} bytes before", file.path.display(), file.len);
        }
        println!("times: 0 to {}", writes.len());
        return Ok(());
    };
    let files = writes.files();
    let file = files.get(cut.number).with_context(|| format!("{name} has {} files", files.len()))?;
    let mut target = OpenOptions::new()
        .read(true)
        .write(true)
        .open(copy)
        .with_context(|| format!("cannot open {}", copy.display()))?;
    let len = target.metadata()?.len();
    ensure!(
        len == file.len,
        "{} has {len} bytes, and {} had {} when the log began; give a copy from then",
        copy.display(),
        file.path.display(),
        file.len
    );
    let seed = cut.seed.unwrap_or_else(|| fastrand::u64(..));
    let mut random = Rng::with_seed(seed);
    let at = cut.at.unwrap_or_else(|| random.u64(0..=writes.len()));
    let lost = writes.cut(cut.number, at, &mut random, &mut target)?;
    println!(
        "{}: a power cut at {at} (seed {seed}): of {} changes that were not durable, {} are missing, {} are torn",
        copy.display(),
        lost.uncertain,
        lost.missing,
        lost.torn
    );
    Ok(())
}
