//! Chains taken together: looked at beside each other, and given back in their order when the round is over.
#![allow(unsafe_code)] // pairs chains with the map that translated them

use super::Queue;
use crate::ring::chain::{Chain, ChainView};
use crate::ring::{Ahead, Token};

/// Most chains of a burst.
pub const MAX_BURST: usize = 32;

/// The chains of a burst. Their storage is made for the first one, and stays.
#[derive(Debug, Default)]
pub(super) struct Burst {
    chains: Vec<Chain>,
    tokens: Vec<Token>,
}

impl Burst {
    pub(super) fn is_open(&self) -> bool {
        !self.tokens.is_empty()
    }

    #[cold]
    fn make(&mut self) {
        self.chains.resize_with(MAX_BURST, Chain::default);
        self.tokens.reserve_exact(MAX_BURST);
    }
}

impl Queue {
    /// Takes the next chains, at most `wanted` and [`MAX_BURST`], with `ahead` of their buffers on its way into the cache;
    /// how many. One that is broken, or waits for a translation, ends them.
    ///
    /// They are [ended](Self::end_burst) before anything else is taken, and before the round is over.
    #[inline]
    pub fn take_burst(&mut self, wanted: usize, ahead: Ahead) -> usize {
        assert!(!self.burst.is_open(), "a burst was not ended");
        let ready = self.ready_for(wanted.min(MAX_BURST) as u16, Ahead::RING);
        if ready > 0 && self.burst.chains.is_empty() {
            self.burst.make();
        }
        let Burst { chains, tokens } = &mut self.burst;
        let (mut refused, map) = (None, self.hold.map());
        let mut at = map.locate();
        for chain in chains.iter_mut().take(ready.into()) {
            let token = match self.ring.take_single(&mut at, chain) {
                Some(token) => token,
                None => match self.ring.take(map, chain) {
                    Ok(token) => token,
                    Err(e) => {
                        refused = Some(e);
                        break;
                    }
                },
            };
            tokens.push(token);
            chain.fetch(ahead);
        }
        let taken = tokens.len();
        if let Some(e) = refused {
            self.not_taken(&e);
        }
        taken
    }

    /// Chain number `at` of the burst.
    ///
    /// # Panics
    /// If it has no such chain.
    #[inline]
    pub fn burst(&self, at: usize) -> ChainView<'_> {
        assert!(at < self.burst.tokens.len(), "no such chain in the burst");
        // SAFETY: while tokens are there, the chains are of the held map, which `set_map` changes only without a burst.
        unsafe { self.burst.chains[at].view(self.hold.map()) }
    }

    /// Ends the burst: gives its first `done` chains back, `written(number)` bytes written to each, and leaves the others
    /// where they were.
    #[inline]
    pub fn end_burst(&mut self, done: usize, written: impl Fn(usize) -> u32) {
        while self.burst.tokens.len() > done {
            let Some(token) = self.burst.tokens.pop() else { break };
            self.ring.untake(token);
        }
        if let Some(log) = &self.log {
            (0..self.burst.tokens.len()).for_each(|at| self.log_written(log, &self.burst(at)));
        }
        self.round_completed += self.burst.tokens.len() as u64;
        for (at, token) in self.burst.tokens.drain(..).enumerate() {
            self.ring.complete(token, written(at));
        }
    }
}
