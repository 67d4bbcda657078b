//! The processor as ring 3 sees it: ports, interrupts, the APICs, and the other CPUs.

use core::arch::{asm, global_asm};
use core::hint::spin_loop;
use core::ptr::{self, NonNull};
use core::sync::atomic::{AtomicU32, Ordering};

use kickless_guest::Fault;

global_asm!(include_str!("boot.S"), options(att_syntax));

/// Pins of the I/O APIC.
pub const LINES: u32 = 24;
/// The line that CPUs wake each other with.
const IPI_LINE: u32 = LINES;
/// Vector of line 0.
const FIRST_VECTOR: u32 = 0x40;
/// `#BP`.
const WAIT_VECTOR: usize = 3;
const SPURIOUS_VECTOR: u32 = 0xff;

const LAPIC: usize = 0xfee0_0000;
const LAPIC_ID: usize = 0x20;
const LAPIC_SPURIOUS: usize = 0xf0;
const LAPIC_ICR_LOW: usize = 0x300;
const LAPIC_ICR_HIGH: usize = 0x310;
const LAPIC_LINT0: usize = 0x350;
const LAPIC_MASKED: u32 = 1 << 16;
const IOAPIC: usize = 0xfec0_0000;
/// Page that a start-up interrupt sends a CPU to; as in boot.S.
const TRAMPOLINE: usize = 0x8000;
/// Bytes of a `line_entry` and a `fault_entry` of boot.S.
const LINE_ENTRY: usize = 64;
const FAULT_ENTRY: usize = 16;
/// Bytes of the stack for interrupts, whose base has the counters; as in boot.S.
const KSTACK: usize = 4096;

unsafe extern "C" {
    static line_entries: u8;
    static wait_entry: u8;
    static spurious_entry: u8;
    static fault_entries: u8;
    static ap_start: u8;
    static ap_end: u8;
    static ap_count: AtomicU32;
    static kstacks: u8;
    static mut idt: [[u64; 2]; 256];
}

/// Reads a device register.
pub fn mmio_read(at: usize) -> u32 {
    // SAFETY: all of the address space below 4 GiB is mapped; callers name device registers.
    unsafe { ptr::with_exposed_provenance::<u32>(at).read_volatile() }
}

/// Writes a device register.
pub fn mmio_write(at: usize, value: u32) {
    // SAFETY: as above.
    unsafe { ptr::with_exposed_provenance_mut::<u32>(at).write_volatile(value) };
}

/// Writes four bytes to a port.
pub fn port_write(port: u16, value: u32) {
    // SAFETY: ring 3 has I/O privilege; no port that is written to here touches memory.
    unsafe { asm!("out dx, eax", in("dx") port, in("eax") value, options(nomem, nostack, preserves_flags)) };
}

/// Writes a byte to a port.
pub fn port_write_byte(port: u16, value: u8) {
    // SAFETY: as above.
    unsafe { asm!("out dx, al", in("dx") port, in("al") value, options(nomem, nostack, preserves_flags)) };
}

/// The time-stamp counter.
#[inline]
pub fn ticks() -> u64 {
    // SAFETY: reads a counter.
    unsafe { core::arch::x86_64::_rdtsc() }
}

/// The interrupt counters of a CPU.
#[derive(Clone, Copy)]
pub struct Counters(NonNull<AtomicU32>);

impl Counters {
    /// Those of CPU `cpu`.
    pub fn of(cpu: usize) -> Counters {
        // SAFETY: every CPU has a page of kstacks, whose first 128 bytes are counters and nothing else.
        unsafe { Counters(NonNull::from(&kstacks).add(cpu * KSTACK).cast()) }
    }

    fn at(self, index: u32) -> u32 {
        // SAFETY: index is at most 1 + IPI_LINE. The CPU's interrupt handlers write meanwhile, four bytes at once.
        unsafe { self.0.add(index as usize).as_ref() }.load(Ordering::Relaxed)
    }

    /// Interrupts of all lines.
    pub fn total(self) -> u32 {
        self.at(0)
    }

