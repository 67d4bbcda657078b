//! A guest that breaks the ring of one queue of the real daemon, in every way there is: that queue stops and says so,
//! and the queue beside it, on the same reactor, goes on with verified I/O as if nothing had happened.
#![allow(clippy::unwrap_used)]

mod blk;

use blk::{Front, LIMIT, Lane, RAM_SIZE, RAM_START, Served};
use kickless_tests::image::Image;
use kickless_tests::scene::Scene;
use kickless_tests::wait;
use poll_engine::ring::layout::{DESC_F_INDIRECT, DESC_F_NEXT, DESC_F_WRITE, Desc};

const RAM_END: u64 = RAM_START + RAM_SIZE;

fn desc(addr: u64, len: u32, flags: u16, next: u16) -> Desc {
    Desc { addr, len, flags, next }
}

type Case = (&'static str, &'static str, fn(&mut Lane));

/// Shows the device a chain of these descriptors, at the start of the table.
fn ring(lane: &mut Lane, descs: &[Desc]) {
    (0..).zip(descs).for_each(|(i, &d)| lane.driver.split().unwrap().set_desc(i, d));
    lane.driver.make_available(0);
}

/// As an indirect table, said to be of `len` bytes.
fn table(lane: &mut Lane, len: u32, descs: &[Desc]) {
    (0..).zip(descs).for_each(|(i, d)| lane.put(lane.more + 16 * i, &d.to_bytes()));
    let indirect = desc(lane.more, len, DESC_F_INDIRECT, 0);
    ring(lane, &[indirect]);
}

const CASES: &[Case] = &[
    ("a loop", "ring", |l| ring(l, &[desc(l.area, 16, DESC_F_NEXT, 0)])),
    ("a loop of two", "ring", |l| {
        ring(l, &[desc(l.area, 16, DESC_F_NEXT, 1), desc(l.area, 16, DESC_F_NEXT, 0)]);
    }),
    ("a loop in a table", "ring", |l| table(l, 64, &[desc(l.area, 16, DESC_F_NEXT, 0)])),
    ("a nested table", "ring", |l| table(l, 16, &[desc(l.more, 16, DESC_F_INDIRECT, 0)])),
    ("a table with more behind it", "ring", |l| {
        ring(l, &[desc(l.more, 16, DESC_F_INDIRECT | DESC_F_NEXT, 1), desc(l.area, 1, DESC_F_WRITE, 0)]);
    }),
    ("an empty table", "ring", |l| table(l, 0, &[])),
    ("a table of 17 bytes", "ring", |l| table(l, 17, &[desc(l.area, 16, 0, 0)])),
    ("a head out of range", "ring", |l| l.driver.make_available(blk::RING)),
    ("the farthest head", "ring", |l| l.driver.make_available(0xffff)),
    ("a next out of range", "ring", |l| ring(l, &[desc(l.area, 16, DESC_F_NEXT, 0xffff)])),
    ("no length", "ring", |l| ring(l, &[desc(l.area, 0, 0, 0)])),
    ("reading after writing", "ring", |l| {
        ring(l, &[desc(l.area, 16, DESC_F_WRITE | DESC_F_NEXT, 1), desc(l.area, 16, 0, 0)]);
    }),
    ("an index that jumps", "ring", |l| {
        l.driver.split().unwrap().set_avail_idx(l.driver.split().unwrap().avail_idx().wrapping_add(65));
    }),
    ("an index that goes back", "ring", |l| {
        l.driver.split().unwrap().set_avail_idx(l.driver.split().unwrap().avail_idx().wrapping_sub(1));
    }),
    ("an address outside", "memory", |l| ring(l, &[desc(0, 16, 0, 0)])),
    ("an address that wraps around", "memory", |l| ring(l, &[desc(u64::MAX - 7, 16, 0, 0)])),
    ("a buffer over the end", "memory", |l| ring(l, &[desc(RAM_END - 8, 16, 0, 0)])),
    ("4 GiB less one", "memory", |l| ring(l, &[desc(RAM_START, u32::MAX, DESC_F_WRITE, 0)])),
    ("a table outside", "memory", |l| ring(l, &[desc(RAM_END, 16, DESC_F_INDIRECT, 0)])),
];

/// Whether the jump cases raise the index by themselves.
fn breaks_the_index(name: &str) -> bool {
    name.starts_with("an index")
}

fn neighbour_survives(args: &[&str]) {
    let scene = Scene::new().unwrap();
    let image = Image::create(&scene, "disk.img", 4 << 20).unwrap();
    let file = format!("--blk-file={}", image.path().display());
    let all = [&["--num-queues=2"], args].concat();
    let all: Vec<&str> = all.into_iter().map(|a| if a == "FILE" { file.as_str() } else { a }).collect();
    let served = Served::start(&scene, &all);
    let mut expected = std::collections::BTreeMap::from([("ring", 0), ("memory", 0)]);
    for (name, kind, break_it) in CASES {
        let mut front = Front::connect(&served.socket, 2);
        let [bad, good] = &mut front.queues[..] else { unreachable!() };
        bad.verified_io(7, 0);
        blk::beside(good, |progress| {
            break_it(bad);
            if breaks_the_index(name) {
                bad.kick.write(1).unwrap();
            } else {
                bad.publish();
                bad.kick.write(1).unwrap();
            }
            wait::until(name, LIMIT, || Ok(bad.err.read().ok())).unwrap();
            progress.more(20);
            assert!(bad.driver.collect().is_none(), "{name}: answered");
        });
        good.verified_io(11, 1);
        // Two requests were good; what broke the queue has not been taken.
        assert_eq!(front.base(0), 2, "{name}");
        *expected.get_mut(kind).unwrap() += 1;
        for (kind, n) in &expected {
            assert_eq!(served.errors(kind), *n, "{name}: errors of kind {kind}");
        }
    }
    served.terminate();
}

#[test]
fn a_broken_ring_stops_its_queue_only_on_a_file() {
    neighbour_survives(&["FILE", "--direct=on", "--poll=adaptive"]);
}

#[test]
fn a_broken_ring_stops_its_queue_only_on_memory() {
    neighbour_survives(&["--backend=ram:4M", "--poll=event"]);
}

/// More in flight than there are descriptors: the same head made available again and again.
#[test]
fn one_head_again_and_again_is_served_or_stopped_but_harms_nobody() {
    let scene = Scene::new().unwrap();
    let image = Image::create(&scene, "disk.img", 4 << 20).unwrap();
    let file = format!("--blk-file={}", image.path().display());
    let served = Served::start(&scene, &[&file, "--num-queues=2"]);
    let mut front = Front::connect(&served.socket, 2);
    let [bad, good] = &mut front.queues[..] else { unreachable!() };
    bad.verified_io(7, 0);
    // Its descriptors still hold the read of sector 7.
    let head = bad.driver.split().unwrap().avail_ring(1);
    for _ in 0..200 {
        for _ in 0..blk::RING {
            bad.driver.make_available(head);
        }
        bad.publish();
        good.verified_io(9, 1);
    }
    drop(front);
    let mut front = Front::connect(&served.socket, 2);
    front.queues[0].verified_io(7, 2);
    front.queues[1].verified_io(9, 2);
    drop(front);
    served.terminate();
}
