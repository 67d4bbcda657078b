//! Where reactors run: on the CPUs that are named, or where they fit best.

use std::path::Path;

use anyhow::{Context, Result};
use poll_engine::engine::placement::auto::{Cpus, Plan, Wish, choose};
use poll_engine::engine::placement::topology::{SYSFS, Topology, node_of_file, node_of_interface};
use poll_engine::engine::placement::{CpuList, usable_cpus};

use crate::file::{Step, Wrong};
use crate::running::RunOptions;

impl RunOptions {
    /// What does not go together.
    pub fn check(&self) -> Result<(), Wrong> {
        let alone = match (&self.cpus, &self.housekeeping, &self.guest_cpus) {
            (Some(Cpus::Auto(_)), ..) | (_, None, None) => return Ok(()),
            (_, Some(_), _) => "housekeeping",
            _ => "guest-cpus",
        };
        let why = "only --cpus auto chooses, and keeps off other CPUs";
        Err(Wrong::new(&[Step::Key(alone)], format!("--{alone} goes with --cpus auto: {why}")))
    }

    /// The CPUs of reactors; and if they were chosen, for `devices` with their nodes, why these.
    pub fn place(&self, devices: &[(String, Option<usize>)]) -> Result<(CpuList, Option<Plan>)> {
        let count = match &self.cpus {
            None => return Ok((CpuList::default(), None)),
            Some(Cpus::These(cpus)) => return Ok((cpus.clone(), None)),
            Some(Cpus::Auto(count)) => *count,
        };
        let usable = usable_cpus().context("which CPUs this process may run on")?;
        let list = |cpus: &Option<CpuList>| cpus.as_ref().map_or_else(Vec::new, |list| list.0.clone());
        let (housekeeping, guests) = (list(&self.housekeeping), list(&self.guest_cpus));
        let wish = Wish { count, devices, usable: &usable, housekeeping: &housekeeping, guests: &guests };
        let plan = choose(&Topology::read(Path::new(SYSFS)), &wish).context("--cpus auto")?;
        Ok((plan.cpus.clone(), Some(plan)))
    }
}

/// What a file is on.
pub fn of_file(name: String, path: Option<&Path>) -> (String, Option<usize>) {
    (name, path.and_then(|path| node_of_file(Path::new(SYSFS), path)))
}

/// What an interface is on.
pub fn of_interface(name: &str) -> (String, Option<usize>) {
    (name.to_owned(), node_of_interface(Path::new(SYSFS), name))
}
