//! Who a thread is and what it may do as that: user, capabilities (capabilities(7)), `no_new_privs`. All of that belongs to
//! a thread, and those that it starts begin with it.

use std::ffi::CString;
use std::io;
use std::os::unix::fs::{MetadataExt, lchown};
use std::path::Path;

use anyhow::{Context, Result, bail};
use nix::unistd::{User, getgrouplist};
use rustix::process::{Gid, Uid};
use rustix::thread::{
    CapabilitySet, CapabilitySets, clear_ambient_capability_set, remove_capability_from_bounding_set,
    set_capabilities, set_keep_capabilities, set_no_new_privs, set_thread_groups, set_thread_res_gid,
    set_thread_res_uid,
};

/// Highest number that a capability may have, whatever the kernel knows.
const LAST: u32 = 63;

/// A user to become.
#[derive(Clone, Debug)]
pub struct Identity {
    uid: Uid,
    gid: Gid,
    groups: Vec<Gid>,
}

impl Identity {
    /// That of the user of this name or number.
    pub fn of(name: &str) -> Result<Identity> {
        let by_number = || name.parse().ok().map(|uid| User::from_uid(nix::unistd::Uid::from_raw(uid)));
        let found = User::from_name(name)
            .and_then(|user| user.map_or_else(|| by_number().unwrap_or(Ok(None)), |user| Ok(Some(user))));
        let Some(user) = found.with_context(|| format!("--user {name}"))? else {
            bail!(
                "--user {name}: there is no such user; make it (useradd --system {name}), or leave --user out"
            );
        };
        let login = CString::new(user.name).context("--user")?;
        let groups = getgrouplist(&login, user.gid).with_context(|| format!("--user {name}: its groups"))?;
        let gid = |gid: nix::unistd::Gid| Gid::from_raw(gid.as_raw());
        Ok(Identity {
            uid: Uid::from_raw(user.uid.as_raw()),
            gid: gid(user.gid),
            groups: groups.into_iter().map(gid).collect(),
        })
    }

    /// Whether that user has this.
    pub fn owns(&self, path: &Path) -> io::Result<bool> {
        Ok(std::fs::metadata(path)?.uid() == self.uid.as_raw())
    }

    /// Has that user have it.
    pub fn own(&self, path: &Path) -> io::Result<()> {
        lchown(path, Some(self.uid.as_raw()), Some(self.gid.as_raw()))
    }

    fn assume(&self) -> io::Result<()> {
        set_thread_groups(&self.groups)?;
        set_thread_res_gid(self.gid, self.gid, self.gid)?;
        set_thread_res_uid(self.uid, self.uid, self.uid)?;
        Ok(())
    }
}

/// No program that this thread, or one that it starts, might ever run has more rights than they.
pub fn forgo_new() -> io::Result<()> {
    Ok(set_no_new_privs(true)?)
}

/// Has the calling thread be nobody but `identity`, with no capability but `keep`.
pub fn reduce(identity: Option<&Identity>, keep: CapabilitySet) -> io::Result<()> {
    if let Some(identity) = identity {
        set_keep_capabilities(true)?;
        identity.assume()?;
        set_keep_capabilities(false)?;
    }
    // Who has none cannot take any out of these either.
    let _ = clear_ambient_capability_set();
    for number in 0..=LAST {
        let one = CapabilitySet::from_bits_retain(1 << number);
        if !keep.contains(one) && remove_capability_from_bounding_set(one).is_err() {
            break;
        }
    }
    let have = rustix::thread::capabilities(None)?.permitted;
    let keep = have & keep;
    Ok(set_capabilities(
        None,
        CapabilitySets { effective: keep, permitted: keep, inheritable: CapabilitySet::empty() },
    )?)
}
