//! Linux as a guest of a scenario.

use anyhow::{Result, bail};

use crate::scenario::{Guest, Plan};
use crate::scene::Scene;

/// Why Linux cannot be had in a machine of ours, if it cannot.
pub fn missing_needs() -> Option<String> {
    Some("not there yet".to_owned())
}

/// Boots in a machine of ours.
pub fn boot_kvm(_plan: &Plan, _scene: &Scene) -> Result<Box<dyn Guest>> {
    bail!("not there yet")
}

/// Boots in QEMU.
pub fn boot_qemu(_plan: &Plan, _scene: &Scene) -> Result<Box<dyn Guest>> {
    bail!("not there yet")
}
