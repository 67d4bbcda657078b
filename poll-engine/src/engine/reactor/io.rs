//! The way into the kernel of what lives on a reactor: each operation carries who it is for.

use std::os::fd::BorrowedFd;

use crate::uring::Uring;

/// A queue's (or a station's) place on its reactor. It is never that of another one before very many have come and gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QueueId {
    pub(in crate::engine) slot: u16,
    pub(super) generation: u16,
}

/// Whom no queue and no station is.
pub(super) const NOBODY: QueueId = QueueId { slot: 0, generation: 0 };

/// What a completion belongs to: packed into the 64 bits io_uring carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Purpose {
    Handler = 0,
    Kick = 1,
    Signal = 2,
    Bell = 3,
    Cancel = 4,
    Station = 5,
}

pub(super) fn label(purpose: Purpose, id: QueueId, tag: u32) -> u64 {
    (purpose as u64) << 60
        | u64::from(id.generation & 0xfff) << 48
        | u64::from(id.slot) << 32
        | u64::from(tag)
}

pub(super) fn unlabel(user_data: u64) -> (u8, QueueId, u32) {
    let id = QueueId { slot: (user_data >> 32) as u16, generation: (user_data >> 48) as u16 & 0xfff };
    ((user_data >> 60) as u8, id, user_data as u32)
}

/// A handler's way into the kernel.
pub struct Io<'a> {
    uring: &'a mut Uring,
    id: QueueId,
    purpose: Purpose,
    reactor: usize,
}

impl<'a> Io<'a> {
    /// Without a reactor, for driving a handler by hand where it is measured: completions go nowhere.
    pub fn alone(uring: &'a mut Uring) -> Io<'a> {
        Io { uring, id: NOBODY, purpose: Purpose::Handler, reactor: 0 }
    }

    /// The queue whose handler this is for; or the station.
    #[inline]
    pub fn id(&self) -> QueueId {
        self.id
    }

    /// The number of this reactor.
    #[inline]
    pub fn reactor(&self) -> usize {
        self.reactor
    }

    /// The reactor's io_uring, for registering files and finding registered memory.
    #[inline]
    pub fn uring(&mut self) -> &mut Uring {
        self.uring
    }

    /// The label of the handler's (or station's) operation `tag`: its completion comes back to
    /// [`QueueHandler::complete`](crate::device::QueueHandler::complete) (or
    /// [`Station::complete`](crate::engine::station::Station::complete)) with this tag.
    #[inline]
    pub fn label(&self, tag: u32) -> u64 {
        label(self.purpose, self.id, tag)
    }

    pub(in crate::engine) fn signal(&mut self, fd: BorrowedFd<'_>, tag: u32) {
        self.uring.signal(fd, label(Purpose::Signal, self.id, tag));
    }

    /// Ends a signal that is under way.
    pub(in crate::engine) fn cancel_signal(&mut self, tag: u32) {
        self.uring.cancel(label(Purpose::Signal, self.id, tag), label(Purpose::Cancel, self.id, tag));
    }
}

/// The way into the kernel of one that lives here.
pub(super) fn io(uring: &mut Uring, purpose: Purpose, id: QueueId, reactor: usize) -> Io<'_> {
    Io { uring, id, purpose, reactor }
}
