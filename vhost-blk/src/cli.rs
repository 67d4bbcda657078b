//! The command line, by QEMU's back-end conventions (docs/interop/vhost-user.rst, "Backend program conventions").

use std::path::PathBuf;
use std::str::FromStr;

use clap::{Args, Parser, ValueEnum};
use daemon::{Fixed, Switch, on_off, ring_size};
use poll_engine::engine::pacing::Pacing;
use poll_engine::engine::placement::CpuList;
use poll_engine::session::state::MAX_QUEUES;

/// Poll-mode vhost-user block back end.
///
/// Serves disks to virtual machines on Unix sockets: QEMU, Cloud Hypervisor, Firecracker or crosvm connects, shares the
/// guest's memory, and requests go straight between guest memory and the disk.
///
/// SIGTERM finishes what is in flight and exits; SIGHUP looks whether images have grown and tells the guests; SIGUSR1
/// prints statistics.
#[derive(Debug, Parser)]
#[command(name = "vhost-blk", version, max_term_width = 110)]
#[allow(clippy::struct_excessive_bools)] // flags
pub struct Cli {
    /// Unix socket to listen on; a stale one is replaced
    #[arg(long, value_name = "PATH", conflicts_with = "fd")]
    pub socket_path: Option<PathBuf>,

    /// Inherited Unix socket, listening or connected, by descriptor number
    #[arg(long, value_name = "FDNUM")]
    pub fd: Option<i32>,

    /// Print what this program can do as JSON (for management software) and exit
    #[arg(long)]
    pub print_capabilities: bool,

    /// Image file or block device to serve
    #[arg(long, value_name = "PATH", conflicts_with = "backend")]
    pub blk_file: Option<PathBuf>,

    /// Serve memory or nothing instead of a file, for measuring: ram:SIZE or null:SIZE
    #[arg(long, value_name = "KIND:SIZE")]
    pub backend: Option<Synthetic>,

    /// Serve a further disk; repeat for more. Keys: socket-path, blk-file, backend, serial, read-only,
    /// incoming, record
    #[arg(long, value_name = "KEY=VALUE,...")]
    pub disk: Vec<ExtraDisk>,

    /// Take over a guest that migrates: the image stays another daemon's until its first queue starts here
    #[arg(long)]
    pub incoming: bool,

    /// Record every request with its time to a new file (see vbench replay, vbench trace)
    #[arg(long, value_name = "FILE")]
    pub record: Option<PathBuf>,

    /// What all disks have
    #[command(flatten)]
    pub device: DeviceOptions,

    /// CPUs to run on, one pinned reactor each (such as 2-3,6); without: one reactor, not pinned
    #[arg(long, value_name = "LIST")]
    pub cpus: Option<CpuList>,

    /// How to wait for requests: busy never sleeps, adaptive spins a while first, event sleeps at once
    #[arg(long, value_name = "MODE", default_value = "adaptive")]
    pub poll: Pacing,

    /// Live upgrade.
    #[command(flatten)]
    pub upgrade: daemon::takeover::Options,

    /// What to log: error, warn, info, debug or trace, also by module (poll_engine=debug)
    #[arg(long, value_name = "FILTER", default_value = "info")]
    pub log: String,
}

/// What a disk is, whichever way it is served.
#[derive(Clone, Debug, Args)]
pub struct DeviceOptions {
    /// Refuse writes, and open the image for reading only
    #[arg(long)]
    pub read_only: bool,

    /// Request queues to offer (1 to 256)
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=i64::from(MAX_QUEUES)))]
    pub num_queues: u16,

    /// Largest ring a queue may have (a power of two up to 32768)
    #[arg(long, value_name = "N", default_value_t = 1024, value_parser = ring_size)]
    pub queue_size: u16,

    /// Offer packed rings, which a driver may then choose
    #[arg(long, value_enum, default_value_t = Switch::On)]
    pub packed: Switch,

    /// Write cache the guest sees at first: writeback needs flushes, writethrough makes every write durable
    #[arg(long, value_enum, default_value_t = CacheMode::Writeback)]
    pub cache: CacheMode,

    /// Bypass the host's page cache (O_DIRECT)
    #[arg(long, value_enum, default_value_t = Switch::On)]
    pub direct: Switch,

    /// Logical block size in bytes (a power of two from 512 to 65536)
    #[arg(long, value_name = "BYTES", default_value_t = 512, value_parser = block_size)]
    pub block_size: u32,

    /// Serial number the guest sees, at most 20 ASCII characters
    #[arg(long, value_name = "TEXT", default_value = "", value_parser = serial)]
    pub serial: String,

    /// Register guest memory with io_uring: auto does so for huge pages, on for all memory (which it pins)
    #[arg(long, value_enum, default_value_t = Fixed::Auto)]
    pub fixed_buffers: Fixed,
}

/// Write-cache modes, named as QEMU names them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum CacheMode {
    /// Durable after a flush.
    Writeback,
    /// Durable at once.
    Writethrough,
}

