//! Back ends beside each other: started afresh for every run, run in turn A B C A B C, compared round by round.

mod backend;
mod charts;
pub mod drive;
mod host;
mod html;
mod matrix;
mod measure;
mod perf;
mod round_trip;
mod spread;
mod table;

use std::io::Write;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use clap::parser::ValueSource;
use clap::{ArgMatches, CommandFactory};
use poll_engine::engine::placement::{CpuList, usable_cpus};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use tempfile::TempPath;

use self::backend::Places;
use self::drive::Drive;
use self::host::Quiet;
use self::matrix::{Backend, Image, Matrix, Point, Workload};
use self::measure::{Results, Runner};
use crate::Load;

/// What to compare.
#[derive(Clone, Debug, clap::Args)]
pub struct Compare {
    /// Back ends and workloads, as a TOML file (examples: bench/matrices)
    #[arg(value_name = "MATRIX.toml", required_unless_present = "backend")]
    pub matrix: Option<PathBuf>,
    /// A back end, as NAME=COMMAND; {socket} in the command is where it is to listen. Without a matrix file the
    /// first is the reference, and the load is that of the options below
    #[arg(long, value_name = "NAME=COMMAND")]
    pub backend: Vec<Backend>,
    /// Times every back end is run
    #[arg(long, value_name = "N")]
    pub rounds: Option<usize>,
    /// Run only these back ends
    #[arg(long, value_name = "NAME", value_delimiter = ',')]
    pub only: Vec<String>,
    /// Run only these workloads of the matrix file
    #[arg(long, value_name = "NAME", value_delimiter = ',')]
    pub workload: Vec<String>,
    /// Write a page with tables and curves
    #[arg(long, value_name = "FILE")]
    pub html: Option<PathBuf>,
    /// Write everything that was measured
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
    /// Wait for the machine to be quiet for so long at most
    #[arg(long, value_name = "SECONDS", default_value_t = 0)]
    pub wait_quiet: u64,
    /// SPDK's `vhost`: what `{spdk}` in commands stands for. Back ends that need it are left out without it
    #[arg(long, value_name = "PROGRAM")]
    pub spdk: Option<PathBuf>,
    /// Make the image of a matrix file in this directory instead of the one it names
    #[arg(long, value_name = "DIR")]
    pub image_dir: Option<PathBuf>,
    /// What each is driven with; beside a matrix file only --runtime, --ramp-time and --cpu
    #[command(flatten)]
    pub load: Load,
}

/// Runs them all, prints tables, and writes what was asked for. Fails if runs are missing, after that.
pub fn compare(what: &Compare) -> Result<()> {
    let (mut matrix, points) = what.resolve()?;
    matrix.keep(&what.only)?;
    let usable = usable_cpus()?;
    let (generator_cpu, cpus) = place(&matrix, &usable)?;
    // Before anything is made that would be left behind.
    let interrupted = Arc::new(AtomicBool::new(false));
    for signal in [SIGINT, SIGTERM, SIGHUP] {
        signal_hook::flag::register(signal, Arc::clone(&interrupted))?;
    }
    let image = matrix.options.image.as_ref().map(|i| make_image(i, &interrupted)).transpose()?;
    let before = wait_quiet(what.wait_quiet, &interrupted)?;
    let exe = std::env::current_exe()?;
    let places = Places {
        bin: exe.parent().unwrap_or(Path::new(".")).to_owned(),
        cpus: (cpus.iter().map(ToString::to_string).collect::<Vec<_>>().join(","), cpus),
        image: image.as_deref().map(Path::to_owned),
        spdk: what.spdk.clone(),
    };
    let runner = Runner { matrix: &matrix, points, places, generator_cpu, usable, interrupted: &interrupted };
    let results = runner.run(before)?;
    print!("{}", table::text(&results));
    write(what, &results)?;
    if interrupted.load(Ordering::Relaxed) {
        bail!("interrupted; the results are partial");
    }
    if results.partial {
        bail!("{} of the back ends failed; the results are partial", results.failures.len());
    }
    Ok(())
}

impl Compare {
    /// The matrix and its points, from a file or from the command line.
    fn resolve(&self) -> Result<(Matrix, Vec<Point>)> {
        let Some(path) = &self.matrix else {
            let mut matrix = Matrix { backend: self.backend.clone(), ..Matrix::default() };
            ensure!(self.rounds != Some(0), "--rounds starts at 1");
            matrix.options.rounds = self.rounds;
            matrix.options.runtime = Some(self.load.runtime.as_secs_f64());
            matrix.options.generator_cpu = self.load.cpu;
            // For the checks of names and commands; what is driven are the options themselves.
            matrix.workload.push(Workload::named("load"));
            matrix.check()?;
            return Ok((
                matrix,
                vec![Point { workload: "load".into(), drive: Drive::Block(self.load.clone()) }],
            ));
        };
        let text =
            std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
        let mut matrix = Matrix::parse(&text, path)?;
        matrix.backend.extend(self.backend.iter().cloned());
        self.override_options(&mut matrix)?;
        for name in &self.workload {
            ensure!(matrix.workload.iter().any(|w| w.name == *name), "no workload is called {name}");
        }
        if !self.workload.is_empty() {
            matrix.workload.retain(|w| self.workload.contains(&w.name));
        }
        matrix.check()?;
        let points = matrix.points()?;
        Ok((matrix, points))
    }

