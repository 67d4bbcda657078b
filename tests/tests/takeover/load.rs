//! Verified random reads and writes on every queue of some disks, with the time between completions: whatever is lost,
//! doubled, failed or mixed up is noticed by the thread that drives the queue.
#![allow(unsafe_code)] // borrows the descriptor of an eventfd

use std::collections::HashMap;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, poll};
use poll_engine::ring::driver::Buffer;
use vhost::VhostBackend;

use crate::blk::{Front, LIMIT, Lane, OK, READ, WRITE};

/// Bytes of a request.
pub const BLOCK: u64 = 4096;
/// Blocks of the disk that each queue has to itself.
pub const SPAN: u64 = 64;
/// Requests in flight on a queue.
const DEPTH: usize = 8;

/// What a block of a disk holds: its own number and how often it was written.
pub fn content(block: u64, version: u64) -> Vec<u8> {
    let word = |i: u64| (block << 40 ^ version << 16 ^ i).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    (0..BLOCK / 8).flat_map(|i| word(i).to_le_bytes()).collect()
}

/// What has come of one queue.
#[derive(Debug)]
pub struct Tally {
    pub requests: u64,
    /// How often each of its blocks was written.
    pub versions: Vec<u64>,
    /// The longest time between two completions, in each epoch.
    pub gaps: Vec<Duration>,
}

/// A load that runs.
pub struct Load {
    stop: Arc<AtomicBool>,
    epoch: Arc<AtomicUsize>,
    completed: Arc<AtomicUsize>,
    queues: Vec<JoinHandle<Tally>>,
    talkers: Vec<JoinHandle<Front>>,
}

impl Load {
    /// On all queues of the disks at these sockets; the read-only ones hold nothing but `fill`. Beside it the front ends
    /// ask questions on their sockets without pause.
    pub fn start(disks: &[(&Path, Option<u8>)], queues: usize, packed: bool) -> Load {
        let stop = Arc::<AtomicBool>::default();
        let (epoch, completed) = (Arc::<AtomicUsize>::default(), Arc::<AtomicUsize>::default());
        let (mut threads, mut talkers) = (Vec::new(), Vec::new());
        for &(socket, fill) in disks {
            let connect = if packed { Front::packed } else { Front::connect };
            let mut front = connect(socket, queues);
            for (i, lane) in (0u64..).zip(std::mem::take(&mut front.queues)) {
                let (stop, epoch, completed) =
                    (Arc::clone(&stop), Arc::clone(&epoch), Arc::clone(&completed));
                let queue = Queue::new(lane, i * SPAN, fill);
                threads.push(std::thread::spawn(move || queue.run(&stop, &epoch, &completed)));
            }
            let stop = Arc::clone(&stop);
            talkers.push(std::thread::spawn(move || talk(front, &stop)));
        }
        Load { stop, epoch, completed, queues: threads, talkers }
    }

    /// Begins to count gaps anew; they come back by these numbers.
    pub fn next_epoch(&self) -> usize {
        self.epoch.fetch_add(1, Ordering::Relaxed) + 1
    }

    /// Waits until there were some requests more.
    pub fn progress(&self) {
        assert!(self.progress_unless(|| false));
    }

    /// As [`progress`](Self::progress), or until `over`; false then.
    pub fn progress_unless(&self, mut over: impl FnMut() -> bool) -> bool {
        let want = self.completed.load(Ordering::Relaxed) + 40 * self.queues.len();
        let deadline = Instant::now() + LIMIT;
        while self.completed.load(Ordering::Relaxed) < want {
            if over() {
                return false;
            }
            assert!(Instant::now() < deadline, "no progress");
            assert!(!self.queues.iter().any(JoinHandle::is_finished), "a queue has failed");
            std::thread::sleep(Duration::from_millis(1));
        }
        true
    }

    /// Leaves it alone: nobody serves any more. Its threads find that out.
    pub fn abandon(self) {
        self.stop.store(true, Ordering::Relaxed);
    }

    /// Ends it: every request must come back.
    pub fn finish(self) -> Vec<Tally> {
        self.stop.store(true, Ordering::Relaxed);
        // The sessions must last as long as their queues.
        let fronts: Vec<_> =
            self.talkers.into_iter().map(|t| t.join().expect("a session has failed")).collect();
        let tallies = self.queues.into_iter().map(|t| t.join().expect("a queue has failed")).collect();
        drop(fronts);
        tallies
    }
}

/// Asks the same question again and again; no answer may be missing.
fn talk(front: Front, stop: &AtomicBool) -> Front {
    let offered = front.session.get_features().unwrap();
    while !stop.load(Ordering::Relaxed) {
        assert_eq!(front.session.get_features().unwrap(), offered);
        std::thread::sleep(Duration::from_micros(300));
    }
    front
}

