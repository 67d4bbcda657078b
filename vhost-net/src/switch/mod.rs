//! A learning layer-2 switch, as decisions: where does this frame go, and what becomes of its VLAN tag. No I/O, and time is
//! an argument.
//!
//! [`Switch`] is what all reactors share: the ports, the addresses learnt ([`fdb`]) and the limits. Each reactor decides
//! with its own [`Shard`], which alone writes the shard's counters. A frame passes, in this order:
//!
//! ```text
//! link ─► addresses ─► VLAN ─► guard ─► rate limit ─► learn ─► look up or flood ─► storm limit ─► of each port it is for:
//! link, isolation, VLAN, MTU, rate limit
//! ```
//!
//! A decision is about bytes that the guest cannot change any more, and these are the bytes to send: whoever reads
//! them from the guest's memory again forwards what nobody has looked at.

pub mod counters;
pub mod fdb;
pub mod guard;
pub mod limit;
pub mod vlan;

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use crate::mac::MacAddr;
use crate::packet::{ETHERNET, Packet, TAG};
pub use counters::{DropReason, PortCounters};
use fdb::{Fdb, FdbConfig, Learnt, MAX_PORTS, Period};
use guard::{Guard, GuardConfig};
use limit::{Limiter, Rate, Storm, StormRates};
use vlan::{Tag, TagAction, Vlan};

/// A port's number in its switch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PortId(pub u16);

impl PortId {
    #[inline]
    fn index(self) -> usize {
        usize::from(self.0)
    }
}

/// What a port is to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PortConfig {
    /// For people.
    pub name: String,
    /// Its VLANs.
    pub vlan: Vlan,
    /// What it may send from.
    pub guard: GuardConfig,
    /// What may come from it.
    pub ingress: Rate,
    /// What may go to it.
    pub egress: Rate,
    /// What may come from it to many.
    pub storm: StormRates,
    /// Sends nothing to other isolated ports.
    pub is_isolated: bool,
    /// Gets frames to addresses that nobody knows.
    pub floods_unknown: bool,
    /// Most bytes of a packet, without the Ethernet header and tags.
    pub mtu: u32,
    /// Most addresses learnt from it.
    pub max_addresses: u32,
}

impl PortConfig {
    /// Most addresses that a guest's port has by itself.
    pub const MAX_ADDRESSES: u32 = 1024;

    /// A port that everything may pass.
    pub fn new(name: impl Into<String>) -> PortConfig {
        PortConfig { name: name.into(), ..PortConfig::default() }
    }

    /// The VLAN of frames without a tag.
    fn untagged(&self) -> Option<u16> {
        self.vlan.admit(None).ok()
    }
}

impl Default for PortConfig {
    fn default() -> PortConfig {
        PortConfig {
            name: String::new(),
            vlan: Vlan::default(),
            guard: GuardConfig::default(),
            ingress: Rate::default(),
            egress: Rate::default(),
            storm: StormRates::default(),
            is_isolated: false,
            floods_unknown: true,
            mtu: 65535,
            max_addresses: PortConfig::MAX_ADDRESSES,
        }
    }
}

/// What is to be known of a frame.
#[derive(Clone, Copy, Debug)]
pub struct Frame<'a> {
    /// Its first bytes, from the Ethernet header on, in memory that nobody writes.
    pub head: &'a [u8],
    /// Bytes of it all.
    pub len: u32,
    /// How many packets it is, once it is segmented.
    pub packets: u32,
    /// Bytes of the longest of them, with their Ethernet header.
    pub longest: u32,
}

impl<'a> Frame<'a> {
    /// One that is one packet.
    #[inline]
    pub fn whole(head: &'a [u8], len: u32) -> Frame<'a> {
        Frame { head, len, packets: 1, longest: len }
    }
}

/// Where a frame goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Nowhere. It is counted.
    Drop(DropReason),
    /// To one port.
    One(PortId, TagAction),
    /// To those that [`Shard::egress`] lists.
    Flood(Flood),
}

/// A frame to many ports.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Flood {
    from: PortId,
    vid: u16,
    tag: Option<Tag>,
    is_unknown: bool,
    len: u32,
    packets: u32,
    longest: u32,
}

