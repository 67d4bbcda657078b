//! The switch's port to the rest of the network: an uplink on one reactor, and what is known of it elsewhere.

use std::fmt;
use std::sync::{Mutex, PoisonError};

use poll_engine::engine::reactor::Io;
use poll_engine::memory::slice::GuestSlice;

use crate::features::{
    CSUM, GUEST_CSUM, GUEST_ECN, GUEST_TSO4, GUEST_TSO6, GUEST_USO4, GUEST_USO6, HOST_ECN, HOST_TSO4,
    HOST_TSO6, HOST_USO,
};
use crate::header::VnetHdr;
use crate::hub::Hub;
use crate::port::{Counters, FIRST_TAG, Link, READABLE, Uplink};
use crate::tx::Head;

/// Nanoseconds between two looks at the link.
const LOOK: u64 = 100_000_000;
/// The labels of what watches the descriptor, and of ending that; others are the uplink's own.
const WATCH: u32 = READABLE;
const UNWATCH: u32 = READABLE + 1;

/// What an uplink may be asked for, as features that a guest's card can have.
pub fn host_features(takes: u64) -> u64 {
    let pairs = [
        (GUEST_CSUM, CSUM),
        (GUEST_TSO4, HOST_TSO4),
        (GUEST_TSO6, HOST_TSO6),
        (GUEST_ECN, HOST_ECN),
        (GUEST_USO4 | GUEST_USO6, HOST_USO),
    ];
    pairs.iter().filter(|(guest, _)| takes & guest == *guest).map(|(_, host)| host).sum()
}

/// All that [`host_features`] can be.
pub const HOST_OFFLOADS: u64 = CSUM | HOST_TSO4 | HOST_TSO6 | HOST_ECN | HOST_USO;

/// What others are told of an uplink, now and then.
#[derive(Debug, Default)]
pub struct News(Mutex<(Link, Counters)>);

impl News {
    /// The latest.
    pub fn latest(&self) -> (Link, Counters) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn tell(&self, news: (Link, Counters)) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = news;
    }
}

/// An uplink, where it is polled.
pub struct Outside {
    /// Its number among the ports.
    pub port: usize,
    /// The uplink.
    pub uplink: Box<dyn Uplink>,
    next_look: u64,
    watched: bool,
    /// What is watched may be a descriptor of before.
    stale: bool,
    stopping: bool,
    /// A frame that came in pieces from another reactor, put together.
    joined: Vec<u8>,
}

impl fmt::Debug for Outside {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Outside").field("port", &self.port).finish_non_exhaustive()
    }
}

impl Outside {
    /// Port number `port` of a hub.
    pub fn new(port: usize, uplink: Box<dyn Uplink>) -> Outside {
        Outside {
            port,
            uplink,
            next_look: 0,
            watched: false,
            stale: false,
            stopping: false,
            joined: Vec::new(),
        }
    }

    /// Has the reactor woken by what comes in.
    pub fn watch(&mut self, io: &mut Io<'_>) {
        if !self.watched && !self.stopping {
            self.watched = true;
            let label = io.label(WATCH);
            io.uring().watch(self.uplink.descriptor(), label);
        }
    }

    /// A completion: of the watch, which goes on or not, or of what the uplink has begun.
    pub fn complete(&mut self, tag: u32, result: i32, more: bool) {
        match tag {
            WATCH => {
                self.watched = more;
                self.uplink.complete(READABLE, result);
            }
            FIRST_TAG.. => self.uplink.complete(tag, result),
            _ => {}
        }
    }

    /// Has what was sent go, at the end of each round, and what is to be received come.
    pub fn flush(&mut self, io: &mut Io<'_>) {
        self.uplink.flush();
        if self.stopping {
            return;
        }
        if std::mem::take(&mut self.stale) {
            self.unwatch(io);
        }
        self.watch(io);
        self.uplink.submit(io);
    }

    /// Begins nothing more, and is not woken any more.
    pub fn stop(&mut self, io: &mut Io<'_>) {
        self.stopping = true;
        self.unwatch(io);
    }

    /// Begins again, on another reactor or where it was.
    pub fn go_on(&mut self) {
        self.stopping = false;
    }

    fn unwatch(&mut self, io: &mut Io<'_>) {
        if self.watched {
            let (watch, own) = (io.label(WATCH), io.label(UNWATCH));
            io.uring().unwatch(watch, own);
        }
    }

    /// Operations of the reactor's io_uring that are still to end.
    pub fn in_flight(&self) -> usize {
        usize::from(self.watched) + self.uplink.in_flight()
    }

    /// Looks at the link now and then, and says what it has come to.
    pub fn look(&mut self, hub: &Hub, now: u64) {
        if now < self.next_look {
            return;
        }
        self.next_look = now + LOOK;
        let link = self.uplink.link();
        let was = hub.outside.latest().0;
        hub.outside.tell((link, self.uplink.counters()));
        if link.up != was.up {
            // One that was gone may have come back as another.
            self.stale = link.up && self.watched;
            hub.set_link(self.port, link.up);
        }
    }

    /// Sends what a guest has sent; false if it went nowhere, which the uplink has counted.
    #[inline]
    pub fn send(&mut self, head: &Head, rest: &mut dyn Iterator<Item = GuestSlice<'_>>) -> bool {
        self.uplink.send(&header(head), head.packet_len() as usize, head.packet(), rest).is_ok()
    }

    /// Sends what was copied on another reactor.
    pub fn send_copy(&mut self, head: &Head, rest: &[u8]) -> bool {
        self.joined.clear();
        self.joined.extend_from_slice(head.packet());
        self.joined.extend_from_slice(rest);
        self.uplink.send(&header(head), self.joined.len(), &self.joined, &mut std::iter::empty()).is_ok()
    }
}

fn header(head: &Head) -> VnetHdr {
    if head.is_plain() { VnetHdr::default() } else { head.offload().header() }
}
