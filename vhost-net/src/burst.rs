//! A burst of a transmit queue on its way, in stages, so that each waits for memory once and not for every packet:
//!
//! ```text
//! take the chains ─► glance at each ─► decide for a run of packets between the same addresses ─► copy the run to its receiver
//! ```
//!
//! A packet that asks for anything, has a tag, goes to many, or does not fit, goes by itself: its head is copied out of guest
//! memory and decided on ([`Head`]).

use std::sync::Arc;

use poll_engine::engine::queue::{MAX_BURST, Queue};
use poll_engine::engine::reactor::QueueId;
use poll_engine::engine::station::Queues;
use poll_engine::ring::Ahead;
use poll_engine::stats::ErrorKind;

use crate::exits::{Exits, Given, Origin, Ran};
use crate::hub::{self, Hub, Plan};
use crate::stats::{Drop, PairStats};
use crate::switch::vlan::TagAction;
use crate::switch::{self, Flood, Frame, PortId, Verdict};
use crate::tx::{Glance, Head, swap_addresses};

/// What is fetched ahead of packets: the header, and a packet that is aligned behind it.
const SENT: Ahead = Ahead { bytes: 76, write: false };
/// Rounds between two looks at a receive queue that has no buffers: about a microsecond.
const PAUSE: u32 = 32;
/// Nanoseconds between two looks for a receiver that is expected.
const LOOK_AGAIN: u64 = 1_000_000;

/// A transmit queue on this reactor.
#[derive(Debug)]
pub struct Source {
    id: QueueId,
    /// Its port.
    pub port: usize,
    /// Which of its port's.
    pub pair: usize,
    /// Bytes of the header before its packets.
    header: usize,
    features: u64,
    /// What its next packet waits for, and for how many rounds nobody looks whether there are buffers now: looking takes the
    /// line from the driver that is about to write there.
    waits_for: Option<Awaited>,
    pause: u32,
    /// When its rate limit lets it send again, or when to look again for what is awaited, of the hub's clock.
    pub waits_until: Option<u64>,
    /// Until when a rate limit's waits have been counted.
    limited_until: u64,
    /// Where its packet before went.
    last: Option<QueueId>,
}

/// What a packet waits for.
#[derive(Clone, Copy, Debug)]
enum Awaited {
    /// Buffers in this receive queue.
    Buffers(QueueId),
    /// A receive queue, to be looked for at this time.
    Queue(u64),
}

impl Source {
    /// A queue of a port, whose packets have a header of so many bytes.
    pub fn new(id: QueueId, (port, pair): (usize, usize), header: usize, features: u64) -> Source {
        let (waits_for, waits_until, last) = (None, None, None);
        Source { id, port, pair, header, features, waits_for, waits_until, limited_until: 0, pause: 0, last }
    }

    /// What has to have chains before it can go on.
    pub fn wake_on(&self) -> QueueId {
        match self.waits_for {
            Some(Awaited::Buffers(target)) => target,
            _ => self.id,
        }
    }

    /// Whether its next packet still has to wait for its receiver.
    #[inline]
    fn is_held_up(&mut self, queues: &mut Queues<'_>, hub: &Hub) -> bool {
        let Some(awaited) = self.waits_for else { return false };
        let target = match awaited {
            Awaited::Buffers(target) => target,
            Awaited::Queue(until) => {
                let waits = hub.now() < until;
                self.waits_for = self.waits_for.filter(|_| waits);
                return waits;
            }
        };
        if self.pause > 0 {
            self.pause -= 1;
            return true;
        }
        if queues.get(target).is_some_and(|rx| !rx.has_chain()) || queues.only_rests(target) {
            self.pause = PAUSE;
            return true;
        }
        self.waits_for = None;
        false
    }
}

/// Room for what is known of the packets of a burst.
#[derive(Debug)]
pub struct Burst {
    glances: [Option<Glance>; MAX_BURST],
    heads: Heads,
}

/// Of a packet that goes by itself: its head, and that for one of many receivers.
#[derive(Debug)]
struct Heads {
    head: Head,
    flooded: Head,
}

impl Burst {
    /// Without packets.
    pub fn new() -> Burst {
        Burst { glances: [None; MAX_BURST], heads: Heads { head: Head::new(), flooded: Head::new() } }
    }

