//! What is asked of the kernel over netlink: interfaces, VFs and routes, and embedded switches.

pub mod devlink;
pub mod route;
