//! The vhost-user session as a state machine without I/O: a request and its descriptors come in, actions to carry out
//! and an answer to give come out. What the actions led to is told back before the answer is made.

use std::os::fd::OwnedFd;

use serde::{Deserialize, Serialize};

use super::action::{Action, Answer, Refusal, Refused};
use super::device_state::Direction;
use super::logging::Logging;
use super::status::Status;
use super::wire::{F_LOG_ALL, F_PROTOCOL_FEATURES, Reply, Request, VRING_F_LOG, VringAddr, iotlb, protocol};
use crate::device::features;
use crate::memory::iotlb::{Access, Mapping};
use crate::memory::map::MAX_REGIONS;
use crate::ring::inflight::InflightSpec;
use crate::ring::{MAX_RING_SIZE, RingConfig, RingFormat};

/// Protocol features of every session; [`Offer::protocol_features`] has those of its device.
const PROTOCOL_FEATURES: u64 = protocol::MQ
    | protocol::LOG_SHMFD
    | protocol::REPLY_ACK
    | protocol::BACKEND_REQ
    | protocol::CONFIG
    | protocol::INFLIGHT_SHMFD
    | protocol::RESET_DEVICE
    | protocol::CONFIGURE_MEM_SLOTS
    | protocol::STATUS;

/// How far a guest is that comes before its memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Postcopy {
    /// None does.
    #[default]
    Off,
    /// One may.
    Advised,
    /// It is here, or will be next.
    Listening,
}

/// What the protocol puts among virtio's feature bits.
pub(super) const TRANSPORT_FEATURES: u64 = F_PROTOCOL_FEATURES | F_LOG_ALL;

/// Most queues the protocol can name: indices of kick and call messages have 8 bits.
pub const MAX_QUEUES: u16 = 256;

/// In the answer to `SET_DEVICE_STATE_FD`: no descriptor goes with it, the front end's is used.
const STATE_NO_FD: u64 = 1 << 8;

/// Configuration space has at most this many bytes (`VHOST_USER_MAX_CONFIG_SIZE`).
const CONFIG_SPACE: u32 = 256;

/// What the device behind the session has to offer.
#[derive(Clone, Copy, Debug)]
pub struct Offer {
    /// Virtio feature bits, those of the engine included.
    pub features: u64,
    /// Number of queues.
    pub num_queues: u16,
    /// Largest ring.
    pub max_ring_size: u16,
    /// Whether it has a state that goes with a guest that migrates.
    pub has_state: bool,
    /// Whether guests may come before their memory.
    pub postcopy: bool,
    /// Whether it is a network device.
    pub is_network: bool,
}

impl Offer {
    /// Protocol features of a session with this device.
    pub fn protocol_features(&self) -> u64 {
        let state = if self.has_state { protocol::DEVICE_STATE } else { 0 };
        let network = if self.is_network { protocol::RARP | protocol::NET_MTU } else { 0 };
        PROTOCOL_FEATURES | state | network | if self.postcopy { protocol::PAGEFAULT } else { 0 }
    }
}

/// A queue as the front end has set it up.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct QueueState {
    pub(super) num: u32,
    addr: Option<VringAddr>,
    /// [`RingConfig::base`], once it was set or the queue has run.
    base: Option<u32>,
    /// Started by a kick descriptor (or a promise to poll), stopped by `GET_VRING_BASE`. We poll, so the first kick
    /// need not be waited for, and one that came early cannot be lost.
    started: bool,
    enabled: bool,
    /// As last told by [`Action::Start`].
    pub(super) running: Option<RingConfig>,
}

/// What a session needs to go on in another process: all but what the device offers there.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SessionState {
    pub(super) features: Option<u64>,
    pub(super) protocol: u64,
    pub(super) has_channel: bool,
    pub(super) status: Status,
    pub(super) queues: Vec<QueueState>,
    pub(super) logging: Vec<Logging>,
}

