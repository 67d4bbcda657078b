//! From the tap to the guest: reads straight into the chains of the guest's receive queue.
//!
//! ```text
//! tap readable ─► take chains ─► a batch of reads ─► in order: header, num_buffers ─► the guest
//!                                     └─ what is beyond a read's chains: spill ─► further chains
//! ```
//!
//! Reads never wait (`RWF_NOWAIT`): the kernel carries each out while it is submitted, so what they bring is in the order
//! in which they were submitted, and none is ever under way when its reactor looks. Between batches nothing of the guest's
//! is held; a poll of the descriptor says when there is something again.
//!
//! How long the next frame is, nobody knows. While frames fit into a buffer, each read of a batch gets one. While they do
//! not (segments to be cut up, jumbo frames), there is one read at a time, with as many buffers as the longest frame needs.
//! Where that guess is wrong, the rest of the frame is in the read's spill, and is copied from there; so nothing is lost, and
//! buffers are used in the order of the ring. What a guest has no buffers for stays in its spill until it has, and
//! everything behind it in the kernel's queue.
#![allow(unsafe_code)] // submissions carry addresses of guest memory, headers, spills and iovecs

use std::io;
use std::os::fd::AsRawFd;

use io_uring::{opcode, types};
use poll_engine::device::QueueHandler;
use poll_engine::engine::queue::{BUDGET, Queue, Request};
use poll_engine::engine::reactor::Io;
use poll_engine::memory::slice::GuestSlice;
use poll_engine::ring::Ahead;
use poll_engine::ring::chain::HeldChain;
use poll_engine::stats::ErrorKind;

use super::Running;
use super::counters::{ReceiveDrop, Way};
use crate::features::{GUEST_CSUM, GUEST_ECN, GUEST_TSO4, GUEST_TSO6, GUEST_USO4, GUEST_USO6, MRG_RXBUF};
use crate::header::{
    F_NEEDS_CSUM, GSO_ECN, GSO_NONE, GSO_TCPV4, GSO_TCPV6, GSO_UDP_L4, HEADER, HEADER_WITH_HASH, VnetHdr,
    header_len,
};
use crate::packet::LARGEST;
use crate::pcap::{Direction, Probe};

/// Reads of a batch, at most, and of the first one after the tap was empty.
pub(super) const MAX_BATCH: usize = 16;
pub(super) const FIRST_BATCH: usize = 2;
/// Bytes of a spill: more than any frame has.
const SPILL: usize = 68 << 10;
/// Iovecs for the guest's pieces of one read; with those of header and spill, `UIO_MAXIOV`.
const MAX_PIECES: usize = 1022;
/// Frames in a row that would have fitted into a buffer each, until buffers are dealt out one by one again.
const SMALL_AGAIN: u32 = 8;
/// How long to wait for more buffers where there are some, but not enough: no notification tells of that.
static PAUSE: types::Timespec = types::Timespec::new().nsec(50_000);
/// And for a tap that is gone, or may be.
static ABSENCE: types::Timespec = types::Timespec::new().nsec(500_000_000);
/// Tags; reads have their number.
const WATCH: u32 = MAX_BATCH as u32;
const PAUSED: u32 = WATCH + 1;
const CANCEL: u32 = PAUSED + 1;
const LIMIT: u32 = CANCEL + 1;

/// A chain that a read of the batch at hand may write to.
#[derive(Default)]
struct Taken {
    request: Option<Request>,
    held: HeldChain,
    len: u32,
}

/// One read.
struct Read {
    header: [u8; HEADER],
    iovecs: Vec<libc::iovec>,
    /// The first of its chains.
    first: usize,
    /// Bytes of a frame that go straight to its chains; the rest goes to the spill, where it would be in the whole frame.
    straight: usize,
    spill: Box<[u8]>,
    /// Bytes of the frame that it brought, if it did.
    frame: Option<usize>,
}

