//! The way of records from a reactor to the writer: a ring with one producer and one consumer.
//!
//! Slots are plain atomics, so there is nothing unsafe about it, and on the producer's side they cost no more than
//! ordinary stores. A full ring drops what comes and counts it: a reactor never waits for a file.

use std::sync::atomic::{AtomicU64, Ordering};

use poll_engine::stats::Counter;

/// Records that a ring holds: of a queue with a million requests a second, 30 ms.
pub const CAPACITY: u64 = 1 << 15;

/// What the reactor notes about a request; times are raw readings of the clock, for the writer to convert.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Note {
    /// When it was taken.
    pub since: u64,
    /// When it was over.
    pub until: u64,
    /// Sector, kind and status, packed as in the file.
    pub what: u64,
    /// Bytes of data.
    pub len: u32,
}

/// A number that does not share a cache line, nor the one fetched along with it, with the other side's.
#[derive(Debug, Default)]
#[repr(align(128))]
struct Apart(AtomicU64);

/// The ring of one queue.
#[derive(Debug)]
pub struct NoteRing {
    slots: Box<[[AtomicU64; 4]]>,
    /// Written by the producer: notes before this are whole.
    tail: Apart,
    /// Written by the consumer: slots before this are free again.
    head: Apart,
    /// Notes dropped because the ring was full.
    pub lost: Counter,
}

impl Default for NoteRing {
    fn default() -> Self {
        NoteRing {
            slots: std::iter::repeat_with(Default::default).take(CAPACITY as usize).collect(),
            tail: Apart::default(),
            head: Apart::default(),
            lost: Counter::default(),
        }
    }
}

impl NoteRing {
    #[inline]
    fn slot(&self, at: u64) -> &[AtomicU64; 4] {
        &self.slots[(at & (CAPACITY - 1)) as usize]
    }

    /// Takes all whole notes out, oldest first; how many. Only the consumer may.
    pub fn drain(&self, mut each: impl FnMut(Note)) -> u64 {
        let head = self.head.0.load(Ordering::Relaxed);
        let tail = self.tail.0.load(Ordering::Acquire);
        for at in head..tail {
            let [since, until, what, len] = self.slot(at).each_ref().map(|word| word.load(Ordering::Relaxed));
            each(Note { since, until, what, len: len as u32 });
        }
        self.head.0.store(tail, Ordering::Release);
        tail - head
    }
}

/// The producer's place in a ring. There is one at a time: that of the reactor which has the queue.
#[derive(Debug)]
pub struct Producer {
    /// What the consumer may see ends here.
    shown: u64,
    /// What was put ends here.
    end: u64,
    /// The consumer had come this far when it was last looked at.
    head: u64,
}

impl Producer {
    /// Goes on where the producer before has stopped.
    pub fn new(ring: &NoteRing) -> Producer {
        let end = ring.tail.0.load(Ordering::Acquire);
        Producer { shown: end, end, head: ring.head.0.load(Ordering::Acquire) }
    }

    /// Whether there is room for `n`; if not, they count as lost.
    #[inline]
    pub fn reserve(&mut self, ring: &NoteRing, n: u64) -> bool {
        if self.end + n - self.head <= CAPACITY {
            return true;
        }
        self.head = ring.head.0.load(Ordering::Acquire);
        let fits = self.end + n - self.head <= CAPACITY;
        if !fits {
            ring.lost.add(1);
        }
        fits
    }

    /// Puts a note into the room that was reserved; when it was over is filled in by [`show`](Self::show).
    #[inline]
    pub fn put(&mut self, ring: &NoteRing, since: u64, what: u64, len: u32) {
        let [a, _, c, d] = ring.slot(self.end);
        a.store(since, Ordering::Relaxed);
        c.store(what, Ordering::Relaxed);
        d.store(u64::from(len), Ordering::Relaxed);
        self.end += 1;
    }

    /// Whether anything was put that the consumer does not see yet.
    #[inline]
    pub fn has_unshown(&self) -> bool {
        self.shown != self.end
    }

    /// Lets the consumer see what was put: all of it was over at `until`.
    #[inline]
    pub fn show(&mut self, ring: &NoteRing, until: u64) {
        for at in self.shown..self.end {
            ring.slot(at)[1].store(until, Ordering::Relaxed);
        }
        self.shown = self.end;
        ring.tail.0.store(self.end, Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicBool;

    fn drained(ring: &NoteRing) -> Vec<Note> {
        let mut notes = Vec::new();
        ring.drain(|note| notes.push(note));
        notes
    }

    #[test]
    fn nothing_is_seen_before_it_is_whole() {
        let ring = NoteRing::default();
        let mut producer = Producer::new(&ring);
        assert!(producer.reserve(&ring, 1));
        producer.put(&ring, 1, 2, 3);
        assert_eq!(drained(&ring), []);
        producer.show(&ring, 4);
        assert_eq!(drained(&ring), [Note { since: 1, until: 4, what: 2, len: 3 }]);
        assert_eq!(drained(&ring), []);
    }

    #[test]
    fn a_full_ring_drops_and_counts_and_takes_notes_again_when_drained() {
        let ring = NoteRing::default();
        let mut producer = Producer::new(&ring);
        for i in 0..CAPACITY {
            assert!(producer.reserve(&ring, 1));
            producer.put(&ring, i, 0, 0);
        }
        producer.show(&ring, 0);
        assert!(!producer.reserve(&ring, 1));
        assert!(!producer.reserve(&ring, 2));
        assert_eq!(ring.lost.get(), 2);
        assert_eq!(drained(&ring).len() as u64, CAPACITY);
        assert!(producer.reserve(&ring, 1));
        // A queue that starts again goes on in the same ring.
        let mut next = Producer::new(&ring);
        assert!(next.reserve(&ring, CAPACITY));
        next.put(&ring, 9, 0, 0);
        next.show(&ring, 0);
        assert_eq!(drained(&ring)[0].since, 9);
    }

    #[test]
    fn notes_arrive_in_order_and_those_missing_are_counted() {
        const NOTES: u64 = 400_000;
        let ring = NoteRing::default();
        let done = AtomicBool::new(false);
        let seen = std::thread::scope(|scope| {
            let consumer = scope.spawn(|| {
                let mut seen = Vec::new();
                loop {
                    // Looked at first: what came before it is then seen.
                    let last = done.load(Ordering::Acquire);
                    ring.drain(|note| {
                        assert_eq!((note.until, note.what, note.len), (note.since, !note.since, 5));
                        seen.push(note.since);
                    });
                    if last {
                        return seen;
                    }
                }
            });
            let mut producer = Producer::new(&ring);
            for i in 0..NOTES {
                if producer.reserve(&ring, 1) {
                    producer.put(&ring, i, !i, 5);
                }
                if producer.has_unshown() {
                    producer.show(&ring, i);
                }
            }
            done.store(true, Ordering::Release);
            consumer.join()
        });
        let Ok(seen) = seen else { panic!("the consumer saw a note that was not whole") };
        assert!(seen.is_sorted_by(|a, b| a < b));
        assert_eq!(seen.len() as u64 + ring.lost.get(), NOTES);
    }
}