    /// Moves what a transmit queue has, at most a burst; how many packets.
    #[inline]
    pub fn forward(
        &mut self,
        source: &mut Source,
        (hub, ports): (&Hub, &[Arc<hub::Port>]),
        exits: &mut Exits,
        switching: Option<&mut switch::Shard>,
        queues: &mut Queues<'_>,
    ) -> usize {
        if source.is_held_up(queues, hub) {
            return 0;
        }
        let Some(tx) = queues.get(source.id) else { return 0 };
        source.waits_until = None;
        let taken = tx.take_burst(MAX_BURST, SENT);
        if taken == 0 {
            return 0;
        }
        // Most often all go where the last one went.
        if let Some(rx) = source.last.and_then(|last| queues.get(last)) {
            rx.expect_burst(taken);
        }
        let id = source.id;
        let (port, own) = (PortId(source.port as u16), &ports[source.port].pairs[source.pair]);
        let glances = &mut self.glances[..taken];
        if switching.as_ref().is_some_and(|switch| switch.looks_inside(port)) {
            glances.fill(None);
        } else if let Some(tx) = queues.finishing(id) {
            let mut are_single = true;
            for (glance, buffer) in glances.iter_mut().zip(tx.burst_buffers(0, false)) {
                are_single &= buffer.is_some();
                *glance = buffer.and_then(|all| Glance::of_first(all, all.len() as u32, source.header));
            }
            if !are_single {
                glance_at_chains(tx, glances, source.header);
            }
        }
        if hub.plan == Plan::Echo {
            glances.iter_mut().flatten().for_each(Glance::swap_addresses);
        }
        let now = if switching.is_some() { hub.now() } else { 0 };
        let way = Way::planned(hub.plan, source.port);
        let mut pass = Pass { source, port, own, hub, exits, switching, queues, now, way };
        let mut done = 0;
        while done < taken && pass.may_send() {
            let moved = if glances[done].is_some() {
                pass.run(&glances[done..], done, &mut self.heads)
            } else {
                pass.single(done, &mut self.heads)
            };
            if moved == 0 {
                break;
            }
            done += moved;
        }
        if let Some(tx) = queues.finishing(id) {
            if exits.witness.is_there() {
                (0..done).for_each(|at| exits.witness.sent(source.port, &tx.burst(at), source.header));
            }
            tx.end_burst(done, |_| 0);
        }
        done
    }
}

impl Default for Burst {
    fn default() -> Burst {
        Burst::new()
    }
}

/// Glances at what was not glanced at yet: packets that are in several buffers.
#[cold]
fn glance_at_chains(tx: &mut Queue, glances: &mut [Option<Glance>], header: usize) {
    for (at, glance) in glances.iter_mut().enumerate().filter(|(_, glance)| glance.is_none()) {
        *glance = Glance::of(&tx.burst(at), header);
    }
}

/// Ports.
#[derive(Clone, Copy)]
enum To {
    None,
    One(usize),
    /// Those that the switch lists.
    Many(Flood),
}

/// Where packets go.
#[derive(Clone, Copy)]
struct Way {
    to: To,
    /// Those between the same addresses; `None`: all.
    like: Option<Glance>,
    /// Those of no more bytes.
    longest: u32,
}

impl Way {
    /// The one of all packets of a port. `None` where a switch decides.
    fn planned(plan: Plan, port: usize) -> Option<Way> {
        let to = match plan {
            Plan::Switch => return None,
            Plan::Echo => To::One(port),
            Plan::Wire => To::One(1 - port),
            Plan::Discard | Plan::Generate(_) => To::None,
        };
        Some(Way { to, like: None, longest: u32::MAX })
    }

    #[inline]
    fn is_of(&self, packet: &Glance) -> bool {
        packet.len() <= self.longest && self.like.is_none_or(|like| like.has_addresses_of(packet))
    }
}

/// A burst in the making.
struct Pass<'a, 'q> {
    source: &'a mut Source,
    port: PortId,
    own: &'a PairStats,
    hub: &'a Hub,
    exits: &'a mut Exits,
    switching: Option<&'a mut switch::Shard>,
    queues: &'a mut Queues<'q>,
    now: u64,
    /// As far as it is known.
    way: Option<Way>,
}

impl Pass<'_, '_> {
    /// Whether the port's rate limit lets it send; if not, when.
    #[inline]
    fn may_send(&mut self) -> bool {
        let limits = self.switching.as_ref().filter(|switch| !switch.may_send(self.port, self.now));
        let Some(until) = limits.map(|switch| switch.may_send_at(self.port)) else { return true };
        self.wait_for_limit(until);
        false
    }

