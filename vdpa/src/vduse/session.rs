//! What is done for one device: requests of the kernel answered, queues started in the engine and stopped, what they
//! miss looked up.

use std::collections::BTreeSet;
use std::fmt::Display;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use crossbeam::sync::WaitGroup;
use nix::sys::eventfd::{EfdFlags, EventFd};
use poll_engine::device::features;
use poll_engine::engine::RunningQueue;
use poll_engine::engine::alarm::Alarm;
use poll_engine::engine::queue::{Call, Interrupt, MapChange, Notifier, Queue};
use poll_engine::memory::iotlb::Revoked;
use poll_engine::memory::{MapHold, Misses};
use poll_engine::ring::inflight::InflightMemory;
use poll_engine::ring::{RingConfig, RingFormat};
use poll_engine::session::serve::Export;
use poll_engine::sync::Bell;
use tracing::{debug, info, warn};

use super::memory::{Bounce, Memory};
use super::node::Node;
use super::state::{About, State};
use super::uapi::{Answer, Request, VqInfo, vq_state};

/// `VIRTIO_CONFIG_S_DRIVER_OK`.
const DRIVER_OK: u8 = 4;
/// `VIRTIO_CONFIG_S_FEATURES_OK`.
const FEATURES_OK: u8 = 8;

/// How often to look whether queues that were not ready have become so: a driver need not say. Less and less often.
const FIRST_LOOK: Duration = Duration::from_millis(10);
const LAST_LOOK: Duration = Duration::from_secs(1);
/// When to interrupt again, where the kernel did not take it.
const INTERRUPT_AGAIN: Duration = Duration::from_millis(5);

/// One queue.
#[derive(Default)]
struct Slot {
    running: Option<(RunningQueue, RingConfig)>,
    /// A ring whose addresses are not translated, or not any more.
    unmapped: Option<RingConfig>,
    kick: Option<EventFd>,
    /// The driver has not made it ready.
    is_awaited: bool,
    /// Where it has stopped.
    base: Option<u32>,
}

/// Interrupts that the kernel has not taken: a driver that is not ready yet gets none, and one that is made ready by the
/// very request that we are about to answer would miss those of its first requests.
#[derive(Debug)]
struct Owed {
    queues: Mutex<BTreeSet<u16>>,
    bell: Arc<Bell>,
}

impl Owed {
    fn queues(&self) -> std::sync::MutexGuard<'_, BTreeSet<u16>> {
        self.queues.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[derive(Debug)]
struct QueueInterrupt {
    node: Arc<Node>,
    index: u16,
    owed: Arc<Owed>,
}

impl Interrupt for QueueInterrupt {
    fn raise(&self) -> bool {
        let done = self.node.interrupt(self.index).is_ok();
        if !done {
            self.owed.queues().insert(self.index);
            self.owed.bell.ring();
        }
        done
    }
}

/// A device and its driver.
pub(super) struct Session {
    export: Export,
    node: Arc<Node>,
    about: About,
    state: State,
    memory: Memory,
    /// As in the vhost-user session: see `poll_engine::session::serve`.
    released: WaitGroup,
    slots: Vec<Slot>,
    alarm: Arc<Alarm>,
    owed: Arc<Owed>,
    /// While the driver is ready: what it has accepted, and the record of what is in flight.
    active: Option<(u64, InflightMemory)>,
    /// The driver is ready, and its queues are to be started.
    is_to_begin: bool,
    next_look: Option<(Instant, Duration)>,
    complaints: u32,
}

impl Session {
    pub(super) fn new(
        export: Export,
        node: Arc<Node>,
        about: About,
        state: State,
        bounce: Bounce,
        bell: &Arc<Bell>,
    ) -> Session {
        let misses = Arc::new(Misses::new(Arc::clone(bell)));
        let slots = std::iter::repeat_with(Slot::default).take(about.num_queues.into()).collect();
        Session {
            memory: Memory::new(Arc::clone(&node), misses, bounce),
            alarm: Arc::new(Alarm::new(Arc::clone(bell))),
            owed: Arc::new(Owed { queues: Mutex::default(), bell: Arc::clone(bell) }),
            export,
            node,
            about,
            state,
            released: WaitGroup::new(),
            slots,
            active: None,
            is_to_begin: false,
            next_look: None,
            complaints: 0,
        }
    }

