//! Data: what is written is what is read.

use std::fs;

use anyhow::{Result, ensure};
use kickless_tests::daemon::Options;
use kickless_tests::image::{Image, MIB};
use kickless_tests::scenario::{Expect, Load, Op, Plan, Platform};
use kickless_tests::scene::Scene;
use poll_engine::device::features;

use crate::OneDisk;

/// Every queue does its share.
pub fn four_queues(scene: &Scene, platform: Platform) -> Result<Option<String>> {
    let mut one = OneDisk::boot(scene, platform, 4)?;
    let outcome = one.guest.run(&Load::verified().requests(2000).flush_every(50))?;
    outcome.expect_clean()?;
    ensure!(outcome.requests == 8000 && outcome.reads > 1000 && outcome.writes > 1000, "{outcome:?}");
    let stats = one.daemon.stats()?;
    let served: Vec<u64> = stats.requests().into_values().collect();
    ensure!(served == [2000; 4] && stats.errors() == 0, "the daemon has seen\n{}", stats.text());
    one.finish()?;
    Ok(None)
}

/// From one sector to more than a mebibyte.
pub fn sizes(scene: &Scene, platform: Platform) -> Result<Option<String>> {
    let mut one = OneDisk::boot(scene, platform, 2)?;
    for (seed, (bytes, depth)) in
        [(512, 64), (1536, 16), (4096, 64), (66048, 8), (1 << 20, 4)].into_iter().enumerate()
    {
        let load = Load::verified().block_size(bytes).depth(depth).span(16 * MIB).seed(seed as u64);
        one.guest.run(&load.requests(200))?.expect_clean()?;
    }
    one.finish()?;
    Ok(None)
}

/// A pass that writes and one that reads, with a reset of the device in between; and the host's view of it.
pub fn two_passes(scene: &Scene, platform: Platform) -> Result<Option<String>> {
    let mut one = OneDisk::boot(scene, platform, 2)?;
    let blocks = 1024;
    let pass =
        |op| Load::new(op).expect(Expect::Written).requests(blocks).span(blocks * 4096).depth(16).seed(7);
    let written = one.guest.run(&pass(Op::Write))?;
    written.expect_clean()?;
    one.guest.run(&Load::new(Op::Flush).requests(1).depth(1))?.expect_clean()?;
    one.guest.reset()?;
    let read = one.guest.run(&pass(Op::Read))?;
    read.expect_clean()?;
    ensure!(written.writes == 2 * blocks && read.reads == 2 * blocks, "{written:?}\n{read:?}");
    let other = one.guest.run(&pass(Op::Read).seed(8))?;
    ensure!(other.mismatches == other.requests, "a comparison that cannot fail: {other:?}");
    let image = one.finish()?;
    let bytes = image.read(0, 8 << 20)?;
    ensure!(
        bytes.chunks(512).all(|sector| sector.iter().any(|&b| b != 0)),
        "sectors are missing in the image"
    );
    ensure!(image.read(8 * MIB, 1 << 20)?.iter().all(|&b| b == 0), "written where nothing was to be written");
    Ok(None)
}

/// Discard and write zeroes.
pub fn discard(scene: &Scene, platform: Platform) -> Result<Option<String>> {
    let image = Image::filled(scene, "disk.img", 16 * MIB, 0xa5)?;
    let daemon = Options::default().spawn(scene, "daemon", &image)?;
    let mut guest = Plan::new().disk(daemon.socket(), 1).boot(platform, scene)?;
    let pass = |op| Load::new(op).block_size(65536).depth(4).requests(16).span(MIB);
    let full = image.allocated()?;
    guest.run(&pass(Op::WriteZeroes))?.expect_clean()?;
    guest.run(&pass(Op::Read).expect(Expect::Zeroes))?.expect_clean()?;
    image.expect_fill(0, 1 << 20, 0)?;
    image.expect_fill(MIB, 15 << 20, 0xa5)?;
    guest.run(&pass(Op::Discard).requests(128).span(8 * MIB))?.expect_clean()?;
    guest.run(&pass(Op::Read).expect(Expect::Zeroes).requests(128).span(8 * MIB))?.expect_clean()?;
    image.expect_fill(8 * MIB, 8 << 20, 0xa5)?;
    let left = image.allocated()?;
    ensure!(left + 7 * MIB <= full, "discarding 8 MiB: {full} bytes allocated before, {left} after");
    let not_zero = guest.run(&pass(Op::Read).expect(Expect::Zeroes).requests(256).span(16 * MIB))?;
    ensure!(not_zero.mismatches == 128, "{not_zero:?}");
    guest.power_off()?;
    daemon.terminate()?;
    Ok(None)
}

