//! The runs themselves, one after another in rounds, and all that is known of each.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Result, anyhow, bail};
use serde::Serialize;

use super::backend::{Found, Places, Started, spawn_on};
use super::drive::{Drive, Kind};
use super::host::{Cpus, Machine, Quiet, Usage};
use super::matrix::{Backend, Matrix, Point};
use super::perf::{Counters, Counts};
use super::round_trip;
use super::spread::number;
use crate::report::Summary;

/// One run of one back end.
#[derive(Clone, Debug, Serialize)]
pub struct Sample {
    /// Index of the point.
    pub point: usize,
    /// Back end.
    pub backend: String,
    /// Round, from 0.
    pub round: usize,
    /// Requests, or packets, a second.
    pub iops: f64,
    /// Requests measured; packets that arrived.
    pub requests: u64,
    /// Of packets, Gbit/s of frames.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub gbits: Option<f64>,
    /// Percent of the packets that were lost.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub loss_percent: Option<f64>,
    /// Microseconds: p50, p90, p99, p99.9, max.
    pub latency_us: [f64; 5],
    /// Part of requests (0 to 1), and microseconds in which they were finished.
    pub percentiles: Vec<[f64; 2]>,
    /// CPU time of the back end for a request, microseconds.
    pub cpu_us: Option<f64>,
    /// Times a request that the back end gave its CPU up.
    pub voluntary: Option<f64>,
    /// Times a request that a CPU was taken from it.
    pub involuntary: Option<f64>,
    /// Cycles, instructions and cache misses of the back end for a request.
    pub counters: Option<[f64; 3]>,
    /// Nanoseconds of a cache line's round trip between the two CPUs, before.
    pub round_trip_ns: Option<f64>,
    /// What went on beside.
    pub quiet: Quiet,
}

/// A point of the matrix as it is written out.
#[derive(Clone, Debug, Serialize)]
pub struct PointInfo {
    /// The workload's name.
    pub workload: String,
    /// All of it in words.
    pub title: String,
    /// Requests in flight for each queue.
    pub iodepth: u16,
    /// Queues.
    pub numjobs: u16,
    /// Requests that arrive a second for each queue, where that does not depend on the back end.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub arrival_rate: Option<u64>,
}

/// A back end as it is written out.
#[derive(Clone, Debug, Serialize)]
pub struct BackendInfo {
    /// Its name.
    pub name: String,
    /// The command as the matrix has it.
    pub command: Option<String>,
    /// Whether ratios are to it.
    pub reference: bool,
}

/// A run that is missing.
#[derive(Clone, Debug, Serialize)]
pub struct Failure {
    /// Index of the point; none where a back end did not run at all.
    pub point: Option<usize>,
    /// Back end.
    pub backend: String,
    /// Round, from 0.
    pub round: Option<usize>,
    /// Why.
    pub error: String,
}

/// Everything.
#[derive(Clone, Debug, Serialize)]
pub struct Results {
    /// Whether runs are missing.
    pub partial: bool,
    /// What the workloads are.
    pub kind: Kind,
    /// What it ran on.
    pub machine: Machine,
    /// CPU of the first job.
    pub generator_cpu: usize,
    /// CPUs of the back ends.
    pub backend_cpus: Vec<usize>,
    /// Rounds asked for.
    pub rounds: usize,
    /// Seconds of each run.
    pub runtime: f64,
    /// Back ends that were to run.
    pub backends: Vec<BackendInfo>,
    /// What they were driven with.
    pub points: Vec<PointInfo>,
    /// What was measured.
    pub samples: Vec<Sample>,
    /// What failed.
    pub failures: Vec<Failure>,
    /// Peers that are not installed, and why they were left out.
    pub left_out: Vec<[String; 2]>,
    /// The machine before.
    pub before: Quiet,
    /// Why there are no hardware counters.
    pub no_counters: Option<String>,
}

impl Results {
    /// Samples of a back end at a point, in the order of rounds.
    pub fn of(&self, point: usize, backend: &str) -> impl Iterator<Item = &Sample> + Clone {
        self.samples.iter().filter(move |s| s.point == point && s.backend == backend)
    }

    /// The back end that ratios are to.
    pub fn reference(&self) -> &str {
        self.backends.iter().find(|b| b.reference).map_or("", |b| &b.name)
    }

    /// Rounds of a point in which it was not quiet, or in which the CPUs moved apart or together.
    pub fn noisy_rounds(&self, point: usize) -> Vec<(usize, String)> {
        let mut noisy = Vec::new();
        for round in 0..self.rounds {
            let here = || self.samples.iter().filter(|s| s.point == point && s.round == round);
            let mut why = Vec::new();
            let noisy_runs = || here().filter(|s| !s.quiet.noise.is_empty());
            if let Some(worst) = noisy_runs().max_by(|a, b| a.quiet.taken().total_cmp(&b.quiet.taken())) {
                let said = worst.quiet.noise.join(", ");
                why.push(format!(
                    "{} of {} runs, at worst {said} ({})",
                    noisy_runs().count(),
                    here().count(),
                    worst.backend
                ));
            }
            let trips = here().filter_map(|s| s.round_trip_ns);
            if let Some(spread) = super::spread::Spread::of(trips)
                && spread.max > spread.min * 1.6
            {
                why.push(format!("the CPUs' distance changed: {:.0} to {:.0} ns", spread.min, spread.max));
            }
            if !why.is_empty() {
                noisy.push((round, why.join("; ")));
            }
        }
        noisy
    }
}