    /// What was given on the command line goes before what the file says; what belongs into the file is refused.
    fn override_options(&self, matrix: &mut Matrix) -> Result<()> {
        let matches = crate::Cli::command().get_matches();
        let Some(given) = matches.subcommand_matches("compare") else { bail!("not started as compare") };
        let is_given = |m: &ArgMatches, id: &str| m.value_source(id) == Some(ValueSource::CommandLine);
        let load = <Load as clap::Args>::augment_args(clap::Command::new("load"));
        for arg in load.get_arguments() {
            let id = arg.get_id().as_str();
            let also = ["runtime", "ramp_time", "cpu"].contains(&id);
            if is_given(given, id) && !also {
                bail!("--{} belongs into the matrix file", arg.get_long().unwrap_or(id));
            }
        }
        let options = &mut matrix.options;
        if is_given(given, "runtime") {
            options.runtime = Some(self.load.runtime.as_secs_f64());
        }
        if is_given(given, "ramp_time") {
            options.ramp_time = Some(self.load.ramp_time.as_secs_f64());
        }
        options.generator_cpu = self.load.cpu.or(options.generator_cpu);
        options.rounds = self.rounds.or(options.rounds);
        if let (Some(image), Some(dir)) = (&mut options.image, &self.image_dir) {
            image.dir.clone_from(dir);
        }
        Ok(())
    }
}

/// The generator's CPU and those of the back ends: what was asked for, or the first two that there are.
fn place(matrix: &Matrix, usable: &[usize]) -> Result<(usize, Vec<usize>)> {
    let asked = matrix.options.backend_cpus.as_deref().map(CpuList::from_str).transpose();
    let asked = asked.map_err(|e| anyhow::anyhow!("backend_cpus: {e}"))?.map(|list| list.0);
    let used = asked.clone().unwrap_or_default();
    let generator = match matrix.options.generator_cpu {
        Some(cpu) => cpu,
        // The second, for the first takes most of the machine's interrupts and is left to the device.
        None => match usable.iter().filter(|c| !used.contains(c)).nth(usize::from(asked.is_none())) {
            Some(cpu) => *cpu,
            None => *usable.last().context("no CPU to run on")?,
        },
    };
    let backend =
        asked.unwrap_or_else(|| vec![usable.iter().copied().find(|c| *c != generator).unwrap_or(generator)]);
    for cpu in backend.iter().chain([&generator]) {
        ensure!(usable.contains(cpu), "CPU {cpu} is not one that this process may use");
    }
    if backend.contains(&generator) {
        println!("NOISY: generator and back ends share CPU {generator}; the figures say little");
    }
    Ok((generator, backend))
}

/// Waits until it is quiet, or no longer than `seconds`, and says how it is.
fn wait_quiet(seconds: u64, interrupted: &AtomicBool) -> Result<Quiet> {
    let begun = Instant::now();
    loop {
        let quiet = Quiet::look()?;
        let over = begun.elapsed() >= Duration::from_secs(seconds) || interrupted.load(Ordering::Relaxed);
        if quiet.noise.is_empty() || over {
            let how = if quiet.noise.is_empty() {
                "quiet".into()
            } else {
                format!("NOISY: {}", quiet.noise.join(", "))
            };
            println!("the machine is {how} (load average {:.2})", quiet.load);
            return Ok(quiet);
        }
    }
}

/// A file of random content, all of it allocated, that goes when it is dropped.
fn make_image(image: &Image, interrupted: &AtomicBool) -> Result<TempPath> {
    let dir = image.dir.display();
    let file = tempfile::Builder::new().prefix("vbench-").suffix(".img").tempfile_in(&image.dir);
    let (mut file, path) = file.with_context(|| format!("cannot make an image in {dir}"))?.into_parts();
    let mut random = 0x9e37_79b9_7f4a_7c15u64;
    let mut mib = vec![0; 1 << 20];
    for _ in 0..image.mib {
        ensure!(!interrupted.load(Ordering::Relaxed), "interrupted");
        for word in mib.chunks_exact_mut(8) {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            word.copy_from_slice(&random.to_le_bytes());
        }
        file.write_all(&mib).with_context(|| format!("{dir} has no room for {} MiB", image.mib))?;
    }
    file.sync_all()?;
    Ok(path)
}

fn write(what: &Compare, results: &Results) -> Result<()> {
    if let Some(path) = &what.json {
        let json = serde_json::to_string_pretty(results)?;
        std::fs::write(path, json).with_context(|| format!("cannot write {}", path.display()))?;
    }
    if let Some(path) = &what.html {
        let page = html::page(results)?;
        std::fs::write(path, page).with_context(|| format!("cannot write {}", path.display()))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with(generator: Option<usize>, backend: Option<&str>) -> Matrix {
        let mut matrix = Matrix::default();
        matrix.options.generator_cpu = generator;
        matrix.options.backend_cpus = backend.map(Into::into);
        matrix
    }

    #[test]
    fn generator_and_back_end_get_a_cpu_each() {
        let placed = |g, b, usable: &[usize]| place(&with(g, b), usable).ok();
        assert_eq!(placed(None, None, &[0, 1]), Some((1, vec![0])));
        assert_eq!(placed(Some(0), None, &[0, 1]), Some((0, vec![1])));
        assert_eq!(placed(None, Some("1"), &[0, 1]), Some((0, vec![1])));
        assert_eq!(placed(None, Some("0-1"), &[0, 1, 2, 3]), Some((2, vec![0, 1])));
        assert_eq!(placed(None, None, &[5]), Some((5, vec![5])));
        assert_eq!(placed(Some(7), None, &[0, 1]), None);
        assert_eq!(placed(None, Some("x"), &[0, 1]), None);
    }

    #[test]
    fn an_image_is_whole_and_goes_when_it_is_dropped() {
        let dir = tempfile::tempdir().unwrap();
        let image = make_image(&Image { dir: dir.path().into(), mib: 2 }, &AtomicBool::new(false)).unwrap();
        assert_eq!(std::fs::metadata(&image).unwrap().len(), 2 << 20);
        drop(image);
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    }
}
