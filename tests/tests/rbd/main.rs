//! Images of a real Ceph cluster of one node (`scripts/rbd-cluster.sh`), by a daemon that is built with RBD
//! (`scripts/rbd-test.sh`).
#![allow(clippy::unwrap_used)]

#[path = "../blk/mod.rs"]
mod blk;
mod cluster;
mod linux;
mod lock;
mod requests;

use std::process::ExitCode;

use kickless_tests::qemu;
use kickless_tests::runner::{self, Test};

fn main() -> ExitCode {
    let tests = vec![
        Test::new("requests", requests::requests, cluster::missing),
        Test::new("lock", lock::lock, cluster::missing),
        Test::new("linux", linux::linux, || cluster::missing().or_else(qemu::missing_needs)),
    ];
    runner::run(tests, "KICKLESS_REQUIRE_RBD")
}
