//! What fuzzers and the tests here feed with bytes. Nothing may panic, and what each says of its subject must hold.
#![allow(clippy::unwrap_used)]

pub mod records;
pub mod rings;
pub mod sessions;

/// Numbers out of bytes; zero when there are no more.
pub struct Bytes<'a>(pub &'a [u8]);

impl<'a> Bytes<'a> {
    pub fn take(&mut self, n: usize) -> &'a [u8] {
        let (head, rest) = self.0.split_at(n.min(self.0.len()));
        self.0 = rest;
        head
    }

    pub fn byte(&mut self) -> u8 {
        self.take(1).first().copied().unwrap_or(0)
    }

    pub fn half(&mut self) -> u16 {
        u16::from(self.byte()) | u16::from(self.byte()) << 8
    }
}
