//! What wakes a reactor from another thread, in every order that the memory model allows: its own file, between a sleeper
//! that does as the reactor does and threads that hand something over as a switch's shards do.
#![allow(dead_code, clippy::unwrap_used)] // the engine's file, in part

#[path = "../../src/engine/waker.rs"]
mod waker;

/// What `poll_engine::sync` has, for the model checker.
mod sync {
    pub use loom::sync::Arc;
    pub use loom::sync::atomic::{AtomicBool, Ordering, fence};

    /// As weak as an eventfd may be taken for: it wakes, and orders nothing but itself.
    #[derive(Debug)]
    pub struct Bell(AtomicBool);

    impl Bell {
        pub fn new() -> Bell {
            Bell(AtomicBool::new(false))
        }

        pub fn ring(&self) {
            self.0.swap(true, Ordering::AcqRel);
        }

        pub fn wait(&self) {
            while !self.0.load(Ordering::Acquire) {
                loom::thread::yield_now();
            }
            self.0.swap(false, Ordering::AcqRel);
        }
    }
}

use loom::sync::Arc;
use loom::sync::atomic::{AtomicUsize, Ordering};
use loom::thread;
use waker::Waker;

fn check(what: impl Fn() + Sync + Send + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(3);
    builder.max_branches = 10_000;
    builder.check(what);
}

/// As `Reactor::sleep` and its station do, until `count` pieces have come: a sleep that nobody ends is a model that never
/// ends, which the checker says.
fn sleeper(waker: &Waker, bell: &sync::Bell, handed: &AtomicUsize, count: usize) {
    let mut had = 0;
    while had < count {
        waker.lie_down();
        // `Station::prepare_sleep`.
        if handed.load(Ordering::Relaxed) == had {
            bell.wait();
        }
        waker.get_up();
        had = handed.load(Ordering::Relaxed).max(had);
    }
}

#[test]
fn nothing_that_is_handed_over_is_slept_through() {
    check(|| {
        let bell = Arc::new(sync::Bell::new());
        let (waker, handed) = (Waker::new(Arc::clone(&bell)), Arc::new(AtomicUsize::new(0)));
        let (theirs, given) = (waker.clone(), Arc::clone(&handed));
        let shard = thread::spawn(move || {
            for _ in 0..2 {
                given.fetch_add(1, Ordering::Relaxed);
                theirs.wake();
            }
        });
        sleeper(&waker, &bell, &handed, 2);
        shard.join().unwrap();
    });
}
