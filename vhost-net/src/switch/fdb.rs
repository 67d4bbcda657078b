//! The forwarding database (IEEE 802.1Q-2022, 8.8): behind which port is which address of which VLAN.
//!
//! There is one for all reactors, and an entry is one word, so that whoever looks something up reads a whole entry or
//! none and waits for nobody. VLAN and address (60 bits) are scrambled one to one under a secret of the process: the
//! first bits say in which bucket of one cache line, the rest is in the word.
//!
//! ```text
//! scrambled  | bucket 11 |            rest 49             |
//! word                   |            rest 49             | port + 1: 10 | static 1 | period 4 |
//! ```
//!
//! Writers take turns, and on the data path nobody waits for a turn: what was not learnt from this frame is from the
//! next. Only the period in which an entry was last seen changes without a turn.

use std::hash::BuildHasher;
use std::time::Duration;

use super::PortId;
use crate::mac::MacAddr;
use crate::sync::{AtomicBool, AtomicU32, AtomicU64, Ordering, RandomState, yield_now};

const BUCKET_BITS: u32 = 11;
const WAYS: usize = 8;
/// Most entries.
pub const CAPACITY: usize = WAYS << BUCKET_BITS;
/// Most ports.
pub const MAX_PORTS: usize = (1 << PORT_BITS) - 1;

const PERIOD: u64 = 0xf;
const STATIC: u64 = 1 << 4;
const PORT_SHIFT: u32 = 5;
const PORT_BITS: u32 = 10;
const REST_SHIFT: u32 = PORT_SHIFT + PORT_BITS;
/// Bits of a scrambled key that are always zero.
const UNUSED: u64 = 0xf;

/// An entry goes when it was not seen in so many whole periods: four bits tell them apart up to 15.
const PERIODS: u64 = 12;

const _: () = assert!(60 - BUCKET_BITS + REST_SHIFT == 64 && PERIODS < PERIOD);

/// How addresses are learnt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FdbConfig {
    /// How long an address is known that sends nothing; up to a twelfth longer. `None`: for ever.
    pub ageing: Option<Duration>,
}

impl Default for FdbConfig {
    /// 300 s (802.1Q-2022, table 8-6).
    fn default() -> FdbConfig {
        FdbConfig { ageing: Some(Duration::from_secs(300)) }
    }
}

/// An address of a VLAN, scrambled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Key(u64);

/// A stretch of time in which nothing ages, as [`Fdb::age`] gives it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Period(u64);

/// What came of learning a source address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Learnt {
    /// Nothing new.
    Known,
    /// It is known from now on.
    New,
    /// It was behind this port until now.
    Moved(PortId),
    /// The port has as many as it may have.
    PortFull,
    /// There is no room that this port has a better right to than others.
    TableFull,
    /// It belongs to another port for good.
    Pinned,
    /// The port takes no part.
    Closed,
    /// Somebody else is writing.
    Busy,
}

/// One entry, for people.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// The VLAN, 0 where there are none.
    pub vid: u16,
    /// The address.
    pub mac: MacAddr,
    /// Behind this port.
    pub port: PortId,
    /// It neither ages nor moves.
    pub is_static: bool,
}

#[repr(align(64))]
#[derive(Debug, Default)]
struct Bucket([AtomicU64; WAYS]);

/// What a port has of the table.
#[derive(Debug)]
struct Share {
    entries: AtomicU32,
    limit: AtomicU32,
    open: AtomicBool,
}

/// A one-to-one map of 60 bits: two multiplications by secret odd numbers and a fold between them. The product's high
/// bits depend on all bits (Dietzfelbinger's multiply-shift), and nobody can choose addresses of one bucket.
#[derive(Clone, Copy, Debug)]
struct Scrambler {
    first: u64,
    second: u64,
}

impl Scrambler {
    fn new() -> Scrambler {
        let random = || RandomState::new().hash_one(0u8) | 1;
        Scrambler { first: random(), second: random() }
    }

