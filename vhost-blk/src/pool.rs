//! Clones that are made before they are wanted: some of each base are kept beside it, and whoever wants one takes it by
//! giving it another name. A thread of its own makes up for those that were taken.

use std::io;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use tracing::{info, warn};

use crate::clone::{Base, put, settle};

/// Most clones that are kept of a base.
const MAX: u16 = 1024;
/// How long after a failure the next try is.
const AGAIN: Duration = Duration::from_secs(10);

/// A pool as it is asked for: `[FORMAT:]PATH:N`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PoolSpec {
    /// Of what.
    pub base: Base,
    /// How many clones are kept ready.
    pub count: u16,
}

impl FromStr for PoolSpec {
    type Err = String;

    fn from_str(s: &str) -> Result<PoolSpec, String> {
        let (base, count) = s.rsplit_once(':').ok_or("a pool is written BASE:COUNT, such as base.qcow2:8")?;
        let count = count.parse().ok().filter(|n| (1..=MAX).contains(n));
        let count =
            count.ok_or(format!("a pool has 1 to {MAX} clones; write BASE:COUNT, such as base.qcow2:8"))?;
        Ok(PoolSpec { base: base.parse()?, count })
    }
}

impl PoolSpec {
    /// Where the clones are kept: beside their base, by number.
    fn place(&self, number: u16) -> PathBuf {
        let mut name = self.base.path.as_os_str().to_owned();
        name.push(format!(".pool-{number}"));
        name.into()
    }
}

/// How a pool is.
#[derive(Clone, Debug)]
pub struct State {
    /// As it was asked for.
    pub spec: PoolSpec,
    /// Which of its clones are there.
    ready: Vec<bool>,
}

impl State {
    /// How many clones are ready.
    pub fn ready(&self) -> usize {
        self.ready.iter().filter(|ready| **ready).count()
    }
}

#[derive(Debug, Default)]
struct Shared {
    pools: Mutex<(Vec<State>, bool)>,
    changed: Condvar,
}

/// All pools of a process.
#[derive(Debug, Default)]
pub struct Pools {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl Shared {
    fn locked(&self) -> MutexGuard<'_, (Vec<State>, bool)> {
        self.pools.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Something that is missing, once it is; nothing when there is to be an end.
    fn missing(&self) -> Option<(PoolSpec, u16)> {
        let mut guard = self.locked();
        loop {
            let (pools, is_over) = &*guard;
            if *is_over {
                return None;
            }
            let missing =
                |state: &State| Some((state.spec.clone(), state.ready.iter().position(|r| !r)? as u16));
            if let Some(found) = pools.iter().find_map(missing) {
                return Some(found);
            }
            guard = self.changed.wait(guard).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn note(&self, spec: &PoolSpec, number: u16, ready: bool) {
        if let Some(state) = self.locked().0.iter_mut().find(|state| state.spec == *spec) {
            state.ready[usize::from(number)] = ready;
        }
    }

    fn fill(&self) {
        let mut failed = false;
        while let Some((spec, number)) = self.missing() {
            let path = spec.place(number);
            // One from before is as good as new: nobody has used it under this name.
            let made = if path.exists() { spec.base.expect_below(&path) } else { spec.base.clone_to(&path) };
            match made {
                Ok(()) => {
                    self.note(&spec, number, true);
                    failed = false;
                }
                Err(e) => {
                    if !std::mem::replace(&mut failed, true) {
                        warn!("the pool of {} is not full: {e:#} (tried again every {AGAIN:?})", spec.base);
                    }
                    let guard = self.locked();
                    let waited = self.changed.wait_timeout_while(guard, AGAIN, |(_, is_over)| !*is_over);
                    drop(waited.unwrap_or_else(PoisonError::into_inner));
                }
            }
        }
    }
}

impl Pools {
    /// Keeps these from now on.
    pub fn start(specs: &[PoolSpec]) -> io::Result<Pools> {
        let ready = |spec: &PoolSpec| vec![false; usize::from(spec.count)];
        let states: Vec<_> =
            specs.iter().map(|spec| State { spec: spec.clone(), ready: ready(spec) }).collect();
        if states.is_empty() {
            return Ok(Pools::default());
        }
        let shared = Arc::new(Shared { pools: Mutex::new((states, false)), changed: Condvar::new() });
        let of_thread = Arc::clone(&shared);
        let thread = std::thread::Builder::new().name("pool".into()).spawn(move || of_thread.fill())?;
        Ok(Pools { shared, thread: Some(thread) })
    }

    /// All.
    pub fn states(&self) -> Vec<State> {
        self.shared.locked().0.clone()
    }

    /// Makes a clone at `path`, where nothing is: of those that are ready, if there is one.
    pub fn clone_to(&self, base: &Base, path: &Path) -> anyhow::Result<()> {
        if self.take(base, path) {
            return Ok(settle(path)?);
        }
        base.clone_to(path)
    }

    fn take(&self, base: &Base, path: &Path) -> bool {
        let mut guard = self.shared.locked();
        let Some(state) = guard.0.iter_mut().find(|state| state.spec.base == *base) else { return false };
        while let Some(number) = state.ready.iter().rposition(|ready| *ready) {
            // Whether it can be had or not, it is looked at again.
            state.ready[number] = false;
            self.shared.changed.notify_all();
            match put(&state.spec.place(number as u16), path) {
                Ok(()) => return true,
                Err(e) if e.kind() == io::ErrorKind::NotFound => {}
                // On another file system, say, or there is something already.
                Err(e) => {
                    info!("{}: not taken from the pool of {base}: {e}", path.display());
                    return false;
                }
            }
        }
        false
    }
}

impl Drop for Pools {
    fn drop(&mut self) {
        self.shared.locked().1 = true;
        self.shared.changed.notify_all();
        if let Some(thread) = self.thread.take() {
            // Its panics were told by the hook.
            let _ = thread.join();
        }
    }
}
