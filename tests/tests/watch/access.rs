//! Who may use the API's socket, by its file's mode and by who it is.

use std::fs;
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::Path;
use std::process::{Command, Output};

use anyhow::Result;
use kickless_tests::process::{self, built};
use kickless_tests::scene::Scene;

use crate::rig::Rig;

/// Of nobody's here.
const GROUP: u32 = 54321;
const NOBODY: u32 = 65534;

pub fn not_root() -> Option<String> {
    (!nix::unistd::geteuid().is_root()).then(|| "it takes root to be another user".into())
}

/// `vhostctl list` by nobody, with these groups.
fn list_as(rig: &Rig, gid: u32, further: &str) -> Result<Output> {
    let copy = rig.path("vhostctl");
    process::copy(&built("vhostctl").expect("cargo build -p vhostctl"), Path::new(&copy))?;
    let mut setpriv = Command::new("setpriv");
    setpriv.arg(format!("--reuid={NOBODY}")).arg(format!("--regid={gid}")).arg(further);
    Ok(setpriv.args(["--", &copy, "--api", &rig.path("api"), "list"]).output()?)
}

pub fn is_by_mode_and_credentials(_: &Scene) -> Result<Option<String>> {
    let scene = Scene::new()?;
    // New files there are of the directory's group.
    chown(scene.path("."), None, Some(GROUP))?;
    fs::set_permissions(scene.path("."), PermissionsExt::from_mode(0o2755))?;
    let mut rig = Rig::start_in(scene, "api-mode = 660\n", &[]);
    let may = |gid, further: &str| -> Result<bool> { Ok(list_as(&rig, gid, further)?.status.success()) };
    let refused = |why: &str| -> Result<()> {
        let out = list_as(&rig, NOBODY, "--clear-groups")?;
        let said = String::from_utf8_lossy(&out.stderr);
        anyhow::ensure!(!out.status.success() && said.contains(why), "{said}");
        Ok(())
    };
    assert!(may(GROUP, "--clear-groups")?, "its own group");
    assert!(may(NOBODY, &format!("--groups={GROUP}"))?, "one of its groups");
    refused("Permission denied")?;
    // Whatever the file says now, the group is let in and others are not.
    fs::set_permissions(rig.path("api"), PermissionsExt::from_mode(0o666))?;
    assert!(may(GROUP, "--clear-groups")?);
    refused(&format!("group {GROUP} if"))?;
    rig.end();
    Ok(None)
}
