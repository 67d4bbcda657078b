//! Why a daemon does not do what it is told, and whose turn it is to tell it something.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError, TryLockError};

use poll_engine::engine::{EngineError, RetireError};
use poll_engine::session::server::AskError;

use crate::problem::Problem;

/// Why something is not done.
#[derive(Debug, thiserror::Error)]
pub enum Refused {
    /// There is nothing of this name.
    #[error("{0}")]
    Missing(String),
    /// What is asked for cannot be; the key that it is about.
    #[error("{1}")]
    Wrong(Option<&'static str>, String),
    /// Not as things are.
    #[error("{0}")]
    Conflict(String),
}

impl From<AskError> for Refused {
    fn from(e: AskError) -> Refused {
        Refused::Conflict(e.to_string())
    }
}

impl From<&anyhow::Error> for Refused {
    fn from(e: &anyhow::Error) -> Refused {
        Refused::Conflict(format!("{e:#}"))
    }
}

impl From<EngineError> for Refused {
    fn from(e: EngineError) -> Refused {
        match e {
            EngineError::NoCpu { .. } => Refused::Wrong(Some("cpu"), e.to_string()),
            EngineError::Reactor(_) => Refused::Conflict(e.to_string()),
        }
    }
}

impl From<RetireError> for Refused {
    fn from(e: RetireError) -> Refused {
        match e {
            RetireError::Unknown(_) => {
                Refused::Missing(format!("{e}; GET /v1/reactors lists those there are"))
            }
            RetireError::Last => Refused::Conflict(e.to_string()),
        }
    }
}

impl From<Refused> for Problem {
    fn from(refused: Refused) -> Problem {
        let why = refused.to_string();
        match refused {
            Refused::Missing(_) => Problem::missing(why),
            Refused::Wrong(None, _) => Problem::bad(why),
            Refused::Wrong(Some(key), _) => Problem::bad(why).at(key),
            Refused::Conflict(_) => Problem::conflict(why),
        }
    }
}

/// Held while something changes, and while all is handed over to a newer process.
#[derive(Debug, Default)]
pub struct Changes {
    turn: Mutex<()>,
    stopping: AtomicBool,
}

impl Changes {
    /// Nothing else changes while this is held.
    pub fn begin(&self) -> Result<MutexGuard<'_, ()>, Refused> {
        if self.stopping.load(Ordering::Acquire) {
            return Err(Refused::Conflict("the daemon is stopping".into()));
        }
        match self.turn.try_lock() {
            Ok(guard) => Ok(guard),
            Err(TryLockError::Poisoned(e)) => Ok(e.into_inner()),
            Err(TryLockError::WouldBlock) => {
                Err(Refused::Conflict("a newer process is taking over from this one; ask that one".into()))
            }
        }
    }

    /// The same, waiting for whatever changes now.
    pub fn wait(&self) -> MutexGuard<'_, ()> {
        self.turn.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Nothing changes any more.
    pub fn stop(&self) {
        self.stopping.store(true, Ordering::Release);
    }
}
