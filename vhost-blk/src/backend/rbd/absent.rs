//! In the place of all that, in a program that is built without it: there is no such image.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use poll_engine::engine::queue::{Queue, Request};
use poll_engine::engine::reactor::Io;

use super::Address;
use crate::backend::{Backend, Begun};
use crate::disk::Disk;
use crate::request::Operation;

/// Why an image is not opened.
#[derive(Debug, thiserror::Error)]
pub enum RbdError {
    /// It is no name of one.
    #[error("{0}")]
    Name(String),
    /// There is nothing to open it with.
    #[error(
        "{0}: this program is built without Ceph; install librbd-dev and build it with cargo build -p vhost-blk \
         --features rbd, or map the image with the kernel's driver (rbd map) and serve the block device"
    )]
    Absent(PathBuf),
}

/// There is none.
#[derive(Debug)]
pub enum RbdImage {}

impl RbdImage {
    /// Says so.
    pub fn open(path: &Path, _: bool) -> Result<RbdImage, RbdError> {
        Address::of(path).map_err(RbdError::Name)?;
        Err(RbdError::Absent(path.to_owned()))
    }

    /// Bytes.
    pub fn size(&self) -> io::Result<u64> {
        match *self {}
    }

    /// Has the program look for growth.
    pub fn watch(&self) {
        match *self {}
    }

    /// Makes all that was written visible to others.
    pub fn flush(&self) -> io::Result<()> {
        match *self {}
    }

    /// Requests that wait for the cluster now, and how often it has not answered for long.
    pub fn waits(&self) -> (u64, u64) {
        match *self {}
    }
}

/// Of none.
pub enum RbdBackend {}

impl RbdBackend {
    /// On none.
    #[allow(clippy::needless_pass_by_value)] // as with the library
    pub fn new(image: Arc<RbdImage>, _: Arc<Disk>, _: u16) -> io::Result<RbdBackend> {
        match *image {}
    }
}

impl Backend for RbdBackend {
    fn begin(&mut self, _: Request, _: Operation, _: &mut Queue, _: &mut Io<'_>) -> Begun {
        match *self {}
    }
}
