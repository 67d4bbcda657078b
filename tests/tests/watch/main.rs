//! What an operator sees of a running daemon, under load: metrics, the view in a terminal, the page in a browser.
#![allow(clippy::unwrap_used)]
#![allow(clippy::needless_pass_by_value)] // bodies are written where they are passed
#![allow(clippy::float_cmp)] // of counts

mod access;
mod browser;
#[path = "../kill/front.rs"]
#[allow(dead_code)] // what kills
mod front;
mod load;
mod log;
mod metrics;
#[path = "../kill/model.rs"]
#[allow(dead_code)]
mod model;
mod page;
#[path = "../control/rig.rs"]
#[allow(dead_code)] // calls that change things
mod rig;
mod top;

use std::process::ExitCode;

use kickless_tests::runner::{self, Test};

fn main() -> ExitCode {
    let tests = vec![
        Test::new("every_metric_is_documented_and_on_the_dashboard", metrics::are_documented, || None),
        Test::new(
            "every_metric_of_ports_is_documented_and_on_the_dashboard",
            metrics::of_ports_are_documented,
            || None,
        ),
        Test::new("prometheus_reads_the_metrics", metrics::are_read, metrics::no_reader),
        Test::new("the_log_is_json_and_not_flooded", log::is_json_and_not_flooded, || None),
        Test::new("the_log_is_json_to_the_end", log::is_json_to_the_end, || None),
        Test::new("access_is_by_mode_and_credentials", access::is_by_mode_and_credentials, access::not_root),
        Test::new("top_is_used_in_a_terminal", top::is_used, || None),
        Test::new("top_shows_ports", top::shows_ports, || None),
        Test::new("limits_that_are_hit_are_seen", top::shows_limits, || None),
        Test::new("the_page_is_only_looked_at", page::is_only_looked_at, || None),
        Test::new("the_page_is_seen_in_a_browser", page::is_seen, browser::missing),
        Test::new("the_page_shows_ports", page::shows_ports, browser::missing),
    ];
    runner::run(tests, "KICKLESS_REQUIRE_WATCH")
}
