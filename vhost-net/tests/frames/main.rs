//! Headers, frames and what is done with them, against `etherparse` and against plain code of the tests' own.

mod header;
mod offload;
mod packet;
mod rss;
mod support;
