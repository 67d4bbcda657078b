//! The command line.

use std::path::PathBuf;

use clap::{Parser, Subcommand};
use netaddr::MacAddr;

use crate::export::Format;
use crate::file::WantedVf;
use crate::host::{EswitchMode, LinkState, PortSet, VlanProto};
use daemon::on_off;

/// Virtual functions (SR-IOV) set up, described and handed out.
///
/// PF and VF are PCI addresses (0000:01:00.0), names of interfaces, or for a VF also PF/NUMBER.
#[derive(Debug, Parser)]
#[command(name = "sriov", version, max_term_width = 110)]
pub struct Cli {
    /// A host that is described in a directory (`sriov record`) instead of this one; what is changed is changed there
    #[arg(long, global = true, value_name = "DIR")]
    pub sysfs: Option<PathBuf>,

    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// How changes are made.
#[derive(Clone, Copy, Debug, clap::Args)]
pub struct How {
    /// Go on although something is in use, or carries the default route or the root file system
    #[arg(long)]
    pub force: bool,

    /// How long the kernel may take to make or remove VFs: it waits for whoever holds one
    #[arg(long, value_name = "SECONDS", default_value_t = 30, value_parser = clap::value_parser!(u64).range(1..=3600))]
    pub timeout: u64,
}

/// What to do.
#[allow(missing_docs)] // flattened options
#[derive(Debug, Subcommand)]
pub enum Command {
    /// List functions with SR-IOV
    List {
        /// All there is to know, for programs
        #[arg(long, conflicts_with = "tree")]
        json: bool,
        /// With their VFs, as a tree
        #[arg(long)]
        tree: bool,
    },
    /// Show a function and its VFs; ! marks a driver that alone may be bound
    Show {
        /// The function
        pf: String,
        /// All there is to know, for programs
        #[arg(long)]
        json: bool,
    },
    /// Give a function so many VFs; those that were there keep their settings
    Create {
        /// The function
        pf: String,
        /// How many
        n: u32,
        /// Leave new VFs without a driver, as for virtual machines
        #[arg(long)]
        unbound: bool,
        #[command(flatten)]
        how: How,
    },
    /// Remove all VFs of a function
    Remove {
        /// The function
        pf: String,
        #[command(flatten)]
        how: How,
    },
    /// Set what a function's interface knows of a VF: mac, vlan, qos, proto (802.1Q or 802.1ad), trust, spoofchk (on or off),
    /// link-state (auto, enable or disable), min-rate, max-rate (megabits a second), msix (vectors)
    Set {
        /// The function
        pf: String,
        /// The VF's number
        vf: u32,
        /// What to set
        #[arg(required = true, value_name = "KEY=VALUE")]
        what: Vec<String>,
        #[command(flatten)]
        how: How,
    },
    /// Bind a VF to vfio-pci, another driver, none, or the one that the kernel chooses (default)
    Bind {
        /// The VF
        vf: String,
        /// The driver
        driver: String,
        #[command(flatten)]
        how: How,
    },
    /// Set the mode of a function's embedded switch (devlink)
    Eswitch {
        /// The function
        pf: String,
        /// The mode
        mode: EswitchMode,
        #[command(flatten)]
        how: How,
    },
    /// List ports of a function's embedded switch, or set the function behind one: mac=ADDRESS, state=active or inactive (devlink)
    Port {
        /// The function
        pf: String,
        /// The port's number
        #[arg(requires = "what")]
        port: Option<u32>,
        /// What to set
        #[arg(value_name = "KEY=VALUE", value_parser = port_set)]
        what: Vec<PortSet>,
    },
    /// Mediated devices, as some GPUs are shared
    #[command(subcommand)]
    Mdev(Mdev),
    /// Print what `apply` would do, and what would be lost; changes nothing
    Plan {
        /// What the host is to look like (TOML)
        file: PathBuf,
    },
    /// Make the host look like that; go back if something fails
    Apply {
        /// What the host is to look like (TOML)
        file: PathBuf,
        #[command(flatten)]
        how: How,
    },
    /// Print what the host looks like, as a file for `apply`
    Save,
    /// Print what hands a VF over
    Export {
        /// The VF
        vf: String,
        /// Whom for
        format: Format,
    },
    /// Bring a VF's interface back from another network namespace
    Reclaim {
        /// The VF (by its address or PF/NUMBER) or PF
        function: String,
    },
    /// Record this host in a new directory, for --sysfs
    Record {
        /// The directory
        dir: PathBuf,
    },
    /// Write a text to a file of sysfs; exits with the error number
    #[command(hide = true)]
    WriteFile {
        /// The file
        file: PathBuf,
        /// The text
        text: String,
    },
}

/// Mediated devices.
#[derive(Debug, Subcommand)]
pub enum Mdev {
    /// List types that there can be, and devices that there are
    List {
        /// For programs
        #[arg(long)]
        json: bool,
    },
    /// Make one
    Create {
        /// The function that it is a share of
        parent: String,
        /// Its type
        #[arg(value_name = "TYPE")]
        kind: String,
        /// Its name: a UUID, such as of uuidgen
        uuid: String,
    },
    /// Remove one
    Remove {
        /// Its name
        uuid: String,
    },
}

fn number<T: std::str::FromStr>(key: &str, value: &str) -> Result<T, String> {
    value.parse().map_err(|_| format!("{key}={value}: write a number"))
}

/// What `set` is to set of a VF.
pub fn wanted_vf(index: u32, pairs: &[String]) -> Result<WantedVf, String> {
    let mut vf = WantedVf { index, ..WantedVf::default() };
    let s = &mut vf.settings;
    for pair in pairs {
        let (key, value) = pair.split_once('=').ok_or(format!("'{pair}' is no KEY=VALUE"))?;
        match key {
            "mac" => s.mac = Some(value.parse::<MacAddr>().map_err(|e| e.to_string())?),
            "vlan" => s.vlan = Some(number(key, value)?),
            "qos" => s.qos = Some(number(key, value)?),
            "proto" => {
                s.proto = Some(match &*value.to_ascii_lowercase() {
                    "802.1q" => VlanProto::Dot1Q,
                    "802.1ad" => VlanProto::Dot1Ad,
                    _ => return Err(format!("proto is 802.1Q or 802.1ad, not '{value}'")),
                });
            }
            "trust" => s.trust = Some(on_off(value).map_err(|e| format!("{key}: {e}"))?),
            "spoofchk" => s.spoofchk = Some(on_off(value).map_err(|e| format!("{key}: {e}"))?),
            "link-state" => {
                s.link_state = Some(match value {
                    "auto" => LinkState::Auto,
                    "enable" => LinkState::Enable,
                    "disable" => LinkState::Disable,
                    _ => return Err(format!("link-state is auto, enable or disable, not '{value}'")),
                });
            }
            "min-rate" => s.min_rate = Some(number(key, value)?),
            "max-rate" => s.max_rate = Some(number(key, value)?),
            "msix" => vf.msix = Some(number(key, value)?),
            other => {
                return Err(format!(
                    "unknown key '{other}' (mac, vlan, qos, proto, trust, spoofchk, link-state, min-rate, max-rate, msix)"
                ));
            }
        }
    }
    Ok(vf)
}

fn port_set(pair: &str) -> Result<PortSet, String> {
    match pair.split_once('=') {
        Some(("mac", mac)) => mac.parse().map(PortSet::Mac).map_err(|e: netaddr::NotAMac| e.to_string()),
        Some(("state", "active")) => Ok(PortSet::Active(true)),
        Some(("state", "inactive")) => Ok(PortSet::Active(false)),
        _ => Err("write mac=ADDRESS, state=active or state=inactive".into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn keys_and_values_of_a_vf() {
        let pairs = [
            "mac=52:54:00:00:00:01",
            "vlan=7",
            "qos=3",
            "proto=802.1ad",
            "trust=on",
            "max-rate=100",
            "msix=5",
        ];
        let vf = wanted_vf(2, &pairs.map(String::from)).unwrap();
        assert_eq!((vf.index, vf.msix, vf.settings.vlan), (2, Some(5), Some(7)));
        assert_eq!(vf.settings.proto, Some(VlanProto::Dot1Ad));
        for bad in ["mac", "mac=1", "vlan=x", "trust=yes", "proto=q", "link-state=up", "nice=1"] {
            assert!(wanted_vf(0, &[bad.into()]).is_err(), "{bad}");
        }
    }
}
