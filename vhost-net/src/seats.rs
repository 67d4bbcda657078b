//! Where the shards of a hub sit: the way to the one on each reactor, reactors that come and go, and the uplink, which moves
//! from one to another.
//!
//! ```text
//! comes:  a seat is taken ─► every shard has heard ─► the reactor starts with its shard ─► queues may run there
//! ends:   no queue is there ─► the uplink moves ─► every shard has heard ─► what was on its way has come ─► the seat is free
//! ```

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use poll_engine::engine::reactor::QueueId;
use poll_engine::engine::station::Waker;
use poll_engine::engine::{Engine, Retiring};

use crate::hub::{HEARING, Hub, HubError, Port};
use crate::outside::Outside;
use crate::parcel::Chute;
use crate::shard::Shard;
use crate::witness::Witness;

/// Most reactors that ports are joined on: a port has a bit for each.
pub const MAX_REACTORS: usize = 64;
/// How often to look whether something has moved.
const LOOK: Duration = Duration::from_millis(1);

/// Something has changed on a reactor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Change {
    /// A queue runs.
    Up { port: usize, index: u16, id: QueueId, features: u64 },
    /// A queue has stopped.
    Down { port: usize, index: u16 },
    /// The switch's ports are not what they were.
    Rules,
    /// There are other ports.
    Ports,
    /// Shards sit elsewhere.
    Seats,
    /// Packets are noted by somebody else, who waits at the seat, or by nobody.
    Witness,
    /// A port's driver has asked for something else.
    Steering(usize),
    /// The uplink is to be laid at the seat, to go elsewhere.
    UplinkGoes,
    /// It lies at the seat, to be here from now on.
    UplinkComes,
}

/// What a shard is told.
#[derive(Debug, Default)]
pub(crate) struct Inbox {
    changes: Mutex<Vec<Change>>,
    full: AtomicBool,
}

impl Inbox {
    pub(crate) fn put(&self, change: Change) {
        let mut changes = locked(&self.changes);
        // Much may be asked for while a reactor sleeps; what it does then is what is asked for last.
        if matches!(change, Change::Up { .. } | Change::Down { .. }) || !changes.contains(&change) {
            changes.push(change);
        }
        self.full.store(true, Ordering::Release);
    }

    /// What has changed: one load while that is nothing.
    #[inline]
    pub(crate) fn take(&self) -> Option<Vec<Change>> {
        if !self.full.load(Ordering::Relaxed) {
            return None;
        }
        self.full.store(false, Ordering::Relaxed);
        Some(std::mem::take(&mut *locked(&self.changes)))
    }
}

/// The way to the shard on one reactor.
#[derive(Debug, Default)]
pub(crate) struct Seat {
    /// Its bit in [`Port::places`].
    pub(crate) bit: usize,
    /// The number of the reactor, once it is there.
    reactor: OnceLock<usize>,
    pub(crate) inbox: Inbox,
    /// For packets that come from elsewhere, once the reactor can be woken.
    pub(crate) chute: OnceLock<Chute>,
    /// Who is to note packets from now on.
    pub(crate) witness: Mutex<Witness>,
    /// The uplink, on its way from one seat to another.
    pub(crate) luggage: Mutex<Option<Outside>>,
}

impl Seat {
    fn of(bit: usize) -> Seat {
        Seat { bit, ..Seat::default() }
    }

    /// Its bit.
    pub(crate) fn mask(&self) -> u64 {
        1 << self.bit
    }
}

/// By their bits. Whoever uses them for each packet has a copy, and hears when there are others.
#[derive(Clone, Debug, Default)]
pub(crate) struct Seats(Arc<[Option<Arc<Seat>>]>);

impl Seats {
    /// Of the first reactors, by their numbers.
    ///
    /// # Panics
    /// With more than [`MAX_REACTORS`].
    pub(crate) fn new(reactors: usize) -> Seats {
        assert!(reactors <= MAX_REACTORS, "{reactors} reactors");
        let seat = |number| {
            let seat = Seat::of(number);
            let _ = seat.reactor.set(number);
            Some(seat.into())
        };
        Seats((0..reactors).map(seat).collect())
    }

