//! Disk images as the host sees them.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use anyhow::{Result, ensure};

use crate::process;
use crate::scene::Scene;

/// One mebibyte.
pub const MIB: u64 = 1 << 20;

/// A raw image file in a [`Scene`].
#[derive(Debug, Clone)]
pub struct Image {
    path: PathBuf,
}

impl Image {
    /// Creates a sparse image.
    pub fn create(scene: &Scene, name: &str, bytes: u64) -> Result<Self> {
        let path = scene.path(name);
        File::create(&path)?.set_len(bytes)?;
        Ok(Self { path })
    }

    /// An image that is there already.
    pub fn at(path: PathBuf) -> Self {
        Self { path }
    }

    /// Creates an image all of whose bytes are `fill`.
    pub fn filled(scene: &Scene, name: &str, bytes: u64, fill: u8) -> Result<Self> {
        let image = Self::create(scene, name, bytes)?;
        let file = OpenOptions::new().write(true).open(&image.path)?;
        let chunk = vec![fill; MIB as usize];
        let mut at = 0;
        while at < bytes {
            let len = chunk.len().min((bytes - at) as usize);
            file.write_all_at(&chunk[..len], at)?;
            at += len as u64;
        }
        file.sync_all()?;
        Ok(image)
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Changes the size of the file.
    pub fn resize(&self, bytes: u64) -> Result<()> {
        Ok(OpenOptions::new().write(true).open(&self.path)?.set_len(bytes)?)
    }

    /// The bytes that are allocated to the file, as `st_blocks` counts them.
    pub fn allocated(&self) -> Result<u64> {
        let file = File::open(&self.path)?;
        file.sync_all()?; // delayed allocation
        Ok(file.metadata()?.blocks() * 512)
    }

    /// Reads part of the file.
    pub fn read(&self, offset: u64, len: usize) -> Result<Vec<u8>> {
        let mut bytes = vec![0; len];
        File::open(&self.path)?.read_exact_at(&mut bytes, offset)?;
        Ok(bytes)
    }

    /// Fails unless all bytes of a range are `fill`.
    pub fn expect_fill(&self, offset: u64, len: usize, fill: u8) -> Result<()> {
        if let Some(at) = self.read(offset, len)?.iter().position(|&byte| byte != fill) {
            anyhow::bail!("byte {} of {} is not {fill:#x}", offset + at as u64, self.path.display());
        }
        Ok(())
    }

    /// The file's SHA-256.
    pub fn sha256(&self) -> Result<String> {
        let (code, text) = process::run("sha256sum", &[&self.path.to_string_lossy()])?;
        ensure!(code == 0, "sha256sum: {text}");
        Ok(text.split(' ').next().unwrap_or_default().to_owned())
    }

    /// Fails unless `e2fsck -fn` finds a clean ext4 file system.
    pub fn fsck(&self) -> Result<()> {
        let e2fsck = process::find_program("e2fsck").unwrap_or_else(|| PathBuf::from("e2fsck"));
        let (code, text) =
            process::run(&e2fsck.to_string_lossy(), &["-f", "-n", &self.path.to_string_lossy()])?;
        ensure!(code == 0, "e2fsck on the host: exit code {code}\n{text}");
        Ok(())
    }

    /// Whether the file's file system takes direct I/O.
    pub fn takes_direct_io(&self) -> bool {
        OpenOptions::new().read(true).custom_flags(nix::libc::O_DIRECT).open(&self.path).is_ok()
    }
}
