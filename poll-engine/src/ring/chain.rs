//! A taken chain: host slices, device-readable ones first, and byte-wise views of both halves.
//!
//! Framing is the driver's choice (virtio 1.3, 2.7.4): a device sees two byte streams, however they are cut up.
#![allow(unsafe_code)] // ties translated addresses back to their map

use std::ops::Range;
use std::sync::Arc;

use super::{Ahead, RingError};
use crate::memory::iotlb::{Access, Revoked};
use crate::memory::log::DirtyLog;
use crate::memory::map::{Locator, MapHold, MemoryMap};
use crate::memory::slice::{GuestSlice, RawSlice};

/// The slices of one chain; its storage is reused from chain to chain.
#[derive(Clone, Debug, Default)]
pub struct Chain {
    /// The chain's, and behind them room for others.
    slots: Vec<RawSlice>,
    count: usize,
    /// Bytes of all of it.
    len: u64,
    /// The first `readable` slices are device-readable, the rest device-writable.
    readable: usize,
    readable_len: u64,
}

impl Chain {
    pub(crate) fn clear(&mut self) {
        (self.count, self.len, self.readable, self.readable_len) = (0, 0, 0, 0);
    }

    /// Goes on where the chain ends.
    #[inline(always)] // once a request
    pub(crate) fn fill<'a>(&'a mut self, map: &'a MemoryMap) -> Filling<'a> {
        Filling { at: map.locate(), count: self.count, len: self.len, chain: self }
    }

    /// Makes it one of this buffer.
    pub(crate) fn set(&mut self, slice: RawSlice, writable: bool) {
        if self.slots.is_empty() {
            self.slots.push(slice);
        }
        self.slots[0] = slice;
        let len = u64::from(slice.len());
        (self.count, self.len) = (1, len);
        (self.readable, self.readable_len) = if writable { (0, 0) } else { (1, len) };
    }

    #[inline]
    fn slices(&self) -> &[RawSlice] {
        &self.slots[..self.count]
    }

    /// Asks the CPU to fetch what is wanted of the first buffer.
    #[inline]
    pub(crate) fn fetch(&self, ahead: Ahead) {
        if let Some(first) = self.slices().first() {
            first.prefetch_lines(ahead.bytes, ahead.write);
        }
    }

    /// The host address of the first byte, 0 without one: to be prefetched, not to be used.
    #[inline]
    pub(crate) fn first_addr(&self) -> usize {
        self.slots.first().map_or(0, |s| s.host_addr().addr())
    }

    /// Bytes the device may write.
    #[inline]
    pub(crate) fn writable_len(&self) -> u32 {
        (self.len - self.readable_len) as u32
    }

    /// The chain as seen through the map that translated it.
    ///
    /// # Safety
    /// `map` must be the map that the chain's slices were translated by.
    #[inline]
    pub unsafe fn view<'a>(&'a self, map: &'a MemoryMap) -> ChainView<'a> {
        ChainView { map, chain: self }
    }
}

/// A chain that is being filled. What every buffer changes is kept in registers until all are there.
pub(crate) struct Filling<'a> {
    chain: &'a mut Chain,
    at: Locator<'a>,
    count: usize,
    len: u64,
}

impl Filling<'_> {
    /// Appends one descriptor's buffer.
    #[inline(always)] // three times a request
    pub(crate) fn push(&mut self, addr: u64, len: u32, writable: bool) -> Result<(), RingError> {
        let chain = &mut *self.chain;
        if !writable && chain.readable != self.count {
            return Err(RingError::BadOrder);
        }
        if let (Some(slice), Some(slot)) =
            (self.at.whole(addr, len, writable), chain.slots.get_mut(self.count))
        {
            *slot = slice;
            self.count += 1;
        } else {
            self.count = push_rarely(&mut chain.slots, self.count, self.at.map(), addr, len, writable)?;
        }
        // There are far fewer descriptors than would make it overflow.
        self.len += u64::from(len);
        if !writable {
            (chain.readable, chain.readable_len) = (self.count, self.len);
        }
        Ok(())
    }

    /// That was all.
    #[inline(always)] // once a request
    pub(crate) fn finish(self) -> Result<(), RingError> {
        (self.chain.count, self.chain.len) = (self.count, self.len);
        if self.len > u64::from(u32::MAX) {
            return Err(RingError::TooManyBytes);
        }
        Ok(())
    }
}

