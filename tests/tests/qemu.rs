//! Scenarios with a real guest: QEMU attaches to the daemon and Linux drives the disk.
//!
//! `scripts/guest-image.sh` builds the guest. Where a need is not met every test ends as ignored, with the reason;
//! with `KICKLESS_REQUIRE_QEMU` set it fails instead.

mod scenarios;

use kickless_tests::qemu;
use kickless_tests::runner::{self, Test};

fn main() -> std::process::ExitCode {
    let tests = scenarios::ALL.iter().map(|&(name, scenario)| Test {
        name: name.to_owned(),
        needs: Box::new(qemu::missing_needs),
        run: Box::new(scenario),
    });
    runner::run(tests.collect(), "KICKLESS_REQUIRE_QEMU")
}
