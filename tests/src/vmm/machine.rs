//! The virtual machine: memory, devices, CPUs.

use std::fmt::Write as _;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use kickless_guest::{EVENT_PORT, event};
use kvm_bindings::{KVM_MAX_CPUID_ENTRIES, kvm_pit_config};
use kvm_ioctls::{Kvm, VmFd};
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryRegion};
use vm_superio::{Serial, Trigger};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::acpi;
use super::boot::{self, Image};
use super::device::{Device, DeviceSpec};
use super::lock;
use super::memory::{Backing, Memory};
use super::vcpu::{Bus, Ended, Vcpu};

/// First ports and lines of the serial ports: the console, and one for whoever wants to talk to the guest.
const SERIAL: [acpi::Uart; 2] = [acpi::Uart { port: 0x3f8, line: 4 }, acpi::Uart { port: 0x2f8, line: 3 }];
/// The keyboard controller, by which PCs are reset.
const RESET_PORT: u16 = 0x64;
/// Where Intel's processors want some pages of their own; below all that is used here.
const TSS_ADDRESS: usize = 0xfffb_d000;
const IDENTITY_MAP_ADDRESS: u64 = 0xfffb_c000;
/// How long a serial port whose guest does not take what is typed is left alone.
const SERIAL_PAUSE: Duration = Duration::from_millis(1);

/// What a machine is to be like.
#[derive(Debug, Clone)]
pub struct Config {
    /// Bytes of memory from address 0 on.
    pub memory: u64,
    /// What the memory is made of.
    pub backing: Backing,
    /// Number of CPUs.
    pub cpus: usize,
    /// Host CPUs for them, in turn; none to let the host choose.
    pub pin: Vec<usize>,
    /// The devices.
    pub devices: Vec<DeviceSpec>,
    /// What is booted. The devices are added to its command line.
    pub image: Image,
    /// Whether there is a timer, which bare-metal guests do not need.
    pub timer: bool,
}

/// A running machine. Dropping it is pulling the plug.
#[derive(Debug)]
pub struct Machine {
    // Before the memory it runs in.
    cpus: Vec<Vcpu>,
    board: Arc<Board>,
    started: Instant,
    /// Our end of the second serial port's socket, and the thread that types what comes out of it.
    cable: Option<(UnixStream, JoinHandle<()>)>,
}

/// What all CPUs share.
struct Board {
    devices: Vec<Arc<Device>>,
    serial: [Mutex<Uart>; 2],
    /// How often the guest was called, for one that waits.
    rung: Mutex<u64>,
    ring: Condvar,
    stopping: AtomicBool,
    first_request: OnceLock<Instant>,
    memory: Arc<Mutex<Memory>>,
    vm: Arc<VmFd>,
}

impl std::fmt::Debug for Board {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Board").field("devices", &self.devices).finish_non_exhaustive()
    }
}

type Uart = Serial<Line, vm_superio::serial::NoEvents, Cable>;

/// What is at the other end of a serial port: a socket, or until there is one, a place to keep what is written.
#[derive(Debug, Default)]
struct Cable {
    kept: Vec<u8>,
    socket: Option<UnixStream>,
}

impl Write for Cable {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        match &mut self.socket {
            Some(socket) => socket.write(bytes),
            None => self.kept.write(bytes),
        }
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// An interrupt line that is pulsed.
#[derive(Debug)]
struct Line(EventFd);

impl Trigger for Line {
    type E = std::io::Error;

