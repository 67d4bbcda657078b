//! A host that is described in a directory: its sysfs, as far as we read it, and `host.json` with what is known beside.
//!
//! Written to, it does what Linux would (drivers/pci/iov.c, pci-sysfs.c, pci-driver.c): plans are tried on it, away from
//! the machine, and tests run on it without root.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use nix::libc::{EBUSY, EINVAL, ENODEV, ENOENT, ENOSPC, EOPNOTSUPP, EPROTONOSUPPORT, ERANGE};
use serde::{Deserialize, Serialize};

use super::{Busy, Elsewhere, EswitchMode, Facts, Host, Link, PortSet, Process, Refused, Settings, VfSet};
use crate::file::NONE;
use crate::pci::PciAddr;
use crate::state::DEVICES;
use crate::sysfs;

/// The file with what is known of the host beside its sysfs.
pub const FACTS: &str = "host.json";

/// What is in that file.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default, rename_all = "kebab-case")]
struct Described {
    facts: Facts,
    /// What VFs of a PF are like: for trying plans.
    vfs: BTreeMap<PciAddr, Kind>,
}

/// What VFs of a PF are like.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default, rename_all = "kebab-case", deny_unknown_fields)]
struct Kind {
    /// The driver that the kernel chooses for them.
    driver: Option<String>,
    /// What the PF's interface says of a new one.
    settings: Settings,
    /// MSI-X vectors of a new one.
    msix: u16,
    /// What the PF's driver does not take: `link-state`, `min-rate`, `802.1ad`, `trust`, `spoofchk`, `max-rate`.
    refuses: Vec<String>,
    /// Whether the PF's driver makes VFs only while its interface is up, and says yes all the same otherwise (bnxt_en).
    only_while_up: bool,
}

/// A host in a directory.
#[derive(Debug)]
pub struct DirHost {
    dir: PathBuf,
    /// Files are read, changed and written back.
    lock: Mutex<()>,
}

impl DirHost {
    /// The host that is described in `dir`.
    pub fn new(dir: &Path) -> DirHost {
        DirHost { dir: dir.to_owned(), lock: Mutex::new(()) }
    }

    fn described(&self) -> io::Result<Described> {
        match fs::read(self.dir.join(FACTS)) {
            Ok(bytes) => serde_json::from_slice(&bytes)
                .map_err(|e| io::Error::other(format!("{}: {e}", self.dir.join(FACTS).display()))),
            // A plain copy of /sys: nothing is known beside it.
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(Described::default()),
            Err(e) => Err(e),
        }
    }

    fn save(&self, described: &Described) -> io::Result<()> {
        let text = serde_json::to_string_pretty(described).expect("facts are plain data");
        fs::write(self.dir.join(FACTS), text + "\n")
    }

    fn device(&self, address: PciAddr) -> PathBuf {
        self.dir.join(DEVICES).join(address.to_string())
    }

    fn pf_of(&self, vf: PciAddr) -> Option<PciAddr> {
        sysfs::link_name(&self.device(vf).join("physfn"))?.parse().ok()
    }

    fn num_vfs(&self, pf: PciAddr, n: u32) -> Result<(), Refused> {
        let dir = self.device(pf);
        let total: u32 = sysfs::number(&dir.join("sriov_totalvfs"))?.ok_or(Refused::errno(ENOENT))?;
        let there = (0..total).filter(|i| dir.join(format!("virtfn{i}")).exists()).count() as u32;
        if n > total {
            return Err(Refused::errno(ERANGE));
        }
        if n == there {
            return Ok(());
        }
        if !dir.join("driver").exists() {
            return Err(Refused::errno(ENOENT));
        }
        if n > 0 && there > 0 {
            return Err(Refused::errno(EBUSY));
        }
        let described = self.described()?;
        let is_up = |name: &String| described.facts.links.get(name).is_some_and(|link| link.up);
        if n > 0
            && described.vfs.get(&pf).is_some_and(|kind| kind.only_while_up)
            && !sysfs::names(&dir.join("net")).iter().any(is_up)
        {
            return Ok(());
        }
        for i in 0..there {
            self.remove_vf(pf, i)?;
        }
        for i in 0..n {
            self.make_vf(pf, i)?;
        }
        fs::write(dir.join("sriov_numvfs"), format!("{n}\n"))?;
        Ok(())
    }

