//! A running daemon that is asked, and told, what to do: every call and what it refuses, under load, by many disks, and by
//! somebody who reads the API's description and then says anything.
#![allow(clippy::unwrap_used)]
#![allow(clippy::needless_pass_by_value)] // bodies are written where they are passed

#[path = "../kill/front.rs"]
#[allow(dead_code)] // what kills
mod front;
mod fuzz;
mod images;
mod many;
#[path = "../kill/model.rs"]
#[allow(dead_code)]
mod model;
mod net;
mod net_random;
mod outside;
mod random;
mod removal;
mod rig;
mod upgrade;

use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Command;

use kickless_tests::image::Image;
use kickless_tests::process::{self, built};
use kickless_tests::wait;
use nix::sys::signal::Signal;
use rig::{LIMIT, Rig};
use serde_json::json;

#[test]
fn disks_come_and_go() {
    let mut rig = Rig::start("", &[]);
    let image = Image::create(&rig.scene, "disk.img", 1 << 20).unwrap();
    let (socket, path) = (rig.path("a.sock"), image.path().display().to_string());
    let disk =
        json!({ "name": "a", "socket-path": socket, "blk-file": path, "num-queues": 3, "read-only": true });
    let added = rig.does(201, "POST", "/v1/disks", Some(disk.clone()));
    assert_eq!(
        (&added["name"], &added["bytes"], &added["image"]),
        (&json!("a"), &json!(1 << 20), &json!(path))
    );
    assert_eq!((added["queues"].as_array().unwrap().len(), &added["read-only"]), (3, &json!(true)));
    assert_eq!(rig.does(200, "GET", "/v1/disks", None).as_array().unwrap().len(), 1);
    assert_eq!(rig.does(200, "GET", "/v1/daemon", None)["disks"], 1);

    // What others have.
    let said = rig.refuses(409, "POST", "/v1/disks", Some(disk.clone()));
    assert!(said.contains("two disks have the socket"), "{said}");
    let again = json!({ "name": "b", "socket-path": rig.path("b.sock"), "blk-file": path });
    assert!(rig.refuses(409, "POST", "/v1/disks", Some(again)).contains("another process reads it"));
    // What cannot be.
    for (body, key, said) in [
        (
            json!({ "socket-path": "/x", "blk-file": "/f", "num-queues": 0 }),
            Some("num-queues"),
            "1 to 256 queues",
        ),
        (json!({ "socket-path": "/x", "blk-file": "/f", "wings": 2 }), None, "unknown field `wings`"),
        (json!({ "socket-path": "/x" }), None, "blk-file or backend is missing"),
        (json!({ "blk-file": "/f" }), None, "socket-path is missing"),
        (
            json!({ "socket-path": "/x", "backend": "null:512", "block-size": 4096 }),
            Some("backend"),
            "no multiple",
        ),
        (json!({ "fd": 3, "backend": "null:512" }), Some("fd"), "inherits nothing"),
        (json!({ "socket-path": "/x", "blk-file": "/dev/fd/3" }), Some("blk-file"), "inherits nothing"),
        (json!([]), None, "socket-path is missing"),
    ] {
        rig.finds_fault("/v1/disks", &body, key, said);
    }
    let missing = json!({ "socket-path": rig.path("c.sock"), "blk-file": rig.path("none") });
    assert!(rig.refuses(409, "POST", "/v1/disks", Some(missing)).contains("No such file"));

    // Somebody is there.
    let front = UnixStream::connect(&socket).unwrap();
    wait::until("the front end", LIMIT, || Ok((rig.disk("a")["attached"] == true).then_some(()))).unwrap();
    assert!(rig.refuses(409, "DELETE", "/v1/disks/a", None).contains("a front end is connected"));
    rig.does(204, "DELETE", "/v1/disks/a?force=true", None);
    drop(front);
    assert!(rig.refuses(404, "DELETE", "/v1/disks/a", None).contains("there is no disk a"));
    assert!(!std::path::Path::new(&socket).exists());
    // The image is free again.
    rig.does(201, "POST", "/v1/disks", Some(disk));
    rig.does(204, "DELETE", "/v1/disks/a", None);
    rig.end();
}