    fn trigger(&self) -> std::io::Result<()> {
        self.0.write(1)
    }
}

impl Machine {
    /// Puts a machine together and starts it.
    pub fn start(config: &Config) -> Result<Machine> {
        let started = Instant::now();
        let kvm = Kvm::new().context("/dev/kvm")?;
        let vm = Arc::new(kvm.create_vm().context("KVM_CREATE_VM")?);
        vm.set_tss_address(TSS_ADDRESS).context("KVM_SET_TSS_ADDR")?;
        vm.set_identity_map_address(IDENTITY_MAP_ADDRESS).context("KVM_SET_IDENTITY_MAP_ADDR")?;
        vm.create_irq_chip().context("KVM_CREATE_IRQCHIP")?;
        if config.timer {
            vm.create_pit2(kvm_pit_config::default()).context("KVM_CREATE_PIT2")?;
        }
        let mut memory = Memory::default();
        memory.add(&vm, 0, config.memory, config.backing)?;
        let memory = Arc::new(Mutex::new(memory));
        let mut devices = Vec::new();
        for (i, spec) in config.devices.iter().enumerate() {
            devices.push(Arc::new(Device::new(&vm, i, spec, &memory)?));
        }
        let entry = boot::load(&image_for(config, &devices), lock(&memory).map())?;
        let mmio: Vec<acpi::Mmio> = devices.iter().map(|device| device.describe()).collect();
        acpi::write(lock(&memory).map(), config.cpus, &mmio, &SERIAL)?;
        let uart = |uart: acpi::Uart| {
            let line = EventFd::new(EFD_NONBLOCK)?;
            vm.register_irqfd(&line, uart.line).context("KVM_IRQFD")?;
            Ok::<_, anyhow::Error>(Mutex::new(Serial::new(Line(line), Cable::default())))
        };
        let board = Arc::new(Board {
            devices,
            serial: [uart(SERIAL[0])?, uart(SERIAL[1])?],
            rung: Mutex::new(0),
            ring: Condvar::new(),
            stopping: AtomicBool::new(false),
            first_request: OnceLock::new(),
            memory,
            vm: Arc::clone(&vm),
        });
        let cpuid = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).context("KVM_GET_SUPPORTED_CPUID")?;
        let mut machine = Machine { cpus: Vec::new(), board, started, cable: None };
        // The first CPU last: it starts the others.
        for index in (0..config.cpus).rev() {
            let pin = config.pin.get(index % config.pin.len().max(1)).copied();
            let bus = Arc::clone(&machine.board) as Arc<dyn Bus>;
            let cpu = Vcpu::start(&vm, index, &cpuid, (index == 0).then_some(entry), pin, bus)?;
            machine.cpus.insert(0, cpu);
        }
        Ok(machine)
    }

    /// Tells a guest that sleeps in [`event::IDLE`] that there is something to do.
    pub fn ring(&self) {
        *lock(&self.board.rung) += 1;
        self.board.ring.notify_all();
    }

    /// From the beginning of its being put together to the first request that the guest has seen complete.
    pub fn first_request(&self) -> Option<Duration> {
        Some(self.board.first_request.get()?.duration_since(self.started))
    }

    /// What the guest has written to its console.
    pub fn serial(&self) -> String {
        String::from_utf8_lossy(&lock(&self.board.serial[0]).writer().kept).into_owned()
    }

    /// The other end of the second serial port, to be asked for once. What the guest has written to it is there.
    pub fn talk(&mut self) -> Result<UnixStream> {
        ensure!(self.cable.is_none(), "somebody talks to the guest already");
        let (mut ours, theirs) = UnixStream::pair()?;
        {
            let mut uart = lock(&self.board.serial[1]);
            let cable = uart.writer_mut();
            ours.write_all(&std::mem::take(&mut cable.kept))?;
            cable.socket = Some(ours.try_clone()?);
        }
        let (mut from, board) = (ours.try_clone()?, Arc::clone(&self.board));
        let thread = std::thread::spawn(move || {
            let mut bytes = [0; 64];
            while let Ok(len @ 1..) = from.read(&mut bytes) {
                board.type_in(&bytes[..len]);
            }
        });
        self.cable = Some((ours, thread));
        Ok(theirs)
    }

    /// The file that holds the memory region at `start`, and its size.
    pub fn memory_file(&self, start: u64) -> Result<(std::fs::File, u64)> {
        let memory = lock(&self.board.memory);
        let region = memory.map().find_region(GuestAddress(start)).context("no such memory region")?;
        let file = region.file_offset().context("memory without a file")?.file().try_clone()?;
        Ok((file, region.len()))
    }

    /// Gives the guest, and every back end, another region of memory.
    pub fn add_memory(&self, start: u64, size: u64, backing: Backing) -> Result<()> {
        let region = lock(&self.board.memory).add(&self.board.vm, start, size, backing)?;
        self.board.devices.iter().try_for_each(|device| device.add_memory(&region))
    }

    /// Takes a region away again.
    pub fn remove_memory(&self, start: u64) -> Result<()> {
        let region = lock(&self.board.memory).describe(start)?;
        for device in &self.board.devices {
            device.remove_memory(&region)?;
        }
        lock(&self.board.memory).remove(&self.board.vm, start)
    }

    /// Connects device `index` to its back end again, once that listens, and goes on where the used rings say.
    pub fn reconnect(&self, index: usize) -> Result<()> {
        self.board.devices.get(index).context("no such device")?.reconnect()
    }

    /// What KVM counts, by CPU.
    pub fn stats(&self) -> Result<Vec<std::collections::BTreeMap<String, u64>>> {
        let stats = |cpu: &Vcpu| cpu.stats.as_ref().context("this kernel has no KVM_GET_STATS_FD")?.read();
        self.cpus.iter().map(stats).collect()
    }

