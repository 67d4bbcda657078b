//! One device that is served: made or gone on with, put on the bus if that is asked for, and taken away at the end.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use poll_engine::device::{Device, features};
use poll_engine::engine::Engine;
use poll_engine::session::serve::Export;
use poll_engine::stats::QueueStats;
use tracing::{info, warn};
use vhost_net::control;
use vhost_net::features::{CTRL_VQ, MQ};

use crate::cli::{BounceMemory, Common};
use crate::netlink::{Bus, NetOptions};
use crate::sysfs::{self, Driver, Outcome};
use crate::vduse::node::{Control, ID_NET, Node, Spec, VduseError};
use crate::vduse::server::{PATIENCE, Plan, Server};
use crate::vduse::state::{About, State};

/// How long a node may take to appear.
const NODE: Duration = Duration::from_secs(5);
/// `VIRTIO_BLK_F_CONFIG_WCE`.
const CONFIG_WCE: u64 = 1 << 11;

/// A device to be served.
pub struct Wanted<'a> {
    /// Its name.
    pub name: String,
    /// `VIRTIO_ID_*`.
    pub id: u32,
    /// What it is.
    pub device: Arc<dyn Device>,
    /// Bytes of configuration space.
    pub config_len: usize,
    /// What all devices have.
    pub common: &'a Common,
    /// Where its queues run.
    pub engine: Arc<Engine>,
}

/// A device that is served.
pub struct Served {
    name: String,
    control: Control,
    server: Server,
    stats: Vec<Arc<QueueStats>>,
    outcome: Option<Outcome>,
}

/// Features that VDUSE has no place for, or that nobody on the way would carry out.
///
/// - `RING_RESET`: no message resets a queue alone.
/// - Configuration space is read-only to drivers: no `CONFIG_WCE`.
fn withheld(id: u32) -> u64 {
    features::RING_RESET | if id == ID_NET { 0 } else { CONFIG_WCE }
}

/// All that a device offers through VDUSE.
pub fn offered(device: &dyn Device, id: u32) -> u64 {
    let in_order = if device.completes_in_order() { features::IN_ORDER } else { 0 };
    (device.features() | features::ENGINE | in_order) & !device.withheld_features() & !withheld(id)
}

/// What a device can be to the kernel, the best first. A network card comes with its control queue, and without for a kernel
/// that takes none (Linux up to 7.2): with the queue goes all that needs one, and all pairs but the first.
pub fn forms(device: &dyn Device, id: u32, config_len: usize) -> Vec<About> {
    let about = About {
        device_id: id,
        features: offered(device, id),
        num_queues: device.num_queues(),
        queue_size: device.max_ring_size(),
        config_len,
    };
    if id != ID_NET {
        return vec![about];
    }
    let features = about.features & !(control::FEATURES | MQ);
    let plain = About { features, num_queues: 2, ..about.clone() };
    if about.features & CTRL_VQ != 0 { vec![about, plain] } else { vec![plain] }
}

/// Makes the first of these that the kernel takes, with its record.
pub fn create(control: &Control, state: &State, name: &str, forms: &[About], config: &[u8]) -> Result<About> {
    let mut forms = forms.iter().peekable();
    while let Some(about) = forms.next() {
        // First: what is made without a record could not be gone on with.
        state.begin(about)?;
        let About { device_id, features, num_queues, queue_size, .. } = *about;
        let config = config.to_vec();
        let spec = Spec { name: name.into(), device_id, features, num_queues, queue_size, config };
        match control.create(&spec) {
            Ok(()) => return Ok(about.clone()),
            Err(VduseError::Create(_, e, _))
                if e.raw_os_error() == Some(libc::EINVAL) && forms.peek().is_some() => {}
            Err(e) => return Err(e.into()),
        }
    }
    bail!("{name} is nothing")
}

