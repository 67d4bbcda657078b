//! The calls of VDUSE by their meaning: the control node makes devices, and each device has a node of its own.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use nix::fcntl::{OFlag, open};
use nix::sys::stat::Mode;
use poll_engine::memory::Ram;
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes};

use super::edge::{Edge, Kernel};
use super::uapi::{
    API_VERSION, Answer, CREATE_DEV, ConfigData, DESTROY_DEV, DEV_GET_FEATURES, DEV_INJECT_CONFIG_IRQ,
    DEV_SET_CONFIG, DevConfig, DevRequest, IOTLB_DEREG_UMEM, IOTLB_GET_FD, IOTLB_GET_INFO, IOTLB_REG_UMEM,
    IOVA_CAP_UMEM, IotlbEntry, IovaInfo, IovaUmem, NAME_MAX, SET_API_VERSION, VQ_GET_INFO, VQ_INJECT_IRQ,
    VQ_SETUP, VQ_SETUP_KICKFD, VqConfig, VqEventfd, VqInfo,
};

/// Where the nodes are.
pub const DIRECTORY: &str = "/dev/vduse";
/// `VIRTIO_ID_NET`.
pub const ID_NET: u32 = 1;
/// `VIRTIO_ID_BLOCK`.
pub const ID_BLOCK: u32 = 2;

/// Why VDUSE does not do what is asked of it.
#[derive(Debug, thiserror::Error)]
pub enum VduseError {
    /// No control node.
    #[error(
        "this kernel offers no VDUSE ({0} is missing): load the module with modprobe vduse; the kernel needs \
         CONFIG_VDPA_USER, which Debian's have from 6.12 on"
    )]
    Missing(PathBuf),
    /// Not for us.
    #[error("cannot open {0}: {1}; run this as root, or give yourself access to it")]
    Open(PathBuf, io::Error),
    /// The kernel speaks later versions only.
    #[error("the kernel does not speak version {API_VERSION} of VDUSE: {0}")]
    Version(io::Error),
    /// There is one.
    #[error(
        "the name {0} is taken by another VDUSE device; choose another --name, or free it with vdpactl detach {0}"
    )]
    Taken(String),
    /// A name that cannot be one.
    #[error("'{0}' is no name for a device: 1 to {max} bytes, without '/', and not 'control'", max = NAME_MAX - 1)]
    Name(String),
    /// Not privileged.
    #[error("the kernel lets only processes with CAP_NET_ADMIN make network devices: run this as root")]
    NetAdmin,
    /// Not this one.
    #[error("the kernel refuses the device {0}: {1}{hint}", hint = if *.2 { " (network devices need Linux 6.9)" } else { "" })]
    Create(String, io::Error, bool),
    /// It is in use.
    #[error("{0} is still on the vDPA bus or served by a process; vdpactl detach {0} takes it away")]
    Busy(String),
    /// There is none of this name.
    #[error("there is no VDUSE device {0}")]
    Unknown(String),
    /// Memory of ours for bouncing.
    #[error(
        "this kernel bounces pages through memory of its own only: --bounce normal and huge need Linux 6.0"
    )]
    NoUmem,
    /// Any other call.
    #[error("{0}: {1}")]
    Call(&'static str, io::Error),
}

fn call(what: &'static str) -> impl Fn(io::Error) -> VduseError {
    move |e| VduseError::Call(what, e)
}

fn open_node(path: &Path) -> Result<OwnedFd, nix::Error> {
    open(path, OFlag::O_RDWR | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC, Mode::empty())
}

/// What a device is to the kernel.
#[derive(Clone, Debug)]
pub struct Spec {
    /// Its name, which it also has on the vDPA bus.
    pub name: String,
    /// `VIRTIO_ID_*`.
    pub device_id: u32,
    /// All that it offers.
    pub features: u64,
    /// Number of queues.
    pub num_queues: u16,
    /// Their largest size.
    pub queue_size: u16,
    /// Configuration space.
    pub config: Vec<u8>,
}

/// `/dev/vduse/control`.
#[derive(Debug)]
pub struct Control(Box<dyn Edge>);

impl Control {
    /// Opens it.
    pub fn open() -> Result<Control, VduseError> {
        Control::open_in(Path::new(DIRECTORY))
    }

    /// Opens it where the nodes are in `directory`.
    pub fn open_in(directory: &Path) -> Result<Control, VduseError> {
        let path = directory.join("control");
        let fd = open_node(&path).map_err(|e| match e {
            nix::Error::ENOENT | nix::Error::ENXIO | nix::Error::ENODEV => VduseError::Missing(path),
            e => VduseError::Open(path, e.into()),
        })?;
        Control::new(Box::new(Kernel(fd)))
    }

