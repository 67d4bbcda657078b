//! One of two daemons dies in the middle of a hand-over, at each step that there is, under load. Whichever it is, either
//! the other one serves, or the next one recovers what was in flight, and nothing is lost.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use kickless_tests::image::Image;
use kickless_tests::process::{self, Process};
use kickless_tests::scene::Scene;
use kickless_tests::wait;
use poll_engine::fault_point::{GIVER, TAKER};

use crate::front::{BLOCKS, End, Front, QUEUES};
use crate::model::BLOCK;

const LIMIT: Duration = Duration::from_secs(60);

/// Who serves afterwards.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum After {
    /// The old one, and its front end notices nothing.
    Old,
    /// The old one, once its front end has connected again.
    OldAgain,
    /// The new one, and its front end notices nothing.
    New,
    /// Nobody.
    Neither,
}

fn after(place: &str) -> After {
    match place {
        // It has sent everything.
        "giver-sent-all" | "giver-heard" | "giver-left" => After::New,
        _ if GIVER.contains(&place) => After::Neither,
        // It serves, and has perhaps served some requests already.
        "taker-has-baton" | "taker-serves" => After::OldAgain,
        "taker-said" => After::Neither,
        _ => After::Old,
    }
}

pub fn at_each(scene: &Scene, packed: bool) -> Result<()> {
    let image = Image::create(scene, "disk.img", (BLOCKS * BLOCK) as u64)?;
    let mut front = Front::new(1, packed);
    let begun = Instant::now();
    for place in GIVER.iter().chain(&TAKER) {
        dies_at(scene, &image, &mut front, place).with_context(|| format!("{place}\n{}", scene.report()))?;
        for log in ["old.log", "new.log"] {
            std::fs::remove_file(scene.path(log))?;
        }
    }
    front.check_image(&image.read(0, BLOCKS * BLOCK)?)?;
    println!("{} deaths in {:.1} s", GIVER.len() + TAKER.len(), begun.elapsed().as_secs_f64());
    Ok(())
}

/// Starts a daemon that dies at `place`, or one that does not.
fn start(
    scene: &Scene,
    image: &Image,
    name: &str,
    further: &[String],
    place: Option<&str>,
) -> Result<Process> {
    let program = process::built("vhost-blk").context("vhost-blk is not built")?;
    let fault = format!("KICKLESS_FAULT={}:1", place.unwrap_or("nowhere"));
    let mut args = vec![
        fault,
        program.display().to_string(),
        format!("--socket-path={}", scene.path("disk.sock").display()),
        format!("--blk-file={}", image.path().display()),
        format!("--num-queues={QUEUES}"),
        format!("--control={}", scene.path("control").display()),
    ];
    args.extend(further.iter().cloned());
    Process::spawn(scene, name, Path::new("env"), &args)
}

fn connect(front: &mut Front, scene: &Scene) -> Result<()> {
    let socket = scene.path("disk.sock");
    wait::until("a session", LIMIT, || Ok(front.connect(&socket).ok()))
}

fn dies_at(scene: &Scene, image: &Image, front: &mut Front, place: &str) -> Result<()> {
    let giver = GIVER.contains(&place);
    let mut old = start(scene, image, "old", &[], giver.then_some(place))?;
    connect(front, scene)?;
    let takeover = format!("--takeover={}", scene.path("control").display());
    wait::until("the control socket", LIMIT, || Ok(scene.path("control").exists().then_some(())))?;
    let mut new = start(scene, image, "new", &[takeover], (!giver).then_some(place))?;

    // Until the one has died, and for a while after that.
    let deadline = Instant::now() + LIMIT;
    let mut died = None;
    let mut end = front.load(|| {
        let dead = if giver { old.poll_exit() } else { new.poll_exit() };
        if died.is_none() && dead.is_ok_and(|status| status.is_some()) {
            died = Some(Instant::now());
        }
        Instant::now() > deadline || died.is_some_and(|at| at.elapsed() > Duration::from_millis(100))
    })?;
    let victim = if giver { &mut old } else { &mut new };
    let status = victim.wait_exit(LIMIT)?;
    ensure!(std::os::unix::process::ExitStatusExt::signal(&status) == Some(9), "{status}, not killed");

    let wanted = after(place);
    ensure!(
        (end == End::Gone) == matches!(wanted, After::OldAgain | After::Neither),
        "{end:?} of the session"
    );
    if wanted == After::OldAgain {
        connect(front, scene)?;
        end = front.load(|| true)?;
        ensure!(end == End::Done, "the old daemon has not gone on");
    }
    // One that is not to serve has gone by itself.
    for (process, serves) in
        [(&mut old, matches!(wanted, After::Old | After::OldAgain)), (&mut new, wanted == After::New)]
    {
        if serves {
            ensure!(process.poll_exit()?.is_none(), "has ended:\n{}", process.stderr());
        } else {
            process.wait_exit(LIMIT)?;
        }
        ensure!(!process.stderr().contains("panicked"), "{}", process.stderr());
    }
    let mut last = if wanted == After::Neither {
        let last = start(scene, image, "last", &[], None)?;
        connect(front, scene)?;
        last
    } else if wanted == After::New {
        new
    } else {
        old
    };
    let whole = front.load(|| true)? == End::Done && front.check()? == End::Done;
    ensure!(whole, "the last daemon has died by itself\n{}", last.stderr());
    last.kill9()
}