/// What a port is, until somebody changes that.
#[derive(Clone, Debug)]
struct Port {
    is_isolated: bool,
    floods_unknown: bool,
    /// Bytes of the longest frame without a tag.
    longest: u32,
    vlan: Vlan,
    guard: Option<Guard>,
    ingress: Option<Arc<Limiter>>,
    egress: Option<Arc<Limiter>>,
    storm: Arc<Storm>,
    /// Those of whoever is no reactor, and of each shard.
    counters: Vec<Arc<PortCounters>>,
}

/// What all reactors share.
#[derive(Debug)]
pub struct Switch {
    /// As many as there can be.
    up: Box<[AtomicBool]>,
    /// As they are asked for, and as shards are to have them.
    rules: Mutex<(Vec<PortConfig>, Arc<[Port]>)>,
    fdb: Fdb,
    shards: AtomicUsize,
}

impl Switch {
    /// A switch with these ports, all down, for so many reactors. The addresses that a guard lists are their port's for good.
    ///
    /// # Panics
    /// With more ports than [`fdb::MAX_PORTS`].
    pub fn new(fdb: FdbConfig, ports: &[PortConfig], shards: usize) -> Switch {
        assert!(ports.len() <= MAX_PORTS, "{} ports", ports.len());
        let spare = std::iter::repeat_n(0, MAX_PORTS - ports.len());
        let switch = Switch {
            up: std::iter::repeat_with(|| AtomicBool::new(false)).take(MAX_PORTS).collect(),
            rules: Mutex::new((ports.to_vec(), ports.iter().map(|p| Port::new(p, shards)).collect())),
            fdb: Fdb::new(fdb, ports.iter().map(|p| p.max_addresses).chain(spare)),
            shards: AtomicUsize::new(shards),
        };
        (0..).map(PortId).zip(ports).for_each(|(id, config)| switch.pin_guarded(id, config));
        switch
    }

    fn pin_guarded(&self, id: PortId, config: &PortConfig) {
        let pairs = config
            .untagged()
            .into_iter()
            .flat_map(|vid| config.guard.macs.iter().map(move |mac| (vid, *mac)));
        // Without room for it, it is learnt as others are.
        pairs.for_each(|(vid, mac)| _ = self.pin(id, vid, mac));
    }

    /// Has there be a port of this number, down: behind the last one, or in the place of one that was
    /// [removed](Self::remove). Shards see it when they [adopt](Shard::adopt) it; until all have, it stays down.
    ///
    /// # Panics
    /// With a number that leaves a gap, or with more ports than [`fdb::MAX_PORTS`].
    pub fn put(&self, id: PortId, config: PortConfig) {
        assert!(id.index() < MAX_PORTS, "{id:?}");
        let mut rules = self.rules.lock().unwrap_or_else(PoisonError::into_inner);
        let (configs, ports) = &mut *rules;
        let mut changed = ports.to_vec();
        let port = Port::new(&config, self.shards.load(Ordering::Relaxed));
        if id.index() == changed.len() {
            changed.push(port);
            configs.push(config);
        } else {
            changed[id.index()] = port;
            configs[id.index()] = config;
        }
        *ports = changed.into();
        let config = &configs[id.index()];
        self.fdb.set_limit(id, config.max_addresses);
        self.pin_guarded(id, config);
    }

    /// A port takes no part any more, and nothing is known of what was behind it.
    pub fn remove(&self, id: PortId) {
        self.set_link(id, false);
        self.fdb.set_limit(id, 0);
        self.fdb.forget(id);
    }

    /// Has a port be something else from now on; each shard sees it when it [adopts](Shard::adopt) it. Limits that stay the
    /// same go on; what was learnt in other VLANs, or of addresses that the port may not have any more, is forgotten.
    pub fn set_rules(&self, id: PortId, config: PortConfig) {
        let mut rules = self.rules.lock().unwrap_or_else(PoisonError::into_inner);
        let (configs, ports) = &mut *rules;
        let old = std::mem::replace(&mut configs[id.index()], config);
        let config = &configs[id.index()];
        let mut changed = ports.to_vec();
        changed[id.index()] = changed[id.index()].renewed(&old, config);
        *ports = changed.into();
        self.fdb.set_limit(id, config.max_addresses);
        if (&old.vlan, &old.guard) != (&config.vlan, &config.guard) {
            self.fdb.forget(id);
            self.pin_guarded(id, config);
        }
    }

