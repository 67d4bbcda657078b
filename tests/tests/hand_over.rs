//! One image between two daemons: at no time do both have it, and whoever may not is told so.
#![allow(clippy::unwrap_used)]

mod blk;

use blk::{Front, LIMIT, Served, program};
use kickless_tests::image::Image;
use kickless_tests::process::Process;
use kickless_tests::scene::Scene;
use kickless_tests::wait;
use poll_engine::session::wire::F_LOG_ALL;
use vhost::VhostBackend;

#[test]
fn the_image_goes_from_one_daemon_to_the_other_and_back() {
    let scene = Scene::new().unwrap();
    let image = Image::create(&scene, "disk.img", 1 << 20).unwrap();
    let file = format!("--blk-file={}", image.path().display());
    let here = Served::start(&scene, &[&file, "--direct=off"]);
    let mut source = Front::connect(&here.socket, 1);
    source.queues[0].verified_io(1, 1);

    // Without --incoming the second one does not start, and says what would help.
    let args = [file.clone(), format!("--socket-path={}", scene.path("no.sock").display())];
    let mut refused = Process::spawn(&scene, "refused", &program(), &args).unwrap();
    assert!(!refused.wait_exit(LIMIT).unwrap().success());
    assert!(refused.stderr().contains("--incoming"), "{}", refused.stderr());

    let socket = scene.path("there.sock");
    let args = [file, format!("--socket-path={}", socket.display()), "--direct=off --incoming".to_owned()];
    let args: Vec<String> = args.iter().flat_map(|a| a.split(' ')).map(str::to_owned).collect();
    let there = Process::spawn(&scene, "there", &program(), &args).unwrap();
    wait::until("the daemon's socket", LIMIT, || Ok(socket.exists().then_some(()))).unwrap();

    // The guest still runs here: a queue that starts there ends its session, and not a byte is touched.
    // The front end panics on the connection that is gone, if it has anything left to say.
    let _ = std::panic::catch_unwind(|| Front::connect(&socket, 1));
    wait::until("the refusal", LIMIT, || Ok(there.stderr().contains("queues cannot start").then_some(())))
        .unwrap();
    source.queues[0].verified_io(2, 2);

    // It leaves, as QEMU has it leave: with writes being logged.
    source.session.set_features(source.features | F_LOG_ALL).unwrap();
    let base = source.base(0);
    let mut guest = Front::connect(&socket, 1);
    guest.queues[0].verified_io(3, 3);
    // To go on here as well is refused.
    source.session.set_vring_base(0, base as u16).unwrap();
    let _ = source.session.set_vring_kick(0, &source.queues[0].kick);
    wait::until("the refusal", LIMIT, || {
        Ok(here.process.stderr().contains("queues cannot start").then_some(()))
    })
    .unwrap();
    guest.queues[0].verified_io(4, 4);

    // And back.
    guest.session.set_features(guest.features | F_LOG_ALL).unwrap();
    guest.base(0);
    Front::connect(&here.socket, 1).queues[0].verified_io(5, 5);
    drop((source, guest));
    here.terminate();
    drop(there);
}
