//! The log as JSON, while front ends do what writes lines as often as they can, and to the end.

use std::os::unix::net::UnixStream;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use kickless_tests::process::{Process, built};
use kickless_tests::scene::Scene;
use kickless_tests::wait;
use serde_json::Value;

use crate::rig::{LIMIT, Rig};

const FLOOD: u64 = 2000;

/// The lines of a log, each of which must be an object with what all have.
fn lines(log: &str) -> Result<Vec<Value>> {
    let parse = |line: &str| {
        let line: Value = serde_json::from_str(line).with_context(|| line.to_owned())?;
        let is_text = |key: &str| line[key].is_string();
        ensure!(["timestamp", "level", "target", "message"].into_iter().all(is_text), "{line}");
        Ok(line)
    };
    log.lines().map(parse).collect()
}

pub fn is_json_and_not_flooded(_: &Scene) -> Result<Option<String>> {
    let mut blk = Rig::start("log = 'json'\n", &[]);
    blk.add("a", "backend=null:1M");
    flood(&mut blk)?;
    let mut net = Rig::start_net("log = 'json'\nswitch = true\npoll = 'event'\n", &[]);
    net.add_port("a", "");
    flood(&mut net)?;
    Ok(None)
}

/// One socket is connected to more often than anybody wants to read.
fn flood(rig: &mut Rig) -> Result<()> {
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
        for line in lines(log)? {
            if line["message"].as_str().is_some_and(|said| said.contains("a: front end connected")) {
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
        std::thread::sleep(Duration::from_millis(300));
        let log = rig.process.stderr();
        // The last line may be under way.
        let (written, left_out) = count(&log[..=log.rfind('\n').unwrap_or(0)])?;
        Ok((written + left_out == connections).then_some((written, left_out)))
    })?;
    ensure!(left_out > FLOOD / 2 && written < FLOOD / 2, "{written} written, {left_out} left out");
    rig.end();
    lines(&rig.process.stderr()).map(drop)
}

/// Why a program ends is its last line, and like the others; of `vdpactl`, too, with or without a bus.
pub fn is_json_to_the_end(scene: &Scene) -> Result<Option<String>> {
    let state = scene.path("state").display().to_string();
    let image = scene.path("nothing").display().to_string();
    for (name, args) in [
        ("vdpactl", &["serve", "blk", "--name=a", "--state-dir", &state, "--blk-file", &image][..]),
        ("vhost-blk", &["--socket-path", &state, "--blk-file", &image]),
        ("vhost-net", &["--socket-path", &state, "--tap=no/such/name"]),
    ] {
        let mut args: Vec<_> = args.iter().map(|&arg| arg.to_owned()).collect();
        args.push("--log=json,off".into());
        let program = built(name).with_context(|| format!("{name} is not built"))?;
        let mut process = Process::spawn(scene, name, &program, &args)?;
        ensure!(!process.wait_exit(LIMIT)?.success(), "{name} goes on");
        let said = lines(&process.stderr())?;
        let [last] = &said[..] else { anyhow::bail!("{name}: {said:?}") };
        ensure!(last["level"] == "ERROR" && last["target"] == name, "{last}");
        let why = last["message"].as_str().unwrap_or_default();
        ensure!(why.contains("no/such/name") || why.contains(&image), "{last}");
    }
    Ok(None)
}
