//! `vbench net`: packets through one network back end and back, or from one port of a switch to the other.

mod ceiling;
pub mod floor;
mod frame;
pub mod plain;
mod queue;
mod report;
mod search;
mod sequence;
mod session;
pub mod spec;
mod tally;
mod worker;

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::{Result, bail};

use self::report::Report;
use self::search::Search;
use self::session::{Negotiated, Session};
use self::spec::{Direction, NetLoad, NetSpec};
use self::tally::Tally;
use crate::drive::drive;
use crate::report::{Summary, Wire};

/// One socket to drive, or two.
#[derive(Clone, Debug, clap::Args)]
pub struct Net {
    /// vhost-user-net socket; twice for the two ports of a switch
    #[arg(long, value_name = "PATH", required_unless_present = "ceiling")]
    socket_path: Vec<PathBuf>,
    /// Listen at the sockets, for back ends that connect
    #[arg(long)]
    server: bool,
    /// Measure the generator itself, against rings that are served in this process
    #[arg(long, conflicts_with_all = ["socket_path", "server", "search", "json"])]
    ceiling: bool,
    /// What to send
    #[command(flatten)]
    load: NetLoad,
    #[command(flatten)]
    search: Search,
    /// Write the result as JSON to FILE; to standard output and nothing else if that is - or missing
    #[arg(long, value_name = "FILE", num_args = 0..=1, default_missing_value = "-")]
    json: Option<PathBuf>,
}

/// Runs it. Usage errors are 2, whatever goes wrong later is 1.
pub fn net(what: &Net) -> ExitCode {
    if what.ceiling {
        return done(ceiling::ceiling(&what.load));
    }
    let spec = match NetSpec::new(what.socket_path.clone(), what.server, &what.load) {
        Ok(spec) => Arc::new(spec),
        Err(e) => {
            eprintln!("vbench: {e}");
            return ExitCode::from(2);
        }
    };
    let report = execute(&spec, &what.search);
    if let Some(failure) = &report.failure {
        eprintln!("vbench: {failure}");
    }
    match report.write(what.json.as_deref()) {
        Ok(()) if report.failure.is_none() => ExitCode::SUCCESS,
        Ok(()) => ExitCode::FAILURE,
        Err(e) => done(Err(e)),
    }
}

fn done(outcome: Result<()>) -> ExitCode {
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("vbench: {e:#}");
            ExitCode::FAILURE
        }
    }
}

fn execute(spec: &Arc<NetSpec>, search: &Search) -> Report {
    let mut report = Report::new(spec);
    let outcome = Session::open(spec).and_then(|mut session| {
        report.negotiated.clone_from(&session.negotiated);
        if search.is_on() {
            return search::search(spec, search, &mut session, &mut report);
        }
        let tally = once(spec, &mut session, || {})?;
        report.failure = judge(spec, &tally);
        report.tally = Some(tally);
        Ok(())
    });
    if let Err(e) = outcome {
        report.failure = Some(format!("{e:#}"));
    }
    report
}

/// Runs all queue pairs once. What went wrong is in the result, unless there is none.
fn once(spec: &Arc<NetSpec>, session: &mut Session, mark: impl FnMut()) -> Result<Tally> {
    let workers = std::mem::take(&mut session.workers);
    let n = workers.len();
    let jobs = workers.into_iter().map(|mut worker| {
        worker.set(spec);
        (Arc::clone(&spec.base), worker)
    });
    let sockets: Vec<_> = session.fds().map(|fd| (fd, 0..n)).collect();
    let mut sum = Tally::new(spec.direction.ports());
    for ended in drive(jobs.collect(), &sockets, mark)? {
        sum.merge(&ended.tally);
        session.workers.push(ended.worker);
    }
    Ok(sum)
}

/// Why what was counted is no success.
fn judge(spec: &NetSpec, tally: &Tally) -> Option<String> {
    let (socket, sum) =
        (spec.sockets.first().map_or(String::new(), |p| p.display().to_string()), tally.sum());
    if let Some(failure) = &tally.failure {
        return Some(format!("{socket}: {}", failure.message));
    }
    let arrived = sum.received + sum.corrupt + sum.foreign + sum.duplicates;
    if sum.corrupt > 0 {
        let of = arrived;
        return Some(format!(
            "{socket}: wrong data: {} of {of} packets are not as they were sent",
            sum.corrupt
        ));
    }
    if spec.direction != Direction::Transmit && arrived == 0 {
        let what =
            if spec.direction == Direction::Receive { "no packet came" } else { "no packet has arrived" };
        return Some(format!("{socket}: {what}; does the back end forward packets?"));
    }
    let allowed = spec.load.max_loss.filter(|_| spec.direction.returns())?;
    let lost = sum.loss_percent();
    (lost > allowed)
        .then(|| format!("{socket}: {lost:.4} % of the packets were lost, more than --max-loss {allowed}"))
}

/// One run of a comparison: the sum of all queues. `mark` is called when measuring begins and when it ends.
pub fn run(spec: &Arc<NetSpec>, mark: impl FnMut()) -> Result<Summary> {
    let tally = once(spec, &mut Session::open(spec)?, mark)?;
    if let Some(failure) = judge(spec, &tally) {
        bail!("{failure}");
    }
    let sum = tally.sum();
    let (packets, bytes) = match spec.direction {
        Direction::Transmit => (sum.sent, sum.sent_bytes),
        _ => (sum.received_in_time, sum.received_bytes_in_time),
    };
    let loss_percent = if spec.direction.returns() { sum.loss_percent() } else { 0.0 };
    let wire = Wire { gbits: tally.rate(bytes * 8) / 1e9, loss_percent };
    Ok(Summary::of_packets(packets, tally.seconds, wire, sum.latency))
}
