//! A hub's station on one reactor: takes packets from the transmit queues there and copies each into a receive queue.

use std::sync::Arc;

use poll_engine::engine::reactor::{Io, QueueId};
use poll_engine::engine::station::{Queues, Station};
use poll_engine::stats::ErrorKind;

use crate::features::MRG_RXBUF;
use crate::header::header_len;
use crate::hub::{Change, Hub, Plan};
use crate::rx::{Form, InChain, Refused, Spread, deliver};
use crate::stats::Drop;
use crate::tx::{Head, MIN_PACKET};

/// Rounds between two looks at a receive queue that has no buffers: about a microsecond.
const PAUSE: u32 = 32;

/// A transmit queue on this reactor.
#[derive(Debug)]
struct Source {
    id: QueueId,
    port: usize,
    pair: usize,
    /// Bytes of the header before its packets.
    header: usize,
    /// The receive queue that its next packet waits for, and for how many rounds nobody looks whether it has buffers now:
    /// looking takes the line from the driver that is about to write there.
    waits_for: Option<QueueId>,
    pause: u32,
    /// Where its packet before went.
    last: Option<QueueId>,
}

/// A receive queue on this reactor.
#[derive(Clone, Copy, Debug)]
struct Target {
    id: QueueId,
    pair: usize,
    form: Form,
}

/// The station.
pub struct Shard {
    hub: Arc<Hub>,
    reactor: usize,
    sources: Vec<Source>,
    /// By port.
    targets: Vec<Vec<Target>>,
    head: Head,
    spread: Spread,
}

impl Shard {
    /// The one of `hub` on this reactor.
    pub fn new(hub: Arc<Hub>, reactor: usize) -> Shard {
        let targets = hub.ports.iter().map(|_| Vec::new()).collect();
        Shard { hub, reactor, sources: Vec::new(), targets, head: Head::new(), spread: Spread::new() }
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
                            waits_for: None,
                            pause: 0,
                            last: None,
                        });
                    } else {
                        let form = Form { header, mergeable: features & MRG_RXBUF != 0 };
                        self.targets[port].push(Target { id, pair, form });
                        self.targets[port].sort_by_key(|t| t.pair);
                    }
                }
                Change::Down { port, index } => {
                    let pair = usize::from(index / 2);
                    if index % 2 == 1 {
                        self.sources.retain(|s| (s.port, s.pair) != (port, pair));
                    } else {
                        self.targets[port].retain(|t| t.pair != pair);
                    }
                }
            }
        }
    }

    /// Moves what a transmit queue has, at most a round's worth; how many packets.
    #[inline]
    fn drain(&mut self, at: usize, queues: &mut Queues<'_>) -> usize {
        let Shard { hub, sources, targets, head, spread, .. } = self;
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
        let ready = tx.ready();
        if ready == 0 {
            return 0;
        }
        // Most often all go where the last one went.
        if let Some(rx) = source.last.and_then(|last| queues.get(last)) {
            rx.ready_for(ready);
        }
        let own = &hub.ports[source.port].pairs[source.pair];
        let mut moved = 0;
        for _ in 0..ready {
            let Some(tx) = queues.get(source.id) else { break };
            let Some(request) = tx.take() else { break };
            if let Err(bad) = head.peek(&tx.chain(), source.header) {
                own.drop_tx(Drop::Malformed);
                tx.count_error(ErrorKind::Malformed, &bad);
                tx.complete(request, 0);
                moved += 1;
                continue;
            }
            let port = match hub.plan {
                Plan::Echo => {
                    swap_addresses(head.packet_mut());
                    source.port
                }
                Plan::Wire => 1 - source.port,
                Plan::Discard | Plan::Generate(_) => {
                    own.tx_packets.add(1);
                    own.tx_bytes.add(head.packet_len().into());
                    tx.complete(request, 0);
                    moved += 1;
                    continue;
                }
            };
            let bytes = u64::from(head.packet_len());
            let here = &targets[port];
            let target = here.get(source.pair).or(here.get(source.pair % here.len().max(1)));
            let pair = target.and_then(|t| Some((t, queues.pair(source.id, t.id)?)));
            let Some((target, (tx, rx))) = pair else {
                own.drop_tx(Drop::LinkDown);
                let Some(tx) = queues.get(source.id) else {
                    unreachable!("a queue that has just given a chain is there");
                };
                tx.complete(request, 0);
                moved += 1;
                continue;
            };
            source.last = Some(target.id);
            let rest = InChain::new(head.rest(&tx.chain(), source.header));
            match deliver(rx, target.form, head, rest, spread) {
                Ok(()) => {
                    let theirs = &hub.ports[port].pairs[target.pair];
                    theirs.rx_packets.add(1);
                    theirs.rx_bytes.add(bytes);
                }
                Err(Refused::NoBuffers) if hub.ports[port].waits => {
                    source.waits_for = Some(target.id);
                    source.pause = PAUSE;
                    own.tx_waits.add(1);
                    tx.untake(request);
                    return moved;
                }
                Err(refused) => {
                    let why = match refused {
                        Refused::NoBuffers => Drop::NoBuffers,
                        Refused::TooLong => Drop::TooLong,
                        Refused::Broken => Drop::LinkDown,
                    };
                    hub.ports[port].pairs[target.pair].drop_rx(why);
                }
            }
            own.tx_packets.add(1);
            own.tx_bytes.add(bytes);
            tx.complete(request, 0);
            moved += 1;
        }
        moved
    }

    /// Fills the receive queues with packets from nowhere.
    fn generate(&mut self, len: u16, queues: &mut Queues<'_>) -> usize {
        let mut made = 0;
        let Shard { hub, targets, head, spread, .. } = self;
        for (port, targets) in targets.iter().enumerate() {
            for target in targets {
                let Some(rx) = queues.get(target.id) else { continue };
                let stats = &hub.ports[port].pairs[target.pair];
                for _ in 0..rx.ready_for(16) {
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

/// As an echo does: what was for us is from us.
fn swap_addresses(packet: &mut [u8]) {
    if let Some((to, rest)) = packet.split_at_mut_checked(6)
        && let Some(from) = rest.get_mut(..6)
    {
        to.swap_with_slice(from);
    }
}

impl Station for Shard {
    fn poll(&mut self, queues: &mut Queues<'_>, _: &mut Io<'_>) -> usize {
        if let Some(changes) = self.hub.inboxes[self.reactor].take() {
            self.change(changes);
        }
        let mut moved = 0;
        for at in 0..self.sources.len() {
            moved += self.drain(at, queues);
        }
        if let Plan::Generate(len) = self.hub.plan {
            moved += self.generate(len, queues);
        }
        moved
    }

    fn prepare_sleep(&mut self, queues: &mut Queues<'_>, _: &mut Io<'_>) -> bool {
        for source in &self.sources {
            queues.wake_on(source.waits_for.unwrap_or(source.id));
        }
        if matches!(self.hub.plan, Plan::Generate(_)) {
            self.targets.iter().flatten().for_each(|t| queues.wake_on(t.id));
        }
        false
    }
}
