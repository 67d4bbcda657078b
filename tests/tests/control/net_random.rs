//! Ports added, removed, pulled, limited, paused and captured, and switches that come and go, at random while two guests of `vbench` send each other packets,
//! all of which must come, whole and in order; the same with reactors that come and go; and nothing is left behind.
//! `KICKLESS_CONTROL_SECONDS` says how long.

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

/// All that no packet is lost by.
const HARMLESS: &[usize] = &[0, 1, 2, 3, 4, 5, 6, 10];
/// With reactors that come and go.
const MOVING: &[usize] = &[0, 1, 3, 4, 6, 7, 7, 8, 9, 10];
const KINDS: usize = 11;

#[test]
fn random_changes_of_ports_under_verified_load_lose_and_leak_nothing() {
    let came = changed(HARMLESS, seconds(), |rig, seed, over| {
        let mut came = 0;
        while !over.load(Ordering::Acquire) {
            came += load(rig, seed, &[]);
        }
        came
    });
    println!("packets that were verified: {came}");
}

/// Queues that move take nobody's packets: each comes once and in order, or is counted by a port.
#[test]
fn queues_that_move_at_random_lose_nothing_that_is_not_counted() {
    let half = seconds().div_ceil(2);
    changed(MOVING, half, |rig, seed, _| {
        let before = drops(rig);
        // A pace, as a loop of packets that wait for each other would stop when one is lost.
        let (runtime, kind) =
            (format!("--runtime={half}"), ["--rate-pps=4k", "--max-loss=100", "--drain-time=5"]);
        let said = vbench(rig, seed, &[&kind[..], &[&runtime]].concat());
        let [came, lost] = ["received", "lost"].map(|key| found(&said, key).unwrap());
        let counted = drops(rig) - before;
        println!("packets that were verified: {came}; lost: {lost}, counted: {counted}");
        assert!(came > 1000 && lost <= counted, "{said}");
        came
    });
}

/// What ports have dropped.
fn drops(rig: &Rig) -> u64 {
    let stats = rig.does(200, "GET", "/v1/stats", None);
    let of = |export: &Value| {
        export["drops"].as_object().map_or(0, |all| all.values().filter_map(Value::as_u64).sum())
    };
    stats["exports"].as_array().unwrap().iter().map(of).sum()
}

/// Changes things for so long while guests load ports `a` and `b`: what they say. Nothing is left behind.
fn changed(kinds: &[usize], seconds: u64, loads: impl FnOnce(&Rig, u64, &AtomicBool) -> u64 + Send) -> u64 {
    let seed = std::process::id().into();
    println!("seed {seed}");
    let mut rig = Rig::start_net("poll = 'event'\n[[switch]]\n[[switch]]\nname = 'other'\n", &[]);
    rig.add_port("a", "wait=on");
    rig.add_port("b", "wait=on");
    // What calls and guests need for themselves is there by now.
    load(&rig, seed, &[]);
    let (quiet, mapped) = (rig.counts(), rig.mappings());
    let over = AtomicBool::new(false);
    let (came, changes) = std::thread::scope(|scope| {
        let loads = scope.spawn(|| loads(&rig, seed, &over));
        let change = || change(&rig, seed, kinds, seconds);
        let changes = std::panic::catch_unwind(std::panic::AssertUnwindSafe(change));
        over.store(true, Ordering::Release);
        let came = loads.join();
        (came.unwrap(), changes.unwrap_or_else(|e| std::panic::resume_unwind(e)))
    });
    println!("changes by kind: {changes:?}");
    for port in rig.does(200, "GET", "/v1/ports", None).as_array().unwrap() {
        let name = port["name"].as_str().unwrap();
        if name.starts_with("extra") {
            rig.does(204, "DELETE", &format!("/v1/ports/{name}"), None);
        }
    }
    for number in reactors(&rig).split_off(1) {
        rig.does(204, "DELETE", &format!("/v1/reactors/{number}"), None);
    }
    wait::until("descriptors, threads and mappings to be as many as at first", LIMIT, || {
        let now = rig.counts();
        Ok((now.0 <= quiet.0 && now.1 <= quiet.1 && rig.mappings() <= mapped + KEPT).then_some(()))
    })
    .unwrap_or_else(|e| {
        panic!("{e}: {quiet:?} and {mapped} at first, {:?} and {} now", rig.counts(), rig.mappings())
    });
    rig.end();
    came
}

