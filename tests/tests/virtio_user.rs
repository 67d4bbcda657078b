//! DPDK's virtio-user, a driver that shares no code with this workspace, on a card of ours and on those of
//! the daemon: split and packed rings, in order or not, by its plain and its vectorized paths. Where it is not installed the tests end as ignored, with the
//! reason.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use kickless_tests::echo::{Card, MRG_RXBUF};
use kickless_tests::net;
use kickless_tests::runner::{self, Test};
use kickless_tests::scene::Scene;
use kickless_tests::testpmd::{self, Testpmd};
use kickless_tests::wait;
use poll_engine::device::features::{IN_ORDER, RING_PACKED};

/// Packets that must have come back; a ring is gone round many times.
const PACKETS: u64 = 50_000;
const LIMIT: Duration = Duration::from_secs(90);

const KINDS: [(&str, &str); 10] = [
    ("split", "packed_vq=0,in_order=0,mrg_rxbuf=0"),
    ("split_mergeable", "packed_vq=0,in_order=0,mrg_rxbuf=1"),
    ("split_in_order", "packed_vq=0,in_order=1,mrg_rxbuf=0"),
    ("split_in_order_mergeable", "packed_vq=0,in_order=1,mrg_rxbuf=1"),
    ("split_vectorized", "packed_vq=0,in_order=0,mrg_rxbuf=0,vectorized=1"),
    ("packed", "packed_vq=1,in_order=0,mrg_rxbuf=0"),
    ("packed_mergeable", "packed_vq=1,in_order=0,mrg_rxbuf=1"),
    ("packed_in_order", "packed_vq=1,in_order=1,mrg_rxbuf=0"),
    ("packed_in_order_mergeable", "packed_vq=1,in_order=1,mrg_rxbuf=1"),
    ("packed_vectorized", "packed_vq=1,in_order=1,mrg_rxbuf=0,vectorized=1"),
];

fn main() -> std::process::ExitCode {
    let tests = KINDS.iter().map(|&(name, kind)| Test {
        name: name.to_owned(),
        needs: Box::new(testpmd::missing),
        run: Box::new(move |scene| packets_go_round(scene, kind).map(|()| None)),
    });
    let daemon = || testpmd::missing().or_else(net::missing_needs);
    let echoes = KINDS.iter().map(|&(name, kind)| Test {
        name: format!("daemon_echoes::{name}"),
        needs: Box::new(daemon),
        run: Box::new(move |scene| the_daemon_echoes(scene, kind).map(|()| None)),
    });
    // Two ports take as long as two devices: of each kind of ring, one path that merges buffers and one that does not.
    let kinds = KINDS.iter().filter(|(name, _)| {
        ["split_mergeable", "packed_mergeable"].contains(name) || name.ends_with("vectorized")
    });
    let flows = kinds.map(|&(name, kind)| Test {
        name: format!("daemon_switches::{name}"),
        needs: Box::new(daemon),
        run: Box::new(move |scene| flows_cross_the_switch(scene, kind).map(|()| None)),
    });
    runner::run(tests.chain(echoes).chain(flows).collect(), "KICKLESS_REQUIRE_DPDK")
}

/// What is sent first comes back from the daemon, on two pairs of queues.
fn the_daemon_echoes(scene: &Scene, kind: &str) -> Result<()> {
    let daemon = net::Options::echo().queues(2).spawn(scene, "echo")?;
    let device =
        format!("net_virtio_user0,path={},queues=2,queue_size=1024,{kind}", daemon.socket().display());
    let args = testpmd::args(&[device], "io", &["--tx-first", "--rxq=2", "--txq=2"]);
    drive(Testpmd::spawn(scene, "testpmd", &args)?, &[0])?;
    daemon.terminate()
}

/// Flows that testpmd makes at each of two ports arrive at the other.
fn flows_cross_the_switch(scene: &Scene, kind: &str) -> Result<()> {
    let daemon = net::Options::switch().queues(1).spawn(scene, "switch")?;
    let device = |(i, socket): (usize, &PathBuf)| {
        format!("net_virtio_user{i},path={},queues=1,queue_size=1024,{kind}", socket.display())
    };
    let devices: Vec<String> = daemon.sockets().iter().enumerate().map(device).collect();
    let args = testpmd::args(&devices, "flowgen", &["--port-topology=chained"]);
    drive(Testpmd::spawn(scene, "testpmd", &args)?, &[0, 1])?;
    daemon.terminate()
}

/// Packets arrive at these ports of testpmd, and none of them broken.
fn drive(mut testpmd: Testpmd, ports: &[usize]) -> Result<()> {
    let arrived = wait::until("packets to arrive", LIMIT, || {
        testpmd.expect_alive()?;
        Ok(ports.iter().all(|&port| testpmd.port(port).received >= PACKETS).then_some(()))
    });
    arrived.with_context(|| testpmd.said())?;
    for &port in ports {
        let errors = testpmd.port(port).receive_errors;
        ensure!(errors == 0, "port {port}: {errors} errors in receiving\n{}", testpmd.said());
    }
    testpmd.end().map(drop)
}

/// What is sent first comes back, and is sent again, for ever.
fn packets_go_round(scene: &Scene, kind: &str) -> Result<()> {
    let card = Card::serve(scene)?;
    let device = format!("net_virtio_user0,path={},queues=1,queue_size=1024,{kind}", card.socket.display());
    let mut testpmd = Testpmd::spawn(scene, "testpmd", &testpmd::args(&[device], "io", &["--tx-first"]))?;
    let returned = || card.stats[0].requests.get();
    let went_round = wait::until("packets to come back", LIMIT, || {
        testpmd.expect_alive()?;
        Ok((returned() >= PACKETS).then_some(()))
    });
    let errors: u64 = card.stats.iter().map(|stats| stats.errors_total()).sum();
    went_round.with_context(|| format!("{} came back, {errors} errors\n{}", returned(), testpmd.said()))?;
    ensure!(errors == 0, "{errors} errors");
    // The rings are of the kind that was asked for.
    for (option, bit) in [("packed_vq=1", RING_PACKED), ("in_order=1", IN_ORDER), ("mrg_rxbuf=1", MRG_RXBUF)]
    {
        ensure!(
            kind.contains(option) == (card.agreed() & bit != 0),
            "{option}: features {:#x}",
            card.agreed()
        );
    }
    Ok(())
}
