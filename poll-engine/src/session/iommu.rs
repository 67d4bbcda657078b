//! A device behind a vIOMMU: what its queues miss is asked for, what the front end tells is given to them, and what it
//! takes back is acknowledged when nothing in flight points there any more (vhost-user, "IOMMU support").
//!
//! A queue that misses something rests, and nobody else: it has posted the miss, the control thread has asked, and the
//! answer is a new map. While the front end does not answer, the queue rests. When it answers that there is nothing, the
//! queue is broken, as one that names an address outside of memory without an IOMMU.

use std::collections::VecDeque;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::sync::Bell;
use crossbeam::sync::WaitGroup;
use nix::sys::socket::{MsgFlags, recv, send};
use tracing::warn;

use super::handover::IommuState;
use super::serve::{ActionError, Served};
use super::wire::{IOTLB_REPLY_LEN, iotlb, iotlb_message, iotlb_reply};
use crate::engine::queue::MapChange;
use crate::memory::iotlb::{Iotlb, Mapping, Miss, Misses, Revoked, inclusive};
use crate::memory::log::QueueLog;
use crate::memory::map::{MapHold, MemoryError, MemoryMap};
use crate::ring::{RingConfig, RingError};

/// Most misses that the front end has been asked for at once, in all queues.
const MAX_ASKED: usize = 256;
/// Most acknowledgements that are waited for: a front end that gives translations and no acknowledgements is asked for
/// none any more.
const MAX_OWED: usize = 1024;
/// When to ask again, where an answer was none or cannot be told from silence.
const ASK_AGAIN: Duration = Duration::from_secs(1);
/// When to try again what the channel had no room for.
const TRY_AGAIN: Duration = Duration::from_millis(20);
/// From when on a missing answer is worth a line in the log.
const SLOW: Duration = Duration::from_secs(5);

/// A miss that the front end has been asked for.
#[derive(Debug)]
struct Asked {
    miss: Miss,
    since: Instant,
    /// When last, and under which number; `None` while the channel has no room.
    sent: Option<(Instant, u64)>,
}

/// The IOTLB of a session.
#[derive(Debug)]
pub(super) struct Iommu {
    iotlb: Iotlb,
    misses: Arc<Misses>,
    /// What queues translate by.
    view: Arc<MemoryMap>,
    asked: Vec<Asked>,
    /// Numbers of the questions whose acknowledgements are to come, in order.
    owed: VecDeque<u64>,
    /// What has come of the next acknowledgement.
    reply: Vec<u8>,
    number: u64,
    slow: bool,
}

impl Iommu {
    /// Without any translation; misses ring `bell`.
    pub(super) fn new(bell: Arc<Bell>) -> Iommu {
        let misses = Arc::new(Misses::new(bell));
        let view = Arc::new(Iotlb::default().snapshot(&MemoryMap::default(), &misses));
        Iommu {
            iotlb: Iotlb::default(),
            misses,
            view,
            asked: Vec::new(),
            owed: VecDeque::new(),
            reply: Vec::new(),
            number: 0,
            slow: false,
        }
    }

    /// What another process has to know of the channel.
    pub(super) fn save(&self) -> IommuState {
        IommuState { owed: self.owed.len() as u32, reply: self.reply.clone() }
    }

    /// Goes on with a channel: what is owed there answers no question of ours.
    pub(super) fn restore(&mut self, state: IommuState) {
        // Numbers begin at 1.
        self.owed = std::iter::repeat_n(0, (state.owed as usize).min(MAX_OWED)).collect();
        self.reply = state.reply;
        self.reply.truncate(IOTLB_REPLY_LEN - 1);
    }

    /// Goes over to another memory table.
    pub(super) fn set_memory(&mut self, memory: &MemoryMap) {
        self.iotlb.retain_in(memory);
        self.renew(memory);
    }

    /// Forgets everything: no queue is left, and the front end tells no more of what becomes invalid.
    pub(super) fn clear(&mut self, memory: &MemoryMap) {
        self.iotlb.clear();
        self.asked.clear();
        self.renew(memory);
    }

    /// A new channel: what was asked on the old one is asked again.
    pub(super) fn channel_changed(&mut self) {
        self.owed.clear();
        self.reply.clear();
        self.asked.iter_mut().for_each(|a| a.sent = None);
    }

    /// The channel, if acknowledgements are to come on it.
    pub(super) fn awaited<'c>(&self, channel: Option<&'c OwnedFd>) -> Option<BorrowedFd<'c>> {
        channel.filter(|_| !self.owed.is_empty()).map(AsFd::as_fd)
    }

    /// How long to wait at most before looking again.
    pub(super) fn patience(&self) -> Option<Duration> {
        let unsent = self.asked.iter().any(|a| a.sent.is_none());
        (!self.asked.is_empty()).then_some(if unsent { TRY_AGAIN } else { ASK_AGAIN })
    }

    fn renew(&mut self, memory: &MemoryMap) {
        self.view = Arc::new(self.iotlb.snapshot(memory, &self.misses));
    }
}