#[test]
fn disks_grow_and_are_recorded() {
    let mut rig = Rig::start("", &[]);
    let image = Image::create(&rig.scene, "disk.img", 1 << 20).unwrap();
    rig.add("a", &format!("blk-file={}", image.path().display()));
    rig.add("ram", "backend=ram:1M");
    assert_eq!(rig.does(200, "POST", "/v1/disks/a/grow", Some(json!({})))["bytes"], 1 << 20);
    image.resize(2 << 20).unwrap();
    assert_eq!(rig.does(200, "POST", "/v1/disks/a/grow", None)["bytes"], 2 << 20);
    assert_eq!(rig.does(200, "POST", "/v1/disks/a/grow", Some(json!({ "size": "4M" })))["bytes"], 4 << 20);
    assert_eq!(std::fs::metadata(image.path()).unwrap().len(), 4 << 20);
    assert!(
        rig.refuses(400, "POST", "/v1/disks/a/grow", Some(json!({ "size": "1M" }))).contains("never shrinks")
    );
    assert!(
        rig.refuses(400, "POST", "/v1/disks/a/grow", Some(json!({ "size": "x" }))).contains("is no size")
    );
    assert!(rig.refuses(409, "POST", "/v1/disks/ram/grow", None).contains("is no image"));

    let capture = rig.path("capture");
    let body = json!({ "file": capture });
    assert_eq!(rig.does(200, "PUT", "/v1/disks/a/record", Some(body.clone()))["record"], json!(capture));
    assert!(rig.refuses(409, "PUT", "/v1/disks/a/record", Some(body.clone())).contains("recorded already"));
    assert!(rig.does(200, "DELETE", "/v1/disks/a/record", None).get("record").is_none());
    assert!(rig.refuses(409, "PUT", "/v1/disks/a/record", Some(body)).contains("exists"));
    assert!(std::fs::metadata(&capture).unwrap().len() > 0);
    rig.end();
}

#[test]
fn reactors_come_and_go_and_wait_in_other_ways() {
    let mut rig = Rig::start("", &[]);
    rig.add("a", "backend=null:1M,num-queues=2");
    assert!(rig.refuses(409, "DELETE", "/v1/reactors/0", None).contains("the only reactor"));
    assert_eq!(rig.does(201, "POST", "/v1/reactors", Some(json!({}))).as_array().unwrap().len(), 2);
    assert!(
        rig.refuses(400, "POST", "/v1/reactors", Some(json!({ "cpu": 99999 }))).contains("cannot be used")
    );
    rig.does(200, "PUT", "/v1/disks/a/reactor", Some(json!({ "reactor": 1 })));
    assert!(
        rig.refuses(400, "PUT", "/v1/disks/a/reactor", Some(json!({ "reactor": 7 })))
            .contains("no reactor 7")
    );
    let body = json!({ "reactor": 1, "queue": 2 });
    assert!(rig.refuses(400, "PUT", "/v1/disks/a/reactor", Some(body)).contains("queues 0 to 1"));
    rig.does(204, "DELETE", "/v1/reactors/0", None);
    assert!(rig.refuses(404, "DELETE", "/v1/reactors/0", None).contains("there is no reactor 0"));
    assert_eq!(rig.does(200, "GET", "/v1/reactors", None), json!([{ "reactor": 1, "queues": 0 }]));
    assert_eq!(rig.does(200, "PUT", "/v1/poll", Some(json!({ "poll": "busy" }))), json!({ "poll": "busy" }));
    assert_eq!(rig.does(200, "GET", "/v1/poll", None), json!({ "poll": "busy" }));
    assert!(rig.refuses(400, "PUT", "/v1/poll", Some(json!({ "poll": "x" }))).contains("none of busy"));
    rig.end();
}

