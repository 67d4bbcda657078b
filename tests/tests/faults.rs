//! Disks that are faulty on purpose: what their guests see is what was asked for, and nothing else of it goes wrong.
#![allow(clippy::unwrap_used)]

mod blk;

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use blk::{FLUSH, Front, IOERR, LIMIT, Lane, OK, READ, Served, Shape, WRITE};
use kickless_tests::image::Image;
use kickless_tests::process::built;
use kickless_tests::scene::Scene;
use kickless_tests::wait;
use poll_engine::ring::driver::Buffer;

const SIZE: u64 = 1 << 20;

fn serve(scene: &Scene, fault: &str) -> (Served, Front, Image) {
    let image = Image::create(scene, "disk.img", SIZE).unwrap();
    let served = Served::start(
        scene,
        &[&format!("--blk-file={}", image.path().display()), &format!("--fault={fault}"), "--num-queues=2"],
    );
    let front = Front::connect(&served.socket, 2);
    (served, front, image)
}

fn write(lane: &mut Lane, sector: u64, byte: u8, sectors: usize) -> u8 {
    lane.put(lane.more, &vec![byte; sectors * 512]);
    let shape = Shape { out: &[sectors as u32 * 512], out_at: Some(lane.more), ..Shape::default() };
    lane.request(WRITE, sector, &shape).0
}

fn read(lane: &mut Lane, sector: u64) -> u8 {
    lane.request(READ, sector, &Shape { into: &[512], ..Shape::default() }).0
}

/// Puts a request of one sector in the ring, with its header and status at `at`; nobody is told yet.
fn put(lane: &mut Lane, at: u64, kind: u32) -> u16 {
    let header = [&kind.to_le_bytes()[..], &[0; 12]].concat();
    lane.put(at, &header);
    lane.put(at + 32, &[0xff]);
    let buffers = [
        Buffer { addr: at, len: 16, writable: false },
        Buffer { addr: at + 512, len: 512, writable: kind == READ },
        Buffer { addr: at + 32, len: 1, writable: true },
    ];
    lane.driver.add(&buffers).unwrap()
}

fn collect(lane: &mut Lane) -> u16 {
    wait::until("an answer", LIMIT, || Ok(lane.driver.collect())).unwrap().0
}

#[test]
fn what_is_late_is_overtaken_and_nobody_waits_for_it() {
    let scene = Scene::new().unwrap();
    let (served, mut front, _image) = serve(&scene, "delay-write=uniform:300ms:400ms");
    let lane = &mut front.queues[0];
    // Both at once: the write first.
    let begun = Instant::now();
    let at = lane.area;
    let (late, early) = (put(lane, at, WRITE), put(lane, at + 4096, READ));
    lane.publish();
    assert_eq!(collect(lane), early);
    assert_eq!(collect(lane), late);
    assert!(begun.elapsed() >= Duration::from_millis(300));
    assert_eq!((lane.get(at + 32, 1), lane.get(at + 4096 + 32, 1)), (vec![OK], vec![OK]));
    // A dozen that are late at the same time: each has its own timer, and all are answered once.
    let mut asked: Vec<_> = (0..12).map(|i| put(lane, at + 2048 * i, WRITE)).collect();
    lane.publish();
    let mut answered: Vec<_> = (0..12).map(|_| collect(lane)).collect();
    asked.sort_unstable();
    answered.sort_unstable();
    assert_eq!(asked, answered);
    // A queue that is to stop answers what is late first.
    let begun = Instant::now();
    let (late, early) = (put(lane, at, WRITE), put(lane, at + 4096, READ));
    lane.publish();
    // By now both were taken.
    assert_eq!(collect(lane), early);
    let index = front.base(0);
    assert!(begun.elapsed() >= Duration::from_millis(300), "it was not waited for");
    assert_eq!(index, 16);
    assert_eq!(front.queues[0].driver.collect().map(|(head, _)| head), Some(late));
    front.queues[1].verified_io(9, 1);
    drop(front);
    served.terminate();
}

