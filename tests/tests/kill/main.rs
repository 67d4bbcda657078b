//! The daemon is killed with SIGKILL under load, again and again, at random moments, and another one takes over. Every
//! request is answered exactly once; no write that was answered is lost, torn, or undone by one that came before it.
//!
//! `KICKLESS_KILLS` says how often (for each ring format), `KICKLESS_SEED` which run to repeat.

mod daemon;
mod faults;
mod front;
mod handover;
mod images;
mod luks;
mod model;

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use daemon::{Daemon, Killer};
use front::{BLOCKS, End, Front};
use kickless_tests::image::Image;
use kickless_tests::random::Random;
use kickless_tests::runner::{self, Test};
use kickless_tests::scene::Scene;
use model::BLOCK;

/// How often the daemon is killed.
fn kills() -> usize {
    let wanted = std::env::var("KICKLESS_KILLS").ok().and_then(|n| n.parse().ok());
    wanted.unwrap_or(110)
}

fn seed() -> u64 {
    let wanted = std::env::var("KICKLESS_SEED").ok().and_then(|n| n.parse().ok());
    wanted.unwrap_or_else(|| {
        u64::from(std::process::id()) << 32 | u64::from(Instant::now().elapsed().subsec_nanos())
    })
}

/// What came of kills.
#[derive(Default)]
struct Tally {
    /// How many were followed by a check of everything.
    checked: usize,
    /// Requests that were in flight.
    left: usize,
    /// From the start of a daemon to its first answer.
    pauses: Vec<Duration>,
}

/// Starts a daemon and kills it: while it comes up, recovers, is checked, or works.
fn kill_once(
    scene: &Scene,
    image: &Image,
    front: &mut Front,
    random: &mut Random,
    args: &[&str],
    tally: &mut Tally,
) -> Result<()> {
    let poll = ["--poll=adaptive", "--poll=busy", "--poll=event"][random.below(3)];
    let started = Instant::now();
    let mut daemon = Daemon::start(scene, image, &[args, &[poll]].concat())?;
    // One in four is killed before it has got far; the others after a check of all that came before.
    let early = random.below(4) == 0;
    let mut killer =
        early.then(|| Killer::after(&daemon, Duration::from_micros(random.below(30_000) as u64)));
    let mut cycle = || -> Result<End> {
        if !daemon.connect(front)? {
            return Ok(End::Gone);
        }
        if !early {
            ensure!(front.load(|| true)? == End::Done, "the daemon has died by itself");
            ensure!(front.check()? == End::Done, "the daemon has died by itself");
            tally.checked += 1;
            killer = Some(Killer::after(&daemon, Duration::from_micros(random.below(12_000) as u64)));
        }
        front.load(|| false)
    };
    let end = cycle().with_context(|| daemon.log())?;
    assert_eq!(end, End::Gone);
    killer.context("nobody to kill it")?.join();
    daemon.expect_killed()?;
    tally.pauses.extend(front.answered.map(|at| at.duration_since(started)));
    tally.left += front.in_flight();
    Ok(())
}

/// Kills daemons while they come up, recover, are checked, and work.
fn killed_at_random(scene: &Scene, packed: bool, kills: usize, args: &[&str]) -> Result<()> {
    let image = Image::create(scene, "disk.img", (BLOCKS * BLOCK) as u64)?;
    killed_with(scene, &image, packed, kills, args, || image.read(0, BLOCKS * BLOCK))
}

/// The same on an image that holds zeros; in the end, that has this `content`.
fn killed_with(
    scene: &Scene,
    image: &Image,
    packed: bool,
    kills: usize,
    args: &[&str],
    content: impl FnOnce() -> Result<Vec<u8>>,
) -> Result<()> {
    let seed = seed();
    let mut front = Front::new(seed, packed);
    front.model.may_tear = args.contains(&"--direct=off");
    let mut random = Random(seed ^ 0x6b69_6c6c);
    let mut tally = Tally::default();
    let begun = Instant::now();
    for kill in 0..kills {
        kill_once(scene, image, &mut front, &mut random, args, &mut tally)
            .with_context(|| format!("after {kill} kills, seed {seed}"))?;
    }
    let Tally { checked, left, mut pauses } = tally;
    let mut daemon = Daemon::start(scene, image, args)?;
    ensure!(daemon.connect(&mut front)?);
    ensure!(front.load(|| true)? == End::Done);
    ensure!(front.check()? == End::Done);
    front.check_image(&content()?)?;
    pauses.sort();
    let (fastest, median, slowest) = (pauses.first(), pauses.get(pauses.len() / 2), pauses.last());
    let (p90, late) = (
        pauses.get(pauses.len() * 9 / 10),
        pauses.iter().filter(|&&p| p > Duration::from_millis(50)).count(),
    );
    println!(
        "from the start of a daemon to its first answer: {median:?} ({fastest:?} to {slowest:?}, p90 {p90:?}, {late} \
         above 50 ms) of {}",
        pauses.len()
    );
    let model = &front.model;
    println!(
        "{kills} kills in {:.1} s, {checked} of them followed by a check of everything, {:.1} requests in flight at \
         each; {} writes and {} reads, seed {seed}",
        begun.elapsed().as_secs_f64(),
        left as f64 / kills as f64,
        model.writes,
        model.reads
    );
    ensure!(
        left > kills,
        "hardly anything was in flight when the daemon was killed: {left} requests in {kills} kills"
    );
    ensure!(model.writes > kills as u64, "{} writes only", model.writes);
    Ok(())
}

type Body = fn(&Scene) -> Result<()>;

const TESTS: &[(&str, Body)] = &[
    ("what_is_lost_torn_or_undone_is_found", |_| model::self_test()),
    ("killed_at_random_split", |scene| killed_at_random(scene, false, kills(), &["--direct=on"])),
    ("killed_at_random_packed", |scene| killed_at_random(scene, true, kills(), &["--direct=on"])),
    // Writes into the page cache: those that a killed daemon had begun go on in workers of the kernel.
    ("killed_at_random_buffered", |scene| killed_at_random(scene, false, kills() / 4, &["--direct=off"])),
];

const FAULTS: &[(&str, Body)] = &[
    ("killed_between_any_two_steps_split", |scene| faults::at_each(scene, false)),
    ("killed_between_any_two_steps_packed", |scene| faults::at_each(scene, true)),
    ("killed_at_any_step_of_a_hand_over_split", |scene| handover::at_each(scene, false)),
    ("killed_at_any_step_of_a_hand_over_packed", |scene| handover::at_each(scene, true)),
];

fn main() -> std::process::ExitCode {
    let test = |&(name, body): &(&str, Body), needs: fn() -> Option<String>| Test {
        name: name.to_owned(),
        needs: Box::new(needs),
        run: Box::new(move |scene| body(scene).map(|()| None)),
    };
    let all = TESTS.iter().map(|t| test(t, || None));
    let images = images::TESTS.iter().map(|t| test(t, kickless_tests::qemu_img::missing));
    let volumes = luks::TESTS.iter().map(|t| test(t, kickless_tests::cryptsetup::missing));
    runner::run(
        all.chain(images)
            .chain(volumes)
            .chain(FAULTS.iter().map(|t| test(t, kickless_tests::process::no_fault_points)))
            .collect(),
        "KICKLESS_REQUIRE_FAULTS",
    )
}