impl Served {
    /// Begins to serve; `ended` is called if the kernel gives the device up.
    pub fn begin(wanted: Wanted<'_>, ended: impl FnOnce() + Send + 'static) -> Result<Served> {
        let Wanted { name, id, device, config_len, common, engine } = wanted;
        if common.bounce != BounceMemory::Kernel {
            raise_lock_limit();
        }
        let forms = forms(&*device, id, config_len);
        let control = Control::open()?;
        let state = State::claim(&common.state_dir, &name)?;
        let found = Node::open(&name)?;
        let resume = found.is_some();
        let (node, about) = match found {
            Some(node) => {
                let known = forms.iter().find(|about| state.resume(about).is_ok());
                // Why not, of the form that asks least of the kernel.
                forms.last().filter(|_| known.is_none()).map_or(Ok(()), |about| state.resume(about))?;
                (node, known.cloned().with_context(|| format!("{name} is nothing"))?)
            }
            None => match make(&control, &state, &name, &forms, &*device, common) {
                Ok(made) => made,
                Err(e) => {
                    // Nothing is left that could be gone on with.
                    state.remove();
                    return Err(e);
                }
            },
        };
        if about.num_queues < device.num_queues() {
            info!("{name} has one pair of queues and no control queue: this kernel takes none from VDUSE");
        }
        let stats: Vec<Arc<QueueStats>> =
            std::iter::repeat_with(Arc::default).take(device.num_queues().into()).collect();
        let export = Export { name: name.clone(), device, stats: stats.clone(), engine };
        let plan = Plan { about, state, resume, bounce: common.bounce.into(), patience: PATIENCE };
        let server = Server::start(export, node, plan, ended).context("cannot start a control thread")?;
        Ok(Served { name, control, server, stats, outcome: None })
    }

    /// Puts it on the bus, where it may be already, and waits for what becomes of it.
    pub fn attach(&mut self, bus: &mut Bus, driver: Driver) -> Result<&Outcome> {
        let name = &self.name;
        if !bus.has(name)? {
            bus.add(name, "vduse", NetOptions::default())?;
        }
        sysfs::bind(name, driver)?;
        Ok(self.outcome.insert(sysfs::wait_for_outcome(name, driver)?))
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What has become of it on the bus, if we have put it there.
    pub fn outcome(&self) -> Option<&Outcome> {
        self.outcome.as_ref()
    }

    /// Counters of its queues.
    pub fn stats(&self) -> &[Arc<QueueStats>] {
        &self.stats
    }

    /// Shows the driver that configuration space has changed. It never waits.
    pub fn config_notifier(&self) -> impl Fn() + Send + Sync + 'static {
        self.server.config_notifier()
    }

    /// Takes it away, from the bus as well if there is one. Whether the kernel had given it up.
    pub fn end(self, bus: Option<&mut Bus>) -> Result<bool> {
        let Served { name, control, server, .. } = self;
        let was_lost = server.has_ended();
        // While somebody answers: its driver lets go of it.
        let deleted = bus.map_or(Ok(()), |bus| if bus.has(&name)? { bus.delete(&name) } else { Ok(()) });
        let state = server.stop();
        match (control.destroy(&name), state) {
            (Ok(()) | Err(VduseError::Unknown(_)), Some(state)) => state.remove(),
            (Err(VduseError::Busy(_)), _) => info!(
                "{name} stays on the vDPA bus: its requests wait for the next vdpactl serve; vdpactl detach {name} takes it \
                 away"
            ),
            (Err(e), _) => warn!("{name}: {e}"),
            (Ok(()), None) => {}
        }
        deleted?;
        Ok(was_lost)
    }
}

/// Makes the device and its node, whose queues are set up.
fn make(
    control: &Control,
    state: &State,
    name: &str,
    forms: &[About],
    device: &dyn Device,
    common: &Common,
) -> Result<(Node, About)> {
    let mut config = vec![0; forms.first().map_or(0, |about| about.config_len)];
    device.read_config(0, &mut config);
    let about = create(control, state, name, forms, &config)?;
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
        for index in 0..about.num_queues {
            node.setup_queue(index, about.queue_size)?;
        }
        if common.bounce != BounceMemory::Kernel {
            node.umem_size(0)?;
        }
        if let Some(bytes) = common.bounce_size {
            sysfs::set_bounce_size(name, bytes)?;
        }
        Ok(node)
    })();
    if outcome.is_err() {
        let _ = control.destroy(name);
    }
    Ok((outcome?, about))
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
