//! The daemon dies between two steps of a request, at each of the places that there are, and at every one of them the
//! next daemon finishes what it had begun.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use kickless_tests::image::Image;
use kickless_tests::process::built;
use kickless_tests::scene::Scene;
use poll_engine::fault_point::{PACKED, RECOVER, SPLIT, UNTAKE};

use crate::daemon::Daemon;
use crate::front::{BLOCKS, End, Front};
use crate::model::BLOCK;

/// How long it may take until a place is passed.
const LIMIT: Duration = Duration::from_secs(60);

/// Has daemons die at each of `places`, the first time they pass it and later, and at the places of a recovery.
pub fn at_each(scene: &Scene, packed: bool) -> Result<()> {
    let (places, back) = if packed { (&PACKED[..], &UNTAKE[..]) } else { (&SPLIT[..], &UNTAKE[3..]) };
    let places = [places, back, &RECOVER].concat();
    let image = Image::create(scene, "disk.img", (BLOCKS * BLOCK) as u64)?;
    let mut front = Front::new(1, packed);
    let begun = Instant::now();
    let mut deaths = 0;
    for place in &places {
        let recovery = RECOVER.contains(place);
        for nth in if recovery { 1..=1 } else { 1..=3 } {
            // The first time, the second, and in the middle of a load.
            let nth = if nth == 3 { 20 } else { nth };
            if recovery {
                leave_in_flight(scene, &image, &mut front, packed)?;
            }
            dies_at(scene, &image, &mut front, place, nth).with_context(|| format!("{place}, {nth}"))?;
            deaths += 1;
        }
    }
    front.check_image(&image.read(0, BLOCKS * BLOCK)?)?;
    println!("{deaths} deaths at {} places in {:.1} s", places.len(), begun.elapsed().as_secs_f64());
    Ok(())
}

/// Has a daemon die with at least one request begun: the last step of taking it is done.
fn leave_in_flight(scene: &Scene, image: &Image, front: &mut Front, packed: bool) -> Result<()> {
    die(scene, image, front, if packed { "take-old-free-head" } else { "take-inflight" }, 20)
}

/// Has a daemon die when it passes `place` for the `nth` time.
fn die(scene: &Scene, image: &Image, front: &mut Front, place: &str, nth: usize) -> Result<()> {
    let program = built("vhost-blk").context("vhost-blk is not built")?;
    let fault = format!("{place}:{nth}");
    // What is over the limit goes back.
    let args: &[&str] = if UNTAKE.contains(&place) { &["--limit=iops-total=5000"] } else { &[] };
    let mut dying = Daemon::start_program(&program, scene, image, args, &[("KICKLESS_FAULT", &fault)])?;
    let deadline = Instant::now() + LIMIT;
    if dying.connect(front)? {
        let end = front.load(|| Instant::now() > deadline)?;
        ensure!(end == End::Gone, "was never passed");
    }
    dying.expect_killed()
}

fn dies_at(scene: &Scene, image: &Image, front: &mut Front, place: &str, nth: usize) -> Result<()> {
    die(scene, image, front, place, nth)?;
    let mut last = Daemon::start(scene, image, &[])?;
    ensure!(last.connect(front)?);
    let whole = front.load(|| true)? == End::Done && front.check()? == End::Done;
    ensure!(whole, "the daemon has died by itself\n{}", last.log());
    Ok(())
}
