//! A virtio network device (virtio 1.3, 5.1) on the poll engine.
//!
//! ```text
//! guest TX ring ─► chain ─► header (peeked once) ─► packet ─► where to ─► port ─► one copy ─► guest RX ring | uplink
//! ```
//!
//! A [`hub`] joins ports, one of the [`hubs`] of a process, one for each switch, each port a [`device`] on a socket of its own. On every reactor it has a [`shard`], which forwards
//! packets a [`burst`] at a time ([`tx`]) by the [`exits`] that there are ([`rx`]). [`header`] is what comes before every packet in a ring, and what may be wrong with it,
//! [`packet`] what is to be known of a frame, [`offload`] what is done to it in software, [`rss`] which receive queue it
//! belongs to. [`port`] is what a device can be joined to besides another guest, and [`pcap`] writes down what crosses it, told by a [`witness`] of each hub.
//! [`switch`] says which port a frame goes to. [`join`] makes all that of the options. [`features`] names the feature bits.

pub mod announce;
pub mod api;
pub mod burst;
pub mod captured;
pub mod check;
pub mod cli;
pub mod control;
pub mod control_queue;
pub mod control_state;
pub mod device;
pub mod exits;
pub mod fallback;
pub mod features;
pub mod header;
pub mod hub;
pub mod hubs;
pub mod join;
pub mod mac;
pub mod metrics;
pub mod mib;
pub mod offload;
pub mod outside;
pub mod packet;
pub mod parcel;
pub mod pcap;
pub mod port;
pub mod ports;
pub mod receivers;
pub mod reload;
pub mod report;
pub mod rss;
pub mod rx;
pub mod saved;
pub mod seats;
pub mod served;
pub mod shard;
pub mod spec;
pub mod stats;
pub mod steering;
pub mod switch;
pub mod switches;
mod sync;
pub mod takeover;
pub mod tx;
pub mod witness;
