//! Clones of an image, pools of them, and clones that are made to need their base no more.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use control::client::Client;
use kickless_tests::qemu_img;
use kickless_tests::scene::Scene;
use kickless_tests::wait;
use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
use nix::sys::signal::Signal;
use serde_json::{Value, json};

use crate::blk::{Front, Served};
use crate::disk::{Copy, check_all, pattern, step};
use crate::{caller, raw};

const LIMIT: Duration = Duration::from_secs(60);
const SIZE: u64 = 6 << 20;

/// A daemon that is told what to do.
struct Told {
    served: Served,
    client: Client,
}

impl Told {
    fn start(scene: &Scene, args: &[&str]) -> Told {
        let api = scene.path("api");
        let served = Served::start(
            scene,
            &[&["--backend=null:1M", &format!("--api={}", api.display())], args].concat(),
        );
        Told { served, client: caller(&api) }
    }

    fn does(&self, method: &str, path: &str, body: &Value) -> Result<Value> {
        let body = (!body.is_null()).then_some(body);
        let answer = self.client.call(method, path, body)?;
        let said = String::from_utf8_lossy(&answer.body).into_owned();
        ensure!(answer.status < 300, "{method} {path}: {} {said}", answer.status);
        if said.is_empty() { Ok(Value::Null) } else { answer.json() }
    }

    fn refuses(&self, method: &str, path: &str, body: &Value, parts: &[&str]) -> Result<()> {
        let answer = self.client.call(method, path, Some(body))?;
        let said = String::from_utf8_lossy(&answer.body).into_owned();
        ensure!(
            matches!(answer.status, 400 | 409) && parts.iter().all(|part| said.contains(part)),
            "{body}: {} {said}",
            answer.status
        );
        Ok(())
    }

    fn flatten(&self, name: &str) -> Result<()> {
        self.does("POST", &format!("/v1/disks/{name}/flatten"), &Value::Null).map(drop)
    }

    /// Whether it is by itself, and nothing is under way.
    fn is_alone(&self, name: &str) -> Result<bool> {
        let disk = self.does("GET", &format!("/v1/disks/{name}"), &Value::Null)?;
        let under_way = disk.get("flattening");
        if let Some(at) = under_way {
            ensure!(at["copied"].as_u64() <= at["bytes"].as_u64(), "{at}");
        }
        Ok(under_way.is_none() && disk.get("backing").is_none())
    }
}

/// An image with this in it.
fn template(scene: &Scene, bytes: &[u8], size: &str) -> Result<PathBuf> {
    let (plain, base) = (scene.path("template.raw"), scene.path("base.qcow2"));
    fs::write(&plain, bytes)?;
    let [from, to] = [&plain, &base].map(|path| path.to_string_lossy());
    qemu_img::run(&["convert", "-f", "raw", "-O", "qcow2", &from, &to])?;
    if !size.is_empty() {
        qemu_img::run(&["resize", "-q", "-f", "qcow2", &to, size])?;
    }
    Ok(base)
}

fn expect_content(scene: &Scene, path: &Path, bytes: &[u8]) -> Result<()> {
    qemu_img::check(path)?;
    let plain = scene.path("plain.raw");
    fs::write(&plain, bytes)?;
    qemu_img::compare((path, "qcow2"), (&plain, "raw"))
}

/// What is written to one is in none of the others and not in the base, and is there after a restart.
pub fn apart(scene: &Scene) -> Result<()> {
    let bytes = pattern(SIZE as usize, 21);
    let base = template(scene, &bytes, "")?;
    let before = fs::read(&base)?;
    let (name, socket) =
        (|i: usize| scene.path(&format!("{i}.qcow2")), |i: usize| scene.path(&format!("{i}.sock")));
    let args: Vec<_> = (0..3)
        .map(|i| {
            let (socket, file) = (socket(i), name(i));
            format!(
                "--disk=socket-path={},blk-file={},clone-of={},num-queues=2",
                socket.display(),
                file.display(),
                base.display()
            )
        })
        .collect();
    let mut copies: Vec<_> = (0..3).map(|i| Copy::new(bytes.clone(), 31 + i)).collect();
    for _ in 0..2 {
        let served = Served::start(
            scene,
            &[&["--backend=null:1M"], &args.iter().map(String::as_str).collect::<Vec<_>>()[..]].concat(),
        );
        let mut fronts: Vec<_> = (0..3).map(|i| Front::connect(&socket(i), 2)).collect();
        for round in 0..16 {
            for (front, copy) in fronts.iter_mut().zip(&mut copies) {
                step(&mut front.queues[round % 2], copy)?;
            }
        }
        for (front, copy) in fronts.iter_mut().zip(&copies) {
            check_all(front, &copy.bytes)?;
        }
        drop(fronts);
        served.terminate();
    }
    for (i, copy) in copies.iter().enumerate() {
        expect_content(scene, &name(i), &copy.bytes)?;
    }
    ensure!(fs::read(&base)? == before, "the base was written to");
    Ok(())
}

