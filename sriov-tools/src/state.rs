//! What a host is like: SR-IOV functions, their VFs, and who uses what.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};

use netaddr::MacAddr;
use serde::Serialize;

use crate::host::{EswitchMode, Facts, Host, Settings};
use crate::pci::PciAddr;
use crate::sysfs;

/// A host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct State {
    /// Whether an IOMMU is on: whether any device is in a group.
    pub iommu: bool,
    /// Whether VFIO may go without (`enable_unsafe_noiommu_mode`).
    pub noiommu: bool,
    /// Functions that can have VFs.
    pub pfs: Vec<Pf>,
    /// Functions that can be shared by mediated devices, and their types.
    pub mdev_types: Vec<MdevType>,
    /// Mediated devices.
    pub mdevs: Vec<Mdev>,
    /// Drivers that PCI devices can be bound to now.
    #[serde(skip)]
    pub drivers: Vec<String>,
    /// Addresses of this host's own interfaces.
    #[serde(skip)]
    pub macs: BTreeMap<String, MacAddr>,
}

/// What PF and VF have in common.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Function {
    /// Where it is.
    pub address: PciAddr,
    /// Class code, 24 bits.
    pub class: u32,
    /// Who made it.
    pub vendor: u16,
    /// What it is.
    pub device: u16,
    /// What it is bound to.
    pub driver: Option<String>,
    /// The only driver that may be bound to it.
    pub driver_override: Option<String>,
    /// The NUMA node that it is near to.
    pub numa_node: Option<u32>,
    /// Its IOMMU group.
    pub iommu_group: Option<Group>,
    /// Its interfaces here.
    pub interfaces: Vec<Interface>,
    /// MSI-X vectors that it has.
    pub msix: Option<u16>,
    /// Who uses it.
    pub users: Vec<String>,
}

/// An IOMMU group: what can only be handed over together. Its number changes between boots.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Group {
    /// The number.
    pub number: u32,
    /// All functions in it.
    pub members: Vec<Member>,
}

/// A function of an IOMMU group.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Member {
    /// Where it is.
    pub address: PciAddr,
    /// What it is bound to.
    pub driver: Option<String>,
}

/// An interface, as sysfs has it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Interface {
    /// Its name.
    pub name: String,
    /// `up`, `down`...
    pub operstate: String,
    /// Megabits a second, if it has a link.
    pub speed: Option<u32>,
    /// Whether it is set up.
    pub up: bool,
}

/// A function that can have VFs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Pf {
    /// The function itself.
    #[serde(flatten)]
    pub function: Function,
    /// VFs that it can have.
    pub total_vfs: u32,
    /// Whether new VFs are bound to drivers by themselves; none before Linux 4.12.
    pub autoprobe: Option<bool>,
    /// Whether its driver lets MSI-X vectors be dealt out among VFs.
    pub deals_msix: bool,
    /// Mode of its embedded switch, if it has one that can be set.
    pub eswitch: Option<EswitchMode>,
    /// What would be lost with it.
    pub carries: Vec<String>,
    /// Its VFs, by number.
    pub vfs: Vec<Vf>,
}

/// A virtual function.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Vf {
    /// Its number.
    pub index: u32,
    /// The function itself.
    #[serde(flatten)]
    pub function: Function,
    /// What its PF's interface knows of it.
    pub settings: Settings,
}

/// A type of mediated devices that a function can be shared as.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct MdevType {
    /// The function.
    pub parent: PciAddr,
    /// The type's name for the kernel.
    pub id: String,
    /// For people.
    pub name: Option<String>,
    /// How many more there can be.
    pub available: Option<u32>,
}

/// A mediated device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Mdev {
    /// Its name.
    pub uuid: String,
    /// The function that it is a share of.
    pub parent: PciAddr,
    /// Its type.
    #[serde(rename = "type")]
    pub kind: String,
}

impl Pf {
    /// Where it is.
    pub fn address(&self) -> PciAddr {
        self.function.address
    }

    /// The interface by which its VFs are set: of several, as in switchdev mode, the one that knows of them.
    pub fn interface<'a>(&'a self, facts: &Facts) -> Option<&'a Interface> {
        interface(&self.function.interfaces, facts)
    }
}

fn interface<'a>(interfaces: &'a [Interface], facts: &Facts) -> Option<&'a Interface> {
    let knows = |i: &&Interface| facts.links.get(&i.name).is_some_and(|link| !link.vfs.is_empty());
    interfaces.iter().find(knows).or(interfaces.first())
}

