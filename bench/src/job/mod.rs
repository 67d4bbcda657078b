//! One job: keeps one queue filled, and polls for what is finished or sleeps until interrupted; on a thread of its own, or
//! in turn with others.

mod answers;
mod send;

use std::sync::Arc;
use std::time::Duration;

use nix::errno::Errno;
use nix::sched::{CpuSet, sched_setaffinity};
use nix::unistd::Pid;
use poll_engine::memory::{MemoryMap, Ram};
use poll_engine::ring::RingConfig;
use poll_engine::ring::driver::DriverRing;
use quanta::Clock;
use vmm_sys_util::eventfd::EventFd;

use crate::control::{Control, Order};
use crate::drive::Work;
use crate::event::sleep;
use crate::measure::Cost;
pub use crate::outcome::{Failure, JobResult};
use crate::pace::Pacer;
use crate::requests::{Random, Region, Request, Requests};
use crate::spec::{Rate, Spec};
use crate::verify::{self, Ledger, Written};

/// Requests that a job which shares its thread sends and collects in a turn: what one with a full queue does must not count
/// as the latency of the others.
const SHARE: usize = 2;
/// No slot.
const NONE: u16 = u16::MAX;

/// Guest-physical places of one request, and the request in it.
#[derive(Clone, Copy, Debug)]
struct Slot {
    header: u64,
    data: u64,
    status: u64,
    table: u64,
    busy: bool,
    request: Request,
    /// When its latency begins.
    since: u64,
    written: Written,
}

/// Where requests come from.
#[derive(Debug)]
enum Source {
    Work,
    ReadBack(std::vec::IntoIter<Request>),
}

/// Puts the calling thread where the job `index` of a section belongs.
pub fn pin(spec: &Spec, index: usize) -> nix::Result<()> {
    let mut set = CpuSet::new();
    match (spec.cpu, &spec.cpus_allowed) {
        (Some(first), _) => set.set(first + index)?,
        (None, Some(list)) => list.0.iter().try_for_each(|&cpu| set.set(cpu))?,
        (None, None) => return Ok(()),
    }
    sched_setaffinity(Pid::from_raw(0), &set)
}

/// A job that is ready to run.
#[derive(Debug)]
pub struct Job {
    spec: Arc<Spec>,
    index: usize,
    map: Arc<MemoryMap>,
    ring: DriverRing,
    slots: Vec<Slot>,
    free: Vec<u16>,
    by_head: Vec<u16>,
    kick: EventFd,
    call: EventFd,
    clock: Clock,
    started: u64,
    source: Source,
    requests: Requests,
    pacer: Pacer,
    /// A request that has to wait for another one to the same place, and since when.
    held: Option<(Request, u64)>,
    /// Latencies count from when requests were due, not from when they were sent.
    open: bool,
    seeds: Random,
    scratch: Vec<u8>,
    /// Bytes and requests that are left to send; what limits the job is counted down.
    bytes_left: u64,
    ios_left: u64,
    /// When measuring began, and when the last sample was taken.
    measuring: Option<u64>,
    sampled: u64,
    finished: u64,
    result: JobResult,
}

impl Work for Job {
    type Outcome = JobResult;
    const UNITS: &'static str = "requests";

    fn waker(&self) -> std::io::Result<EventFd> {
        self.call.try_clone()
    }

    fn run(mut jobs: Vec<(Job, Arc<Control>)>, ready: impl FnOnce()) -> Vec<JobResult> {
        if jobs.len() == 1 {
            let alone = jobs.pop().map(|(job, control)| job.run_beside(&control, ready, || {}));
            return alone.into_iter().collect();
        }
        jobs.iter_mut().take(1).for_each(|(job, _)| job.pin());
        ready();
        for (job, _) in &mut jobs {
            job.begin();
        }
        // In turn, each looked at once and sleeping never.
        let mut going = vec![true; jobs.len()];
        while going.contains(&true) {
            for ((job, control), going) in jobs.iter_mut().zip(&mut going) {
                if *going && !job.turn(control, SHARE, &mut || {}) {
                    *going = false;
                    control.end(job.result.failure.is_some());
                }
            }
        }
        let mut results: Vec<_> = jobs.into_iter().map(|(job, control)| job.end(&control)).collect();
        // Time of the CPU is the thread's: the first answers for all.
        for other in &mut results[1..] {
            (other.cpu_seconds, other.cost) = (0.0, Cost::default());
        }
        results
    }