// SAFETY: the iovecs are addresses kept for the kernel, not used by us; they point to the header and spill of the same read
// and into memory that chains of the handler keep alive, whatever thread that is on.
unsafe impl Send for Read {}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// The tap is empty, as far as is known, and has to be watched.
    Empty,
    /// The same, although it was said that it is not.
    Doubtful,
    /// It is watched.
    Watched,
    /// There is something to be read.
    Readable,
    /// Reads have been submitted.
    Reading,
    /// The batch brought more than the guest has buffers for. Nothing is read before the rest has been delivered.
    Waiting,
    /// The same, where there are buffers, but not enough for the next frame.
    Pausing,
    /// The tap has been deleted.
    Gone,
    /// The same, until the next look whether it is there again.
    Away,
}

/// The handler of a receive queue.
pub struct Receive {
    from: Running,
    header_len: usize,
    is_mergeable: bool,
    features: u64,
    state: State,
    reads: Box<[Read]>,
    /// The watch has said that there is something, of which nothing has been read yet.
    was_told: bool,
    /// How many reads the next batch may have.
    batch: usize,
    /// Of the batch at hand: how many were submitted, how many are complete, how many have been delivered.
    submitted: usize,
    complete: usize,
    delivered: usize,
    /// The chains taken for it, in order, and how many of them have been used.
    chains: Box<[Taken]>,
    taken: usize,
    used: usize,
    /// Chains that the queue has counted and that are not taken yet.
    ready: u16,
    /// Frames since the last one that was longer than a buffer, as far as that counts.
    small_in_a_row: u32,
    /// What it was waiting for is counted once.
    waits_counted: bool,
    probe: Option<Probe>,
}

impl Receive {
    pub(super) fn new(from: Running, features: u64, ring_size: u16) -> Receive {
        let read = || Read {
            header: [0; HEADER],
            iovecs: Vec::with_capacity(64),
            first: 0,
            straight: 0,
            spill: vec![0; SPILL].into(),
            frame: None,
        };
        Receive {
            from,
            header_len: header_len(features),
            is_mergeable: features & MRG_RXBUF != 0,
            features,
            state: State::Empty,
            was_told: false,
            reads: std::iter::repeat_with(read).take(MAX_BATCH).collect(),
            batch: FIRST_BATCH,
            submitted: 0,
            complete: 0,
            delivered: 0,
            chains: std::iter::repeat_with(Taken::default).take(ring_size.into()).collect(),
            taken: 0,
            used: 0,
            ready: 0,
            small_in_a_row: SMALL_AGAIN,
            waits_counted: false,
            probe: None,
        }
    }

    /// Notes frames in a capture, if there is one.
    #[must_use]
    pub fn captured(self, probe: Option<Probe>) -> Receive {
        Receive { probe, ..self }
    }

    fn counters(&self) -> &Way<ReceiveDrop> {
        &self.from.pair().receive
    }

    /// What is under way although nothing is in flight.
    fn under_way(&self) -> Option<u32> {
        match self.state {
            State::Watched => Some(WATCH),
            State::Pausing | State::Away => Some(PAUSED),
            _ => None,
        }
    }

    fn watch(&mut self, io: &mut Io<'_>) {
        let fd = types::Fd(self.from.tun().as_raw_fd());
        let poll = opcode::PollAdd::new(fd, libc::POLLIN as u32).build();
        let poll = poll.user_data(io.label(WATCH));
        if self.state == State::Doubtful {
            // Who waits is woken before a tap that is deleted is taken away (Linux, tun_detach_all), and never after that.
            let limit = opcode::LinkTimeout::new(&raw const ABSENCE).build().user_data(io.label(LIMIT));
            // SAFETY: the time is static; the descriptor as below.
            unsafe { io.uring().push_linked(poll, limit) };
        } else {
            // SAFETY: the entry points to nothing; the descriptor is open for as long as the handler is, and `detach`
            // submits.
            unsafe { io.uring().push(&poll) };
        }
        self.state = State::Watched;
    }

