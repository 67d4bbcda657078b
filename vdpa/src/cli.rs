//! The command line of `vdpactl`.

use std::path::{Path, PathBuf};

use clap::{Args, Parser, Subcommand, ValueEnum};
use daemon::running::RunOptions;
use daemon::{Switch, ring_size};
use vhost_blk::backend::formatted::Format;
use vhost_blk::cli::{DeviceOptions, KeyOptions, Synthetic, parse_size};
use vhost_net::cli::pairs;
use vhost_net::spec::{PortSpec, mac};

use crate::sysfs::Driver;
use crate::vduse::memory::Bounce;
use crate::vduse::state::ROOT;

/// Disks and network cards on the kernel's vDPA bus.
///
/// Serves them as vhost-blk and vhost-net do, through VDUSE instead of vhost-user: the host itself gets a plain /dev/vdX or
/// a network interface (virtio_vdpa), a virtual machine or a container a /dev/vhost-vdpa-N (vhost_vdpa).
#[derive(Debug, Parser)]
#[command(name = "vdpactl", version, max_term_width = 110)]
pub struct Cli {
    /// What to do
    #[command(subcommand)]
    pub command: Command,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Take an image to /dev/vdX, and take all of it away on SIGTERM or SIGINT
    Attach(Box<Attach>),
    /// Take a device away, whoever serves it, or served it
    Detach(Detach),
    /// Serve a device
    #[command(subcommand)]
    Serve(Serve),
    /// List the devices on the vDPA bus
    List(Shown),
    /// Show a device on the vDPA bus
    Show(Shown),
    /// Show the configuration of devices
    Config(Shown),
    /// Show what can make devices
    Mgmtdev(Shown),
    /// Show what a device counts for a queue, if it does
    Stats(Stats),
    /// Put a device on the vDPA bus
    Add(Add),
    /// Take a device from the vDPA bus; whoever serves it goes on
    Del(Del),
}

/// `attach`.
#[derive(Debug, Args)]
pub struct Attach {
    /// Image file or block device
    #[arg(value_name = "IMAGE")]
    pub image: PathBuf,

    /// What the bytes of the image mean; never guessed. vmdk needs --read-only, luks a key
    #[arg(long, value_enum, default_value_t = Format::Raw)]
    pub format: Format,

    /// The key of a LUKS volume
    #[command(flatten)]
    pub key: KeyOptions,

    /// Name on the vDPA bus; without, that of the image
    #[arg(long, value_name = "NAME")]
    pub name: Option<String>,

    /// What it is to become
    #[arg(long, value_enum, default_value_t = Driver::Virtio)]
    pub driver: Driver,

    /// As vhost-blk has them
    #[command(flatten)]
    pub device: DeviceOptions,

    /// As all have them
    #[command(flatten)]
    pub common: Common,
}

/// `detach`.
#[derive(Debug, Args)]
pub struct Detach {
    /// Its name, or the image it was made of; without, the only one there is
    #[arg(value_name = "NAME")]
    pub name: Option<String>,

    /// Even if it is in use
    #[arg(long)]
    pub force: bool,

    /// Where the state of devices is kept
    #[arg(long, value_name = "DIR", default_value = ROOT)]
    pub state_dir: PathBuf,
}

/// `serve`.
#[derive(Debug, Subcommand)]
#[allow(clippy::large_enum_variant)] // one for a process
pub enum Serve {
    /// A disk
    Blk(Box<ServeBlk>),
    /// A network card
    Net(Box<ServeNet>),
}

/// `serve blk`.
#[derive(Debug, Args)]
pub struct ServeBlk {
    /// Name of the device
    #[arg(long, value_name = "NAME")]
    pub name: String,

    /// Image file or block device to serve
    #[arg(long, value_name = "PATH", conflicts_with = "backend", required_unless_present = "backend")]
    pub blk_file: Option<PathBuf>,

    /// What the bytes of the image mean; never guessed. vmdk needs --read-only, luks a key
    #[arg(long, value_enum, default_value_t = Format::Raw, conflicts_with = "backend")]
    pub format: Format,

    /// The key of a LUKS volume
    #[command(flatten)]
    pub key: KeyOptions,

    /// Serve memory or nothing instead of a file, for measuring: ram:SIZE or null:SIZE
    #[arg(long, value_name = "KIND:SIZE")]
    pub backend: Option<Synthetic>,

    /// Put it on the vDPA bus with this driver as well, and take it away at the end
    #[arg(long, value_enum, value_name = "DRIVER")]
    pub driver: Option<Driver>,

    /// As vhost-blk has them
    #[command(flatten)]
    pub device: DeviceOptions,

    /// As all have them
    #[command(flatten)]
    pub common: Common,
}

/// `serve net`.
#[derive(Debug, Args)]
pub struct ServeNet {
    /// Name of the device, which is joined to --tap, or by a switch to each --port and the --uplink
    #[arg(long, value_name = "NAME", required_unless_present = "port")]
    pub name: Option<String>,

    /// Join it to this tap; one that does not exist is made, and goes when this ends
    #[arg(long, value_name = "NAME", requires = "name", conflicts_with_all = ["port", "uplink"])]
    pub tap: Option<String>,

    /// Serve a further card on the switch; repeat for more. Keys are those of vhost-net --port; one with name and without
    /// socket-path is on the vDPA bus by that name, the others are for virtual machines
    #[arg(long, value_name = "KEY=VALUE,...")]
    pub port: Vec<PortSpec>,

    /// Join the switch to the host, as vhost-net --uplink does: tap=, af-packet= or af-xdp=
    #[arg(long, value_name = "KEY=VALUE,...")]
    pub uplink: Option<PortSpec>,