    #[inline]
    fn scramble(self, vid: u16, mac: u64) -> Key {
        let x = ((u64::from(vid) << 48 | mac) << 4).wrapping_mul(self.first);
        Key(Self::fold(x).wrapping_mul(self.second))
    }

    /// Its own inverse: the upper half stays.
    #[inline]
    fn fold(x: u64) -> u64 {
        x ^ (x >> 32 & !UNUSED)
    }

    fn unscramble(self, key: Key) -> (u16, u64) {
        let x = Self::fold(key.0.wrapping_mul(inverse(self.second))).wrapping_mul(inverse(self.first)) >> 4;
        ((x >> 48) as u16, x & ((1 << 48) - 1))
    }
}

/// The number that `odd` times gives 1, by Newton's iteration: each step doubles the bits that are right, from three.
fn inverse(odd: u64) -> u64 {
    (0..5).fold(odd, |x, _| x.wrapping_mul(2u64.wrapping_sub(odd.wrapping_mul(x))))
}

/// The table.
#[derive(Debug)]
pub struct Fdb {
    buckets: Box<[Bucket]>,
    scrambler: Scrambler,
    shares: Box<[Share]>,
    /// Nanoseconds of a period; `None`: nothing ages.
    period: Option<u64>,
    /// The period up to which old entries have been removed.
    aged: AtomicU64,
    writing: AtomicBool,
}

/// The turn to write.
struct Writing<'a>(&'a AtomicBool);

impl Drop for Writing<'_> {
    fn drop(&mut self) {
        self.0.store(false, Ordering::Release);
    }
}

#[inline]
fn port_of(word: u64) -> PortId {
    PortId((word >> PORT_SHIFT & ((1 << PORT_BITS) - 1)).wrapping_sub(1) as u16)
}

#[inline]
fn word(key: Key, port: PortId, low: u64) -> u64 {
    key.0 << BUCKET_BITS | (u64::from(port.0) + 1) << PORT_SHIFT | low
}

impl Fdb {
    /// An empty one; `limits` says how many entries each port may have. All ports are closed.
    ///
    /// # Panics
    /// With more ports than [`MAX_PORTS`].
    pub fn new(config: FdbConfig, limits: impl IntoIterator<Item = u32>) -> Fdb {
        let share = |limit| Share {
            entries: AtomicU32::new(0),
            limit: AtomicU32::new(limit),
            open: AtomicBool::new(false),
        };
        let shares: Box<[Share]> = limits.into_iter().map(share).collect();
        assert!(shares.len() <= MAX_PORTS, "{} ports", shares.len());
        Fdb {
            buckets: std::iter::repeat_with(Bucket::default).take(1 << BUCKET_BITS).collect(),
            scrambler: Scrambler::new(),
            shares,
            period: config.ageing.map(|a| (a.as_nanos() as u64 / PERIODS).max(1)),
            aged: AtomicU64::new(0),
            writing: AtomicBool::new(false),
        }
    }

    /// What an address (as [`MacAddr::to_u64`] gives it) of a VLAN is looked up by.
    #[inline]
    pub fn key(&self, vid: u16, mac: u64) -> Key {
        self.scrambler.scramble(vid, mac)
    }

    #[inline]
    fn bucket(&self, key: Key) -> &Bucket {
        &self.buckets[(key.0 >> (64 - BUCKET_BITS)) as usize]
    }

    #[inline]
    fn find(&self, key: Key) -> Option<(&AtomicU64, u64)> {
        let rest = key.0 << BUCKET_BITS;
        self.bucket(key).0.iter().find_map(|slot| {
            let word = slot.load(Ordering::Relaxed);
            // Only what is below the rest differs, and there is a port in it: an empty word has none.
            let matches = (word ^ rest).wrapping_sub(1 << PORT_SHIFT) < (1 << REST_SHIFT) - (1 << PORT_SHIFT);
            matches.then_some((slot, word))
        })
    }

