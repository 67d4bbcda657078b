//! A null disk as an ordinary user of the `vhost-user-backend` and `virtio-queue` crates writes one: epoll, a queue
//! behind a lock, an event for every batch. A peer to measure beside, with nothing done to make it fast or slow.

use std::io::{Error, Result};
use std::path::Path;
use std::sync::{Arc, RwLock};

use anyhow::Context;
use poll_engine::device::features;
use poll_engine::engine::placement::pin_to;
use vhost::vhost_user::message::{VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use vhost_user_backend::{VhostUserBackendMut, VhostUserDaemon, VringRwLock, VringT};
use virtio_queue::{DescriptorChain, QueueOwnedT};
use vm_memory::{
    Bytes, GuestAddress, GuestAddressSpace, GuestMemoryAtomic, GuestMemoryLoadGuard, GuestMemoryMmap,
};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::event::{EventConsumer, EventFlag, EventNotifier, new_event_consumer_and_notifier};

const MAX_QUEUE_SIZE: usize = 1024;
const SECTORS: u64 = (1 << 30) / 512;
/// Virtio 1.3, 5.2.6: types of requests, and what a status says.
const T_IN: u32 = 0;
const T_OUT: u32 = 1;
const T_FLUSH: u32 = 4;
const S_OK: u8 = 0;
const S_UNSUPP: u8 = 2;
const F_MQ: u64 = 1 << 12;

type Memory = GuestMemoryAtomic<GuestMemoryMmap>;

/// Serves one front end after another for ever.
pub fn serve(path: &Path, num_queues: u16, cpu: Option<usize>) -> anyhow::Result<()> {
    if let Some(cpu) = cpu {
        // The crate's threads are started by this one, and run where it runs.
        pin_to(cpu).with_context(|| format!("cannot run on CPU {cpu}"))?;
    }
    loop {
        let memory = Memory::new(GuestMemoryMmap::new());
        let disk = Null { memory: memory.clone(), event_idx: false, num_queues: num_queues.into() };
        let mut daemon = VhostUserDaemon::new("plain".into(), Arc::new(RwLock::new(disk)), memory)
            .map_err(|e| anyhow::anyhow!("cannot set the daemon up: {e}"))?;
        daemon.serve(path).map_err(|e| anyhow::anyhow!("serving {}: {e}", path.display()))?;
    }
}

struct Null {
    memory: Memory,
    event_idx: bool,
    num_queues: usize,
}

/// As an error of the crate.
pub fn other(e: impl std::fmt::Display) -> Error {
    Error::other(e.to_string())
}

impl Null {
    /// Answers what is in the queue; whether there was something.
    fn process(&self, vring: &VringRwLock) -> Result<bool> {
        let memory = self.memory.memory();
        let chains: Vec<_> = {
            let mut state = vring.get_mut();
            state.get_queue_mut().iter(memory.clone()).map_err(other)?.collect()
        };
        if chains.is_empty() {
            return Ok(false);
        }
        for chain in chains {
            let head = chain.head_index();
            let written = answer(chain, &memory).map_err(other)?;
            vring.add_used(head, written).map_err(other)?;
        }
        if vring.needs_notification().map_err(other)? {
            vring.signal_used_queue()?;
        }
        Ok(true)
    }
}

/// Writes the status of one request; the bytes written in all.
fn answer(
    chain: DescriptorChain<GuestMemoryLoadGuard<GuestMemoryMmap>>,
    memory: &GuestMemoryMmap,
) -> anyhow::Result<u32> {
    let mut header = None;
    let mut status = None;
    let mut writable: u32 = 0;
    for descriptor in chain {
        header.get_or_insert(descriptor.addr());
        if descriptor.is_write_only() && descriptor.len() > 0 {
            writable = writable.checked_add(descriptor.len()).context("more than 4 GiB")?;
            let last = u64::from(descriptor.len()) - 1;
            status = descriptor.addr().0.checked_add(last).map(GuestAddress);
        }
    }
    let kind: u32 = memory.read_obj(header.context("an empty chain")?)?;
    let supported = matches!(u32::from_le(kind), T_IN | T_OUT | T_FLUSH);
    memory.write_obj(if supported { S_OK } else { S_UNSUPP }, status.context("no room for a status")?)?;
    Ok(writable)
}

impl VhostUserBackendMut for Null {
    type Bitmap = ();
    type Vring = VringRwLock;

    fn num_queues(&self) -> usize {
        self.num_queues
    }

    fn max_queue_size(&self) -> usize {
        MAX_QUEUE_SIZE
    }

    fn features(&self) -> u64 {
        features::VERSION_1
            | features::INDIRECT_DESC
            | features::EVENT_IDX
            | F_MQ
            | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits()
    }

    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        VhostUserProtocolFeatures::MQ | VhostUserProtocolFeatures::CONFIG
    }

    fn set_event_idx(&mut self, enabled: bool) {
        self.event_idx = enabled;
    }

    fn get_config(&self, offset: u32, size: u32) -> Vec<u8> {
        // Virtio 1.3, 5.2.4: capacity, and num_queues at 34.
        let mut config = [0; 60];
        config[..8].copy_from_slice(&SECTORS.to_le_bytes());
        config[34..36].copy_from_slice(&(self.num_queues as u16).to_le_bytes());
        let at = offset as usize;
        at.checked_add(size as usize)
            .and_then(|end| config.get(at..end))
            .map(<[u8]>::to_vec)
            .unwrap_or_default()
    }

    fn update_memory(&mut self, memory: Memory) -> Result<()> {
        self.memory = memory;
        Ok(())
    }

    fn exit_event(&self, _thread: usize) -> Option<(EventConsumer, EventNotifier)> {
        new_event_consumer_and_notifier(EventFlag::NONBLOCK | EventFlag::CLOEXEC).ok()
    }

    fn handle_event(
        &mut self,
        queue: u16,
        events: EventSet,
        vrings: &[VringRwLock],
        _thread: usize,
    ) -> Result<()> {
        if events != EventSet::IN {
            return Err(other("an unexpected event"));
        }
        let vring = vrings.get(usize::from(queue)).ok_or_else(|| other("an event of no queue"))?;
        drain(vring, self.event_idx, || self.process(vring))
    }
}

/// Has `process` take what is in a queue that was kicked.
pub fn drain(vring: &VringRwLock, event_idx: bool, mut process: impl FnMut() -> Result<bool>) -> Result<()> {
    if !event_idx {
        return process().map(drop);
    }
    // As the crate's documentation asks: until nothing came between the last look and allowing kicks again.
    loop {
        vring.disable_notification().map_err(other)?;
        process()?;
        if !vring.enable_notification().map_err(other)? {
            return Ok(());
        }
    }
}
