//! A CPU: a thread in `KVM_RUN`, and what it does when the guest comes out.
#![allow(unsafe_code)] // a signal handler that does nothing

use std::os::unix::thread::JoinHandleExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::sync::{Arc, Once};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result};
use kvm_bindings::{CpuId, kvm_regs, kvm_sregs};
use kvm_ioctls::{Cap, VcpuExit, VcpuFd, VmFd};
use nix::sched::{CpuSet, sched_setaffinity};
use nix::sys::pthread::pthread_kill;
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};
use nix::unistd::Pid;

use super::boot::{self, Entry};
use super::stats::CpuStats;

/// Gets a thread out of `KVM_RUN`.
const KICK: Signal = Signal::SIGUSR2;

/// CPUID 1, ECX: there is a hypervisor, whose clock Linux then uses.
const HYPERVISOR: u32 = 1 << 31;
/// CPUID 1, ECX: the local APIC's timer goes by the time-stamp counter.
const TSC_DEADLINE: u32 = 1 << 24;

/// What the rest of the machine does for a CPU.
pub trait Bus: Send + Sync {
    /// A read of a port.
    fn port_read(&self, port: u16, data: &mut [u8]);
    /// A write to a port. False when the guest has powered itself off.
    fn port_write(&self, cpu: usize, port: u16, data: &[u8]) -> bool;
    /// A read of a device's memory.
    fn mmio_read(&self, address: u64, data: &mut [u8]);
    /// A write to a device's memory.
    fn mmio_write(&self, address: u64, data: &[u8]);
    /// A CPU has come to its end, which [`Vcpu::ended`] knows by now.
    fn ended(&self);
}

/// Why a CPU has come to its end.
#[derive(Debug, Clone)]
pub enum Ended {
    /// It was told to, or the guest powered off. With the registers it had then.
    Stopped(String),
    /// KVM does not go on: a triple fault, an instruction that it cannot emulate, and the like.
    Failed(String),
}

/// A running CPU.
#[derive(Debug)]
pub struct Vcpu {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
    ended: Receiver<Ended>,
    /// Set when it has ended.
    outcome: Option<Ended>,
    /// What KVM counts of it.
    pub stats: Option<CpuStats>,
}

impl Vcpu {
    /// Makes CPU `index`, on host CPU `pin` if that is said, and starts it. All but the first wait to be started by
    /// the guest.
    pub fn start(
        vm: &VmFd,
        index: usize,
        cpuid: &CpuId,
        entry: Option<Entry>,
        pin: Option<usize>,
        bus: Arc<dyn Bus>,
    ) -> Result<Vcpu> {
        static HANDLER: Once = Once::new();
        HANDLER.call_once(|| {
            extern "C" fn nothing(_: i32) {}
            let action = SigAction::new(SigHandler::Handler(nothing), SaFlags::empty(), SigSet::empty());
            // SAFETY: the handler does nothing, which is safe at any time.
            let _ = unsafe { sigaction(KICK, &action) };
        });
        // Never among what is supported, since only userspace knows of the APIC (KVM_GET_SUPPORTED_CPUID).
        let deadline = vm.check_extension(Cap::TscDeadlineTimer);
        let mut vcpu = vm.create_vcpu(index as u64).context("KVM_CREATE_VCPU")?;
        let mut cpuid = cpuid.clone();
        for entry in cpuid.as_mut_slice() {
            match entry.function {
                1 => {
                    entry.ebx = entry.ebx & 0x00ff_ffff | (index as u32) << 24;
                    entry.ecx |= HYPERVISOR | if deadline { TSC_DEADLINE } else { 0 };
                }
                0xb | 0x1f => entry.edx = index as u32,
                _ => {}
            }
        }
        vcpu.set_cpuid2(&cpuid).context("KVM_SET_CPUID2")?;
        if let Some(entry) = entry {
            let (mut regs, mut sregs) = (vcpu.get_regs()?, vcpu.get_sregs()?);
            boot::set_registers(entry, &mut regs, &mut sregs);
            vcpu.set_sregs(&sregs).context("KVM_SET_SREGS")?;
            vcpu.set_regs(&regs).context("KVM_SET_REGS")?;
        }
        let stats = CpuStats::of(&vcpu).ok();
        let stop = Arc::new(AtomicBool::new(false));
        let (sender, ended) = channel();
        let stopped = Arc::clone(&stop);
        let thread = std::thread::Builder::new().name(format!("vcpu{index}")).spawn(move || {
            if let Some(cpu) = pin {
                let mut set = CpuSet::new();
                let _ = set.set(cpu).and_then(|()| sched_setaffinity(Pid::from_raw(0), &set));
            }
            let end = run(&mut vcpu, index, &*bus, &stopped);
            let _ = sender.send(end);
            bus.ended();
        })?;
        Ok(Vcpu { stop, thread: Some(thread), ended, outcome: None, stats })
    }

