//! Disks added, removed, paused, moved and recorded at random while guests that verify all they read load two of them; and
//! nothing is left behind. `KICKLESS_CONTROL_SECONDS` says how long.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use kickless_tests::image::Image;
use kickless_tests::random::Random;
use kickless_tests::wait;
use serde_json::json;

use crate::front::{BLOCKS, End, Front};
use crate::model::BLOCK;
use crate::rig::{LIMIT, Rig};

pub fn seconds() -> u64 {
    std::env::var("KICKLESS_CONTROL_SECONDS").ok().and_then(|n| n.parse().ok()).unwrap_or(10)
}

#[test]
fn random_changes_under_verified_load_lose_and_leak_nothing() {
    let seed = std::process::id().into();
    println!("seed {seed}");
    let mut rig = Rig::start("", &[]);
    let names = ["loaded", "packed"];
    for name in names {
        let image = Image::create(&rig.scene, &format!("{name}.img"), (BLOCKS * BLOCK) as u64).unwrap();
        let direct = if image.takes_direct_io() { "on" } else { "off" };
        let spec = format!("blk-file={},num-queues=4,direct={direct}", image.path().display());
        rig.add(name, &spec);
    }
    // What calls need for themselves is there by now.
    let quiet = rig.counts();
    let over = AtomicBool::new(false);
    let changes = std::thread::scope(|scope| {
        let loads: Vec<_> = names
            .iter()
            .map(|name| {
                let (socket, over) = (rig.scene.path(&format!("{name}.sock")), &over);
                let packed = *name == "packed";
                scope.spawn(move || {
                    let mut front = Front::new(seed, packed);
                    front.model.may_tear = true;
                    front.connect(&socket).unwrap();
                    assert_eq!(front.load(|| over.load(Ordering::Acquire)).unwrap(), End::Done);
                    assert_eq!(front.check().unwrap(), End::Done);
                    (front.model.reads, front.model.writes)
                })
            })
            .collect();
        let changes = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| change(&rig, seed, &names)));
        over.store(true, Ordering::Release);
        let served: Vec<_> = loads.into_iter().map(|load| load.join().unwrap()).collect();
        println!("reads and writes that were verified: {served:?}");
        assert!(served.iter().all(|(reads, writes)| *reads > 0 && *writes > 0));
        changes.unwrap_or_else(|e| std::panic::resume_unwind(e))
    });
    println!("changes by kind: {changes:?}");
    let disks = rig.does(200, "GET", "/v1/disks", None);
    for disk in disks.as_array().unwrap() {
        assert_eq!(disk["all"]["errors"], 0, "{disk}");
        let name = disk["name"].as_str().unwrap();
        if !names.contains(&name) {
            rig.does(204, "DELETE", &format!("/v1/disks/{name}?force=true"), None);
        }
    }
    let reactors = rig.does(200, "GET", "/v1/reactors", None);
    for reactor in reactors.as_array().unwrap().iter().skip(1) {
        rig.does(204, "DELETE", &format!("/v1/reactors/{}", reactor["reactor"]), None);
    }
    // Threads of calls end a while after the last one.
    wait::until("descriptors and threads to be as many as at first", LIMIT, || {
        let now = rig.counts();
        Ok((now.0 <= quiet.0 && now.1 <= quiet.1).then_some(()))
    })
    .unwrap_or_else(|e| panic!("{e}: {:?} at first, {:?} now", quiet, rig.counts()));
    rig.end();
}

/// Changes things until the time is over: how often each was done.
fn change(rig: &Rig, seed: u64, loaded: &[&str]) -> [usize; 8] {
    let mut random = Random(seed);
    let mut extra: Vec<String> = Vec::new();
    let mut done = [0; 8];
    let mut fresh = 0;
    let until = Instant::now() + Duration::from_secs(seconds());
    while Instant::now() < until {
        let kind = random.below(8);
        let name = loaded[random.below(loaded.len())];
        match kind {
            0 if extra.len() < 20 => {
                fresh += 1;
                let new = format!("extra{fresh}");
                rig.add(&new, &format!("backend={}:1M,num-queues=2", ["ram", "null"][random.below(2)]));
                extra.push(new);
            }
            1 if !extra.is_empty() => {
                let old = extra.swap_remove(random.below(extra.len()));
                rig.does(204, "DELETE", &format!("/v1/disks/{old}"), None);
            }
            2 => {
                assert_eq!(rig.does(200, "POST", &format!("/v1/disks/{name}/pause"), None)["paused"], true);
                let requests = |disk: &serde_json::Value| disk["all"]["requests"].clone();
                let before = requests(&rig.disk(name));
                std::thread::sleep(Duration::from_millis(random.below(20) as u64));
                assert_eq!(requests(&rig.disk(name)), before, "{name} was served while paused");
                rig.does(200, "POST", &format!("/v1/disks/{name}/resume"), None);
            }
            3 => {
                let reactors = rig.does(200, "GET", "/v1/reactors", None);
                let reactors = reactors.as_array().unwrap();
                let to = reactors[random.below(reactors.len())]["reactor"].clone();
                let disk = rig.does(
                    200,
                    "PUT",
                    &format!("/v1/disks/{name}/reactor"),
                    Some(json!({ "reactor": to })),
                );
                let queues = disk["queues"].as_array().unwrap();
                assert!(queues.iter().filter_map(|q| q.get("reactor")).all(|r| *r == to), "{disk}");
            }
            4 if rig.does(200, "GET", "/v1/reactors", None).as_array().unwrap().len() < 4 => {
                rig.does(201, "POST", "/v1/reactors", Some(json!({})));
            }
            5 => {
                let reactors = rig.does(200, "GET", "/v1/reactors", None);
                let reactors = reactors.as_array().unwrap();
                if reactors.len() > 1 {
                    let which = &reactors[random.below(reactors.len())]["reactor"];
                    rig.does(204, "DELETE", &format!("/v1/reactors/{which}"), None);
                }
            }
            6 => {
                let poll = ["busy", "adaptive", "event"][random.below(3)];
                rig.does(200, "PUT", "/v1/poll", Some(json!({ "poll": poll })));
            }
            7 => {
                fresh += 1;
                let file = rig.path(&format!("capture{fresh}"));
                let call = format!("/v1/disks/{name}/record");
                rig.does(200, "PUT", &call, Some(json!({ "file": file })));
                rig.does(200, "DELETE", &call, None);
                std::fs::remove_file(file).unwrap();
            }
            _ => continue,
        }
        done[kind] += 1;
    }
    rig.does(200, "PUT", "/v1/poll", Some(json!({ "poll": "adaptive" })));
    done
}
