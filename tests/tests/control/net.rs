//! The same of `vhost-net`: ports that come and go, links, limits, captures, and what it learns.

use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Instant;

use kickless_tests::wait;
use serde_json::json;

use crate::net_random;
use crate::rig::{LIMIT, Rig};

const SWITCH: &str = "switch = true\npoll = 'event'\n";

#[test]
fn ports_come_and_go() {
    let mut rig = Rig::start_net(SWITCH, &[]);
    let socket = rig.path("a.sock");
    let port =
        json!({ "name": "a", "socket-path": socket, "mac": "52:54:00:00:00:01", "vlan": 5, "guard": true });
    let added = rig.does(201, "POST", "/v1/ports", Some(port.clone()));
    assert_eq!((&added["name"], &added["kind"], &added["up"]), (&json!("a"), &json!("switch"), &json!(true)));
    // A pair, and the control queue.
    assert_eq!(added["queues"].as_array().unwrap().len(), 3, "{added}");
    assert_eq!(rig.does(200, "GET", "/v1/daemon", None)["ports"], 1);
    // The address of its own is where it is for good.
    let fdb = json!([{ "mac": "52:54:00:00:00:01", "vlan": 5, "port": "a", "fixed": true }]);
    assert_eq!(rig.does(200, "GET", "/v1/fdb", None), fdb);

    // What others have.
    let said = rig.refuses(409, "POST", "/v1/ports", Some(port.clone()));
    assert!(said.contains("two ports have the socket"), "{said}");
    // What cannot be.
    for (body, key, said) in [
        (json!({ "socket-path": "/x", "vlan": 4095 }), Some("vlan"), "is no VLAN"),
        (json!({ "socket-path": "/x", "wings": 2 }), None, "unknown field `wings`"),
        (json!({ "name": "x" }), None, "socket-path is missing"),
        (json!({ "socket-path": "/x", "guard": true }), Some("guard"), "needs its mac="),
        (json!({ "socket-path": "/x", "af-xdp": "e" }), Some("af-xdp"), "for the uplink"),
        (json!({ "socket-path": "/x", "switch": "x" }), Some("switch"), "there is no switch x"),
        (json!({ "fd": 3 }), Some("fd"), "inherits nothing"),
        (json!({ "socket-path": "/x", "tap-fds": [3] }), Some("tap-fds"), "inherits nothing"),
    ] {
        rig.finds_fault("/v1/ports", &body, key, said);
    }
    let elsewhere = json!({ "socket-path": "/nonexistent/x.sock" });
    assert!(rig.refuses(409, "POST", "/v1/ports", Some(elsewhere)).contains("/nonexistent/x.sock"));

    // Somebody is there.
    let front = UnixStream::connect(&socket).unwrap();
    wait::until("the front end", LIMIT, || Ok((rig.port("a")["attached"] == true).then_some(()))).unwrap();
    assert!(rig.refuses(409, "DELETE", "/v1/ports/a", None).contains("a front end is connected"));
    rig.does(204, "DELETE", "/v1/ports/a?force=true", None);
    drop(front);
    assert!(rig.refuses(404, "DELETE", "/v1/ports/a", None).contains("there is no port a"));
    assert!(!Path::new(&socket).exists());
    assert_eq!(rig.does(200, "GET", "/v1/fdb", None), json!([]));
    for round in 0..50 {
        rig.add_port(&format!("p{round}"), "");
        rig.does(204, "DELETE", &format!("/v1/ports/p{round}"), None);
    }
    assert_eq!(rig.does(200, "GET", "/v1/ports", None), json!([]));
    rig.end();
}

/// What holds how ports are joined holds for those that come, too.
#[test]
fn what_cannot_change_while_it_runs_is_said() {
    let mut rig = Rig::start_net("wire = true\n", &[]);
    rig.add_port("a", "");
    rig.add_port("b", "");
    let third = json!({ "name": "c", "socket-path": rig.path("c.sock") });
    assert!(rig.refuses(409, "POST", "/v1/ports", Some(third)).contains("a wire has two ends"));
    let limits = json!({ "tx-pps": 5 });
    assert!(rig.refuses(409, "PUT", "/v1/ports/a/limits", Some(limits)).contains("no port of a switch"));
    rig.does(204, "DELETE", "/v1/ports/a", None);
    rig.add_port("c", "");
    let switch = json!({ "name": "x" });
    assert!(rig.refuses(409, "POST", "/v1/switches", Some(switch)).contains("without a switch"));
    rig.end();
}

