//! A virtio-mmio device: its registers, its back end, and the wires between them and KVM.

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use anyhow::{Context, Result};
use kvm_ioctls::{IoEventAddress, VmFd};
use vhost::VhostUserMemoryRegionInfo;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use poll_engine::device::features::RING_PACKED;
use poll_engine::ring::RingFormat;

use super::acpi;
use super::backend::{Backend, Kind, QueueSetup};
use super::lock;
use super::memory::Memory;
use super::mmio::{self, Effect, INT_CONFIG, NEEDS_RESET, Registers};

/// Where devices are, one after the other.
const MMIO_BASE: u64 = 0xd000_0000;
/// Lines of the I/O APIC that devices have, more than one a line when there are many.
const FIRST_LINE: u32 = 5;
const LINES: u32 = 19;

/// A device of the machine.
#[derive(Debug, Clone)]
pub struct DeviceSpec {
    /// What it is.
    pub kind: Kind,
    /// Where its back end listens.
    pub socket: PathBuf,
    /// Queues, at most.
    pub queues: usize,
    /// Descriptors a ring may have.
    pub ring_size: u16,
    /// Features of the back end that are passed on.
    pub features: u64,
}

/// A device in its place.
#[derive(Debug)]
pub struct Device {
    base: u64,
    line: u32,
    state: Mutex<State>,
    /// The back end has announced another configuration.
    changed: Arc<AtomicBool>,
    memory: Arc<Mutex<Memory>>,
}

#[derive(Debug)]
struct State {
    registers: Registers,
    backend: Backend,
    /// Indices of the queues that run.
    running: Vec<usize>,
    /// What went wrong last.
    failure: Option<String>,
}

impl Device {
    /// Connects device `index` to its back end and wires it up.
    pub fn new(vm: &VmFd, index: usize, spec: &DeviceSpec, memory: &Arc<Mutex<Memory>>) -> Result<Device> {
        let base = MMIO_BASE + index as u64 * mmio::SIZE;
        let line = FIRST_LINE + index as u32 % LINES;
        let config_line = EventFd::new(EFD_NONBLOCK)?;
        vm.register_irqfd(&config_line, line).context("KVM_IRQFD")?;
        let changed = Arc::new(AtomicBool::new(false));
        let announce = {
            let changed = Arc::clone(&changed);
            Arc::new(move || {
                changed.store(true, Ordering::Release);
                let _ = config_line.write(1);
            })
        };
        let regions = lock(memory).describe_all();
        let backend = Backend::connect(spec.kind, &spec.socket, spec.queues, &regions, announce)?;
        for (queue, wires) in backend.wires().iter().enumerate() {
            let notify = IoEventAddress::Mmio(Self::doorbell(index));
            vm.register_ioevent(&wires.kick, &notify, queue as u32).context("KVM_IOEVENTFD")?;
            vm.register_irqfd(&wires.call, line).context("KVM_IRQFD")?;
        }
        let registers = Registers::new(
            backend.kind().id(),
            backend.features() & spec.features,
            backend.wires().len(),
            spec.ring_size,
        );
        let state = State { registers, backend, running: Vec::new(), failure: None };
        Ok(Device { base, line, state: Mutex::new(state), changed, memory: Arc::clone(memory) })
    }

    /// What is said of it in tables.
    pub fn describe(&self) -> acpi::Mmio {
        acpi::Mmio { base: self.base as u32, size: mmio::SIZE as u32, line: self.line }
    }

    /// The address at which device `index` is notified.
    pub fn doorbell(index: usize) -> u64 {
        MMIO_BASE + index as u64 * mmio::SIZE + mmio::QUEUE_NOTIFY
    }

    /// Which device is at an address, by its index, and what of it.
    pub fn at(address: u64) -> Option<(usize, u64)> {
        let offset = address.checked_sub(MMIO_BASE)?;
        Some(((offset / mmio::SIZE) as usize, offset % mmio::SIZE))
    }

    /// What went wrong last, if anything did.
    pub fn failure(&self) -> Option<String> {
        lock(&self.state).failure.clone()
    }

    /// Shares another region of memory with the back end.
    pub fn add_memory(&self, region: &VhostUserMemoryRegionInfo) -> Result<()> {
        lock(&self.state).backend.add_memory(region)
    }

    /// Has the back end let go of a region.
    pub fn remove_memory(&self, region: &VhostUserMemoryRegionInfo) -> Result<()> {
        lock(&self.state).backend.remove_memory(region)
    }

