//! Devices on the vDPA bus of a Linux 6.12 guest, in which our program serves them through VDUSE: the guest's own drivers
//! use them, and the `virtio-driver` crate by way of vhost-vdpa.
//!
//! This program is in the guest as well, where it is that client.

mod block;
mod client;
mod confined;
mod datagrams;
mod guest;
mod nested;
mod net;

use std::process::ExitCode;

use kickless_tests::qemu::release::Release;
use kickless_tests::runner::{self, Test};

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().collect();
    if let [_, mode, node] = args.as_slice()
        && mode == "client"
    {
        client::exercise(node);
        return ExitCode::SUCCESS;
    }
    if let [_, mode, what @ ..] = args.as_slice()
        && mode == "datagrams"
    {
        let done = datagrams::main(what).inspect_err(|e| eprintln!("{e:#}"));
        return if done.is_ok() { ExitCode::SUCCESS } else { ExitCode::FAILURE };
    }
    let needs = || Release::Backports.missing_needs().or_else(guest::missing_program);
    let tests: [(&str, runner::Scenario); 2] =
        [("disks", Box::new(block::disks)), ("network_card", Box::new(net::network_card))];
    let tests = tests.map(|(name, run)| Test { name: name.into(), needs: Box::new(needs), run });
    runner::run(tests.into(), "KICKLESS_REQUIRE_QEMU")
}
