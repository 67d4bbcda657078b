//! Live upgrade: daemons take over from each other while guests' requests are in flight, and nothing is lost, doubled or
//! failed; and everything that can go wrong with the new one leaves the old one serving.
#![allow(clippy::unwrap_used)]

#[path = "../blk/mod.rs"]
mod blk;
mod chain;
mod failures;
mod load;

use std::time::Duration;

use blk::Front;
use chain::Chain;
use kickless_tests::image::{Image, MIB};
use kickless_tests::qemu_img;
use kickless_tests::runner::{self, Test};
use kickless_tests::scene::Scene;
use load::{BLOCK, Load, SPAN, Tally, content};

const QUEUES: usize = 2;

const TESTS: &[(&str, fn())] = &[
    ("twenty_upgrades_under_load_lose_nothing_on_split_rings", || upgrades_under_load(false)),
    ("twenty_upgrades_under_load_lose_nothing_on_packed_rings", || upgrades_under_load(true)),
    ("disks_may_be_added_and_options_changed_that_no_guest_sees", disks_may_be_added),
    ("a_bad_configuration_is_refused_before_anything_stops", failures::bad_configuration),
    ("it_may_die_at_any_step", failures::dies_at_any_step),
    ("it_may_be_killed_at_any_time", failures::killed_at_any_time),
    ("a_new_one_that_stands_still_is_not_waited_for", failures::stands_still),
    ("programs_of_another_age_refuse_each_other", failures::another_age),
    (OTHER_USER, failures::another_user),
    (QCOW2, upgrades_of_a_qcow2_image),
];
const QCOW2: &str = "upgrades_of_a_qcow2_image_lose_nothing";
const OTHER_USER: &str = "nobody_but_its_user_may_take_over";

fn main() -> std::process::ExitCode {
    let not_root =
        || (!nix::unistd::geteuid().is_root()).then(|| "it takes root to be another user".to_owned());
    let test = |&(name, body): &(&'static str, fn())| Test {
        name: name.to_owned(),
        needs: Box::new(move || match name {
            OTHER_USER => not_root(),
            QCOW2 => qemu_img::missing(),
            _ => None,
        }),
        run: Box::new(move |_| {
            body();
            Ok(None)
        }),
    };
    runner::run(TESTS.iter().map(test).collect(), "KICKLESS_REQUIRE_ROOT")
}

/// Hand-overs of the long test: `KICKLESS_TAKEOVERS`, or 20.
fn rounds() -> usize {
    std::env::var("KICKLESS_TAKEOVERS").ok().and_then(|n| n.parse().ok()).unwrap_or(20)
}

/// Options of a daemon with an image, memory and a read-only image.
pub fn three_disks(scene: &Scene, image: &Image, read_only: &Image) -> Vec<String> {
    let direct = if image.takes_direct_io() { "on" } else { "off" };
    vec![
        format!("--direct={direct}"),
        format!("--num-queues={QUEUES}"),
        format!("--disk=socket-path={},blk-file={}", scene.path("a").display(), image.path().display()),
        format!("--disk=socket-path={},backend=ram:16M", scene.path("b").display()),
        format!(
            "--disk=socket-path={},blk-file={},read-only",
            scene.path("c").display(),
            read_only.path().display()
        ),
    ]
}

fn report(what: &str, tallies: &[Tally], epochs: impl Iterator<Item = usize> + Clone) -> Duration {
    let mut gaps: Vec<_> = epochs
        .map(|e| tallies.iter().filter_map(|t| t.gaps.get(e)).max().copied().unwrap_or_default())
        .collect();
    gaps.sort();
    let (median, max) = (gaps[gaps.len() / 2], gaps[gaps.len() - 1]);
    println!(
        "{what}: {} times, longest gap between completions of any queue p50 {median:.1?}, max {max:.1?}",
        gaps.len()
    );
    max
}

/// Descriptors by kind, threads, and mappings of guest memory of a process.
fn belongings(pid: nix::unistd::Pid) -> (Vec<String>, usize, usize) {
    let dir = |name: &str| std::fs::read_dir(format!("/proc/{pid}/{name}")).unwrap().flatten();
    let link = |e: std::fs::DirEntry| std::fs::read_link(e.path()).ok();
    let mut fds: Vec<String> = dir("fd")
        .filter_map(link)
        .map(|to| to.display().to_string())
        // Sockets and pipes have numbers, and logs names, that differ.
        .map(|to| to.trim_end_matches(|c: char| c.is_ascii_digit() || c == ']').to_owned())
        .filter(|to| !to.contains(".log"))
        .collect();
    fds.sort();
    let maps = std::fs::read_to_string(format!("/proc/{pid}/maps")).unwrap();
    // Workers of io_uring come and go.
    let is_worker =
        |e: &std::fs::DirEntry| std::fs::read(e.path().join("comm")).is_ok_and(|c| c.starts_with(b"iou-"));
    (
        fds,
        dir("task").filter(|e| !is_worker(e)).count(),
        maps.lines().filter(|l| l.contains("guest-ram")).count(),
    )
}