    pub(crate) fn all(&self) -> impl Iterator<Item = &Arc<Seat>> {
        self.0.iter().flatten()
    }

    /// The one of this bit.
    ///
    /// # Panics
    /// If there is none.
    pub(crate) fn at(&self, bit: usize) -> &Arc<Seat> {
        self.0.get(bit).and_then(Option::as_ref).unwrap_or_else(|| unreachable!("no seat {bit}"))
    }

    #[inline]
    fn chute(&self, bit: usize) -> Option<&Chute> {
        self.0.get(bit)?.as_ref()?.chute.get()
    }

    /// The way to a reactor that has a receive queue of a port.
    pub(crate) fn way_to(&self, port: &Port) -> Option<&Chute> {
        self.chute(port.places.load(Ordering::Relaxed).trailing_zeros() as usize)
    }

    /// The way to the other reactor that has the receive queue of this pair.
    pub(crate) fn way_to_pair(&self, port: &Port, pair: usize, own: usize) -> Option<&Chute> {
        let home = port.homes.get(pair)?.load(Ordering::Relaxed);
        self.chute(home).filter(|_| home != own)
    }

    fn with(&self, at: usize, seat: Option<Arc<Seat>>) -> Seats {
        let mut all = self.0.to_vec();
        all.resize(all.len().max(at + 1), None);
        all[at] = seat;
        Seats(all.into())
    }
}

pub(crate) fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A seat for a reactor that is about to start. Without one, it is free again.
#[derive(Debug)]
pub struct Reserved {
    hub: Arc<Hub>,
    seat: Arc<Seat>,
    taken: bool,
}

impl Reserved {
    /// The shard that sits there, on the reactor of this number, which this wakes.
    pub fn shard(mut self, reactor: usize, waker: Waker, witness: Witness) -> Shard {
        let _ = self.seat.reactor.set(reactor);
        let _ = self.seat.chute.set(Chute::new(waker));
        self.taken = true;
        Shard::new(Arc::clone(&self.hub), self.seat.bit).with_witness(witness)
    }
}

impl Drop for Reserved {
    fn drop(&mut self) {
        if !self.taken {
            self.hub.set_seat(self.seat.bit, None);
        }
    }
}

impl Hub {
    /// Lets packets go from one reactor to another.
    pub fn connect(&self, engine: &Engine) {
        for (at, seat) in self.seats().all().enumerate() {
            seat.chute.get_or_init(|| Chute::new(engine.waker(at)));
        }
    }

    pub(crate) fn seats(&self) -> Seats {
        locked(&self.seats).clone()
    }

    /// That of the shard on the reactor of this number.
    ///
    /// # Panics
    /// If there is none: no queue of a port's runs there.
    pub(crate) fn seat_on(&self, reactor: usize) -> Arc<Seat> {
        let seats = self.seats();
        let seat = seats.all().find(|seat| seat.reactor.get() == Some(&reactor));
        Arc::clone(seat.unwrap_or_else(|| unreachable!("a queue on reactor {reactor}, which has no shard")))
    }

    fn set_seat(&self, at: usize, seat: Option<Arc<Seat>>) {
        let mut seats = locked(&self.seats);
        *seats = seats.with(at, seat);
        drop(seats);
        self.tell_all(Change::Seats);
    }

    pub(crate) fn tell_all(&self, change: Change) {
        self.seats().all().for_each(|seat| seat.inbox.put(change));
    }

    /// Has packets on each reactor noted by these from now on. When it returns, nobody else notes any.
    pub fn set_witnesses(
        &self,
        mut witness: impl FnMut() -> Witness,
        engine: &Engine,
    ) -> Result<(), HubError> {
        for seat in self.seats().all() {
            *locked(&seat.witness) = witness();
            seat.inbox.put(Change::Witness);
        }
        // Twice: what is heard of in a round is done in the next one.
        if (0..2).all(|_| engine.turns(HEARING)) { Ok(()) } else { Err(HubError::Stuck) }
    }

