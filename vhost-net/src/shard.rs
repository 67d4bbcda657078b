//! A hub's station on one reactor: forwards what the transmit queues there have ([`burst`](crate::burst)), and what comes
//! from the uplink and from other reactors.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use poll_engine::engine::reactor::Io;
use poll_engine::engine::station::{Queues, Station};

use crate::burst::{Burst, Source, described};
use crate::exits::{Exits, Target, read_of};
use crate::features::MRG_RXBUF;
use crate::header::{HashReport, header_len};
use crate::hub::{Hub, Plan, Port};
use crate::outside::Outside;
use crate::parcel::{Chute, PARCELS, Parcel};
use crate::rx::Form;
use crate::seats::{Change, Seat, locked};
use crate::stats::Drop;
use crate::switch::{self, PortId, Verdict};
use crate::tx::{Head, MIN_PACKET};
use crate::witness::Witness;

/// Most packets from other reactors in one round.
const MAX_PARCELS: usize = 32;
/// Most packets from outside, and made up, in one round.
const BURST: u16 = 32;

/// How long a reactor sleeps at least and at most while a rate limit holds a sender back.
const SHORTEST_SLEEP: Duration = Duration::from_micros(50);
const LONGEST_SLEEP: Duration = Duration::from_millis(100);

/// The station.
pub struct Shard {
    hub: Arc<Hub>,
    seat: Arc<Seat>,
    /// Those of the exits.
    ports: Arc<[Arc<Port>]>,
    sources: Vec<Source>,
    exits: Exits,
    switching: Option<switch::Shard>,
    burst: Burst,
    /// Of a packet that does not come from a guest here, and that for one of many receivers.
    head: Head,
    flooded: Head,
    /// When to look again whether ports that are expected have come.
    next_look: Option<u64>,
    /// The uplink is to be laid at the seat once nothing of it is under way.
    uplink_goes: bool,
}

impl Shard {
    /// The one of `hub` at this seat, which is that of the reactor of this number, of those that there were at first.
    ///
    /// # Panics
    /// If there is no such seat.
    pub fn new(hub: Arc<Hub>, seat: usize) -> Shard {
        let exits = Exits::new(Arc::clone(&hub), seat);
        let switching = hub.switch.as_ref().map(|switch| switch.shard(seat));
        let seat = Arc::clone(exits.seats.at(seat));
        let (burst, head, flooded) = (Burst::new(), Head::new(), Head::new());
        let (sources, next_look, ports, uplink_goes) = (Vec::new(), None, Arc::clone(&exits.ports), false);
        Shard { hub, seat, ports, sources, exits, switching, burst, head, flooded, next_look, uplink_goes }
    }

    /// With the uplink, whose port is one of the hub's.
    #[must_use]
    pub fn with_outside(mut self, outside: Outside) -> Shard {
        self.exits.outside = Some(outside);
        self
    }

    /// With somebody who notes packets.
    #[must_use]
    pub fn with_witness(mut self, witness: Witness) -> Shard {
        self.exits.witness = witness;
        self
    }

