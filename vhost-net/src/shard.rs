//! A hub's station on one reactor: takes packets from the transmit queues there and copies each into a receive queue.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use poll_engine::engine::queue::Request;
use poll_engine::engine::reactor::{Io, QueueId};
use poll_engine::engine::station::{Queues, Station};
use poll_engine::ring::Ahead;
use poll_engine::stats::ErrorKind;

use crate::fallback::{Outcome, deliver_softened, takes};
use crate::features::MRG_RXBUF;
use crate::header::header_len;
use crate::hub::{Change, Hub, Plan};
use crate::outside::Outside;
use crate::parcel::{Chute, Parcel};
use crate::rx::{Form, Refused, Sent, Spread, deliver};
use crate::stats::{Drop, PairStats};
use crate::switch::{self, Frame, PortId, Verdict};
use crate::tx::{Head, MIN_PACKET};

/// Most packets from other reactors in one round.
const MAX_PARCELS: usize = 32;
/// Most packets of a queue in one round.
const BURST: u16 = 32;
/// What is fetched ahead of packets to be sent, and of buffers to receive into: drivers put the header before a packet that
/// is aligned, so that both together are in two lines.
const SENT: Ahead = Ahead { bytes: 76, write: false };
const RECEIVED: Ahead = Ahead { bytes: 76, write: true };

/// Rounds between two looks at a receive queue that has no buffers: about a microsecond.
const PAUSE: u32 = 32;
/// How long a reactor sleeps at least and at most while a rate limit holds a sender back.
const SHORTEST_SLEEP: Duration = Duration::from_micros(50);
const LONGEST_SLEEP: Duration = Duration::from_millis(100);

/// A transmit queue on this reactor.
#[derive(Debug)]
struct Source {
    id: QueueId,
    port: usize,
    pair: usize,
    /// Bytes of the header before its packets.
    header: usize,
    features: u64,
    /// The receive queue that its next packet waits for, and for how many rounds nobody looks whether it has buffers now:
    /// looking takes the line from the driver that is about to write there.
    waits_for: Option<QueueId>,
    pause: u32,
    /// When its rate limit lets it send again, of the hub's clock.
    waits_until: Option<u64>,
    /// Where its packet before went.
    last: Option<QueueId>,
}

/// A receive queue on this reactor.
#[derive(Clone, Copy, Debug)]
struct Target {
    id: QueueId,
    pair: usize,
    form: Form,
    features: u64,
}

/// The station.
pub struct Shard {
    hub: Arc<Hub>,
    reactor: usize,
    sources: Vec<Source>,
    /// By port.
    targets: Vec<Vec<Target>>,
    switching: Option<switch::Shard>,
    head: Head,
    /// The head for one of many receivers.
    flooded: Head,
    /// A segment's head.
    piece: Head,
    spread: Spread,
    /// The uplink, if it is here.
    outside: Option<Outside>,
}

impl Shard {
    /// The one of `hub` on this reactor.
    pub fn new(hub: Arc<Hub>, reactor: usize) -> Shard {
        let targets = hub.ports.iter().map(|_| Vec::new()).collect();
        let switching = hub.switch.as_ref().map(|switch| switch.shard(reactor));
        let (head, flooded, piece, spread) = (Head::new(), Head::new(), Head::new(), Spread::new());
        let (sources, outside) = (Vec::new(), None);
        Shard { hub, reactor, sources, targets, switching, head, flooded, piece, spread, outside }
    }

    /// With the uplink, whose port is one of the hub's.
    #[must_use]
    pub fn with_outside(mut self, outside: Outside) -> Shard {
        self.outside = Some(outside);
        self
    }