    fn failure(outcome: &mut JobResult) -> &mut Option<Failure> {
        &mut outcome.failure
    }
}

impl Job {
    /// Sets memory aside; `None` when there is not enough. `index` is the job's in its section.
    pub fn new(
        spec: &Arc<Spec>,
        index: usize,
        ram: &mut Ram,
        config: &RingConfig,
        (region, known): (Region, &Ledger),
        (kick, call): (EventFd, EventFd),
    ) -> Option<Job> {
        let largest = spec.largest();
        let seed = spec.randseed.wrapping_add(index as u64);
        let mut seeds = Random::new(!seed);
        let mut scratch = vec![0; largest as usize];
        verify::fill(&mut scratch, 0, seeds.next());
        let mut slots = Vec::new();
        for _ in 0..spec.iodepth {
            // Header and status on one cache line, as drivers have them (Linux: `struct virtblk_req`).
            let header = ram.alloc(32, 64)?;
            let slot = Slot {
                header,
                status: header + 16,
                table: ram.alloc(48, 64)?,
                data: ram.alloc(u64::from(largest), 4096)?,
                busy: false,
                request: Request::FLUSH,
                since: 0,
                written: Written { len: 0, seed: 0, crc: 0 },
            };
            if spec.rw.writes() {
                // Zeroes may be cheaper to store.
                ram.map().slice(slot.data, largest)?.write(&scratch);
            }
            slots.push(slot);
        }
        let ring = DriverRing::new(config, ram.map()).ok()?;
        let mut result = JobResult::nothing(region, None);
        result.ledger = spec.verify.then(|| known.within(region.start, region.start + region.len));
        Some(Job {
            index,
            map: Arc::clone(ram.map()),
            ring,
            slots,
            free: (0..spec.iodepth).rev().collect(),
            by_head: vec![NONE; config.size as usize],
            kick,
            call,
            clock: Clock::new(),
            started: 0,
            source: Source::Work,
            requests: Requests::new(spec, index as u64, region),
            pacer: Pacer::new(spec.rate(), seed),
            held: None,
            open: matches!(spec.rate(), Rate::Open { .. }),
            seeds,
            scratch,
            bytes_left: u64::MAX,
            ios_left: u64::MAX,
            measuring: None,
            sampled: 0,
            finished: 0,
            result,
            spec: Arc::clone(spec),
        })
    }

    /// Runs until its work is done or it is told to end. `ready` is called before the first request, `peer` after
    /// requests were published.
    pub fn run_beside(
        mut self,
        control: &Control,
        ready: impl FnOnce(),
        mut peer: impl FnMut(),
    ) -> JobResult {
        self.pin();
        ready();
        self.begin();
        while self.turn(control, usize::MAX, &mut peer) {}
        self.end(control)
    }

    fn pin(&mut self) {
        if let Err(e) = pin(&self.spec, self.index) {
            self.fail(Errno::EINVAL, format!("cannot run on the CPU that was asked for: {e}"));
        }
    }

    fn begin(&mut self) {
        self.started = self.clock.raw();
        self.ring.set_interrupts(self.spec.interrupt);
    }

    /// Sends what is due and collects what is finished, of both at most so much, or waits a little; false when there is
    /// nothing more to come.
    #[inline(always)]
    fn turn(&mut self, control: &Control, most: usize, peer: &mut impl FnMut()) -> bool {
        let order = control.order();
        if order == Order::Abort {
            return false;
        }
        let now = self.now();
        if order >= Order::Measure && self.measuring.is_none() {
            self.measure(now);
        }
        let sending = self.result.failure.is_none()
            && match self.source {
                Source::Work => order <= Order::Measure,
                Source::ReadBack(_) => order <= Order::Stop,
            };
        let free = self.free.len();
        while sending && free - self.free.len() < most && self.send_next(now) {}
        let sent = free - self.free.len();
        let in_flight = self.slots.len() - self.free.len();
        if sent > 0 {
            self.result.sent.add(sent, 1);
            self.result.depths.add_depth(in_flight, sent as u64);
            control.report(self.finished, in_flight);
            if self.ring.publish() {
                self.result.kicks += 1;
                // A counter that is full has been kicked.
                let _ = self.kick.write(1);
            }
        }
        peer();
        let finished = usize::from(self.ring.finished()).min(most);
        if finished == 0 {
            if in_flight == 0 && !(sending && self.more()) {
                return self.read_back(order);
            }
            self.wait(sending, now);
            return true;
        }
        if finished > in_flight || !self.collect(finished) {
            self.fail(Errno::EPROTO, "the back end answered a request that is not in flight".into());
            return false;
        }
        control.report(self.finished, self.slots.len() - self.free.len());
        true
    }