#[test]
fn what_has_changed_is_saved_and_is_there_after_a_restart() {
    let mut rig = Rig::start("# Ours.\npoll = 'event'\n", &[]);
    rig.add("a", "backend=null:1M");
    rig.add("b", "backend=ram:1M,num-queues=2,cache=writethrough");
    rig.does(200, "PUT", "/v1/poll", Some(json!({ "poll": "adaptive" })));
    rig.does(200, "POST", "/v1/save", None);
    rig.does(204, "DELETE", "/v1/disks/a", None);
    rig.does(200, "POST", "/v1/save", None);
    rig.restart();
    let disks = rig.does(200, "GET", "/v1/disks", None);
    assert_eq!((disks.as_array().unwrap().len(), &disks[0]["name"]), (1, &json!("b")));
    assert_eq!(rig.does(200, "GET", "/v1/poll", None), json!({ "poll": "adaptive" }));
    assert!(std::fs::read_to_string(rig.path("blk.toml")).unwrap().starts_with("# Ours.\n"));
    rig.end();

    let mut rig = Rig::with_options(&["--poll=event"]);
    assert!(rig.refuses(409, "POST", "/v1/save", None).contains("start the daemon with --config"));
    rig.end();
}

#[test]
fn who_may_not_use_the_socket_is_told_so() {
    let mut rig = Rig::start("api-mode = 666\n", &[]);
    let mode = |rig: &Rig| std::fs::metadata(rig.path("api")).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(&rig), 0o666);
    rig.end();
    let mut rig = Rig::start("", &[]);
    assert_eq!(mode(&rig), 0o600);
    if nix::unistd::geteuid().is_root() {
        // The file lets others in, the daemon does not.
        std::fs::set_permissions(rig.path("api"), PermissionsExt::from_mode(0o666)).unwrap();
        std::fs::set_permissions(rig.scene.path("."), PermissionsExt::from_mode(0o755)).unwrap();
        let copy = rig.path("vhostctl");
        process::copy(&built("vhostctl").expect("cargo build -p vhostctl"), Path::new(&copy)).unwrap();
        let as_nobody = [
            "--reuid=65534",
            "--regid=65534",
            "--clear-groups",
            "--",
            &copy,
            "--api",
            &rig.path("api"),
            "list",
        ];
        let out = Command::new("setpriv").args(as_nobody).output().unwrap();
        let said = String::from_utf8_lossy(&out.stderr);
        assert!(!out.status.success() && said.contains("user 65534 may not do this"), "{said}");
    }
    rig.end();
}

#[test]
fn a_newer_daemon_takes_over_with_all_that_was_added_and_the_socket_of_the_api() {
    let mut rig = Rig::start("poll = 'event'\ncontrol = 'CONTROL'\n", &[]);
    rig.add("a", "backend=ram:1M");
    rig.add("b", "backend=ram:1M");
    rig.does(200, "POST", "/v1/disks/b/pause", None);
    rig.does(200, "POST", "/v1/save", None);
    let refused = rig.spawn_heir().wait_exit(LIMIT).unwrap();
    assert!(!refused.success(), "a paused disk was handed over");
    rig.does(200, "POST", "/v1/disks/b/resume", None);
    let pid = rig.does(200, "GET", "/v1/daemon", None)["pid"].clone();
    let heir = rig.spawn_heir();
    rig.succeed(heir);
    wait::until("the new daemon's API", LIMIT, || {
        let answer = rig.client.call("GET", "/v1/daemon", None);
        Ok(answer.ok().and_then(|a| a.json().ok()).filter(|d| d["pid"] != pid))
    })
    .unwrap();
    let disks = rig.does(200, "GET", "/v1/disks", None);
    assert_eq!(disks.as_array().unwrap().len(), 2);
    rig.does(204, "DELETE", "/v1/disks/a", None);
    rig.end();
}

