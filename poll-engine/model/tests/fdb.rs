//! The forwarding database of `vhost-net`, which all reactors share: its own file, in every order that the memory model
//! allows. Only the words of the addresses at hand are under the checker: all others are empty and stay so.
#![allow(dead_code, clippy::unwrap_used)] // the switch's file, in part

#[path = "../../../vhost-net/src/switch/fdb.rs"]
mod fdb;
#[path = "../../../vhost-net/src/mac.rs"]
mod mac;

/// What `vhost_net::sync` has, for the model checker.
mod sync {
    use std::sync::OnceLock;

    use loom::sync::atomic;
    pub use loom::sync::atomic::{AtomicBool, AtomicU32, Ordering};
    pub use loom::thread::yield_now;

    /// One of very many, of which few are ever touched: it exists from when [`touch`](Self::touch) is called, and is empty
    /// without.
    #[derive(Debug, Default)]
    pub struct AtomicU64(OnceLock<atomic::AtomicU64>);

    impl AtomicU64 {
        pub fn new(value: u64) -> AtomicU64 {
            AtomicU64(OnceLock::from(atomic::AtomicU64::new(value)))
        }

        pub fn touch(&self) -> &atomic::AtomicU64 {
            self.0.get_or_init(|| atomic::AtomicU64::new(0))
        }

        pub fn load(&self, order: Ordering) -> u64 {
            self.0.get().map_or(0, |word| word.load(order))
        }

        pub fn store(&self, value: u64, order: Ordering) {
            self.touch().store(value, order);
        }

        pub fn swap(&self, value: u64, order: Ordering) -> u64 {
            self.touch().swap(value, order)
        }

        pub fn compare_exchange(
            &self,
            old: u64,
            new: u64,
            done: Ordering,
            failed: Ordering,
        ) -> Result<u64, u64> {
            self.touch().compare_exchange(old, new, done, failed)
        }
    }

    /// The same in each run, or the checker could not go back to an order of events.
    #[derive(Default)]
    pub struct RandomState;

    impl RandomState {
        pub fn new() -> RandomState {
            RandomState
        }
    }

    impl std::hash::BuildHasher for RandomState {
        type Hasher = std::hash::DefaultHasher;

        fn build_hasher(&self) -> Self::Hasher {
            Self::Hasher::new()
        }
    }
}

/// A port's number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PortId(pub u16);

use std::time::Duration;

use fdb::{Fdb, FdbConfig, Key, Learnt, Period};
use loom::sync::Arc;
use loom::thread;

const A: PortId = PortId(0);
const B: PortId = PortId(1);
const SECOND: u64 = 1_000_000_000;

fn check(what: impl Fn() + Sync + Send + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(3);
    builder.max_branches = 10_000;
    builder.check(what);
}

/// With two open ports, and a key whose word is under the checker.
fn table() -> (Arc<Fdb>, Key, Period) {
    let ageing = Some(Duration::from_secs(12));
    let fdb = Fdb::new(FdbConfig { ageing }, [4, 4]);
    fdb.open(A);
    fdb.open(B);
    let key = fdb.key(1, 0x5254_0012_3456);
    let (period, _) = fdb.age(0).unwrap();
    // The first way of its bucket.
    assert_eq!(fdb.learn(key, A, period), Learnt::New);
    (Arc::new(fdb), key, period)
}

/// Each entry counts for the port that it is of, and for no other.
fn counts(fdb: &Fdb) -> [u32; 2] {
    let of = |port| fdb.dump().filter(|entry| entry.port == port).count() as u32;
    let counts = [of(A), of(B)];
    assert_eq!([fdb.entries(A), fdb.entries(B)], counts, "of the ports, and in the table");
    counts
}

/// An address moves while it is looked up and sends from where it was: whoever looks sees the one port or the other, and
/// it ends at one of them.
#[test]
fn an_address_that_moves_is_always_somewhere() {
    check(|| {
        let (fdb, key, period) = table();
        let there = Arc::clone(&fdb);
        let (refresher, (later, _)) = (Arc::clone(&fdb), fdb.age(SECOND).unwrap());
        let moves = thread::spawn(move || there.learn(key, B, period));
        let stays = thread::spawn(move || refresher.learn(key, A, later));
        let found = fdb.lookup(key).unwrap();
        assert!(found == A || found == B, "{found:?}");
        assert_eq!(moves.join().unwrap(), Learnt::Moved(A));
        let stayed = stays.join().unwrap();
        assert!(matches!(stayed, Learnt::Known | Learnt::Moved(B) | Learnt::Busy), "{stayed:?}");
        assert_eq!(counts(&fdb).iter().sum::<u32>(), 1);
    });
}

/// A port that is closed is forgotten, with frames of its own under way: when both are done, nothing is behind it.
#[test]
fn nothing_is_learnt_from_a_port_that_has_closed() {
    check(|| {
        let (fdb, key, period) = table();
        let there = Arc::clone(&fdb);
        let frame = thread::spawn(move || there.learn(key, B, period));
        fdb.close(B);
        let learnt = frame.join().unwrap();
        assert!(matches!(learnt, Learnt::Moved(A) | Learnt::Closed | Learnt::Busy), "{learnt:?}");
        assert_eq!(counts(&fdb)[1], 0, "behind a closed port: {learnt:?}");
    });
}

/// Two reactors learn the same address anew, and one port more than it may have.
#[test]
fn writers_take_turns() {
    check(|| {
        let (fdb, key, period) = table();
        fdb.close(A);
        fdb.open(A);
        let there = Arc::clone(&fdb);
        let other = thread::spawn(move || there.learn(key, B, period));
        let here = fdb.learn(key, A, period);
        let there = other.join().unwrap();
        let outcomes = [here, there];
        assert!(outcomes.contains(&Learnt::New), "{outcomes:?}");
        assert_eq!(counts(&fdb).iter().sum::<u32>(), 1, "{outcomes:?}");
    });
}

/// An entry that is refreshed while the old ones are removed is still counted once, or not at all.
#[test]
fn what_ages_while_it_is_seen_is_there_or_not() {
    check(|| {
        let (fdb, key, _) = table();
        let there = Arc::clone(&fdb);
        let ages = thread::spawn(move || there.age(13 * SECOND).is_some());
        if let Some((period, _)) = fdb.age(13 * SECOND) {
            let seen = fdb.learn(key, A, period);
            assert!(matches!(seen, Learnt::Known | Learnt::New | Learnt::Busy), "{seen:?}");
        }
        ages.join().unwrap();
        assert!(counts(&fdb)[0] <= 1);
    });
}
