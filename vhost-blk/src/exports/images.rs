//! Clones, pools of them, and images that are made to need no other.

use std::path::Path;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use poll_engine::session::server::AskError;
use tracing::{info, warn};

use super::{Exports, Refused, Served, conflict, locked};
use crate::backend::formatted::{Formatted, StepError};
use crate::clone::Base;
use crate::pool::State;

/// Before the last step is tried again.
const AGAIN: Duration = Duration::from_secs(1);

impl Exports {
    /// Makes a clone that nobody serves yet.
    pub fn clone_to(&self, base: &Base, path: &Path) -> Result<(), Refused> {
        let _change = self.changes.begin()?;
        if path.exists() {
            return Err(Refused::Conflict(format!("{} is there already; name another file", path.display())));
        }
        self.pools.clone_to(base, path).map_err(|e| conflict(&e))?;
        info!("{} is a new clone of {base}", path.display());
        Ok(())
    }

    /// All pools.
    pub fn pools(&self) -> Vec<State> {
        self.pools.states()
    }

    /// Begins to make an image need nothing below it; a thread goes on with that.
    pub fn flatten(&self, key: &str) -> Result<Arc<Served>, Refused> {
        let _change = self.changes.begin()?;
        let served = self.find(key)?;
        let refused = |why: &StepError| Refused::Conflict(format!("{key} is not flattened: {why}"));
        let image = served.image().ok_or_else(|| refused(&StepError::Impossible("is no qcow2 image")))?;
        image.begin_flatten().map_err(|e| refused(&e))?;
        let weak = Arc::downgrade(&served);
        let begun = std::thread::Builder::new().name("flatten".into()).spawn(move || flatten(&weak));
        let thread = begun.map_err(|e| {
            image.stop_flatten();
            refused(&e.into())
        })?;
        let mut threads = locked(&self.flattening);
        threads.retain(|thread| !thread.is_finished());
        threads.push(thread);
        info!("{} is being flattened", served.name);
        Ok(served)
    }

    /// Ends all of that, before the end of the process: a thread may have a disk in its hand.
    pub(super) fn end_flattening(&self) {
        self.all().iter().filter_map(|s| s.image()).for_each(Formatted::stop_flatten);
        for thread in locked(&self.flattening).drain(..) {
            // Its panics were told by the hook.
            let _ = thread.join();
        }
    }

    /// Ends that; what was copied stays so.
    pub fn stop_flatten(&self, key: &str) -> Result<Arc<Served>, Refused> {
        let _change = self.changes.begin()?;
        let served = self.find(key)?;
        if let Some(image) = served.image() {
            image.stop_flatten();
        }
        Ok(served)
    }
}

/// Makes an image this large.
pub(super) fn grow(served: &Served, image: &Formatted, size: u64) -> Result<(), Refused> {
    let (key, block) = (&served.key, served.disk.block_size());
    if !size.is_multiple_of(block.into()) {
        let why = format!("{size} bytes are no multiple of the block size of {key}, {block}");
        return Err(Refused::Wrong(Some("size"), why));
    }
    let grown = served.disk.grow_image(image, size);
    grown.map_err(|e| Refused::Conflict(format!("{key} stays as large as it is: {e}")))
}

/// Copies up what is below, for half of the time, so that guests get on as well; then has the image opened anew.
fn flatten(weak: &Weak<Served>) {
    loop {
        let Some(served) = weak.upgrade() else { return };
        let Some(image) = served.image().filter(|_| !served.server.has_ended()) else { return };
        let begun = Instant::now();
        match image.flatten_piece() {
            Ok(true) => {}
            Ok(false) => break,
            Err(e) => {
                image.stop_flatten();
                return warn!("{} is not flattened to its end: {e}", served.name);
            }
        }
        drop(served);
        std::thread::sleep(begun.elapsed());
    }
    loop {
        let Some(served) = weak.upgrade() else { return };
        let Some(image) = served.image() else { return };
        image.end_flatten();
        // Of the queues there are, the first one opens it; where there are none, we do.
        let outcome = served.server.restart_queues();
        let opened = image.finish_flatten();
        match (image.flattening(), outcome, opened) {
            (None, ..) => {
                let is_alone = image.backing().is_ok_and(|below| below.is_none());
                if is_alone {
                    info!("{} needs no other image any more", served.name);
                }
                return;
            }
            (_, Err(AskError::Ended), _) | (.., Err(_)) => return image.stop_flatten(),
            // A guest is coming, say.
            (_, Err(e), _) => info!("{}: {e}; tried again in {AGAIN:?}", served.name),
            (_, Ok(()), Ok(())) => {}
        }
        drop(served);
        std::thread::sleep(AGAIN);
    }
}
