//! Two guests on one daemon, one of which does what it must not: the other does not notice.

use std::time::Duration;

use anyhow::Result;
use kickless_guest::{Order, kind, misdeed};
use kickless_tests::bare::Bare;
use kickless_tests::daemon::{Daemon, Options};
use kickless_tests::image::{Image, MIB};
use kickless_tests::scenario::{Guest, Load, Plan, Platform};
use kickless_tests::scene::Scene;
use kickless_tests::wait;

/// The longest that a request of the well-behaved guest may take.
const STALL: Duration = Duration::from_millis(100);
const LIMIT: Duration = Duration::from_secs(60);

struct Two {
    daemon: Daemon,
    good: Box<dyn Guest>,
}

impl Two {
    fn start(scene: &Scene, platform: Platform) -> Result<Two> {
        let image = |name| Image::create(scene, name, 32 * MIB);
        let images = [image("good.img")?, image("bad.img")?];
        let daemon = Options::default().spawn_many(scene, "daemon", &[&images[0], &images[1]])?;
        let good = Plan::new().disk(&daemon.sockets()[0], 2).boot(platform, scene)?;
        Ok(Two { daemon, good })
    }

    fn bad_guest(&self, scene: &Scene, platform: Platform) -> Result<Box<dyn Guest>> {
        Plan::new().disk(&self.daemon.sockets()[1], 2).boot(platform, scene)
    }

    /// Has the good guest work while `bad` is done, and fails if it has noticed. A stall is not the daemon's fault on
    /// a host that stalls by itself: then it is tried again, a few times.
    fn while_working(&mut self, mut bad: impl FnMut(&mut Daemon) -> Result<()>) -> Result<()> {
        let mut stalls = Vec::new();
        for seed in 0..4 {
            self.good.start(&Load::verified().depth(4).until_told().seed(seed))?;
            self.good.after(200)?;
            bad(&mut self.daemon)?;
            self.good.stop()?;
            let outcome = self.good.finish()?;
            outcome.expect_clean()?;
            if outcome.longest < STALL {
                return Ok(());
            }
            stalls.push(outcome.longest);
        }
        anyhow::bail!("the good guest's longest requests took {stalls:?}")
    }

    fn finish(self) -> Result<()> {
        self.good.power_off()?;
        self.daemon.terminate()
    }
}

/// Each way of breaking a ring stops that queue; after a reset the guest is served again.
pub fn misdeeds(scene: &Scene, platform: Platform) -> Result<Option<String>> {
    let mut two = Two::start(scene, platform)?;
    let mut bad = two.bad_guest(scene, platform)?;
    two.while_working(|daemon| {
        for misdeed in 0..misdeed::COUNT {
            if misdeed == misdeed::RESET_IN_FLIGHT {
                continue;
            }
            for seed in 1..=if misdeed == misdeed::NOISE { 20 } else { 1 } {
                let order = Order { misdeed, seed, ..Bare::blank(kind::MISBEHAVE, 1) };
                let before = daemon.stats()?.errors();
                bad.bare()?.order(&order, LIMIT)?;
                // Noise may happen to be good enough.
                if misdeed != misdeed::NOISE {
                    wait::until(&format!("the daemon's notice of misdeed {misdeed}"), LIMIT, || {
                        Ok((daemon.stats()?.errors() > before).then_some(()))
                    })?;
                }
                bad.reset()?;
            }
        }
        bad.run(&Load::verified().requests(100))?.expect_clean()
    })?;
    bad.power_off()?;
    two.finish()?;
    Ok(None)
}

/// Resets while requests are in flight.
pub fn resets(scene: &Scene, platform: Platform) -> Result<Option<String>> {
    let mut two = Two::start(scene, platform)?;
    let mut bad = two.bad_guest(scene, platform)?;
    two.while_working(|_| {
        let order =
            Order { misdeed: misdeed::RESET_IN_FLIGHT, requests: 20, ..Bare::blank(kind::MISBEHAVE, 1) };
        bad.bare()?.order(&order, LIMIT)?;
        bad.run(&Load::verified().requests(100))?.expect_clean()
    })?;
    bad.power_off()?;
    two.finish()?;
    Ok(None)
}

/// Pulls the plug while requests are in flight, or has its QEMU killed, and comes back.
pub fn vanishes(scene: &Scene, platform: Platform) -> Result<Option<String>> {
    if let Some(reason) = Platform::Microvm.missing_needs() {
        return Ok(Some(reason));
    }
    let mut two = Two::start(scene, platform)?;
    let socket = two.daemon.sockets()[1].clone();
    two.while_working(|_| {
        for platform in [platform, Platform::Microvm, platform] {
            let mut bad = Plan::new().disk(&socket, 2).boot(platform, scene)?;
            bad.start(&Load::verified().requests(100_000))?;
            bad.after(100)?;
            drop(bad);
        }
        Ok(())
    })?;
    two.finish()?;
    Ok(None)
}
