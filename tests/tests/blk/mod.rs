//! A front end of our own on the real daemon: rings that can be written raw, and block requests cut up anyhow.
#![allow(dead_code)] // each test program uses its part

use std::os::fd::AsRawFd;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use kickless_tests::daemon::Kind;
use kickless_tests::process::Process;
use kickless_tests::scene::Scene;
use kickless_tests::wait;
use nix::sys::signal::Signal;
use nix::sys::socket::{MsgFlags, recv, send};
use poll_engine::device::features;
use poll_engine::memory::{MemoryMap, Ram};
use poll_engine::ring::driver::{Buffer, DriverRing};
use poll_engine::session::wire::F_LOG_ALL;
use vhost::vhost_user::message::{
    VhostUserConfigFlags, VhostUserHeaderFlag, VhostUserProtocolFeatures, VhostUserVirtioFeatures,
};
use vhost::vhost_user::{Frontend, FrontendReqHandler, VhostUserFrontend, VhostUserFrontendReqHandler};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

pub const LIMIT: Duration = Duration::from_secs(60);
pub const RING: u16 = 64;

pub const READ: u32 = 0;
pub const WRITE: u32 = 1;
pub const FLUSH: u32 = 4;
pub const GET_ID: u32 = 8;
pub const DISCARD: u32 = 11;
pub const WRITE_ZEROES: u32 = 13;

/// `VIRTIO_BLK_F_CONFIG_WCE`.
const CONFIG_WCE: u64 = 1 << 11;

pub const OK: u8 = 0;
pub const IOERR: u8 = 1;
pub const UNSUPP: u8 = 2;

/// The daemon's program. The tests of this file are about nothing else, so without it they fail.
pub fn program() -> PathBuf {
    Kind::VhostBlk.program().expect("vhost-blk is not built: cargo build -p vhost-blk")
}

/// A running daemon.
pub struct Served {
    pub process: Process,
    pub socket: PathBuf,
}

impl Served {
    pub fn start(scene: &Scene, args: &[&str]) -> Served {
        let socket = scene.path("disk.sock");
        let mut all = vec![format!("--socket-path={}", socket.display())];
        all.extend(args.iter().map(|&a| a.to_owned()));
        let mut process = Process::spawn(scene, "vhost-blk", &program(), &all).unwrap();
        wait::until("the daemon's socket", LIMIT, || {
            assert!(process.poll_exit()?.is_none(), "{}", process.stderr());
            Ok(std::fs::metadata(&socket).is_ok_and(|m| m.file_type().is_socket()).then_some(()))
        })
        .unwrap();
        Served { process, socket }
    }

    /// The report that `SIGUSR1` brings.
    pub fn stats(&self) -> String {
        let before = self.process.stdout().len();
        self.process.signal(Signal::SIGUSR1).unwrap();
        let new =
            || Ok(self.process.stdout()[before..].split_once("\n\n").map(|(report, _)| report.to_owned()));
        wait::until("statistics", LIMIT, new).unwrap()
    }

    /// How many errors of a kind have been counted.
    pub fn errors(&self, kind: &str) -> u64 {
        let stats = self.stats();
        let line = stats.lines().find_map(|l| l.strip_prefix(&format!("errors {kind} ")));
        line.map_or(0, |n| n.parse().unwrap())
    }

    pub fn terminate(mut self) {
        self.process.signal(Signal::SIGTERM).unwrap();
        let status = self.process.wait_exit(LIMIT).unwrap();
        let said = self.process.stderr();
        assert!(status.success() && !said.contains("panicked"), "{status}\n{said}");
        assert!(!self.socket.exists(), "the socket is still there");
    }
}

/// What is negotiated of the protocol.
const PROTOCOL: VhostUserProtocolFeatures = VhostUserProtocolFeatures::MQ
    .union(VhostUserProtocolFeatures::REPLY_ACK)
    .union(VhostUserProtocolFeatures::LOG_SHMFD);

/// A session with its queues.
pub struct Front {
    pub session: Frontend,
    /// The features that were negotiated.
    pub features: u64,
    pub ram: Ram,
    pub queues: Vec<Lane>,
}

