//! A back end over another one that has requests take longer and fail, as [`Faults`] say: for rehearsals and tests.
//!
//! ```text
//! begin ─► fails at once, or: the back end below ─► over ─► timer (io_uring) ─► answered
//! ```
//!
//! What fails is not carried out; of a torn write, only a part of its sectors, from the first on, before it fails. What
//! is late is carried out at once and answered later, each request by itself: others may overtake it.
#![allow(unsafe_code)] // timers carry the address of their time

use std::sync::Arc;
use std::time::Duration;

use fastrand::Rng;
use io_uring::{opcode, types};
use poll_engine::engine::queue::{Queue, Request};
use poll_engine::engine::reactor::Io;
use poll_engine::memory::map::MemoryMap;
use poll_engine::ring::chain::{ChainView, HeldChain};
use poll_engine::uring::FixedBuffers;

use super::{Backend, Begun, Failure, Outcome};
use crate::faults::{Faults, Kind};
use crate::request::{Operation, SECTOR};

/// Timers have tags from here on, each with the number of its slot. No back end has so many operations.
const TIMERS: u32 = 1 << 30;
/// No slot.
const NONE: u16 = u16::MAX;

/// What becomes of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Fate {
    /// As it was asked for.
    operation: Operation,
    delay: Duration,
    fails: bool,
}

impl Fate {
    fn outcome(self, outcome: Outcome) -> Outcome {
        if self.fails { Outcome::Failed(Failure::OnPurpose) } else { outcome }
    }
}

/// A request with a fate.
#[derive(Default)]
struct Slot {
    /// The request's id, and the next slot that is [found](Slots::remove) at the same place.
    id: u16,
    next: u16,
    fate: Option<Fate>,
    /// The chain, if it is to be late.
    held: HeldChain,
    /// What waits for its time to be answered.
    over: Option<(Request, Outcome)>,
    time: types::Timespec,
}

/// The requests with a fate, found by their ids. A driver may give two the same one: then each has the fate of either.
struct Slots {
    all: Box<[Slot]>,
    free: Vec<u16>,
    /// Of the ids with the same remainder, the first slot.
    first: Box<[u16]>,
}

impl Slots {
    fn new(ring_size: u16) -> Slots {
        let size = ring_size.max(1);
        Slots {
            all: std::iter::repeat_with(Slot::default).take(size.into()).collect(),
            free: (0..size).rev().collect(),
            first: vec![NONE; size.into()].into(),
        }
    }

    fn insert(&mut self, id: u16, fate: Fate) -> u16 {
        // The ring lets no more chains be in flight than it has descriptors.
        let Some(number) = self.free.pop() else { unreachable!("more requests than ring slots") };
        let first = &mut self.first[usize::from(id) % self.all.len()];
        let slot = &mut self.all[usize::from(number)];
        (slot.id, slot.next, slot.fate) = (id, *first, Some(fate));
        *first = number;
        number
    }

    /// Finds a slot and has it not found again. It is to be [released](Self::release).
    fn remove(&mut self, id: u16) -> Option<u16> {
        let place = usize::from(id) % self.all.len();
        let (mut before, mut number) = (NONE, self.first[place]);
        while number != NONE {
            let Slot { id: found, next, .. } = self.all[usize::from(number)];
            if found == id {
                match before {
                    NONE => self.first[place] = next,
                    before => self.all[usize::from(before)].next = next,
                }
                return Some(number);
            }
            (before, number) = (number, next);
        }
        None
    }

    fn release(&mut self, number: u16) {
        self.all[usize::from(number)].held.release();
        self.free.push(number);
    }

