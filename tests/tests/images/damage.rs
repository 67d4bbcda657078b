//! Images with bytes turned at random: they are refused, or served as far as they go. Nothing panics or hangs, and memory
//! stays bounded.

use std::fs;
use std::os::unix::fs::FileTypeExt;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use kickless_tests::process::Process;
use kickless_tests::qemu_img;
use kickless_tests::random::Random;
use kickless_tests::scene::Scene;
use kickless_tests::wait;

use crate::blk::{FLUSH, Front, READ, Shape, WRITE, program};
use crate::{SIZE, raw};

const LIMIT: Duration = Duration::from_secs(20);
/// More than any daemon with two queues takes.
const MAX_MEMORY_KIB: u64 = 512 << 10;

/// How many; `KICKLESS_DAMAGES` says otherwise.
fn damages() -> usize {
    std::env::var("KICKLESS_DAMAGES").ok().and_then(|n| n.parse().ok()).unwrap_or(30)
}

fn turn(bytes: &mut [u8], random: &mut Random) {
    for _ in 0..=random.below(4) {
        // The header, or one of the tables that are behind it.
        let within = [112, 1024, 4 * 4096, bytes.len()][random.below(4)];
        let at = random.below(within);
        bytes[at] = match random.below(3) {
            0 => random.number() as u8,
            1 => 0xff,
            _ => bytes[at] ^ 1 << random.below(8),
        };
    }
}

/// Peak of a process's memory.
fn peak_kib(process: &Process) -> Result<u64> {
    let status = fs::read_to_string(format!("/proc/{}/status", process.pid()))?;
    let line = status.lines().find_map(|l| l.strip_prefix("VmHWM:")).context("VmHWM")?;
    Ok(line.trim().trim_end_matches("kB").trim().parse()?)
}

/// Whether it was served.
fn one(scene: &Scene, bytes: &[u8], number: usize) -> Result<bool> {
    let (path, socket) = (scene.path("damaged.qcow2"), scene.path("damaged.sock"));
    fs::write(&path, bytes)?;
    let _ = fs::remove_file(&socket);
    let args = [
        format!("--socket-path={}", socket.display()),
        "--format=qcow2".into(),
        format!("--blk-file={}", path.display()),
    ];
    let mut daemon = Process::spawn(scene, &format!("damaged-{number}"), &program(), &args)?;
    let is_up = wait::until("a socket or the end", LIMIT, || {
        if daemon.poll_exit()?.is_some() {
            return Ok(Some(false));
        }
        Ok(fs::metadata(&socket).is_ok_and(|m| m.file_type().is_socket()).then_some(true))
    })?;
    if is_up {
        let mut front = Front::connect(&socket, 1);
        let lane = &mut front.queues[0];
        for sector in (0..SIZE / 512 - 128).step_by(1021) {
            let at = lane.more;
            // Any answer will do, as long as there is one.
            lane.request(READ, sector, &Shape { into: &[65536], into_at: Some(at), ..Shape::default() });
            lane.request(WRITE, sector, &Shape { out: &[4096], out_at: Some(at), ..Shape::default() });
        }
        lane.request(FLUSH, 0, &Shape::default());
        let peak = peak_kib(&daemon)?;
        ensure!(peak < MAX_MEMORY_KIB, "it took {peak} KiB");
        drop(front);
        daemon.signal(nix::sys::signal::Signal::SIGTERM)?;
    }
    let status = daemon.wait_exit(LIMIT)?;
    let said = daemon.stderr();
    let lines = said.lines().filter(|l| l.starts_with("vhost-blk: ")).count();
    match (is_up, status.code()) {
        _ if said.contains("panicked") => bail!("{said}"),
        (true, Some(0)) => Ok(true),
        (false, Some(1)) if lines == 1 => Ok(false),
        _ => bail!("{status}\n{said}"),
    }
}

pub fn damaged(scene: &Scene) -> Result<()> {
    let (plain, _) = raw(scene, "content.raw", SIZE, 7)?;
    let mut served = 0;
    let seed = u64::from(std::process::id());
    for number in 0..damages() {
        let mut random = Random(seed.wrapping_mul(1_000_003) + number as u64);
        let path = scene.path("sound.qcow2");
        if number % 20 == 0 {
            let [from, to] = [&plain, &path].map(|p| p.to_string_lossy());
            let packed: &[&str] = if number % 40 == 0 { &[] } else { &["-c"] };
            qemu_img::run(
                &[&["convert", "-o", "cluster_size=4096", "-f", "raw", "-O", "qcow2"], packed, &[&from, &to]]
                    .concat(),
            )?;
        }
        let mut bytes = fs::read(&path)?;
        turn(&mut bytes, &mut random);
        served +=
            usize::from(one(scene, &bytes, number).with_context(|| format!("image {number}, seed {seed}"))?);
    }
    println!("{} damaged images, {served} of them served", damages());
    Ok(())
}
