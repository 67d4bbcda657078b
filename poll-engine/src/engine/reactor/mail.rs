//! What control threads ask of a reactor, and how it is done: between two rounds, and answered as soon as the requests
//! that are in its way are over.

use crossbeam::channel::Sender;
use crossbeam::sync::WaitGroup;
use tracing::{debug, warn};

use super::io::{Purpose, QueueId, io, label};
use super::task::Task;
use super::{Reactor, Stationed};
use crate::device::QueueHandler;
use crate::engine::pacing::Pacing;
use crate::engine::queue::{MapChange, Queue};
use crate::engine::station::Station;
use crate::memory::iotlb::Miss;
use crate::memory::log::QueueLog;
use crate::probes;

/// What control threads can ask of a reactor.
pub(in crate::engine) enum Message {
    /// Run this queue from now on.
    Start { queue: Box<Queue>, handler: Box<dyn QueueHandler>, paused: bool, id: Sender<QueueId> },
    /// Take no more chains, finish what is in flight, answer with the base and let the queue go.
    Stop { id: QueueId, base: Sender<u32> },
    /// Go over to a new memory map.
    SetMap { id: QueueId, change: MapChange },
    /// Take no more chains for now, finish what is in flight, and let `paused` go.
    Pause { id: QueueId, paused: WaitGroup },
    /// Take chains again.
    Resume { id: QueueId },
    /// Wait in this way from now on.
    SetPacing(Pacing),
    /// Take no more chains, finish what is in flight, and leave the ring alone until a map comes that has it.
    Park { id: QueueId, parked: WaitGroup },
    /// The front end has no translation for this, or (`None`) for the ring.
    Refuse { id: QueueId, miss: Option<Miss> },
    /// Tell a dirty log what is written from now on, or nobody, and let `adopted` go.
    SetLog { id: QueueId, log: Option<QueueLog>, adopted: WaitGroup },
    /// Replace one of the event descriptors.
    SetNotifier { id: QueueId, change: NotifierChange },
    /// Poll this station from now on.
    AddStation { station: Box<dyn Station>, id: Sender<QueueId> },
    /// Let this station go once nothing of its own is in flight.
    RemoveStation { id: QueueId, gone: WaitGroup },
    /// Say that it turns.
    Turn(Sender<()>),
    /// Leave, once no queue is left.
    Quit,
}

/// A new event descriptor for a running queue.
#[derive(Debug)]
pub enum NotifierChange {
    /// To be signalled when chains were used.
    Call(Option<std::os::fd::OwnedFd>),
    /// To be signalled when the queue breaks.
    Err(Option<std::os::fd::OwnedFd>),
}

impl Reactor {
    #[cold]
    pub(super) fn read_mail(&mut self) {
        // What is queued names descriptors that a message may replace.
        self.uring.submit();
        for message in self.mailbox.take() {
            match message {
                Message::Start { queue, handler, paused, id } => {
                    let started = self.start(queue, handler, paused);
                    // Whoever asked may have given up; then the queue is stopped by its owner going away.
                    let _ = id.send(started);
                }
                Message::Stop { id, base } => {
                    if let Some(task) = self.find(id) {
                        task.stopping = Some(base);
                        task.settle();
                        self.awaited += 1;
                    } else {
                        warn!("{}: asked to stop a queue that does not run here", self.name);
                    }
                }
                Message::SetMap { id, change } => {
                    let done = self.find(id).map(|task| task.queue.set_map(change));
                    self.awaited += usize::from(matches!(done, Some((_, None))));
                    self.sync_buffers();
                    // Last: whoever waits for the old map takes its memory away.
                    drop(done);
                }
                Message::Park { id, parked } => {
                    if let Some(task) = self.find(id) {
                        task.parking = Some(parked);
                        task.settle();
                        self.awaited += 1;
                    }
                }
                Message::Pause { id, paused } => {
                    if let Some(task) = self.find(id) {
                        task.paused = true;
                        let waits = task.pausing.replace(paused).is_none();
                        task.settle();
                        self.awaited += usize::from(waits);
                    }
                }
                Message::Resume { id } => {
                    if let Some(task) = self.find(id) {
                        task.paused = false;
                        let waited = task.pausing.take().is_some();
                        task.settle();
                        self.awaited -= usize::from(waited);
                        self.pacer.worked();
                    }
                }
                Message::SetPacing(pacing) => self.pacer.set(pacing),
                Message::Refuse { id, miss } => {
                    if let Some(task) = self.find(id) {
                        task.queue.refuse(miss);
                    }
                }
                Message::SetLog { id, log, adopted } => {
                    if let Some(task) = self.find(id) {
                        task.queue.set_log(log);
                    }
                    drop(adopted);
                }
                Message::SetNotifier { id, change } => {
                    if let Some(task) = self.find(id) {
                        match change {
                            NotifierChange::Call(fd) => task.queue.set_call(fd),
                            NotifierChange::Err(fd) => {
                                task.queue.notifier.err = fd;
                                // One that comes too late to hear of it is told now.
                                task.reported = false;
                            }
                        }
                    }
                }
                Message::AddStation { station, id } => {
                    let _ = id.send(self.add_station(station));
                }
                Message::RemoveStation { id, gone } => {
                    if let Some(at) = self.stations.iter().position(|s| s.id == id) {
                        self.on_station(at, |station, queues, io| station.stop(queues, io));
                        self.stations[at].leaving = Some(gone);
                        self.awaited += 1;
                    }
                }
                Message::Turn(heard) => {
                    let _ = heard.send(());
                }
                Message::Quit => self.quitting = true,
            }
        }
    }

