//! From what a host is like to what it should be like: the steps, and what would be lost. No I/O.

use std::collections::BTreeMap;
use std::fmt;

use netaddr::MacAddr;

use crate::file::{DEFAULT, NONE, Wanted, WantedPf, WantedVf};
use crate::host::{EswitchMode, LinkState, Settings, VfSet, VlanProto};
use crate::pci::PciAddr;
use crate::state::{Pf, State, Vf};

/// What is to be done.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// In this order.
    pub steps: Vec<Step>,
    /// What would be lost or disturbed by that.
    pub risks: Vec<String>,
}

/// One thing to do: one write to the kernel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// Load a driver.
    LoadModule(String),
    /// Set the interface of a PF up or down.
    Up(PciAddr, bool),
    /// Say whether new VFs of a PF are bound by themselves.
    Autoprobe(PciAddr, bool),
    /// Set the mode of a PF's embedded switch.
    Eswitch(PciAddr, EswitchMode),
    /// Make VFs, or with 0 remove them all.
    NumVfs(PciAddr, u32),
    /// Take the driver from a VF.
    Unbind(VfId),
    /// Say which driver alone may be bound to a VF.
    Override(VfId, Option<String>),
    /// Have the kernel bind a VF to what it chooses, by its override if there is one.
    Probe(VfId, Option<String>),
    /// Bind a VF to a driver that it is not bound to by force.
    Bind(VfId, String),
    /// Deal out MSI-X vectors.
    Msix(VfId, u16),
    /// Set something of a VF by its PF's interface.
    Set(VfId, VfSet),
    /// Make a mediated device of this type.
    MdevCreate(PciAddr, String, String),
    /// Remove a mediated device.
    MdevRemove(PciAddr, String),
}

/// A VF, which may not be there yet and have no address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct VfId {
    /// Its PF.
    pub pf: PciAddr,
    /// Its number.
    pub index: u32,
}

impl fmt::Display for VfId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} vf {}", self.pf, self.index)
    }
}

impl Step {
    /// The PF that it is about.
    pub fn pf(&self) -> Option<PciAddr> {
        match self {
            Step::LoadModule(_) => None,
            Step::Up(pf, _)
            | Step::Autoprobe(pf, _)
            | Step::Eswitch(pf, _)
            | Step::NumVfs(pf, _)
            | Step::MdevCreate(pf, ..)
            | Step::MdevRemove(pf, _) => Some(*pf),
            Step::Unbind(vf)
            | Step::Override(vf, _)
            | Step::Probe(vf, _)
            | Step::Bind(vf, _)
            | Step::Msix(vf, _)
            | Step::Set(vf, _) => Some(vf.pf),
        }
    }
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Step::LoadModule(name) => write!(f, "load module {name}"),
            Step::Up(pf, up) => write!(f, "{pf}: set the interface {}", if *up { "up" } else { "down" }),
            Step::Autoprobe(pf, on) => {
                write!(f, "{pf}: bind new VFs by themselves: {}", if *on { "yes" } else { "no" })
            }
            Step::Eswitch(pf, mode) => write!(f, "{pf}: set the embedded switch to {mode}"),
            Step::NumVfs(pf, 0) => write!(f, "{pf}: remove all VFs"),
            Step::NumVfs(pf, n) => write!(f, "{pf}: make {n} VF{}", if *n == 1 { "" } else { "s" }),
            Step::Unbind(vf) => write!(f, "{vf}: unbind from its driver"),
            Step::Override(vf, None) => write!(f, "{vf}: let any driver be bound"),
            Step::Override(vf, Some(name)) if name == NONE => write!(f, "{vf}: let no driver be bound"),
            Step::Override(vf, Some(name)) => write!(f, "{vf}: let only {name} be bound"),
            Step::Probe(vf, None) => write!(f, "{vf}: bind to the driver that the kernel chooses"),
            Step::Probe(vf, Some(name)) | Step::Bind(vf, name) => write!(f, "{vf}: bind to {name}"),
            Step::Msix(vf, n) => write!(f, "{vf}: give {n} MSI-X vectors"),
            Step::Set(vf, set) => write!(f, "{vf}: set {set}"),
            Step::MdevCreate(pf, kind, uuid) => write!(f, "{pf}: make mediated device {uuid} of type {kind}"),
            Step::MdevRemove(pf, uuid) => write!(f, "{pf}: remove mediated device {uuid}"),
        }
    }
}