    #[cold]
    fn change(&mut self, changes: Vec<Change>) {
        for change in changes {
            match change {
                Change::Up { port, index, id, features } => {
                    let (pair, header) = (usize::from(index / 2), header_len(features));
                    if index % 2 == 1 {
                        self.sources.push(Source {
                            id,
                            port,
                            pair,
                            header,
                            features,
                            waits_for: None,
                            waits_until: None,
                            pause: 0,
                            last: None,
                        });
                    } else {
                        let form = Form { header, mergeable: features & MRG_RXBUF != 0 };
                        self.targets[port].push(Target { id, pair, form, features });
                        self.targets[port].sort_by_key(|t| t.pair);
                        self.hub.ports[port].places.fetch_or(1 << (self.reactor % 64), Ordering::Relaxed);
                    }
                }
                Change::Down { port, index } => {
                    let pair = usize::from(index / 2);
                    if index % 2 == 1 {
                        self.sources.retain(|s| (s.port, s.pair) != (port, pair));
                    } else {
                        self.targets[port].retain(|t| t.pair != pair);
                        if self.targets[port].is_empty() {
                            let others = !(1 << (self.reactor % 64));
                            self.hub.ports[port].places.fetch_and(others, Ordering::Relaxed);
                        }
                    }
                }
            }
        }
    }

    /// Moves what a transmit queue has, at most a round's worth; how many packets.
    #[inline]
    fn drain(&mut self, at: usize, queues: &mut Queues<'_>) -> usize {
        let Shard { hub, sources, targets, switching, head, flooded, piece, spread, outside, .. } = self;
        let source = &mut sources[at];
        if let Some(target) = source.waits_for {
            if source.pause > 0 {
                source.pause -= 1;
                return 0;
            }
            if queues.get(target).is_some_and(|rx| !rx.has_chain()) {
                source.pause = PAUSE;
                return 0;
            }
            source.waits_for = None;
        }
        let Some(tx) = queues.get(source.id) else { return 0 };
        source.waits_until = None;
        let ready = tx.ready_for(BURST, SENT);
        if ready == 0 {
            return 0;
        }
        let now = if switching.is_some() { hub.now() } else { 0 };
        // Most often all go where the last one went.
        if let Some(rx) = source.last.and_then(|last| queues.get(last)) {
            rx.ready_for(ready, RECEIVED);
        }
        let own = &hub.ports[source.port].pairs[source.pair];
        let mut way = Way { hub, targets, queues, spread, piece, own, outside };
        for moved in 0..usize::from(ready) {
            let from = PortId(source.port as u16);
            if let Some(switch) = switching.as_ref().filter(|s| !s.may_send(from, now)) {
                source.waits_until = Some(switch.may_send_at(from));
                return moved;
            }
            let Some(tx) = way.queues.get(source.id) else { return moved };
            let Some(request) = tx.take() else { return moved };
            if let Err(bad) = head.peek(&tx.chain(), source.header) {
                own.drop_tx(Drop::Malformed);
                tx.count_error(ErrorKind::Malformed, &bad);
                tx.complete(request, 0);
                continue;
            }
            if switching.as_ref().is_some_and(|switch| switch.looks_inside(from)) {
                head.look_closer(&tx.chain());
            }
            if let Err(bad) = head.check(source.features) {
                own.drop_tx(Drop::BadHeader);
                tx.count_error(ErrorKind::Malformed, &bad);
                tx.complete(request, 0);
                continue;
            }
            let bytes = u64::from(head.packet_len());
            let given = match hub.plan {
                Plan::Echo => {
                    swap_addresses(head.packet_mut());
                    way.give(source, source.port, head, Some(request))
                }
                Plan::Wire => way.give(source, 1 - source.port, head, Some(request)),
                Plan::Discard | Plan::Generate(_) => way.finish(source, request),
                Plan::Switch => match switching {
                    Some(switch) => way.forward(source, request, switch, now, head, flooded),
                    None => way.finish(source, request),
                },
            };
            match given {
                Given::To(target) => source.last = Some(target),
                Given::Nowhere => {}
                Given::Waits(target) => {
                    (source.waits_for, source.last) = (Some(target), Some(target));
                    source.pause = PAUSE;
                    own.tx_waits.add(1);
                    return moved;
                }
            }
            own.tx_packets.add(1);
            own.tx_bytes.add(bytes);
        }
        ready.into()
    }

