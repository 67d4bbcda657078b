//! The front end: connects by the `vhost` crate's half of the protocol, lays rings out, runs jobs.

use std::os::fd::AsRawFd;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result, bail};
use poll_engine::device::features;
use poll_engine::memory::Ram;
use poll_engine::ring::RingConfig;
use poll_engine::ring::driver::DriverRing;
use vhost::vhost_user::message::{VhostUserConfigFlags, VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::Load;
use crate::job::{Job, JobResult};

const RAM: u64 = 256 << 20;

/// The results of all jobs. `mark` is called when measuring begins and when it ends.
pub fn run(socket: &Path, run: &Load, mut mark: impl FnMut()) -> Result<Vec<JobResult>> {
    let jobs = run.numjobs;
    let path = socket.display();
    let mut front = Frontend::connect(socket, jobs.into())
        .with_context(|| format!("cannot connect to {path}; is the back end running?"))?;
    let refused = || format!("{path} refused the session");
    front.set_owner().with_context(refused)?;
    let offered = front.get_features().with_context(refused)?;
    let protocol_bit = VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
    let mut wanted = features::VERSION_1 | protocol_bit;
    wanted |= if run.indirect { features::INDIRECT_DESC } else { 0 };
    wanted |= if run.no_event_idx { 0 } else { offered & features::EVENT_IDX };
    if wanted & !offered != 0 {
        bail!("{path} does not offer feature bits {:#x}", wanted & !offered);
    }
    front.set_features(wanted).with_context(refused)?;
    let protocol = front.get_protocol_features().with_context(refused)?;
    let use_protocol = protocol & (VhostUserProtocolFeatures::MQ | VhostUserProtocolFeatures::CONFIG);
    front.set_protocol_features(use_protocol).with_context(refused)?;
    let queues =
        if use_protocol.contains(VhostUserProtocolFeatures::MQ) { front.get_queue_num()? } else { 1 };
    if queues < jobs.into() {
        bail!("{path} has {queues} queues, fewer than --numjobs {jobs}");
    }
    let (_, config) = front.get_config(0, 8, VhostUserConfigFlags::empty(), &[0; 8]).with_context(refused)?;
    let sectors =
        u64::from_le_bytes(config.try_into().ok().context("a configuration space of another size")?);

    let mut ram = Ram::new(0, RAM, false)?;
    let spec = ram.spec();
    front
        .set_mem_table(&[VhostUserMemoryRegionInfo {
            guest_phys_addr: spec.guest_addr,
            memory_size: spec.size,
            userspace_addr: spec.user_addr,
            mmap_offset: 0,
            mmap_handle: ram.fd().as_raw_fd(),
        }])
        .with_context(refused)?;

    let size = run.ring_size();
    let mut ready = Vec::new();
    for index in 0..usize::from(jobs) {
        let full = "guest memory is used up; lower --iodepth, --bs or --numjobs";
        let config = DriverRing::lay_out(&mut ram, size, wanted & features::EVENT_IDX != 0, run.indirect)
            .context(full)?;
        let kick = EventFd::new(EFD_NONBLOCK)?;
        let call = EventFd::new(EFD_NONBLOCK)?;
        set_up(&front, index, &config, &kick, &call).with_context(refused)?;
        front.set_vring_enable(index, true).with_context(refused)?;
        let job = Job::new(run, index as u64, &mut ram, &config, sectors, kick).context(full)?;
        ready.push((job, call));
    }
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let threads: Vec<_> = ready
            .into_iter()
            .map(|(job, call)| {
                let stop = &stop;
                scope.spawn(move || {
                    let _call = call;
                    job.run(run, stop)
                })
            })
            .collect();
        std::thread::sleep(run.ramp_time);
        mark();
        std::thread::sleep(run.runtime);
        mark();
        stop.store(true, Ordering::Relaxed);
        threads.into_iter().map(|t| t.join().map_err(|_| anyhow::anyhow!("a job panicked"))?).collect()
    })
}

fn set_up(
    front: &Frontend,
    index: usize,
    config: &RingConfig,
    kick: &EventFd,
    call: &EventFd,
) -> vhost::Result<()> {
    front.set_vring_num(index, config.size as u16)?;
    front.set_vring_base(index, config.base)?;
    front.set_vring_addr(
        index,
        &VringConfigData {
            queue_max_size: config.size as u16,
            queue_size: config.size as u16,
            flags: 0,
            desc_table_addr: config.desc_addr,
            used_ring_addr: config.used_addr,
            avail_ring_addr: config.avail_addr,
            log_addr: None,
        },
    )?;
    front.set_vring_call(index, call)?;
    front.set_vring_kick(index, kick)
}