/// A hundred of a large template, and a hundred that are served as well.
pub fn hundred(scene: &Scene) -> Result<()> {
    let bytes = pattern(SIZE as usize, 22);
    let base = template(scene, &bytes, "10G")?;
    let before = fs::read(&base)?;
    let told = Told::start(scene, &[]);
    let begun = Instant::now();
    for i in 0..100 {
        told.does(
            "POST",
            "/v1/clones",
            &json!({ "base": base, "file": scene.path(&format!("a-{i}.qcow2")) }),
        )?;
    }
    let made = begun.elapsed();
    let begun = Instant::now();
    for i in 0..100 {
        let (socket, file) = (scene.path(&format!("{i}.sock")), scene.path(&format!("b-{i}.qcow2")));
        told.does(
            "POST",
            "/v1/disks",
            &json!({ "name": i.to_string(), "socket-path": socket, "blk-file": file, "clone-of": base }),
        )?;
    }
    println!("100 clones of 10 GiB in {made:?}, and 100 more served in {:?}", begun.elapsed());
    for i in [0, 57, 99] {
        let mut front = Front::connect(&scene.path(&format!("{i}.sock")), 1);
        check_all(&mut front, &bytes)?;
        front.queues[0].verified_io((10 << 30) / 512 - 1, i as u8);
    }
    told.served.terminate();
    for file in ["a-0", "a-99", "b-57", "b-99"].map(|name| scene.path(&format!("{name}.qcow2"))) {
        qemu_img::check(&file)?;
        let text = qemu_img::run(&["info", "--output=json", &file.to_string_lossy()])?;
        let info: Value = serde_json::from_str(&text)?;
        ensure!(
            info["virtual-size"] == 10u64 << 30 && info["full-backing-filename"] == json!(base),
            "{info}"
        );
    }
    ensure!(fs::read(&base)? == before, "the base was written to");
    Ok(())
}

/// What one of them has read of the base is in memory for all of them, whatever they say of the page cache: the daemon fetches
/// it once.
pub fn cached(scene: &Scene) -> Result<Option<String>> {
    let bytes = pattern(SIZE as usize, 24);
    let base = template(scene, &bytes, "")?;
    let file = fs::File::open(&base)?;
    file.sync_all()?;
    posix_fadvise(&file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED)?;
    let told = Told::start(scene, &["--direct=on"]);
    let socket = |i: usize| scene.path(&format!("{i}.sock"));
    for i in 0..8 {
        let file = scene.path(&format!("{i}.qcow2"));
        told.does(
            "POST",
            "/v1/disks",
            &json!({ "name": i.to_string(), "socket-path": socket(i), "blk-file": file, "clone-of": base }),
        )?;
    }
    let fetched = || -> Result<u64> {
        let io = fs::read_to_string(format!("/proc/{}/io", told.served.process.pid()))?;
        let bytes = io.lines().find_map(|line| line.strip_prefix("read_bytes: ")).context("no read_bytes")?;
        Ok(bytes.parse()?)
    };
    let mut fetches = Vec::new();
    for i in 0..8 {
        let before = fetched()?;
        check_all(&mut Front::connect(&socket(i), 1), &bytes)?;
        fetches.push(fetched()? - before);
    }
    told.served.terminate();
    let again: u64 = fetches[1..].iter().sum();
    println!("fetched by each of eight clones: {fetches:?}");
    if fetches[0] < SIZE / 4 {
        return Ok(Some("what is read from the file system here is not counted as fetched (tmpfs?)".into()));
    }
    ensure!(again < fetches[0] / 2, "the base was fetched again: {fetches:?}");
    Ok(None)
}

