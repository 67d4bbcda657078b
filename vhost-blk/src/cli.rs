//! The command line, by QEMU's back-end conventions (docs/interop/vhost-user.rst, "Backend program conventions"), and the
//! file that says the same.

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use anyhow::Result;
use clap::{Args, CommandFactory, Parser, ValueEnum};
use daemon::file::{File, options_of};
use daemon::placement::of_file;
use daemon::process::ProcessOptions;
use daemon::running::{ApiOptions, RunOptions, unsaid};
use daemon::{Fixed, Switch, from_text, ring_size, said};
use poll_engine::session::state::MAX_QUEUES;
use serde::{Deserialize, Serialize};

use crate::backend::formatted::Format;
use crate::backend::luks::KeySource;
use crate::check::check;
use crate::clone::Base;
use crate::faults::Faults;
use crate::limits::Limits;
use crate::pool::PoolSpec;
use crate::spec::DiskSpec;

/// Poll-mode vhost-user block back end.
///
/// Serves disks to virtual machines on Unix sockets: QEMU, Cloud Hypervisor, Firecracker or crosvm connects, shares the
/// guest's memory, and requests go straight between guest memory and the disk.
///
/// SIGTERM finishes what is in flight and exits; SIGHUP looks whether images have grown and tells the guests; SIGUSR1
/// prints statistics.
#[derive(Clone, Debug, Parser)]
#[command(name = "vhost-blk", version, max_term_width = 110)]
#[command(mut_arg("config", |config| config.conflicts_with_all(options_of::<Options>())))]
pub struct Cli {
    /// Read all that follows from a file instead (TOML): options by their long names, further disks as [[disk]]
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,

    /// Say whether the options, or the file, are right, and exit
    #[arg(long)]
    pub check: bool,

    /// Print what this program can do as JSON (for management software) and exit
    #[arg(long)]
    pub print_capabilities: bool,

    /// What becomes of the process.
    #[command(flatten)]
    pub process: ProcessOptions,

    /// All else.
    #[command(flatten)]
    pub options: Options,
}

/// What is served and how, on the command line or in a file.
#[derive(Clone, Debug, Args, Deserialize)]
#[group(skip)]
#[serde(default, rename_all = "kebab-case")]
pub struct Options {
    /// Unix socket to listen on; a stale one is replaced
    #[arg(long, value_name = "PATH")]
    pub socket_path: Option<PathBuf>,

    /// Inherited Unix socket, listening or connected, by descriptor number
    #[arg(long, value_name = "FDNUM")]
    pub fd: Option<i32>,

    /// Image file or block device to serve
    #[arg(long, value_name = "PATH")]
    pub blk_file: Option<PathBuf>,

    /// What the bytes of the image mean; never guessed, since a guest may write anything into a raw one. vmdk needs
    /// --read-only; luks is LUKS2, and needs a key
    #[arg(long, value_enum, default_value_t = Format::Raw)]
    pub format: Format,

    /// The key of a LUKS volume, in a file: all of its bytes, as cryptsetup --key-file takes them
    #[arg(long, value_name = "PATH")]
    pub key_file: Option<PathBuf>,

    /// The same, behind an inherited descriptor, up to its end
    #[arg(long, value_name = "FDNUM")]
    pub key_fd: Option<i32>,

    /// The same, in a credential of the service (LoadCredentialEncrypted= has the machine's TPM keep it)
    #[arg(long, value_name = "NAME", value_parser = crate::spec::credential)]
    #[serde(deserialize_with = "credential")]
    pub key_credential: Option<String>,

    /// Have what a guest discards on a LUKS volume given up in its file, which shows where nothing is
    #[arg(long)]
    pub allow_discards: bool,

    /// Make the image if it is not there: a clone, which begins as this one is and keeps what is written (qcow2, of this and
    /// nothing else; formats: raw, qcow2 (which it is if that is not said), vmdk)
    #[arg(long, value_name = "[FORMAT:]PATH")]
    #[serde(deserialize_with = "base")]
    pub clone_of: Option<Base>,