    #[cold]
    fn change(&mut self, changes: Vec<Change>, queues: &mut Queues<'_>, io: &mut Io<'_>) {
        self.next_look = self.hub.next_look();
        // What a queue, or the uplink, had sent from another reactor comes before what it sends from here.
        if changes.iter().any(|change| matches!(change, Change::Up { .. } | Change::UplinkComes)) {
            for _ in 0..PARCELS.div_ceil(MAX_PARCELS) {
                self.take_in(queues);
            }
        }
        for change in changes {
            match change {
                Change::Up { port, index, id, features } => {
                    let (pair, header) = (usize::from(index / 2), header_len(features));
                    if index % 2 == 1 {
                        self.sources.push(Source::new(id, (port, pair), header, features));
                    } else {
                        let mergeable = features & MRG_RXBUF != 0;
                        let form = Form { header, mergeable, hash: HashReport::default() };
                        self.exits.open(port, Target { id, pair, form, features, made: 0 });
                    }
                }
                Change::Rules => self.switching.iter_mut().for_each(switch::Shard::adopt),
                Change::Ports => {
                    self.exits.adopt();
                    self.ports = Arc::clone(&self.exits.ports);
                    self.switching.iter_mut().for_each(switch::Shard::adopt);
                }
                Change::Seats => self.exits.look_round(),
                Change::Witness => self.exits.witness = std::mem::take(&mut *locked(&self.seat.witness)),
                Change::UplinkGoes => {
                    if let Some(outside) = &mut self.exits.outside {
                        outside.stop(io);
                        self.uplink_goes = true;
                    }
                }
                Change::UplinkComes => self.welcome_uplink(),
                Change::Steering(port) => self.exits.steer(port),
                Change::Down { port, index } => {
                    let pair = usize::from(index / 2);
                    if index % 2 == 1 {
                        self.sources.retain(|s| (s.port, s.pair) != (port, pair));
                    } else {
                        self.exits.close(port, pair);
                    }
                }
            }
        }
    }

    /// Lays the uplink at the seat, if nothing of it is under way.
    #[cold]
    fn see_uplink_off(&mut self) {
        let Some(outside) = self.exits.outside.take_if(|outside| outside.in_flight() == 0) else { return };
        self.uplink_goes = false;
        self.ports[outside.port].places.fetch_and(!self.seat.mask(), Ordering::SeqCst);
        *locked(&self.seat.luggage) = Some(outside);
    }

    /// Takes the uplink from the seat, or keeps it if it was to go and has not.
    #[cold]
    fn welcome_uplink(&mut self) {
        self.uplink_goes = false;
        if let Some(outside) = locked(&self.seat.luggage).take() {
            self.ports[outside.port].places.fetch_or(self.seat.mask(), Ordering::SeqCst);
            self.exits.outside = Some(outside);
        }
        self.exits.outside.iter_mut().for_each(Outside::go_on);
    }

    /// Takes in what other reactors have for ports here, a bounded amount of it.
    #[inline]
    fn take_in(&mut self, queues: &mut Queues<'_>) -> usize {
        let Shard { seat, exits, .. } = self;
        let Some(chute) = seat.chute.get() else { return 0 };
        for taken in 0..MAX_PARCELS {
            let Some(mut parcel) = chute.receive() else { return taken };
            let Parcel { head, bytes, port, pair, serial } = &mut parcel;
            // The port that it was for has gone, and with it its counters.
            if exits.ports.get(*port).is_none_or(|port| port.serial != *serial) {
                chute.give_back(parcel);
                continue;
            }
            let rest = bytes.get(head.read() as usize..).unwrap_or_default();
            let read = |at: u32, into: &mut [u8]| read_of(bytes, at, into);
            if !exits.leave(*port, head, |outside, head| outside.send_copy(head, rest), &read) {
                // Without a queue here, it has left since. To send it after that could have it come behind later ones.
                if !exits.hand_in(queues, *port, *pair, head, bytes) {
                    exits.ports[*port].miss_rx(*pair);
                }
            }
            chute.give_back(parcel);
        }
        MAX_PARCELS
    }

