//! The command line, by QEMU's back-end conventions (docs/interop/vhost-user.rst, "Backend program conventions").

use std::path::PathBuf;
use std::str::FromStr;

use clap::Parser;
use daemon::{Switch, on_off, ring_size};
use poll_engine::engine::pacing::Pacing;
use poll_engine::engine::placement::CpuList;

use crate::device::{MAX_PAIRS, MTU_RANGE};
use crate::hub::Plan;
use crate::mac::{MacAddr, NotAMac};
use crate::pcap::SNAPLEN;
use crate::pcap::filter::Filter;
use crate::switch::PortConfig;
use crate::switch::options::KEYS;

/// Poll-mode vhost-user network back end.
///
/// Gives virtual machines network cards on Unix sockets: QEMU, Cloud Hypervisor or crosvm connects, shares the guest's
/// memory, and packets are copied once, from the memory of one guest to that of the other.
///
/// SIGTERM finishes what is in flight and exits; SIGUSR1 prints statistics.
#[allow(clippy::struct_excessive_bools)] // options, each by itself
#[derive(Debug, Parser)]
#[command(name = "vhost-net", version, max_term_width = 110)]
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

    /// Join the first port to this tap; one that does not exist is made, and goes when this ends
    #[arg(long, value_name = "NAME", conflicts_with_all = ["wire", "loopback"])]
    pub tap: Option<String>,

    /// Join the first port to an inherited tap, by descriptor numbers: one for each pair of queues
    #[arg(long, value_name = "FDNUM,...", value_delimiter = ',', conflicts_with_all = ["tap", "wire", "loopback"])]
    pub tap_fds: Vec<i32>,

    /// Capture what crosses taps to a new file (pcapng), for Wireshark and tcpdump
    #[arg(long, value_name = "FILE")]
    pub pcap: Option<PathBuf>,

    /// Bytes of each frame to capture, at most
    #[arg(long, value_name = "BYTES", default_value_t = SNAPLEN, requires = "pcap", value_parser = clap::value_parser!(u32).range(14..))]
    pub pcap_snaplen: u32,

    /// What to capture, such as "tcp port 80 or arp"; without: everything
    #[arg(long, value_name = "EXPRESSION", default_value = "", hide_default_value = true, requires = "pcap")]
    pub pcap_filter: Filter,

    /// Serve a further port; repeat for more. Keys: socket-path, name, mac, mtu, wait, tap; with --switch also vlan, trunk
    /// (such as 5+10-19), native, guard, ip, router, isolated, flood-unknown, max-macs, tx-bps, tx-pps, rx-bps, rx-pps,
    /// burst-ms, broadcast-pps, multicast-pps, unknown-pps
    #[arg(long, value_name = "KEY=VALUE,...")]
    pub port: Vec<ExtraPort>,

    /// Join each port to itself, for measuring: echo, discard, or generate:BYTES
    #[arg(long, value_name = "KIND", value_parser = loopback, conflicts_with = "wire")]
    pub loopback: Option<Plan>,

    /// Join two ports to each other, and nothing else
    #[arg(long)]
    pub wire: bool,

    /// Join all ports by a switch that learns addresses
    #[arg(long, conflicts_with_all = ["wire", "loopback"])]
    pub switch: bool,

    /// With --switch, join it to an interface of the host's. Keys: af-packet (any interface) or af-xdp (around the kernel's
    /// stack, with queue), and of those of --port: vlan, trunk, native, isolated, flood-unknown, max-macs and the limits
    #[arg(long, value_name = "KEY=VALUE,...", requires = "switch")]
    pub uplink: Option<UplinkPort>,

    /// With --switch, how long an address is known that sends nothing
    #[arg(long, value_name = "SECONDS", default_value_t = 300, value_parser = clap::value_parser!(u32).range(1..))]
    pub mac_ageing: u32,

    /// Address of the first port's card (such as 52:54:00:12:34:56); without, the front end's or the guest's own
    #[arg(long, value_name = "MAC", value_parser = mac)]
    pub mac: Option<[u8; 6]>,

    /// MTU that cards advise to their guests
    #[arg(long, value_name = "BYTES", value_parser = mtu)]
    pub mtu: Option<u16>,

    /// Pairs of queues that each card offers (1 to 16)
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=i64::from(MAX_PAIRS)))]
    pub num_queue_pairs: u16,

    /// Largest ring a queue may have (a power of two up to 32768)
    #[arg(long, value_name = "N", default_value_t = 1024, value_parser = ring_size)]
    pub queue_size: u16,

    /// Offer packed rings, which a driver may then choose
    #[arg(long, value_enum, default_value_t = Switch::On)]
    pub packed: Switch,

    /// CPUs to run on, one pinned reactor each (such as 2-3,6); without: one reactor, not pinned
    #[arg(long, value_name = "LIST")]
    pub cpus: Option<CpuList>,

    /// How to wait for packets: busy never sleeps, adaptive spins a while first, event sleeps at once
    #[arg(long, value_name = "MODE", default_value = "adaptive")]
    pub poll: Pacing,

    /// Count the cycles that reactors are busy for, for the statistics
    #[arg(long)]
    pub record_core_cycles: bool,

    /// What to log: error, warn, info, debug or trace, also by module (poll_engine=debug)
    #[arg(long, value_name = "FILTER", default_value = "info")]
    pub log: String,
}

