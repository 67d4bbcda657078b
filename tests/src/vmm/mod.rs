//! A small virtual machine monitor on KVM, for tests: virtio-mmio devices whose queues are served by vhost-user back
//! ends, and nothing else that a guest could notice but a serial port.
//!
//! ```text
//!  guest ── QueueNotify ──► KVM_IOEVENTFD ──► kick eventfd ─┐
//!    ▲                                                      ├─► back end (a process)
//!    └────── I/O APIC ◄──── KVM_IRQFD ◄────── call eventfd ◄┘
//! ```
//!
//! | module      | what it is                                                            |
//! |-------------|-----------------------------------------------------------------------|
//! | [`machine`] | the virtual machine: memory, devices and CPUs put together            |
//! | [`memory`]  | guest memory in memfds, which can come and go                         |
//! | [`device`]  | a virtio-mmio device: registers, back end, and the wires between them and KVM |
//! | [`mmio`]    | the registers of a virtio-mmio device                                 |
//! | [`backend`] | its other half: the vhost-user session, and the eventfds of the queues |
//! | [`vcpu`]    | a CPU: a thread in `KVM_RUN`                                          |
//! | [`boot`]    | how a guest is loaded and where it begins                             |
//! | [`acpi`]    | the tables by which Linux finds devices and CPUs                      |
//! | [`stats`]   | what KVM counts                                                       |
//! | [`speed`]   | how fast guests run here, measured                                    |

pub mod acpi;
pub mod backend;
pub mod boot;
pub mod device;
pub mod machine;
pub mod memory;
pub mod mmio;
pub mod speed;
pub mod stats;
pub mod vcpu;

use std::sync::{Mutex, MutexGuard, PoisonError};

/// Why there is no virtual machine here, if there is none.
pub fn missing_needs() -> Option<String> {
    match kvm_ioctls::Kvm::new() {
        Ok(kvm) if kvm.get_api_version() == 12 => None,
        Ok(_) => Some("/dev/kvm is there, and is not KVM".to_owned()),
        Err(error) => Some(format!("/dev/kvm does not open: {error}")),
    }
}

/// Frequency of the time-stamp counter of this machine, which is also that of its guests, in ticks a nanosecond.
pub fn ticks_per_ns() -> anyhow::Result<f64> {
    let vcpu = kvm_ioctls::Kvm::new()?.create_vm()?.create_vcpu(0)?;
    Ok(f64::from(vcpu.get_tsc_khz()?) / 1e6)
}

/// Locks, whatever has become of others who did.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
