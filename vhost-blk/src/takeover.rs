//! What two processes tell each other of a disk when one takes over from the other: by which place it is known, and what
//! it is made of, with the locked image or the memory itself.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, OwnedFd};

use poll_engine::takeover::give::Program;
use poll_engine::takeover::take::Offered;
use serde::{Deserialize, Serialize};

use crate::disk::{Disk, Storage};

/// This program, to its next version.
pub const PROGRAM: Program = Program { name: "vhost-blk", version: env!("CARGO_PKG_VERSION") };

/// Why a disk is not taken over.
#[derive(Debug, thiserror::Error)]
pub enum ClaimError {
    /// The new process would drop a disk.
    #[error(
        "the running process serves a disk on {0}, and this one would not; add it to the options, or stop the running process first"
    )]
    Missing(String),
    /// Another kind of disk.
    #[error(
        "the running process serves {theirs} on {key}, and this one would serve {ours}; keep the options"
    )]
    Kind {
        /// Where.
        key: String,
        /// There.
        theirs: String,
        /// Here.
        ours: String,
    },
    /// Not what we understand.
    #[error("the running process describes its disk on {0} in a way that this one does not know")]
    Unknown(String),
}

/// What a disk is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub enum Medium {
    /// A file; its descriptor comes with it, locked.
    File,
    /// Memory; its descriptor comes with it.
    Ram(u64),
    /// Nothing.
    Null,
}

/// What a disk says of itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct About {
    /// What it is made of.
    pub medium: Medium,
    /// Whether it refuses writes.
    pub read_only: bool,
}

impl About {
    /// Of a disk that is served; the descriptor goes with it.
    pub fn disk(disk: &Disk) -> io::Result<(About, Option<OwnedFd>)> {
        let (medium, fd) = match disk.storage() {
            Storage::File(file, _) => (Medium::File, Some(file.as_fd().try_clone_to_owned()?)),
            Storage::Ram(ram) => (Medium::Ram(disk.capacity()), Some(ram.fd().try_clone_to_owned()?)),
            Storage::Null => (Medium::Null, None),
        };
        Ok((About { medium, read_only: disk.is_read_only() }, fd))
    }

    fn words(self) -> String {
        let what = match self.medium {
            Medium::File => "an image".into(),
            Medium::Ram(size) => format!("ram:{size}"),
            Medium::Null => "null".into(),
        };
        format!("{what}{}", if self.read_only { ", read-only" } else { "" })
    }
}

/// A disk of the running process, to be gone on with.
#[derive(Debug)]
pub struct Inherited {
    /// Its place in what the running process has offered.
    pub place: usize,
    /// What it is.
    pub about: About,
    /// The image or the memory.
    pub fd: Option<OwnedFd>,
}

impl Inherited {
    /// Fails unless it is what this process is to serve.
    pub fn expect(&self, key: &str, ours: About) -> Result<(), ClaimError> {
        if self.about == ours {
            return Ok(());
        }
        let (theirs, ours) = (self.about.words(), ours.words());
        Err(ClaimError::Kind { key: key.into(), theirs, ours })
    }
}

/// Finds for each of `keys` what the running process has offered there. All of it must be asked for.
pub fn claim(offered: Vec<Offered>, keys: &[String]) -> Result<Vec<Option<Inherited>>, ClaimError> {
    let mut there = HashMap::new();
    for (place, Offered { key, about, fds }) in offered.into_iter().enumerate() {
        let Ok(about) = serde_json::from_value(about) else { return Err(ClaimError::Unknown(key)) };
        there.insert(key, Inherited { place, about, fd: fds.into_iter().next() });
    }
    let claimed = keys.iter().map(|key| there.remove(key)).collect();
    match there.into_keys().min() {
        Some(key) => Err(ClaimError::Missing(key)),
        None => Ok(claimed),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn offered(key: &str) -> Offered {
        let about = About { medium: Medium::Ram(4096), read_only: false };
        Offered { key: key.into(), about: serde_json::to_value(about).unwrap(), fds: Vec::new() }
    }

    #[test]
    fn disks_are_found_by_their_place_and_none_is_dropped() {
        let keys = ["/b", "/new", "/a"].map(String::from);
        let found = claim(vec![offered("/a"), offered("/b")], &keys).unwrap();
        let places: Vec<_> = found.iter().map(|f| f.as_ref().map(|f| f.place)).collect();
        assert_eq!(places, [Some(1), None, Some(0)]);
        let missing = claim(vec![offered("/a"), offered("/c")], &keys).unwrap_err();
        assert!(matches!(&missing, ClaimError::Missing(key) if key == "/c"), "{missing}");
        let odd = Offered { about: serde_json::json!({ "medium": "Tape" }), ..offered("/a") };
        assert!(matches!(claim(vec![odd], &keys), Err(ClaimError::Unknown(_))));
    }

    #[test]
    fn a_disk_stays_what_it_is() {
        let [inherited] = &claim(vec![offered("/a")], &["/a".into()]).unwrap()[..] else { panic!() };
        let inherited = inherited.as_ref().unwrap();
        let about = inherited.about;
        inherited.expect("/a", about).unwrap();
        for other in [About { read_only: true, ..about }, About { medium: Medium::Null, ..about }] {
            assert!(inherited.expect("/a", other).is_err());
        }
    }
}
