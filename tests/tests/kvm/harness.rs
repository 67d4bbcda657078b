//! The harness itself: what it says when a guest goes wrong.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use kickless_guest::{Order, kind};
use kickless_tests::bare::Bare;
use kickless_tests::scenario::{Load, Op, Platform};
use kickless_tests::scene::Scene;
use poll_engine::device::features;

use crate::OneDisk;

/// Nothing but a machine, a guest and a request: how long that takes is printed, and looked at by people.
pub fn boots(scene: &Scene, platform: Platform) -> Result<Option<String>> {
    let mut times = Vec::new();
    for _ in 0..5 {
        let mut one = OneDisk::boot(scene, platform, 1)?;
        one.guest.run(&Load::new(Op::Read).requests(1).depth(1))?.expect_clean()?;
        times.push(one.guest.bare()?.machine()?.first_request().context("no first request")?);
        one.finish()?;
    }
    times.sort_unstable();
    println!("to the first completed request: {:.1?} / {:.1?} / {:.1?}", times[0], times[2], times[4]);
    Ok(None)
}

fn expect_error(result: Result<impl Sized>, words: &[&str]) -> Result<()> {
    let Err(error) = result else { anyhow::bail!("no error") };
    let text = format!("{error:#}");
    match words.iter().find(|&&word| !text.contains(word)) {
        Some(word) => anyhow::bail!("no '{word}' in: {text}"),
        None => Ok(()),
    }
}

/// A page fault in the guest ends the run with its registers.
pub fn fault(scene: &Scene, platform: Platform) -> Result<Option<String>> {
    let mut one = OneDisk::boot(scene, platform, 1)?;
    let result = one.guest.bare()?.order(&Bare::blank(kind::FAULT, 1), Duration::from_secs(10));
    expect_error(result, &["exception 14", "cr2 0x100000000", "cs 0x1b", "rip 0x2", "guest: exception"])?;
    one.daemon.terminate()?;
    Ok(None)
}

/// A guest that does not answer ends at the deadline, with the registers of its CPU.
pub fn hang(scene: &Scene, platform: Platform) -> Result<Option<String>> {
    let mut one = OneDisk::boot(scene, platform, 1)?;
    let result = one.guest.bare()?.order(&Bare::blank(kind::HANG, 1), Duration::from_millis(300));
    expect_error(result, &["no answer in time", "CPU 0: Stopped", "rip 0x2", "cs 0x1b"])?;
    one.daemon.terminate()?;
    Ok(None)
}

/// Features that are not accepted are not in use, impossible orders are refused, the configuration is the daemon's.
pub fn negotiation(scene: &Scene, platform: Platform) -> Result<Option<String>> {
    let mut one = OneDisk::boot(scene, platform, 2)?;
    let guest = one.guest.bare()?;
    let known = guest.device(0);
    let all = features::VERSION_1 | features::EVENT_IDX | features::INDIRECT_DESC;
    ensure!(known.features & all == all && known.id == 2 && known.queues == 2, "{known:?}");
    ensure!(known.config == 64 << 11, "{} sectors", known.config);
    expect_error(guest.attach(2, 1, 64, !0), &["no such device"])?;
    expect_error(guest.order(&Order { kind: 99, ..Order::default() }, Duration::from_secs(5)), &["refuses"])?;
    guest.attach(1, 1, 64, features::VERSION_1)?;
    let known = guest.device(0);
    ensure!((known.features, known.queues) == (features::VERSION_1, 1), "{known:?}");
    one.guest.reset()?;
    one.guest.run(&Load::verified())?.expect_clean()?;
    one.finish()?;
    Ok(None)
}