    /// The port that the address is behind.
    #[inline]
    pub fn lookup(&self, key: Key) -> Option<PortId> {
        self.find(key).map(|(_, word)| port_of(word))
    }

    /// The address has sent from this port.
    #[inline]
    pub fn learn(&self, key: Key, port: PortId, period: Period) -> Learnt {
        match self.find(key) {
            Some((slot, word)) if port_of(word) == port => {
                if (word ^ period.0) & PERIOD != 0 && word & STATIC == 0 {
                    Self::refresh(slot, word, period);
                }
                Learnt::Known
            }
            _ => self.learn_anew(key, port, period),
        }
    }

    #[cold]
    fn refresh(slot: &AtomicU64, word: u64, period: Period) {
        let seen = word & !PERIOD | period.0 & PERIOD;
        // If it has changed meanwhile, the next frame refreshes it.
        let _ = slot.compare_exchange(word, seen, Ordering::Relaxed, Ordering::Relaxed);
    }

    #[cold]
    fn learn_anew(&self, key: Key, port: PortId, period: Period) -> Learnt {
        // Without a turn first: whoever sends from ever new addresses takes none.
        if let Some(refused) = self.refuses(port) {
            return refused;
        }
        let Some(_turn) = self.try_write() else { return Learnt::Busy };
        if let Some(refused) = self.refuses(port) {
            return refused;
        }
        let new = word(key, port, period.0 & PERIOD);
        match self.find(key) {
            Some((_, old)) if port_of(old) == port => Learnt::Known,
            Some((_, old)) if old & STATIC != 0 => Learnt::Pinned,
            Some((slot, old)) => {
                self.replace(slot, new);
                Learnt::Moved(port_of(old))
            }
            None => match self.room(key, port) {
                Some(slot) => {
                    self.replace(slot, new);
                    Learnt::New
                }
                None => Learnt::TableFull,
            },
        }
    }

    fn refuses(&self, port: PortId) -> Option<Learnt> {
        let share = &self.shares[usize::from(port.0)];
        if !share.open.load(Ordering::Relaxed) {
            Some(Learnt::Closed)
        } else if share.entries.load(Ordering::Relaxed) >= share.limit.load(Ordering::Relaxed) {
            Some(Learnt::PortFull)
        } else {
            None
        }
    }

    /// An empty slot for the key, or that of the port which has the most, if that has more than `port`.
    fn room(&self, key: Key, port: PortId) -> Option<&AtomicU64> {
        let slots = &self.bucket(key).0;
        if let Some(empty) = slots.iter().find(|s| s.load(Ordering::Relaxed) == 0) {
            return Some(empty);
        }
        let learnt = slots.iter().map(|s| (s, s.load(Ordering::Relaxed))).filter(|(_, w)| w & STATIC == 0);
        let (slot, most) = learnt.map(|(s, w)| (s, self.entries(port_of(w)))).max_by_key(|&(_, n)| n)?;
        (most > self.entries(port)).then_some(slot)
    }

    /// Puts a word in place of another and keeps count. Only in turn.
    fn replace(&self, slot: &AtomicU64, new: u64) {
        let old = slot.swap(new, Ordering::Relaxed);
        for (word, change) in [(old, u32::MAX), (new, 1)] {
            if let Some(share) = self.shares.get(usize::from(port_of(word).0)) {
                share.entries.fetch_add(change, Ordering::Relaxed);
            }
        }
    }

