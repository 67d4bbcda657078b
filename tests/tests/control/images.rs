//! Limits, clones, pools of them, and images that are made to need no other, as they are asked for on a command line: what is
//! said about it, and what has become of it.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use kickless_tests::wait;
use serde_json::{Value, json};

use crate::front::{BLOCKS, End, Front};
use crate::model::BLOCK;
use crate::rig::{LIMIT, Rig};

/// Done, and this is said.
fn says(rig: &Rig, args: &[&str]) -> String {
    let out = rig.ctl(args);
    assert!(out.status.success() && out.stderr.is_empty(), "{args:?}: {out:?}");
    String::from_utf8(out.stdout).unwrap()
}

/// The same, as JSON.
fn answers(rig: &Rig, args: &[&str]) -> Value {
    serde_json::from_str(&says(rig, &[&["--json"], args].concat())).unwrap()
}

/// Refused in a line that has this in it.
fn refuses(rig: &Rig, args: &[&str], why: &str) {
    let out = rig.ctl(args);
    let said = String::from_utf8_lossy(&out.stderr);
    let is_right = said.starts_with("vhostctl: ") && said.lines().count() == 1 && said.contains(why);
    assert!(out.status.code() == Some(1) && out.stdout.is_empty() && is_right, "{args:?}: {out:?}");
}

#[test]
fn limits_are_asked_for_on_a_command_line() {
    let mut rig = Rig::start("", &[]);
    rig.add("a", "backend=ram:1M,limit=iops-total=7");
    let kept = || rig.does(200, "GET", "/v1/disks/a/limits", None);
    assert_eq!(answers(&rig, &["limit", "a"]), json!({ "iops-total": 7 }));
    let text = says(&rig, &["limit", "a", "iops-read=1000", "bps-write=100M,bps-write-max=1G"]);
    assert!(text.contains("iops-read") && text.contains("104857600"), "{text}");
    // Those that are not named are none.
    let now = json!({
        "iops-read": 1000, "bps-write": 100 << 20, "bps-write-max": 1 << 30, "bps-write-max-length": 1
    });
    assert_eq!(kept(), now);
    assert_eq!(answers(&rig, &["limit", "a"]), now);
    for (keys, why) in [
        (&["a", "wings=2"][..], "wings"),
        (&["a", "iops-read=few"], "few"),
        (&["a", "iops-read-max=5"], "iops-read"),
        (&["a", "iops-read=5", "iops-read=6"], "twice"),
        (&["b", "iops-read=5"], "there is no disk b"),
        (&["b"], "there is no disk b"),
    ] {
        refuses(&rig, &[&["limit"], keys].concat(), why);
        assert_eq!(kept(), now, "{keys:?}");
    }
    says(&rig, &["save"]);
    let saved = fs::read_to_string(rig.path("blk.toml")).unwrap();
    assert!(saved.contains("iops-read=1000") && !saved.contains("iops-total"), "{saved}");
    rig.restart();
    assert_eq!(answers(&rig, &["limit", "a"]), now);
    says(&rig, &["limit", "a", "none"]);
    assert_eq!(rig.does(200, "GET", "/v1/disks/a/limits", None), json!({}));
    rig.end();
}

/// Its image needs no other, and nothing is under way.
fn is_alone(rig: &Rig, name: &str) -> bool {
    let disk = answers(rig, &["show", name]);
    disk.get("flattening").is_none() && disk.get("backing").is_none()
}

