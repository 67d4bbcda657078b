//! Where requests are carried out. A back end answers at once or later; the queue does the rest.

pub mod bounce;
pub mod fault;
pub mod formatted;
pub mod layout;
pub mod luks;
pub mod null;
pub mod nvme;
pub mod power_cut;
pub mod ram;
pub mod rbd;
pub mod sync;
pub mod uring;
pub mod write_log;

use std::io;

use poll_engine::engine::queue::{Queue, Request};
use poll_engine::engine::reactor::Io;
use poll_engine::memory::map::MemoryMap;
use poll_engine::ring::chain::ChainView;
use poll_engine::uring::FixedBuffers;

use crate::request::{Operation, STATUS_IOERR};
use crate::share::weight_of;

/// What became of a request.
#[derive(Debug)]
pub enum Outcome {
    /// Carried out.
    Done,
    /// Not carried out.
    Failed(Failure),
}

/// Why a request was not carried out.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    /// The request names ranges that do not fit.
    #[error(transparent)]
    Invalid(#[from] crate::request::Invalid),
    /// The storage says no.
    #[error("{what}: {error}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// What the system said.
        error: io::Error,
    },
    /// Somebody has asked for that.
    #[error("failed on purpose, as --fault says")]
    OnPurpose,
}

impl Failure {
    /// The status byte for it.
    pub fn status(&self) -> u8 {
        match self {
            Failure::Invalid(e) => e.status(),
            Failure::Io { .. } | Failure::OnPurpose => STATUS_IOERR,
        }
    }
}

/// How a request was begun.
#[derive(Debug)]
pub enum Begun {
    /// It is over; the chain is still the queue's last.
    Over(Request, Outcome),
    /// It goes on; [`Backend::complete`] will tell.
    Pending,
}

/// A back end of one queue.
pub trait Backend: Send + 'static {
    /// Whether requests take no time to speak of, however large: nobody waits for another's.
    const IS_FREE: bool = false;

    /// Whether something more may be begun now. If not, that changes with something that is under way.
    #[inline]
    fn has_room(&self) -> bool {
        true
    }

    /// What a request counts for of all that may be begun in a round.
    #[inline]
    fn weight(&self, operation: &Operation) -> u32 {
        weight_of(operation)
    }

    /// Begins the request whose chain the queue has just taken. Never [`Operation::GetId`].
    fn begin(&mut self, request: Request, operation: Operation, queue: &mut Queue, io: &mut Io<'_>) -> Begun;

    /// Called on the reactor before anything else.
    fn attach(&mut self, _io: &mut Io<'_>) {}

    /// Called on the reactor when nothing is pending, and nothing will be any more.
    fn detach(&mut self, _io: &mut Io<'_>) {}

    /// Goes on with the pending request of `tag`; when it is over, `finish` is called with its chain still held.
    fn complete(
        &mut self,
        _io: &mut Io<'_>,
        _tag: u32,
        _result: i32,
        _finish: &mut dyn FnMut(Request, Operation, Outcome, ChainView<'_>),
    ) {
    }

    /// Called in each round, after requests have been begun, for a back end that hears of their ends elsewhere than from the
    /// reactor's io_uring. Returns how many pieces of work there were.
    #[inline]
    fn turn(
        &mut self,
        _io: &mut Io<'_>,
        _finish: &mut dyn FnMut(Request, Operation, Outcome, ChainView<'_>),
    ) -> usize {
        0
    }

    /// The reactor is about to sleep: has its io_uring wait for what [`turn`](Self::turn) would find. True if there is
    /// something already.
    fn prepare_sleep(&mut self, _io: &mut Io<'_>) -> bool {
        false
    }

    /// Guest memory is this from now on, for a back end that registers it with a ring of its own.
    fn register_memory(&mut self, _mode: FixedBuffers, _map: &MemoryMap) {}

    /// Whether guest memory should be registered with io_uring.
    fn uses_fixed_buffers(&self) -> bool {
        false
    }
}
