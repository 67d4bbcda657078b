//! The control thread of one device: one front end after another, each session's actions carried out.

use std::fmt::Display;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use crossbeam::sync::WaitGroup;
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::socket::{MsgFlags, send};
use tracing::{debug, info, warn};

use super::inflight::{self, Inflight, InflightError};
use super::listen::{Accepted, Listener};
use super::logging::Logs;
use super::socket::{Connection, Incoming, SocketError};
use super::state::{Action, Answer, Offer, Refused, Session};
use super::wire::config_change;
use crate::device::{Device, features};
use crate::engine::queue::{Alarm, Notifier, Queue};
use crate::engine::reactor::NotifierChange;
use crate::engine::{Engine, RunningQueue};
use crate::memory::log::LogError;
use crate::memory::map::{MapHold, MemoryError, MemoryMap, Region};
use crate::ring::{RingConfig, RingError};
use crate::stats::QueueStats;

/// A control thread's stack: it parses small messages. Hundreds of these threads may exist.
const STACK: usize = 128 << 10;

/// Mistakes of a front end that are logged, for each session.
const MAX_COMPLAINTS: u32 = 16;

/// Why an action failed; the front end is told by an error acknowledgement.
#[derive(Debug, thiserror::Error)]
enum ActionError {
    #[error(transparent)]
    Memory(#[from] MemoryError),
    #[error("queue {0}: {1}{hint}", hint = hint(.1))]
    Ring(u16, RingError),
    #[error("queue {0}: {1}")]
    Queue(u16, io::Error),
    #[error(transparent)]
    Inflight(#[from] InflightError),
    #[error(transparent)]
    Log(#[from] LogError),
    #[error("the descriptor for {0} is no eventfd")]
    NotEventfd(String),
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

#[derive(Debug)]
struct Control {
    bell: Arc<EventFd>,
    stop: AtomicBool,
    config_changed: AtomicBool,
}

/// A running control thread.
#[derive(Debug)]
pub struct Server {
    control: Arc<Control>,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    /// Starts serving `export` to whoever connects to `listener`; `ended` is called when no more front ends can come.
    pub fn start(
        export: Export,
        mut listener: Listener,
        ended: impl FnOnce() + Send + 'static,
    ) -> io::Result<Server> {
        let bell = Arc::new(EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?);
        let control =
            Arc::new(Control { bell, stop: AtomicBool::new(false), config_changed: AtomicBool::new(false) });
        let shared = Arc::clone(&control);
        let builder = std::thread::Builder::new().name("session".into()).stack_size(STACK);
        let thread = builder.spawn(move || {
            while !shared.stop.load(Ordering::Acquire) {
                match listener.accept(shared.bell.as_fd()) {
                    Ok(Accepted::FrontEnd(stream)) => {
                        info!("{}: front end connected", export.name);
                        let outcome = Connection::new(stream)
                            .map_err(SocketError::from)
                            .and_then(|connection| Served::new(&export, connection, &shared).run(&shared));
                        match outcome {
                            Ok(()) => info!("{}: front end gone", export.name),
                            Err(e) => warn!("{}: session ended: {e}", export.name),
                        }
                        export.device.reset();
                    }
                    Ok(Accepted::Rung) => {
                        // Without a front end there is nobody to tell anything: only stopping matters.
                        let _ = shared.bell.read();
                    }
                    Ok(Accepted::Never) => break,
                    Err(e) => {
                        // Out of descriptors, most likely: others may give some back.
                        warn!("{}: cannot accept a front end: {e}", export.name);
                        std::thread::sleep(Duration::from_millis(200));
                    }
                }
            }
            drop(listener);
            ended();
        })?;
        Ok(Server { control, thread: Some(thread) })
    }

    /// Tells the front end, and through it the guest, to read configuration space again.
    pub fn config_changed(&self) {
        self.control.config_changed.store(true, Ordering::Release);
        self.ring();
    }

    /// Begins to stop: queues finish what is in flight, the socket is closed and its path removed.
    pub fn begin_stop(&self) {
        self.control.stop.store(true, Ordering::Release);
        self.ring();
    }

    fn ring(&self) {
        // A full counter has rung.
        let _ = self.control.bell.write(1);
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.begin_stop();
        if let Some(thread) = self.thread.take() {
            // A panic there has been printed.
            let _ = thread.join();
        }
    }
}

/// What the front end has set for a queue, and the queue while it runs.
#[derive(Default)]
struct Slot {
    kick: Option<OwnedFd>,
    call: Option<OwnedFd>,
    err: Option<OwnedFd>,
    running: Option<(RunningQueue, RingConfig)>,
}

/// One session being served.
struct Served<'a> {
    export: &'a Export,
    connection: Connection,
    session: Session,
    map: Arc<MemoryMap>,
    /// Cloned into every hold on `map`, and on those it grew from: waiting for it is waiting for the last request that
    /// points into any of them.
    released: WaitGroup,
    slots: Vec<Slot>,
    /// Raised by any of this session's queues when it breaks.
    alarm: Arc<Alarm>,
    inflight: Inflight,
    /// To go with the next reply.
    reply_fd: Option<OwnedFd>,
    logs: Logs,
    backend_channel: Option<OwnedFd>,
    complaints: u32,
}

impl<'a> Served<'a> {
    fn new(export: &'a Export, connection: Connection, control: &Control) -> Served<'a> {
        let device = &export.device;
        let offer = Offer {
            features: device.features() | features::ENGINE,
            num_queues: device.num_queues(),
            max_ring_size: device.max_ring_size(),
        };
        Served {
            export,
            connection,
            session: Session::new(offer),
            map: Arc::default(),
            released: WaitGroup::new(),
            slots: std::iter::repeat_with(Slot::default).take(device.num_queues().into()).collect(),
            alarm: Arc::new(Alarm::new(Arc::clone(&control.bell))),
            inflight: Inflight::Off,
            reply_fd: None,
            logs: Logs::default(),
            backend_channel: None,
            complaints: 0,
        }
    }

    /// Logs what the front end did wrong: the first few times, so that it cannot fill the log.
    fn complain(&mut self, what: &dyn Display) {
        self.complaints += 1;
        let name = &self.export.name;
        match self.complaints.cmp(&MAX_COMPLAINTS) {
            std::cmp::Ordering::Less => warn!("{name}: {what}"),
            std::cmp::Ordering::Equal => warn!("{name}: {what} (no more of this session is logged)"),
            std::cmp::Ordering::Greater => {}
        }
    }

    /// Serves until the front end leaves or we are to stop. Queues are stopped, with nothing in flight, in any case.
    fn run(mut self, control: &Control) -> Result<(), SocketError> {
        let outcome = self.converse(control);
        for slot in &mut self.slots {
            slot.running = None;
        }
        outcome
    }

    fn converse(&mut self, control: &Control) -> Result<(), SocketError> {
        // Looked at each time: a front end that sends without end is to be stopped as well.
        while !control.stop.load(Ordering::Acquire) {
            let incoming = self.connection.receive(control.bell.as_fd())?;
            if self.alarm.take() && self.session.needs_reset() {
                self.tell_config_changed();
            }
            match incoming {
                Incoming::Closed => return Ok(()),
                Incoming::Rung => {
                    let _ = control.bell.read();
                    if control.config_changed.swap(false, Ordering::AcqRel) {
                        self.tell_config_changed();
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
                            let done = self.carry_out(actions);
                            if let (false, Answer::Log { .. }) = (done, answer) {
                                return Err(SocketError::Refused(header.request));
                            }
                            let device = &self.export.device;
                            self.session.reply(answer, header.need_reply, done, |at, into| {
                                device.read_config(at, into);
                            })
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
        Ok(())
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

    fn carry_out(&mut self, actions: Vec<Action>) -> bool {
        let mut done = true;
        for action in actions {
            if let Err(e) = self.act(action) {
                self.complain(&e);
                done = false;
            }
        }
        done
    }

    fn act(&mut self, action: Action) -> Result<(), ActionError> {
        match action {
            Action::SetMemory(regions) => {
                let mapped = regions.into_iter().map(|(spec, fd)| Region::map(spec, fd).map(Arc::new));
                let map = MemoryMap::new(mapped.collect::<Result<_, _>>()?)?;
                self.replace_memory(map);
            }
            Action::AddMemory(spec, fd) => self.extend_memory(self.map.with(Region::map(spec, fd)?)?),
            Action::RemoveMemory(spec) => self.replace_memory(self.map.without(&spec)?),
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
            Action::Start(index, config) => {
                let config = RingConfig { base: self.session.base(index), ..config };
                if let Err(e) = self.start(index, config) {
                    self.session.start_failed(index);
                    // The front end need not have asked for an answer.
                    self.alarm.raise();
                    return Err(e);
                }
            }
            Action::Stop(index) => {
                if let Some((queue, _)) = self.slot(index).running.take() {
                    let base = queue.stop().map_err(|e| ActionError::Queue(index, e))?;
                    self.session.stopped(index, base);
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
            Action::SetInflight(spec, fd) => self.inflight.set(spec, fd)?,
            Action::BackendChannel(fd) => self.backend_channel = Some(fd),
            Action::WriteConfig(offset, bytes) => self.export.device.write_config(offset, &bytes)?,
            Action::ResetDevice => {
                // What broke has been stopped before this, and is forgotten.
                self.alarm.take();
                self.export.device.reset();
            }
        }
        Ok(())
    }

    fn slot(&mut self, index: u16) -> &mut Slot {
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

    fn start(&mut self, index: u16, config: RingConfig) -> Result<(), ActionError> {
        let export = self.export;
        let hold = MapHold::new(Arc::clone(&self.map), self.released.clone());
        let stats = Arc::clone(&export.stats[usize::from(index)]);
        let name: Arc<str> = format!("{} queue {index}", export.name).into();
        let features = self.session.features();
        let alarm = Arc::clone(&self.alarm);
        let region = self.inflight.region(index, config.format)?;
        let logged = self.logs.of(index);
        let slot = self.slot(index);
        let notifier = Notifier {
            kick: copy_of(index, slot.kick.as_ref())?,
            call: copy_of(index, slot.call.as_ref())?,
            err: copy_of(index, slot.err.as_ref())?,
            alarm: Some(alarm),
        };
        let size = config.checked_size().map_err(|e| ActionError::Ring(index, e))?;
        let mut queue =
            Queue::new(name, &config, hold, notifier, stats).map_err(|e| ActionError::Ring(index, e))?;
        if let Some(region) = region {
            queue = queue.recover(region).map_err(|e| ActionError::Ring(index, e))?;
        }
        queue.set_log(logged);
        let started = export.device.start_queue(index, features, size);
        let running = started.and_then(|handler| export.engine.run_queue(queue, handler));
        slot.running = Some((running.map_err(|e| ActionError::Queue(index, e))?, config));
        Ok(())
    }

    /// Tells every running queue what to log. Returns when all do so: from the acknowledgement on, no write goes
    /// unnoticed, and an earlier log may be taken away.
    fn adopt_logs(&self) {
        let adopted = WaitGroup::new();
        for (index, slot) in (0u16..).zip(&self.slots) {
            if let Some((queue, _)) = &slot.running {
                queue.set_log(self.logs.of(index), adopted.clone());
            }
        }
        adopted.wait();
    }

    /// Moves every running queue to `map`, in which nothing that was there is missing. Returns when all have gone over:
    /// from the acknowledgement on, the guest may use what is new.
    fn extend_memory(&mut self, map: MemoryMap) {
        self.map = Arc::new(map);
        let adopted = WaitGroup::new();
        for (queue, config) in self.slots.iter().filter_map(|s| s.running.as_ref()) {
            queue.set_map(
                *config,
                MapHold::new(Arc::clone(&self.map), self.released.clone()),
                adopted.clone(),
            );
        }
        adopted.wait();
    }

    /// Moves every running queue to `map`, and returns when nothing points into any earlier one: only then may the
    /// front end take removed memory for its own.
    fn replace_memory(&mut self, map: MemoryMap) {
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
