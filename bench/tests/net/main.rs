//! `vbench net` against network cards: every packet is accounted for, whatever happens to it.
#![allow(clippy::unwrap_used)]

mod nic;
#[path = "../peer/mod.rs"]
mod peer;

use std::os::unix::net::UnixListener;
use std::time::Duration;

use nic::{Nic, connected, drive, own_args};
use peer::{Daemon, Started, vbench};

#[test]
fn packets_of_every_kind_come_back_from_the_floor() {
    let nic = Nic::floor(1);
    for args in [
        &["--iodepth=32"][..],
        &["--size=1518", "--mrg-rxbuf=0"],
        &["--size=imix", "--flows=100", "--indirect"],
        // Six buffers for each packet, and a packet in the last that there are.
        &["--size=1518", "--rx-buffer=256", "--ring-size=64", "--iodepth=4"],
        &["--size=1518", "--rx-buffer=300", "--indirect"],
        &["--completion=interrupt", "--iodepth=8"],
        &["--burst=1", "--ring-size=4", "--verify=head"],
    ] {
        nic.lossless(2000, args);
    }
    let bits = nic.lossless(100, &["--size=gso", "--rx-buffer=4096"])["rx_bps"].as_f64().unwrap();
    assert!(bits > 0.0);
    nic.lossless(100, &["--size=gso,64", "--mrg-rxbuf=0"]);
}

#[test]
fn what_one_port_sends_arrives_at_the_other() {
    for nic in [Nic::floor(2), Nic::plain(2, &[])] {
        let both = nic.lossless(2000, &["--iodepth=16"]);
        assert_eq!(both["directions"].as_array().unwrap().len(), 2);
        assert_eq!(both["received"], 4000);
        let forward = nic.lossless(2000, &["--direction=forward", "--iodepth=16", "--size=imix"]);
        assert_eq!(forward["directions"].as_array().unwrap().len(), 1);
    }
}

#[test]
fn the_plain_card_sends_everything_back() {
    let nic = Nic::plain(1, &[]);
    nic.lossless(1000, &["--iodepth=32"]);
    nic.lossless(1000, &["--iodepth=8", "--completion=interrupt", "--size=1518"]);
    let result = nic.lossless(500, &["--iodepth=8", "--no-event-idx", "--indirect", "--mrg-rxbuf=0"]);
    // It asks for kicks, and gets them.
    assert!(result["kicks"].as_u64().unwrap() > 0);
}

#[test]
fn transmit_and_receive_need_no_answer() {
    let nic = Nic::plain(2, &[]);
    let transmit = |args: &[&str]| drive(&nic.sockets[..1], &[&["--json"], args].concat()).good().json();
    let json = transmit(&["--direction=transmit", "--packets=3000"]);
    assert_eq!((&json["result"]["sent"], &json["result"]["lost"]), (&3000.into(), &serde_json::Value::Null));
    nic.listening();
    // What another generator sends is foreign to this one, and counts where it only receives.
    let other =
        Started::new(&["net", "--socket-path", &nic.sockets[0], "--direction=transmit", "--runtime=30"]);
    let receive = ["--direction=receive", "--runtime=1", "--json"];
    let json = drive(&nic.sockets[1..], &receive).good().json();
    drop(other);
    let result = &json["result"];
    assert!(result["foreign"].as_u64().unwrap() > 0 && result["rx_pps"].as_f64().unwrap() > 0.0, "{result}");
}

/// Packets that fit into the receive ring all at once: none is lost for want of a buffer.
const FEW: [&str; 4] = ["--packets=800", "--ring-size=1024", "--drain-time=2s", "--json"];

#[test]
fn faults_are_counted_exactly() {
    for (fault, lost, reordered, duplicates) in
        [("drop:7", 114, 0, 0), ("duplicate:7", 0, 0, 114), ("swap:7", 0, 114, 0)]
    {
        let nic = Nic::plain(1, &["--fault", fault]);
        for more in ["--flows=1", "--size=imix", "--size=1518"] {
            let result = &nic.drive(&[&FEW[..], &[more]].concat()).good().json()["result"];
            let count = |name: &str| result[name].as_u64().unwrap();
            let counts = ["lost", "reordered", "duplicates", "corrupt", "received"].map(count);
            assert_eq!(counts, [lost, reordered, duplicates, 0, 800 - lost], "{fault} {more}: {result}");
        }
    }
    let nic = Nic::plain(1, &["--fault", "corrupt:7"]);
    for more in ["--size=64", "--size=1518"] {
        let outcome = nic.drive(&[&FEW[..], &[more]].concat());
        let outcome = outcome.bad(1, "wrong data: 114 of 800 packets are not as they were sent");
        let (json, result) = (outcome.json(), &outcome.json()["result"]);
        assert_eq!(
            (&json["partial"], &result["corrupt"], &result["lost"]),
            (&true.into(), &114.into(), &0.into())
        );
        assert_eq!(result["received"], 686);
    }
    // Its body is not looked at.
    nic.drive(&[&FEW[..], &["--size=1518", "--verify=head"]].concat()).good();
}

