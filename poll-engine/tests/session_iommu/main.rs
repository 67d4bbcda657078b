//! A device behind a vIOMMU: what it misses is asked for and waited for by its queue alone, what is permitted is kept
//! to, and what is taken back is not touched any more from the acknowledgement on.
#![allow(clippy::unwrap_used)]

mod asking;
mod front;
mod handover;
mod invalidation;
mod limits;
mod rings;
#[path = "../support/mod.rs"]
mod support;
