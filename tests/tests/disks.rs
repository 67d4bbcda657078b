//! Several disks of one process: each is itself, whatever is behind it.
#![allow(clippy::unwrap_used)]

mod blk;

use blk::{Front, OK, READ, Shape};
use kickless_tests::daemon::{Medium, Options};
use kickless_tests::image::{Image, MIB};
use kickless_tests::scene::Scene;

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
