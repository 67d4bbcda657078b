//! Switches as they are asked for: by `--switch` as a list of keys and values, and in a file as tables.

use std::str::FromStr;

use daemon::from_text;
use daemon::said::from_keys;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::cli::Options;
use crate::spec::PortSpec;

/// For how many seconds an address is known that sends nothing.
pub const MAC_AGEING: u32 = 300;

/// One `--switch` or `[[switch]]`. Ports and an uplink name theirs; those that name none are on the one without a name.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct SwitchSpec {
    /// What it is known by.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub name: Option<String>,
    /// How long an address is known that sends nothing, in seconds.
    #[serde(deserialize_with = "some_seconds", skip_serializing_if = "Option::is_none")]
    #[schema(value_type = u32, minimum = 1, nullable = false)]
    pub mac_ageing: Option<u32>,
}

from_text! {
    some_seconds: Option<u32> = |s| seconds(s).map(Some);
}

/// A number of them.
pub fn seconds(s: &str) -> Result<u32, &'static str> {
    s.parse().ok().filter(|n| *n > 0).ok_or("write a number of seconds above 0")
}

impl FromStr for SwitchSpec {
    type Err = String;

    /// `--switch` alone is one without any keys.
    fn from_str(s: &str) -> Result<SwitchSpec, String> {
        if s.is_empty() { Ok(SwitchSpec::default()) } else { from_keys(s) }
    }
}

/// How people read of a switch.
pub fn called(name: Option<&str>) -> String {
    name.map_or("the switch without a name".into(), |name| format!("switch {name}"))
}

impl Options {
    /// The switches, or the only other way in which ports are joined: by name.
    pub fn joints(&self) -> Vec<Option<&SwitchSpec>> {
        if self.switch.is_empty() { vec![None] } else { self.switch.iter().map(Some).collect() }
    }

    /// How long a switch knows an address that sends nothing.
    pub fn ageing(&self, switch: &SwitchSpec) -> u32 {
        switch.mac_ageing.or(self.mac_ageing).unwrap_or(MAC_AGEING)
    }

    /// With one switch more. What one that has no keys is told by options of the process is among its keys then.
    pub fn add_switch(&mut self, new: SwitchSpec) {
        let ageing = self.mac_ageing.take();
        self.switch.iter_mut().for_each(|switch| switch.mac_ageing = switch.mac_ageing.or(ageing));
        self.switch.push(new);
    }

    /// The uplink of a switch.
    pub fn uplink_of(&self, switch: Option<&str>) -> Option<&PortSpec> {
        self.uplink.iter().find(|uplink| uplink.switch.as_deref() == switch)
    }
}
