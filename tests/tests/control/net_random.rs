//! Ports added, removed, pulled, limited and captured at random while two guests of `vbench` send each other packets, all of
//! which must come, whole and in order; and nothing is left behind. `KICKLESS_CONTROL_SECONDS` says how long.

use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use kickless_tests::process::built;
use kickless_tests::random::Random;
use kickless_tests::wait;
use serde_json::{Value, json};

use crate::random::seconds;
use crate::rig::{LIMIT, Rig};

/// Mappings that may be more than at first: the allocator keeps stacks and heaps of threads that have ended.
const KEPT: usize = 100;

#[test]
fn random_changes_of_ports_under_verified_load_lose_and_leak_nothing() {
    let seed = std::process::id().into();
    println!("seed {seed}");
    let mut rig = Rig::start_net("switch = true\npoll = 'event'\n", &[]);
    rig.add_port("a", "wait=on");
    rig.add_port("b", "wait=on");
    let vbench = built("vbench").expect("vbench is not built: cargo build -p vbench");
    // What calls and guests need for themselves is there by now.
    let mut moved = load(&rig, &vbench, seed);
    let (quiet, mapped) = (rig.counts(), rig.mappings());
    let over = AtomicBool::new(false);
    let changes = std::thread::scope(|scope| {
        let loads = scope.spawn(|| {
            while !over.load(Ordering::Acquire) {
                moved += load(&rig, &vbench, seed);
            }
            moved
        });
        let changes = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| change(&rig, seed)));
        over.store(true, Ordering::Release);
        println!("packets that were verified: {}", loads.join().unwrap());
        changes.unwrap_or_else(|e| std::panic::resume_unwind(e))
    });
    println!("changes by kind: {changes:?}");
    for port in rig.does(200, "GET", "/v1/ports", None).as_array().unwrap() {
        let name = port["name"].as_str().unwrap();
        if name.starts_with("extra") {
            rig.does(204, "DELETE", &format!("/v1/ports/{name}"), None);
        }
    }
    wait::until("descriptors, threads and mappings to be as many as at first", LIMIT, || {
        let now = rig.counts();
        Ok((now.0 <= quiet.0 && now.1 <= quiet.1 && rig.mappings() <= mapped + KEPT).then_some(()))
    })
    .unwrap_or_else(|e| {
        panic!("{e}: {quiet:?} and {mapped} at first, {:?} and {} now", rig.counts(), rig.mappings())
    });
    rig.end();
}

/// Two guests that come, send each other packets, and go: how many packets.
fn load(rig: &Rig, vbench: &Path, seed: u64) -> u64 {
    let sockets = ["a", "b"].map(|name| format!("--socket-path={}", rig.path(&format!("{name}.sock"))));
    let mut vbench = Command::new(vbench);
    vbench.arg("net").args(sockets).arg(format!("--randseed={}", seed & 0xffff));
    let kind = [
        "--size=imix",
        "--iodepth=8",
        "--max-loss=0",
        "--runtime=1",
        "--drain-time=60",
        "--completion=interrupt",
    ];
    let out = vbench.args(kind).arg("--json=-").output().unwrap();
    let text = String::from_utf8_lossy(&out.stdout);
    assert!(out.status.success(), "{text}\n{}", String::from_utf8_lossy(&out.stderr));
    let said: Value = serde_json::from_str(&text).unwrap_or_else(|e| panic!("{e}: {text}"));
    let sum = |key: &str| found(&said, key).unwrap_or_else(|| panic!("no {key} in {said}"));
    for wrong in ["lost", "reordered", "duplicates", "corrupt", "foreign", "error"] {
        assert_eq!(sum(wrong), 0, "{wrong}: {said}");
    }
    assert!(sum("received") > 0, "{said}");
    sum("received")
}

/// A number of this name, the outermost one there is.
fn found(value: &Value, key: &str) -> Option<u64> {
    let own = value.get(key).and_then(Value::as_u64);
    let inner = || match value {
        Value::Object(object) => object.values().find_map(|value| found(value, key)),
        Value::Array(items) => items.iter().find_map(|value| found(value, key)),
        _ => None,
    };
    own.or_else(inner)
}

/// Changes things until the time is over: how often each was done.
fn change(rig: &Rig, seed: u64) -> [usize; 6] {
    let mut random = Random(seed);
    let mut extra: Vec<String> = Vec::new();
    let mut done = [0; 6];
    let mut fresh = 0;
    let until = Instant::now() + Duration::from_secs(seconds());
    while Instant::now() < until {
        let kind = random.below(done.len());
        match kind {
            0 if extra.len() < 20 => {
                fresh += 1;
                let new = format!("extra{fresh}");
                rig.add_port(&new, ["", "vlan=5", "wait=on", "isolated=on,tx-pps=9"][random.below(4)]);
                extra.push(new);
            }
            1 if !extra.is_empty() => {
                let old = extra.swap_remove(random.below(extra.len()));
                rig.does(204, "DELETE", &format!("/v1/ports/{old}"), None);
            }
            2 if !extra.is_empty() => {
                let (name, up) = (&extra[random.below(extra.len())], random.below(2) == 0);
                let port = rig.does(200, "PUT", &format!("/v1/ports/{name}/link"), Some(json!({ "up": up })));
                assert_eq!(port["up"], up);
            }
            3 => {
                // None that holds anybody up.
                let limits = [json!({}), json!({ "tx-bps": "100G", "rx-pps": 1_000_000_000u64 })];
                let limits = limits[random.below(2)].clone();
                rig.does(
                    200,
                    "PUT",
                    &format!("/v1/ports/{}/limits", ["a", "b"][random.below(2)]),
                    Some(limits),
                );
            }
            4 => {
                let poll = ["busy", "adaptive", "event"][random.below(3)];
                rig.does(200, "PUT", "/v1/poll", Some(json!({ "poll": poll })));
            }
            5 => {
                fresh += 1;
                let file = rig.path(&format!("capture{fresh}"));
                rig.does(200, "PUT", "/v1/capture", Some(json!({ "file": file, "filter": "arp" })));
                rig.does(204, "DELETE", "/v1/capture", None);
                std::fs::remove_file(file).unwrap();
            }
            _ => continue,
        }
        done[kind] += 1;
    }
    rig.does(200, "PUT", "/v1/poll", Some(json!({ "poll": "event" })));
    done
}
