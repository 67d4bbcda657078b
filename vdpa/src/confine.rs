//! What `vdpactl` gives up once its devices are where they are wanted, as the daemons do (`daemon::confine`).

use std::path::PathBuf;

use anyhow::{Context, Result};
use daemon::confine::{CapabilitySet, Confinement, Identity, Places};

use crate::cli::Common;
use crate::sysfs::Driver;

/// A process on its way to giving up its rights.
pub(crate) struct Confined {
    confinement: Confinement,
    identity: Option<Identity>,
    state: PathBuf,
}

/// Has threads that begin from now on be confined, and the first one once it is sealed. Sockets are in these directories;
/// an interface of the host's may have to be opened again.
pub(crate) fn threads(
    common: &Common,
    identity: Option<Identity>,
    driver: Option<Driver>,
    sockets: Vec<PathBuf>,
    opens: bool,
) -> Result<Confined> {
    let state = &common.state_dir;
    std::fs::create_dir_all(state).with_context(|| format!("{} (see --state-dir)", state.display()))?;
    let places = Places {
        sockets,
        // Whether a disk is in use is asked by opening it.
        read: vec![PathBuf::from("/dev")],
        devices: opens.then(|| PathBuf::from("/dev/net")).into_iter().collect(),
        // A device is forgotten in the end.
        remove: vec![state.clone()],
        ..Places::default()
    };
    // Whoever has put it on the bus takes it away from there, and asks before; a user may not open every disk.
    let keep = match (driver, &identity) {
        (None, _) => CapabilitySet::empty(),
        (Some(_), None) => CapabilitySet::NET_ADMIN,
        (Some(_), Some(_)) => CapabilitySet::NET_ADMIN | CapabilitySet::DAC_READ_SEARCH,
    };
    let confinement = common.confine.threads(identity.clone(), &places, keep)?;
    Ok(Confined { confinement, identity, state: state.clone() })
}

impl Confined {
    /// Gives up what nobody needs any more who serves devices of these names.
    pub fn seal<'a>(&self, names: impl Iterator<Item = &'a str>) -> Result<()> {
        if let Some(identity) = &self.identity
            && identity.owns(&self.state)?
        {
            // In the end each device is forgotten.
            names.map(|name| self.state.join(name)).try_for_each(|state| identity.own(&state))?;
        }
        self.confinement.seal()
    }
}