    /// Keep so many clones of this ready beside it, to be taken over the API; repeat for more
    #[arg(long, value_name = "[FORMAT:]PATH:N")]
    #[serde(deserialize_with = "pools")]
    pub pool: Vec<PoolSpec>,

    /// Serve memory or nothing instead of a file, for measuring: ram:SIZE or null:SIZE
    #[arg(long, value_name = "KIND:SIZE")]
    #[serde(deserialize_with = "backend")]
    pub backend: Option<Synthetic>,

    /// Serve a further disk; repeat for more. Keys: socket-path, fd, blk-file, format, key-file, key-fd, key-credential,
    /// allow-discards, clone-of, backend, name, serial, incoming, record, and in the place of what all disks have:
    /// read-only, num-queues, queue-size, packed, cache, direct, block-size, limit and fault (with + for each comma)
    #[arg(long, value_name = "KEY=VALUE,...")]
    pub disk: Vec<DiskSpec>,

    /// Take over a guest that migrates: the image stays another daemon's until its first queue starts here
    #[arg(long)]
    pub incoming: bool,

    /// Record every request with its time to a new file (see vbench replay, vbench trace)
    #[arg(long, value_name = "FILE")]
    pub record: Option<PathBuf>,

    /// What all disks have
    #[command(flatten)]
    #[serde(skip)] // a type of its own, also in a file
    pub device: DeviceOptions,

    /// How it runs.
    #[command(flatten)]
    #[serde(skip)] // a type of its own, also in a file
    pub run: RunOptions,

    /// Who may ask it.
    #[command(flatten)]
    #[serde(skip)] // likewise
    pub http: ApiOptions,

    /// What a file says of the process.
    #[arg(skip)]
    #[serde(skip)] // a type of its own
    pub process: ProcessOptions,
}

/// What a disk is, whichever way it is served.
#[derive(Clone, Debug, PartialEq, Eq, Args, Deserialize)]
#[serde(default, rename_all = "kebab-case")]
pub struct DeviceOptions {
    /// Refuse writes, and open the image for reading only
    #[arg(long)]
    pub read_only: bool,

    /// Request queues to offer (1 to 256)
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = num_queues)]
    #[serde(deserialize_with = "count")]
    pub num_queues: u16,

    /// Largest ring a queue may have (a power of two up to 32768)
    #[arg(long, value_name = "N", default_value_t = 1024, value_parser = ring_size)]
    #[serde(deserialize_with = "size")]
    pub queue_size: u16,

    /// Offer packed rings, which a driver may then choose
    #[arg(long, value_enum, default_value_t = Switch::On)]
    #[serde(deserialize_with = "switched")]
    pub packed: Switch,

    /// Write cache the guest sees at first: writeback needs flushes, writethrough makes every write durable
    #[arg(long, value_enum, default_value_t = CacheMode::Writeback)]
    #[serde(deserialize_with = "cache")]
    pub cache: CacheMode,

    /// Bypass the host's page cache (O_DIRECT)
    #[arg(long, value_enum, default_value_t = Switch::On)]
    #[serde(deserialize_with = "switched")]
    pub direct: Switch,

    /// Logical block size in bytes (a power of two from 512 to 65536)
    #[arg(long, value_name = "BYTES", default_value_t = 512, value_parser = block_size)]
    #[serde(deserialize_with = "blocks")]
    pub block_size: u32,

    /// Most requests and bytes in a second, such as iops-read=1000,bps-write=100M. Keys: iops-total, iops-read, iops-write,
    /// bps-total, bps-read, bps-write; each with -max, what it may go up to after it was less, and -max-length, for how many
    /// seconds
    #[arg(long, value_name = "KEY=VALUE,...")]
    pub limit: Option<Limits>,

    /// FOR REHEARSALS: have things go wrong on purpose, such as delay=exponential:2ms,error=0.001. Keys: delay and error, each
    /// also with -read, -write or -flush; torn, seed, log-writes. A delay is TIME, uniform:LEAST:MOST, exponential:MEAN,
    /// normal:MEAN:DEVIATION or pareto:LEAST:SHAPE
    #[arg(long, value_name = "KEY=VALUE,...")]
    pub fault: Option<Faults>,

    /// Serial number the guest sees, at most 20 ASCII characters
    #[arg(long, value_name = "TEXT", default_value = "", value_parser = serial)]
    #[serde(deserialize_with = "text")]
    pub serial: String,

    /// Register guest memory with io_uring: auto does so for huge pages, on for all memory (which it pins)
    #[arg(long, value_enum, default_value_t = Fixed::Auto)]
    #[serde(deserialize_with = "fixed")]
    pub fixed_buffers: Fixed,

    /// Requests in flight on a storage device while several disks of a reactor use it, for all of them together; 0: no bound,
    /// so that one with many has the others wait
    #[arg(long, value_name = "N", default_value_t = 16, value_parser = shared_depth)]
    #[serde(deserialize_with = "depth")]
    pub shared_depth: u16,
}

