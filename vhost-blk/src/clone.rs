//! Clones: disks that begin as another one is, their base, and keep for themselves only what is written to them. A clone is
//! a qcow2 image over its base, so it is made in the same time whatever the size of that, and any number share one.

use std::fmt;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use anyhow::{Context, Result, bail};
use daemon::confine::Places;
use rustix::fs::{CWD, RenameFlags, renameat_with};
use serde::{Serialize, Serializer};

use crate::backend::formatted::{Format, Formatted, create};
use crate::lock::lock;
use crate::open::{OpenError, is_same, open_file};

/// What a clone begins as: `[FORMAT:]PATH`, of qcow2 where no format is said.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Base {
    /// What the bytes of the file mean. Never guessed.
    pub format: Format,
    /// The file.
    pub path: PathBuf,
}

impl FromStr for Base {
    type Err = String;

    fn from_str(s: &str) -> Result<Base, String> {
        let (format, path) = match s.split_once(':') {
            Some(("raw", path)) => (Format::Raw, path),
            Some(("qcow2", path)) => (Format::Qcow2, path),
            Some(("vmdk", path)) => (Format::Vmdk, path),
            _ => (Format::Qcow2, s),
        };
        if path.is_empty() {
            return Err("a base is written [FORMAT:]PATH, such as base.qcow2 or raw:base.img".into());
        }
        Ok(Base { format, path: path.into() })
    }
}

impl fmt::Display for Base {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.format {
            Format::Qcow2 => write!(f, "{}", self.path.display()),
            format => write!(f, "{format}:{}", self.path.display()),
        }
    }
}

impl Serialize for Base {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.collect_str(self)
    }
}

impl Base {
    /// Bytes of its disk. It must be sound, and nobody may be writing to it.
    fn size(&self) -> Result<u64> {
        let (file, traits) = open_file(&self.path, true, false)?;
        lock(&file, false).map_err(|error| OpenError::Lock { path: self.path.clone(), error })?;
        if self.format == Format::Raw {
            return Ok(crate::open::size_of(std::os::fd::AsFd::as_fd(&file))?);
        }
        Ok(Formatted::new(self.format, &self.path, (file, traits), (true, false), None).look()?)
    }

    /// Makes a clone of it at `path`, where nothing is: whole and durable, or not at all.
    pub fn clone_to(&self, path: &Path) -> Result<()> {
        let failed = || format!("cannot make {} a clone of {self}", path.display());
        let size = self.size().with_context(failed)?;
        if !size.is_multiple_of(512) {
            bail!("{}: its base has {size} bytes, no multiple of 512; resize that (truncate)", failed());
        }
        // It is found wherever the clone is moved to.
        let backing = fs::canonicalize(&self.path).with_context(failed)?;
        let beside = unfinished(path);
        let _ = fs::remove_file(&beside);
        create(&beside, size, &backing, self.format).with_context(failed)?;
        put(&beside, path).inspect_err(|_| drop(fs::remove_file(&beside))).with_context(failed)?;
        settle(path).with_context(failed)
    }

    /// Fails unless the image at `path` is a clone of it, or was one and is by itself now.
    pub fn expect_below(&self, path: &Path) -> Result<()> {
        let (file, traits) = open_file(path, true, false)?;
        let image = Formatted::new(Format::Qcow2, path, (file, traits), (true, false), None);
        let same = match image.backing()? {
            None => true,
            Some((path, format)) => {
                let is_it = |theirs| is_same(&theirs, &File::open(&self.path)?);
                format == self.format && File::open(&path).and_then(is_it).unwrap_or(false)
            }
        };
        if same {
            return Ok(());
        }
        bail!(
            "{} is there, and is no clone of {self}; name another file, or leave clone-of out to serve what is there",
            path.display()
        )
    }
}

/// What a clone is called while it is made: by its process, since there may be two.
fn unfinished(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(format!(".{}.new", std::process::id()));
    name.into()
}

/// Gives a file another name, which nothing may have. [`settle`] makes it durable.
pub fn put(from: &Path, to: &Path) -> io::Result<()> {
    Ok(renameat_with(CWD, from, CWD, to, RenameFlags::NOREPLACE)?)
}

/// Makes the name of a file durable.
pub fn settle(path: &Path) -> io::Result<()> {
    File::open(Places::directory_of(path))?.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_base_is_qcow2_unless_said_otherwise() {
        for (said, format, path) in [
            ("base.qcow2", Format::Qcow2, "base.qcow2"),
            ("raw:/img/a:b", Format::Raw, "/img/a:b"),
            ("vmdk:x", Format::Vmdk, "x"),
            ("a:b", Format::Qcow2, "a:b"),
        ] {
            let base: Base = said.parse().unwrap();
            assert_eq!((base.format, base.path.as_path()), (format, Path::new(path)));
            assert_eq!(base.to_string(), said);
        }
        assert!("".parse::<Base>().is_err() && "raw:".parse::<Base>().is_err());
    }
}