    /// Takes in what comes from outside, a bounded amount of it.
    #[inline]
    fn come_in(&mut self, queues: &mut Queues<'_>) -> usize {
        let Shard { hub, ports, exits, switching, head, flooded, .. } = self;
        let Some(switch) = switching else { return 0 };
        // Out of the way of packets, none of which go back there.
        let Some(mut outside) = exits.outside.take() else { return 0 };
        let now = hub.now();
        outside.look(hub, now);
        let port = outside.port;
        let own = &ports[port].pairs[0];
        let mut give = |exits: &mut Exits, to: usize, head: &mut Head, frame: &[u8]| {
            let pair = flow(frame);
            if exits.hand_in(queues, to, pair, head, frame) {
                return;
            }
            match exits.seats.way_to(&ports[to]) {
                Some(chute) if chute.send_frame((to, &ports[to]), pair, head, frame) => {}
                Some(_) => own.drop_tx(Drop::NoBuffers),
                None => own.drop_tx(Drop::LinkDown),
            }
        };
        let received = outside.uplink.receive(BURST.into(), &mut |header, frame| {
            own.tx_packets.add(1);
            own.tx_bytes.add(frame.len() as u64);
            own.tx_groups.count(frame, 1);
            exits.witness.came_in(port, header, frame);
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
                    give(exits, to.0.into(), head, frame);
                }
                Verdict::Flood(flood) => {
                    for (to, action) in switch.egress(flood, now) {
                        flooded.clone_from(head);
                        flooded.retag(action);
                        give(exits, to.0.into(), flooded, frame);
                    }
                }
            }
        });
        exits.outside = Some(outside);
        received
    }
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

impl Station for Shard {
    fn attach(&mut self, io: &mut Io<'_>) {
        if let Some(outside) = &mut self.exits.outside {
            outside.watch(io);
        }
    }

    fn poll(&mut self, queues: &mut Queues<'_>, io: &mut Io<'_>) -> usize {
        if let Some(changes) = self.seat.inbox.take() {
            self.change(changes, queues, io);
        }
        if self.uplink_goes {
            self.see_uplink_off();
        }
        if self.next_look.is_some_and(|at| self.hub.now() >= at) {
            self.hub.look_again();
            self.next_look = None;
        }
        let mut moved = self.take_in(queues);
        let Shard { hub, ports, sources, exits, switching, burst, .. } = self;
        for source in sources {
            moved += burst.forward(source, (hub, ports), exits, switching.as_mut(), queues);
        }
        moved += self.come_in(queues);
        if let Some(outside) = &mut self.exits.outside {
            outside.flush(io);
        }
        if let Plan::Generate(len) = self.hub.plan {
            let len = u32::from(len).max(MIN_PACKET);
            moved += self.exits.generate(queues, &mut self.head, len, BURST);
        }
        moved
    }

    fn complete(&mut self, _: &mut Queues<'_>, _: &mut Io<'_>, tag: u32, result: i32, more: bool) {
        if let Some(outside) = &mut self.exits.outside {
            outside.complete(tag, result, more);
        }
    }

    fn stop(&mut self, _: &mut Queues<'_>, io: &mut Io<'_>) {
        if let Some(outside) = &mut self.exits.outside {
            outside.stop(io);
        }
    }

    fn in_flight(&self) -> usize {
        self.exits.outside.as_ref().map_or(0, Outside::in_flight)
    }

    fn prepare_sleep(&mut self, queues: &mut Queues<'_>, io: &mut Io<'_>) -> bool {
        if let Some(outside) = &mut self.exits.outside {
            outside.watch(io);
        }
        for source in self.sources.iter().filter(|s| s.waits_until.is_none()) {
            queues.wake_on(source.wake_on());
        }
        if matches!(self.hub.plan, Plan::Generate(_)) {
            self.exits.targets.iter().flatten().for_each(|t| queues.wake_on(t.id));
        }
        let has_work = self.exits.outside.as_ref().is_some_and(|outside| outside.uplink.has_work());
        has_work || self.seat.chute.get().is_some_and(Chute::has_parcel)
    }

    fn longest_sleep(&self) -> Option<Duration> {
        let until = self.sources.iter().filter_map(|s| s.waits_until).chain(self.next_look).min();
        // The link of an uplink is looked at now and then.
        let Some(until) = until else { return self.exits.outside.is_some().then_some(LONGEST_SLEEP) };
        // No longer than what a driver may be without service that makes its ring anew.
        Some(Duration::from_nanos(until.saturating_sub(self.hub.now())).clamp(SHORTEST_SLEEP, LONGEST_SLEEP))
    }
}
