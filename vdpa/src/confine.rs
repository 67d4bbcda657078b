//! What `vdpactl` gives up once its devices are where they are wanted, as the daemons do (`daemon::confine`).

use std::path::PathBuf;

use anyhow::{Context, Result};
use daemon::confine::{CapabilitySet, Confinement, Options, Places};

use crate::cli::Common;
use crate::sysfs::Driver;

fn options(common: &Common) -> Options {
    Options { sandbox: common.sandbox, ..Options::default() }
}

/// Has threads that begin from now on be confined, and the first one once it is sealed. Sockets are in these directories.
pub(crate) fn threads(
    common: &Common,
    driver: Option<Driver>,
    sockets: Vec<PathBuf>,
) -> Result<Confinement> {
    let state = &common.state_dir;
    std::fs::create_dir_all(state).with_context(|| format!("{} (see --state-dir)", state.display()))?;
    // Whether a disk is in use is asked by opening it, and a device is forgotten in the end.
    let places =
        Places { sockets, read: vec![PathBuf::from("/dev")], remove: vec![state.clone()], ..Places::default() };
    // Whoever has put it on the bus takes it away from there.
    let keep = driver.map_or(CapabilitySet::empty(), |_| CapabilitySet::NET_ADMIN);
    options(common).threads(None, &places, keep)
}

/// Has this thread, and all that it starts from now on, be confined as far as those can be that open an interface of the
/// host's again when it comes back.
pub(crate) fn seal_coarsely(common: &Common) -> Result<()> {
    options(common).seal_coarsely(None, CapabilitySet::NET_ADMIN | CapabilitySet::NET_RAW)
}
