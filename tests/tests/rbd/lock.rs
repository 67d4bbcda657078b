//! The exclusive lock of an image, which two clients want.

use anyhow::{Context, Result, ensure};
use kickless_tests::process::Process;
use kickless_tests::scene::Scene;
use kickless_tests::wait;

use crate::blk::{Front, IOERR, LIMIT, Lane, OK, READ, Served, Shape, WRITE, program};
use crate::cluster::Cluster;

/// Where the second client writes.
const SECOND: u64 = 4096;

pub fn lock(scene: &Scene) -> Result<Option<String>> {
    let cluster = Cluster::up(scene)?;
    cluster.rbd("create --size 16M rbd/disk")?;
    let first = Served::start(scene, &["--blk-file", &cluster.name("disk")]);
    let second = serve(scene, &cluster, "second")?;
    let [mut a, mut b] = [&first, &second].map(|served| Front::connect(&served.socket, 1));
    ensure!(holder(&cluster)?.is_none(), "somebody has the lock who has written nothing");
    handed_over(&cluster, &mut a.queues[0], &mut b.queues[0])?;
    let held = wanted_by_both(&cluster, &mut a.queues[0], &mut b.queues[0])?;
    ensure!(first.errors("io") == 0 && second.errors("io") == 0, "{}", first.stats());
    println!("both wrote at once, and the lock was seen to change hands {held} times");
    taken_by_force(&cluster, &first, &mut a.queues[0], &mut b.queues[0])?;
    drop((a, b));
    first.terminate();
    second.terminate();
    // Who was shut out comes back as another client.
    let again = serve(scene, &cluster, "again")?;
    Front::connect(&again.socket, 1).queues[0].verified_io(1, 9);
    again.terminate();
    Ok(None)
}

/// Another daemon on the image.
fn serve(scene: &Scene, cluster: &Cluster, name: &str) -> Result<Served> {
    let socket = scene.path(&format!("{name}.sock"));
    let args =
        [format!("--socket-path={}", socket.display()), format!("--blk-file={}", cluster.name("disk"))];
    let mut process = Process::spawn(scene, name, &program(), &args)?;
    wait::until("the daemon's socket", LIMIT, || {
        ensure!(process.poll_exit()?.is_none(), "{}", process.stderr());
        Ok(socket.exists().then_some(()))
    })?;
    Ok(Served { process, socket })
}

/// Who has the lock: the cookie of the lock, and its client.
fn holder(cluster: &Cluster) -> Result<Option<(String, String)>> {
    let locks: serde_json::Value = serde_json::from_slice(&cluster.rbd("lock ls --format json rbd/disk")?)?;
    let all = locks.as_array().context("no list of locks")?;
    ensure!(all.len() <= 1, "several have the lock: {locks}");
    let text = |key: &str| Some(all.first()?[key].as_str()?.to_owned());
    Ok(text("id").zip(text("locker")))
}

fn client(cluster: &Cluster) -> Result<String> {
    Ok(holder(cluster)?.context("nobody has the lock")?.1)
}

/// It is taken with the first write, and goes to whoever writes next; both see what the other one has written.
fn handed_over(cluster: &Cluster, a: &mut Lane, b: &mut Lane) -> Result<()> {
    a.verified_io(1, 1);
    let first = client(cluster)?;
    a.verified_io(2, 2);
    ensure!(client(cluster)? == first, "the lock has gone without anybody wanting it");
    b.verified_io(SECOND, 3);
    let second = client(cluster)?;
    ensure!(second != first, "it has written without the lock, which {first} has");
    let written = b.get(b.area + 4096, 512);
    ensure!(a.request(READ, SECOND, &Shape { into: &[512], ..Shape::default() }) == (OK, 513));
    ensure!(a.get(a.area + 4096, 512) == written, "what the other one has written is not there");
    ensure!(client(cluster)? == second, "a read has taken the lock");
    a.verified_io(3, 4);
    ensure!(client(cluster)? == first, "it has written without the lock, which {second} has");
    Ok(())
}

/// Both write at once, until the lock was seen to change hands; how often it was.
fn wanted_by_both(cluster: &Cluster, a: &mut Lane, b: &mut Lane) -> Result<usize> {
    use std::sync::atomic::{AtomicBool, Ordering};
    let over = AtomicBool::new(false);
    let write = |lane: &mut Lane, from: u64| {
        let mut rounds = 0u64;
        while !over.load(Ordering::Relaxed) {
            lane.verified_io(from + rounds % 50, rounds as u8);
            rounds += 1;
        }
        rounds
    };
    std::thread::scope(|scope| {
        let both = [scope.spawn(|| write(a, 0)), scope.spawn(|| write(b, SECOND))];
        let (mut last, mut changes) = (None, 0);
        let changed = wait::until("the lock to change hands", LIMIT, || {
            let now = holder(cluster)?.map(|(_, client)| client);
            if now.is_some() && now != last {
                (last, changes) = (now, changes + 1);
            }
            Ok((changes > 4).then_some(changes - 1))
        });
        over.store(true, Ordering::Relaxed);
        for rounds in both {
            ensure!(rounds.join().unwrap() > 0, "one of them has written nothing");
        }
        changed
    })
}

/// An operator takes the lock away (`rbd lock rm`), as somebody does who takes a client for dead. That one is shut out: its
/// requests fail, each at once, and write nothing; the other one goes on.
fn taken_by_force(cluster: &Cluster, first: &Served, a: &mut Lane, b: &mut Lane) -> Result<()> {
    a.verified_io(4, 5);
    let (cookie, client) = holder(cluster)?.context("nobody has the lock")?;
    cluster.rbd_with(&["lock", "rm", "rbd/disk", &cookie, &client])?;
    b.verified_io(SECOND + 100, 6);
    let theirs = b.get(b.area + 4096, 512);
    let ours = vec![0xa5; 512];
    a.put(a.area + 4096, &ours);
    let write = Shape { out: &[512], ..Shape::default() };
    let answer = a.request(WRITE, SECOND + 100, &write);
    ensure!(answer.0 == IOERR, "a client that was shut out has written: {answer:?}");
    let read = a.request(READ, SECOND + 100, &Shape { into: &[512], ..Shape::default() });
    ensure!(read.0 == IOERR, "a client that was shut out has read: {read:?}");
    ensure!(first.errors("io") >= 2, "{}", first.stats());
    let at = (SECOND as usize + 100) * 512;
    ensure!(cluster.bytes("disk")?[at..at + 512] == theirs, "other bytes than those of who has the lock");
    b.verified_io(SECOND + 101, 7);
    Ok(())
}