    /// The queue, which is looked at from now on.
    fn find(&mut self, id: QueueId) -> Option<&mut Task> {
        let place = self.place(id)?;
        let place = self.rouse(place);
        self.tasks.get_mut(place)
    }

    fn start(&mut self, queue: Box<Queue>, mut handler: Box<dyn QueueHandler>, paused: bool) -> QueueId {
        let slot = self.places.iter().position(Option::is_none).unwrap_or_else(|| {
            self.places.push(None);
            self.places.len() - 1
        });
        let id = QueueId { slot: slot as u16, generation: self.next_generation() };
        handler.attach(&mut io(&mut self.uring, Purpose::Handler, id, self.index));
        probes::start(&*queue, queue.name());
        self.insert(Task {
            id,
            queue,
            handler,
            stopping: None,
            parking: None,
            paused,
            pausing: None,
            rests: paused,
            watching_kick: false,
            reported: false,
            reaped: false,
            touched: false,
            worked: true,
            wanted: false,
        });
        self.sync_buffers();
        self.pacer.worked();
        id
    }

    fn next_generation(&mut self) -> u16 {
        self.generation = self.generation.wrapping_add(1) & 0xfff;
        self.generation
    }

    fn add_station(&mut self, mut station: Box<dyn Station>) -> QueueId {
        let taken = |slot: &u16| self.stations.iter().any(|s| s.id.slot == *slot);
        let slot = (0..u16::MAX).find(|slot| !taken(slot)).unwrap_or(u16::MAX);
        let id = QueueId { slot, generation: self.next_generation() };
        station.attach(&mut io(&mut self.uring, Purpose::Station, id, self.index));
        self.stations.push(Stationed { station, id, leaving: None });
        self.pacer.worked();
        id
    }

    fn sync_buffers(&mut self) {
        let users = self.tasks.iter().filter(|t| t.handler.uses_fixed_buffers());
        self.uring.sync_buffers(self.fixed, users.map(|t| t.queue.map()));
        for task in &mut self.tasks {
            task.handler.register_memory(self.fixed, task.queue.map());
        }
    }

    /// Says what has become true with the requests that are over: nothing points any more to what was revoked, and rings
    /// that were to be left alone are.
    #[cold]
    pub(super) fn park(&mut self) {
        for task in &mut self.tasks[..self.polled] {
            self.awaited -= task.queue.release_revoked();
            if task.parking.is_some() && task.queue.in_flight() == 0 {
                task.queue.publish();
                task.queue.signal(&mut io(&mut self.uring, Purpose::Handler, task.id, self.index));
                task.queue.unmap_ring();
                self.awaited -= 1;
                task.parking = None;
                task.settle();
            }
            if task.pausing.is_some() && task.queue.in_flight() == 0 {
                task.queue.publish();
                task.queue.signal(&mut io(&mut self.uring, Purpose::Handler, task.id, self.index));
                self.awaited -= 1;
                task.pausing = None;
            }
        }
    }

    /// Lets the queues and stations go that were asked to stop and have finished.
    #[cold]
    pub(super) fn retire(&mut self) {
        let all = self.stations.len();
        self.stations.retain(|s| s.leaving.is_none() || s.station.in_flight() > 0);
        self.awaited -= all - self.stations.len();
        for task in self.tasks[..self.polled].iter_mut().filter(|t| t.waits_idly()) {
            task.queue.return_resubmits();
        }
        while let Some(place) = self.tasks[..self.polled].iter().position(Task::is_done) {
            let mut task = self.remove(place);
            let io = &mut io(&mut self.uring, Purpose::Handler, task.id, self.index);
            task.queue.publish();
            task.queue.signal(io);
            // The driver may be run by somebody else from here on, who wants to hear of it.
            task.queue.enable_notification();
            task.handler.detach(io);
            if task.watching_kick {
                io.uring().unwatch(label(Purpose::Kick, task.id, 0), label(Purpose::Cancel, task.id, 0));
            }
            io.uring().submit();
            // What has not been taken by now waits for a front end that does not read.
            task.queue.cancel_signals(io);
            self.uring.submit();
            self.awaited -= 1 + task.queue.revoked();
            let base = task.queue.base();
            probes::stop(&*task.queue);
            let reply = task.stopping.take();
            debug!("{}: a queue has left at {base:#x}", self.name);
            drop(task);
            self.sync_buffers();
            if let Some(reply) = reply {
                // Nobody waiting any more is no trouble: the queue is gone either way.
                let _ = reply.send(base);
            }
        }
    }
}
