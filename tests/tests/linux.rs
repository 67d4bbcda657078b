//! The same scenarios on several guests: bare metal, Linux in a machine of ours, Linux in QEMU.
//!
//! Where a platform cannot be had, its tests end as ignored, with the reason; with `KICKLESS_REQUIRE_QEMU` set they
//! fail instead. `scripts/nested.sh` runs those that need KVM where KVM is too slow for them.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use kickless_tests::daemon::{Kind, Options};
use kickless_tests::image::{Image, MIB};
use kickless_tests::scenario::{Expect, Load, Op, Plan, Platform};
use kickless_tests::scene::Scene;
use kickless_tests::vmm;
use libtest_mimic::{Arguments, Completion, Failed, Trial};

type Scenario = fn(Platform, &Scene) -> Result<()>;

const SCENARIOS: [(&str, Scenario); 4] = [
    ("verified_load_on_two_disks", verified_load_on_two_disks),
    ("disk_grows_online", disk_grows_online),
    ("daemon_is_restarted_under_load", daemon_is_restarted_under_load),
    ("every_kind_of_load", every_kind_of_load),
];
const PLATFORMS: [Platform; 3] = [Platform::Bare, Platform::LinuxKvm, Platform::LinuxQemu];

fn main() -> std::process::ExitCode {
    let mut args = Arguments::from_args();
    args.test_threads.get_or_insert(1);
    let mut trials = vec![Trial::ignorable_test("speed_of_kvm_is_known_quickly", speed_of_kvm)];
    for platform in PLATFORMS {
        for (name, scenario) in SCENARIOS {
            let name = format!("{platform}_{name}").replace('-', "_");
            trials.push(Trial::ignorable_test(name, move || attempt(platform, scenario)));
        }
    }
    libtest_mimic::run(&args, trials).exit_code()
}

/// Runs one scenario; what it leaves in its logs is part of the message when it fails.
fn attempt(platform: Platform, scenario: Scenario) -> Result<Completion, Failed> {
    let missing = match Kind::from_env().program() {
        Some(_) => platform.missing_needs(),
        None => Some("no daemon: run cargo build, or set KICKLESS_BIN_DIR".to_owned()),
    };
    if let Some(reason) = missing {
        if platform == Platform::LinuxQemu && std::env::var_os("KICKLESS_REQUIRE_QEMU").is_some() {
            return Err(reason.into());
        }
        return Ok(Completion::ignored_with(reason));
    }
    let scene = Scene::new().map_err(|error| format!("{error:#}"))?;
    match scenario(platform, &scene) {
        Ok(()) => Ok(Completion::Completed),
        Err(error) => Err(format!("{error:#}\n{}", scene.report()).into()),
    }
}

fn speed_of_kvm() -> Result<Completion, Failed> {
    if let Some(reason) = vmm::missing_needs() {
        return Ok(Completion::ignored_with(reason));
    }
    let start = Instant::now();
    let rate = vmm::speed::instructions_a_second().map_err(|error| format!("{error:#}"))?;
    let took = start.elapsed();
    println!("{:.1} million instructions a second, known after {took:?}", rate / 1e6);
    assert!(rate > 1e5, "{rate} instructions a second");
    assert!(took < Duration::from_secs(1), "measuring takes {took:?}");
    Ok(Completion::Completed)
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
    guest.start(&Load::verified().time(Duration::from_secs(4)))?;
    guest.after(500)?;
    daemon.terminate()?;
    daemon = Options::default().spawn(scene, "daemon", &image)?;
    guest.reconnect(0)?;
    let before = guest.progress()?;
    guest.after(before + 500)?;
    guest.finish()?.expect_clean()?;
    guest.power_off()?;
    daemon.terminate()
}

fn every_kind_of_load(platform: Platform, scene: &Scene) -> Result<()> {
    let image = Image::filled(scene, "disk.img", 16 * MIB, 0x5a)?;
    let mut daemon = Options::default().spawn(scene, "daemon", &image)?;
    let mut guest = plan().disk(daemon.socket(), 2).boot(platform, scene)?;
    // With more in flight, bare metal's requests go round in parts of the span, some of them ahead of others.
    let small = |op| Load::new(op).depth(1).requests(256).span(MIB);
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
