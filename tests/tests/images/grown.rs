//! Images that grow while they are in use, and daemons that die meanwhile.

use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use anyhow::{Context, Result, ensure};
use control::client::{Answer, Client};
use kickless_tests::image::{Image, MIB};
use kickless_tests::loop_device::Loop;
use kickless_tests::process::{Process, built};
use kickless_tests::scene::Scene;
use kickless_tests::{qemu_img, wait};
use nix::sys::signal::Signal;
use serde_json::{Value, json};
use vhost::vhost_user::message::VhostUserProtocolFeatures;
use vhost::vhost_user::{FrontendReqHandler, HandlerResult, VhostUserFrontendReqHandler};

use crate::blk::{FLUSH, Front, LIMIT, OK, Served, Shape};
use crate::disk::{Copy, check_all, pattern, step, write};
use crate::{caller, quick, raw};

/// No multiple of any cluster.
const SIZE: u64 = (1 << 20) + 7 * 512;

fn size_of(path: &Path) -> Result<u64> {
    let text = qemu_img::run(&["info", "-U", "--output=json", "-f", "qcow2", &path.to_string_lossy()])?;
    serde_json::from_str::<Value>(&text)?["virtual-size"].as_u64().context("no size")
}

/// It holds this, and zeros up to its size.
fn look(scene: &Scene, path: &Path, bytes: &[u8], size: u64) -> Result<()> {
    qemu_img::check(path)?;
    let plain = scene.path("grown.plain");
    std::fs::write(&plain, bytes)?;
    std::fs::OpenOptions::new().write(true).open(&plain)?.set_len(size)?;
    qemu_img::compare((path, "qcow2"), (&plain, "raw"))
}

fn grow(client: &Client, socket: &Path, size: u64) -> Result<Answer> {
    let name = socket.to_string_lossy().replace('/', "%2F");
    client.call("POST", &format!("/v1/disks/{name}/grow"), Some(&json!({ "size": size.to_string() })))
}

/// Counts how often the guest is told that its configuration has changed.
#[derive(Default)]
struct Told(AtomicU64);

impl VhostUserFrontendReqHandler for Told {
    fn handle_config_change(&self) -> HandlerResult<u64> {
        self.0.fetch_add(1, Ordering::Relaxed);
        Ok(0)
    }
}

/// Has it told, for as long as the daemon is there.
fn listen(front: &mut Front) -> Result<Arc<Told>> {
    let told = Arc::new(Told::default());
    let mut handler = FrontendReqHandler::new(Arc::clone(&told))?;
    handler.set_reply_ack_flag(true);
    front.talk(VhostUserProtocolFeatures::BACKEND_REQ | VhostUserProtocolFeatures::CONFIG, &handler);
    std::thread::spawn(move || while handler.handle_request().is_ok() {});
    Ok(told)
}

struct StopOnDrop<'a>(&'a AtomicBool);

impl Drop for StopOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Does something while a guest writes, and reads what it has written.
fn beside(front: &mut Front, copy: &mut Copy, what: impl FnOnce() -> Result<()>) -> Result<()> {
    let (stop, steps) = (AtomicBool::new(false), AtomicU64::new(0));
    let more = |n: u64| {
        let from = steps.load(Ordering::Relaxed);
        wait::until("the guest's requests", LIMIT, || {
            let now = steps.load(Ordering::Relaxed);
            Ok((now >= from + n || stop.load(Ordering::Relaxed)).then_some(()))
        })
    };
    std::thread::scope(|scope| {
        // The scope waits for its threads, whatever ends it.
        let stopped = StopOnDrop(&stop);
        let guest = scope.spawn(|| -> Result<()> {
            let _stopped = StopOnDrop(&stop);
            while !stop.load(Ordering::Relaxed) {
                let number = steps.fetch_add(1, Ordering::Relaxed) as usize;
                step(&mut front.queues[number % 2], copy)?;
            }
            Ok(())
        });
        let done = more(2).and_then(|()| what()).and_then(|()| more(2));
        drop(stopped);
        guest.join().ok().context("the guest panicked")??;
        done
    })
}

