//! Images that somebody has made to do harm, opened and used in this process: thousands of them, where a daemon for each
//! ([`damage`](crate::damage)) allows for tens. Each is refused with a line, or serves what it can; nothing panics, takes
//! long, or takes memory without bound.

use std::fs::{self, File};
use std::os::fd::{AsRawFd, BorrowedFd};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use kickless_tests::qemu_img;
use kickless_tests::random::Random;
use kickless_tests::scene::Scene;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::uio::{pread, pwrite};
use vhost_blk::backend::bounce::Bounce;
use vhost_blk::backend::formatted::errand::{Errand, What};
use vhost_blk::backend::formatted::{Format, Formatted, Mapped};
use vhost_blk::backend::layout::{Layout, Place};
use vhost_blk::disk::Access;
use vhost_blk::open::open_file;

use crate::{SIZE, mutations, quick, raw};

/// How long one image may take: many times what any does on a busy machine.
const LIMIT: Duration = Duration::from_secs(60);
/// Memory that one image may take beyond what the process has.
const MAX_MEMORY_KIB: u64 = 256 << 10;

/// Of an entry of a table: where it points.
const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;

/// How many; `KICKLESS_MALFORMED` says otherwise.
fn count() -> usize {
    std::env::var("KICKLESS_MALFORMED").ok().and_then(|n| n.parse().ok()).unwrap_or(600)
}

/// Memory of this process in KiB: most of it since it was last forgotten, and now.
fn memory(what: &str) -> Result<u64> {
    let status = fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find_map(|l| l.strip_prefix(what)).context("no memory in /proc/self/status")?;
    Ok(line.trim_start_matches(':').trim().trim_end_matches("kB").trim().parse()?)
}

/// Reads or writes at a place; an error is an answer, too.
fn transfer(layout: &Mapped, access: Access, offset: u64, len: u32) -> Result<bool> {
    let mut buffer = Bounce::zeros(len as usize);
    match layout.place(access, offset, len) {
        Place::Zeros(_) if access == Access::Read => Ok(true),
        Place::File { fd, offset, len } => {
            let bytes = &mut buffer.bytes_mut()[..len as usize];
            let done = match access {
                Access::Read => pread(borrow(fd), bytes, offset as i64),
                Access::Write => pwrite(borrow(fd), bytes, offset as i64),
            };
            Ok(done.is_ok())
        }
        Place::Zeros(n) | Place::Elsewhere(n) => {
            let what = match access {
                Access::Read => What::Read(buffer),
                Access::Write => What::Write { buffer, durable: false },
            };
            errand(layout, offset, n.into(), what)
        }
    }
}

/// Has a worker do something; whether it could.
fn errand(layout: &Mapped, offset: u64, len: u64, what: What) -> Result<bool> {
    layout.send(Errand { tag: 0, offset, len, what });
    let inbox = layout.inbox().context("no inbox")?;
    let deadline = Instant::now() + LIMIT;
    loop {
        inbox.quiet();
        if let Some(answer) = inbox.take() {
            return Ok(answer.result >= 0);
        }
        ensure!(Instant::now() < deadline, "a worker does not answer");
        let mut fds = [PollFd::new(borrow(inbox.fd()), PollFlags::POLLIN)];
        poll(&mut fds, PollTimeout::from(100u8))?;
    }
}

#[allow(unsafe_code)]
fn borrow<'a>(fd: i32) -> BorrowedFd<'a> {
    // SAFETY: it is the image's or its inbox's, which are open until it is dropped.
    unsafe { BorrowedFd::borrow_raw(fd) }
}

/// What became of images.
#[derive(Default)]
struct Tally {
    refused: usize,
    served: usize,
    /// Requests that were answered with an error.
    errors: usize,
    most_kib: u64,
    longest: Duration,
}

fn use_it(layout: &Mapped, size: u64, random: &mut Random, tally: &mut Tally) -> Result<()> {
    for at in 0..24 {
        // The beginning, the end, and in between.
        let sectors = size / 512;
        let sector = match at {
            0 => 0,
            1 => sectors - 1,
            2..12 => random.number() % sectors,
            _ => random.number() % sectors.min(SIZE / 512),
        };
        let (offset, most) = (sector * 512, ((sectors - sector) * 512).min(128 << 10));
        let len = (512 << random.below(9)).min(most as usize) as u32;
        let done = match random.below(6) {
            0..3 => transfer(layout, Access::Read, offset, len)?,
            3 | 4 => transfer(layout, Access::Write, offset, len)?,
            _ => errand(layout, offset, len.into(), What::Zero { unmap: random.below(2) == 0 })?,
        };
        tally.errors += usize::from(!done);
    }
    Ok(())
}

