//! A disk as somebody asks for it on a command line, opened.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use daemon::Switch;
use poll_engine::memory::Ram;

use crate::cli::{CacheMode, DeviceOptions, Synthetic};
use crate::disk::{Disk, DiskConfig, Storage};
use crate::open::{Owner, open};

/// A file, or something in place of one.
#[derive(Debug, Default)]
pub struct Image<'a> {
    /// The image.
    pub file: Option<&'a Path>,
    /// Or none.
    pub synthetic: Option<Synthetic>,
    /// Serial number.
    pub serial: &'a str,
    /// Refuse writes.
    pub read_only: bool,
    /// Leave the image to another daemon until the guest arrives.
    pub incoming: bool,
    /// The same image or memory, as a process has it that we take over from.
    pub beside: Option<OwnedFd>,
}

impl Image<'_> {
    /// The disk.
    pub fn open(self, options: &DeviceOptions) -> Result<Disk> {
        let (storage, capacity) = match (self.file, self.synthetic) {
            (Some(path), _) => {
                let beside = self.beside.map(File::from);
                let direct = options.direct == Switch::On;
                let owner = match &beside {
                    _ if self.incoming => Owner::Another,
                    Some(theirs) => Owner::Beside(theirs),
                    None => Owner::Us,
                };
                let (file, traits, size) = open(path, self.read_only, direct, options.block_size, owner)?;
                (Storage::File(file, traits), size)
            }
            (None, Some(Synthetic::Ram(size))) => {
                let ram = match self.beside {
                    Some(fd) => Ram::shared(0, size, fd),
                    None => Ram::new(0, size, false),
                };
                let ram = ram.with_context(|| format!("cannot get {size} bytes for a RAM disk"))?;
                (Storage::Ram(Arc::new(ram)), size)
            }
            (None, Some(Synthetic::Null(size))) => (Storage::Null, size),
            (None, None) => bail!("a disk without an image"),
        };
        if !capacity.is_multiple_of(u64::from(options.block_size)) {
            bail!(
                "{} bytes are no multiple of --block-size {}; choose another size",
                capacity,
                options.block_size
            );
        }
        let disk = Disk::new(
            storage,
            capacity,
            &DiskConfig {
                block_size: options.block_size,
                read_only: self.read_only,
                serial: self.serial.to_owned(),
                writeback: options.cache == CacheMode::Writeback,
                ring_size: options.queue_size,
                path: self.file.map(Path::to_owned).unwrap_or_default(),
                incoming: self.incoming,
            },
        );
        disk.throttle().set(options.limit.unwrap_or_default());
        Ok(disk)
    }
}
