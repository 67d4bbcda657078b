//! Images in formats of their own, as `qemu-img` makes them: what is read and written through the daemon is what a plain
//! copy in memory says, and what `qemu-img` finds afterwards; and what is damaged is refused.

#[path = "../blk/mod.rs"]
mod blk;
mod clones;
mod damage;
mod disk;
mod elsewhere;
mod grown;
mod malformed;
mod mutations;
mod refusals;
mod room;

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Result, ensure};
use control::client::Client;
use disk::{Copy, exercise};
use kickless_tests::process::no_fault_points;
use kickless_tests::qemu_img;
use kickless_tests::runner::{self, Test};
use kickless_tests::scene::Scene;
use kickless_tests::wait;

/// Bytes of a disk: more than an L2 table of clusters of 4 KiB maps.
const SIZE: u64 = 3 << 20;

/// A directory in memory, where the host has one: what is not about storage does not have to wait for it.
fn quick(scene: &Scene) -> Result<tempfile::TempDir> {
    let memory = Path::new("/dev/shm");
    let place = if memory.is_dir() { memory.to_owned() } else { scene.path("") };
    Ok(tempfile::Builder::new().prefix("kickless-").tempdir_in(place)?)
}

/// Somebody who tells a daemon what to do. Its sockets are made one after the other.
fn caller(api: &Path) -> Client {
    let client = Client::new(api);
    let answers = || Ok(client.call("GET", "/v1/daemon", None).ok().map(drop));
    wait::until("the API", Duration::from_secs(60), answers).expect("an API");
    client
}

/// A raw image with something in most places.
fn raw(scene: &Scene, name: &str, size: u64, seed: u64) -> Result<(PathBuf, Vec<u8>)> {
    let bytes = disk::pattern(size as usize, seed);
    let path = scene.path(name);
    std::fs::write(&path, &bytes)?;
    Ok((path, bytes))
}

/// Serves the image twice, uses it anyhow, and has it looked at.
fn used(scene: &Scene, path: &Path, bytes: Vec<u8>, args: &[&str]) -> Result<()> {
    let mut copy = Copy::new(bytes, 0x6b69 ^ path.to_string_lossy().len() as u64);
    for _ in 0..2 {
        exercise(scene, path, &mut copy, args)?;
        qemu_img::check(path)?;
        let plain = scene.path("plain.raw");
        std::fs::write(&plain, &copy.bytes)?;
        qemu_img::compare((path, "qcow2"), (&plain, "raw"))?;
    }
    Ok(())
}

fn every_cluster_size(scene: &Scene) -> Result<()> {
    let memory = quick(scene)?;
    for bits in 9..=21 {
        let path = memory.path().join(format!("{bits}.qcow2"));
        qemu_img::create(&path, SIZE, &format!("cluster_size={}", 1 << bits), &[])?;
        used(scene, &path, vec![0; SIZE as usize], &[])?;
    }
    Ok(())
}

fn direct_and_through_the_page_cache(scene: &Scene) -> Result<()> {
    for (bits, direct) in
        [(12, "--direct=on"), (16, "--direct=on"), (21, "--direct=on"), (16, "--direct=off")]
    {
        let path = scene.path(&format!("{bits}.qcow2"));
        qemu_img::create(&path, SIZE, &format!("cluster_size={}", 1 << bits), &[])?;
        used(scene, &path, vec![0; SIZE as usize], &[direct])?;
    }
    Ok(())
}

fn every_kind_of_image(scene: &Scene) -> Result<()> {
    for options in [
        "compat=0.10",
        "lazy_refcounts=on",
        "refcount_bits=1,cluster_size=4096",
        "refcount_bits=64,cluster_size=512",
        "preallocation=metadata",
        "preallocation=falloc,cluster_size=4096",
        "data_file=data.raw,cluster_size=4096",
        "data_file=data.raw,data_file_raw=on",
    ] {
        let memory = quick(scene)?;
        let path = memory.path().join("kind.qcow2");
        let data = memory.path().join("data.raw");
        let options = options.replace("data.raw", &data.to_string_lossy());
        qemu_img::create(&path, SIZE, &options, &[])?;
        used(scene, &path, vec![0; SIZE as usize], &[])?;
    }
    Ok(())
}