/// Whether somebody stands over one that takes for ever: this cannot be told from within it.
static AT: AtomicU64 = AtomicU64::new(0);
static PANICS: AtomicUsize = AtomicUsize::new(0);

fn watch() {
    static ONCE: std::sync::Once = std::sync::Once::new();
    ONCE.call_once(|| {
        let before = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            PANICS.fetch_add(1, Ordering::Relaxed);
            before(info);
        }));
        std::thread::spawn(|| {
            let mut last = (AT.load(Ordering::Relaxed), Instant::now());
            loop {
                std::thread::sleep(Duration::from_secs(1));
                let now = AT.load(Ordering::Relaxed);
                if now != last.0 || now == 0 {
                    last = (now, Instant::now());
                }
                if last.1.elapsed() > 2 * LIMIT {
                    eprintln!("an image takes for ever");
                    std::process::abort();
                }
            }
        });
    });
}

/// Opens one, and uses it if that is possible.
fn one(path: &Path, format: Format, random: &mut Random, tally: &mut Tally) -> Result<()> {
    AT.fetch_add(1, Ordering::Relaxed);
    // The peak begins anew.
    fs::write("/proc/self/clear_refs", "5")?;
    let (resident, begun, panics) = (memory("VmRSS")?, Instant::now(), PANICS.load(Ordering::Relaxed));
    let refused = |tally: &mut Tally, line: String| {
        tally.refused += 1;
        ensure!(!line.trim().is_empty() && !line.contains('\n'), "no line: {line:?}");
        Ok(())
    };
    let read_only = format == Format::Vmdk;
    match open_file(path, read_only, false) {
        Err(e) => refused(tally, e.to_string())?,
        Ok(opened) => {
            let image = Arc::new(Formatted::new(format, path, opened, (read_only, false), None));
            match image.run() {
                Err(e) => refused(tally, e.to_string())?,
                Ok(running) => {
                    tally.served += 1;
                    let size = running.size();
                    if size < 512 {
                        // A daemon makes no disk of that.
                    } else if read_only {
                        let layout = Mapped::new(running, 4)?;
                        for _ in 0..12 {
                            let offset = random.number() % (size / 512) * 512;
                            tally.errors += usize::from(!transfer(&layout, Access::Read, offset, 512)?);
                        }
                    } else {
                        use_it(&Mapped::new(running, 4)?, size, random, tally)?;
                    }
                    // It may have nothing left to be made durable on.
                    let _ = image.hand_over();
                }
            }
        }
    }
    let took = memory("VmHWM")?.saturating_sub(resident);
    tally.most_kib = tally.most_kib.max(took);
    tally.longest = tally.longest.max(begun.elapsed());
    ensure!(took < MAX_MEMORY_KIB, "it took {took} KiB");
    ensure!(begun.elapsed() < LIMIT, "it took {:?}", begun.elapsed());
    ensure!(PANICS.load(Ordering::Relaxed) == panics, "a thread has panicked");
    Ok(())
}

fn all(
    scene: &Scene,
    path: &Path,
    sound: &[Vec<u8>],
    format: Format,
    damage: fn(&mut Vec<u8>, &mut Random),
) -> Result<()> {
    watch();
    let seed = u64::from(std::process::id());
    let mut tally = Tally::default();
    let kept = scene.path("last-damaged");
    for number in 0..count() {
        let mut random = Random(seed.wrapping_mul(1_000_003) + number as u64);
        let mut bytes = sound[number % sound.len()].clone();
        damage(&mut bytes, &mut random);
        fs::write(path, &bytes)?;
        one(path, format, &mut random, &mut tally)
            .inspect_err(|_| fs::write(&kept, &bytes).unwrap_or_default())
            .with_context(|| format!("image {number}, seed {seed}"))?;
    }
    AT.store(0, Ordering::Relaxed);
    let Tally { refused, served, errors, most_kib, longest } = tally;
    println!(
        "{refused} images refused, {served} served, with {errors} errors; at most {most_kib} KiB and {longest:?} for one"
    );
    ensure!(refused > 0 && served > 0, "all came to the same");
    Ok(())
}

