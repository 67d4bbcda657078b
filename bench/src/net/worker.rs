//! One thread: drives a queue pair of every port. What it sends and what arrives is told apart by what is in the
//! packets.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::Result;
use nix::errno::Errno;
use quanta::Clock;
use vmm_sys_util::eventfd::EventFd;

use super::frame::{Frames, Mark, PART, VNET, Wrong};
use super::queue::{Arrived, BATCH, MadeUp, Port};
use super::sequence::{Arrival, Flows};
use super::spec::{Direction, NetSpec, Verify};
use super::tally::Tally;
use crate::control::{Control, Order};
use crate::drive::Work;
use crate::event::sleep;
use crate::job::pin;
use crate::measure::Cost;
use crate::outcome::Failure;
use crate::pace::Pacer;
use crate::requests::Random;
use crate::spec::Rate;

/// How long nothing may arrive until what is under way is given up and others take its place.
const GIVE_UP: u64 = 100_000_000;

/// What all threads of a run share.
#[derive(Debug)]
pub struct Shared {
    clock: Clock,
    origin: u64,
    /// Of this run, whatever else goes through the back end.
    token: u32,
    /// The frames of every stream.
    frames: Vec<Frames>,
    /// Packets of each stream that have arrived, wherever. Written only where the number under way is limited.
    arrived: Vec<AtomicU64>,
}

impl Shared {
    /// For this run.
    pub fn new(spec: &NetSpec) -> Result<Shared> {
        let (clock, load) = (Clock::new(), &spec.load);
        let ports = spec.direction.ports();
        let macs = |port: usize| [load.mac[port].0, load.mac[1 - port].0];
        let streams = 0..usize::from(load.queue_pairs) * ports;
        let frames = streams.map(|s| Frames::new(&load.size.kinds, s as u8, macs(s % ports)));
        let frames: Vec<_> = frames.collect::<Result<_>>()?;
        let token = Random::new(clock.raw() ^ u64::from(std::process::id()) << 32).next() as u32 & !PART;
        let arrived = frames.iter().map(|_| AtomicU64::new(0)).collect();
        Ok(Shared { origin: clock.raw(), clock, token, frames, arrived })
    }
}

/// What a port of a worker sends.
#[derive(Debug)]
struct Sender {
    /// Its stream, if it sends.
    stream: Option<u8>,
    pacer: Pacer,
    flow: u16,
    sequence: u32,
    /// Where it is in the mix.
    turn: usize,
    sent: u64,
    /// Packets to send.
    left: u64,
    /// Packets under way that are not waited for any more.
    given_up: u64,
}

/// A thread's work, ready to run. It can be run again.
#[derive(Debug)]
pub struct Worker {
    spec: Arc<NetSpec>,
    shared: Arc<Shared>,
    index: usize,
    ports: Vec<Port>,
    senders: Vec<Sender>,
    /// What has arrived of each stream.
    flows: Vec<Flows>,
    call: EventFd,
    /// The part of the run, which is in every packet: what is left of an earlier one does not count.
    part: u32,
    scratch: Vec<u8>,
    /// When something last arrived.
    last: u64,
    /// When measuring began, and whether it is over.
    measuring: Option<u64>,
    closed: bool,
    tally: Tally,
}

/// What becomes of a worker's run.
#[derive(Debug)]
pub struct Ended {
    /// To be run again.
    pub worker: Worker,
    /// What it has counted.
    pub tally: Tally,
}

impl Work for Worker {
    type Outcome = Ended;
    const UNITS: &'static str = "packets";

    fn waker(&self) -> std::io::Result<EventFd> {
        self.call.try_clone()
    }

    fn run(works: Vec<(Worker, Arc<Control>)>, ready: impl FnOnce()) -> Vec<Ended> {
        // One: there is no option by which they share a thread.
        let mut ready = Some(ready);
        let run = |(worker, control): (Worker, Arc<Control>)| {
            worker.run_beside(&control, || ready.take().into_iter().for_each(|ready| ready()), || {})
        };
        works.into_iter().map(run).collect()
    }

    fn failure(outcome: &mut Ended) -> &mut Option<Failure> {
        &mut outcome.tally.failure
    }
}