    /// Takes in what other reactors have for ports here, a bounded amount of it.
    #[inline]
    fn take_in(&mut self, queues: &mut Queues<'_>) -> usize {
        let Shard { hub, reactor, targets, piece, spread, outside, .. } = self;
        let Some(chute) = hub.chutes.get().and_then(|chutes| chutes.get(*reactor)) else { return 0 };
        for taken in 0..MAX_PARCELS {
            let Some(mut parcel) = chute.receive() else { return taken };
            let Parcel { head, bytes, port, pair } = &mut parcel;
            if let Some(outside) = outside.as_mut().filter(|o| o.port == *port) {
                let rest = bytes.get(head.read() as usize..).unwrap_or_default();
                leave(hub, outside, head, |outside, head| outside.send_copy(head, rest));
            } else {
                // Without a queue here, it has stopped since.
                hand_in(hub, &targets[*port], queues, *port, *pair, head, bytes, piece, spread);
            }
            chute.give_back(parcel);
        }
        MAX_PARCELS
    }

    /// Takes in what comes from outside, a bounded amount of it.
    #[inline]
    fn come_in(&mut self, queues: &mut Queues<'_>) -> usize {
        let Shard { hub, targets, switching, head, flooded, piece, spread, outside, .. } = self;
        let (Some(outside), Some(switch)) = (outside, switching) else { return 0 };
        let now = hub.now();
        outside.look(hub, now);
        let port = outside.port;
        let own = &hub.ports[port].pairs[0];
        let mut give = |to: usize, head: &mut Head, frame: &[u8]| {
            let pair = flow(frame);
            if hand_in(hub, &targets[to], queues, to, pair, head, frame, piece, spread) {
                return;
            }
            let places = hub.ports[to].places.load(Ordering::Relaxed);
            let chute = hub.chutes.get().and_then(|chutes| chutes.get(places.trailing_zeros() as usize));
            match chute {
                Some(chute) if chute.send_frame(to, pair, head, frame) => {}
                Some(_) => own.drop_tx(Drop::NoBuffers),
                None => own.drop_tx(Drop::LinkDown),
            }
        };
        outside.uplink.receive(BURST.into(), &mut |header, frame| {
            own.tx_packets.add(1);
            own.tx_bytes.add(frame.len() as u64);
            if frame.len() < MIN_PACKET as usize {
                return own.drop_tx(Drop::Malformed);
            }
            if head.take_frame(header, frame).is_err() {
                return own.drop_tx(Drop::BadHeader);
            }
            match switch.decide(PortId(port as u16), &described(head), now) {
                Verdict::Drop(_) => {}
                Verdict::One(to, action) => {
                    head.retag(action);
                    give(to.0.into(), head, frame);
                }
                Verdict::Flood(flood) => {
                    for (to, action) in switch.egress(flood, now) {
                        flooded.clone_from(head);
                        flooded.retag(action);
                        give(to.0.into(), flooded, frame);
                    }
                }
            }
        })
    }

    /// Fills the receive queues with packets from nowhere.
    fn generate(&mut self, len: u16, queues: &mut Queues<'_>) -> usize {
        let mut made = 0;
        let Shard { hub, targets, head, spread, .. } = self;
        for (port, targets) in targets.iter().enumerate() {
            for target in targets {
                let Some(rx) = queues.get(target.id) else { continue };
                let stats = &hub.ports[port].pairs[target.pair];
                for _ in 0..rx.ready_for(BURST, RECEIVED) {
                    head.make_up(u32::from(len).max(MIN_PACKET));
                    // Its payload is what has been in the buffer.
                    if deliver(rx, target.form, head, &[][..], spread).is_err() {
                        break;
                    }
                    stats.rx_packets.add(1);
                    stats.rx_bytes.add(len.into());
                    made += 1;
                }
            }
        }
        made
    }
}

