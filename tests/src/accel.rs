//! KVM or TCG, found out by measuring.
//!
//! `/dev/kvm` does not mean that KVM is of use: under some hypervisors it opens and yet executes guest kernels
//! hundreds of times too slowly. A loop tells in milliseconds ([`speed`]); where it is fast, one guest is booted under
//! KVM, against the clock, and the answer is kept next to the guest image. `KICKLESS_ACCEL=kvm` or `KICKLESS_ACCEL=tcg` says it without measuring.

use std::fmt;
use std::fs;
use std::path::Path;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};

use crate::qemu::{Vm, guest_dir};
use crate::scene::Scene;
use crate::vmm::speed;

/// How fast a guest has to boot under KVM. On a machine where KVM is what it should be it takes a second or two.
const KVM_LIMIT: Duration = Duration::from_secs(12);

/// What executes the guest's instructions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Accel {
    /// The processor.
    Kvm,
    /// QEMU's translator.
    Tcg,
}

impl Accel {
    /// The value of QEMU's `-accel`.
    pub fn qemu_accel(self) -> &'static str {
        match self {
            Self::Kvm => "kvm",
            Self::Tcg => "tcg,thread=multi",
        }
    }

    /// The value of QEMU's `-cpu`. For KVM the processor itself, less a register that nested hypervisors may not let
    /// QEMU set; for TCG a model with the CRC instruction and little else to initialise.
    pub fn qemu_cpu(self) -> &'static str {
        match self {
            Self::Kvm => "host,arch-capabilities=off",
            Self::Tcg => "Nehalem",
        }
    }
}

impl fmt::Display for Accel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Kvm => "kvm",
            Self::Tcg => "tcg",
        })
    }
}

/// The accelerator for this machine, with the reason printed once.
pub fn choose() -> Result<Accel> {
    static CHOICE: OnceLock<std::result::Result<Accel, String>> = OnceLock::new();
    let choice = CHOICE.get_or_init(|| {
        let (accel, reason) = decide().map_err(|error| format!("{error:#}"))?;
        eprintln!("accelerator: {accel} ({reason})");
        Ok(accel)
    });
    match choice {
        Ok(accel) => Ok(*accel),
        Err(error) => bail!("{error}"),
    }
}

fn decide() -> Result<(Accel, String)> {
    match std::env::var("KICKLESS_ACCEL").as_deref() {
        Ok("kvm") => return Ok((Accel::Kvm, "KICKLESS_ACCEL".to_owned())),
        Ok("tcg") => return Ok((Accel::Tcg, "KICKLESS_ACCEL".to_owned())),
        Ok(other) => bail!("KICKLESS_ACCEL={other}: neither kvm nor tcg"),
        Err(_) => {}
    }
    if fs::OpenOptions::new().read(true).write(true).open("/dev/kvm").is_err() {
        return Ok((Accel::Tcg, "/dev/kvm does not open".to_owned()));
    }
    if let Some(reason) = speed::is_emulated() {
        return Ok((Accel::Tcg, reason));
    }
    let cache = guest_dir().join("accel");
    if let Some(answer) = read_cache(&cache) {
        return Ok(answer);
    }
    let (accel, reason) = measure()?;
    // A guest directory that cannot be written to costs another measurement next time.
    let _ = fs::write(&cache, format!("{accel}\n{reason}\n"));
    Ok((accel, reason))
}

fn read_cache(path: &Path) -> Option<(Accel, String)> {
    let text = fs::read_to_string(path).ok()?;
    let (accel, reason) = text.trim_end().split_once('\n')?;
    let accel = match accel {
        "kvm" => Accel::Kvm,
        "tcg" => Accel::Tcg,
        _ => return None,
    };
    Some((accel, format!("{reason}; remembered in {}", path.display())))
}

fn measure() -> Result<(Accel, String)> {
    let scene = Scene::new()?;
    let start = Instant::now();
    let vm = Vm::builder().cpus(1).accel(Accel::Kvm).boot_limit(KVM_LIMIT).boot(&scene);
    let took = start.elapsed();
    Ok(match vm {
        Ok(_) => (Accel::Kvm, format!("a guest boots in {:.1} s under KVM", took.as_secs_f64())),
        Err(_) if took < KVM_LIMIT => (Accel::Tcg, "QEMU does not start under KVM".to_owned()),
        Err(_) => {
            let limit = KVM_LIMIT.as_secs();
            (Accel::Tcg, format!("KVM is there, but a guest does not boot within {limit} s under it"))
        }
    })
}