#[test]
fn what_fails_is_counted_and_changes_nothing() {
    let scene = Scene::new().unwrap();
    let (served, mut front, image) = serve(&scene, "error-write=1,delay-write=1ms,error-flush=1");
    let lane = &mut front.queues[0];
    assert_eq!(write(lane, 3, 0xaa, 4), IOERR);
    assert_eq!(lane.request(FLUSH, 0, &Shape::default()).0, IOERR);
    assert_eq!(read(lane, 3), OK);
    assert_eq!(served.errors("io"), 2);
    drop(front);
    let said = served.process.stderr();
    assert!(said.contains("FAULTY ON PURPOSE") && said.contains("failed on purpose"), "{said}");
    served.terminate();
    assert!(image.read(0, SIZE as usize).unwrap().iter().all(|&b| b == 0));
}

#[test]
fn a_torn_write_leaves_its_beginning() {
    let scene = Scene::new().unwrap();
    let (served, mut front, image) = serve(&scene, "torn=1,seed=4");
    let mut lengths = [0; 8];
    for i in 0..64 {
        let status = write(&mut front.queues[i % 2], 8 * i as u64, 1 + i as u8, 8);
        assert_eq!(status, IOERR);
    }
    drop(front);
    served.terminate();
    for (i, found) in image.read(0, 64 * 4096).unwrap().chunks(4096).enumerate() {
        let len = found.iter().position(|&b| b != 1 + i as u8).unwrap();
        assert!(len % 512 == 0 && found[len..].iter().all(|&b| b == 0), "write {i}: {len}");
        lengths[len / 512] += 1;
    }
    assert!(lengths.iter().all(|&n| n > 0), "{lengths:?}");
}

#[test]
fn the_same_seed_is_the_same_fate() {
    let scene = Scene::new().unwrap();
    let fates = |seed: u32| {
        let (served, mut front, _image) = serve(&scene, &format!("error=0.4,seed={seed}"));
        let fates: Vec<_> = (0..80).map(|i| read(&mut front.queues[i / 40], 5)).collect();
        drop(front);
        served.terminate();
        fates
    };
    let first = fates(1);
    assert_eq!(first, fates(1));
    assert_ne!(first, fates(2));
    assert_ne!(first[..40], first[40..], "queues have their own");
}

/// What `vbench cut` says.
fn cut(args: &[&Path], more: &[&str]) -> (bool, String) {
    let output = Command::new(built("vbench").expect("vbench is not built: cargo build"))
        .arg("cut")
        .args(args)
        .args(more)
        .output()
        .unwrap();
    (output.status.success(), String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned())
}

#[test]
fn the_power_is_cut_by_a_log_and_the_log_is_nobodys_to_overwrite() {
    let scene = Scene::new().unwrap();
    let log = scene.path("writes");
    let (served, mut front, image) = serve(&scene, &format!("log-writes={},error-read=1", log.display()));
    let lane = &mut front.queues[0];
    assert_eq!(write(lane, 0, 1, 8), OK);
    assert_eq!(lane.request(FLUSH, 0, &Shape::default()).0, OK);
    assert_eq!(write(lane, 8, 2, 8), OK);
    assert_eq!(read(lane, 0), IOERR);
    drop(front);
    served.terminate();
    let before = scene.path("before");
    fs::write(&before, vec![0; SIZE as usize]).unwrap();
    let (done, said) = cut(&[&log], &[]);
    assert!(
        done && said.contains(&format!("file 0: {}, {SIZE} bytes before", image.path().display())),
        "{said}"
    );
    let end = fs::metadata(&log).unwrap().len().to_string();
    let (done, said) = cut(&[&log, &before], &["--seed=3", "--at", &end]);
    assert!(done && said.contains("a power cut at"), "{said}");
    let found = fs::read(&before).unwrap();
    assert!(found[..4096].iter().all(|&b| b == 1), "what was flushed is not there");
    let (done, said) = cut(&[&scene.path("none"), &before], &[]);
    assert!(!done && said.contains("none"), "{said}");
    fs::write(&before, [0; 512]).unwrap();
    let (done, said) = cut(&[&log, &before], &[]);
    assert!(!done && said.contains("give a copy from then"), "{said}");
    // It is there already.
    let fault = format!("--fault=log-writes={}", log.display());
    let file = format!("--blk-file={}", image.path().display());
    let socket = format!("--socket-path={}", scene.path("x.sock").display());
    let output = Command::new(blk::program()).args([&socket, &file, &fault]).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success() && said.contains("it exists; remove it or name another file"), "{said}");
}