pub fn refused(scene: &Scene) -> Result<()> {
    let bytes = pattern(1 << 20, 23);
    let base = template(scene, &bytes, "")?;
    let (other, _) = raw(scene, "other.raw", 1 << 20, 1)?;
    let told = Told::start(scene, &[]);
    let clone = |base: &Value, name: &str| json!({ "base": base, "file": scene.path(name) });
    let disk = |base: &Value, name: &str| json!({ "socket-path": scene.path("x.sock"), "blk-file": scene.path(name), "clone-of": base });
    let (base, other) = (json!(base), json!(other));
    told.does("POST", "/v1/clones", &clone(&base, "a.qcow2"))?;
    told.refuses("POST", "/v1/clones", &clone(&base, "a.qcow2"), &["is there already", "another file"])?;
    told.refuses("POST", "/v1/clones", &clone(&other, "b.qcow2"), &["no qcow2 image", "other.raw"])?;
    told.refuses(
        "POST",
        "/v1/clones",
        &clone(&json!(scene.path("none")), "b.qcow2"),
        &["cannot open", "none"],
    )?;
    told.refuses("POST", "/v1/clones", &clone(&base, "none/b.qcow2"), &["No such file"])?;
    told.refuses("POST", "/v1/clones", &clone(&json!(""), "b.qcow2"), &["FORMAT"])?;
    let of_raw = json!(format!("raw:{}", other.as_str().context("a path")?));
    told.refuses("POST", "/v1/disks", &disk(&of_raw, "a.qcow2"), &["is no clone of", "a.qcow2"])?;
    told.refuses(
        "POST",
        "/v1/disks",
        &json!({ "socket-path": "/x", "backend": "null:1M", "clone-of": base }),
        &["clone-of goes with blk-file"],
    )?;
    // A raw one that is said to be raw.
    told.does("POST", "/v1/clones", &clone(&of_raw, "c.qcow2"))?;
    // What is not served in the end is not left behind.
    let mut taken = disk(&base, "d.qcow2");
    taken["socket-path"] = json!(scene.path("none/x.sock"));
    told.refuses("POST", "/v1/disks", &taken, &["No such file"])?;
    ensure!(!scene.path("d.qcow2").exists(), "a clone was left behind");
    told.refuses("POST", "/v1/disks/%2Fx/flatten", &json!({}), &[])
        .err()
        .context("a disk that is not there")?;
    // Somebody writes to the base.
    let writer = json!({ "socket-path": scene.path("w.sock"), "blk-file": scene.path("plain.raw") });
    fs::write(scene.path("plain.raw"), bytes)?;
    told.does("POST", "/v1/disks", &writer)?;
    let of_it = json!(format!("raw:{}", scene.path("plain.raw").display()));
    told.refuses("POST", "/v1/clones", &clone(&of_it, "e.qcow2"), &["open for writing"])?;
    ensure!(!scene.path("e.qcow2").exists(), "a clone of what changes");
    told.served.terminate();
    Ok(())
}

/// Clones are there before they are asked for, also those of an earlier process; and the thread makes up for those taken.
pub fn pool(scene: &Scene) -> Result<()> {
    let bytes = pattern(1 << 20, 24);
    let base = template(scene, &bytes, "")?;
    let pool = format!("--pool={}:4", base.display());
    let inode =
        |path: &Path| -> Result<u64> { Ok(std::os::unix::fs::MetadataExt::ino(&fs::metadata(path)?)) };
    let member = |i: usize| scene.path(&format!("base.qcow2.pool-{i}"));
    for round in 0..2 {
        let told = Told::start(scene, &[&pool]);
        let full = || {
            let pools = told.does("GET", "/v1/pools", &Value::Null)?;
            ensure!(pools[0]["base"] == json!(base) && pools[0]["count"] == 4, "{pools}");
            Ok((pools[0]["ready"] == 4).then_some(()))
        };
        wait::until("a full pool", LIMIT, full)?;
        // In another directory.
        fs::create_dir_all(scene.path("vm"))?;
        for i in 0..6 {
            wait::until("a full pool", LIMIT, full)?;
            let ready: Vec<_> = (0..4).map(|i| inode(&member(i))).collect::<Result<_>>()?;
            let file = scene.path(&format!("vm/{round}-{i}.qcow2"));
            told.does("POST", "/v1/clones", &json!({ "base": base, "file": file }))?;
            ensure!(ready.contains(&inode(&file)?), "it was not taken from the pool");
            expect_content(scene, &file, &bytes)?;
        }
        wait::until("a full pool", LIMIT, full)?;
        // More at once than there are.
        for i in 6..12 {
            told.does(
                "POST",
                "/v1/clones",
                &json!({ "base": base, "file": scene.path(&format!("vm/{round}-{i}.qcow2")) }),
            )?;
        }
        wait::until("a full pool", LIMIT, full)?;
        told.served.terminate();
    }
    let leftover =
        fs::read_dir(scene.path(""))?.flatten().any(|e| e.path().extension().is_some_and(|e| e == "new"));
    ensure!(!leftover, "something half made was left behind");
    Ok(())
}

