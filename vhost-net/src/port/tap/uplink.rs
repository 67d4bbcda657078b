//! A tap as a switch's uplink, through the station's io_uring.
//!
//! ```text
//! tap readable ─► a batch of reads ─► buffers of the host ─► take
//! small frames ─► one buffer ─► a batch of writes ─► tap          large frames straight from the guest ─► writev ─► tap
//! ```
//!
//! As in [`receive`](super::receive) and [`transmit`](super::transmit) nothing waits (`RWF_NOWAIT`): the kernel carries all
//! out, in order, while it is submitted. A large frame is written at once and not with the others of its round, because
//! its guest gets the buffers back before the round is over; the system call is nothing beside 64 KiB to be copied.
#![allow(unsafe_code)] // submissions carry addresses of buffers

use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::sync::Arc;

use io_uring::{opcode, types};
use poll_engine::engine::reactor::Io;
use poll_engine::memory::slice::GuestSlice;

use super::counters::TransmitDrop;
use super::receive::{FIRST_BATCH, MAX_BATCH, next_batch};
use super::{Tap, TapError};
use crate::features::{GUEST_CSUM, GUEST_ECN, GUEST_TSO4, GUEST_TSO6, GUEST_USO4, GUEST_USO6};
use crate::header::{HEADER, VnetHdr};
use crate::packet::{ETHERNET, LARGEST};
use crate::port::interface::Interface;
use crate::port::outgoing::{Parts, Staged, is_small};
use crate::port::{Counters, FIRST_TAG, Link, READABLE, Refused, Uplink};

/// Bytes of a buffer to read into, more than any frame has.
const BUFFER: usize = (HEADER + LARGEST + 1).next_multiple_of(64);
/// Small frames that are written together.
const WRITES: usize = 256;
/// Tags: of reads, then of writes.
const READ: u32 = FIRST_TAG;
const WRITE: u32 = READ + MAX_BATCH as u32;

/// One queue of a tap.
#[derive(Debug)]
pub struct TapUplink {
    tap: Arc<Tap>,
    interface: Interface,
    takes: u64,
    /// A buffer for each read of a batch, and the bytes that it brought, if it did.
    buffers: Vec<u8>,
    lens: [Option<usize>; MAX_BATCH],
    /// How many reads the next batch may have.
    batch: usize,
    /// Of the batch at hand: how many were submitted, how many are complete, how many have been taken.
    submitted: usize,
    complete: usize,
    taken: usize,
    /// There may be something to be read.
    is_readable: bool,
    /// The tap was gone when it was last looked at.
    was_gone: bool,
    staged: Staged,
    /// Writes of staged frames that are still to complete.
    writing: usize,
    counters: Counters,
}

impl TapUplink {
    /// Opens the tap `name`, as [`Tap::open`] does.
    pub fn open(name: &str, mtu: Option<u16>) -> Result<TapUplink, TapError> {
        let tap = Tap::open(name, 1, mtu)?;
        let failed = |what| move |e| TapError::Io(name.to_owned(), what, e);
        let uso = if tap.has_uso { GUEST_USO4 | GUEST_USO6 } else { 0 };
        let takes = GUEST_CSUM | GUEST_TSO4 | GUEST_TSO6 | GUEST_ECN | uso;
        // What a guest does not take undone is done by the switch.
        tap.negotiated(takes).map_err(failed("setting offloads"))?;
        Ok(TapUplink {
            interface: Interface::new(tap.name()).map_err(failed("a socket"))?,
            tap,
            takes,
            buffers: vec![0; MAX_BATCH * BUFFER],
            lens: [None; MAX_BATCH],
            batch: FIRST_BATCH,
            submitted: 0,
            complete: 0,
            taken: 0,
            is_readable: true,
            was_gone: false,
            staged: Staged::new(WRITES),
            writing: 0,
            counters: Counters::default(),
        })
    }

    fn has_read(&mut self, number: usize, result: i32) {
        self.complete += 1;
        self.lens[number] = usize::try_from(result).ok().filter(|len| *len > 0);
        match result {
            0.. => {}
            _ if -result == libc::EAGAIN => {}
            _ if -result == libc::EBADFD => {
                self.was_gone = true;
                self.tap.has_gone();
            }
            _ => self.counters.rx_errors += 1,
        }
        if self.complete == self.submitted {
            let brought = self.lens[..self.submitted].iter().flatten().count();
            self.batch = next_batch(brought, self.submitted);
            // Otherwise there was nothing more at some time after the batch was begun.
            self.is_readable |= brought == self.submitted;
        }
    }

    fn has_written(&mut self, frame: usize, result: i32) {
        self.writing -= 1;
        if result < 0 {
            let why = self.refused(-result);
            self.counters.refused(why);
        } else {
            self.counters.sent(self.staged.frame(frame).len() - HEADER);
        }
        if self.writing == 0 {
            self.staged.clear();
        }
    }

    fn refused(&self, errno: i32) -> Refused {
        match self.tap.why_not_sent(errno) {
            TransmitDrop::Down | TransmitDrop::Gone => Refused::Down,
            TransmitDrop::Full => Refused::Full,
            _ => Refused::Bad,
        }
    }

    /// Writes what is staged, each frame by itself: before one that does not wait for them.
    #[cold]
    fn write_out(&mut self) {
        self.writing = self.staged.len();
        for at in 0..self.staged.len() {
            let frame = self.staged.frame(at);
            // SAFETY: the bytes are there, and only read.
            let done = unsafe { libc::write(self.tap.tun().as_raw_fd(), frame.as_ptr().cast(), frame.len()) };
            let result = if done < 0 { -nix::errno::Errno::last_raw() } else { done as i32 };
            self.has_written(at, result);
        }
    }