/// One session.
#[derive(Debug)]
pub struct Session {
    pub(super) offer: Offer,
    pub(super) features: Option<u64>,
    pub(super) protocol: u64,
    /// The front end has given us a channel for requests of ours.
    pub(super) has_channel: bool,
    pub(super) status: Status,
    pub(super) queues: Vec<QueueState>,
    /// What each queue logs, as last told by [`Action::Log`].
    pub(super) logging: Vec<Logging>,
    /// No part of what is handed over.
    pub(super) postcopy: Postcopy,
}

impl Session {
    /// A new session with nothing negotiated.
    pub fn new(offer: Offer) -> Session {
        let queues = std::iter::repeat_with(QueueState::default).take(offer.num_queues.into()).collect();
        let logging = vec![Logging::default(); offer.num_queues.into()];
        Session {
            offer,
            features: None,
            protocol: 0,
            has_channel: false,
            status: Status::default(),
            queues,
            logging,
            postcopy: Postcopy::Off,
        }
    }

    /// The negotiated feature bits of the device.
    pub fn features(&self) -> u64 {
        self.features.unwrap_or(0) & self.offer.features
    }

    /// Whether the front end may be told of configuration changes.
    pub fn has_backend_channel(&self) -> bool {
        self.protocol & protocol::BACKEND_REQ != 0
    }

    /// Whether addresses are I/O virtual and translated by the front end. It is so when `VIRTIO_F_ACCESS_PLATFORM` is
    /// negotiated by a front end that can be asked for translations. QEMU negotiates it with us only for devices behind
    /// a vIOMMU; front ends that know no IOTLB have no use for a channel to be asked on, and mean guest-physical
    /// addresses.
    pub fn has_iotlb(&self) -> bool {
        self.features() & features::ACCESS_PLATFORM != 0 && self.has_backend_channel() && self.has_channel
    }

    /// Whether there is a guest, whose front end does not read configuration space.
    pub(super) fn sees_no_link(&self) -> bool {
        self.protocol & protocol::CONFIG == 0 && self.is_running()
    }

    /// Whether requests of ours on the channel may ask for an acknowledgement.
    pub fn has_reply_ack(&self) -> bool {
        self.protocol & protocol::REPLY_ACK != 0
    }

    /// Takes a request: what to do, in order, and what to answer then.
    pub fn handle(&mut self, request: Request, fds: Vec<OwnedFd>) -> Result<(Vec<Action>, Answer), Refusal> {
        let was_running = self.is_running();
        let mut actions = Vec::new();
        let had_iotlb = self.has_iotlb();
        let answer = self.take(request, fds, &mut actions)?;
        if self.has_iotlb() != had_iotlb {
            // Every address means something else now.
            for (index, queue) in (0..).zip(&mut self.queues) {
                if queue.running.take().is_some() {
                    actions.push(Action::Stop(index));
                }
            }
        }
        self.settle(was_running, &mut actions);
        if was_running && !self.is_running() && self.logs_data() {
            actions.push(Action::HandOver);
        }
        Ok((actions, answer))
    }

