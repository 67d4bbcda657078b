//! The command line, by QEMU's back-end conventions (docs/interop/vhost-user.rst, "Backend program conventions"), and the
//! file that says the same.

use std::path::{Path, PathBuf};

use anyhow::Result;
use clap::{Args, CommandFactory, Parser};
use daemon::file::{File, options_of};
use daemon::placement::of_interface;
use daemon::process::ProcessOptions;
use daemon::running::{ApiOptions, RunOptions, unsaid};
use daemon::{Place, Switch, from_text, ring_size, said};
use serde::{Deserialize, Deserializer};

use crate::check::check;
use crate::device::MAX_PAIRS;
use crate::hub::Plan;
use crate::pcap::filter::Filter;
use crate::spec::{PortSpec, mac, mtu};
use crate::switches::{SwitchSpec, seconds};

/// Poll-mode vhost-user network back end.
///
/// Gives virtual machines network cards on Unix sockets: QEMU, Cloud Hypervisor or crosvm connects, shares the guest's
/// memory, and packets are copied once, from the memory of one guest to that of the other.
///
/// SIGTERM finishes what is in flight and exits; SIGHUP has --config read again, and does what can be done while guests run;
/// SIGUSR1 prints statistics. With --api, ports come and go while it runs.
#[derive(Clone, Debug, Parser)]
#[command(name = "vhost-net", version, max_term_width = 110)]
#[command(mut_arg("config", |config| config.conflicts_with_all(options_of::<Options>())))]
pub struct Cli {
    /// Read all that follows from a file instead (TOML): options by their long names, ports as [[port]], [uplink] or
    /// [[uplink]], switches as [[switch]]
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
#[allow(clippy::struct_excessive_bools)] // options, each by itself
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

    /// Join the first port to this tap; one that does not exist is made, and goes when this ends
    #[arg(long, value_name = "NAME")]
    pub tap: Option<String>,

    /// Join the first port to an inherited tap, by descriptor numbers: one for each pair of queues
    #[arg(long, value_name = "FDNUM,...", value_delimiter = ',')]
    pub tap_fds: Vec<i32>,

    /// Capture what crosses ports, taps and the uplink to a new file (pcapng), for Wireshark and tcpdump
    #[arg(long, value_name = "FILE")]
    pub pcap: Option<PathBuf>,

    /// Bytes of each frame to capture, at most (262144)
    #[arg(long, value_name = "BYTES", value_parser = clap::value_parser!(u32).range(14..))]
    #[serde(deserialize_with = "snaplen")]
    pub pcap_snaplen: Option<u32>,

    /// What to capture, such as "tcp port 80 or arp"; without: everything
    #[arg(long, value_name = "EXPRESSION")]
    #[serde(deserialize_with = "filter")]
    pub pcap_filter: Option<Filter>,

    /// Serve a further port; repeat for more. Keys: socket-path, fd, name, mac, mtu, wait, link, tap, tap-fds; with --switch
    /// also switch (the name of its own), vlan, trunk (such as 5+10-19), native, guard, ip, router, isolated, flood-unknown, max-macs, tx-bps, tx-pps,
    /// rx-bps, rx-pps, burst-ms, broadcast-pps, multicast-pps, unknown-pps
    #[arg(long, value_name = "KEY=VALUE,...")]
    pub port: Vec<PortSpec>,

    /// Join each port to itself, for measuring: echo, discard, or generate:BYTES
    #[arg(long, value_name = "KIND", value_parser = plan)]
    #[serde(deserialize_with = "loopback")]
    pub loopback: Option<Plan>,

    /// Join two ports to each other, and nothing else
    #[arg(long)]
    pub wire: bool,

    /// Join all ports by a switch that learns addresses. Repeat, with names, for several, between which nothing passes; ports
    /// and uplinks then name theirs. Keys: name, mac-ageing
    #[arg(long, value_name = "KEY=VALUE,...", num_args = 0..=1, default_missing_value = "")]
    #[serde(deserialize_with = "switches")]
    pub switch: Vec<SwitchSpec>,

    /// With --switch, join it to the host; repeat for an uplink of each switch. Keys: tap (the host itself; made if there is
    /// none), af-packet (any interface) or af-xdp (around the kernel's stack, with queue), and of those of --port: name,
    /// switch, vlan, trunk, native, isolated, flood-unknown, max-macs and the limits
    #[arg(long, value_name = "KEY=VALUE,...")]
    #[serde(deserialize_with = "uplinks")]
    pub uplink: Vec<PortSpec>,

