//! A port's receive queues on one reactor, and which of them its driver wants used for what. As long as no packet has to be
//! looked at for that, none is.

use std::sync::Arc;

use poll_engine::engine::reactor::QueueId;

use crate::exits::Target;
use crate::header::{HEADER, HashReport};
use crate::steering::Steering;
use crate::tx::Head;

/// Of one port.
#[derive(Debug, Default)]
pub struct Receivers {
    all: Vec<Target>,
    steering: Arc<Steering>,
    /// The one in use for packets from each pair, if they have to be looked at.
    steered: Vec<Target>,
}

/// Where a packet that had to be looked at goes.
#[derive(Clone, Copy, Debug)]
pub enum Place {
    /// Its driver does not want it, who has this queue among others.
    Nowhere(Target),
    /// Into this queue.
    Here(Target),
    /// Into that of this pair, if there is one elsewhere; or else into this one.
    Pair(usize, Target),
}

impl Receivers {
    /// A queue runs.
    pub fn open(&mut self, target: Target) {
        self.all.push(target);
        self.all.sort_by_key(|t| t.pair);
    }

    /// One has stopped.
    pub fn close(&mut self, pair: usize) {
        self.all.retain(|t| t.pair != pair);
    }

    /// Which pair's queue this is.
    pub fn pair_of(&self, queue: QueueId) -> Option<usize> {
        self.all.iter().find(|t| t.id == queue).map(|t| t.pair)
    }

    /// The driver wants this from now on.
    pub fn steer(&mut self, steering: Arc<Steering>) {
        self.steering = steering;
    }

    /// The one in use for packets from each of so many pairs, which is that of the same pair if that is here. None, if packets
    /// have to be looked at, or if none is here.
    pub fn sort_out(&mut self, pairs: usize) -> Vec<Target> {
        let used = self.all.iter().filter(|t| t.pair < self.steering.pairs);
        let used = used.map(|t| Target { features: t.features & self.steering.offloads, ..*t });
        let used: Vec<Target> = used.collect();
        let looks = self.steering.looks_at_packets() || used.iter().any(|t| t.form.header != HEADER);
        let exact = |pair: usize| used.iter().find(|t| t.pair == pair);
        let pairs = 0..if used.is_empty() { 0 } else { pairs };
        let table = pairs.map(|pair| exact(pair).map_or(used[pair % used.len()], |t| *t)).collect();
        let (plain, steered) = if looks { (Vec::new(), table) } else { (table, Vec::new()) };
        self.steered = steered;
        plain
    }

    /// Whether there are some in use whose packets have to be looked at.
    pub fn is_steered(&self) -> bool {
        !self.steered.is_empty()
    }

    /// The queue for packets of this pair that begin so, of which no more is to be known than their Ethernet header; and
    /// how many of them.
    pub fn filtered<'a>(
        &self,
        pair: usize,
        heads: impl Iterator<Item = [u8; 16]> + 'a,
    ) -> Option<(Target, usize)> {
        let target = self.modulo(pair).filter(|t| t.form.header == HEADER && !self.steering.hashes())?;
        let taken = heads.take_while(|head| self.steering.takes(head)).count();
        (taken > 0).then_some((target, taken))
    }

    /// Where a packet goes that comes from this pair. More of it is read as needed.
    pub fn place(
        &self,
        pair: usize,
        head: &mut Head,
        read: impl FnOnce(u32, &mut [u8]) -> usize,
    ) -> Option<Place> {
        let target = self.modulo(pair)?;
        head.make_received(HEADER, HashReport::default());
        if !self.steering.takes(head.packet()) {
            return Some(Place::Nowhere(target));
        }
        if !self.steering.hashes() {
            return Some(Place::Here(target));
        }
        head.look_further(read);
        let (wanted, hash) = self.steering.place(head.packet(), head.packet_len() as usize);
        Some(match wanted {
            None => Place::Here(target.with(hash)),
            Some(pair) => match self.steered.iter().find(|t| t.pair == pair) {
                Some(target) => Place::Here(target.with(hash)),
                None => Place::Pair(pair, target.with(hash)),
            },
        })
    }

    fn modulo(&self, pair: usize) -> Option<Target> {
        let used = &self.steered;
        used.get(pair).or_else(|| used.get(pair % used.len().max(1))).copied()
    }
}

impl Target {
    fn with(self, hash: HashReport) -> Target {
        Target { form: crate::rx::Form { hash, ..self.form }, ..self }
    }
}