    #[allow(clippy::too_many_lines)] // one arm a request: the protocol's table of contents
    fn take(
        &mut self,
        request: Request,
        fds: Vec<OwnedFd>,
        actions: &mut Vec<Action>,
    ) -> Result<Answer, Refusal> {
        match request {
            Request::GetFeatures => return Ok(Answer::Number(self.offer.features | TRANSPORT_FEATURES)),
            Request::SetFeatures(bits) => {
                let beyond = bits & !(self.offer.features | TRANSPORT_FEATURES);
                self.status.features(beyond == 0);
                if beyond != 0 {
                    return Err(Refusal::Features(beyond));
                }
                self.features = Some(bits);
            }
            Request::SetOwner => {}
            // "Recommended that back-ends either ignore this message, or use it to disable all rings."
            Request::ResetOwner => self.queues.iter_mut().for_each(|q| q.enabled = false),
            Request::GetProtocolFeatures => return Ok(Answer::Number(self.offer.protocol_features())),
            Request::SetProtocolFeatures(bits) => {
                let beyond = bits & !self.offer.protocol_features();
                if beyond != 0 {
                    return Err(Refusal::Features(beyond));
                }
                self.protocol = bits;
            }
            Request::GetQueueNum => return Ok(Answer::Number(self.offer.num_queues.into())),
            Request::GetMaxMemSlots => return Ok(Answer::Number(MAX_REGIONS as u64)),
            Request::SetMemTable(regions)
                if regions.is_empty() && fds.is_empty() && self.postcopy == Postcopy::Listening =>
            {
                actions.push(Action::Adopt);
            }
            Request::SetMemTable(regions) => {
                if fds.len() != regions.len() {
                    return Err(Refusal::Descriptors { sent: fds.len(), wanted: regions.len() });
                }
                actions.push(Action::SetMemory(regions.into_iter().zip(fds).collect()));
                if self.postcopy == Postcopy::Listening {
                    return Ok(Answer::Mapped { whole: true });
                }
            }
            Request::SetLogBase { size, offset } => {
                actions.push(Action::LogBase { offset, size, fd: one(fds)? });
                return Ok(Answer::Log { size, offset });
            }
            Request::SetLogFd => actions.push(Action::LogFd(one(fds)?)),
            Request::AddMemReg(region) => {
                actions.push(Action::AddMemory(region, one(fds)?));
                if self.postcopy == Postcopy::Listening {
                    return Ok(Answer::Mapped { whole: false });
                }
            }
            // Some front ends send the region's descriptor along; it is closed.
            Request::RemMemReg(region) => actions.push(Action::RemoveMemory(region)),
            Request::SetVringNum { index, num } => {
                let max = self.offer.max_ring_size;
                let format = self.format();
                let queue = self.queue(index)?;
                if !format.allows_size(num) || num > u32::from(max) {
                    return Err(Refusal::RingSize { num, max });
                }
                queue.num = num;
            }
            Request::SetVringAddr { index, addr } => self.queue(index)?.addr = Some(addr),
            Request::SetVringBase { index, base } => {
                if self.format() == RingFormat::Split && base > u32::from(u16::MAX) {
                    return Err(Refusal::OutOfRange("the ring's base"));
                }
                let queue = self.queue(index)?;
                if queue.running.is_some() {
                    return Err(Refusal::OutOfRange("a base for a running ring"));
                }
                queue.base = Some(base);
            }
            Request::GetVringBase { index } => {
                self.queue(index)?.started = false;
                return Ok(Answer::Base(index as u16));
            }
            Request::SetVringKick { index, has_fd } => {
                let fd = vring_fd(has_fd, fds)?;
                let queue = self.queue(index)?;
                queue.started = true;
                if queue.running.is_some() {
                    // The reactor watches the old one: begin anew with the new one.
                    actions.push(Action::Stop(index as u16));
                    queue.running = None;
                }
                actions.push(Action::Kick(index as u16, fd));
            }
            Request::SetVringCall { index, has_fd } => {
                let fd = vring_fd(has_fd, fds)?;
                self.queue(index)?;
                actions.push(Action::Call(index as u16, fd));
            }
            Request::SetVringErr { index, has_fd } => {
                let fd = vring_fd(has_fd, fds)?;
                self.queue(index)?;
                actions.push(Action::Err(index as u16, fd));
            }
            Request::SetVringEnable { index, enable } => self.queue(index)?.enabled = enable,
            Request::SendRarp(mac) if self.protocol & protocol::RARP != 0 => {
                actions.push(Action::Announce(mac));
            }
            Request::SendRarp(_) => return Err(Refusal::Unsupported(19)),
            Request::SetMtu(mtu) if self.protocol & protocol::NET_MTU != 0 => {
                actions.push(Action::SetMtu(mtu));
            }
            Request::SetMtu(_) => return Err(Refusal::Unsupported(20)),
            Request::SetBackendReqFd => {
                actions.push(Action::BackendChannel(one(fds)?));
                self.has_channel = true;
            }
            Request::Iotlb { iova, size, user_addr, perm, kind } => {
                if !self.has_iotlb() {
                    return Err(Refusal::Unsupported(22));
                }
                actions.push(match kind {
                    iotlb::UPDATE => {
                        let access = Access::from_bits(perm).ok_or(Refusal::OutOfRange("a permission"))?;
                        Action::MapIova(Mapping { iova, size, user_addr, access })
                    }
                    iotlb::INVALIDATE => Action::UnmapIova { iova, size },
                    _ => return Err(Refusal::OutOfRange("the kind of an IOTLB message")),
                });
                return Ok(Answer::Done);
            }
            Request::GetConfig { offset, size, flags } => {
                return Ok(Answer::Config { start: device_offset(offset), size, offset, flags });
            }
            Request::SetConfig { offset, bytes, .. } => {
                actions.push(Action::WriteConfig(device_offset(offset), bytes));
            }
            Request::PostcopyAdvise => {
                let negotiated = self.protocol & protocol::PAGEFAULT != 0;
                if !negotiated || self.postcopy == Postcopy::Listening {
                    return Err(Refusal::Unsupported(28));
                }
                self.postcopy = Postcopy::Advised;
                actions.push(Action::Advise);
                return Ok(Answer::Userfault);
            }
            Request::PostcopyListen => {
                if self.postcopy != Postcopy::Advised {
                    return Err(Refusal::OutOfRange("listening without advice"));
                }
                self.postcopy = Postcopy::Listening;
                actions.push(Action::Listen);
                return Ok(Answer::Listening);
            }
            Request::PostcopyEnd => {
                if std::mem::take(&mut self.postcopy) == Postcopy::Off {
                    return Err(Refusal::OutOfRange("the end of what has not begun"));
                }
                actions.push(Action::EndPostcopy);
                return Ok(Answer::Ended);
            }
            Request::PostcopyAck(0) if self.postcopy == Postcopy::Listening => actions.push(Action::Adopt),
            Request::PostcopyAck(_) => return Err(Refusal::OutOfRange("an acknowledgement")),
            Request::GetInflightFd(spec) => {
                let spec = self.checked(spec)?.sized(self.format());
                actions.push(Action::AllocateInflight(spec));
                return Ok(Answer::Inflight(spec));
            }
            Request::SetInflightFd(spec) => {
                let fd = one(fds)?;
                if self.checked(spec)?.regions_bytes(self.format()) > spec.mmap_size {
                    return Err(Refusal::OutOfRange("the size of the in-flight record"));
                }
                // Whatever runs has its record elsewhere: it begins anew with this one.
                self.stop_all(actions);
                actions.push(Action::SetInflight(spec, fd));
            }
            Request::ResetDevice => self.reset(actions),
            Request::SetStatus(status) => {
                match u8::try_from(status).map_err(|_| Refusal::OutOfRange("the device status"))? {
                    // Virtio 1.3, 4.1.4.3.1: writing 0 resets the device.
                    0 => self.reset(actions),
                    bits => self.status.set(bits),
                }
            }
            Request::GetStatus => return Ok(Answer::Number(self.status.bits().into())),
            Request::SetDeviceStateFd { .. } | Request::CheckDeviceState
                if self.protocol & protocol::DEVICE_STATE == 0 =>
            {
                return Err(Refusal::Unsupported(42));
            }
            Request::SetDeviceStateFd { direction, phase } => {
                let direction = match (direction, phase) {
                    (0, 0) => Direction::Save,
                    (1, 0) => Direction::Load,
                    _ => return Err(Refusal::OutOfRange("the direction or phase of a state's transfer")),
                };
                if self.is_running() {
                    return Err(Refusal::Running);
                }
                actions.push(Action::TransferState(direction, one(fds)?));
                return Ok(Answer::StateChannel);
            }
            Request::CheckDeviceState => {
                actions.push(Action::CheckState);
                return Ok(Answer::StateChecked);
            }
            Request::Other(number) => return Err(Refusal::Unsupported(number)),
        }
        Ok(Answer::Ack)
    }

