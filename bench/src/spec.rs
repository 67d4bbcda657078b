//! What one job is to do: fio's vocabulary, resolved.

use std::path::PathBuf;
use std::time::Duration;

use poll_engine::engine::placement::CpuList;

use crate::units::{Amount, Sizes};
use crate::{Load, Pattern};

/// How requests are timed.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Rate {
    /// As fast as the queue takes them.
    Full,
    /// Not faster than this many a second; a request begins when it is sent.
    Closed(f64),
    /// This many a second arrive whatever the back end does; a request begins when it arrives.
    Open {
        /// Requests a second.
        rate: f64,
        /// Exponential times between them instead of equal ones.
        poisson: bool,
    },
}

/// A job section with all its options.
#[derive(Clone, Debug)]
#[allow(clippy::struct_excessive_bools)] // options are
pub struct Spec {
    /// Name in the output.
    pub name: String,
    /// Socket to drive.
    pub socket_path: Option<PathBuf>,
    /// Access pattern.
    pub rw: Pattern,
    /// Percentage of reads where both are mixed.
    pub rwmixread: u8,
    /// Block sizes of reads and writes.
    pub sizes: [Sizes; 2],
    /// Requests in flight for each job.
    pub iodepth: u16,
    /// Jobs, each with one queue.
    pub numjobs: u16,
    /// When to stop, if not before.
    pub runtime: Option<Duration>,
    /// Start over until `runtime` is over.
    pub time_based: bool,
    /// Time before measuring begins.
    pub ramp_time: Duration,
    /// Bytes to do, and the part of the disk to do them in.
    pub size: Option<Amount>,
    /// Where that part begins.
    pub offset: Amount,
    /// How much further it begins for each further job of `numjobs`.
    pub offset_increment: Amount,
    /// Stop after so many requests.
    pub number_ios: Option<u64>,
    /// `rate_iops`.
    pub rate_iops: Option<u64>,
    /// `arrival_rate`.
    pub arrival_rate: Option<u64>,
    /// Arrivals of `arrival_rate` are a Poisson process.
    pub poisson: bool,
    /// A flush behind every so many writes.
    pub fsync: Option<u64>,
    /// Writes are durable before they are answered: the device knows of no flushes.
    pub sync: bool,
    /// Seed of all random numbers.
    pub randseed: u64,
    /// Random offsets may repeat before all blocks were used.
    pub norandommap: bool,
    /// Write headers with checksums and check what is read.
    pub verify: bool,
    /// Read everything back after writing.
    pub do_verify: bool,
    /// Sleep until interrupted instead of polling.
    pub interrupt: bool,
    /// On one thread with all jobs that have this, polled in turn.
    pub one_thread: bool,
    /// Indirect descriptors.
    pub indirect: bool,
    /// No event index.
    pub no_event_idx: bool,
    /// Guest memory in 2 MiB pages.
    pub hugepages: bool,
    /// Packed rings.
    pub packed: bool,
    /// Have the device answer in order, and tell of several answers at once.
    pub in_order: bool,
    /// Have requests in flight recorded (`INFLIGHT_SHMFD`).
    pub inflight: bool,
    /// CPU of the first job; the next for the next.
    pub cpu: Option<usize>,
    /// CPUs for all jobs.
    pub cpus_allowed: Option<CpuList>,
    /// Begin when all sections before have ended.
    pub stonewall: bool,
    /// Report all jobs of the section as one.
    pub group_reporting: bool,
    /// Sequential jobs start at different places of the same part.
    pub spread: bool,
}

