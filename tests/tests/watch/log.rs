//! The log as JSON, while a front end does what writes lines as often as it can.

use std::os::unix::net::UnixStream;

use anyhow::{Context, Result, ensure};
use kickless_tests::scene::Scene;
use kickless_tests::wait;
use serde_json::Value;

use crate::rig::{LIMIT, Rig};

const FLOOD: u64 = 2000;

pub fn is_json_and_not_flooded(_: &Scene) -> Result<Option<String>> {
    let mut rig = Rig::start("log = 'json'\n", &[]);
    rig.add("a", "backend=null:1M");
    let socket = rig.scene.path("a.sock");
    let connect = |times: u64| -> Result<()> {
        for _ in 0..times {
            UnixStream::connect(&socket)?;
        }
        Ok(())
    };
    connect(FLOOD)?;
    let mut connections = FLOOD;
    // Lines of one kind, and how many more there would have been.
    let count = |log: &str| -> Result<(u64, u64)> {
        let (mut written, mut left_out) = (0, 0);
        for line in log.lines() {
            let line: Value = serde_json::from_str(line).with_context(|| line.to_owned())?;
            let message = line["message"].as_str().with_context(|| line.to_string())?;
            ensure!(line["timestamp"].is_string() && line["level"].is_string(), "{line}");
            if message.contains("a: front end connected") {
                match line["left_out"].as_u64() {
                    Some(n) => left_out += n,
                    None => written += 1,
                }
            }
        }
        Ok((written, left_out))
    };
    // What was left out is told when somebody else says something later: all of it, in the end.
    let (written, left_out) = wait::until("all to be told of", LIMIT, || {
        connect(1)?;
        connections += 1;
        std::thread::sleep(std::time::Duration::from_millis(300));
        let log = rig.process.stderr();
        // The last line may be under way.
        let (written, left_out) = count(&log[..=log.rfind('\n').unwrap_or(0)])?;
        Ok((written + left_out == connections).then_some((written, left_out)))
    })?;
    ensure!(left_out > FLOOD / 2 && written < FLOOD / 2, "{written} written, {left_out} left out");
    rig.end();
    Ok(None)
}