    fn send_large(
        &mut self,
        header: &VnetHdr,
        head: &[u8],
        rest: &mut dyn Iterator<Item = GuestSlice<'_>>,
    ) -> Result<(), Refused> {
        self.write_out();
        let header = header.to_bytes();
        let Some(mut parts) = Parts::new(&header, head, rest) else {
            return Err(self.counters.refused(Refused::TooLong));
        };
        let tun = self.tap.tun().as_raw_fd();
        // SAFETY: the vectors are as many, of bytes that the kernel only reads, before this returns.
        let sent = parts.read_by(|vectors, count| unsafe { libc::writev(tun, vectors, count as i32) });
        match sent {
            Ok(_) => {
                self.counters.sent(parts.len - HEADER);
                Ok(())
            }
            Err(why) => {
                let why = self.refused(why.raw_os_error().unwrap_or(libc::EINVAL));
                Err(self.counters.refused(why))
            }
        }
    }
}

impl Uplink for TapUplink {
    fn receive(&mut self, most: usize, take: &mut dyn FnMut(&VnetHdr, &[u8])) -> usize {
        if self.complete < self.submitted {
            return 0;
        }
        let mut done = 0;
        while self.taken < self.submitted && done < most {
            let at = self.taken;
            self.taken += 1;
            let Some(len) = self.lens[at] else { continue };
            done += 1;
            let Some((header, frame)) = self.buffers[at * BUFFER..][..len].split_first_chunk::<HEADER>()
            else {
                self.counters.rx_length_errors += 1;
                continue;
            };
            if frame.len() < ETHERNET || frame.len() > LARGEST {
                self.counters.rx_length_errors += 1;
                continue;
            }
            self.counters.received(frame.len());
            take(&VnetHdr::from_bytes(header), frame);
        }
        if self.taken == self.submitted {
            (self.submitted, self.complete, self.taken) = (0, 0, 0);
        }
        done
    }

    fn send(
        &mut self,
        header: &VnetHdr,
        len: usize,
        head: &[u8],
        rest: &mut dyn Iterator<Item = GuestSlice<'_>>,
    ) -> Result<(), Refused> {
        // Those of the round before are still in their places only if the kernel has not had the memory to begin.
        if self.writing > 0 {
            return Err(self.counters.refused(Refused::Full));
        }
        if !is_small(header, len) {
            return self.send_large(header, head, rest);
        }
        if self.staged.is_full() {
            self.write_out();
        }
        let is_staged = self.staged.push(&header.to_bytes(), head, rest);
        if is_staged { Ok(()) } else { Err(self.counters.refused(Refused::TooLong)) }
    }

    fn flush(&mut self) {}

    fn submit(&mut self, io: &mut Io<'_>) {
        let fd = types::Fd(self.tap.tun().as_raw_fd());
        if self.writing == 0 {
            self.writing = self.staged.len();
            for at in 0..self.writing {
                let frame = self.staged.frame(at);
                let write = opcode::Write::new(fd, frame.as_ptr(), frame.len() as u32);
                let write = write.rw_flags(libc::RWF_NOWAIT).build().user_data(io.label(WRITE + at as u32));
                // SAFETY: the frame stays in its place until all have been written, and this is not let go before that
                // (`in_flight`); nor is the descriptor.
                unsafe { io.uring().push(&write) };
            }
        }
        if self.is_readable && self.submitted == 0 && !self.tap.is_gone() {
            self.is_readable = false;
            self.submitted = self.batch;
            let buffers = self.buffers.chunks_exact_mut(BUFFER).take(self.batch);
            for (at, buffer) in buffers.enumerate() {
                let read = opcode::Read::new(fd, buffer.as_mut_ptr(), BUFFER as u32);
                let read = read.rw_flags(libc::RWF_NOWAIT).build().user_data(io.label(READ + at as u32));
                // SAFETY: the buffer is this read's until it is complete, and this is not let go before that
                // (`in_flight`); nor is the descriptor.
                unsafe { io.uring().push(&read) };
            }
        }
        if io.uring().queued() > 0 {
            io.uring().submit();
        }
    }

    fn complete(&mut self, tag: u32, result: i32) {
        match tag {
            // An error of the watch shows in what is read.
            READABLE => self.is_readable = true,
            WRITE.. => self.has_written((tag - WRITE) as usize, result),
            _ => self.has_read((tag - READ) as usize, result),
        }
    }

    fn in_flight(&self) -> usize {
        self.writing + (self.submitted - self.complete)
    }

    fn has_work(&self) -> bool {
        self.is_readable && !self.tap.is_gone() || self.taken < self.complete
    }

    fn takes(&self) -> u64 {
        self.takes
    }

    fn descriptor(&self) -> BorrowedFd<'_> {
        self.tap.tun().as_fd()
    }

    fn link(&mut self) -> Link {
        let link = self.interface.link();
        let is_gone = self.tap.is_gone();
        // Down once, even if it was away for a shorter time than there is between two looks.
        let was_gone = std::mem::replace(&mut self.was_gone, is_gone);
        // Who waits is woken before a tap that is deleted is taken away (Linux, tun_detach_all), and never after that: what
        // was read then did not say so.
        self.is_readable = true;
        Link { up: link.up && !is_gone && !was_gone, ..link }
    }

    fn counters(&mut self) -> Counters {
        self.counters
    }
}
