//! The running process's side: a socket on which another process asks for everything, and a thread that sees to it.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::socket::{getsockopt, sockopt};
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use tracing::{info, warn};

use super::baton::Baton;
use super::channel::Channel;
use super::{Answer, Request, TakeoverError};
use crate::confine::{self, Role};
use crate::device::Device;
use crate::fault_point;
use crate::session::handover::{Freeze, Snapshot};
use crate::session::listen::{Accepted, Listener};
use crate::session::server::Server;

/// How long the new process may take over its greeting.
const GREETING: Duration = Duration::from_secs(5);
/// How long it may then take to start. Guests are served meanwhile, and so is nobody else on this socket.
const START: Duration = Duration::from_secs(120);
/// How long sessions may take to come to a rest between two requests: longer than a front end may leave a reply unread.
/// Queues run meanwhile.
const PARK: Duration = Duration::from_secs(15);
/// How long the new process may take to listen in our place. Nobody waits meanwhile.
const FAREWELL: Duration = Duration::from_secs(2);
/// How long queues may take to finish what is in flight. Guests wait meanwhile, as they do in the next two.
const DRAIN: Duration = Duration::from_secs(5);
/// How long the new process may take to receive all and to run. A few milliseconds is usual.
const TAKE: Duration = Duration::from_secs(5);

/// How long the kernel may take to end a process that has closed its end of the socket.
const DEATH: Duration = Duration::from_secs(5);

/// Something that is served, and can be handed over.
pub struct Lot {
    /// Where it is served: what the new process knows it by.
    pub key: String,
    /// What the device has to say about itself to the new process, before anything stops.
    pub about: serde_json::Value,
    /// Descriptors that go with it.
    pub fds: Vec<OwnedFd>,
    /// What serves it.
    pub server: Arc<Server>,
    /// What is served.
    pub device: Arc<dyn Device>,
}

impl std::fmt::Debug for Lot {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Lot").field("key", &self.key).field("about", &self.about).finish_non_exhaustive()
    }
}

/// What is there to be handed over when somebody asks for it.
pub trait Estate: Send + 'static {
    /// Calls `give` with all of it. Nothing is added to it or taken away meanwhile.
    fn with(&self, give: &mut dyn FnMut(&[Lot])) -> io::Result<()>;
}

/// One that never changes.
impl Estate for Vec<Lot> {
    fn with(&self, give: &mut dyn FnMut(&[Lot])) -> io::Result<()> {
        give(self);
        Ok(())
    }
}

/// What the program calls itself.
#[derive(Clone, Copy, Debug)]
pub struct Program {
    /// Its name: only a program of the same name can take over.
    pub name: &'static str,
    /// Its version, for the log.
    pub version: &'static str,
}

#[derive(Debug)]
struct Bell {
    stop: AtomicBool,
    bell: EventFd,
}

/// The socket to take over by, and its thread; dropped, both are gone.
#[derive(Debug)]
pub struct Giver {
    shared: Arc<Bell>,
    thread: Option<JoinHandle<()>>,
}

impl Giver {
    /// Waits on `listener` for somebody to hand `estate` to. Afterwards, with nothing left to serve, `given` is
    /// called, with an error if the new process has taken over and was not heard of again.
    pub fn start(
        mut listener: Listener,
        program: Program,
        estate: impl Estate,
        given: impl FnOnce(Result<(), TakeoverError>) + Send + 'static,
    ) -> io::Result<Giver> {
        let bell = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?;
        let shared = Arc::new(Bell { stop: AtomicBool::new(false), bell });
        let seen = Arc::clone(&shared);
        let builder = std::thread::Builder::new().name("control".into());
        let thread = confine::spawn(builder, Role::Session, move || {
            while !seen.stop.load(Ordering::Acquire) {
                match listener.accept(seen.bell.as_fd()) {
                    Ok(Accepted::FrontEnd(stream)) => match give(stream, program, &estate) {
                        Ok(heard) => return given(heard),
                        Err(e) => warn!("not handed over, going on: {e}"),
                    },
                    Ok(Accepted::Rung) => {}
                    Ok(Accepted::Never) => return,
                    Err(e) => {
                        warn!("cannot accept on the control socket: {e}");
                        std::thread::sleep(Duration::from_millis(200));
                    }
                }
            }
        })?;
        Ok(Giver { shared, thread: Some(thread) })
    }
}

impl Drop for Giver {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Release);
        // A full counter has rung.
        let _ = self.shared.bell.write(1);
        if let Some(thread) = self.thread.take() {
            // A panic there has been printed.
            let _ = thread.join();
        }
    }
}

/// Hands `estate` to whoever has connected. Any error means that they are served here as before; one inside, that they are
/// not, and perhaps nowhere.
fn give(
    stream: UnixStream,
    program: Program,
    estate: &impl Estate,
) -> Result<Result<(), TakeoverError>, TakeoverError> {
    let peer = Peer::of(&stream);
    let channel = Channel::new(stream)?;
    let outcome = channel.expect_user(false).and_then(|()| {
        let mut outcome = Err(TakeoverError::Gone);
        estate.with(&mut |lots| {
            let lots: Vec<&Lot> = lots.iter().filter(|lot| !lot.server.has_ended()).collect();
            outcome = greet(&channel, program, &lots).and_then(|()| hand_over(&channel, &peer, &lots));
        })?;
        outcome
    });
    if let Err(e) = &outcome {
        // The last message of all, to somebody who may be gone, or stuck.
        let _ = channel.send(&Answer::Refused(e.to_string()), &[], Instant::now());
    }
    outcome
}

