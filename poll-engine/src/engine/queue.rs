//! A queue as its handler sees it: take chains, give them back. Ring, memory, notification and counting behind it.
#![allow(unsafe_code)] // pairs chains with the map that translated them

mod burst;

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use crossbeam::sync::WaitGroup;
use tracing::{info, warn};

pub use burst::MAX_BURST;

use super::alarm::Alarm;
use super::reactor::Io;
use crate::clock::Clock;
use crate::fault_point::pass;
use crate::memory::iotlb::{Miss, Revoked};
use crate::memory::log::QueueLog;
use crate::memory::map::{MapHold, MemoryError, MemoryMap};
use crate::probes;
use crate::ring::chain::{Chain, ChainView, HeldChain, Pins};
use crate::ring::inflight::QueueRegion;
use crate::ring::{Ahead, Ring, RingConfig, RingError, Token};
use crate::stats::{ErrorKind, QueueStats};

/// Most chains one queue may take in one round of the reactor. Enough to amortise a round and to overlap the cache
/// misses of its chains; few enough that the driver can go on with the first of a long run while we work on the rest
/// (measured: 64 costs a fifth of the rate at depth 32), and that a neighbour never waits long.
pub const BUDGET: u16 = 16;

/// Most rounds in a row that may publish before the driver's wish for an interrupt is looked at: a few microseconds.
const MAX_UNSIGNALLED: u32 = 4;

/// A chain in flight: its token and when it was taken.
#[derive(Debug)]
#[must_use = "a request must be completed"]
pub struct Request {
    token: Token,
    since: u64,
}

impl Request {
    /// When it was taken, as a raw reading of the clock.
    #[inline]
    pub fn since(&self) -> u64 {
        self.since
    }

    /// Names its chain while that is in flight: the head's index in a split ring, the buffer ID in a packed one. A driver
    /// that breaks the rules may have several of the same.
    #[inline]
    pub fn id(&self) -> u16 {
        self.token.id()
    }
}

/// A new memory map for a running queue.
#[derive(Debug)]
pub struct MapChange {
    /// The map.
    pub hold: MapHold,
    /// Where the ring lies in it, if that has to be looked up again. A ring that was not mapped is from now on.
    pub ring: Option<RingConfig>,
    /// What was taken away against the map before.
    pub revoked: Option<Arc<Revoked>>,
    /// Dropped once the queue takes requests by the new map, and none in flight points to what was taken away.
    pub adopted: WaitGroup,
}

/// What a queue behind an IOMMU rests for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Rest {
    /// Nothing: it runs.
    No,
    /// An address that the next chain names.
    Address(Miss),
    /// Its ring, which must not be touched.
    Ring,
}

/// Most misses that a queue posts at a time.
const MAX_MISSES: usize = 64;

/// A transport that has no eventfd to interrupt a driver by.
pub trait Interrupt: std::fmt::Debug + Send + Sync {
    /// Interrupts the driver of this queue; false if that could not be done. It never waits.
    fn raise(&self) -> bool;
}

/// How a driver hears that chains were used.
#[derive(Debug)]
pub enum Call {
    /// By an eventfd that is written to with the reactor's other I/O.
    Eventfd(OwnedFd),
    /// By a system call of its own (VDUSE).
    Interrupt(Box<dyn Interrupt>),
}

/// The event descriptors of a queue.
#[derive(Debug, Default)]
pub struct Notifier {
    /// Readable when the driver has made chains available; without it the queue must be polled.
    pub kick: Option<OwnedFd>,
    /// To be signalled when chains were used; without it the driver polls.
    pub call: Option<Call>,
    /// To be signalled when the queue breaks.
    pub err: Option<OwnedFd>,
    /// Raised when the queue breaks, before `err` is signalled.
    pub alarm: Option<Arc<Alarm>>,
}

/// Writes to a queue's descriptors that are under way: at most eight, which is how many rounds can pass before they are
/// submitted. Beyond that, the front end has filled its counter and made it blocking, and each write waits in the
/// kernel, at our cost.
#[derive(Debug, Default)]
struct Signals {
    /// A bit for each number that is in use.
    under_way: u8,
    /// One more is due when the next is complete.
    owed: bool,
}

impl Signals {
    /// Signals `fd` if another write may be under way; otherwise that is owed.
    fn send(&mut self, fd: &OwnedFd, io: &mut Io<'_>) -> bool {
        let tag = self.under_way.trailing_ones();
        self.owed = tag == u8::BITS;
        if !self.owed {
            self.under_way |= 1 << tag;
            io.signal(fd.as_fd(), tag);
        }
        !self.owed
    }

