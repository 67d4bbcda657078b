//! No storage: every request succeeds at once. For measuring everything but storage.

use poll_engine::engine::queue::{Queue, Request};
use poll_engine::engine::reactor::Io;

use super::{Backend, Begun, Outcome};
use crate::request::Operation;

/// The null back end.
#[derive(Clone, Copy, Debug)]
pub struct Null;

impl Backend for Null {
    const IS_FREE: bool = true;

    #[inline]
    fn begin(
        &mut self,
        request: Request,
        _operation: Operation,
        _queue: &mut Queue,
        _io: &mut Io<'_>,
    ) -> Begun {
        Begun::Over(request, Outcome::Done)
    }
}
