//! What a control thread does for one front end: each request of the session answered, its actions carried out.

use std::fmt::Display;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::Arc;

use crossbeam::sync::WaitGroup;
use nix::sys::socket::{MsgFlags, send};
use tracing::{debug, warn};

use super::action::{Action, Answer, Refused};
use super::device_state::{StateError, Transfer};
use super::handover::Then;
use super::inflight::{self, Inflight, InflightError};
use super::iommu::Iommu;
use super::listen::Listener;
use super::logging::Logs;
use super::postcopy::{PostCopy, PostCopyError};
use super::repeats::Repeats;
use super::server::{Ask, Control, Orders};
use super::socket::{Connection, Incoming, SocketError};
use super::state::{Offer, Session};
use super::wire::{Reply, config_change};
use crate::device::{Device, QueueHandler, features};
use crate::engine::alarm::Alarm;
use crate::engine::queue::{Call, Notifier, Queue};
use crate::engine::reactor::NotifierChange;
use crate::engine::{At, Engine, RunningQueue};
use crate::memory::iotlb::IotlbError;
use crate::memory::log::LogError;
use crate::memory::map::{MapHold, MemoryError, MemoryMap, Region, RegionSpec};
use crate::memory::node::node_of;
use crate::memory::userfault;
use crate::ring::inflight::QueueRegion;
use crate::ring::{RingConfig, RingError};
use crate::stats::QueueStats;

/// Mistakes of a front end that are logged, for each session.
const MAX_COMPLAINTS: u32 = 16;