/// Where in its area a request has its status.
const STATUS: u64 = 1024;

/// One queue, and memory for one request.
pub struct Lane {
    pub driver: DriverRing,
    pub map: Arc<MemoryMap>,
    pub kick: EventFd,
    pub call: EventFd,
    pub err: EventFd,
    /// Where the ring is, as the session was told.
    pub addresses: VringConfigData,
    /// 64 KiB for header, data and status.
    pub area: u64,
    /// 1 MiB for indirect tables and further data.
    pub more: u64,
}

pub const RAM_START: u64 = 0x1000_0000;
pub const RAM_SIZE: u64 = 8 << 20;

impl Front {
    pub fn connect(socket: &Path, queues: usize) -> Front {
        Front::with(socket, queues, 0)
    }

    /// With packed rings.
    pub fn packed(socket: &Path, queues: usize) -> Front {
        Front::with(socket, queues, features::RING_PACKED)
    }

    /// With split rings, or (`features::RING_PACKED`) packed ones.
    pub fn with(socket: &Path, queues: usize, format: u64) -> Front {
        let ram = Ram::new(RAM_START, RAM_SIZE, false).unwrap();
        let mut front = Front::negotiate(socket, queues, format, ram);
        let lanes = (0..queues).map(|i| Lane::start(&mut front, i));
        front.queues = lanes.collect();
        front
    }

    /// With a driver that takes the write cache as it is: it flushes.
    pub fn flushing(socket: &Path, queues: usize) -> Front {
        let ram = Ram::new(RAM_START, RAM_SIZE, false).unwrap();
        let mut front = Front::negotiate(socket, queues, 0, ram);
        front.features &= !CONFIG_WCE;
        front.session.set_features(front.features).unwrap();
        let lanes = (0..queues).map(|i| Lane::start(&mut front, i));
        front.queues = lanes.collect();
        front
    }

    /// A guest that has run elsewhere: its memory, and its queues with where they go on.
    pub fn arriving(socket: &Path, format: u64, ram: Ram, lanes: Vec<(Lane, u32)>) -> Front {
        let mut front = Front::negotiate(socket, lanes.len(), format, ram);
        for (index, (lane, base)) in lanes.iter().enumerate() {
            lane.set_up(&front, index, *base);
        }
        front.queues = lanes.into_iter().map(|(lane, _)| lane).collect();
        front
    }

    /// All but the queues.
    fn negotiate(socket: &Path, queues: usize, format: u64, ram: Ram) -> Front {
        // A daemon's sockets are made one after the other.
        let made = || Ok(socket.exists().then_some(()));
        wait::until("the socket", LIMIT, made).unwrap();
        let mut front = Frontend::connect(socket, queues as u64).unwrap();
        front.set_owner().unwrap();
        let protocol_bit = VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
        let ring = features::VERSION_1 | features::INDIRECT_DESC | features::EVENT_IDX;
        // The disk's own bits that exist; RO and those that go with writing are taken as they are offered.
        let offered = front.get_features().unwrap();
        assert_eq!(offered & (ring | format), ring | format);
        let not =
            features::ACCESS_PLATFORM | F_LOG_ALL | features::IN_ORDER | features::RING_PACKED & !format;
        let wanted = offered & !not | protocol_bit;
        front.set_features(wanted).unwrap();
        assert!(front.get_protocol_features().unwrap().contains(PROTOCOL));
        front.set_protocol_features(PROTOCOL).unwrap();
        front.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        let spec = ram.spec();
        let info = VhostUserMemoryRegionInfo {
            guest_phys_addr: spec.guest_addr,
            memory_size: spec.size,
            userspace_addr: spec.user_addr,
            mmap_offset: 0,
            mmap_handle: ram.fd().as_raw_fd(),
        };
        front.set_mem_table(&[info]).unwrap();
        Front { session: front, features: wanted, ram, queues: Vec::new() }
    }

    pub fn base(&self, index: usize) -> u32 {
        self.session.get_vring_base(index).unwrap()
    }