/// Grows step by step, under load. The disk has blocks of `block` bytes.
fn grows(scene: &Scene, path: &Path, bytes: Vec<u8>, block: usize, direct: &str) -> Result<()> {
    let api = scene.path("api");
    let (image, at) = (format!("--blk-file={}", path.display()), format!("--api={}", api.display()));
    let (blocks, rest) =
        (format!("--block-size={block}"), ["--format=qcow2", "--num-queues=2", "--sandbox=on"]);
    let served = Served::start(scene, &[&[&*image, &*blocks, direct, &at], &rest[..]].concat());
    let client = caller(&api);
    let mut front = Front::connect(&served.socket, 2);
    let told = listen(&mut front)?;
    let first = bytes.len() as u64;
    let mut copy = Copy::new(bytes, 17);
    copy.block = block;
    // Up to and behind what is below, and by more than small L1 tables have room for.
    for (number, size) in (1..).zip([first + block as u64, (2 << 20) + block as u64, 5 << 20]) {
        beside(&mut front, &mut copy, || {
            let answer = grow(&client, &served.socket, size)?;
            ensure!(answer.status == 200, "{} {}", answer.status, String::from_utf8_lossy(&answer.body));
            ensure!(answer.json()?["bytes"] == size, "{}", answer.json()?);
            Ok(())
        })
        .with_context(|| format!("to {size}"))?;
        copy.bytes.resize(size as usize, 0);
        let is_told = || Ok((told.0.load(Ordering::Relaxed) >= number).then_some(()));
        wait::until("a change of the configuration", LIMIT, is_told)?;
        ensure!(front.capacity() == size / 512, "the guest sees {} sectors", front.capacity());
        check_all(&mut front, &copy.bytes).with_context(|| format!("at {size}"))?;
        (0..8).try_for_each(|i| step(&mut front.queues[i % 2], &mut copy))?;
    }
    for (size, why) in
        [(1 << 20, "a disk never shrinks"), ((5 << 20) + 1, "multiple of"), (1 << 59, "be that large")]
    {
        let answer = grow(&client, &served.socket, size)?;
        let said = String::from_utf8_lossy(&answer.body).into_owned();
        ensure!(matches!(answer.status, 400 | 409) && said.contains(why), "{} {said}", answer.status);
    }
    check_all(&mut front, &copy.bytes)?;
    drop(front);
    served.terminate();
    ensure!(size_of(path)? == 5 << 20, "{}", size_of(path)?);
    look(scene, path, &copy.bytes, 5 << 20)
}

/// Images of every kind.
pub fn in_use(scene: &Scene) -> Result<()> {
    for (options, direct) in [
        ("", "--direct=on"),
        ("cluster_size=512,refcount_bits=1", "--direct=off"),
        ("compat=0.10,cluster_size=4096", "--direct=off"),
        ("data_file=DATA,cluster_size=4096", "--direct=off"),
    ] {
        let memory = quick(scene)?;
        let place = if direct == "--direct=on" { scene.path("") } else { memory.path().to_owned() };
        let path = place.join("grown.qcow2");
        let options = options.replace("DATA", &place.join("grown.data").to_string_lossy());
        qemu_img::create(&path, SIZE, &options, &[])?;
        grows(scene, &path, vec![0; SIZE as usize], 512, direct).with_context(|| options)?;
    }
    Ok(())
}

/// One that a block device holds, of sectors that are as large as its clusters, or not.
pub fn on_a_block_device(scene: &Scene) -> Result<Option<String>> {
    const SIZE: u64 = (1 << 20) + (3 << 12);
    for cluster in [4096, 65536] {
        let device = match Loop::over(Image::create(scene, "device", 16 * MIB)?.path(), 4096) {
            Ok(device) => device,
            Err(reason) => return Ok(Some(format!("no loop device of 4 KiB sectors: {reason}"))),
        };
        qemu_img::create(device.path(), SIZE, &format!("cluster_size={cluster}"), &[])?;
        grows(scene, device.path(), vec![0; SIZE as usize], 4096, "--direct=on")
            .with_context(|| format!("clusters of {cluster} bytes"))?;
    }
    Ok(None)
}

/// One that was larger: its last cluster holds something behind the end of the disk.
pub fn shrunk(scene: &Scene) -> Result<()> {
    let memory = quick(scene)?;
    let (plain, mut bytes) = raw(scene, "larger.raw", 2 << 20, 8)?;
    bytes[SIZE as usize..][..4096].fill(0x5a);
    std::fs::write(&plain, &bytes)?;
    let path = memory.path().join("shrunk.qcow2");
    let [from, to] = [&plain, &path].map(|p| p.to_string_lossy());
    qemu_img::run(&["convert", "-f", "raw", "-O", "qcow2", &from, &to])?;
    qemu_img::run(&["resize", "-q", "--shrink", "-f", "qcow2", &to, &SIZE.to_string()])?;
    bytes.truncate(SIZE as usize);
    grows(scene, &path, bytes, 512, "--direct=off")
}

/// Clones: of what ends before, and of what goes on behind their end, which nobody is to see.
pub fn clones(scene: &Scene) -> Result<()> {
    for (len, packed) in [(SIZE / 2, false), (SIZE + 4096, false), (3 << 20, true)] {
        let memory = quick(scene)?;
        let (plain, mut bytes) = raw(scene, "base.raw", len, 5)?;
        let base = memory.path().join("base.qcow2");
        let [from, to] = [&plain, &base].map(|p| p.to_string_lossy());
        let mut convert = vec!["convert", "-f", "raw", "-O", "qcow2", &from, &to];
        if packed {
            convert.insert(1, "-c");
        }
        qemu_img::run(&convert)?;
        let path = memory.path().join("grown.qcow2");
        qemu_img::create(&path, SIZE, "cluster_size=4096", &["-F", "qcow2", "-b", &to])?;
        bytes.resize(SIZE as usize, 0);
        grows(scene, &path, bytes, 512, "--direct=off").with_context(|| format!("over {len} bytes"))?;
    }
    Ok(())
}