#[test]
fn clones_are_asked_for_on_a_command_line() {
    let mut rig = Rig::start("direct = false\n", &[]);
    let file = |rig: &Rig, name: &str| rig.path(name);
    let path = file(&rig, "base.img");
    fs::File::create(&path).unwrap().set_len((BLOCKS * BLOCK) as u64).unwrap();
    let base = format!("raw:{path}");
    let mut front = Front::new(std::process::id().into(), false);
    front.tracks = false;
    front.model.may_tear = true;
    let load = |front: &mut Front| {
        let mut rounds = 0..40;
        assert_eq!(front.load(|| rounds.next().is_none()).unwrap(), End::Done);
        assert_eq!(front.check().unwrap(), End::Done);
    };
    rig.add("base", &format!("blk-file={path},num-queues=2"));
    front.connect(&rig.scene.path("base.sock")).unwrap();
    load(&mut front);
    says(&rig, &["remove", "base", "--force"]);
    assert_eq!(says(&rig, &["pools"]).trim(), "none");
    let config = rig.path("blk.toml");
    let text = fs::read_to_string(&config).unwrap();
    fs::write(&config, format!("pool = ['{base}:2']\n{text}")).unwrap();
    rig.restart();

    let full = |rig: &Rig| {
        let ready = || {
            Ok((answers(rig, &["pools"]) == json!([{ "base": base, "count": 2, "ready": 2 }])).then_some(()))
        };
        wait::until("a full pool", LIMIT, ready).unwrap();
    };
    full(&rig);
    let text = says(&rig, &["pools"]);
    assert!(text.contains("READY") && text.contains(&base), "{text}");
    let inode = |path: &str| fs::metadata(path).unwrap().ino();
    let ready = [0, 1].map(|i| inode(&format!("{path}.pool-{i}")));
    let pooled = file(&rig, "pooled.qcow2");
    let said = says(&rig, &["clone", &base, &pooled]);
    assert!(said.contains(&pooled) && said.contains(&base), "{said}");
    assert!(ready.contains(&inode(&pooled)), "it was not of the pool");
    full(&rig);
    let other = file(&rig, "other.qcow2");
    refuses(&rig, &["clone", &base, &pooled], "is there already");
    refuses(&rig, &["clone", "cow:/x", &other], "cow");
    refuses(&rig, &["clone", &format!("raw:{other}"), &other], "No such file");
    refuses(&rig, &["clone", &base, &other, "name=c"], "socket-path is missing");
    assert!(!Path::new(&other).exists());

    // What its base holds; and what it is given besides.
    let socket = format!("socket-path={}", rig.path("c.sock"));
    let served = answers(&rig, &["clone", &base, &other, "name=c", &socket, "num-queues=2"]);
    assert_eq!((&served["name"], &served["backing"]), (&json!("c"), &json!(path)), "{served}");
    front.connect(&rig.scene.path("c.sock")).unwrap();
    assert_eq!(front.check().unwrap(), End::Done);
    load(&mut front);

    rig.add("ram", "backend=ram:1M");
    refuses(&rig, &["flatten", "ram"], "is no qcow2 image");
    refuses(&rig, &["flatten", "nobody"], "there is no disk nobody");
    refuses(&rig, &["flatten", "nobody", "--stop"], "there is no disk nobody");
    let stopped = || Ok(answers(&rig, &["show", "c"]).get("flattening").is_none().then_some(()));
    says(&rig, &["flatten", "c"]);
    says(&rig, &["flatten", "c", "--stop"]);
    wait::until("it to stop", LIMIT, stopped).unwrap();
    // However far it has come.
    if !is_alone(&rig, "c") {
        let said = says(&rig, &["flatten", "c"]);
        assert!(said.contains("c.sock"), "{said}");
        wait::until("the end of it", LIMIT, || {
            load(&mut front);
            Ok(is_alone(&rig, "c").then_some(()))
        })
        .unwrap();
    }
    refuses(&rig, &["flatten", "c"], "has no image below it");
    fs::remove_file(&path).unwrap();
    load(&mut front);
    says(&rig, &["remove", "c", "--force"]);
    says(&rig, &["add", "name=c", &socket, &format!("blk-file={other}"), "format=qcow2,num-queues=2"]);
    front.connect(&rig.scene.path("c.sock")).unwrap();
    assert_eq!(front.check().unwrap(), End::Done);
    rig.end();
}
