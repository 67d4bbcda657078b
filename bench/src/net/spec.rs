//! What to send and where: the options of `vbench net`, resolved.

use std::path::PathBuf;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use clap::{ArgMatches, Args, Command, FromArgMatches, ValueEnum};

use super::frame::{FLOWS, Kind, LARGEST, SMALLEST, VNET};
use crate::options::{self, Given};
use crate::spec::{Rate, Spec};
use crate::units::count;

/// Options that mean the same as for `vbench run`.
const SHARED: &[&str] = &[
    "name",
    "runtime",
    "ramp_time",
    "arrival_rate",
    "arrival",
    "randseed",
    "completion",
    "indirect",
    "no_event_idx",
    "packed",
    "hugepages",
    "cpu",
    "cpus_allowed",
];

/// Their values.
#[derive(Clone, Debug, Default)]
pub struct Shared(pub Given);

impl Args for Shared {
    fn augment_args(command: Command) -> Command {
        options::augment(command, options::OPTIONS.iter().filter(|o| SHARED.contains(&o.name)))
    }

    fn augment_args_for_update(command: Command) -> Command {
        Self::augment_args(command)
    }
}

impl FromArgMatches for Shared {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Shared, clap::Error> {
        Given::from_arg_matches(matches).map(Shared)
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        self.0.update_from_arg_matches(matches)
    }
}

/// Which way packets go.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Direction {
    /// One socket: what is sent comes back.
    Echo,
    /// One socket: the back end takes what is sent.
    Transmit,
    /// One socket: the back end sends.
    Receive,
    /// Two sockets: from the first to the second.
    Forward,
    /// Two sockets: from each to the other.
    Both,
}

impl Direction {
    /// Its name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Direction::Echo => "echo",
            Direction::Transmit => "transmit",
            Direction::Receive => "receive",
            Direction::Forward => "forward",
            Direction::Both => "both",
        }
    }

    /// Sockets that it takes.
    pub fn ports(self) -> usize {
        if matches!(self, Direction::Forward | Direction::Both) { 2 } else { 1 }
    }

    /// Whether it is sent from this port.
    pub fn sends(self, port: usize) -> bool {
        match self {
            Direction::Receive => false,
            Direction::Forward => port == 0,
            _ => true,
        }
    }

    /// Where it arrives.
    pub fn to(self, port: usize) -> usize {
        if self.ports() == 2 { 1 - port } else { port }
    }

    /// Whether what is sent is waited for.
    pub fn returns(self) -> bool {
        !matches!(self, Direction::Transmit | Direction::Receive)
    }
}

/// Frames that are sent in turn.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mix {
    /// Kinds.
    pub kinds: Vec<Kind>,
    /// Which of them, one after another.
    pub order: Vec<u8>,
    text: String,
}

impl Mix {
    /// As it was written.
    pub fn text(&self) -> &str {
        &self.text
    }

    /// The largest frame.
    pub fn largest(&self) -> u32 {
        self.kinds.iter().map(|k| k.size).max().unwrap_or(SMALLEST)
    }

    /// Whether there are frames to be segmented.
    pub fn gso(&self) -> bool {
        self.kinds.iter().any(|k| k.gso_size.is_some())
    }
}

impl FromStr for Mix {
    type Err = String;

    fn from_str(text: &str) -> Result<Mix, String> {
        let parts = if text == "imix" { "64:7,594:4,1518:1" } else { text };
        let (mut kinds, mut weights) = (Vec::new(), Vec::new());
        for part in parts.split(',') {
            let (size, weight) = part.split_once(':').unwrap_or((part, "1"));
            let kind = if size == "gso" {
                Kind { size: LARGEST, gso_size: Some(1448) }
            } else {
                Kind { size: count(size, SMALLEST.into(), LARGEST.into())? as u32, gso_size: None }
            };
            if kinds.contains(&kind) {
                return Err(format!("'{text}' has {size} twice"));
            }
            kinds.push(kind);
            weights.push(count(weight, 1, 100)? as usize);
        }
        // Each as evenly spread over the whole as it can be: the one that is furthest behind its share comes next.
        let total: usize = weights.iter().sum();
        let mut sent = vec![0; kinds.len()];
        let order = (1..=total).map(|n| {
            let behind = |i: &usize| (weights[*i] * n) as i64 - (sent[*i] * total) as i64;
            let next = (0..kinds.len()).max_by_key(behind).unwrap_or(0);
            sent[next] += 1;
            next as u8
        });
        Ok(Mix { order: order.collect(), kinds, text: text.into() })
    }
}