    /// Takes a change of the configuration in, if one was announced.
    fn refresh(&self, state: &mut State) {
        if self.changed.swap(false, Ordering::AcqRel) {
            state.registers.interrupts |= INT_CONFIG;
            state.registers.generation = state.registers.generation.wrapping_add(1);
            let read = state.backend.read_config();
            state.note(read);
        }
    }

    /// Reads a register.
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        let mut state = lock(&self.state);
        self.refresh(&mut state);
        state.registers.read(offset, state.backend.config(), data);
    }

    /// Writes a register, and does what follows.
    pub fn write(&self, offset: u64, data: &[u8]) {
        let mut state = lock(&self.state);
        let result = match state.registers.write(offset, data) {
            Effect::None => Ok(()),
            Effect::Start => {
                let queues: Vec<usize> =
                    (0..state.registers.queues.len()).filter(|&i| state.registers.queues[i].ready).collect();
                self.start_anew(&mut state, &queues)
            }
            Effect::ResetQueue(index) => {
                state.running.retain(|&i| i != index);
                state.backend.stop(index).map(|_| ())
            }
            Effect::StartQueue(index) => self.start_anew(&mut state, &[index]),
            Effect::Reset => {
                state.stop_queues();
                state.backend.forget();
                Ok(())
            }
            Effect::Notify(queue) => match state.backend.wires().get(queue as usize) {
                Some(wires) => wires.kick.write(1).context("kick"),
                None => Ok(()),
            },
            Effect::WriteConfig(offset, bytes) => state.backend.write_config(offset, &bytes),
        };
        state.note(result);
    }

    /// Starts queues from the beginning of their rings.
    fn start_anew(&self, state: &mut State, queues: &[usize]) -> Result<()> {
        // The lower half of a base is all that the `vhost` crate passes on, and enough where nothing is in flight.
        let packed = state.registers.features() & RING_PACKED != 0;
        let base = if packed { RingFormat::Packed } else { RingFormat::Split }.initial_base() as u16;
        self.start_queues(state, queues, |_, _| Ok(base))
    }

    /// Starts queues: the first of a device, or one that was reset beside others that run.
    fn start_queues(
        &self,
        state: &mut State,
        queues: &[usize],
        base: impl Fn(&QueueSetup, &Memory) -> Result<u16>,
    ) -> Result<()> {
        let memory = lock(&self.memory);
        let mut setups = Vec::new();
        for &index in queues {
            let setup = state.registers.queues[index].setup;
            setups.push((index, setup, base(&setup, &memory)?));
        }
        let host = |address: u64| {
            let host = memory.map().get_host_address(GuestAddress(address));
            Ok(host.with_context(|| format!("a ring at {address:#x}"))? as u64)
        };
        if state.running.is_empty() {
            let largest = setups.iter().map(|(_, setup, _)| setup.size).max().unwrap_or_default();
            state.backend.begin(state.registers.features(), largest)?;
        }
        state.backend.start(&setups, host)?;
        state.running.extend(queues);
        Ok(())
    }

    /// Begins another session with a back end that was started again, and goes on where the used rings say.
    pub fn reconnect(&self) -> Result<()> {
        let mut state = lock(&self.state);
        let regions = lock(&self.memory).describe_all();
        state.backend.reconnect(&regions)?;
        state.failure = None;
        let queues = std::mem::take(&mut state.running);
        // What is in flight is served again, from where the used ring ends (vhost-user, "Reconnecting").
        self.start_queues(&mut state, &queues, |setup, memory| {
            Ok(memory.map().read_obj::<u16>(GuestAddress(setup.device + 2))?)
        })?;
        for &index in &queues {
            state.backend.wires()[index].kick.write(1)?;
            // The one that was lost with the old process, perhaps, if the new one does not know.
            if !state.backend.records() {
                state.backend.wires()[index].call.write(1)?;
            }
        }
        Ok(())
    }
}

impl State {
    fn stop_queues(&mut self) {
        for index in std::mem::take(&mut self.running) {
            // A back end that has gone has stopped.
            let _ = self.backend.stop(index);
        }
    }

    fn note(&mut self, result: Result<()>) {
        if let Err(error) = result {
            self.registers.status |= NEEDS_RESET;
            self.failure = Some(format!("{error:#}"));
        }
    }
}