/// Two guests that come, send each other packets, and go: how many packets, of which none was lost.
pub fn load(rig: &Rig, seed: u64, options: &[&str]) -> u64 {
    let kind = ["--iodepth=8", "--max-loss=0", "--runtime=1", "--drain-time=60"];
    let said = vbench(rig, seed, &[&kind[..], options].concat());
    assert_eq!(found(&said, "lost"), Some(0), "{said}");
    let came = found(&said, "received").unwrap();
    assert!(came > 0, "{said}");
    came
}

/// What two guests say who have sent each other packets: none out of order, twice, broken or somebody else's.
fn vbench(rig: &Rig, seed: u64, options: &[&str]) -> Value {
    let vbench = built("vbench").expect("vbench is not built: cargo build -p vbench");
    let sockets = ["a", "b"].map(|name| format!("--socket-path={}", rig.path(&format!("{name}.sock"))));
    let mut vbench = Command::new(vbench);
    vbench.arg("net").args(sockets).arg(format!("--randseed={}", seed & 0xffff)).args(options);
    let out = vbench.args(["--size=imix", "--completion=interrupt", "--json=-"]).output().unwrap();
    let text = String::from_utf8_lossy(&out.stdout);
    assert!(out.status.success(), "{text}\n{}", String::from_utf8_lossy(&out.stderr));
    let said: Value = serde_json::from_str(&text).unwrap_or_else(|e| panic!("{e}: {text}"));
    for wrong in ["reordered", "duplicates", "corrupt", "foreign", "error"] {
        assert_eq!(found(&said, wrong), Some(0), "{wrong}: {said}");
    }
    said
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
fn change(rig: &Rig, seed: u64, kinds: &[usize], seconds: u64) -> [usize; KINDS] {
    let mut random = Random(seed);
    let mut extra: Vec<String> = Vec::new();
    let mut done = [0; KINDS];
    let mut fresh = 0;
    let until = Instant::now() + Duration::from_secs(seconds);
    while Instant::now() < until {
        let kind = kinds[random.below(kinds.len())];
        let name = ["a", "b"][random.below(2)];
        match kind {
            0 if extra.len() < 20 => {
                fresh += 1;
                let new = format!("extra{fresh}");
                let rules =
                    ["", "vlan=5", "wait=on", "isolated=on,tx-pps=9", "switch=other", "switch=other,vlan=5"];
                rig.add_port(&new, rules[random.below(rules.len())]);
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
                rig.does(200, "PUT", &format!("/v1/ports/{name}/limits"), Some(limits));
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
            6 => {
                let call = |what: &str| rig.does(200, "POST", &format!("/v1/ports/{name}/{what}"), None);
                assert_eq!(call("pause")["paused"], true);
                // What was taken is answered, and nothing else is taken.
                let sent = || rig.port(name)["tx"]["packets"].clone();
                let before = sent();
                std::thread::sleep(Duration::from_millis(random.below(20) as u64));
                assert_eq!(sent(), before, "{name} was served while paused");
                call("resume");
            }
            7 => {
                let all = reactors(rig);
                let to = all[random.below(all.len())];
                let mut body = json!({ "reactor": to });
                if let queue @ 0..2 = random.below(4) {
                    body["queue"] = json!(queue);
                }
                rig.does(200, "PUT", &format!("/v1/ports/{name}/reactor"), Some(body));
            }
            8 if reactors(rig).len() < 4 => {
                rig.does(201, "POST", "/v1/reactors", Some(json!({})));
            }
            9 => {
                let all = reactors(rig);
                if all.len() > 1 {
                    let which = all[random.below(all.len())];
                    rig.does(204, "DELETE", &format!("/v1/reactors/{which}"), None);
                }
            }
            10 => {
                fresh += 1;
                let (switch, port) = (format!("switch{fresh}"), format!("passing{fresh}"));
                rig.does(201, "POST", "/v1/switches", Some(json!({ "name": switch })));
                rig.add_port(&port, &format!("switch={switch}"));
                rig.does(204, "DELETE", &format!("/v1/ports/{port}"), None);
                rig.does(204, "DELETE", &format!("/v1/switches/{switch}"), None);
            }
            _ => continue,
        }
        done[kind] += 1;
    }
    rig.does(200, "PUT", "/v1/poll", Some(json!({ "poll": "event" })));
    done
}

/// Their numbers.
fn reactors(rig: &Rig) -> Vec<u64> {
    let all = rig.does(200, "GET", "/v1/reactors", None);
    all.as_array().unwrap().iter().filter_map(|reactor| reactor["reactor"].as_u64()).collect()
}