    /// Negotiates more of the protocol, with a channel for the back end's own requests.
    pub fn talk<H: VhostUserFrontendReqHandler>(
        &mut self,
        more: VhostUserProtocolFeatures,
        handler: &FrontendReqHandler<H>,
    ) {
        self.session.set_protocol_features(PROTOCOL | more).unwrap();
        self.session.set_backend_request_fd(&handler.get_tx_raw_fd()).unwrap();
    }

    /// Sectors of the disk, where the protocol has a configuration space.
    pub fn capacity(&mut self) -> u64 {
        let flags = VhostUserConfigFlags::empty();
        let (_, bytes) = self.session.get_config(0, 8, flags, &[0; 8]).unwrap();
        u64::from_le_bytes(bytes.try_into().unwrap())
    }

    fn enable(&self, index: usize) {
        let mut session = self.session.clone();
        session.set_vring_enable(index, true).unwrap();
    }

    /// Both halves of a base: the crate has a message for the lower one, which is all that a split ring has.
    pub fn set_base(&self, index: usize, base: u32) {
        let words = |words: &[u32]| words.iter().flat_map(|w| w.to_ne_bytes()).collect::<Vec<_>>();
        // A version 1 request that wants an acknowledgement.
        let message = words(&[10, 1 | 8, 8, index as u32, base]);
        let fd = self.session.as_raw_fd();
        assert_eq!(send(fd, &message, MsgFlags::MSG_NOSIGNAL), Ok(message.len()));
        let mut reply = [0xff; 20];
        assert_eq!(recv(fd, &mut reply, MsgFlags::MSG_WAITALL), Ok(reply.len()));
        assert_eq!(reply[..], words(&[10, 1 | 4, 8, 0, 0]), "base {base:#x} was not taken");
    }
}

impl Lane {
    fn start(front: &mut Front, index: usize) -> Lane {
        let config = DriverRing::lay_out(&mut front.ram, RING, front.features).unwrap();
        let event = || EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).unwrap();
        let addresses = VringConfigData {
            queue_max_size: RING,
            queue_size: RING,
            flags: 0,
            desc_table_addr: config.desc_addr,
            used_ring_addr: config.used_addr,
            avail_ring_addr: config.avail_addr,
            log_addr: None,
        };
        let driver = DriverRing::new(&config, front.ram.map()).unwrap();
        let area = front.ram.alloc(64 << 10, 4096).unwrap();
        let more = front.ram.alloc(1 << 20, 4096).unwrap();
        let map = Arc::clone(front.ram.map());
        let lane = Lane { driver, map, kick: event(), call: event(), err: event(), addresses, area, more };
        lane.set_up(front, index, config.base);
        lane
    }

    fn set_up(&self, front: &Front, index: usize, base: u32) {
        let session = &front.session;
        session.set_vring_num(index, RING).unwrap();
        front.set_base(index, base);
        session.set_vring_addr(index, &self.addresses).unwrap();
        session.set_vring_call(index, &self.call).unwrap();
        session.set_vring_err(index, &self.err).unwrap();
        session.set_vring_kick(index, &self.kick).unwrap();
        front.enable(index);
    }

    pub fn put(&self, at: u64, bytes: &[u8]) {
        assert_eq!(self.map.slice(at, bytes.len() as u32).unwrap().write(bytes), bytes.len());
    }

    pub fn get(&self, at: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        assert_eq!(self.map.slice(at, len as u32).unwrap().read(&mut bytes), len);
        bytes
    }

    pub fn publish(&mut self) {
        if self.driver.publish() {
            self.kick.write(1).unwrap();
        }
    }

    /// Has these buffers served as one request; the used length.
    pub fn serve(&mut self, buffers: &[Buffer]) -> u32 {
        self.driver.add(buffers).unwrap();
        self.publish();
        let deadline = Instant::now() + LIMIT;
        loop {
            if let Some((_, len)) = self.driver.collect() {
                return len;
            }
            assert!(Instant::now() < deadline, "no answer");
            std::thread::yield_now();
        }
    }

    /// A request of `kind` for `sector`, its header and data cut as told: status and used length.
    pub fn request(&mut self, kind: u32, sector: u64, shape: &Shape<'_>) -> (u8, u32) {
        let buffers = self.lay_out(kind, sector, shape);
        let used = self.serve(&buffers);
        (self.get(self.area + STATUS, 1)[0], used)
    }

    /// Begins such a request, of which [`over`](Self::over) tells when it is over.
    pub fn begin(&mut self, kind: u32, sector: u64, shape: &Shape<'_>) {
        let buffers = self.lay_out(kind, sector, shape);
        self.driver.add(&buffers).unwrap();
        self.publish();
    }

    /// The status of the request that was begun, if it is over.
    pub fn over(&mut self) -> Option<u8> {
        self.driver.collect()?;
        Some(self.get(self.area + STATUS, 1)[0])
    }

    fn lay_out(&mut self, kind: u32, sector: u64, shape: &Shape<'_>) -> Vec<Buffer> {
        let mut header = [kind.to_le_bytes(), [0; 4]].concat();
        header.extend(sector.to_le_bytes());
        self.put(self.area, &header);
        let status = self.area + STATUS;
        self.put(status, &[0xff]);
        let cut = |start: u64, lens: &[u32], writable: bool| {
            let mut addr = start;
            let pieces = lens.iter().map(move |&len| {
                addr += u64::from(len);
                Buffer { addr: addr - u64::from(len), len, writable }
            });
            pieces.collect::<Vec<_>>()
        };
        let mut buffers = cut(self.area, shape.header, false);
        buffers.extend(cut(shape.out_at.unwrap_or(self.area + 4096), shape.out, false));
        buffers.extend(cut(shape.into_at.unwrap_or(self.area + 4096), shape.into, true));
        buffers.push(Buffer { addr: status, len: 1, writable: true });
        buffers
    }

    /// Writes a pattern to a sector and reads it back.
    pub fn verified_io(&mut self, sector: u64, seed: u8) {
        let bytes: Vec<u8> = (0..512u32).map(|i| (i as u8).wrapping_mul(7) ^ seed).collect();
        self.put(self.area + 4096, &bytes);
        assert_eq!(self.request(WRITE, sector, &Shape { out: &[512], ..Shape::default() }), (OK, 1));
        self.put(self.area + 4096, &[0; 512]);
        assert_eq!(self.request(READ, sector, &Shape { into: &[512], ..Shape::default() }), (OK, 513));
        assert_eq!(self.get(self.area + 4096, 512), bytes);
    }
}

