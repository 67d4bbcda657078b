//! Live upgrade, from the command line's side: `--control` and `--takeover`. What becomes of each device in a new process is
//! decided by its program; the order of steps is here, once.

use std::collections::HashMap;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use clap::Args;
use poll_engine::session::handover::Snapshot;
use poll_engine::session::listen::{ListenError, Listener};
use poll_engine::session::serve::Export;
use poll_engine::session::server::{Prepared, Server};
use poll_engine::takeover::TakeoverError;
use poll_engine::takeover::baton::Baton;
use poll_engine::takeover::give::{Estate, Giver, Lot, Program};
use poll_engine::takeover::take::{Offered, Taker};
use sd_notify::NotifyState;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use tracing::warn;

use crate::{Place, path_key};

/// How long getting ready may take while guests wait. The process that we take over from waits a little longer.
const READY: Duration = Duration::from_secs(4);

/// The options.
#[derive(Args, Clone, Debug, Default, Deserialize)]
#[group(id = "upgrade")] // programs have options of their own that are called so
#[serde(default, rename_all = "kebab-case")]
pub struct Options {
    /// Unix socket on which a newer version of this program can take over from this one (see --takeover)
    #[arg(long, value_name = "PATH")]
    pub control: Option<PathBuf>,

    /// Take over from the running program of this name whose --control is PATH, while its guests run: serves the same
    /// sockets, sessions and devices. If this one cannot start, the running one goes on
    #[arg(long, value_name = "PATH")]
    #[serde(skip)]
    pub takeover: Option<PathBuf>,
}

/// Why something is not taken over.
#[derive(Debug, thiserror::Error)]
pub enum ClaimError {
    /// The new process would drop it.
    #[error(
        "the running process serves something on {0}, and this one would not; add it to the options, or stop the running process first"
    )]
    Missing(String),
    /// It would be something else.
    #[error(
        "the running process serves {theirs} on {key}, and this one would serve {ours}; keep the options"
    )]
    Kind {
        /// Where.
        key: String,
        /// There.
        theirs: String,
        /// Here.
        ours: String,
    },
    /// Not what we understand.
    #[error("the running process describes what it serves on {0} in a way that this one does not know")]
    Unknown(String),
}

/// Something that another process serves, to be gone on with.
#[derive(Debug)]
pub struct Inherited<A> {
    /// Its place in what the running process has offered.
    pub place: usize,
    /// What it is.
    pub about: A,
    /// What has come with it.
    pub fds: Vec<OwnedFd>,
}

/// Finds for each of `keys` what the running process has offered there. All of it must be asked for.
pub fn claim<A: DeserializeOwned>(
    offered: Vec<Offered>,
    keys: &[String],
) -> Result<Vec<Option<Inherited<A>>>, ClaimError> {
    let mut there = HashMap::new();
    for (place, Offered { key, about, fds }) in offered.into_iter().enumerate() {
        let Ok(about) = serde_json::from_value(about) else { return Err(ClaimError::Unknown(key)) };
        there.insert(key, Inherited { place, about, fds });
    }
    let claimed = keys.iter().map(|key| there.remove(key)).collect();
    match there.into_keys().min() {
        Some(key) => Err(ClaimError::Missing(key)),
        None => Ok(claimed),
    }
}

/// Where front ends come from.
#[derive(Debug)]
pub enum Source {
    /// A socket of our own.
    Own(Listener),
    /// That of the process that we take over from, by its place there.
    Other(usize),
}

impl Source {
    /// The socket, ready for front ends; or that of what has been inherited from this place.
    pub fn of(place: &Place, inherited: Option<usize>) -> Result<Source, ListenError> {
        inherited.map_or_else(|| place.listen().map(Source::Own), |at| Ok(Source::Other(at)))
    }
}

