//! Runs a plan: step by step, and back again from the first that fails.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::io;
use std::sync::Arc;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use nix::errno::Errno;

use crate::file::Wanted;
use crate::host::{Facts, Host, Refused, VfSet};
use crate::pci::PciAddr;
use crate::plan::{Step, VfId, plan};
use crate::state::{self, DEVICES, Pf, State, Vf};

/// How a plan is run.
pub struct Applier {
    /// Where.
    pub host: Arc<dyn Host>,
    /// How long VFs may take to be made or removed.
    pub limit: Duration,
    /// How often to say what is waited for.
    pub every: Duration,
    /// Told what is done and waited for.
    pub say: Box<dyn Fn(&str) + Send>,
}

/// Why a step failed.
#[derive(Debug, thiserror::Error)]
pub enum StepError {
    /// The kernel refused a write.
    #[error("{file}: {refused}{hint}")]
    Refused {
        /// The file, or the message.
        file: String,
        /// What the kernel said.
        refused: Refused,
        /// What to do, behind a semicolon.
        hint: String,
    },
    /// The kernel took it, and nothing came of it.
    #[error("{file}: taken, but {what}")]
    NoEffect {
        /// The file, or the message.
        file: String,
        /// What is not so.
        what: String,
    },
    /// It takes too long.
    #[error("{file}: no answer within {} s{held}; the kernel goes on with it until they let go: stop them", .limit.as_secs())]
    TimedOut {
        /// The file.
        file: String,
        /// How long it was waited for.
        limit: Duration,
        /// Who holds what.
        held: String,
    },
    /// What the step is about is not there.
    #[error("{0}")]
    Gone(String),
    /// The host cannot be read.
    #[error("reading the state: {0}")]
    Read(#[from] io::Error),
}

/// A plan that did not work out.
#[derive(Debug)]
pub struct ApplyError {
    /// The step that failed.
    pub step: Step,
    /// Why.
    pub error: StepError,
    /// What came of going back.
    pub undone: Undone,
}

/// What came of going back.
#[derive(Debug)]
pub enum Undone {
    /// All is as it was.
    All,
    /// Some is not, for these reasons.
    Not(Vec<String>),
}

impl fmt::Display for ApplyError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.step, self.error)?;
        match &self.undone {
            Undone::All => write!(f, " (all is as it was before)"),
            Undone::Not(reasons) => write!(f, " (NOT all is as it was before: {})", reasons.join("; ")),
        }
    }
}

impl std::error::Error for ApplyError {}

impl Applier {
    /// Runs steps that were planned from `before`; when one fails, goes back to that.
    pub fn run(&self, before: &State, steps: &[Step]) -> Result<(), Box<ApplyError>> {
        for (done, step) in steps.iter().enumerate() {
            (self.say)(&step.to_string());
            if let Err(error) = self.step(step) {
                let undone = self.undo(before, &steps[..=done], &error);
                return Err(Box::new(ApplyError { step: step.clone(), error, undone }));
            }
        }
        Ok(())
    }

    /// Back to what was before, as far as these steps may have changed it: by a plan from what is there now.
    fn undo(&self, before: &State, tried: &[Step], error: &StepError) -> Undone {
        let mut touched: BTreeSet<PciAddr> = tried.iter().filter_map(Step::pf).collect();
        let mut reasons = Vec::new();
        if let (StepError::TimedOut { .. }, Some(Step::NumVfs(pf, _))) = (error, tried.last()) {
            // Whatever else is asked of it would wait, too.
            touched.remove(pf);
            reasons.push(format!("{pf} is as far as it has come"));
        }
        let wanted = Wanted { no_other_mdevs: true, ..Wanted::of(before).only(&touched) };
        let steps = match state::read(&*self.host) {
            // What was there before is not to be refused now: a bridge may still have an address that goes back.
            Ok((now, _)) => match plan(&State { macs: BTreeMap::new(), ..now }, &wanted) {
                Ok(plan) => plan.steps,
                Err(wrong) => {
                    reasons.extend(wrong.iter().map(ToString::to_string));
                    Vec::new()
                }
            },
            Err(e) => {
                reasons.push(format!("reading the state: {e}"));
                Vec::new()
            }
        };
        let mut stuck = BTreeSet::new();
        for step in steps.iter().filter(|step| !matches!(step, Step::LoadModule(_))) {
            if step.pf().is_some_and(|pf| stuck.contains(&pf)) {
                continue;
            }
            (self.say)(&format!("undoing: {step}"));
            if let Err(e) = self.step(step) {
                reasons.push(format!("{step}: {e}"));
                if let Step::NumVfs(pf, _) = step {
                    stuck.insert(*pf);
                }
            }
        }
        if reasons.is_empty() { Undone::All } else { Undone::Not(reasons) }
    }

