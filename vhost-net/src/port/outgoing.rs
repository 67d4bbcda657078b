//! Frames on their way out of an uplink: small ones are copied and go together, large ones go from where they are.
#![allow(unsafe_code)] // addresses of guest memory for the kernel

use std::io;
use std::marker::PhantomData;
use std::mem::MaybeUninit;

use libc::iovec;
use poll_engine::memory::slice::GuestSlice;

use crate::header::{GSO_NONE, VnetHdr};

/// Bytes of a frame, header and all, that is copied to be sent with others.
const SMALL: usize = 2048;
/// Most parts of a frame that is sent from where it is. Linux takes 1024 at most.
const PARTS: usize = 256;

/// Whether a frame of `len` bytes is to be copied.
pub fn is_small(header: &VnetHdr, len: usize) -> bool {
    header.gso_type == GSO_NONE && len + size_of_val(&header.to_bytes()) <= SMALL
}

/// Small frames that wait to be sent, each with the header before it that the kernel wants.
#[derive(Debug)]
pub struct Staged {
    bytes: Vec<u8>,
    ends: Vec<usize>,
    most: usize,
}

impl Staged {
    /// Room for `most` frames, which stay where they are until all are [cleared](Self::clear).
    pub fn new(most: usize) -> Staged {
        Staged { bytes: Vec::with_capacity(most * SMALL), ends: Vec::with_capacity(most), most }
    }

    /// Adds a frame; false if there is no room for it.
    pub fn push(
        &mut self,
        header: &[u8],
        head: &[u8],
        rest: &mut dyn Iterator<Item = GuestSlice<'_>>,
    ) -> bool {
        let begin = self.bytes.len();
        if self.ends.len() == self.most || header.len() + head.len() > SMALL {
            return false;
        }
        self.bytes.extend_from_slice(header);
        self.bytes.extend_from_slice(head);
        for slice in rest {
            let at = self.bytes.len();
            if at - begin + slice.len() > SMALL {
                self.bytes.truncate(begin);
                return false;
            }
            self.bytes.resize(at + slice.len(), 0);
            slice.read(&mut self.bytes[at..]);
        }
        self.ends.push(self.bytes.len());
        true
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.ends.len()
    }

    /// Whether there is room for no more.
    pub fn is_full(&self) -> bool {
        self.ends.len() == self.most
    }

    /// One of them, with its header.
    pub fn frame(&self, at: usize) -> &[u8] {
        let begin = if at == 0 { 0 } else { self.ends[at - 1] };
        &self.bytes[begin..self.ends[at]]
    }

    /// Lets them all go.
    pub fn clear(&mut self) {
        self.bytes.clear();
        self.ends.clear();
    }
}

/// A frame in parts, with its header before it, for one call of the kernel.
pub struct Parts<'a, 'b> {
    vectors: [MaybeUninit<iovec>; PARTS],
    count: usize,
    /// Bytes of all of them.
    pub len: usize,
    lifetime: PhantomData<(&'a [u8], GuestSlice<'b>)>,
}

impl<'a, 'b> Parts<'a, 'b> {
    /// Of `header`, `head` and the `rest` of a guest's memory; `None` if they are too many.
    pub fn new(
        header: &'a [u8],
        head: &'a [u8],
        rest: &mut dyn Iterator<Item = GuestSlice<'b>>,
    ) -> Option<Parts<'a, 'b>> {
        let lifetime = PhantomData;
        let mut parts = Parts { vectors: [MaybeUninit::uninit(); PARTS], count: 0, len: 0, lifetime };
        let own = [header, head].map(|part| (part.as_ptr().cast_mut(), part.len()));
        for (base, len) in own.into_iter().chain(rest.map(|slice| (slice.host_addr(), slice.len()))) {
            let vector = parts.vectors.get_mut(parts.count)?;
            vector.write(iovec { iov_base: base.cast(), iov_len: len });
            (parts.count, parts.len) = (parts.count + 1, parts.len + len);
        }
        Some(parts)
    }

    /// Has `call` read them: given the vectors and how many they are, it returns what the system call did.
    pub fn read_by(&mut self, call: impl FnOnce(*mut iovec, usize) -> libc::ssize_t) -> io::Result<usize> {
        let done = call(self.vectors.as_mut_ptr().cast(), self.count);
        usize::try_from(done).map_err(|_| io::Error::last_os_error())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use poll_engine::memory::ram::Ram;

    #[test]
    fn a_frame_that_finds_no_room_leaves_the_others_as_they_are() {
        let mut ram = Ram::new(0, 1 << 16, false).unwrap();
        let at = ram.alloc(4096, 1).unwrap();
        let slice = |len| ram.map().slice(at, len).unwrap();
        let mut staged = Staged::new(2);
        assert!(staged.push(&[1; 12], &[2; 60], &mut std::iter::once(slice(100))));
        assert!(!staged.push(&[1; 12], &[2; 60], &mut [slice(1000), slice(1000)].into_iter()));
        assert!(!staged.push(&[1; 12], &[2; 2048], &mut std::iter::empty()));
        assert!(staged.push(&[3; 12], &[4; 36], &mut [slice(1000), slice(1000)].into_iter()));
        assert!(staged.is_full() && !staged.push(&[1; 12], &[2; 60], &mut std::iter::empty()));
        assert_eq!((staged.frame(0).len(), staged.frame(1).len()), (172, 2048));
        assert_eq!((staged.frame(0)[12], staged.frame(1)[0]), (2, 3));
        staged.clear();
        assert_eq!(staged.len(), 0);
    }
}