/// Verified I/O on one queue, in a thread of its own, for as long as something else is done: it fails if that I/O goes
/// wrong or stops.
pub fn beside<R>(lane: &mut Lane, what: impl FnOnce(&Progress<'_>) -> R) -> R {
    let (stop, rounds) = (AtomicBool::new(false), AtomicU64::new(0));
    std::thread::scope(|scope| {
        // The scope waits for its threads, also when an assertion ends it.
        let stopped = StopOnDrop(&stop);
        let io = scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                let round = rounds.fetch_add(1, Ordering::Relaxed);
                lane.verified_io(round % 1000, round as u8);
                // The other side needs a CPU as well.
                std::thread::sleep(Duration::from_micros(300));
            }
        });
        let progress = Progress(&rounds);
        progress.more(5);
        let outcome = what(&progress);
        progress.more(5);
        drop(stopped);
        io.join().unwrap();
        outcome
    })
}

/// How far the I/O of [`beside`] is.
pub struct Progress<'a>(&'a AtomicU64);

impl Progress<'_> {
    /// Waits for that many requests more, so many writes and reads each.
    pub fn more(&self, rounds: u64) {
        let from = self.0.load(Ordering::Relaxed);
        let moved = || Ok((self.0.load(Ordering::Relaxed) > from + rounds).then_some(()));
        wait::until("the neighbour's requests", LIMIT, moved).unwrap();
    }
}

struct StopOnDrop<'a>(&'a AtomicBool);

impl Drop for StopOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// How a request is cut into descriptors.
pub struct Shape<'a> {
    pub header: &'a [u32],
    pub out: &'a [u32],
    pub into: &'a [u32],
    pub out_at: Option<u64>,
    pub into_at: Option<u64>,
}

impl Default for Shape<'_> {
    fn default() -> Self {
        Shape { header: &[16], out: &[], into: &[], out_at: None, into_at: None }
    }
}