    fn complain(&mut self, what: &dyn Display) {
        self.complaints += 1;
        match self.complaints {
            1..16 => warn!("{}: {what}", self.export.name),
            16 => warn!("{}: {what} (no more is logged)", self.export.name),
            _ => {}
        }
    }

    /// Goes on with the device of a process that has died: answers what was asked of it, and starts the queues if its
    /// driver is ready.
    pub(super) fn resume(&mut self) -> std::io::Result<()> {
        let mut was_reset = false;
        while let Some(request) = self.node.request()? {
            was_reset |= request.request() == Request::SetStatus(0);
            let answer = self.handle(request.request());
            self.node.answer(request.id, answer)?;
        }
        // There is no asking for the status; but the kernel tells of a configuration only a driver that is ready. One that
        // has just been reset may still look so.
        let ready = !was_reset && self.config_changed();
        if ready && self.active.is_none() {
            match self.start() {
                Ok(()) => info!("{}: going on with its driver", self.export.name),
                Err(e) => self.complain(&e),
            }
        }
        Ok(())
    }

    /// Answers a request.
    pub(super) fn handle(&mut self, request: Request) -> Answer {
        debug!("{}: {request:?}", self.export.name);
        if request != Request::SetStatus(0) && std::mem::take(&mut self.is_to_begin) {
            // It has heard the answer, or could not ask on.
            self.begin();
        }
        let outcome = match request {
            Request::SetStatus(0) => {
                self.reset();
                Ok(Answer::Done)
            }
            Request::SetStatus(status) if status & DRIVER_OK != 0 => self.start().map(|()| Answer::Done),
            Request::SetStatus(status) if status & FEATURES_OK != 0 => {
                self.check_features().map(|_| Answer::Done)
            }
            Request::SetStatus(_) => Ok(Answer::Done),
            Request::VqState(index) => self.queue_state(index),
            Request::UpdateIotlb(first, last) if first <= last => {
                self.update(first, last);
                Ok(Answer::Done)
            }
            Request::UpdateIotlb(first, last) => {
                Err(format!("translations from {first:#x} to {last:#x} cannot change"))
            }
            Request::Unknown(kind) => {
                Err(format!("the kernel makes a request of kind {kind}, which is unknown"))
            }
        };
        outcome.unwrap_or_else(|e| {
            self.complain(&e);
            Answer::Failed
        })
    }

    /// What the driver has accepted, if that is something it may accept.
    fn check_features(&self) -> Result<u64, String> {
        let accepted = self.node.features().map_err(|e| e.to_string())?;
        let unknown = accepted & !self.about.features;
        if unknown != 0 {
            return Err(format!("the driver accepts features that were not offered: {unknown:#x}"));
        }
        if accepted & features::ACCESS_PLATFORM == 0 {
            return Err(
                "the driver does not accept VIRTIO_F_ACCESS_PLATFORM, without which there is no memory"
                    .into(),
            );
        }
        Ok(accepted)
    }

    fn format(accepted: u64) -> RingFormat {
        if accepted & features::RING_PACKED != 0 { RingFormat::Packed } else { RingFormat::Split }
    }

    /// The driver is ready.
    fn start(&mut self) -> Result<(), String> {
        if self.active.is_some() {
            return Ok(());
        }
        let accepted = self.check_features()?;
        let record = self.state.record(&self.about, Self::format(accepted)).map_err(|e| e.to_string())?;
        self.export.device.acquire().map_err(|e| e.to_string())?;
        self.active = Some((accepted, record));
        self.is_to_begin = true;
        Ok(())
    }

