//! The ways out of a hub on one reactor: the receive queues there, the uplink, and the ways to other reactors.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use poll_engine::engine::queue::Queue;
use poll_engine::engine::reactor::QueueId;
use poll_engine::engine::station::Queues;
use poll_engine::ring::Ahead;

use crate::fallback::{Outcome, deliver_softened, takes};
use crate::hub::{Hub, Port};
use crate::outside::Outside;
use crate::parcel::Chute;
use crate::receivers::{Place, Receivers};
use crate::rx::{Form, Refused, Sent, Spread, copy, copy_chain, deliver};
use crate::seats::Seats;
use crate::stats::{Drop, PairStats};
use crate::switch::PortId;
use crate::tx::{Glance, Head};
use crate::witness::Witness;

/// What is fetched ahead of buffers to receive into: drivers put the header before a packet that is aligned, so that both
/// together are in two lines.
pub const RECEIVED: Ahead = Ahead { bytes: 76, write: true };

/// A receive queue on this reactor.
#[derive(Clone, Copy, Debug)]
pub struct Target {
    /// The queue.
    pub id: QueueId,
    /// Which of its port's.
    pub pair: usize,
    /// What its driver expects.
    pub form: Form,
    /// What was negotiated.
    pub features: u64,
    /// Packets that were made up for it.
    pub made: u64,
}

/// A packet on its way: in a burst of a transmit queue.
#[derive(Clone, Copy, Debug)]
pub struct Origin {
    /// The transmit queue.
    pub id: QueueId,
    /// Its port.
    pub port: usize,
    /// Which of its port's queues.
    pub pair: usize,
    /// Its number in the burst.
    pub at: usize,
}

/// What became of a packet.
#[derive(Clone, Copy, Debug)]
pub enum Given {
    /// It went to this queue, or was to.
    To(QueueId),
    /// It went elsewhere, or nowhere, and is done with.
    Away,
    /// This queue has no room for it yet, and it is to wait.
    Waits(QueueId),
    /// Its port has no queue just now, and it is to wait.
    Absent,
}

/// What became of packets of a burst to one receiver.
#[derive(Clone, Copy, Debug)]
pub enum Ran {
    /// So many of them went to this queue; whatever the next one needs is to be looked at by itself.
    Some(QueueId, usize),
    /// The first of them goes another way, or nowhere.
    Single,
    /// This queue has no room for any of them yet, and they are to wait.
    Waits(QueueId),
}

/// The ways out.
pub struct Exits {
    hub: Arc<Hub>,
    /// The bit of its seat.
    bit: usize,
    /// The ways to the others, as last [heard](Self::look_round) of.
    pub(crate) seats: Seats,
    /// The hub's, as last [adopted](Self::adopt).
    pub ports: Arc<[Arc<Port>]>,
    /// The receive queues here for packets of each pair, by port; none of a port whose packets have to be looked at.
    pub targets: Vec<Vec<Target>>,
    /// All of them.
    receivers: Vec<Receivers>,
    /// The uplink, if it is here.
    pub outside: Option<Outside>,
    /// A segment's head.
    piece: Head,
    spread: Spread,
    /// Who notes packets.
    pub witness: Witness,
}

impl Exits {
    /// Those of `hub` at this seat: none yet.
    pub fn new(hub: Arc<Hub>, bit: usize) -> Exits {
        let (piece, spread, witness) = (Head::new(), Spread::new(), Witness::default());
        let (ports, targets, receivers, seats) = (Arc::default(), Vec::new(), Vec::new(), hub.seats());
        let mut exits =
            Exits { hub, bit, seats, ports, targets, receivers, outside: None, piece, spread, witness };
        exits.adopt();
        // What drivers have asked for before, which nobody says again.
        for (receivers, port) in exits.receivers.iter_mut().zip(&*exits.ports) {
            receivers.steer(port.steering());
        }
        exits
    }

    /// Shards may sit elsewhere.
    pub(crate) fn look_round(&mut self) {
        self.seats = self.hub.seats();
    }