    fn queue(&mut self, index: u32) -> Result<&mut QueueState, Refusal> {
        let queues = self.offer.num_queues;
        self.queues.get_mut(index as usize).ok_or(Refusal::Queue { index, queues })
    }

    /// The format of the rings.
    pub fn format(&self) -> RingFormat {
        if self.features() & features::RING_PACKED == 0 { RingFormat::Split } else { RingFormat::Packed }
    }

    /// A record for queues that exist.
    fn checked(&self, spec: InflightSpec) -> Result<InflightSpec, Refusal> {
        let queues = self.offer.num_queues;
        match spec {
            InflightSpec { num_queues, .. } if num_queues == 0 || num_queues > queues => {
                Err(Refusal::Queue { index: num_queues.into(), queues })
            }
            InflightSpec { queue_size, .. } if !(1..=MAX_RING_SIZE).contains(&queue_size) => {
                Err(Refusal::RingSize { num: queue_size.into(), max: MAX_RING_SIZE })
            }
            _ => Ok(spec),
        }
    }

    fn stop_all(&mut self, actions: &mut Vec<Action>) {
        let running = (0u16..).zip(&mut self.queues).filter(|(_, q)| q.running.is_some());
        actions.extend(running.map(|(index, queue)| {
            queue.running = None;
            Action::Stop(index)
        }));
    }