/// What it takes to run a matrix.
#[derive(Debug)]
pub struct Runner<'a> {
    /// What to run.
    pub matrix: &'a Matrix,
    /// Its points.
    pub points: Vec<Point>,
    /// What stands for braces.
    pub places: Places,
    /// CPU of the first job.
    pub generator_cpu: usize,
    /// CPUs this process may use.
    pub usable: Vec<usize>,
    /// Set by Ctrl-C.
    pub interrupted: &'a AtomicBool,
}

impl Runner<'_> {
    /// Runs all of it, for as long as it is not interrupted. What fails is in the results.
    pub fn run(&self, before: Quiet) -> Result<Results> {
        let mut results = self.prepared(before)?;
        for point in 0..self.points.len() {
            println!("== {}", self.points[point].title());
            let mut given_up: Vec<String> = Vec::new();
            for round in 0..results.rounds {
                for backend in &self.matrix.backend {
                    let name = &backend.name;
                    let runs = results.backends.iter().any(|b| b.name == *name) && !given_up.contains(name);
                    if self.interrupted.load(Ordering::Relaxed) || !runs {
                        continue;
                    }
                    match self.sample(point, round, backend) {
                        Ok((sample, no_counters)) => {
                            print_sample(&sample, results.kind);
                            results.no_counters = results.no_counters.or(no_counters);
                            results.samples.push(sample);
                        }
                        Err(e) if self.interrupted.load(Ordering::Relaxed) => drop(e),
                        Err(e) => {
                            let error = format!("{e:#}");
                            eprintln!(
                                "vbench: {name} failed in round {}, left out of the rest: {error}",
                                round + 1
                            );
                            given_up.push(name.clone());
                            let (point, round) = (Some(point), Some(round));
                            results.failures.push(Failure { point, backend: name.clone(), round, error });
                        }
                    }
                }
            }
        }
        results.partial = !results.failures.is_empty() || self.interrupted.load(Ordering::Relaxed);
        Ok(results)
    }

    /// Results without samples: what can run and what cannot.
    fn prepared(&self, before: Quiet) -> Result<Results> {
        let (mut backends, mut left_out, mut failures) = (Vec::new(), Vec::new(), Vec::new());
        for backend in &self.matrix.backend {
            let name = backend.name.clone();
            match self.places.find(backend)? {
                Found::Yes => backends.push(BackendInfo {
                    name,
                    command: backend.command.clone(),
                    reference: backend.reference,
                }),
                Found::NotInstalled(why) => {
                    println!("{name} is left out: {why}");
                    left_out.push([name, why]);
                }
                Found::Missing(error) => {
                    eprintln!("vbench: {name} cannot run: {error}");
                    failures.push(Failure { point: None, backend: name, round: None, error });
                }
            }
        }
        if backends.is_empty() {
            bail!("no back end can run");
        }
        if !backends.iter().any(|b| b.reference) {
            backends[0].reference = true;
        }
        let info = |p: &Point| PointInfo {
            workload: p.workload.clone(),
            title: p.title(),
            iodepth: p.drive.iodepth(),
            numjobs: p.drive.queues(),
            arrival_rate: p.drive.arrival_rate(),
        };
        Ok(Results {
            partial: true,
            kind: self.matrix.kind(),
            machine: Machine::this(self.usable.len()),
            generator_cpu: self.generator_cpu,
            backend_cpus: self.places.cpus.1.clone(),
            rounds: self.matrix.rounds(),
            runtime: self.matrix.runtime(),
            backends,
            points: self.points.iter().map(info).collect(),
            samples: Vec::new(),
            failures,
            left_out,
            before,
            no_counters: None,
        })
    }

    fn sample(&self, point: usize, round: usize, backend: &Backend) -> Result<(Sample, Option<String>)> {
        let device = self.places.cpus.1.first().copied().unwrap_or(0);
        let round_trip_ns = round_trip::median_ns(self.generator_cpu, device);
        let mut started = Started::new(backend, &self.places, self.interrupted)?;
        let drive = &self.points[point].drive;
        let drive = backend.ring.map_or_else(|| drive.clone(), |ring| drive.through(ring));
        let (drive, cpus) = self.place(&if backend.inflight { drive.recorded() } else { drive });
        let (sockets, pid) = (started.sockets().to_owned(), started.pid());
        // The jobs' threads are started by this one, and inherit its CPUs.
        let running = spawn_on(&cpus, move || {
            let mut marks: Vec<Result<Mark>> = Vec::new();
            let summary = drive.run(&sockets, || {
                let mut mark = Mark::now(pid, marks.is_empty());
                if let (Some(Ok(first)), Ok(mark)) = (marks.first_mut(), &mut mark) {
                    mark.counts = first.counted();
                }
                marks.push(mark);
            });
            summary.map(|summary| (summary, marks))
        })?;
        let mut ended = None;
        while !running.is_finished() {
            if self.interrupted.load(Ordering::Relaxed) {
                // Its thread ends with the process.
                bail!("interrupted");
            }
            ended = ended.or_else(|| started.ended());
            std::thread::sleep(Duration::from_millis(20));
        }
        let outcome = running.join().map_err(|_| anyhow!("the generator panicked"))??;
        let (summary, marks) = match (outcome, ended.or_else(|| started.ended())) {
            (_, Some(how)) => bail!("died while it was measured: {how}"),
            (Err(e), None) => return Err(e),
            (Ok(done), None) => done,
        };
        let [a, b] = <[Result<Mark>; 2]>::try_from(marks).map_err(|_| anyhow!("no two marks"))?;
        let (a, b) = (a?, b?);
        let none = summary.requests == 0;
        // Not a number where there was no request: it is left out of what is made of it.
        let each = |n: u64| if none { f64::NAN } else { n as f64 / summary.requests as f64 };
        let usage = a.theirs.zip(b.theirs);
        let us = |n: u64| each(n) / 1000.0;
        let ours = usage.map(|(x, y)| y.cpu_ns.saturating_sub(x.cpu_ns) + b.own.saturating_sub(a.own));
        let mut quiet = Quiet::between(&a.cpus, &b.cpus, ours)?;
        if none {
            quiet.noise.push("no request was finished in the time that was measured".into());
        }
        let latency = |p: f64| if none { f64::NAN } else { summary.us(p) };
        let sample = Sample {
            point,
            backend: backend.name.clone(),
            round,
            iops: summary.iops,
            requests: summary.requests,
            gbits: summary.wire.map(|w| w.gbits),
            loss_percent: summary.wire.map(|w| w.loss_percent),
            latency_us: [50.0, 90.0, 99.0, 99.9, 100.0].map(latency),
            percentiles: percentiles(&summary),
            cpu_us: usage.map(|(x, y)| us(y.cpu_ns.saturating_sub(x.cpu_ns))),
            voluntary: usage.map(|(x, y)| each(y.voluntary.saturating_sub(x.voluntary))),
            involuntary: usage.map(|(x, y)| each(y.involuntary.saturating_sub(x.involuntary))),
            counters: b.counts.map(|counts| counts.map(each)),
            round_trip_ns,
            quiet,
        };
        Ok((sample, a.no_counters))
    }

    /// Where the jobs run: one CPU each where there are enough, or all on the first.
    fn place(&self, drive: &Drive) -> (Drive, Vec<usize>) {
        let first = self.generator_cpu;
        let wanted: Vec<usize> = (first..first + usize::from(drive.queues())).collect();
        let own = wanted.iter().all(|c| self.usable.contains(c) && !self.places.cpus.1.contains(c));
        if own || drive.queues() == 1 { (drive.on(first), wanted) } else { (drive.clone(), vec![first]) }
    }
}