impl Worker {
    /// Takes queue pair `index` of every port.
    pub fn new(
        spec: &Arc<NetSpec>,
        shared: &Arc<Shared>,
        index: usize,
        mut ports: Vec<Port>,
        call: EventFd,
    ) -> Worker {
        let mut senders = Vec::new();
        for (at, port) in ports.iter_mut().enumerate() {
            let stream = spec.direction.sends(at).then(|| spec.stream(at, index));
            if let Some(stream) = stream {
                port.tx.fill(&port.map, &shared.frames[usize::from(stream)]);
            }
            port.rx.publish();
            senders.push(Sender {
                stream,
                pacer: Pacer::new(Rate::Full, 0),
                flow: 0,
                sequence: 0,
                turn: 0,
                sent: 0,
                left: 0,
                given_up: 0,
            });
        }
        Worker {
            flows: shared.frames.iter().map(|_| Flows::new(spec.load.flows as usize)).collect(),
            scratch: vec![0; spec.load.size.largest() as usize],
            tally: Tally::new(spec.direction.ports()),
            spec: Arc::clone(spec),
            shared: Arc::clone(shared),
            index,
            ports,
            senders,
            call,
            part: 0,
            last: 0,
            measuring: None,
            closed: false,
        }
    }

    /// Gives it something else to do, with the same packets on the same queues.
    pub fn set(&mut self, spec: &Arc<NetSpec>) {
        self.spec = Arc::clone(spec);
    }

    /// Runs until its work is done or it is told to end. `ready` is called before the first packet, `peer` after
    /// packets were published.
    pub fn run_beside(mut self, control: &Control, ready: impl FnOnce(), mut peer: impl FnMut()) -> Ended {
        self.tally = Tally::new(self.ports.len());
        (self.measuring, self.closed) = (None, false);
        let kicks = self.kicks();
        if let Err(e) = pin(&self.spec.base, self.index) {
            self.fail(Errno::EINVAL, format!("cannot run on the CPU that was asked for: {e}"));
        }
        ready();
        let ramp = control.order() == Order::Ramp;
        self.begin(!ramp);
        self.set_interrupts(self.spec.base.interrupt);
        let mut finished = 0;
        let mut stopped = None;
        loop {
            let order = control.order();
            let now = self.now();
            if order >= Order::Measure && self.measuring.is_none() {
                self.measure(now, ramp);
            }
            let sending = order <= Order::Measure && self.tally.failure.is_none() && self.left();
            let Ok(n) = self.turn(now, sending) else {
                self.fail(Errno::EPROTO, "the back end returned a buffer that it did not have".into());
                break;
            };
            finished += n as u64;
            let in_flight = self.ports.iter().map(|p| p.tx.in_flight()).sum();
            control.report(finished, in_flight);
            peer();
            if order == Order::Abort || order == Order::Halt {
                break;
            }
            let receiving = self.spec.direction == Direction::Receive && order <= Order::Measure;
            if !sending && !receiving {
                let since = *stopped.get_or_insert(now);
                if self.spec.base.runtime.is_some() {
                    self.close(now);
                }
                if self.tally.failure.is_some() || self.settled(now, since, in_flight) {
                    break;
                }
            }
            if n == 0 {
                self.wait(now, sending);
            }
        }
        // Without a time it is over when the last packet has arrived.
        let end = if stopped.is_some() { self.last } else { self.now() };
        self.close(end);
        self.tally.kicks = self.kicks() - kicks;
        control.end(self.tally.failure.is_some());
        let tally = std::mem::replace(&mut self.tally, Tally::new(0));
        Ended { worker: self, tally }
    }

    /// Receives and sends once at every port; how many packets that were, or came back from being sent.
    #[inline]
    fn turn(&mut self, now: u64, sending: bool) -> Result<usize, MadeUp> {
        let mut n = 0;
        for at in 0..self.ports.len() {
            n += self.receive(at, now)?;
            n += self.ports[at].tx.reclaim()?;
            if sending {
                n += self.send(at, now);
            }
        }
        Ok(n)
    }

    fn kicks(&self) -> u64 {
        self.ports.iter().map(|p| p.rx.kicks() + p.tx.kicks()).sum()
    }

    /// Begins counting anew: packets of before are not known any more.
    fn begin(&mut self, counts: bool) {
        self.part = (self.part + 1) & PART;
        let (seed, rate) = (self.spec.base.randseed.wrapping_add(self.index as u64), self.spec.rate());
        for (at, sender) in self.senders.iter_mut().enumerate() {
            sender.pacer = Pacer::new(rate, seed ^ (at as u64) << 32);
            (sender.flow, sender.sequence, sender.turn) = (0, 0, 0);
            (sender.sent, sender.given_up) = (0, 0);
            // What goes before measuring has no limit but its time.
            sender.left = self.spec.base.number_ios.filter(|_| counts).unwrap_or(u64::MAX);
        }
        self.flows.iter_mut().for_each(Flows::clear);
        for stream in self.senders.iter().filter_map(|s| s.stream) {
            self.shared.arrived[usize::from(stream)].store(0, Ordering::Relaxed);
        }
        self.tally = Tally { failure: self.tally.failure.take(), ..Tally::new(self.ports.len()) };
        let now = self.now();
        self.last = now;
        for sender in &mut self.senders {
            sender.pacer.begin(now);
        }
    }