/// What makes a plan impossible: in the file, or on this host.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Impossible {
    /// The function is not there, or cannot have VFs.
    #[error("{0} is no function with SR-IOV here: `sriov list` says which there are")]
    NoPf(PciAddr),
    /// Named twice.
    #[error("{0} is there twice: say each once")]
    Twice(String),
    /// It cannot have so many.
    #[error("{0} cannot have {1} VFs: it has {2} at most (sriov_totalvfs)")]
    TooMany(PciAddr, u32, u32),
    /// A VF beyond those that are to be there.
    #[error("{0} is not among the {1} VFs that {pf} is to have: write vfs = {more} or more, or a smaller index", pf = .0.pf, more = .0.index + 1)]
    NoVf(VfId, u32),
    /// VFs are made by a driver.
    #[error("{0} has no driver, and VFs are made by one: load it, or bind it")]
    NoDriver(PciAddr),
    /// Two cards with one address.
    #[error("{1} and {2} would both have the address {0}: give each its own")]
    SameMac(MacAddr, String, String),
    /// Not a card's address.
    #[error("{0}: {1} is no address of a card")]
    NotACard(VfId, MacAddr),
    /// Out of range.
    #[error("{0}: {1}")]
    Range(VfId, &'static str),
    /// Nothing to set it by.
    #[error("{0}: {1} has no network interface to set it by{2}")]
    NoInterface(VfId, PciAddr, &'static str),
    /// VFIO needs an IOMMU.
    #[error(
        "{0} cannot be given to vfio-pci: no IOMMU is on (kernel command line intel_iommu=on or amd_iommu=on, VT-d or AMD-Vi in the firmware)"
    )]
    NoIommu(VfId),
    /// Its driver cannot deal them out.
    #[error("{0}: the driver of {pf} cannot deal out MSI-X vectors (its sriov_vf_total_msix is 0)", pf = .0.pf)]
    NoMsix(VfId),
    /// It has no such switch.
    #[error("{0} has no embedded switch that can be set: its driver does not offer one through devlink")]
    NoEswitch(PciAddr),
    /// No such type.
    #[error("{0} has no mediated devices of type {1}: `sriov mdev list` says which there are")]
    NoMdevType(PciAddr, String),
    /// None left.
    #[error("{0} can have no more mediated devices of type {1}")]
    NoMdevLeft(PciAddr, String),
    /// Not to be changed.
    #[error("mediated device {0} is there, but of {1}, type {2}: remove it first")]
    MdevDiffers(String, PciAddr, String),
}

/// Drivers that make no VFs while their interface is down, and report success.
const WANT_INTERFACE_UP: [&str; 1] = ["bnxt_en"];

/// The driver that hands functions to virtual machines.
pub const VFIO: &str = "vfio-pci";

/// The steps from one state to another.
pub fn plan(now: &State, wanted: &Wanted) -> Result<Plan, Vec<Impossible>> {
    let mut planner = Planner { now, plan: Plan::default(), wrong: Vec::new() };
    let mut seen = Vec::new();
    for want in &wanted.pfs {
        if seen.contains(&want.address) {
            planner.wrong.push(Impossible::Twice(want.address.to_string()));
            continue;
        }
        seen.push(want.address);
        match now.pfs.iter().find(|pf| pf.address() == want.address) {
            Some(pf) => planner.pf(pf, want),
            None => planner.wrong.push(Impossible::NoPf(want.address)),
        }
    }
    planner.addresses(wanted);
    planner.mdevs(wanted);
    let Planner { mut plan, wrong, .. } = planner;
    if wrong.is_empty() {
        plan.risks.dedup();
        return Ok(plan);
    }
    Err(wrong)
}