    fn pause(&mut self, io: &mut Io<'_>, time: &'static types::Timespec, state: State) {
        let pause = opcode::Timeout::new(std::ptr::from_ref(time)).build();
        let pause = pause.user_data(io.label(PAUSED));
        // SAFETY: the time is static.
        unsafe { io.uring().push(&pause) };
        self.state = state;
    }

    /// Takes the next chain of the guest's, if there is one.
    fn take(&mut self, queue: &mut Queue) -> bool {
        if self.taken == self.chains.len() {
            return false;
        }
        if self.ready == 0 {
            self.ready = queue.ready_for(BUDGET, Ahead::HEADER);
        }
        let Some(request) = (self.ready > 0).then(|| queue.take()).flatten() else {
            self.ready = 0;
            return false;
        };
        self.ready -= 1;
        let taken = &mut self.chains[self.taken];
        taken.len = queue.chain().writable_len();
        taken.request = Some(request);
        queue.hold_chain(&mut taken.held);
        self.taken += 1;
        true
    }

    /// Whether a frame can begin in this chain: it has room for more than a header.
    fn can_begin(&self, chain: usize) -> bool {
        self.chains[chain].len as usize > self.header_len
    }

    /// Gives the chain that is next back, in which no frame can begin.
    #[cold]
    fn refuse(&mut self, queue: &mut Queue) {
        let len = self.chains[self.used].len;
        queue.count_error(
            ErrorKind::Malformed,
            &format_args!("a receive buffer of {len} bytes has no room for a header and a frame"),
        );
        self.counters().dropped(ReceiveDrop::SmallBuffer);
        self.give(1, 0, queue);
    }

    /// Begins a batch; how many pieces of work that was.
    fn read(&mut self, queue: &mut Queue, io: &mut Io<'_>) -> usize {
        (self.submitted, self.complete, self.delivered) = (0, 0, 0);
        let (batch, wanted) =
            if self.small_in_a_row < SMALL_AGAIN { (1, self.header_len + LARGEST) } else { (self.batch, 1) };
        while self.submitted < batch {
            let first = self.taken;
            if !self.take(queue) {
                break;
            }
            if !self.can_begin(first) {
                // Buffers are given back in order: one that comes behind others waits for its turn.
                if self.submitted > 0 {
                    break;
                }
                self.refuse(queue);
                if self.used == MAX_BATCH {
                    break;
                }
                continue;
            }
            let mut room = self.chains[first].len as usize;
            while room < wanted && self.take(queue) {
                room += self.chains[self.taken - 1].len as usize;
            }
            self.submit(first, io);
        }
        let work = self.used + self.submitted;
        if self.submitted > 0 {
            self.state = State::Reading;
            self.waits_counted = false;
        } else {
            self.put_back(queue);
            if work == 0 {
                self.wait();
            }
        }
        work
    }

    /// The guest has no buffers.
    fn wait(&mut self) {
        if !std::mem::replace(&mut self.waits_counted, true) {
            self.counters().waits.add(1);
        }
    }

    /// Submits a read into the chains taken from number `first` on.
    fn submit(&mut self, first: usize, io: &mut Io<'_>) {
        let number = self.submitted;
        self.submitted += 1;
        let Read { header, iovecs, first: own_first, straight, spill, frame } = &mut self.reads[number];
        (*own_first, *straight, *frame) = (first, 0, None);
        iovecs.clear();
        iovecs.push(libc::iovec { iov_base: header.as_mut_ptr().cast(), iov_len: HEADER });
        for piece in pieces(&self.chains[first..self.taken], self.header_len).take(MAX_PIECES) {
            let piece = piece.part(0, SPILL - *straight);
            if piece.is_empty() {
                break;
            }
            iovecs.push(libc::iovec { iov_base: piece.host_addr().cast(), iov_len: piece.len() });
            *straight += piece.len();
        }
        let rest = &mut spill[*straight..];
        iovecs.push(libc::iovec { iov_base: rest.as_mut_ptr().cast(), iov_len: rest.len() });
        let fd = types::Fd(self.from.tun().as_raw_fd());
        let read =
            opcode::Readv::new(fd, iovecs.as_ptr(), iovecs.len() as u32).rw_flags(libc::RWF_NOWAIT).build();
        let read = read.user_data(io.label(number as u32));
        // SAFETY: the iovecs, header and spill that they point to stay in the read, which has its place on the heap, and the
        // chains in `chains`, until all reads of the batch are complete. The descriptor is open for as long as the handler
        // is, which outlives what is pending (`QueueHandler::detach`): each read has a chain that is in flight.
        unsafe { io.uring().push(&read) };
    }