/// How much of each packet that arrives is compared with what was sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Verify {
    /// All of it.
    All,
    /// Headers, number, time and checksum of those, but not the body after them.
    Head,
}

/// A MAC address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mac(pub [u8; 6]);

impl FromStr for Mac {
    type Err = String;

    fn from_str(s: &str) -> Result<Mac, String> {
        let bytes: Vec<u8> = s.split(':').filter_map(|b| u8::from_str_radix(b, 16).ok()).collect();
        let bytes: [u8; 6] = bytes.try_into().map_err(|_| format!("'{s}' is no MAC address"))?;
        if bytes[0] & 1 != 0 { Err(format!("'{s}' is a group's address")) } else { Ok(Mac(bytes)) }
    }
}

/// What to drive a network back end with.
#[derive(Clone, Debug, clap::Args)]
pub struct NetLoad {
    /// Which way: echo, transmit or receive with one socket, forward or both with two [default: echo, or both]
    #[arg(long, value_enum)]
    pub direction: Option<Direction>,
    /// Bytes of a frame as they are in the ring, without the frame check sequence: 64 to 65536; imix, which is
    /// 64:7,594:4,1518:1 (size:weight,..); or gso, TCP of 64 KiB to be segmented
    #[arg(long, value_name = "SIZES", default_value = "64")]
    pub size: Mix,
    /// Flows of each queue, told apart by their UDP or TCP source port
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=i64::from(FLOWS)))]
    pub flows: u32,
    /// Queue pairs, each driven by a thread of its own
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=64))]
    pub queue_pairs: u16,
    /// Descriptors of each ring, a power of two
    #[arg(long, value_name = "N", default_value = "256", value_parser = ring_size)]
    pub ring_size: u16,
    /// Most packets sent, or received, before the other side is told
    #[arg(long, value_name = "N", default_value_t = 32, value_parser = clap::value_parser!(u16).range(1..=256))]
    pub burst: u16,
    /// Closed loop: packets under way for each queue; the next is sent when one has arrived. Without it and without a
    /// rate, as many are sent as the ring takes
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=65536), conflicts_with = "arrival_rate")]
    pub iodepth: Option<u32>,
    /// At most N packets a second for each queue; latency counts from when one is sent. (With --arrival-rate it counts
    /// from when it should have been)
    #[arg(long, value_name = "N", value_parser = rate, conflicts_with = "arrival_rate")]
    pub rate_pps: Option<u64>,
    /// End when each queue has sent so many packets; without --runtime that is all that ends it
    #[arg(long, value_name = "N", value_parser = rate)]
    pub packets: Option<u64>,
    /// Mergeable receive buffers: 1 where they are offered, 0 never
    #[arg(long, value_name = "0|1", default_value_t = 1, value_parser = clap::value_parser!(u8).range(0..=1))]
    pub mrg_rxbuf: u8,
    /// Bytes of a receive buffer where they are mergeable; where not, they hold the largest frame
    #[arg(long, value_name = "SIZE", default_value_t = 2048, value_parser = clap::value_parser!(u32).range(128..=65536))]
    pub rx_buffer: u32,
    /// What of a packet is checked
    #[arg(long, value_enum, default_value_t = Verify::All)]
    pub verify: Verify,
    /// MAC addresses of the ports
    #[arg(
        long,
        value_name = "MAC,MAC",
        value_delimiter = ',',
        default_value = "52:54:00:00:00:01,52:54:00:00:00:02"
    )]
    pub mac: Vec<Mac>,
    /// Most packets that may be lost, in percent of those sent: more is a failure, and what the search allows
    #[arg(long, value_name = "PERCENT", value_parser = percent)]
    pub max_loss: Option<f64>,
    /// How long to wait for packets that are under way at the end
    #[arg(long, value_name = "TIME", default_value = "100ms", value_parser = crate::units::time)]
    pub drain_time: Duration,
    /// Those that mean the same as for vbench run
    #[command(flatten)]
    pub shared: Shared,
}

