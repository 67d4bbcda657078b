//! The highest rate at which nothing, or no more than is allowed, is lost (RFC 2544, 26.1): a binary search by trials
//! at constant rates.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Result, bail};

use super::report::Report;
use super::session::Session;
use super::spec::{NetSpec, percent};
use super::tally::Tally;
use super::{judge, once};

/// How to search.
#[derive(Clone, Debug, clap::Args)]
pub struct Search {
    /// Search for the highest rate at which no more than --max-loss (0) is lost, by trials of --runtime (2 s) at
    /// constant rates (RFC 2544, 26.1). Packets that find no room in the ring count as lost
    #[arg(id = "search", long = "search", conflicts_with_all = ["arrival_rate", "rate_pps", "iodepth", "packets"])]
    on: bool,
    /// End the search when rates that pass and fail are so close, in percent
    #[arg(long, value_name = "PERCENT", default_value = "1", value_parser = percent, requires = "search")]
    resolution: f64,
    /// Packets a second to begin with, all queues and directions together; without it, what a first trial without a
    /// limit has received
    #[arg(long, value_name = "N", requires = "search")]
    max_rate: Option<f64>,
}

/// One trial.
#[derive(Clone, Debug)]
pub struct Trial {
    /// Packets a second, all queues and directions together.
    pub rate: f64,
    /// What was counted.
    pub tally: Tally,
    /// Whether no more was lost than is allowed.
    pub passed: bool,
}

/// Which rate comes next.
#[derive(Clone, Copy, Debug)]
struct Bounds {
    passed: f64,
    failed: f64,
    resolution: f64,
}

impl Bounds {
    fn next(&self) -> Option<f64> {
        let apart = (self.failed - self.passed) / self.failed;
        (apart > self.resolution).then_some(f64::midpoint(self.passed, self.failed))
    }

    fn note(&mut self, rate: f64, passed: bool) {
        if passed {
            self.passed = rate;
        } else {
            self.failed = rate;
        }
    }
}

impl Search {
    /// Whether it is asked for.
    pub fn is_on(&self) -> bool {
        self.on
    }
}

/// Searches; the trials and the best of them are left in the report.
pub fn search(spec: &Arc<NetSpec>, how: &Search, session: &mut Session, report: &mut Report) -> Result<()> {
    if !spec.direction.returns() {
        bail!("--search counts what arrives, and in {} nothing does", spec.direction.name());
    }
    let given = spec.load.shared.0.0.iter().any(|(name, _)| *name == "runtime");
    let runtime = spec.base.runtime.filter(|_| given).unwrap_or(Duration::from_secs(2));
    let senders = (0..spec.direction.ports()).filter(|p| spec.direction.sends(*p)).count();
    let senders = (senders * usize::from(spec.load.queue_pairs)) as f64;
    let allowed = spec.load.max_loss.unwrap_or(0.0);
    let mut trial = |rate: Option<f64>, report: &mut Report| -> Result<(f64, bool)> {
        let mut spec = spec.at(rate.map(|r| r / senders), runtime);
        // Loss is what is looked for.
        spec.load.max_loss = None;
        let spec = Arc::new(spec);
        let tally = once(&spec, session, || {})?;
        let failure = judge(&spec, &tally);
        let arrived = tally.rate(tally.sum().received_in_time);
        let passed = failure.is_none() && rate.is_some() && tally.sum().loss_percent() <= allowed;
        report.trial(Trial { rate: rate.unwrap_or(tally.rate(tally.sum().sent)), tally, passed });
        match failure {
            Some(failure) => bail!("{failure}"),
            None => Ok((arrived, passed)),
        }
    };
    let most = match how.max_rate {
        Some(rate) => rate,
        None => trial(None, report)?.0,
    };
    let mut bounds = Bounds { passed: 0.0, failed: most, resolution: how.resolution.max(0.01) / 100.0 };
    if !trial(Some(most), report)?.1 {
        while let Some(rate) = bounds.next() {
            let passed = trial(Some(rate), report)?.1;
            bounds.note(rate, passed);
            // Below that there is no rate to speak of.
            if bounds.failed < 100.0 * senders {
                break;
            }
        }
    }
    let best = report.trials.iter().filter(|t| t.passed).max_by(|a, b| a.rate.total_cmp(&b.rate));
    match best {
        Some(best) => report.tally = Some(best.tally.clone()),
        None => bail!("at no rate were only {allowed} % or fewer of the packets lost"),
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_search_ends_beside_what_it_looks_for() {
        for limit in [1.0, 1234.0, 500_000.0, 999_999.0] {
            let mut bounds = Bounds { passed: 0.0, failed: 1e6, resolution: 0.01 };
            let mut trials = 0;
            while let Some(rate) = bounds.next() {
                bounds.note(rate, rate <= limit);
                trials += 1;
                assert!(trials < 40);
            }
            assert!(bounds.passed <= limit && limit < bounds.failed, "{limit}: {bounds:?}");
            assert!(bounds.passed >= bounds.failed * 0.99, "{limit}: {bounds:?}");
        }
    }
}
