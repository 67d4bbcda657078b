//! The two threads of a device. One answers the kernel and is blocked by nothing: a request that is not answered within
//! 30 seconds breaks the device for good. The other does what is asked ([`Session`]), and may take its time; where that is
//! too long, the kernel is told that it has failed.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crossbeam::channel::{Receiver, Sender, bounded, unbounded};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use poll_engine::confine::{self, Role};
use poll_engine::fault_point::hijack;
use poll_engine::session::serve::Export;
use poll_engine::sync::Bell;
use tracing::warn;

use super::memory::Bounce;
use super::node::Node;
use super::session::Session;
use super::state::{About, State};
use super::uapi::{Answer, Request};

/// How long a request may take. The kernel gives up after 30 seconds, unless `msg_timeout` in sysfs says otherwise.
pub const PATIENCE: Duration = Duration::from_secs(25);

/// Shared by the threads and whoever has started them.
#[derive(Debug)]
struct Shared {
    /// For the session's thread.
    session: Arc<Bell>,
    /// For the one that answers.
    answers: Bell,
    stop: AtomicBool,
    config_changed: AtomicBool,
    ended: AtomicBool,
}

/// A device being served. Dropping it finishes what is in flight and closes the node; requests that come after that wait
/// for whoever opens it next.
#[derive(Debug)]
pub struct Server {
    shared: Arc<Shared>,
    session: Option<JoinHandle<()>>,
    /// Where the session leaves the directory of its device.
    left: Receiver<State>,
    answers: Option<JoinHandle<()>>,
}

/// How a device is to be served.
#[derive(Debug)]
pub struct Plan {
    /// What the kernel knows of it.
    pub about: About,
    /// Where its state is kept.
    pub state: State,
    /// It was served before, by a process that has died.
    pub resume: bool,
    /// Where pages are bounced.
    pub bounce: Bounce,
    /// How long a request may take: [`PATIENCE`].
    pub patience: Duration,
}

impl Server {
    /// Serves `export` on `node`. `ended` is called if the kernel gives the device up.
    pub fn start(
        export: Export,
        node: Node,
        plan: Plan,
        ended: impl FnOnce() + Send + 'static,
    ) -> io::Result<Server> {
        let Plan { about, state, resume, bounce, patience } = plan;
        let shared = Arc::new(Shared {
            session: Arc::new(Bell::new()?),
            answers: Bell::new()?,
            stop: AtomicBool::new(false),
            config_changed: AtomicBool::new(false),
            ended: AtomicBool::new(false),
        });
        let (node, name) = (Arc::new(node), export.name.clone());
        let mut session = Session::new(export, Arc::clone(&node), about, state, bounce, &shared.session);
        if resume {
            session.resume()?;
        }
        let (ask, asked) = unbounded();
        let (answer, answered) = unbounded();
        let (leave, left) = bounded(1);
        let mine = Arc::clone(&shared);
        let builder = |name: &str| std::thread::Builder::new().name(name.into());
        let session = confine::spawn(builder("vduse"), Role::Session, move || {
            hijack("session");
            let _ = leave.send(serve(session, &mine, &asked, &answer));
        })?;
        let mine = Arc::clone(&shared);
        let answers = confine::spawn(builder("vduse-answers"), Role::Session, move || {
            let answers = Answers { node, pending: vec![], patience, name, ask, answered };
            if let Err(e) = answers.run(&mine) {
                warn!("{e}");
                mine.ended.store(true, Ordering::Release);
                ended();
            }
        })?;
        Ok(Server { shared, session: Some(session), left, answers: Some(answers) })
    }

    /// Shows the driver that configuration space has changed. It never waits.
    pub fn config_notifier(&self) -> impl Fn() + Send + Sync + 'static {
        let shared = Arc::clone(&self.shared);
        move || {
            shared.config_changed.store(true, Ordering::Release);
            shared.session.ring();
        }
    }

    /// Whether the kernel has given the device up.
    pub fn has_ended(&self) -> bool {
        self.shared.ended.load(Ordering::Acquire)
    }

    /// Begins to stop.
    pub fn begin_stop(&self) {
        self.shared.stop.store(true, Ordering::Release);
        self.shared.session.ring();
        self.shared.answers.ring();
    }

    /// Stops, and gives the directory of the device back.
    pub fn stop(mut self) -> Option<State> {
        self.join()
    }

    fn join(&mut self) -> Option<State> {
        self.begin_stop();
        for thread in [self.session.take(), self.answers.take()].into_iter().flatten() {
            // A panic there has been printed.
            let _ = thread.join();
        }
        self.left.try_recv().ok()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.join();
    }
}