#[test]
fn links_limits_and_captures_change_and_are_saved() {
    let mut rig =
        Rig::start_net(&format!("# Ours.\n{SWITCH}[[port]]\nsocket-path = 'DIR/a.sock' # first\n"), &[]);
    let name = rig.does(200, "GET", "/v1/ports", None)[0]["name"].as_str().unwrap().to_owned();
    let call = |what: &str| format!("/v1/ports/{}{what}", control::client::part(&name));
    rig.add_port("b", "trunk=5+10-19,native=7,tx-pps=9");
    assert_eq!(rig.does(200, "PUT", &call("/link"), Some(json!({ "up": false })))["up"], false);
    assert_eq!(rig.does(200, "PUT", "/v1/ports/b/link", Some(json!({ "up": true })))["up"], true);
    assert_eq!(rig.does(200, "GET", "/v1/ports/b/limits", None), json!({ "tx-pps": 9 }));
    let limits = json!({ "tx-bps": 1_000_000, "rx-pps": 7, "burst-ms": 5 });
    assert_eq!(rig.does(200, "PUT", "/v1/ports/b/limits", Some(limits.clone())), limits);
    assert!(rig.refuses(400, "PUT", "/v1/ports/b/limits", Some(json!({ "tx-bps": 0 }))).contains("above 0"));
    rig.does(200, "PUT", "/v1/poll", Some(json!({ "poll": "adaptive" })));

    let (capture, body) = (rig.path("capture"), json!({ "file": rig.path("capture"), "filter": "arp" }));
    assert_eq!(rig.does(200, "GET", "/v1/capture", None), json!({ "written": 0, "lost": 0 }));
    let begun = rig.does(200, "PUT", "/v1/capture", Some(body.clone()));
    assert_eq!(begun, json!({ "file": capture, "written": 0, "lost": 0 }));
    assert!(rig.refuses(409, "PUT", "/v1/capture", Some(body.clone())).contains("a capture already"));
    rig.does(204, "DELETE", "/v1/capture", None);
    assert!(rig.refuses(409, "PUT", "/v1/capture", Some(body)).contains("it exists"));
    assert!(std::fs::metadata(&capture).unwrap().len() > 0);
    let wrong = json!({ "file": rig.path("x"), "filter": "nothing" });
    let problem = rig.call("PUT", "/v1/capture", Some(wrong)).json().unwrap();
    assert_eq!((&problem["status"], &problem["key"]), (&json!(400), &json!("filter")), "{problem}");

    rig.does(200, "POST", "/v1/save", None);
    rig.restart();
    let text = std::fs::read_to_string(rig.path("net.toml")).unwrap();
    assert!(
        text.contains("# Ours.") && text.contains("# first") && text.contains("link = \"down\""),
        "{text}"
    );
    assert_eq!(rig.does(200, "GET", &call(""), None)["up"], false);
    assert_eq!(rig.does(200, "GET", "/v1/ports/b/limits", None), limits);
    assert_eq!(rig.does(200, "GET", "/v1/poll", None), json!({ "poll": "adaptive" }));
    // Read again, it says the same.
    rig.process.signal(nix::sys::signal::Signal::SIGHUP).unwrap();
    wait::until("the file to be read", LIMIT, || {
        Ok(rig.process.stderr().contains("was read again").then_some(()))
    })
    .unwrap();
    assert!(!rig.process.stderr().contains("start it anew"), "{}", rig.process.stderr());
    rig.end();
}

