//! The front end: negotiates with a back end, and lays rings out.

use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::{Sender, channel};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, SockFlag, SockType, UnixAddr, connect, setsockopt, socket, sockopt::SendTimeout,
};
use nix::sys::time::{TimeVal, TimeValLike};
use poll_engine::device::features;
use poll_engine::memory::Ram;
use poll_engine::ring::RingConfig;
use poll_engine::ring::driver::DriverRing;
use vhost::vhost_user::message::VhostUserProtocolFeatures;
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use vhost_blk::device::{F_FLUSH, F_RO};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::Load;
use crate::back_end::{BackEnd, Socket};
use crate::drive::drive;
use crate::job::{Job, JobResult};
use crate::node::{BLOCK, Node, is_node};
use crate::requests::Region;
use crate::spec::Spec;
use crate::verify::Ledger;

/// How long a back end may take for the start of a session.
pub const PATIENCE: Duration = Duration::from_secs(5);
const HUGE_PAGE: u64 = 2 << 20;

/// The results of all jobs. `mark` is called when measuring begins and when it ends.
pub fn run(socket: &Path, run: &Load, mark: impl FnMut()) -> Result<Vec<JobResult>> {
    let spec = Arc::new(Spec::of(run));
    let mut session = Session::open(socket, &[spec], &Ledger::default())?;
    let jobs = std::mem::take(&mut session.jobs);
    let results = drive(jobs, &[(session.fd(), 0..usize::from(run.numjobs))], mark)?;
    match results.iter().find_map(|r| r.failure.clone()) {
        Some(failure) => bail!("{}: {}", socket.display(), failure.message),
        None => Ok(results),
    }
}

/// A started session: its queues run for as long as it is kept.
pub struct Session {
    back_end: Box<dyn BackEnd>,
    /// One job for each queue, to be taken out and run.
    pub jobs: Vec<(Arc<Spec>, Job)>,
}

impl Session {
    /// Connects to a socket, or opens a vhost-vdpa node, and starts a queue for every job of every section.
    pub fn open(path: &Path, specs: &[Arc<Spec>], known: &Ledger) -> Result<Session> {
        if is_node(path) {
            return Session::negotiate(path, Box::new(Node::open(path, BLOCK)?), specs, known);
        }
        let deadline = Deadline::new(reach(path)?)?;
        let mut protocol = VhostUserProtocolFeatures::MQ | VhostUserProtocolFeatures::CONFIG;
        protocol.set(VhostUserProtocolFeatures::INFLIGHT_SHMFD, specs.iter().any(|s| s.inflight));
        let socket = Socket::new(deadline.stream.try_clone()?, jobs(specs), protocol)?;
        let outcome = Session::negotiate(path, Box::new(socket), specs, known);
        outcome.map_err(|e| {
            let late = "does not answer; does it serve another front end?";
            if deadline.passed() { anyhow!("{} {late}", path.display()) } else { e }
        })
    }

