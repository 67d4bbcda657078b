//! Static tracepoints (USDT, provider `kickless`) at the hops of a request: one instruction each that does nothing, until
//! `bpftrace`, `perf` or `gdb` puts a breakpoint there. What they tell is in docs/tracing.md; scripts that use them, in
//! scripts/bpf.
//!
//! Arguments are what a register holds at that place anyway: a queue is known by its address, which stays the same while it
//! runs, and [`start`] tells the name that goes with it.
#![allow(unsafe_code)] // the macro is an instruction and a note about it

use probe::probe;

/// A queue begins to run: its name.
#[cold]
pub(crate) fn start<Q>(queue: &Q, name: &str) {
    probe!(kickless, start, std::ptr::from_ref(queue), name.as_ptr(), name.len());
}

/// And leaves its reactor.
#[cold]
pub(crate) fn stop<Q>(queue: &Q) {
    probe!(kickless, stop, std::ptr::from_ref(queue));
}

/// The driver has kicked a queue whose reactor slept.
#[cold]
pub(crate) fn kick<Q>(queue: &Q) {
    probe!(kickless, kick, std::ptr::from_ref(queue));
}

/// A chain is taken. In its low 16 bits, `chain` has the head's index, or the buffer ID of a packed ring.
#[inline(always)]
pub(crate) fn take<Q>(queue: &Q, chain: u64) {
    probe!(kickless, take, std::ptr::from_ref(queue), chain);
}

/// It is put back, untouched, to be taken again later.
#[inline(always)]
pub(crate) fn untake<Q>(queue: &Q, chain: u64) {
    probe!(kickless, untake, std::ptr::from_ref(queue), chain);
}

/// It is given back. (The bytes written would cost an instruction more for each request.)
#[inline(always)]
pub(crate) fn complete<Q>(queue: &Q, chain: u64) {
    probe!(kickless, complete, std::ptr::from_ref(queue), chain);
}

/// So many chains are taken together; their ids are not told.
#[inline(always)]
pub(crate) fn take_burst<Q>(queue: &Q, count: usize) {
    probe!(kickless, take_burst, std::ptr::from_ref(queue), count);
}

/// So many of them are given back, and the others are still to be taken.
#[inline(always)]
pub(crate) fn end_burst<Q>(queue: &Q, count: usize) {
    probe!(kickless, end_burst, std::ptr::from_ref(queue), count);
}

/// What was given back is shown to the driver.
#[inline(always)]
pub(crate) fn publish<Q>(queue: &Q) {
    probe!(kickless, publish, std::ptr::from_ref(queue));
}

/// The driver is interrupted.
#[inline(always)]
pub(crate) fn signal<Q>(queue: &Q) {
    probe!(kickless, signal, std::ptr::from_ref(queue));
}

/// So many operations go to the kernel.
#[inline(always)]
pub(crate) fn submit(count: u32) {
    probe!(kickless, submit, count);
}

/// So many are over.
#[inline(always)]
pub(crate) fn reap(count: usize) {
    probe!(kickless, reap, count);
}

/// A reactor has nothing to do until something comes.
#[inline(always)]
pub(crate) fn sleep() {
    probe!(kickless, sleep);
}

/// And goes on.
#[inline(always)]
pub(crate) fn wake() {
    probe!(kickless, wake);
}
