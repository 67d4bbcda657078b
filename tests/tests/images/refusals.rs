//! What is not used, and what is said of it.

use std::fs;
use std::os::unix::fs::FileExt;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail, ensure};
use kickless_tests::qemu_img;
use kickless_tests::scene::Scene;

use crate::blk::{Served, program};
use crate::{SIZE, raw};

/// Runs the daemon, which must say one line with all of `parts` in it and end.
fn fails_with(scene: &Scene, args: &[&str], parts: &[&str]) -> Result<()> {
    let mut command = Command::new("timeout");
    command.arg("20").arg(program()).arg(format!("--socket-path={}", scene.path("none.sock").display()));
    let output = command.args(args).stdin(Stdio::null()).output()?;
    let text = String::from_utf8_lossy(&output.stderr);
    let is_log = |line: &&str| [" INFO", " WARN"].iter().any(|level| line.contains(level));
    let said: Vec<_> = text.lines().filter(|l| !is_log(l)).collect();
    let sound = said.len() == 1 && parts.iter().all(|p| said[0].contains(p));
    ensure!(
        sound && matches!(output.status.code(), Some(1 | 2)),
        "{args:?} {parts:?}: {}\n{text}",
        output.status
    );
    Ok(())
}

pub fn refused(scene: &Scene) -> Result<()> {
    let at = |name: &str| scene.path(name).to_string_lossy().into_owned();
    let with = |name: &str, parts: &[&str]| {
        fails_with(scene, &["--format=qcow2", &format!("--blk-file={}", at(name))], parts)
    };
    raw(scene, "plain.raw", SIZE, 1)?;
    with("plain.raw", &["no qcow2 image", "--format"])?;
    let create =
        |name: &str, options: &str, more: &[&str]| qemu_img::create(&scene.path(name), SIZE, options, more);
    // Chains.
    create("over.qcow2", "", &["-u", "-F", "qcow2", "-b", "missing.qcow2"])?;
    with("over.qcow2", &["cannot open", "missing.qcow2"])?;
    create("a.qcow2", "", &["-u", "-F", "qcow2", "-b", "b.qcow2"])?;
    create("b.qcow2", "", &["-u", "-F", "qcow2", "-b", "a.qcow2"])?;
    with("a.qcow2", &["twice", "a.qcow2"])?;
    create("odd.qcow2", "", &["-u", "-F", "vpc", "-b", "plain.raw"])?;
    with("odd.qcow2", &["plain.raw", "vpc", "none of raw, qcow2, vmdk"])?;
    create("00.qcow2", "", &[])?;
    create("01.qcow2", "", &["-u", "-F", "qcow2", "-b", "00.qcow2"])?;
    let over = fs::read(scene.path("01.qcow2"))?;
    let name = over.windows(8).position(|w| w == b"00.qcow2").context("no backing file")?;
    for i in 2..=64 {
        let below = format!("{:02}.qcow2", i - 1);
        fs::write(
            scene.path(&format!("{i:02}.qcow2")),
            [&over[..name], below.as_bytes(), &over[name + 8..]].concat(),
        )?;
    }
    with("64.qcow2", &["at most 64 files"])?;
    let most = format!("--blk-file={}", at("63.qcow2"));
    Served::start(scene, &["--format=qcow2", &most]).terminate();
    // A backing file whose format nobody has said: the extension is turned into one that nobody knows.
    create("plain.qcow2", "", &["-F", "raw", "-b", "plain.raw"])?;
    let file = fs::File::options().read(true).write(true).open(scene.path("plain.qcow2"))?;
    let mut start = vec![0; 1024];
    file.read_exact_at(&mut start, 0)?;
    let extension = start.windows(4).position(|w| w == [0xe2, 0x79, 0x2a, 0xca]).context("no format")?;
    file.write_all_at(&[1, 2, 3, 4], extension as u64)?;
    with("plain.qcow2", &["does not say which format", "plain.raw", "qemu-img rebase"])?;
    // What is not known.
    create("zstd.qcow2", "compression_type=zstd", &[])?;
    with("zstd.qcow2", &["zlib", "qemu-img convert"])?;
    create("sub.qcow2", "extended_l2=on", &[])?;
    with("sub.qcow2", &["extended L2"])?;
    create("dirty.qcow2", "lazy_refcounts=on", &[])?;
    fs::File::options().write(true).open(scene.path("dirty.qcow2"))?.write_all_at(&[1], 79)?;
    with("dirty.qcow2", &["not closed", "qemu-img check"])?;
    // The command line.
    let file = format!("--blk-file={}", at("00.qcow2"));
    fails_with(scene, &["--format=qed", &file], &["raw", "qcow2", "vmdk"])?;
    fails_with(scene, &["--format=vmdk", &file], &["only be read", "read-only"])?;
    fails_with(scene, &["--format=qcow2", "--backend=ram:1M"], &["format goes with blk-file"])?;
    fails_with(scene, &["--format=vmdk", "--read-only", &file], &["cannot use", "00.qcow2"])?;
    fails_with(
        scene,
        &["--format=qcow2", "--block-size=1024", &format!("--blk-file={}", at("none"))],
        &["cannot open"],
    )
}

pub fn locked(scene: &Scene) -> Result<()> {
    raw(scene, "base.raw", SIZE, 1)?;
    for name in ["a.qcow2", "b.qcow2"] {
        qemu_img::create(&scene.path(name), SIZE, "", &["-F", "raw", "-b", "base.raw"])?;
    }
    let file = |name: &str| format!("--blk-file={}", scene.path(name).display());
    let both = format!(
        "socket-path={},format=qcow2,blk-file={}",
        scene.path("b.sock").display(),
        scene.path("b.qcow2").display()
    );
    let served = Served::start(scene, &["--format=qcow2", &file("a.qcow2"), "--disk", &both]);
    // Two over one, but nobody writes to that, and nobody else to those.
    std::thread::scope(|scope| {
        // Each waits a while for its locks.
        let base = scope.spawn(|| fails_with(scene, &[&file("base.raw")], &["does not allow writers"]));
        fails_with(scene, &["--format=qcow2", &file("a.qcow2")], &["open for writing"])?;
        base.join().unwrap_or_else(|_| bail!("it panicked"))
    })?;
    let (code, text) = kickless_tests::process::run(
        "qemu-img",
        &["resize", &scene.path("b.qcow2").to_string_lossy(), "+1M"],
    )?;
    ensure!(code != 0 && text.contains("lock"), "{text}");
    served.terminate();
    qemu_img::run(&["resize", "-q", "-f", "qcow2", &scene.path("b.qcow2").to_string_lossy(), "+1M"])?;
    Ok(())
}
