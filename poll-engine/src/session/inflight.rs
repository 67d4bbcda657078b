//! The record of requests in flight from the session's side: memory for it is made on request, and taken up from a front
//! end that has kept it over the death of an earlier back end.

use std::io;
use std::os::fd::{AsFd, OwnedFd};

use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};

use crate::memory::map::MemoryError;
use crate::ring::RingFormat;
use crate::ring::inflight::{InflightMemory, InflightSpec, Memento, QueueRegion};

/// Why requests in flight cannot be recorded.
#[derive(Debug, thiserror::Error)]
pub enum InflightError {
    /// The system gives no memory.
    #[error("no memory for a record of requests in flight: {0}")]
    Allocate(io::Error),
    /// What the front end has sent is no such memory.
    #[error("the record of requests in flight cannot be used: {0}")]
    Map(#[from] MemoryError),
    /// What the front end had sent was of no use.
    #[error("there is no usable record of requests in flight, and some may have to be served again")]
    Lost,
}

/// Where a session's queues keep their record.
#[derive(Debug, Default)]
pub enum Inflight {
    /// Nowhere: the front end does not ask for one.
    #[default]
    Off,
    /// There.
    On(InflightMemory),
    /// The front end has one that cannot be used. A queue that ran all the same might lose requests.
    Lost,
}

impl Inflight {
    /// Goes over to the record behind `fd`.
    pub fn set(&mut self, spec: InflightSpec, fd: OwnedFd) -> Result<(), InflightError> {
        *self = Inflight::Lost;
        *self = Inflight::On(InflightMemory::map(spec, fd)?);
        Ok(())
    }

    /// The device has been reset.
    pub fn forget(&self, format: RingFormat) -> Result<(), InflightError> {
        if let Inflight::On(memory) = self {
            memory.forget(format)?;
        }
        Ok(())
    }

    /// The part of queue `index`, which has a ring of this format; `None` when it goes unrecorded.
    pub fn region(&self, index: u16, format: RingFormat) -> Result<Option<QueueRegion>, InflightError> {
        match self {
            Inflight::Off => Ok(None),
            Inflight::On(memory) => Ok(memory.queue(index, format)?),
            Inflight::Lost => Err(InflightError::Lost),
        }
    }

    /// Where a device with rings of this format leaves what has to outlive the process.
    pub fn memento(&self, format: RingFormat) -> Option<Memento> {
        if let Inflight::On(memory) = self { memory.memento(format) } else { None }
    }
}

/// Memory for a new record: a file of zeros that nobody can make shorter.
pub fn allocate(spec: &InflightSpec) -> Result<OwnedFd, InflightError> {
    let make = || -> nix::Result<OwnedFd> {
        let fd = memfd_create(c"inflight", MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING)?;
        nix::unistd::ftruncate(&fd, spec.mmap_size as i64)?;
        let seals = SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SEAL;
        fcntl(fd.as_fd(), FcntlArg::F_ADD_SEALS(seals))?;
        Ok(fd)
    };
    make().map_err(|e| InflightError::Allocate(e.into()))
}
