//! Requests of a front end of our own, and what the cluster then has.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use kickless_tests::process::{self, Process};
use kickless_tests::scene::Scene;
use kickless_tests::wait;
use nix::sys::signal::Signal;

use crate::blk::{DISCARD, FLUSH, Front, IOERR, LIMIT, Lane, OK, READ, Served, Shape, WRITE, WRITE_ZEROES};
use crate::cluster::Cluster;

const MIB: usize = 1 << 20;

pub fn requests(scene: &Scene) -> Result<Option<String>> {
    let cluster = Cluster::up(scene)?;
    cluster.rbd("create --size 16M rbd/disk")?;
    refusals(scene, &cluster)?;
    for (round, poll) in ["event", "busy"].iter().enumerate() {
        let poll = format!("--poll={poll}");
        let served = Served::start(scene, &["--blk-file", &cluster.name("disk"), "--num-queues=2", &poll]);
        verified(scene, &served)?;
        let mut front = Front::connect(&served.socket, 2);
        all_kinds(&mut front, &cluster, round as u8)?;
        if round == 0 {
            stalled(&served, &mut front.queues[0], &cluster)?;
            grown(&served, &mut front, &cluster)?;
        }
        ensure!(served.errors("io") == 0, "{}", served.stats());
        drop(front);
        served.terminate();
    }
    snapshot(scene, &cluster)?;
    timed_out(scene, &cluster)?;
    Ok(None)
}

/// A segment of a discard or write-zeroes request.
fn segment(lane: &Lane, sector: u64, sectors: u32, flags: u32) {
    lane.put(lane.area + 4096, &sector.to_le_bytes());
    lane.put(lane.area + 4104, &sectors.to_le_bytes());
    lane.put(lane.area + 4108, &flags.to_le_bytes());
}

fn all_kinds(front: &mut Front, cluster: &Cluster, seed: u8) -> Result<()> {
    let pattern: Vec<u8> = (0..MIB).map(|i| (i % 251) as u8 ^ seed).collect();
    for (q, lane) in front.queues.iter_mut().enumerate() {
        // At an offset in memory, in pieces of any length; the data lie in two objects of the cluster.
        let at = (4 * q + 3) * MIB + MIB / 2;
        let from = lane.more + 20;
        let cut = [512, 100, 412, 3 * 1024, 60 * 1024, 4 * 1024];
        let len: u32 = cut.iter().sum();
        lane.put(from, &pattern[..len as usize]);
        let write = Shape { out: &cut, out_at: Some(from), ..Shape::default() };
        assert_eq!(lane.request(WRITE, at as u64 / 512, &write), (OK, 1));
        assert_eq!(lane.request(FLUSH, 0, &Shape::default()), (OK, 1));
        ensure!(cluster.bytes("disk")?[at..at + len as usize] == pattern[..len as usize], "other bytes");
        lane.put(from, &vec![0; len as usize]);
        let read = Shape { into: &cut, into_at: Some(from), ..Shape::default() };
        assert_eq!(lane.request(READ, at as u64 / 512, &read), (OK, len + 1));
        assert_eq!(lane.get(from, len as usize), pattern[..len as usize]);
    }
    // Both, of what the first queue has written: a part of it zeroed with its space kept, and then all of its object given up.
    let lane = &mut front.queues[0];
    let at = 3 * MIB + MIB / 2;
    for (kind, sector, sectors, flags) in [
        (WRITE_ZEROES, at / 512 + 2, 4, 0),
        (WRITE_ZEROES, at / 512 + 8, 8, 1),
        (DISCARD, 8 * MIB / 512, 4 * MIB as u32 / 512, 0),
    ]
    .map(|(k, at, n, f)| (k, at as u64, n, f))
    {
        segment(lane, sector, sectors, flags);
        assert_eq!(lane.request(kind, sector, &Shape { out: &[16], ..Shape::default() }), (OK, 1));
    }
    assert_eq!(lane.request(FLUSH, 0, &Shape::default()), (OK, 1));
    let bytes = cluster.bytes("disk")?;
    let mut wanted = pattern[..68 * 1024].to_vec();
    wanted[1024..3072].fill(0);
    wanted[4096..8192].fill(0);
    ensure!(bytes[at..at + 68 * 1024] == wanted, "what was zeroed is something else");
    // 5.2.6.2: after a discard, anything may be there; of an image that gives a whole object up, zeros are.
    ensure!(bytes[8 * MIB..12 * MIB].iter().all(|&b| b == 0), "the discarded object is still there");
    // Behind the end.
    assert_eq!(lane.request(READ, 1 << 30, &Shape { into: &[512], ..Shape::default() }).0, IOERR);
    Ok(())
}

/// Our load generator writes, and reads all of it back.
fn verified(scene: &Scene, served: &Served) -> Result<()> {
    let job = "--rw randwrite --verify crc32c --bssplit 4k/60:64k/40 --iodepth 16 --numjobs 2 --size 2M --offset-increment 8M";
    let mut args = vec!["run".to_owned(), format!("--socket-path={}", served.socket.display())];
    args.extend(job.split(' ').map(str::to_owned));
    let mut load = Process::spawn(scene, "vbench", &process::built("vbench").context("no vbench")?, &args)?;
    let status = load.wait_exit(2 * LIMIT)?;
    ensure!(status.success(), "{}\n{}", load.stderr(), served.process.stderr());
    Ok(())
}