fn clone_disk(scene: &Scene, base: &Path) -> Value {
    json!({
        "name": "c", "socket-path": scene.path("c.sock"), "blk-file": scene.path("c.qcow2"), "clone-of": base,
        "num-queues": 2
    })
}

/// With a guest at work all the time, its base may go when it is over.
pub fn flattened(scene: &Scene) -> Result<()> {
    // Over two: one that is packed, and one over that.
    let bytes = pattern(SIZE as usize, 25);
    let lowest = template(scene, &bytes, "")?;
    let base = scene.path("middle.qcow2");
    qemu_img::create(
        &base,
        SIZE + (1 << 20),
        "cluster_size=4096",
        &["-F", "qcow2", "-b", &lowest.to_string_lossy()],
    )?;
    let mut copy = Copy::new([bytes, vec![0; 1 << 20]].concat(), 26);
    let told = Told::start(scene, &[]);
    told.does("POST", "/v1/disks", &clone_disk(scene, &base))?;
    let mut front = Front::connect(&scene.path("c.sock"), 2);
    (0..10).try_for_each(|i| step(&mut front.queues[i % 2], &mut copy))?;
    told.flatten("c")?;
    let until = Instant::now() + LIMIT;
    let mut steps = 0;
    while !told.is_alone("c")? {
        ensure!(Instant::now() < until, "it does not end after {steps} requests");
        step(&mut front.queues[steps % 2], &mut copy)?;
        steps += 1;
    }
    println!("{steps} requests meanwhile");
    told.refuses("POST", "/v1/disks/c/flatten", &Value::Null, &["has no image below it"])?;
    // Nobody keeps them any more.
    for file in [&base, &lowest] {
        let bytes = fs::metadata(file)?.len();
        let file = file.to_string_lossy();
        qemu_img::run(&["resize", "-q", "-f", "qcow2", &file, "+1M"])
            .with_context(|| format!("{bytes} bytes"))?;
    }
    [&base, &lowest].into_iter().try_for_each(fs::remove_file)?;
    (0..20).try_for_each(|i| step(&mut front.queues[i % 2], &mut copy))?;
    check_all(&mut front, &copy.bytes)?;
    drop(front);
    // As it was asked for: its base is not missed.
    told.does("DELETE", "/v1/disks/c?force=true", &Value::Null)?;
    told.does("POST", "/v1/disks", &clone_disk(scene, &base))?;
    check_all(&mut Front::connect(&scene.path("c.sock"), 2), &copy.bytes)?;
    told.served.terminate();
    expect_content(scene, &scene.path("c.qcow2"), &copy.bytes)
}

/// At any time: the image is sound, holds what it held, and goes on where it was.
pub fn killed(scene: &Scene) -> Result<()> {
    let bytes = pattern(SIZE as usize, 27);
    let base = template(scene, &bytes, "")?;
    let mut copy = Copy::new(bytes, 28);
    let file = scene.path("c.qcow2");
    let mut alone = 0;
    for kill in 0..8u64 {
        let mut told = Told::start(scene, &[]);
        told.does("POST", "/v1/disks", &clone_disk(scene, &base))?;
        let mut front = Front::connect(&scene.path("c.sock"), 2);
        check_all(&mut front, &copy.bytes)?;
        if !told.is_alone("c")? {
            told.flatten("c")?;
        }
        for i in 0..kill as usize {
            step(&mut front.queues[i % 2], &mut copy)?;
        }
        alone += u32::from(told.is_alone("c")?);
        told.served.process.signal(Signal::SIGKILL)?;
        told.served.process.wait_exit(LIMIT)?;
        drop(front);
        for socket in ["c.sock", "disk.sock", "api"] {
            let _ = fs::remove_file(scene.path(socket));
        }
        // What it has given to the kernel ends when its locks do.
        Served::start(scene, &["--format=qcow2", &format!("--blk-file={}", file.display())]).terminate();
        expect_content(scene, &file, &copy.bytes).with_context(|| format!("after {kill} kills"))?;
    }
    println!("by itself already at {alone} of 8 kills");
    Ok(())
}
