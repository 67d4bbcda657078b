//! The front-end half of a device: the vhost-user session with its back end, and the eventfds that its queues are
//! wired to KVM with.

use std::fs::File;
use std::net::Shutdown;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use poll_engine::device::features::ACCESS_PLATFORM;
use vhost::vhost_user::message::{
    VhostUserConfigFlags, VhostUserHeaderFlag, VhostUserInflight, VhostUserProtocolFeatures as Protocol,
    VhostUserVirtioFeatures,
};
use vhost::vhost_user::{
    Frontend, FrontendReqHandler, HandlerResult, VhostUserFrontend, VhostUserFrontendReqHandler,
};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::wait;

/// How long a back end may take to listen (again).
const CONNECT_LIMIT: Duration = Duration::from_secs(60);
/// How long it may take to answer what belongs together.
const ANSWER_LIMIT: Duration = Duration::from_secs(if cfg!(test) { 1 } else { 15 });

/// Virtio device types.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A network card.
    Net,
    /// A disk.
    Block,
}

impl Kind {
    /// The number of the type (virtio 1.3, 5).
    pub fn id(self) -> u32 {
        match self {
            Self::Net => 1,
            Self::Block => 2,
        }
    }
}

/// Bytes of `struct virtio_net_config` up to the status.
const NET_CONFIG: u32 = 8;
/// Bytes of `struct virtio_blk_config` up to the write-zeroes fields.
const BLOCK_CONFIG: u32 = 60;
/// `VIRTIO_NET_F_MAC`: the front end has the address.
const NET_F_MAC: u64 = 1 << 5;
/// `VIRTIO_NET_F_CTRL_VQ`, and all that needs it (virtio 1.3, 5.1.3.1): there is no control queue here.
const NET_F_CONTROLLED: u64 = 0x7f << 17 | 1 << 2 | 1 << 57 | 1 << 60;

/// A queue as the driver has set it up. Addresses are the guest's.
#[derive(Debug, Clone, Copy, Default)]
pub struct QueueSetup {
    /// Descriptors.
    pub size: u16,
    /// Descriptor table.
    pub desc: u64,
    /// Available ring.
    pub driver: u64,
    /// Used ring.
    pub device: u64,
}

/// The eventfds of one queue.
#[derive(Debug)]
pub struct Wires {
    /// The guest's notifications.
    pub kick: EventFd,
    /// The back end's.
    pub call: EventFd,
}

/// A session, and what is needed to make another one.
pub struct Backend {
    kind: Kind,
    socket: PathBuf,
    wires: Vec<Wires>,
    front: Frontend,
    stream: UnixStream,
    /// What the back end itself offers.
    offered: u64,
    features: u64,
    config: Vec<u8>,
    channel: Channel,
    config_changed: Arc<dyn Fn() + Send + Sync>,
    /// Whether the back end records what is in flight, and the record, kept from one back end to the next.
    records: bool,
    record: Option<(VhostUserInflight, File)>,
}

impl std::fmt::Debug for Backend {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Backend")
            .field("kind", &self.kind)
            .field("socket", &self.socket)
            .finish_non_exhaustive()
    }
}

impl Backend {
    /// Connects to the back end at `socket` for at most `queues` queues. `config_changed` is called, from another
    /// thread, when the back end says so.
    pub fn connect(
        kind: Kind,
        socket: &Path,
        queues: usize,
        memory: &[VhostUserMemoryRegionInfo],
        config_changed: Arc<dyn Fn() + Send + Sync>,
    ) -> Result<Backend> {
        let opened = open(kind, socket, queues, memory, &config_changed)
            .with_context(|| format!("vhost-user session at {}", socket.display()))?;
        let wire = || EventFd::new(EFD_NONBLOCK);
        let wires = (0..opened.queues).map(|_| Ok(Wires { kick: wire()?, call: wire()? }));
        Ok(Backend {
            kind,
            socket: socket.to_owned(),
            wires: wires.collect::<Result<_>>()?,
            front: opened.front,
            stream: opened.stream,
            offered: opened.offered,
            features: opened.features,
            config: opened.config,
            channel: opened.channel,
            config_changed,
            records: opened.records,
            record: None,
        })
    }

    /// What kind of device it is.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// The features a driver may choose from.
    pub fn features(&self) -> u64 {
        self.features
    }

    /// The configuration space as last read.
    pub fn config(&self) -> &[u8] {
        &self.config
    }

    /// Reads the configuration space again.
    pub fn read_config(&mut self) -> Result<()> {
        if self.kind == Kind::Block {
            self.config = within(&self.stream, || read_config(&mut self.front, BLOCK_CONFIG))?;
        }
        Ok(())
    }

    /// Writes to the configuration space.
    pub fn write_config(&mut self, offset: u32, bytes: &[u8]) -> Result<()> {
        within(&self.stream, || self.front.set_config(offset, VhostUserConfigFlags::WRITABLE, bytes))?;
        self.read_config()
    }

    /// The queues' eventfds.
    pub fn wires(&self) -> &[Wires] {
        &self.wires
    }

