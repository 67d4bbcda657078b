//! The mailbox of a reactor, the alarm of a session and the hold on a memory map: the engine's own files, in every order
//! that the memory model allows.
#![allow(dead_code, clippy::unwrap_used, clippy::unnecessary_wraps)] // the engine's files, in part

#[path = "../../src/engine/alarm.rs"]
mod alarm;
#[path = "../../src/memory/hold.rs"]
mod hold;
#[path = "../../src/engine/mailbox.rs"]
mod mailbox;

/// What `poll_engine::sync` has, for the model checker.
mod sync {
    pub use loom::sync::Arc;
    use loom::sync::atomic::AtomicUsize;
    pub use loom::sync::atomic::{AtomicBool, Ordering};

    /// An eventfd. A thread that sleeps on one that never rings is a model that never ends, which the checker says.
    #[derive(Debug)]
    pub struct Bell(AtomicBool);

    impl Bell {
        pub fn new() -> std::io::Result<Bell> {
            Ok(Bell(AtomicBool::new(false)))
        }

        pub fn ring(&self) {
            self.0.swap(true, Ordering::AcqRel);
        }

        pub fn heard(&self) {
            self.0.swap(false, Ordering::AcqRel);
        }

        pub fn wait(&self) {
            while !self.0.load(Ordering::Acquire) {
                loom::thread::yield_now();
            }
        }
    }

    /// As weak as a channel may be: a message is there once its slot is seen, by acquire and release and nothing more.
    #[derive(Debug)]
    struct Channel<M> {
        slots: [(AtomicBool, std::sync::Mutex<Option<M>>); 4],
        tail: AtomicUsize,
        /// The receiver's alone.
        head: std::sync::atomic::AtomicUsize,
    }

    #[derive(Debug)]
    pub struct Sender<M>(Arc<Channel<M>>);

    #[derive(Debug)]
    pub struct Receiver<M>(Arc<Channel<M>>);

    pub fn unbounded<M>() -> (Sender<M>, Receiver<M>) {
        let slots = std::array::from_fn(|_| (AtomicBool::new(false), std::sync::Mutex::new(None)));
        let channel = Arc::new(Channel { slots, tail: AtomicUsize::new(0), head: 0.into() });
        (Sender(Arc::clone(&channel)), Receiver(channel))
    }

    impl<M> Sender<M> {
        pub fn send(&self, message: M) -> Result<(), ()> {
            let (sent, slot) = &self.0.slots[self.0.tail.fetch_add(1, Ordering::Relaxed)];
            *slot.lock().unwrap() = Some(message);
            sent.store(true, Ordering::Release);
            Ok(())
        }
    }

    impl<M> Receiver<M> {
        pub fn try_iter(&self) -> impl Iterator<Item = M> + '_ {
            std::iter::from_fn(|| {
                let (sent, slot) = self.0.slots.get(self.0.head.load(Ordering::Relaxed))?;
                if !sent.load(Ordering::Acquire) {
                    return None;
                }
                self.0.head.fetch_add(1, Ordering::Relaxed);
                slot.lock().unwrap().take()
            })
        }
    }

    #[derive(Debug)]
    pub struct WaitGroup(Arc<AtomicUsize>);

    impl WaitGroup {
        pub fn new() -> WaitGroup {
            WaitGroup(Arc::new(AtomicUsize::new(1)))
        }

        pub fn wait(self) {
            let count = Arc::clone(&self.0);
            drop(self);
            while count.load(Ordering::Acquire) > 0 {
                loom::thread::yield_now();
            }
        }
    }

    impl Clone for WaitGroup {
        fn clone(&self) -> WaitGroup {
            self.0.fetch_add(1, Ordering::Relaxed);
            WaitGroup(Arc::clone(&self.0))
        }
    }

    impl Drop for WaitGroup {
        fn drop(&mut self) {
            self.0.fetch_sub(1, Ordering::AcqRel);
        }
    }
}

use loom::cell::UnsafeCell;
use loom::sync::Arc;
use loom::thread;