#[test]
fn ports_pause_and_move() {
    let mut rig = Rig::start_net(&format!("cpus = '0-1'\n{SWITCH}"), &["--control=CONTROL"]);
    rig.add_port("a", "");
    for (call, paused) in [("pause", true), ("pause", true), ("resume", false), ("resume", false)] {
        let port = rig.does(200, "POST", &format!("/v1/ports/a/{call}"), None);
        assert_eq!(port["paused"], paused);
        let metric = format!("vhost_net_paused{{port=\"a\"}} {}", u8::from(paused));
        let text = String::from_utf8(rig.call("GET", "/metrics", None).body).unwrap();
        assert!(text.lines().any(|line| line == metric), "{text}");
        assert_eq!(rig.does(200, "GET", "/v1/stats", None)["exports"][0]["paused"], paused);
    }
    assert!(rig.refuses(404, "POST", "/v1/ports/x/pause", None).contains("there is no port x"));
    for body in [json!({ "reactor": 1 }), json!({ "reactor": 0, "queue": 2 })] {
        rig.does(200, "PUT", "/v1/ports/a/reactor", Some(body));
    }
    let call = |body| rig.call("PUT", "/v1/ports/a/reactor", Some(body)).json().unwrap();
    for (body, key, said) in [
        (json!({ "reactor": 7 }), "reactor", "there is no reactor 7"),
        (json!({ "reactor": 0, "queue": 3 }), "queue", "a has queues 0 to 2, and no 3"),
    ] {
        let problem = call(body);
        assert_eq!((&problem["status"], &problem["key"]), (&json!(400), &json!(key)), "{problem}");
        assert!(problem["detail"].as_str().unwrap().contains(said), "{problem}");
    }
    let nowhere = Some(json!({ "reactor": 0 }));
    assert!(rig.refuses(404, "PUT", "/v1/ports/x/reactor", nowhere).contains("there is no port x"));
    // What waits for a paused port would wait for ever elsewhere.
    rig.does(200, "POST", "/v1/ports/a/pause", None);
    rig.does(200, "POST", "/v1/save", None);
    let mut heir = rig.spawn_heir();
    assert!(!heir.wait_exit(LIMIT).unwrap().success());
    assert!(heir.stderr().contains("a is paused"), "{}", heir.stderr());
    rig.end();
}

#[test]
fn reactors_come_and_go() {
    let mut rig = Rig::start_net(&format!("cpus = '0'\n{SWITCH}"), &[]);
    rig.add_port("a", "");
    assert!(rig.refuses(409, "DELETE", "/v1/reactors/0", None).contains("it is the only reactor"));
    assert!(rig.refuses(404, "DELETE", "/v1/reactors/7", None).contains("there is no reactor 7"));
    let elsewhere = json!({ "cpu": 100_000 });
    assert!(rig.refuses(400, "POST", "/v1/reactors", Some(elsewhere)).contains("CPU 100000"));
    let reactors = rig.does(201, "POST", "/v1/reactors", Some(json!({ "cpu": 1 })));
    assert_eq!(
        reactors,
        json!([{ "reactor": 0, "cpu": 0, "queues": 0 }, { "reactor": 1, "cpu": 1, "queues": 0 }])
    );
    rig.does(200, "PUT", "/v1/ports/a/reactor", Some(json!({ "reactor": 1 })));
    rig.does(204, "DELETE", "/v1/reactors/0", None);
    rig.does(200, "POST", "/v1/save", None);
    rig.restart();
    assert_eq!(rig.does(200, "GET", "/v1/reactors", None)[0]["cpu"], 1);
    for _ in 1..5 {
        rig.does(201, "POST", "/v1/reactors", Some(json!({})));
    }
    for number in 0..4 {
        rig.does(204, "DELETE", &format!("/v1/reactors/{number}"), None);
    }
    assert!(rig.refuses(409, "DELETE", "/v1/reactors/4", None).contains("it is the only reactor"));
    rig.end();
}