/// What a VF is bound to, and may be.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Binding {
    only: Option<String>,
    driver: Option<String>,
}

impl Binding {
    fn of(vf: &Vf) -> Binding {
        Binding { only: vf.function.driver_override.clone(), driver: vf.function.driver.clone() }
    }
}

/// What a VF is to be bound to.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Goal {
    /// What the kernel chooses.
    Default,
    /// This.
    Exactly(Binding),
}

impl Goal {
    /// What a file says of a VF, if it does.
    fn wanted(want: &WantedVf) -> Option<Goal> {
        let only = want.driver_override.clone().map(|only| (!only.is_empty()).then_some(only));
        match want.driver.as_deref() {
            None => {
                only.map(|only| Goal::Exactly(Binding { driver: only.clone().filter(|o| o != NONE), only }))
            }
            Some(DEFAULT) => Some(Goal::Default),
            Some(driver) => {
                let only = only.unwrap_or_else(|| Some(driver.into()));
                Some(Goal::Exactly(Binding { only, driver: (driver != NONE).then(|| driver.into()) }))
            }
        }
    }
}

struct Planner<'a> {
    now: &'a State,
    plan: Plan,
    wrong: Vec<Impossible>,
}

impl Planner<'_> {
    fn step(&mut self, step: Step) {
        self.plan.steps.push(step);
    }

    fn pf(&mut self, pf: &Pf, want: &WantedPf) {
        let wrong = self.wrong.len();
        self.check(pf, want);
        if self.wrong.len() > wrong {
            return;
        }
        let address = pf.address();
        let there = pf.vfs.len() as u32;
        let anew = want.vfs != there;
        let eswitch = want.eswitch.filter(|mode| Some(*mode) != pf.eswitch);
        let empty = WantedVf::default();
        let wants: Vec<&WantedVf> =
            (0..want.vfs).map(|i| want.vf.iter().find(|vf| vf.index == i).unwrap_or(&empty)).collect();

        // What a new VF was bound to before counts for it, unless the file says otherwise.
        let goals: Vec<Option<Goal>> = wants
            .iter()
            .enumerate()
            .map(|(i, want)| {
                let before = pf.vfs.get(i).filter(|_| anew).map(|vf| Goal::Exactly(Binding::of(vf)));
                Goal::wanted(want).or(before)
            })
            .collect();
        for goal in goals.iter().flatten() {
            let Goal::Exactly(Binding { driver: Some(driver), .. }) = goal else { continue };
            let load = Step::LoadModule(driver.clone());
            if !self.now.drivers.contains(driver) && !self.plan.steps.contains(&load) {
                self.step(load);
            }
        }
        let exactly = goals.iter().any(|goal| matches!(goal, Some(Goal::Exactly(_))));

        // A link takes seconds to come up, and rates are held against it.
        let needs_up = anew
            && want.vfs > 0
            && pf.function.driver.as_deref().is_some_and(|d| WANT_INTERFACE_UP.contains(&d));
        let up = pf.function.interfaces.first().map(|i| i.up);
        if up == Some(false) && (want.up == Some(true) || needs_up && want.up.is_none()) {
            self.step(Step::Up(address, true));
        }

        if anew || eswitch.is_some() {
            self.disturbs(pf);
        }
        if anew && there > 0 {
            self.step(Step::NumVfs(address, 0));
        }
        // In a change of mode drivers rebuild everything for each VF that is bound: they are bound once, afterwards.
        let mut unbound = vec![false; want.vfs as usize];
        if eswitch.is_some() && !anew {
            for vf in pf.vfs.iter().filter(|vf| vf.function.driver.is_some()) {
                self.step(Step::Unbind(id(pf, vf.index)));
                unbound[vf.index as usize] = true;
            }
        }
        if let Some(mode) = eswitch {
            self.step(Step::Eswitch(address, mode));
        }
        let after = want.autoprobe.or(pf.autoprobe);
        let mut autoprobe = pf.autoprobe;
        if anew && want.vfs > 0 {
            let during = if exactly && pf.autoprobe.is_some() { Some(false) } else { after };
            self.autoprobe(address, &mut autoprobe, during);
            self.step(Step::NumVfs(address, want.vfs));
        }
        let from = self.plan.steps.len();
        for (i, want_vf) in wants.iter().enumerate() {
            let vf = if anew { None } else { Some(&pf.vfs[i]) };
            self.vf(
                pf,
                i as u32,
                VfPlan {
                    before: pf.vfs.get(i),
                    now: vf,
                    want: want_vf,
                    goal: goals[i].clone(),
                    unbound: unbound[i],
                    probes: after != Some(false),
                    probed: autoprobe != Some(false),
                },
            );
        }
        // Without an override the kernel binds a VF, even when told to, only where VFs are bound by themselves
        // (pci_device_can_probe).
        let freely = |step: &Step| matches!(step, Step::Probe(_, None) | Step::Bind(..));
        if autoprobe == Some(false) && self.plan.steps[from..].iter().any(freely) {
            self.plan.steps.insert(from, Step::Autoprobe(address, true));
            autoprobe = Some(true);
        }
        self.autoprobe(address, &mut autoprobe, after);
        if up == Some(true) && want.up == Some(false) {
            self.disturbs(pf);
            self.step(Step::Up(address, false));
        }
    }

    fn autoprobe(&mut self, pf: PciAddr, now: &mut Option<bool>, to: Option<bool>) {
        if let Some(on) = to.filter(|_| *now != to) {
            self.step(Step::Autoprobe(pf, on));
            *now = to;
        }
    }

    fn vf(&mut self, pf: &Pf, index: u32, vf: VfPlan<'_>) {
        let id = id(pf, index);
        // What it is bound to now, as far as known: a VF that was just made is bound only if the kernel does that.
        let mut bound = match vf.now {
            Some(now) if !vf.unbound => Some(Binding::of(now)),
            Some(now) => Some(Binding { driver: None, ..Binding::of(now) }),
            None if vf.probed => None,
            None => Some(Binding { only: None, driver: None }),
        };
        let mut goal = vf.goal.or_else(|| match vf.now {
            Some(now) if vf.unbound => Some(Goal::Exactly(Binding::of(now))),
            Some(_) => None,
            None => vf.probes.then_some(Goal::Default),
        });

        // Vectors are dealt out while no driver has them.
        let carried = vf.before.filter(|_| vf.now.is_none() && pf.deals_msix);
        let msix = vf.want.msix.or(carried.and_then(|b| b.function.msix));
        if let Some(n) = msix.filter(|n| vf.now.is_none_or(|now| now.function.msix != Some(*n))) {
            if bound.as_ref().is_none_or(|b| b.driver.is_some()) {
                if let Some(now) = vf.now {
                    self.taken(now, id);
                    goal = goal.or_else(|| Some(Goal::Exactly(Binding::of(now))));
                }
                self.step(Step::Unbind(id));
                bound = Some(Binding { only: bound.and_then(|b| b.only), driver: None });
            }
            self.step(Step::Msix(id, n));
        }

        // Before its driver is bound, which reads them once.
        let settings = laid_over(vf.want.settings, vf.before.filter(|_| vf.now.is_none()));
        for set in sets(&settings, vf.now.or(vf.before).map(|v| v.settings)) {
            if vf.now.is_none_or(|now| !set.holds(&now.settings)) {
                self.step(Step::Set(id, set));
            }
        }
        if let Some(goal) = goal {
            self.bind(pf, id, vf.now, bound, goal);
        }
    }

    fn bind(&mut self, pf: &Pf, id: VfId, vf: Option<&Vf>, bound: Option<Binding>, goal: Goal) {
        let goal = match goal {
            Goal::Exactly(goal) => goal,
            Goal::Default => {
                let by_force = bound.as_ref().is_some_and(|b| {
                    b.only.is_some() || b.driver.is_none() || b.driver.as_deref() == Some(VFIO)
                });
                if !by_force {
                    return;
                }
                if bound.as_ref().is_some_and(|b| b.only.is_some()) {
                    self.step(Step::Override(id, None));
                }
                if bound.is_some_and(|b| b.driver.is_some()) {
                    if let Some(vf) = vf {
                        self.taken(vf, id);
                    }
                    self.step(Step::Unbind(id));
                }
                self.step(Step::Probe(id, None));
                return;
            }
        };
        // First what may be bound, so that whoever probes in between comes to the same result.
        if bound.as_ref().is_none_or(|b| b.only != goal.only) {
            self.step(Step::Override(id, goal.only.clone()));
        }
        if bound.as_ref().is_some_and(|b| b.driver == goal.driver) {
            return;
        }
        if bound.is_none_or(|b| b.driver.is_some()) {
            if let Some(vf) = vf {
                self.taken(vf, id);
            }
            self.step(Step::Unbind(id));
        }
        let Some(driver) = goal.driver else { return };
        if driver == VFIO {
            self.shared(pf, id, vf);
        }
        if goal.only.as_ref() == Some(&driver) {
            self.step(Step::Probe(id, Some(driver)));
        } else {
            self.step(Step::Bind(id, driver));
        }
    }

    /// A group goes to a virtual machine as a whole.
    fn shared(&mut self, pf: &Pf, id: VfId, vf: Option<&Vf>) {
        let Some(group) = vf.and_then(|vf| vf.function.iommu_group.as_ref()) else { return };
        let siblings = |a: PciAddr| pf.vfs.iter().any(|vf| vf.function.address == a);
        // Bridges are what groups are often about, and never in the way (vfio_dev_viable in the kernel).
        let harmless = [VFIO, "pci-stub", "pcieport", "shpchp"];
        for member in group.members.iter().filter(|m| !siblings(m.address)) {
            if let Some(driver) = member.driver.as_deref().filter(|d| !harmless.contains(d)) {
                self.plan.risks.push(format!(
                    "{id} shares its IOMMU group with {} (bound to {driver}): VFIO gives out neither until that is bound to vfio-pci, too, or to nothing",
                    member.address
                ));
            }
        }
    }

    /// What a PF carries, and who uses its VFs.
    fn disturbs(&mut self, pf: &Pf) {
        for what in &pf.carries {
            self.plan.risks.push(format!("{} carries {what}: drivers may reset it", pf.address()));
        }
        for vf in &pf.vfs {
            self.taken(vf, id(pf, vf.index));
        }
    }

    fn taken(&mut self, vf: &Vf, id: VfId) {
        for user in &vf.function.users {
            let risk = format!("{id} ({}) is in use: {user}", vf.function.address);
            if !self.plan.risks.contains(&risk) {
                self.plan.risks.push(risk);
            }
        }
    }

    /// What can be known to fail.
    fn check(&mut self, pf: &Pf, want: &WantedPf) {
        let address = pf.address();
        if want.vfs > pf.total_vfs {
            self.wrong.push(Impossible::TooMany(address, want.vfs, pf.total_vfs));
        }
        if want.vfs != pf.vfs.len() as u32 && pf.function.driver.is_none() {
            self.wrong.push(Impossible::NoDriver(address));
        }
        if want.eswitch.is_some() && pf.eswitch.is_none() {
            self.wrong.push(Impossible::NoEswitch(address));
        }
        for (n, vf) in want.vf.iter().enumerate() {
            let id = id(pf, vf.index);
            if want.vf[..n].iter().any(|other| other.index == vf.index) {
                self.wrong.push(Impossible::Twice(id.to_string()));
            }
            if vf.index >= want.vfs {
                self.wrong.push(Impossible::NoVf(id, want.vfs));
            }
            let s = &vf.settings;
            if s.mac.is_some_and(MacAddr::is_group) {
                self.wrong.push(Impossible::NotACard(id, s.mac.unwrap_or_default()));
            }
            if s.vlan.is_some_and(|vlan| vlan > 4094) {
                self.wrong.push(Impossible::Range(id, "a VLAN is a number from 0 (none) to 4094"));
            }
            if s.qos.is_some_and(|qos| qos > 7) {
                self.wrong.push(Impossible::Range(id, "a priority (qos) is a number from 0 to 7"));
            }
            if matches!((s.min_rate, s.max_rate), (Some(min), Some(max)) if max != 0 && min > max) {
                self.wrong.push(Impossible::Range(id, "min-rate is above max-rate"));
            }
            if *s != Settings::default() && pf.function.interfaces.is_empty() {
                let hint = if pf.function.class >> 16 == 2 { ": bind its driver" } else { "" };
                self.wrong.push(Impossible::NoInterface(id, address, hint));
            }
            if vf.driver.as_deref() == Some(VFIO) && !self.now.iommu && !self.now.noiommu {
                self.wrong.push(Impossible::NoIommu(id));
            }
            if vf.msix.is_some() && !pf.deals_msix {
                self.wrong.push(Impossible::NoMsix(id));
            }
        }
    }

    /// No two cards with one address, whoever has it.
    fn addresses(&mut self, wanted: &Wanted) {
        let now = self.now;
        let want_of = |pf: &Pf| wanted.pfs.iter().find(|want| want.address == pf.address());
        let stated =
            |pf: &Pf, index| want_of(pf).and_then(|w| w.vf.iter().find(|vf| vf.index == index)?.settings.mac);
        let left = |pf: &Pf| want_of(pf).map_or(pf.vfs.len() as u32, |w| w.vfs);
        let has = |vf: &Vf, mac| vf.function.interfaces.iter().any(|i| now.macs.get(&i.name) == Some(&mac));

        // All of this host's interfaces but those of VFs that go away, or get another address.
        let mut macs = now.macs.clone();
        for pf in &now.pfs {
            let goes = |vf: &&Vf| {
                vf.index >= left(pf)
                    || stated(pf, vf.index).is_some_and(|mac| mac.is_station() && !has(vf, mac))
            };
            for interface in pf.vfs.iter().filter(goes).flat_map(|vf| &vf.function.interfaces) {
                macs.remove(&interface.name);
            }
        }
        let mut owners: BTreeMap<MacAddr, String> = BTreeMap::new();
        for pf in &now.pfs {
            for index in 0..left(pf) {
                let vf = pf.vfs.get(index as usize);
                let before = vf.and_then(|vf| vf.settings.mac);
                let mac = stated(pf, index).or(before);
                let Some(mac) = mac.filter(|mac| mac.is_station()) else { continue };
                // What it has already a bridge or a bond may have, too, that its interface is in.
                let is_its_own = before == Some(mac) || vf.is_some_and(|vf| has(vf, mac));
                let taken = || macs.iter().find(|(_, m)| **m == mac).map(|(name, _)| name.clone());
                let id = id(pf, index).to_string();
                let other = owners.insert(mac, id.clone());
                if let Some(other) = other.or_else(|| taken().filter(|_| !is_its_own)) {
                    self.wrong.push(Impossible::SameMac(mac, other, id));
                }
            }
        }
    }

    fn mdevs(&mut self, wanted: &Wanted) {
        let now = self.now;
        for gone in now
            .mdevs
            .iter()
            .filter(|m| wanted.no_other_mdevs && wanted.mdevs.iter().all(|w| w.uuid != m.uuid))
        {
            self.step(Step::MdevRemove(gone.parent, gone.uuid.clone()));
        }
        let mut taken: BTreeMap<(PciAddr, &str), u32> = BTreeMap::new();
        for want in &wanted.mdevs {
            if let Some(there) = now.mdevs.iter().find(|m| m.uuid == want.uuid) {
                if (there.parent, &there.kind) != (want.parent, &want.kind) {
                    let differs =
                        Impossible::MdevDiffers(there.uuid.clone(), there.parent, there.kind.clone());
                    self.wrong.push(differs);
                }
                continue;
            }
            let kind = now.mdev_types.iter().find(|t| t.parent == want.parent && t.id == want.kind);
            let Some(kind) = kind else {
                self.wrong.push(Impossible::NoMdevType(want.parent, want.kind.clone()));
                continue;
            };
            let taken = taken.entry((want.parent, &want.kind)).or_default();
            *taken += 1;
            if kind.available.is_some_and(|left| *taken > left) {
                self.wrong.push(Impossible::NoMdevLeft(want.parent, want.kind.clone()));
            }
            self.step(Step::MdevCreate(want.parent, want.kind.clone(), want.uuid.clone()));
        }
    }
}