/// Why an action failed; the front end is told by an error acknowledgement.
#[derive(Debug, thiserror::Error)]
pub(super) enum ActionError {
    #[error(transparent)]
    Memory(#[from] MemoryError),
    #[error(transparent)]
    Iotlb(#[from] IotlbError),
    #[error("queue {0}: {1}{hint}", hint = hint(.1))]
    Ring(u16, RingError),
    #[error("queue {0}: {1}")]
    Queue(u16, io::Error),
    #[error(transparent)]
    Inflight(#[from] InflightError),
    #[error(transparent)]
    Acquire(io::Error),
    #[error(transparent)]
    Log(#[from] LogError),
    #[error(transparent)]
    PostCopy(#[from] PostCopyError),
    #[error("the descriptor for {0} is no eventfd")]
    NotEventfd(String),
    #[error("{0}")]
    Mtu(String),
    #[error(transparent)]
    State(#[from] StateError),
    #[error(transparent)]
    Config(#[from] crate::device::ConfigRefused),
}

/// What is behind it, most often.
fn hint(error: &RingError) -> &'static str {
    match error {
        RingError::Memory(_) => " (is the guest's memory shared? with QEMU: memory-backend-memfd,share=on)",
        _ => "",
    }
}

/// A device as it is offered on a socket.
pub struct Export {
    /// For the log.
    pub name: String,
    /// What is offered.
    pub device: Arc<dyn Device>,
    /// Counters, one a queue.
    pub stats: Vec<Arc<QueueStats>>,
    /// What runs the queues.
    pub engine: Arc<Engine>,
}

/// What the front end has set for a queue, and the queue while it runs.
#[derive(Default)]
pub(super) struct Slot {
    pub(super) kick: Option<OwnedFd>,
    pub(super) call: Option<OwnedFd>,
    pub(super) err: Option<OwnedFd>,
    pub(super) running: Option<(RunningQueue, RingConfig)>,
    /// It has been stopped in this session: the front end knows where it stands.
    pub(super) base_is_known: bool,
    /// A ring that the front end has not yet translated, or not again: its queue runs, but leaves it alone, or is to be
    /// started with it.
    pub(super) unmapped: Option<RingConfig>,
}

impl Export {
    /// What a session can agree on.
    pub(super) fn offer(&self) -> Offer {
        let device = &self.device;
        let in_order = if device.completes_in_order() { features::IN_ORDER } else { 0 };
        Offer {
            features: (device.features() | features::ENGINE | in_order) & !device.withheld_features(),
            num_queues: device.num_queues(),
            max_ring_size: device.max_ring_size(),
            has_state: device.save_state().is_some(),
            // Queues that wait for pages run beside the others, on a reactor that has none of the device's stations.
            postcopy: device.place(0).is_none() && userfault::is_available(),
            is_network: device.network().is_some(),
        }
    }
}

/// What a queue needs besides its ring.
pub(super) struct QueueParts {
    notifier: Notifier,
    region: Option<QueueRegion>,
    handler: Box<dyn QueueHandler>,
}

/// How a session has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ended {
    /// By its front end, or because we are to stop.
    Over,
    /// The link is down, and the front end's guest would not see it.
    CutOff,
    /// Another process goes on with it.
    HandedOver,
    /// Another process has gone on with it, and has died.
    Lost,
}

/// One session being served.
pub(super) struct Served<'a> {
    pub(super) export: &'a Export,
    pub(super) connection: Connection,
    pub(super) session: Session,
    pub(super) map: Arc<MemoryMap>,
    pub(super) repeats: Repeats,
    pub(super) iommu: Iommu,
    /// Cloned into every hold on `map`, and on those it grew from: waiting for it is waiting for the last request that
    /// points into any of them.
    pub(super) released: WaitGroup,
    pub(super) slots: Vec<Slot>,
    /// Raised by any of this session's queues when it breaks.
    pub(super) alarm: Arc<Alarm>,
    pub(super) inflight: Inflight,
    /// To go with the next reply.
    pub(super) reply_fd: Option<OwnedFd>,
    pub(super) logs: Logs,
    pub(super) backend_channel: Option<OwnedFd>,
    pub(super) transfer: Transfer,
    pub(super) complaints: u32,
    pub(super) orders: Arc<Orders>,
    /// While a guest comes before its memory.
    pub(super) postcopy: Option<PostCopy>,
    /// Where new memory is mapped, to be the next reply.
    pub(super) mapped: Vec<RegionSpec>,
}

impl<'a> Served<'a> {
    pub(super) fn new(export: &'a Export, connection: Connection, control: &Control) -> Served<'a> {
        let device = &export.device;
        Served {
            export,
            connection,
            session: Session::new(export.offer()),
            map: Arc::default(),
            iommu: Iommu::new(control.shared_bell()),
            released: WaitGroup::new(),
            slots: std::iter::repeat_with(Slot::default).take(device.num_queues().into()).collect(),
            alarm: Arc::new(Alarm::new(control.shared_bell())),
            inflight: Inflight::Off,
            reply_fd: None,
            logs: Logs::default(),
            backend_channel: None,
            transfer: Transfer::None,
            complaints: 0,
            orders: control.orders(),
            postcopy: None,
            repeats: Repeats::default(),
            mapped: Vec::new(),
        }
    }

    /// Logs what the front end did wrong: the first few times, so that it cannot fill the log.
    pub(super) fn complain(&mut self, what: &dyn Display) {
        self.complaints += 1;
        let name = &self.export.name;
        match self.complaints.cmp(&MAX_COMPLAINTS) {
            std::cmp::Ordering::Less => warn!("{name}: {what}"),
            std::cmp::Ordering::Equal => warn!("{name}: {what} (no more of this session is logged)"),
            std::cmp::Ordering::Greater => {}
        }
    }

    /// Serves until the front end leaves or we are to stop. Queues are stopped, with nothing in flight, in any case.
    pub(super) fn run(mut self, control: &Control, listener: &Listener) -> Result<Ended, SocketError> {
        let outcome = self.converse(control, listener);
        if !control.is_stopping() {
            self.give_up_pages();
        }
        for slot in &mut self.slots {
            slot.running = None;
        }
        outcome
    }

    fn converse(&mut self, control: &Control, listener: &Listener) -> Result<Ended, SocketError> {
        // Looked at each time: a front end that sends without end is to be stopped as well.
        while !control.is_stopping() {
            if control.link_is_down() && listener.has_path() && self.session.sees_no_link() {
                return Ok(Ended::CutOff);
            }
            let also = [self.iommu.awaited(self.backend_channel.as_ref()), self.transfer.awaited()];
            let incoming = self.connection.receive_or(control.bell(), also, self.iommu.patience())?;
            if let Incoming::Rung = incoming {
                control.heard();
            }
            if self.alarm.take() && self.session.needs_reset() {
                self.tell_config_changed();
            }
            match incoming {
                Incoming::Closed => break,
                Incoming::Rung => {
                    self.attend_iommu();
                    self.attend_transfer();
                    if control.take_config_changed() {
                        self.tell_config_changed();
                    }
                    control.answer(|ask| self.answer(ask));
                    if let Some(parking) = control.take_parking() {
                        match parking.follow(|| self.save(listener)) {
                            Then::GoOn => self.go_on(),
                            Then::Leave => return Ok(Ended::HandedOver),
                            Then::StartOver => return Ok(Ended::Lost),
                        }
                    }
                }
                Incoming::Message(header, request, fds) => {
                    let handled = match request {
                        Ok(request) => {
                            debug!("{}: {request:?} with {} descriptors", self.export.name, fds.len());
                            self.session.handle(request, fds).map_err(|e| e.to_string())
                        }
                        Err(e) => Err(e.to_string()),
                    };
                    let reply = match handled {
                        Ok((actions, answer)) => {
                            let done = self.carry_out(actions)?;
                            if !done
                                && matches!(
                                    answer,
                                    Answer::Log { .. } | Answer::Listening | Answer::Mapped { .. }
                                )
                            {
                                return Err(SocketError::Refused(header.request));
                            }
                            self.reply(answer, header.need_reply, done)
                        }
                        Err(why) => {
                            self.complain(&format_args!("request {} refused: {why}", header.request));
                            match self.session.refuse(header.request, header.need_reply) {
                                Refused::Reply(reply) => Some(reply),
                                Refused::Silence => None,
                                Refused::End => return Err(SocketError::Refused(header.request)),
                            }
                        }
                    };
                    if let Some(reply) = reply {
                        let fd = self.reply_fd.take();
                        self.connection.send(&reply.encode(header.request), fd.as_ref().map(AsFd::as_fd))?;
                    }
                }
            }
        }
        Ok(Ended::Over)
    }

    fn reply(&mut self, answer: Answer, need_reply: bool, done: bool) -> Option<Reply> {
        let mapped = std::mem::take(&mut self.mapped);
        match answer {
            Answer::Mapped { whole: true } => Some(Reply::MemTable(mapped)),
            Answer::Mapped { whole: false } => mapped.first().copied().map(Reply::MemReg),
            _ => {
                let config = |at, into: &mut [u8]| self.export.device.read_config(at, into);
                self.session.reply(answer, need_reply, done, config)
            }
        }
    }

    fn tell_config_changed(&self) {
        if let (true, Some(channel)) = (self.session.has_backend_channel(), &self.backend_channel) {
            // Never blocking: a front end that does not read its channel misses the news, nothing else.
            let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
            if let Err(e) = send(channel.as_raw_fd(), &config_change(), flags) {
                warn!(
                    "{}: the front end did not take the notice of a configuration change: {e}",
                    self.export.name
                );
            }
        }
    }

    fn carry_out(&mut self, actions: Vec<Action>) -> Result<bool, SocketError> {
        let mut done = true;
        for action in actions {
            match self.act(action) {
                Ok(()) => {}
                // QEMU looks at no acknowledgement of a start. That its back end is gone it sees, and tries again.
                Err(ActionError::Acquire(e)) => return Err(SocketError::Device(e)),
                Err(e) => {
                    self.complain(&e);
                    done = false;
                }
            }
        }
        Ok(done)
    }

    #[allow(clippy::too_many_lines)] // one arm an action
    fn act(&mut self, action: Action) -> Result<(), ActionError> {
        match action {
            Action::SetMemory(regions) => {
                self.repeats.clear();
                let mapped = regions.into_iter().map(|(spec, fd)| Region::map(spec, fd).map(Arc::new));
                self.set_memory(mapped.collect::<Result<_, _>>()?)?;
            }
            Action::AddMemory(spec, _) if self.postcopy.is_none() && self.repeats.add(&spec, &self.map) => {}
            Action::AddMemory(spec, fd) => self.add_memory(Arc::new(Region::map(spec, fd)?))?,
            Action::RemoveMemory(spec) if self.repeats.remove(&spec) => {}
            Action::RemoveMemory(spec) if self.postcopy.is_some() => self.remove_late_memory(&spec)?,
            Action::RemoveMemory(spec) => self.replace_memory(self.map.without(&spec)?),
            Action::Advise => self.advise()?,
            Action::Listen => self.listen()?,
            Action::Adopt => self.adopt_pending(),
            Action::EndPostcopy => self.end_postcopy()?,
            Action::LogBase { offset, size, fd } => {
                self.logs.set_base(fd, offset, size, &self.map)?;
                self.adopt_logs();
            }
            Action::LogFd(fd) => {
                self.logs.set_call(eventfd("the log", Some(fd))?);
                self.adopt_logs();
            }
            Action::Log(queues) => {
                for (index, logging) in queues {
                    self.logs.set(index, logging);
                }
                self.adopt_logs();
            }
            Action::Acquire => self.export.device.acquire().map_err(ActionError::Acquire)?,
            Action::HandOver => self.export.device.hand_over(),
            Action::Start(index, config) => {
                let config = RingConfig { base: self.session.base(index), ..config };
                let translated = self.session.has_iotlb();
                let started =
                    if translated { self.start_translated(index, config) } else { self.start(index, config) };
                if let Err(e) = started {
                    self.session.start_failed(index);
                    // The front end need not have asked for an answer.
                    self.alarm.raise();
                    return Err(e);
                }
            }
            Action::MapIova(mapping) => self.map_iova(&mapping)?,
            Action::UnmapIova { iova, size } => self.unmap_iova(iova, size)?,
            Action::Stop(index) => {
                self.slot(index).unmapped = None;
                if let Some((queue, _)) = self.slot(index).running.take() {
                    let base = queue.stop().map_err(|e| ActionError::Queue(index, e))?;
                    self.session.stopped(index, base);
                    self.slot(index).base_is_known = true;
                }
                if self.slots.iter().all(|s| s.running.is_none() && s.unmapped.is_none()) {
                    self.iommu.clear(&self.map);
                }
            }
            Action::Kick(index, fd) => self.slot(index).kick = eventfd(format_args!("queue {index}"), fd)?,
            Action::Call(index, fd) => {
                let fd = eventfd(format_args!("queue {index}"), fd)?;
                self.notify(index, fd, |slot| &mut slot.call, NotifierChange::Call)?;
            }
            Action::Err(index, fd) => {
                let fd = eventfd(format_args!("queue {index}"), fd)?;
                self.notify(index, fd, |slot| &mut slot.err, NotifierChange::Err)?;
            }
            Action::AllocateInflight(spec) => {
                self.reply_fd = Some(inflight::allocate(&spec)?);
            }
            Action::SetInflight(spec, fd) => {
                self.slots.iter_mut().for_each(|slot| slot.base_is_known = false);
                self.inflight.set(spec, fd)?;
            }
            Action::BackendChannel(fd) => {
                self.backend_channel = Some(fd);
                self.iommu.channel_changed();
            }
            Action::Announce(mac) => {
                self.export.device.network().into_iter().for_each(|card| card.announce(mac));
            }
            Action::SetMtu(mtu) => {
                let set = self.export.device.network().map(|card| card.set_mtu(mtu));
                set.transpose().map_err(ActionError::Mtu)?;
            }
            Action::WriteConfig(offset, bytes) => {
                self.export.device.write_config(offset, &bytes)?;
            }
            Action::TransferState(direction, fd) => {
                self.transfer = Transfer::begin(direction, fd, &*self.export.device)?;
            }
            Action::CheckState => {
                self.attend_transfer();
                self.transfer.check()?;
            }
            Action::ResetDevice => {
                // What broke has been stopped before this, and is forgotten.
                self.alarm.take();
                self.export.device.reset();
                self.inflight.forget(self.session.format())?;
            }
        }
        Ok(())
    }

    fn attend_transfer(&mut self) {
        let slots = &self.slots;
        self.transfer.attend(&*self.export.device, || slots.iter().any(|s| s.running.is_some()));
    }

    fn set_memory(&mut self, mapped: Vec<Arc<Region>>) -> Result<(), ActionError> {
        if self.expect_pages(&mapped)? {
            self.set_pending(MemoryMap::new(mapped)?);
        } else {
            self.replace_memory(MemoryMap::new(mapped)?);
        }
        Ok(())
    }

    fn add_memory(&mut self, region: Arc<Region>) -> Result<(), ActionError> {
        if self.expect_pages(std::slice::from_ref(&region))? {
            self.set_pending(self.next_map().with(region)?);
        } else {
            self.extend_memory(self.map.with(region)?);
        }
        Ok(())
    }

    /// Does what the rest of the process asks for.
    fn answer(&mut self, ask: Ask) -> Result<(), String> {
        match ask {
            Ask::Pause => {
                let paused = WaitGroup::new();
                // From the last one on: what a network card's transmit queue takes can still go to its receive queue.
                for (queue, _) in self.slots.iter().rev().filter_map(|slot| slot.running.as_ref()) {
                    if self.orders.is_paused() { queue.pause(paused.clone()) } else { queue.resume() }
                }
                paused.wait();
                Ok(())
            }
            Ask::Restart if self.postcopy.is_some() => {
                Err("a guest is on its way here (post-copy); try again when all of it has come".into())
            }
            Ask::Restart => {
                let stopped = self.pause();
                self.go_on();
                stopped.map_err(|e| e.to_string())
            }
        }
    }

    pub(super) fn slot(&mut self, index: u16) -> &mut Slot {
        &mut self.slots[usize::from(index)]
    }

    fn notify(
        &mut self,
        index: u16,
        fd: Option<OwnedFd>,
        kept: impl Fn(&mut Slot) -> &mut Option<OwnedFd>,
        change: impl Fn(Option<OwnedFd>) -> NotifierChange,
    ) -> Result<(), ActionError> {
        let slot = self.slot(index);
        *kept(slot) = fd;
        let copy = copy_of(index, kept(slot).as_ref())?;
        if let Some((queue, _)) = &slot.running {
            queue.set_notifier(change(copy));
        }
        Ok(())
    }

    pub(super) fn start(&mut self, index: u16, config: RingConfig) -> Result<(), ActionError> {
        let parts = self.queue_parts(index, &config)?;
        self.run_queue(index, config, parts)
    }

    /// Everything for a queue that can be had without touching its ring.
    pub(super) fn queue_parts(&mut self, index: u16, config: &RingConfig) -> Result<QueueParts, ActionError> {
        let features = self.session.features();
        let alarm = Arc::clone(&self.alarm);
        let base_is_known = self.slot(index).base_is_known;
        let region = self.inflight.region(index, config.format)?.map(|r| r.with_known_base(base_is_known));
        let size = config.checked_size().map_err(|e| ActionError::Ring(index, e))?;
        let slot = self.slot(index);
        let notifier = Notifier {
            kick: copy_of(index, slot.kick.as_ref())?,
            call: copy_of(index, slot.call.as_ref())?.map(Call::Eventfd),
            err: copy_of(index, slot.err.as_ref())?,
            alarm: Some(alarm),
        };
        let device = &self.export.device;
        if self.slots.iter().all(|slot| slot.running.is_none()) {
            device.keep(self.inflight.memento(config.format));
        }
        let handler = device.start_queue(index, features, size);
        Ok(QueueParts { notifier, region, handler: handler.map_err(|e| ActionError::Queue(index, e))? })
    }

    pub(super) fn run_queue(
        &mut self,
        index: u16,
        config: RingConfig,
        parts: QueueParts,
    ) -> Result<(), ActionError> {
        let export = self.export;
        let hold = MapHold::new(Arc::clone(self.view()), self.released.clone());
        let stats = Arc::clone(&export.stats[usize::from(index)]);
        let name: Arc<str> = format!("{} queue {index}", export.name).into();
        let mut queue = Queue::new(name, &config, hold, parts.notifier, stats)
            .map_err(|e| ActionError::Ring(index, e))?;
        if let Some(region) = parts.region {
            queue = queue.recover(region).map_err(|e| ActionError::Ring(index, e))?;
        }
        queue.set_log(self.log_of(index));
        let (place, reactor) = (export.device.place(index), export.device.reactor(index));
        let at = At { place, reactor, near: self.nodes_near(&config), paused: self.orders.is_paused() };
        let running = self.engine().run_queue_at(queue, parts.handler, at);
        self.slot(index).running = Some((running.map_err(|e| ActionError::Queue(index, e))?, config));
        Ok(())
    }

    /// Where a queue is best off, if there is a choice: at the memory of its ring, which the guest's requests and their
    /// headers are near; or else at the device. Of the ring it is what the driver writes: asking brings a page that is not
    /// there into our own node's memory.
    fn nodes_near(&mut self, config: &RingConfig) -> [Option<usize>; 2] {
        if !self.engine().spans_nodes() {
            return [None; 2];
        }
        let ring = self.view().ring_address(config.avail_addr, 1, config.access_platform);
        [ring.ok().and_then(|ring| node_of(ring.host)), self.export.device.node()]
    }

    /// Starts a queue that nobody waits for an answer about.
    pub(super) fn start_or_complain(
        &mut self,
        index: u16,
        start: impl FnOnce(&mut Self) -> Result<(), ActionError>,
    ) {
        if let Err(e) = start(self) {
            self.session.start_failed(index);
            self.complain(&e);
        }
    }

    /// Tells every running queue what to log. Returns when all do so: from the acknowledgement on, no write goes
    /// unnoticed, and an earlier log may be taken away.
    fn adopt_logs(&self) {
        let adopted = WaitGroup::new();
        for (index, slot) in (0u16..).zip(&self.slots) {
            if let Some((queue, _)) = &slot.running {
                queue.set_log(self.log_of(index), adopted.clone());
            }
        }
        adopted.wait();
    }

    /// Moves every running queue to `map`, in which nothing that was there is missing. Returns when all have gone over:
    /// from the acknowledgement on, the guest may use what is new.
    pub(super) fn extend_memory(&mut self, map: MemoryMap) {
        self.map = Arc::new(map);
        self.iommu.set_memory(&self.map);
        let adopted = WaitGroup::new();
        self.hand_out(None, &adopted);
        adopted.wait();
        self.find_rings();
    }

    /// Moves every running queue to `map`, and returns when nothing points into any earlier one: only then may the
    /// front end take removed memory for its own.
    pub(super) fn replace_memory(&mut self, map: MemoryMap) {
        if self.session.has_iotlb() {
            // Those in memory that stays go on at once.
            self.park_rings(|_| true);
        }
        let released = std::mem::take(&mut self.released);
        self.extend_memory(map);
        released.wait();
    }
}

/// Event descriptors must be eventfds: a pipe that its writer has closed would wake its watcher for ever.
fn eventfd(of: impl Display, fd: Option<OwnedFd>) -> Result<Option<OwnedFd>, ActionError> {
    let Some(fd) = fd else { return Ok(None) };
    let link = std::fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd()));
    match link {
        Ok(target) if target.as_os_str() != "anon_inode:[eventfd]" => {
            Err(ActionError::NotEventfd(of.to_string()))
        }
        // Without /proc there is no telling.
        _ => Ok(Some(fd)),
    }
}

fn copy_of(index: u16, fd: Option<&OwnedFd>) -> Result<Option<OwnedFd>, ActionError> {
    fd.map(OwnedFd::try_clone).transpose().map_err(|e| ActionError::Queue(index, e))
}
