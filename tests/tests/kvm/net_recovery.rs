//! What becomes of packets between cards on a switch when the daemon, the guest's memory or the cards change under load.
//! A daemon that is killed may lose the packets of one round, or bring them twice; nothing else may, unless it says so.

use std::time::Duration;

use anyhow::{Result, ensure};
use kickless_guest::{Order, kind, misdeed};
use kickless_tests::bare::Bare;
use kickless_tests::daemon::Daemon;
use kickless_tests::net;
use kickless_tests::scenario::{Guest, Load, Op, Outcome, Plan, Platform, Wait};
use kickless_tests::scene::Scene;

/// Packets that each card has under way at most.
const DEPTH: u64 = 128;
/// Most packets that a daemon takes from a queue in one round.
const BURST: u64 = 32;
const KILLS: u64 = 6;
const UPGRADES: u64 = 4;

/// A guest with two cards on a switch, which has a third port.
struct Cards {
    daemon: Daemon,
    guest: Box<dyn Guest>,
}

impl Cards {
    fn boot(scene: &Scene, platform: Platform, options: net::Options) -> Result<Cards> {
        let daemon = options.queues(1).lossless().spawn(scene, "switch")?;
        let [a, b, ..] = daemon.sockets() else { anyhow::bail!("a switch with two ports") };
        let guest = Plan::new().cpus(2).nic(a).nic(b).boot(platform, scene)?;
        Ok(Cards { daemon, guest })
    }

    /// As it must be when nothing happens.
    fn undisturbed(&mut self) -> Result<()> {
        let outcome = self.guest.run(&packets(5000).wait(Wait::Sleep))?;
        outcome.expect_clean()?;
        ensure!(outcome.requests == 10_000, "{outcome:?}");
        Ok(())
    }

    /// What has come of a load that may have lost packets, as many as these and no others.
    fn expect(outcome: &Outcome, most: u64) -> Result<()> {
        let (missing, twice) = (outcome.missing, outcome.repeated);
        println!("{} packets, {missing} missing, {twice} came twice", outcome.requests);
        outcome.expect_clean()?;
        ensure!(missing <= most && twice <= most, "{missing} missing and {twice} twice are more than {most}");
        Ok(())
    }

    fn finish(self) -> Result<()> {
        self.guest.power_off()?;
        self.daemon.terminate()
    }
}

/// So many from each card to the other.
fn packets(each: u64) -> Load {
    let load = Load::new(Op::Exchange).on(&[0, 1]).block_size(300).unrecorded().depth(DEPTH as u32);
    load.requests(each).limit(Duration::from_secs(120))
}

/// SIGKILL under load, and another daemon on the same sockets: what it has taken and not given back is served again.
pub fn killed(scene: &Scene, platform: Platform) -> Result<Option<String>> {
    if let Some(reason) = net::missing_needs() {
        return Ok(Some(reason));
    }
    let mut cards = Cards::boot(scene, platform, net::Options::switch())?;
    cards.guest.start(&packets(0).lossy().until_told())?;
    for _ in 1..=KILLS {
        cards.guest.some_more(8000)?;
        cards.daemon.kill_and_restart(scene)?;
        (0..2).try_for_each(|card| cards.guest.reconnect(card))?;
    }
    cards.guest.some_more(1000)?;
    cards.guest.stop()?;
    // A round of each card; and what was sent to a card that was not there for longer than packets wait.
    Cards::expect(&cards.guest.finish()?, KILLS * 2 * (BURST + DEPTH))?;
    cards.undisturbed()?;
    ensure!(!cards.daemon.stats()?.text().contains("\ndrops "), "{}", cards.daemon.stats()?.text());
    cards.finish()?;
    Ok(None)
}

