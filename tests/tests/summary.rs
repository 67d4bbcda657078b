//! `scripts/test.sh summary`: the end of a run, which may be all of it that is kept.
#![allow(clippy::unwrap_used)]

use std::path::Path;
use std::process::Command;

/// What the script makes of a log, and whether it calls it good.
fn summary(log: &str) -> (String, bool) {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), log).unwrap();
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../scripts/test.sh");
    let output = Command::new(script).arg("summary").arg(file.path()).output().unwrap();
    (String::from_utf8(output.stdout).unwrap(), output.status.success())
}

#[test]
fn failed_tests_are_listed_with_their_reasons() {
    let long: Vec<String> = (0..30).map(|n| format!("line {n} {}", "x".repeat(300))).collect();
    let many = long.join("\n");
    let log = format!(
        "     Running tests/qemu.rs (target/debug/deps/qemu-1)\n\
         running 4 tests\n\
         test good ... ok\n\
         test bad ... FAILED\n\
         test talkative ... accelerator: tcg\n\
         FAILED\n\
         test absent ... ignored, no such thing\n\n\
         failures:\n\n\
         ---- bad ----\n\
         the load: not within 90s\n\
         \n\
         ---- end of daemon.log\n\
         vhost-blk: listening\n\n\
         ---- talkative ----\n\
         {many}\n\
         failures:\n    bad\n    talkative\n\n\
         test result: FAILED. 1 passed; 2 failed; 1 ignored; 0 measured; 0 filtered out\n\n\
         error: test failed, to rerun pass `--test qemu`\n\
         \x20    Running unittests src/lib.rs (target/debug/deps/lib-2)\n\
         running 1 test\n\
         test bad ... FAILED\n\n\
         failures:\n\n\
         ---- bad stdout ----\n\
         some output of its own\n\
         thread 'bad' (7) panicked at src/lib.rs:5:9:\n\
         assertion failed: one\n\
         note: run with `RUST_BACKTRACE=1` environment variable to display a backtrace\n\n\n\
         failures:\n    bad\n\n\
         test result: FAILED. 0 passed; 1 failed; 0 ignored; 0 measured; 0 filtered out\n"
    );
    let cut: Vec<String> = long[..12].iter().map(|line| format!("      {}\n", &line[..200])).collect();
    let cut = cut.concat();
    let want = format!(
        "\nskipped:\n  absent: no such thing\n\
         \nfailed:\n\
         \x20 bad\n      the load: not within 90s\n      ---- end of daemon.log\n      vhost-blk: listening\n\
         \x20 talkative\n{cut}\
         \x20 bad\n      thread 'bad' (7) panicked at src/lib.rs:5:9:\n      assertion failed: one\n\
         \ntotal: 1 passed, 3 failed, 1 skipped\n"
    );
    let (found, good) = summary(&log);
    assert_eq!(found, want);
    assert!(!good);
}

#[test]
fn a_run_without_failures_ends_with_its_totals() {
    let log = "running 2 tests\ntest a ... ok\ntest b ... ok\n\n\
               test result: ok. 2 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out\n";
    assert_eq!(summary(log), ("\ntotal: 2 passed, 0 failed, 0 skipped\n".to_owned(), true));
}

#[test]
fn a_binary_that_dies_counts_as_failed() {
    let log = "     Running tests/a.rs (target/debug/deps/a-1)\nrunning 2 tests\ntest a ... ok\n\
               \x20    Running tests/b.rs (target/debug/deps/b-1)\nrunning 1 test\ntest b ... ok\n\n\
               test result: ok. 1 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out\n";
    let want = "\nfailed:\n  (died) Running tests/a.rs (target/debug/deps/a-1)\n\ntotal: 1 passed, 1 failed, 0 skipped\n";
    assert_eq!(summary(log), (want.to_owned(), false));
}