    fn measure(&mut self, now: u64, ramp: bool) {
        if ramp {
            self.begin(true);
        }
        self.measuring = Some(now);
        self.tally.cost = Cost::now();
    }

    /// The measured time is over.
    fn close(&mut self, now: u64) {
        let Some(began) = self.measuring.filter(|_| !self.closed) else { return };
        self.closed = true;
        let nanos = now.saturating_sub(began);
        self.tally.seconds = nanos as f64 / 1e9;
        let mut cost = Cost::now();
        cost.add(&self.tally.cost, -1);
        self.tally.cost = cost;
        for (side, sender) in self.tally.sides.iter_mut().zip(&self.senders) {
            side.received_in_time = side.received + side.foreign;
            side.received_bytes_in_time = side.received_bytes;
            // What was due and found no room.
            side.unsent = sender.pacer.due(now).min(sender.left);
        }
    }

    /// Nanoseconds of the run's clock.
    #[inline]
    fn now(&self) -> u64 {
        self.shared.clock.delta_as_nanos(self.shared.origin, self.shared.clock.raw())
    }

    fn fail(&mut self, errno: Errno, message: String) {
        self.tally.failure.get_or_insert(Failure { message, errno: errno as i32 });
    }

    /// Whether there is anything left to send, now or later.
    #[inline]
    fn left(&self) -> bool {
        self.spec.base.number_ios.is_none() || self.senders.iter().any(|s| s.stream.is_some() && s.left > 0)
    }

    /// Whether all that will arrive has arrived.
    fn settled(&self, now: u64, since: u64, in_flight: usize) -> bool {
        let (sent, arrived) =
            self.tally.sides.iter().fold((0, 0), |(sent, arrived), side| {
                (sent + side.sent, arrived + side.received + side.corrupt)
            });
        let quiet = now.saturating_sub(self.last.max(since)) >= self.spec.load.drain_time.as_nanos() as u64;
        // Of several threads, one may get what another has sent; duplicates may follow what is complete.
        let all = self.spec.load.queue_pairs == 1 && arrived >= sent && now > since + 1_000_000;
        in_flight == 0 && (all || quiet || !self.spec.direction.returns())
    }

    #[inline]
    fn send(&mut self, at: usize, now: u64) -> usize {
        let sender = &mut self.senders[at];
        let Some(stream) = sender.stream else { return 0 };
        let (port, load) = (&mut self.ports[at], &self.spec.load);
        let frames = &self.shared.frames[usize::from(stream)];
        let mut room =
            port.tx.room().min(load.burst.into()).min(sender.left.try_into().unwrap_or(usize::MAX));
        if let Some(depth) = load.iodepth {
            let arrived = self.shared.arrived[usize::from(stream)].load(Ordering::Relaxed) + sender.given_up;
            let mut under_way = sender.sent.saturating_sub(arrived);
            if under_way >= depth.into() && now.saturating_sub(self.last) > GIVE_UP {
                sender.given_up += under_way;
                self.last = now;
                under_way = 0;
            }
            room = room.min(u64::from(depth).saturating_sub(under_way) as usize);
        }
        let side = &mut self.tally.sides[at];
        let mut n = 0;
        while n < room {
            let Some(time) = sender.pacer.take(now) else { break };
            let kind = usize::from(load.size.order[sender.turn]);
            let token = self.shared.token | self.part;
            let mark = Mark { token, stream, sequence: sender.sequence, time, flow: sender.flow };
            if !port.tx.send(&port.map, frames, kind, &mark) {
                break;
            }
            n += 1;
            side.sent_bytes += u64::from(frames.kinds()[kind].size);
            sender.turn += 1;
            if sender.turn == load.size.order.len() {
                sender.turn = 0;
            }
            sender.flow += 1;
            if u32::from(sender.flow) == load.flows {
                (sender.flow, sender.sequence) = (0, sender.sequence.wrapping_add(1));
            }
        }
        if n > 0 {
            sender.sent += n as u64;
            sender.left -= n as u64;
            side.sent += n as u64;
            port.tx.publish();
        }
        n
    }

