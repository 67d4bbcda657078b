//! Images of Ceph's block devices (RBD) by librbd, in a program that is built with it (`--features rbd`).

mod address;

#[cfg(not(feature = "rbd"))]
mod absent;
#[cfg(feature = "rbd")]
mod ffi;
#[cfg(feature = "rbd")]
mod image;
#[cfg(feature = "rbd")]
mod queue;

#[cfg(not(feature = "rbd"))]
pub use self::absent::{RbdBackend, RbdError, RbdImage};
pub use self::address::{Address, is_address};
#[cfg(feature = "rbd")]
pub use self::image::{RbdError, RbdImage};
#[cfg(feature = "rbd")]
pub use self::queue::RbdBackend;