    /// The rate limit has the next packet wait until then. It is found so in each round until it may go.
    #[cold]
    fn wait_for_limit(&mut self, until: u64) {
        self.source.waits_until = Some(until);
        let counted = self.source.limited_until.max(self.now);
        if until > counted {
            self.own.tx_limited.add(1);
            self.own.tx_limited_ns.add(until - counted);
            self.source.limited_until = until;
        }
    }

    /// Moves packets from number `at` on that go where the first one goes; how many, 0 if it has to wait.
    #[inline]
    fn run(&mut self, packets: &[Option<Glance>], at: usize, heads: &mut Heads) -> usize {
        let Some(first) = &packets[0] else { return self.single(at, heads) };
        let way = match self.way.filter(|way| way.is_of(first)) {
            Some(way) => way,
            None => match self.find(first) {
                Ok(way) => way,
                Err(verdict) => {
                    heads.head.take_glance(first);
                    return self.act(verdict, at, heads);
                }
            },
        };
        let more = packets[1..].iter().take_while(|p| p.as_ref().is_some_and(|p| way.is_of(p)));
        let run = &packets[..=more.count()];
        let to = match way.to {
            To::None => return self.sent(run),
            To::One(to) => to,
            To::Many(flood) => return self.flood(flood, run, at, heads),
        };
        match self.exits.run(self.queues, self.from(at), to, run) {
            Ran::Some(target, moved) => {
                self.source.last = Some(target);
                self.sent(&run[..moved])
            }
            Ran::Single => {
                heads.head.take_glance(first);
                self.give(to, at, &mut heads.head)
            }
            Ran::Waits(target) => self.wait(target),
        }
    }