    #[inline]
    fn receive(&mut self, at: usize, now: u64) -> Result<usize, MadeUp> {
        let mut all = 0;
        let most = usize::from(self.spec.load.burst);
        while all < most {
            let port = &mut self.ports[at];
            if port.rx.ready() == 0 {
                break;
            }
            let mut batch = [Arrived::NONE; BATCH];
            let n = port.rx.take(&port.map, &mut batch, most - all)?;
            let mut next = 0;
            while next < n {
                next += self.packet(at, &batch[next..n], now)?;
            }
            let port = &mut self.ports[at];
            port.rx.recycle(&port.map, &batch[..n])?;
            all += n;
        }
        if all > 0 {
            self.ports[at].rx.publish();
            self.last = now;
            self.tally.sides[at].record_rest();
        }
        Ok(all)
    }

    /// Counts one packet; how many buffers it took.
    #[inline]
    fn packet(&mut self, at: usize, batch: &[Arrived], now: u64) -> Result<usize, MadeUp> {
        let Port { map, rx, .. } = &mut self.ports[at];
        let side = &mut self.tally.sides[at];
        let (packet, buffers) = rx.packet(map, batch)?;
        let len = packet.len.unwrap_or(0);
        let (shared, token) = (&*self.shared, self.shared.token | self.part);
        let parsed = match packet.len {
            // Somebody else's, whatever it is.
            Some(_) if self.spec.direction == Direction::Receive => Err(Wrong::Foreign),
            Some(len) => Frames::parse(&packet.head, len, token, &shared.frames),
            None => Err(Wrong::Corrupt),
        };
        match parsed {
            Ok((kind, shift, mark)) => {
                if mark.token != token {
                    // Left over from before.
                    return Ok(buffers);
                }
                let stream = usize::from(mark.stream);
                let frames = &shared.frames[stream];
                let mut body = || {
                    packet.has(
                        frames.kinds()[kind].before_body(),
                        frames.body(kind, shift),
                        &mut self.scratch,
                    )
                };
                if self.spec.load.verify == Verify::All && !body() {
                    side.corrupt += 1;
                } else {
                    match self.flows[stream].arrive(mark.flow.into(), mark.sequence) {
                        Some(Arrival::Twice) => {
                            side.duplicates += 1;
                            return Ok(buffers);
                        }
                        Some(Arrival::Late) => side.reordered += 1,
                        Some(Arrival::Next) => {}
                        None => {
                            side.corrupt += 1;
                            return Ok(buffers);
                        }
                    }
                    side.received += 1;
                    side.received_bytes += u64::from(len);
                    side.record(now.saturating_sub(mark.time));
                }
                if self.spec.load.iodepth.is_some() {
                    shared.arrived[stream].fetch_add(1, Ordering::Relaxed);
                }
            }
            Err(Wrong::Corrupt) => {
                side.corrupt += 1;
                // Whose it was is a guess, and right where there is one queue pair.
                if let Some(from) = self.senders[self.spec.direction.to(at)].stream {
                    shared.arrived[usize::from(from)].fetch_add(1, Ordering::Relaxed);
                }
                side.first_corrupt.get_or_insert_with(|| {
                    let bytes: Vec<u8> = packet.head.iter().flat_map(|w| w.to_le_bytes()).collect();
                    bytes[VNET..].to_vec()
                });
            }
            Err(Wrong::Foreign) => {
                side.foreign += 1;
                if self.spec.direction == Direction::Receive {
                    side.received_bytes += u64::from(len);
                }
            }
        }
        Ok(buffers)
    }

    fn set_interrupts(&mut self, on: bool) -> bool {
        let mut there = false;
        for port in &mut self.ports {
            there |= port.rx.set_interrupts(on);
            // That something was sent is of interest where it makes room.
            let full = on && port.tx.room() == 0;
            there |= port.tx.set_interrupts(full);
        }
        there
    }

    /// Sleeps until something may be there, if that is asked for, or spins.
    #[inline]
    fn wait(&mut self, now: u64, sending: bool) {
        if !self.spec.base.interrupt {
            std::hint::spin_loop();
            return;
        }
        let room = |at: usize, s: &Sender| s.stream.is_some() && s.left > 0 && self.ports[at].tx.room() > 0;
        let due = self.senders.iter().enumerate().filter(|(at, s)| sending && room(*at, s));
        // With a limit on what is under way, an arrival makes room; what is lost does not arrive.
        let limited = self.spec.load.iodepth.is_some();
        let at_once = Duration::ZERO;
        let wait = due.map(|(_, s)| match s.pacer.next() {
            Some(next) => Duration::from_nanos(next.saturating_sub(now)),
            None if limited => Duration::from_millis(10),
            None => at_once,
        });
        let wait = wait.min().unwrap_or(Duration::from_millis(10));
        if wait > at_once && !self.set_interrupts(true) {
            sleep(&self.call, Some(wait.min(Duration::from_millis(10))));
            self.set_interrupts(false);
        }
    }
}
