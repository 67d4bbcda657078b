//! What a program is told about its own process, on the command line or in its file.

use anyhow::Result;
use clap::Args;

use crate::confine::Identity;
use crate::file::File;
use crate::{confine, takeover};

/// The options.
#[derive(Args, Clone, Debug, Default)]
#[group(skip)]
pub struct ProcessOptions {
    /// Live upgrade.
    #[command(flatten)]
    pub upgrade: takeover::Options,

    /// Confinement.
    #[command(flatten)]
    pub confine: confine::Options,
}

/// Of each of these options that a file may say some value, there and on the command line: for the tests of those who have
/// them.
pub const EXAMPLES: [(&str, &str); 3] =
    [("--control=/c", "control = '/c'"), ("--sandbox=off", "sandbox = false"), ("--user=107", "user = 107")];

impl ProcessOptions {
    /// Those of a file.
    pub fn of(file: &File) -> Result<ProcessOptions> {
        Ok(ProcessOptions { upgrade: file.parse()?, confine: file.parse()? })
    }

    /// These, and those of a file for what these leave open.
    #[must_use]
    pub fn or(&self, file: &ProcessOptions) -> ProcessOptions {
        let (upgrade, confine) = (&self.upgrade, &self.confine);
        ProcessOptions {
            upgrade: takeover::Options {
                control: upgrade.control.clone().or_else(|| file.upgrade.control.clone()),
                takeover: upgrade.takeover.clone(),
            },
            confine: confine::Options {
                sandbox: confine.sandbox.or(file.confine.sandbox),
                user: confine.user.clone().or_else(|| file.confine.user.clone()),
                chroot: confine.chroot.clone(),
            },
        }
    }

    /// Who to become: whom the command line names (`named`, looked up before the root changed), or the file.
    pub fn identity(&self, named: Option<Identity>) -> Result<Option<Identity>> {
        named.map_or_else(|| self.confine.identity(), |identity| Ok(Some(identity)))
    }
}