    /// What a port is asked to be.
    pub fn rules(&self, id: PortId) -> PortConfig {
        self.rules.lock().unwrap_or_else(PoisonError::into_inner).0[id.index()].clone()
    }

    fn latest(&self) -> Arc<[Port]> {
        Arc::clone(&self.rules.lock().unwrap_or_else(PoisonError::into_inner).1)
    }

    /// Is for so many reactors, if it was for fewer.
    pub fn grow(&self, shards: usize) {
        let mut rules = self.rules.lock().unwrap_or_else(PoisonError::into_inner);
        if self.shards.fetch_max(shards, Ordering::Relaxed) < shards {
            let mut ports = rules.1.to_vec();
            for port in &mut ports {
                port.counters.resize_with(shards + 1, Arc::default);
            }
            rules.1 = ports.into();
        }
    }

    /// The decisions of reactor number `shard`: one at a time may be in use.
    pub fn shard(self: &Arc<Self>, shard: usize) -> Shard {
        self.numbered(shard + 1)
    }

    /// The decisions of whoever is no reactor: one at a time may be in use.
    pub fn outsider(self: &Arc<Self>) -> Shard {
        self.numbered(0)
    }

    fn numbered(self: &Arc<Self>, number: usize) -> Shard {
        let ports = self.latest();
        Shard { switch: Arc::clone(self), ports, number, period: Period::default(), period_ends: 0 }
    }

    /// The addresses learnt.
    pub fn fdb(&self) -> &Fdb {
        &self.fdb
    }

    /// Has frames of a port, and to it, pass or not. What was learnt from one that goes down is forgotten.
    pub fn set_link(&self, port: PortId, is_up: bool) {
        self.up[port.index()].store(is_up, Ordering::Relaxed);
        if is_up { self.fdb.open(port) } else { self.fdb.close(port) }
    }

    /// Whether a port is up.
    #[inline]
    pub fn is_up(&self, port: PortId) -> bool {
        self.up[port.index()].load(Ordering::Relaxed)
    }

    /// Has an address belong to a port for good. False when the table has no room for it.
    pub fn pin(&self, port: PortId, vid: u16, mac: MacAddr) -> bool {
        self.fdb.pin(self.fdb.key(vid, mac.to_u64()), port)
    }

    /// A counter of a port over all reactors: (name, value) of each.
    pub fn counters(&self, port: PortId) -> Vec<(&'static str, u64)> {
        let ports = self.latest();
        let mut shards = ports[port.index()].counters.iter().map(|shard| shard.named());
        let mut sum: Vec<_> = shards.next().into_iter().flatten().collect();
        for shard in shards {
            sum.iter_mut().zip(shard).for_each(|((_, n), (_, more))| *n += more);
        }
        sum
    }

    /// How many of a port's frames were dropped for a reason.
    pub fn drops(&self, port: PortId, reason: DropReason) -> u64 {
        self.latest()[port.index()].counters.iter().map(|shard| shard.drops(reason)).sum()
    }
}

impl Port {
    fn new(config: &PortConfig, shards: usize) -> Port {
        Port {
            is_isolated: config.is_isolated,
            floods_unknown: config.floods_unknown,
            longest: config.mtu.saturating_add(ETHERNET as u32),
            vlan: config.vlan.clone(),
            guard: Guard::new(&config.guard),
            ingress: Limiter::new(config.ingress).map(Arc::new),
            egress: Limiter::new(config.egress).map(Arc::new),
            storm: Arc::new(Storm::new(config.storm)),
            counters: std::iter::repeat_with(Arc::default).take(shards + 1).collect(),
        }
    }

    /// With the limits that are the same, and what was counted.
    fn renewed(&self, old: &PortConfig, new: &PortConfig) -> Port {
        let mut port = Port { counters: self.counters.clone(), ..Port::new(new, 0) };
        if old.ingress == new.ingress {
            port.ingress.clone_from(&self.ingress);
        }
        if old.egress == new.egress {
            port.egress.clone_from(&self.egress);
        }
        if old.storm == new.storm {
            port.storm.clone_from(&self.storm);
        }
        port
    }