/// The counters when measuring begins or ends.
struct Mark {
    own: u64,
    theirs: Option<Usage>,
    cpus: Cpus,
    counters: Option<Counters>,
    counts: Option<Counts>,
    no_counters: Option<String>,
}

impl Mark {
    fn now(pid: Option<u32>, first: bool) -> Result<Mark> {
        let (counters, no_counters) = match pid.filter(|_| first).map(Counters::start) {
            Some(Ok(counters)) => (Some(counters), None),
            Some(Err(e)) => (None, Some(e.to_string())),
            None => (None, first.then(|| "not started here".into())),
        };
        let own = Usage::of(std::process::id())?.cpu_ns;
        let theirs = pid.map(Usage::of).transpose()?;
        Ok(Mark { own, theirs, cpus: Cpus::now()?, counters, counts: None, no_counters })
    }

    fn counted(&mut self) -> Option<Counts> {
        self.counters.as_mut().and_then(|c| c.read().ok())
    }
}

/// Ten for each further nine, as far as the number of requests bears them out.
fn percentiles(summary: &Summary) -> Vec<[f64; 2]> {
    let most = summary.requests as f64;
    let inverse = (0..=60).map(|i| 10f64.powf(f64::from(i) / 10.0)).filter(|x| *x <= most);
    inverse.map(|x| 1.0 - 1.0 / x).map(|part| [part, summary.us(part * 100.0)]).collect()
}

fn print_sample(s: &Sample, kind: Kind) {
    let trip = s.round_trip_ns.map_or("one CPU".into(), |ns| format!("CPUs {ns:.0} ns apart"));
    let noise = if s.quiet.noise.is_empty() {
        String::new()
    } else {
        format!("; NOISY: {}", s.quiet.noise.join(", "))
    };
    println!(
        "   round {} {:<16} {:>12} {}, p50 {:.2} us; {trip}, load {:.2}{noise}",
        s.round + 1,
        s.backend,
        number(s.iops, 0),
        kind.rate(),
        s.latency_us[0],
        s.quiet.load,
    );
}