    fn make_vf(&self, pf: PciAddr, i: u32) -> io::Result<()> {
        let mut described = self.described()?;
        let dir = self.device(pf);
        let number = |name: &str| Ok::<u32, io::Error>(sysfs::number(&dir.join(name))?.unwrap_or(1));
        let by = number("sriov_offset")? + i * number("sriov_stride")?;
        let address = pf.offset(by).ok_or(io::Error::from_raw_os_error(ENOSPC))?;
        let vf = self.device(address);
        fs::create_dir_all(&vf)?;
        for name in ["class", "vendor", "numa_node"] {
            if let Some(text) = sysfs::text(&dir.join(name))? {
                fs::write(vf.join(name), text + "\n")?;
            }
        }
        if let Some(device) = sysfs::text(&dir.join("sriov_vf_device"))? {
            fs::write(vf.join("device"), format!("0x{}\n", device.trim_start_matches("0x")))?;
        }
        fs::write(vf.join("driver_override"), "(null)\n")?;
        if dir.join("sriov_vf_total_msix").exists() {
            fs::write(vf.join("sriov_vf_msix_count"), "")?;
        }
        symlink(format!("../{pf}"), vf.join("physfn"))?;
        symlink(format!("../{address}"), dir.join(format!("virtfn{i}")))?;
        let groups = self.dir.join("kernel/iommu_groups");
        if groups.is_dir() {
            // The kernel counts; here a number says whose it is, so that the same host is the same.
            let number = by_address(address);
            fs::create_dir_all(groups.join(format!("{number}/devices")))?;
            symlink(
                format!("../../../../{DEVICES}/{address}"),
                groups.join(format!("{number}/devices/{address}")),
            )?;
            symlink(format!("../../../../kernel/iommu_groups/{number}"), vf.join("iommu_group"))?;
        }
        let kind = described.vfs.get(&pf).cloned().unwrap_or_default();
        if kind.msix > 0 {
            fs::write(vf.join("config"), config(kind.msix))?;
        }
        if let Some(interface) = sysfs::names(&dir.join("net")).first() {
            described.facts.links.entry(interface.clone()).or_default().vfs.insert(i, kind.settings);
            self.save(&described)?;
        }
        if sysfs::number::<u8>(&dir.join("sriov_drivers_autoprobe"))? != Some(0) {
            self.probe(address)?;
        }
        Ok(())
    }

    fn remove_vf(&self, pf: PciAddr, i: u32) -> io::Result<()> {
        let dir = self.device(pf);
        let link = dir.join(format!("virtfn{i}"));
        let Some(address) = sysfs::link_name(&link).and_then(|name| name.parse().ok()) else { return Ok(()) };
        if self.device(address).join("driver").exists() {
            self.unbind(address)?;
        }
        if let Some(group) = sysfs::link_name(&self.device(address).join("iommu_group")) {
            let group = self.dir.join("kernel/iommu_groups").join(group);
            fs::remove_file(group.join("devices").join(address.to_string()))?;
            if sysfs::names(&group.join("devices")).is_empty() {
                fs::remove_dir_all(group)?;
            }
        }
        fs::remove_dir_all(self.device(address))?;
        fs::remove_file(link)?;
        let mut described = self.described()?;
        for interface in sysfs::names(&dir.join("net")) {
            if let Some(link) = described.facts.links.get_mut(&interface) {
                link.vfs.remove(&i);
            }
        }
        self.save(&described)
    }

    /// The driver that the kernel would choose, and whether it is there.
    fn choice(&self, address: PciAddr) -> io::Result<Option<String>> {
        let only = sysfs::text(&self.device(address).join("driver_override"))?
            .filter(|n| !n.is_empty() && n != "(null)");
        let described = self.described()?;
        // `pci_device_can_probe`.
        let by_itself = self.pf_of(address).map(|pf| self.device(pf).join("sriov_drivers_autoprobe"));
        if only.is_none() && by_itself.is_some_and(|file| matches!(sysfs::number::<u8>(&file), Ok(Some(0)))) {
            return Ok(None);
        }
        let native = self.pf_of(address).and_then(|pf| described.vfs.get(&pf)?.driver.clone());
        let driver = match only {
            // An override makes a driver without a table of devices match; others still need theirs.
            Some(only) if only == "vfio-pci" || only == "pci-stub" || native.as_ref() == Some(&only) => {
                Some(only)
            }
            Some(_) => None,
            None => native,
        };
        Ok(driver.filter(|name| name != NONE && self.dir.join("bus/pci/drivers").join(name).is_dir()))
    }