    fn try_write(&self) -> Option<Writing<'_>> {
        let free = self.writing.compare_exchange(false, true, Ordering::Acquire, Ordering::Relaxed);
        free.is_ok().then(|| Writing(&self.writing))
    }

    /// Waits for a turn: control threads only.
    fn write(&self) -> Writing<'_> {
        loop {
            match self.try_write() {
                Some(turn) => return turn,
                None => yield_now(),
            }
        }
    }

    fn slots(&self) -> impl Iterator<Item = (u64, &AtomicU64)> {
        self.buckets.iter().zip(0u64..).flat_map(|(bucket, i)| bucket.0.iter().map(move |slot| (i, slot)))
    }

    /// The period `now` (nanoseconds of a clock that does not go back) is in, and when it is over. Removes what has become
    /// too old since the last. `None`: somebody else is writing, to be tried again.
    pub fn age(&self, now: u64) -> Option<(Period, u64)> {
        let Some(length) = self.period else { return Some((Period(0), u64::MAX)) };
        let period = now / length;
        let end = length.saturating_mul(period + 1);
        if self.aged.load(Ordering::Relaxed) >= period {
            return Some((Period(period), end));
        }
        let _turn = self.try_write()?;
        let aged = self.aged.load(Ordering::Relaxed);
        if aged < period {
            for (_, slot) in self.slots() {
                let word = slot.load(Ordering::Relaxed);
                // What is here was seen at most `PERIODS` before `aged`, so that four bits are enough.
                let age = (aged.wrapping_sub(word) & PERIOD) + (period - aged);
                if word != 0 && word & STATIC == 0 && age > PERIODS {
                    self.replace(slot, 0);
                }
            }
            self.aged.store(period, Ordering::Relaxed);
        }
        Some((Period(period), end))
    }

    /// The port takes part: what it sends from is learnt.
    pub fn open(&self, port: PortId) {
        let _turn = self.write();
        self.shares[usize::from(port.0)].open.store(true, Ordering::Relaxed);
    }

    /// The port takes no part any more: forgets what was learnt from it, and learns nothing from frames under way.
    pub fn close(&self, port: PortId) {
        let _turn = self.write();
        self.shares[usize::from(port.0)].open.store(false, Ordering::Relaxed);
        for (_, slot) in self.slots() {
            let word = slot.load(Ordering::Relaxed);
            if word & STATIC == 0 && port_of(word) == port {
                self.replace(slot, 0);
            }
        }
    }

    /// How many addresses are learnt from a port at most, from now on. Those that are there stay.
    pub fn set_limit(&self, port: PortId, limit: u32) {
        self.shares[usize::from(port.0)].limit.store(limit, Ordering::Relaxed);
    }

    /// Forgets all addresses of a port, those that were its own for good as well.
    pub fn forget(&self, port: PortId) {
        let _turn = self.write();
        for (_, slot) in self.slots() {
            let word = slot.load(Ordering::Relaxed);
            if word != 0 && port_of(word) == port {
                self.replace(slot, 0);
            }
        }
    }

    /// Has an address belong to a port for good. False when there is no room.
    pub fn pin(&self, key: Key, port: PortId) -> bool {
        let _turn = self.write();
        let found = self.find(key).map(|(slot, _)| slot).or_else(|| self.room(key, port));
        if let Some(slot) = found {
            self.replace(slot, word(key, port, STATIC));
        }
        found.is_some()
    }

    /// How many entries a port has.
    pub fn entries(&self, port: PortId) -> u32 {
        self.shares[usize::from(port.0)].entries.load(Ordering::Relaxed)
    }

    /// What is in it, in no order: each entry as it was when it was looked at.
    pub fn dump(&self) -> impl Iterator<Item = Entry> {
        self.slots().filter_map(|(bucket, slot)| {
            let word = slot.load(Ordering::Relaxed);
            let key = Key(bucket << (64 - BUCKET_BITS) | word >> REST_SHIFT << 4);
            let (vid, mac) = self.scrambler.unscramble(key);
            let (mac, is_static) = (MacAddr::from_u64(mac), word & STATIC != 0);
            (word != 0).then(|| Entry { vid, mac, port: port_of(word), is_static })
        })
    }
}

#[cfg(all(test, not(kickless_model)))] // which has primitives that run in the checker only
mod tests {
    use super::*;

