//! Serves one device: makes it or goes on with it, puts it on the bus if asked to, and takes away at the end what it has
//! made.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use daemon::Switch;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use poll_engine::device::{Device, features};
use poll_engine::engine::{Engine, EngineConfig};
use poll_engine::session::serve::Export;
use poll_engine::stats::QueueStats;
use sd_notify::NotifyState;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM, SIGUSR1};
use signal_hook::iterator::Signals;
use tracing::{info, warn};
use vhost_blk::cli::{DeviceOptions, Synthetic};
use vhost_blk::device::BlkDevice;
use vhost_blk::disk::Disk;
use vhost_blk::image::Image;
use vhost_blk::report::report;
use vhost_net::device::{Card, Joined, NetDevice};
use vhost_net::port::tap::Tap;
use vhost_net::port::tap::card::TapCard;
use vhost_net::report::tap_report;

use crate::cli::{Attach, BounceMemory, Common, ServeBlk, ServeNet, name_of};
use crate::netlink::{Bus, NetOptions};
use crate::sysfs::{self, Driver, Outcome};
use crate::vduse::node::{Control, Node, Spec, VduseError};
use crate::vduse::server::{PATIENCE, Plan, Server};
use crate::vduse::state::{About, State};

/// `VIRTIO_ID_NET` and `VIRTIO_ID_BLOCK`.
const ID_NET: u32 = 1;
const ID_BLOCK: u32 = 2;

/// How long a node may take to appear.
const NODE: Duration = Duration::from_secs(5);

/// The device behind the interface.
enum Kind {
    Disk(Arc<Disk>),
    Card(Arc<Tap>),
}

/// A device to be served.
struct Wanted<'a> {
    name: String,
    kind: Kind,
    device: Arc<dyn Device>,
    num_queues: u16,
    config_len: usize,
    driver: Option<Driver>,
    common: &'a Common,
    engine: Arc<Engine>,
}

/// Features that VDUSE has no place for, or that nobody on the way would carry out.
///
/// - `RING_RESET`: no message resets a queue alone.
/// - Configuration space is read-only to drivers: no `CONFIG_WCE`.
/// - A control queue is refused for network devices (Linux up to 7.2), and with it goes all that needs one.
fn withheld(id: u32) -> u64 {
    use vhost_net::features as net;
    features::RING_RESET
        | match id {
            ID_NET => {
                net::CTRL_VQ
                    | net::CTRL_RX
                    | net::CTRL_VLAN
                    | net::CTRL_RX_EXTRA
                    | net::GUEST_ANNOUNCE
                    | net::MQ
                    | net::CTRL_MAC_ADDR
                    | net::CTRL_GUEST_OFFLOADS
                    | net::RSS
                    | net::HASH_REPORT
            }
            _ => 1 << 11,
        }
}

/// All that a device offers through VDUSE.
pub fn offered(device: &dyn Device, id: u32) -> u64 {
    let in_order = if device.completes_in_order() { features::IN_ORDER } else { 0 };
    (device.features() | features::ENGINE | in_order) & !device.withheld_features() & !withheld(id)
}

fn engine(common: &Common, fixed: poll_engine::uring::FixedBuffers) -> Result<Arc<Engine>> {
    let cpus = common.cpus.clone().unwrap_or_default();
    let config = EngineConfig { cpus, pacing: common.poll, fixed_buffers: fixed, count_cycles: false };
    Ok(Arc::new(Engine::start(&config)?))
}

fn withheld_rings(packed: Switch) -> u64 {
    if packed == Switch::Off { features::RING_PACKED } else { 0 }
}

/// `vdpactl attach`.
pub fn attach(cli: &Attach) -> Result<()> {
    let name = cli.name.clone().unwrap_or_else(|| name_of(&cli.image));
    blk(name, Some(&cli.image), None, Some(cli.driver), &cli.device, &cli.common)
}

/// `vdpactl serve blk`.
pub fn serve_blk(cli: &ServeBlk) -> Result<()> {
    blk(cli.name.clone(), cli.blk_file.as_deref(), cli.backend, cli.driver, &cli.device, &cli.common)
}