fn over_other_images(scene: &Scene) -> Result<()> {
    let (base, bytes) = raw(scene, "base.raw", SIZE, 1)?;
    let convert = |to: &str, args: &[&str]| {
        let (from, to) = (base.to_string_lossy(), scene.path(to));
        qemu_img::run(
            &[&["convert", "-f", "raw", "-O", "qcow2"], args, &[&from, &to.to_string_lossy()]].concat(),
        )
    };
    convert("plain.qcow2", &[])?;
    convert("packed.qcow2", &["-c"])?;
    convert("fine.qcow2", &["-c", "-o", "cluster_size=1024"])?;
    qemu_img::create(&scene.path("middle.qcow2"), SIZE, "", &["-F", "qcow2", "-b", "packed.qcow2"])?;
    // An odd end: half a cluster, and not a whole page either.
    let (short, mut shorter) = raw(scene, "short.raw", SIZE / 3 + 512, 2)?;
    let short = short.to_string_lossy();
    shorter.resize(SIZE as usize, 0);
    for (below, format, cluster, content) in [
        ("base.raw", "raw", 65536, &bytes),
        ("plain.qcow2", "qcow2", 4096, &bytes),
        ("packed.qcow2", "qcow2", 65536, &bytes),
        ("fine.qcow2", "qcow2", 16384, &bytes),
        ("middle.qcow2", "qcow2", 2 << 20, &bytes),
        (&*short, "raw", 65536, &shorter),
    ] {
        let path = scene.path("over.qcow2");
        let options = format!("cluster_size={cluster}");
        qemu_img::create(&path, SIZE, &options, &["-F", format, "-b", below])?;
        used(scene, &path, content.clone(), &[])?;
    }
    // Those below are as they were.
    let same = std::fs::read(&base)? == bytes;
    ensure!(same, "the base was written to");
    for below in ["plain.qcow2", "packed.qcow2", "fine.qcow2", "middle.qcow2"] {
        qemu_img::compare((&scene.path(below), "qcow2"), (&base, "raw"))?;
    }
    Ok(())
}

fn packed_and_shared_clusters(scene: &Scene) -> Result<()> {
    for cluster in [4096, 65536] {
        let (plain, bytes) = raw(scene, "content.raw", SIZE, 3)?;
        let path = scene.path("packed.qcow2");
        let [from, to] = [&plain, &path].map(|p| p.to_string_lossy());
        let options = format!("cluster_size={cluster}");
        qemu_img::run(&["convert", "-c", "-o", &options, "-f", "raw", "-O", "qcow2", &from, &to])?;
        used(scene, &path, bytes, &[])?;
        // All clusters are a snapshot's as well now.
        let content = std::fs::read(scene.path("plain.raw"))?;
        qemu_img::run(&["snapshot", "-c", "then", &to])?;
        used(scene, &path, content.clone(), &[])?;
        qemu_img::run(&["snapshot", "-a", "then", &to])?;
        std::fs::write(&plain, content)?;
        qemu_img::compare((&path, "qcow2"), (&plain, "raw"))?;
    }
    Ok(())
}

fn write_through_and_one_queue(scene: &Scene) -> Result<()> {
    let path = scene.path("disk.qcow2");
    qemu_img::create(&path, SIZE, "", &[])?;
    used(scene, &path, vec![0; SIZE as usize], &["--cache=writethrough", "--poll=event"])
}

