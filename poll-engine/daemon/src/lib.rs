//! What the daemons have in common besides the engine: how they are called, where they listen, what they log.

pub mod confine;
pub mod file;
pub mod log;
pub mod placement;
pub mod process;
pub mod running;
pub mod said;
pub mod takeover;
pub mod watchdog;

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, ValueEnum};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use poll_engine::ring::MAX_RING_SIZE;
use poll_engine::session::listen::{ListenError, Listener};
use poll_engine::uring::FixedBuffers;
use serde::Serialize;

/// Runs a program: what it is asked for, and what has gone wrong in one line.
///
/// A thread that panics ends it, as what that thread has shared may be half changed.
pub fn main<C: Parser>(run: impl FnOnce(&C) -> Result<()>) -> ExitCode {
    // Optimised builds end by themselves (`panic = "abort"`).
    let say = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        say(panic);
        std::process::abort();
    }));
    let name = C::command().get_name().to_owned();
    let cli = match C::try_parse() {
        Ok(cli) => cli,
        Err(e) => return usage(&name, &e),
    };
    match run(&cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            log::write_end(&name, &e);
            ExitCode::FAILURE
        }
    }
}

/// Help and version go out as they are; a mistake is one line, like every other error.
fn usage(name: &str, error: &clap::Error) -> ExitCode {
    if !error.use_stderr() {
        error.exit();
    }
    let text = error.render().to_string();
    // The first paragraph says what is wrong; usage and hints follow behind an empty line.
    let what =
        text.lines().take_while(|line| !line.trim().is_empty()).map(str::trim).collect::<Vec<_>>().join(" ");
    eprintln!("{name}: {} (see {name} --help)", what.trim_start_matches("error: "));
    ExitCode::from(2)
}

/// Guests bring descriptors: regions, kicks and calls. Take what the administrator allows.
pub fn raise_descriptor_limit() {
    if let Ok((_, hard)) = getrlimit(Resource::RLIMIT_NOFILE) {
        let _ = setrlimit(Resource::RLIMIT_NOFILE, hard, hard);
    }
}

/// What management software reads (vhost-user.json: VhostUserBackendCapabilities): what kind of back end this is, and
/// which optional arguments of that kind it takes.
pub fn print_capabilities(kind: &str, features: &[&str]) {
    print(&serde_json::json!({ "type": kind, "features": features }).to_string());
}

/// Prints to standard output; whoever asked may have closed the pipe.
pub fn print(text: &str) {
    let mut out = std::io::stdout().lock();
    let _ = writeln!(out, "{text}").and_then(|()| out.flush());
}

/// Where a device is served.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    /// A socket to be made.
    Path(PathBuf),
    /// One that is inherited.
    Fd(i32),
}

impl Place {
    /// The socket, ready for front ends.
    pub fn listen(&self) -> Result<Listener, ListenError> {
        match self {
            Place::Path(path) => Listener::bind(path),
            Place::Fd(fd) => Listener::inherited(*fd),
        }
    }

    /// The path of a socket that is to be made.
    pub fn path(&self) -> Option<&Path> {
        match self {
            Place::Path(path) => Some(path),
            Place::Fd(_) => None,
        }
    }

    /// What it is known by when another process takes over.
    pub fn key(&self) -> String {
        match self {
            Place::Path(path) => path_key(path),
            Place::Fd(fd) => fd_key(*fd),
        }
    }
}

/// What a socket is known by to another process: a path that is the same from everywhere.
pub fn path_key(path: &Path) -> String {
    std::path::absolute(path).unwrap_or_else(|_| PathBuf::from(path)).display().to_string()
}

/// As [`path_key`], for an inherited descriptor.
pub fn fd_key(fd: i32) -> String {
    format!("--fd {fd}")
}

/// On or off.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Switch {
    /// On.
    On,
    /// Off.
    Off,
}

/// Which guest memory to register.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Fixed {
    /// Huge pages.
    Auto,
    /// All.
    On,
    /// None.
    Off,
}

impl From<Fixed> for FixedBuffers {
    fn from(fixed: Fixed) -> FixedBuffers {
        match fixed {
            Fixed::Auto => FixedBuffers::Auto,
            Fixed::On => FixedBuffers::On,
            Fixed::Off => FixedBuffers::Off,
        }
    }
}

/// A value that is on or off.
pub fn on_off(value: &str) -> Result<bool, String> {
    match value {
        "on" => Ok(true),
        "off" => Ok(false),
        other => Err(format!("'{other}' is neither on nor off")),
    }
}

/// The mode of a socket's file: octal digits, of which the owner's stay.
pub fn socket_mode(s: &str) -> Result<u32, String> {
    let mode = u32::from_str_radix(s, 8).ok().filter(|mode| mode & !0o777 == 0 && mode & 0o600 == 0o600);
    mode.ok_or(format!("'{s}' is no mode of a socket; write 600, or 660 for its group"))
}

/// A ring size, for a device whose requests do not fit into fewer than four descriptors.
pub fn ring_size(s: &str) -> Result<u16, String> {
    let n: u32 = s.parse().map_err(|_| format!("'{s}' is no number"))?;
    // Below 4 there is no room for a request with header, data and status beside another.
    if n.is_power_of_two() && (4..=u32::from(MAX_RING_SIZE)).contains(&n) {
        return Ok(n as u16);
    }
    Err(format!("a ring size is a power of two from 4 to {MAX_RING_SIZE} (virtio 1.3, 2.7)"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_of_sockets_are_whole_paths() {
        assert_eq!(path_key(Path::new("/x/y.sock")), "/x/y.sock");
        assert!(path_key(Path::new("y.sock")).starts_with('/'));
    }

    #[test]
    fn ring_sizes_are_powers_of_two() {
        assert_eq!(ring_size("1024"), Ok(1024));
        for bad in ["", "0", "2", "1000", "65536", "x"] {
            assert!(ring_size(bad).is_err(), "{bad}");
        }
    }
}