fn ring_size(s: &str) -> Result<u16, String> {
    let n = count(s, 4, 32768)? as u16;
    if n.is_power_of_two() { Ok(n) } else { Err(format!("'{s}' is no power of two")) }
}

fn rate(s: &str) -> Result<u64, String> {
    count(s, 1, 1 << 40)
}

pub(super) fn percent(s: &str) -> Result<f64, String> {
    let n: f64 = s.parse().map_err(|_| format!("'{s}' is no percentage"))?;
    if (0.0..=100.0).contains(&n) { Ok(n) } else { Err(format!("'{s}' is not between 0 and 100")) }
}

/// All that a run is to do.
#[derive(Clone, Debug)]
pub struct NetSpec {
    /// Sockets: one or two.
    pub sockets: Vec<PathBuf>,
    /// The back ends connect to us.
    pub server: bool,
    /// Which way.
    pub direction: Direction,
    /// Options of its own.
    pub load: NetLoad,
    /// What `vbench run` has as well.
    pub base: Arc<Spec>,
}

impl NetSpec {
    /// Puts it together, and says what does not fit.
    pub fn new(sockets: Vec<PathBuf>, server: bool, load: &NetLoad) -> Result<NetSpec, String> {
        let mut base = Spec { name: "net".into(), ..Spec::default() };
        load.shared.0.apply(&mut base)?;
        base.numjobs = load.queue_pairs;
        base.number_ios = load.packets;
        if base.runtime.is_none() && load.packets.is_none() {
            base.runtime = Some(Duration::from_secs(5));
        }
        let direction =
            load.direction.unwrap_or(if sockets.len() > 1 { Direction::Both } else { Direction::Echo });
        let n = direction.ports();
        let bad = if sockets.len() != n {
            format!("{} needs {n} --socket-path, not {}", direction.name(), sockets.len())
        } else if n == 2 && sockets[0] == sockets[1] {
            "both sockets are the same".into()
        } else if load.mac.len() != 2 {
            "--mac takes two addresses".into()
        } else if base.poisson && base.arrival_rate.is_none() {
            "arrival=poisson needs an arrival_rate".into()
        } else if base.cpu.is_some() && base.cpus_allowed.is_some() {
            "cpu and cpus_allowed exclude each other".into()
        } else if load.iodepth.is_some() && !direction.returns() {
            format!("--iodepth counts packets until they arrive, and in {} none do", direction.name())
        } else if load.packets.is_some() && direction == Direction::Receive {
            "--packets counts what is sent; receive goes by --runtime".into()
        } else {
            return Ok(NetSpec { sockets, server, direction, load: load.clone(), base: Arc::new(base) });
        };
        Err(bad)
    }

    /// The same at another rate and for another time, as one trial of a search.
    pub fn at(&self, rate: Option<f64>, runtime: Duration) -> NetSpec {
        let mut other = self.clone();
        let mut base = (*self.base).clone();
        base.arrival_rate = rate.map(|r| (r as u64).max(1));
        base.runtime = Some(runtime);
        other.base = Arc::new(base);
        other.load.rate_pps = None;
        other
    }

    /// How each queue's packets are timed.
    pub fn rate(&self) -> Rate {
        self.load.rate_pps.map_or_else(|| self.base.rate(), |rate| Rate::Closed(rate as f64))
    }

    /// Bytes of a receive buffer.
    pub fn rx_buffer(&self, mergeable: bool) -> u32 {
        let largest = self.load.size.largest();
        // A back end that sends by itself may send what Ethernet takes.
        let whole = if self.direction == Direction::Receive { largest.max(1518) } else { largest };
        if mergeable { self.load.rx_buffer } else { whole + VNET as u32 }
    }

