//! A virtio network device (virtio 1.3, 5.1) on the poll engine.
//!
//! ```text
//! guest TX ring ─► chain ─► header (peeked once) ─► packet ─► where to ─► port ─► one copy ─► guest RX ring | uplink
//! ```
//!
//! [`header`] is what comes before every packet in a ring, and what may be wrong with it. [`port`] is what a device can
//! be joined to besides another guest. [`switch`] says which port a frame goes to.
//! [`features`] names the feature bits.

pub mod features;
pub mod header;
pub mod mac;
pub mod port;
pub mod switch;
