//! Scenarios with a real guest: QEMU attaches to the daemon and Linux drives the disk.
//!
//! `scripts/guest-image.sh` builds the guest. Where a need is not met every test ends as ignored, with the reason;
//! with `KICKLESS_REQUIRE_QEMU` set it fails instead.

mod scenarios;

use kickless_tests::qemu;
use kickless_tests::runner::{self, Test};

fn main() -> std::process::ExitCode {
    let split = scenarios::ALL.iter().map(|&(name, scenario)| Test {
        name: name.to_owned(),
        needs: Box::new(qemu::missing_needs),
        run: Box::new(scenario),
    });
    let packed = scenarios::PACKED.iter().map(|&(name, scenario)| Test {
        name: format!("packed::{name}"),
        needs: Box::new(qemu::missing_needs),
        run: Box::new(move |scene| {
            scene.use_packed();
            scenario(scene)
        }),
    });
    runner::run(split.chain(packed).collect(), "KICKLESS_REQUIRE_QEMU")
}
