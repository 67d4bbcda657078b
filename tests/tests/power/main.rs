//! Power cuts: a guest works on a disk, all that reaches the files of its image is written down, and afterwards the power
//! is cut at moments of that. Each time the image is as any of the storage's caches may have left it; what was flushed is
//! there, what was not is there or not, sector by sector, nothing else has changed, and `qemu-img check` finds the image
//! sound. Then the guest goes on with what is left. Images that can grow do so half-way.
//!
//! `KICKLESS_CUTS` says how often, for all kinds of images together, `KICKLESS_SEED` which run to repeat.

#[path = "../blk/mod.rs"]
mod blk;
mod driver;

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use blk::{LIMIT, Served};
use control::client::Client;
use driver::{Grow, Guest, Model, SECTOR};
use fastrand::Rng;
use kickless_tests::cryptsetup::{self, Cipher, Volume};
use kickless_tests::qemu_img;
use kickless_tests::random::Random;
use kickless_tests::runner::{self, Test};
use kickless_tests::scene::Scene;
use kickless_tests::wait;
use serde_json::json;
use vhost_blk::backend::power_cut::{Lost, Writes};

/// Bytes of a disk: more than an L2 table of clusters of 4 KiB maps.
const SIZE: u64 = 3 << 20;
/// Requests between two times that the power goes.
const REQUESTS: usize = 160;
/// Moments at which it may have gone, of which the last one counts.
const CUTS_OF_A_LIFE: usize = 10;

/// How often the power is cut.
fn cuts() -> usize {
    std::env::var("KICKLESS_CUTS").ok().and_then(|n| n.parse().ok()).unwrap_or(110)
}

fn seed() -> u64 {
    let wanted = std::env::var("KICKLESS_SEED").ok().and_then(|n| n.parse().ok());
    wanted.unwrap_or_else(|| u64::from(std::process::id()))
}

/// An image, and how it is served.
struct Disk {
    path: PathBuf,
    args: Vec<String>,
    luks: Option<Luks>,
}

/// A disk that is enciphered.
struct Luks {
    cipher: Cipher,
    /// What zeros in the file are to the guest.
    given_up: Vec<u8>,
    /// Sectors of the guest that are enciphered together.
    block: usize,
}

impl Disk {
    fn raw(path: PathBuf) -> Disk {
        Disk { path, args: Vec::new(), luks: None }
    }

    fn qcow2(path: PathBuf) -> Disk {
        Disk::raw(path).with("--format=qcow2")
    }

    fn with(mut self, arg: &str) -> Disk {
        self.args.push(arg.into());
        self
    }

    fn is_raw(&self) -> bool {
        self.args.iter().all(|arg| !arg.starts_with("--format"))
    }

    fn grows(&self) -> bool {
        self.args.iter().any(|arg| arg == "--format=qcow2")
    }

    /// What is on the disk, by somebody else.
    fn content(&self) -> Result<Vec<u8>> {
        if let Some(luks) = &self.luks {
            let mut data = fs::read(&self.path)?.split_off(cryptsetup::OFFSET as usize);
            luks.cipher.decipher(&mut data);
            return Ok(data);
        }
        if self.is_raw() {
            return Ok(fs::read(&self.path)?);
        }
        qemu_img::check(&self.path)?;
        let plain = self.path.with_extension("content");
        let [from, to] = [&self.path, &plain].map(|path| path.to_string_lossy());
        qemu_img::run(&["convert", "-f", "qcow2", "-O", "raw", &from, &to])?;
        Ok(fs::read(plain)?)
    }
}

/// A directory in memory, where the host has one: the power is cut anyway.
fn quick(scene: &Scene) -> Result<tempfile::TempDir> {
    let memory = Path::new("/dev/shm");
    let place = if memory.is_dir() { memory.to_owned() } else { scene.path("") };
    Ok(tempfile::Builder::new().prefix("kickless-").tempdir_in(place)?)
}

