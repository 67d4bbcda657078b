//! The vhost-user session: a codec ([`wire`]), a state machine without I/O ([`state`], with the device's
//! [`status`]), a socket ([`socket`]), the place where front ends connect ([`listen`]), what is logged while a guest
//! migrates ([`logging`]), and the control thread that joins them to a device ([`serve`]).

pub mod inflight;
pub mod listen;
pub mod logging;
pub mod serve;
pub mod socket;
pub mod state;
pub mod status;
pub mod wire;
