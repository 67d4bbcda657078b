//! All that is read of a host beyond sysfs, and all that is written to it.
//!
//! Plans are pure, and applying one goes through [`Host`] alone: [`real::RealHost`] is this machine, [`dir::DirHost`] one
//! that is described in a directory.

pub mod dir;
pub mod real;

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::path::Path;

use netaddr::MacAddr;
pub use netlink::Refused;
use serde::{Deserialize, Serialize};

use crate::pci::PciAddr;

/// A host: what is known of it beside sysfs, and what can be done to it.
pub trait Host: Send + Sync {
    /// Where its sysfs is.
    fn sysfs(&self) -> &Path;

    /// What is known of it beside sysfs.
    fn facts(&self) -> io::Result<Facts>;

    /// Who has which VFIO group open, by its number: part of the facts that can be had while the kernel waits for them.
    fn holders(&self) -> BTreeMap<u32, Vec<Process>>;

    /// Writes to a file of sysfs. To `sriov_numvfs` that may take as long as somebody holds a VF.
    fn write(&self, path: &str, text: &str) -> Result<(), Refused>;

    /// Sets something of a VF by the interface of its PF.
    fn set_vf(&self, interface: &str, vf: u32, set: VfSet) -> Result<(), Refused>;

    /// Sets an interface up or down.
    fn set_up(&self, interface: &str, up: bool) -> Result<(), Refused>;

    /// Gives the link of an interface that is up some seconds to be there.
    fn wait_link(&self, interface: &str);

    /// Sets the mode of a PF's embedded switch.
    fn set_eswitch(&self, pf: PciAddr, mode: EswitchMode) -> Result<(), Refused>;

    /// Sets something of the function behind a port of a PF's embedded switch.
    fn set_port(&self, pf: PciAddr, port: u32, set: PortSet) -> Result<(), Refused>;

    /// Loads a module of the kernel.
    fn load_module(&self, name: &str) -> Result<(), Refused>;

    /// Brings an interface back from another network namespace.
    fn reclaim(&self, lost: &Elsewhere) -> Result<(), Refused>;
}

/// What is known of a host beside its sysfs.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, rename_all = "kebab-case")]
pub struct Facts {
    /// Interfaces by name.
    pub links: BTreeMap<String, Link>,
    /// Interfaces that carry a default route.
    pub default_routes: Vec<String>,
    /// Functions that the root file system is on.
    pub root_disk: Vec<PciAddr>,
    /// Functions that other mounted file systems are on, and where they are mounted.
    pub mounts: BTreeMap<PciAddr, Vec<String>>,
    /// Who has a VFIO group open, by its number.
    pub holders: BTreeMap<u32, Vec<Process>>,
    /// Embedded switches and their modes.
    pub eswitch: BTreeMap<PciAddr, EswitchMode>,
    /// Ports of embedded switches.
    pub ports: Vec<Port>,
    /// Interfaces of PCI functions in other network namespaces.
    pub elsewhere: Vec<Elsewhere>,
    /// Whose files would not answer now.
    #[serde(skip)]
    pub busy: Busy,
}

/// Whose VFs are being made or removed, as far as known: some files of theirs do not answer until that is done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Busy {
    /// Nobody's.
    #[default]
    Nothing,
    /// Those of this function, by us.
    Ours(PciAddr),
    /// Anybody's: somebody else is changing something.
    Theirs,
}

impl Busy {
    /// Whether files of a function and its VFs may not answer.
    pub fn is(self, pf: PciAddr) -> bool {
        match self {
            Busy::Nothing => false,
            Busy::Ours(busy) => busy == pf,
            Busy::Theirs => true,
        }
    }
}

/// An interface, by rtnetlink.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Link {
    /// Whether it is set up (`IFF_UP`).
    pub up: bool,
    /// Its address.
    pub mac: Option<MacAddr>,
    /// What it says of its VFs.
    pub vfs: BTreeMap<u32, Settings>,
}

/// What a PF's interface knows of a VF (`IFLA_VF_*`); what its driver does not say is none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, rename_all = "kebab-case", deny_unknown_fields)]
pub struct Settings {
    /// Its address; zero is none, and then its driver makes one up.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mac: Option<MacAddr>,
    /// VLAN that its packets are put into; 0 is none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vlan: Option<u16>,
    /// Priority in that VLAN's tag.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub qos: Option<u8>,
    /// Kind of tag.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub proto: Option<VlanProto>,
    /// Whether it may change its address and be promiscuous.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub trust: Option<bool>,
    /// Whether packets with other addresses than its own are dropped.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub spoofchk: Option<bool>,
    /// What link it sees.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub link_state: Option<LinkState>,
    /// Megabits a second that it gets in any case; 0 is no promise.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub min_rate: Option<u32>,
    /// Megabits a second that it gets at most; 0 is no limit.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_rate: Option<u32>,
}

/// Kind of a VLAN tag.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum VlanProto {
    /// Customer tag.
    #[default]
    #[serde(rename = "802.1Q")]
    Dot1Q,
    /// Service tag, as for QinQ.
    #[serde(rename = "802.1ad")]
    Dot1Ad,
}