    /// What has gone wrong, if anything has: a CPU that cannot go on, a back end that refuses.
    pub fn failure(&mut self) -> Option<String> {
        for (i, cpu) in self.cpus.iter_mut().enumerate() {
            if let Some(Ended::Failed(why)) = cpu.ended() {
                return Some(format!("CPU {i}: {why}"));
            }
        }
        self.board.devices.iter().find_map(|device| device.failure())
    }

    /// Whether the guest has powered off: one CPU does so for all.
    pub fn is_off(&mut self) -> bool {
        self.cpus.iter_mut().any(|cpu| matches!(cpu.ended(), Some(Ended::Stopped(_))))
    }

    /// Stops the CPUs; where each of them was.
    pub fn stop(&mut self) -> Vec<Ended> {
        self.board.stopping.store(true, Ordering::Release);
        self.ring();
        self.cpus.iter_mut().map(Vcpu::stop).collect()
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        // Back ends hear of it by their sockets being closed, as from a VMM that was killed.
        self.stop();
        self.cpus.clear();
        if let Some((socket, thread)) = self.cable.take() {
            let _ = socket.shutdown(Shutdown::Both);
            let _ = thread.join();
        }
    }
}

fn image_for(config: &Config, devices: &[Arc<Device>]) -> Image {
    let mut image = config.image.clone();
    for device in devices {
        let acpi::Mmio { base, size, line } = device.describe();
        let _ = write!(image.cmdline, " virtio_mmio.device={size:#x}@{base:#x}:{line}");
    }
    image
}

impl Board {
    /// Types at the second serial port, as fast as the guest takes it.
    fn type_in(&self, mut bytes: &[u8]) {
        while !bytes.is_empty() && !self.stopping.load(Ordering::Acquire) {
            let mut uart = lock(&self.serial[1]);
            let room = uart.fifo_capacity().min(bytes.len());
            let typed = uart.enqueue_raw_bytes(&bytes[..room]).unwrap_or(0);
            drop(uart);
            bytes = &bytes[typed..];
            if typed == 0 {
                std::thread::sleep(SERIAL_PAUSE);
            }
        }
    }

    fn uart(&self, port: u16) -> Option<(MutexGuard<'_, Uart>, u8)> {
        let at = |uart: &acpi::Uart| (uart.port..uart.port + 8).contains(&port);
        let index = SERIAL.iter().position(at)?;
        Some((lock(&self.serial[index]), (port - SERIAL[index].port) as u8))
    }

    fn device(&self, address: u64) -> Option<(&Arc<Device>, u64)> {
        let (index, offset) = Device::at(address)?;
        Some((self.devices.get(index)?, offset))
    }

    /// Sleeps until somebody has rung since the last time.
    fn idle(&self, seen: &mut u64) {
        let mut rung = lock(&self.rung);
        while *rung == *seen && !self.stopping.load(Ordering::Acquire) {
            rung = self.ring.wait(rung).unwrap_or_else(PoisonError::into_inner);
        }
        *seen = *rung;
    }
}

thread_local! {
    /// How often this CPU has been called so far.
    static SEEN: std::cell::Cell<u64> = const { std::cell::Cell::new(0) };
}

impl Bus for Board {
    fn port_read(&self, port: u16, data: &mut [u8]) {
        // The keyboard controller is always ready.
        data.fill(if port == RESET_PORT { 0 } else { 0xff });
        if let (Some((mut uart, register)), [byte]) = (self.uart(port), data) {
            *byte = uart.read(register);
        }
    }

    fn port_write(&self, _cpu: usize, port: u16, data: &[u8]) -> bool {
        match (port, data) {
            (EVENT_PORT, &[a, b, c, d]) => match u32::from_le_bytes([a, b, c, d]) {
                event::FIRST_REQUEST => {
                    let _ = self.first_request.set(Instant::now());
                }
                event::IDLE | event::FAILED => {
                    let mut seen = SEEN.get();
                    self.idle(&mut seen);
                    SEEN.set(seen);
                }
                _ => {}
            },
            (RESET_PORT, &[0xfe]) => return false,
            (_, &[byte]) => {
                if let Some((mut uart, register)) = self.uart(port) {
                    let _ = uart.write(register, byte);
                }
            }
            _ => {}
        }
        true
    }

    fn mmio_read(&self, address: u64, data: &mut [u8]) {
        data.fill(0);
        if let Some((device, offset)) = self.device(address) {
            device.read(offset, data);
        }
    }

    fn mmio_write(&self, address: u64, data: &[u8]) {
        if let Some((device, offset)) = self.device(address) {
            device.write(offset, data);
        }
    }

    fn ended(&self) {
        // Whoever waits for the guest's words has waited long enough.
        if let Some(socket) = &lock(&self.serial[1]).writer().socket {
            let _ = socket.shutdown(Shutdown::Both);
        }
    }
}