/// A daemon that dies before the `nth` change that it makes to its image's file.
fn dying(scene: &Scene, image: &Path, nth: u32) -> Result<(Process, PathBuf, Client)> {
    let program = built("vhost-blk").context("vhost-blk is not built")?;
    let (socket, api) = (scene.path("dying.sock"), scene.path("dying.api"));
    for old in [&socket, &api] {
        let _ = std::fs::remove_file(old);
    }
    let args = [
        format!("KICKLESS_FAULT=image-changes:{nth}"),
        program.display().to_string(),
        format!("--socket-path={}", socket.display()),
        format!("--api={}", api.display()),
        format!("--blk-file={}", image.display()),
        "--format=qcow2".into(),
        "--num-queues=2".into(),
    ];
    let process = Process::spawn(scene, "dying", Path::new("/usr/bin/env"), &args)?;
    let client = caller(&api);
    Ok((process, socket, client))
}

/// Before each change of the file that growth makes: the image is as large as it was or as it is to be, sound, and holds
/// what it held, also what was written and flushed a moment before. Every `stride`-th of them.
fn dies(scene: &Scene, options: &str, (base, to): (u64, u64), stride: usize) -> Result<()> {
    let memory = quick(scene)?;
    let [path, first, below] =
        ["grown.qcow2", "first.qcow2", "base.raw"].map(|name| memory.path().join(name));
    let mut bytes = pattern(base as usize, 6);
    std::fs::write(&below, &bytes)?;
    qemu_img::create(&first, SIZE, options, &["-F", "raw", "-b", &below.to_string_lossy()])?;
    bytes.resize(SIZE as usize, 0);
    let mut copy = Copy::new(bytes, 4);
    let served = Served::start(
        scene,
        &[&*format!("--blk-file={}", first.display()), "--format=qcow2", "--num-queues=2"],
    );
    let mut front = Front::connect(&served.socket, 2);
    (0..12).try_for_each(|i| step(&mut front.queues[i % 2], &mut copy))?;
    // Clusters that are its own.
    write(&mut front.queues[0], &mut copy, 0..64 << 10)?;
    drop(front);
    served.terminate();
    let mut sizes = Vec::new();
    for nth in (1..).step_by(stride) {
        std::fs::copy(&first, &path)?;
        let (mut process, socket, client) = dying(scene, &path, nth)?;
        let mut front = Front::connect(&socket, 2);
        write(&mut front.queues[0], &mut copy, 8 << 10..16 << 10)?;
        let flushed = front.queues[0].request(FLUSH, 0, &Shape::default());
        ensure!(flushed == (OK, 1), "flush: {flushed:?}");
        let answer = grow(&client, &socket, to);
        drop(front);
        let lives = answer.is_ok();
        if let Ok(answer) = answer {
            ensure!(answer.status == 200, "{}", String::from_utf8_lossy(&answer.body));
            process.signal(Signal::SIGKILL)?;
        }
        let status = process.wait_exit(LIMIT)?;
        ensure!(status.signal() == Some(Signal::SIGKILL as i32), "{status} {}", process.stderr());
        let size = size_of(&path)?;
        ensure!(size == SIZE || size == to, "it has {size} bytes");
        look(scene, &path, &copy.bytes, size)
            .with_context(|| format!("{size} bytes, dead at change {nth}"))?;
        sizes.push(size);
        if lives {
            break;
        }
        if sizes.len() % 4 == 0 {
            // The next daemon can do it.
            let again = dying(scene, &path, 0)?;
            let answer = grow(&again.2, &again.1, to)?;
            ensure!(answer.status == 200, "{}", String::from_utf8_lossy(&answer.body));
            drop(again);
            look(scene, &path, &copy.bytes, to)
                .with_context(|| format!("grown after death at change {nth}"))?;
        }
    }
    let old = sizes.iter().filter(|&&size| size == SIZE).count();
    println!("{options}: {} deaths, as large as it was after {old} of them", sizes.len() - 1);
    ensure!(sizes.is_sorted() && old > 8 && sizes.last() == Some(&to), "{sizes:?}");
    Ok(())
}

/// With a base that is longer and a new L1 table; and with one so large that it needs a new refcount table.
pub fn killed(scene: &Scene) -> Result<()> {
    dies(scene, "cluster_size=512", (SIZE + (64 << 10), 3 << 20), 1)?;
    dies(scene, "cluster_size=512,refcount_bits=64", (SIZE, 4 << 30), 19)
}