/// A disk without a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Synthetic {
    /// Memory of this many bytes.
    Ram(u64),
    /// Nothing, said to be of this many bytes.
    Null(u64),
}

impl FromStr for Synthetic {
    type Err = String;

    fn from_str(s: &str) -> Result<Synthetic, String> {
        let (kind, size) = s.split_once(':').ok_or("write ram:SIZE or null:SIZE, such as ram:1G")?;
        let size = parse_size(size)?;
        match kind {
            "ram" => Ok(Synthetic::Ram(size)),
            "null" => Ok(Synthetic::Null(size)),
            other => Err(format!("'{other}' is none of ram, null")),
        }
    }
}

/// One `--disk`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ExtraDisk {
    /// Where to listen.
    pub socket_path: PathBuf,
    /// Image file.
    pub blk_file: Option<PathBuf>,
    /// Or no file.
    pub backend: Option<Synthetic>,
    /// Serial number.
    pub serial: String,
    /// Refuse writes.
    pub read_only: bool,
    /// Leave the image to another daemon until the guest arrives.
    pub incoming: bool,
    /// Record requests here.
    pub record: Option<PathBuf>,
}

impl FromStr for ExtraDisk {
    type Err = String;

    fn from_str(s: &str) -> Result<ExtraDisk, String> {
        let mut disk = ExtraDisk::default();
        for pair in s.split(',') {
            let (key, value) = pair.split_once('=').unwrap_or((pair, "on"));
            match key {
                "socket-path" => disk.socket_path = value.into(),
                "blk-file" => disk.blk_file = Some(value.into()),
                "backend" => disk.backend = Some(value.parse()?),
                "record" => disk.record = Some(value.into()),
                "serial" => disk.serial = serial(value)?,
                "read-only" => disk.read_only = on_off(value).map_err(|e| format!("{key}: {e}"))?,
                "incoming" => disk.incoming = on_off(value).map_err(|e| format!("{key}: {e}"))?,
                other => {
                    return Err(format!(
                        "unknown key '{other}' (socket-path, blk-file, backend, serial, read-only, incoming, record)"
                    ));
                }
            }
        }
        if disk.socket_path.as_os_str().is_empty() {
            return Err("socket-path is missing".into());
        }
        match (&disk.blk_file, &disk.backend) {
            (None, None) => Err("blk-file or backend is missing".into()),
            (Some(_), Some(_)) => Err("blk-file and backend exclude each other".into()),
            _ => Ok(disk),
        }
    }
}

/// A size in bytes, with K, M, G or T for powers of 1024; a multiple of 512.
pub fn parse_size(s: &str) -> Result<u64, String> {
    let (digits, shift) = match s.char_indices().last() {
        Some((at, 'K' | 'k')) => (&s[..at], 10),
        Some((at, 'M' | 'm')) => (&s[..at], 20),
        Some((at, 'G' | 'g')) => (&s[..at], 30),
        Some((at, 'T' | 't')) => (&s[..at], 40),
        _ => (s, 0),
    };
    let number: u64 = digits.parse().map_err(|_| format!("'{s}' is no size (write 512M, 10G, ...)"))?;
    let bytes = number.checked_mul(1 << shift).ok_or_else(|| format!("'{s}' is too large"))?;
    if bytes == 0 || !bytes.is_multiple_of(512) || bytes > 1 << 60 {
        return Err(format!("'{s}' must be a multiple of 512 bytes from 512 to 2^60"));
    }
    Ok(bytes)
}

fn block_size(s: &str) -> Result<u32, String> {
    let n: u32 = s.parse().map_err(|_| format!("'{s}' is no number"))?;
    if n.is_power_of_two() && (512..=65536).contains(&n) {
        return Ok(n);
    }
    Err("a block size is a power of two from 512 to 65536".into())
}

fn serial(s: &str) -> Result<String, String> {
    if s.len() <= crate::request::ID_LEN && s.bytes().all(|b| b.is_ascii_graphic() || b == b' ') {
        return Ok(s.to_owned());
    }
    Err(format!("a serial number has at most {} printable ASCII characters", crate::request::ID_LEN))
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
    fn sizes_take_the_usual_suffixes() {
        assert_eq!(parse_size("512"), Ok(512));
        assert_eq!(parse_size("1G"), Ok(1 << 30));
        for bad in ["", "G", "0", "513", "1X", "99999999999T", "-1"] {
            assert!(parse_size(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn further_disks_are_key_value_lists() {
        let disk: ExtraDisk = "socket-path=/s,blk-file=/f,read-only,record=/r".parse().unwrap();
        assert_eq!(
            (disk.read_only, disk.blk_file, disk.record),
            (true, Some("/f".into()), Some("/r".into()))
        );
        for bad in ["", "socket-path=/s", "blk-file=/f", "socket-path=/s,blk-file=/f,backend=null:1G", "x=y"]
        {
            assert!(bad.parse::<ExtraDisk>().is_err(), "{bad}");
        }
    }
}
