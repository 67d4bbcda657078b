//! The way of notes from a reactor to the writer: records of four words ([`poll_engine::words`]).

use poll_engine::words::{self, WordRing};

/// Notes that a ring holds: of a queue with a million requests a second, 30 ms.
pub const CAPACITY: u64 = 1 << 15;
/// Words of a note, and which of them says when it was over.
const WORDS: u64 = 4;
const UNTIL: u64 = 1;

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

/// The ring of one queue.
#[derive(Debug)]
pub struct NoteRing(WordRing);

impl Default for NoteRing {
    fn default() -> Self {
        NoteRing(WordRing::new(WORDS * CAPACITY))
    }
}

impl NoteRing {
    /// Takes all whole notes out, oldest first; how many. Only the consumer may.
    pub fn drain(&self, mut each: impl FnMut(Note)) -> u64 {
        let words = self.0.drain(|words| {
            while let (Some(since), Some(until), Some(what), Some(len)) =
                (words.next(), words.next(), words.next(), words.next())
            {
                each(Note { since, until, what, len: len as u32 });
            }
        });
        words / WORDS
    }

    /// Notes dropped because the ring was full.
    pub fn lost(&self) -> u64 {
        self.0.lost.get()
    }
}

/// The producer's place in a ring. There is one at a time: that of the reactor which has the queue.
#[derive(Debug)]
pub struct Producer(words::Producer);

impl Producer {
    /// Goes on where the producer before has stopped.
    pub fn new(ring: &NoteRing) -> Producer {
        Producer(words::Producer::new(&ring.0))
    }

    /// Whether there is room for `n`; if not, they count as lost.
    #[inline]
    pub fn reserve(&mut self, ring: &NoteRing, n: u64) -> bool {
        self.0.reserve(&ring.0, WORDS * n)
    }

    /// Puts a note into the room that was reserved; when it was over is filled in by [`show`](Self::show).
    #[inline]
    pub fn put(&mut self, ring: &NoteRing, since: u64, what: u64, len: u32) {
        for word in [since, 0, what, u64::from(len)] {
            self.0.put(&ring.0, word);
        }
    }

    /// Whether anything was put that the consumer does not see yet.
    #[inline]
    pub fn has_unshown(&self) -> bool {
        !self.0.unshown().is_empty()
    }

    /// Lets the consumer see what was put: all of it was over at `until`.
    #[inline]
    pub fn show(&mut self, ring: &NoteRing, until: u64) {
        for at in self.0.unshown().step_by(WORDS as usize) {
            self.0.put_at(&ring.0, at + UNTIL, until);
        }
        self.0.show(&ring.0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
        assert_eq!(ring.lost(), 2);
        assert_eq!(drained(&ring).len() as u64, CAPACITY);
        assert!(producer.reserve(&ring, 1));
        // A queue that starts again goes on in the same ring.
        let mut next = Producer::new(&ring);
        assert!(next.reserve(&ring, CAPACITY));
        next.put(&ring, 9, 0, 0);
        next.show(&ring, 0);
        assert_eq!(drained(&ring)[0].since, 9);
    }
}