    /// A seat for one reactor more, of which all shards know when this returns.
    pub fn reserve(self: &Arc<Self>, engine: &Engine) -> Result<Reserved, HubError> {
        let seats = self.seats();
        let at = (0..MAX_REACTORS).find(|&at| seats.0.get(at).is_none_or(Option::is_none));
        let at = at.ok_or(HubError::NoSeat)?;
        let seat = Arc::new(Seat::of(at));
        if let Some(switch) = &self.switch {
            switch.grow(at + 1);
        }
        self.set_seat(at, Some(Arc::clone(&seat)));
        let reserved = Reserved { hub: Arc::clone(self), seat, taken: false };
        if engine.turns(HEARING) { Ok(reserved) } else { Err(HubError::Stuck) }
    }

    /// No shard sits on a reactor any more that has no queues left and is about to end: what was on its way there has come, and the
    /// uplink, if it was there, is on another one. After that, its station may be dropped.
    pub fn leave(&self, retiring: &Retiring, engine: &Engine) -> Result<Left, HubError> {
        let turn =
            || if engine.turns(HEARING) && retiring.turns(HEARING) { Ok(()) } else { Err(HubError::Stuck) };
        let seat = self.seat_on(retiring.number());
        // Its shard knows that the queues have gone, and nobody sends there any more because of them.
        turn()?;
        if let Some(port) = self.uplink {
            self.move_uplink(&self.port(port.into()), &seat, &turn)?;
        }
        turn()?;
        self.set_seat(seat.bit, None);
        let emptied = || {
            turn()?;
            while seat.chute.get().is_some_and(Chute::has_parcel) {
                turn()?;
            }
            Ok(())
        };
        emptied().inspect_err(|_| self.sit_again(&seat))?;
        Ok(Left(seat))
    }

    /// The shard at a seat that was to leave stays, after all. What it has not been told meanwhile, it is told now.
    fn sit_again(&self, seat: &Arc<Seat>) {
        self.set_seat(seat.bit, Some(Arc::clone(seat)));
        seat.inbox.put(Change::Ports);
        (0..self.ports().len()).for_each(|port| seat.inbox.put(Change::Steering(port)));
    }

    /// Moves the uplink, if it is at this seat, to another one.
    fn move_uplink(
        &self,
        port: &Port,
        from: &Arc<Seat>,
        turn: &dyn Fn() -> Result<(), HubError>,
    ) -> Result<(), HubError> {
        if port.places.load(Ordering::SeqCst) & from.mask() == 0 {
            return Ok(());
        }
        let seats = self.seats();
        let Some(to) = seats.all().find(|seat| !Arc::ptr_eq(seat, from)) else { return Err(HubError::Stuck) };
        from.inbox.put(Change::UplinkGoes);
        let until = Instant::now() + HEARING;
        let outside = loop {
            turn()?;
            if let Some(outside) = locked(&from.luggage).take() {
                break outside;
            }
            if Instant::now() > until {
                // It comes back to where it was as soon as it can.
                from.inbox.put(Change::UplinkComes);
                return Err(HubError::Stuck);
            }
            std::thread::sleep(LOOK);
        };
        *locked(&to.luggage) = Some(outside);
        to.inbox.put(Change::UplinkComes);
        turn()
    }
}

/// What a shard has left behind.
#[derive(Debug)]
#[must_use]
pub struct Left(Arc<Seat>);

impl Left {
    /// Its shard has not been dropped, and stays.
    pub fn undo(self, hub: &Hub) {
        hub.sit_again(&self.0);
    }

    /// Counts packets that nobody was there for any more, once the shard is gone.
    pub fn count(&self, hub: &Hub) {
        let Some(chute) = self.0.chute.get() else { return };
        let ports = hub.ports();
        while let Some(parcel) = chute.receive() {
            if let Some(port) = ports.get(parcel.port).filter(|port| port.serial == parcel.serial) {
                port.miss_rx(parcel.pair);
            }
        }
    }
}