fn blk(
    name: String,
    file: Option<&Path>,
    synthetic: Option<Synthetic>,
    driver: Option<Driver>,
    options: &DeviceOptions,
    common: &Common,
) -> Result<()> {
    daemon::init_log(&common.log)?;
    let (serial, read_only) = (options.serial.as_str(), options.read_only);
    let image = Image { file, synthetic, serial, read_only, ..Image::default() };
    let disk = Arc::new(image.open(options)?);
    let device = BlkDevice::new(Arc::clone(&disk), options.num_queues, options.queue_size, None);
    let device = Arc::new(device.without(withheld_rings(options.packed)));
    serve(Wanted {
        name,
        kind: Kind::Disk(disk),
        device,
        num_queues: options.num_queues,
        config_len: vhost_blk::device::CONFIG_LEN,
        driver,
        common,
        engine: engine(common, options.fixed_buffers.into())?,
    })
}

/// `vdpactl serve net`.
pub fn serve_net(cli: &ServeNet) -> Result<()> {
    daemon::init_log(&cli.common.log)?;
    // Without a control queue there is no choosing among pairs of queues.
    let tap = Tap::open(&cli.tap, 1, cli.mtu)?;
    let card = Card { mac: cli.mac, mtu: cli.mtu, pairs: 1, ring_size: cli.queue_size };
    let joined = Joined::Tap(TapCard::new(Arc::clone(&tap), None));
    let device = Arc::new(NetDevice::new(card, joined, withheld_rings(cli.packed)));
    serve(Wanted {
        name: cli.name.clone(),
        kind: Kind::Card(tap),
        device,
        num_queues: 2,
        config_len: vhost_net::device::CONFIG_LEN,
        driver: cli.driver,
        common: &cli.common,
        engine: engine(&cli.common, poll_engine::uring::FixedBuffers::Off)?,
    })
}

fn serve(wanted: Wanted<'_>) -> Result<()> {
    let Wanted { name, kind, device, num_queues, config_len, driver, common, engine } = wanted;
    let id = if matches!(kind, Kind::Disk(_)) { ID_BLOCK } else { ID_NET };
    // The driver first: its absence is found out before anything is made.
    let mut bus = driver.map(|_| Bus::open()).transpose()?;
    if common.bounce != BounceMemory::Kernel {
        raise_lock_limit();
    }
    let about = About {
        device_id: id,
        features: offered(&*device, id),
        num_queues,
        queue_size: device.max_ring_size(),
        config_len,
    };
    let state = State::claim(&common.state_dir, &name)?;
    let control = Control::open()?;
    let found = Node::open(&name)?;
    let resume = found.is_some();
    let node = match found {
        Some(node) => {
            state.resume(&about)?;
            node
        }
        None => make(&control, &state, &name, &about, &*device, common)?,
    };
    // From here on it is to be taken away again if that was all for nothing.
    let mut signals = Signals::new([SIGTERM, SIGINT, SIGHUP, SIGUSR1]).context("cannot handle signals")?;
    let stats: Vec<Arc<QueueStats>> = std::iter::repeat_with(Arc::default).take(num_queues.into()).collect();
    let export = Export { name: name.clone(), device, stats: stats.clone(), engine: Arc::clone(&engine) };
    let handle = signals.handle();
    let plan = Plan { about, state, resume, bounce: common.bounce.into(), patience: PATIENCE };
    let server =
        Server::start(export, node, plan, move || handle.close()).context("cannot start a control thread")?;
    let tell = server.config_notifier();
    if let Kind::Card(tap) = &kind {
        tap.on_change(server.config_notifier());
    }
    let attached = match (&mut bus, driver) {
        (Some(bus), Some(driver)) => attach_to(bus, &name, driver).map(Some),
        _ => Ok(None),
    };
    let outcome = match attached {
        Ok(outcome) => {
            if let Some(outcome) = &outcome {
                info!("{name} is {outcome}");
                // For scripts.
                daemon::print(&outcome.to_string());
            } else {
                info!("serving {name}; put it on the bus with vdpactl add {name}");
            }
            let _ = sd_notify::notify(&[NotifyState::Ready]);
            obey(&mut signals, &name, &kind, &stats, outcome.as_ref(), &tell);
            Ok(())
        }
        Err(e) => Err(e),
    };
    let _ = sd_notify::notify(&[NotifyState::Stopping]);
    info!("stopping: finishing what is in flight");
    let was_lost = server.has_ended();
    // While somebody answers: its driver lets go of it.
    if let Some(bus) = &mut bus
        && bus.has(&name)?
    {
        bus.delete(&name)?;
    }
    let state = server.stop();
    match (control.destroy(&name), state) {
        (Ok(()) | Err(VduseError::Unknown(_)), Some(state)) => state.remove(),
        (Err(VduseError::Busy(_)), _) => info!(
            "{name} stays on the vDPA bus: its requests wait for the next vdpactl serve; vdpactl detach {name} takes it away"
        ),
        (Err(e), _) => warn!("{name}: {e}"),
        (Ok(()), None) => {}
    }
    drop(engine);
    outcome?;
    if was_lost {
        bail!("the kernel had given {name} up");
    }
    Ok(())
}