    /// As [`send`](Self::send), in the transport's way.
    fn call(&mut self, call: &Call, io: &mut Io<'_>) -> bool {
        match call {
            Call::Eventfd(fd) => self.send(fd, io),
            Call::Interrupt(interrupt) => interrupt.raise(),
        }
    }

    /// A write is complete; true when one is owed.
    fn complete(&mut self, tag: u32) -> bool {
        self.under_way &= !1u8.checked_shl(tag).unwrap_or(0);
        std::mem::take(&mut self.owed)
    }

    fn under_way(&self) -> impl Iterator<Item = u32> + use<> {
        let bits = self.under_way;
        (0..u8::BITS).filter(move |tag| bits & 1 << tag != 0)
    }
}

/// A running queue.
#[derive(Debug)]
pub struct Queue {
    name: Arc<str>,
    ring: Ring,
    hold: MapHold,
    /// The chain taken last, until it is held or given back.
    chain: Chain,
    burst: Box<burst::Burst>,
    pub(super) notifier: Notifier,
    stats: Arc<QueueStats>,
    broken: bool,
    rest: Rest,
    /// With an IOTLB: where the chains in flight point, and who waits for which of them.
    pins: Pins,
    revoked: Vec<(Arc<Revoked>, WaitGroup)>,
    /// While the front end wants to know what is written.
    log: Option<QueueLog>,
    signals: Signals,
    /// Publishes since the driver was last signalled or found not to want it.
    unsignalled: u32,
    clock: Clock,
    /// When the present round took its first chain; what it takes and completes by itself is timed together.
    round: u64,
    round_completed: u64,
    /// When the completions at hand were reaped.
    reaped: u64,
}

impl Queue {
    /// Activates `config` in the map held. `name` is for the log.
    pub fn new(
        name: Arc<str>,
        config: &RingConfig,
        hold: MapHold,
        notifier: Notifier,
        stats: Arc<QueueStats>,
    ) -> Result<Queue, RingError> {
        let ring = Ring::activate(config, hold.map())?;
        Ok(Queue {
            name,
            ring,
            hold,
            chain: Chain::default(),
            burst: Box::default(),
            notifier,
            stats,
            broken: false,
            rest: Rest::No,
            pins: Pins::default(),
            revoked: Vec::new(),
            log: None,
            signals: Signals::default(),
            unsignalled: 0,
            clock: Clock::new(),
            round: 0,
            round_completed: 0,
            reaped: 0,
        })
    }

    /// Keeps the record of what is in flight in `region`, and begins with what it holds ([`Ring::recover`]).
    pub fn recover(mut self, region: QueueRegion) -> Result<Queue, RingError> {
        self.ring = self.ring.recover(region)?;
        let resubmits = self.ring.resubmits();
        if resubmits > 0 {
            info!("{}: {resubmits} requests of an earlier back end are served again", self.name);
        }
        // The interrupt of the last back end may have died with it.
        self.unsignalled = 1;
        Ok(self)
    }

    /// The queue's counters.
    #[inline]
    pub fn stats(&self) -> &QueueStats {
        &self.stats
    }

    /// What it is called in the log.
    pub(super) fn name(&self) -> &str {
        &self.name
    }

    /// The counters, for whoever outlives the queue.
    pub(super) fn shared_stats(&self) -> Arc<QueueStats> {
        Arc::clone(&self.stats)
    }

    /// Requests taken and not completed.
    #[inline]
    pub fn in_flight(&self) -> u16 {
        self.ring.in_flight()
    }

    /// Whether there are chains of an earlier back end to be taken still.
    #[inline]
    pub fn has_resubmits(&self) -> bool {
        self.is_running() && self.ring.resubmits() > 0
    }

    /// Gets rid of the chains of an earlier back end, for a handler that has nothing to do with them: a receive queue
    /// without packets. They are available again for the next start; or come back empty, if the driver has let others
    /// overtake them. Nothing may be in flight.
    #[cold]
    pub(super) fn return_resubmits(&mut self) {
        if self.ring.return_resubmits() {
            return;
        }
        while self.has_resubmits() {
            if let Some(request) = self.take() {
                self.complete(request, 0);
            } else if self.is_running() {
                return;
            }
        }
    }

    /// Where the next start of this queue begins.
    pub fn base(&self) -> u32 {
        self.ring.base()
    }

    /// Whether a broken ring has stopped the queue.
    pub fn is_broken(&self) -> bool {
        self.broken
    }

