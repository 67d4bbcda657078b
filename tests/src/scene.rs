//! The scratch directory of one test.

use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result};
use tempfile::TempDir;

/// How many lines of each log go into a failure report.
const TAIL_LINES: usize = 25;

/// The scratch directory of one test: images, sockets and logs. Removed on drop, unless `KICKLESS_KEEP` is set.
#[derive(Debug)]
pub struct Scene {
    dir: TempDir,
    packed: AtomicBool,
}

impl Scene {
    /// Creates the directory, in `TMPDIR` (a short path, as Unix sockets need).
    pub fn new() -> Result<Self> {
        let mut dir = tempfile::Builder::new().prefix("kickless-").tempdir().context("scratch directory")?;
        if std::env::var_os("KICKLESS_KEEP").is_some() {
            dir.disable_cleanup(true);
            eprintln!("keeping {}", dir.path().display());
        }
        Ok(Self { dir, packed: AtomicBool::new(false) })
    }

    /// Has guests of this test drive packed rings, and rings in order, wherever they are offered.
    pub fn use_packed(&self) {
        self.packed.store(true, Ordering::Relaxed);
    }

    /// Whether guests of this test drive packed rings.
    pub fn packed(&self) -> bool {
        self.packed.load(Ordering::Relaxed)
    }

    /// The path of a file in the directory.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// A name of a log that does not exist yet: `stem.log`, `stem-1.log`, ...
    pub fn fresh_log(&self, stem: &str) -> PathBuf {
        let mut path = self.path(&format!("{stem}.log"));
        let mut number = 0;
        while path.exists() {
            number += 1;
            path = self.path(&format!("{stem}-{number}.log"));
        }
        path
    }

    /// The ends of all logs, for a failure report.
    pub fn report(&self) -> String {
        let mut logs: Vec<PathBuf> = fs::read_dir(self.dir.path())
            .map(|entries| entries.flatten().map(|entry| entry.path()).collect())
            .unwrap_or_default();
        logs.retain(|path| path.extension().is_some_and(|extension| extension == "log"));
        logs.sort();
        logs.iter().fold(String::new(), |mut report, log| {
            let text = tail(log, TAIL_LINES);
            if !text.is_empty() {
                let name = log.file_name().unwrap_or_default().to_string_lossy();
                let _ = write!(report, "\n---- end of {name}\n{text}");
            }
            report
        })
    }
}

/// The last lines of a file; empty when it cannot be read.
pub fn tail(path: &Path, lines: usize) -> String {
    let bytes = fs::read(path).unwrap_or_default();
    let text = String::from_utf8_lossy(&bytes).replace('\r', "");
    let all: Vec<&str> = text.lines().collect();
    all[all.len().saturating_sub(lines)..].iter().fold(String::new(), |mut out, line| {
        out.push_str(line);
        out.push('\n');
        out
    })
}
