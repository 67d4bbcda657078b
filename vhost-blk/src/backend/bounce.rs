//! Buffers that stand in for guest memory: where it is not aligned as direct I/O wants it, and where somebody else than the
//! kernel is to read or write the data.
#![allow(unsafe_code)] // pages as bytes

use std::collections::VecDeque;

#[repr(C, align(4096))]
#[derive(Clone, Copy)]
struct Page([u8; 4096]);

/// A page-aligned buffer.
pub struct Bounce(Vec<Page>);

impl Bounce {
    fn new(pages: usize) -> Bounce {
        Bounce(vec![Page([0; 4096]); pages])
    }

    /// A buffer of zeros.
    pub fn zeros(bytes: usize) -> Bounce {
        Bounce::new(bytes.div_ceil(size_of::<Page>()))
    }

    /// All of it.
    pub fn bytes(&self) -> &[u8] {
        let len = size_of_val(self.0.as_slice());
        // SAFETY: a Page is 4096 bytes without padding.
        unsafe { std::slice::from_raw_parts(self.0.as_ptr().cast(), len) }
    }

    /// All of it, to be written to.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        let len = size_of_val(self.0.as_slice());
        // SAFETY: a Page is 4096 bytes without padding, and any bytes make one.
        unsafe { std::slice::from_raw_parts_mut(self.0.as_mut_ptr().cast(), len) }
    }
}

/// The buffers of a queue, and who waits for one.
pub struct Pool {
    pages: usize,
    max: usize,
    free: Vec<Bounce>,
    made: usize,
    waiting: VecDeque<u32>,
}

impl Pool {
    /// Of at most `max` buffers with this many pages. Further requests that need one wait their turn.
    pub fn new(pages: usize, max: usize) -> Pool {
        Pool { pages, max, free: Vec::new(), made: 0, waiting: VecDeque::new() }
    }

    /// Bytes of a buffer.
    pub fn size(&self) -> u32 {
        (self.pages * size_of::<Page>()) as u32
    }

    /// A buffer for the request of `tag`, which waits for one if there is none.
    pub fn take(&mut self, tag: u32) -> Option<Bounce> {
        if let Some(buffer) = self.free.pop() {
            return Some(buffer);
        }
        if self.made == self.max {
            self.waiting.push_back(tag);
            return None;
        }
        self.made += 1;
        Some(Bounce::new(self.pages))
    }

    /// A buffer comes back.
    pub fn give_back(&mut self, buffer: Bounce) {
        self.free.push(buffer);
    }

    /// Who is to try again, now that there is a buffer.
    pub fn woken(&mut self) -> Option<u32> {
        if self.free.is_empty() { None } else { self.waiting.pop_front() }
    }
}