    /// By way of `edge`.
    pub fn new(edge: Box<dyn Edge>) -> Result<Control, VduseError> {
        // First, and always: a kernel that knows version 1 takes that for granted once it is asked, and wants groups then.
        edge.ioctl(SET_API_VERSION, API_VERSION.to_ne_bytes().as_mut_slice()).map_err(VduseError::Version)?;
        Ok(Control(edge))
    }

    /// Makes a device and its node. Its queues are to be set up before it can go to the vDPA bus.
    pub fn create(&self, spec: &Spec) -> Result<(), VduseError> {
        let mut config = DevConfig::new_zeroed();
        config.name = name_bytes(&spec.name)?;
        config.device_id = spec.device_id;
        config.features = spec.features;
        config.vq_num = spec.num_queues.into();
        // What virtio_vdpa aligns the parts of a ring to, for drivers before virtio 1.0.
        config.vq_align = 4096;
        config.config_size = spec.config.len() as u32;
        let mut bytes = config.as_bytes().to_vec();
        bytes.extend_from_slice(&spec.config);
        let is_net = spec.device_id == ID_NET;
        self.0.ioctl(CREATE_DEV, &mut bytes).map_err(|e| match e.raw_os_error() {
            Some(libc::EEXIST) => VduseError::Taken(spec.name.clone()),
            Some(libc::EPERM) if is_net => VduseError::NetAdmin,
            _ => VduseError::Create(spec.name.clone(), e, is_net),
        })
    }

    /// Takes a device away that is neither on the vDPA bus nor open.
    pub fn destroy(&self, name: &str) -> Result<(), VduseError> {
        self.0.ioctl(DESTROY_DEV, &mut name_bytes(name)?).map_err(|e| match e.raw_os_error() {
            Some(libc::EBUSY) => VduseError::Busy(name.into()),
            Some(libc::EINVAL) => VduseError::Unknown(name.into()),
            _ => VduseError::Call("cannot take the device away", e),
        })
    }
}

/// A name with NULs behind it.
fn name_bytes(name: &str) -> Result<[u8; NAME_MAX], VduseError> {
    let fits = (1..NAME_MAX).contains(&name.len());
    // It becomes the name of files.
    if !fits || name.contains(['/', '\0', '!']) || matches!(name, "." | ".." | "control") {
        return Err(VduseError::Name(name.into()));
    }
    let mut bytes = [0; NAME_MAX];
    bytes[..name.len()].copy_from_slice(name.as_bytes());
    Ok(bytes)
}

/// `/dev/vduse/NAME`: open once at a time.
#[derive(Debug)]
pub struct Node(Box<dyn Edge>);

impl Node {
    /// Opens it; `None` if there is no such device.
    pub fn open(name: &str) -> Result<Option<Node>, VduseError> {
        name_bytes(name)?;
        let path = Path::new(DIRECTORY).join(name);
        match open_node(&path) {
            Ok(fd) => Ok(Some(Node::new(Box::new(Kernel(fd))))),
            Err(nix::Error::ENOENT | nix::Error::ENODEV) => Ok(None),
            Err(nix::Error::EBUSY) => Err(VduseError::Taken(name.into())),
            Err(e) => Err(VduseError::Open(path, e.into())),
        }
    }

    /// By way of `edge`.
    pub fn new(edge: Box<dyn Edge>) -> Node {
        Node(edge)
    }