pub fn qcow2(scene: &Scene) -> Result<()> {
    let memory = quick(scene)?;
    let (plain, _) = raw(scene, "content.raw", SIZE, 8)?;
    let at = |name: &str| memory.path().join(name).to_string_lossy().into_owned();
    let from = plain.to_string_lossy();
    let convert = |to: &str, more: &[&str]| {
        let args = [&["convert", "-o", "cluster_size=4096", "-f", "raw", "-O", "qcow2"], more, &[&from, to]];
        qemu_img::run(&args.concat())
    };
    convert(&at("plain.qcow2"), &[])?;
    convert(&at("packed.qcow2"), &["-c"])?;
    convert(&at("snapshot.qcow2"), &[])?;
    qemu_img::run(&["snapshot", "-c", "then", &at("snapshot.qcow2")])?;
    let over = Path::new(&at("over.qcow2")).to_owned();
    qemu_img::create(&over, SIZE, "cluster_size=4096", &["-F", "qcow2", "-b", "packed.qcow2"])?;
    qemu_img::create(Path::new(&at("old.qcow2")), SIZE, "cluster_size=4096,compat=0.10", &[])?;
    let names = ["plain.qcow2", "packed.qcow2", "snapshot.qcow2", "over.qcow2", "old.qcow2"];
    let sound = names.iter().map(|name| Ok(fs::read(at(name))?)).collect::<Result<Vec<_>>>()?;
    let damaged = Path::new(&at("damaged.qcow2")).to_owned();
    all(scene, &damaged, &sound, Format::Qcow2, mutations::qcow2)
}

pub fn vmdk(scene: &Scene) -> Result<()> {
    let memory = quick(scene)?;
    let (plain, _) = raw(scene, "content.raw", SIZE, 8)?;
    let path = memory.path().join("disk.vmdk");
    let [from, to] = [&plain, &path].map(|p| p.to_string_lossy());
    qemu_img::run(&["convert", "-o", "subformat=monolithicFlat", "-f", "raw", "-O", "vmdk", &from, &to])?;
    let mut sound = vec![fs::read(&path)?];
    qemu_img::run(&[
        "convert",
        "-o",
        "subformat=monolithicSparse",
        "-f",
        "raw",
        "-O",
        "vmdk",
        &from,
        &scene.path("sparse.vmdk").to_string_lossy(),
    ])?;
    sound.push(fs::read(scene.path("sparse.vmdk"))?);
    // Whole, each says what becomes of one that is not damaged.
    all(scene, &path, &sound, Format::Vmdk, mutations::vmdk)
}

/// Disks of impossible sizes that are sound as far as their tables go.
pub fn enormous(scene: &Scene) -> Result<()> {
    watch();
    let mut tally = Tally::default();
    for (size, cluster) in [("1E", "2M"), ("64P", "2M"), ("256T", "64K"), ("100T", "64K"), ("128G", "512")] {
        let path = scene.path(&format!("{size}.qcow2"));
        let options = format!("cluster_size={cluster}");
        let made =
            qemu_img::run(&["create", "-q", "-f", "qcow2", "-o", &options, &path.to_string_lossy(), size]);
        if let Err(e) = made {
            // What QEMU does not make nobody else does.
            println!("{size}: {e:#}");
            continue;
        }
        let before = tally.served;
        one(&path, Format::Qcow2, &mut Random(5), &mut tally)
            .with_context(|| format!("{size} in {cluster}"))?;
        println!(
            "{size} in {cluster}: served {}, at most {} KiB, {:?}",
            tally.served > before,
            tally.most_kib,
            tally.longest
        );
    }
    AT.store(0, Ordering::Relaxed);
    ensure!(tally.served > 1, "none was served");
    Ok(())
}

/// Where each byte of a cluster's entry is: its place in the L2 table of the first clusters.
fn entry(bytes: &[u8], cluster: usize) -> usize {
    let long = |at: usize| u64::from_be_bytes(std::array::from_fn(|i| bytes[at + i]));
    let l1 = long(40) as usize;
    (long(l1) & OFFSET) as usize + 8 * cluster
}

