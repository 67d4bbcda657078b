//! Chains taken together: looked at beside each other, and given back in their order when the round is over.
#![allow(unsafe_code)] // pairs chains with the map that translated them

use super::Queue;
use crate::memory::GuestSlice;
use crate::memory::slice::RawSlice;
use crate::probes;
use crate::ring::chain::{Chain, ChainView};
use crate::ring::{Ahead, Used};

/// Most chains of a burst.
pub const MAX_BURST: usize = 32;

/// The chains of a burst. What is needed of all of them lies together.
#[derive(Debug)]
pub(super) struct Burst {
    /// What they owe to the ring.
    used: [Used; MAX_BURST],
    count: usize,
    /// Where the one buffer of each is; [none](RawSlice::NONE) of one that is more, which is in `chains`.
    buffers: [RawSlice; MAX_BURST],
    /// Their storage is made when the first one is asked for, and stays.
    chains: Vec<Chain>,
    /// So many of the next chains need not be fetched ahead any more.
    fetched: u16,
}

impl Default for Burst {
    fn default() -> Burst {
        let (used, buffers) = ([Used::NONE; MAX_BURST], [RawSlice::NONE; MAX_BURST]);
        Burst { used, count: 0, buffers, chains: Vec::new(), fetched: 0 }
    }
}

impl Burst {
    pub(super) fn is_open(&self) -> bool {
        self.count > 0
    }

    fn used(&self) -> &[Used] {
        &self.used[..self.count]
    }

    #[inline]
    fn make_chains(&mut self) {
        if self.chains.is_empty() {
            self.chains.resize_with(MAX_BURST, Chain::default);
        }
    }
}

impl Queue {
    /// Says that so many chains are about to be taken together: what that needs of the ring is on its way into the cache.
    #[inline]
    pub fn expect_burst(&mut self, wanted: usize) {
        self.burst.fetched = self.ready_for(wanted.min(MAX_BURST) as u16, Ahead::RING);
    }

    /// Takes the next chains, at most `wanted` and [`MAX_BURST`], with `ahead` of their buffers on its way into the cache;
    /// how many. One that is broken, or waits for a translation, ends them.
    ///
    /// They are [ended](Self::end_burst) before anything else is taken, and before the round is over.
    #[inline]
    pub fn take_burst(&mut self, wanted: usize, ahead: Ahead) -> usize {
        assert!(!self.burst.is_open(), "a burst was not ended");
        let ready = self.count_ready(wanted.min(MAX_BURST) as u16);
        if std::mem::take(&mut self.burst.fetched) < ready {
            self.ring.prefetch(ready, Ahead::RING, self.hold.map());
        }
        let (ready, map) = (usize::from(ready), self.hold.map());
        let burst = &mut *self.burst;
        let (mut at, mut refused) = (map.locate(), None);
        let mut taken = 0;
        loop {
            let (buffers, used) = (&mut burst.buffers[taken..ready], &mut burst.used[taken..ready]);
            taken += self.ring.take_singles(&mut at, ahead, buffers, used);
            if taken == ready {
                break;
            }
            burst.make_chains();
            let chain = &mut burst.chains[taken];
            match self.ring.take(map, chain) {
                Ok(token) => (burst.buffers[taken], burst.used[taken]) = (RawSlice::NONE, token.redeem()),
                Err(e) => {
                    refused = Some(e);
                    break;
                }
            }
            chain.fetch(ahead);
            taken += 1;
        }
        burst.count = taken;
        if taken > 0 {
            probes::take_burst(self, taken);
        }
        if let Some(e) = refused {
            self.not_taken(&e);
        }
        taken
    }

    /// Chain number `at` of the burst.
    ///
    /// # Panics
    /// If it has no such chain.
    pub fn burst(&mut self, at: usize) -> ChainView<'_> {
        let burst = &mut *self.burst;
        let (writable, single) = (burst.used()[at].writable() > 0, burst.buffers[at]);
        if !single.is_none() {
            burst.make_chains();
            burst.chains[at].set(single, writable);
        }
        self.chain_of_burst(at)
    }

    fn chain_of_burst(&self, at: usize) -> ChainView<'_> {
        // SAFETY: while the burst is open, its chains are of the held map, which `set_map` changes only without a burst.
        unsafe { self.burst.chains[at].view(self.hold.map()) }
    }

    /// The chains of the burst from number `from` on: the buffer of each that is one, to be written by the device or to be
    /// read, as asked for; `None` of the others.
    ///
    /// # Panics
    /// If the burst has fewer chains.
    #[inline]
    pub fn burst_buffers(&self, from: usize, writable: bool) -> impl Iterator<Item = Option<GuestSlice<'_>>> {
        let (used, map) = (&self.burst.used()[from..], self.hold.map());
        let buffers = &self.burst.buffers[from..][..used.len()];
        buffers.iter().zip(used).map(move |(buffer, used)| {
            let is_asked_for = !buffer.is_none() && (used.writable() > 0) == writable;
            // SAFETY: as in `chain_of_burst`.
            is_asked_for.then(|| unsafe { buffer.in_map(map) })
        })
    }

    /// Ends the burst: gives its first `done` chains back, `written(number)` bytes written to each, and leaves the others
    /// where they were.
    #[inline]
    pub fn end_burst(&mut self, done: usize, written: impl Fn(usize) -> u32) {
        while self.burst.count > done {
            self.burst.count -= 1;
            self.ring.untake_used(self.burst.used[self.burst.count]);
        }
        if self.log.is_some() {
            self.log_burst();
        }
        self.round_completed += self.burst.count as u64;
        probes::end_burst(self, self.burst.count);
        self.ring.complete_all(self.burst.used(), written);
        self.burst.count = 0;
    }

    #[cold]
    fn log_burst(&mut self) {
        for at in 0..self.burst.count {
            self.burst(at);
            if let Some(log) = &self.log {
                self.log_written(log, &self.chain_of_burst(at));
            }
        }
    }
}