    /// How it has ended, if it has.
    pub fn ended(&mut self) -> Option<&Ended> {
        if self.outcome.is_none() {
            self.outcome = self.ended.try_recv().ok();
        }
        self.outcome.as_ref()
    }

    /// Stops it, if it has not ended.
    pub fn stop(&mut self) -> Ended {
        self.stop.store(true, Ordering::Release);
        loop {
            if let Some(ended) = &self.outcome {
                return ended.clone();
            }
            if let Some(thread) = &self.thread {
                let _ = pthread_kill(thread.as_pthread_t(), KICK);
            }
            // Sent again and again: one that comes just before KVM_RUN is lost.
            match self.ended.recv_timeout(Duration::from_millis(1)) {
                Ok(ended) => self.outcome = Some(ended),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => {
                    self.outcome = Some(Ended::Failed("the thread has panicked".to_owned()));
                }
            }
        }
    }
}

impl Drop for Vcpu {
    fn drop(&mut self) {
        self.stop();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn run(vcpu: &mut VcpuFd, index: usize, bus: &dyn Bus, stop: &AtomicBool) -> Ended {
    let why = loop {
        if stop.load(Ordering::Acquire) {
            return Ended::Stopped(registers(vcpu));
        }
        match vcpu.run() {
            Ok(VcpuExit::IoIn(port, data)) => bus.port_read(port, data),
            Ok(VcpuExit::IoOut(port, data)) => {
                if !bus.port_write(index, port, data) {
                    return Ended::Stopped("powered off".to_owned());
                }
            }
            Ok(VcpuExit::MmioRead(address, data)) => bus.mmio_read(address, data),
            Ok(VcpuExit::MmioWrite(address, data)) => bus.mmio_write(address, data),
            Ok(VcpuExit::Intr) => {}
            Ok(VcpuExit::Shutdown) => break "triple fault".to_owned(),
            Ok(other) => break format!("{other:?}"),
            Err(error) if matches!(error.errno(), nix::libc::EINTR | nix::libc::EAGAIN) => {}
            Err(error) => break format!("KVM_RUN: {error}"),
        }
    };
    Ended::Failed(format!("{why}; {}", registers(vcpu)))
}

/// The registers, for a report.
fn registers(vcpu: &VcpuFd) -> String {
    let (regs, sregs): (kvm_regs, kvm_sregs) = match (vcpu.get_regs(), vcpu.get_sregs()) {
        (Ok(regs), Ok(sregs)) => (regs, sregs),
        _ => return "registers unknown".to_owned(),
    };
    format!(
        "rip {:#x} cs {:#x} rflags {:#x} rsp {:#x} rax {:#x} rbx {:#x} rcx {:#x} rdx {:#x} rsi {:#x} rdi {:#x} \
         rbp {:#x} cr0 {:#x} cr2 {:#x} cr3 {:#x} cr4 {:#x} efer {:#x}",
        regs.rip,
        sregs.cs.selector,
        regs.rflags,
        regs.rsp,
        regs.rax,
        regs.rbx,
        regs.rcx,
        regs.rdx,
        regs.rsi,
        regs.rdi,
        regs.rbp,
        sregs.cr0,
        sregs.cr2,
        sregs.cr3,
        sregs.cr4,
        sregs.efer
    )
}