    /// To wait for: readable when there are requests, in error when the kernel has given the device up.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.0.fd()
    }

    fn get<T: FromBytes + IntoBytes>(&self, number: u64, structure: &mut T) -> io::Result<()> {
        self.0.ioctl(number, structure.as_mut_bytes())
    }

    fn put<T: IntoBytes + Immutable>(&self, number: u64, structure: &T) -> io::Result<()> {
        self.0.ioctl(number, &mut structure.as_bytes().to_vec())
    }

    /// The next request, with its number; `None` when there is none. Anything but a whole request is an error.
    pub fn request(&self) -> io::Result<Option<DevRequest>> {
        let mut request = DevRequest::new_zeroed();
        match self.0.read(request.as_mut_bytes()) {
            Ok(n) if n == size_of::<DevRequest>() => Ok(Some(request)),
            Ok(n) => Err(io::Error::other(format!("a request of {n} bytes"))),
            Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => Ok(None),
            Err(e) => Err(e),
        }
    }

    /// Answers request number `id`.
    pub fn answer(&self, id: u32, answer: Answer) -> io::Result<()> {
        self.0.write(answer.response(id).as_bytes()).map(drop)
    }

    /// What the driver has accepted.
    pub fn features(&self) -> Result<u64, VduseError> {
        let mut features = 0u64;
        self.get(DEV_GET_FEATURES, &mut features).map_err(call("cannot read the driver's features"))?;
        Ok(features)
    }

    /// The first translation that has an address between `first` and `last` in it, and the file that it is to.
    pub fn translation(&self, first: u64, last: u64) -> io::Result<Option<(IotlbEntry, OwnedFd)>> {
        let mut entry = IotlbEntry { start: first, last, ..IotlbEntry::new_zeroed() };
        match self.0.ioctl_fd(IOTLB_GET_FD, entry.as_mut_bytes()) {
            Ok(fd) => Ok(Some((entry, fd))),
            Err(e) if e.raw_os_error() == Some(libc::EINVAL) => Ok(None),
            Err(e) => Err(e),
        }
    }

    /// Whether memory of ours can be put behind the translation at `iova`, and then of how many bytes. An error if the
    /// kernel does not know the question.
    pub fn umem_size(&self, iova: u64) -> Result<Option<u64>, VduseError> {
        let mut info = IovaInfo { start: iova, last: iova, ..IovaInfo::new_zeroed() };
        match self.get(IOTLB_GET_INFO, &mut info) {
            Ok(()) => {}
            Err(e) if e.raw_os_error() == Some(libc::ENOTTY) => return Err(VduseError::NoUmem),
            // There is no such translation.
            Err(_) => return Ok(None),
        }
        let size = || info.last.checked_sub(info.start)?.checked_add(1);
        Ok((info.capability & IOVA_CAP_UMEM != 0).then(size).flatten())
    }

    /// Puts memory of ours behind the translations from 0 on, all that are for bouncing.
    pub fn register_umem(&self, ram: &Ram) -> io::Result<()> {
        self.put(IOTLB_REG_UMEM, &umem(ram))
    }

    /// Takes it back.
    pub fn deregister_umem(&self, ram: &Ram) -> io::Result<()> {
        self.put(IOTLB_DEREG_UMEM, &umem(ram))
    }

    /// Writes configuration space, which must have these bytes.
    pub fn set_config(&self, offset: u32, bytes: &[u8]) -> Result<(), VduseError> {
        let head = ConfigData { offset, length: bytes.len() as u32 };
        let mut all = [head.as_bytes(), bytes].concat();
        self.0.ioctl(DEV_SET_CONFIG, &mut all).map_err(call("cannot write configuration space"))
    }

    /// Has the driver read configuration space again; false if there is none that is ready, which is the only way to ask
    /// for that.
    pub fn config_interrupt(&self) -> Result<bool, VduseError> {
        match self.0.ioctl(DEV_INJECT_CONFIG_IRQ, &mut []) {
            Ok(()) => Ok(true),
            Err(e) if e.raw_os_error() == Some(libc::EINVAL) => Ok(false),
            Err(e) => Err(VduseError::Call("cannot tell the driver of its configuration", e)),
        }
    }

    /// Says how large a queue may be. All have to have one before the device goes to the vDPA bus.
    pub fn setup_queue(&self, index: u16, max_size: u16) -> Result<(), VduseError> {
        let config = VqConfig { index: index.into(), max_size, reserved: [0; 13] };
        self.put(VQ_SETUP, &config).map_err(call("cannot set a queue up"))
    }

    /// What the driver has made of a queue.
    pub fn queue_info(&self, index: u16) -> Result<VqInfo, VduseError> {
        let mut info = VqInfo { index: index.into(), ..VqInfo::new_zeroed() };
        self.get(VQ_GET_INFO, &mut info).map_err(call("cannot read what a queue is"))?;
        Ok(info)
    }

    /// Has the driver's kicks of a queue written to an eventfd. One that has come already is written at once.
    pub fn set_kick(&self, index: u16, kick: BorrowedFd<'_>) -> Result<(), VduseError> {
        let eventfd = VqEventfd { index: index.into(), fd: kick.as_raw_fd() };
        self.put(VQ_SETUP_KICKFD, &eventfd).map_err(call("cannot get a queue's kicks"))
    }

    /// Interrupts the driver of a queue.
    pub fn interrupt(&self, index: u16) -> io::Result<()> {
        self.0.ioctl(VQ_INJECT_IRQ, u32::from(index).to_ne_bytes().as_mut_slice())
    }
}

fn umem(ram: &Ram) -> IovaUmem {
    let spec = ram.spec();
    IovaUmem { uaddr: spec.user_addr, iova: spec.guest_addr, size: spec.size, reserved: [0; 3] }
}
