//! What `vdpactl` gives up once its devices are where they are wanted, as the daemons do (`daemon::confine`).

use std::path::PathBuf;

use anyhow::{Context, Result};
use daemon::confine::{CapabilitySet, Confinement, Options, Places};

use crate::cli::Common;
use crate::sysfs::Driver;

/// Has threads that begin from now on be confined, and the first one once it is sealed. Sockets are in these directories;
/// an interface of the host's may have to be opened again.
pub(crate) fn threads(
    common: &Common,
    driver: Option<Driver>,
    sockets: Vec<PathBuf>,
    opens: bool,
) -> Result<Confinement> {
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
    // Whoever has put it on the bus takes it away from there.
    let keep = driver.map_or(CapabilitySet::empty(), |_| CapabilitySet::NET_ADMIN);
    Options { sandbox: Some(common.sandbox), ..Options::default() }.threads(None, &places, keep)
}
