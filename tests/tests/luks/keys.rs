//! Where keys come from, and where they are not.

use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::os::unix::fs::FileExt;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use kickless_tests::cryptsetup::{self, Volume};
use kickless_tests::scene::Scene;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::blk::{Front, OK, Shape, WRITE, program};
use crate::{SIZE, dir, disk};

/// A descriptor and a credential, as a service manager gives them. Files are what all else uses.
pub fn sources(scene: &Scene) -> Result<()> {
    let volume = Volume::format(&dir(scene), "given", SIZE as u64, &["--sector-size=512"])?;
    let file = format!("--blk-file={}", volume.path.display());
    for key in ["--key-fd=0", "--key-credential=given.key"] {
        let socket = scene.path(&format!("{}.sock", key.len()));
        let mut daemon = Command::new(program())
            .args([&file, "--format=luks", key, &format!("--socket-path={}", socket.display())])
            .env("CREDENTIALS_DIRECTORY", dir(scene))
            .stdin(File::open(&volume.key)?)
            .stderr(File::create(scene.fresh_log("given"))?)
            .spawn()?;
        let mut front = Front::connect(&socket, 1);
        let answer = front.queues[0].request(WRITE, 0, &Shape { out: &[512], ..Shape::default() });
        ensure!(answer == (OK, 1), "{key}: {answer:?}");
        drop(front);
        kill(Pid::from_raw(daemon.id() as i32), Signal::SIGTERM)?;
        let status = daemon.wait()?;
        ensure!(status.success(), "{key}: {status}");
    }
    Ok(())
}

/// Where in the memory of a process these bytes are, and what the kernel keeps of the mapping's flags.
fn found(pid: u32, bytes: &[u8]) -> Result<Vec<(u64, String)>> {
    let memory = File::open(format!("/proc/{pid}/mem"))?;
    let smaps = BufReader::new(File::open(format!("/proc/{pid}/smaps"))?);
    let (mut range, mut found) = (0..0, Vec::new());
    for line in smaps.lines() {
        let line = line?;
        let first = line.split(' ').next().unwrap_or_default();
        if let Some((from, to)) = first.split_once('-') {
            range = u64::from_str_radix(from, 16)?..u64::from_str_radix(to, 16)?;
        } else if line.starts_with("VmFlags:") && line.contains(" rd ") {
            let mut content = vec![0; (range.end - range.start) as usize];
            // Some of the kernel's own cannot be read.
            if memory.read_exact_at(&mut content, range.start).is_ok() {
                let places = content.windows(bytes.len()).enumerate().filter(|(_, w)| *w == bytes);
                found.extend(places.map(|(at, _)| (range.start + at as u64, line.clone() + " ")));
            }
        }
    }
    Ok(found)
}

/// The key of the slot is wiped once the volume is open; the key of the volume is where nothing is swapped out or dumped;
/// and the log, however much it tells, has neither.
pub fn hidden(scene: &Scene) -> Result<()> {
    let volume = Volume::format(&dir(scene), "hidden", SIZE as u64, &["--sector-size=512"])?;
    let key = b"a passphrase that is nowhere else 7f3a";
    cryptsetup::run(&[
        "luksChangeKey",
        "-q",
        "--pbkdf=pbkdf2",
        "--pbkdf-force-iterations=1000",
        &format!("--key-file={}", volume.key.display()),
        &volume.path.to_string_lossy(),
        &{
            fs::write(scene.path("new.key"), key)?;
            scene.path("new.key").to_string_lossy().into_owned()
        },
    ])?;
    let volume = Volume { key: scene.path("new.key"), ..volume };
    let volume_key = scene.path("volume.key");
    cryptsetup::run(&[
        "luksDump",
        "-q",
        "--dump-volume-key",
        &format!("--volume-key-file={}", volume_key.display()),
        &format!("--key-file={}", volume.key.display()),
        &volume.path.to_string_lossy(),
    ])?;
    let volume_key = fs::read(volume_key)?;
    ensure!(volume_key.len() == 64, "a key of {} bytes", volume_key.len());
    let luks = volume.args();
    let (served, mut front) = disk::serve(scene, &volume.path, &[&luks[0], &luks[1], "--log=trace"]);
    let answer = front.queues[0].request(WRITE, 0, &Shape { out: &[512], ..Shape::default() });
    ensure!(answer == (OK, 1), "write: {answer:?}");
    let pid = served.process.pid().as_raw() as u32;
    // That one can find something at all: the name of the socket.
    let socket = served.socket.to_string_lossy().into_owned();
    ensure!(!found(pid, socket.as_bytes())?.is_empty(), "nothing is found in its memory");
    let slots = found(pid, key)?;
    ensure!(slots.is_empty(), "the key of the slot is still in memory: {slots:?}");
    let keys = found(pid, &volume_key[..32])?;
    ensure!(!keys.is_empty(), "the volume's key is nowhere, but in use");
    let open: Vec<_> =
        keys.iter().filter(|(_, flags)| !(flags.contains(" lo ") && flags.contains(" dd "))).collect();
    ensure!(open.is_empty(), "the volume's key can be swapped out or dumped: {open:?}");
    let said = served.process.stderr() + &served.process.stdout();
    let hex = volume_key[..16].iter().fold(String::new(), |hex, b| hex + &format!("{b:02x}"));
    let passphrase = std::str::from_utf8(key).context("a text")?;
    for secret in [passphrase, &hex] {
        ensure!(!said.contains(secret), "the log has a key:\n{said}");
    }
    drop(front);
    served.terminate();
    Ok(())
}