/// Has a guest work, and cuts the power: how many sectors could hold one thing only, of how many.
fn life(scene: &Scene, disk: &Disk, random: &mut Rng, lost: &mut Lost) -> Result<(usize, usize)> {
    let log = disk.path.with_extension("writes");
    let image = format!("--blk-file={}", disk.path.display());
    let fault = format!("--fault=log-writes={}", log.display());
    let api = scene.path("api");
    let listen = format!("--api={}", api.display());
    let mut args = vec![&*image, &*fault, "--num-queues=4", &*listen];
    args.extend(disk.args.iter().map(String::as_str));
    let write_through = disk.args.iter().any(|arg| arg == "--cache=writethrough");
    let (given_up, block) = match &disk.luks {
        Some(luks) => (Some(luks.given_up.clone()), luks.block),
        None => (None, 1),
    };
    let mut model = Model::new(disk.content()?, given_up, write_through);
    // What the files hold now, before anybody opens them: by name, since their numbers are not known yet.
    let mut before: Vec<(PathBuf, Vec<u8>)> = Vec::new();
    let directory = disk.path.parent().context("a directory")?;
    for file in fs::read_dir(directory)?.flatten().filter(|file| file.path().is_file()) {
        before.push((file.path(), fs::read(file.path())?));
    }
    let served = Served::start(scene, &args);
    let client = Client::new(&api);
    let answers = || Ok(client.call("GET", "/v1/daemon", None).ok().map(drop));
    wait::until("the API", LIMIT, answers)?;
    let size = model.len() + SECTOR * random.usize(1..6000);
    let name = served.socket.to_string_lossy().replace('/', "%2F");
    let grow = || {
        let size = json!({ "size": size.to_string() });
        let answer = client.call("POST", &format!("/v1/disks/{name}/grow"), Some(&size))?;
        ensure!(answer.status == 200, "{} {}", answer.status, String::from_utf8_lossy(&answer.body));
        Ok(())
    };
    let grow = disk.grows().then_some((size, &grow as Grow<'_>));
    Guest::new(&served.socket, &log, &mut model, block, random.u64(..)).work(REQUESTS, grow)?;
    served.terminate();

    let writes = Writes::read(&log)?;
    let mut files = Vec::new();
    for (number, file) in writes.files().iter().enumerate() {
        let known = before.iter().find(|(path, _)| *path == file.path);
        let (path, bytes) = known.with_context(|| format!("{} came from nowhere", file.path.display()))?;
        // Nothing goes past the log.
        let mut all = bytes.clone();
        writes.all(number, &mut all)?;
        ensure!(all == fs::read(path)?, "{}: the log does not have all that was done", path.display());
        files.push((number, path, bytes));
    }
    ensure!(!files.is_empty(), "nothing is in the log");
    let moments = writes.moments();
    let (mut certain, mut all) = (0, 0);
    for _ in 0..CUTS_OF_A_LIFE {
        let time = moments[random.usize(..moments.len())];
        let seed = random.u64(..);
        let mut random = Rng::with_seed(seed);
        for (number, path, bytes) in &files {
            let mut bytes = (*bytes).clone();
            let more = writes.cut(*number, time, &mut random, &mut bytes)?;
            lost.uncertain += more.uncertain;
            lost.missing += more.missing;
            lost.torn += more.torn;
            fs::write(path, bytes)?;
        }
        let history = |sector: &[u8]| match writes.find(sector) {
            Some((number, offset)) => {
                let lines = writes.history(number, offset);
                format!("file {number}, byte {offset}:\n{}", lines.join("\n"))
            }
            None => "nowhere".into(),
        };
        let checked = disk.content().and_then(|found| {
            all += found.len() / SECTOR;
            model.check(time, &found, history)
        });
        certain += checked.with_context(|| format!("cut at {time} of {}, seed {seed}", writes.len()))?;
    }
    fs::remove_file(&log)?;
    Ok((certain, all))
}

fn cut(scene: &Scene, disk: &Disk) -> Result<()> {
    let begun = Instant::now();
    let seed = seed();
    let mut random = Rng::with_seed(seed);
    let lives = cuts().div_ceil(CUTS_OF_A_LIFE * KINDS.len());
    let (mut lost, mut certain, mut all) = (Lost::default(), 0, 0);
    for number in 0..lives {
        let sectors = life(scene, disk, &mut random, &mut lost)
            .with_context(|| format!("life {number}, seed {seed}"))?;
        (certain, all) = (certain + sectors.0, all + sectors.1);
    }
    let cuts = lives * CUTS_OF_A_LIFE;
    println!(
        "{cuts} power cuts in {:.1} s: {} changes were not durable, {} of them missing and {} torn; {certain} of {all} \
         sectors could hold one thing only; seed {seed}",
        begun.elapsed().as_secs_f64(),
        lost.uncertain,
        lost.missing,
        lost.torn
    );
    ensure!(lost.uncertain > 0 && certain > 0, "nothing was at stake: {lost:?}");
    Ok(())
}

fn content(seed: u64) -> Vec<u8> {
    let mut random = Random(seed);
    let mut bytes = vec![0; SIZE as usize];
    for stretch in bytes.chunks_mut(24 << 10) {
        if random.below(3) > 0 {
            stretch.chunks_mut(16).for_each(|word| word[..8].copy_from_slice(&random.number().to_le_bytes()));
        }
    }
    bytes
}

fn raw(at: &Path) -> Result<Disk> {
    let path = at.join("disk.raw");
    fs::write(&path, content(1))?;
    Ok(Disk::raw(path))
}

fn write_through(at: &Path) -> Result<Disk> {
    Ok(raw(at)?.with("--cache=writethrough"))
}

fn empty(at: &Path, options: &str) -> Result<Disk> {
    let path = at.join("disk.qcow2");
    qemu_img::create(&path, SIZE, options, &[])?;
    Ok(Disk::qcow2(path))
}

fn usual(at: &Path) -> Result<Disk> {
    empty(at, "")
}

fn small(at: &Path) -> Result<Disk> {
    empty(at, "cluster_size=512,refcount_bits=64")
}

fn durable(at: &Path) -> Result<Disk> {
    Ok(empty(at, "cluster_size=4096")?.with("--cache=writethrough"))
}

fn elsewhere(at: &Path) -> Result<Disk> {
    empty(at, &format!("cluster_size=4096,data_file={}", at.join("disk.data").display()))
}

/// All clusters are a snapshot's as well.
fn shared(at: &Path) -> Result<Disk> {
    let (plain, path) = (at.join("content.raw"), at.join("disk.qcow2"));
    fs::write(&plain, content(2))?;
    let [from, to] = [&plain, &path].map(|path| path.to_string_lossy());
    qemu_img::run(&["convert", "-c", "-o", "cluster_size=4096", "-f", "raw", "-O", "qcow2", &from, &to])?;
    qemu_img::run(&["snapshot", "-c", "then", &to])?;
    Ok(Disk::qcow2(path))
}

/// A clone of one that is packed, and longer.
fn clone(at: &Path) -> Result<Disk> {
    let (plain, base) = (at.join("content.raw"), at.join("base.qcow2"));
    fs::write(&plain, [content(3), content(4)].concat())?;
    let [from, to] = [&plain, &base].map(|path| path.to_string_lossy());
    qemu_img::run(&["convert", "-c", "-f", "raw", "-O", "qcow2", &from, &to])?;
    let path = at.join("clone.qcow2");
    qemu_img::create(&path, SIZE, "", &["-F", "qcow2", "-b", &to])?;
    Ok(Disk::qcow2(path))
}

/// A volume, of whose sectors a guest writes whole ones only. The larger ones are torn as others are, between sectors of
/// the storage.
fn enciphered(at: &Path, sector: usize) -> Result<Disk> {
    let volume = Volume::format(at, "volume", SIZE, &[&format!("--sector-size={sector}")])?;
    let cipher = volume.cipher(sector)?;
    // What is in a file that nobody has written to.
    let mut given_up = vec![0; SIZE as usize];
    cipher.decipher(&mut given_up);
    let luks = Some(Luks { cipher, given_up, block: sector / SECTOR });
    Ok(Disk { args: volume.args().to_vec(), luks, ..Disk::raw(volume.path) })
}

fn luks(at: &Path) -> Result<Disk> {
    Ok(enciphered(at, 512)?.with("--allow-discards"))
}

fn luks_large(at: &Path) -> Result<Disk> {
    enciphered(at, 4096)
}

fn luks_durable(at: &Path) -> Result<Disk> {
    Ok(enciphered(at, 4096)?.with("--cache=writethrough").with("--allow-discards"))
}

type Make = fn(&Path) -> Result<Disk>;

const KINDS: &[(&str, Make)] = &[
    ("raw", raw),
    ("raw_written_through", write_through),
    ("qcow2", usual),
    ("qcow2_small_clusters", small),
    ("qcow2_written_through", durable),
    ("qcow2_data_file", elsewhere),
    ("qcow2_shared_and_packed_clusters", shared),
    ("qcow2_clone", clone),
    ("luks", luks),
    ("luks_large_sectors", luks_large),
    ("luks_written_through", luks_durable),
];

fn main() -> std::process::ExitCode {
    let self_test = Test {
        name: "what_is_lost_or_changed_is_found".into(),
        needs: Box::new(|| None),
        run: Box::new(|_| driver::self_test().map(|()| None)),
    };
    let test = |&(name, make): &(&str, Make)| Test {
        name: name.to_owned(),
        needs: Box::new(if name.starts_with("luks") { cryptsetup::missing } else { qemu_img::missing }),
        run: Box::new(move |scene| {
            let memory = quick(scene)?;
            cut(scene, &make(memory.path())?).map(|()| None)
        }),
    };
    runner::run(KINDS.iter().map(test).chain([self_test]).collect(), "KICKLESS_REQUIRE_IMAGES")
}