/// Runs `serve` in the place of the process that `options` name, if they do, with what it has for each of `keys`. When that
/// fails, the other one goes on at once, and says why.
pub fn run<A: DeserializeOwned>(
    options: &Options,
    program: Program,
    keys: &[String],
    serve: impl FnOnce(&mut Heir, Vec<Option<Inherited<A>>>) -> Result<()>,
) -> Result<()> {
    let mut heir =
        Heir { options: options.clone(), program, taker: None, snapshots: Vec::new(), baton: None };
    let Some(path) = &options.takeover else {
        return serve(&mut heir, keys.iter().map(|_| None).collect());
    };
    let (taker, offered) = Taker::connect(path, program)?;
    heir.taker = Some(taker);
    let claimed = claim(offered, keys).map_err(anyhow::Error::from);
    let outcome = claimed.and_then(|inherited| serve(&mut heir, inherited));
    if let (Err(e), Some(taker)) = (&outcome, heir.taker) {
        taker.give_up(&format!("{e:#}"));
    }
    outcome
}

/// A process on its way to serving, in the place of another one or of none.
#[derive(Debug)]
pub struct Heir {
    options: Options,
    program: Program,
    taker: Option<Taker>,
    snapshots: Vec<Option<Snapshot>>,
    baton: Option<Baton>,
}

impl Heir {
    /// The socket on which a newer process can take over from this one: in the place of the one that we take over from, if it
    /// is the same.
    pub fn listen(&self) -> Result<Option<Listener>, ListenError> {
        let Some(path) = &self.options.control else { return Ok(None) };
        let same = |other: &Path| path_key(other) == path_key(path);
        if self.options.takeover.as_deref().is_some_and(same) {
            return Listener::bind_private_beside(path).map(Some);
        }
        Listener::bind_private(path).map(Some)
    }

    /// Whether it is in the place of another one.
    pub fn is_one(&self) -> bool {
        self.options.takeover.is_some()
    }

    /// Has the other process stop: guests wait from here on. Everything that can be wrong here must have been found out.
    pub fn ask(&mut self) -> Result<(), TakeoverError> {
        if let Some(taker) = &self.taker {
            let (snapshots, baton) = taker.ask()?;
            self.snapshots = snapshots.into_iter().map(Some).collect();
            self.baton = Some(baton);
        }
        Ok(())
    }

    /// Prepares to serve.
    pub fn prepare(
        &mut self,
        export: Export,
        source: Source,
        ended: impl FnOnce() + Send + 'static,
    ) -> Result<Prepared> {
        let prepared = match source {
            Source::Own(listener) => Server::prepare(export, listener, ended),
            Source::Other(place) => {
                let snapshot = self.snapshots.get_mut(place).and_then(Option::take);
                Server::resume(export, snapshot.context("a state of the running process is missing")?, ended)
            }
        };
        prepared.context("cannot start a control thread")
    }

    /// Serves, when all are ready, and nobody else does any more. Afterwards nothing may fail.
    pub fn go<'k>(
        &mut self,
        prepared: impl IntoIterator<Item = (&'k Place, Prepared)>,
    ) -> Result<Vec<Arc<Server>>> {
        let until = Instant::now() + READY;
        let mut ready = Vec::new();
        for (place, server) in prepared {
            server.wait_ready(until).with_context(|| place.key())?;
            ready.push(server);
        }
        if let (Some(taker), Some(baton)) = (&self.taker, self.baton.take()) {
            taker.seize(baton)?;
        }
        Ok(ready.into_iter().map(|server| Arc::new(server.go())).collect())
    }

    /// Says to the other process and to the service manager that this one serves, and waits on `control` for the next, which
    /// gets what `estate` makes; `successor` has `over` called when that has taken over.
    pub fn settle<E: Estate>(
        &mut self,
        successor: &Successor,
        control: Option<Listener>,
        estate: impl Fn() -> E + Send + 'static,
        over: impl Fn() + Send + Sync + 'static,
    ) {
        let taker = self.taker.take();
        let taken_over = taker.as_ref().map(Taker::running).is_some();
        let (program, given, over) = (self.program, Arc::clone(&successor.0), Arc::new(over));
        successor.prepare(Box::new(move |listener| {
            let (given, over) = (Arc::clone(&given), Arc::clone(&over));
            Giver::start(listener, program, estate(), move |outcome| {
                given.give(outcome);
                over();
            })
        }));
        if let Some(mut listener) = control {
            let start = || {
                if let (Some(path), true) = (&self.options.control, self.options.takeover.is_some()) {
                    listener.replace(path)?;
                }
                successor.start(listener)
            };
            start().unwrap_or_else(|e| warn!("nobody can take over from this process: {e:#}"));
        }
        // Taken over, the service has another main process now.
        let main = taken_over.then(|| NotifyState::MainPid(std::process::id()));
        // Nobody to notify is the usual case.
        let _ = sd_notify::notify(&main.into_iter().chain([NotifyState::Ready]).collect::<Vec<_>>());
        // The other process may leave now: whoever is next comes to us.
        drop(taker);
    }
}