    fn negotiate(
        path: &Path,
        mut back_end: Box<dyn BackEnd>,
        specs: &[Arc<Spec>],
        known: &Ledger,
    ) -> Result<Session> {
        let any = |is: fn(&Spec) -> bool| specs.iter().any(|s| is(s));
        let (path, jobs) = (path.display(), jobs(specs));
        let refused = || format!("{path} refused the session");
        let offered = back_end.offered().with_context(refused)?;
        let packed = any(|s| s.packed);
        if packed && offered & features::RING_PACKED == 0 {
            bail!("{path} does not offer RING_PACKED; run without --packed");
        }
        if offered & F_RO != 0 && any(|s| s.rw.writes()) {
            bail!("{path} is a read-only disk");
        }
        let indirect = any(|s| s.indirect);
        let needs = back_end.needs();
        let mut wanted = features::VERSION_1 | needs.0;
        wanted |= if indirect { features::INDIRECT_DESC } else { 0 };
        wanted |= if packed { features::RING_PACKED } else { 0 };
        wanted |= if any(|s| s.in_order) { features::IN_ORDER } else { 0 };
        wanted |= if any(|s| s.no_event_idx) { 0 } else { offered & features::EVENT_IDX };
        // As any driver does; without it, the device has to make each write durable before it answers (5.2.5.1).
        let (sync, fsync) = (any(|s| s.sync), any(|s| s.fsync.is_some()));
        if sync && fsync {
            bail!("{path}: jobs at the same time have sync and fsync, which exclude each other in a session");
        }
        wanted |= if sync { 0 } else { offered & F_FLUSH };
        wanted |= if fsync { F_FLUSH } else { 0 };
        if wanted & !offered != 0 {
            bail!("{path} does not offer {}", names(wanted & !offered, needs));
        }
        back_end.accept(wanted).with_context(refused)?;
        let queues = back_end.num_queues().with_context(refused)?;
        if queues < jobs {
            bail!("{path} has {queues} queues, fewer than the {jobs} jobs that run at once (--numjobs)");
        }
        let config = back_end.config(8).with_context(|| format!("{path} does not tell its disk's size"))?;
        let sectors =
            u64::from_le_bytes(config.try_into().ok().context("a configuration space of another size")?);
        let regions = regions(specs, sectors.saturating_mul(512))?;

        let mut ram = memory(specs.iter().map(|s| s.memory()).sum(), any(|s| s.hugepages))?;
        back_end.share(&ram).with_context(refused)?;
        if any(|s| s.inflight) {
            let largest = specs.iter().map(|s| s.ring_size()).max().unwrap_or_default();
            back_end.record(jobs as u16, largest).with_context(refused)?;
        }
        let mut session = Session { back_end, jobs: Vec::new() };
        for (at, (spec, index, region)) in regions.into_iter().enumerate() {
            let full = "guest memory is used up; lower iodepth, bs or numjobs";
            let config = DriverRing::lay_out(&mut ram, spec.ring_size(), wanted).context(full)?;
            let events = events()?;
            // First, as a driver does: what it writes to its ring decides on which node the ring is, and the back end asks.
            let ours = (events.0.try_clone()?, events.1.try_clone()?);
            let job = Job::new(&spec, index, &mut ram, &config, (region, known), ours).context(full)?;
            session.back_end.set_up(at, &config, &events).with_context(|| {
                format!("{path} refused a ring of {} descriptors; lower --iodepth", config.size)
            })?;
            session.jobs.push((spec, job));
        }
        session.back_end.start().with_context(refused)?;
        Ok(session)
    }

    /// To see when the back end is gone.
    pub fn fd(&self) -> RawFd {
        self.back_end.fd()
    }
}

fn jobs(specs: &[Arc<Spec>]) -> u64 {
    specs.iter().map(|s| u64::from(s.numjobs)).sum()
}

/// Kick and call. Neither blocks, as with QEMU: a write to one that may has the kernel leave it to a thread of its own.
pub fn events() -> std::io::Result<(EventFd, EventFd)> {
    Ok((EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?, EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?))
}

/// A job's section, its number there, and its part of the disk.
pub type Placed = (Arc<Spec>, usize, Region);

/// All jobs with their parts of the disk.
pub fn regions(specs: &[Arc<Spec>], disk: u64) -> Result<Vec<Placed>> {
    let mut all: Vec<Placed> = Vec::new();
    for spec in specs {
        for index in 0..usize::from(spec.numjobs) {
            let region = Region::of(spec, index as u64, disk).map_err(|e| anyhow!(spec.named(&e)))?;
            let spoils = |(other, _, theirs): &Placed| {
                let verified = (spec.verify && other.rw.writes()) || (other.verify && spec.rw.writes());
                verified && theirs.overlaps(&region)
            };
            if all.iter().any(spoils) {
                let what = "another job would overwrite what is verified; give --size and --offset-increment";
                bail!(spec.named(what));
            }
            all.push((Arc::clone(spec), index, region));
        }
    }
    Ok(all)
}