/// Rings that are full all the time.
pub fn small_rings(scene: &Scene, platform: Platform) -> Result<Option<String>> {
    for size in [4, 16] {
        let plan = |disk: &std::path::Path| Plan::new().disk(disk, 2).ring_size(size);
        let mut one = OneDisk::boot_with(scene, platform, &plan)?;
        one.guest.run(&Load::verified().depth(64).direct())?.expect_clean()?;
        one.guest.run(&Load::verified().depth(64))?.expect_clean()?;
        one.finish()?;
    }
    Ok(None)
}

/// What an old driver does.
pub fn few_features(scene: &Scene, platform: Platform) -> Result<Option<String>> {
    let plan = |disk: &std::path::Path| {
        Plan::new().disk(disk, 2).without(features::EVENT_IDX | features::INDIRECT_DESC)
    };
    let mut one = OneDisk::boot_with(scene, platform, &plan)?;
    let known = one.guest.bare()?.device(0).features;
    ensure!(known & (features::EVENT_IDX | features::INDIRECT_DESC) == 0, "features {known:#x}");
    one.guest.run(&Load::verified().requests(2000))?.expect_clean()?;
    one.finish()?;
    Ok(None)
}

/// Two CPUs, two queues each.
pub fn two_cpus(scene: &Scene, platform: Platform) -> Result<Option<String>> {
    let plan = |disk: &std::path::Path| Plan::new().disk(disk, 4).cpus(2).pin(&[0, 1]);
    let mut one = OneDisk::boot_with(scene, platform, &plan)?;
    let cpus = one.guest.bare()?.cpus();
    ensure!(cpus == 2, "{cpus} CPUs");
    let outcome = one.guest.run(&Load::verified().requests(1000))?;
    outcome.expect_clean()?;
    ensure!(outcome.requests == 4000, "{outcome:?}");
    one.finish()?;
    Ok(None)
}

/// More devices than the interrupt controller has lines for.
pub fn many_disks(scene: &Scene, platform: Platform) -> Result<Option<String>> {
    const DISKS: usize = 24;
    let images =
        (0..DISKS).map(|i| Image::create(scene, &format!("{i}.img"), 8 * MIB)).collect::<Result<Vec<_>>>()?;
    let daemon = Options::default().spawn_many(scene, "daemon", &images.iter().collect::<Vec<_>>())?;
    let mut plan = Plan::new();
    for socket in daemon.sockets() {
        plan = plan.disk(socket, 1);
    }
    let mut guest = plan.boot(platform, scene)?;
    let all: Vec<usize> = (0..DISKS).collect();
    let load = Load::verified().on(&all).depth(8).requests(100);
    let outcome = guest.run(&load)?;
    outcome.expect_clean()?;
    ensure!(outcome.requests == DISKS as u64 * 100, "{outcome:?}");
    guest.power_off()?;
    daemon.terminate()?;
    Ok(None)
}

/// Huge pages, where the host can be made to have some.
pub fn huge_pages(scene: &Scene, platform: Platform) -> Result<Option<String>> {
    const PAGES: u64 = 32;
    let pool = "/proc/sys/vm/nr_hugepages";
    let number = |text: String| text.trim().parse::<u64>().unwrap_or(0);
    let before = number(fs::read_to_string(pool)?);
    if fs::write(pool, (before + PAGES).to_string()).is_err() {
        return Ok(Some(format!("{pool} cannot be written")));
    }
    let result = with_huge_pages(scene, platform, number(fs::read_to_string(pool)?) >= before + PAGES);
    fs::write(pool, before.to_string())?;
    result
}

fn with_huge_pages(scene: &Scene, platform: Platform, enough: bool) -> Result<Option<String>> {
    if !enough {
        return Ok(Some("the host has no 32 huge pages to spare".to_owned()));
    }
    let plan = |disk: &std::path::Path| Plan::new().disk(disk, 2).huge_pages();
    let mut one = OneDisk::boot_with(scene, platform, &plan)?;
    one.guest.run(&Load::verified())?.expect_clean()?;
    one.finish()?;
    Ok(None)
}