    /// Starts the queues of a driver that has heard that it is ready. Not before: a network driver says so with the lock
    /// held that our tap needs on the same host, and would wait for us as we wait for it.
    fn begin(&mut self) {
        // Nothing was known.
        let _none = self.memory.refresh(0, u64::MAX);
        for index in 0..self.about.num_queues {
            self.slot(index).is_awaited = true;
        }
        self.look_for_ready();
        self.next_look = Some((Instant::now() + FIRST_LOOK, FIRST_LOOK));
    }

    /// Starts the queues that have become ready since.
    fn look_for_ready(&mut self) {
        for index in 0..self.about.num_queues {
            if self.slot(index).is_awaited
                && let Err(e) = self.look_at(index)
            {
                self.complain(&format_args!("queue {index}: {e}"));
            }
        }
    }

    fn look_at(&mut self, index: u16) -> Result<(), String> {
        if self.slot(index).kick.is_none() {
            let kick = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK);
            let kick = kick.map_err(|e| e.to_string())?;
            // A reset has taken the last one away.
            self.node.set_kick(index, kick.as_fd()).map_err(|e| e.to_string())?;
            self.slot(index).kick = Some(kick);
        }
        // After that: a queue that is made ready in between is kicked into it, or seen.
        let info = self.node.queue_info(index).map_err(|e| e.to_string())?;
        if info.ready == 0 {
            return Ok(());
        }
        self.slot(index).is_awaited = false;
        let config = self.config_of(&info);
        if config.size > self.about.queue_size.into() {
            return Err(format!("{} descriptors are more than its {}", config.size, self.about.queue_size));
        }
        self.slot(index).unmapped = Some(config);
        self.find_ring(index)
    }

    fn config_of(&self, info: &VqInfo) -> RingConfig {
        let accepted = self.active.as_ref().map_or(0, |active| active.0);
        let config =
            RingConfig::new(info.num, [info.desc_addr, info.driver_addr, info.device_addr], accepted);
        RingConfig { base: vq_state::to_base(info.state, config.format), ..config }
    }

    /// Starts a queue whose ring is translated, or has it go on.
    fn find_ring(&mut self, index: u16) -> Result<(), String> {
        let Some(config) = self.slot(index).unmapped else { return Ok(()) };
        config.checked_size().map_err(|e| e.to_string())?;
        let mut missing = vec![];
        config.each_missing(self.memory.view(), |miss| missing.push(miss));
        for miss in missing {
            if !self.memory.view().allows(miss.iova, miss.access) {
                let revoked = self.memory.resolve(miss).ok_or(format!(
                    "its ring is not mapped for the device at I/O address {:#x}",
                    miss.iova
                ))?;
                self.hand_out(revoked);
            }
        }
        self.slot(index).unmapped = None;
        let hold = self.hold();
        if let Some((queue, _)) = &self.slot(index).running {
            queue.set_map(MapChange { hold, ring: Some(config), revoked: None, adopted: WaitGroup::new() });
            return Ok(());
        }
        self.run(index, config, hold)
    }

    fn hold(&self) -> MapHold {
        MapHold::new(Arc::clone(self.memory.view()), self.released.clone())
    }