/// The directory of PCI functions, below sysfs.
pub const DEVICES: &str = "bus/pci/devices";

/// Reads what a host is like.
pub fn read(host: &dyn Host) -> io::Result<(State, Facts)> {
    let facts = host.facts()?;
    let reader = Reader { sysfs: host.sysfs(), facts: &facts };
    let state = reader.state()?;
    Ok((state, facts))
}

/// What an address or the name of an interface stands for.
pub fn resolve(state: &State, name: &str) -> Option<PciAddr> {
    if let Ok(address) = name.parse() {
        return Some(address);
    }
    let all = state
        .pfs
        .iter()
        .flat_map(|pf| std::iter::once(&pf.function).chain(pf.vfs.iter().map(|vf| &vf.function)));
    let found = all.clone().find(|f| f.interfaces.iter().any(|i| i.name == name));
    if let Some(function) = found {
        return Some(function.address);
    }
    // PF/N, as in enp1s0f0/3.
    let (pf, index) = name.rsplit_once('/')?;
    let (pf, index) = (resolve(state, pf)?, index.parse::<u32>().ok()?);
    let pf = state.pfs.iter().find(|p| p.address() == pf)?;
    Some(pf.vfs.iter().find(|vf| vf.index == index)?.function.address)
}

struct Reader<'a> {
    sysfs: &'a Path,
    facts: &'a Facts,
}

