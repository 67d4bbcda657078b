//! What both ends of a virtqueue agree on, and its driver side (virtio 1.3, 2.7 and 2.8), without the standard library:
//! shared by `poll-engine`, the tests, `vbench`, and guests that run without an operating system.
//!
//! - [`layout`] is the split ring in memory, [`packed`] the packed one: offsets, sizes and atomic access, for both sides.
//! - [`driver`] makes requests available and collects what the device has finished, in either format.
//!
//! The crate knows neither how memory is mapped nor how guest addresses are translated. Whoever makes a layout promises
//! that its memory is there and stays; everything after that is safe.
#![no_std]

extern crate alloc;

pub mod driver;
pub mod layout;
pub mod packed;
