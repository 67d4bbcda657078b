//! What is not opened, and what is said of it.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Result, ensure};
use kickless_tests::cryptsetup::{self, OFFSET, Volume};
use kickless_tests::scene::Scene;

use crate::blk::{Served, program};
use crate::{SIZE, dir, disk};

/// Runs the daemon, which must say one line with all of `parts` in it and end.
fn fails_with(scene: &Scene, args: &[&str], parts: &[&str]) -> Result<()> {
    let mut command = Command::new("timeout");
    command.arg("60").arg(program()).arg(format!("--socket-path={}", scene.path("none.sock").display()));
    let output = command.args(args).stdin(Stdio::null()).output()?;
    let text = String::from_utf8_lossy(&output.stderr);
    let is_log = |line: &&str| [" INFO", " WARN"].iter().any(|level| line.contains(level));
    let said: Vec<_> = text.lines().filter(|l| !is_log(l)).collect();
    let sound = said.len() == 1 && parts.iter().all(|p| said[0].contains(p));
    let code = output.status.code();
    ensure!(sound && matches!(code, Some(1 | 2)), "{args:?} {parts:?}: {}\n{text}", output.status);
    Ok(())
}

/// The same, of a volume that is to be opened by its key.
fn is_refused(scene: &Scene, volume: &Volume, parts: &[&str]) -> Result<()> {
    let luks = volume.args();
    let file = format!("--blk-file={}", volume.path.display());
    fails_with(scene, &[&luks[0], &luks[1], &file], parts)
}

fn write(path: &Path, at: u64, bytes: &[u8]) -> Result<()> {
    Ok(File::options().write(true).open(path)?.write_all_at(bytes, at)?)
}

pub fn refused(scene: &Scene) -> Result<()> {
    let dir = dir(scene);
    let new = |name: &str, options: &[&str]| Volume::format(&dir, name, SIZE as u64, options);
    // Keys.
    let volume = new("a", &[])?;
    let other = |name: &str| Volume { key: dir.join(name), ..volume.clone() };
    fs::write(dir.join("wrong"), "the key of a")?;
    is_refused(scene, &other("wrong"), &["no key slot opens with this key"])?;
    fs::write(dir.join("empty"), "")?;
    is_refused(scene, &other("empty"), &["is empty"])?;
    fs::write(dir.join("long"), vec![7; (1 << 20) + 1])?;
    is_refused(scene, &other("long"), &["more than 1048576 bytes"])?;
    is_refused(scene, &other("missing"), &["missing", "No such file"])?;
    let file = format!("--blk-file={}", volume.path.display());
    fails_with(scene, &["--format=luks", &file], &["luks needs its key"])?;
    fails_with(
        scene,
        &["--format=luks", "--key-credential=k", &file],
        &["no credential k", "LoadCredential="],
    )?;
    fails_with(scene, &["--format=luks", "--key-fd=77", &file], &["descriptor 77"])?;
    fails_with(scene, &[&file, "--key-fd=77"], &["goes with format luks"])?;
    // Key slots: the first byte of the only one, and the whole of it.
    for len in [1, 4096] {
        let slot = new("slot", &[])?;
        let mut bytes = vec![0; len];
        File::open(&slot.path)?.read_exact_at(&mut bytes, 32 << 10)?;
        // Whatever they are, others.
        for byte in &mut bytes {
            *byte ^= 0xee;
        }
        write(&slot.path, 32 << 10, &bytes)?;
        is_refused(scene, &slot, &["no key slot opens with this key"])?;
    }
    // Headers.
    let plain = Volume { path: dir.join("plain"), ..volume.clone() };
    fs::write(&plain.path, disk::pattern(SIZE, 4))?;
    is_refused(scene, &plain, &["no LUKS header", "another format"])?;
    let both = new("both", &[])?;
    for copy in [0, 16 << 10] {
        write(&both.path, copy + 4096 + 20, b"damage")?;
    }
    is_refused(scene, &both, &["both copies of its header are damaged"])?;
    for len in [100, 4096, 20 << 10, 1 << 20, OFFSET, OFFSET + 511] {
        let short = new("short", &[])?;
        File::options().write(true).open(&short.path)?.set_len(len)?;
        is_refused(scene, &short, &["short"])?;
    }
    // What is not known.
    let old = new("old", &[])?;
    let path = old.path.to_string_lossy();
    cryptsetup::run(&[
        "luksFormat",
        "-q",
        "--type=luks1",
        "--pbkdf-force-iterations=1000",
        &path,
        &old.key.to_string_lossy(),
    ])?;
    is_refused(scene, &old, &["LUKS1", "cryptsetup convert"])?;
    is_refused(scene, &new("half", &["--key-size=256"])?, &["256 bits", "--key-size 512"])?;
    is_refused(
        scene,
        &new("cbc", &["--cipher=aes-cbc-essiv:sha256"])?,
        &["aes-cbc-essiv:sha256", "only aes-xts-plain64"],
    )?;
    let begun = new("begun", &[])?;
    let [path, key] = [&begun.path, &begun.key].map(|path| path.to_string_lossy());
    let key = format!("--key-file={key}");
    cryptsetup::run(&[
        "reencrypt",
        "--init-only",
        "-q",
        "--pbkdf-force-iterations=1000",
        "--pbkdf=pbkdf2",
        "--force-offline-reencrypt",
        &key,
        &path,
    ])?;
    is_refused(scene, &begun, &["reencrypt"])
}

/// One copy of the header is enough, and nobody changes the file for the other one.
pub fn damaged(scene: &Scene) -> Result<()> {
    for (name, at) in [("first", 0), ("json", 4096 + 20), ("second", 16 << 10)] {
        let volume = Volume::format(&dir(scene), name, SIZE as u64, &[])?;
        write(&volume.path, at, b"damage")?;
        let before = fs::read(&volume.path)?;
        let luks = volume.args();
        let file = format!("--blk-file={}", volume.path.display());
        let served = Served::start(scene, &[&luks[0], &luks[1], &file, "--num-queues=2"]);
        let said = served.process.stderr();
        ensure!(said.contains("one of the two copies of its LUKS header is damaged"), "{name}: {said}");
        served.terminate();
        ensure!(fs::read(&volume.path)? == before, "{name}: it was written to");
    }
    Ok(())
}
