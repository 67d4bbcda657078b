//! The dirty log of a session: what the front end has given for it, and what each queue is to tell it.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::memory::MemoryMap;
use crate::memory::log::{DirtyLog, LogError, QueueLog};

/// What a queue logs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Logging {
    /// What is written to buffers (`VHOST_F_LOG_ALL`).
    pub data: bool,
    /// What is written to the used ring, from this guest-physical address on (`VHOST_VRING_F_LOG`).
    pub used: Option<u64>,
}

/// The log and who tells it what.
#[derive(Debug, Default)]
pub(super) struct Logs {
    pub(super) log: Option<Arc<DirtyLog>>,
    pub(super) call: Option<Arc<OwnedFd>>,
    pub(super) queues: Vec<Logging>,
}

impl Logs {
    /// Logs to this memory from now on, which has to have a bit for all of `map`.
    pub(super) fn set_base(
        &mut self,
        fd: OwnedFd,
        offset: u64,
        size: u64,
        map: &MemoryMap,
    ) -> Result<(), LogError> {
        let log = DirtyLog::map(fd, offset, size)?;
        log.check_covers(map)?;
        self.log = Some(Arc::new(log));
        Ok(())
    }

    /// What is signalled when pages were marked.
    pub(super) fn set_call(&mut self, fd: Option<OwnedFd>) {
        self.call = fd.map(Arc::new);
    }

    /// What queue `index` is to log.
    pub(super) fn set(&mut self, index: u16, logging: Logging) {
        let index = usize::from(index);
        if self.queues.len() <= index {
            self.queues.resize(index + 1, Logging::default());
        }
        self.queues[index] = logging;
    }

    /// What queue `index` logs, and where. Nothing as long as there is no log: QEMU gives that last when a guest that
    /// migrates starts its driver anew.
    pub(super) fn of(&self, index: u16) -> Option<QueueLog> {
        let Logging { data, used } = self.queues.get(usize::from(index)).copied().unwrap_or_default();
        let log = self.log.as_ref().filter(|_| data || used.is_some())?;
        Some(QueueLog { log: Arc::clone(log), data, used, call: self.call.clone() })
    }
}