/// Where the key of the one disk of a command is.
#[derive(Clone, Debug, Default, Args)]
pub struct KeyOptions {
    /// The key of a LUKS volume, in a file: all of its bytes, as cryptsetup --key-file takes them
    #[arg(long, value_name = "PATH")]
    pub key_file: Option<PathBuf>,

    /// The same, in a credential of the service
    #[arg(long, value_name = "NAME", value_parser = crate::spec::credential, conflicts_with = "key_file")]
    pub key_credential: Option<String>,
}

impl KeyOptions {
    /// There, if that is said.
    pub fn source(&self) -> Option<KeySource> {
        let file = self.key_file.clone().map(KeySource::File);
        file.or_else(|| self.key_credential.clone().map(KeySource::Credential))
    }
}

/// Pools as a list of texts.
fn pools<'de, D: serde::Deserializer<'de>>(from: D) -> Result<Vec<PoolSpec>, D::Error> {
    let texts = Vec::<String>::deserialize(from)?;
    texts.iter().map(|text| text.parse().map_err(serde::de::Error::custom)).collect()
}

/// Write-cache modes, named as QEMU names them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "lowercase")]
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

impl Serialize for Synthetic {
    fn serialize<S: serde::Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.collect_str(self)
    }
}

impl fmt::Display for Synthetic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Synthetic::Ram(size) => write!(f, "ram:{size}"),
            Synthetic::Null(size) => write!(f, "null:{size}"),
        }
    }
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

from_text! {
    credential: Option<String> = |s| crate::spec::credential(s).map(Some);
    base: Option<Base> = |s| s.parse().map(Some);
    backend: Option<Synthetic> = |s| s.parse().map(Some);
    count: u16 = num_queues;
    size: u16 = ring_size;
    switched: Switch = said::switch;
    cache: CacheMode = cache_mode;
    blocks: u32 = block_size;
    text: String = serial;
    depth: u16 = shared_depth;
    fixed: Fixed = |s| <Fixed as ValueEnum>::from_str(s, false);
}

impl Cli {
    /// This, with what the file says of the process as far as this does not.
    #[must_use]
    pub fn completed(&self, options: &Options) -> Cli {
        Cli { process: self.process.or(&options.process), ..self.clone() }
    }

    /// What is asked for, which goes together.
    pub fn options(&self) -> Result<Options> {
        if let Some(path) = &self.config {
            return Options::read(path);
        }
        check(&self.options)?;
        Ok(self.options.clone())
    }
}

impl Default for Options {
    /// Those of a command line without any.
    fn default() -> Options {
        unsaid()
    }
}

