//! What a thread may do with files and sockets by their names: Landlock, as far as the kernel has it (landlock(7)). It holds
//! for io_uring as well. Descriptors that are open stay what they are.

use std::io;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use landlock::{
    ABI, Access, AccessFs, AccessNet, BitFlags, CompatLevel, Compatible, PathBeneath, PathFd, Ruleset,
    RulesetAttr, RulesetCreated, RulesetCreatedAttr, Scope,
};

use super::install::landlock_abi;

/// What the rules are written for; an older kernel leaves out what it does not know.
const KNOWN: ABI = ABI::V7;

/// Directories in which something is still to be done by name.
#[derive(Clone, Debug, Default)]
pub struct Places {
    /// Socket files, and what a start that fails has made, are moved and removed.
    pub sockets: Vec<PathBuf>,
    /// Files are read, again or later.
    pub read: Vec<PathBuf>,
    /// Files are made, opened, replaced and removed.
    pub write: Vec<PathBuf>,
    /// Devices are opened and told things, by those that open interfaces of the host's again.
    pub devices: Vec<PathBuf>,
    /// Directories are removed with what is in them.
    pub remove: Vec<PathBuf>,
}

impl Places {
    /// The directory that `file` is in.
    pub fn directory_of(file: &Path) -> PathBuf {
        match file.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent.to_owned(),
            _ => PathBuf::from("."),
        }
    }

    /// With what is asked for over the API as well: in these directories, or if there are none, anywhere; and the file that
    /// changes are saved to.
    pub fn for_api(&mut self, allowed: &[PathBuf], config: Option<&Path>) {
        self.write.extend_from_slice(allowed);
        self.write.extend(config.map(Places::directory_of));
        if allowed.is_empty() {
            self.write.push(PathBuf::from("/"));
        }
        // Of which groups somebody is.
        self.read.push(PathBuf::from("/proc"));
    }

    /// What of these a session does: nothing but sockets.
    #[must_use]
    pub fn of_sockets(&self) -> Places {
        Places { sockets: self.sockets.clone(), ..Places::default() }
    }

    /// What of these an opener does: nothing but devices.
    #[must_use]
    pub fn of_devices(&self) -> Places {
        Places { devices: self.devices.clone(), ..Places::default() }
    }
}

/// Rules, ready for any number of threads. `None` is a kernel without Landlock.
#[derive(Debug)]
pub struct Rules(Option<RulesetCreated>);

impl Rules {
    /// Rules by which nothing can be done but this.
    pub fn new(places: &Places) -> Result<Rules> {
        if landlock_abi().is_err() {
            return Ok(Rules(None));
        }
        let sockets = AccessFs::MakeSock | AccessFs::RemoveFile;
        let read = AccessFs::ReadFile | AccessFs::ReadDir;
        let make = AccessFs::MakeReg | AccessFs::Refer;
        let write = read | sockets | make | AccessFs::WriteFile | AccessFs::Truncate;
        let remove = AccessFs::ReadDir | AccessFs::RemoveFile | AccessFs::RemoveDir;
        let created = Ruleset::default()
            .set_compatibility(CompatLevel::BestEffort)
            .handle_access(AccessFs::from_all(KNOWN))?
            .handle_access(AccessNet::from_all(KNOWN))?
            .scope(scopes())?
            .create()?;
        let tell = AccessFs::ReadFile | AccessFs::WriteFile | AccessFs::IoctlDev;
        let Places { sockets: s, read: r, write: w, devices: d, remove: gone } = places;
        let rules = [(s, sockets), (r, read), (w, write), (d, tell), (gone, remove)];
        let created = rules.into_iter().try_fold(created, |created, (paths, access)| {
            // What is not there will be told of by whoever wants to open something in it.
            paths.iter().filter(|path| path.exists()).try_fold(created, |created, path| {
                let fd = PathFd::new(path).with_context(|| format!("cannot open {}", path.display()))?;
                anyhow::Ok(created.add_rule(PathBeneath::new(fd, access))?)
            })
        })?;
        Ok(Rules(Some(created)))
    }

    /// Holds the calling thread to them, and those that it starts from now on.
    pub fn hold(&self) -> io::Result<()> {
        let Some(rules) = &self.0 else { return Ok(()) };
        rules.try_clone()?.restrict_self().map(drop).map_err(io::Error::other)
    }
}

/// A service manager that listens on an abstract socket is outside.
fn scopes() -> BitFlags<Scope> {
    let is_abstract =
        std::env::var_os("NOTIFY_SOCKET").is_some_and(|s| s.as_encoded_bytes().starts_with(b"@"));
    if is_abstract { Scope::Signal.into() } else { Scope::from_all(KNOWN) }
}

/// What the kernel has of it, for the log, and what it lacks.
pub fn support() -> (Option<String>, Option<&'static str>) {
    match landlock_abi() {
        Ok(abi) => {
            let lacks = match abi {
                ..2 => Some("Landlock's limits of renames, truncation, TCP and signals (Linux 5.19 to 6.12)"),
                2 => Some("Landlock's limits of truncation, TCP and signals (Linux 6.2 to 6.12)"),
                3 => Some("Landlock's limits of TCP and signals (Linux 6.7 to 6.12)"),
                4 | 5 => Some("Landlock's limits of signals (Linux 6.12)"),
                _ => None,
            };
            (Some(format!("Landlock ABI {abi}")), lacks)
        }
        Err(e) if e.raw_os_error() == Some(libc::EOPNOTSUPP) => {
            (None, Some("Landlock (it is not among lsm= on the kernel's command line)"))
        }
        Err(_) => (None, Some("Landlock (CONFIG_SECURITY_LANDLOCK, from Linux 5.13 on)")),
    }
}
