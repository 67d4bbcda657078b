//! The service manager's watchdog (sd_notify(3), `WatchdogSec=`): told that all is well for as long as every reactor
//! turns, and not when this program merely runs.

use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::sync::{Arc, Weak};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result};
use poll_engine::engine::Engine;
use sd_notify::NotifyState;
use tracing::{info, warn};

/// A thread that looks after the reactors. Dropped, it looks no more.
#[derive(Debug)]
pub struct Watchdog {
    stop: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Watchdog {
    /// Looks after the reactors of `engine`, if the service manager wants that. A process that has taken over is watched in
    /// the place of the one that was started.
    pub fn start(engine: &Arc<Engine>, taken_over: bool) -> Result<Option<Watchdog>> {
        let Some(limit) = wanted(taken_over) else { return Ok(None) };
        let engine = Arc::downgrade(engine);
        let (stop, stopped) = mpsc::channel();
        // The answer may be as late as the next question, and is still in time.
        let every = limit / 3;
        let look = move || {
            let mut was_well = true;
            while let Err(RecvTimeoutError::Timeout) = stopped.recv_timeout(every) {
                let is_well = Weak::upgrade(&engine).is_none_or(|engine| engine.turns(every));
                if is_well {
                    let _ = sd_notify::notify(&[NotifyState::Watchdog]);
                } else if was_well {
                    warn!(
                        "a reactor has not turned for {every:?}; the service manager is not told that all is well"
                    );
                }
                was_well = is_well;
            }
        };
        let thread = std::thread::Builder::new().name("watchdog".into()).spawn(look);
        info!("the service manager hears every {every:?} that reactors turn");
        let thread = thread.context("cannot start the watchdog's thread")?;
        Ok(Some(Watchdog { stop: Some(stop), thread: Some(thread) }))
    }
}

impl Drop for Watchdog {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            // A panic there has been printed.
            let _ = thread.join();
        }
    }
}

fn wanted(taken_over: bool) -> Option<Duration> {
    if !taken_over {
        return sd_notify::watchdog_enabled();
    }
    // WATCHDOG_PID is another's.
    let micros = std::env::var("WATCHDOG_USEC").ok()?.parse().ok()?;
    Some(Duration::from_micros(micros))
}