type Wait = Box<dyn Fn(Listener) -> io::Result<Giver> + Send>;

/// The process that may take over from this one, on a socket that was there from the start or is when somebody asks.
#[derive(Clone, Default)]
pub struct Successor(Arc<Awaited>);

#[derive(Default)]
struct Awaited {
    /// How to wait for it on a socket, as long as there is something to be handed over.
    wait: Mutex<Option<Wait>>,
    /// Where it is waited for.
    giver: Mutex<Option<(PathBuf, Giver)>>,
    given: Mutex<Option<Result<(), TakeoverError>>>,
}

impl Awaited {
    fn give(&self, outcome: Result<(), TakeoverError>) {
        *locked(&self.given) = Some(outcome);
    }
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Successor {
    fn prepare(&self, wait: Wait) {
        *locked(&self.0.wait) = Some(wait);
    }

    fn start(&self, listener: Listener) -> Result<()> {
        let path = listener.path().context("no socket of its own")?.to_owned();
        let wait = locked(&self.0.wait);
        let giver = wait.as_ref().context("the daemon is starting, or stopping")?(listener)?;
        *locked(&self.0.giver) = Some((path, giver));
        Ok(())
    }

    /// Waits for it from now on, beside the socket of the API, unless it is waited for already: where.
    pub fn expect_beside(&self, api: Option<&Path>) -> Result<PathBuf> {
        if let Some(path) = self.expected_at() {
            return Ok(path);
        }
        let mut path = api.context("no --api")?.as_os_str().to_owned();
        path.push(".takeover");
        self.start(Listener::bind_private(Path::new(&path))?)?;
        Ok(path.into())
    }

    /// Where it is waited for, if it is.
    pub fn expected_at(&self) -> Option<PathBuf> {
        locked(&self.0.giver).as_ref().map(|(path, _)| path.clone())
    }

    /// This process is to end: waits for what may be in the middle of being handed over, and tells the service manager if
    /// nobody goes on.
    pub fn bid_farewell(&self) {
        drop(locked(&self.0.wait).take());
        let giver = locked(&self.0.giver).take();
        drop(giver);
        if locked(&self.0.given).is_none() {
            let _ = sd_notify::notify(&[NotifyState::Stopping]);
        }
    }

    /// How it has ended: an error if another process has taken over and was not heard of again.
    pub fn outcome(&self) -> Result<()> {
        match locked(&self.0.given).take() {
            Some(Err(e)) => {
                Err(anyhow::Error::from(e).context("handed over to a process that was not heard of again"))
            }
            _ => Ok(()),
        }
    }
}

/// A [`Lot`] of something that is served at `key`.
pub fn lot(
    key: String,
    about: &impl Serialize,
    fds: Vec<OwnedFd>,
    server: &Arc<Server>,
    device: Arc<dyn poll_engine::device::Device>,
) -> Result<Lot> {
    Ok(Lot { key, about: serde_json::to_value(about)?, fds, server: Arc::clone(server), device })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn offered(key: &str) -> Offered {
        Offered { key: key.into(), about: serde_json::json!(7), fds: Vec::new() }
    }

    #[test]
    fn what_is_served_is_found_by_its_place_and_none_is_dropped() {
        let keys = ["/b", "/new", "/a"].map(String::from);
        let found = claim::<u32>(vec![offered("/a"), offered("/b")], &keys).unwrap();
        let places: Vec<_> = found.iter().map(|f| f.as_ref().map(|f| f.place)).collect();
        assert_eq!(places, [Some(1), None, Some(0)]);
        let missing = claim::<u32>(vec![offered("/a"), offered("/c")], &keys).unwrap_err();
        assert!(matches!(&missing, ClaimError::Missing(key) if key == "/c"), "{missing}");
        let odd = Offered { about: serde_json::json!("tape"), ..offered("/a") };
        assert!(matches!(claim::<u32>(vec![odd], &keys), Err(ClaimError::Unknown(_))));
    }
}