fn greet(channel: &Channel, program: Program, lots: &[&Lot]) -> Result<(), TakeoverError> {
    let until = Instant::now() + GREETING;
    let (hello, _) = channel.receive(until, "greet")?;
    let Request::Hello { program: name, version } = hello else { return Err(unexpected(hello)) };
    if name != program.name {
        return Err(TakeoverError::Program { theirs: name, ours: program.name.into() });
    }
    info!("version {version} wants to take over from {}", program.version);
    let (name, version) = (name, program.version.into());
    channel.send(&Answer::Hello { program: name, version, exports: lots.len() as u32 }, &[], until)?;
    for lot in lots {
        let fds: Vec<_> = lot.fds.iter().map(AsFd::as_fd).collect();
        let export = Answer::Export { key: lot.key.clone(), about: lot.about.clone() };
        channel.send(&export, &fds, until)?;
    }
    fault_point::pass("giver-greeted");
    Ok(())
}

fn hand_over(
    channel: &Channel,
    peer: &Peer,
    lots: &[&Lot],
) -> Result<Result<(), TakeoverError>, TakeoverError> {
    let (ready, _) = channel.receive(Instant::now() + START, "start")?;
    let Request::Ready = ready else { return Err(unexpected(ready)) };
    let failed = |lot: &Lot, e| TakeoverError::Session(lot.key.clone(), e);

    // Whichever way this function is left, what is frozen thaws, unless it is told to leave.
    let frozen: Vec<(Freeze, &Lot)> = lots.iter().map(|&lot| (lot.server.freeze(), lot)).collect();
    let until = Instant::now() + PARK;
    for (freeze, lot) in &frozen {
        freeze.wait_parked(until).map_err(|e| failed(lot, e))?;
    }
    fault_point::pass("giver-parked");
    let begun = Instant::now();
    for (freeze, _) in &frozen {
        freeze.stop();
    }
    let until = begun + DRAIN;
    let snapshots = frozen.iter().map(|(freeze, lot)| freeze.snapshot(until).map_err(|e| failed(lot, e)));
    let snapshots = snapshots.collect::<Result<Vec<_>, _>>()?;
    let drained = begun.elapsed();
    fault_point::pass("giver-drained");

    let baton = Baton::new()?;
    let heard = send_all(channel, snapshots, &baton);
    match heard {
        // Not heard of, so perhaps not begun: whoever takes the baton serves.
        Err(e) if baton.take() => return Err(e),
        // It had begun, and nobody serves any more.
        Err(TakeoverError::Gone) => match peer.has_died().and_then(|()| reclaim(lots)) {
            Ok(()) => {
                for (freeze, _) in frozen {
                    freeze.start_over();
                }
                return Err(TakeoverError::Died);
            }
            Err(e) => warn!("cannot go on in the place of the new process: {e}"),
        },
        _ => {}
    }
    fault_point::pass("giver-heard");
    for (freeze, _) in frozen {
        freeze.leave();
    }
    fault_point::pass("giver-left");
    if heard.is_ok() {
        // It hangs up once it is in our place on the control socket. Had we left before, the next one would find nobody
        // there; or we might remove its socket for ours.
        let _ = channel.receive::<Request>(Instant::now() + FAREWELL, "take our place");
    }
    info!("handed over: drained in {drained:.1?}, the new process runs after {:.1?}", begun.elapsed());
    Ok(heard)
}

/// Sends everything and waits for the new process to run.
fn send_all(channel: &Channel, snapshots: Vec<Snapshot>, baton: &Baton) -> Result<(), TakeoverError> {
    let until = Instant::now() + TAKE;
    for snapshot in snapshots {
        let (state, fds) = snapshot.into_parts();
        let fds: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
        channel.send(&Answer::Server(Box::new(state)), &fds, until)?;
        fault_point::pass("giver-sent-one");
    }
    channel.send(&Answer::Baton, &[baton.as_fd()], until)?;
    fault_point::pass("giver-sent-all");
    match channel.receive(until, "run")?.0 {
        Request::Running => Ok(()),
        other => Err(unexpected(other)),
    }
}

/// Has all that a dead process has begun come to an end.
fn reclaim(lots: &[&Lot]) -> io::Result<()> {
    let one =
        |lot: &&Lot| lot.device.reclaim().map_err(|e| io::Error::new(e.kind(), format!("{}: {e}", lot.key)));
    lots.iter().try_for_each(one)
}

/// The process at the other end of a socket.
struct Peer(io::Result<OwnedFd>);

impl Peer {
    fn of(stream: &UnixStream) -> Peer {
        let find = || {
            let pid = getsockopt(stream, sockopt::PeerCredentials)?.pid();
            // Of another namespace it is 0.
            let pid = Pid::from_raw(pid).ok_or(nix::Error::ESRCH)?;
            io::Result::Ok(pidfd_open(pid, PidfdFlags::empty())?)
        };
        Peer(find())
    }

    /// Waits for its end: until then it may still serve, whatever has become of its socket.
    fn has_died(&self) -> io::Result<()> {
        let fd = self
            .0
            .as_ref()
            .map_err(|e| io::Error::new(e.kind(), format!("unknown whether it lives: {e}")))?;
        // Readable when all of its threads are gone (pidfd_open(2)).
        let mut wait = [PollFd::new(fd.as_fd(), PollFlags::POLLIN)];
        match poll(&mut wait, PollTimeout::try_from(DEATH).unwrap_or(PollTimeout::MAX))? {
            0 => Err(io::Error::other("it still lives")),
            _ => Ok(()),
        }
    }
}

fn unexpected(request: Request) -> TakeoverError {
    match request {
        Request::Failed(why) => TakeoverError::Failed(why),
        other => TakeoverError::Protocol(format!("{other:?} at this place")),
    }
}
