//! What is served, until a signal ends it: a disk, or a card on a tap. Cards on a switch are [`switch`](crate::switch)'s.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use anyhow::{Context, Result, anyhow, bail};
use daemon::Switch;
use daemon::placement::of_file;
use poll_engine::device::features;
use poll_engine::engine::{Engine, EngineConfig};
use poll_engine::uring::FixedBuffers;
use sd_notify::NotifyState;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM, SIGUSR1};
use signal_hook::iterator::Signals;
use tracing::{info, warn};
use vhost_blk::cli::DeviceOptions;
use vhost_blk::device::BlkDevice;
use vhost_blk::disk::Disk;
use vhost_blk::image::Image;
use vhost_blk::report::report;
use vhost_net::device::{Card, Joined, NetDevice};
use vhost_net::port::tap::Tap;
use vhost_net::port::tap::card::TapCard;
use vhost_net::report::tap_report;

use crate::cli::{Attach, Common, ServeBlk, ServeNet, name_of};
use crate::confine::{self, Confined};
use crate::netlink::Bus;
use crate::served::{Served, Wanted};
use crate::switch;
use crate::sysfs::Driver;
use crate::vduse::node::{ID_BLOCK, ID_NET};

/// Starts the reactors, near these devices if it is for us to say where.
pub(crate) fn engine(
    common: &Common,
    fixed: FixedBuffers,
    near: &[(String, Option<usize>)],
) -> Result<Arc<Engine>> {
    common.run.check().map_err(|e| anyhow!("{e}"))?;
    let (cpus, plan) = common.run.place(near)?;
    if let Some(plan) = plan {
        info!("{plan}");
    }
    let config =
        EngineConfig { cpus, pacing: common.run.poll, fixed_buffers: fixed, ..EngineConfig::default() };
    Ok(Arc::new(Engine::start(&config)?))
}

/// `vdpactl attach`.
pub fn attach(cli: &Attach) -> Result<()> {
    let name = cli.name.clone().unwrap_or_else(|| name_of(&cli.image));
    let key = cli.key.source();
    let image = Image { file: Some(&cli.image), format: cli.format, key, ..Image::default() };
    blk(name, image, Some(cli.driver), &cli.device, &cli.common)
}

/// `vdpactl serve blk`.
pub fn serve_blk(cli: &ServeBlk) -> Result<()> {
    let (file, synthetic, format) = (cli.blk_file.as_deref(), cli.backend, cli.format);
    let key = cli.key.source();
    blk(
        cli.name.clone(),
        Image { file, format, key, synthetic, ..Image::default() },
        cli.driver,
        &cli.device,
        &cli.common,
    )
}

fn withheld_rings(packed: Switch) -> u64 {
    if packed == Switch::Off { features::RING_PACKED } else { 0 }
}

fn blk(
    name: String,
    image: Image<'_>,
    driver: Option<Driver>,
    options: &DeviceOptions,
    common: &Common,
) -> Result<()> {
    let identity = common.confine.enter()?;
    daemon::log::init(&common.run.log)?;
    let confined = confine::threads(common, identity, driver, vec![], false)?;
    let image = Image { serial: options.serial.as_str(), read_only: options.read_only, ..image };
    let near = of_file(name.clone(), image.file);
    let disk = Arc::new(image.open(options)?);
    let device = BlkDevice::new(Arc::clone(&disk), options.num_queues, options.queue_size, None);
    let device = Arc::new(device.without(withheld_rings(options.packed)));
    let wanted = Wanted {
        name,
        id: ID_BLOCK,
        device,
        config_len: vhost_blk::device::CONFIG_LEN,
        common,
        engine: engine(common, options.fixed_buffers.into(), &[near])?,
    };
    serve(vec![wanted], driver, &*disk, &confined)
}

impl Service for Disk {
    fn report(&self, served: &[Served]) -> String {
        served.iter().map(|s| report(s.name(), self.capacity(), s.stats())).collect()
    }

    /// Its image may have grown.
    fn renew(&self, served: &[Served]) {
        for device in served {
            match self.grow() {
                Ok(Some(size)) => {
                    info!("{} has grown to {size} bytes", device.name());
                    device.config_notifier()();
                }
                Ok(None) => {}
                Err(e) => warn!("{}: {e}", device.name()),
            }
        }
    }
}