/// Beside one without a name, which stands in the file as `true`, others come and go, and are saved.
#[test]
fn switches_come_and_go() {
    let mut rig = Rig::start_net(&format!("mac-ageing = 9 # short\n{SWITCH}"), &[]);
    let own = json!({ "ports": 0, "mac-ageing": 9, "addresses": 0 });
    assert_eq!(rig.does(200, "GET", "/v1/switches", None), json!([own]));
    let blue = rig.does(201, "POST", "/v1/switches", Some(json!({ "name": "blue" })));
    assert_eq!(blue, json!({ "name": "blue", "ports": 0, "mac-ageing": 300, "addresses": 0 }));
    for (body, key, said) in [
        (json!({ "name": "" }), Some("name"), "is empty"),
        (json!({ "name": "x", "mac-ageing": 0 }), Some("mac-ageing"), "above 0"),
        (json!({ "name": "x", "vlan": 5 }), None, "unknown field `vlan`"),
    ] {
        rig.finds_fault("/v1/switches", &body, key, said);
    }
    for body in [json!({ "name": "blue" }), json!({})] {
        assert!(rig.refuses(409, "POST", "/v1/switches", Some(body)).contains("two switches have"));
    }
    // The same address in the same VLAN, on each of them for good.
    let guarded = "mac=52:54:00:00:00:01,guard=on,vlan=5";
    rig.add_port("a", guarded);
    rig.add_port("b", &format!("{guarded},switch=blue"));
    let station = json!({ "mac": "52:54:00:00:00:01", "vlan": 5, "fixed": true });
    let with = |port: &str, switch: Option<&str>| {
        let mut station = station.clone();
        station["port"] = json!(port);
        if let Some(switch) = switch {
            station["switch"] = json!(switch);
        }
        station
    };
    assert_eq!(rig.does(200, "GET", "/v1/fdb", None), json!([with("a", None), with("b", Some("blue"))]));
    assert_eq!(rig.does(200, "GET", "/v1/fdb?switch=blue", None), json!([with("b", Some("blue"))]));
    let text = String::from_utf8(rig.call("GET", "/metrics", None).body).unwrap();
    for line in [
        "vhost_net_addresses{switch=\"\"} 1",
        "vhost_net_addresses{switch=\"blue\"} 1",
        "vhost_net_port_info{port=\"b\",kind=\"switch\",switch=\"blue\"} 1",
    ] {
        assert!(text.lines().any(|l| l == line), "{line} is not in {text}");
    }
    assert_eq!(rig.does(200, "GET", "/v1/stats", None)["exports"][1]["switch"], "blue");
    assert!(rig.refuses(409, "DELETE", "/v1/switches/blue", None).contains("b is on blue"));
    assert!(rig.refuses(404, "DELETE", "/v1/switches/red", None).contains("there is no switch red"));
    assert!(rig.refuses(404, "GET", "/v1/fdb?switch=red", None).contains("there is no switch red"));

    rig.does(200, "POST", "/v1/save", None);
    rig.restart();
    let switches = json!([
        { "ports": 1, "mac-ageing": 9, "addresses": 1 },
        { "name": "blue", "ports": 1, "mac-ageing": 300, "addresses": 1 },
    ]);
    assert_eq!(rig.does(200, "GET", "/v1/switches", None), switches);
    rig.does(204, "DELETE", "/v1/ports/b", None);
    rig.does(204, "DELETE", "/v1/switches/blue", None);
    for round in 0..20 {
        rig.does(201, "POST", "/v1/switches", Some(json!({ "name": format!("s{round}") })));
        rig.add_port("p", &format!("switch=s{round}"));
        rig.does(204, "DELETE", "/v1/ports/p", None);
        rig.does(204, "DELETE", &format!("/v1/switches/s{round}"), None);
    }
    rig.does(200, "POST", "/v1/save", None);
    rig.restart();
    assert_eq!(
        rig.does(200, "GET", "/v1/switches", None),
        json!([{ "ports": 1, "mac-ageing": 9, "addresses": 1 }])
    );
    rig.end();
}

/// What a guest sends waits for its limit, which is counted.
#[test]
fn limits_that_are_hit_are_counted() {
    let mut rig = Rig::start_net(SWITCH, &[]);
    rig.add_port("a", "wait=on,tx-pps=100,burst-ms=10");
    rig.add_port("b", "wait=on");
    let metric = |name: &str, port: &str| {
        let text = String::from_utf8(rig.call("GET", "/metrics", None).body).unwrap();
        let line = format!("vhost_net_{name}_total{{port=\"{port}\"}} ");
        let value = text.lines().find_map(|l| l.strip_prefix(&line));
        value.unwrap_or_else(|| panic!("no {line}in {text}")).parse::<f64>().unwrap()
    };
    assert_eq!((metric("limited", "a"), metric("limited_seconds", "a")), (0.0, 0.0));
    let begun = Instant::now();
    wait::until("the limit to be hit", LIMIT, || {
        net_random::load(&rig, 7, &[]);
        Ok((metric("limited", "a") > 0.0).then_some(()))
    })
    .unwrap();
    // At most one queue waits, and what is counted is when it may go on.
    let (seconds, most) = (metric("limited_seconds", "a"), begun.elapsed().as_secs_f64() + 1.0);
    assert!(seconds > 0.0 && seconds < most, "{seconds} of {most}");
    assert_eq!((metric("limited", "b"), metric("limited_seconds", "b")), (0.0, 0.0));
    let stats = rig.does(200, "GET", "/v1/stats", None);
    let queues = &stats["exports"][0]["queues"];
    assert!(queues[1]["limited"].as_u64() >= Some(1) && queues[0]["limited"] == 0, "{queues}");
    rig.end();
}