#[test]
fn everything_can_be_asked_for_on_a_command_line() {
    let mut rig = Rig::start("", &[]);
    let socket = format!("socket-path={}", rig.path("a.sock"));
    for (args, said) in [
        (&["info"][..], "vhost-blk"),
        (&["add", "name=a", &socket, "backend=null:1M,num-queues=2"], "a.sock"),
        (&["list"], "NAME"),
        (&["show", "a"], "QUEUE"),
        (&["pause", "a"], "paused"),
        (&["resume", "a"], "paused"),
        (&["add-reactor"], "REACTOR"),
        (&["move", "a", "1"], "a.sock"),
        (&["retire", "0"], "done"),
        (&["reactors"], "REACTOR"),
        (&["poll", "event"], "event"),
        (&["poll"], "event"),
        (&["record", "a", &rig.path("capture")], "capture"),
        (&["record", "a", "off"], "a.sock"),
        (&["save"], "blk.toml"),
        (&["metrics"], "vhost_blk_requests_total{disk=\"a\",queue=\"1\"} 0"),
        (&["--json", "list"], "\"name\": \"a\""),
        (&["call", "GET", "/v1/disks/a"], "\"queues\""),
        (&["openapi"], "\"openapi\": \"3.1"),
        (&["completions", "bash"], "_vhostctl"),
        (&["remove", "a"], "done"),
    ] {
        let out = rig.ctl(args);
        let text = String::from_utf8_lossy(&out.stdout);
        assert!(out.status.success() && text.contains(said), "{args:?}: {out:?}");
    }
    for (args, said) in [
        (&["show", "a"][..], "vhostctl: there is no disk a"),
        (&["grow", "a", "x"], "vhostctl: there is no disk a"),
        (&["add", "name=b"], "vhostctl: socket-path is missing"),
        (&["--api=/nonexistent", "list"], "vhostctl: cannot reach a daemon at /nonexistent"),
    ] {
        let out = rig.ctl(args);
        let text = String::from_utf8_lossy(&out.stderr);
        assert!(
            !out.status.success() && text.starts_with(said) && text.lines().count() == 1,
            "{args:?}: {out:?}"
        );
    }
    rig.end();
}

#[test]
fn metrics_are_what_prometheus_reads() {
    let mut rig = Rig::start("", &[]);
    rig.add("a", "backend=null:1M,num-queues=2");
    let answer = rig.call("GET", "/metrics", None);
    assert!(answer.content_type.starts_with("application/openmetrics-text; version=1.0.0"));
    let text = String::from_utf8(answer.body).unwrap();
    for line in [
        "# TYPE vhost_blk_requests counter",
        "vhost_blk_read_bytes_total{disk=\"a\",queue=\"0\"} 0",
        "vhost_blk_errors_total{disk=\"a\",kind=\"ring\"} 0",
        "vhost_blk_capacity_bytes{disk=\"a\"} 1048576",
        "vhost_blk_attached{disk=\"a\"} 0",
        "vhost_blk_latency_seconds_count{disk=\"a\"} 0",
        "vhost_blk_latency_seconds_bucket{le=\"+Inf\",disk=\"a\"} 0",
        "vhost_blk_reactor_queues{reactor=\"0\"} 0",
        "# EOF",
    ] {
        assert!(text.lines().any(|l| l == line), "{line} is missing in\n{text}");
    }
    rig.end();
}

/// Ends well when it is told to, with the API in use.
#[test]
fn the_daemon_ends_with_callers_connected() {
    let mut rig = Rig::start("", &[]);
    let _idle = UnixStream::connect(rig.path("api")).unwrap();
    rig.add("a", "backend=null:1M");
    rig.process.signal(Signal::SIGTERM).unwrap();
    assert!(rig.process.wait_exit(LIMIT).unwrap().success());
    assert!(!std::path::Path::new(&rig.path("api")).exists());
}
