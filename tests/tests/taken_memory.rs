//! A front end that truncates the memory it has shared: its own queues stop, and the guest beside it, on the same
//! reactor of the same daemon, goes on.
#![allow(clippy::unwrap_used)]

mod blk;

use blk::{Front, LIMIT, Served};
use kickless_tests::scene::Scene;
use kickless_tests::wait;

fn memory_is_taken_away(poll: &str) {
    let scene = Scene::new().unwrap();
    let beside = scene.path("beside.sock");
    let disk = format!("--disk=socket-path={},backend=ram:1M", beside.display());
    let served = Served::start(&scene, &["--backend=ram:1M", &disk, &format!("--poll={poll}")]);
    let mut victim = Front::connect(&served.socket, 1);
    let mut other = Front::connect(&beside, 1);
    victim.queues[0].verified_io(0, 1);
    other.queues[0].verified_io(0, 2);

    // From here on our own mapping of it must not be touched either.
    nix::unistd::ftruncate(victim.ram.fd(), 0).unwrap();
    victim.queues[0].kick.write(1).unwrap();
    let broken = || Ok((served.errors("ring") + served.errors("memory") > 0).then_some(()));
    wait::until("the error to be counted", LIMIT, broken).unwrap();
    wait::until("the error descriptor", LIMIT, || Ok(victim.queues[0].err.read().ok())).unwrap();
    for seed in 3..20 {
        other.queues[0].verified_io(u64::from(seed), seed);
    }
    drop(victim);
    // The disk whose front end misbehaved is there for the next one.
    Front::connect(&served.socket, 1).queues[0].verified_io(5, 6);
    other.queues[0].verified_io(7, 8);
    served.terminate();
}

#[test]
fn taken_from_a_spinning_reactor() {
    memory_is_taken_away("busy");
}

#[test]
fn taken_from_a_sleeping_reactor() {
    memory_is_taken_away("event");
}