impl Default for DeviceOptions {
    /// Those of a command line without any.
    fn default() -> DeviceOptions {
        unsaid()
    }
}

impl Options {
    /// What is near which memory: disks with a file.
    pub fn near(&self) -> Vec<(String, Option<usize>)> {
        self.disks().iter().map(|disk| of_file(disk.key(), disk.blk_file.as_deref())).collect()
    }

    /// Those of a file, which go together.
    pub fn read(path: &Path) -> Result<Options> {
        Options::of(&File::read(path)?)
    }

    /// As [`read`](Self::read), of a file that was read.
    pub fn of(file: &File) -> Result<Options> {
        file.expect_options(&Cli::command())?;
        let options = Options::said_by(file)?;
        check(&options).map_err(|e| file.error(&e))?;
        Ok(options)
    }

    fn said_by(file: &File) -> Result<Options> {
        Ok(Options {
            device: file.parse()?,
            run: file.parse()?,
            http: file.parse()?,
            process: ProcessOptions::of(file)?,
            ..file.parse()?
        })
    }

    /// All disks. The first may be described by options of its own.
    pub fn disks(&self) -> Vec<DiskSpec> {
        let is_first = self.socket_path.is_some() || self.fd.is_some();
        let first = is_first.then(|| DiskSpec {
            socket_path: self.socket_path.clone(),
            fd: self.fd,
            blk_file: self.blk_file.clone(),
            format: self.format,
            key_file: self.key_file.clone(),
            key_fd: self.key_fd,
            key_credential: self.key_credential.clone(),
            allow_discards: self.allow_discards,
            clone_of: self.clone_of.clone(),
            backend: self.backend,
            serial: self.device.serial.clone(),
            record: self.record.clone(),
            ..DiskSpec::default()
        });
        let incoming = |disk: DiskSpec| DiskSpec { incoming: disk.incoming || self.incoming, ..disk };
        first.into_iter().chain(self.disk.iter().cloned()).map(incoming).collect()
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

/// A number of queues.
pub(crate) fn num_queues(s: &str) -> Result<u16, String> {
    let count = s.parse().ok().filter(|n| (1..=MAX_QUEUES).contains(n));
    count.ok_or(format!("a disk has 1 to {MAX_QUEUES} queues, not '{s}'"))
}

/// Requests in flight on a device that is shared.
fn shared_depth(s: &str) -> Result<u16, String> {
    s.parse().map_err(|_| format!("0 to 65535 requests can be in flight, not '{s}'"))
}

/// A write-cache mode.
pub(crate) fn cache_mode(s: &str) -> Result<CacheMode, String> {
    ValueEnum::from_str(s, false)
}

/// A logical block size.
pub(crate) fn block_size(s: &str) -> Result<u32, String> {
    let n: u32 = s.parse().map_err(|_| format!("'{s}' is no number"))?;
    if n.is_power_of_two() && (512..=65536).contains(&n) {
        return Ok(n);
    }
    Err("a block size is a power of two from 512 to 65536".into())
}

/// A serial number.
pub(crate) fn serial(s: &str) -> Result<String, String> {
    if s.len() <= crate::request::ID_LEN && s.bytes().all(|b| b.is_ascii_graphic() || b == b' ') {
        return Ok(s.to_owned());
    }
    Err(format!("a serial number has at most {} printable ASCII characters", crate::request::ID_LEN))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    use daemon::file::said_by_files;
    use daemon::{process, running};

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
    fn a_file_takes_the_place_of_options() {
        for (option, _) in process::EXAMPLES {
            assert!(Cli::try_parse_from(["", "--config=x", "--check", option]).is_ok(), "{option}");
        }
        for (option, _) in each() {
            assert!(Cli::try_parse_from(["", "--config=x", option]).is_err(), "{option}");
        }
    }

    /// Of each further option some value, on the command line and in a file.
    const EACH: &[(&str, &str)] = &[
        ("--socket-path=/s", "socket-path = '/s'"),
        ("--fd=3", "fd = 3"),
        ("--blk-file=/f", "blk-file = '/f'"),
        ("--format=qcow2", "format = 'qcow2'"),
        ("--key-file=/k", "key-file = '/k'"),
        ("--key-fd=4", "key-fd = 4"),
        ("--key-credential=k", "key-credential = 'k'"),
        ("--allow-discards", "allow-discards = true"),
        ("--clone-of=raw:/b", "clone-of = 'raw:/b'"),
        ("--pool=/b:8", "pool = ['/b:8']"),
        ("--backend=ram:1G", "backend = 'ram:1G'"),
        (
            "--disk=socket-path=/a,backend=null:1G,num-queues=2,read-only,cache=writethrough",
            "disk = [{ socket-path = '/a', backend = 'null:1G', num-queues = 2, read-only = true, cache = 'writethrough' }]",
        ),
        ("--incoming", "incoming = true"),
        ("--record=/r", "record = '/r'"),
        ("--read-only", "read-only = true"),
        ("--num-queues=4", "num-queues = 4"),
        ("--queue-size=256", "queue-size = 256"),
        ("--packed=off", "packed = false"),
        ("--cache=writethrough", "cache = 'writethrough'"),
        ("--direct=off", "direct = 'off'"),
        ("--block-size=4096", "block-size = 4096"),
        ("--limit=iops-read=5,bps-total=1M", "limit = { iops-read = 5, bps-total = '1M' }"),
        ("--fault=delay=2ms,error=0.5", "fault = { delay = '2ms', error = 0.5 }"),
        ("--serial=17", "serial = 17"),
        ("--fixed-buffers=on", "fixed-buffers = true"),
        ("--shared-depth=64", "shared-depth = 64"),
    ];

    fn each() -> impl Iterator<Item = &'static (&'static str, &'static str)> {
        EACH.iter().chain(&running::EXAMPLES)
    }

    fn unchecked(text: &str) -> Result<Options> {
        let file = File::new(Path::new("f"), text.into());
        Options::said_by(&file)
    }

    #[test]
    fn a_file_says_all_that_the_command_line_does() {
        let program = Cli::command();
        let options: BTreeSet<_> = said_by_files(&program).filter_map(|arg| arg.get_long()).collect();
        let tried = each()
            .chain(&process::EXAMPLES)
            .filter_map(|(arg, _)| arg.trim_start_matches('-').split('=').next());
        assert_eq!(options, tried.collect(), "tried here, or in NOT_IN_A_FILE with a reason");
        for (arg, line) in each().chain(&process::EXAMPLES) {
            let cli = Cli::parse_from(["", arg]);
            let said = Options { process: cli.process, ..cli.options };
            let written = unchecked(line).unwrap();
            assert_eq!(format!("{said:?}"), format!("{written:?}"), "{line}");
            assert_ne!(format!("{written:?}"), format!("{:?}", Options::default()), "{line}");
        }
    }

    #[test]
    fn what_the_command_line_refuses_a_file_may_not_say() {
        for line in [
            "backend = 'disk:1G'",
            "num-queues = 0",
            "queue-size = 1000",
            "packed = 'maybe'",
            "cache = 'none'",
            "block-size = 100",
            "limit = 'iops=5'",
            "limit = { iops-read-max = 5 }",
            "fault = 'delay=2'",
            "fault = { error = 2 }",
            "serial = '123456789012345678901'",
            "fixed-buffers = 'some'",
            "shared-depth = -1",
            "cpus = 'x'",
            "cpus = 'auto:0'",
            "housekeeping = 'auto'",
            "poll = 'often'",
            "disk = 'socket-path=/a'",
            "sandbox = 'some'",
            "control = 1",
        ] {
            assert!(unchecked(line).is_err(), "{line}");
        }
    }
}