#[test]
fn more_loss_than_allowed_is_a_failure() {
    let nic = Nic::plain(1, &["--fault=drop:8"]);
    let outcome = nic.drive(&[&FEW[..], &["--max-loss=10"]].concat());
    let outcome = outcome.bad(1, "12.5000 % of the packets were lost, more than --max-loss 10");
    assert_eq!(outcome.json()["result"]["lost"], 100);
    nic.drive(&[&FEW[..], &["--max-loss=12.5"]].concat()).good();
}

#[test]
fn the_search_finds_what_passes_or_that_nothing_does() {
    let search = ["--search", "--runtime=100ms", "--max-rate=1000", "--json"];
    let nic = Nic::plain(1, &["--fault=drop:2"]);
    let outcome = nic.drive(&[&search[..], &["--max-loss=100"]].concat()).good();
    let json = outcome.json();
    assert_eq!((json["trials"].as_array().unwrap().len(), &json["trials"][0]["passed"]), (1, &true.into()));
    assert!(json["result"]["loss_percent"].as_f64().unwrap() > 40.0);
    let outcome = nic.drive(&search).bad(1, "at no rate were only 0 % or fewer of the packets lost");
    let json = outcome.json();
    let rates: Vec<_> =
        json["trials"].as_array().unwrap().iter().map(|t| t["rate_pps"].as_f64().unwrap()).collect();
    assert_eq!(rates, [1000.0, 500.0, 250.0, 125.0, 62.5]);
    // Without --max-rate, it begins with what arrives when as much is sent as the ring takes.
    let floor = Nic::floor(1);
    let args = ["--search", "--runtime=100ms", "--resolution=50", "--max-loss=100", "--json"];
    let json = floor.drive(&args).good().json();
    assert_eq!(json["trials"].as_array().unwrap().len(), 2, "{json}");
}

#[test]
fn what_cannot_be_sent_in_time_waits_and_the_wait_counts() {
    let nic = Nic::floor(1);
    // More arrives than any ring takes.
    let args = ["--arrival-rate=1000m", "--runtime=500ms"];
    let result = nic.good(&args);
    assert!(result["unsent"].as_u64().unwrap() > 0, "{result}");
    // After half a second without keeping up, the last are nearly as late.
    assert!(result["latency_ns"]["max"].as_f64().unwrap() > 250e6, "{result}");
    // A rate is kept, and not exceeded.
    for rate in ["--arrival-rate=500", "--rate-pps=500"] {
        let result = nic.good(&[rate, "--runtime=1"]);
        let number = |name: &str| result[name].as_f64().unwrap();
        // A loaded machine may stop it late.
        let most = 500.0 * number("seconds") + 2.0;
        assert!((250.0..=most).contains(&number("sent")), "{rate}: {result}");
    }
}

#[test]
fn what_cannot_begin_says_why() {
    let outcome = vbench(&["net", "--socket-path=/nonexistent/socket", "--json"]);
    let outcome = outcome.bad(1, "cannot connect to /nonexistent/socket");
    assert_eq!((&outcome.json()["partial"], &outcome.json()["result"]), (&true.into(), &().into()));
    let disk = Daemon::start(&["--backend=ram:1M"]);
    drive(std::slice::from_ref(&disk.socket), &[]).bad(1, "looks like a block device");
    let nic = Nic::plain(1, &[]);
    nic.drive(&["--size=gso"])
        .bad(1, "does not offer VIRTIO_NET_F_CSUM (--size gso) and VIRTIO_NET_F_HOST_TSO4");
    nic.drive(&["--packed"]).bad(1, "does not offer VIRTIO_F_RING_PACKED (--packed)");
    nic.drive(&["--queue-pairs=4"]).bad(1, "has 2 queues, fewer than --queue-pairs 4");
    nic.drive(&["--ring-size=2048"]).bad(1, "refused ring 0 of 2048 descriptors; lower --ring-size");
    nic.drive(&["--cpu=1000"]).bad(1, "cannot run on the CPU");
    // Somebody who listens and never answers.
    let silent = nic.path("silent").to_str().unwrap().to_owned();
    let _listener = UnixListener::bind(&silent).unwrap();
    drive(&[silent], &[]).bad(1, "does not answer; does it serve another front end?");
    // One port of two: nobody is at the other.
    let nic = Nic::plain(2, &[]);
    drive(&nic.sockets[..1], &["--packets=10"])
        .bad(1, "no packet has arrived; does the back end forward packets?");
}

