//! One job: a thread that keeps one queue filled and polls for what is finished.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use anyhow::{Context, Result, bail};
use hdrhistogram::Histogram;
use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::time::TimeValLike;
use poll_engine::engine::placement::pin_to;
use poll_engine::memory::{MemoryMap, Ram};
use poll_engine::ring::RingConfig;
use poll_engine::ring::driver::{Buffer, DriverRing};
use quanta::Clock;
use vmm_sys_util::eventfd::EventFd;

use crate::{Load, Pattern};

/// What a job measured.
#[derive(Debug)]
pub struct JobResult {
    /// Requests finished in the measured time.
    pub requests: u64,
    /// Seconds measured.
    pub seconds: f64,
    /// Latencies in nanoseconds.
    pub latency: Histogram<u64>,
    /// Kicks sent.
    pub kicks: u64,
    /// CPU seconds of this thread in all.
    pub cpu_seconds: f64,
}

/// Guest-physical places of one request.
#[derive(Clone, Copy, Debug)]
struct Place {
    header: u64,
    data: u64,
    status: u64,
    table: u64,
}

/// A job that is ready to run.
#[derive(Debug)]
pub struct Job {
    map: Arc<MemoryMap>,
    ring: DriverRing,
    places: Vec<Place>,
    blocks: u64,
    kick: EventFd,
    index: u64,
}

impl Job {
    /// Sets memory aside; `None` when there is not enough.
    pub fn new(
        run: &Load,
        index: u64,
        ram: &mut Ram,
        config: &RingConfig,
        sectors: u64,
        kick: EventFd,
    ) -> Option<Job> {
        let places = (0..run.iodepth)
            .map(|_| {
                Some(Place {
                    header: ram.alloc(16, 64)?,
                    status: ram.alloc(1, 64)?,
                    table: ram.alloc(48, 64)?,
                    data: ram.alloc(u64::from(run.bs), 4096)?,
                })
            })
            .collect::<Option<Vec<_>>>()?;
        let ring = DriverRing::new(config, ram.map()).ok()?;
        let blocks = (sectors * 512 / u64::from(run.bs)).max(1);
        Some(Job { map: Arc::clone(ram.map()), ring, places, blocks, kick, index })
    }

    /// Runs until told to stop, then collects what is in flight.
    pub fn run(mut self, run: &Load, stop: &AtomicBool) -> Result<JobResult> {
        if let Some(cpu) = run.cpu {
            pin_to(cpu + self.index as usize).with_context(|| format!("cannot run on CPU {cpu}"))?;
        }
        let clock = Clock::new();
        let mut random = 0x9e37_79b9_7f4a_7c15 ^ (self.index + 1);
        let mut next_block = self.index * (self.blocks / 64);
        let mut latency = Histogram::<u64>::new_with_bounds(1, 60_000_000_000, 3)?;
        let mut free: Vec<u16> = (0..run.iodepth).rev().collect();
        let mut by_head = vec![(0u16, 0u64); usize::from(run.ring_size())];
        let (mut requests, mut kicks, mut measuring) = (0, 0, None);
        let started = Instant::now();
        self.ring.set_interrupts(false);
        let mut idle = 0u32;
        loop {
            let stopping = stop.load(Ordering::Relaxed);
            if stopping && free.len() == self.places.len() {
                break;
            }
            let now = clock.raw();
            while let Some(slot) = if stopping { None } else { free.pop() } {
                random ^= random << 13;
                random ^= random >> 7;
                random ^= random << 17;
                let block = match run.rw {
                    Pattern::Read | Pattern::Write => {
                        next_block += 1;
                        next_block % self.blocks
                    }
                    _ => ((u128::from(random) * u128::from(self.blocks)) >> 64) as u64,
                };
                let write = match run.rw {
                    Pattern::Randwrite | Pattern::Write => true,
                    Pattern::Randrw => random % 100 >= u64::from(run.rwmixread),
                    _ => false,
                };
                let head = self
                    .add(slot, block * u64::from(run.bs / 512), write, run)
                    .context("the ring is full")?;
                by_head[usize::from(head)] = (slot, now);
            }
            if self.ring.publish() {
                self.kick.write(1)?;
                kicks += 1;
            }
            let finished = self.ring.finished();
            if finished == 0 {
                idle = idle.wrapping_add(1);
                // A look at the clock now and then ends a run against a back end that has died.
                if idle.is_multiple_of(1 << 26) && started.elapsed() > (run.ramp_time + run.runtime) * 2 {
                    bail!("the back end does not answer; {requests} requests were finished");
                }
                std::hint::spin_loop();
                continue;
            }
            idle = 0;
            let now = clock.raw();
            for _ in 0..finished {
                let Some((head, _)) = self.ring.collect() else { break };
                let (slot, since) = by_head[usize::from(head)];
                let status = self.status(self.places[usize::from(slot)]);
                if status != 0 {
                    bail!("a request failed with status {status}");
                }
                if measuring.is_some() {
                    requests += 1;
                    latency.saturating_record(clock.delta_as_nanos(since, now));
                }
                free.push(slot);
            }
            if measuring.is_none() && started.elapsed() >= run.ramp_time {
                measuring = Some(Instant::now());
            }
        }
        let seconds = measuring.map_or(0.0, |m| m.elapsed().as_secs_f64());
        let usage = getrusage(UsageWho::RUSAGE_THREAD)?;
        let cpu = usage.user_time().num_microseconds() + usage.system_time().num_microseconds();
        Ok(JobResult { requests, seconds, latency, kicks, cpu_seconds: cpu as f64 / 1e6 })
    }

    #[inline]
    fn status(&self, place: Place) -> u8 {
        let mut byte = [0xff];
        if let Some(slice) = self.map.slice(place.status, 1) {
            slice.read(&mut byte);
        }
        byte[0]
    }

    #[inline]
    fn add(&mut self, slot: u16, sector: u64, write: bool, run: &Load) -> Option<u16> {
        let place = self.places[usize::from(slot)];
        let mut header = [0; 16];
        header[0] = u8::from(write);
        header[8..].copy_from_slice(&sector.to_le_bytes());
        self.map.slice(place.header, 16)?.write(&header);
        self.map.slice(place.status, 1)?.write(&[0xff]);
        let buffers = [
            Buffer { addr: place.header, len: 16, writable: false },
            Buffer { addr: place.data, len: run.bs, writable: !write },
            Buffer { addr: place.status, len: 1, writable: true },
        ];
        if run.indirect {
            self.ring.add_indirect(&self.map, place.table, &buffers)
        } else {
            self.ring.add(&buffers)
        }
    }
}