/// Appends a buffer that is of several slices, finds no room, or is not to be appended. Returns how many slices there are.
#[cold]
#[inline(never)]
fn push_rarely(
    slots: &mut Vec<RawSlice>,
    count: usize,
    map: &MemoryMap,
    addr: u64,
    len: u32,
    writable: bool,
) -> Result<usize, RingError> {
    if len == 0 {
        return Err(RingError::ZeroLength);
    }
    slots.truncate(count);
    map.translate(addr, len, if writable { Access::WRITE } else { Access::READ }, slots)?;
    let count = slots.len();
    slots.resize(slots.capacity(), RawSlice::NONE);
    Ok(count)
}

/// A chain together with a hold on its memory, for requests that outlive the call that took them.
#[derive(Debug, Default)]
pub struct HeldChain {
    chain: Chain,
    hold: Option<MapHold>,
    /// With an IOTLB: says where this points, to whoever has to know (see [`Pins`]).
    pin: Option<Pin>,
}

impl HeldChain {
    /// Takes over the slices of `chain` (which gets this one's old storage) with a hold on the map that made them.
    ///
    /// # Safety
    /// `hold` must be of the map that `chain` was translated by.
    #[inline]
    pub(crate) unsafe fn take(&mut self, chain: &mut Chain, hold: &MapHold) {
        std::mem::swap(&mut self.chain, chain);
        self.hold = Some(hold.clone());
    }

    /// As [`take`](Self::take), leaving `chain` as it is.
    ///
    /// # Safety
    /// `hold` must be of the map that `chain` was translated by.
    pub(crate) unsafe fn copy(&mut self, chain: &Chain, hold: &MapHold) {
        self.chain.clone_from(chain);
        self.hold = Some(hold.clone());
    }

    /// Has `pins` know where the chain points, until it is released.
    pub(crate) fn pin_in(&mut self, pins: &mut Pins) {
        self.pin = Some(pins.pin(self.chain.slices()));
    }

    /// The held chain. `None` after [`release`](Self::release).
    #[inline]
    pub fn view(&self) -> Option<ChainView<'_>> {
        // SAFETY: `take` put the chain and the hold of its own map here together.
        self.hold.as_ref().map(|hold| unsafe { self.chain.view(hold.map()) })
    }

    /// Lets the memory go; the storage stays for the next chain.
    #[inline]
    pub fn release(&mut self) {
        self.hold = None;
        self.pin = None;
        self.chain.clear();
    }
}

/// The host addresses of one held chain.
type Pin = Arc<Vec<Range<usize>>>;

/// Where the held chains of a queue point. A front end that takes a translation back waits for those that point there,
/// and for no others.
#[derive(Debug, Default)]
pub(crate) struct Pins {
    /// One for each chain held at a time; those that nobody else has are used again.
    pins: Vec<Pin>,
    next: usize,
}

impl Pins {
    fn pin(&mut self, slices: &[RawSlice]) -> Pin {
        let count = self.pins.len();
        let free =
            (0..count).map(|i| (self.next + i) % count).find(|&i| Arc::strong_count(&self.pins[i]) == 1);
        let at = free.unwrap_or_else(|| {
            self.pins.push(Pin::default());
            count
        });
        self.next = at + 1;
        let pin = &mut self.pins[at];
        if let Some(ranges) = Arc::get_mut(pin) {
            ranges.clear();
            ranges.extend(slices.iter().map(|s| s.host_range()));
        }
        Arc::clone(pin)
    }