struct Queue {
    lane: Lane,
    first: u64,
    /// Of a disk that is only read.
    fill: Option<u8>,
    /// By head: slot and block of a request in flight, and whether it is a write.
    in_flight: HashMap<u16, (u64, u64, bool)>,
    slots: Vec<u64>,
    versions: Vec<u64>,
    busy: Vec<bool>,
    random: u64,
}

impl Queue {
    fn new(lane: Lane, first: u64, fill: Option<u8>) -> Queue {
        Queue {
            lane,
            first,
            fill,
            in_flight: HashMap::new(),
            slots: (0..DEPTH as u64).collect(),
            versions: vec![0; SPAN as usize],
            busy: vec![false; SPAN as usize],
            random: first + 1,
        }
    }

    fn next_random(&mut self, below: u64) -> u64 {
        // xorshift64
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        self.random % below
    }

    fn submit(&mut self) {
        while let Some(slot) = self.slots.pop() {
            let block = loop {
                let block = self.next_random(SPAN);
                if !self.busy[block as usize] {
                    break block;
                }
            };
            let write =
                self.fill.is_none() && (self.versions[block as usize] == 0 || self.next_random(2) == 0);
            let at = self.lane.more + slot * 2 * BLOCK;
            let sector = (self.first + block) * BLOCK / 512;
            let kind = if write { WRITE } else { READ };
            self.lane.put(at, &[&kind.to_le_bytes()[..], &[0; 4], &sector.to_le_bytes(), &[0xff]].concat());
            if write {
                self.lane.put(at + BLOCK, &content(self.first + block, self.versions[block as usize] + 1));
            } else {
                self.lane.put(at + BLOCK, &[0xee; BLOCK as usize]);
            }
            let buffers = [
                Buffer { addr: at, len: 16, writable: false },
                Buffer { addr: at + BLOCK, len: BLOCK as u32, writable: !write },
                Buffer { addr: at + 16, len: 1, writable: true },
            ];
            let head = self.lane.driver.add(&buffers).expect("room in the ring");
            self.busy[block as usize] = true;
            assert!(self.in_flight.insert(head, (slot, block, write)).is_none());
        }
        self.lane.publish();
    }

    fn check(&mut self, head: u16, len: u32) {
        let (slot, block, write) =
            self.in_flight.remove(&head).expect("a request came back that was not in flight");
        let at = self.lane.more + slot * 2 * BLOCK;
        assert_eq!(self.lane.get(at + 16, 1), [OK], "status");
        assert_eq!(len, if write { 1 } else { BLOCK as u32 + 1 }, "used length");
        if write {
            self.versions[block as usize] += 1;
        } else {
            let found = self.lane.get(at + BLOCK, BLOCK as usize);
            let wanted = match self.fill {
                Some(fill) => vec![fill; BLOCK as usize],
                None => content(self.first + block, self.versions[block as usize]),
            };
            assert!(found == wanted, "block {} is not what was written last", self.first + block);
        }
        self.busy[block as usize] = false;
        self.slots.push(slot);
    }

    fn run(mut self, stop: &AtomicBool, epoch: &AtomicUsize, completed: &AtomicUsize) -> Tally {
        let (mut requests, mut gaps) = (0, vec![Duration::ZERO]);
        let mut last = Instant::now();
        let mut again = true;
        while again || !self.in_flight.is_empty() {
            if again {
                self.submit();
            }
            self.wait();
            while let Some((head, len)) = self.lane.driver.collect() {
                let now = Instant::now();
                let at = epoch.load(Ordering::Relaxed);
                gaps.resize(gaps.len().max(at + 1), Duration::ZERO);
                gaps[at] = gaps[at].max(now - last);
                last = now;
                self.check(head, len);
                requests += 1;
                completed.fetch_add(1, Ordering::Relaxed);
            }
            assert!(last.elapsed() < LIMIT, "{} requests have been lost", self.in_flight.len());
            again = !stop.load(Ordering::Relaxed);
        }
        Tally { requests, versions: self.versions, gaps }
    }

    /// Sleeps until an interrupt. One that is lost is a request that is lost.
    fn wait(&mut self) {
        if self.lane.driver.set_interrupts(true) || self.in_flight.is_empty() {
            return;
        }
        // SAFETY: the lane keeps its eventfd open.
        let call = unsafe { BorrowedFd::borrow_raw(self.lane.call.as_raw_fd()) };
        let limit = LIMIT.as_millis() as u16;
        let rung = poll(&mut [PollFd::new(call, PollFlags::POLLIN)], limit).unwrap();
        assert!(rung > 0, "no interrupt for {} requests in flight", self.in_flight.len());
        let _ = self.lane.call.read();
    }
}