/// Makes the device and its node, whose queues are set up.
fn make(
    control: &Control,
    state: &State,
    name: &str,
    about: &About,
    device: &dyn Device,
    common: &Common,
) -> Result<Node> {
    // First: what is made without a record could not be gone on with.
    state.begin(about)?;
    let mut config = vec![0; about.config_len];
    device.read_config(0, &mut config);
    let About { device_id, features, num_queues, queue_size, .. } = *about;
    control.create(&Spec { name: name.into(), device_id, features, num_queues, queue_size, config })?;
    let outcome = (|| {
        let deadline = Instant::now() + NODE;
        let node = loop {
            match Node::open(name)? {
                Some(node) => break node,
                None if Instant::now() < deadline => std::thread::sleep(Duration::from_millis(5)),
                None => {
                    bail!("the node of {name} in /dev/vduse does not appear (is udev or devtmpfs there?)")
                }
            }
        };
        for index in 0..num_queues {
            node.setup_queue(index, queue_size)?;
        }
        if let Some(bytes) = common.bounce_size {
            sysfs::set_bounce_size(name, bytes).context("--bounce-size needs Linux 6.0")?;
        }
        Ok(node)
    })();
    if outcome.is_err() {
        let _ = control.destroy(name);
    }
    outcome
}

/// Puts the device on the bus, where it may be already, and waits for what becomes of it.
fn attach_to(bus: &mut Bus, name: &str, driver: Driver) -> Result<Outcome> {
    if !bus.has(name)? {
        bus.add(name, "vduse", NetOptions::default())?;
    }
    sysfs::bind(name, driver)?;
    Ok(sysfs::wait_for_outcome(name, driver)?)
}

/// What signals ask for, until one ends it.
fn obey(
    signals: &mut Signals,
    name: &str,
    kind: &Kind,
    stats: &[Arc<QueueStats>],
    outcome: Option<&Outcome>,
    tell: &impl Fn(),
) {
    let mut warned = false;
    for signal in signals.forever() {
        match signal {
            SIGHUP => {
                let Kind::Disk(disk) = kind else { continue };
                match disk.grow() {
                    Ok(Some(size)) => {
                        info!("{name} has grown to {size} bytes");
                        tell();
                    }
                    Ok(None) => {}
                    Err(e) => warn!("{name}: {e}"),
                }
            }
            SIGUSR1 => daemon::print(&match kind {
                Kind::Disk(disk) => report(name, disk.capacity(), stats),
                Kind::Card(tap) => tap_report(name, tap),
            }),
            _ => match outcome {
                // Its file system would lose what is not written yet.
                Some(outcome) if !warned && outcome.is_in_use() => {
                    warned = true;
                    warn!(
                        "{outcome} is in use: unmount it and signal again; a second signal takes it away as it is"
                    );
                }
                _ => return,
            },
        }
    }
}

/// What bounces through memory of ours is locked.
fn raise_lock_limit() {
    let unlimited = setrlimit(Resource::RLIMIT_MEMLOCK, libc::RLIM_INFINITY, libc::RLIM_INFINITY);
    if unlimited.is_err()
        && let Ok((_, hard)) = getrlimit(Resource::RLIMIT_MEMLOCK)
    {
        let _ = setrlimit(Resource::RLIMIT_MEMLOCK, hard, hard);
    }
}
