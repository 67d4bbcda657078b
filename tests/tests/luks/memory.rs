//! Volumes on tmpfs, which are read and written on the reactor, at once or piece by piece; and guests that change what is being
//! read and written.

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use kickless_tests::cryptsetup::Volume;
use kickless_tests::random::Random;
use kickless_tests::scene::Scene;
use poll_engine::ring::driver::Buffer;

use crate::blk::{FLUSH, LIMIT, Lane, OK, READ, Served, Shape, WRITE};
use crate::disk::{check_all, pattern, step};
use crate::{SIZE, copy_of, dir, disk, same};

/// Threads of the daemon that the kernel has made for io_uring, to wait where the reactor does not.
fn workers(served: &Served) -> Result<usize> {
    let names = std::fs::read_dir(format!("/proc/{}/task", served.process.pid()))?
        .map(|task| Ok(std::fs::read_to_string(task?.path().join("comm"))?));
    let names = names.collect::<Result<Vec<_>>>()?;
    ensure!(!names.is_empty(), "no threads");
    Ok(names.iter().filter(|name| name.starts_with("iou-wrk")).count())
}

pub fn at_once(_: &Scene) -> Result<()> {
    let memory = tempfile::tempdir_in("/dev/shm")?;
    for (sector, poll) in [(512, "--poll=busy"), (4096, "--poll=event")] {
        let data = pattern(SIZE, sector as u64);
        let size = format!("--sector-size={sector}");
        let volume = Volume::encrypt(memory.path(), &format!("v{sector}"), &data, &[&size])?;
        let mut copy = copy_of(data, sector);
        let luks = volume.args();
        let scene = Scene::new()?;
        let (served, mut front) = disk::serve(&scene, &volume.path, &[&luks[0], &luks[1], poll]);
        for i in 0..60 {
            step(&mut front.queues[i % 2], &mut copy)?;
        }
        many_at_once(&mut front.queues[0], &mut copy.bytes)?;
        check_all(&mut front, &copy.bytes)?;
        ensure!(front.queues[1].request(FLUSH, 0, &Shape::default()) == (OK, 1), "flush");
        ensure!(workers(&served)? == 0, "a volume in memory is waited for elsewhere");
        ensure!(!served.stats().contains("\nerrors "), "{}", served.stats());
        drop(front);
        served.terminate();
        same(&volume.decrypt()?, &copy.bytes)?;
    }
    Ok(())
}

/// Requests longer than a piece, which wait for each other's buffer, and short ones among them, which do not.
fn many_at_once(lane: &mut Lane, bytes: &mut [u8]) -> Result<()> {
    const KIB: usize = 1 << 10;
    const PARTS: [(usize, usize); 6] = [
        (0, 256 * KIB),
        (256 * KIB, 4 * KIB),
        (260 * KIB, 300 * KIB),
        (560 * KIB, 128 * KIB),
        (688 * KIB, 16 * KIB),
        (704 * KIB, 320 * KIB),
    ];
    let new = pattern(1 << 20, 99);
    for kind in [WRITE, READ] {
        lane.put(lane.more, &if kind == WRITE { new.clone() } else { vec![0xa5; 1 << 20] });
        for (i, (at, len)) in PARTS.into_iter().enumerate() {
            let (header, status) = (lane.area + 16 * i as u64, lane.area + 1024 + i as u64);
            let sector = (at / 512) as u64;
            lane.put(header, &[&kind.to_le_bytes()[..], &[0; 4], &sector.to_le_bytes()].concat());
            lane.put(status, &[0xff]);
            let data = Buffer { addr: lane.more + at as u64, len: len as u32, writable: kind == READ };
            let [header, status] =
                [(header, 16), (status, 1)].map(|(addr, len)| Buffer { addr, len, writable: len == 1 });
            lane.driver.add(&[header, data, status]).context("no room in the ring")?;
        }
        lane.publish();
        let (mut over, since) = (0, Instant::now());
        while over < PARTS.len() {
            over += usize::from(lane.driver.collect().is_some());
            ensure!(since.elapsed() < LIMIT, "{over} of {} are over", PARTS.len());
        }
        ensure!(lane.get(lane.area + 1024, PARTS.len()) == [OK; PARTS.len()], "not all succeeded");
        same(&lane.get(lane.more, 1 << 20), &new)?;
    }
    bytes[..1 << 20].copy_from_slice(&new);
    Ok(())
}