impl Served<'_> {
    /// The map that queues translate by.
    pub(super) fn view(&self) -> &Arc<MemoryMap> {
        if self.session.has_iotlb() { &self.iommu.view } else { &self.map }
    }

    /// What queue `index` logs. With an IOTLB the used ring's address is I/O virtual, and the log is of physical pages.
    pub(super) fn log_of(&self, index: u16) -> Option<QueueLog> {
        let mut log = self.logs.of(index)?;
        if self.session.has_iotlb() {
            log.used = log.used.and_then(|iova| self.view().physical(iova));
        }
        Some(log)
    }

    /// Takes a translation.
    pub(super) fn map_iova(&mut self, mapping: &Mapping) -> Result<(), ActionError> {
        let revoked = self.iommu.iotlb.update(mapping, &self.map)?;
        let last = mapping.iova + (mapping.size - 1);
        // First: a queue whose question has a bad answer need not ask again.
        let inside = |a: &Asked| (mapping.iova..=last).contains(&a.miss.iova);
        for asked in self.iommu.asked.extract_if(.., |a| inside(a)).collect::<Vec<_>>() {
            if !mapping.access.allows(asked.miss.access) {
                self.fail_access(asked.miss, true);
            }
        }
        if revoked.is_empty() {
            self.iommu.renew(&self.map);
            self.hand_out(None, &WaitGroup::new());
            self.find_rings();
        } else {
            self.revoke(revoked, mapping.iova, last);
        }
        Ok(())
    }

    /// Forgets translations, and returns when nothing in flight points there any more.
    pub(super) fn unmap_iova(&mut self, iova: u64, size: u64) -> Result<(), ActionError> {
        let (first, last) = inclusive(iova, size)?;
        let revoked = self.iommu.iotlb.invalidate(first, last);
        self.revoke(revoked, first, last);
        Ok(())
    }

    fn revoke(&mut self, revoked: Revoked, first: u64, last: u64) {
        self.park_rings(|ring| ring.touches(first, last));
        // Where something evicted was is not known any more.
        let earlier = self.iommu.iotlb.take_evicted().then(|| std::mem::take(&mut self.released));
        if !revoked.is_empty() || earlier.is_some() {
            self.iommu.renew(&self.map);
            let adopted = WaitGroup::new();
            self.hand_out(Some(&Arc::new(revoked)), &adopted);
            adopted.wait();
        }
        if let Some(earlier) = earlier {
            earlier.wait();
        }
        self.find_rings();
    }

    /// Hands the map out to all queues. Without an IOTLB their rings are looked up in it again.
    pub(super) fn hand_out(&self, revoked: Option<&Arc<Revoked>>, adopted: &WaitGroup) {
        let moves = !self.session.has_iotlb();
        for (queue, config) in self.slots.iter().filter_map(|s| s.running.as_ref()) {
            queue.set_map(MapChange {
                hold: MapHold::new(Arc::clone(self.view()), self.released.clone()),
                ring: moves.then_some(*config),
                revoked: revoked.cloned(),
                adopted: adopted.clone(),
            });
        }
    }

    /// Has queues leave their rings alone, and returns when they do.
    pub(super) fn park_rings(&mut self, which: impl Fn(&RingConfig) -> bool) {
        let parked = WaitGroup::new();
        for slot in self.slots.iter_mut().filter(|s| s.unmapped.is_none()) {
            if let Some((queue, config)) = slot.running.as_ref().filter(|(_, config)| which(config)) {
                queue.park(parked.clone());
                slot.unmapped = Some(*config);
            }
        }
        parked.wait();
    }

    /// Starts a queue now, or when its ring is mapped.
    pub(super) fn start_translated(&mut self, index: u16, config: RingConfig) -> Result<(), ActionError> {
        self.slot(index).unmapped = Some(config);
        self.find_ring(index)
    }

    /// Goes on with the queues whose rings are mapped now, and asks for what the others miss.
    pub(super) fn find_rings(&mut self) {
        for index in 0..self.slots.len() as u16 {
            if let Err(e) = self.find_ring(index) {
                self.session.start_failed(index);
                self.alarm.raise();
                self.complain(&e);
            }
        }
    }

    fn find_ring(&mut self, index: u16) -> Result<(), ActionError> {
        let Some(config) = self.slot(index).unmapped else { return Ok(()) };
        let mut missing = Vec::new();
        config.each_missing(&self.iommu.view, |miss| missing.push(miss));
        if !missing.is_empty() {
            for miss in missing {
                self.ask(miss);
            }
            return Ok(());
        }
        self.slot(index).unmapped = None;
        let hold = MapHold::new(Arc::clone(self.view()), self.released.clone());
        if let Some((queue, _)) = &self.slots[usize::from(index)].running {
            // First: the ring may be elsewhere now, and nothing is written to it yet.
            queue.set_log(self.log_of(index), WaitGroup::new());
            queue.set_map(MapChange { hold, ring: Some(config), revoked: None, adopted: WaitGroup::new() });
            return Ok(());
        }
        drop(hold);
        self.start(index, config)
    }

    /// What the channel and the queues have brought, and what is to be asked again.
    pub(super) fn attend_iommu(&mut self) {
        self.read_replies();
        while let Some(miss) = self.iommu.misses.take() {
            self.ask(miss);
        }
        let now = Instant::now();
        let mut again = Vec::new();
        let mut slow = None;
        for asked in &self.iommu.asked {
            let is_due = match asked.sent {
                None => true,
                Some((at, number)) => now - at >= ASK_AGAIN && !self.iommu.owed.contains(&number),
            };
            if is_due {
                again.push(asked.miss);
            }
            if now - asked.since >= SLOW {
                slow = Some(asked.miss);
            }
        }
        for miss in again {
            self.send_miss(miss);
        }
        if let (Some(miss), false) = (slow, self.iommu.slow) {
            self.iommu.slow = true;
            let error = MemoryError::Miss(miss);
            warn!(
                "{}: {error}, and the front end has not answered for {SLOW:?}; queues that need it wait",
                self.export.name
            );
        }
    }

    fn ask(&mut self, miss: Miss) {
        let iommu = &mut self.iommu;
        let known = iommu.view.allows(miss.iova, miss.access);
        // Without room it is posted again when one of the others is answered.
        if known || iommu.asked.len() >= MAX_ASKED || iommu.asked.iter().any(|a| a.miss == miss) {
            return;
        }
        iommu.asked.push(Asked { miss, since: Instant::now(), sent: None });
        self.send_miss(miss);
    }

    fn send_miss(&mut self, miss: Miss) {
        let wants_reply = self.session.has_reply_ack() && self.iommu.owed.len() < MAX_OWED;
        if !self.send_on_channel(&iotlb_message(iotlb::MISS, miss, wants_reply)) {
            return;
        }
        let iommu = &mut self.iommu;
        iommu.number += 1;
        if wants_reply {
            iommu.owed.push_back(iommu.number);
        }
        if let Some(asked) = iommu.asked.iter_mut().find(|a| a.miss == miss) {
            asked.sent = Some((Instant::now(), iommu.number));
        }
    }

    /// Sends without waiting; false when there is no room, or no channel.
    fn send_on_channel(&self, bytes: &[u8]) -> bool {
        let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
        self.backend_channel.as_ref().is_some_and(|c| send(c.as_raw_fd(), bytes, flags) == Ok(bytes.len()))
    }

    fn read_replies(&mut self) {
        while let Some(channel) = self.iommu.awaited(self.backend_channel.as_ref()) {
            let reply = &mut self.iommu.reply;
            let have = reply.len();
            reply.resize(IOTLB_REPLY_LEN, 0);
            let received = recv(channel.as_raw_fd(), &mut self.iommu.reply[have..], MsgFlags::MSG_DONTWAIT);
            let reply = &mut self.iommu.reply;
            reply.truncate(have + received.unwrap_or(0));
            match received {
                Err(nix::Error::EAGAIN | nix::Error::EINTR) => return,
                Ok(n) if n > 0 => {}
                _ => return self.lose_channel("has closed its end"),
            }
            let Some(bytes) = reply.first_chunk() else { continue };
            let Some(done) = iotlb_reply(bytes) else {
                return self.lose_channel("sends what is no acknowledgement");
            };
            reply.clear();
            let number = self.iommu.owed.pop_front();
            let asked = &mut self.iommu.asked;
            let place = asked.iter().position(|a| a.sent.map(|(_, number)| number) == number);
            // One that is done has been answered by a translation, and is not there any more; or it was not, and is
            // asked again after a while.
            if let (Some(place), false) = (place, done) {
                let miss = asked.swap_remove(place).miss;
                let is_known = self.iommu.view.knows(miss.iova);
                self.fail_access(miss, is_known);
            }
        }
    }

    fn lose_channel(&mut self, why: &str) {
        warn!("{}: the front end's channel for requests of ours {why}: it is used no more", self.export.name);
        self.backend_channel = None;
        self.iommu.channel_changed();
    }

    /// There is no translation, or (`is_known`) none that permits the access: breaks who waits for it.
    fn fail_access(&mut self, miss: Miss, is_known: bool) {
        if is_known {
            self.send_on_channel(&iotlb_message(iotlb::ACCESS_FAIL, miss, false));
        }
        for index in 0..self.slots.len() as u16 {
            let slot = self.slot(index);
            if let Some((queue, _)) = &slot.running {
                queue.refuse(Some(miss));
            }
            if slot.unmapped.is_none_or(|ring| !ring.touches(miss.iova, miss.iova)) {
                continue;
            }
            slot.unmapped = None;
            if let Some((queue, _)) = &slot.running {
                queue.refuse(None);
                continue;
            }
            self.session.start_failed(index);
            self.alarm.raise();
            self.complain(&ActionError::Ring(index, RingError::Memory(MemoryError::Miss(miss))));
        }
    }
}