    /// A read is complete.
    fn has_read(&mut self, number: usize, result: i32, queue: &mut Queue) {
        self.complete += 1;
        match result {
            // The guest takes no empty frame, and the kernel makes none.
            n if n > HEADER as i32 => self.reads[number].frame = Some(n as usize - HEADER),
            0.. => {}
            _ if -result == libc::EAGAIN => {}
            _ if -result == libc::EBADFD => {
                self.from.tap.has_gone();
                self.state = State::Gone;
            }
            _ => {
                let error = io::Error::from_raw_os_error(-result);
                queue.count_error(ErrorKind::Io, &format_args!("tap {}: {error}", self.from.tap.name()));
                self.counters().dropped(ReceiveDrop::Failed);
            }
        }
        if self.complete == self.submitted {
            self.batch_is_complete(queue);
        }
    }

    fn batch_is_complete(&mut self, queue: &mut Queue) {
        let brought = self.reads[..self.submitted].iter().filter(|r| r.frame.is_some()).count();
        let is_drained = brought < self.submitted;
        self.batch = next_batch(brought, self.submitted);
        let was_told = std::mem::take(&mut self.was_told);
        if self.state == State::Reading {
            self.state = match is_drained {
                true if brought == 0 && was_told => State::Doubtful,
                true => State::Empty,
                false => State::Readable,
            };
        }
        self.deliver(queue);
    }

    /// Delivers what the batch has brought, as far as the guest has buffers, and puts those back that were not needed;
    /// whether there were such.
    fn deliver(&mut self, queue: &mut Queue) -> bool {
        let after = self.state;
        // From the first frame on that is not all in its place, and everything behind it, frames come out of spills.
        let mut is_spilled = after == State::Waiting;
        while self.delivered < self.submitted {
            let number = self.delivered;
            if let Some(frame) = self.reads[number].frame {
                let is_in_place =
                    self.reads[number].first == self.used && frame <= self.reads[number].straight;
                if !is_spilled && !is_in_place {
                    is_spilled = true;
                    self.spill(number);
                }
                if !self.hand_over(number, frame, is_spilled, queue) {
                    self.wait();
                    self.state = State::Waiting;
                    break;
                }
            }
            self.delivered += 1;
        }
        if self.delivered == self.submitted && after == State::Waiting {
            self.state = State::Readable;
        }
        let has_some = self.taken > self.used;
        self.put_back(queue);
        has_some
    }

    /// Copies what reads from `number` on have put into chains to where it belongs in their spills.
    #[cold]
    fn spill(&mut self, number: usize) {
        for read in &mut self.reads[number..self.submitted] {
            let Some(frame) = read.frame else { continue };
            let mut rest = &mut read.spill[..frame.min(read.straight)];
            for piece in pieces(&self.chains[read.first..self.taken], self.header_len) {
                if rest.is_empty() {
                    break;
                }
                let n = piece.read(rest);
                rest = &mut rest[n..];
            }
        }
    }