impl fmt::Display for VlanProto {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            VlanProto::Dot1Q => "802.1Q",
            VlanProto::Dot1Ad => "802.1ad",
        })
    }
}

/// The link that a VF sees.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum LinkState {
    /// The PF's.
    #[default]
    Auto,
    /// Up.
    Enable,
    /// Down.
    Disable,
}

impl fmt::Display for LinkState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            LinkState::Auto => "auto",
            LinkState::Enable => "enable",
            LinkState::Disable => "disable",
        })
    }
}

/// One thing to set of a VF, as netlink takes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum VfSet {
    /// Its address.
    Mac(MacAddr),
    /// The VLAN, its priority and kind of tag, which are set at once.
    Vlan(u16, u8, VlanProto),
    /// Trust.
    Trust(bool),
    /// Spoof check.
    Spoofchk(bool),
    /// Least and most megabits a second, which are set at once.
    Rate(u32, u32),
    /// The link that it sees.
    LinkState(LinkState),
}

impl VfSet {
    /// Whether `now` is like that already.
    pub fn holds(&self, now: &Settings) -> bool {
        match *self {
            VfSet::Mac(mac) => now.mac == Some(mac),
            VfSet::Vlan(vlan, qos, proto) => {
                now.vlan == Some(vlan)
                    && now.qos.unwrap_or(0) == qos
                    && now.proto.unwrap_or_default() == proto
            }
            VfSet::Trust(on) => now.trust == Some(on),
            VfSet::Spoofchk(on) => now.spoofchk == Some(on),
            VfSet::Rate(min, max) => now.min_rate.unwrap_or(0) == min && now.max_rate == Some(max),
            VfSet::LinkState(state) => now.link_state == Some(state),
        }
    }

    /// Does it, where settings are a record.
    pub fn put(&self, into: &mut Settings) {
        match *self {
            VfSet::Mac(mac) => into.mac = Some(mac),
            VfSet::Vlan(vlan, qos, proto) => {
                (into.vlan, into.qos, into.proto) = (Some(vlan), Some(qos), Some(proto));
            }
            VfSet::Trust(on) => into.trust = Some(on),
            VfSet::Spoofchk(on) => into.spoofchk = Some(on),
            VfSet::Rate(min, max) => (into.min_rate, into.max_rate) = (Some(min), Some(max)),
            VfSet::LinkState(state) => into.link_state = Some(state),
        }
    }
}

impl fmt::Display for VfSet {
    /// In the words of `ip link set PF vf N`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            VfSet::Mac(mac) => write!(f, "mac {mac}"),
            VfSet::Vlan(0, 0, VlanProto::Dot1Q) => write!(f, "vlan 0 (none)"),
            VfSet::Vlan(vlan, qos, proto) => write!(f, "vlan {vlan} qos {qos} proto {proto}"),
            VfSet::Trust(on) => write!(f, "trust {}", on_off(*on)),
            VfSet::Spoofchk(on) => write!(f, "spoofchk {}", on_off(*on)),
            VfSet::Rate(min, max) => write!(f, "min_tx_rate {min} max_tx_rate {max}"),
            VfSet::LinkState(state) => write!(f, "state {state}"),
        }
    }
}

/// `on` or `off`.
pub fn on_off(on: bool) -> &'static str {
    if on { "on" } else { "off" }
}

/// Mode of an embedded switch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum EswitchMode {
    /// Forwards by address and VLAN, set by the PF's interface.
    Legacy,
    /// Forwards by what is set on an interface for each VF, its representor.
    Switchdev,
}

impl fmt::Display for EswitchMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            EswitchMode::Legacy => "legacy",
            EswitchMode::Switchdev => "switchdev",
        })
    }
}

/// A port of an embedded switch, by devlink.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Port {
    /// The PF that it belongs to.
    pub pf: PciAddr,
    /// devlink's number for it.
    pub index: u32,
    /// What it is for: physical, pcipf, pcivf, pcisf.
    pub flavour: String,
    /// The VF behind it.
    pub vf: Option<u32>,
    /// Its interface, the representor.
    pub interface: Option<String>,
    /// Address of the function behind it.
    pub mac: Option<MacAddr>,
    /// Whether that function is active, where the driver lets one say so.
    pub active: Option<bool>,
}

/// One thing to set of the function behind a port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PortSet {
    /// Its address.
    Mac(MacAddr),
    /// Whether it is active.
    Active(bool),
}

/// A process that holds something.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Process {
    /// Its number.
    pub pid: u32,
    /// Its name.
    pub command: String,
}

impl fmt::Display for Process {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({})", self.pid, self.command)
    }
}

/// An interface of a PCI function that is in another network namespace.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Elsewhere {
    /// The function.
    pub address: PciAddr,
    /// The interface's name there.
    pub interface: String,
    /// A path to the namespace: `/run/netns/NAME` or `/proc/PID/ns/net`.
    pub namespace: String,
    /// A process in it, if there is one: a namespace without is left over.
    pub process: Option<Process>,
}
