//! What both ends of a virtqueue agree on, and its driver side (virtio 1.3, 2.7), without the standard library:
//! shared by `poll-engine`, the tests, `vbench`, and guests that run without an operating system.
//!
//! - [`layout`] is the ring in memory: offsets, sizes and atomic access, for both sides.
//! - [`driver`] makes requests available and collects what the device has finished.
//!
//! The crate knows neither how memory is mapped nor how guest addresses are translated. Whoever makes a
//! [`layout::SplitLayout`] promises that its memory is there and stays; everything after that is safe.
#![no_std]

extern crate alloc;

pub mod driver;
pub mod layout;
