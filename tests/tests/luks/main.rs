//! LUKS volumes: what `cryptsetup` has enciphered is read through the daemon, and what is written through it `cryptsetup`
//! deciphers; what is damaged or locked is refused; and keys are nowhere to be found.

#[path = "../blk/mod.rs"]
mod blk;
#[path = "../takeover/chain.rs"]
#[allow(dead_code)] // the takeover tests use all of it
mod chain;
#[path = "../images/disk.rs"]
mod disk;
mod keys;
mod memory;
mod refusals;
mod running;

use std::path::{Path, PathBuf};

use anyhow::{Result, ensure};
use blk::{DISCARD, Front, OK, READ, Shape, UNSUPP, WRITE, WRITE_ZEROES};
use disk::{Copy, exercise_as, pattern};
use kickless_tests::cryptsetup::{self, Volume};
use kickless_tests::random::Random;
use kickless_tests::runner::{self, Test};
use kickless_tests::scene::Scene;

/// Bytes of a disk.
const SIZE: usize = 3 << 20;

fn dir(scene: &Scene) -> PathBuf {
    scene.path("")
}

/// Serves the volume twice, uses it anyhow, and has `cryptsetup` tell what is in it.
fn used(scene: &Scene, volume: &Volume, copy: &mut Copy, args: &[&str]) -> Result<()> {
    let luks = volume.args();
    let args = [&[&*luks[0], &*luks[1]], args].concat();
    for _ in 0..2 {
        exercise_as(scene, &volume.path, copy, &args)?;
    }
    same(&volume.decrypt()?, &copy.bytes)
}

fn same(found: &[u8], wanted: &[u8]) -> Result<()> {
    ensure!(found.len() == wanted.len(), "{} bytes, not {}", found.len(), wanted.len());
    let differs = found.iter().zip(wanted).position(|(a, b)| a != b);
    ensure!(differs.is_none(), "differs at byte {differs:?}");
    Ok(())
}

fn copy_of(bytes: Vec<u8>, block: usize) -> Copy {
    let mut copy = Copy::new(bytes, 0x6c75_6b73 + block as u64);
    (copy.block, copy.discards) = (block, false);
    copy
}

fn both_ways(scene: &Scene) -> Result<()> {
    for (sector, args) in [
        (512, &["--direct=on"][..]),
        (4096, &["--direct=off"]),
        (4096, &["--direct=on", "--cache=writethrough", "--poll=event"]),
    ] {
        let data = pattern(SIZE, sector as u64);
        let size = format!("--sector-size={sector}");
        let volume = Volume::encrypt(&dir(scene), &format!("v{sector}"), &data, &[&size])?;
        used(scene, &volume, &mut copy_of(data, sector), args)?;
    }
    Ok(())
}

/// Sectors that no descriptor has whole, and some that one has beside parts of others.
fn cut_anywhere(scene: &Scene) -> Result<()> {
    for sector in [512u32, 4096] {
        let options = format!("--sector-size={sector}");
        let volume = Volume::format(&dir(scene), &format!("cut{sector}"), SIZE as u64, &[&options])?;
        let luks = volume.args();
        let (served, mut front) = disk::serve(scene, &volume.path, &[&luks[0], &luks[1]]);
        let lane = &mut front.queues[0];
        let mut random = Random(7 + u64::from(sector));
        let mut cut = |mut left: u32| {
            let mut lens = Vec::new();
            while left > 0 {
                let most = [3, sector, 3 * sector][random.below(3)].min(left);
                let len = if lens.len() == 50 { left } else { 1 + random.below(most as usize) as u32 };
                lens.push(len);
                left -= len;
            }
            lens
        };
        for round in 0..24u64 {
            // As long as a piece, longer than one, and short.
            let len =
                [sector, 4 * sector, 48 << 10, 128 << 10, 500 << 10][round as usize % 5] / sector * sector;
            let at = round * u64::from(sector / 512);
            let bytes = pattern(len as usize, round);
            // At an odd address.
            let place = lane.more + 1 + round;
            lane.put(place, &bytes);
            let out = cut(len);
            let shape = Shape { out: &out, out_at: Some(place), ..Shape::default() };
            ensure!(lane.request(WRITE, at, &shape) == (OK, 1), "write cut so: {out:?}");
            ensure!(lane.get(place, len as usize) == bytes, "a write has changed the guest's memory");
            lane.put(place, &vec![0xa5; len as usize]);
            let into = cut(len);
            let shape = Shape { into: &into, into_at: Some(place), ..Shape::default() };
            ensure!(lane.request(READ, at, &shape) == (OK, len + 1), "read cut so: {into:?}");
            same(&lane.get(place, len as usize), &bytes)?;
        }
        drop(front);
        served.terminate();
    }
    Ok(())
}

