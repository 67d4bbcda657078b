//! The VDUSE transport against a kernel of the test's own: every message, and drivers that do as they like.

mod hostile;
mod kernel;
mod net;
mod rig;

use std::sync::Arc;
use std::time::{Duration, Instant};

use poll_engine::memory::Ram;
use vdpa::vduse::memory::Bounce;
use vdpa::vduse::node::{Control, Node, Spec, VduseError};
use vdpa::vduse::state::{self, State, StateError};

use kernel::{DRIVER_OK, Kernel};
use rig::{BOUNCE, PACKED, RING, RINGS, Rig, SPLIT, about, file_of};

fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(60);
    while !holds() {
        assert!(Instant::now() < deadline, "{what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn spec() -> Spec {
    Spec {
        name: "disk0".into(),
        device_id: 2,
        features: SPLIT,
        num_queues: 2,
        queue_size: RING,
        config: vec![7; 60],
    }
}

#[test]
fn devices_are_made_and_taken_away() {
    let kernel = Kernel::new(2, 0);
    let control = Control::new(kernel.edge()).unwrap();
    assert_eq!(kernel.lock().version, Some(0), "the version is said, not assumed");
    control.create(&spec()).unwrap();
    assert_eq!(kernel.lock().created, Some(("disk0".into(), 2, SPLIT, 2, vec![7; 60])));
    let node = Node::new(kernel.edge());
    for index in 0..2 {
        node.setup_queue(index, RING).unwrap();
    }
    assert!(node.setup_queue(2, RING).is_err());
    assert!(kernel.lock().queues.iter().all(|q| q.max_size == RING));
    control.destroy("disk0").unwrap();
    assert_eq!(kernel.lock().destroyed, ["disk0"]);
}

#[test]
fn refusals_name_the_way_out() {
    let kernel = Kernel::new(2, 0);
    let control = Control::new(kernel.edge()).unwrap();
    for name in ["", "a/b", "control", "..", &"x".repeat(256)] {
        assert!(
            matches!(control.create(&Spec { name: name.into(), ..spec() }), Err(VduseError::Name(_))),
            "{name}"
        );
    }
    let refused = |code, device_id| {
        kernel.lock().refuses = Some(code);
        control.create(&Spec { device_id, ..spec() }).unwrap_err().to_string()
    };
    assert!(refused(libc::EEXIST, 2).contains("vdpactl detach disk0"));
    assert!(refused(libc::EPERM, 1).contains("CAP_NET_ADMIN"));
    assert!(refused(libc::EINVAL, 1).contains("Linux 6.9"));
    assert!(!refused(libc::EINVAL, 2).contains("Linux 6.9"));
    kernel.lock().refuses = Some(libc::EBUSY);
    assert!(control.destroy("disk0").unwrap_err().to_string().contains("vdpactl detach disk0"));
    kernel.lock().refuses = Some(libc::EINVAL);
    assert!(matches!(Control::new(kernel.edge()), Err(VduseError::Version(_))));
    let nothing = tempfile::tempdir().unwrap();
    let missing = Control::open_in(nothing.path()).unwrap_err().to_string();
    assert!(missing.contains("modprobe vduse") && missing.contains("CONFIG_VDPA_USER"), "{missing}");
}

#[test]
fn requests_go_through_both_rings_and_the_driver_is_interrupted() {
    for features in [SPLIT, PACKED] {
        let mut rig = Rig::new(features);
        rig.serve(false);
        let mut driver = rig.drive();
        for sector in 0..40 {
            driver.write(0, sector, sector as u8 + 1);
            assert_eq!(driver.read(0, sector), sector as u8 + 1);
        }
        assert!(rig.kernel.lock().queues[0].interrupts > 0);
        assert!(rig.kernel.set_status(0));
        assert!(rig.kernel.lock().queues[0].kick.is_none());
    }
}

#[test]
fn a_queue_that_is_made_ready_late_is_found() {
    let mut rig = Rig::new(SPLIT);
    rig.serve(false);
    let mut driver = rig.drive();
    driver.write(0, 1, 1);
    // What was kicked before is not lost; nobody kicks after.
    driver.queues[1].set_interrupts(true);
    driver.submit(1, 0, 1, 0x2000);
    std::thread::sleep(Duration::from_millis(50));
    driver.ready(1);
    assert_eq!(driver.wait(1), Some(0));
}

#[test]
fn a_driver_that_is_reset_begins_anew() {
    let mut rig = Rig::new(PACKED);
    rig.serve(false);
    for round in 1..20 {
        let mut driver = rig.drive();
        driver.write(0, 5, round);
        assert_eq!(driver.read(0, 5), round);
        assert!(rig.kernel.set_status(0));
        // Memory of the last driver is another's.
        rig.kernel.lock().table.clear();
    }
}

#[test]
fn a_queue_tells_where_it_stands_and_goes_on() {
    for (features, begin, after) in [(SPLIT, [0; 4], [3, 0, 0, 0]), (PACKED, [1, 0, 1, 0], [1, 9, 1, 9])] {
        let mut rig = Rig::new(features);
        rig.serve(false);
        assert_eq!(rig.kernel.vq_state(0), Some(begin));
        let mut driver = rig.drive();
        for sector in 0..3 {
            driver.write(0, sector, 9);
        }
        assert_eq!(rig.kernel.vq_state(0), Some(after));
        assert_eq!(rig.kernel.vq_state(0), Some(after), "asked again");
        assert_eq!(driver.read(0, 2), 9);
        assert_eq!(rig.kernel.vq_state(7), None);
    }
}

#[test]
fn memory_that_moves_is_followed() {
    let mut rig = Rig::new(SPLIT);
    rig.serve(false);
    let mut driver = rig.drive();
    driver.write(0, 1, 1);
    for round in 2..12 {
        // Pages elsewhere, at the same addresses.
        let other = Ram::new(0, BOUNCE, false).unwrap();
        {
            let mut kernel = rig.kernel.lock();
            kernel.table.retain(|t| t.start != 0);
        }
        rig.kernel.map(0, BOUNCE, 0, 3, &file_of(&other));
        assert!(rig.kernel.update_iotlb(0, u64::MAX));
        driver.data = other;
        driver.write(0, round, round as u8);
        assert_eq!(driver.read(0, round), round as u8);
    }
    // Rings, too: the same pages at other addresses of a file, which only the kernel knows.
    rig.kernel.lock().table.retain(|t| t.start != RINGS);
    assert!(rig.kernel.update_iotlb(RINGS, RINGS + 0xf_ffff));
    rig.kernel.map(RINGS, 1 << 20, 0, 3, &file_of(&driver.rings));
    assert!(rig.kernel.update_iotlb(RINGS, RINGS + 0xf_ffff));
    assert_eq!(driver.read(0, 3), 3);
}

#[test]
fn what_may_only_be_read_is_not_written() {
    let mut rig = Rig::new(SPLIT);
    rig.serve(false);
    let mut driver = rig.drive();
    driver.write(0, 1, 1);
    let page = Ram::new(0, 4096, false).unwrap();
    page.map().slice(0, 4096).unwrap().fill(3);
    rig.kernel.map(1 << 32, 4096, 0, 1, &file_of(&page));
    driver.submit(0, 1, 2, 1 << 32);
    assert_eq!(driver.wait(0), Some(0), "it can be read");
    driver.submit(0, 0, 1, 1 << 32);
    std::thread::sleep(Duration::from_millis(200));
    assert!(driver.queues[0].collect().is_none(), "the queue is broken");
    let mut bytes = [0; 512];
    page.map().slice(0, 512).unwrap().read(&mut bytes);
    assert_eq!(bytes, [3; 512]);
    // That is over with a reset.
    assert!(rig.kernel.set_status(0));
    rig.kernel.lock().table.clear();
    assert_eq!(rig.drive().read(0, 2), 3);
}

#[test]
fn pages_bounce_through_memory_of_ours() {
    let mut rig = Rig::new(SPLIT);
    rig.bounce = Bounce::Own { huge: false };
    rig.kernel.lock().bounce = BOUNCE;
    rig.serve(false);
    let mut driver = rig.drive();
    // The driver's kernel copies to and from the pages that it was given: here, they are looked at where they are.
    driver.bounce();
    driver.queues[0]
        .add(&[poll_engine::ring::driver::Buffer { addr: 0x100, len: 16, writable: true }])
        .unwrap();
    driver.queues[0].publish();
    rig.kernel.kick(0);
    until("nothing is registered", || rig.kernel.lock().umem.is_some());
    let (uaddr, iova, size) = rig.kernel.lock().umem.unwrap();
    assert_eq!((iova, size, uaddr % 4096), (0, BOUNCE, 0));
    drop(rig.server.take());
    assert_eq!(rig.kernel.lock().umem, None, "it is taken back");
}

/// A kernel before 6.0: that is said, and a device that is there already is served without.
#[test]
fn memory_of_ours_needs_a_kernel_that_takes_it() {
    let mut rig = Rig::new(SPLIT);
    rig.bounce = Bounce::Own { huge: false };
    let node = Node::new(rig.kernel.edge());
    assert_eq!(node.umem_size(0).unwrap(), None, "nothing is mapped yet");
    rig.kernel.lock().knows_no_info = true;
    assert!(node.umem_size(0).unwrap_err().to_string().contains("--bounce normal and huge need Linux 6.0"));
    drop(node);
    rig.serve(false);
    let mut driver = rig.drive();
    driver.write(0, 1, 1);
    assert_eq!(driver.read(0, 1), 1);
    assert_eq!(rig.kernel.lock().umem, None);
}

/// As after a migration: the ring is in the middle, and the device another one.
#[test]
fn a_queue_begins_where_its_driver_says() {
    for (features, state, after) in
        [(SPLIT, [3, 0, 0, 0], [5, 0, 0, 0]), (PACKED, [1, 9, 1, 9], [1, 15, 1, 15])]
    {
        let mut rig = Rig::new(features);
        rig.serve(false);
        let mut driver = rig.drive();
        for sector in 0..3 {
            driver.write(0, sector, 9);
        }
        assert_eq!(rig.kernel.vq_state(0), Some(state));
        drop(rig.server.take());
        let mut other = Rig::new(features);
        other.serve(false);
        other.kernel.map(RINGS, 1 << 20, 0, 3, &file_of(&driver.rings));
        other.kernel.map(0, BOUNCE, 0, 3, &file_of(&driver.data));
        // What is done already, if it were done again, would show here.
        let header = [1u32, 0, 7, 0].map(u32::to_le_bytes).concat();
        driver.data.map().slice(0x100, 16).unwrap().write(&header);
        driver.kernel = Arc::clone(&other.kernel);
        assert!(other.kernel.set_status(1 | 2 | 8));
        driver.ready(0);
        other.kernel.lock().queues[0].state = state;
        assert!(other.kernel.set_status(1 | 2 | 8 | DRIVER_OK));
        assert_eq!(other.kernel.vq_state(0), Some(state), "nothing is done again");
        driver.write(0, 1, 5);
        assert_eq!(driver.read(0, 7), 0, "nothing was done again");
        assert_eq!(other.kernel.vq_state(0), Some(after));
    }
}

#[test]
fn a_queue_larger_than_the_devices_is_not_started() {
    let mut rig = Rig::new(SPLIT);
    rig.serve(false);
    let mut driver = rig::Driver::new(&rig.kernel, SPLIT, rig::QUEUES);
    assert!(rig.kernel.set_status(1 | 2 | 8));
    driver.ready(0);
    rig.kernel.lock().queues[0].num = 2 * u32::from(RING);
    assert!(rig.kernel.set_status(1 | 2 | 8 | DRIVER_OK));
    driver.submit(0, 0, 1, 0x2000);
    // Answered by whoever starts queues, and once it has.
    assert_eq!(rig.kernel.vq_state(0), Some([0; 4]));
    assert!(driver.queues[0].collect().is_none(), "it was started");
    assert!(rig.kernel.set_status(0));
    rig.kernel.lock().table.clear();
    let mut driver = rig.drive();
    driver.write(0, 1, 1);
    assert_eq!(driver.read(0, 1), 1);
}

#[test]
fn features_that_were_not_offered_are_refused() {
    let mut rig = Rig::new(SPLIT);
    rig.serve(false);
    for features in [SPLIT | 1 << 11, SPLIT & !(1 << 33)] {
        rig.kernel.lock().driver_features = features;
        assert!(!rig.kernel.set_status(11), "{features:#x}");
        assert!(!rig.kernel.set_status(15), "{features:#x}");
        assert_eq!(rig.kernel.lock().status, 0);
    }
    assert_eq!(rig.kernel.ask(3, &[0, 0]).result, 1, "a request of version 1");
    assert_eq!(rig.kernel.ask(77, &[]).result, 1);
    assert!(!rig.kernel.update_iotlb(2, 1));
}

#[test]
fn a_request_that_comes_in_part_ends_the_device_and_nothing_else() {
    let mut rig = Rig::new(SPLIT);
    rig.serve(false);
    rig.drive().write(0, 1, 1);
    rig.kernel.lock().cuts_requests = true;
    rig.kernel.post(1, &[0]);
    until("it is served on", || rig.server.as_ref().unwrap().has_ended());
    drop(rig.server.take());
    // A successor finds the kernel as it should be.
    rig.kernel.lock().cuts_requests = false;
    rig.serve(true);
    assert!(rig.kernel.set_status(0));
    rig.kernel.lock().table.clear();
    assert_eq!(rig.drive().read(0, 1), 1);
}

#[test]
fn a_successor_goes_on_where_a_killed_process_was() {
    for features in [SPLIT, PACKED] {
        let mut rig = Rig::new(features);
        rig.serve(false);
        let mut driver = rig.drive();
        driver.write(0, 1, 1);
        driver.write(0, 2, 2);
        // As far as the kernel can tell, this is a process that dies: the node is closed, the driver stays ready.
        drop(rig.server.take());
        driver.submit(0, 0, 2, 0x2000);
        let asked = rig.kernel.post(0, &[0]);
        rig.serve(true);
        assert_eq!(driver.wait(0), Some(0), "what was made available meanwhile");
        assert_eq!(rig.kernel.answer(asked).result, 0, "what was asked meanwhile");
        assert_eq!(driver.read(0, 1), 1);
        assert_eq!(rig.kernel.lock().config_interrupts, 1);
    }
}

/// What a process has read and not answered when it dies, its successor reads again.
#[test]
fn a_request_that_was_read_and_not_answered_is_answered() {
    let mut rig = Rig::new(SPLIT);
    rig.serve(false);
    let mut driver = rig.drive();
    driver.write(0, 1, 1);
    drop(rig.server.take());
    let (state, moved) = (rig.kernel.post(0, &[0]), rig.kernel.post(2, &[0, 0, u32::MAX, u32::MAX]));
    let dies = Node::new(rig.kernel.edge());
    assert_eq!(dies.request().unwrap().map(|r| r.id), Some(state));
    assert_eq!(dies.request().unwrap().map(|r| r.id), Some(moved));
    assert!(dies.request().unwrap().is_none());
    drop(dies);
    rig.serve(true);
    for id in [state, moved] {
        assert_eq!(rig.kernel.answer(id).result, 0);
    }
    assert_eq!(driver.read(0, 1), 1);
}

#[test]
fn a_reset_that_came_meanwhile_is_a_reset() {
    let mut rig = Rig::new(SPLIT);
    rig.serve(false);
    rig.drive().write(0, 1, 1);
    drop(rig.server.take());
    let reset = rig.kernel.post(1, &[0]);
    rig.serve(true);
    assert_eq!(rig.kernel.answer(reset).result, 0);
    let mut kernel = rig.kernel.lock();
    assert!(kernel.queues[0].kick.is_some(), "the first process's, which the kernel drops now");
    kernel.status = 0;
    kernel.table.clear();
    kernel.queues[0].kick = None;
    drop(kernel);
    assert_eq!(rig.drive().read(0, 1), 1);
}

#[test]
fn state_is_one_processes_and_of_one_device() {
    let root = tempfile::tempdir().unwrap();
    let state = State::claim(root.path(), "d0").unwrap();
    assert!(matches!(state.resume(&about(SPLIT)), Err(StateError::Unknown(_))));
    state.begin(&about(SPLIT)).unwrap();
    state.resume(&about(SPLIT)).unwrap();
    let other = vdpa::vduse::state::About { num_queues: 7, ..about(SPLIT) };
    assert!(matches!(state.resume(&other), Err(StateError::Differs { what: "number of queues", .. })));
    assert!(state.resume(&about(PACKED)).unwrap_err().to_string().contains("vdpactl detach d0"));
    assert_eq!(state::names(root.path()), ["d0"]);
    assert_eq!(state::owner(root.path(), "d0"), None, "the lock is ours, and locks of ours do not count");
    assert_eq!(state::owner(root.path(), "d1"), None);
    state.remove();
    assert!(state::names(root.path()).is_empty());
}

#[test]
fn the_driver_hears_of_configuration() {
    let mut rig = Rig::new(SPLIT);
    rig.serve(false);
    let tell = rig.server.as_ref().unwrap().config_notifier();
    tell();
    until("configuration space is not written", || {
        rig.kernel.lock().config[..8] == (1u64 << 11).to_le_bytes()
    });
    assert_eq!(rig.kernel.lock().config_interrupts, 0, "nobody to tell");
    let _driver = rig.drive();
    tell();
    until("the driver is not told", || rig.kernel.lock().config_interrupts == 1);
    assert!(rig.kernel.set_status(0));
    assert!(Arc::strong_count(&rig.kernel) > 1);
    assert!(rig.kernel.lock().status & DRIVER_OK == 0);
}
