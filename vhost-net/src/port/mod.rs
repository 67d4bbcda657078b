//! What a device can be joined to besides another guest.

pub mod tap;