fn vmdk_is_read(scene: &Scene) -> Result<()> {
    let (plain, bytes) = raw(scene, "content.raw", SIZE, 4)?;
    let path = scene.path("disk.vmdk");
    let [from, to] = [&plain, &path].map(|p| p.to_string_lossy());
    qemu_img::run(&["convert", "-o", "subformat=monolithicFlat", "-f", "raw", "-O", "vmdk", &from, &to])?;
    disk::read_all(scene, &path, &bytes, &["--format=vmdk", "--read-only"])
}

fn read_only_images(scene: &Scene) -> Result<()> {
    let (plain, bytes) = raw(scene, "content.raw", SIZE, 5)?;
    let path = scene.path("disk.qcow2");
    let [from, to] = [&plain, &path].map(|p| p.to_string_lossy());
    qemu_img::run(&["convert", "-f", "raw", "-O", "qcow2", &from, &to])?;
    let before = std::fs::read(&path)?;
    disk::read_all(scene, &path, &bytes, &["--format=qcow2", "--read-only"])?;
    ensure!(std::fs::read(&path)? == before, "it was written to");
    Ok(())
}

type Body = fn(&Scene) -> Result<()>;

const TESTS: &[(&str, Body)] = &[
    ("every_cluster_size", every_cluster_size),
    ("direct_and_through_the_page_cache", direct_and_through_the_page_cache),
    ("every_kind_of_image", every_kind_of_image),
    ("over_other_images", over_other_images),
    ("packed_and_shared_clusters", packed_and_shared_clusters),
    ("write_through_and_one_queue", write_through_and_one_queue),
    ("vmdk_is_read", vmdk_is_read),
    ("read_only_images", read_only_images),
    ("what_cannot_be_used_is_refused", refusals::refused),
    ("who_may_use_an_image_beside_whom", refusals::locked),
    ("a_guest_moves_with_its_image", elsewhere::moved),
    ("a_confined_daemon_is_given_an_image", elsewhere::added),
    ("clones_keep_to_themselves", clones::apart),
    ("clones_are_made_at_once", clones::hundred),
    ("clones_that_cannot_be", clones::refused),
    ("a_pool_is_kept_full", clones::pool),
    ("an_image_is_flattened_in_use", clones::flattened),
    ("a_flattening_daemon_is_killed", clones::killed),
    ("what_is_allocated_ahead_is_zeros", room::zeros),
    ("what_is_allocated_ahead_is_not_below", room::over_a_base),
    ("an_image_grows_in_use", grown::in_use),
    ("an_image_that_was_larger_grows", grown::shrunk),
    ("clones_grow_beyond_their_base", grown::clones),
    ("damaged_images_do_no_harm", damage::damaged),
    ("malformed_qcow2_does_no_harm", malformed::qcow2),
    ("malformed_vmdk_does_no_harm", malformed::vmdk),
    ("enormous_disks_take_no_memory", malformed::enormous),
    ("tables_are_not_written_over", malformed::overlapping),
    ("only_files_are_backing_files", malformed::named),
];

/// With a daemon that dies where it is told to.
const DYING: &[(&str, Body)] = &[("a_growing_daemon_is_killed", grown::killed)];

fn main() -> std::process::ExitCode {
    let test = |needs: fn() -> Option<String>| {
        move |&(name, body): &(&str, Body)| Test {
            name: name.to_owned(),
            needs: Box::new(needs),
            run: Box::new(move |scene| body(scene).map(|()| None)),
        }
    };
    let dying = || qemu_img::missing().or_else(no_fault_points);
    let all = TESTS.iter().map(test(qemu_img::missing)).chain(DYING.iter().map(test(dying)));
    let cached = Test::new("the_base_is_cached_once_for_all_clones", clones::cached, qemu_img::missing);
    let on_a_device =
        Test::new("an_image_on_a_block_device_grows", grown::on_a_block_device, qemu_img::missing);
    runner::run(all.chain([cached, on_a_device]).collect(), "KICKLESS_REQUIRE_IMAGES")
}
