//! What two processes tell each other of a disk when one takes over from the other: by which place it is known, and what
//! it is made of, with the locked image or the memory itself.

use std::io;
use std::os::fd::{AsFd, OwnedFd};

use daemon::takeover::ClaimError;
use poll_engine::takeover::give::Program;
use serde::{Deserialize, Serialize};

use crate::backend::formatted::Format;
use crate::disk::{Disk, Storage};

/// This program, to its next version.
pub const PROGRAM: Program = Program { name: "vhost-blk", version: env!("CARGO_PKG_VERSION") };

/// What a disk is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub enum Medium {
    /// A file; its descriptor comes with it, locked.
    File,
    /// A file that holds a disk in this format; its descriptor comes with it, locked.
    Image(Format),
    /// An image in a Ceph cluster.
    Rbd,
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
            // The block device of a namespace, to which commands are only another way.
            Storage::File(file, _) | Storage::Nvme(_, file, _) => {
                (Medium::File, Some(file.as_fd().try_clone_to_owned()?))
            }
            Storage::Image(image) => {
                (Medium::Image(image.format()), Some(image.file().as_fd().try_clone_to_owned()?))
            }
            Storage::Luks(volume) => {
                (Medium::Image(Format::Luks), Some(volume.file().as_fd().try_clone_to_owned()?))
            }
            Storage::Rbd(_) => (Medium::Rbd, None),
            Storage::Ram(ram) => (Medium::Ram(disk.capacity()), Some(ram.fd().try_clone_to_owned()?)),
            Storage::Null => (Medium::Null, None),
        };
        Ok((About { medium, read_only: disk.is_read_only() }, fd))
    }

    fn words(self) -> String {
        let what = match self.medium {
            Medium::File => "an image".into(),
            Medium::Rbd => "an RBD image".into(),
            Medium::Image(format) => format!("a {format} image"),
            Medium::Ram(size) => format!("ram:{size}"),
            Medium::Null => "null".into(),
        };
        format!("{what}{}", if self.read_only { ", read-only" } else { "" })
    }

    /// Fails unless this, which another process serves at `key`, is what this one is to serve.
    pub fn expect(self, key: &str, ours: About) -> Result<(), ClaimError> {
        if self == ours {
            return Ok(());
        }
        let (theirs, ours) = (self.words(), ours.words());
        Err(ClaimError::Kind { key: key.into(), theirs, ours })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_stays_what_it_is() {
        let about = About { medium: Medium::Ram(4096), read_only: false };
        about.expect("/a", about).unwrap();
        for other in [About { read_only: true, ..about }, About { medium: Medium::Null, ..about }] {
            assert!(about.expect("/a", other).is_err());
        }
    }
}
