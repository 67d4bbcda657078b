//! Ethernet addresses, which `sriov` has in common with the switch.

pub use netaddr::MacAddr;