    /// The memory table stays: it is the front end's to change.
    fn reset(&mut self, actions: &mut Vec<Action>) {
        self.stop_all(actions);
        self.queues.fill_with(QueueState::default);
        self.status.reset();
        actions.push(Action::ResetDevice);
    }

    /// Starts and stops queues so that what runs is what should.
    fn settle(&mut self, mut acquired: bool, actions: &mut Vec<Action>) {
        self.settle_logging(actions);
        for index in 0..self.offer.num_queues {
            let wanted = self.wanted(index);
            let queue = &mut self.queues[usize::from(index)];
            // A queue that runs keeps its base; only where it lies and how it speaks matter.
            let same = |a: &RingConfig, b: &RingConfig| *a == RingConfig { base: a.base, ..*b };
            match (&queue.running, &wanted) {
                (None, None) => continue,
                (Some(a), Some(b)) if same(a, b) => continue,
                (Some(_), _) => actions.push(Action::Stop(index)),
                (None, Some(_)) => {}
            }
            queue.running = wanted;
            if let Some(config) = wanted {
                if !std::mem::replace(&mut acquired, true) {
                    actions.push(Action::Acquire);
                }
                actions.push(Action::Start(index, config));
            }
        }
    }

    fn is_running(&self) -> bool {
        self.queues.iter().any(|q| q.running.is_some())
    }

    fn logs_data(&self) -> bool {
        self.features.is_some_and(|bits| bits & F_LOG_ALL != 0)
    }

    /// Logging is no part of how a ring runs: it is switched while rings go on.
    fn settle_logging(&mut self, actions: &mut Vec<Action>) {
        let data = self.logs_data();
        let mut changes = Vec::new();
        for ((index, queue), told) in (0u16..).zip(&self.queues).zip(&mut self.logging) {
            let used = queue.addr.filter(|addr| addr.flags & VRING_F_LOG != 0).map(|addr| addr.log);
            let wanted = Logging { data, used };
            if std::mem::replace(told, wanted) != wanted {
                changes.push((index, wanted));
            }
        }
        if !changes.is_empty() {
            actions.push(Action::Log(changes));
        }
    }

    fn wanted(&self, index: u16) -> Option<RingConfig> {
        let queue = &self.queues[usize::from(index)];
        let bits = self.features?;
        let addr = queue.addr?;
        // "If VHOST_USER_F_PROTOCOL_FEATURES has not been negotiated, the ring starts directly in the enabled state."
        let enabled = queue.enabled || bits & F_PROTOCOL_FEATURES == 0;
        let parts = [addr.desc, addr.avail, addr.used];
        (queue.started && enabled && queue.num > 0 && !self.status.holds_queues())
            .then(|| RingConfig { base: self.base(index), ..RingConfig::new(queue.num, parts, bits) })
    }

    /// A queue has stopped at `base`. Returns where a [`Action::Start`] of the same request goes on.
    pub fn stopped(&mut self, index: u16, base: u32) {
        if let Some(queue) = self.queues.get_mut(usize::from(index)) {
            queue.base = Some(base);
            if let Some(running) = &mut queue.running {
                running.base = base;
            }
        }
    }

    /// A queue broke. True when the driver is to be told by a notice of a configuration change.
    pub fn needs_reset(&mut self) -> bool {
        self.status.need_reset() && self.protocol & protocol::STATUS != 0
    }

