//! The control thread of one device: one front end after another, and what the rest of the process asks of it.

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crossbeam::channel::{Receiver, RecvTimeoutError, Sender, bounded, unbounded};
use tracing::{info, warn};

use super::handover::served::Restored;
use super::handover::{Freeze, HandoverError, Parking, Snapshot, Then};
use super::listen::{Accepted, Listener};
use super::serve::{Ended, Export, Served};
use super::socket::{Connection, SocketError};
use crate::confine::{self, Role};
use crate::fault_point;
use crate::memory::userfault;
use crate::sync::Bell;

/// A control thread's stack: it parses small messages. Hundreds of these threads may exist.
const STACK: usize = 128 << 10;

/// How long a control thread may take over what it is asked for: its queues may have to finish what is in flight, on storage
/// that is slow to answer.
const PATIENCE: Duration = Duration::from_secs(30);

/// What a control thread hears of.
#[derive(Debug)]
pub(super) struct Control {
    orders: Arc<Orders>,
    parking: Receiver<Parking>,
    asked: Receiver<(Ask, Sender<Result<(), String>>)>,
}

/// What may be asked of a control thread, done between two requests of its front end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ask {
    /// Queues take no requests, or do so again, as [`Orders::is_paused`] says.
    Pause,
    /// Queues are stopped and started again: with other handlers, on other reactors.
    Restart,
}

/// Why a server does not do what it is asked for.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum AskError {
    /// It has ended.
    #[error("it serves nobody any more")]
    Ended,
    /// It has not answered.
    #[error("its control thread has not answered within {0:?}; see what keeps its storage or its front end")]
    Late(Duration),
    /// It cannot be done now.
    #[error("{0}")]
    Refused(String),
}

/// Nobody is connected.
const IDLE: u8 = 0;
/// A front end is.
const ATTACHED: u8 = 1;
/// Nobody is to be served any more.
const STOPPING: u8 = 2;

/// What is shared with it.
#[derive(Debug)]
pub(super) struct Orders {
    bell: Arc<Bell>,
    /// One of the above.
    phase: AtomicU8,
    paused: AtomicBool,
    config_changed: AtomicBool,
    /// The link of a network device is down.
    link_down: AtomicBool,
}

impl Orders {
    pub(super) fn is_stopping(&self) -> bool {
        self.phase.load(Ordering::Acquire) == STOPPING
    }

    /// Whether queues are to take no requests.
    pub(super) fn is_paused(&self) -> bool {
        self.paused.load(Ordering::Acquire)
    }

    /// A front end is connected from here on; false if nobody is to be served any more.
    fn attach(&self) -> bool {
        self.turn(IDLE, ATTACHED) || self.phase.load(Ordering::Acquire) == ATTACHED
    }

    /// Goes over to the next phase; false if it was another one.
    fn turn(&self, from: u8, to: u8) -> bool {
        self.phase.compare_exchange(from, to, Ordering::AcqRel, Ordering::Acquire).is_ok()
    }
}

impl Control {
    pub(super) fn orders(&self) -> Arc<Orders> {
        Arc::clone(&self.orders)
    }

    /// Rings when there is anything to hear.
    pub(super) fn bell(&self) -> BorrowedFd<'_> {
        self.orders.bell.fd()
    }

    /// To be rung by queues as well.
    pub(super) fn shared_bell(&self) -> Arc<Bell> {
        Arc::clone(&self.orders.bell)
    }

    /// The bell has been heard, and everything is looked at from now on.
    pub(super) fn heard(&self) {
        self.orders.bell.heard();
    }

    pub(super) fn is_stopping(&self) -> bool {
        self.orders.is_stopping()
    }

    pub(super) fn link_is_down(&self) -> bool {
        self.orders.link_down.load(Ordering::Acquire)
    }

    pub(super) fn take_config_changed(&self) -> bool {
        self.orders.config_changed.swap(false, Ordering::AcqRel)
    }

    pub(super) fn take_parking(&self) -> Option<Parking> {
        self.parking.try_recv().ok()
    }

    /// Does what was asked for.
    pub(super) fn answer(&self, mut act: impl FnMut(Ask) -> Result<(), String>) {
        for (ask, done) in self.asked.try_iter() {
            // Whoever has asked may have given up.
            let _ = done.send(act(ask));
        }
    }
}

/// A running control thread.
#[derive(Debug)]
pub struct Server {
    orders: Arc<Orders>,
    parking: Sender<Parking>,
    asked: Sender<(Ask, Sender<Result<(), String>>)>,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    /// Starts serving `export` to whoever connects to `listener`; `ended` is called when no more front ends can come.
    pub fn start(
        export: Export,
        listener: Listener,
        ended: impl FnOnce() + Send + 'static,
    ) -> io::Result<Server> {
        Self::spawn(move |control| {
            serve(&export, listener, None, &control);
            ended();
        })
    }

