//! ACPI tables, by which a Linux finds CPUs, virtio-mmio devices and serial ports (distributions' kernels do not take
//! `virtio_mmio.device=` from the command line). Hardware-reduced (ACPI 6.5, 4.1): there are no fixed registers.

use acpi_tables::aml::{Device, EISAName, IO, Interrupt, Memory32Fixed, Name, Path, ResourceTemplate, Scope};
use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::madt::{EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic};
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use acpi_tables::{Aml, aml};
use anyhow::{Result, ensure};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

/// Where the root pointer is: systems look for it here, if nobody tells them. The tables follow.
pub const RSDP: u64 = 0xe_0000;
const END: u64 = 0x10_0000;

const LOCAL_APIC: u32 = 0xfee0_0000;
const IO_APIC: u32 = 0xfec0_0000;
const OEM: [u8; 6] = *b"KICKLS";
const TABLE: [u8; 8] = *b"KICKLESS";
/// `CMOS RTC Not Present` of the boot flags (ACPI 6.5, 5.2.9.3).
const NO_RTC: u16 = 1 << 5;

/// A virtio-mmio device.
#[derive(Debug, Clone, Copy)]
pub struct Mmio {
    /// Where its registers are.
    pub base: u32,
    /// Bytes of them.
    pub size: u32,
    /// Its line of the I/O APIC, pulsed.
    pub line: u32,
}

/// A 16550.
#[derive(Debug, Clone, Copy)]
pub struct Uart {
    /// The first of its eight ports.
    pub port: u16,
    /// Its line of the I/O APIC, pulsed.
    pub line: u32,
}

/// Writes all tables.
pub fn write(memory: &GuestMemoryMmap, cpus: usize, mmio: &[Mmio], uarts: &[Uart]) -> Result<()> {
    let mut at = RSDP + Rsdp::len().next_multiple_of(16) as u64;
    let mut put = |table: &dyn Aml| {
        let mut bytes = Vec::new();
        table.to_aml_bytes(&mut bytes);
        let start = at;
        at += bytes.len().next_multiple_of(16) as u64;
        ensure!(at <= END, "the ACPI tables are too long");
        memory.write_slice(&bytes, GuestAddress(start))?;
        Ok(start)
    };
    let dsdt = put(&dsdt(mmio, uarts))?;
    let mut fadt = FADTBuilder::new(OEM, TABLE, 1).flag(Flags::HwReducedAcpi).dsdt_64(dsdt);
    fadt.iapc_boot_arch = NO_RTC.into();
    let fadt = put(&fadt.finalize())?;
    let mut madt = MADT::new(OEM, TABLE, 1, LocalInterruptController::Address(LOCAL_APIC));
    for cpu in 0..cpus as u8 {
        madt.add_structure(ProcessorLocalApic::new(cpu, cpu, EnabledStatus::Enabled));
    }
    madt.add_structure(IoApic::new(0, IO_APIC, 0));
    let madt = put(&madt)?;
    let mut xsdt = XSDT::new(OEM, TABLE, 1);
    xsdt.add_entry(fadt);
    xsdt.add_entry(madt);
    let xsdt = put(&xsdt)?;
    let mut bytes = Vec::new();
    Rsdp::new(OEM, xsdt).to_aml_bytes(&mut bytes);
    Ok(memory.write_slice(&bytes, GuestAddress(RSDP))?)
}

fn dsdt(mmio: &[Mmio], uarts: &[Uart]) -> Sdt {
    let mut table = Sdt::new(*b"DSDT", 36, 2, OEM, TABLE, 1);
    for (i, device) in mmio.iter().enumerate() {
        let registers = Memory32Fixed::new(true, device.base, device.size);
        // Lines are shared when there are more devices than lines.
        let interrupt = Interrupt::new(true, true, false, true, device.line);
        add_device(&mut table, &format!("VM{i:02}"), &"LNRO0005", i, vec![&registers, &interrupt]);
    }
    for (i, uart) in uarts.iter().enumerate() {
        let ports = IO::new(uart.port, uart.port, 1, 8);
        let interrupt = Interrupt::new(true, true, false, false, uart.line);
        let id = EISAName::new("PNP0501");
        add_device(&mut table, &format!("COM{i}"), &id, i, vec![&ports, &interrupt]);
    }
    table
}

fn add_device(table: &mut Sdt, name: &str, id: &dyn Aml, number: usize, resources: Vec<&dyn Aml>) {
    let path = |name: &str| Path::new(name);
    let id = Name::new(path("_HID"), id);
    let number = Name::new(path("_UID"), &(number as aml::DWord));
    let resources = Name::new(path("_CRS"), &ResourceTemplate::new(resources));
    let device = Device::new(path(name), vec![&id, &number, &resources]);
    let mut bytes = Vec::new();
    Scope::new(path("_SB_"), vec![&device]).to_aml_bytes(&mut bytes);
    table.append_slice(&bytes);
}
