//! The vhost-user session: a codec ([`wire`]), a state machine without I/O ([`state`], its words in [`action`], with
//! the device's [`status`]), a socket ([`socket`]), the place where front ends connect ([`listen`]), what is logged while a guest
//! migrates ([`logging`]) and what its device takes along ([`device_state`]), how one comes before its memory
//! (`postcopy`), memory that is added twice (`repeats`), the control thread of a device ([`server`]) and what it does for each front end ([`serve`]),
//! with the translations of a device behind a vIOMMU (`iommu`), or with each when another process takes over
//! ([`handover`]).

pub mod action;
pub mod device_state;
pub mod handover;
pub mod inflight;
mod iommu;
pub mod listen;
pub mod logging;
mod postcopy;
mod repeats;
pub mod serve;
pub mod server;
pub mod socket;
pub mod state;
pub mod status;
pub mod wire;