    /// Does one step, unless all is so already.
    fn step(&self, step: &Step) -> Result<(), StepError> {
        let (now, facts) = state::read(&*self.host)?;
        match step {
            Step::LoadModule(name) => {
                let refused = |refused| refused_by(step, format!("modprobe {name}"), refused);
                if !now.drivers.contains(name) {
                    self.host.load_module(name).map_err(refused)?;
                }
                Ok(())
            }
            Step::Up(pf, up) => {
                let interface = pf_in(&now, *pf)?.function.interfaces.first();
                let Some(interface) = interface else { return Err(gone(*pf, "has no interface")) };
                let refused = |refused| refused_by(step, format!("rtnetlink ({})", interface.name), refused);
                self.host.set_up(&interface.name, *up).map_err(refused)
            }
            Step::Autoprobe(pf, on) => self.put(
                step,
                &format!("{DEVICES}/{pf}/sriov_drivers_autoprobe"),
                if *on { "1" } else { "0" },
            ),
            Step::Eswitch(pf, mode) => {
                if pf_in(&now, *pf)?.eswitch == Some(*mode) {
                    return Ok(());
                }
                let refused = |refused| refused_by(step, format!("devlink (pci/{pf})"), refused);
                self.host.set_eswitch(*pf, *mode).map_err(refused)
            }
            Step::NumVfs(pf, n) => self.num_vfs(step, &now, *pf, *n),
            Step::MdevCreate(pf, kind, uuid) => {
                self.put(step, &format!("{DEVICES}/{pf}/mdev_supported_types/{kind}/create"), uuid)
            }
            Step::MdevRemove(_, uuid) => self.put(step, &format!("bus/mdev/devices/{uuid}/remove"), "1"),
            Step::Unbind(id) => {
                let vf = vf_in(&now, *id)?;
                if vf.function.driver.is_none() {
                    return Ok(());
                }
                let address = vf.function.address;
                self.put(step, &format!("{DEVICES}/{address}/driver/unbind"), &address.to_string())
            }
            Step::Override(id, name) => {
                let vf = vf_in(&now, *id)?;
                if vf.function.driver_override == *name {
                    return Ok(());
                }
                let file = format!("{DEVICES}/{}/driver_override", vf.function.address);
                self.put(step, &file, name.as_deref().unwrap_or("\n"))
            }
            Step::Probe(id, driver) => self.bind(step, &now, *id, "bus/pci/drivers_probe", driver.as_deref()),
            Step::Bind(id, driver) => {
                self.bind(step, &now, *id, &format!("bus/pci/drivers/{driver}/bind"), Some(driver))
            }
            Step::Msix(id, n) => {
                let vf = vf_in(&now, *id)?;
                if vf.function.msix == Some(*n) {
                    return Ok(());
                }
                self.put(
                    step,
                    &format!("{DEVICES}/{}/sriov_vf_msix_count", vf.function.address),
                    &n.to_string(),
                )
            }
            Step::Set(id, set) => self.set(step, &now, &facts, *id, *set),
        }
    }

    fn put(&self, step: &Step, file: &str, text: &str) -> Result<(), StepError> {
        self.host.write(file, text).map_err(|refused| refused_by(step, self.full(file), refused))
    }

    fn full(&self, file: &str) -> String {
        self.host.sysfs().join(file).display().to_string()
    }

