//! Everything between a vhost-user socket and a virtio device: session, guest memory, rings and reactors.
//!
//! ```text
//! front end ──► session ──► memory ──► RingConfig ──► mailbox              control threads
//! ═══════════════════════════════════════════════════════════════════════════════════════
//! avail ring ─► chain ─► request ─► back end ─► io_uring ─► completion ─► used ring ─► notifier
//!   ring/        ring/    the device's handler     uring.rs                 ring/       engine/
//! ```
//!
//! - [`device`] is what a device implements: [`device::Device`] and [`device::QueueHandler`].
//! - [`session`] speaks vhost-user, once for every device.
//! - [`memory`] maps what the front end shares and translates guest addresses.
//! - [`ring`] is both sides of a virtqueue.
//! - [`engine`] runs queues on pinned threads; [`uring`] is a thread's way into the kernel.
//! - [`stats`] counts; [`limit`] lets pass no more than a rate; [`words`] takes records from reactors to whoever writes
//!   them down.
//! - `probes` are where `bpftrace` can look on.
//! - [`confine`] is where threads give up what they do not need.
//! - [`takeover`] hands all of it to another process while guests run.
//!
//! Control and data never share a lock: a queue is moved into its reactor to run and moved out to stop, and everything
//! said to it in between goes through the reactor's mailbox.

pub mod clock;
pub mod confine;
pub mod device;
pub mod engine;
pub mod fault_point;
pub mod limit;
pub mod memory;
mod probes;
pub mod ring;
pub mod session;
pub mod stats;
pub mod sync;
pub mod takeover;
pub mod uring;
pub mod words;
