//! Queues that move between reactors, and reactors that end: what all daemons do alike.

use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use poll_engine::engine::{Engine, Retiring};
use poll_engine::session::server::{AskError, Server};
use poll_engine::stats::QueueStats;
use serde::Deserialize;
use tracing::info;
use utoipa::ToSchema;

use crate::refused::Refused;

/// How long a reactor that ends may take to get rid of its queues.
const DRAIN: Duration = Duration::from_secs(30);
/// How often to look meanwhile.
const LOOK: Duration = Duration::from_millis(2);

/// A place for queues.
#[derive(Clone, Copy, Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Placed {
    /// The number of the reactor.
    pub reactor: usize,
    /// The queue; without it, all of them.
    #[serde(default)]
    #[schema(maximum = 65535)]
    pub queue: Option<u16>,
}

impl Placed {
    /// The queues of `key`, which has so many, that are to move. Fails without such a reactor or queue.
    fn queues(&self, engine: &Engine, key: &str, count: usize) -> Result<Range<u16>, Refused> {
        let Placed { reactor, queue } = *self;
        if engine.list().iter().all(|r| r.number != reactor) {
            let why = format!("there is no reactor {reactor}; GET /v1/reactors lists those there are");
            return Err(Refused::Wrong(Some("reactor"), why));
        }
        let count = count as u16;
        match queue {
            Some(queue) if queue >= count => {
                let why = format!("{key} has queues 0 to {}, and no {queue}", count - 1);
                Err(Refused::Wrong(Some("queue"), why))
            }
            queue => Ok(queue.map_or(0..count, |queue| queue..queue + 1)),
        }
    }
}

/// Something that is served, whose queues can move.
pub trait Movable {
    /// What it is known by.
    fn key(&self) -> &str;
    /// Counters of its queues.
    fn stats(&self) -> &[Arc<QueueStats>];
    /// What serves it.
    fn server(&self) -> &Server;
    /// Has these queues on this reactor when they start next.
    fn want_on(&self, queues: Range<u16>, reactor: usize);
    /// Stops its queues, and starts them where they are wanted.
    fn restart(&self) -> Result<(), AskError> {
        self.server().restart_queues()
    }

    /// Moves a queue, or all of them, to a reactor.
    fn place(&self, engine: &Engine, at: Placed) -> Result<(), Refused> {
        let queues = at.queues(engine, self.key(), self.stats().len())?;
        self.want_on(queues, at.reactor);
        Ok(self.restart()?)
    }

    /// Has its queues take nothing and answer nothing, or go on.
    fn set_paused(&self, paused: bool) -> Result<(), Refused> {
        self.server().set_paused(paused)?;
        info!("{} {}", self.key(), if paused { "is paused" } else { "goes on" });
        Ok(())
    }
}

/// Fails if one of them is paused, which a newer process would not know.
pub fn expect_none_paused<T: Movable>(all: &[Arc<T>]) -> io::Result<()> {
    match all.iter().find(|one| one.server().is_paused()) {
        Some(paused) => Err(io::Error::other(format!("{} is paused; resume it first", paused.key()))),
        None => Ok(()),
    }
}

/// Has the queues on a reactor that is to end move to others. It stays if they do not.
pub fn move_away<T: Movable>(
    engine: &Engine,
    retiring: Retiring,
    all: impl Fn() -> Vec<Arc<T>>,
) -> Result<Retiring, Refused> {
    let number = retiring.number();
    let until = Instant::now() + DRAIN;
    let moved = || {
        while retiring.queues() > 0 {
            for one in all() {
                let is_there = one.stats().iter().any(|queue| queue.reactor() == Some(number));
                // One that has ended has no queues.
                match if is_there { one.restart() } else { Ok(()) } {
                    Ok(()) | Err(AskError::Ended) => {}
                    Err(e) => return Err(format!("{}: {e}", one.key())),
                }
            }
            if Instant::now() > until {
                return Err("its queues do not leave it".into());
            }
            std::thread::sleep(LOOK);
        }
        Ok(())
    };
    match moved() {
        Ok(()) => Ok(retiring),
        Err(why) => {
            engine.keep(retiring);
            Err(Refused::Conflict(format!("reactor {number} stays: {why}")))
        }
    }
}
