//! A virtio device of ours on the kernel's vDPA bus, through VDUSE.
//!
//! ```text
//! kernel: vdpa bus ─ vduse ─► /dev/vduse/NAME ─► server (answers) ─► session ─► memory map, ring config, notifier ─► engine
//! ```
//!
//! [`uapi`] is what the kernel's header says, [`edge`] the system calls, [`node`] the calls by their meaning, [`memory`] the
//! kernel's translations, `session` what is done for the driver, [`server`] its threads, [`state`] what outlives them.

pub mod edge;
pub mod memory;
pub mod node;
pub mod server;
mod session;
pub mod state;
pub mod uapi;
