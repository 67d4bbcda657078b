//! A block device of the host as the disk: a loop device, where this machine lets us have one.

mod blk;

use std::process::Command;

use blk::{DISCARD, Front, LIMIT, OK, Served, Shape, WRITE_ZEROES};
use kickless_tests::image::{Image, MIB};
use kickless_tests::loop_device::Loop;
use kickless_tests::scene::Scene;
use kickless_tests::wait;
use libtest_mimic::{Arguments, Completion, Failed, Trial};
use nix::sys::signal::Signal;

fn main() -> std::process::ExitCode {
    let trials = vec![Trial::ignorable_test("a_loop_device_is_a_disk", a_loop_device_is_a_disk)];
    libtest_mimic::run(&Arguments::from_args(), trials).exit_code()
}

fn a_loop_device_is_a_disk() -> Result<Completion, Failed> {
    let scene = Scene::new().map_err(|e| e.to_string())?;
    let image = Image::filled(&scene, "disk.img", 16 * MIB, 0x5a).map_err(|e| e.to_string())?;
    let device = match Loop::over(image.path(), 512) {
        Ok(device) => device,
        Err(reason) => return Ok(Completion::ignored_with(format!("no loop device: {reason}"))),
    };
    let served =
        Served::start(&scene, &[&format!("--blk-file={}", device.path().display()), "--poll=adaptive"]);
    let mut front = Front::connect(&served.socket, 1);
    let lane = &mut front.queues[0];
    for seed in 0..32 {
        lane.verified_io(u64::from(seed) * 64, seed);
    }
    // Sectors 4096 to 4103 are zeroed, 8192 to 8199 given up (which a loop device does by a hole: zeros too).
    for (kind, sector) in [(WRITE_ZEROES, 4096u64), (DISCARD, 8192)] {
        let mut segment = sector.to_le_bytes().to_vec();
        segment.extend(8u32.to_le_bytes());
        segment.extend(0u32.to_le_bytes());
        lane.put(lane.area + 4096, &segment);
        let (status, _) = lane.request(kind, 0, &Shape { out: &[16], ..Shape::default() });
        assert_eq!(status, OK, "request type {kind}");
    }
    // The device grows while it is served.
    image.resize(32 * MIB).map_err(|e| e.to_string())?;
    let grown = Command::new("losetup").arg("--set-capacity").arg(device.path()).status()?;
    assert!(grown.success());
    served.process.signal(Signal::SIGHUP).map_err(|e| e.to_string())?;
    let size = format!(" {} bytes", 32 * MIB);
    wait::until("the new size", LIMIT, || Ok(served.stats().contains(&size).then_some(())))
        .map_err(|e| e.to_string())?;
    lane.verified_io(40_000, 9);
    assert_eq!(served.errors("io") + served.errors("range"), 0);
    drop(front);
    served.terminate();
    drop(device);
    for (what, at, byte) in
        [("zeroed", 4096 * 512, 0), ("discarded", 8192 * 512, 0), ("untouched", 4104 * 512, 0x5a)]
    {
        let bytes = image.read(at, 4096).map_err(|e| e.to_string())?;
        assert!(bytes.iter().all(|&b| b == byte), "{what} bytes are not {byte:#x}");
    }
    Ok(Completion::Completed)
}