    fn probe(&self, address: PciAddr) -> io::Result<()> {
        if self.device(address).join("driver").exists() {
            return Ok(());
        }
        match self.choice(address)? {
            Some(driver) => self.bind(address, &driver),
            None => Ok(()),
        }
    }

    fn bind(&self, address: PciAddr, driver: &str) -> io::Result<()> {
        let device = self.device(address);
        symlink(format!("../../drivers/{driver}"), device.join("driver"))?;
        let is_network = sysfs::text(&device.join("class"))?.is_some_and(|class| class.starts_with("0x02"));
        if driver == "vfio-pci" || !is_network {
            return Ok(());
        }
        let Some(pf) = self.pf_of(address) else { return Ok(()) };
        let index = (0..256).find(|i| {
            sysfs::link_name(&self.device(pf).join(format!("virtfn{i}"))) == Some(address.to_string())
        });
        let parent =
            sysfs::names(&self.device(pf).join("net")).first().cloned().unwrap_or_else(|| "eth".into());
        let name = format!("{parent}v{}", index.unwrap_or(0));
        fs::create_dir_all(device.join("net").join(&name))?;
        fs::write(device.join("net").join(&name).join("operstate"), "down\n")?;
        let mut described = self.described()?;
        described.facts.links.insert(name, Link::default());
        self.save(&described)
    }

    fn unbind(&self, address: PciAddr) -> io::Result<()> {
        let device = self.device(address);
        let mut described = self.described()?;
        for interface in sysfs::names(&device.join("net")) {
            described.facts.links.remove(&interface);
        }
        self.save(&described)?;
        let _ = fs::remove_dir_all(device.join("net"));
        fs::remove_file(device.join("driver"))
    }

    fn mdev_create(&self, parent: PciAddr, kind: &str, uuid: &str) -> Result<(), Refused> {
        let device = self.device(parent);
        let types = device.join("mdev_supported_types").join(kind);
        let left: u32 = sysfs::number(&types.join("available_instances"))?.unwrap_or(0);
        if left == 0 {
            return Err(Refused::errno(ENOSPC));
        }
        fs::create_dir_all(device.join(uuid))?;
        symlink(format!("../mdev_supported_types/{kind}"), device.join(uuid).join("mdev_type"))?;
        let bus = self.dir.join("bus/mdev/devices");
        fs::create_dir_all(&bus)?;
        symlink(format!("../../pci/devices/{parent}/{uuid}"), bus.join(uuid))?;
        fs::write(types.join("available_instances"), format!("{}\n", left - 1))?;
        Ok(())
    }

    fn mdev_remove(&self, uuid: &str) -> Result<(), Refused> {
        let link = self.dir.join("bus/mdev/devices").join(uuid);
        let device = link.canonicalize()?;
        let types = device.join("mdev_type").canonicalize()?;
        let left: u32 = sysfs::number(&types.join("available_instances"))?.unwrap_or(0);
        fs::remove_dir_all(device)?;
        fs::remove_file(link)?;
        fs::write(types.join("available_instances"), format!("{}\n", left + 1))?;
        Ok(())
    }
}

impl Host for DirHost {
    fn sysfs(&self) -> &Path {
        &self.dir
    }

    fn facts(&self) -> io::Result<Facts> {
        Ok(self.described()?.facts)
    }

    fn holders(&self) -> BTreeMap<u32, Vec<Process>> {
        self.facts().map(|facts| facts.holders).unwrap_or_default()
    }

