//! What a program is told of how it runs and who may ask it, on the command line or in its file.

use std::path::PathBuf;

use clap::{Args, Parser};
use poll_engine::engine::pacing::Pacing;
use poll_engine::engine::placement::CpuList;
use poll_engine::engine::placement::auto::Cpus;
use serde::Deserialize;

use crate::{from_text, said};

/// Where reactors run, how they wait, and what is logged.
#[derive(Args, Clone, Debug, PartialEq, Eq, Deserialize)]
#[group(skip)]
#[serde(default, rename_all = "kebab-case")]
pub struct RunOptions {
    /// CPUs to run on, one pinned reactor each (such as 2-3,6); auto or auto:N: as many as devices are on different nodes, or
    /// N, on CPUs near them (see --housekeeping, --guest-cpus); without: one reactor, not pinned
    #[arg(long, value_name = "LIST")]
    #[serde(deserialize_with = "cpus")]
    pub cpus: Option<Cpus>,

    /// With --cpus auto, CPUs to keep off because the host's own work runs there
    #[arg(long, value_name = "LIST")]
    #[serde(deserialize_with = "cpu_list")]
    pub housekeeping: Option<CpuList>,

    /// With --cpus auto, CPUs to keep off because virtual machines run there
    #[arg(long, value_name = "LIST")]
    #[serde(deserialize_with = "cpu_list")]
    pub guest_cpus: Option<CpuList>,

    /// How to wait for requests or packets: busy never sleeps, adaptive spins a while first, event sleeps at once
    #[arg(long, value_name = "MODE", default_value = "adaptive")]
    #[serde(deserialize_with = "pacing")]
    pub poll: Pacing,

    /// What to log: error, warn, info, debug or trace, also by module (poll_engine=debug); with json: as JSON (json,warn)
    #[arg(long, value_name = "FILTER", default_value = "info")]
    pub log: String,
}

/// Who may ask a daemon what, while it runs.
#[derive(Args, Clone, Debug, PartialEq, Eq, Deserialize)]
#[group(skip)]
#[serde(default, rename_all = "kebab-case")]
pub struct ApiOptions {
    /// Unix socket on which the running daemon can be asked, and told, what to do (HTTP and JSON; see vhostctl)
    #[arg(long, value_name = "PATH")]
    pub api: Option<PathBuf>,

    /// Mode of that socket, octal: 660 lets its group use it, too
    #[arg(long, value_name = "MODE", default_value = "600", value_parser = crate::socket_mode)]
    #[serde(deserialize_with = "mode")]
    pub api_mode: u32,

    /// With --api, a directory in which files may be opened and made that are asked for while it runs; repeat for more.
    /// Without any: anywhere
    #[arg(long, value_name = "DIR")]
    pub allow: Vec<PathBuf>,
}

from_text! {
    cpus: Option<Cpus> = |s| said::cpus(s).map(Some);
    cpu_list: Option<CpuList> = |s| said::cpu_list(s).map(Some);
    pacing: Pacing = str::parse;
    mode: u32 = crate::socket_mode;
}

/// Options as a command line without any has them.
#[derive(Parser)]
struct Unsaid<T: Args> {
    #[command(flatten)]
    options: T,
}

/// The default of options that a command line has.
pub fn unsaid<T: Args>() -> T {
    Unsaid::parse_from([""]).options
}

impl Default for RunOptions {
    fn default() -> RunOptions {
        unsaid()
    }
}

impl Default for ApiOptions {
    fn default() -> ApiOptions {
        unsaid()
    }
}

/// Of each of these options some value, on the command line and in a file: for the tests of those who have them.
pub const EXAMPLES: [(&str, &str); 8] = [
    ("--cpus=0-1", "cpus = [0, 1]"),
    ("--housekeeping=0,4", "housekeeping = [0, 4]"),
    ("--guest-cpus=2-3", "guest-cpus = '2-3'"),
    ("--poll=busy", "poll = 'busy'"),
    ("--log=debug", "log = 'debug'"),
    ("--api=/a", "api = '/a'"),
    ("--api-mode=660", "api-mode = 660"),
    ("--allow=/d", "allow = ['/d']"),
];
