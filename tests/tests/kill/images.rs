//! The same with qcow2 images: after each kill the image is sound, and `qemu-img` finds in it every write that was answered,
//! whether it had been flushed or not. Again and again the image becomes the base of a new one, so that there are clusters to be allocated
//! and copied all the time.

use std::time::Instant;

use anyhow::{Context, Result, ensure};
use kickless_tests::image::Image;
use kickless_tests::qemu_img;
use kickless_tests::random::Random;
use kickless_tests::scene::Scene;

use crate::daemon::Daemon;
use crate::front::{BLOCKS, End, Front};
use crate::model::BLOCK;
use crate::{Body, Tally, kill_once, kills, seed};

/// Kills until the image becomes a base.
const KILLS_OF_A_LAYER: usize = 4;
/// Images over each other, until they are made one.
const LAYERS: usize = 6;

/// An image over the one at hand, if there is one.
fn layer(scene: &Scene, number: usize, cluster: usize) -> Result<Image> {
    let path = scene.path(&format!("layer-{number}.qcow2"));
    let options = format!("cluster_size={cluster}");
    let below = number.checked_sub(1).map(|n| format!("layer-{n}.qcow2"));
    // What a killed daemon has given to the kernel may go on in what is below, so that is not looked into.
    let over: &[&str] = match &below {
        Some(below) => &["-u", "-F", "qcow2", "-b", below],
        None => &[],
    };
    qemu_img::create(&path, (BLOCKS * BLOCK) as u64, &options, over)?;
    Ok(Image::at(path))
}

/// What an image holds, by somebody else.
fn content(scene: &Scene, image: &Image) -> Result<Vec<u8>> {
    let raw = scene.path("all.raw");
    let [from, to] = [image.path(), &raw].map(|p| p.to_string_lossy());
    qemu_img::run(&["convert", "-U", "-f", "qcow2", "-O", "raw", &from, &to])?;
    Image::at(raw).read(0, BLOCKS * BLOCK)
}

fn killed(scene: &Scene, cluster: usize, kills: usize, args: &[&str]) -> Result<()> {
    let seed = seed();
    let args = [&["--format=qcow2"], args].concat();
    let mut front = Front::new(seed, cluster.trailing_zeros().is_multiple_of(2));
    front.model.may_tear = args.contains(&"--direct=off");
    let mut random = Random(seed ^ 0x696d_6167);
    let mut tally = Tally::default();
    let begun = Instant::now();
    let mut image = layer(scene, 0, cluster)?;
    for kill in 0..kills {
        let number = kill / KILLS_OF_A_LAYER % LAYERS;
        if kill > 0 && kill % KILLS_OF_A_LAYER == 0 {
            if number == 0 {
                let one = scene.path("one.qcow2");
                let [from, to] = [image.path(), &one].map(|p| p.to_string_lossy());
                // By then all that was in the kernel is over: another daemon has had its locks.
                let mut daemon = Daemon::start(scene, &image, &args)?;
                ensure!(daemon.connect(&mut front)? && front.load(|| true)? == End::Done);
                drop(daemon);
                qemu_img::run(&["convert", "-U", "-c", "-f", "qcow2", "-O", "qcow2", &from, &to])?;
                std::fs::rename(&one, scene.path("layer-0.qcow2"))?;
                image = Image::at(scene.path("layer-0.qcow2"));
            } else {
                image = layer(scene, number, cluster)?;
            }
        }
        kill_once(scene, &image, &mut front, &mut random, &args, &mut tally)
            .and_then(|()| qemu_img::check(image.path()))
            .and_then(|()| front.check_left(&content(scene, &image)?))
            .with_context(|| format!("after {kill} kills, seed {seed}"))?;
    }
    let mut daemon = Daemon::start(scene, &image, &args)?;
    ensure!(daemon.connect(&mut front)?);
    ensure!(front.load(|| true)? == End::Done);
    ensure!(front.check()? == End::Done);
    drop(daemon);
    qemu_img::check(image.path())?;
    front.check_image(&content(scene, &image)?)?;
    let model = &front.model;
    println!(
        "clusters of {cluster}: {kills} kills in {:.1} s, {} of them followed by a check of everything, {} requests in \
         flight; {} writes and {} reads, seed {seed}",
        begun.elapsed().as_secs_f64(),
        tally.checked,
        tally.left,
        model.writes,
        model.reads
    );
    ensure!(tally.left > 0, "nothing was in flight");
    ensure!(model.writes > kills as u64, "{} writes only", model.writes);
    Ok(())
}

pub const TESTS: &[(&str, Body)] = &[
    ("killed_at_random_qcow2", |scene| killed(scene, 4096, kills() / 4, &["--direct=on"])),
    ("killed_at_random_qcow2_large_clusters", |scene| killed(scene, 65536, kills() / 8, &["--direct=on"])),
    ("killed_at_random_qcow2_buffered", |scene| killed(scene, 512, kills() / 8, &["--direct=off"])),
];