    fn bind(
        &self,
        step: &Step,
        now: &State,
        id: VfId,
        file: &str,
        driver: Option<&str>,
    ) -> Result<(), StepError> {
        let vf = vf_in(now, id)?;
        if driver.is_some() && vf.function.driver.as_deref() == driver {
            return Ok(());
        }
        let address = vf.function.address;
        self.put(step, file, &address.to_string())?;
        // Whoever probes says yes even if nothing was found.
        let (now, _) = state::read(&*self.host)?;
        let bound = vf_in(&now, id)?.function.driver.as_deref();
        if driver.is_none() || bound == driver {
            return Ok(());
        }
        let bound = bound.map_or("to nothing".into(), |name| format!("to {name}"));
        let what = format!("{address} is bound {bound}: the driver's reason is in the kernel's log (dmesg)");
        Err(StepError::NoEffect { file: self.full(file), what })
    }

    fn set(&self, step: &Step, now: &State, facts: &Facts, id: VfId, set: VfSet) -> Result<(), StepError> {
        let pf = pf_in(now, id.pf)?;
        let vf = vf_in(now, id)?;
        if set.holds(&vf.settings) {
            return Ok(());
        }
        let Some(interface) = pf.interface(facts) else { return Err(gone(id.pf, "has no interface")) };
        if matches!(set, VfSet::Rate(..)) {
            // They are held against the speed of a link, which drivers reset when VFs are made.
            self.host.wait_link(&interface.name);
        }
        let file = format!("rtnetlink (ip link set {} vf {} {set})", interface.name, id.index);
        let refused = |refused| refused_by(step, file.clone(), refused);
        self.host.set_vf(&interface.name, id.index, set).map_err(refused)?;
        // An address that a reset has brought back has been seen twice on a network.
        let (now, _) = state::read(&*self.host)?;
        let settings = vf_in(&now, id)?.settings;
        if let (VfSet::Mac(mac), Some(now)) = (set, settings.mac)
            && now != mac
        {
            return Err(StepError::NoEffect { file, what: format!("the driver has {now} for it") });
        }
        Ok(())
    }

    /// Makes VFs, or removes them: that waits for whoever holds one.
    fn num_vfs(&self, step: &Step, now: &State, pf: PciAddr, n: u32) -> Result<(), StepError> {
        if pf_in(now, pf)?.vfs.len() as u32 == n {
            return Ok(());
        }
        let file = format!("{DEVICES}/{pf}/sriov_numvfs");
        let full = self.full(&file);
        let (answer, answered) = mpsc::channel();
        let host = Arc::clone(&self.host);
        let (begun, mut said) = (Instant::now(), Instant::now());
        thread::spawn(move || answer.send(host.write(&file, &n.to_string())));
        let written = loop {
            let left = self.limit.saturating_sub(begun.elapsed());
            match answered.recv_timeout(left.min(self.every)) {
                Ok(written) => break written,
                Err(RecvTimeoutError::Disconnected) => {
                    return Err(gone(pf, "the thread that writes has ended"));
                }
                Err(RecvTimeoutError::Timeout) => {}
            }
            let held = self.holders(now, pf);
            if begun.elapsed() >= self.limit {
                return Err(StepError::TimedOut { file: full, limit: self.limit, held });
            }
            if said.elapsed() >= self.every {
                said = Instant::now();
                (self.say)(&format!(
                    "{pf}: waiting for {} s for the kernel{held}",
                    begun.elapsed().as_secs()
                ));
            }
        };
        written.map_err(|refused| refused_by(step, full.clone(), refused))?;
        // Some drivers say yes and make none, for one while their interface is down.
        let (now, _) = state::read(&*self.host)?;
        let there = pf_in(&now, pf)?.vfs.len() as u32;
        if there == n {
            return Ok(());
        }
        let what = format!(
            "there are {there} VFs: some drivers want their interface up first (up = true), others a larger BAR (dmesg)"
        );
        Err(StepError::NoEffect { file: full, what })
    }