#[test]
fn a_back_end_that_dies_leaves_a_partial_result() {
    for kind in ["floor-net", "plain-net"] {
        let mut nic = Nic::own(kind, 1, &[]);
        let socket = nic.sockets[0].clone();
        let run = Started::new(&["net", "--socket-path", &socket, "--iodepth=8", "--runtime=25", "--json"]);
        std::thread::sleep(Duration::from_secs(1));
        nic.kill();
        let json = run.end().bad(1, "the back end has closed the connection").json();
        assert_eq!(json["partial"], true);
        assert!(json["result"]["sent"].as_u64().unwrap() > 0, "{json}");
        assert_eq!(json["result"]["error"], nix::errno::Errno::ECONNRESET as i32);
    }
}

#[test]
fn back_ends_may_connect_to_us() {
    let connect = |socket: String| {
        let args = |_: &[String]| own_args("plain-net", &[socket], &["--client"]);
        Nic::connecting(env!("CARGO_BIN_EXE_vbench"), 0, args)
    };
    let outcome = connected(&["--packets=500", "--iodepth=4", "--json"], connect).good();
    assert_eq!(outcome.json()["result"]["received"], 500);
}

#[test]
fn usage_errors_are_one_line_and_exit_code_2() {
    for (args, what) in [
        (&["--size=63"][..], "'63' is not between 64 and 65536"),
        (&["--direction=both"], "both needs 2 --socket-path, not 1"),
        (&["--ring-size=100"], "'100' is no power of two"),
        (&["--max-rate=1"], "--search"),
        (&["--completion=sometimes"], "neither poll nor interrupt"),
    ] {
        drive(&["/s".into()], args).bad(2, what);
    }
    vbench(&["net"]).bad(2, "--socket-path");
}

#[test]
fn the_generator_measures_itself() {
    let outcome = vbench(&["net", "--ceiling", "--runtime=200ms"]).good();
    for how in ["served by the generator's own thread: ", "served by a second thread: "] {
        assert!(outcome.out.contains(how), "{}", outcome.out);
    }
    vbench(&["net", "--ceiling", "--direction=both", "--size=imix", "--indirect", "--runtime=100ms"]).good();
    vbench(&["net", "--ceiling", "--completion=interrupt"]).bad(1, "--ceiling");
}

#[test]
fn a_matrix_of_networks_is_compared() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    let matrix = r#"
[options]
rounds = 1
runtime = 0.3
ramp_time = 0.1

[[backend]]
name = "floor"
command = "{bin}/vbench floor-net --socket-path {socket} --socket-path {socket2}"

[[backend]]
name = "plain"
command = "{bin}/vbench plain-net --socket-path {socket} --socket-path {socket2}"

[[workload]]
name = "wire"
kind = "net"
direction = "both"
size = "imix"
iodepth = 16
"#;
    std::fs::write(path("m.toml"), matrix).unwrap();
    let (json, html) = (path("out.json"), path("out.html"));
    let outcome = vbench(&["compare", &path("m.toml"), "--json", &json, "--html", &html]).good();
    for said in ["packets/s", "Gbit/s", "lost %", "CPU us/packet", "wire: both, imix bytes, depth 16"] {
        assert!(outcome.out.contains(said), "{said}: {}", outcome.out);
    }
    let json: serde_json::Value = serde_json::from_slice(&std::fs::read(json).unwrap()).unwrap();
    assert_eq!((&json["kind"], json["samples"].as_array().unwrap().len()), (&"net".into(), 2));
    for sample in json["samples"].as_array().unwrap() {
        assert!(sample["loss_percent"].as_f64().unwrap() >= 0.0, "{sample}");
    }
    assert!(std::fs::read_to_string(html).unwrap().contains("packets a second"));
}
