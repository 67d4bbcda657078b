//! A device of the block daemon's, served on a kernel of the test's, and the driver that uses it.

use std::fs::File;
use std::sync::Arc;
use std::time::{Duration, Instant};

use poll_engine::device::Device;
use poll_engine::device::features::{ACCESS_PLATFORM, EVENT_IDX, INDIRECT_DESC, VERSION_1};
use poll_engine::engine::{Engine, EngineConfig};
use poll_engine::memory::Ram;
use poll_engine::ring::RingFormat;
use poll_engine::ring::driver::{Buffer, DriverRing};
use poll_engine::session::serve::Export;
use tempfile::TempDir;
use vdpa::vduse::memory::Bounce;
use vdpa::vduse::node::Node;
use vdpa::vduse::server::{PATIENCE, Plan, Server};
use vdpa::vduse::state::{About, State};
use vhost_blk::device::{BlkDevice, CONFIG_LEN};
use vhost_blk::disk::{Disk, DiskConfig, Storage};

use crate::kernel::{DRIVER_OK, Kernel};

pub const QUEUES: u16 = 2;
pub const RING: u16 = 16;
pub const SPLIT: u64 = VERSION_1 | ACCESS_PLATFORM | EVENT_IDX | INDIRECT_DESC | 1 << 9;
pub const PACKED: u64 = SPLIT | 1 << 34;
/// Where the driver's memory is, by I/O virtual addresses: rings, and what is bounced through.
pub const RINGS: u64 = 0x4000_0000;
pub const BOUNCE: u64 = 1 << 20;

pub struct Rig {
    pub kernel: Arc<Kernel>,
    pub server: Option<Server>,
    pub disk: Arc<Ram>,
    pub root: TempDir,
    engine: Arc<Engine>,
    device: Arc<dyn Device>,
    about: About,
    pub features: u64,
    pub bounce: Bounce,
    pub patience: Duration,
}

pub fn about(features: u64) -> About {
    About { device_id: 2, features, num_queues: QUEUES, queue_size: RING, config_len: CONFIG_LEN }
}

impl Rig {
    pub fn new(features: u64) -> Rig {
        let disk = Arc::new(Ram::new(0, 1 << 20, false).unwrap());
        let config = DiskConfig {
            block_size: 512,
            read_only: false,
            serial: "vduse".into(),
            writeback: true,
            ring_size: RING,
            path: "ram".into(),
            incoming: false,
            shared_depth: 16,
        };
        let medium = Disk::new(Storage::Ram(Arc::clone(&disk)), 1 << 20, &config);
        let device = Arc::new(BlkDevice::new(Arc::new(medium), QUEUES, RING, None));
        let mut rig = Rig::with(features, device);
        rig.disk = disk;
        rig
    }

    pub fn with(features: u64, device: Arc<dyn Device>) -> Rig {
        Rig::of(about(PACKED), features, device)
    }

    /// A device that is this to the kernel, with a driver that accepts these features of it.
    pub fn of(about: About, features: u64, device: Arc<dyn Device>) -> Rig {
        Rig {
            kernel: Kernel::new(about.num_queues.into(), features),
            server: None,
            disk: Arc::new(Ram::new(0, 4096, false).unwrap()),
            root: TempDir::new().unwrap(),
            engine: Arc::new(Engine::start(&EngineConfig::default()).unwrap()),
            device,
            about,
            features,
            bounce: Bounce::Kernel,
            patience: PATIENCE,
        }
    }

    pub fn serve(&mut self, resume: bool) {
        let state = State::claim(self.root.path(), "d0").unwrap();
        if !resume {
            state.begin(&self.about).unwrap();
        }
        let stats = std::iter::repeat_with(Arc::default).take(self.about.num_queues.into()).collect();
        let (device, engine) = (Arc::clone(&self.device), Arc::clone(&self.engine));
        let export = Export { name: "d0".into(), device, stats, engine };
        let (bounce, patience) = (self.bounce, self.patience);
        let plan = Plan { about: self.about.clone(), state, resume, bounce, patience };
        self.server = Some(Server::start(export, Node::new(self.kernel.edge()), plan, || {}).unwrap());
    }