    /// Who holds VFs of a PF, by what was known before: what is being removed may not answer.
    fn holders(&self, before: &State, pf: PciAddr) -> String {
        let holders = self.host.holders();
        let vfs = before.pfs.iter().filter(|p| p.address() == pf).flat_map(|p| &p.vfs);
        let held: Vec<String> = vfs
            .filter_map(|vf| {
                let by = holders.get(&vf.function.iommu_group.as_ref()?.number)?;
                let by: Vec<_> = by.iter().map(ToString::to_string).collect();
                Some(format!("process {} holds {}", by.join(", "), vf.function.address))
            })
            .collect();
        if held.is_empty() { String::new() } else { format!(": {}", held.join("; ")) }
    }
}

/// An error by value, with what to do.
fn refused_by(step: &Step, file: String, refused: Refused) -> StepError {
    let errno = refused.error.raw_os_error().map(Errno::from_raw);
    let hint = errno.and_then(|errno| hint(step, errno)).map(|hint| format!("; {hint}"));
    StepError::Refused { file, refused, hint: hint.unwrap_or_default() }
}

/// What to do about an error.
fn hint(step: &Step, errno: Errno) -> Option<&'static str> {
    Some(match (step, errno) {
        (_, Errno::EACCES | Errno::EPERM) => "run it as root",
        (_, Errno::EROFS) => "sysfs is mounted read-only here, as in containers: run it on the host",
        (Step::NumVfs(..), Errno::EBUSY) => "VFs are there or in use: `sriov show` says by whom",
        (Step::NumVfs(..), Errno::ENOENT | Errno::EOPNOTSUPP | Errno::ENOSYS) => {
            "the driver bound to this function makes no VFs: bind the maker's (dmesg)"
        }
        (Step::NumVfs(..), Errno::ERANGE) => "it has fewer than that (sriov_totalvfs)",
        (Step::NumVfs(..), Errno::ENOMEM | Errno::ENOSPC | Errno::EINVAL | Errno::EIO) => {
            "no room for their registers: enable SR-IOV and \"above 4G decoding\" in the firmware, or boot with pci=realloc (dmesg)"
        }
        (Step::Set(_, VfSet::Rate(..)), Errno::EINVAL) => {
            "the driver takes no such rate: none above the link's speed, none without a link, and some no least rate (min-rate)"
        }
        (Step::Set(_, VfSet::Vlan(..)), Errno::EPROTONOSUPPORT) => "the driver puts on 802.1Q tags only",
        (Step::Set(..), Errno::EOPNOTSUPP) => "this driver does not have it: leave it out",
        (Step::Set(..), Errno::EINVAL) => "the driver does not take this value",
        (Step::Eswitch(..), Errno::EOPNOTSUPP | Errno::ENODEV) => {
            "this driver has no embedded switch that can be set"
        }
        (Step::Eswitch(..), Errno::EBUSY) => "VFs or rules of the switch are in use",
        (Step::Probe(..) | Step::Bind(..), Errno::ENODEV) => "the driver is not made for this device",
        (Step::Probe(..) | Step::Bind(..) | Step::Unbind(..) | Step::Msix(..), Errno::EBUSY) => {
            "it is bound, or in use"
        }
        (Step::Msix(..), Errno::EINVAL | Errno::ENOSPC) => "fewer are left to deal out (sriov_vf_total_msix)",
        (Step::LoadModule(_), Errno::ENOENT) => "modprobe is not installed (package kmod)",
        (Step::MdevCreate(..), Errno::ENOSPC | Errno::EUSERS) => "there can be no more of this type",
        _ => return None,
    })
}

fn gone(pf: PciAddr, what: &str) -> StepError {
    StepError::Gone(format!("{pf} {what}"))
}

fn pf_in(state: &State, pf: PciAddr) -> Result<&Pf, StepError> {
    state.pfs.iter().find(|p| p.address() == pf).ok_or_else(|| gone(pf, "is gone"))
}

fn vf_in(state: &State, id: VfId) -> Result<&Vf, StepError> {
    let vf = pf_in(state, id.pf)?.vfs.iter().find(|vf| vf.index == id.index);
    vf.ok_or_else(|| StepError::Gone(format!("{id} is gone: somebody else has removed it")))
}