    /// What the back end below has ended is answered, or is `late`, as its fate has it.
    fn meet(
        &mut self,
        late: &mut Vec<u16>,
        (request, operation, outcome): (Request, Operation, Outcome),
        chain: ChainView<'_>,
        finish: &mut dyn FnMut(Request, Operation, Outcome, ChainView<'_>),
    ) {
        let Some(number) = self.remove(request.id()) else {
            return finish(request, operation, outcome, chain);
        };
        let slot = &mut self.all[usize::from(number)];
        let Some(fate) = slot.fate else { unreachable!("a slot without a fate") };
        let outcome = fate.outcome(outcome);
        if fate.delay.is_zero() {
            self.release(number);
            return finish(request, fate.operation, outcome, chain);
        }
        slot.over = Some((request, outcome));
        late.push(number);
    }
}

/// The back end of one queue.
pub struct Faulty<B> {
    inner: B,
    faults: Arc<Faults>,
    random: Rng,
    slots: Slots,
    /// Those that are over and whose timers are to be set.
    late: Vec<u16>,
}

impl<B: Backend> Faulty<B> {
    /// Over `inner`, for a queue with `ring_size` slots, whose random numbers begin with `seed`.
    pub fn new(inner: B, faults: Arc<Faults>, seed: u64, ring_size: u16) -> Faulty<B> {
        Faulty {
            inner,
            faults,
            random: Rng::with_seed(seed),
            slots: Slots::new(ring_size),
            late: Vec::with_capacity(ring_size.into()),
        }
    }

    /// What becomes of a request, and what is carried out of it.
    fn draw(&mut self, operation: Operation) -> (Fate, Option<Operation>) {
        let kind = Kind::of(&operation);
        let random = &mut self.random;
        let delay = self.faults.delay(kind).map(|delay| delay.draw(random)).unwrap_or_default();
        let fails = self.faults.error(kind).is_some_and(|error| error.comes(random));
        let tears = matches!(operation, Operation::Write { .. })
            && self.faults.torn.is_some_and(|torn| torn.comes(random));
        let (fails, carried_out) = match operation {
            _ if fails => (true, None),
            Operation::Write { offset, len } if tears => {
                // Never all of it.
                let len = random.u32(0..len / SECTOR as u32) * SECTOR as u32;
                (true, (len > 0).then_some(Operation::Write { offset, len }))
            }
            _ => (false, Some(operation)),
        };
        (Fate { operation, delay, fails }, carried_out)
    }

    /// Has what is over wait for its time.
    fn wait(&mut self, io: &mut Io<'_>, number: u16) {
        let slot = &mut self.slots.all[usize::from(number)];
        slot.time = slot.fate.map(|fate| fate.delay).unwrap_or_default().into();
        let timer = opcode::Timeout::new(&raw const slot.time).build();
        let timer = timer.user_data(io.label(TIMERS | u32::from(number)));
        // SAFETY: the time is in a slot, which stays where it is for as long as the back end, which outlives what is
        // pending (`QueueHandler::detach`), and is not changed before the timer has come.
        unsafe { io.uring().push(&timer) };
    }
}

impl<B: Backend> Backend for Faulty<B> {
    fn has_room(&self) -> bool {
        self.inner.has_room()
    }

    fn weight(&self, operation: &Operation) -> u32 {
        self.inner.weight(operation)
    }

    fn begin(&mut self, request: Request, operation: Operation, queue: &mut Queue, io: &mut Io<'_>) -> Begun {
        let (fate, carried_out) = self.draw(operation);
        let is_late = !fate.delay.is_zero();
        if !is_late && !fate.fails {
            return self.inner.begin(request, operation, queue, io);
        }
        let id = request.id();
        let number = self.slots.insert(id, fate);
        if is_late {
            queue.copy_chain(&mut self.slots.all[usize::from(number)].held);
        }
        let begun = match carried_out {
            Some(operation) => self.inner.begin(request, operation, queue, io),
            None => Begun::Over(request, Outcome::Done),
        };
        let Begun::Over(request, outcome) = begun else { return Begun::Pending };
        // The latest with this id.
        self.slots.remove(id);
        let outcome = fate.outcome(outcome);
        if !is_late {
            self.slots.release(number);
            return Begun::Over(request, outcome);
        }
        self.slots.all[usize::from(number)].over = Some((request, outcome));
        self.wait(io, number);
        Begun::Pending
    }

