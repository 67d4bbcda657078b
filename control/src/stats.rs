//! All that a view of a daemon needs, in one answer: counters since it has started, of which a view shows what came in between
//! two of them.

use std::collections::BTreeMap;

use nix::time::{ClockId, clock_gettime};
use poll_engine::engine::ReactorInfo;
use poll_engine::stats::{ERROR_KINDS, QueueStats};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// A daemon, at one moment.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub struct Stats {
    /// Its name.
    pub program: String,
    /// Its version.
    pub version: String,
    /// The number of its process: another one counts anew.
    pub pid: u32,
    /// When this was, in nanoseconds of the kernel's monotonic clock.
    pub now_ns: u64,
    /// How reactors wait for requests.
    pub poll: String,
    /// Its reactors.
    pub reactors: Vec<ReactorTimes>,
    /// What it serves.
    pub exports: Vec<Export>,
}

/// The time now, for [`Stats::now_ns`].
pub fn now_ns() -> u64 {
    clock_gettime(ClockId::CLOCK_MONOTONIC)
        .map_or(0, |t| t.tv_sec().unsigned_abs() * 1_000_000_000 + t.tv_nsec().unsigned_abs())
}

/// What a reactor has spent its time on since it began.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub struct ReactorTimes {
    /// Its number, which no other one ever has.
    pub reactor: usize,
    /// The CPU that it is pinned to, if it is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub cpu: Option<usize>,
    /// How many queues run on it.
    pub queues: usize,
    /// Nanoseconds of serving requests.
    pub busy_ns: u64,
    /// Nanoseconds of looking at rings that had nothing.
    pub idle_ns: u64,
    /// Nanoseconds of waiting in the kernel.
    pub asleep_ns: u64,
}

impl From<&ReactorInfo> for ReactorTimes {
    fn from(r: &ReactorInfo) -> ReactorTimes {
        let ns = |time: std::time::Duration| time.as_nanos() as u64;
        let (busy_ns, idle_ns, asleep_ns) = (ns(r.spent.busy), ns(r.spent.idle), ns(r.spent.asleep));
        ReactorTimes { reactor: r.number, cpu: r.cpu, queues: r.queues, busy_ns, idle_ns, asleep_ns }
    }
}

/// A disk or port.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub struct Export {
    /// What it is known by.
    pub name: String,
    /// The name of the switch that a port is on, if that has one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub switch: Option<String>,
    /// Whether a front end is connected.
    pub attached: bool,
    /// Whether its queues are to take no requests.
    pub paused: bool,
    /// Its queues.
    pub queues: Vec<QueueCounts>,
    /// Packets that went nowhere, by reason: those that have come up. Disks have none.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub drops: BTreeMap<String, u64>,
}

/// What a queue has done. A port's receive and transmit queues take turns, and their requests are packets: read are those that
/// its guest is given, written those that it sends.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub struct QueueCounts {
    /// Its number.
    pub queue: u16,
    /// The number of the reactor that it runs on, if it runs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub reactor: Option<usize>,
    /// Requests completed.
    pub requests: u64,
    /// Bytes read by the guest.
    pub read: u64,
    /// Bytes written by the guest.
    pub written: u64,
    /// Errors of any kind.
    pub errors: u64,
    /// Times that a limit had it leave its requests where they were.
    pub limited: u64,
    /// For how long, in nanoseconds.
    pub limited_ns: u64,
    /// Notifications taken from the guest.
    pub kicks: u64,
    /// Interrupts sent to the guest.
    pub signals: u64,
    /// Most requests ever in flight at once.
    pub peak: u64,
    /// Times from taking a request to giving it back: nanoseconds at most, exact to 6 %, and how many took that.
    pub latency: Vec<[u64; 2]>,
}

impl QueueCounts {
    /// Those of queue `queue`.
    pub fn of(queue: u16, stats: &QueueStats) -> QueueCounts {
        QueueCounts {
            queue,
            reactor: stats.reactor(),
            requests: stats.requests.get(),
            read: stats.bytes_read.get(),
            written: stats.bytes_written.get(),
            errors: ERROR_KINDS.iter().map(|(kind, _)| stats.errors(*kind)).sum(),
            limited: stats.limited.get(),
            limited_ns: stats.limited_ns.get(),
            kicks: stats.kicks.get(),
            signals: stats.signals.get(),
            peak: stats.in_flight_peak.get(),
            latency: stats.latency.counts().into_iter().map(<[u64; 2]>::from).collect(),
        }
    }
}