/// Guest memory of at least `size` bytes.
pub fn memory(size: u64, huge: bool) -> Result<Ram> {
    let size = size.next_multiple_of(HUGE_PAGE);
    if huge {
        let free = |what: &str| {
            let path = format!("/sys/kernel/mm/hugepages/hugepages-2048kB/{what}");
            std::fs::read_to_string(path).ok().and_then(|n| n.trim().parse::<u64>().ok()).unwrap_or(0)
        };
        let (needed, there) =
            (size / HUGE_PAGE, free("free_hugepages").saturating_sub(free("resv_hugepages")));
        // Memory that is not there would end this process, and the back end, when it is touched.
        if there < needed {
            bail!(
                "--hugepages needs {needed} pages of 2 MiB and {there} are free; as root: \
                 echo {} >/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages",
                free("nr_hugepages") + needed - there
            );
        }
    }
    Ok(Ram::new(0, size, huge)?)
}

/// Shares guest memory with the back end.
pub fn share(front: &Frontend, ram: &Ram) -> vhost::Result<()> {
    let spec = ram.spec();
    front.set_mem_table(&[VhostUserMemoryRegionInfo {
        guest_phys_addr: spec.guest_addr,
        memory_size: spec.size,
        userspace_addr: spec.user_addr,
        mmap_offset: 0,
        mmap_handle: ram.fd().as_raw_fd(),
    }])?;
    Ok(())
}

/// Connects, but does not wait for ever for a listener that does not accept.
pub fn reach(path: &Path) -> Result<UnixStream> {
    let connected = || -> nix::Result<UnixStream> {
        let fd = socket(AddressFamily::Unix, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
        setsockopt(&fd, SendTimeout, &TimeVal::seconds(PATIENCE.as_secs() as i64))?;
        connect(fd.as_raw_fd(), &UnixAddr::new(path)?)?;
        Ok(fd.into())
    };
    // A back end that has bound its socket and does not listen yet refuses.
    let mut outcome = connected();
    for _ in 0..5 {
        if outcome.as_ref().err() == Some(&Errno::ECONNREFUSED) {
            std::thread::sleep(Duration::from_millis(100));
            outcome = connected();
        }
    }
    outcome.with_context(|| format!("cannot connect to {}; is the back end running?", path.display()))
}

/// Closes the connection when a session takes too long to start: the `vhost` crate waits without a limit.
pub struct Deadline {
    stream: UnixStream,
    thread: Option<std::thread::JoinHandle<bool>>,
    met: Option<Sender<()>>,
}

impl Deadline {
    /// For a session over `stream`, from now on.
    pub fn new(stream: UnixStream) -> Result<Deadline> {
        let (met, over) = channel();
        let theirs = stream.try_clone()?;
        let thread = std::thread::spawn(move || {
            let late = over.recv_timeout(PATIENCE) == Err(std::sync::mpsc::RecvTimeoutError::Timeout);
            late && theirs.shutdown(std::net::Shutdown::Both).is_ok()
        });
        Ok(Deadline { stream, thread: Some(thread), met: Some(met) })
    }

    /// Ends it, and says whether it had passed.
    pub fn passed(mut self) -> bool {
        self.met = None;
        self.thread.take().is_some_and(|t| t.join().unwrap_or(false))
    }
}

/// Names of feature bits.
fn names(bits: u64, needs: (u64, &'static str)) -> String {
    let known = [
        (features::VERSION_1, "VIRTIO_F_VERSION_1"),
        (features::INDIRECT_DESC, "VIRTIO_F_INDIRECT_DESC (--indirect)"),
        (features::IN_ORDER, "VIRTIO_F_IN_ORDER (--in-order)"),
        (F_FLUSH, "VIRTIO_BLK_F_FLUSH (--fsync)"),
        needs,
    ];
    let names: Vec<_> = known.iter().filter(|(bit, _)| bits & bit != 0).map(|(_, name)| *name).collect();
    names.join(" and ")
}

/// Sets a queue up with its kick and call, and starts it.
pub fn set_up(
    front: &mut Frontend,
    index: usize,
    config: &RingConfig,
    (kick, call): &(EventFd, EventFd),
) -> vhost::Result<()> {
    front.set_vring_num(index, config.size as u16)?;
    front.set_vring_base(index, config.base as u16)?;
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
    front.set_vring_kick(index, kick)?;
    front.set_vring_enable(index, true)?;
    // Answered after all of these: what is refused without an answer shows here.
    front.get_features().map(|_| ())
}
