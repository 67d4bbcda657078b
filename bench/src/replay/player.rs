//! Plays the requests of one queue: a thread that starts each at its time and polls for what is finished.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use hdrhistogram::Histogram;
use poll_engine::memory::{MemoryMap, Ram};
use poll_engine::ring::driver::Buffer;
use quanta::Clock;

use super::Speed;
use super::disk::{Disk, Queue};
use super::plan::{Data, Step};

/// Between the order to start and time 0: until then all threads run.
pub const LEAD: Duration = Duration::from_millis(20);
/// With nothing in flight and nothing due for this long, the thread sleeps.
const WORTH_SLEEPING_NS: u64 = 500_000;
/// A back end that answers nothing for so long is given up.
const PATIENCE: Duration = Duration::from_secs(30);
/// Different sectors are written with different data: each begins at another of so many places in the pattern.
const PATTERN_STARTS: u64 = 128;
/// Most memory of a queue that reads go to.
const MOST_READ_MEMORY: u64 = 64 << 20;
/// Room for the ranges of a request.
const RANGES: u64 = 4096;

/// What a queue measured.
#[derive(Debug)]
pub struct Played {
    /// Requests finished.
    pub requests: u64,
    /// Bytes of those that went well.
    pub bytes: u64,
    /// Requests that failed.
    pub errors: u64,
    /// The first of them.
    pub first_error: Option<String>,
    /// Nanoseconds from the intended start to the end (at full speed: from the actual start).
    pub latency: Histogram<u64>,
    /// Nanoseconds from the intended to the actual start.
    pub lateness: Histogram<u64>,
    /// Requests that were due while the depth was used up.
    pub held_up: u64,
    /// Nanoseconds from time 0 to the last end.
    pub took: u64,
}

#[derive(Clone, Copy, Debug)]
struct Place {
    header: u64,
    status: u64,
    table: u64,
    ranges: u64,
    read: u64,
}

/// A queue that is ready to play.
pub struct Player {
    map: Arc<MemoryMap>,
    queue: Queue,
    places: Vec<Place>,
    pattern: u64,
    segment: u32,
    indirect: bool,
    steps: Vec<Step>,
}

impl Player {
    /// Sets memory aside and starts queue `index`.
    pub fn new(disk: &mut Disk, index: usize, steps: Vec<Step>, depth: u16) -> Result<Player> {
        let queue = disk.start_queue(index, (depth.max(16) * 4).next_power_of_two())?;
        let longest = steps.iter().map(|s| match s.data {
            Data::In(n) | Data::Out(n) => u64::from(n),
            _ => 0,
        });
        let longest = longest.max().unwrap_or(0).max(4096).next_multiple_of(4096);
        let segment = disk.limits.segment;
        let descriptors = longest.div_ceil(u64::from(segment)) + 2;
        let (places, pattern) = lay_out(&mut disk.ram, depth, longest, descriptors)
            .context("guest memory is used up; lower --iodepth or --queues")?;
        let map = Arc::clone(disk.ram.map());
        fill(&map, pattern, longest + PATTERN_STARTS * 512);
        Ok(Player { map, queue, places, pattern, segment, indirect: disk.indirect, steps })
    }

    /// Plays everything; time 0 is [`LEAD`] after the reading `zero` of the clock.
    pub fn play(mut self, speed: Speed, clock: &Clock, zero: u64) -> Result<Played> {
        let histogram = || Histogram::<u64>::new_with_bounds(1, 3_600_000_000_000, 3);
        let mut played = Played {
            requests: 0,
            bytes: 0,
            errors: 0,
            first_error: None,
            latency: histogram()?,
            lateness: histogram()?,
            held_up: 0,
            took: 0,
        };
        let steps = std::mem::take(&mut self.steps);
        let mut free: Vec<u16> = (0..self.places.len() as u16).rev().collect();
        // For each head: the place, the step, and when it was to start.
        let mut by_head = vec![(0u16, 0usize, 0u64); self.places.len().max(16) * 8];
        let now = || clock.delta_as_nanos(zero, clock.raw());
        let mut next = 0;
        let mut held_up = usize::MAX;
        let mut idle = 0u32;
        let mut progress = Instant::now();
        self.queue.ring.set_interrupts(false);
        while next < steps.len() || free.len() < self.places.len() {
            let time = now();
            while let Some(step) = steps.get(next) {
                let due = speed.due(step.at).map(|at| at + LEAD.as_nanos() as u64);
                if due.unwrap_or(LEAD.as_nanos() as u64) > time {
                    break;
                }
                let Some(slot) = free.pop() else {
                    played.held_up += u64::from(held_up != next);
                    held_up = next;
                    break;
                };
                let Some(head) = self.send(slot, step) else {
                    bail!("the ring has no room for a request of {:?}", step.data);
                };
                by_head[usize::from(head)] = (slot, next, due.unwrap_or(time));
                if let Some(due) = due {
                    played.lateness.saturating_record(time - due);
                }
                next += 1;
            }
            if self.queue.ring.publish() {
                self.queue.kick.write(1)?;
            }
            let finished = self.queue.ring.finished();
            if finished == 0 {
                idle = idle.wrapping_add(1);
                self.wait(idle, steps.get(next), free.len(), speed, time, &mut progress)?;
                continue;
            }
            let time = now();
            progress = Instant::now();
            for _ in 0..finished {
                let Some((head, _)) = self.queue.ring.collect() else { break };
                let (slot, at, since) = by_head[usize::from(head)];
                let step = &steps[at];
                played.requests += 1;
                played.latency.saturating_record(time - since);
                match self.status(slot) {
                    0 => played.bytes += bytes(&step.data),
                    status => {
                        played.errors += 1;
                        played.first_error.get_or_insert_with(|| {
                            let (kind, sector) = (step.kind, step.sector);
                            format!("request of type {kind}, sector {sector}: status {status}")
                        });
                    }
                }
                free.push(slot);
            }
            played.took = time.saturating_sub(LEAD.as_nanos() as u64);
        }
        Ok(played)
    }