/// In every order in which a thread is interrupted at most three times, where it could go on.
fn check(what: impl Fn() + Sync + Send + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(3);
    builder.check(what);
}

/// A reactor that takes its mail and sleeps when there is none, until it has had `count` messages.
fn reactor(mail: &mailbox::Mailbox<usize>, count: usize) -> Vec<usize> {
    let mut had = Vec::new();
    while had.len() < count {
        if mail.has_mail() {
            had.extend(mail.take());
        } else {
            mail.bell().wait();
            // Each ring is one event, and this was it.
            mail.bell().heard();
        }
    }
    had
}

/// No message is slept through, whoever posts and when.
#[test]
fn every_message_is_taken() {
    check(|| {
        let (post, mail) = mailbox::mailbox::<usize>().unwrap();
        let post = Arc::new(post);
        let other = Arc::clone(&post);
        let poster = thread::spawn(move || assert!(other.post(1)));
        let second = thread::spawn(move || assert!(post.post(2)));
        let mut had = reactor(&mail, 2);
        had.sort_unstable();
        assert_eq!(had, [1, 2]);
        poster.join().unwrap();
        second.join().unwrap();
    });
}

/// And those of one poster come in its order.
#[test]
fn messages_keep_their_order() {
    check(|| {
        let (post, mail) = mailbox::mailbox::<usize>().unwrap();
        let poster = thread::spawn(move || (1..=2).for_each(|n| assert!(post.post(n))));
        assert_eq!(reactor(&mail, 2), [1, 2]);
        poster.join().unwrap();
    });
}

/// A session that sleeps on its bell hears of each broken queue, also while it is woken for something else.
#[test]
fn no_alarm_is_slept_through() {
    check(|| {
        let bell = Arc::new(sync::Bell::new().unwrap());
        let alarm = Arc::new(alarm::Alarm::new(Arc::clone(&bell)));
        let (theirs, other) = (Arc::clone(&alarm), Arc::clone(&bell));
        let queue = thread::spawn(move || theirs.raise());
        let order = thread::spawn(move || other.ring());
        loop {
            bell.wait();
            bell.heard();
            if alarm.take() {
                break;
            }
        }
        assert!(!alarm.take());
        queue.join().unwrap();
        order.join().unwrap();
    });
}

/// Guest memory: whoever touches it while it is taken away is caught by the checker.
struct Memory {
    bytes: Arc<UnsafeCell<u8>>,
    unmapped: Arc<loom::sync::atomic::AtomicBool>,
}

impl Drop for Memory {
    fn drop(&mut self) {
        self.unmapped.store(true, sync::Ordering::Relaxed);
    }
}

/// When a removal is acknowledged, the memory is unmapped and no request touches it any more: neither one whose queue
/// has gone over to the new map, nor one that outlives that in another thread.
#[test]
fn memory_is_free_when_its_removal_is_acknowledged() {
    check(|| {
        let bytes = Arc::new(UnsafeCell::new(0));
        let unmapped = Arc::new(loom::sync::atomic::AtomicBool::new(false));
        let map = Arc::new(Memory { bytes: Arc::clone(&bytes), unmapped: Arc::clone(&unmapped) });
        let released = sync::WaitGroup::new();
        let queue = hold::Hold::new(Arc::clone(&map), released.clone());
        let request = queue.clone();
        // The control thread's own.
        drop(map);
        let touch = |hold: &hold::Hold<Memory>| {
            hold.map().bytes.with(|at| {
                #[allow(unsafe_code)]
                // SAFETY: the checker says so, or fails.
                let _ = unsafe { at.read_volatile() };
            });
        };
        let reactor = thread::spawn(move || {
            touch(&queue);
            drop(queue);
        });
        let in_flight = thread::spawn(move || {
            touch(&request);
            drop(request);
        });
        released.wait();
        assert!(unmapped.load(sync::Ordering::Relaxed), "acknowledged while it is mapped");
        bytes.with_mut(|at| {
            #[allow(unsafe_code)]
            // SAFETY: as above.
            unsafe {
                at.write(1);
            }
        });
        reactor.join().unwrap();
        in_flight.join().unwrap();
    });
}