    fn attach(&mut self, io: &mut Io<'_>) {
        self.inner.attach(io);
    }

    fn detach(&mut self, io: &mut Io<'_>) {
        self.inner.detach(io);
    }

    fn complete(
        &mut self,
        io: &mut Io<'_>,
        tag: u32,
        result: i32,
        finish: &mut dyn FnMut(Request, Operation, Outcome, ChainView<'_>),
    ) {
        if tag & !u32::from(u16::MAX) == TIMERS {
            let number = tag as u16;
            let Slot { over, fate, held, .. } = &mut self.slots.all[usize::from(number)];
            // Whatever the timer's result is (-ETIME when its time has come), nothing else comes.
            if let (Some((request, outcome)), Some(fate), Some(chain)) =
                (over.take(), fate.take(), held.view())
            {
                finish(request, fate.operation, outcome, chain);
            }
            return self.slots.release(number);
        }
        let Faulty { inner, slots, late, .. } = self;
        inner.complete(io, tag, result, &mut |request, operation, outcome, chain| {
            slots.meet(late, (request, operation, outcome), chain, finish);
        });
        while let Some(number) = self.late.pop() {
            self.wait(io, number);
        }
    }

    fn turn(
        &mut self,
        io: &mut Io<'_>,
        finish: &mut dyn FnMut(Request, Operation, Outcome, ChainView<'_>),
    ) -> usize {
        let Faulty { inner, slots, late, .. } = self;
        let ended = inner.turn(io, &mut |request, operation, outcome, chain| {
            slots.meet(late, (request, operation, outcome), chain, finish);
        });
        while let Some(number) = self.late.pop() {
            self.wait(io, number);
        }
        ended
    }

    fn prepare_sleep(&mut self, io: &mut Io<'_>) -> bool {
        self.inner.prepare_sleep(io)
    }

    fn register_memory(&mut self, mode: FixedBuffers, map: &MemoryMap) {
        self.inner.register_memory(mode, map);
    }

    fn uses_fixed_buffers(&self) -> bool {
        self.inner.uses_fixed_buffers()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fate(ms: u64) -> Fate {
        Fate { operation: Operation::Flush, delay: Duration::from_millis(ms), fails: false }
    }

    #[test]
    fn requests_are_found_by_their_ids() {
        let mut slots = Slots::new(4);
        // The same remainder, and the same id twice.
        let numbers = [3, 7, 7, 65535].map(|id| slots.insert(id, fate(id.into())));
        assert_eq!(slots.remove(11), None);
        assert_eq!(slots.remove(7), Some(numbers[2]), "the latest");
        slots.release(numbers[2]);
        assert_eq!(slots.remove(3), Some(numbers[0]));
        assert_eq!(slots.remove(65535), Some(numbers[3]));
        assert_eq!(slots.insert(11, fate(1)), numbers[2], "what was released");
        assert_eq!(slots.remove(7), Some(numbers[1]));
        assert_eq!((slots.remove(7), slots.remove(11)), (None, Some(numbers[2])));
    }

    #[test]
    fn a_torn_write_is_the_beginning_of_it_and_fails() {
        let faults = Arc::new("torn=1,seed=3".parse::<Faults>().unwrap());
        let mut faulty = Faulty::new(super::super::null::Null, faults, 3, 16);
        let write = Operation::Write { offset: 4096, len: 2048 };
        let mut found = [0; 4];
        for _ in 0..400 {
            let (fate, part) = faulty.draw(write);
            assert!(fate.fails && fate.operation == write);
            let len = match part {
                None => 0,
                Some(Operation::Write { offset: 4096, len }) if len > 0 && len % 512 == 0 => len,
                other => panic!("{other:?}"),
            };
            found[len as usize / 512] += 1;
        }
        assert!(found.iter().all(|&n| n > 50), "{found:?}");
        let read = Operation::Read { offset: 0, len: 512 };
        assert_eq!(
            faulty.draw(read),
            (Fate { operation: read, delay: Duration::ZERO, fails: false }, Some(read))
        );
    }
}
