//! Post-copy migration: the guest comes first, and each page of its memory when somebody touches it, or later. A page
//! that is touched too early holds up who touches it until the front end has it (qemu, docs/interop/vhost-user.rst,
//! "Migration": `VHOST_USER_POSTCOPY_ADVISE`, `_LISTEN`, `_END`).
//!
//! Until all has come, the queues run on a reactor of their own: what they wait for, their neighbours need not. A front
//! end that goes away takes with it whoever could bring a page, so a thread watches for that: whoever waits, the control
//! thread included, is told by an error.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, poll};
use tracing::{info, warn};

use super::serve::{ActionError, Served};
use super::server::Orders;
use crate::confine::{self, Role};
use crate::engine::pacing::Pacing;
use crate::engine::{Engine, EngineConfig, EngineError};
use crate::memory::map::MemoryError;
use crate::memory::userfault::Userfault;
use crate::memory::{MemoryMap, Region, RegionSpec};
use crate::sync::Bell;
use crate::uring::FixedBuffers;

/// How long requests may wait for pages of a front end that is still there, once we are to stop.
const PATIENCE: Duration = Duration::from_secs(10);
/// How often it is looked whether we are to stop, in milliseconds.
const LOOK: u16 = 100;

/// Why a guest cannot come before its memory.
#[derive(Debug, thiserror::Error)]
pub(super) enum PostCopyError {
    #[error("post-copy: {0}")]
    Io(#[from] io::Error),
    #[error("post-copy: {0}")]
    Engine(#[from] EngineError),
    #[error("post-copy cannot begin: guest memory is mapped already")]
    Mapped,
    #[error("post-copy has not begun")]
    Off,
}

/// What there is while a guest comes before its memory.
pub(super) struct PostCopy {
    late: Arc<Late>,
    listening: Option<Listening>,
}

struct Listening {
    /// Before the reactor: a queue that is to stop may wait for a page.
    _watcher: Watcher,
    engine: Engine,
    /// Mapped, and not yet to be touched: the front end does not know where it is.
    pending: Option<MemoryMap>,
}

/// The memory that comes late.
struct Late {
    faults: Userfault,
    state: Mutex<LateState>,
}

#[derive(Default)]
struct LateState {
    regions: Vec<Arc<Region>>,
    given_up: bool,
}

impl Late {
    fn state(&self) -> MutexGuard<'_, LateState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn expect(&self, regions: &[Arc<Region>]) -> io::Result<()> {
        let mut state = self.state();
        if state.given_up {
            return Err(io::Error::other("the front end is gone"));
        }
        for region in regions {
            region.come_late(&self.faults)?;
            state.regions.push(Arc::clone(region));
        }
        Ok(())
    }

    /// Forgets what is in neither of these maps, and is waited for by nobody.
    fn keep(&self, maps: [Option<&MemoryMap>; 2]) {
        let has =
            |map: &MemoryMap, region: &Arc<Region>| map.regions().iter().any(|r| Arc::ptr_eq(r, region));
        self.state().regions.retain(|region| maps.iter().flatten().any(|map| has(map, region)));
    }

    /// No page comes any more.
    fn give_up(&self) {
        let mut state = self.state();
        state.given_up = true;
        for region in state.regions.drain(..) {
            if let Err(e) = region.give_up(&self.faults) {
                warn!("memory that does not come any more cannot be given up: {e}");
            }
        }
    }

    fn has_come(&self) -> io::Result<()> {
        let mut state = self.state();
        state.regions.iter().try_for_each(|region| region.has_come(&self.faults))?;
        state.regions.clear();
        Ok(())
    }
}

/// A thread that gives up on pages when nobody brings them any more.
struct Watcher {
    over: Arc<Bell>,
    thread: Option<JoinHandle<()>>,
}

impl Watcher {
    fn start(late: Arc<Late>, stream: OwnedFd, orders: Arc<Orders>) -> io::Result<Watcher> {
        let over = Arc::new(Bell::new()?);
        let bell = Arc::clone(&over);
        let builder = std::thread::Builder::new().name("post-copy".into()).stack_size(64 << 10);
        let thread = confine::spawn(builder, Role::Session, move || {
            if !all_comes(&stream, &bell, &orders) {
                late.give_up();
            }
        })?;
        Ok(Watcher { over, thread: Some(thread) })
    }
}

impl Drop for Watcher {
    fn drop(&mut self) {
        self.over.ring();
        if let Some(thread) = self.thread.take() {
            // A panic there has been printed.
            let _ = thread.join();
        }
    }
}

/// Waits until it is over; false when the front end has left before, or lets us wait too long when we are to stop.
fn all_comes(stream: &OwnedFd, over: &Bell, orders: &Orders) -> bool {
    let mut stop_by = None;
    loop {
        let hang_up = PollFlags::from_bits_retain(libc::POLLRDHUP);
        let mut waits = [PollFd::new(stream.as_fd(), hang_up), PollFd::new(over.fd(), PollFlags::POLLIN)];
        match poll(&mut waits, LOOK) {
            Ok(_) | Err(nix::Error::EINTR) => {}
            Err(e) => warn!("post-copy: cannot watch the front end: {e}"),
        }
        // Bits that nix does not know count as well.
        let [gone, over] = waits.map(|w| w.any().unwrap_or(true));
        if over {
            return true;
        }
        if gone {
            return false;
        }
        if orders.is_stopping() {
            let by = *stop_by.get_or_insert_with(|| Instant::now() + PATIENCE);
            if Instant::now() > by {
                return false;
            }
        }
    }
}

impl Served<'_> {
    /// Makes the userfaultfd that goes with the reply.
    pub(super) fn advise(&mut self) -> Result<(), PostCopyError> {
        let faults = Userfault::new()?;
        self.reply_fd = Some(faults.as_fd().try_clone_to_owned()?);
        self.postcopy =
            Some(PostCopy { late: Arc::new(Late { faults, state: Mutex::default() }), listening: None });
        Ok(())
    }

