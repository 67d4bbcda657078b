//! Which emulator and which kernel a virtual machine is made of.

use std::path::{Path, PathBuf};

use super::{QEMU, guest_dir, missing_needs, missing_program};
use crate::process;

/// Where the emulator and the guest's kernel come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Release {
    /// QEMU that is installed, and the kernel of Debian's stable release (`scripts/guest-image.sh`).
    Stable,
    /// QEMU 10 and Linux 6.12 of Debian's backports (`scripts/backports.sh`): emulated SR-IOV cards and disks, an
    /// IOMMU, and a kernel with vDPA.
    Backports,
}

impl Release {
    /// Why a virtual machine of this kind cannot be had here, if it cannot.
    pub fn missing_needs(self) -> Option<String> {
        if self == Self::Stable {
            return missing_needs();
        }
        if let Some(reason) = missing_program() {
            return Some(reason);
        }
        let has_all = self.emulator().is_some()
            && ["vmlinux", "initramfs"].iter().all(|name| self.guest(name).is_file());
        (!has_all).then(|| {
            "no newer kernel and emulator: run scripts/backports.sh, then scripts/guest-image.sh \
             target/guest-backports target/backports/linux"
                .to_owned()
        })
    }

    /// The emulator's program.
    pub(super) fn emulator(self) -> Option<PathBuf> {
        match self {
            Self::Stable => process::find_program(QEMU),
            Self::Backports => {
                Some(workspace().join("target/backports").join(QEMU)).filter(|path| path.is_file())
            }
        }
    }

    /// A file of the guest: `vmlinux`, `initramfs`.
    pub(super) fn guest(self, name: &str) -> PathBuf {
        match self {
            Self::Stable => guest_dir().join(name),
            Self::Backports => workspace().join("target/guest-backports").join(name),
        }
    }
}

fn workspace() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}