/// What is known of a VF when its steps are planned.
struct VfPlan<'a> {
    /// As it was before all VFs were removed.
    before: Option<&'a Vf>,
    /// As it is, unless it is made anew.
    now: Option<&'a Vf>,
    want: &'a WantedVf,
    goal: Option<Goal>,
    /// Its driver has been taken for a change of mode.
    unbound: bool,
    /// VFs are bound by themselves in the end.
    probes: bool,
    /// This one was, when it was made.
    probed: bool,
}

fn id(pf: &Pf, index: u32) -> VfId {
    VfId { pf: pf.address(), index }
}

/// Settings that are stated, and what a VF that is made anew had before.
fn laid_over(stated: Settings, before: Option<&Vf>) -> Settings {
    let Some(before) = before.map(|vf| vf.settings) else { return stated };
    // What is as it is in any new VF goes without saying; without a VLAN there is no tag.
    let tagged = stated.vlan != Some(0);
    let rate = |rate: Option<u32>| rate.filter(|rate| *rate != 0);
    Settings {
        mac: stated.mac.or(before.mac.filter(|mac| mac.is_station())),
        vlan: stated.vlan.or(before.vlan.filter(|vlan| *vlan != 0)),
        qos: stated.qos.or(before.qos.filter(|qos| tagged && *qos != 0)),
        proto: stated.proto.or(before.proto.filter(|proto| tagged && *proto != VlanProto::default())),
        trust: stated.trust.or(before.trust.filter(|on| *on)),
        spoofchk: stated.spoofchk.or(before.spoofchk),
        link_state: stated.link_state.or(before.link_state.filter(|state| *state != LinkState::default())),
        min_rate: stated.min_rate.or(rate(before.min_rate)),
        max_rate: stated.max_rate.or(rate(before.max_rate)),
    }
}