fn upgrades_under_load(packed: bool) {
    let scene = Scene::new().unwrap();
    let image = Image::create(&scene, "a.img", 16 * MIB).unwrap();
    let read_only = Image::filled(&scene, "c.img", 4 * MIB, 0x5c).unwrap();
    let mut chain = Chain::start(&scene, &three_disks(&scene, &image, &read_only));
    let [a, b, c] = ["a", "b", "c"].map(|name| scene.path(name));
    let load = Load::start(&[(&a, None), (&b, None), (&c, Some(0x5c))], QUEUES, packed);
    load.progress();
    let fresh = belongings(chain.current.pid());
    for round in 0..rounds() {
        load.next_epoch();
        // Options may differ from one to the next.
        let (poll, cpus) =
            (["adaptive", "event"][round % 2], ["--cpus=0", "--fixed-buffers=off"][round / 2 % 2]);
        chain.upgrade(&[&format!("--poll={poll}"), cpus]);
        load.progress();
        load.next_epoch();
        load.progress();
    }
    // As many reactors and as registered as the first.
    load.next_epoch();
    chain.upgrade(&[]);
    load.progress();
    let now = belongings(chain.current.pid());
    assert_eq!(now, fresh, "descriptors, threads, mappings");

    let tallies = load.finish();
    let total: u64 = tallies.iter().map(|t| t.requests).sum();
    println!("{total} requests on {} queues of 3 disks, {} hand-overs", tallies.len(), rounds() + 1);
    report("between hand-overs", &tallies, (2..=2 * rounds()).step_by(2));
    report("around hand-overs", &tallies, (1..=2 * rounds() + 1).step_by(2));

    // What the last one serves is what all of them have written, and so is what is in the image.
    let mut front = Front::connect(&a, QUEUES);
    front.queues[0].verified_io(15 * MIB / 512, 9);
    drop(front);
    chain.terminate();
    for (queue, tally) in (0u64..).zip(&tallies[..QUEUES]) {
        for (block, &version) in (queue * SPAN..).zip(&tally.versions) {
            if version > 0 {
                let found = image.read(block * BLOCK, BLOCK as usize).unwrap();
                assert!(found == content(block, version), "block {block} of the image");
            }
        }
    }
    assert!(!a.exists() && !b.exists() && !c.exists(), "sockets are still there");
}

/// Each has to find what the one before it has allocated.
fn upgrades_of_a_qcow2_image() {
    let scene = Scene::new().unwrap();
    let [base, path, plain] = ["base.raw", "a.qcow2", "plain.raw"].map(|name| scene.path(name));
    Image::create(&scene, "base.raw", 16 * MIB).unwrap();
    let over = ["-F", "raw", "-b", &base.to_string_lossy()];
    qemu_img::create(&path, 16 * MIB, "cluster_size=4096", &over).unwrap();
    let a = scene.path("a");
    let disk = format!("--disk=socket-path={},format=qcow2,blk-file={}", a.display(), path.display());
    let mut chain = Chain::start(&scene, &[format!("--num-queues={QUEUES}"), disk]);
    let load = Load::start(&[(&a, None)], QUEUES, false);
    load.progress();
    for _ in 0..=rounds() / 4 {
        load.next_epoch();
        chain.upgrade(&[]);
        load.progress();
    }
    let tallies = load.finish();
    chain.terminate();
    qemu_img::check(&path).unwrap();
    let [from, to] = [&path, &plain].map(|p| p.to_string_lossy());
    qemu_img::run(&["convert", "-f", "qcow2", "-O", "raw", &from, &to]).unwrap();
    let image = Image::at(plain.clone());
    for (queue, tally) in (0u64..).zip(&tallies) {
        for (block, &version) in (queue * SPAN..).zip(&tally.versions) {
            if version > 0 {
                let found = image.read(block * BLOCK, BLOCK as usize).unwrap();
                assert!(found == content(block, version), "block {block} of the image");
            }
        }
    }
}

fn disks_may_be_added() {
    let scene = Scene::new().unwrap();
    let args = [format!("--disk=socket-path={},backend=ram:4M", scene.path("a").display())];
    let mut chain = Chain::start(&scene, &args);
    let a = scene.path("a");
    let mut front = Front::connect(&a, 1);
    front.queues[0].verified_io(3, 1);
    let added = format!("--disk=socket-path={},backend=null:1M", scene.path("b").display());
    // The guest of the first has nothing to do with room for larger rings, with what a reset will bring, or with another
    // disk.
    chain.upgrade(&[&added, "--queue-size=2048", "--cache=writethrough"]);
    chain.args.push(added);
    front.queues[0].verified_io(4, 2);
    let mut other = Front::connect(&scene.path("b"), 1);
    assert_eq!(other.queues[0].request(blk::FLUSH, 0, &blk::Shape::default()), (blk::OK, 1));
    // A front end that leaves finds the next daemon as it left the last one.
    drop(front);
    let mut front = Front::connect(&a, 1);
    chain.upgrade(&["--queue-size=2048"]);
    front.queues[0].verified_io(5, 3);
    drop((front, other));
    chain.terminate();
}
