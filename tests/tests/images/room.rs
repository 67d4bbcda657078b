//! Clusters that are allocated before they are written to: they hold zeros, whatever the file held there, or what is below.

use std::io::{Seek, SeekFrom, Write};
use std::path::Path;

use anyhow::{Context, Result, ensure};
use kickless_tests::qemu_img;
use kickless_tests::scene::Scene;
use nix::sys::signal::Signal;
use serde_json::Value;

use crate::blk::{Front, LIMIT, OK, Served, Shape, WRITE};
use crate::disk::{check_all, pattern};
use crate::quick;

const SIZE: usize = 24 << 20;

fn write(front: &mut Front, at: usize, bytes: &[u8], copy: &mut [u8]) -> Result<()> {
    let lane = &mut front.queues[0];
    lane.put(lane.more, bytes);
    let shape = Shape { out: &[bytes.len() as u32], out_at: Some(lane.more), ..Shape::default() };
    let answer = lane.request(WRITE, (at / 512) as u64, &shape);
    ensure!(answer == (OK, 1), "write at {at}: {answer:?}");
    copy[at..at + bytes.len()].copy_from_slice(bytes);
    Ok(())
}

/// Bytes of the disk that an image has clusters for.
fn allocated(path: &Path) -> Result<u64> {
    let text = qemu_img::run(&["map", "--output=json", "-f", "qcow2", &path.to_string_lossy()])?;
    let map: Value = serde_json::from_str(&text)?;
    let stretches = map.as_array().context("no map")?.iter();
    Ok(stretches.filter(|s| s.get("offset").is_some()).filter_map(|s| s["length"].as_u64()).sum())
}

/// Writes here and there, is killed, and has it looked at.
fn written(scene: &Scene, path: &Path, mut copy: Vec<u8>, args: &[&str]) -> Result<()> {
    let image = format!("--blk-file={}", path.display());
    let args = [&[&*image, "--format=qcow2"], args].concat();
    for round in 0..3 {
        let mut served = Served::start(scene, &args);
        let mut front = Front::connect(&served.socket, 1);
        check_all(&mut front, &copy)?;
        for (i, at) in
            [5 << 20, (5 << 20) + 512, (9 << 20) - 4096, 17 << 20, SIZE - 8192].into_iter().enumerate()
        {
            let mut bytes = pattern(8192, (round * 8 + i) as u64);
            bytes[0] = 1;
            write(&mut front, at - round * 4096, &bytes, &mut copy)?;
        }
        // Whole clusters, in order.
        for i in 0..8 {
            write(
                &mut front,
                (10 << 20) + (round * 8 + i) * 65536,
                &pattern(65536, i as u64 + 9),
                &mut copy,
            )?;
        }
        check_all(&mut front, &copy)?;
        served.process.signal(Signal::SIGKILL)?;
        served.process.wait_exit(LIMIT)?;
        drop(front);
        std::fs::remove_file(&served.socket)?;
        // What it has given to the kernel ends when its locks do.
        Served::start(scene, &args).terminate();
        qemu_img::check(path)?;
        let plain = path.with_extension("raw");
        std::fs::write(&plain, &copy)?;
        qemu_img::compare((path, "qcow2"), (&plain, "raw"))?;
    }
    Ok(())
}

/// The file has something else where it gets its new clusters.
pub fn zeros(scene: &Scene) -> Result<()> {
    for (cluster, direct) in [(4096, "off"), (65536, "on"), (2 << 20, "off")] {
        let memory = quick(scene)?;
        let path = if direct == "on" { scene.path("room.qcow2") } else { memory.path().join("room.qcow2") };
        qemu_img::create(&path, SIZE as u64, &format!("cluster_size={cluster}"), &[])?;
        let mut file = std::fs::OpenOptions::new().write(true).open(&path)?;
        file.seek(SeekFrom::End(0))?;
        file.write_all(&vec![0xff; 12 << 20])?;
        file.sync_all()?;
        written(scene, &path, vec![0; SIZE], &[&format!("--direct={direct}")])?;
        let allocated = allocated(&path)?;
        ensure!(allocated > 8 << 20, "only {allocated} bytes were allocated");
    }
    Ok(())
}

/// What is below ends in the middle of a cluster, and has holes of its own.
pub fn over_a_base(scene: &Scene) -> Result<()> {
    let memory = quick(scene)?;
    let mut bytes = pattern(13 << 20, 3);
    bytes[4 << 20..(5 << 20) + 1024].fill(0);
    bytes.truncate((12 << 20) + 1024 + 512);
    let (plain, base) = (memory.path().join("base.raw"), memory.path().join("base.qcow2"));
    std::fs::write(&plain, &bytes)?;
    let [from, to] = [&plain, &base].map(|p| p.to_string_lossy());
    qemu_img::run(&["convert", "-o", "cluster_size=1024", "-f", "raw", "-O", "qcow2", &from, &to])?;
    bytes.resize(SIZE, 0);
    let path = memory.path().join("over.qcow2");
    qemu_img::create(&path, SIZE as u64, "", &["-F", "qcow2", "-b", &to])?;
    written(scene, &path, bytes, &[])?;
    // What was zeros is its own now, what was not is not.
    let allocated = allocated(&path)?;
    ensure!(allocated > 8 << 20 && allocated < 23 << 20, "{allocated} bytes were allocated");
    Ok(())
}
