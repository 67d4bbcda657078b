//! See `poll-engine/tests/fuzzed/records.rs`.
#![no_main]
#![allow(dead_code)] // the others

#[path = "../../poll-engine/tests/fuzzed/mod.rs"]
mod fuzzed;

libfuzzer_sys::fuzz_target!(|data: &[u8]| fuzzed::records::run(data));