    fn run(&mut self, index: u16, config: RingConfig, hold: MapHold) -> Result<(), String> {
        let Some((accepted, record)) = &self.active else { return Ok(()) };
        let accepted = *accepted;
        let fail = |e: &dyn Display| e.to_string();
        let device = Arc::clone(&self.export.device);
        if self.slots.iter().all(|slot| slot.running.is_none()) {
            device.keep(record.memento(config.format));
        }
        let size = config.checked_size().map_err(|e| fail(&e))?;
        let handler = device.start_queue(index, accepted, size).map_err(|e| fail(&e))?;
        let region = record.queue(index, config.format).map_err(|e| fail(&e))?;
        let slot = &self.slots[usize::from(index)];
        let kick = slot.kick.as_ref().map(|kick| kick.as_fd().try_clone_to_owned());
        let interrupt = QueueInterrupt { node: Arc::clone(&self.node), index, owed: Arc::clone(&self.owed) };
        let notifier = Notifier {
            kick: kick.transpose().map_err(|e| fail(&e))?,
            call: Some(Call::Interrupt(Box::new(interrupt))),
            err: None,
            alarm: Some(Arc::clone(&self.alarm)),
        };
        let name = format!("{} queue {index}", self.export.name).into();
        let stats = Arc::clone(&self.export.stats[usize::from(index)]);
        let mut queue = Queue::new(name, &config, hold, notifier, stats).map_err(|e| fail(&e))?;
        if let Some(region) = region {
            queue = queue.recover(region.with_known_base(slot.base.is_some())).map_err(|e| fail(&e))?;
        }
        let running =
            self.export.engine.run_queue(queue, handler, device.place(index)).map_err(|e| fail(&e))?;
        self.slot(index).running = Some((running, config));
        Ok(())
    }

    /// The driver has reset the device: nothing of it is touched any more.
    fn reset(&mut self) {
        self.stop_queues();
        self.slots.iter_mut().for_each(|slot| *slot = Slot { base: slot.base, ..Slot::default() });
        if let Some((accepted, record)) = self.active.take()
            && let Err(e) = record.forget(Self::format(accepted))
        {
            self.complain(&e);
        }
        self.memory.clear();
        self.is_to_begin = false;
        self.next_look = None;
        self.owed.queues().clear();
        self.alarm.take();
        self.export.device.reset();
    }

    /// Finishes what is in flight.
    pub(super) fn stop_queues(&mut self) {
        let stopping =
            self.slots.iter_mut().map(|slot| slot.running.take().map(|(queue, _)| queue.begin_stop()));
        // All at once, then each awaited.
        let stopping: Vec<_> = stopping.collect();
        for (slot, stopping) in self.slots.iter_mut().zip(stopping) {
            if let Some(stopping) = stopping {
                slot.base = stopping.wait().ok();
            }
        }
    }

    /// Where a queue stands. It does so only while it stands still: everything before is finished then.
    fn queue_state(&mut self, index: u32) -> Result<Answer, String> {
        let at = u16::try_from(index).ok().filter(|&i| i < self.about.num_queues);
        let at = at.ok_or(format!("there is no queue {index}"))?;
        let accepted = match &self.active {
            Some(active) => active.0,
            None => self.node.features().map_err(|e| e.to_string())?,
        };
        let format = Self::format(accepted);
        if let Some((queue, config)) = self.slot(at).running.take() {
            let base = queue.stop().map_err(|e| e.to_string())?;
            self.slot(at).base = Some(base);
            self.slot(at).unmapped = Some(RingConfig { base, ..config });
            if let Err(e) = self.find_ring(at) {
                self.complain(&format_args!("queue {index} does not go on: {e}"));
            }
        }
        let base = self.slot(at).base.unwrap_or(format.initial_base());
        Ok(Answer::VqState(index, vq_state::of_base(base, format)))
    }

    /// Translations have changed. Returns when nothing in flight points to what is gone.
    fn update(&mut self, first: u64, last: u64) {
        if self.active.is_none() {
            return;
        }
        self.park_rings(first, last);
        let revoked = self.memory.refresh(first, last);
        self.hand_out(revoked);
        self.find_rings();
    }

    fn find_rings(&mut self) {
        for index in 0..self.about.num_queues {
            if let Err(e) = self.find_ring(index) {
                self.complain(&format_args!("queue {index}: {e}"));
            }
        }
    }