fn blocks_are_sectors_at_least(scene: &Scene) -> Result<()> {
    let volume = Volume::format(&dir(scene), "fine", SIZE as u64, &["--sector-size=4096"])?;
    let luks = volume.args();
    let (served, mut front) = disk::serve(scene, &volume.path, &[&luks[0], &luks[1]]);
    let config = blk_size(&front)?;
    ensure!(config == 4096, "blocks of {config} bytes");
    let answer = front.queues[0].request(READ, 1, &Shape { into: &[4096], ..Shape::default() });
    ensure!(answer == (blk::IOERR, 0), "half a sector was read: {answer:?}");
    drop(front);
    served.terminate();
    Ok(())
}

/// `blk_size` of the configuration space.
fn blk_size(front: &Front) -> Result<u32> {
    use vhost::vhost_user::VhostUserFrontend;
    use vhost::vhost_user::message::{VhostUserConfigFlags, VhostUserProtocolFeatures as Protocol};
    let mut session = front.session.clone();
    session.set_protocol_features(Protocol::MQ | Protocol::REPLY_ACK | Protocol::CONFIG)?;
    let (_, bytes) = session.get_config(0, 60, VhostUserConfigFlags::empty(), &[0; 60])?;
    Ok(u32::from_le_bytes(bytes[20..24].try_into()?))
}

/// Blocks that the file takes.
fn taken(path: &Path) -> Result<u64> {
    use std::os::unix::fs::MetadataExt;
    Ok(std::fs::metadata(path)?.blocks())
}

fn discards_are_asked_for(scene: &Scene) -> Result<()> {
    let volume = Volume::format(&dir(scene), "space", SIZE as u64, &["--sector-size=512"])?;
    let luks = volume.args();
    let full = vec![0x5a; 1 << 20];
    let mut before = 0;
    for allowed in [false, true] {
        let mut args = vec![&*luks[0], &*luks[1]];
        args.extend(allowed.then_some("--allow-discards"));
        let (served, mut front) = disk::serve(scene, &volume.path, &args);
        let offered = front.features;
        ensure!(
            (offered & 1 << 13 != 0) == allowed,
            "F_DISCARD with --allow-discards {allowed}: {offered:#x}"
        );
        let lane = &mut front.queues[0];
        lane.put(lane.more, &full);
        let shape = Shape { out: &[1 << 20], out_at: Some(lane.more), ..Shape::default() };
        ensure!(lane.request(WRITE, 0, &shape) == (OK, 1), "write");
        // Zeros are written, whatever may be done about them.
        let zeroes = disk::segment(2048, 2048, 1);
        lane.put(lane.area + 4096, &zeroes);
        let shape = Shape { out: &[16], ..Shape::default() };
        ensure!(lane.request(WRITE_ZEROES, 0, &shape) == (OK, 1), "write-zeroes");
        if !allowed {
            before = taken(&volume.path)?;
        }
        lane.put(lane.area + 4096, &disk::segment(0, 2048, 0));
        let (status, _) = lane.request(DISCARD, 0, &shape);
        ensure!(
            status == if allowed { OK } else { UNSUPP },
            "discard with --allow-discards {allowed}: {status}"
        );
        drop(front);
        served.terminate();
        let gone = before.saturating_sub(taken(&volume.path)?);
        ensure!(
            (gone >= 2048) == allowed,
            "a discard has given up {gone} sectors with --allow-discards {allowed}"
        );
    }
    let found = volume.decrypt()?;
    ensure!(found[1 << 20..2 << 20].iter().all(|&b| b == 0), "zeros are none to cryptsetup");
    Ok(())
}

type Body = fn(&Scene) -> Result<()>;

const TESTS: &[(&str, Body)] = &[
    ("cryptsetup_reads_what_we_write_and_we_what_it_writes", both_ways),
    ("requests_are_cut_anywhere", cut_anywhere),
    ("blocks_are_sectors_at_least", blocks_are_sectors_at_least),
    ("discards_are_asked_for", discards_are_asked_for),
    ("a_volume_on_tmpfs_is_served_at_once", memory::at_once),
    ("a_guest_may_change_what_is_under_way", memory::changed_meanwhile),
    ("a_volume_grows", running::grows),
    ("a_confined_daemon_is_given_a_volume", running::added),
    ("a_volume_is_taken_over", running::taken_over),
    ("a_killed_daemon_loses_nothing", running::killed),
    ("keys_come_from_where_they_are", keys::sources),
    ("keys_are_nowhere_to_be_found", keys::hidden),
    ("what_cannot_be_opened_is_refused", refusals::refused),
    ("a_damaged_header_is_made_up_for", refusals::damaged),
];

fn main() -> std::process::ExitCode {
    let test = |&(name, body): &(&str, Body)| Test {
        name: name.to_owned(),
        needs: Box::new(cryptsetup::missing),
        run: Box::new(move |scene| body(scene).map(|()| None)),
    };
    runner::run(TESTS.iter().map(test).collect(), "KICKLESS_REQUIRE_LUKS")
}
