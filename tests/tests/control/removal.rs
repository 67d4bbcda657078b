//! A disk that is removed while its guest waits for a slow storage: everything is answered, once, before the disk goes.

use std::os::unix::net::UnixStream;
use std::thread;

use kickless_tests::image::Image;
use kickless_tests::wait;

use crate::front::{BLOCKS, Front};
use crate::model::BLOCK;
use crate::rig::{LIMIT, Rig};

/// Whether something was in flight when the removal had begun, which a machine may be too slow for.
fn removed_in_flight(rig: &Rig, packed: bool, delay: u64) -> bool {
    let image = Image::create(&rig.scene, "slow.img", (BLOCKS * BLOCK) as u64).unwrap();
    let direct = if image.takes_direct_io() { "on" } else { "off" };
    let path = image.path().display();
    rig.add("slow", &format!("blk-file={path},direct={direct},num-queues=2,fault=delay={delay}s"));
    let socket = rig.scene.path("slow.sock");
    let mut front = Front::new(std::process::id().into(), packed);
    front.model.may_tear = true;
    front.connect(&socket).unwrap();
    front.submit();
    let asked = front.in_flight();
    wait::until("the requests to be taken", LIMIT, || {
        Ok((rig.disk("slow")["all"]["peak"].as_u64() > Some(0)).then_some(()))
    })
    .unwrap();
    assert!(rig.refuses(409, "DELETE", "/v1/disks/slow", None).contains("a front end is connected"));

    let in_time = thread::scope(|scope| {
        let removal = scope.spawn(|| rig.does(204, "DELETE", "/v1/disks/slow?force=true", None));
        let begun = || {
            let answer = rig.call("GET", "/v1/disks/slow", None);
            let is_listed = answer.status == 200;
            Ok((!is_listed || answer.json()?["attached"] == false).then_some(is_listed))
        };
        let is_listed = wait::until("the removal to begin", LIMIT, begun).unwrap();
        // Each once and as it should be, or this fails.
        let answered = front.collect().unwrap();
        let left = front.in_flight();
        assert_eq!(answered + left, asked);
        assert!(is_listed || left == 0, "{left} requests are left of a disk that is gone");
        removal.join().unwrap();
        left > 0
    });
    // Nobody has waited for anything since.
    front.collect().unwrap();
    assert_eq!(front.in_flight(), 0, "the disk is gone, and its guest waits");
    assert!(UnixStream::connect(&socket).is_err() && !socket.exists());
    rig.refuses(404, "GET", "/v1/disks/slow", None);
    front.check_image(&std::fs::read(image.path()).unwrap()).unwrap();
    // Nobody holds it any more.
    rig.add("slow", &format!("blk-file={path}"));
    rig.does(204, "DELETE", "/v1/disks/slow", None);
    in_time
}

#[test]
fn a_disk_goes_when_what_is_in_flight_is_answered() {
    let mut rig = Rig::start("", &[]);
    for packed in [false, true] {
        let in_time = [1, 4, 16].into_iter().any(|delay| removed_in_flight(&rig, packed, delay));
        assert!(in_time, "nothing was in flight when the removal had begun, however slow the storage was");
    }
    rig.end();
}