    fn write(&self, path: &str, text: &str) -> Result<(), Refused> {
        let _one = self.lock.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let invalid = || Refused::errno(EINVAL);
        let parts: Vec<&str> = path.split('/').collect();
        let address = |s: &str| s.trim().parse::<PciAddr>().map_err(|_| Refused::errno(ENODEV));
        match parts[..] {
            ["bus", "pci", "drivers_probe"] => {
                let address = address(text)?;
                if !self.device(address).exists() {
                    return Err(Refused::errno(ENODEV));
                }
                Ok(self.probe(address)?)
            }
            ["bus", "pci", "drivers", driver, "bind"] => {
                let address = address(text)?;
                if self.device(address).join("driver").exists() {
                    return Err(Refused::errno(EBUSY));
                }
                if self.choice(address)?.as_deref() != Some(driver) {
                    return Err(Refused::errno(ENODEV));
                }
                Ok(self.bind(address, driver)?)
            }
            ["bus", "pci", "devices", device, "driver", "unbind"] => Ok(self.unbind(address(device)?)?),
            ["bus", "pci", "devices", device, "sriov_numvfs"] => {
                self.num_vfs(address(device)?, text.trim().parse().map_err(|_| invalid())?)
            }
            ["bus", "pci", "devices", device, "sriov_drivers_autoprobe"] => Ok(fs::write(
                self.device(address(device)?).join("sriov_drivers_autoprobe"),
                format!("{text}\n"),
            )?),
            ["bus", "pci", "devices", device, "driver_override"] => {
                let file = self.device(address(device)?).join("driver_override");
                if !file.exists() {
                    return Err(Refused::errno(ENOENT));
                }
                let name = if text.trim().is_empty() { "(null)" } else { text.trim() };
                Ok(fs::write(file, format!("{name}\n"))?)
            }
            ["bus", "pci", "devices", device, "sriov_vf_msix_count"] => {
                let device = self.device(address(device)?);
                if device.join("driver").exists() {
                    return Err(Refused::errno(EBUSY));
                }
                Ok(fs::write(device.join("config"), config(text.trim().parse().map_err(|_| invalid())?))?)
            }
            ["bus", "pci", "devices", device, "mdev_supported_types", kind, "create"] => {
                self.mdev_create(address(device)?, kind, text.trim())
            }
            ["bus", "mdev", "devices", uuid, "remove"] => self.mdev_remove(uuid),
            _ => Err(Refused::errno(ENOENT)),
        }
    }

    fn set_vf(&self, interface: &str, vf: u32, set: VfSet) -> Result<(), Refused> {
        let mut described = self.described()?;
        let refuses = |what: &str| {
            let owns = |pf: &PciAddr| self.device(*pf).join("net").join(interface).exists();
            described.vfs.iter().any(|(pf, kind)| owns(pf) && kind.refuses.iter().any(|r| r == what))
        };
        // As igb does.
        let errno = match set {
            VfSet::LinkState(_) if refuses("link-state") => Some(EOPNOTSUPP),
            VfSet::Rate(min, _) if min > 0 && refuses("min-rate") => Some(EINVAL),
            VfSet::Rate(..) if refuses("max-rate") => Some(EOPNOTSUPP),
            VfSet::Vlan(.., super::VlanProto::Dot1Ad) if refuses("802.1ad") => Some(EPROTONOSUPPORT),
            VfSet::Trust(_) if refuses("trust") => Some(EOPNOTSUPP),
            VfSet::Spoofchk(_) if refuses("spoofchk") => Some(EOPNOTSUPP),
            _ => None,
        };
        if let Some(errno) = errno {
            return Err(Refused::errno(errno));
        }
        let link = described.facts.links.get_mut(interface).ok_or(Refused::errno(ENODEV))?;
        set.put(link.vfs.get_mut(&vf).ok_or(Refused::errno(EINVAL))?);
        Ok(self.save(&described)?)
    }

    fn set_up(&self, interface: &str, up: bool) -> Result<(), Refused> {
        let mut described = self.described()?;
        described.facts.links.get_mut(interface).ok_or(Refused::errno(ENODEV))?.up = up;
        Ok(self.save(&described)?)
    }

    fn wait_link(&self, _interface: &str) {}

    fn set_eswitch(&self, pf: PciAddr, mode: EswitchMode) -> Result<(), Refused> {
        let mut described = self.described()?;
        *described.facts.eswitch.get_mut(&pf).ok_or(Refused::errno(EOPNOTSUPP))? = mode;
        Ok(self.save(&described)?)
    }

    fn set_port(&self, pf: PciAddr, port: u32, set: PortSet) -> Result<(), Refused> {
        let mut described = self.described()?;
        let port = described.facts.ports.iter_mut().find(|p| p.pf == pf && p.index == port);
        let port = port.ok_or(Refused::errno(ENODEV))?;
        match set {
            PortSet::Mac(mac) => port.mac = Some(mac),
            PortSet::Active(active) => port.active = Some(active),
        }
        Ok(self.save(&described)?)
    }