/// Clusters that lie where tables are: whoever writes to them gets an error, and the tables stay as they were.
pub fn overlapping(scene: &Scene) -> Result<()> {
    let memory = quick(scene)?;
    let (plain, _) = raw(scene, "content.raw", SIZE, 8)?;
    let path = memory.path().join("disk.qcow2");
    let [from, to] = [&plain, &path].map(|p| p.to_string_lossy());
    qemu_img::run(&["convert", "-o", "cluster_size=4096", "-f", "raw", "-O", "qcow2", &from, &to])?;
    let sound = fs::read(&path)?;
    let long = |at: usize| u64::from_be_bytes(std::array::from_fn(|i| sound[at + i]));
    let (l1, refcounts) = (long(40), long(48));
    let (l2, block) = (long(l1 as usize) & OFFSET, long(refcounts as usize));
    let behind = (sound.len() as u64).next_multiple_of(4096);
    for (what, target) in [
        ("the header", 0),
        ("the L1 table", l1),
        ("the refcount table", refcounts),
        ("a refcount block", block),
        ("an L2 table", l2),
        ("behind the end", behind + (1 << 30)),
        ("far behind the end", (1 << 55) - 4096),
    ] {
        let mut bytes = sound.clone();
        let at = entry(&bytes, 3);
        // Its own (OFLAG_COPIED): to be written in place. The header as nothing else than 0 would be unallocated.
        bytes[at..at + 8].copy_from_slice(&(target | 1 << 63).to_be_bytes());
        fs::write(&path, &bytes)?;
        let opened = open_file(&path, false, false)?;
        let image = Arc::new(Formatted::new(Format::Qcow2, &path, opened, (false, false), None));
        let layout = Mapped::new(image.run()?, 4)?;
        let read = transfer(&layout, Access::Read, 3 * 4096, 4096)?;
        // Twice: once it was looked up.
        for _ in 0..2 {
            if transfer(&layout, Access::Write, 3 * 4096, 512)? && !what.contains("behind") && target != 0 {
                bail!("{what} was written to");
            }
            let zeroed = errand(&layout, 3 * 4096, 4096, What::Zero { unmap: true })?;
            ensure!(!zeroed || what.contains("behind") || target == 0, "{what} was zeroed");
            errand(&layout, 3 * 4096, 4096, What::Discard)?;
        }
        println!("{what}: read {read}");
        // The others are served as ever.
        ensure!(transfer(&layout, Access::Read, 0, 4096)?, "its neighbours are not read");
        drop(layout);
        let _ = image.hand_over();
        drop(image);
        // Who writes to what is said to be far behind the end makes a file of that length, without what is in between.
        if target < behind {
            let after = fs::read(&path)?;
            let tables = [0, l1, refcounts, block].map(|at| at as usize);
            for table in tables {
                let range = table..table + if table == 0 { 72 } else { 4096 };
                // A cluster that was allocated anew is counted.
                let counts = table == block as usize && target == 0;
                ensure!(
                    counts || after[range.clone()] == bytes[range],
                    "{what}: the table at {table} has changed"
                );
            }
        }
    }
    Ok(())
}

/// Keeps what is in the way of a file's being one: fifos and devices as backing and data files.
pub fn named(scene: &Scene) -> Result<()> {
    let mut tally = Tally::default();
    watch();
    let fifo = scene.path("fifo");
    nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU)?;
    for name in [
        "/dev/zero",
        "/dev/stdin",
        "fifo",
        ".",
        "/proc/self/mem",
        "json:{}",
        "nbd://localhost/x",
        "self.qcow2",
    ] {
        let path = scene.path("self.qcow2");
        let _ = fs::remove_file(&path);
        qemu_img::create(&path, SIZE, "", &["-u", "-F", "raw", "-b", name])?;
        one(&path, Format::Qcow2, &mut Random(1), &mut tally).context(name)?;
    }
    AT.store(0, Ordering::Relaxed);
    ensure!(tally.served == 0, "{} were served", tally.served);
    // Nobody else's descriptor is left open.
    ensure!(File::open(scene.path("self.qcow2"))?.as_raw_fd() < 900, "descriptors are left open");
    Ok(())
}
