//! The bodies of the fuzz targets (`fuzz/`), which needs a toolchain of its own, on random bytes and on the seeds.
#![allow(clippy::unwrap_used)]

mod fuzzed;

use std::path::Path;

use proptest::prelude::*;

fn seeds(target: &str, run: fn(&[u8])) {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/seeds").join(target);
    let mut count = 0;
    for seed in std::fs::read_dir(&dir).unwrap() {
        run(&std::fs::read(seed.unwrap().path()).unwrap());
        count += 1;
    }
    assert!(count > 0, "no seeds in {}", dir.display());
}

#[test]
fn seeds_of_rings() {
    seeds("rings", fuzzed::rings::run);
}

#[test]
fn seeds_of_records() {
    seeds("records", fuzzed::records::run);
}

#[test]
fn seeds_of_sessions() {
    seeds("sessions", fuzzed::sessions::run);
}

proptest! {
    #[test]
    fn rings(data in prop::collection::vec(any::<u8>(), 0..600)) {
        fuzzed::rings::run(&data);
    }

    #[test]
    fn records(data in prop::collection::vec(any::<u8>(), 0..400)) {
        fuzzed::records::run(&data);
    }

    #[test]
    fn sessions(data in prop::collection::vec(any::<u8>(), 0..800)) {
        fuzzed::sessions::run(&data);
    }
}