#[test]
fn a_newer_daemon_takes_over_with_ports_that_were_added() {
    let mut rig = Rig::start_net(SWITCH, &["--control=CONTROL"]);
    rig.add_port("a", "");
    rig.add_port("b", "vlan=5");
    let tap = json!({ "socket-path": rig.path("t.sock"), "tap": "kl-none" });
    assert!(rig.refuses(409, "POST", "/v1/ports", Some(tap)).contains("cannot be handed over"));
    rig.does(200, "POST", "/v1/save", None);
    let pid = rig.does(200, "GET", "/v1/daemon", None)["pid"].clone();
    let heir = rig.spawn_heir();
    rig.succeed(heir);
    wait::until("the new daemon's API", LIMIT, || {
        let answer = rig.client.call("GET", "/v1/daemon", None);
        Ok(answer.ok().and_then(|a| a.json().ok()).filter(|d| d["pid"] != pid))
    })
    .unwrap();
    assert_eq!(rig.does(200, "GET", "/v1/ports", None).as_array().unwrap().len(), 2);
    rig.does(204, "DELETE", "/v1/ports/a", None);
    rig.end();
}

#[test]
fn everything_can_be_asked_for_on_a_command_line() {
    let mut rig = Rig::start_net(SWITCH, &[]);
    let socket = format!("socket-path={}", rig.path("a.sock"));
    for (args, said) in [
        (&["info"][..], "vhost-net"),
        (&["add", "name=a", &socket, "mac=52:54:00:00:00:01,guard"], "a.sock"),
        (&["list"], "NAME"),
        (&["show", "a"], "QUEUE"),
        (&["link", "a", "down"], "no"),
        (&["pause", "a"], "paused"),
        (&["resume", "a"], "paused"),
        (&["move", "a", "0"], "QUEUE"),
        (&["move", "a", "0", "--queue=1"], "QUEUE"),
        (&["limit", "a", "tx-bps=1M"], "1000000"),
        (&["limit", "a"], "tx-bps"),
        (&["capture", &rig.path("capture"), "--filter=arp", "--snaplen=96"], "capture"),
        (&["capture"], "written"),
        (&["capture", "off"], "done"),
        (&["fdb"], "52:54:00:00:00:01"),
        (&["switches"], "MAC-AGEING"),
        (&["add-switch", "name=blue,mac-ageing=60"], "blue"),
        (&["add", "name=b", "switch=blue", &format!("socket-path={}", rig.path("b.sock"))], "blue"),
        (&["list"], "SWITCH"),
        (&["fdb", "blue"], "none"),
        (&["remove", "b"], "done"),
        (&["remove-switch", "blue"], "done"),
        (&["poll", "busy"], "busy"),
        (&["reactors"], "REACTOR"),
        (&["add-reactor"], "1"),
        (&["retire", "1"], "done"),
        (&["save"], "net.toml"),
        (&["metrics"], "vhost_net_packets_total{port=\"a\",way=\"rx\",cast=\"unicast\"} 0"),
        (&["openapi"], "\"openapi\": \"3.1"),
        (&["remove", "a"], "done"),
    ] {
        let out = rig.ctl(args);
        let text = String::from_utf8_lossy(&out.stdout);
        assert!(out.status.success() && text.contains(said), "{args:?}: {out:?}");
    }
    let out = rig.ctl(&["show", "a"]);
    assert!(String::from_utf8_lossy(&out.stderr).starts_with("vhostctl: there is no port a"), "{out:?}");
    rig.end();
}
