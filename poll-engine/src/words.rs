//! The way of records from a reactor to a thread that writes them: words in a ring with one producer and one consumer.
//!
//! Slots are plain atomics, so there is nothing unsafe about it, and on the producer's side they cost no more than
//! ordinary stores. What has no room in a full ring is dropped and counted: a reactor never waits for a file.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::stats::Counter;

/// A number that does not share a cache line, nor the one fetched along with it, with the other side's.
#[derive(Debug, Default)]
#[repr(align(128))]
struct Apart(AtomicU64);

/// The ring.
#[derive(Debug)]
pub struct WordRing {
    slots: Box<[AtomicU64]>,
    /// Written by the producer: words before this are whole.
    tail: Apart,
    /// Written by the consumer: slots before this are free again.
    head: Apart,
    /// Times that there was no room.
    pub lost: Counter,
}

impl WordRing {
    /// With room for `capacity` words, a power of two.
    pub fn new(capacity: u64) -> WordRing {
        assert!(capacity.is_power_of_two());
        WordRing {
            slots: std::iter::repeat_with(AtomicU64::default).take(capacity as usize).collect(),
            tail: Apart::default(),
            head: Apart::default(),
            lost: Counter::default(),
        }
    }

    /// How many words it has room for.
    #[inline]
    pub fn capacity(&self) -> u64 {
        self.slots.len() as u64
    }

    #[inline]
    fn slot(&self, at: u64) -> &AtomicU64 {
        &self.slots[(at & (self.slots.len() as u64 - 1)) as usize]
    }

    /// Gives what is shown to `take`, oldest first, and frees it; how many words that was. Only the consumer may.
    pub fn drain(&self, take: impl FnOnce(&mut Words<'_>)) -> u64 {
        let head = self.head.0.load(Ordering::Relaxed);
        let tail = self.tail.0.load(Ordering::Acquire);
        take(&mut Words { ring: self, next: head, end: tail });
        self.head.0.store(tail, Ordering::Release);
        tail - head
    }
}

/// Words being drained.
#[derive(Debug)]
pub struct Words<'a> {
    ring: &'a WordRing,
    next: u64,
    end: u64,
}

impl Iterator for Words<'_> {
    type Item = u64;

    #[inline]
    fn next(&mut self) -> Option<u64> {
        if self.next == self.end {
            return None;
        }
        let word = self.ring.slot(self.next).load(Ordering::Relaxed);
        self.next += 1;
        Some(word)
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
    pub fn new(ring: &WordRing) -> Producer {
        let end = ring.tail.0.load(Ordering::Acquire);
        Producer { shown: end, end, head: ring.head.0.load(Ordering::Acquire) }
    }

    /// Whether there is room for `n` words; if not, that counts as one loss.
    #[inline]
    pub fn reserve(&mut self, ring: &WordRing, n: u64) -> bool {
        if self.end + n - self.head <= ring.capacity() {
            return true;
        }
        self.head = ring.head.0.load(Ordering::Acquire);
        let fits = self.end + n - self.head <= ring.capacity();
        if !fits {
            ring.lost.add(1);
        }
        fits
    }

    /// Puts a word into the room that was reserved.
    #[inline]
    pub fn put(&mut self, ring: &WordRing, word: u64) {
        ring.slot(self.end).store(word, Ordering::Relaxed);
        self.end += 1;
    }

    /// Where what the consumer does not see yet lies.
    #[inline]
    pub fn unshown(&self) -> Range<u64> {
        self.shown..self.end
    }

    /// Puts another word to a place that the consumer does not see yet.
    #[inline]
    pub fn put_at(&self, ring: &WordRing, at: u64, word: u64) {
        debug_assert!(self.unshown().contains(&at));
        ring.slot(at).store(word, Ordering::Relaxed);
    }

    /// Lets the consumer see what was put.
    #[inline]
    pub fn show(&mut self, ring: &WordRing) {
        self.shown = self.end;
        ring.tail.0.store(self.end, Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicBool;

    fn drained(ring: &WordRing) -> Vec<u64> {
        let mut all = Vec::new();
        ring.drain(|words| all.extend(words));
        all
    }

    #[test]
    fn nothing_is_seen_before_it_is_shown() {
        let ring = WordRing::new(8);
        let mut producer = Producer::new(&ring);
        assert!(producer.reserve(&ring, 2));
        producer.put(&ring, 1);
        producer.put(&ring, 2);
        assert!(drained(&ring).is_empty());
        producer.put_at(&ring, producer.unshown().start, 3);
        producer.show(&ring);
        assert_eq!(drained(&ring), [3, 2]);
        assert!(drained(&ring).is_empty());
    }

    #[test]
    fn what_does_not_fit_is_counted_and_room_comes_back() {
        let ring = WordRing::new(8);
        let mut producer = Producer::new(&ring);
        assert!(producer.reserve(&ring, 8) && !producer.reserve(&ring, 9));
        (0..8).for_each(|word| producer.put(&ring, word));
        producer.show(&ring);
        assert!(!producer.reserve(&ring, 1));
        assert_eq!(ring.lost.get(), 2);
        assert_eq!(drained(&ring), (0..8).collect::<Vec<_>>());
        // A queue that starts again goes on in the same ring.
        let mut next = Producer::new(&ring);
        assert!(next.reserve(&ring, 8));
        next.put(&ring, 9);
        next.show(&ring);
        assert_eq!(drained(&ring), [9]);
    }

    #[test]
    fn records_arrive_whole_and_in_order_and_those_missing_are_counted() {
        const RECORDS: u64 = 400_000;
        let ring = WordRing::new(1 << 10);
        let done = AtomicBool::new(false);
        let seen = std::thread::scope(|scope| {
            let consumer = scope.spawn(|| {
                let mut seen = Vec::new();
                loop {
                    // Looked at first: what came before it is then seen.
                    let last = done.load(Ordering::Acquire);
                    ring.drain(|words| {
                        while let Some(number) = words.next() {
                            assert_eq!(words.next(), Some(!number));
                            seen.push(number);
                        }
                    });
                    if last {
                        return seen;
                    }
                }
            });
            let mut producer = Producer::new(&ring);
            for number in 0..RECORDS {
                if producer.reserve(&ring, 2) {
                    producer.put(&ring, number);
                    producer.put(&ring, !number);
                    producer.show(&ring);
                }
            }
            done.store(true, Ordering::Release);
            consumer.join()
        });
        let Ok(seen) = seen else { panic!("the consumer saw a record that was not whole") };
        assert!(seen.is_sorted_by(|a, b| a < b));
        assert_eq!(seen.len() as u64 + ring.lost.get(), RECORDS);
    }
}