/// What became of a packet, and of the chain that it is in.
enum Given {
    /// It went here, and the chain is done with.
    To(QueueId),
    /// It went nowhere, or to many, and the chain is done with.
    Nowhere,
    /// This queue has no room for it yet, and it is to wait: the chain is where it was.
    Waits(QueueId),
}

fn reason(refused: Refused) -> Drop {
    match refused {
        Refused::NoBuffers => Drop::NoBuffers,
        Refused::TooLong => Drop::TooLong,
        Refused::Broken => Drop::LinkDown,
    }
}

/// What a switch is to know of a packet.
#[inline]
fn described(head: &Head) -> Frame<'_> {
    let len = head.packet_len();
    let gso = if head.is_plain() { None } else { head.offload().gso };
    gso.map_or(Frame::whole(head.packet(), len), |gso| {
        let (header, size) = (u32::from(gso.header_len), u32::from(gso.size));
        let packets = len.saturating_sub(header).div_ceil(size).max(1);
        Frame { head: head.packet(), len, packets, longest: header + size }
    })
}

/// Which of its receiver's queues a frame from outside goes to: the same for all that two hosts say to each other.
fn flow(frame: &[u8]) -> usize {
    let addresses = match frame.get(12..14) {
        Some([0x08, 0x00]) => frame.get(26..34),
        Some([0x86, 0xdd]) => frame.get(22..54),
        _ => None,
    };
    let sum =
        addresses.unwrap_or_default().iter().fold(0u32, |sum, byte| sum.wrapping_mul(31) ^ u32::from(*byte));
    (sum ^ sum >> 8 ^ sum >> 16) as usize & 0xff
}

/// Gives a packet whose bytes are ours to a port; false if it has no queue here.
#[allow(clippy::too_many_arguments)] // parts of a shard, of which others are borrowed
fn hand_in(
    hub: &Hub,
    here: &[Target],
    queues: &mut Queues<'_>,
    port: usize,
    pair: usize,
    head: &mut Head,
    bytes: &[u8],
    piece: &mut Head,
    spread: &mut Spread,
) -> bool {
    let target = here.get(pair % here.len().max(1));
    let Some((target, rx)) = target.and_then(|t| Some((t, queues.get(t.id)?))) else { return false };
    let theirs = &hub.ports[port].pairs[target.pair];
    if takes(head, target.features) {
        let (len, rest) = (head.packet_len(), bytes.part(head.read(), u32::MAX));
        count(theirs, Some(Outcome::of(len, deliver(rx, target.form, head, rest, spread))));
    } else {
        let read = |at: u32, into: &mut [u8]| {
            let from = bytes.get(at as usize..).unwrap_or_default();
            let n = from.len().min(into.len());
            into[..n].copy_from_slice(&from[..n]);
        };
        count(theirs, deliver_softened(rx, (target.form, target.features), head, piece, bytes, read, spread));
    }
    true
}

/// Has a packet leave by the uplink, and counts it.
fn leave(hub: &Hub, outside: &mut Outside, head: &Head, send: impl FnOnce(&mut Outside, &Head) -> bool) {
    let theirs = &hub.ports[outside.port].pairs[0];
    if !takes(head, outside.uplink.takes()) {
        // Guests are not offered what the uplink does not take.
        return theirs.drop_rx(Drop::BadHeader);
    }
    if send(outside, head) {
        theirs.rx_packets.add(1);
        theirs.rx_bytes.add(head.packet_len().into());
    } else {
        theirs.drop_rx(Drop::LinkDown);
    }
}

/// Counts what became of a packet that was changed for its receiver.
#[cold]
fn count(theirs: &PairStats, outcome: Option<Outcome>) {
    let Some(outcome) = outcome else { return theirs.drop_rx(Drop::BadHeader) };
    theirs.rx_packets.add(outcome.packets);
    theirs.rx_bytes.add(outcome.bytes);
    if let Some(why) = outcome.why {
        (0..outcome.refused).for_each(|_| theirs.drop_rx(reason(why)));
    }
}