    /// What becomes of a frame from a port that is to leave through this one, which is up or not.
    #[inline]
    fn emit(&self, is_up: bool, from: &Port, frame: &Flood, now: u64) -> Result<TagAction, DropReason> {
        if !is_up {
            return Err(DropReason::EgressDown);
        }
        if from.is_isolated && self.is_isolated {
            return Err(DropReason::Isolated);
        }
        let action = self.vlan.emit(frame.vid, frame.tag)?;
        let tag = if frame.tag.is_some() { TAG as u32 } else { 0 };
        if frame.longest > self.longest + tag {
            return Err(DropReason::TooLong);
        }
        match &self.egress {
            Some(limit) if !limit.take(now, frame.packets, frame.len) => Err(DropReason::EgressRateLimit),
            _ => Ok(action),
        }
    }
}

/// A reactor's part of a switch.
#[derive(Debug)]
pub struct Shard {
    switch: Arc<Switch>,
    /// As last adopted.
    ports: Arc<[Port]>,
    number: usize,
    period: Period,
    period_ends: u64,
}

/// To a group, the group to all included (802.1Q's group bit, in the first octet).
const GROUP: u64 = 1 << 40;
/// 01:80:c2:00:00:00 to 0f.
const RESERVED: u64 = 0x0180_c200_0000;

impl Shard {
    /// The switch.
    pub fn switch(&self) -> &Arc<Switch> {
        &self.switch
    }

    /// Has what was changed of ports hold from now on.
    pub fn adopt(&mut self) {
        self.ports = self.switch.latest();
    }

    /// Whether the port's rate limit lets it send at `now`: one that can wait asks before it takes a frame.
    #[inline]
    pub fn may_send(&self, port: PortId, now: u64) -> bool {
        self.ports[port.index()].ingress.as_ref().is_none_or(|limit| limit.is_open(now))
    }

    /// Nanoseconds: when the port's rate limit lets it send again. May be past.
    pub fn may_send_at(&self, port: PortId) -> u64 {
        self.ports[port.index()].ingress.as_ref().map_or(0, |limit| limit.open_at())
    }

    /// Whether frames from a port are looked at behind their Ethernet header.
    #[inline]
    pub fn looks_inside(&self, port: PortId) -> bool {
        self.ports[port.index()].guard.is_some()
    }

    /// Where a frame from a port goes. `now` is in nanoseconds, of a clock that all shards share and that does not go back.
    #[inline]
    pub fn decide(&mut self, from: PortId, frame: &Frame<'_>, now: u64) -> Verdict {
        if now >= self.period_ends {
            self.age(now);
        }
        self.forward(from, frame, now).unwrap_or_else(|(port, reason)| {
            self.counters(port).dropped(reason);
            Verdict::Drop(reason)
        })
    }

    /// Up to how many bytes frames between the same addresses as the one just decided on, without a tag as it was, go the same
    /// way at the same time. 0 where each is to be decided on.
    pub fn repeats(&self, from: PortId, verdict: Verdict) -> u32 {
        let ports = &self.ports;
        let from = &ports[from.index()];
        if from.guard.is_some() || from.ingress.is_some() {
            return 0;
        }
        let longest = |port: &Port| if port.egress.is_none() { port.longest } else { 0 };
        match verdict {
            Verdict::Drop(_) => 0,
            Verdict::One(to, _) => longest(&ports[to.index()]),
            Verdict::Flood(_) if from.storm.limits() => 0,
            Verdict::Flood(_) => ports.iter().map(longest).min().unwrap_or(0),
        }
    }

    fn counters(&self, port: PortId) -> &PortCounters {
        &self.ports[port.index()].counters[self.number]
    }

    #[cold]
    fn age(&mut self, now: u64) {
        if let Some((period, ends)) = self.switch.fdb.age(now) {
            (self.period, self.period_ends) = (period, ends);
        }
    }

