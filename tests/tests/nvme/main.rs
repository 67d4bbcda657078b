//! NVMe namespaces as disks, in a Linux 6.12 guest with QEMU's NVMe controller and NVMe over TCP on loopback: by commands of
//! their own where those pass, by the block device where they do not. Our programs are in the guest, and serve them to our
//! load generator, and through VDUSE to the guest's own driver and fio.

mod guest;
mod local;
mod tcp;

use std::process::ExitCode;

use kickless_tests::qemu::release::Release;
use kickless_tests::runner::{self, Test};

fn main() -> ExitCode {
    let needs = || Release::Backports.missing_needs().or_else(guest::missing_program);
    let tests: [(&str, runner::Scenario); 2] =
        [("by_commands", Box::new(local::by_commands)), ("over_tcp", Box::new(tcp::over_tcp))];
    let tests = tests.map(|(name, run)| Test { name: name.into(), needs: Box::new(needs), run });
    runner::run(tests.into(), "KICKLESS_REQUIRE_QEMU")
}
