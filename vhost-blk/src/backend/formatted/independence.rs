//! How far an image is on its way to be [flattened](super::flatten), and who may take the next step.
//!
//! A thread of the process takes a piece at a time, and holds the image still only for that. When all is copied, the image
//! has to be opened anew without those below: at a moment when no queue has it. So queues are restarted, and the first that
//! comes back does it.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use tracing::warn;

use super::chain::{self, ChainError};
use super::{Format, Formatted, Running, flatten};

/// How long one queue waits for the others to be gone.
const PATIENCE: Duration = Duration::from_millis(500);
const LOOK: Duration = Duration::from_micros(200);

/// Where an image is.
#[derive(Debug, Default)]
pub(super) struct Independence {
    under_way: AtomicBool,
    copied: AtomicU64,
    /// All is copied: whoever finds no queue that has the image opens it anew.
    is_due: AtomicBool,
}

/// How far it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Flattening {
    /// Bytes of the disk that were looked at.
    pub copied: u64,
    /// Bytes of the disk.
    pub bytes: u64,
}

/// Why an image is not flattened.
#[derive(Debug, thiserror::Error)]
pub enum StepError {
    /// It is not for us to say.
    #[error(
        "its guest, or its process, has gone elsewhere; flatten it there, which goes on where this stopped"
    )]
    Stopped,
    /// It cannot be.
    #[error("it {0}")]
    Impossible(&'static str),
    /// It is being done.
    #[error("it is being flattened already")]
    UnderWay,
    /// Its files.
    #[error(transparent)]
    Chain(#[from] ChainError),
    /// Its storage.
    #[error("{0}")]
    Io(#[from] io::Error),
}

impl Formatted {
    /// The image below it, if there is one, and its format.
    pub fn backing(&self) -> Result<Option<(PathBuf, Format)>, ChainError> {
        if self.format != Format::Qcow2 {
            return Ok(None);
        }
        let header = chain::header(&self.top()?)?;
        let Some(name) = &header.backing_file else { return Ok(None) };
        let format = chain::backing_format(&self.path, name, &header)?;
        Ok(Some((chain::beside(&self.path, name), format)))
    }

    /// How far it is on its way to need nothing below it, if it is on its way.
    pub fn flattening(&self) -> Option<Flattening> {
        let Independence { under_way, copied, .. } = &self.independence;
        let bytes = self.running().as_ref().map_or(0, |running| running.size());
        under_way
            .load(Ordering::Acquire)
            .then(|| Flattening { copied: copied.load(Ordering::Relaxed), bytes })
    }

    /// Begins to make it independent of what is below. [`flatten_piece`](Self::flatten_piece) does it.
    pub fn begin_flatten(&self) -> Result<(), StepError> {
        if self.format != Format::Qcow2 || self.how.read_only {
            return Err(StepError::Impossible("cannot be written to"));
        }
        let header = chain::header(&self.top()?)?;
        if header.backing_file.is_none() {
            return Err(StepError::Impossible("has no image below it"));
        }
        if let Some(obstacle) = flatten::obstacle(&header) {
            return Err(StepError::Impossible(obstacle));
        }
        if self.independence.under_way.swap(true, Ordering::AcqRel) {
            return Err(StepError::UnderWay);
        }
        self.independence.copied.store(0, Ordering::Relaxed);
        Ok(())
    }

    /// Copies up another piece; false when nothing is left to be copied.
    pub fn flatten_piece(&self) -> Result<bool, StepError> {
        // Nobody gives the image away meanwhile.
        let running = self.running();
        let Independence { under_way, copied, .. } = &self.independence;
        let Some(running) = running.as_ref().filter(|_| under_way.load(Ordering::Acquire)) else {
            return Err(StepError::Stopped);
        };
        let next = running.workers.image().copy_up(copied.load(Ordering::Relaxed))?;
        copied.store(next, Ordering::Relaxed);
        Ok(next < running.size())
    }

    /// All is copied: the next queue that starts while no other has the image opens it anew.
    pub fn end_flatten(&self) {
        let running = self.running();
        if running.is_some() && self.independence.under_way.load(Ordering::Acquire) {
            self.independence.is_due.store(true, Ordering::Release);
        }
    }

    /// Takes the last step if it is due, where no queue has the image.
    pub fn finish_flatten(&self) -> Result<(), ChainError> {
        let mut running = self.running();
        // One that has gone elsewhere is not opened again.
        if running.is_some() {
            self.forget_below(&mut running);
            self.opened_in(&mut running)?;
        }
        Ok(())
    }

    /// It is flattened no further; what was copied stays so.
    pub fn stop_flatten(&self) {
        // What is under way ends first.
        let _running = self.running();
        self.independence.under_way.store(false, Ordering::Release);
        self.independence.is_due.store(false, Ordering::Release);
    }

    /// Takes the last step, if it is time for that.
    pub(super) fn forget_below(&self, running: &mut Option<Arc<Running>>) {
        if running.is_none() || !self.independence.is_due.load(Ordering::Acquire) {
            return;
        }
        // The reactors let go of what their queues had a moment after those have stopped.
        let until = Instant::now() + PATIENCE;
        while running.as_ref().is_some_and(|running| Arc::strong_count(running) > 1) {
            if Instant::now() > until {
                return;
            }
            std::thread::sleep(LOOK);
        }
        if let Err(e) = self.stand_alone(running) {
            warn!("{}: it needs what is below it still: {e}", self.path.display());
        }
        self.independence.is_due.store(false, Ordering::Release);
        self.independence.under_way.store(false, Ordering::Release);
    }

    fn stand_alone(&self, running: &mut Option<Arc<Running>>) -> Result<(), StepError> {
        if let Some(running) = &*running {
            running.sync()?;
        }
        // Closed before its header is written by anybody else.
        *running = None;
        let top = self.top()?;
        flatten::forget_below(&top)?;
        let data = chain::header(&top)?.data_file.map(|name| chain::beside(&self.path, &name));
        self.opened().retain(|(path, ..)| Some(path) == data.as_ref());
        Ok(())
    }
}
