//! How a guest is loaded, and where its first CPU begins: the PVH entry of an ELF file (which Linux has as well), or
//! the 64-bit entry of a bzImage.

use std::fs::File;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use kvm_bindings::{kvm_regs, kvm_segment, kvm_sregs};
use linux_loader::cmdline::Cmdline;
use linux_loader::configurator::linux::LinuxBootConfigurator;
use linux_loader::configurator::pvh::PvhBootConfigurator;
use linux_loader::configurator::{BootConfigurator, BootParams};
use linux_loader::loader::bootparam::{boot_e820_entry, boot_params};
use linux_loader::loader::bzimage::BzImage;
use linux_loader::loader::elf::{Elf, PvhBootCapability};
use linux_loader::loader::start_info::{hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info};
use linux_loader::loader::{KernelLoader, load_cmdline};
use vm_memory::{
    Address, Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, ReadVolatile,
};

use super::acpi;

/// Where what the loader leaves for the guest lies, all below 640 KiB.
const GDT: u64 = 0x500;
const START_INFO: u64 = 0x6000;
const ZERO_PAGE: u64 = 0x7000;
// The page at 0x8000 is the guest's, for starting its other CPUs.
const PML4: u64 = 0x9000;
const PDPT: u64 = 0xa000;
const PAGE_DIRECTORIES: u64 = 0xb000;
const MODULES: u64 = 0x1_0000;
const MEMORY_MAP: u64 = 0x1_1000;
const CMDLINE: u64 = 0x2_0000;
const CMDLINE_SIZE: usize = 0x1000;
/// End of conventional memory, and where memory goes on.
const LOW_END: u64 = 0x9_fc00;
const HIGH_START: u64 = 0x10_0000;

/// `XEN_HVM_START_MAGIC_VALUE`.
const START_MAGIC: u32 = 0x336e_c578;
const E820_RAM: u32 = 1;
const E820_RESERVED: u32 = 2;

/// What is booted.
#[derive(Debug, Clone)]
pub struct Image {
    /// An ELF file with a PVH entry, or a bzImage.
    pub kernel: PathBuf,
    /// The initial file system, for kernels that want one.
    pub initramfs: Option<PathBuf>,
    /// The command line.
    pub cmdline: String,
}

/// Where the first CPU begins.
#[derive(Debug, Clone, Copy)]
pub enum Entry {
    /// Protected mode without paging, `ebx` pointing to the start information.
    Pvh(u64),
    /// Long mode, `rsi` pointing to the zero page.
    Linux64(u64),
}

/// Loads the image into memory, a plain run of which begins at 0.
pub fn load(image: &Image, memory: &GuestMemoryMmap) -> Result<Entry> {
    let mut cmdline = Cmdline::new(CMDLINE_SIZE)?;
    cmdline.insert_str(&image.cmdline).context("the command line is too long")?;
    load_cmdline(memory, GuestAddress(CMDLINE), &cmdline)?;
    let initramfs = image.initramfs.as_ref().map(|path| load_initramfs(path, memory)).transpose()?;
    let mut kernel = File::open(&image.kernel).with_context(|| image.kernel.display().to_string())?;
    if let Ok(loaded) = Elf::load(memory, None, &mut kernel, Some(GuestAddress(HIGH_START))) {
        let PvhBootCapability::PvhEntryPresent(entry) = loaded.pvh_boot_cap else {
            bail!("{} has no PVH entry", image.kernel.display());
        };
        write_start_info(memory, initramfs)?;
        return Ok(Entry::Pvh(entry.raw_value()));
    }
    let loaded = BzImage::load(memory, None, &mut kernel, Some(GuestAddress(HIGH_START)))
        .with_context(|| format!("{} is neither ELF nor bzImage", image.kernel.display()))?;
    let mut zero_page = boot_params { hdr: loaded.setup_header.unwrap_or_default(), ..Default::default() };
    write_zero_page(&mut zero_page, memory, initramfs)?;
    write_page_tables(memory)?;
    // The 64-bit entry is 0x200 after the start (Documentation/arch/x86/boot.rst).
    Ok(Entry::Linux64(loaded.kernel_load.raw_value() + 0x200))
}

/// Runs of memory as firmware would report them.
fn memory_map(memory: &GuestMemoryMmap) -> Vec<(u64, u64, u32)> {
    let mut map = vec![(0, LOW_END, E820_RAM), (LOW_END, HIGH_START - LOW_END, E820_RESERVED)];
    for region in memory.iter() {
        let start = region.start_addr().raw_value().max(HIGH_START);
        let end = region.start_addr().raw_value() + region.len();
        if end > start {
            map.push((start, end - start, E820_RAM));
        }
    }
    map
}

