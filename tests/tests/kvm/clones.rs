//! Guests of clones of one image.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Result, ensure};
use kickless_tests::daemon::{Medium, Options};
use kickless_tests::image::MIB;
use kickless_tests::qemu_img;
use kickless_tests::scenario::{Expect, Guest, Load, Op, Plan, Platform};
use kickless_tests::scene::Scene;

use crate::OneDisk;

const GUESTS: usize = 8;
/// Seed of what their base holds.
const OF_BASE: u64 = 7;

fn pass(op: Op, seed: u64) -> Load {
    Load::new(op).expect(Expect::Written).span(MIB).requests(256).depth(16).seed(seed)
}

/// Has a daemon serve the clones, which it makes where they are missing, and each guest do its loads, all at once.
fn serve(scene: &Scene, platform: Platform, base: &Path, loads: impl Fn(u64) -> Vec<Load>) -> Result<()> {
    let path = |i: usize, what: &str| scene.path(&format!("clone-{i}.{what}"));
    let disk = |i| {
        let [socket, file] = ["sock", "qcow2"].map(|what| path(i, what));
        let (socket, file, base) = (socket.display(), file.display(), base.display());
        format!("--disk=socket-path={socket},blk-file={file},clone-of={base}")
    };
    let disks: Vec<_> = (0..GUESTS).map(disk).collect();
    let args: Vec<_> = disks.iter().map(String::as_str).collect();
    let daemon = Options::default().args(&args).spawn(scene, "daemon", Medium::Null(MIB))?;
    let sockets: Vec<PathBuf> = (0..GUESTS).map(|i| path(i, "sock")).collect();
    // They are made one after the other.
    kickless_tests::wait::until("sockets", std::time::Duration::from_secs(60), || {
        Ok(sockets.iter().all(|socket| socket.exists()).then_some(()))
    })?;
    let boot = |socket: &PathBuf| Plan::new().disk(socket, 1).boot(platform, scene);
    let mut guests: Vec<Box<dyn Guest>> = sockets.iter().map(boot).collect::<Result<_>>()?;
    let loads: Vec<_> = (0..GUESTS as u64).map(loads).collect();
    for step in 0..loads[0].len() {
        for (guest, loads) in guests.iter_mut().zip(&loads) {
            guest.start(&loads[step])?;
        }
        for guest in &mut guests {
            guest.finish()?.expect_clean()?;
        }
    }
    guests.into_iter().try_for_each(Guest::power_off)?;
    daemon.terminate()
}

/// Each finds what its base has, keeps what it writes for itself, and finds it again.
pub fn eight(scene: &Scene, platform: Platform) -> Result<Option<String>> {
    if let Some(reason) = qemu_img::missing() {
        return Ok(Some(reason));
    }
    let mut one = OneDisk::boot(scene, platform, 1)?;
    one.guest.run(&pass(Op::Write, OF_BASE))?.expect_clean()?;
    let image = one.finish()?;
    let base = scene.path("base.qcow2");
    let [from, to] = [image.path(), &base].map(|path| path.to_string_lossy());
    qemu_img::run(&["convert", "-f", "raw", "-O", "qcow2", &from, &to])?;
    let before = fs::read(&base)?;
    let first = |i| {
        let mixed = Load::verified().span(2 * MIB).requests(300).flush_every(50).seed(i);
        vec![pass(Op::Read, OF_BASE), mixed, pass(Op::Write, 100 + i), pass(Op::Read, 100 + i)]
    };
    serve(scene, platform, &base, first)?;
    serve(scene, platform, &base, |i| vec![pass(Op::Read, 100 + i)])?;
    for i in 0..GUESTS {
        qemu_img::check(&scene.path(&format!("clone-{i}.qcow2")))?;
    }
    ensure!(fs::read(&base)? == before, "the base was written to");
    Ok(None)
}