    /// Whether the queue takes requests: it is not broken, and waits for no translation.
    pub(super) fn is_running(&self) -> bool {
        !self.broken && self.rest == Rest::No
    }

    /// Whether the ring may be touched.
    fn has_ring(&self) -> bool {
        !self.broken && self.rest != Rest::Ring
    }

    pub(super) fn map(&self) -> &MemoryMap {
        self.hold.map()
    }

    /// How many chains to take this round, at most [`BUDGET`], with what they need on its way into the cache.
    #[inline]
    pub fn ready(&mut self) -> u16 {
        self.stats.polls.add(1);
        let ready = self.ready_for(BUDGET, Ahead::HEADER);
        if ready == 0 {
            self.stats.empty_polls.add(1);
        }
        ready
    }

    /// As [`ready`](Self::ready), for a queue that is needed rather than polled: how many chains there are to be taken, at
    /// most `wanted`, with what they need and `ahead` of their buffers on its way.
    #[inline]
    pub fn ready_for(&mut self, wanted: u16, ahead: Ahead) -> u16 {
        let ready = self.count_ready(wanted);
        if ready > 0 {
            self.ring.prefetch(ready, ahead, self.hold.map());
        }
        ready
    }

    /// As [`ready_for`](Self::ready_for), with nothing on its way.
    #[inline]
    fn count_ready(&mut self, wanted: u16) -> u16 {
        let ready = match self.ring.available() {
            Ok(n) => n.min(wanted),
            Err(e) => {
                self.fail(&e);
                0
            }
        };
        if ready > 0 {
            self.stats.in_flight_peak.raise(u64::from(self.ring.in_flight()) + u64::from(ready));
            self.round = self.clock.raw();
        }
        ready
    }

    /// Whether there is a chain to be taken, without any preparation for it.
    #[inline]
    pub fn has_chain(&mut self) -> bool {
        match self.ring.available() {
            Ok(n) => n > 0,
            Err(e) => {
                self.fail(&e);
                false
            }
        }
    }

    /// Takes a chain that [`ready`](Self::ready) has counted. `None` when it is broken, and the queue with it, or when
    /// the queue has to wait for a translation.
    #[inline(always)] // the beginning of every request
    pub fn take(&mut self) -> Option<Request> {
        match self.ring.take(self.hold.map(), &mut self.chain) {
            Ok(token) => {
                probes::take(self, token.about());
                Some(Request { token, since: self.round })
            }
            Err(e) => {
                self.not_taken(&e);
                None
            }
        }
    }

    /// Breaks, or rests until what the next chain names is translated. The chain stays where it is and is read anew then.
    #[cold]
    fn not_taken(&mut self, error: &RingError) {
        let RingError::Memory(MemoryError::Miss(miss)) = *error else { return self.fail(error) };
        self.rest = Rest::Address(miss);
        self.stats.iotlb_misses.add(1);
        let map = self.hold.map();
        let Some(misses) = map.misses() else { return };
        // All that is known to be missing at once: each answer takes the front end a while.
        let mut found = vec![miss];
        self.ring.survey(map, &mut |miss| {
            if !found.contains(&miss) {
                found.push(miss);
            }
            found.len() < MAX_MISSES
        });
        misses.post(&found);
    }

    /// The front end has no translation for this, or (`None`) none for the ring.
    pub(super) fn refuse(&mut self, miss: Option<Miss>) {
        match (self.rest, miss) {
            (Rest::Address(own), Some(miss)) if own == miss => {
                self.fail(&RingError::Memory(MemoryError::Miss(miss)));
            }
            (Rest::Ring, None) => self.fail(&RingError::Memory(MemoryError::RingUnmapped)),
            _ => {}
        }
    }

    /// Leaves the ring alone until a map says where it is. Nothing may be in flight.
    pub(super) fn unmap_ring(&mut self) {
        self.rest = Rest::Ring;
    }