    /// There may be other ports, none of whose queues run yet.
    pub fn adopt(&mut self) {
        let ports = self.hub.ports();
        self.targets.resize_with(ports.len(), Vec::new);
        self.receivers.resize_with(ports.len(), Receivers::default);
        for (at, (new, old)) in ports.iter().zip(&*self.ports).enumerate() {
            if !Arc::ptr_eq(new, old) {
                self.targets[at] = Vec::new();
                self.receivers[at] = Receivers::default();
            }
        }
        self.ports = ports;
    }

    /// A receive queue runs.
    pub fn open(&mut self, port: usize, target: Target) {
        if let Some(home) = self.ports[port].homes.get(target.pair) {
            home.store(self.bit, Ordering::Relaxed);
        }
        self.receivers[port].open(target);
        self.sort_out(port);
    }

    /// A receive queue has stopped.
    pub fn close(&mut self, port: usize, pair: usize) {
        self.receivers[port].close(pair);
        self.sort_out(port);
    }

    /// A port's driver wants its packets in another way.
    pub fn steer(&mut self, port: usize) {
        self.receivers[port].steer(self.ports[port].steering());
        self.sort_out(port);
    }

    /// Which of a port's queues are used, and whether its packets have to be looked at.
    fn sort_out(&mut self, port: usize) {
        let before = std::mem::take(&mut self.targets[port]);
        let made = |id| before.iter().find(|t| t.id == id).map_or(0, |t| t.made);
        let plain = self.receivers[port].sort_out(self.ports[port].pairs.len()).into_iter();
        self.targets[port] = plain.map(|t| Target { made: made(t.id), ..t }).collect();
        let (places, own) = (&self.ports[port].places, 1 << self.bit);
        if self.targets[port].is_empty() && !self.receivers[port].is_steered() {
            if places.fetch_and(!own, Ordering::Relaxed) == own {
                self.hub.miss(&self.ports[port]);
            }
        } else {
            places.fetch_or(own, Ordering::Relaxed);
        }
    }

    /// A port's queue of the same pair, if there are as many.
    #[inline]
    fn target(&self, port: usize, pair: usize) -> Option<Target> {
        let here = &self.targets[port];
        here.get(pair).or_else(|| here.get(pair % here.len().max(1))).copied()
    }

    /// Copies the packets of a burst from `from` on, of which no more is to be known than these glances, to a port that gets
    /// them as they are: as many as are in one buffer each.
    #[inline]
    pub fn run(
        &mut self,
        queues: &mut Queues<'_>,
        from: Origin,
        port: usize,
        packets: &[Option<Glance>],
    ) -> Ran {
        let (target, packets) = match self.target(port, from.pair) {
            Some(target) => (target, packets),
            None => match self.filtered(port, from.pair, packets) {
                Some(some) => some,
                None => return Ran::Single,
            },
        };
        let Some((tx, rx)) = queues.pair(from.id, target.id) else { return Ran::Single };
        let room = rx.take_burst(packets.len(), RECEIVED);
        if room == 0 {
            let waits = self.ports[port].waits && !rx.is_broken();
            return if waits { Ran::Waits(target.id) } else { Ran::Single };
        }
        let (packets, mut done) = (&packets[..room], 0);
        loop {
            let buffers = tx.burst_buffers(from.at + done, false).zip(rx.burst_buffers(done, true));
            let copied = |packet: &Option<Glance>, buffers| match (packet, buffers) {
                (Some(packet), (Some(sent), Some(to))) => copy(packet, sent, to),
                _ => false,
            };
            done +=
                packets[done..].iter().zip(buffers).take_while(|&(p, buffers)| copied(p, buffers)).count();
            // One that is not a buffer each.
            let Some(Some(packet)) = packets.get(done) else { break };
            if !copy_chain(packet, &tx.burst(from.at + done), &rx.burst(done)) {
                break;
            }
            done += 1;
        }
        let bytes: u64 = packets[..done].iter().flatten().map(|packet| u64::from(packet.len())).sum();
        if self.witness.is_there() {
            for (at, packet) in packets.iter().flatten().take(done).enumerate() {
                self.witness.received(port, &rx.burst(at), packet.len());
            }
        }
        rx.end_burst(done, |at| packets[at].as_ref().map_or(0, Glance::len_in_ring));
        if done == 0 {
            return Ran::Single;
        }
        let theirs = &self.ports[port].pairs[target.pair];
        theirs.rx_packets.add(done as u64);
        theirs.rx_bytes.add(bytes);
        theirs.rx_groups.count_run(&packets[..done], self.hub.switch.is_some());
        Ran::Some(target.id, done)
    }