impl Reader<'_> {
    fn state(&self) -> io::Result<State> {
        let devices = self.sysfs.join(DEVICES);
        if !self.sysfs.join("bus").is_dir() {
            return Err(io::Error::other(format!(
                "{} has no directory bus: is it a sysfs?",
                self.sysfs.display()
            )));
        }
        let mut pfs = Vec::new();
        let mut mdev_types = Vec::new();
        for address in addresses(&devices) {
            let dir = devices.join(address.to_string());
            if let Some(total) = sysfs::number(&dir.join("sriov_totalvfs"))? {
                pfs.push(self.pf(address, &dir, total)?);
            }
            for id in sysfs::names(&dir.join("mdev_supported_types")) {
                let dir = dir.join("mdev_supported_types").join(&id);
                mdev_types.push(MdevType {
                    parent: address,
                    id,
                    name: sysfs::text(&dir.join("name"))?,
                    available: sysfs::number(&dir.join("available_instances"))?,
                });
            }
        }
        let noiommu = sysfs::text(&self.sysfs.join("module/vfio/parameters/enable_unsafe_noiommu_mode"))?;
        Ok(State {
            iommu: !sysfs::names(&self.sysfs.join("kernel/iommu_groups")).is_empty(),
            noiommu: noiommu.is_some_and(|on| on == "Y" || on == "1"),
            pfs,
            mdev_types,
            mdevs: self.mdevs(),
            drivers: sysfs::names(&self.sysfs.join("bus/pci/drivers")),
            macs: self
                .facts
                .links
                .iter()
                .filter_map(|(name, link)| Some((name.clone(), link.mac?)))
                .collect(),
        })
    }

    fn pf(&self, address: PciAddr, dir: &Path, total_vfs: u32) -> io::Result<Pf> {
        let function = self.function(address, dir, address)?;
        // VFs are counted by their links, as the kernel has them: `sriov_numvfs` does not answer while VFs are removed.
        let mut vfs = Vec::new();
        let settings =
            interface(&function.interfaces, self.facts).and_then(|i| self.facts.links.get(&i.name));
        for index in 0..total_vfs {
            let Some(vf) = sysfs::link_name(&dir.join(format!("virtfn{index}"))).and_then(|n| n.parse().ok())
            else {
                break;
            };
            let settings = settings.and_then(|link| link.vfs.get(&index)).copied().unwrap_or_default();
            let mut function = self.function(vf, &self.dir(vf), address)?;
            function.users = self.users(&function);
            vfs.push(Vf { index, function, settings });
        }
        let mut carries = Vec::new();
        for name in function.interfaces.iter().map(|i| &i.name) {
            if self.facts.default_routes.contains(name) {
                carries.push(format!("the default route ({name})"));
            }
        }
        if self.facts.root_disk.contains(&address) {
            carries.push("the root file system".to_owned());
        }
        Ok(Pf {
            total_vfs,
            autoprobe: sysfs::number::<u8>(&dir.join("sriov_drivers_autoprobe"))?.map(|on| on != 0),
            // The file is there for each function, and 0 unless its driver can; it waits for a lock of the device.
            deals_msix: !self.facts.busy.is(address)
                && sysfs::number::<u32>(&dir.join("sriov_vf_total_msix"))?.is_some_and(|total| total > 0),
            eswitch: self.facts.eswitch.get(&address).copied(),
            carries,
            vfs,
            function,
        })
    }

    fn function(&self, address: PciAddr, dir: &Path, pf: PciAddr) -> io::Result<Function> {
        let config = std::fs::read(dir.join("config")).unwrap_or_default();
        // Its file waits for a lock of the device.
        let over = if self.facts.busy.is(pf) { None } else { sysfs::text(&dir.join("driver_override"))? };
        Ok(Function {
            address,
            class: sysfs::number(&dir.join("class"))?.unwrap_or(0),
            vendor: sysfs::number(&dir.join("vendor"))?.unwrap_or(0),
            device: sysfs::number(&dir.join("device"))?.unwrap_or(0),
            driver: sysfs::link_name(&dir.join("driver")),
            driver_override: over.filter(|name| !name.is_empty() && name != "(null)"),
            numa_node: sysfs::number(&dir.join("numa_node"))?,
            iommu_group: self.group(dir),
            interfaces: sysfs::names(&dir.join("net"))
                .into_iter()
                .map(|name| self.interface(dir, name))
                .collect::<io::Result<_>>()?,
            msix: sysfs::msix_vectors(&config),
            users: Vec::new(),
        })
    }

    fn interface(&self, dir: &Path, name: String) -> io::Result<Interface> {
        let dir = dir.join("net").join(&name);
        Ok(Interface {
            operstate: sysfs::text(&dir.join("operstate"))?.unwrap_or_else(|| "unknown".into()),
            speed: sysfs::number(&dir.join("speed"))?,
            up: self.facts.links.get(&name).is_some_and(|link| link.up),
            name,
        })
    }

    fn group(&self, dir: &Path) -> Option<Group> {
        let number = sysfs::link_name(&dir.join("iommu_group"))?.parse().ok()?;
        let members = addresses(&self.sysfs.join(format!("kernel/iommu_groups/{number}/devices")));
        let member =
            |address| Member { address, driver: sysfs::link_name(&self.dir(address).join("driver")) };
        Some(Group { number, members: members.into_iter().map(member).collect() })
    }

    /// Who uses a VF.
    fn users(&self, vf: &Function) -> Vec<String> {
        let mut users = Vec::new();
        let group = vf.iommu_group.as_ref().map(|g| g.number);
        // A group without an IOMMU is its own kind of device, /dev/vfio/noiommu-N, by the same number.
        for holder in group.and_then(|g| self.facts.holders.get(&g)).into_iter().flatten() {
            users.push(format!("held through VFIO by process {holder}"));
        }
        for lost in self.facts.elsewhere.iter().filter(|e| e.address == vf.address) {
            let by = lost.process.as_ref().map_or("left over".into(), |p| format!("of process {p}"));
            users.push(format!("{} is in network namespace {} ({by})", lost.interface, lost.namespace));
        }
        for interface in vf.interfaces.iter().filter(|i| i.up) {
            users.push(format!("{} is up", interface.name));
        }
        for place in self.facts.mounts.get(&vf.address).into_iter().flatten() {
            users.push(format!("mounted at {place}"));
        }
        users
    }

    fn mdevs(&self) -> Vec<Mdev> {
        let dir = self.sysfs.join("bus/mdev/devices");
        let mdev = |uuid: String| {
            let device = dir.join(&uuid).canonicalize().ok()?;
            let parent = device.parent()?.file_name()?.to_str()?.parse().ok()?;
            Some(Mdev { kind: sysfs::link_name(&device.join("mdev_type"))?, parent, uuid })
        };
        sysfs::names(&dir).into_iter().filter_map(mdev).collect()
    }

    fn dir(&self, address: PciAddr) -> PathBuf {
        self.sysfs.join(DEVICES).join(address.to_string())
    }
}

fn addresses(dir: &Path) -> Vec<PciAddr> {
    let mut all: Vec<PciAddr> = sysfs::names(dir).iter().filter_map(|n| n.parse().ok()).collect();
    all.sort();
    all
}