    /// `Err` is the port that a drop counts for, and the reason.
    #[inline]
    fn forward(&self, from: PortId, frame: &Frame<'_>, now: u64) -> Result<Verdict, (PortId, DropReason)> {
        let switch = &*self.switch;
        let port = &self.ports[from.index()];
        let here = |reason| (from, reason);
        if !switch.is_up(from) {
            return Err(here(DropReason::LinkDown));
        }
        let packet = Packet::parse(frame.head, frame.head.len()).map_err(|_| here(DropReason::Runt))?;
        let [dst, src] = [packet.destination(), packet.source()].map(|mac| MacAddr(mac).to_u64());
        let tag = Tag::of(&packet);
        if src & GROUP != 0 || src == 0 {
            return Err(here(DropReason::BadSource));
        }
        if dst & !0xf == RESERVED {
            return Err(here(DropReason::ReservedGroup));
        }
        let vid = port.vlan.admit(tag).map_err(here)?;
        if let Some(guard) = &port.guard {
            guard.check(&packet).map_err(here)?;
        }
        if let Some(limit) = &port.ingress
            && !limit.take(now, frame.packets, frame.len)
        {
            return Err(here(DropReason::RateLimit));
        }
        match switch.fdb.learn(switch.fdb.key(vid, src), from, self.period) {
            Learnt::Known => {}
            news => self.count_learnt(from, news),
        }
        let Frame { len, packets, longest, .. } = *frame;
        let flood = Flood { from, vid, tag, is_unknown: dst & GROUP == 0, len, packets, longest };
        if flood.is_unknown
            && let Some(to) = switch.fdb.lookup(switch.fdb.key(vid, dst))
        {
            if to == from {
                return Err(here(DropReason::SamePort));
            }
            let action = self.ports[to.index()].emit(switch.is_up(to), port, &flood, now);
            return action.map(|action| Verdict::One(to, action)).map_err(|reason| (to, reason));
        }
        let (limit, storm) = match dst {
            _ if flood.is_unknown => (&port.storm.unknown, DropReason::UnknownStorm),
            0xffff_ffff_ffff => (&port.storm.broadcast, DropReason::BroadcastStorm),
            _ => (&port.storm.multicast, DropReason::MulticastStorm),
        };
        match limit {
            Some(limit) if !limit.take(now, packets, len) => Err(here(storm)),
            _ => Ok(Verdict::Flood(flood)),
        }
    }

    #[cold]
    fn count_learnt(&self, from: PortId, news: Learnt) {
        let counters = self.counters(from);
        match news {
            Learnt::New => counters.learnt.add(1),
            Learnt::Moved(_) => {
                counters.learnt.add(1);
                counters.moved.add(1);
            }
            Learnt::PortFull | Learnt::TableFull | Learnt::Pinned => counters.not_learnt.add(1),
            Learnt::Known | Learnt::Closed | Learnt::Busy => {}
        }
    }

    /// The ports that a flood goes to but for their limits, which do not count it.
    pub fn reach(&self, flood: Flood) -> impl Iterator<Item = PortId> {
        let from = &self.ports[flood.from.index()];
        let ports = (0..).map(PortId).zip(&*self.ports).filter(move |&(id, to)| {
            let is_wanted = id != flood.from && (to.floods_unknown || !flood.is_unknown);
            let is_open = is_wanted && self.switch.is_up(id) && !(from.is_isolated && to.is_isolated);
            is_open && to.vlan.emit(flood.vid, flood.tag).is_ok()
        });
        ports.map(|(id, _)| id)
    }

    /// The ports that a frame to many goes to, and what becomes of its tag at each. What does not pass at a port is counted
    /// there, unless it is simply not for that port.
    pub fn egress(&self, flood: Flood, now: u64) -> impl Iterator<Item = (PortId, TagAction)> {
        let switch = &*self.switch;
        let from = &self.ports[flood.from.index()];
        (0..).map(PortId).zip(&*self.ports).filter_map(move |(id, to)| {
            if id == flood.from || flood.is_unknown && !to.floods_unknown {
                return None;
            }
            match to.emit(switch.is_up(id), from, &flood, now) {
                Ok(action) => Some((id, action)),
                Err(DropReason::EgressDown | DropReason::Isolated | DropReason::VlanEgress) => None,
                Err(reason) => {
                    to.counters[self.number].dropped(reason);
                    None
                }
            }
        })
    }
}