/// `vdpactl serve net`.
pub fn serve_net(cli: &ServeNet) -> Result<()> {
    let identity = cli.common.confine.enter()?;
    daemon::log::init(&cli.common.run.log)?;
    let Some(tap) = &cli.tap else { return switch::serve_net(cli, identity) };
    // A tap's own card has no control queue, and without one there is no choosing among pairs of queues.
    let tap = Tap::open(tap, 1, cli.mtu)?;
    let confined = confine::threads(&cli.common, identity, cli.driver, vec![], true)?;
    let card = Card { mac: cli.mac, mtu: cli.mtu, pairs: 1, ring_size: cli.queue_size };
    let joined = Joined::Tap(TapCard::new(Arc::clone(&tap), None));
    let wanted = Wanted {
        name: cli.name.clone().context("--name is missing")?,
        id: ID_NET,
        device: Arc::new(NetDevice::new(card, joined, withheld_rings(cli.packed))),
        config_len: vhost_net::device::CONFIG_LEN,
        common: &cli.common,
        engine: engine(&cli.common, FixedBuffers::Off, &[])?,
    };
    serve(vec![wanted], cli.driver, &*tap, &confined)
}

impl Service for Tap {
    fn begun(&self, served: &[Served]) {
        for device in served {
            self.on_change(device.config_notifier());
        }
    }

    fn report(&self, served: &[Served]) -> String {
        served.iter().map(|device| tap_report(device.name(), self)).collect()
    }
}

/// What is behind devices that are served together.
pub(crate) trait Service {
    /// They are.
    fn begun(&self, _: &[Served]) {}

    /// Statistics, for SIGUSR1.
    fn report(&self, served: &[Served]) -> String;

    /// SIGHUP: looks at what may have changed.
    fn renew(&self, _: &[Served]) {}
}

/// Serves all of `devices` until told to stop, or until the kernel has given all of them up.
pub(crate) fn serve(
    devices: Vec<Wanted<'_>>,
    driver: Option<Driver>,
    service: &dyn Service,
    confined: &Confined,
) -> Result<()> {
    // The driver first: its absence is found out before anything is made.
    let mut bus = driver.map(|_| Bus::open()).transpose()?;
    let mut signals = Signals::new([SIGTERM, SIGINT, SIGHUP, SIGUSR1]).context("cannot handle signals")?;
    let left = Arc::new(AtomicUsize::new(devices.len()));
    let mut served = vec![];
    let outcome = devices
        .into_iter()
        .try_for_each(|device| {
            let (left, handle) = (Arc::clone(&left), signals.handle());
            let ended = move || {
                if left.fetch_sub(1, Ordering::AcqRel) == 1 {
                    handle.close();
                }
            };
            // From here on it is to be taken away again if that was all for nothing.
            served.push(Served::begin(device, ended)?);
            Ok(())
        })
        .and_then(|()| {
            service.begun(&served);
            served.iter_mut().try_for_each(|device| go(device, bus.as_mut().zip(driver)))?;
            confined.seal(served.iter().map(Served::name))
        });
    if outcome.is_ok() {
        let _ = sd_notify::notify(&[NotifyState::Ready]);
        obey(&mut signals, &served, service);
    }
    let _ = sd_notify::notify(&[NotifyState::Stopping]);
    info!("stopping: finishing what is in flight");
    let (mut lost, mut ends) = (vec![], Ok(()));
    for device in served {
        let name = device.name().to_owned();
        match device.end(bus.as_mut()) {
            Ok(false) => {}
            Ok(true) => lost.push(name),
            Err(e) => ends = Err(e),
        }
    }
    outcome.and(ends)?;
    if !lost.is_empty() {
        bail!("the kernel had given {} up", lost.join(", "));
    }
    Ok(())
}

/// Puts a device where it is wanted.
fn go(device: &mut Served, wanted: Option<(&mut Bus, Driver)>) -> Result<()> {
    let name = device.name().to_owned();
    let Some((bus, driver)) = wanted else {
        info!("serving {name}; put it on the bus with vdpactl add {name}");
        return Ok(());
    };
    let outcome = device.attach(bus, driver)?;
    info!("{name} is {outcome}");
    // For scripts.
    daemon::print(&outcome.to_string());
    Ok(())
}

/// What signals ask for, until one ends it.
fn obey(signals: &mut Signals, served: &[Served], service: &dyn Service) {
    let mut warned = false;
    for signal in signals.forever() {
        let in_use = || served.iter().filter_map(Served::outcome).find(|outcome| outcome.is_in_use());
        match signal {
            SIGHUP => service.renew(served),
            SIGUSR1 => daemon::print(&service.report(served)),
            _ if warned => return,
            _ => match in_use() {
                // Its file system would lose what is not written yet.
                Some(outcome) => {
                    warned = true;
                    warn!(
                        "{outcome} is in use: unmount it and signal again; a second signal takes it away as it is"
                    );
                }
                None => return,
            },
        }
    }
}
