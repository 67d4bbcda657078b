//! What a daemon does now: what came between two readings of its counters.

use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap};

use control::stats::{Export, QueueCounts, ReactorTimes, Stats};

/// What was done in a second, and how long it took.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Rates {
    /// Requests a second.
    pub iops: f64,
    /// The same by the way: of queues with even numbers, in which guests of ports receive, and with odd ones.
    pub ways: [f64; 2],
    /// Bytes a second that the guest has read.
    pub read: f64,
    /// Bytes a second that the guest has written.
    pub written: f64,
    /// Nanoseconds that half of the requests, 99 % and 99.9 % of them took at most; nothing if there were none.
    pub percentiles: Option<[u64; 3]>,
    /// Errors since the daemon has started, and how many of them came now; of ports, with packets that went nowhere.
    pub errors: (u64, u64),
    /// Packets a second that went nowhere.
    pub dropped: f64,
    /// Share of the time that a limit had requests wait, of the queue that waited most.
    pub limited: f64,
    /// Notifications a second.
    pub kicks: f64,
    /// Interrupts a second.
    pub signals: f64,
    /// Requests completed since the daemon has started.
    pub requests: u64,
    /// Most requests ever in flight on one queue.
    pub peak: u64,
}

/// A queue now.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct QueueNow {
    pub queue: u16,
    pub reactor: Option<usize>,
    pub rates: Rates,
}

/// Why packets went nowhere, now.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct DropsNow {
    pub reason: String,
    /// Since the daemon has started.
    pub all: u64,
    /// A second.
    pub rate: f64,
}

/// An export now.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ExportNow {
    pub name: String,
    /// That of the switch that it is on, if that has one.
    pub switch: Option<String>,
    pub attached: bool,
    pub paused: bool,
    pub rates: Rates,
    pub queues: Vec<QueueNow>,
    pub drops: Vec<DropsNow>,
}

impl ExportNow {
    /// As it is shown, and found.
    pub fn label(&self) -> Cow<'_, str> {
        match &self.switch {
            Some(switch) => format!("{} on {switch}", self.name).into(),
            None => self.name.as_str().into(),
        }
    }
}

/// A reactor now: shares of its time.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ReactorNow {
    pub reactor: usize,
    pub cpu: Option<usize>,
    pub queues: usize,
    pub busy: f64,
    pub idle: f64,
    pub asleep: f64,
}

/// A daemon now.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Now {
    pub program: String,
    pub version: String,
    pub pid: u32,
    pub poll: String,
    pub reactors: Vec<ReactorNow>,
    pub exports: Vec<ExportNow>,
    /// Of all exports.
    pub all: Rates,
}

/// What came between two readings; nothing, if another process has answered or no time has passed.
pub fn between(before: &Stats, after: &Stats) -> Option<Now> {
    let ns = after.now_ns.checked_sub(before.now_ns).filter(|ns| *ns > 0)?;
    if before.pid != after.pid {
        return None;
    }
    let seconds = ns as f64 / 1e9;
    let earlier: HashMap<_, _> = before.exports.iter().map(|e| (e.name.as_str(), e)).collect();
    let exports: Vec<_> =
        after.exports.iter().map(|e| export(earlier.get(e.name.as_str()).copied(), e, seconds)).collect();
    let dropped = exports.iter().flat_map(|e| &e.drops);
    let all_drops: Vec<_> = dropped.cloned().collect();
    let reactor = |r: &ReactorTimes| reactor(before.reactors.iter().find(|b| b.reactor == r.reactor), r);
    let all = after.exports.iter().flat_map(|e| {
        let before = earlier.get(e.name.as_str());
        e.queues.iter().map(move |q| (queue_before(before.copied(), q), q))
    });
    let mut all = rates(all, seconds);
    add_drops(&mut all, &all_drops, seconds);
    Some(Now {
        program: after.program.clone(),
        version: after.version.clone(),
        pid: after.pid,
        poll: after.poll.clone(),
        reactors: after.reactors.iter().map(reactor).collect(),
        all,
        exports,
    })
}

/// The counts of a queue before. A disk that was removed and added again has counted anew: that all came since.
fn queue_before<'a>(export: Option<&'a Export>, queue: &QueueCounts) -> Option<&'a QueueCounts> {
    let before = export?.queues.iter().find(|b| b.queue == queue.queue)?;
    (before.requests <= queue.requests && before.kicks <= queue.kicks).then_some(before)
}

fn export(before: Option<&Export>, after: &Export, seconds: f64) -> ExportNow {
    let pair = |q| (queue_before(before, q), q);
    let queue = |q: &QueueCounts| QueueNow {
        queue: q.queue,
        reactor: q.reactor,
        rates: rates([(queue_before(before, q), q)].into_iter(), seconds),
    };
    let drops: Vec<_> = after
        .drops
        .iter()
        .map(|(reason, n)| {
            let was = before.and_then(|before| before.drops.get(reason)).copied().unwrap_or(0);
            // One that has counted anew has done so since.
            let more = n.checked_sub(was).unwrap_or(*n);
            DropsNow { reason: reason.clone(), all: *n, rate: more as f64 / seconds }
        })
        .collect();
    let mut rates = rates(after.queues.iter().map(pair), seconds);
    add_drops(&mut rates, &drops, seconds);
    ExportNow {
        name: after.name.clone(),
        switch: after.switch.clone(),
        attached: after.attached,
        paused: after.paused,
        rates,
        queues: after.queues.iter().map(queue).collect(),
        drops,
    }
}

