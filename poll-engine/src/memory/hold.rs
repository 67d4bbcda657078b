//! Holding on to a snapshot of guest memory, and hearing when nobody does any more.

use crate::sync::{Arc, WaitGroup};

/// A user's hold on a snapshot: cloned into each request that points into it. When the last clone of a queue's hold is
/// gone, whoever changed the memory table may tell the front end so.
#[derive(Debug)]
pub struct Hold<M>(Arc<Held<M>>);

/// The order matters: the snapshot goes, and its memory with it, before that is said.
#[derive(Debug)]
struct Held<M> {
    map: Arc<M>,
    _released: WaitGroup,
}

impl<M> Hold<M> {
    /// A hold on `map`; `released` is dropped with the last clone.
    ///
    /// One per queue, so that the count is touched by one reactor only.
    pub fn new(map: Arc<M>, released: WaitGroup) -> Hold<M> {
        Hold(Arc::new(Held { map, _released: released }))
    }

    /// The snapshot.
    #[inline]
    pub fn map(&self) -> &M {
        &self.0.map
    }
}

impl<M> Clone for Hold<M> {
    #[inline]
    fn clone(&self) -> Hold<M> {
        Hold(Arc::clone(&self.0))
    }
}