    /// With a --switch that has no keys, how long an address is known that sends nothing (300)
    #[arg(long, value_name = "SECONDS", value_parser = clap::value_parser!(u32).range(1..))]
    #[serde(deserialize_with = "some_seconds")]
    pub mac_ageing: Option<u32>,

    /// Address of the first port's card (such as 52:54:00:12:34:56); without, the front end's or the guest's own
    #[arg(long, value_name = "MAC", value_parser = mac)]
    #[serde(deserialize_with = "some_mac")]
    pub mac: Option<[u8; 6]>,

    /// MTU that cards advise to their guests
    #[arg(long, value_name = "BYTES", value_parser = mtu)]
    #[serde(deserialize_with = "some_mtu")]
    pub mtu: Option<u16>,

    /// Pairs of queues that each card offers (1 to 16)
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = pairs)]
    #[serde(deserialize_with = "num_pairs")]
    pub num_queue_pairs: u16,

    /// Largest ring a queue may have (a power of two up to 32768)
    #[arg(long, value_name = "N", default_value_t = 1024, value_parser = ring_size)]
    #[serde(deserialize_with = "size")]
    pub queue_size: u16,

    /// Offer packed rings, which a driver may then choose
    #[arg(long, value_enum, default_value_t = Switch::On)]
    #[serde(deserialize_with = "switched")]
    pub packed: Switch,

    /// Count the cycles that reactors are busy for, for the statistics
    #[arg(long)]
    pub record_core_cycles: bool,

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

from_text! {
    snaplen: Option<u32> = |s| s.parse().ok().filter(|n| *n >= 14).map(Some).ok_or("write a number of bytes from 14 on");
    filter: Option<Filter> = |s| s.parse().map(Some);
    loopback: Option<Plan> = |s| plan(s).map(Some);
    some_seconds: Option<u32> = |s| seconds(s).map(Some);
    some_mac: Option<[u8; 6]> = |s| mac(s).map(Some);
    some_mtu: Option<u16> = |s| mtu(s).map(Some);
    num_pairs: u16 = pairs;
    size: u16 = ring_size;
    switched: Switch = said::switch;
}

fn switches<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<SwitchSpec>, D::Error> {
    said::several(from, true)
}

fn uplinks<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<PortSpec>, D::Error> {
    said::several(from, false)
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

impl Options {
    /// What is near which memory: interfaces of uplinks.
    pub fn near(&self) -> Vec<(String, Option<usize>)> {
        let of = |port: &PortSpec| port.af_xdp.as_deref().or(port.af_packet.as_deref()).map(of_interface);
        self.uplink.iter().filter_map(of).collect()
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
            run: file.parse()?,
            http: file.parse()?,
            process: ProcessOptions::of(file)?,
            ..file.parse()?
        })
    }

    /// With one port less: that of this place.
    pub fn drop_port(&mut self, place: &Place) {
        let first = Options { port: Vec::new(), ..self.clone() }.ports();
        if first.first().and_then(PortSpec::place).as_ref() == Some(place) {
            (self.socket_path, self.fd, self.tap, self.mac) = (None, None, None, None);
            self.tap_fds.clear();
        }
        self.port.retain(|port| port.place().as_ref() != Some(place));
    }

    /// With a port that is there as it is now. One that was described by options of its own may need more than these can say.
    pub fn set_port(&mut self, now: &PortSpec) {
        let place = now.place();
        if let Some(port) = self.port.iter_mut().find(|port| port.place() == place) {
            port.clone_from(now);
            return;
        }
        if let Some(place) = &place {
            self.drop_port(place);
        }
        self.port.insert(0, now.clone());
    }

    /// All ports of guests. The first may be described by options of its own.
    pub fn ports(&self) -> Vec<PortSpec> {
        let first = (self.socket_path.is_some() || self.fd.is_some()).then(|| PortSpec {
            socket_path: self.socket_path.clone(),
            fd: self.fd,
            mac: self.mac,
            tap: self.tap.clone(),
            tap_fds: self.tap_fds.clone(),
            ..PortSpec::default()
        });
        let with_mtu = |port: PortSpec| PortSpec { mtu: port.mtu.or(self.mtu), ..port };
        first.into_iter().chain(self.port.iter().cloned()).map(with_mtu).collect()
    }
}