    /// Gives a packet of a burst to a port, as it takes it.
    pub fn give(&mut self, queues: &mut Queues<'_>, from: Origin, port: usize, head: &mut Head) -> Given {
        let target = match self.target(port, from.pair) {
            Some(target) => target,
            None => match self.look(queues, from, port, head) {
                Ok(target) => target,
                Err(given) => return given,
            },
        };
        let Some((tx, rx)) = queues.pair(from.id, target.id) else {
            return self.rests_or_stops(queues, from, port, target);
        };
        let chain = tx.burst(from.at);
        let read = |at: u32, into: &mut [u8]| _ = chain.readable(at, into.len() as u32).read(into);
        let own = (&mut self.piece, &mut self.spread, &mut self.witness);
        let outcome = fit(rx, (port, target), head, &chain, read, own);
        let port = &self.ports[port];
        let nothing = matches!(outcome, Some(Outcome { packets: 0, why: Some(Refused::NoBuffers), .. }));
        if nothing && port.waits {
            return Given::Waits(target.id);
        }
        count(&port.pairs[target.pair], head, outcome);
        Given::To(target.id)
    }

    /// As many packets as go to the same queue here of a port whose packets have to be looked at, if their Ethernet headers
    /// are enough for that.
    #[cold]
    fn filtered<'p>(
        &self,
        port: usize,
        pair: usize,
        packets: &'p [Option<Glance>],
    ) -> Option<(Target, &'p [Option<Glance>])> {
        let heads = packets.iter().map_while(|packet| packet.as_ref().map(Glance::bytes));
        let (target, count) = self.receivers[port].filtered(pair, heads)?;
        Some((target, &packets[..count]))
    }

    /// The queue here for a packet that has to be looked at, or that is for a port without queues here. `None`: it went
    /// elsewhere, or nowhere, or is to wait.
    #[cold]
    fn look(
        &mut self,
        queues: &mut Queues<'_>,
        from: Origin,
        port: usize,
        head: &mut Head,
    ) -> Result<Target, Given> {
        if self.hub.expects(&self.ports[port]) {
            return Err(Given::Absent);
        }
        if !self.receivers[port].is_steered() {
            self.send_away(queues, from, port, head);
            return Err(Given::Away);
        }
        let chain = queues.finishing(from.id).ok_or(Given::Away)?.burst(from.at);
        let read = |at: u32, into: &mut [u8]| chain.readable(at, into.len() as u32).read(into);
        let place = self.receivers[port].place(from.pair, head, read).ok_or(Given::Away)?;
        self.settle(port, place, |chute, pair| chute.send((port, &self.ports[port]), pair, head, &chain))
            .ok_or(Given::Away)
    }

    /// What becomes of a packet for a queue that takes nothing: for now, as one that has no buffers, or any more, as it is about
    /// to stop, or broken.
    #[cold]
    fn rests_or_stops(&self, queues: &mut Queues<'_>, from: Origin, port: usize, target: Target) -> Given {
        let port = &self.ports[port];
        if queues.only_rests(target.id) {
            if port.waits {
                return Given::Waits(target.id);
            }
            port.pairs[target.pair].drop_rx(Drop::NoBuffers);
            return Given::Away;
        }
        if port.waits && queues.finishing(target.id).is_some_and(|rx| !rx.is_broken()) {
            return Given::Absent;
        }
        self.stats_of(from).drop_tx(Drop::LinkDown);
        Given::Away
    }

    /// Whether one of these ports is expected: what goes to it and to others waits for it.
    #[inline]
    pub fn expects_any(&self, mut ports: impl Iterator<Item = PortId>) -> bool {
        self.hub.expecting.load(Ordering::Relaxed)
            && ports.any(|port| self.hub.expects(&self.ports[usize::from(port.0)]))
    }

    /// The queue here for a packet that has to be looked at, whose bytes are ours; as [`look`](Self::look).
    #[cold]
    fn look_inside(&self, port: usize, pair: usize, head: &mut Head, bytes: &[u8]) -> Option<Target> {
        let read = |at: u32, into: &mut [u8]| {
            read_of(bytes, at, into);
            bytes.len().saturating_sub(at as usize).min(into.len())
        };
        let place = self.receivers[port].place(pair, head, read)?;
        self.settle(port, place, |chute, pair| chute.send_frame((port, &self.ports[port]), pair, head, bytes))
    }

    /// The queue here for a packet whose place is known, unless it goes by the way to another reactor, which looks at it
    /// again.
    fn settle(&self, port: usize, place: Place, send: impl FnOnce(&Chute, usize) -> bool) -> Option<Target> {
        let drop = |target: Target, why| self.ports[port].pairs[target.pair].drop_rx(why);
        match place {
            Place::Nowhere(target) => drop(target, Drop::Filtered),
            Place::Here(target) => return Some(target),
            Place::Pair(pair, instead) => match self.seats.way_to_pair(&self.ports[port], pair, self.bit) {
                Some(chute) if send(chute, pair) => {}
                Some(_) => drop(instead, Drop::NoBuffers),
                None => return Some(instead),
            },
        }
        None
    }

    /// Gives a packet whose bytes are ours to a port; false if it has no queue here.
    pub fn hand_in(
        &mut self,
        queues: &mut Queues<'_>,
        port: usize,
        pair: usize,
        head: &mut Head,
        bytes: &[u8],
    ) -> bool {
        let here = &self.targets[port];
        let target = match here.get(pair % here.len().max(1)).copied() {
            Some(target) => target,
            None if !self.receivers[port].is_steered() => return false,
            None => match self.look_inside(port, pair, head, bytes) {
                Some(target) => target,
                None => return true,
            },
        };
        let Some(rx) = queues.get(target.id) else {
            let rests = queues.only_rests(target.id);
            if rests {
                self.ports[port].pairs[target.pair].drop_rx(Drop::NoBuffers);
            }
            return rests;
        };
        let read = |at: u32, into: &mut [u8]| read_of(bytes, at, into);
        let own = (&mut self.piece, &mut self.spread, &mut self.witness);
        let outcome = fit(rx, (port, target), head, bytes, read, own);
        count(&self.ports[port].pairs[target.pair], head, outcome);
        true
    }

    /// A packet that could wait does not.
    #[cold]
    pub fn refuse(&self, port: usize, target: QueueId) {
        if let Some(pair) = self.receivers[port].pair_of(target) {
            self.ports[port].pairs[pair].drop_rx(Drop::NoBuffers);
        }
    }

    /// To a port that has no queue here: the uplink, or one that has a queue on another reactor, by way of that.
    #[cold]
    fn send_away(&mut self, queues: &mut Queues<'_>, from: Origin, port: usize, head: &Head) {
        let Some(tx) = queues.finishing(from.id) else { return };
        let chain = tx.burst(from.at);
        let rest = &mut chain.readable(head.read(), u32::MAX);
        let read = |at: u32, into: &mut [u8]| _ = chain.readable(at, into.len() as u32).read(into);
        if self.leave(port, head, |outside, head| outside.send(head, rest), &read) {
            return;
        }
        // The receiver's counters are another reactor's.
        let theirs = &self.ports[port];
        match self.seats.way_to(theirs) {
            Some(chute) if chute.send((port, theirs), from.pair, head, &chain) => {}
            Some(_) => self.stats_of(from).drop_tx(Drop::NoBuffers),
            None => self.stats_of(from).drop_tx(Drop::LinkDown),
        }
    }

    fn stats_of(&self, from: Origin) -> &PairStats {
        &self.ports[from.port].pairs[from.pair]
    }

    /// Has a packet leave by the uplink, and counts it; false if that is not here.
    pub fn leave(
        &mut self,
        port: usize,
        head: &Head,
        send: impl FnOnce(&mut Outside, &Head) -> bool,
        read: &dyn Fn(u32, &mut [u8]),
    ) -> bool {
        let Some(outside) = self.outside.as_mut().filter(|o| o.port == port) else { return false };
        let theirs = &self.ports[port].pairs[0];
        if !takes(head, outside.uplink.takes()) {
            // Guests are not offered what the uplink does not take.
            theirs.drop_rx(Drop::BadHeader);
        } else if send(outside, head) {
            theirs.rx_packets.add(1);
            theirs.rx_bytes.add(head.packet_len().into());
            theirs.rx_groups.count(head.packet(), 1);
            self.witness.forwarded(port, head, head.read(), read);
        } else {
            theirs.drop_rx(Drop::LinkDown);
        }
        true
    }

    /// Fills the receive queues with packets from nowhere, at most so many each; how many.
    pub fn generate(&mut self, queues: &mut Queues<'_>, head: &mut Head, len: u32, burst: u16) -> usize {
        let mut made = 0;
        for (port, targets) in self.targets.iter_mut().enumerate() {
            for (pair, target) in targets.iter_mut().enumerate() {
                if target.pair != pair {
                    continue;
                }
                let Some(rx) = queues.get(target.id) else { continue };
                let stats = &self.ports[port].pairs[target.pair];
                for _ in 0..rx.ready_for(burst, RECEIVED) {
                    head.make_up(len, target.made);
                    // Its payload is what has been in the buffer.
                    if deliver(rx, target.form, head, &[][..], &mut self.spread).is_err() {
                        break;
                    }
                    stats.rx_packets.add(1);
                    stats.rx_bytes.add(len.into());
                    stats.rx_groups.count(head.packet(), 1);
                    self.witness.forwarded(port, head, 0, &|_, into| into.fill(0));
                    (made, target.made) = (made + 1, target.made + 1);
                }
            }
        }
        made
    }
}

