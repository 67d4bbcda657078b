//! The disk to replay on: connects, and learns from configuration space what it takes.

use std::path::Path;

use anyhow::{Context, Result, bail};
use poll_engine::device::features;
use poll_engine::memory::Ram;
use poll_engine::ring::driver::DriverRing;
use vhost::VhostBackend;
use vhost::vhost_user::message::{VhostUserConfigFlags, VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost_blk::device::{CONFIG_LEN, F_DISCARD, F_FLUSH, F_RO, F_SEG_MAX, F_SIZE_MAX, F_WRITE_ZEROES};
use vmm_sys_util::eventfd::EventFd;

use super::plan::Limits;
use crate::front_end;

/// Without limits of the device's, requests are cut into segments of this.
const SEGMENT: u32 = 1 << 20;
const SEGMENTS: u32 = 126;
const RAM: u64 = 512 << 20;

/// A connected disk.
pub struct Disk {
    front: Frontend,
    /// Memory shared with it.
    pub ram: Ram,
    /// What it takes.
    pub limits: Limits,
    /// Queues that it has.
    pub queues: u16,
    /// Whether indirect descriptors were agreed on.
    pub indirect: bool,
    features: u64,
}

/// A queue that runs.
pub struct Queue {
    /// The driver's side.
    pub ring: DriverRing,
    /// To tell the device of requests.
    pub kick: EventFd,
    /// The device's way to interrupt us, which nobody listens to.
    _call: EventFd,
}

impl Disk {
    /// Connects and negotiates.
    pub fn connect(socket: &Path, most_queues: u16) -> Result<Disk> {
        let path = socket.display();
        let mut front = Frontend::connect(socket, most_queues.into())
            .with_context(|| format!("cannot connect to {path}; is the back end running?"))?;
        let refused = || format!("{path} refused the session");
        front.set_owner().with_context(refused)?;
        let offered = front.get_features().with_context(refused)?;
        let needed = features::VERSION_1 | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
        if needed & !offered != 0 {
            bail!("{path} does not offer feature bits {:#x}", needed & !offered);
        }
        let block = F_SIZE_MAX | F_SEG_MAX | F_RO | F_FLUSH | F_DISCARD | F_WRITE_ZEROES;
        let agreed = offered & (needed | block | features::INDIRECT_DESC | features::EVENT_IDX);
        front.set_features(agreed).with_context(refused)?;
        let protocol = front.get_protocol_features().with_context(refused)?;
        let protocol = protocol & (VhostUserProtocolFeatures::MQ | VhostUserProtocolFeatures::CONFIG);
        front.set_protocol_features(protocol).with_context(refused)?;
        let queues =
            if protocol.contains(VhostUserProtocolFeatures::MQ) { front.get_queue_num()? } else { 1 };
        let (_, config) = front
            .get_config(0, CONFIG_LEN as u32, VhostUserConfigFlags::empty(), &[0; CONFIG_LEN])
            .with_context(refused)?;
        if config.len() < CONFIG_LEN {
            bail!("{path} has a configuration space of {} bytes, not of a block device", config.len());
        }
        let ram = Ram::new(0, RAM, false)?;
        front_end::share(&front, &ram).with_context(refused)?;
        Ok(Disk {
            front,
            ram,
            limits: limits(&config, agreed),
            queues: u16::try_from(queues).unwrap_or(u16::MAX),
            indirect: agreed & features::INDIRECT_DESC != 0,
            features: agreed,
        })
    }

    /// Starts queue `index` with this many descriptors.
    pub fn start_queue(&mut self, index: usize, size: u16) -> Result<Queue> {
        let config = DriverRing::lay_out(&mut self.ram, size, self.features)
            .context("guest memory is used up; lower --iodepth or --queues")?;
        let events = front_end::events()?;
        front_end::set_up(&mut self.front, index, &config, &events)
            .with_context(|| format!("the disk refused queue {index} with {size} descriptors"))?;
        let ring = DriverRing::new(&config, self.ram.map())?;
        let (kick, call) = events;
        Ok(Queue { ring, kick, _call: call })
    }
}

fn limits(config: &[u8], agreed: u64) -> Limits {
    let u32_at = |at: usize| u32::from_le_bytes(std::array::from_fn(|i| config[at + i]));
    let sectors = u64::from_le_bytes(std::array::from_fn(|i| config[i]));
    let has = |bit: u64| agreed & bit != 0;
    let most = |bit: u64, at: usize, default: u32| match u32_at(at) {
        n if has(bit) && n > 0 => n.min(default),
        _ => default,
    };
    // Segments of ours are whole sectors.
    let segment = most(F_SIZE_MAX, 8, SEGMENT) & !511;
    Limits {
        size: sectors.saturating_mul(512),
        segment: segment.max(512),
        segments: most(F_SEG_MAX, 12, SEGMENTS),
        read_only: has(F_RO),
        flush: has(F_FLUSH),
        discard: if has(F_DISCARD) { (u32_at(36), u32_at(40)) } else { (0, 0) },
        write_zeroes: if has(F_WRITE_ZEROES) { (u32_at(48), u32_at(52)) } else { (0, 0) },
    }
}
