//! What a host should look like: the file that `plan` and `apply` read and `save` writes.

use std::collections::BTreeSet;
use std::fmt::Write;

use serde::{Deserialize, Serialize};

use crate::host::{EswitchMode, Settings};
use crate::pci::PciAddr;
use crate::state::State;

/// What is wanted. What it does not say stays as it is.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Wanted {
    /// Functions that are to have VFs.
    #[serde(rename = "pf", skip_serializing_if = "Vec::is_empty")]
    pub pfs: Vec<WantedPf>,
    /// Mediated devices that are to be there.
    #[serde(rename = "mdev", skip_serializing_if = "Vec::is_empty")]
    pub mdevs: Vec<WantedMdev>,
    /// Whether there are to be no other mediated devices: when undoing.
    #[serde(skip)]
    pub no_other_mdevs: bool,
}

/// A function and its VFs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct WantedPf {
    /// Where it is.
    pub address: PciAddr,
    /// How many VFs it is to have.
    pub vfs: u32,
    /// Whether its interface is to be up.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub up: Option<bool>,
    /// Whether new VFs are bound to drivers by themselves.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub autoprobe: Option<bool>,
    /// Mode of its embedded switch.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub eswitch: Option<EswitchMode>,
    /// Its VFs.
    #[serde(rename = "vf", default, skip_serializing_if = "Vec::is_empty")]
    pub vf: Vec<WantedVf>,
}

/// A VF.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct WantedVf {
    /// Its number.
    pub index: u32,
    /// What it is to be bound to: a driver's name, `none`, or `default` for what the kernel would choose.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub driver: Option<String>,
    /// The only driver that may be bound to it, `driver` unless this says otherwise; empty for any.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub driver_override: Option<String>,
    /// MSI-X vectors that it is to have.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub msix: Option<u16>,
    /// What its PF's interface is to know of it.
    #[serde(flatten)]
    pub settings: Settings,
}

/// A mediated device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct WantedMdev {
    /// Its name.
    pub uuid: String,
    /// The function that it is a share of.
    pub parent: PciAddr,
    /// Its type.
    #[serde(rename = "type")]
    pub kind: String,
}

/// A driver that is not one: with it in `driver_override`, none is bound.
pub const NONE: &str = "none";

/// As a driver: what the kernel would choose.
pub const DEFAULT: &str = "default";

impl Wanted {
    /// The present state, all of it: what `save` writes, and what is gone back to.
    pub fn of(state: &State) -> Wanted {
        let pfs = state.pfs.iter().map(|pf| WantedPf {
            address: pf.address(),
            vfs: pf.vfs.len() as u32,
            up: pf.function.interfaces.first().map(|i| i.up),
            autoprobe: pf.autoprobe,
            eswitch: pf.eswitch,
            vf: pf
                .vfs
                .iter()
                .map(|vf| {
                    let (driver, over) = (&vf.function.driver, &vf.function.driver_override);
                    let driver = driver.clone().unwrap_or_else(|| NONE.into());
                    WantedVf {
                        index: vf.index,
                        driver_override: (over.as_ref() != Some(&driver))
                            .then(|| over.clone().unwrap_or_default()),
                        driver: Some(driver),
                        msix: pf.deals_msix.then_some(vf.function.msix).flatten(),
                        settings: vf.settings,
                    }
                })
                .collect(),
        });
        let mdevs = state.mdevs.iter().map(|m| WantedMdev {
            uuid: m.uuid.clone(),
            parent: m.parent,
            kind: m.kind.clone(),
        });
        Wanted { pfs: pfs.collect(), mdevs: mdevs.collect(), no_other_mdevs: false }
    }

    /// Only what is said of some functions.
    #[must_use]
    pub fn only(mut self, pfs: &BTreeSet<PciAddr>) -> Wanted {
        self.pfs.retain(|pf| pfs.contains(&pf.address));
        self
    }

    /// As a file, with names for people beside the addresses.
    pub fn to_file(&self, state: &State) -> String {
        let mut text = String::from("# What this host is to look like, for `sriov apply`.\n");
        for pf in &self.pfs {
            let now = state.pfs.iter().find(|p| p.address() == pf.address);
            let names: Vec<_> =
                now.into_iter().flat_map(|p| &p.function.interfaces).map(|i| &*i.name).collect();
            let class = now.map_or("", |p| crate::pci::class_name(p.function.class));
            let _ = writeln!(text, "\n# {class} {}", names.join(" "));
            let one = Wanted { pfs: vec![pf.clone()], ..Wanted::default() };
            text += &toml::to_string(&one).expect("a file can say all that is wanted");
        }
        if !self.mdevs.is_empty() {
            text.push('\n');
            let mdevs = Wanted { mdevs: self.mdevs.clone(), ..Wanted::default() };
            text += &toml::to_string(&mdevs).expect("a file can say all that is wanted");
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::VlanProto;

    #[test]
    fn a_file_says_what_is_wanted() {
        let text = r#"
            [[pf]]
            address = "0000:01:00.0"
            vfs = 4
            autoprobe = false
            eswitch = "switchdev"

            [[pf.vf]]
            index = 2
            driver = "vfio-pci"
            mac = "52:54:00:00:00:02"
            vlan = 7
            proto = "802.1ad"
            link-state = "enable"
            max-rate = 1000
        "#;
        let wanted = toml::from_str::<Wanted>(text).unwrap();
        let pf = &wanted.pfs[0];
        assert_eq!((pf.vfs, pf.autoprobe, pf.eswitch), (4, Some(false), Some(EswitchMode::Switchdev)));
        let vf = &pf.vf[0];
        assert_eq!((vf.index, vf.driver.as_deref()), (2, Some("vfio-pci")));
        assert_eq!(vf.settings.proto, Some(VlanProto::Dot1Ad));
        assert_eq!(vf.settings.trust, None);
        assert_eq!(toml::from_str::<Wanted>(&toml::to_string(&wanted).unwrap()).unwrap(), wanted);
    }
}
