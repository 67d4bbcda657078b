//! A virtual machine without an operating system: it finds its virtio devices, and does with them what the harness
//! orders. See `boot.S` for what runs in kernel mode (next to nothing).
#![cfg(not(test))] // `cargo clippy --all-targets` would have std and its panic handler here as well
#![no_std]
#![no_main]
#![allow(unsafe_code)] // there is nobody below that could be asked

extern crate alloc;

mod arena;
mod block;
mod cmdline;
mod cpu;
mod devices;
mod fail;
mod heap;
mod libc;
mod load;
mod mailbox;
mod misbehave;
mod net;
mod selftest;
mod transport;

use kickless_guest::{Report, failure, kind};

use crate::devices::Devices;
use crate::mailbox::Inbox;

/// Where boot.S leaves a CPU, in ring 3.
#[unsafe(no_mangle)]
extern "C" fn ring3(cpu: usize, start_info: usize) -> ! {
    if cpu != 0 {
        cpu::init_local();
        load::serve(cpu)
    }
    heap::init();
    let line = cmdline::of(start_info);
    // Early, so that whatever goes wrong from now on is reported.
    let inbox = cmdline::value(line, "kickless.mailbox=").and_then(|at| Inbox::open(at as usize));
    cpu::init();
    let wanted = cmdline::value(line, "kickless.cpus=").unwrap_or(1) as usize;
    let cpus = cpu::start_others(wanted.clamp(1, kickless_guest::MAX_CPUS));
    let mut devices = Devices::probe(cmdline::devices(line));
    let Some(inbox) = inbox else { selftest::run(&mut devices, line, cpus) };
    devices.show(&inbox);
    inbox.up(cpus as u32);
    loop {
        let (number, order) = inbox.wait();
        let mut report = empty_report();
        let start = cpu::ticks();
        let taken = || (0..cpus).map(|cpu| cpu::Counters::of(cpu).devices()).sum::<u64>();
        let before = taken();
        let result = match order.kind {
            kind::ATTACH => devices.attach(&order, cpus),
            kind::RESET => devices.reset(&order),
            kind::BLOCK | kind::ECHO | kind::EXCHANGE => load::run(&mut devices, &order, cpus, &mut report),
            kind::MISBEHAVE => devices.misbehave(&order, cpus),
            kind::AWAIT_CONFIG => devices.await_config(&order, cpus),
            kind::FAULT => {
                cpu::mmio_write(0x1_0000_0000, 0);
                Ok(())
            }
            kind::HANG => loop {
                core::hint::spin_loop();
            },
            _ => Err(failure::ORDER),
        };
        report.failure = result.err().unwrap_or(failure::NONE);
        report.ticks = cpu::ticks() - start;
        report.interrupts = taken() - before;
        devices.show(&inbox);
        inbox.answer(number, &report);
    }
}

/// Nothing done yet.
fn empty_report() -> Report {
    Report {
        failure: failure::NONE,
        lanes: 0,
        ticks: 0,
        interrupts: 0,
        sleeps: 0,
        lane: [kickless_guest::LaneReport::default(); kickless_guest::MAX_LANES],
    }
}
