//! What reactors share the forwarding database by. It takes this from here, so that the model checker can run its very file
//! on primitives of its own (`poll-engine/model`).

pub(crate) use std::hash::RandomState;
pub(crate) use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
pub(crate) use std::thread::yield_now;