fn plan(s: &str) -> Result<Plan, String> {
    match s.split_once(':') {
        None if s == "echo" => Ok(Plan::Echo),
        None if s == "discard" => Ok(Plan::Discard),
        Some(("generate", bytes)) => match bytes.parse() {
            Ok(bytes @ 60..=9000) => Ok(Plan::Generate(bytes)),
            _ => Err("packets of 60 to 9000 bytes can be generated".into()),
        },
        _ => Err(format!("'{s}' is none of echo, discard, generate:BYTES")),
    }
}

/// How many pairs of queues a card has.
pub fn pairs(s: &str) -> Result<u16, String> {
    let pairs = s.parse().ok().filter(|n| (1..=MAX_PAIRS).contains(n));
    pairs.ok_or(format!("a card has 1 to {MAX_PAIRS} pairs of queues, not '{s}'"))
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
        ("--tap=t", "tap = 't'"),
        ("--tap-fds=4,5", "tap-fds = [4, 5]"),
        ("--pcap=/p", "pcap = '/p'"),
        ("--pcap-snaplen=96", "pcap-snaplen = 96"),
        ("--pcap-filter=arp", "pcap-filter = 'arp'"),
        ("--port=socket-path=/a,vlan=5,wait", "port = [{ socket-path = '/a', vlan = 5, wait = true }]"),
        ("--loopback=generate:64", "loopback = 'generate:64'"),
        ("--wire", "wire = true"),
        ("--switch", "switch = true"),
        ("--switch=name=a,mac-ageing=9", "switch = [{ name = 'a', mac-ageing = 9 }]"),
        ("--uplink=af-xdp=e,queue=1", "uplink = { af-xdp = 'e', queue = 1 }"),
        ("--uplink=tap=t,switch=a", "uplink = [{ tap = 't', switch = 'a' }]"),
        ("--mac-ageing=9", "mac-ageing = 9"),
        ("--mac=52:54:00:00:00:01", "mac = '52:54:00:00:00:01'"),
        ("--mtu=9000", "mtu = 9000"),
        ("--num-queue-pairs=4", "num-queue-pairs = 4"),
        ("--queue-size=256", "queue-size = 256"),
        ("--packed=off", "packed = false"),
        ("--record-core-cycles", "record-core-cycles = true"),
    ];

    fn each() -> impl Iterator<Item = &'static (&'static str, &'static str)> {
        EACH.iter().chain(&running::EXAMPLES)
    }

    fn unchecked(text: &str) -> Result<Options> {
        let file = File::new(Path::new("f"), text.into());
        file.expect_options(&Cli::command())?;
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
    fn several_switches_are_said_in_both_ways() {
        let line = "x --switch --switch name=a,mac-ageing=9 --uplink=tap=t --uplink=af-packet=e,switch=a \
                    --port=socket-path=/a,switch=a --port=socket-path=/b";
        let file = "[[switch]]\n[[switch]]\nname = 'a'\nmac-ageing = 9\n\
                    [[uplink]]\ntap = 't'\n[[uplink]]\naf-packet = 'e'\nswitch = 'a'\n\
                    [[port]]\nsocket-path = '/a'\nswitch = 'a'\n[[port]]\nsocket-path = '/b'\n";
        let said = Cli::parse_from(line.split_whitespace()).options().unwrap();
        let written = Options::of(&File::new(Path::new("f"), file.into())).unwrap();
        assert_eq!(format!("{said:?}"), format!("{written:?}"));
        assert_eq!((said.switch.len(), said.uplink.len(), said.port.len()), (2, 2, 2));
    }

    #[test]
    fn what_the_command_line_refuses_a_file_may_not_say() {
        for line in [
            "pcap-snaplen = 13",
            "pcap-filter = 'nothing'",
            "loopback = 'generate:59'",
            "mac-ageing = 0",
            "mac = '01:00:00:00:00:00'",
            "mtu = 67",
            "num-queue-pairs = 17",
            "queue-size = 1000",
            "packed = 'maybe'",
            "cpus = 'x'",
            "cpus = 'auto:0'",
            "housekeeping = 'auto'",
            "poll = 'often'",
            "config = 'x'",
            "uplink = 'e'",
            "uplink = true",
            "switch = 'yes'",
            "switch = [{ mac-ageing = 0 }]",
            "switch = { vlan = 5 }",
            "sandbox = 'some'",
            "control = 1",
        ] {
            assert!(unchecked(line).is_err(), "{line}");
        }
    }
}
