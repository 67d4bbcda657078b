//! A live capture of what passes a tap, read by tcpdump.

use std::process::Command;

use poll_engine::engine::pacing::Pacing;
use vhost_net::features::{CSUM, GUEST_CSUM, GUEST_TSO4, HOST_TSO4, MRG_RXBUF};
use vhost_net::header::HEADER;
use vhost_net::pcap::{Capture, CaptureConfig};
use vhost_net::port::tap::Tap;

use super::guest::{Guest, engine};
use super::host::{GUEST_MAC, HOST_MAC, Host, frame};
use super::{PLAIN, datagram, segments, short, tso};

pub fn missing() -> Option<String> {
    Command::new("tcpdump")
        .arg("--version")
        .output()
        .is_err()
        .then(|| "no tcpdump: scripts/setup.sh installs it".into())
}

pub fn tcpdump() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("tap.pcapng");
    let config = CaptureConfig { filter: "ip".parse().unwrap(), ..CaptureConfig::default() };
    let capture = Capture::create(&path, &["kl0"], config).unwrap();
    capture.keep();
    let tap = Tap::open("kl0", 1, None).unwrap();
    let (engine, host) = (engine(Pacing::Event), Host::on("kl0"));
    let features = MRG_RXBUF | CSUM | GUEST_CSUM | GUEST_TSO4 | HOST_TSO4;
    let mut guest = Guest::captured(&tap, &engine, features, 256, 1526, &capture);
    guest.post(256);
    guest.send([0; HEADER], &datagram(b"hello"), 14);
    guest.send([0; HEADER], &frame(GUEST_MAC, HOST_MAC, 100, 1), 14);
    guest.send(tso(1448).to_bytes(), &segments(GUEST_MAC, HOST_MAC, 60_000), 54);
    (0..3).for_each(|_| drop(host.wait()));
    for payload in [2_000, 50_000] {
        host.send(short(&tso(1448)), &segments(HOST_MAC, GUEST_MAC, payload));
        guest.wait();
    }
    host.send(PLAIN, &frame(HOST_MAC, GUEST_MAC, 100, 1));
    guest.wait();
    guest.stop();
    drop(capture);
    let out = Command::new("tcpdump").args(["-nn", "-tvv", "-r"]).arg(&path).output().unwrap();
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    let text = String::from_utf8(out.stdout).unwrap();
    let udp = "10.9.0.2.9 > 10.9.0.1.7000: [udp sum ok]";
    assert!(text.contains(udp), "{text}");
    let lengths: Vec<&str> = text
        .lines()
        .filter_map(|line| line.split_once("win 65000, length "))
        .map(|(_, length)| length)
        .collect();
    assert_eq!(lengths, ["60000", "2000", "50000"], "{text}");
    assert_eq!(text.matches("10.9.0.").count(), 8, "{text}");
}