    /// How long the switch knows an address that sends nothing
    #[arg(long, value_name = "SECONDS", default_value_t = 300, value_parser = clap::value_parser!(u32).range(1..))]
    pub mac_ageing: u32,

    /// Address of the card of --name (such as 52:54:00:12:34:56)
    #[arg(long, value_name = "MAC", value_parser = mac, requires = "name")]
    pub mac: Option<[u8; 6]>,

    /// MTU that cards advise
    #[arg(long, value_name = "BYTES", value_parser = clap::value_parser!(u16).range(68..=65521))]
    pub mtu: Option<u16>,

    /// Pairs of queues that each card on the switch offers (1 to 16); one on the bus has as many only if the kernel takes a
    /// control queue from VDUSE, which Linux up to 7.2 does not, and one otherwise
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = pairs, conflicts_with = "tap")]
    pub num_queue_pairs: u16,

    /// Largest ring a queue may have (a power of two up to 32768)
    #[arg(long, value_name = "N", default_value_t = 256, value_parser = ring_size)]
    pub queue_size: u16,

    /// Offer packed rings, which a driver may then choose
    #[arg(long, value_enum, default_value_t = Switch::On)]
    pub packed: Switch,

    /// Put it on the vDPA bus with this driver as well, and take it away at the end
    #[arg(long, value_enum, value_name = "DRIVER")]
    pub driver: Option<Driver>,

    /// As all have them
    #[command(flatten)]
    pub common: Common,
}

/// What all devices have.
#[derive(Clone, Debug, Args)]
pub struct Common {
    /// Where pages bounce that virtio_vdpa gives to the device: in the kernel's memory, or in ours (Linux 6.0)
    #[arg(long, value_enum, value_name = "WHERE", default_value_t = BounceMemory::Kernel)]
    pub bounce: BounceMemory,

    /// Bytes to bounce pages through, 1M to 1G (Linux 6.4); the kernel's default is 64M
    #[arg(long, value_name = "BYTES", value_parser = bounce_size)]
    pub bounce_size: Option<u64>,

    /// Where to keep what a successor needs to know if this process is killed
    #[arg(long, value_name = "DIR", default_value = ROOT)]
    pub state_dir: PathBuf,

    /// Confinement.
    #[command(flatten)]
    pub confine: daemon::confine::Options,

    /// How it runs.
    #[command(flatten)]
    pub run: RunOptions,
}

/// `--bounce`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum BounceMemory {
    /// The kernel's.
    Kernel,
    /// Ours, in normal pages.
    Normal,
    /// Ours, in huge pages.
    Huge,
}

impl From<BounceMemory> for Bounce {
    fn from(memory: BounceMemory) -> Bounce {
        match memory {
            BounceMemory::Kernel => Bounce::Kernel,
            BounceMemory::Normal => Bounce::Own { huge: false },
            BounceMemory::Huge => Bounce::Own { huge: true },
        }
    }
}

/// `list`, `show`, `config`, `mgmtdev`.
#[derive(Debug, Args)]
pub struct Shown {
    /// Which one; without, all
    #[arg(value_name = "NAME")]
    pub name: Option<String>,

    /// JSON, as vdpa -j of iproute2 prints it
    #[arg(long, short)]
    pub json: bool,
}

/// `stats`.
#[derive(Debug, Args)]
pub struct Stats {
    /// The device
    #[arg(value_name = "NAME")]
    pub name: String,

    /// The queue
    #[arg(long, value_name = "INDEX", default_value_t = 0)]
    pub queue: u32,

    /// JSON, as vdpa -j of iproute2 prints it
    #[arg(long, short)]
    pub json: bool,
}

/// `add`.
#[derive(Debug, Args)]
pub struct Add {
    /// Its name; with VDUSE that of the device that is served
    #[arg(value_name = "NAME")]
    pub name: String,

    /// What makes it
    #[arg(long, value_name = "NAME", default_value = "vduse")]
    pub mgmtdev: String,

    /// The driver that it is to have; without, whichever the kernel takes
    #[arg(long, value_enum)]
    pub driver: Option<Driver>,

    /// Address of a network card, where the management device can give it one
    #[arg(long, value_name = "MAC", value_parser = mac)]
    pub mac: Option<[u8; 6]>,

    /// Its MTU, likewise
    #[arg(long, value_name = "BYTES")]
    pub mtu: Option<u16>,

    /// Its pairs of queues, likewise
    #[arg(long, value_name = "N")]
    pub max_vqp: Option<u16>,
}

/// `del`.
#[derive(Debug, Args)]
pub struct Del {
    /// The device
    #[arg(value_name = "NAME")]
    pub name: String,
}

fn bounce_size(s: &str) -> Result<u64, String> {
    let bytes = parse_size(s)?;
    if (1 << 20..=1 << 30).contains(&bytes) { Ok(bytes) } else { Err("the kernel takes 1M to 1G".into()) }
}

/// The name of a device that is made of an image: its own, without what the bus has no place for.
pub fn name_of(image: &Path) -> String {
    let stem = image.file_stem().unwrap_or_default().to_string_lossy();
    let name: String =
        stem.chars().map(|c| if c.is_ascii_alphanumeric() || "-_.".contains(c) { c } else { '-' }).collect();
    if name.trim_matches('.').is_empty() { "disk".into() } else { name }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn images_give_names() {
        for (image, name) in
            [("/x/disk.img", "disk"), ("a b.raw", "a-b"), ("/dev/sdb", "sdb"), ("..", "disk"), ("é.img", "-")]
        {
            assert_eq!(name_of(Path::new(image)), name);
        }
    }

    #[test]
    fn bounce_buffers_have_bounds() {
        assert_eq!(bounce_size("64M"), Ok(64 << 20));
        for bad in ["512K", "2G", "x"] {
            assert!(bounce_size(bad).is_err(), "{bad}");
        }
    }
}
