//! Guest memory as the device sees it: mapped once, translated per request, dropped when nobody uses it.
//!
//! [`map`] turns what the front end shares into immutable snapshots, [`slice`](mod@slice) is the only way to touch
//! guest bytes, [`hold`] keeps a snapshot for as long as a request needs it, [`ram`] is memory of our own in the same form, [`log`] tells which pages were written, [`iotlb`] what a
//! device behind a vIOMMU may touch, [`fault`] survives memory that is taken away,
//! [`userfault`] waits for memory that comes late, [`node`] says where it is, and [`shortfall`] how much of it is
//! missing.

pub mod fault;
pub mod hold;
pub mod iotlb;
pub mod log;
pub mod map;
pub mod node;
pub mod ram;
mod region;
pub mod shortfall;
pub mod slice;
mod stitch;
pub mod userfault;

pub use iotlb::{Access, Miss, Misses};
pub use map::{MapHold, MemoryError, MemoryMap};
pub use ram::Ram;
pub use region::{Region, RegionSpec, RingAddress};
pub use slice::GuestSlice;