/// A guest writes to the buffers of requests that are under way. What it has of it is one of the bytes that it wrote, or the
/// disk's; what is beside it on the disk stays, and so does the daemon.
fn changed(scene: &Scene, place: &Path) -> Result<()> {
    const LEN: usize = 640 << 10;
    let volume = Volume::format(place, "changed", SIZE as u64, &["--sector-size=4096"])?;
    let luks = volume.args();
    let (served, mut front) = disk::serve(scene, &volume.path, &[&luks[0], &luks[1], "--poll=adaptive"]);
    let lane = &mut front.queues[0];
    let rest = pattern(LEN, 5);
    lane.put(lane.more, &rest);
    let at = |sector| (sector * LEN / 512) as u64;
    let out = Shape { out: &[LEN as u32], out_at: Some(lane.more), ..Shape::default() };
    ensure!(lane.request(WRITE, at(1), &out) == (OK, 1), "write");
    let (stop, map, more) = (AtomicBool::new(false), std::sync::Arc::clone(&lane.map), lane.more);
    let mut random = Random(17);
    std::thread::scope(|scope| {
        let guest = scope.spawn(|| {
            for byte in [0x5au8, 0xc3].into_iter().cycle() {
                if stop.load(Ordering::Relaxed) {
                    break;
                }
                if let Some(slice) = map.slice(more, LEN as u32) {
                    slice.fill(byte);
                }
            }
        });
        let written = (0..60).try_for_each(|round| {
            let len = [4096, 128 << 10, LEN][round % 3];
            // Whole sectors, and parts of them.
            let first = if round % 2 == 0 { len } else { 1 + random.below(len - 1) };
            let lens = [first as u32, (len - first) as u32];
            let cut = &lens[..if first == len { 1 } else { 2 }];
            let shape = Shape { out: cut, out_at: Some(more), ..Shape::default() };
            ensure!(lane.request(WRITE, at(0), &shape) == (OK, 1), "write of {len}");
            let shape = Shape { into: cut, into_at: Some(more), ..Shape::default() };
            ensure!(lane.request(READ, at(1), &shape) == (OK, len as u32 + 1), "read of {len}");
            Ok(())
        });
        stop.store(true, Ordering::Relaxed);
        guest.join().map_err(|_| anyhow::anyhow!("the guest has died"))?;
        written
    })?;
    let into = Shape { into: &[LEN as u32], into_at: Some(more), ..Shape::default() };
    ensure!(lane.request(READ, at(0), &into) == (OK, LEN as u32 + 1), "read");
    let found = lane.get(more, LEN);
    let from_rest = |(i, byte): (usize, &u8)| *byte == rest[i];
    let own = |byte: &u8| [0x5a, 0xc3].contains(byte);
    let other = found.iter().enumerate().position(|(i, byte)| !own(byte) && !from_rest((i, byte)));
    ensure!(other.is_none(), "at byte {other:?} is what nobody wrote");
    ensure!(lane.request(READ, at(1), &into) == (OK, LEN as u32 + 1), "read");
    same(&lane.get(more, LEN), &rest)?;
    drop(front);
    served.terminate();
    Ok(())
}

pub fn changed_meanwhile(scene: &Scene) -> Result<()> {
    let memory = tempfile::tempdir_in("/dev/shm")?;
    changed(scene, memory.path())?;
    changed(&Scene::new()?, &dir(scene))
}