    /// Memory comes late from now on.
    pub(super) fn listen(&mut self) -> Result<(), PostCopyError> {
        if !self.map.regions().is_empty() {
            return Err(PostCopyError::Mapped);
        }
        let postcopy = self.postcopy.as_mut().ok_or(PostCopyError::Off)?;
        let engine = Engine::start(&EngineConfig {
            pacing: Pacing::Event,
            // To register memory is to have all of it.
            fixed_buffers: FixedBuffers::Off,
            ..EngineConfig::default()
        })?;
        let stream = self.connection.parts().0.as_fd().try_clone_to_owned()?;
        let watcher = Watcher::start(Arc::clone(&postcopy.late), stream, Arc::clone(&self.orders))?;
        postcopy.listening = Some(Listening { _watcher: watcher, engine, pending: None });
        info!("{}: its guest comes before its memory", self.export.name);
        Ok(())
    }

    fn listening(&mut self) -> Option<&mut Listening> {
        self.postcopy.as_mut().and_then(|p| p.listening.as_mut())
    }

    /// What runs the queues.
    pub(super) fn engine(&self) -> &Engine {
        let listening = self.postcopy.as_ref().and_then(|p| p.listening.as_ref());
        listening.map_or(&*self.export.engine, |l| &l.engine)
    }

    /// Has new memory come late, if all does: false if not. Where it is mapped is the next reply.
    pub(super) fn expect_pages(&mut self, regions: &[Arc<Region>]) -> Result<bool, PostCopyError> {
        let Some(PostCopy { late, listening: Some(_) }) = &self.postcopy else { return Ok(false) };
        late.expect(regions)?;
        let ours = |r: &Arc<Region>| RegionSpec { user_addr: r.host_addr().addr() as u64, ..*r.spec() };
        self.mapped = regions.iter().map(ours).collect();
        Ok(true)
    }

    /// The memory table as the front end has it.
    pub(super) fn next_map(&self) -> &MemoryMap {
        let listening = self.postcopy.as_ref().and_then(|p| p.listening.as_ref());
        listening.and_then(|l| l.pending.as_ref()).unwrap_or(&self.map)
    }

    /// Keeps a memory table until the front end sees to its faults.
    pub(super) fn set_pending(&mut self, map: MemoryMap) {
        if let Some(listening) = self.listening() {
            listening.pending = Some(map);
        }
    }

    /// The front end sees to the faults of all memory it has been told of.
    pub(super) fn adopt_pending(&mut self) {
        let Some(map) = self.listening().and_then(|l| l.pending.take()) else { return };
        let stays = |r: &Arc<Region>| map.regions().iter().any(|new| Arc::ptr_eq(r, new));
        if self.map.regions().iter().all(stays) {
            self.extend_memory(map);
        } else {
            self.replace_memory(map);
        }
        self.forget_pages();
    }

    /// Removes a region at once: the front end does not wait to be told.
    pub(super) fn remove_late_memory(&mut self, spec: &RegionSpec) -> Result<(), MemoryError> {
        let without = self.map.without(spec);
        if let Some(listening) = self.listening()
            && let Some(pending) = &listening.pending
        {
            listening.pending = Some(pending.without(spec)?);
        } else if let Err(e) = without {
            return Err(e);
        }
        if let Ok(map) = without {
            self.replace_memory(map);
        }
        self.forget_pages();
        Ok(())
    }

    fn forget_pages(&self) {
        if let Some(PostCopy { late, listening }) = &self.postcopy {
            late.keep([Some(&self.map), listening.as_ref().and_then(|l| l.pending.as_ref())]);
        }
    }

    /// All memory has come: the queues go back to where the others run.
    pub(super) fn end_postcopy(&mut self) -> Result<(), ActionError> {
        if let Some(PostCopy { late, listening: Some(_) }) = &self.postcopy {
            late.has_come().map_err(PostCopyError::from)?;
            self.pause().map_err(PostCopyError::from)?;
            self.postcopy = None;
            self.go_on();
            info!("{}: all memory of its guest has come", self.export.name);
        }
        self.postcopy = None;
        Ok(())
    }

    /// No page comes any more: whoever waits for one is told.
    pub(super) fn give_up_pages(&self) {
        if let Some(PostCopy { late, listening: Some(_) }) = &self.postcopy {
            late.give_up();
        }
    }
}