    /// Memory of one port.
    pub fn memory(&self) -> u64 {
        let frames = u64::from(self.load.size.largest()).next_multiple_of(64) + 256;
        let buffers = u64::from(self.rx_buffer(false).max(self.rx_buffer(true))).next_multiple_of(64);
        let ring = u64::from(self.load.ring_size);
        u64::from(self.load.queue_pairs) * (ring * (frames + buffers + 52) + (8 << 12)) + (1 << 16)
    }

    /// Streams that arrive at `port` of queue pair `index`: all that are sent to it, from any queue.
    pub fn stream(&self, port: usize, index: usize) -> u8 {
        (index * self.direction.ports() + port) as u8
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use clap::Parser;

    use super::*;

    #[derive(Debug, Parser)]
    #[command(no_binary_name = true)]
    struct Line {
        #[command(flatten)]
        load: NetLoad,
    }

    fn spec(sockets: &[&str], args: &[&str]) -> Result<NetSpec, String> {
        let line = Line::try_parse_from(args).map_err(|e| e.to_string())?;
        NetSpec::new(sockets.iter().map(PathBuf::from).collect(), false, &line.load)
    }

    #[test]
    fn a_mix_has_its_weights_and_is_spread_evenly() {
        let mix: Mix = "imix".parse().unwrap();
        let sizes: Vec<u32> = mix.order.iter().map(|k| mix.kinds[usize::from(*k)].size).collect();
        assert_eq!(sizes.len(), 12);
        for (size, n) in [(64, 7), (594, 4), (1518, 1)] {
            assert_eq!(sizes.iter().filter(|s| **s == size).count(), n);
        }
        assert!(sizes.windows(4).all(|w| w.contains(&64) && w.contains(&594)), "{sizes:?}");
        assert!("gso".parse::<Mix>().unwrap().gso());
        for bad in ["", "63", "65537", "64:0", "64,64", "x", "64:1:1"] {
            assert!(bad.parse::<Mix>().is_err(), "{bad}");
        }
    }

    #[test]
    fn options_that_do_not_fit_together_are_refused() {
        assert_eq!(spec(&["a"], &[]).unwrap().direction, Direction::Echo);
        assert_eq!(spec(&["a", "b"], &[]).unwrap().direction, Direction::Both);
        for (sockets, args, what) in [
            (&["a"][..], &["--direction=both"][..], "both needs 2 --socket-path"),
            (&["a", "b"], &["--direction=echo"], "echo needs 1 --socket-path"),
            (&["a", "a"], &[], "both sockets are the same"),
            (&["a"], &["--direction=transmit", "--iodepth=1"], "--iodepth counts"),
            (&["a"], &["--direction=receive", "--packets=1"], "--packets counts"),
            (&["a"], &["--arrival=poisson"], "needs an arrival_rate"),
            (&["a"], &["--iodepth=1", "--arrival-rate=1"], "cannot be used with"),
            (&["a"], &["--ring-size=100"], "no power of two"),
            (&["a"], &["--mac=01:00:00:00:00:00"], "a group's address"),
            (&["a"], &["--max-loss=101"], "not between 0 and 100"),
        ] {
            let said = spec(sockets, args).unwrap_err();
            assert!(said.contains(what), "{said}");
        }
    }

    #[test]
    fn without_an_end_it_is_five_seconds() {
        assert_eq!(spec(&["a"], &[]).unwrap().base.runtime, Some(Duration::from_secs(5)));
        assert_eq!(spec(&["a"], &["--packets=5"]).unwrap().base.runtime, None);
        let rate = |args: &[&str]| spec(&["a"], args).unwrap().rate();
        assert_eq!(rate(&[]), Rate::Full);
        assert_eq!(rate(&["--rate-pps=5"]), Rate::Closed(5.0));
        assert_eq!(rate(&["--arrival-rate=1k"]), Rate::Open { rate: 1024.0, poisson: false });
    }
}