/// Bytes of a packet that is ours.
pub fn read_of(bytes: &[u8], at: u32, into: &mut [u8]) {
    let from = bytes.get(at as usize..).unwrap_or_default();
    let n = from.len().min(into.len());
    into[..n].copy_from_slice(&from[..n]);
}

/// Puts a packet into receive buffers of a port in the form in which their driver takes it.
fn fit(
    rx: &mut Queue,
    (port, target): (usize, Target),
    head: &mut Head,
    sent: &(impl Sent + ?Sized),
    read: impl Fn(u32, &mut [u8]),
    (piece, spread, witness): (&mut Head, &mut Spread, &mut Witness),
) -> Option<Outcome> {
    if !takes(head, target.features) {
        let got = |head: &Head, behind| witness.forwarded(port, head, behind, &read);
        return deliver_softened(rx, (target.form, target.features), head, piece, sent, &read, spread, got);
    }
    let (len, rest) = (head.packet_len(), sent.part(head.read(), u32::MAX));
    let delivered = deliver(rx, target.form, head, rest, spread);
    if delivered.is_ok() {
        witness.forwarded(port, head, head.read(), &read);
    }
    Some(Outcome::of(len, delivered))
}

fn reason(refused: Refused) -> Drop {
    match refused {
        Refused::NoBuffers => Drop::NoBuffers,
        Refused::TooLong => Drop::TooLong,
        Refused::Broken => Drop::LinkDown,
    }
}

/// Counts what became of a packet for its receiver.
fn count(theirs: &PairStats, head: &Head, outcome: Option<Outcome>) {
    let Some(outcome) = outcome else { return theirs.drop_rx(Drop::BadHeader) };
    theirs.rx_packets.add(outcome.packets);
    theirs.rx_bytes.add(outcome.bytes);
    theirs.rx_groups.count(head.packet(), outcome.packets);
    if let Some(why) = outcome.why {
        (0..outcome.refused).for_each(|_| theirs.drop_rx(reason(why)));
    }
}