/// While the cluster stands still requests wait, and are counted; afterwards they are done.
fn stalled(served: &Served, lane: &mut Lane, cluster: &Cluster) -> Result<()> {
    cluster.osd(Signal::SIGSTOP)?;
    std::thread::scope(|scope| -> Result<()> {
        let io = scope.spawn(|| lane.verified_io(7, 0x5a));
        let told = wait::until("the stall in the statistics", LIMIT, || {
            let said = served.stats().contains("cluster 1 requests waiting, 1 times without an answer");
            Ok(said.then_some(()))
        });
        let waits = !io.is_finished();
        cluster.osd(Signal::SIGCONT)?;
        io.join().unwrap();
        told?;
        ensure!(waits, "the request was over while the cluster stood still");
        Ok(())
    })?;
    wait::until("the log", LIMIT, || {
        let log = served.process.stderr();
        Ok((log.contains("1 requests wait, and the cluster has not answered")
            && log.contains("answers again"))
        .then_some(()))
    })?;
    ensure!(served.stats().contains("cluster 0 requests waiting, 1 times"), "{}", served.stats());
    Ok(())
}

/// `rbd resize` is seen without anybody asking for it.
fn grown(served: &Served, front: &mut Front, cluster: &Cluster) -> Result<()> {
    cluster.rbd("resize --no-progress --size 24M rbd/disk")?;
    wait::until("growth", LIMIT, || {
        Ok(served.process.stderr().contains("has grown to 25165824").then_some(()))
    })?;
    front.queues[1].verified_io(20 * MIB as u64 / 512, 3);
    cluster.rbd("resize --no-progress --allow-shrink --size 16M rbd/disk").map(drop)
}

/// A snapshot is read as it was.
fn snapshot(scene: &Scene, cluster: &Cluster) -> Result<()> {
    let before = cluster.bytes("disk")?;
    cluster.rbd("snap create --no-progress rbd/disk@then")?;
    let served = Served::start(scene, &["--blk-file", &cluster.name("disk")]);
    let mut front = Front::connect(&served.socket, 1);
    front.queues[0].verified_io(7168, 0x77);
    drop(front);
    served.terminate();
    ensure!(cluster.bytes("disk")? != before, "nothing was written");
    let served = Served::start(scene, &["--blk-file", &cluster.name("disk@then"), "--read-only"]);
    let mut front = Front::connect(&served.socket, 1);
    let lane = &mut front.queues[0];
    assert_eq!(lane.request(READ, 7168, &Shape { into: &[512], ..Shape::default() }), (OK, 513));
    ensure!(lane.get(lane.area + 4096, 512) == before[7168 * 512..][..512], "the snapshot has changed");
    assert_eq!(lane.request(WRITE, 0, &Shape { out: &[512], ..Shape::default() }).0, IOERR);
    drop(front);
    served.terminate();
    Ok(())
}

/// Requests fail after a while if that is asked for.
fn timed_out(scene: &Scene, cluster: &Cluster) -> Result<()> {
    let name = format!("{}:rados_osd_op_timeout=2", cluster.name("disk"));
    let served = Served::start(scene, &["--blk-file", &name]);
    let mut front = Front::connect(&served.socket, 1);
    let lane = &mut front.queues[0];
    lane.verified_io(0, 1);
    cluster.osd(Signal::SIGSTOP)?;
    let status = lane.request(READ, 0, &Shape { into: &[512], ..Shape::default() }).0;
    cluster.osd(Signal::SIGCONT)?;
    ensure!(status == IOERR && served.errors("io") == 1, "{status}, {}", served.stats());
    wait::until("the cluster", LIMIT, || {
        let read = lane.request(READ, 0, &Shape { into: &[512], ..Shape::default() });
        Ok((read.0 == OK).then_some(()))
    })?;
    drop(front);
    served.terminate();
    Ok(())
}

/// What cannot be served, in one line each.
fn refusals(scene: &Scene, cluster: &Cluster) -> Result<()> {
    let program = process::built("vhost-blk").unwrap();
    let name = |image: &str| cluster.name(image);
    let wrong_id = cluster.name("disk").replace("id=disk", "id=nobody") + ":client_mount_timeout=5";
    for (blk_file, more, why) in [
        (name("other"), "", "cannot open the image: No such file or directory"),
        (name("disk@never"), "--read-only", "cannot open the image: No such file or directory"),
        (name("disk@then"), "", "use --read-only"),
        (name("disk"), "--format=qcow2", "what is in a cluster is raw"),
        (name("disk").replace("rbd:rbd/", "rbd:pool/"), "", "cannot open the pool"),
        (wrong_id, "", "cannot reach the cluster"),
        ("rbd:rbd/disk:conf=/nowhere/ceph.conf".into(), "", "cannot read the cluster's configuration"),
        (format!("{}:no_such_option=1", name("disk")), "", "cannot set an option of Ceph's"),
        ("rbd:rbd".into(), "", "write rbd:POOL/IMAGE"),
    ] {
        let mut args = vec![format!("--blk-file={blk_file}"), "--socket-path=/tmp/never.sock".to_owned()];
        args.extend((!more.is_empty()).then(|| more.to_owned()));
        let mut refused = Process::spawn(scene, "refused", &program, &args)?;
        let status = refused.wait_exit(Duration::from_secs(60))?;
        let said = refused.stderr();
        ensure!(status.code() == Some(1) && said.contains(why), "{blk_file}: {said}");
    }
    Ok(())
}
