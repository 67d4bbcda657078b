//! Volumes of daemons that run: they grow, come later, go on in another process, and outlive their daemon.

use std::fs::File;

use anyhow::{Context, Result, ensure};
use control::client::Client;
use kickless_tests::cryptsetup::{OFFSET, Volume};
use kickless_tests::process::Process;
use kickless_tests::scene::Scene;
use kickless_tests::wait;
use serde_json::json;

use crate::blk::{FLUSH, Front, LIMIT, OK, READ, Served, Shape, WRITE_ZEROES, program};
use crate::chain::Chain;
use crate::disk::{Copy, check_all, pattern, segment, step};
use crate::{SIZE, copy_of, dir, same};

const QUEUES: usize = 2;

fn volume(scene: &Scene, name: &str) -> Result<(Volume, Copy)> {
    let data = pattern(SIZE, name.len() as u64);
    let volume = Volume::encrypt(&dir(scene), name, &data, &["--sector-size=4096"])?;
    Ok((volume, copy_of(data, 4096)))
}

fn args(volume: &Volume) -> Vec<String> {
    let file = format!("--blk-file={}", volume.path.display());
    [file, "--num-queues=2".into()].into_iter().chain(volume.args()).collect()
}

fn strs(args: &[String]) -> Vec<&str> {
    args.iter().map(String::as_str).collect()
}

fn work(front: &mut Front, copy: &mut Copy) -> Result<()> {
    check_all(front, &copy.bytes)?;
    for i in 0..12 {
        step(&mut front.queues[i % QUEUES], copy)?;
    }
    Ok(())
}

fn caller(scene: &Scene) -> Result<Client> {
    let client = Client::new(&scene.path("api"));
    let answers = || Ok(client.call("GET", "/v1/daemon", None).ok().map(drop));
    wait::until("the API", LIMIT, answers)?;
    Ok(client)
}

/// To the size that is asked for, and to what somebody else has made of the file.
pub fn grows(scene: &Scene) -> Result<()> {
    let (volume, mut copy) = volume(scene, "growing")?;
    let api = format!("--api={}", scene.path("api").display());
    let mut all = args(&volume);
    all.extend([
        api,
        "--disk".into(),
        format!("socket-path={},backend=null:1M", scene.path("n.sock").display()),
    ]);
    let served = Served::start(scene, &strs(&all));
    let mut front = Front::connect(&served.socket, QUEUES);
    work(&mut front, &mut copy)?;
    let client = caller(scene)?;
    let disk = format!("/v1/disks/{}/grow", percent(&served.socket.to_string_lossy()));
    let grow = |size: Option<&str>| client.call("POST", &disk, Some(&json!({ "size": size })));
    let answer = grow(Some("5M"))?;
    ensure!(answer.status == 200, "{} {:?}", answer.status, answer.json());
    ensure!(
        volume.path.metadata()?.len() == OFFSET + (5 << 20),
        "the file has {} bytes",
        volume.path.metadata()?.len()
    );
    File::options().write(true).open(&volume.path)?.set_len(OFFSET + (6 << 20) + 512)?;
    let answer = grow(None)?;
    let capacity = answer.json().context("no answer")?["bytes"].as_u64();
    ensure!(capacity == Some(6 << 20), "{:?}", answer.json());
    // What is new holds nothing in particular.
    let more = front.queues[0].request(READ, (6 << 11) - 8, &Shape { into: &[4096], ..Shape::default() });
    ensure!(more == (OK, 4097), "the end is out of reach: {more:?}");
    copy.bytes.resize(6 << 20, 0);
    let zeroes = segment((SIZE / 512) as u64, ((6 << 20) - SIZE) as u32 / 512, 0);
    let lane = &mut front.queues[0];
    lane.put(lane.area + 4096, &zeroes);
    let answer = lane.request(WRITE_ZEROES, 0, &Shape { out: &[16], ..Shape::default() });
    ensure!(answer == (OK, 1), "write-zeroes: {answer:?}");
    work(&mut front, &mut copy)?;
    drop(front);
    served.terminate();
    File::options().write(true).open(&volume.path)?.set_len(OFFSET + (6 << 20))?;
    same(&volume.decrypt()?, &copy.bytes)
}

fn percent(text: &str) -> String {
    text.replace('/', "%2F")
}