    /// Interrupts of one line.
    pub fn line(self, line: u32) -> u32 {
        self.at(1 + line.min(IPI_LINE))
    }

    /// Interrupts of devices.
    pub fn devices(self) -> u64 {
        (0..LINES).map(|line| u64::from(self.line(line))).sum()
    }
}

/// Sleeps until an interrupt comes, unless one has come since `total` was read on this CPU.
pub fn sleep(total: u32) {
    // SAFETY: the gate preserves all registers and returns here.
    unsafe { asm!("int3", in("edi") total) };
}

/// Fills the interrupt table and turns the local APIC on. Once, on the first CPU.
pub fn init() {
    let gate = |vector: usize, entry: u64, dpl: u64| {
        let low =
            (entry & 0xffff) | (0x08 << 16) | ((0x8e00 | (dpl << 13)) << 32) | ((entry >> 16 & 0xffff) << 48);
        // SAFETY: vector is below 256; nobody else writes the table.
        unsafe { (&raw mut idt).cast::<[u64; 2]>().add(vector).write_volatile([low, entry >> 32]) };
    };
    let address = |symbol: *const u8| symbol.addr() as u64;
    for vector in 0..32 {
        gate(vector, address(&raw const fault_entries) + (vector * FAULT_ENTRY) as u64, 0);
    }
    for line in 0..=IPI_LINE as usize {
        gate(FIRST_VECTOR as usize + line, address(&raw const line_entries) + (line * LINE_ENTRY) as u64, 0);
    }
    gate(WAIT_VECTOR, address(&raw const wait_entry), 3);
    gate(SPURIOUS_VECTOR as usize, address(&raw const spurious_entry), 0);
    init_local();
}

/// Turns the APIC of this CPU on.
pub fn init_local() {
    mmio_write(LAPIC + LAPIC_LINT0, LAPIC_MASKED);
    mmio_write(LAPIC + LAPIC_SPURIOUS, 0x100 | SPURIOUS_VECTOR);
}

/// Has a line of the I/O APIC interrupt one CPU, or all of them.
pub fn route(line: u32, cpu: Option<u32>) {
    let write = |register: u32, value: u32| {
        mmio_write(IOAPIC, register);
        mmio_write(IOAPIC + 0x10, value);
    };
    write(0x11 + 2 * line, cpu.unwrap_or(0xff) << 24);
    write(0x10 + 2 * line, FIRST_VECTOR + line); // fixed, physical, edge, active high
}

/// Starts the other CPUs, one after the other; how many run in the end.
pub fn start_others(count: usize) -> usize {
    let (from, end) = (&raw const ap_start, &raw const ap_end);
    // SAFETY: the page at TRAMPOLINE is free memory; start and end are of one piece of code.
    unsafe {
        ptr::copy_nonoverlapping(
            from,
            ptr::with_exposed_provenance_mut(TRAMPOLINE),
            end.addr() - from.addr(),
        );
    }
    for apic_id in 1..count as u32 {
        let send = |command: u32| {
            mmio_write(LAPIC + LAPIC_ICR_HIGH, apic_id << 24);
            mmio_write(LAPIC + LAPIC_ICR_LOW, command);
        };
        send(0x4500); // INIT
        send(0x4600 | (TRAMPOLINE >> 12) as u32); // SIPI
        // SAFETY: an aligned word that CPUs count themselves in with.
        while unsafe { &ap_count }.load(Ordering::Acquire) < apic_id {
            spin_loop();
        }
    }
    count
}

/// Wakes the other CPUs.
pub fn wake_others() {
    mmio_write(LAPIC + LAPIC_ICR_LOW, 0x000c_0000 | (FIRST_VECTOR + IPI_LINE)); // all but this one
}

/// Number of this CPU as its APIC says.
pub fn apic_id() -> u32 {
    mmio_read(LAPIC + LAPIC_ID) >> 24
}

/// Where boot.S comes back to after an exception, on a stack of its own.
#[unsafe(no_mangle)]
extern "C" fn report_fault(frame: &Fault) -> ! {
    crate::fail::fault(frame)
}