    /// As [`start`](Self::start), but serves nobody before [`Prepared::go`].
    pub fn prepare(
        export: Export,
        listener: Listener,
        ended: impl FnOnce() + Send + 'static,
    ) -> io::Result<Prepared> {
        Self::spawn_prepared(export, move |_, _| Ok(Restored::fresh(listener)), ended)
    }

    /// Prepares to go on with what another process has served. Nothing that is shared with it is touched before
    /// [`Prepared::go`].
    pub fn resume(
        export: Export,
        snapshot: Snapshot,
        ended: impl FnOnce() + Send + 'static,
    ) -> io::Result<Prepared> {
        Self::spawn_prepared(export, move |export, control| Restored::new(export, control, snapshot), ended)
    }

    fn spawn_prepared(
        export: Export,
        prepare: impl for<'a> FnOnce(&'a Export, &Control) -> Result<Restored<'a>, HandoverError> + Send + 'static,
        ended: impl FnOnce() + Send + 'static,
    ) -> io::Result<Prepared> {
        let (tell, ready) = bounded(1);
        let (go, may_go) = bounded::<()>(1);
        let server = Self::spawn(move |control| {
            let restored = match prepare(&export, &control) {
                Ok(restored) => restored,
                Err(e) => {
                    let _ = tell.send(Err(e));
                    return;
                }
            };
            if restored.has_session() {
                // Whoever asks as soon as this serves is told of it.
                control.orders.attach();
            }
            // Whoever has given up drops the other ends.
            let _ = tell.send(Ok(()));
            if may_go.recv().is_ok() {
                let (listener, served) = restored.activate();
                serve(&export, listener, served, &control);
                ended();
            }
        })?;
        Ok(Prepared { ready, go, server })
    }

    fn spawn(run: impl FnOnce(Control) + Send + 'static) -> io::Result<Server> {
        let bell = Arc::new(Bell::new()?);
        let orders = Arc::new(Orders {
            bell,
            phase: AtomicU8::new(IDLE),
            paused: AtomicBool::new(false),
            config_changed: AtomicBool::new(false),
            link_down: AtomicBool::new(false),
        });
        let (parking, receiver) = unbounded();
        let (asked, asks) = unbounded();
        let control = Control { orders: Arc::clone(&orders), parking: receiver, asked: asks };
        let builder = std::thread::Builder::new().name("session".into()).stack_size(STACK);
        let thread = confine::spawn(builder, Role::Session, move || {
            // Said at the start, not when the first front end comes; and by a thread that may do no more than those that
            // will need it.
            userfault::is_available();
            fault_point::hijack("session");
            run(control);
        })?;
        Ok(Server { orders, parking, asked, thread: Some(thread) })
    }

    /// Tells the front end, and through it the guest, to read configuration space again.
    pub fn config_changed(&self) {
        (self.config_notifier())();
    }

    /// Does what [`config_changed`](Self::config_changed) does, for whoever hears of a change first. It never waits.
    pub fn config_notifier(&self) -> impl Fn() + Send + Sync + 'static {
        let orders = Arc::clone(&self.orders);
        move || {
            orders.config_changed.store(true, Ordering::Release);
            orders.bell.ring();
        }
    }

    /// The link of a network device is up or down, which configuration space says already. A front end that reads that is
    /// told that it has changed. Others, such as QEMU, show their guests a link as long as they have a back end, and nothing
    /// else: with the link down they are hung up on, and do not find the socket until it is up again.
    pub fn set_link(&self, is_up: bool) {
        self.orders.link_down.store(!is_up, Ordering::Release);
        self.config_changed();
    }

    /// Begins to stop: queues finish what is in flight, the socket is closed and its path removed.
    pub fn begin_stop(&self) {
        self.orders.phase.store(STOPPING, Ordering::Release);
        self.ring();
    }

    /// As [`begin_stop`](Self::begin_stop), unless a front end is connected: false then, and nothing has changed.
    pub fn begin_stop_unattached(&self) -> bool {
        let stops = self.orders.turn(IDLE, STOPPING) || self.orders.is_stopping();
        self.ring();
        stops
    }

    /// Whether a front end is connected.
    pub fn is_attached(&self) -> bool {
        self.orders.phase.load(Ordering::Acquire) == ATTACHED
    }

    /// Whether queues take no requests.
    pub fn is_paused(&self) -> bool {
        self.orders.is_paused()
    }

    /// Has queues take no requests, or take them again; those that start later, too. Returns when what was in flight is
    /// finished. An error says that it may be so later, or never.
    pub fn set_paused(&self, paused: bool) -> Result<(), AskError> {
        self.orders.paused.store(paused, Ordering::Release);
        self.ask(Ask::Pause)
    }

    /// Stops all queues, finishing what is in flight, and starts them again where they were: with handlers that their device
    /// makes anew, on the reactors that it wants them on. Guests notice a pause.
    pub fn restart_queues(&self) -> Result<(), AskError> {
        self.ask(Ask::Restart)
    }

    fn ask(&self, ask: Ask) -> Result<(), AskError> {
        let (done, answer) = bounded(1);
        self.asked.send((ask, done)).map_err(|_| AskError::Ended)?;
        self.ring();
        match answer.recv_timeout(PATIENCE) {
            Ok(outcome) => outcome.map_err(AskError::Refused),
            Err(RecvTimeoutError::Timeout) => Err(AskError::Late(PATIENCE)),
            Err(RecvTimeoutError::Disconnected) => Err(AskError::Ended),
        }
    }

    /// Has the thread come to a rest between two requests of its front end, to be handed over or let go on.
    pub fn freeze(&self) -> Freeze {
        let (freeze, parking) = Freeze::new();
        // A thread that has ended drops it, which the freeze notices.
        let _ = self.parking.send(parking);
        self.ring();
        freeze
    }

    /// Whether no front end is served any more, nor will be.
    pub fn has_ended(&self) -> bool {
        self.thread.as_ref().is_none_or(JoinHandle::is_finished)
    }

    fn ring(&self) {
        self.orders.bell.ring();
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

/// A control thread that is ready to serve.
#[derive(Debug)]
pub struct Prepared {
    ready: Receiver<Result<(), HandoverError>>,
    go: Sender<()>,
    /// Last: its drop waits for the thread, which must have noticed by then.
    server: Server,
}

impl Prepared {
    /// Waits until everything that can fail is done.
    pub fn wait_ready(&self, until: Instant) -> Result<(), HandoverError> {
        self.ready.recv_deadline(until).map_err(|e| match e {
            RecvTimeoutError::Timeout => HandoverError::Late("get ready"),
            RecvTimeoutError::Disconnected => HandoverError::Ended,
        })?
    }

    /// Serves. A process that it is taken over from must not do so any more.
    pub fn go(self) -> Server {
        let _ = self.go.send(());
        self.server
    }
}

/// Has the socket where no front end finds it, or back.
fn set_aside(listener: &mut Listener, is_aside: bool, export: &Export) {
    if let Err(e) = listener.set_aside(is_aside) {
        warn!("{}: its socket cannot be moved: {e}", export.name);
    }
}

/// Serves one front end after another, first the one that is connected.
fn serve<'a>(export: &'a Export, mut listener: Listener, mut served: Option<Served<'a>>, control: &Control) {
    while !control.is_stopping() {
        if !control.link_is_down() {
            set_aside(&mut listener, false, export);
        }
        if let Some(session) = served.take() {
            // One that came with a hand-over, or that came while it was decided to stop.
            if !control.orders.attach() {
                return;
            }
            let ended = session.run(control, &listener);
            control.orders.turn(ATTACHED, IDLE);
            match ended {
                Ok(Ended::Over) => info!("{}: front end gone", export.name),
                Ok(Ended::HandedOver) => return listener.own(None),
                Ok(Ended::CutOff) => {
                    info!("{}: front end hung up on: the link is down", export.name);
                    set_aside(&mut listener, true, export);
                }
                Ok(Ended::Lost) => warn!("{}: session ended: the front end must connect again", export.name),
                Err(e) => warn!("{}: session ended: {e}", export.name),
            }
            // What comes next may be another process, and has no use for what a reset leaves.
            export.device.keep(None);
            export.device.reset();
            continue;
        }
        match listener.accept(control.bell()) {
            Ok(Accepted::FrontEnd(stream)) => {
                info!("{}: front end connected", export.name);
                match Connection::new(stream) {
                    Ok(connection) => served = Some(Served::new(export, connection, control)),
                    Err(e) => warn!("{}: session ended: {}", export.name, SocketError::from(e)),
                }
            }
            Ok(Accepted::Rung) => {
                control.heard();
                // Nobody to tell that configuration space has changed.
                control.take_config_changed();
                // Queues that do not run are as they are to be.
                control.answer(|_| Ok(()));
                if let Some(parking) = control.take_parking()
                    && parking.follow(|| Snapshot::idle(&listener)) == Then::Leave
                {
                    return listener.own(None);
                }
            }
            Ok(Accepted::Never) => return,
            Err(e) => {
                // Out of descriptors, most likely: others may give some back.
                warn!("{}: cannot accept a front end: {e}", export.name);
                std::thread::sleep(Duration::from_millis(200));
            }
        }
    }
}