    /// The driver lays its rings out and is ready.
    pub fn drive(&self) -> Driver {
        let mut driver = Driver::new(&self.kernel, self.features, self.about.num_queues);
        assert!(self.kernel.set_status(1 | 2 | 8));
        driver.ready(0);
        assert!(self.kernel.set_status(1 | 2 | 8 | DRIVER_OK));
        driver
    }
}

/// The driver's half: rings in one memory, data in another, as `virtio_vdpa` has them.
pub struct Driver {
    pub kernel: Arc<Kernel>,
    pub rings: Ram,
    pub data: Ram,
    pub queues: Vec<DriverRing>,
    pub configs: Vec<poll_engine::ring::RingConfig>,
    pub bounced: bool,
}

pub fn file_of(ram: &Ram) -> File {
    File::from(ram.fd().try_clone_to_owned().unwrap())
}

impl Driver {
    pub fn new(kernel: &Arc<Kernel>, features: u64, queues: u16) -> Driver {
        let mut rings = Ram::new(RINGS, 1 << 20, false).unwrap();
        let data = Ram::new(0, BOUNCE, false).unwrap();
        let configs = (0..queues).map(|_| DriverRing::lay_out(&mut rings, RING, features).unwrap());
        let configs: Vec<_> = configs.collect();
        let queues = configs.iter().map(|c| DriverRing::new(c, rings.map()).unwrap()).collect();
        kernel.map(RINGS, 1 << 20, 0, 3, &file_of(&rings));
        Driver { kernel: Arc::clone(kernel), rings, data, queues, configs, bounced: false }
    }

    /// Makes a queue ready.
    pub fn ready(&mut self, index: usize) {
        let config = self.configs[index];
        let iova = |user: u64| user - self.rings.spec().user_addr + RINGS;
        let mut kernel = self.kernel.lock();
        let queue = &mut kernel.queues[index];
        queue.num = config.size;
        queue.addrs = [config.desc_addr, config.avail_addr, config.used_addr].map(iova);
        // As virtio_vdpa says where a new packed ring begins.
        queue.state = if config.format == RingFormat::Packed { [1, 0, 1, 0] } else { [0; 4] };
        queue.ready = true;
    }

    /// The first request has its page bounced, and the kernel has the translation from then on.
    pub fn bounce(&mut self) {
        if !std::mem::replace(&mut self.bounced, true) {
            self.kernel.map(0, BOUNCE, 0, 3, &file_of(&self.data));
        }
    }

    /// A request of a block device without waiting for its end.
    pub fn submit(&mut self, index: usize, kind: u32, sector: u64, addr: u64) {
        self.bounce();
        let header = [kind.to_le_bytes(), [0; 4], (sector as u32).to_le_bytes(), [0; 4]].concat();
        self.data.map().slice(0x100, 16).unwrap().write(&header);
        self.data.map().slice(0x200, 1).unwrap().write(&[0xff]);
        let buffers = [
            Buffer { addr: 0x100, len: 16, writable: false },
            Buffer { addr, len: 512, writable: kind == 0 },
            Buffer { addr: 0x200, len: 1, writable: true },
        ];
        self.queues[index].add(&buffers).unwrap();
        if self.queues[index].publish() {
            self.kernel.kick(index);
        }
    }

    pub fn wait(&mut self, index: usize) -> Option<u8> {
        let deadline = Instant::now() + Duration::from_secs(60);
        while Instant::now() < deadline {
            if self.queues[index].collect().is_some() {
                let mut status = [0];
                self.data.map().slice(0x200, 1).unwrap().read(&mut status);
                return Some(status[0]);
            }
            std::thread::sleep(Duration::from_micros(200));
        }
        None
    }

    pub fn write(&mut self, index: usize, sector: u64, byte: u8) {
        self.data.map().slice(0x1000, 512).unwrap().fill(byte);
        self.submit(index, 1, sector, 0x1000);
        assert_eq!(self.wait(index), Some(0), "a write of {byte}");
    }

    pub fn read(&mut self, index: usize, sector: u64) -> u8 {
        self.data.map().slice(0x2000, 512).unwrap().fill(0xee);
        self.submit(index, 0, sector, 0x2000);
        assert_eq!(self.wait(index), Some(0), "a read");
        let mut bytes = [0; 512];
        self.data.map().slice(0x2000, 512).unwrap().read(&mut bytes);
        assert!(bytes.iter().all(|&b| b == bytes[0]));
        bytes[0]
    }
}
