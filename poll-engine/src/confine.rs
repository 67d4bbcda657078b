//! What threads give up as they begin: the engine says which kind of thread it is, the program what that kind may keep.
//!
//! A thread cannot have more than the one that starts it. So where threads are confined, one that does nothing else starts
//! all the others: it has what any of them needs to begin, and nobody who speaks with a guest or a front end has.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::thread::{Builder, JoinHandle};

use crossbeam::channel::{Sender, bounded, unbounded};
use tracing::warn;

use crate::fault_point::hijack;

/// A kind of thread, by what it needs of the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Role {
    /// Runs queues: its io_uring, guest memory and descriptors that are open.
    Reactor,
    /// Speaks with front ends, or with a process that takes over: memory that they share, sockets that are open.
    Session,
    /// Writes captures into files that are open.
    Writer,
    /// Reads and writes images that are open, where reactors would have to wait.
    Worker,
    /// Of a library that speaks with a storage cluster, and starts further threads for that: it keeps nobody's rights but
    /// all system calls, which nobody can list.
    Cluster,
    /// Opens interfaces of the host's, again when they come back, or later.
    Opener,
    /// Starts threads of these kinds.
    Starter,
}

type Confine = dyn Fn(Role) -> io::Result<()> + Send + Sync;
type Job = Box<dyn FnOnce() + Send>;

/// A thread that does what it is sent, one after the other.
struct Hands(Sender<Job>);

impl Hands {
    fn new() -> (Hands, impl FnOnce() + Send + 'static) {
        let (jobs, to_do) = unbounded::<Job>();
        (Hands(jobs), move || to_do.iter().for_each(|job| job()))
    }

    fn post(&self, job: impl FnOnce() + Send + 'static) {
        let _ = self.0.send(Box::new(job));
    }

    fn run<T: Send + 'static>(&self, job: impl FnOnce() -> T + Send + 'static) -> io::Result<T> {
        let (tell, done) = bounded(1);
        self.post(move || drop(tell.send(job())));
        done.recv().map_err(|_| io::Error::other("the thread that starts others has ended"))
    }
}

struct Process {
    confine: Box<Confine>,
    starter: Hands,
    /// There are hundreds of sessions, and the kernel takes a millisecond for the filters of one: they have those of the
    /// first, which starts the others.
    sessions: Mutex<Option<Hands>>,
}

static PROCESS: OnceLock<Process> = OnceLock::new();
static SEALED: AtomicBool = AtomicBool::new(false);

/// Has threads that begin from now on call `confine` for themselves, before they do anything for others. What a thread
/// gives up is the process's to say, so there is one for the process: later calls change nothing, and return false.
pub fn threads_with(confine: impl Fn(Role) -> io::Result<()> + Send + Sync + 'static) -> io::Result<bool> {
    let (starter, work) = Hands::new();
    let process = Process { confine: Box::new(confine), starter, sessions: Mutex::default() };
    if PROCESS.set(process).is_err() {
        return Ok(false);
    }
    Builder::new().name("starter".into()).spawn(work)?;
    Ok(true)
}

/// The thread that starts others gives up what they do not need to begin; `calls` among it, or only rights.
pub fn seal(calls: bool) -> io::Result<()> {
    SEALED.store(calls, Ordering::Release);
    let Some(process) = PROCESS.get() else { return Ok(()) };
    process.starter.run(|| begin(Role::Starter).map(|()| hijack("starter")))?
}

/// Has the thread that starts others make what only it may, such as a ring; where none is confined, the calling one does.
pub fn make<T: Send + 'static>(what: impl FnOnce() -> T + Send + 'static) -> io::Result<T> {
    match PROCESS.get() {
        Some(process) => process.starter.run(what),
        None => Ok(what()),
    }
}

/// Whether threads that begin now are held to the calls that the one which starts them has left.
pub fn is_sealed() -> bool {
    SEALED.load(Ordering::Acquire)
}

/// The calling thread is of this kind. It must not go on if this fails.
fn begin(role: Role) -> io::Result<()> {
    PROCESS.get().map_or(Ok(()), |process| (process.confine)(role))
}

/// Starts a thread of this kind. It runs nothing if it cannot be confined.
pub fn spawn(
    builder: Builder,
    role: Role,
    run: impl FnOnce() + Send + 'static,
) -> io::Result<JoinHandle<()>> {
    match PROCESS.get() {
        Some(process) if role == Role::Session => process.session(builder, run),
        _ => spawn_with(builder, role, || Ok(()), |()| run()),
    }
}

/// As [`spawn`], for a thread that makes something before it is confined: what that fails with, this fails with.
pub fn spawn_with<T>(
    builder: Builder,
    role: Role,
    make: impl FnOnce() -> io::Result<T> + Send + 'static,
    run: impl FnOnce(T) + Send + 'static,
) -> io::Result<JoinHandle<()>> {
    let (tell, begun) = bounded(1);
    let thread = move || match make().and_then(|made| begin(role).map(|()| made)) {
        Ok(made) => {
            let _ = tell.send(Ok(()));
            run(made);
        }
        Err(e) => drop(tell.send(Err(e))),
    };
    let thread = match PROCESS.get() {
        Some(process) => process.starter.run(move || builder.spawn(thread))??,
        None => builder.spawn(thread)?,
    };
    begun.recv().unwrap_or_else(|_| Err(io::Error::other("the thread has ended")))?;
    Ok(thread)
}

/// Has a thread of this kind do something. Does not even wait for its beginning, as no reactor may.
pub fn post(name: &str, role: Role, act: impl FnOnce() + Send + 'static) -> io::Result<()> {
    let builder = Builder::new().name(name.into());
    let failed = |e: io::Error| warn!("a thread that was to open something does not begin: {e}");
    let thread = move || begin(role).map_or_else(failed, |()| act());
    match PROCESS.get() {
        Some(process) => process.starter.post(move || builder.spawn(thread).map_or_else(failed, drop)),
        None => drop(builder.spawn(thread)?),
    }
    Ok(())
}

/// Has a thread of this kind do something, and waits for it. The calling thread does it where none is confined.
pub fn have<T: Send + 'static>(role: Role, act: impl FnOnce() -> T + Send + 'static) -> io::Result<T> {
    if PROCESS.get().is_none() {
        return Ok(act());
    }
    let (tell, done) = bounded(1);
    let thread = spawn(Builder::new().name("opener".into()), role, move || drop(tell.send(act())))?;
    let done = done.recv().map_err(|_| io::Error::other("the thread has ended"));
    // A panic there has been printed.
    let _ = thread.join();
    done
}

impl Process {
    fn session(&self, builder: Builder, run: impl FnOnce() + Send + 'static) -> io::Result<JoinHandle<()>> {
        let mut sessions = self.sessions.lock().unwrap_or_else(PoisonError::into_inner);
        let first = match &mut *sessions {
            Some(first) => first,
            none => {
                let (hands, work) = Hands::new();
                spawn_with(Builder::new().name("sessions".into()), Role::Session, || Ok(()), |()| work())?;
                none.insert(hands)
            }
        };
        first.run(move || builder.spawn(run))?
    }
}