/// From a transmit queue to others.
struct Way<'a, 'q> {
    hub: &'a Hub,
    targets: &'a [Vec<Target>],
    queues: &'a mut Queues<'q>,
    spread: &'a mut Spread,
    piece: &'a mut Head,
    own: &'a PairStats,
    outside: &'a mut Option<Outside>,
}

impl Way<'_, '_> {
    /// Where a switch says.
    #[inline]
    fn forward(
        &mut self,
        source: &Source,
        request: Request,
        switch: &mut switch::Shard,
        now: u64,
        head: &mut Head,
        flooded: &mut Head,
    ) -> Given {
        match switch.decide(PortId(source.port as u16), &described(head), now) {
            Verdict::Drop(_) => self.finish(source, request),
            Verdict::One(to, action) => {
                head.retag(action);
                self.give(source, to.0.into(), head, Some(request))
            }
            Verdict::Flood(flood) => {
                for (to, action) in switch.egress(flood, now) {
                    flooded.clone_from(head);
                    flooded.retag(action);
                    if let Given::Waits(target) = self.give(source, to.0.into(), flooded, None) {
                        // It would be late for the others.
                        self.refuse(to.0.into(), target, Drop::NoBuffers);
                    }
                }
                self.finish(source, request)
            }
        }
    }

    /// To a port: into its queue of the same pair, if there are as many. Does with the chain what is to be done, if that is
    /// told.
    #[inline]
    fn give(&mut self, source: &Source, port: usize, head: &mut Head, request: Option<Request>) -> Given {
        let here = &self.targets[port];
        let target = here.get(source.pair).or(here.get(source.pair % here.len().max(1)));
        if target.is_none() {
            return self.send_away(source, port, head, request);
        }
        let pair = target.and_then(|t| Some((t, self.queues.pair(source.id, t.id)?)));
        let Some((target, (tx, rx))) = pair else {
            self.own.drop_tx(Drop::LinkDown);
            return request.map_or(Given::Nowhere, |request| self.finish(source, request));
        };
        let theirs = &self.hub.ports[port].pairs[target.pair];
        if !takes(head, target.features) {
            let (form, chain) = ((target.form, target.features), tx.chain());
            let read = |at: u32, into: &mut [u8]| _ = chain.readable(at, into.len() as u32).read(into);
            let outcome = deliver_softened(rx, form, head, self.piece, &chain, read, self.spread);
            let waits = self.hub.ports[port].waits;
            return match outcome {
                Some(Outcome { packets: 0, why: Some(Refused::NoBuffers), .. }) if waits => {
                    if let Some(request) = request {
                        tx.untake(request);
                    }
                    Given::Waits(target.id)
                }
                outcome => {
                    count(theirs, outcome);
                    if let Some(request) = request {
                        tx.complete(request, 0);
                    }
                    Given::To(target.id)
                }
            };
        }
        let chain = tx.chain();
        let (bytes, rest) = (head.packet_len().into(), chain.part(head.read(), u32::MAX));
        let given = match deliver(rx, target.form, head, rest, self.spread) {
            Ok(()) => {
                theirs.rx_packets.add(1);
                theirs.rx_bytes.add(bytes);
                Given::To(target.id)
            }
            Err(Refused::NoBuffers) if self.hub.ports[port].waits => {
                if let Some(request) = request {
                    tx.untake(request);
                }
                return Given::Waits(target.id);
            }
            Err(refused) => {
                theirs.drop_rx(reason(refused));
                Given::Nowhere
            }
        };
        if let Some(request) = request {
            tx.complete(request, 0);
        }
        given
    }

    #[cold]
    fn refuse(&self, port: usize, target: QueueId, why: Drop) {
        if let Some(target) = self.targets[port].iter().find(|t| t.id == target) {
            self.hub.ports[port].pairs[target.pair].drop_rx(why);
        }
    }