    fn end(mut self, control: &Control) -> JobResult {
        let end = self.now();
        self.close(end);
        let mut all = Cost::now();
        self.result.cpu_seconds = all.user + all.system;
        all.add(&self.result.cost, -1);
        // Without a measured time `cost` is that of nothing.
        self.result.cost = if self.measuring.is_some() { all } else { Cost::default() };
        let JobResult { read, write, latency, requests, .. } = &mut self.result;
        *requests = read.ios + write.ios;
        // Same bounds, so both fit.
        let _ = (latency.add(&read.latency), latency.add(&write.latency));
        control.end(self.result.failure.is_some());
        self.result
    }

    /// What there is to do in all.
    fn limit(&mut self) {
        let region = self.result.region;
        // The blocks that fit, where all are the same: what remains is less than one.
        let same = self.spec.sizes.each_ref().map(crate::units::Sizes::only);
        let unit = same[usize::from(self.spec.rw.writes())].filter(|_| same[0] == same[1]);
        let whole = unit.map_or(region.len, |unit| region.len / u64::from(unit) * u64::from(unit));
        self.bytes_left = if self.spec.time_based { u64::MAX } else { whole };
        self.ios_left = self.spec.number_ios.unwrap_or(u64::MAX);
    }

    fn measure(&mut self, now: u64) {
        self.measuring = Some(now);
        self.sampled = now;
        self.result.cost = Cost::now();
        // What the ramp did does not count, and it has no limit but its time.
        self.limit();
    }

    /// Nanoseconds since the job began.
    #[inline]
    fn now(&self) -> u64 {
        self.clock.delta_as_nanos(self.started, self.clock.raw())
    }

    fn fail(&mut self, errno: Errno, message: String) {
        self.result.failure.get_or_insert(Failure { message, errno: errno as i32 });
    }

    /// Whether there is anything left to send, now or later.
    #[inline]
    fn more(&self) -> bool {
        self.held.is_some()
            || match &self.source {
                Source::Work => self.requests.flush_is_due() || (self.bytes_left > 0 && self.ios_left > 0),
                Source::ReadBack(rest) => !rest.as_slice().is_empty(),
            }
    }

    /// Nothing is finished: sleeps until something may be, or spins.
    #[inline]
    fn wait(&mut self, sending: bool, now: u64) {
        if self.spec.one_thread {
            return;
        }
        if !self.spec.interrupt {
            std::hint::spin_loop();
            return;
        }
        if self.ring.set_interrupts(true) {
            return;
        }
        let room = sending && !self.free.is_empty() && self.held.is_none() && self.more();
        let due = self.pacer.next().filter(|_| room && matches!(self.source, Source::Work));
        match due {
            Some(due) => sleep(&self.call, Some(Duration::from_nanos(due.saturating_sub(now)))),
            None => match self.call.read() {
                // A back end may have made the descriptor one that does not block.
                Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => sleep(&self.call, None),
                _ => {}
            },
        }
    }

    /// All work is done: whether there is something to read back now.
    fn read_back(&mut self, order: Order) -> bool {
        let wanted = self.spec.do_verify && self.spec.rw.writes() && order <= Order::Stop;
        if !wanted || self.result.failure.is_some() || !matches!(self.source, Source::Work) {
            return false;
        }
        let Some(ledger) = &self.result.ledger else { return false };
        let reads = ledger.reads().into_iter();
        let now = self.now();
        self.close(now);
        if self.measuring.is_some() {
            self.measuring = Some(now);
        }
        self.held = None;
        self.source = Source::ReadBack(reads);
        true
    }

    /// Adds the time since measuring began to what it was the time of.
    fn close(&mut self, now: u64) {
        let Some(began) = self.measuring else { return };
        let seconds = now.saturating_sub(began) as f64 / 1e9;
        let work = matches!(self.source, Source::Work);
        self.result.seconds += seconds;
        if !work || self.spec.rw.reads() {
            self.result.read.seconds += seconds;
        }
        if work && self.spec.rw.writes() {
            self.result.write.seconds += seconds;
        }
    }
}
