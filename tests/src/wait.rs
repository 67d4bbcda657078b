//! Waiting with a deadline.

use std::io::{Error, ErrorKind};
use std::time::{Duration, Instant};

use anyhow::{Result, bail};

/// Calls `probe` every few milliseconds until it yields a value; fails after `limit`, naming `what`.
pub fn until<T>(what: &str, limit: Duration, mut probe: impl FnMut() -> Result<Option<T>>) -> Result<T> {
    let deadline = Instant::now() + limit;
    loop {
        if let Some(value) = probe()? {
            return Ok(value);
        }
        if Instant::now() >= deadline {
            bail!("{what}: not within {limit:?}");
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Whether a read with a time-out has brought nothing yet, rather than failed. A process that was stopped and continued, with
/// its machine or by its shell, is interrupted in such a read without having had a signal (signal(7)).
pub fn goes_on(error: &Error) -> bool {
    matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut | ErrorKind::Interrupted)
}