fn serve(
    mut session: Session,
    shared: &Shared,
    asked: &Receiver<(u32, Request)>,
    answer: &Sender<(u32, Answer)>,
) -> State {
    let mut patience = session.attend();
    while !shared.stop.load(Ordering::Acquire) {
        let mut fds = vec![PollFd::new(shared.session.fd(), PollFlags::POLLIN)];
        fds.extend(session.awaited().map(|fd| PollFd::new(fd, PollFlags::POLLIN)));
        let timeout = patience.map_or(PollTimeout::NONE, |d| {
            PollTimeout::try_from(d + Duration::from_millis(1)).unwrap_or(PollTimeout::MAX)
        });
        let _ = poll(&mut fds, timeout);
        let kicked = fds.iter().skip(1).any(|fd| fd.any().unwrap_or(false));
        if kicked {
            session.kicked();
        }
        shared.session.heard();
        while let Ok((id, request)) = asked.try_recv() {
            // Nobody hears it if the kernel has given the device up.
            let _ = answer.send((id, session.handle(request)));
            shared.answers.ring();
        }
        if shared.config_changed.swap(false, Ordering::AcqRel) {
            session.config_changed();
        }
        patience = session.attend();
    }
    session.end()
}

/// The thread that answers.
struct Answers {
    node: Arc<Node>,
    /// Requests that are not answered, and until when they have to be.
    pending: Vec<(u32, Request, Instant)>,
    patience: Duration,
    name: String,
    ask: Sender<(u32, Request)>,
    answered: Receiver<(u32, Answer)>,
}

impl Answers {
    fn run(mut self, shared: &Shared) -> Result<(), String> {
        while !shared.stop.load(Ordering::Acquire) {
            let mut fds = [self.node.fd(), shared.answers.fd()].map(|fd| PollFd::new(fd, PollFlags::POLLIN));
            let first = self.pending.iter().map(|p| p.2.saturating_duration_since(Instant::now())).min();
            let timeout = first.map_or(PollTimeout::NONE, |d| {
                PollTimeout::try_from(d + Duration::from_millis(1)).unwrap_or(PollTimeout::MAX)
            });
            let _ = poll(&mut fds, timeout);
            let broken = fds[0]
                .revents()
                .is_some_and(|r| r.intersects(PollFlags::POLLERR | PollFlags::POLLNVAL | PollFlags::POLLHUP));
            if broken {
                return Err(format!(
                    "{}: the kernel has given the device up, for something was not answered in time; take it away with \
                     vdpactl detach {0}, and add it anew",
                    self.name
                ));
            }
            shared.answers.heard();
            let lost = |e: io::Error| format!("{}: the device is lost: {e}", self.name);
            while let Some(request) = self.node.request().map_err(lost)? {
                let what = request.request();
                self.pending.push((request.id, what, Instant::now() + self.patience));
                let _ = self.ask.send((request.id, what));
                shared.session.ring();
            }
            while let Ok((id, answer)) = self.answered.try_recv() {
                // One that was late has been answered.
                if let Some(at) = self.pending.iter().position(|p| p.0 == id) {
                    self.pending.swap_remove(at);
                    self.send(id, answer);
                }
            }
            let now = Instant::now();
            for (id, what, _) in self.pending.extract_if(.., |p| p.2 <= now).collect::<Vec<_>>() {
                warn!(
                    "{}: {what:?} takes longer than {:?}: the kernel is told that it has failed",
                    self.name, self.patience
                );
                self.send(id, Answer::Failed);
            }
        }
        Ok(())
    }

    fn send(&self, id: u32, answer: Answer) {
        if let Err(e) = self.node.answer(id, answer) {
            // The driver's process was killed while it waited.
            warn!("{}: nobody waits for the answer to request {id}: {e}", self.name);
        }
    }
}
