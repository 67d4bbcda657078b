//! Images of a daemon that runs already, and of a guest that goes from one daemon to another.

use std::os::unix::fs::FileTypeExt;
use std::path::Path;

use anyhow::{Result, ensure};
use kickless_tests::process::Process;
use kickless_tests::qemu_img;
use kickless_tests::scene::Scene;
use kickless_tests::wait;
use poll_engine::session::wire::F_LOG_ALL;
use serde_json::json;
use vhost::VhostBackend;

use crate::blk::{Front, LIMIT, Served, program};
use crate::disk::{Copy, check_all, step};
use crate::{SIZE, caller, raw};

const QUEUES: usize = 2;

/// An image over another one, with its data in a third file; what is in it.
fn in_three_files(scene: &Scene) -> Result<(std::path::PathBuf, Copy)> {
    let (_, bytes) = raw(scene, "base.raw", SIZE, 9)?;
    let path = scene.path("over.qcow2");
    let options = format!("cluster_size=4096,data_file={}", scene.path("over.data").display());
    qemu_img::create(&path, SIZE, &options, &["-F", "raw", "-b", "base.raw"])?;
    Ok((path, Copy::new(bytes, 11)))
}

fn look(scene: &Scene, path: &Path, copy: &Copy) -> Result<()> {
    qemu_img::check(path)?;
    let plain = scene.path("plain.raw");
    std::fs::write(&plain, &copy.bytes)?;
    qemu_img::compare((path, "qcow2"), (&plain, "raw"))
}

fn work(front: &mut Front, copy: &mut Copy) -> Result<()> {
    check_all(front, &copy.bytes)?;
    for i in 0..12 {
        step(&mut front.queues[i % QUEUES], copy)?;
    }
    Ok(())
}

/// The guest leaves, as QEMU has it leave: with writes being logged.
fn leave(mut front: Front) -> Result<()> {
    front.session.set_features(front.features | F_LOG_ALL)?;
    for queue in 0..QUEUES {
        front.base(queue);
    }
    front.queues.clear();
    Ok(())
}

/// What each daemon allocates, the other one has not seen when it opens the image.
pub fn moved(scene: &Scene) -> Result<()> {
    for direct in ["--direct=on", "--direct=off"] {
        let (path, mut copy) = in_three_files(scene)?;
        let file = format!("--blk-file={}", path.display());
        let args = [&*file, "--format=qcow2", "--num-queues=2", direct];
        let here = Served::start(scene, &args);
        let mut guest = Front::connect(&here.socket, QUEUES);
        let socket = scene.path("there.sock");
        let mut arriving = vec![format!("--socket-path={}", socket.display()), "--incoming".into()];
        arriving.extend(args.iter().map(|&arg| arg.to_owned()));
        let there = Process::spawn(scene, "there", &program(), &arriving)?;
        let is_socket = || std::fs::metadata(&socket).is_ok_and(|m| m.file_type().is_socket());
        wait::until("the daemon's socket", LIMIT, || Ok(is_socket().then_some(())))?;
        for to in [&socket, &here.socket, &socket] {
            work(&mut guest, &mut copy)?;
            leave(guest)?;
            guest = Front::connect(to, QUEUES);
        }
        work(&mut guest, &mut copy)?;
        drop(guest);
        here.terminate();
        drop(there);
        look(scene, &path, &copy)?;
        for file in ["over.qcow2", "over.data", "there.sock"] {
            let _ = std::fs::remove_file(scene.path(file));
        }
    }
    Ok(())
}

/// A daemon that has given up its rights opens an image with all that the image names.
pub fn added(scene: &Scene) -> Result<()> {
    let (path, mut copy) = in_three_files(scene)?;
    let api = scene.path("api");
    let served = Served::start(
        scene,
        &["--backend=null:1M", "--sandbox=on", &format!("--api={}", api.display()), "--num-queues=2"],
    );
    let socket = scene.path("added.sock");
    let disk = json!({ "name": "added", "socket-path": socket, "blk-file": path, "format": "qcow2" });
    let client = caller(&api);
    let answer = client.call("POST", "/v1/disks", Some(&disk))?;
    let answer = (answer.status, answer.json());
    ensure!(answer.0 == 201, "{answer:?}");
    let mut front = Front::connect(&socket, QUEUES);
    work(&mut front, &mut copy)?;
    drop(front);
    // It grows there, too.
    let answer = client.call("POST", "/v1/disks/added/grow", Some(&json!({ "size": "16M" })))?;
    ensure!(answer.status == 200, "{} {:?}", answer.status, answer.json());
    copy.bytes.resize(16 << 20, 0);
    let mut front = Front::connect(&socket, QUEUES);
    work(&mut front, &mut copy)?;
    drop(front);
    served.terminate();
    look(scene, &path, &copy)
}
