//! Scenarios with a real guest: QEMU attaches to the daemon and Linux drives the disk.
//!
//! `scripts/guest-image.sh` builds the guest. Where a need is not met every test ends as ignored, with the reason;
//! with `KICKLESS_REQUIRE_QEMU` set it fails instead.

mod scenarios;

use kickless_tests::daemon::Kind;
use kickless_tests::qemu;
use kickless_tests::scene::Scene;
use libtest_mimic::{Arguments, Completion, Failed, Trial};

fn main() -> std::process::ExitCode {
    let mut args = Arguments::from_args();
    // A guest under emulation keeps more than one processor busy.
    args.test_threads.get_or_insert(1);
    let trials = scenarios::ALL
        .iter()
        .map(|&(name, scenario)| Trial::ignorable_test(name, move || attempt(scenario)))
        .collect();
    libtest_mimic::run(&args, trials).exit_code()
}

/// Runs one scenario; what it leaves in its logs is part of the message when it fails.
fn attempt(scenario: scenarios::Scenario) -> Result<Completion, Failed> {
    if let Some(reason) = missing_needs() {
        if std::env::var_os("KICKLESS_REQUIRE_QEMU").is_some() {
            return Err(reason.into());
        }
        return Ok(Completion::ignored_with(reason));
    }
    let scene = Scene::new().map_err(|error| format!("{error:#}"))?;
    match scenario(&scene) {
        Ok(None) => Ok(Completion::Completed),
        Ok(Some(reason)) => Ok(Completion::ignored_with(reason)),
        Err(error) => Err(format!("{error:#}\n{}", scene.report()).into()),
    }
}

fn missing_needs() -> Option<String> {
    if Kind::from_env().program().is_none() {
        return Some("no daemon: run cargo build, or set KICKLESS_BIN_DIR".to_owned());
    }
    qemu::missing_needs()
}