    /// Whether the back end serves again what an earlier one had begun.
    pub fn records(&self) -> bool {
        self.records
    }

    /// The driver has reset the device: what was in flight is nobody's.
    pub fn forget(&mut self) {
        self.record = None;
    }

    /// Has the back end record what is in flight in queues of at most `ring_size` descriptors, where it did before.
    fn record(&mut self, ring_size: u16) -> vhost::Result<()> {
        if !self.records {
            return Ok(());
        }
        let num_queues = self.wires.len() as u16;
        let wanted = VhostUserInflight { num_queues, queue_size: ring_size, ..Default::default() };
        let (spec, file) = match &self.record {
            Some(record) => record,
            None => self.record.insert(self.front.get_inflight_fd(&wanted)?),
        };
        self.front.set_inflight_fd(spec, file.as_raw_fd())
    }

    /// Agrees on features, and on the record for queues of at most `ring_size` descriptors, before the first starts.
    pub fn begin(&mut self, features: u64, ring_size: u16) -> Result<()> {
        let stream = self.stream.try_clone()?;
        within(&stream, || {
            self.front
                .set_features(features & self.offered | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits())?;
            Ok(self.record(ring_size)?)
        })
    }

    /// Starts queues: `(index, setup, host address of a guest address, first available index)`.
    pub fn start(
        &mut self,
        queues: &[(usize, QueueSetup, u16)],
        host: impl Fn(u64) -> Result<u64>,
    ) -> Result<()> {
        let stream = self.stream.try_clone()?;
        within(&stream, || {
            for &(index, setup, base) in queues {
                self.front.set_vring_num(index, setup.size)?;
                self.front.set_vring_base(index, base)?;
                let addresses = VringConfigData {
                    queue_max_size: setup.size,
                    queue_size: setup.size,
                    flags: 0,
                    desc_table_addr: host(setup.desc)?,
                    used_ring_addr: host(setup.device)?,
                    avail_ring_addr: host(setup.driver)?,
                    log_addr: None,
                };
                self.front.set_vring_addr(index, &addresses)?;
                self.front.set_vring_call(index, &self.wires[index].call)?;
                self.front.set_vring_kick(index, &self.wires[index].kick)?;
                self.front.set_vring_enable(index, true)?;
            }
            Ok(())
        })
    }

    /// Stops a queue; where it stands.
    pub fn stop(&mut self, index: usize) -> Result<u32> {
        Ok(within(&self.stream, || self.front.get_vring_base(index))?)
    }

    /// Shares another region.
    pub fn add_memory(&mut self, region: &VhostUserMemoryRegionInfo) -> Result<()> {
        within(&self.stream, || self.front.add_mem_region(region)).map(|_| ()).context("ADD_MEM_REG")
    }

    /// Has the back end let go of a region.
    pub fn remove_memory(&mut self, region: &VhostUserMemoryRegionInfo) -> Result<()> {
        within(&self.stream, || self.front.remove_mem_region(region)).context("REM_MEM_REG")
    }

    /// Begins another session, when the back end has been started again.
    pub fn reconnect(&mut self, memory: &[VhostUserMemoryRegionInfo]) -> Result<()> {
        let opened = open(self.kind, &self.socket, self.wires.len(), memory, &self.config_changed)?;
        ensure!(opened.queues == self.wires.len(), "the back end has fewer queues than before");
        self.front = opened.front;
        self.stream = opened.stream;
        self.config = opened.config;
        self.channel = opened.channel;
        self.records = opened.records;
        Ok(())
    }
}

/// Does something with a session. The `vhost` crate waits for answers for ever, so a back end that does not give one
/// loses its connection.
fn within<T>(stream: &UnixStream, what: impl FnOnce() -> T) -> T {
    let (done, ends) = channel::<()>();
    std::thread::scope(|scope| {
        scope.spawn(move || {
            if ends.recv_timeout(ANSWER_LIMIT) == Err(RecvTimeoutError::Timeout) {
                let _ = stream.shutdown(Shutdown::Both);
            }
        });
        let result = what();
        drop(done);
        result
    })
}

struct Opened {
    front: Frontend,
    stream: UnixStream,
    offered: u64,
    features: u64,
    queues: usize,
    config: Vec<u8>,
    channel: Channel,
    records: bool,
}

fn open(
    kind: Kind,
    socket: &Path,
    queues: usize,
    memory: &[VhostUserMemoryRegionInfo],
    config_changed: &Arc<dyn Fn() + Send + Sync>,
) -> Result<Opened> {
    let stream =
        wait::until("a back end that listens", CONNECT_LIMIT, || Ok(UnixStream::connect(socket).ok()))?;
    within(&stream.try_clone()?, || negotiate(kind, stream, queues, memory, config_changed))
}

