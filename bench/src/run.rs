//! `vbench run`: sections in order, their results, and how it ends.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Instant, SystemTime};

use anyhow::{Context, Result};
use nix::errno::Errno;

use crate::drive::drive;
use crate::front_end::Session;
use crate::job::{Failure, JobResult};
use crate::jobfile::{self, Section};
use crate::options::Given;
use crate::requests::Region;
use crate::spec::Spec;
use crate::verify::Ledger;
use crate::{fio_json, human};

/// One socket to drive, or what a job file says.
#[derive(Clone, Debug, clap::Args)]
pub struct Run {
    /// Job file: fio's format, or TOML if it ends in .toml. Options of the command line hold where a section of the
    /// file has none of its own
    #[arg(value_name = "JOBFILE")]
    pub file: Option<PathBuf>,
    /// What to do; names and meanings are fio's where fio has them
    #[command(flatten)]
    pub options: Given,
    /// Write the result as JSON, in fio's form, to FILE; to standard output and nothing else if that is - or missing
    #[arg(long, value_name = "FILE", num_args = 0..=1, default_missing_value = "-")]
    pub json: Option<PathBuf>,
}

/// A job and what became of it.
#[derive(Debug)]
pub struct Entry {
    /// What it was to do.
    pub spec: Arc<Spec>,
    /// Sections that ran at the same time have the same.
    pub group: usize,
    /// Options as they were given.
    pub options: Given,
    /// What it has done.
    pub result: JobResult,
    /// Seconds from the start of its group to its end.
    pub elapsed: f64,
}

/// All that a run was.
#[derive(Debug, Default)]
pub struct Report {
    /// Its jobs.
    pub entries: Vec<Entry>,
    /// Options of the file for all sections.
    pub global: Given,
    /// Why it ended before its time.
    pub failure: Option<String>,
}

/// Runs it. Usage errors are 2, whatever goes wrong later is 1.
pub fn run(run: &Run) -> ExitCode {
    let plan = match plan(run) {
        Ok(plan) => plan,
        Err(e) => {
            eprintln!("vbench: {e}");
            return ExitCode::from(2);
        }
    };
    let report = execute(plan);
    if let Some(failure) = &report.failure {
        eprintln!("vbench: {failure}");
    }
    match write(run, &report) {
        Ok(()) if report.failure.is_none() => ExitCode::SUCCESS,
        Ok(()) => ExitCode::FAILURE,
        Err(e) => {
            eprintln!("vbench: {e:#}");
            ExitCode::FAILURE
        }
    }
}

fn write(run: &Run, report: &Report) -> Result<()> {
    let json = || format!("{:#}\n", fio_json::document(report, SystemTime::now()));
    match &run.json {
        Some(path) if path == Path::new("-") => print!("{}", json()),
        Some(path) => {
            std::fs::write(path, json()).with_context(|| format!("cannot write {}", path.display()))?;
            human::print(report);
        }
        None => human::print(report),
    }
    Ok(())
}

/// A section with all its options applied.
#[derive(Debug)]
struct Planned {
    spec: Arc<Spec>,
    group: usize,
    options: Given,
    global: Given,
}

fn plan(run: &Run) -> Result<Vec<Planned>, String> {
    let sections = match &run.file {
        Some(file) => jobfile::read(file)?,
        None => vec![Section::default()],
    };
    // `--json jobs.fio` takes the job file for the place of the result.
    let swallowed = |path: &&PathBuf| {
        run.file.is_none() && path.extension().is_some_and(|e| e == "fio" || e == "toml") && path.exists()
    };
    if let Some(path) = run.json.as_ref().filter(swallowed) {
        return Err(format!("--json would overwrite {0}; write --json=- {0} to run it", path.display()));
    }
    let (mut group, mut planned) = (0, Vec::new());
    for section in sections {
        let mut spec = Spec { name: section.name.clone().unwrap_or("vbench".into()), ..Spec::default() };
        for given in [&section.global, &run.options, &section.own] {
            given.apply(&mut spec)?;
        }
        // --name names the only job there is without a file.
        spec.name = section.name.unwrap_or(spec.name);
        spec.check()?;
        group += usize::from(spec.stonewall && !planned.is_empty());
        let options = Given([run.options.0.clone(), section.own.0].concat());
        planned.push(Planned { spec: Arc::new(spec), group, options, global: section.global });
    }
    Ok(planned)
}

fn execute(mut plan: Vec<Planned>) -> Report {
    let mut report = Report::default();
    let mut known: HashMap<PathBuf, Ledger> = HashMap::new();
    report.global = plan.first().map(|p| p.global.clone()).unwrap_or_default();
    while report.failure.is_none() && !plan.is_empty() {
        let group = plan[0].group;
        let rest = plan.iter().position(|p| p.group != group).unwrap_or(plan.len());
        let mut sections: Vec<_> = plan.drain(..rest).collect();
        // Those of one socket share a session.
        sections.sort_by(|a, b| a.spec.socket_path.cmp(&b.spec.socket_path));
        let specs: Vec<_> = sections.iter().map(|s| Arc::clone(&s.spec)).collect();
        let begun = Instant::now();
        let results = together(&specs, &mut known).unwrap_or_else(|e| {
            let errno = e.downcast_ref::<Errno>().map_or(Errno::EIO, |e| *e) as i32;
            let failure = Failure { message: format!("{e:#}"), errno };
            let jobs = specs.iter().map(|s| usize::from(s.numjobs)).sum();
            vec![JobResult::nothing(Region { start: 0, len: 0 }, Some(failure)); jobs]
        });
        let elapsed = begun.elapsed().as_secs_f64();
        let jobs = sections.iter().flat_map(|s| std::iter::repeat_n(s, usize::from(s.spec.numjobs)));
        for (section, result) in jobs.zip(results) {
            if let (None, Some(failure)) = (&report.failure, &result.failure) {
                // What concerns one section has its name already.
                let own = failure.message.starts_with(&format!("{}:", section.spec.name));
                let message = &failure.message;
                report.failure = Some(if own { message.clone() } else { section.spec.named(message) });
            }
            let (spec, options) = (Arc::clone(&section.spec), section.options.clone());
            report.entries.push(Entry { spec, group, options, result, elapsed });
        }
    }
    report
}

/// Runs sections, sorted by socket, at the same time.
fn together(specs: &[Arc<Spec>], known: &mut HashMap<PathBuf, Ledger>) -> Result<Vec<JobResult>> {
    let (mut sessions, mut jobs, mut sockets) = (Vec::new(), Vec::new(), Vec::new());
    let mut owners = Vec::new();
    for same in specs.chunk_by(|a, b| a.socket_path == b.socket_path) {
        let path = same[0].socket_path.clone().unwrap_or_default();
        let ledger = known.entry(path.clone()).or_default();
        let mut session = Session::open(&path, same, ledger)?;
        let first = jobs.len();
        jobs.append(&mut session.jobs);
        sockets.push((session.fd(), first..jobs.len()));
        owners.resize(jobs.len(), path);
        sessions.push(session);
    }
    let writes: Vec<_> = jobs.iter().map(|(spec, _)| spec.rw.writes()).collect();
    let mut results = drive(jobs, &sockets, || {})?;
    for ((result, path), writes) in results.iter_mut().zip(owners).zip(writes) {
        let (ledger, region) = (known.entry(path).or_default(), result.region);
        if writes {
            ledger.forget_range(region.start, region.start + region.len);
        }
        ledger.merge(result.ledger.take().unwrap_or_default());
    }
    Ok(results)
}
