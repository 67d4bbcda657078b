//! The control API of a daemon: HTTP and JSON on a Unix socket.
//!
//! ```text
//! vhostctl, curl ─► socket ─► who is it? ─► router (the program's) ─► one call after the other ─► the program
//! ```
//!
//! One thread of its own serves it, which never touches the data path; what takes long is done on a few others. Nothing
//! listens on a network. [`server`] is the socket, [`common`] the calls that all programs have, [`refused`] why something is
//! not done, [`moving`] how queues get to other reactors, [`saved`] how a file comes to say what holds now, [`problem`] what
//! is said of a call that fails, [`body`] how calls bring what they say, [`client`] the other side; [`stats`] and
//! [`metrics`] are what daemons have done, for views and for Prometheus, [`page`] is such a view, and [`relay`] shows it to
//! browsers.

pub mod body;
pub mod client;
pub mod common;
pub mod metrics;
pub mod moving;
pub mod page;
pub mod problem;
pub mod refused;
pub mod relay;
pub mod saved;
pub mod server;
pub mod stats;