    /// To a port that has no queue here: the uplink, or one that has a queue on another reactor, by way of that.
    fn send_away(&mut self, source: &Source, port: usize, head: &Head, request: Option<Request>) -> Given {
        if let Some(outside) = self.outside.as_mut().filter(|o| o.port == port) {
            if let Some(tx) = self.queues.finishing(source.id) {
                let chain = tx.chain();
                leave(self.hub, outside, head, |outside, head| {
                    outside.send(head, &mut chain.readable(head.read(), u32::MAX))
                });
            }
            return request.map_or(Given::Nowhere, |request| self.finish(source, request));
        }
        let places = self.hub.ports[port].places.load(Ordering::Relaxed);
        let chute = self.hub.chutes.get().and_then(|chutes| chutes.get(places.trailing_zeros() as usize));
        match (chute, self.queues.finishing(source.id)) {
            (Some(chute), Some(tx)) if chute.send(port, source.pair, head, &tx.chain()) => {}
            (Some(_), _) => self.own.drop_tx(Drop::NoBuffers),
            _ => self.own.drop_tx(Drop::LinkDown),
        }
        request.map_or(Given::Nowhere, |request| self.finish(source, request))
    }

    /// Gives the chain back to the sender.
    #[inline]
    fn finish(&mut self, source: &Source, request: Request) -> Given {
        let Some(tx) = self.queues.finishing(source.id) else {
            unreachable!("a queue that has just given a chain is there");
        };
        tx.complete(request, 0);
        Given::Nowhere
    }
}

/// As an echo does: what was for us is from us.
fn swap_addresses(packet: &mut [u8]) {
    if let Some((to, rest)) = packet.split_at_mut_checked(6)
        && let Some(from) = rest.get_mut(..6)
    {
        to.swap_with_slice(from);
    }
}

impl Station for Shard {
    fn attach(&mut self, io: &mut Io<'_>) {
        if let Some(outside) = &mut self.outside {
            outside.watch(io);
        }
    }

    fn poll(&mut self, queues: &mut Queues<'_>, _: &mut Io<'_>) -> usize {
        if let Some(changes) = self.hub.inboxes[self.reactor].take() {
            self.change(changes);
        }
        let mut moved = self.take_in(queues);
        for at in 0..self.sources.len() {
            moved += self.drain(at, queues);
        }
        moved += self.come_in(queues);
        if let Some(outside) = &mut self.outside {
            outside.uplink.flush();
        }
        if let Plan::Generate(len) = self.hub.plan {
            moved += self.generate(len, queues);
        }
        moved
    }

    fn complete(&mut self, _: &mut Queues<'_>, _: &mut Io<'_>, tag: u32, _: i32, more: bool) {
        if let Some(outside) = &mut self.outside {
            outside.complete(tag, more);
        }
    }

    fn stop(&mut self, _: &mut Queues<'_>, io: &mut Io<'_>) {
        if let Some(outside) = &mut self.outside {
            outside.unwatch(io);
        }
    }

    fn in_flight(&self) -> usize {
        self.outside.as_ref().map_or(0, Outside::in_flight)
    }

    fn prepare_sleep(&mut self, queues: &mut Queues<'_>, io: &mut Io<'_>) -> bool {
        if let Some(outside) = &mut self.outside {
            outside.watch(io);
        }
        for source in self.sources.iter().filter(|s| s.waits_until.is_none()) {
            queues.wake_on(source.waits_for.unwrap_or(source.id));
        }
        if matches!(self.hub.plan, Plan::Generate(_)) {
            self.targets.iter().flatten().for_each(|t| queues.wake_on(t.id));
        }
        self.hub.chutes.get().and_then(|chutes| chutes.get(self.reactor)).is_some_and(Chute::has_parcel)
    }

    fn longest_sleep(&self) -> Option<Duration> {
        let until = self.sources.iter().filter_map(|s| s.waits_until).min();
        // The link of an uplink is looked at now and then.
        let Some(until) = until else { return self.outside.is_some().then_some(LONGEST_SLEEP) };
        // No longer than what a driver may be without service that makes its ring anew.
        Some(Duration::from_nanos(until.saturating_sub(self.hub.now())).clamp(SHORTEST_SLEEP, LONGEST_SLEEP))
    }
}
