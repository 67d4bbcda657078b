//! `vbench net` against DPDK's testpmd with net_vhost ports. Where it is not installed the tests end as ignored, with
//! the reason.
#![allow(clippy::unwrap_used)]

mod nic;
#[path = "../peer/mod.rs"]
mod peer;

use std::process::{Command, Stdio};

use libtest_mimic::{Arguments, Completion, Trial};
use nic::{Nic, connected};

const TESTPMD: &str = "dpdk-testpmd";
const RAMP: &str = "--ramp-time=300ms";

fn main() -> std::process::ExitCode {
    let mut args = Arguments::from_args();
    // They poll: at the same time they would take the CPUs from each other.
    args.test_threads.get_or_insert(1);
    let tests: [(&str, fn()); 6] = [
        ("testpmd_macswap_sends_everything_back", macswap),
        ("testpmd_has_several_queues", queues),
        ("testpmd_has_packed_rings", packed),
        ("testpmd_io_forwards_between_two_ports", io),
        ("testpmd_sends_what_is_received_and_takes_what_is_sent", one_way),
        ("testpmd_may_connect_to_us", client),
    ];
    let trial = |(name, test): (&str, fn())| Trial::ignorable_test(name, move || Ok(attempt(test)));
    libtest_mimic::run(&args, tests.into_iter().map(trial).collect()).exit_code()
}

fn attempt(test: fn()) -> Completion {
    let there = Command::new(TESTPMD).arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status();
    if there.is_err() {
        return Completion::ignored_with("dpdk-testpmd is not installed (apt-get install dpdk-dev)");
    }
    test();
    Completion::Completed
}

/// Both of its threads on one CPU, memory without huge pages, nothing but the ports.
fn args(sockets: &[String], mode: &str, more: &str) -> Vec<String> {
    let mut args: Vec<String> = "--lcores 0@0,1@0 --no-huge -m 512 --no-pci --no-shconf --no-telemetry"
        .split(' ')
        .map(Into::into)
        .collect();
    for (i, socket) in sockets.iter().enumerate() {
        args.push(format!("--vdev=net_vhost{i},iface={socket},queues=1{more}"));
    }
    // Without a terminal it would end at once; with a period it goes on.
    let rest = ["--", "--auto-start", "--stats-period=3600", "--total-num-mbufs=16384", "--forward-mode"];
    args.extend(rest.map(Into::into));
    args.push(mode.into());
    args
}

fn testpmd(ports: usize, mode: &str) -> Nic {
    // By lines, to see when it forwards; a front end that comes before may wait for ever.
    let lines = |sockets: &[String]| [vec!["-oL".into(), TESTPMD.into()], args(sockets, mode, "")].concat();
    let nic = Nic::start("stdbuf", ports, lines);
    nic.until_said("nb forwarding ports");
    nic
}

fn macswap() {
    let nic = testpmd(1, "macswap");
    // Packets may be lost before both of its queues run.
    nic.lossless(5000, &["--iodepth=32", RAMP]);
    nic.lossless(5000, &["--iodepth=16", "--size=1518", "--indirect", RAMP]);
    nic.lossless(
        5000,
        &["--iodepth=16", "--size=imix", "--mrg-rxbuf=0", "--flows=16", "--completion=interrupt", RAMP],
    );
}

/// What is in packed rings.
fn packed() {
    let nic = testpmd(2, "io");
    for more in [
        &["--iodepth=32"][..],
        &["--size=1518", "--indirect", "--iodepth=16"],
        &["--completion=interrupt", "--iodepth=8"],
    ] {
        nic.lossless(5000, &[&["--packed", RAMP], more].concat());
    }
}

/// What is sent by one queue comes back by the same.
fn queues() {
    let nic = Nic::start("stdbuf", 1, |sockets| {
        let mut args = args(sockets, "macswap", "");
        args.iter_mut()
            .filter(|a| a.contains("queues=1"))
            .for_each(|a| *a = a.replace("queues=1", "queues=2"));
        [vec!["-oL".into(), TESTPMD.into()], args, vec!["--rxq=2".into(), "--txq=2".into()]].concat()
    });
    nic.until_said("nb forwarding ports");
    let json =
        nic.drive(&["--queue-pairs=2", "--packets=3000", "--iodepth=16", RAMP, "--json"]).good().json();
    let (mq, result) = (&json["options"]["mq"], &json["result"]);
    assert_eq!((mq, &result["received"], &result["lost"]), (&true.into(), &6000.into(), &0.into()));
}

fn io() {
    let nic = testpmd(2, "io");
    let result = nic.lossless(5000, &["--iodepth=32", RAMP]);
    assert_eq!(result["received"], 10_000);
    nic.lossless(5000, &["--direction=forward", "--iodepth=16", "--size=1518", RAMP]);
}

fn one_way() {
    let nic = testpmd(1, "txonly");
    let result = nic.good(&["--direction=receive", "--runtime=1"]);
    assert!(result["foreign"].as_u64().unwrap() > 100, "{result}");
    drop(nic);
    let nic = testpmd(1, "rxonly");
    assert_eq!(nic.good(&["--direction=transmit", "--packets=20000"])["sent"], 20000);
}

fn client() {
    let connect = |socket: String| Nic::connecting(TESTPMD, 0, |_| args(&[socket], "macswap", ",client=1"));
    let outcome = connected(&["--packets=2000", "--iodepth=8", "--ramp-time=1", "--json"], connect);
    assert_eq!(outcome.good().json()["result"]["received"], 2000);
}
