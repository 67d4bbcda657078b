//! Places where a test has the process die as by `kill -9`, between the steps that a crash must not come between.
//!
//! They are in debug builds, which tests run, and in optimised ones they are nothing. `KICKLESS_FAULT=NAME:N` ends the
//! process when it passes the place NAME for the N-th time.

/// The places on the way of a request through a split ring, in order, and those of a recovery.
pub const SPLIT: [&str; 13] = [
    "take-begins",
    "take-counter",
    "take-inflight",
    "complete-used-ring",
    "complete-next",
    "complete-last-batch-head",
    "publish-begins",
    "publish-used-idx",
    "publish-clear",
    "publish-cleared",
    "publish-noted",
    "signal-begins",
    "signal-ends",
];
/// Those on the way through a packed ring.
pub const PACKED: [&str; 17] = [
    "take-begins",
    "take-counter",
    "take-inflight",
    "take-free-head",
    "take-old-free-head",
    "complete-begins",
    "publish-begins",
    "publish-next",
    "publish-free-head",
    "publish-used-idx",
    "publish-shown",
    "publish-clear",
    "publish-cleared",
    "publish-old-free-head",
    "publish-noted",
    "signal-begins",
    "signal-ends",
];
/// Where a chain goes back to those that are available, as a limit has it; a split ring has the last only.
pub const UNTAKE: [&str; 4] = ["untake-next", "untake-free-head", "untake-old-free-head", "untake-inflight"];
/// The places of a recovery, which come up when requests were in flight.
pub const RECOVER: [&str; 2] = ["recover-begins", "recover-taken"];

/// Places that a packed ring passes when a batch was cut short and when what was left is given back unserved: tests come
/// upon them by chance only.
pub const BY_CHANCE: [&str; 2] = ["recover-erased", "return-written"];

/// The places of a process that is taken over from, in order.
pub const GIVER: [&str; 7] = [
    "giver-greeted",
    "giver-parked",
    "giver-drained",
    "giver-sent-one",
    "giver-sent-all",
    "giver-heard",
    "giver-left",
];
/// Those of one that takes over.
pub const TAKER: [&str; 8] = [
    "taker-begins",
    "taker-greeted",
    "taker-asked",
    "taker-has-all",
    "taker-prepared",
    "taker-has-baton",
    "taker-serves",
    "taker-said",
];

/// Those of an image in a format of its own: before each change of a file by a worker.
pub const IMAGE: [&str; 1] = ["image-changes"];

#[cfg(debug_assertions)]
mod hijack;
#[cfg(debug_assertions)]
pub use hijack::hijack;
#[cfg(debug_assertions)]
pub(crate) use hijack::hijack_reactor;

/// Where a test has a thread of this name do what an attacker who runs code in it would.
#[cfg(not(debug_assertions))]
#[inline(always)]
pub fn hijack(_thread: &str) {}

/// As [`hijack`], with the reactor's own io_uring.
#[cfg(not(debug_assertions))]
#[inline(always)]
pub(crate) fn hijack_reactor(_uring: &mut crate::uring::Uring) {}

/// One of the places.
#[cfg(not(debug_assertions))]
#[inline(always)]
pub fn pass(_name: &'static str) {}

/// One of the places.
#[cfg(debug_assertions)]
pub fn pass(name: &'static str) {
    use std::sync::OnceLock;
    use std::sync::atomic::{AtomicI64, Ordering};

    static WANTED: OnceLock<Option<(String, AtomicI64)>> = OnceLock::new();
    let wanted = WANTED.get_or_init(|| {
        let text = std::env::var("KICKLESS_FAULT").ok()?;
        let (name, nth) = text.split_once(':')?;
        Some((name.to_owned(), AtomicI64::new(nth.parse().ok()?)))
    });
    if let Some((wanted, left)) = wanted
        && wanted == name
        && left.fetch_sub(1, Ordering::Relaxed) == 1
    {
        let _ = nix::sys::signal::kill(nix::unistd::getpid(), nix::sys::signal::Signal::SIGKILL);
        // Nothing more is done by this thread, whoever else goes on until the signal has got there.
        loop {
            std::thread::park();
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::collections::BTreeSet;
    use std::path::Path;

    use super::{BY_CHANCE, GIVER, IMAGE, PACKED, RECOVER, SPLIT, TAKER, UNTAKE};

    /// Names of the places in the files of a directory.
    fn passed(directory: &Path, names: &mut BTreeSet<String>) {
        for entry in std::fs::read_dir(directory).unwrap().flatten() {
            let path = entry.path();
            if path.is_dir() {
                passed(&path, names);
            } else if path.file_name() != Some("fault_point.rs".as_ref()) {
                let text = std::fs::read_to_string(path).unwrap();
                let places = text.split("pass(\"").skip(1).filter_map(|rest| rest.split_once("\")"));
                names.extend(places.map(|(name, _)| name.to_owned()));
            }
        }
    }

    /// A place that is in no list is one that no test dies at.
    #[test]
    fn the_lists_have_every_place() {
        let mut there = BTreeSet::new();
        for source in ["src", "../vhost-blk/src", "../vhost-net/src"] {
            passed(&Path::new(env!("CARGO_MANIFEST_DIR")).join(source), &mut there);
        }
        let lists =
            [&SPLIT[..], &PACKED, &UNTAKE, &RECOVER, &BY_CHANCE, &GIVER, &TAKER, &IMAGE].concat().into_iter();
        assert_eq!(there, lists.map(str::to_owned).collect());
    }
}