impl Default for Spec {
    fn default() -> Spec {
        Spec {
            name: "vbench".into(),
            socket_path: None,
            rw: Pattern::Read,
            rwmixread: 50,
            sizes: [Sizes::one(4096), Sizes::one(4096)],
            iodepth: 1,
            numjobs: 1,
            runtime: None,
            time_based: false,
            ramp_time: Duration::ZERO,
            size: None,
            offset: Amount::Bytes(0),
            offset_increment: Amount::Bytes(0),
            number_ios: None,
            rate_iops: None,
            arrival_rate: None,
            poisson: false,
            fsync: None,
            sync: false,
            randseed: 0,
            norandommap: false,
            verify: false,
            do_verify: true,
            interrupt: false,
            one_thread: false,
            indirect: false,
            no_event_idx: false,
            hugepages: false,
            packed: false,
            in_order: false,
            inflight: false,
            cpu: None,
            cpus_allowed: None,
            stonewall: false,
            group_reporting: false,
            spread: false,
        }
    }
}

impl Spec {
    /// The load of a comparison: by time, and with repeating offsets.
    pub fn of(load: &Load) -> Spec {
        Spec {
            rw: load.rw,
            rwmixread: load.rwmixread,
            sizes: [Sizes::one(load.bs), Sizes::one(load.bs)],
            iodepth: load.iodepth,
            arrival_rate: load.arrival_rate,
            fsync: load.fsync,
            sync: load.sync,
            numjobs: load.numjobs,
            runtime: Some(load.runtime),
            time_based: true,
            ramp_time: load.ramp_time,
            cpu: load.cpu,
            indirect: load.indirect,
            no_event_idx: load.no_event_idx,
            packed: load.packed,
            in_order: load.in_order,
            inflight: load.inflight,
            norandommap: true,
            spread: true,
            ..Spec::default()
        }
    }

    /// What no single option can know.
    pub fn check(&self) -> Result<(), String> {
        let bad = if self.socket_path.is_none() {
            "no socket: give --socket-path, or socket_path in the job file"
        } else if self.time_based && self.runtime.is_none() {
            "time_based needs a runtime"
        } else if self.rate_iops.is_some() && self.arrival_rate.is_some() {
            "rate_iops and arrival_rate exclude each other"
        } else if self.poisson && self.arrival_rate.is_none() {
            "arrival=poisson needs an arrival_rate"
        } else if self.cpu.is_some() && self.cpus_allowed.is_some() {
            "cpu and cpus_allowed exclude each other"
        } else if self.one_thread && self.interrupt {
            "one_thread polls: it excludes completion=interrupt"
        } else if self.sync && self.fsync.is_some() {
            "sync and fsync exclude each other"
        } else {
            return Ok(());
        };
        Err(self.named(bad))
    }

    /// A message about it: with its name, if it has one.
    pub fn named(&self, message: &str) -> String {
        if self.name == Spec::default().name { message.into() } else { format!("{}: {message}", self.name) }
    }

    /// How its requests are timed.
    pub fn rate(&self) -> Rate {
        match (self.rate_iops, self.arrival_rate) {
            (_, Some(rate)) => Rate::Open { rate: rate as f64, poisson: self.poisson },
            (Some(rate), _) => Rate::Closed(rate as f64),
            _ => Rate::Full,
        }
    }

    /// Descriptors of a queue: room for three a request, and more where rings of common length have it.
    pub fn ring_size(&self) -> u16 {
        let ample = (u32::from(self.iodepth.max(16)) * 4).next_power_of_two();
        let needed = u32::from(self.iodepth) * if self.indirect { 1 } else { 3 };
        (if ample > 1024 { needed.next_power_of_two().max(1024) } else { ample }) as u16
    }

    /// The largest request it makes.
    pub fn largest(&self) -> u32 {
        let [(_, read), (_, write)] = self.sizes.each_ref().map(Sizes::range);
        match (self.rw.reads(), self.rw.writes()) {
            (true, false) => read,
            (false, true) => write,
            _ => read.max(write),
        }
    }

    /// Guest memory that its jobs take.
    pub fn memory(&self) -> u64 {
        let request = u64::from(self.largest()).next_multiple_of(4096) + 4096;
        let ring = u64::from(self.ring_size()) * 26 + (4 << 12);
        u64::from(self.numjobs) * (u64::from(self.iodepth) * request + ring)
    }
}