/// Newer daemons take over, one from the other: the driver sees nothing but a pause.
pub fn upgraded(scene: &Scene, platform: Platform) -> Result<Option<String>> {
    if let Some(reason) = net::missing_needs() {
        return Ok(Some(reason));
    }
    let mut cards = Cards::boot(scene, platform, net::Options::switch().upgradable())?;
    for round in 0..UPGRADES {
        cards.guest.start(&packets(0).lossy().until_told())?;
        cards.guest.after(1000)?;
        cards.daemon.upgrade(scene, &[["--poll=adaptive", "--poll=event"][round as usize % 2]])?;
        cards.guest.some_more(1000)?;
        cards.guest.stop()?;
        // What was sent to a card whose queues were stopped for longer than packets wait.
        Cards::expect(&cards.guest.finish()?, 4 * DEPTH)?;
        cards.undisturbed()?;
    }
    cards.finish()?;
    Ok(None)
}

/// Regions of memory are added and removed with packets under way, and packets lie in them.
pub fn memory(scene: &Scene, platform: Platform) -> Result<Option<String>> {
    if let Some(reason) = net::missing_needs() {
        return Ok(Some(reason));
    }
    let mut cards = Cards::boot(scene, platform, net::Options::switch())?;
    let load = packets(10_000).wait(Wait::Sleep);
    for _ in 0..3 {
        cards.guest.start(&load.clone().until_told())?;
        cards.guest.after(1000)?;
        cards.guest.add_memory(32)?;
        cards.guest.add_memory(64)?;
        cards.guest.some_more(1000)?;
        cards.guest.stop()?;
        cards.guest.finish()?.expect_clean()?;
        // With buffers in the last one.
        cards.guest.run(&load)?.expect_clean()?;
        cards.guest.remove_memory()?;
        cards.guest.start(&load)?;
        cards.guest.after(1000)?;
        cards.guest.finish()?.expect_clean()?;
        cards.guest.remove_memory()?;
        cards.undisturbed()?;
    }
    cards.finish()?;
    Ok(None)
}

/// Queues are reset one by one with packets under way: those that come while there is nothing to receive with wait; all that
/// is sent is taken exactly once.
pub fn queue_resets(scene: &Scene, platform: Platform) -> Result<Option<String>> {
    if let Some(reason) = net::missing_needs() {
        return Ok(Some(reason));
    }
    let mut cards = Cards::boot(scene, platform, net::Options::switch())?;
    let outcome = cards.guest.run(&packets(20_000).lossy().reset_every(500))?;
    ensure!(outcome.resets >= 40, "{} resets", outcome.resets);
    ensure!(outcome.repeated == 0, "{} packets were taken again", outcome.repeated);
    Cards::expect(&outcome, outcome.resets * 3 * DEPTH)?;
    cards.undisturbed()?;
    ensure!(cards.daemon.stats()?.errors() == 0, "{}", cards.daemon.stats()?.text());
    cards.finish()?;
    Ok(None)
}

/// A third card is reset with its queues full again and again, and vanishes: the other two do not notice.
pub fn card_resets(scene: &Scene, platform: Platform) -> Result<Option<String>> {
    if let Some(reason) = net::missing_needs() {
        return Ok(Some(reason));
    }
    let mut cards = Cards::boot(scene, platform, net::Options::switch().ports(3))?;
    let third = Plan::new().nic(&cards.daemon.sockets()[2]);
    let mut bad = third.boot(platform, scene)?;
    cards.guest.start(&packets(0).wait(Wait::Sleep).until_told())?;
    cards.guest.after(1000)?;
    let resets = Order { misdeed: misdeed::RESET_IN_FLIGHT, requests: 40, ..Bare::blank(kind::MISBEHAVE, 1) };
    bad.bare()?.order(&resets, Duration::from_secs(60))?;
    drop(bad);
    let bad = third.boot(platform, scene)?;
    cards.guest.some_more(1000)?;
    cards.guest.stop()?;
    cards.guest.finish()?.expect_clean()?;
    cards.undisturbed()?;
    bad.power_off()?;
    cards.finish()?;
    Ok(None)
}