    /// The chain taken last.
    #[inline]
    pub fn chain(&self) -> ChainView<'_> {
        // SAFETY: the chain was translated by the held map, which only `set_map` changes, and that clears the chain.
        unsafe { self.chain.view(self.hold.map()) }
    }

    /// Moves the chain taken last into `held`, to outlive this round.
    #[inline]
    pub fn hold_chain(&mut self, held: &mut HeldChain) {
        // SAFETY: as for `chain`.
        unsafe { held.take(&mut self.chain, &self.hold) };
        if self.hold.map().misses().is_some() {
            held.pin_in(&mut self.pins);
        }
    }

    /// As [`hold_chain`](Self::hold_chain), of a copy: the chain stays the one that was taken last.
    pub fn copy_chain(&mut self, held: &mut HeldChain) {
        // SAFETY: as for `chain`.
        unsafe { held.copy(&self.chain, &self.hold) };
        if self.hold.map().misses().is_some() {
            held.pin_in(&mut self.pins);
        }
    }

    /// Gives the request of the chain taken last back with the number of bytes written to it. The driver sees it when
    /// the round ends.
    #[inline(always)] // the end of every request
    pub fn complete(&mut self, request: Request, written: u32) {
        if let Some(log) = &self.log {
            self.log_written(log, &self.chain());
        }
        self.give_back(request, written);
    }

    /// As [`complete`](Self::complete), for a request whose chain was held.
    #[inline]
    pub fn complete_held(&mut self, request: Request, written: u32, chain: &ChainView<'_>) {
        if let Some(log) = &self.log {
            self.log_written(log, chain);
        }
        self.give_back(request, written);
    }

    /// Puts the request taken last back, untouched, for a later round. Several go back in reverse order, before any that
    /// was taken after one of them is completed. What is [ready](Self::ready) has to be counted anew.
    #[inline]
    pub fn untake(&mut self, request: Request) {
        probes::untake(self, request.token.about());
        self.ring.untake(request.token);
    }

    #[inline(always)]
    fn give_back(&mut self, request: Request, written: u32) {
        probes::complete(self, request.token.about());
        if request.since == self.round {
            self.round_completed += 1;
        } else {
            let ns = self.clock.delta_as_nanos(request.since, self.reaped);
            self.stats.latency.record(ns, 1);
            self.stats.requests.add(1);
        }
        self.ring.complete(request.token, written);
    }

    /// When the completions at hand were reaped, as a raw reading of the clock: what they end is over since then.
    #[inline]
    pub fn reaped(&self) -> u64 {
        self.reaped
    }

    /// Completions have been reaped: their requests are timed up to now.
    pub fn mark_reaped(&mut self) {
        self.reaped = self.clock.raw();
        self.round = self.reaped;
    }

    /// Ends a round: shows completed chains to the driver; false when there was none.
    #[inline]
    pub fn publish(&mut self) -> bool {
        if !self.ring.publish() {
            return false;
        }
        probes::publish(self);
        self.unsignalled += 1;
        if self.round_completed > 0 {
            let ns = self.clock.delta_as_nanos(self.round, self.clock.raw());
            self.stats.latency.record(ns, self.round_completed);
            self.stats.requests.add(self.round_completed);
            self.round_completed = 0;
        }
        true
    }

    /// Whether to see now if the driver wants an interrupt. Looking costs a memory barrier that waits for all our
    /// writes: while there is more to take, the rounds share one.
    #[inline]
    pub fn is_signal_due(&self, idle: bool) -> bool {
        self.unsignalled > 0 && (idle || self.unsignalled >= MAX_UNSIGNALLED)
    }

    /// Signals the driver if it wants that.
    #[inline]
    pub fn signal(&mut self, io: &mut Io<'_>) {
        if std::mem::take(&mut self.unsignalled) == 0 {
            return;
        }
        if let Some(call) = self.log.as_ref().and_then(|log| log.call.as_ref()) {
            self.signals.send(call, io);
        }
        let Some(wants_interrupt) = self.ring.wants_interrupt() else { return };
        match &self.notifier.call {
            Some(call) if wants_interrupt => {
                pass("signal-begins");
                probes::signal(self);
                if self.signals.call(call, io) {
                    self.stats.signals.add(1);
                }
                pass("signal-ends");
            }
            _ => self.stats.signals_suppressed.add(1),
        }
    }

    /// Replaces the descriptor that the driver is signalled by, and signals the new one at once. What went to the old one
    /// may have reached nobody: a front end may start a ring with a descriptor that it does not listen to (QEMU's masked
    /// notifier) and give it the one that interrupts after that. A driver that then waits for all it has asked for would
    /// wait for ever. One interrupt too many is harmless, and QEMU's own libvhost-user sends it, too.
    pub(super) fn set_call(&mut self, call: Option<OwnedFd>) {
        self.notifier.call = call.map(Call::Eventfd);
        self.ring.owe_interrupt();
        self.unsignalled += 1;
    }

    /// Write number `tag` to one of the descriptors is complete, or has failed.
    pub(super) fn signalled(&mut self, io: &mut Io<'_>, tag: u32) {
        if self.signals.complete(tag)
            && let Some(call) = &self.notifier.call
            && self.signals.call(call, io)
        {
            self.stats.signals.add(1);
        }
    }

    /// Ends the writes that still wait, for a front end that does not read its counter.
    pub(super) fn cancel_signals(&mut self, io: &mut Io<'_>) {
        self.signals.under_way().for_each(|tag| io.cancel_signal(tag));
    }

    pub(super) fn enable_notification(&mut self) -> bool {
        self.has_ring() && self.ring.enable_notification()
    }

    /// To be called now and then while awake, too: the ring keeps its event index from going stale.
    #[inline]
    pub fn disable_notification(&mut self) {
        if self.has_ring() {
            self.ring.disable_notification();
        }
    }

    /// Tells a log what is written from now on, requests in flight included.
    pub fn set_log(&mut self, log: Option<QueueLog>) {
        self.ring.set_log(log.as_ref());
        self.log = log;
    }

    /// Marks what the device may have written. More than it says it has: the length given back counts only an unbroken
    /// run from the start (virtio 1.3, 2.7.8.2).
    #[cold]
    fn log_written(&self, log: &QueueLog, chain: &ChainView<'_>) {
        if log.data {
            chain.log_writable(&log.log);
        }
        if log.log.take_overrun() {
            self.count_error(
                ErrorKind::Memory,
                &"written behind the end of the dirty log: the guest's migration misses pages",
            );
        }
    }

    /// Goes over to a new memory map. Returns what is to be dropped last: the hold on the old one, which lives on in the
    /// requests that point into it, and `adopted`, unless one of them points to what was revoked.
    pub(super) fn set_map(&mut self, change: MapChange) -> (MapHold, Option<WaitGroup>) {
        assert!(!self.burst.is_open(), "a burst lasts no longer than a round");
        let MapChange { hold, ring, revoked, adopted } = change;
        if let (Some(config), false) = (&ring, self.broken) {
            match self.ring.relocate(config, hold.map()) {
                Ok(()) if self.rest == Rest::Ring => self.rest = Rest::No,
                Ok(()) => {}
                Err(e) => self.fail(&e),
            }
        }
        if let (Rest::Address(miss), false) = (self.rest, self.broken) {
            match hold.map().misses() {
                Some(misses) if !hold.map().allows(miss.iova, miss.access) => misses.post(&[miss]),
                _ => self.rest = Rest::No,
            }
        }
        self.chain.clear();
        let old = std::mem::replace(&mut self.hold, hold);
        match revoked {
            Some(revoked) if self.pins.touch(&revoked) => {
                self.revoked.push((revoked, adopted));
                (old, None)
            }
            _ => (old, Some(adopted)),
        }
    }

    /// How many wait for requests to be over that point to what was revoked.
    pub(super) fn revoked(&self) -> usize {
        self.revoked.len()
    }

    /// Lets those go who wait for requests that are over now; how many.
    pub(super) fn release_revoked(&mut self) -> usize {
        let before = self.revoked.len();
        let pins = &self.pins;
        self.revoked.retain(|(revoked, _)| pins.touch(revoked));
        before - self.revoked.len()
    }

    /// Counts an error of the request kind, and logs the first of it.
    pub fn count_error(&self, kind: ErrorKind, what: &dyn std::fmt::Display) {
        if self.stats.error(kind) {
            warn!("{}: {what} (further ones are only counted)", self.name);
        }
    }

    /// Breaks the queue if memory that it uses has been taken away.
    pub(super) fn check_memory(&mut self) {
        let log_faulted = self.log.as_ref().is_some_and(|l| l.log.has_faulted());
        if !self.broken && (log_faulted || self.ring.has_faulted() || self.hold.map().has_faulted()) {
            self.fail(&RingError::Memory(MemoryError::TakenAway));
        }
    }

    #[cold]
    fn fail(&mut self, error: &RingError) {
        let kind = if matches!(error, RingError::Memory(_)) { ErrorKind::Memory } else { ErrorKind::Ring };
        if self.stats.error(kind) {
            warn!("{}: stopped, its driver broke the ring: {error}", self.name);
        }
        self.broken = true;
    }

    /// Says that the queue is broken, to the control thread and then to the front end.
    pub(super) fn report_broken(&mut self, io: &mut Io<'_>) {
        if let Some(alarm) = &self.notifier.alarm {
            alarm.raise();
        }
        if let Some(err) = &self.notifier.err {
            self.signals.send(err, io);
        }
    }
}
