//! See `poll-engine/tests/fuzzed/sessions.rs`.
#![no_main]
#![allow(dead_code)] // the others

#[path = "../../poll-engine/tests/fuzzed/mod.rs"]
mod fuzzed;

libfuzzer_sys::fuzz_target!(|data: &[u8]| fuzzed::sessions::run(data));