    fn load_module(&self, name: &str) -> Result<(), Refused> {
        Ok(fs::create_dir_all(self.dir.join("bus/pci/drivers").join(name.replace('_', "-")))?)
    }

    fn reclaim(&self, lost: &Elsewhere) -> Result<(), Refused> {
        let mut described = self.described()?;
        described.facts.elsewhere.retain(|e| e != lost);
        fs::create_dir_all(self.device(lost.address).join("net").join(&lost.interface))?;
        Ok(self.save(&described)?)
    }
}

/// A number for the IOMMU group of a function that is alone in it.
fn by_address(address: PciAddr) -> u32 {
    1000 + (u32::from(address.bus) << 8 | u32::from(address.device) << 3 | u32::from(address.function))
}

/// Configuration space with nothing in it but an MSI-X capability.
fn config(vectors: u16) -> [u8; 256] {
    let mut config = [0; 256];
    (config[6], config[0x34], config[0x40]) = (0x10, 0x40, 0x11);
    config[0x42..0x44].copy_from_slice(&vectors.saturating_sub(1).to_le_bytes());
    config
}

/// Records a host in a directory: what we read of its sysfs, and the facts.
pub fn record(host: &dyn Host, to: &Path) -> io::Result<()> {
    const FILES: [&str; 11] = [
        "class",
        "vendor",
        "device",
        "numa_node",
        "driver_override",
        "config",
        "sriov_totalvfs",
        "sriov_drivers_autoprobe",
        "sriov_offset",
        "sriov_stride",
        "sriov_vf_device",
    ];
    let from = host.sysfs();
    let write = |path: PathBuf, bytes: Vec<u8>| {
        fs::create_dir_all(path.parent().expect("a path below a directory"))?;
        fs::write(path, bytes)
    };
    let facts = host.facts()?;
    if facts.busy != Busy::Nothing {
        return Err(io::Error::other("something is being changed right now: wait for that"));
    }
    for name in sysfs::names(&from.join(DEVICES)) {
        let (device, copy) = (from.join(DEVICES).join(&name), to.join(DEVICES).join(&name));
        fs::create_dir_all(&copy)?;
        for file in FILES {
            if let Ok(bytes) = fs::read(device.join(file)) {
                write(copy.join(file), bytes)?;
            }
        }
        if let Some(total) = sysfs::text(&device.join("sriov_vf_total_msix"))? {
            write(copy.join("sriov_vf_total_msix"), total.into_bytes())?;
        }
        for file in sysfs::names(&device) {
            let target = sysfs::link_name(&device.join(&file)).unwrap_or_default();
            match &*file {
                "driver" => {
                    fs::create_dir_all(to.join("bus/pci/drivers").join(&target))?;
                    symlink(format!("../../drivers/{target}"), copy.join(file))?;
                }
                "iommu_group" => {
                    let devices = to.join(format!("kernel/iommu_groups/{target}/devices"));
                    fs::create_dir_all(&devices)?;
                    symlink(format!("../../../../{DEVICES}/{name}"), devices.join(&name))?;
                    symlink(format!("../../../../kernel/iommu_groups/{target}"), copy.join(file))?;
                }
                "physfn" => symlink(format!("../{target}"), copy.join(file))?,
                file if file.starts_with("virtfn") => symlink(format!("../{target}"), copy.join(file))?,
                _ => {}
            }
        }
        for interface in sysfs::names(&device.join("net")) {
            fs::create_dir_all(copy.join("net").join(&interface))?;
            for file in ["operstate", "speed"] {
                if let Ok(Some(text)) = sysfs::text(&device.join("net").join(&interface).join(file)) {
                    write(copy.join("net").join(&interface).join(file), text.into_bytes())?;
                }
            }
        }
        for kind in sysfs::names(&device.join("mdev_supported_types")) {
            for file in ["name", "available_instances"] {
                let path = Path::new("mdev_supported_types").join(&kind).join(file);
                if let Ok(bytes) = fs::read(device.join(&path)) {
                    write(copy.join(path), bytes)?;
                }
            }
        }
    }
    for driver in sysfs::names(&from.join("bus/pci/drivers")) {
        fs::create_dir_all(to.join("bus/pci/drivers").join(driver))?;
    }
    DirHost::new(to).save(&Described { facts, vfs: BTreeMap::new() })
}
