//! Block devices of the host over files.

use std::fs::OpenOptions;
use std::path::{Path, PathBuf};
use std::process::Command;

/// A loop device, given back when dropped.
#[derive(Debug)]
pub struct Loop(PathBuf);

impl Loop {
    /// One over a file, with sectors of so many bytes. An error is why there is none.
    pub fn over(file: &Path, sector: u32) -> Result<Loop, String> {
        let mut losetup = Command::new("losetup");
        losetup.args(["--find", "--show", "--sector-size", &sector.to_string()]).arg(file);
        let output = losetup.output().map_err(|e| format!("losetup: {e}"))?;
        let device = String::from_utf8_lossy(&output.stdout).trim().to_owned();
        if !output.status.success() || device.is_empty() {
            return Err(String::from_utf8_lossy(&output.stderr).trim().to_owned());
        }
        let device = Loop(device.into());
        let opened = OpenOptions::new().read(true).write(true).open(&device.0);
        opened.map_err(|e| format!("{}: {e}", device.0.display()))?;
        Ok(device)
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup").arg("--detach").arg(&self.0).status();
    }
}