    /// Gives a frame to the guest; false if it has no buffers for it. What cannot ever be delivered is dropped.
    fn hand_over(&mut self, number: usize, frame: usize, is_spilled: bool, queue: &mut Queue) -> bool {
        if !takes(&VnetHdr::from_bytes(&self.reads[number].header), self.features) {
            self.counters().dropped(ReceiveDrop::Offload);
            return true;
        }
        let needed = self.header_len + frame;
        let (mut room, mut count, mut refused) = (0, 0, 0);
        while room < needed && (count == 0 || self.is_mergeable) {
            if self.used + count == self.taken && !self.take(queue) {
                if count < self.chains.len() {
                    return false;
                }
                break;
            }
            if count == 0 && !self.can_begin(self.used) {
                if refused == MAX_BATCH {
                    return false;
                }
                self.refuse(queue);
                refused += 1;
                continue;
            }
            room += self.chains[self.used + count].len as usize;
            count += 1;
        }
        self.guess(frame);
        if room < needed {
            self.too_long(frame, queue);
            return true;
        }
        let read = &self.reads[number];
        let chains = &self.chains[self.used..self.used + count];
        if is_spilled {
            let mut rest = &read.spill[..frame];
            for piece in pieces(chains, self.header_len) {
                rest = &rest[piece.write(rest)..];
            }
        }
        let header = self.header(&read.header, count as u16);
        if let Some(first) = chains[0].held.view() {
            first.writable(0, self.header_len as u32).write(&header);
        }
        if let Some(probe) = &mut self.probe {
            let header = VnetHdr::from_bytes(&read.header);
            probe
                .note(Direction::Inbound, &header, frame, |at, into| copy(chains, self.header_len, at, into));
        }
        let mut destination = [0; 6];
        copy(chains, self.header_len, 0, &mut destination);
        self.give(count, needed, queue);
        queue.stats().bytes_read.add(frame as u64);
        self.counters().passed(&destination, frame as u64);
        true
    }

    /// Gives the next `count` chains to the guest, with `written` bytes in them.
    #[inline]
    fn give(&mut self, count: usize, written: usize, queue: &mut Queue) {
        let mut left = written;
        for taken in &mut self.chains[self.used..self.used + count] {
            let len = left.min(taken.len as usize);
            left -= len;
            if let (Some(request), Some(chain)) = (taken.request.take(), taken.held.view()) {
                queue.complete_held(request, len as u32, &chain);
            }
            taken.held.release();
        }
        self.used += count;
    }

    /// The header as the guest gets it (5.1.6.4): without a hash, and with nothing in it that was not negotiated.
    fn header(&self, from_tap: &[u8; HEADER], num_buffers: u16) -> [u8; HEADER_WITH_HASH] {
        // Without GUEST_CSUM the kernel leaves nothing undone, but it may say that a checksum is right.
        let has_csum = self.features & GUEST_CSUM != 0;
        let said = if has_csum { VnetHdr::from_bytes(from_tap) } else { VnetHdr::default() };
        let header = VnetHdr { num_buffers, ..said };
        let mut bytes = [0; HEADER_WITH_HASH];
        bytes[..HEADER].copy_from_slice(&header.to_bytes());
        bytes
    }

    /// Learns from the length of a frame how to deal buffers out.
    #[inline]
    fn guess(&mut self, frame: usize) {
        let buffer = self.chains.get(self.used).map_or(0, |taken| taken.len as usize);
        let is_small = !self.is_mergeable || self.header_len + frame <= buffer;
        self.small_in_a_row = if is_small { (self.small_in_a_row + 1).min(SMALL_AGAIN) } else { 0 };
    }

    #[cold]
    fn too_long(&self, frame: usize, queue: &Queue) {
        self.counters().dropped(ReceiveDrop::TooLong);
        let what = if self.is_mergeable { "all receive buffers together" } else { "a receive buffer" };
        queue.count_error(
            ErrorKind::Range,
            &format_args!("dropped a frame of {frame} bytes, more than fits into {what}"),
        );
    }

    /// Puts the chains back that were not used, the last first.
    fn put_back(&mut self, queue: &mut Queue) {
        for taken in self.chains[self.used..self.taken].iter_mut().rev() {
            if let Some(request) = taken.request.take() {
                queue.untake(request);
            }
            taken.held.release();
        }
        (self.taken, self.used, self.ready) = (0, 0, 0);
    }
}