    /// Nothing is finished: sleeps if that is worth it, and gives up a dead back end.
    fn wait(
        &self,
        idle: u32,
        next: Option<&Step>,
        free: usize,
        speed: Speed,
        time: u64,
        progress: &mut Instant,
    ) -> Result<()> {
        if free == self.places.len() {
            *progress = Instant::now();
            let due = next.and_then(|s| speed.due(s.at)).map(|at| at + LEAD.as_nanos() as u64);
            let ahead = due.unwrap_or(0).saturating_sub(time);
            if ahead > WORTH_SLEEPING_NS {
                // The last bit is spent spinning: sleeping ends late.
                std::thread::sleep(Duration::from_nanos(ahead - WORTH_SLEEPING_NS / 2));
            }
        } else if idle.is_multiple_of(1 << 12) {
            // There may be more queues than CPUs.
            std::thread::yield_now();
            if progress.elapsed() > PATIENCE {
                let n = self.places.len() - free;
                bail!("the back end has not answered {n} requests in {} s", PATIENCE.as_secs());
            }
        }
        std::hint::spin_loop();
        Ok(())
    }

    fn status(&self, slot: u16) -> u8 {
        let mut byte = [0xff];
        if let Some(slice) = self.map.slice(self.places[usize::from(slot)].status, 1) {
            slice.read(&mut byte);
        }
        byte[0]
    }

    fn send(&mut self, slot: u16, step: &Step) -> Option<u16> {
        let place = self.places[usize::from(slot)];
        let mut header = [0; 16];
        header[..4].copy_from_slice(&step.kind.to_le_bytes());
        header[8..].copy_from_slice(&step.sector.to_le_bytes());
        self.map.slice(place.header, 16)?.write(&header);
        self.map.slice(place.status, 1)?.write(&[0xff]);
        let (addr, len, writable) = match &step.data {
            Data::None => (0, 0, false),
            Data::In(len) => (place.read, *len, true),
            Data::Out(len) => (self.pattern + step.sector % PATTERN_STARTS * 512, *len, false),
            Data::Ranges(bytes) => {
                self.map.slice(place.ranges, bytes.len() as u32)?.write(bytes);
                (place.ranges, bytes.len() as u32, false)
            }
        };
        let head = Buffer { addr: place.header, len: 16, writable: false };
        let tail = Buffer { addr: place.status, len: 1, writable: true };
        if len <= self.segment {
            let data = Buffer { addr, len, writable };
            let all = [head, data, tail];
            // One request in three descriptors, which is what the ring has room for.
            return if len == 0 { self.queue.ring.add(&[head, tail]) } else { self.queue.ring.add(&all) };
        }
        let mut buffers = vec![head];
        for at in (0..len).step_by(self.segment as usize) {
            let part = (len - at).min(self.segment);
            buffers.push(Buffer { addr: addr + u64::from(at), len: part, writable });
        }
        buffers.push(tail);
        if self.indirect {
            self.queue.ring.add_indirect(&self.map, place.table, &buffers)
        } else {
            self.queue.ring.add(&buffers)
        }
    }
}

fn bytes(data: &Data) -> u64 {
    match data {
        Data::In(n) | Data::Out(n) => u64::from(*n),
        _ => 0,
    }
}

/// A place for each request in flight, and the pattern that writes carry. What reads bring is looked at by nobody:
/// where memory is short for the depth, they share it.
fn lay_out(ram: &mut Ram, depth: u16, longest: u64, descriptors: u64) -> Option<(Vec<Place>, u64)> {
    let pattern = ram.alloc(longest + PATTERN_STARTS * 512, 4096)?;
    let places = (u64::from(depth) * longest).min(MOST_READ_MEMORY.max(longest)) / longest;
    let reads = ram.alloc(places * longest, 4096)?;
    let place = |i: u64| {
        Some(Place {
            header: ram.alloc(16, 64)?,
            status: ram.alloc(1, 64)?,
            table: ram.alloc(descriptors * 16, 64)?,
            ranges: ram.alloc(RANGES, 64)?,
            read: reads + i % places * longest,
        })
    };
    Some(((0..u64::from(depth)).map(place).collect::<Option<_>>()?, pattern))
}

/// Data that neither compresses nor repeats.
fn fill(map: &MemoryMap, addr: u64, len: u64) {
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let mut sector = [0; 512];
    for at in (0..len).step_by(512) {
        for word in sector.as_chunks_mut::<8>().0 {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            *word = state.to_le_bytes();
        }
        if let Some(slice) = map.slice(addr + at, 512) {
            slice.write(&sector);
        }
    }
}