    /// Has queues leave rings alone whose translations may change, and returns when they do.
    fn park_rings(&mut self, first: u64, last: u64) {
        let parked = WaitGroup::new();
        for slot in self.slots.iter_mut().filter(|s| s.unmapped.is_none()) {
            if let Some((queue, config)) =
                slot.running.as_ref().filter(|(_, config)| config.touches(first, last))
            {
                queue.park(parked.clone());
                slot.unmapped = Some(*config);
            }
        }
        parked.wait();
    }

    /// Gives all queues the new map, and returns when none uses what was revoked.
    fn hand_out(&mut self, revoked: Revoked) {
        let revoked = (!revoked.is_empty()).then(|| Arc::new(revoked));
        let adopted = WaitGroup::new();
        for (queue, _) in self.slots.iter().filter_map(|s| s.running.as_ref()) {
            queue.set_map(MapChange {
                hold: self.hold(),
                ring: None,
                revoked: revoked.clone(),
                adopted: adopted.clone(),
            });
        }
        if revoked.is_some() {
            adopted.wait();
        }
    }

    /// Looks after what queues wait for; how long until that is to be done again at the latest.
    pub(super) fn attend(&mut self) -> Option<Duration> {
        if std::mem::take(&mut self.is_to_begin) {
            self.begin();
        }
        while let Some(miss) = self.memory.misses().take() {
            if self.memory.view().allows(miss.iova, miss.access) {
                continue;
            }
            if self.memory.is_full() {
                // As if all had changed: what is used is found again.
                self.park_rings(0, u64::MAX);
                let released = std::mem::take(&mut self.released);
                self.memory.clear();
                self.hand_out(Revoked::default());
                released.wait();
                self.find_rings();
            }
            match self.memory.resolve(miss) {
                Some(revoked) => self.hand_out(revoked),
                None => self
                    .slots
                    .iter()
                    .filter_map(|s| s.running.as_ref())
                    .for_each(|(q, _)| q.refuse(Some(miss))),
            }
        }
        if self.alarm.take() {
            self.complain(&"a queue is broken, and VDUSE has no way to tell the driver so: take the device away and add it anew");
        }
        self.owe_less();
        let now = Instant::now();
        if let Some((at, pause)) = self.next_look
            && at <= now
        {
            self.look_for_ready();
            let pause = (2 * pause).min(LAST_LOOK);
            self.next_look = self.slots.iter().any(|s| s.is_awaited).then_some((now + pause, pause));
        }
        let look = self.next_look.map(|(at, _)| at.saturating_duration_since(now));
        let owed = (!self.owed.queues().is_empty()).then_some(INTERRUPT_AGAIN);
        look.into_iter().chain(owed).min()
    }

    fn owe_less(&self) {
        let queues: Vec<u16> = self.owed.queues().iter().copied().collect();
        for index in queues {
            if self.node.interrupt(index).is_ok() {
                self.owed.queues().remove(&index);
            }
        }
    }

    /// A kick of a queue that was not ready.
    pub(super) fn awaited(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        self.slots.iter().filter(|s| s.is_awaited).filter_map(|s| Some(s.kick.as_ref()?.as_fd()))
    }

    /// Looks at once at the queues that were kicked.
    pub(super) fn kicked(&mut self) {
        for slot in self.slots.iter().filter(|s| s.is_awaited) {
            let _ = slot.kick.as_ref().map(EventFd::read);
        }
        self.next_look = Some((Instant::now(), FIRST_LOOK));
    }

    /// Shows the driver what configuration space is now; whether there is one that is ready.
    pub(super) fn config_changed(&mut self) -> bool {
        let mut config = vec![0; self.about.config_len];
        self.export.device.read_config(0, &mut config);
        let told = self.node.set_config(0, &config).and_then(|()| self.node.config_interrupt());
        told.unwrap_or_else(|e| {
            self.complain(&e);
            false
        })
    }

    fn slot(&mut self, index: u16) -> &mut Slot {
        &mut self.slots[usize::from(index)]
    }

    /// The directory of the device, which is not served any more.
    pub(super) fn end(mut self) -> State {
        self.stop_queues();
        self.state
    }
}
