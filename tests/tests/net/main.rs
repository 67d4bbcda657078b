//! Linux guests in QEMU on network cards of ours: two of them on a switch, and one on a tap of the host's.
//!
//! Booting takes longest, so a scenario is many steps with the same guests; each says what it took. Where a need is not
//! met a test ends as ignored, with the reason; with `KICKLESS_REQUIRE_NET` set it fails instead.

mod guests;
mod switch;
mod tap;

use kickless_tests::netns::Netns;
use kickless_tests::runner::{self, Test};
use kickless_tests::{net, qemu};

fn main() -> std::process::ExitCode {
    let needs = || net::missing_needs().or_else(qemu::missing_needs);
    let tests = switch::ALL.iter().map(|&(name, scenario)| Test {
        name: format!("switch::{name}"),
        needs: Box::new(needs),
        run: Box::new(scenario),
    });
    let taps = tap::ALL.iter().map(|&(name, scenario)| Test {
        name: format!("tap::{name}"),
        needs: Box::new(move || needs().or_else(Netns::missing_needs).or_else(tap::missing_needs)),
        run: Box::new(scenario),
    });
    runner::run(tests.chain(taps).collect(), "KICKLESS_REQUIRE_NET")
}