/// A daemon that has given up its rights opens a volume: by a key in a file, and by a credential; and refuses one by a
/// descriptor, which nobody can give it.
pub fn added(scene: &Scene) -> Result<()> {
    let (volume, mut copy) = volume(scene, "added")?;
    let credentials = scene.path("credentials");
    std::fs::create_dir(&credentials)?;
    std::fs::copy(&volume.key, credentials.join("disk"))?;
    let api = format!("--api={}", scene.path("api").display());
    let (allow, socket) = (scene.path("allowed"), scene.path("disk.sock"));
    std::fs::create_dir(&allow)?;
    std::fs::rename(&volume.path, allow.join("added"))?;
    std::fs::rename(&volume.key, allow.join("added.key"))?;
    let volume = Volume { path: allow.join("added"), key: allow.join("added.key") };
    // In the environment, a process gets its credentials; the test's own is its parent's.
    let env = format!("CREDENTIALS_DIRECTORY={}", credentials.display());
    let command = [
        env,
        program().to_string_lossy().into_owned(),
        format!("--socket-path={}", socket.display()),
        "--backend=null:1M".into(),
        "--sandbox=on".into(),
        api,
        format!("--allow={}", allow.display()),
    ];
    let mut process = Process::spawn(scene, "confined", std::path::Path::new("/usr/bin/env"), &command)?;
    let client = caller(scene)?;
    let base =
        json!({ "socket-path": allow.join("s"), "blk-file": volume.path, "format": "luks", "num-queues": 2 });
    let with = |name: &str, key: &str, value: serde_json::Value| {
        let mut disk = base.clone();
        (disk["name"], disk[key]) = (json!(name), value);
        client.call("POST", "/v1/disks", Some(&disk))
    };
    let refused = with("fd", "key-fd", json!(3))?;
    ensure!(refused.status == 400 || refused.status == 422, "{} {:?}", refused.status, refused.json());
    std::fs::write(allow.join("wrong"), "the key of another one")?;
    let wrong = with("wrong", "key-file", json!(allow.join("wrong")))?;
    let why = format!("{:?}", wrong.json());
    ensure!(wrong.status == 409 && why.contains("no key slot opens"), "{} {why}", wrong.status);
    for (name, key, value) in
        [("by-file", "key-file", json!(volume.key)), ("by-credential", "key-credential", json!("disk"))]
    {
        let answer = with(name, key, value)?;
        ensure!(answer.status == 201, "{name}: {} {:?}", answer.status, answer.json());
        let mut front = Front::connect(&allow.join("s"), QUEUES);
        work(&mut front, &mut copy)?;
        drop(front);
        let gone = || {
            let answer = client.call("DELETE", &format!("/v1/disks/{name}?force=true"), None)?;
            Ok((answer.status < 300).then_some(()))
        };
        wait::until("its removal", LIMIT, gone)?;
    }
    process.signal(nix::sys::signal::Signal::SIGTERM)?;
    let status = process.wait_exit(LIMIT)?;
    ensure!(status.success(), "{status}: {}", process.stderr());
    same(&volume.decrypt()?, &copy.bytes)
}

/// The next process reads the key itself, from where it is told; without it, the first one goes on.
pub fn taken_over(scene: &Scene) -> Result<()> {
    let (volume, mut copy) = volume(scene, "moving")?;
    let (socket, kept) = (scene.path("disk.sock"), volume.key.with_extension("kept"));
    let mut all = args(&volume);
    all.push(format!("--socket-path={}", socket.display()));
    let mut chain = Chain::start(scene, &all);
    let mut front = Front::connect(&socket, QUEUES);
    work(&mut front, &mut copy)?;
    std::fs::rename(&volume.key, &kept)?;
    let mut without = chain.successor(&[]);
    let status = without.wait_exit(LIMIT)?;
    let said = without.stderr();
    ensure!(!status.success() && said.contains("cannot read its key"), "{status}: {said}");
    chain.expect_alive();
    work(&mut front, &mut copy)?;
    std::fs::rename(&kept, &volume.key)?;
    for _ in 0..2 {
        chain.upgrade(&[]);
        work(&mut front, &mut copy)?;
    }
    drop(front);
    chain.terminate();
    same(&volume.decrypt()?, &copy.bytes)
}

/// What was flushed is there for the next one, and for cryptsetup.
pub fn killed(scene: &Scene) -> Result<()> {
    let (volume, mut copy) = volume(scene, "killed")?;
    let all = args(&volume);
    for _ in 0..3 {
        let mut served = Served::start(scene, &strs(&all));
        let mut front = Front::connect(&served.socket, QUEUES);
        work(&mut front, &mut copy)?;
        ensure!(front.queues[0].request(FLUSH, 0, &Shape::default()) == (OK, 1), "flush");
        served.process.kill9()?;
        std::fs::remove_file(&served.socket)?;
    }
    same(&volume.decrypt()?, &copy.bytes)
}
