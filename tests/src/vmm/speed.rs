//! How fast a guest's kernel code runs here. There are hosts whose `/dev/kvm` runs only the code of guest processes
//! natively and emulates the rest, hundreds of times slower: bare metal with little code gets by, Linux does not.

use std::sync::OnceLock;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use kvm_bindings::KVM_MAX_CPUID_ENTRIES;
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd};
use vm_memory::{Bytes, GuestAddress};

use super::boot::{self, Entry};
use super::memory::{Backing, Memory};

const MEMORY: u64 = 1 << 20;
const CODE: u64 = 0x5_0000;
/// `1: dec ecx; jnz 1b; hlt`
const LOOP: [u8; 5] = [0xff, 0xc9, 0x75, 0xfc, 0xf4];
/// A loop that takes at least so long says enough.
const ENOUGH: Duration = Duration::from_millis(3);
/// Loops that a native processor takes 50 ms for, at most.
const MOST: u64 = 1 << 26;
/// Fewer instructions a second are emulation: by far less than any processor, by far more than an emulator in KVM.
const LIMIT: f64 = 20e6;

/// Why only guests with little kernel code can run here, if that is so. Takes some milliseconds the first time.
pub fn is_emulated() -> Option<String> {
    static ANSWER: OnceLock<Option<String>> = OnceLock::new();
    let answer = ANSWER.get_or_init(|| match instructions_a_second() {
        Ok(rate) if rate >= LIMIT => None,
        Ok(rate) => Some(format!(
            "KVM emulates the guest's kernel code here: {:.1} million instructions a second (a native loop does \
             hundreds)",
            rate / 1e6
        )),
        Err(error) => Some(format!("KVM does not run a loop of three instructions: {error:#}")),
    });
    answer.clone()
}

/// Instructions of a short loop in kernel mode of a guest.
pub fn instructions_a_second() -> Result<f64> {
    let kvm = Kvm::new().context("/dev/kvm")?;
    let vm = kvm.create_vm().context("KVM_CREATE_VM")?;
    let mut memory = Memory::default();
    memory.add(&vm, 0, MEMORY, Backing::Pages)?;
    boot::write_page_tables(memory.map())?;
    memory.map().write_slice(&LOOP, GuestAddress(CODE))?;
    let mut vcpu = vm.create_vcpu(0).context("KVM_CREATE_VCPU")?;
    vcpu.set_cpuid2(&kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)?).context("KVM_SET_CPUID2")?;
    let (mut regs, mut sregs) = (vcpu.get_regs()?, vcpu.get_sregs()?);
    boot::set_registers(Entry::Linux64(CODE), &mut regs, &mut sregs);
    vcpu.set_sregs(&sregs).context("KVM_SET_SREGS")?;
    // The first time pages are mapped, and whatever else happens once.
    run(&mut vcpu, 1)?;
    let mut loops = 1024;
    loop {
        // A host that has other things to do does not look like an emulator three times in a row.
        let mut took = run(&mut vcpu, loops)?;
        for _ in 1..3 {
            if took >= ENOUGH {
                took = took.min(run(&mut vcpu, loops)?);
            }
        }
        if took >= ENOUGH || loops >= MOST {
            return Ok(2.0 * loops as f64 / took.as_secs_f64());
        }
        loops *= 4;
    }
}

fn run(vcpu: &mut VcpuFd, loops: u64) -> Result<Duration> {
    let mut regs = vcpu.get_regs()?;
    (regs.rip, regs.rcx, regs.rflags) = (CODE, loops, 2);
    vcpu.set_regs(&regs).context("KVM_SET_REGS")?;
    let start = Instant::now();
    match vcpu.run().context("KVM_RUN")? {
        VcpuExit::Hlt => Ok(start.elapsed()),
        other => bail!("{other:?}"),
    }
}
