//! Devices of Kickless for the host's own kernel (`virtio_vdpa`: a plain `/dev/vda`) and for `vhost_vdpa`, by way of the
//! kernel's vDPA bus.
//!
//! [`vduse`] is the transport: it makes of the kernel's messages what the engine needs, so that devices run as they do
//! over vhost-user. [`netlink`] is the bus as `vdpa` of iproute2 has it, [`sysfs`] its drivers. On top of them, [`serve`],
//! [`switch`] and [`detach`] are what the program `vdpactl` does, with the command lines of [`cli`]; [`served`] is one device.

pub mod cli;
mod confine;
pub mod detach;
pub mod netlink;
pub mod serve;
pub mod served;
pub mod switch;
pub mod sysfs;
pub mod vduse;
