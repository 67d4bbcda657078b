//! Several disks of one process: each is itself, whatever is behind it.
#![allow(clippy::unwrap_used)]

mod blk;
#[path = "../../poll-engine/tests/support/peer.rs"]
mod peer;

use std::os::unix::net::UnixStream;

use blk::{Front, OK, READ, Shape};
use kickless_tests::daemon::{Medium, Options};
use kickless_tests::image::{Image, MIB};
use kickless_tests::scene::Scene;
use kickless_tests::wait;
use peer::Peer;
use poll_engine::device::features;

#[test]
fn disks_of_one_process_keep_apart() {
    let scene = Scene::new().unwrap();
    let [a, b] = [0xaa, 0xbb].map(|fill| {
        let image = Image::filled(&scene, &format!("{fill:x}.img"), MIB, fill).unwrap();
        (image, fill)
    });
    let disks =
        [Medium::Image(&a.0), Medium::Image(&b.0), Medium::Ram(MIB), Medium::Null(MIB), Medium::Ram(MIB)];
    let mut daemon = Options::default().spawn_many(&scene, "daemon", &disks).unwrap();
    assert_eq!(daemon.sockets().len(), disks.len());
    let mut fronts: Vec<Front> = daemon.sockets().iter().map(|socket| Front::connect(socket, 1)).collect();
    // A null disk leaves the guest's memory as it was, so it has no content to tell.
    for (i, fill) in [(0, a.1), (1, b.1), (2, 0), (4, 0)] {
        let lane = &mut fronts[i].queues[0];
        assert_eq!(lane.request(READ, 9, &Shape { into: &[512], ..Shape::default() }), (OK, 513));
        assert_eq!(lane.get(lane.area + 4096, 512), [fill; 512], "disk {i}");
    }
    for (i, seed) in [(0, 1), (1, 2), (2, 3), (4, 4)] {
        fronts[i].queues[0].verified_io(7, seed);
    }
    let stats = daemon.stats().unwrap();
    let served: Vec<u64> = stats.disks().iter().map(|disk| disk.requests()[&0]).collect();
    assert_eq!(served, [3, 3, 3, 0, 3]);
    assert_eq!(stats.errors(), 0);
    drop(fronts);
    daemon.terminate().unwrap();
    assert_ne!(a.0.read(7 * 512, 512).unwrap(), b.0.read(7 * 512, 512).unwrap());
    // What was not written is as before.
    a.0.expect_fill(8 * 512, 4096, a.1).unwrap();
    b.0.expect_fill(8 * 512, 4096, b.1).unwrap();
}

/// VIRTIO_F_IN_ORDER is a promise (virtio 1.3, 6.1), so it is offered where the disk is done with a request before it takes
/// the next, and not where the kernel finishes them as it likes.
#[test]
fn only_disks_that_complete_in_order_say_so() {
    let scene = Scene::new().unwrap();
    let on_disk = Image::filled(&scene, "disk.img", MIB, 0).unwrap();
    let memory = tempfile::NamedTempFile::new_in("/dev/shm").unwrap();
    memory.as_file().set_len(MIB).unwrap();
    let disks = [
        ("backend=null:1M".to_owned(), true),
        ("backend=ram:1M".to_owned(), true),
        (format!("blk-file={},direct=off", memory.path().display()), true),
        (format!("blk-file={},direct=on", on_disk.path().display()), false),
        (format!("blk-file={},direct=off,read-only=on", on_disk.path().display()), false),
    ];
    for (disk, in_order) in disks {
        let socket = scene.path("in-order.sock");
        let other = format!("--disk=socket-path={},{disk}", socket.display());
        let served = blk::Served::start(&scene, &["--backend=null:1M", &other]);
        // A daemon's sockets are made one after the other.
        let stream =
            wait::until("a connection", blk::LIMIT, || Ok(UnixStream::connect(&socket).ok())).unwrap();
        let offered = Peer::new(stream).ask_number(1);
        assert_eq!(offered & features::IN_ORDER != 0, in_order, "{disk}: {offered:#x}");
        served.terminate();
    }
}
