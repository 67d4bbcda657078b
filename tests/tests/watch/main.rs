//! What an operator sees of a running daemon, under load: metrics, the view in a terminal, the page in a browser.
#![allow(clippy::unwrap_used)]
#![allow(clippy::needless_pass_by_value)] // bodies are written where they are passed
#![allow(clippy::float_cmp)] // of counts

#[path = "../kill/front.rs"]
#[allow(dead_code)] // what kills
mod front;
mod load;
mod metrics;
#[path = "../kill/model.rs"]
#[allow(dead_code)]
mod model;
#[path = "../control/rig.rs"]
#[allow(dead_code)] // calls that change things
mod rig;

use std::process::ExitCode;

use kickless_tests::runner::{self, Test};

fn main() -> ExitCode {
    let tests = vec![
        Test::new("every_metric_is_documented_and_on_the_dashboard", metrics::are_documented, || None),
        Test::new("prometheus_reads_the_metrics", metrics::are_read, metrics::no_reader),
    ];
    runner::run(tests, "KICKLESS_REQUIRE_WATCH")
}
