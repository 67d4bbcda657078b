//! The same scenarios on several guests: bare metal, Linux in a machine of ours, Linux in QEMU.
//!
//! Where a platform cannot be had, its tests end as ignored, with the reason; with `KICKLESS_REQUIRE_LINUX` set they
//! fail instead. `scripts/nested.sh` runs those that need KVM where KVM is too slow for them.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use kickless_tests::daemon::Options;
use kickless_tests::image::{Image, MIB};
use kickless_tests::runner::{self, Test};
use kickless_tests::scenario::{Expect, Load, Op, Plan, Platform};
use kickless_tests::scene::Scene;
use kickless_tests::vmm;

type Scenario = fn(Platform, &Scene) -> Result<()>;

const SCENARIOS: [(&str, Scenario); 4] = [
    ("verified_load_on_two_disks", verified_load_on_two_disks),
    ("disk_grows_online", disk_grows_online),
    ("daemon_is_restarted_under_load", daemon_is_restarted_under_load),
    ("every_kind_of_load", every_kind_of_load),
];
const PLATFORMS: [Platform; 3] = [Platform::Bare, Platform::LinuxKvm, Platform::LinuxQemu];

fn main() -> std::process::ExitCode {
    let mut tests = vec![Test {
        name: "speed_of_kernel_code_is_known".to_owned(),
        needs: Box::new(vmm::missing_needs),
        run: Box::new(speed_of_kvm),
    }];
    for platform in PLATFORMS {
        for (name, scenario) in SCENARIOS {
            tests.push(Test {
                name: format!("{platform}_{name}").replace('-', "_"),
                needs: Box::new(move || platform.missing_needs()),
                run: Box::new(move |scene| scenario(platform, scene).map(|()| None)),
            });
        }
    }
    runner::run(tests, "KICKLESS_REQUIRE_LINUX")
}

fn speed_of_kvm(_: &Scene) -> Result<Option<String>> {
    let rate = vmm::speed::instructions_a_second()?;
    println!("{:.1} million instructions a second", rate / 1e6);
    ensure!(rate > 1e5, "{rate} instructions a second");
    Ok(None)
}

fn plan() -> Plan {
    Plan::new().cpus(2)
}

fn verified_load_on_two_disks(platform: Platform, scene: &Scene) -> Result<()> {
    let mut daemons = Vec::new();
    let mut plan = plan();
    for name in ["first", "second"] {
        let image = Image::create(scene, &format!("{name}.img"), 64 * MIB)?;
        let daemon = Options::default().spawn(scene, name, &image)?;
        plan = plan.disk(daemon.socket(), 2);
        daemons.push(daemon);
    }
    let mut guest = plan.boot(platform, scene)?;
    let outcome = guest.run(&Load::verified().on(&[0, 1]).requests(1000))?;
    println!("{platform}: {} requests in {:?}", outcome.requests, outcome.elapsed);
    outcome.expect_clean()?;
    ensure!(outcome.requests >= 4000, "{} requests on 4 queues", outcome.requests);
    ensure!(outcome.reads > 0 && outcome.writes > 0, "{} reads, {} writes", outcome.reads, outcome.writes);
    guest.power_off()?;
    daemons.into_iter().try_for_each(|mut daemon| {
        let seen: u64 = daemon.stats()?.requests().values().sum();
        ensure!(seen >= 2000, "the daemon has seen {seen} requests");
        daemon.terminate()
    })
}

fn disk_grows_online(platform: Platform, scene: &Scene) -> Result<()> {
    let image = Image::create(scene, "disk.img", 16 * MIB)?;
    let daemon = Options::default().spawn(scene, "daemon", &image)?;
    let mut guest = plan().disk(daemon.socket(), 2).boot(platform, scene)?;
    ensure!(guest.capacity(0)? == 16 * MIB, "{} bytes at first", guest.capacity(0)?);
    image.resize(48 * MIB)?;
    daemon.sighup()?;
    guest.await_capacity(0, 48 * MIB)?;
    // The second queue's part is beyond the old end.
    guest.run(&Load::verified().span(24 * MIB).requests(500))?.expect_clean()?;
    guest.power_off()?;
    daemon.terminate()
}

fn daemon_is_restarted_under_load(platform: Platform, scene: &Scene) -> Result<()> {
    let image = Image::create(scene, "disk.img", 64 * MIB)?;
    let mut daemon = Options::default().spawn(scene, "daemon", &image)?;
    let mut guest = plan().disk(daemon.socket(), 2).boot(platform, scene)?;
    if let Ok(vm) = guest.qemu() {
        // QEMU asks a back end that has gone where its rings are.
        vm.tolerate("ring restore failed");
    }
    guest.start(&Load::verified().until_told())?;
    guest.after(500)?;
    daemon.terminate()?;
    daemon = Options::default().spawn(scene, "daemon", &image)?;
    guest.reconnect(0)?;
    guest.some_more(500)?;
    guest.stop()?;
    guest.finish()?.expect_clean()?;
    guest.power_off()?;
    daemon.terminate()
}

fn every_kind_of_load(platform: Platform, scene: &Scene) -> Result<()> {
    let image = Image::filled(scene, "disk.img", 16 * MIB, 0x5a)?;
    let mut daemon = Options::default().spawn(scene, "daemon", &image)?;
    let mut guest = plan().disk(daemon.socket(), 2).boot(platform, scene)?;
    let small = |op| Load::new(op).depth(4).requests(256).span(MIB);
    let zeroes = small(Op::Read).expect(Expect::Zeroes);
    // Some are meant to fail, and a failure must be told.
    let outcome = guest.run(&zeroes)?;
    ensure!(outcome.mismatches > 0, "bytes of 0x5a are taken for zeroes");
    for op in [Op::WriteZeroes, Op::Flush, Op::Read, Op::Write, Op::Discard, Op::WriteZeroes] {
        let outcome = guest.run(&small(op).limit(Duration::from_secs(90)))?;
        outcome.expect_clean().with_context(|| format!("{op:?}"))?;
        ensure!(outcome.requests == 512, "{op:?}: {} requests", outcome.requests);
    }
    guest.run(&zeroes)?.expect_clean().context("zeroes")?;
    image.expect_fill(0, 2 * MIB as usize, 0)?;
    image.expect_fill(2 * MIB, 14 * MIB as usize, 0x5a)?;
    let outcome = guest.run(&small(Op::Read).random().time(Duration::from_millis(300)))?;
    outcome.expect_clean()?;
    ensure!(!outcome.latency.is_empty() && outcome.longest > Duration::ZERO, "no latencies");
    guest.reset()?;
    guest.run(&Load::verified().requests(100))?.expect_clean()?;
    if platform != Platform::LinuxKvm {
        guest.add_memory(128)?;
        guest.run(&Load::verified().requests(100))?.expect_clean()?;
        guest.remove_memory()?;
    }
    guest.power_off()?;
    daemon.expect_alive()?;
    daemon.terminate()
}
