//! Without a harness, in somebody else's VMM: says what is there on the serial port and, with `kickless.selftest` on
//! the command line, writes and reads back the beginning of every disk.

use core::fmt::Write;

use kickless_guest::{EVENT_PORT, Order, event, kind, op, verify, wait};

use crate::cpu;
use crate::devices::{BLOCK, Devices};
use crate::fail::Serial;
use crate::load;

/// Memory for rings and buffers, beyond the program; the machine needs 32 MiB.
const RINGS: u64 = 16 << 20;
const BUFFERS: u64 = 20 << 20;
const SIZE: u64 = 4 << 20;
const BLOCKS: u64 = 256;
/// `VHOST_F_LOG_ALL`, which is vhost's own: QEMU offers it to drivers of a vhost-vdpa-device (seen in 10.0).
const VHOST_LOG_ALL: u64 = 1 << 26;

/// Does it, and stops.
pub fn run(devices: &mut Devices, line: &str, cpus: usize) -> ! {
    let _ = writeln!(Serial, "guest: {cpus} CPUs, {} devices, nobody to take orders from", devices.len());
    let wanted = line.split_ascii_whitespace().any(|word| word == "kickless.selftest");
    for index in 0..devices.len() {
        if !wanted || devices.get(index).info.id != BLOCK {
            continue;
        }
        let result = test(devices, index, cpus);
        let verdict =
            if result.is_ok_and(|(errors, mismatches)| errors + mismatches == 0) { "ok" } else { "FAILED" };
        let _ = writeln!(Serial, "guest: disk {index}: {verdict}: {result:?} (errors and mismatches)");
    }
    let _ = writeln!(Serial, "guest: done");
    loop {
        cpu::port_write(EVENT_PORT, event::IDLE);
        cpu::sleep(cpu::Counters::of(0).total());
    }
}

fn test(devices: &mut Devices, index: usize, cpus: usize) -> Result<(u64, u64), u32> {
    let attach = Order {
        kind: kind::ATTACH,
        devices: 1 << index,
        arena: RINGS,
        arena_size: SIZE,
        features: !VHOST_LOG_ALL,
        queues: 1,
        ring_size: 128,
        ..Order::default()
    };
    devices.attach(&attach, cpus)?;
    let pass = |op| Order {
        kind: kind::BLOCK,
        arena: BUFFERS,
        block_size: 4096,
        op,
        depth: 16,
        wait: wait::SLEEP,
        verify: verify::STAMPS,
        indirect: 1,
        requests: BLOCKS,
        span: BLOCKS * 4096,
        seed: 1,
        ..attach
    };
    let mut report = crate::empty_report();
    let mut bad = (0, 0);
    for op in [op::WRITE, op::READ] {
        load::run(devices, &pass(op), cpus, &mut report)?;
        let lane = &report.lane[0];
        let _ = writeln!(Serial, "guest: disk {index}: {} written, {} read", lane.writes, lane.reads);
        bad = (bad.0 + lane.errors, bad.1 + lane.mismatches);
    }
    devices.reset(&attach)?;
    Ok(bad)
}
