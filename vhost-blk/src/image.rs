//! A disk as somebody asks for it on a command line, opened.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use daemon::Switch;
use poll_engine::memory::Ram;
use tracing::{info, warn};

use crate::backend::formatted::{Format, Formatted};
use crate::backend::luks::{KeySource, Volume};
use crate::backend::nvme::{self, NoCommands};
use crate::backend::rbd::{RbdImage, is_address};
use crate::backend::write_log::WriteLog;
use crate::cli::{CacheMode, DeviceOptions, Synthetic};
use crate::disk::{Disk, DiskConfig, Storage};
use crate::open::{OpenError, Owner, open, open_file, own, own_too};

/// A file, or something in place of one.
#[derive(Debug, Default)]
pub struct Image<'a> {
    /// The image.
    pub file: Option<&'a Path>,
    /// What its bytes mean.
    pub format: Format,
    /// The key of a LUKS volume.
    pub key: Option<KeySource>,
    /// Whether what is discarded on such a volume is given up.
    pub discards: bool,
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
    fn open_formatted(
        &self,
        path: &Path,
        direct: bool,
        block_size: u32,
        owner: Owner<'_>,
        log: Option<Arc<WriteLog>>,
    ) -> Result<(Storage, u64)> {
        let (file, traits) = open_file(path, self.read_only, direct)?;
        if traits.offset_align > block_size {
            bail!(OpenError::Alignment { path: path.to_owned(), align: traits.offset_align });
        }
        own(path, &file, self.read_only, owner)?;
        let beside = matches!(owner, Owner::Beside(_));
        let image = Formatted::new(self.format, path, (file, traits), (self.read_only, beside), log);
        let size = match owner {
            // All that is wrong with it is found now.
            Owner::Us => image.run()?.size(),
            Owner::Beside(_) | Owner::Another => image.look()?,
        };
        if size < u64::from(block_size) {
            bail!("cannot use {}: its disk has {size} bytes, which is less than a block", path.display());
        }
        Ok((Storage::Image(Arc::new(image)), size - size % u64::from(block_size)))
    }

    /// A file or a block device; or an NVMe namespace, by commands of its own if they pass.
    fn open_raw(
        &self,
        path: &Path,
        direct: bool,
        options: &DeviceOptions,
        owner: Owner<'_>,
    ) -> Result<(Storage, u64)> {
        let plain = |path: &Path| open(path, self.read_only, direct, options.block_size, owner);
        let Some(found) = nvme::find(path) else {
            let (file, traits, size) = plain(path)?;
            return Ok((Storage::File(file, traits), size));
        };
        let block = found.block.clone();
        let is_logged = options.fault.as_ref().is_some_and(|fault| fault.log_writes.is_some());
        let opened = if is_logged {
            Err(NoCommands::Here("only writes to files and block devices are logged".into()))
        } else {
            found.open(self.read_only, options.num_queues, options.queue_size)
        };
        match opened {
            Ok(namespace) => {
                // What direct I/O wants holds for commands, whatever --direct says: they pass by the page cache.
                let (file, traits, size) = open(&block, self.read_only, true, options.block_size, owner)?;
                own_too(path, namespace.generic(), self.read_only, owner)?;
                let how = if namespace.is_polled() { ", polled for" } else { "" };
                info!("{} is given NVMe commands{how}", path.display());
                Ok((Storage::Nvme(Arc::new(namespace), file, traits), size))
            }
            Err(NoCommands::Here(why)) => {
                info!("{} is given no NVMe commands, using {}: {why}", path.display(), block.display());
                let (file, traits, size) = plain(&block)?;
                Ok((Storage::File(file, traits), size))
            }
            Err(e @ NoCommands::Metadata { .. }) => Err(e.into()),
        }
    }

    fn open_luks(
        &self,
        path: &Path,
        direct: bool,
        block_size: u32,
        owner: Owner<'_>,
    ) -> Result<(Storage, u64)> {
        let key = self.key.as_ref().context("a LUKS volume without its key; say where that is")?;
        let (file, traits) = open_file(path, self.read_only, direct)?;
        own(path, &file, self.read_only, owner)?;
        let volume = Volume::open(path, (file, traits), key, self.discards)?;
        let block_size = block_size.max(volume.sector());
        if traits.offset_align > block_size {
            bail!(OpenError::Alignment { path: path.to_owned(), align: traits.offset_align });
        }
        let size = volume.size()?;
        let size = size - size % u64::from(block_size);
        Ok((Storage::Luks(Arc::new(volume)), size))
    }

    /// The disk.
    pub fn open(mut self, options: &DeviceOptions) -> Result<Disk> {
        let faults = options.fault.clone();
        let log = faults.as_ref().and_then(|faults| faults.log_writes.as_deref());
        let log = log.map(WriteLog::create).transpose()?.map(Arc::new);
        if let Some(faults) = &faults {
            let name = self.file.map_or("a disk without a file".into(), |path| path.display().to_string());
            warn!("{name} is FAULTY ON PURPOSE, for a rehearsal: {faults}");
        }
        if self.key.is_some() && self.format != Format::Luks {
            bail!("a key goes with format luks");
        }
        let (storage, capacity) = match (self.file, self.synthetic) {
            (Some(path), _) if is_address(path) => {
                if self.format != Format::Raw {
                    bail!(
                        "{}: what is in a cluster is raw; leave --format {} out",
                        path.display(),
                        self.format
                    );
                }
                let image = RbdImage::open(path, self.read_only)?;
                let size = image.size().with_context(|| path.display().to_string())?;
                (Storage::Rbd(Arc::new(image)), size)
            }
            (Some(path), _) => {
                let beside = self.beside.take().map(File::from);
                let direct = options.direct == Switch::On;
                let owner = match &beside {
                    _ if self.incoming => Owner::Another,
                    Some(theirs) => Owner::Beside(theirs),
                    None => Owner::Us,
                };
                match self.format {
                    Format::Raw => self.open_raw(path, direct, options, owner)?,
                    Format::Luks => self.open_luks(path, direct, options.block_size, owner)?,
                    Format::Qcow2 | Format::Vmdk => {
                        self.open_formatted(path, direct, options.block_size, owner, log.clone())?
                    }
                }
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
                shared_depth: options.shared_depth,
            },
        );
        disk.throttle().set(options.limit.unwrap_or_default());
        Ok(disk.with_faults(faults, log))
    }
}
