//! Uplinks over a pair of virtual interfaces and over a tap, in a network namespace of the test's own.

#[path = "../../../poll-engine/tests/support/peer.rs"]
mod peer;

mod af_packet;
mod af_xdp;
#[path = "../forward/guest.rs"]
#[allow(dead_code)] // each test program uses its part
mod guest;
mod pair;
mod switched;
mod switches;
mod tap;

use libtest_mimic::{Arguments, Failed, Trial};

/// A test, for which there is to be such a pair.
pub type Test = (&'static str, fn());

fn main() {
    let args = Arguments::from_args();
    let lacking = pair::lacking();
    if let Some(why) = &lacking {
        eprintln!("ignored: {why}");
    }
    let trial = |(name, run): Test| {
        let test = move || -> Result<(), Failed> {
            pair::alone(run);
            Ok(())
        };
        Trial::test(name, test).with_ignored_flag(lacking.is_some())
    };
    let tests = af_packet::TESTS
        .iter()
        .chain(af_xdp::TESTS)
        .chain(switched::TESTS)
        .chain(switches::TESTS)
        .chain(tap::TESTS);
    libtest_mimic::run(&args, tests.copied().map(trial).collect()).exit();
}
