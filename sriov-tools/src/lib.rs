//! Virtual functions (SR-IOV) set up, described and handed out.
//!
//! ```text
//! sysfs, netlink, /proc ──► State ─┐
//!                                  ├─► plan (pure) ──► steps ──► apply ──► sysfs, netlink
//! file, command line ────► Wanted ─┘                               │ a step fails: plan from what is there now
//!                                                                  └► to what was before, and apply that
//! ```
//!
//! Functions are named by their PCI addresses; numbers of IOMMU groups, which change at boot, are only shown. All that is
//! written goes through [`host::Host`], which is this machine or a directory that describes one.

pub mod apply;
pub mod cli;
pub mod export;
pub mod file;
pub mod host;
pub mod netlink;
pub mod pci;
pub mod plan;
pub mod state;
pub mod sysfs;
pub mod table;
pub mod vfio;