    const NOW: Period = Period(0);

    /// Ports with room for `limits` entries, all open.
    fn fdb(limits: &[u32]) -> Fdb {
        let fdb = Fdb::new(FdbConfig::default(), limits.iter().copied());
        (0..limits.len() as u16).for_each(|p| fdb.open(PortId(p)));
        fdb
    }

    /// Addresses of one bucket.
    fn neighbours(fdb: &Fdb) -> impl Iterator<Item = Key> {
        (1..).map(|mac| fdb.key(1, mac)).filter(|key| key.0 >> (64 - BUCKET_BITS) == 0)
    }

    #[test]
    fn scrambling_loses_nothing() {
        let s = Scrambler::new();
        for vid in [0, 1, 0xfff] {
            for mac in (0..200).chain([0xffff_ffff_ffff, 0x5254_0012_3456]).chain((0..48).map(|b| 1 << b)) {
                assert_eq!(s.unscramble(s.scramble(vid, mac)), (vid, mac));
            }
        }
        assert!((1..9999).step_by(2).all(|odd: u64| odd.wrapping_mul(inverse(odd)) == 1));
    }

    #[test]
    fn addresses_that_follow_each_other_spread_over_the_buckets() {
        let fdb = fdb(&[1]);
        let mut held = vec![0; 1 << BUCKET_BITS];
        (0..CAPACITY as u64 / 2)
            .for_each(|mac| held[(fdb.key(0, mac).0 >> (64 - BUCKET_BITS)) as usize] += 1);
        // At random about 4 are in each, and 2 % have more than 8.
        let crowded = held.iter().filter(|&&n| n > 8).count();
        assert!(crowded < held.len() / 8, "{crowded} buckets of {} are crowded", held.len());
    }

    #[test]
    fn a_full_bucket_takes_from_the_port_that_has_the_most() {
        let fdb = fdb(&[100, 100, 100]);
        let (many, few, other) = (PortId(0), PortId(1), PortId(2));
        let keys: Vec<Key> = neighbours(&fdb).take(WAYS + 3).collect();
        assert!(fdb.pin(keys[0], other));
        assert!(keys[1..WAYS].iter().all(|&k| fdb.learn(k, many, NOW) == Learnt::New));
        assert_eq!(fdb.learn(keys[WAYS], many, NOW), Learnt::TableFull, "it has the most itself");
        assert_eq!(fdb.learn(keys[WAYS + 1], few, NOW), Learnt::New);
        assert_eq!((fdb.entries(many), fdb.entries(few), fdb.entries(other)), (6, 1, 1));
        assert_eq!(fdb.lookup(keys[WAYS + 1]), Some(few));
        assert_eq!(fdb.lookup(keys[0]), Some(other), "what is pinned stays");
    }

    #[test]
    fn nobody_waits_for_a_turn_on_the_data_path() {
        let fdb = fdb(&[10, 10]);
        let key = fdb.key(0, 1);
        let turn = fdb.write();
        assert_eq!(fdb.learn(key, PortId(0), NOW), Learnt::Busy);
        assert_eq!(fdb.age(u64::MAX), None);
        drop(turn);
        assert_eq!(fdb.learn(key, PortId(0), NOW), Learnt::New);
    }

    #[test]
    fn an_entry_that_is_refreshed_while_it_moves_is_moved() {
        let fdb = fdb(&[10, 10]);
        let key = fdb.key(0, 1);
        fdb.learn(key, PortId(0), NOW);
        let (slot, word) = fdb.find(key).unwrap();
        assert_eq!(fdb.learn(key, PortId(1), NOW), Learnt::Moved(PortId(0)));
        Fdb::refresh(slot, word, Period(1));
        assert_eq!(fdb.lookup(key), Some(PortId(1)));
        assert_eq!((fdb.entries(PortId(0)), fdb.entries(PortId(1))), (0, 1));
    }
}