fn add_drops(rates: &mut Rates, drops: &[DropsNow], seconds: f64) {
    for drops in drops {
        rates.errors.0 += drops.all;
        rates.errors.1 += (drops.rate * seconds).round() as u64;
        rates.dropped += drops.rate;
    }
}

fn reactor(before: Option<&ReactorTimes>, after: &ReactorTimes) -> ReactorNow {
    let none = ReactorTimes::default();
    let before = before.unwrap_or(&none);
    let [busy, idle, asleep] = [
        after.busy_ns.saturating_sub(before.busy_ns),
        after.idle_ns.saturating_sub(before.idle_ns),
        after.asleep_ns.saturating_sub(before.asleep_ns),
    ];
    let all = (busy + idle + asleep).max(1) as f64;
    let share = |ns: u64| ns as f64 / all;
    ReactorNow {
        reactor: after.reactor,
        cpu: after.cpu,
        queues: after.queues,
        busy: share(busy),
        idle: share(idle),
        asleep: share(asleep),
    }
}

fn rates<'a>(
    queues: impl Iterator<Item = (Option<&'a QueueCounts>, &'a QueueCounts)>,
    seconds: f64,
) -> Rates {
    let mut sum = Rates::default();
    let mut latency = BTreeMap::new();
    let none = QueueCounts::default();
    for (before, after) in queues {
        let before = before.unwrap_or(&none);
        let more = |of: fn(&QueueCounts) -> u64| of(after).saturating_sub(of(before));
        let rate = |of: fn(&QueueCounts) -> u64| more(of) as f64 / seconds;
        sum.iops += rate(|q| q.requests);
        sum.ways[usize::from(after.queue % 2)] += rate(|q| q.requests);
        sum.read += rate(|q| q.read);
        sum.written += rate(|q| q.written);
        sum.kicks += rate(|q| q.kicks);
        sum.signals += rate(|q| q.signals);
        sum.errors.0 += after.errors;
        sum.errors.1 += more(|q| q.errors);
        sum.limited = sum.limited.max((rate(|q| q.limited_ns) / 1e9).min(1.0));
        sum.requests += after.requests;
        sum.peak = sum.peak.max(after.peak);
        let earlier: HashMap<u64, u64> = before.latency.iter().map(|[ns, n]| (*ns, *n)).collect();
        for [ns, n] in &after.latency {
            *latency.entry(*ns).or_insert(0) += n.saturating_sub(earlier.get(ns).copied().unwrap_or(0));
        }
    }
    let latency: Vec<_> = latency.into_iter().filter(|(_, n)| *n > 0).collect();
    let percentile = |percent| poll_engine::stats::percentile(&latency, percent);
    sum.percentiles = (!latency.is_empty()).then(|| [50.0, 99.0, 99.9].map(percentile));
    sum
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stats(now_ns: u64, queues: Vec<QueueCounts>) -> Stats {
        let exports = vec![Export { name: "a".into(), queues, ..Export::default() }];
        let busy_ns = now_ns / 4;
        let reactor = ReactorTimes { busy_ns, asleep_ns: now_ns - busy_ns, ..ReactorTimes::default() };
        Stats { now_ns, exports, reactors: vec![reactor], ..Stats::default() }
    }

    #[test]
    fn rates_are_what_came_between_two_readings() {
        let queue = |requests, latency: &[[u64; 2]]| QueueCounts {
            requests,
            read: requests * 4096,
            errors: requests / 100,
            limited_ns: requests * 1_000_000,
            latency: latency.to_vec(),
            ..QueueCounts::default()
        };
        let before = stats(1_000_000_000, vec![queue(1000, &[[10, 900], [20, 100]])]);
        let after = stats(3_000_000_000, vec![queue(2000, &[[10, 900], [20, 1090], [70, 10]])]);
        let now = between(&before, &after).unwrap();
        let rates = &now.exports[0].rates;
        assert_eq!((rates.iops, rates.read, rates.errors), (500.0, 500.0 * 4096.0, (20, 10)));
        assert_eq!((rates.percentiles, rates.limited), (Some([20, 20, 70]), 0.5));
        assert_eq!((&now.all, &now.exports[0].queues[0].rates), (rates, rates));
        assert_eq!((now.reactors[0].busy, now.reactors[0].asleep), (0.25, 0.75));
        // Another process, or a disk that has begun anew.
        assert_eq!(between(&before, &Stats { pid: 7, ..after.clone() }), None);
        assert_eq!(between(&after, &after), None);
        // Packets that went nowhere, of a port that was added again meanwhile, too.
        let dropping = |stats: &Stats, all: &[(&str, u64)]| {
            let mut stats = stats.clone();
            stats.exports[0].drops = all.iter().map(|(reason, n)| ((*reason).to_owned(), *n)).collect();
            stats
        };
        let [before, after] =
            [dropping(&before, &[("a", 5), ("b", 9)]), dropping(&after, &[("a", 7), ("b", 4), ("c", 2)])];
        let now = between(&before, &after).unwrap();
        let drops: Vec<_> = now.exports[0].drops.iter().map(|d| (d.reason.as_str(), d.all, d.rate)).collect();
        assert_eq!(drops, [("a", 7, 1.0), ("b", 4, 2.0), ("c", 2, 1.0)]);
        assert_eq!((now.all.dropped, now.exports[0].rates.errors), (4.0, (20 + 13, 10 + 8)));
        let anew = stats(4_000_000_000, vec![queue(10, &[[10, 10]])]);
        assert!((between(&after, &anew).unwrap().all.iops - 10.0).abs() < 1e-9);
    }
}
