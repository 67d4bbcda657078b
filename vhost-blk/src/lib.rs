//! A virtio block device (virtio 1.3, 5.2) on the poll engine.
//!
//! ```text
//! chain ─► request (pure parser) ─► queue ─► backend/{null, ram, sync, uring} ─► queue: status byte, used length
//! ```
//!
//! [`disk`] is what all queues of a device share, [`device`] is its face to the engine, [`image`] opens one as it
//! was asked for, [`open`] finds out what a file can do before anything starts, [`lock`] keeps other writers away,
//! [`clone`](mod@clone) makes one that begins as another is and [`pool`] keeps some ready,
//! [`record`] writes down what was asked for, [`limits`] is how much may be done and [`throttle`] keeps to it,
//! [`share`] is what disks leave each other, [`faults`] are what is to go wrong on purpose,
//! [`spec`] and [`cli`] are what a disk and a daemon are asked to be, and [`check`] whether that goes together,
//! [`exports`] are the disks of a running daemon and what can change of them, [`api`] and [`metrics`] how that is asked for,
//! [`saved`] how it gets into the file,
//! [`takeover`] is what a newer process needs to know of a disk to go on with it.

pub mod api;
pub mod backend;
pub mod check;
pub mod cli;
pub mod clone;
pub mod device;
pub mod disk;
pub mod exports;
pub mod faults;
pub mod image;
pub mod limits;
pub mod lock;
pub mod metrics;
pub mod open;
pub mod pool;
pub mod queue;
pub mod record;
pub mod report;
pub mod request;
pub mod saved;
pub mod share;
pub mod spec;
pub mod takeover;
pub mod throttle;