    /// Whether a held chain points to what was revoked.
    pub(crate) fn touch(&self, revoked: &Revoked) -> bool {
        self.pins.iter().any(|pin| Arc::strong_count(pin) > 1 && revoked.touches(pin))
    }
}

/// A chain that can be read and written.
#[derive(Clone, Copy, Debug)]
pub struct ChainView<'a> {
    map: &'a MemoryMap,
    chain: &'a Chain,
}

impl<'a> ChainView<'a> {
    /// Bytes the device may read.
    #[inline]
    pub fn readable_len(&self) -> u32 {
        self.chain.readable_len as u32
    }

    /// Bytes the device may write.
    #[inline]
    pub fn writable_len(&self) -> u32 {
        self.chain.writable_len()
    }

    /// The first device-readable buffer.
    #[inline]
    pub fn first_readable(&self) -> Option<GuestSlice<'a>> {
        let raw = self.chain.slots[..self.chain.readable].first()?;
        // SAFETY: a ChainView holds slices and the map that made them.
        Some(unsafe { raw.in_map(self.map) })
    }

    /// The first device-writable buffer.
    #[inline]
    pub fn first_writable(&self) -> Option<GuestSlice<'a>> {
        let raw = self.chain.slices()[self.chain.readable..].first()?;
        // SAFETY: a ChainView holds slices and the map that made them.
        Some(unsafe { raw.in_map(self.map) })
    }

    /// The last byte the device may write: where many devices put a status.
    #[inline]
    pub fn last_writable(&self) -> Option<GuestSlice<'a>> {
        let raw = self.chain.slices()[self.chain.readable..].last()?;
        // SAFETY: a ChainView holds slices and the map that made them.
        let slice = unsafe { raw.in_map(self.map) };
        Some(slice.part(slice.len() - 1, 1))
    }

    /// Marks everything the device may have written as dirty.
    #[cold]
    pub(crate) fn log_writable(&self, log: &DirtyLog) {
        self.writable(0, u32::MAX).for_each(|slice| log.mark_slice(self.map, &slice));
    }

    /// The device-readable bytes from `offset`, at most `len` of them, as slices in order.
    #[inline]
    pub fn readable(&self, offset: u32, len: u32) -> Slices<'a> {
        Slices { map: self.map, rest: &self.chain.slots[..self.chain.readable], skip: offset, left: len }
    }

    /// The device-writable bytes from `offset`, at most `len` of them, as slices in order.
    #[inline]
    pub fn writable(&self, offset: u32, len: u32) -> Slices<'a> {
        Slices { map: self.map, rest: &self.chain.slices()[self.chain.readable..], skip: offset, left: len }
    }
}

/// An iterator over the host slices of a byte range of a chain.
#[derive(Clone, Debug)]
pub struct Slices<'a> {
    map: &'a MemoryMap,
    rest: &'a [RawSlice],
    skip: u32,
    left: u32,
}

impl<'a> Iterator for Slices<'a> {
    type Item = GuestSlice<'a>;

    #[inline]
    fn next(&mut self) -> Option<GuestSlice<'a>> {
        while self.left > 0 {
            let (&raw, rest) = self.rest.split_first()?;
            self.rest = rest;
            if self.skip >= raw.len() {
                self.skip -= raw.len();
                continue;
            }
            // SAFETY: a ChainView holds slices and the map that made them.
            let part = unsafe { raw.in_map(self.map) }.part(self.skip as usize, self.left as usize);
            self.skip = 0;
            self.left -= part.len() as u32;
            return Some(part);
        }
        None
    }
}

impl Slices<'_> {
    /// Copies the range out, as far as `into` goes; returns how many bytes.
    pub fn read(self, into: &mut [u8]) -> usize {
        let mut done = 0;
        for slice in self {
            done += slice.read(&mut into[done..]);
        }
        done
    }

    /// Copies `from` into the range; returns how many bytes.
    pub fn write(self, from: &[u8]) -> usize {
        let mut done = 0;
        for slice in self {
            done += slice.write(&from[done..]);
        }
        done
    }
}