fn negotiate(
    kind: Kind,
    stream: UnixStream,
    queues: usize,
    memory: &[VhostUserMemoryRegionInfo],
    config_changed: &Arc<dyn Fn() + Send + Sync>,
) -> Result<Opened> {
    let mut front = Frontend::from_stream(stream.try_clone()?, queues as u64);
    front.set_owner()?;
    let offered = front.get_features()?;
    let theirs = front.get_protocol_features()?;
    let wanted = Protocol::MQ
        | Protocol::REPLY_ACK
        | Protocol::CONFIG
        | Protocol::CONFIGURE_MEM_SLOTS
        | Protocol::INFLIGHT_SHMFD
        | Protocol::BACKEND_REQ;
    let protocol = theirs & wanted;
    front.set_protocol_features(protocol)?;
    if protocol.contains(Protocol::REPLY_ACK) {
        front.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
    }
    let queues =
        if protocol.contains(Protocol::MQ) { queues.min(front.get_queue_num()? as usize) } else { 1 };
    let channel = Channel::open(&mut front, protocol, config_changed)?;
    if protocol.contains(Protocol::CONFIGURE_MEM_SLOTS) {
        for region in memory {
            front.add_mem_region(region)?;
        }
    } else {
        front.set_mem_table(memory)?;
    }
    // What is between the two of us, and not for the driver.
    let mut features = offered
        & !(VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits()
            | VhostUserVirtioFeatures::LOG_ALL.bits()
            // There is no IOMMU to translate for the back end.
            | ACCESS_PLATFORM);
    let config = match kind {
        Kind::Block => read_config(&mut front, BLOCK_CONFIG)?,
        Kind::Net => {
            let has_own = features & NET_F_MAC != 0 && protocol.contains(Protocol::CONFIG);
            features = features & !NET_F_CONTROLLED | NET_F_MAC;
            // Its own address, or one that is locally administered.
            if has_own { read_config(&mut front, NET_CONFIG)? } else { vec![0x02, 0x4b, 0x4b, 0, 0, 1, 1, 0] }
        }
    };
    let records = protocol.contains(Protocol::INFLIGHT_SHMFD);
    Ok(Opened { front, stream, offered, features, queues, config, channel, records })
}

fn read_config(front: &mut Frontend, len: u32) -> Result<Vec<u8>> {
    let room = vec![0; len as usize];
    let (_, config) = front.get_config(0, len, VhostUserConfigFlags::empty(), &room)?;
    ensure!(config.len() == room.len(), "GET_CONFIG: {} bytes", config.len());
    Ok(config)
}

/// The back end's channel to us, and the thread that listens to it.
struct Channel {
    stop: Arc<AtomicBool>,
    wake: EventFd,
    thread: Option<JoinHandle<()>>,
}

struct OnConfigChange(Arc<dyn Fn() + Send + Sync>);

impl VhostUserFrontendReqHandler for OnConfigChange {
    fn handle_config_change(&self) -> HandlerResult<u64> {
        (self.0)();
        Ok(0)
    }
}

impl Channel {
    fn open(
        front: &mut Frontend,
        protocol: Protocol,
        config_changed: &Arc<dyn Fn() + Send + Sync>,
    ) -> Result<Channel> {
        let stop = Arc::new(AtomicBool::new(false));
        let wake = EventFd::new(EFD_NONBLOCK)?;
        let mut thread = None;
        if protocol.contains(Protocol::BACKEND_REQ) {
            let mut handler = FrontendReqHandler::new(Arc::new(OnConfigChange(Arc::clone(config_changed))))?;
            if protocol.contains(Protocol::REPLY_ACK) {
                handler.set_reply_ack_flag(true);
            }
            front.set_backend_request_fd(&RawFd(handler.get_tx_raw_fd()))?;
            let (stop, wake) = (Arc::clone(&stop), wake.try_clone()?);
            thread = Some(std::thread::spawn(move || {
                while !stop.load(Ordering::Acquire) && readable(&handler, &wake) {
                    if handler.handle_request().is_err() {
                        break;
                    }
                }
            }));
        }
        Ok(Channel { stop, wake, thread })
    }
}

/// For an interface that asks for something with a descriptor.
struct RawFd(i32);

impl AsRawFd for RawFd {
    fn as_raw_fd(&self) -> i32 {
        self.0
    }
}

/// Waits for a message, or for the end: then false.
fn readable(handler: &impl AsRawFd, wake: &EventFd) -> bool {
    let mut fds =
        [handler.as_raw_fd(), wake.as_raw_fd()].map(|fd| PollFd::new(borrow(fd), PollFlags::POLLIN));
    while poll(&mut fds, PollTimeout::NONE) == Err(nix::Error::EINTR) {}
    fds[1].any() != Some(true)
}

#[allow(unsafe_code)]
fn borrow(fd: i32) -> BorrowedFd<'static> {
    // SAFETY: only used by `readable`, whose caller keeps both descriptors open.
    unsafe { BorrowedFd::borrow_raw(fd) }
}

impl Drop for Channel {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        let _ = self.wake.write(1);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::{Arc, Backend, Kind};

    #[test]
    fn a_back_end_that_does_not_answer_is_given_up() -> anyhow::Result<()> {
        let dir = tempfile::tempdir()?;
        let socket = dir.path().join("s");
        let _listener = UnixListener::bind(&socket)?;
        assert!(Backend::connect(Kind::Block, &socket, 1, &[], Arc::new(|| {})).is_err());
        Ok(())
    }
}