/// How many reads the next batch is to have, after one of `submitted` reads that brought so many frames.
pub(super) fn next_batch(brought: usize, submitted: usize) -> usize {
    (if brought < submitted { brought + 1 } else { 2 * brought }).clamp(FIRST_BATCH, MAX_BATCH)
}

/// Whether a driver with these features takes what a header says is left undone. The kernel leaves no more undone than it
/// was told to ([`Tap::negotiated`](super::Tap::negotiated)), but frames may have waited in its queue since the guest before.
#[inline]
fn takes(header: &VnetHdr, features: u64) -> bool {
    let needed = match header.gso_type & !GSO_ECN {
        GSO_NONE if header.flags & F_NEEDS_CSUM == 0 => 0,
        GSO_NONE => GUEST_CSUM,
        GSO_TCPV4 => GUEST_CSUM | GUEST_TSO4,
        GSO_TCPV6 => GUEST_CSUM | GUEST_TSO6,
        GSO_UDP_L4 => GUEST_CSUM | GUEST_USO4 | GUEST_USO6,
        _ => return false,
    };
    let ecn = if header.gso_type & GSO_ECN == 0 { 0 } else { GUEST_ECN };
    features & (needed | ecn) == needed | ecn
}

/// The pieces of a frame's place in `chains`, behind the header.
fn pieces(chains: &[Taken], header_len: usize) -> impl Iterator<Item = GuestSlice<'_>> {
    chains.iter().enumerate().flat_map(move |(nth, taken)| {
        let skip = if nth == 0 { header_len } else { 0 };
        taken.held.view().into_iter().flat_map(move |chain| chain.writable(skip as u32, u32::MAX))
    })
}

/// Copies bytes of a frame out of its place in `chains`, from its byte `at` on.
fn copy(chains: &[Taken], header_len: usize, at: usize, into: &mut [u8]) -> usize {
    let (mut skip, mut done) = (at, 0);
    for piece in pieces(chains, header_len) {
        done += piece.part(skip, into.len() - done).read(&mut into[done..]);
        skip = skip.saturating_sub(piece.len());
    }
    done
}

impl QueueHandler for Receive {
    fn attach(&mut self, _: &mut Io<'_>) {}

    fn poll(&mut self, queue: &mut Queue, io: &mut Io<'_>) -> usize {
        match self.state {
            State::Watched | State::Reading | State::Pausing | State::Away => 0,
            State::Gone => {
                self.pause(io, &ABSENCE, State::Away);
                0
            }
            State::Empty | State::Doubtful => {
                self.watch(io);
                0
            }
            State::Readable => self.read(queue, io),
            State::Waiting => {
                let before = self.delivered;
                let had_some = self.deliver(queue);
                if had_some && self.state == State::Waiting {
                    self.pause(io, &PAUSE, State::Pausing);
                }
                self.delivered - before
            }
        }
    }

    fn complete(&mut self, queue: &mut Queue, _: &mut Io<'_>, tag: u32, result: i32) {
        match tag {
            // An error of the poll shows in what is read.
            WATCH => {
                self.state = State::Readable;
                self.was_told = result > 0;
            }
            LIMIT => {}
            PAUSED if self.state == State::Away => {
                self.state = if self.from.tap.is_gone() { State::Gone } else { State::Readable };
            }
            PAUSED => self.state = State::Waiting,
            number => self.has_read(number as usize, result, queue),
        }
    }

    fn detach(&mut self, io: &mut Io<'_>) {
        if let Some(tag) = self.under_way() {
            let (label, own) = (io.label(tag), io.label(CANCEL));
            io.uring().cancel(label, own);
        }
        let lost = self.reads[self.delivered..self.submitted].iter().filter(|r| r.frame.is_some()).count();
        (0..lost).for_each(|_| self.counters().dropped(ReceiveDrop::NoBuffer));
    }

    fn wants_chains(&self) -> bool {
        matches!(self.state, State::Readable | State::Waiting)
    }
}
