//! What threads give up as they begin: the engine says which kind of thread it is, the program what that kind may keep.

use std::io;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{Builder, JoinHandle};

use crossbeam::channel::bounded;

/// A kind of thread, by what it needs of the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Role {
    /// Runs queues: its io_uring, guest memory and descriptors that are open.
    Reactor,
    /// Speaks with front ends, or with a process that takes over: memory that they share, sockets that are open, threads.
    Session,
    /// Writes captures into files that are open.
    Writer,
    /// Reads and writes images that are open, where reactors would have to wait.
    Worker,
    /// Of a library that speaks with a storage cluster, and starts further threads for that: it keeps nobody's rights but
    /// all system calls, which nobody can list.
    Cluster,
}

type Confine = dyn Fn(Role) -> io::Result<()> + Send + Sync;

static SEALED: AtomicBool = AtomicBool::new(false);
static CONFINE: OnceLock<Box<Confine>> = OnceLock::new();

/// Has threads that begin from now on call `confine` for themselves, before they do anything for others. What a thread
/// gives up is the process's to say, so there is one for the process: later calls change nothing, and return false.
pub fn threads_with(confine: impl Fn(Role) -> io::Result<()> + Send + Sync + 'static) -> bool {
    CONFINE.set(Box::new(confine)).is_ok()
}

/// Nobody starts threads with more from here on.
pub fn seal() {
    SEALED.store(true, Ordering::Release);
}

/// Whether threads that begin now have what the program's first one has left at most.
pub fn is_sealed() -> bool {
    SEALED.load(Ordering::Acquire)
}

/// The calling thread is of this kind. It must not go on if this fails.
pub fn begin(role: Role) -> io::Result<()> {
    CONFINE.get().map_or(Ok(()), |confine| confine(role))
}

/// Starts a thread of this kind. It runs nothing if it cannot be confined.
pub fn spawn(
    builder: Builder,
    role: Role,
    run: impl FnOnce() + Send + 'static,
) -> io::Result<JoinHandle<()>> {
    let (tell, begun) = bounded(1);
    let thread = builder.spawn(move || {
        let confined = begin(role);
        let may_run = confined.is_ok();
        let _ = tell.send(confined);
        if may_run {
            run();
        }
    })?;
    begun.recv().unwrap_or_else(|_| Err(io::Error::other("the thread has ended")))?;
    Ok(thread)
}