    /// Where queue `index` goes on ([`RingConfig::base`]).
    pub fn base(&self, index: u16) -> u32 {
        let told = self.queues.get(usize::from(index)).and_then(|q| q.base);
        told.unwrap_or_else(|| self.format().initial_base())
    }

    /// A queue could not be started; it waits for its next kick descriptor.
    pub fn start_failed(&mut self, index: u16) {
        if let Some(queue) = self.queues.get_mut(usize::from(index)) {
            queue.running = None;
            queue.started = false;
        }
    }

    /// The reply, if one is due. `config` is read for [`Answer::Config`].
    pub fn reply(
        &self,
        answer: Answer,
        need_reply: bool,
        done: bool,
        config: impl FnOnce(u32, &mut [u8]),
    ) -> Option<Reply> {
        match answer {
            Answer::Number(n) => Some(Reply::Number(n)),
            Answer::StateChannel => Some(Reply::Number(STATE_NO_FD | u64::from(!done))),
            Answer::StateChecked | Answer::Ended => Some(Reply::Number(u64::from(!done))),
            Answer::Base(index) => Some(Reply::VringState(index.into(), self.base(index))),
            Answer::Log { size, offset } => Some(Reply::Log(size, offset)),
            Answer::Config { start, size, offset, flags } => {
                let mut bytes = vec![0; if size <= CONFIG_SPACE { size as usize } else { 0 }];
                config(start, &mut bytes);
                Some(Reply::Config { offset, flags, bytes })
            }
            // "mmap size" 0 tells that there is none.
            Answer::Inflight(spec) => {
                Some(Reply::Inflight(if done { spec } else { InflightSpec::default() }))
            }
            Answer::Userfault => Some(Reply::Empty),
            // Made by whoever has mapped it.
            Answer::Mapped { .. } => None,
            Answer::Done | Answer::Listening => need_reply.then_some(Reply::Number(u64::from(!done))),
            Answer::Ack => (need_reply && self.protocol & protocol::REPLY_ACK != 0)
                .then_some(Reply::Number(u64::from(!done))),
        }
    }

    /// How the front end learns that a request is refused.
    pub fn refuse(&self, request: u32, need_reply: bool) -> Refused {
        match request {
            // "Zero length of payload to indicate an error."
            24 => Refused::Reply(Reply::Config { offset: 0, flags: 0, bytes: Vec::new() }),
            // A reply that brings no descriptor.
            28 => Refused::Reply(Reply::Empty),
            31 => Refused::Reply(Reply::Inflight(InflightSpec::default())),
            42 => Refused::Reply(Reply::Number(STATE_NO_FD | 1)),
            30 | 43 => Refused::Reply(Reply::Number(1)),
            // It is owed a ring's base, and there is none.
            11 => Refused::End,
            22 if need_reply => Refused::Reply(Reply::Number(1)),
            _ => match self.reply(Answer::Ack, need_reply, false, |_, _| {}) {
                Some(reply) => Refused::Reply(reply),
                // What was never offered is at most a hint, and goes unanswered.
                None if !matches!(request, 1..=22 | 25 | 29 | 32 | 34 | 36..=40) => Refused::Silence,
                // A front end that believes it has set something up must not go on.
                None => Refused::End,
            },
        }
    }
}

/// The front end's offset into configuration space. Cloud Hypervisor counts from 0x100, where a virtio-mmio device has
/// it; no configuration space is that long, so the two cannot be confused.
fn device_offset(offset: u32) -> u32 {
    offset.checked_sub(CONFIG_SPACE).unwrap_or(offset)
}

fn one(fds: Vec<OwnedFd>) -> Result<OwnedFd, Refusal> {
    let sent = fds.len();
    let [fd] = <[OwnedFd; 1]>::try_from(fds).map_err(|_| Refusal::Descriptors { sent, wanted: 1 })?;
    Ok(fd)
}

fn vring_fd(has_fd: bool, fds: Vec<OwnedFd>) -> Result<Option<OwnedFd>, Refusal> {
    if has_fd { one(fds).map(Some) } else { Ok(None) }
}