    /// Copies packets to each of many ports, as far as there is room: they do not wait for one of several, being late for the others.
    fn flood(&mut self, flood: Flood, run: &[Option<Glance>], at: usize, heads: &mut Heads) -> usize {
        let from = |done: usize| Origin { at: at + done, ..origin(self.source) };
        let Some(switch) = &self.switching else { return self.sent(run) };
        if self.exits.expects_any(switch.reach(flood)) {
            return self.hold();
        }
        let mut waits = None;
        'ports: for (to, action) in switch.egress(flood, self.now) {
            let to = usize::from(to.0);
            let mut done = 0;
            while let Some(Some(packet)) = run.get(done) {
                if action == TagAction::Keep
                    && let Ran::Some(_, moved) = self.exits.run(self.queues, from(done), to, &run[done..])
                {
                    done += moved;
                    continue;
                }
                let head = &mut heads.flooded;
                head.take_glance(packet);
                head.retag(action);
                match self.exits.give(self.queues, from(done), to, head) {
                    Given::Waits(target) if switch.reach(flood).count() == 1 => {
                        waits = Some((target, done));
                        break 'ports;
                    }
                    given => self.refuse(to, given),
                }
                done += 1;
            }
        }
        match waits {
            None => self.sent(run),
            Some((target, 0)) => self.wait(target),
            Some((_, done)) => self.sent(&run[..done]),
        }
    }

    /// Asks the switch. Those that are not simply to be copied come back with what is to be done.
    fn find(&mut self, packet: &Glance) -> Result<Way, Verdict> {
        let Some(switch) = &mut self.switching else {
            return Ok(Way { to: To::None, like: None, longest: 0 });
        };
        let verdict = switch.decide(self.port, &Frame::whole(&packet.bytes(), packet.len()), self.now);
        let longest = switch.repeats(self.port, verdict);
        let to = match verdict {
            Verdict::One(to, TagAction::Keep) if longest > 0 => To::One(to.0.into()),
            Verdict::Flood(flood) if longest > 0 => To::Many(flood),
            _ => return Err(verdict),
        };
        let way = Way { to, like: Some(*packet), longest };
        self.way = Some(way);
        Ok(way)
    }

    /// Moves packet number `at`, of which there is more to be known; 0 if it has to wait.
    fn single(&mut self, at: usize, heads: &mut Heads) -> usize {
        let Some(tx) = self.queues.finishing(self.source.id) else { return 0 };
        let (chain, head) = (tx.burst(at), &mut heads.head);
        if let Err(bad) = head.peek(&chain, self.source.header) {
            self.own.drop_tx(Drop::Malformed);
            tx.count_error(ErrorKind::Malformed, &bad);
            return 1;
        }
        if let Err(bad) = head.check(self.source.features) {
            self.own.drop_tx(Drop::BadHeader);
            tx.count_error(ErrorKind::Malformed, &bad);
            return 1;
        }
        if self.hub.plan == Plan::Echo {
            swap_addresses(head.packet_mut());
        }
        let Some(switch) = &mut self.switching else {
            return match Way::planned(self.hub.plan, self.source.port) {
                Some(Way { to: To::One(to), .. }) => self.give(to, at, head),
                _ => self.sent_one(head.packet(), head.packet_len()),
            };
        };
        let verdict = switch.decide(self.port, &described(head), self.now);
        self.act(verdict, at, heads)
    }

    /// Does what a switch has decided of a packet by itself.
    #[cold]
    fn act(&mut self, verdict: Verdict, at: usize, heads: &mut Heads) -> usize {
        let Heads { head, flooded } = heads;
        let bytes = head.packet_len();
        match verdict {
            Verdict::Drop(_) => {}
            Verdict::One(to, action) => {
                head.retag(action);
                return self.give_bytes(to.0.into(), at, head, bytes);
            }
            Verdict::Flood(flood) => {
                let from = self.from(at);
                let Some(switch) = &self.switching else { return 1 };
                if self.exits.expects_any(switch.reach(flood)) {
                    return self.hold();
                }
                let mut waits = None;
                for (to, action) in switch.egress(flood, self.now) {
                    flooded.clone_from(head);
                    flooded.retag(action);
                    let to = to.0.into();
                    match self.exits.give(self.queues, from, to, flooded) {
                        Given::Waits(target) if switch.reach(flood).count() == 1 => {
                            waits = Some(target);
                            break;
                        }
                        // It would be late for the others.
                        given => self.refuse(to, given),
                    }
                }
                if let Some(target) = waits {
                    return self.wait(target);
                }
            }
        }
        self.sent_one(head.packet(), bytes)
    }

    fn give(&mut self, to: usize, at: usize, head: &mut Head) -> usize {
        let bytes = head.packet_len();
        self.give_bytes(to, at, head, bytes)
    }

    /// Gives a packet, which had so many bytes, to a port.
    fn give_bytes(&mut self, to: usize, at: usize, head: &mut Head, bytes: u32) -> usize {
        match self.exits.give(self.queues, self.from(at), to, head) {
            Given::Waits(target) => return self.wait(target),
            Given::Absent => return self.hold(),
            Given::To(target) => self.source.last = Some(target),
            Given::Away => {}
        }
        self.sent_one(head.packet(), bytes)
    }

    fn from(&self, at: usize) -> Origin {
        Origin { at, ..origin(self.source) }
    }

    #[inline]
    fn sent(&self, packets: &[Option<Glance>]) -> usize {
        self.own.tx_packets.add(packets.len() as u64);
        self.own.tx_bytes.add(packets.iter().flatten().map(|p| u64::from(p.len())).sum());
        self.own.tx_groups.count_run(packets, self.switching.is_some());
        packets.len()
    }

    fn sent_one(&self, packet: &[u8], bytes: u32) -> usize {
        self.own.tx_groups.count(packet, 1);
        self.own.tx_packets.add(1);
        self.own.tx_bytes.add(bytes.into());
        1
    }

    /// A packet to many that could wait for one of them does not.
    fn refuse(&self, to: usize, given: Given) {
        match given {
            Given::Waits(target) => self.exits.refuse(to, target),
            Given::Absent => self.own.drop_tx(Drop::LinkDown),
            Given::To(_) | Given::Away => {}
        }
    }

    #[cold]
    fn wait(&mut self, target: QueueId) -> usize {
        (self.source.waits_for, self.source.last) = (Some(Awaited::Buffers(target)), Some(target));
        self.source.pause = PAUSE;
        self.own.tx_waits.add(1);
        0
    }

    /// Leaves the packet where it is until its receiver may be there again.
    #[cold]
    fn hold(&mut self) -> usize {
        let until = self.hub.now() + LOOK_AGAIN;
        self.source.waits_for = Some(Awaited::Queue(until));
        self.source.waits_until = Some(until);
        self.own.tx_waits.add(1);
        0
    }
}

fn origin(source: &Source) -> Origin {
    Origin { id: source.id, port: source.port, pair: source.pair, at: 0 }
}

/// What a switch is to know of a packet.
pub fn described(head: &Head) -> Frame<'_> {
    let len = head.packet_len();
    let gso = if head.is_plain() { None } else { head.offload().gso };
    gso.map_or(Frame::whole(head.packet(), len), |gso| {
        let (header, size) = (u32::from(gso.header_len), u32::from(gso.size));
        let packets = len.saturating_sub(header).div_ceil(size).max(1);
        Frame { head: head.packet(), len, packets, longest: header + size }
    })
}