/// Puts the file at the end of the first region.
fn load_initramfs(path: &Path, memory: &GuestMemoryMmap) -> Result<(u64, u64)> {
    let mut file = File::open(path).with_context(|| path.display().to_string())?;
    let size = file.metadata()?.len();
    let end = memory.iter().next().context("no memory")?.len();
    let start = end.checked_sub(size).context("the initramfs does not fit into memory")? & !0xfff;
    let mut slice = memory.get_slice(GuestAddress(start), size as usize)?;
    file.read_exact_volatile(&mut slice)?;
    Ok((start, size))
}

fn write_start_info(memory: &GuestMemoryMmap, initramfs: Option<(u64, u64)>) -> Result<()> {
    let map: Vec<hvm_memmap_table_entry> = memory_map(memory)
        .into_iter()
        .map(|(addr, size, type_)| hvm_memmap_table_entry { addr, size, type_, reserved: 0 })
        .collect();
    let modules: Vec<hvm_modlist_entry> = initramfs
        .map(|(paddr, size)| hvm_modlist_entry { paddr, size, ..Default::default() })
        .into_iter()
        .collect();
    let info = hvm_start_info {
        magic: START_MAGIC,
        version: 1,
        cmdline_paddr: CMDLINE,
        memmap_paddr: MEMORY_MAP,
        memmap_entries: map.len() as u32,
        nr_modules: modules.len() as u32,
        modlist_paddr: if modules.is_empty() { 0 } else { MODULES },
        rsdp_paddr: acpi::RSDP,
        ..Default::default()
    };
    let mut params = BootParams::new(&info, GuestAddress(START_INFO));
    params.set_sections(&map, GuestAddress(MEMORY_MAP));
    if !modules.is_empty() {
        params.set_modules(&modules, GuestAddress(MODULES));
    }
    Ok(PvhBootConfigurator::write_bootparams(&params, memory)?)
}

fn write_zero_page(
    zero_page: &mut boot_params,
    memory: &GuestMemoryMmap,
    initramfs: Option<(u64, u64)>,
) -> Result<()> {
    zero_page.hdr.type_of_loader = 0xff;
    zero_page.acpi_rsdp_addr = acpi::RSDP;
    zero_page.hdr.cmd_line_ptr = CMDLINE as u32;
    zero_page.hdr.cmdline_size = CMDLINE_SIZE as u32;
    if let Some((start, size)) = initramfs {
        zero_page.hdr.ramdisk_image = start as u32;
        zero_page.hdr.ramdisk_size = size as u32;
    }
    let map = memory_map(memory);
    for (entry, &(addr, size, r#type)) in zero_page.e820_table.iter_mut().zip(&map) {
        *entry = boot_e820_entry { addr, size, r#type };
    }
    zero_page.e820_entries = map.len() as u8;
    let params = BootParams::new(zero_page, GuestAddress(ZERO_PAGE));
    Ok(LinuxBootConfigurator::write_bootparams(&params, memory)?)
}

/// Maps the first 4 GiB one to one.
pub fn write_page_tables(memory: &GuestMemoryMmap) -> Result<()> {
    memory.write_obj(PDPT | 3, GuestAddress(PML4))?;
    for gib in 0..4_u64 {
        let directory = PAGE_DIRECTORIES + gib * 0x1000;
        memory.write_obj(directory | 3, GuestAddress(PDPT + gib * 8))?;
        for page in 0..512 {
            memory.write_obj(gib << 30 | page << 21 | 0x83, GuestAddress(directory + page * 8))?;
        }
    }
    let gdt = [0_u64, 0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff];
    for (i, entry) in gdt.into_iter().enumerate() {
        memory.write_obj(entry, GuestAddress(GDT + 8 * i as u64))?;
    }
    Ok(())
}

/// Sets registers for the entry.
pub fn set_registers(entry: Entry, regs: &mut kvm_regs, sregs: &mut kvm_sregs) {
    let segment = |selector: u16, code: bool, long: bool| kvm_segment {
        base: 0,
        limit: 0xffff_ffff,
        selector,
        type_: if code { 11 } else { 3 },
        present: 1,
        s: 1,
        db: u8::from(!long),
        l: u8::from(long),
        g: 1,
        ..Default::default()
    };
    let long = matches!(entry, Entry::Linux64(_));
    sregs.cs = segment(0x10, true, long);
    let data = segment(0x18, false, false);
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.tr = kvm_segment { limit: 0x67, type_: 11, present: 1, ..Default::default() };
    regs.rflags = 2;
    sregs.cr0 = 0x11; // ET, PE
    sregs.cr4 = 0;
    match entry {
        Entry::Pvh(rip) => {
            regs.rip = rip;
            regs.rbx = START_INFO;
        }
        Entry::Linux64(rip) => {
            regs.rip = rip;
            regs.rsi = ZERO_PAGE;
            sregs.gdt.base = GDT;
            sregs.gdt.limit = 31;
            sregs.cr3 = PML4;
            sregs.cr4 = 0x20; // PAE
            sregs.cr0 = 0x8000_0011; // PG
            sregs.efer = 0x500; // LMA, LME
        }
    }
}
