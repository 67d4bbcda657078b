//! The harness itself: what it says when a guest goes wrong.

use std::fs;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use kickless_guest::{Order, kind};
use kickless_tests::accel::Accel;
use kickless_tests::bare::{Bare, program};
use kickless_tests::image::{Image, MIB};
use kickless_tests::process::{self, Process};
use kickless_tests::qemu::QEMU;
use kickless_tests::scenario::{Load, Op, Plan, Platform};
use kickless_tests::scene::Scene;
use kickless_tests::wait;
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

/// The guest by itself, on a device that shares no code with ours.
pub fn selftest(scene: &Scene, _: Platform) -> Result<Option<String>> {
    let image = Image::create(scene, "disk.img", 16 * MIB)?;
    let serial = scene.fresh_log("serial");
    let args = [
        "-machine microvm,accel=kvm,acpi=off,pit=off,pic=off,rtc=off,isa-serial=on,x-option-roms=off"
            .to_owned(),
        format!(
            "-nodefaults -no-reboot -cpu {} -m 64 -smp 2 -global virtio-mmio.force-legacy=false",
            Accel::Kvm.qemu_cpu()
        ),
        format!("-display none -serial file:{}", serial.display()),
        format!(
            "-drive id=d,file={},if=none,format=raw -device virtio-blk-device,drive=d",
            image.path().display()
        ),
        format!("-kernel {} -append", program().context("no guest")?.display()),
    ];
    let mut args: Vec<String> = args.iter().flat_map(|part| part.split(' ')).map(str::to_owned).collect();
    args.push("kickless.cpus=2 kickless.selftest".to_owned());
    let qemu = process::find_program(QEMU).context("no QEMU")?;
    let mut process = Process::spawn(scene, "qemu", &qemu, &args)?;
    let said = || fs::read_to_string(&serial).unwrap_or_default();
    wait::until("the guest's word that it is done", Duration::from_secs(20), || {
        ensure!(process.poll_exit()?.is_none(), "QEMU: {}", process.stderr_tail());
        Ok(said().contains("guest: done").then_some(()))
    })?;
    ensure!(said().contains("2 CPUs, 1 devices") && said().contains("disk 0: ok"), "{}", said());
    process.kill9()?;
    ensure!(image.read(0, 1 << 20)?.chunks(512).all(|sector| sector.iter().any(|&byte| byte != 0)));
    Ok(None)
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

/// A guest that drives packed rings, of a size that only they may have.
pub fn packed(scene: &Scene, platform: Platform) -> Result<Option<String>> {
    let mut one = OneDisk::boot_with(scene, platform, &|disk| Plan::new().disk(disk, 2).ring_size(100))?;
    let known = one.guest.bare()?.device(0);
    ensure!(known.features & features::RING_PACKED != 0, "features {:#x}", known.features);
    one.guest.run(&Load::verified().requests(2000))?.expect_clean()?;
    one.finish()?;
    Ok(None)
}