/// As netlink takes them; what goes along with something stated is as it was.
fn sets(stated: &Settings, now: Option<Settings>) -> Vec<VfSet> {
    let now = now.unwrap_or_default();
    let mut sets = Vec::new();
    sets.extend(stated.mac.map(VfSet::Mac));
    if stated.vlan.is_some() || stated.qos.is_some() || stated.proto.is_some() {
        let vlan = stated.vlan.or(now.vlan).unwrap_or(0);
        // Without a VLAN there is no tag that could have a priority or a kind.
        let tag = |stated: Option<u8>, now: Option<u8>| if vlan == 0 { stated } else { stated.or(now) };
        let proto = if vlan == 0 { stated.proto } else { stated.proto.or(now.proto) };
        sets.push(VfSet::Vlan(vlan, tag(stated.qos, now.qos).unwrap_or(0), proto.unwrap_or_default()));
    }
    sets.extend(stated.trust.map(VfSet::Trust));
    sets.extend(stated.spoofchk.map(VfSet::Spoofchk));
    if stated.min_rate.is_some() || stated.max_rate.is_some() {
        let (min, max) = (stated.min_rate.or(now.min_rate), stated.max_rate.or(now.max_rate));
        sets.push(VfSet::Rate(min.unwrap_or(0), max.unwrap_or(0)));
    }
    sets.extend(stated.link_state.map(VfSet::LinkState));
    sets
}