/// One `--port`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ExtraPort {
    /// Where to listen.
    pub socket_path: PathBuf,
    /// For people.
    pub name: Option<String>,
    /// The card's address.
    pub mac: Option<[u8; 6]>,
    /// The MTU it advises.
    pub mtu: Option<u16>,
    /// Packets for it wait for its buffers.
    pub wait: bool,
    /// What it is to a switch.
    pub rules: PortConfig,
    /// The tap that it is joined to.
    pub tap: Option<String>,
}

impl FromStr for ExtraPort {
    type Err = String;

    fn from_str(s: &str) -> Result<ExtraPort, String> {
        let mut port = ExtraPort::default();
        for pair in s.split(',') {
            let (key, value) = pair.split_once('=').unwrap_or((pair, "on"));
            match key {
                "socket-path" => port.socket_path = value.into(),
                "name" => port.name = Some(value.into()),
                "mac" => port.mac = Some(mac(value)?),
                "mtu" => port.mtu = Some(mtu(value)?),
                "wait" => port.wait = on_off(key, value)?,
                "tap" => port.tap = Some(value.into()),
                key if port.rules.set(key, value)? => {}
                other => {
                    return Err(format!(
                        "unknown key '{other}' (socket-path, name, mac, mtu, wait, tap, {KEYS})"
                    ));
                }
            }
        }
        if port.socket_path.as_os_str().is_empty() {
            return Err("socket-path is missing".into());
        }
        Ok(port)
    }
}

/// The interface that a switch is joined to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UplinkPort {
    /// Its name.
    pub interface: String,
    /// With AF_XDP, its queue; without, packet sockets.
    pub xdp_queue: Option<u32>,
    /// What it is to the switch.
    pub rules: PortConfig,
}

impl FromStr for UplinkPort {
    type Err = String;

    fn from_str(s: &str) -> Result<UplinkPort, String> {
        let (mut interface, mut xdp, mut queue) = (None, false, None);
        let mut rules = PortConfig::default();
        for pair in s.split(',') {
            let (key, value) = pair.split_once('=').ok_or(format!("'{pair}' is no key and value"))?;
            match key {
                "af-packet" | "af-xdp" if interface.is_some() => return Err("one interface is enough".into()),
                "af-packet" | "af-xdp" => (interface, xdp) = (Some(value.to_owned()), key == "af-xdp"),
                "queue" => queue = Some(value.parse().map_err(|_| format!("queue={value}: write a number"))?),
                "guard" | "ip" | "router" => return Err(format!("{key} is for ports of guests")),
                key if rules.set(key, value)? => {}
                other => return Err(format!("unknown key '{other}' (af-packet, af-xdp, queue, {KEYS})")),
            }
        }
        let interface = interface.filter(|name| !name.is_empty()).ok_or("af-packet or af-xdp is missing")?;
        match (xdp, queue) {
            (false, Some(_)) => Err("queue goes with af-xdp".into()),
            (false, None) => Ok(UplinkPort { interface, xdp_queue: None, rules }),
            (true, queue) => Ok(UplinkPort { interface, xdp_queue: Some(queue.unwrap_or(0)), rules }),
        }
    }
}

fn loopback(s: &str) -> Result<Plan, String> {
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

fn mtu(s: &str) -> Result<u16, String> {
    let (least, most) = (MTU_RANGE.start(), MTU_RANGE.end());
    s.parse()
        .ok()
        .filter(|n| MTU_RANGE.contains(n))
        .ok_or(format!("an MTU is a number from {least} to {most}"))
}

/// A card's address as people write it.
pub fn mac(s: &str) -> Result<[u8; 6], String> {
    let mac: MacAddr = s.replace('-', ":").parse().map_err(|e: NotAMac| e.to_string())?;
    if mac.is_group() {
        return Err(format!("'{s}' is a group's address, not a card's"));
    }
    if !mac.is_station() {
        return Err("a card's address is not zero".into());
    }
    Ok(mac.0)
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
    fn addresses_are_six_bytes_of_one_card() {
        assert_eq!(mac("52:54:00:12:34:5f"), Ok([0x52, 0x54, 0, 0x12, 0x34, 0x5f]));
        for bad in [
            "",
            "52:54:00:12:34",
            "52:54:00:12:34:56:78",
            "53:54:00:12:34:56",
            "5:54:00:12:34:56",
            "00:00:00:00:00:00",
        ] {
            assert!(mac(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn further_ports_are_key_value_lists() {
        let port: ExtraPort = "socket-path=/s,name=a,wait,mtu=9000,tap=t0".parse().unwrap();
        assert_eq!((port.name.as_deref(), port.wait, port.mtu), (Some("a"), true, Some(9000)));
        assert_eq!(port.tap.as_deref(), Some("t0"));
        for bad in [
            "",
            "name=a",
            "socket-path=/s,x=y",
            "socket-path=/s,mtu=1",
            "socket-path=/s,vlan=0",
            "socket-path=/s,wait=maybe",
        ] {
            assert!(bad.parse::<ExtraPort>().is_err(), "{bad}");
        }
    }

    #[test]
    fn an_uplink_is_one_interface() {
        let uplink: UplinkPort = "af-xdp=eth0,queue=3,trunk=5+6".parse().unwrap();
        assert_eq!((uplink.interface.as_str(), uplink.xdp_queue), ("eth0", Some(3)));
        assert_eq!("af-packet=eth0".parse::<UplinkPort>().unwrap().xdp_queue, None);
        for bad in [
            "",
            "eth0",
            "af-packet=",
            "vlan=5",
            "af-packet=a,af-xdp=b",
            "af-packet=a,queue=1",
            "af-packet=a,guard=on",
            "af-packet=a,x=y",
        ] {
            assert!(bad.parse::<UplinkPort>().is_err(), "{bad}");
        }
    }
}
