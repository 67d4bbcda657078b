//! Which frames to capture: the part of libpcap's language that says where from and where to.
//!
//! ```text
//! expression = term { ("and" | "&&" | "or" | "||") term }        left to right, as libpcap has them
//! term       = ("not" | "!") term | "(" expression ")" | test
//! test       = [src | dst] [ether] host ADDRESS    an IPv4, IPv6 or (with ether) MAC address; ARP's addresses count
//!            | [src | dst] net ADDRESS/LENGTH
//!            | [tcp | udp] [src | dst] port NUMBER
//!            | ip | ip6 | arp | tcp | udp | icmp | icmp6
//!            | proto NUMBER | ether proto NUMBER
//!            | vlan [ID] | broadcast | multicast
//! ```
//!
//! Unlike libpcap's, tests look behind VLAN tags, whether or not `vlan` is said.

use std::net::IpAddr;
use std::str::FromStr;

use crate::packet::{
    ETHERTYPE_ARP, ETHERTYPE_IPV4, ETHERTYPE_IPV6, ICMP, ICMPV6, Layers, Mac, Network, Packet, TCP, UDP,
};

/// Why an expression is none.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FilterError {
    /// Something else was expected.
    #[error("'{0}' in a capture filter: expected {1}")]
    Unexpected(String, &'static str),
    /// It ends too early.
    #[error("a capture filter ends where {0} is expected")]
    Ends(&'static str),
    /// Nested without end.
    #[error("a capture filter has more than {MAX_DEPTH} brackets or nots inside each other")]
    Deep,
}

/// Brackets and nots inside each other.
const MAX_DEPTH: usize = 64;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Side {
    Source,
    Destination,
    Either,
}

impl Side {
    fn any<T>(self, source: T, destination: T, test: impl Fn(T) -> bool) -> bool {
        match self {
            Side::Source => test(source),
            Side::Destination => test(destination),
            Side::Either => test(source) || test(destination),
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Expression {
    All,
    Not(Box<Expression>),
    And(Box<[Expression; 2]>),
    Or(Box<[Expression; 2]>),
    /// Addresses whose first bits are these.
    Net(Side, IpAddr, u8),
    Ether(Side, Mac),
    Port(Side, Option<u8>, u16),
    Ethertype(u16),
    Protocol(Option<Network>, u8),
    Vlan(Option<u16>),
    Broadcast,
    Multicast,
}

/// A capture filter.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Filter(Expression);

impl Default for Filter {
    /// Everything.
    fn default() -> Self {
        Filter(Expression::All)
    }
}

impl Filter {
    /// Whether it lets everything pass.
    pub fn is_all(&self) -> bool {
        self.0 == Expression::All
    }

    /// Whether it lets this frame pass.
    pub fn matches(&self, packet: &Packet<'_>) -> bool {
        self.is_all() || self.0.matches(packet, &packet.layers())
    }
}

impl Expression {
    fn matches(&self, packet: &Packet<'_>, layers: &Layers) -> bool {
        match self {
            Expression::All => true,
            Expression::Not(inner) => !inner.matches(packet, layers),
            Expression::And(both) => both.iter().all(|one| one.matches(packet, layers)),
            Expression::Or(both) => both.iter().any(|one| one.matches(packet, layers)),
            Expression::Net(side, net, bits) => match addresses(packet, layers) {
                Some((source, destination)) => side.any(source, destination, |a| is_in(a, *net, *bits)),
                None => false,
            },
            Expression::Ether(side, mac) => side.any(packet.source(), packet.destination(), |a| a == *mac),
            Expression::Port(side, protocol, port) => match packet.ports(layers) {
                Some((source, destination)) => {
                    protocol.is_none_or(|p| p == layers.protocol)
                        && side.any(source, destination, |p| p == *port)
                }
                None => false,
            },
            Expression::Ethertype(wanted) => packet.ethertype() == *wanted,
            Expression::Protocol(network, protocol) => {
                let is_ip = matches!(layers.network, Network::Ipv4 | Network::Ipv6);
                is_ip && network.is_none_or(|n| n == layers.network) && layers.protocol == *protocol
            }
            Expression::Vlan(id) => packet.tag().is_some_and(|tag| id.is_none_or(|id| tag.vlan() == id)),
            Expression::Broadcast => packet.to_all(),
            Expression::Multicast => packet.to_group(),
        }
    }
}

/// The addresses of an IP or ARP packet, as its header has them.
fn addresses(packet: &Packet<'_>, layers: &Layers) -> Option<(IpAddr, IpAddr)> {
    let at = usize::from(layers.l3);
    match layers.network {
        Network::Ipv4 => {
            let both = packet.head().get(at + 12..)?.first_chunk::<8>()?;
            let (source, destination) = both.split_first_chunk::<4>()?;
            Some(((*source).into(), (*destination.first_chunk::<4>()?).into()))
        }
        Network::Ipv6 => {
            let both = packet.head().get(at + 8..)?.first_chunk::<32>()?;
            let (source, destination) = both.split_first_chunk::<16>()?;
            Some(((*source).into(), (*destination.first_chunk::<16>()?).into()))
        }
        Network::Arp => packet.arp().map(|arp| (arp.sender_ip.into(), arp.target_ip.into())),
        _ => None,
    }
}

/// Whether the first `bits` of both are the same.
fn is_in(address: IpAddr, net: IpAddr, bits: u8) -> bool {
    let differ = match (address, net) {
        (IpAddr::V4(a), IpAddr::V4(b)) => u128::from(a.to_bits() ^ b.to_bits()) << 96,
        (IpAddr::V6(a), IpAddr::V6(b)) => a.to_bits() ^ b.to_bits(),
        _ => return false,
    };
    differ.checked_shr(128 - u32::from(bits)).unwrap_or(0) == 0
}

impl FromStr for Filter {
    type Err = FilterError;

    fn from_str(text: &str) -> Result<Filter, FilterError> {
        let spaced = ["(", ")", "!", "&&", "||"]
            .iter()
            .fold(text.to_lowercase(), |text, mark| text.replace(mark, &format!(" {mark} ")));
        let mut words = Parser { words: spaced.split_whitespace().collect(), next: 0, depth: 0 };
        if words.words.is_empty() {
            return Ok(Filter::default());
        }
        let all = words.expression()?;
        match words.peek() {
            None => Ok(Filter(all)),
            Some(more) => Err(FilterError::Unexpected(more.into(), "and, or, or the end")),
        }
    }
}

struct Parser<'a> {
    words: Vec<&'a str>,
    next: usize,
    depth: usize,
}

impl<'a> Parser<'a> {
    fn peek(&self) -> Option<&'a str> {
        self.words.get(self.next).copied()
    }

    fn word(&mut self, expected: &'static str) -> Result<&'a str, FilterError> {
        let word = self.peek().ok_or(FilterError::Ends(expected))?;
        self.next += 1;
        Ok(word)
    }

    fn parsed<T: FromStr>(&mut self, expected: &'static str) -> Result<T, FilterError> {
        let word = self.word(expected)?;
        word.parse().map_err(|_| FilterError::Unexpected(word.into(), expected))
    }

    fn accept(&mut self, words: &[&str]) -> bool {
        let is_there = self.peek().is_some_and(|word| words.contains(&word));
        self.next += usize::from(is_there);
        is_there
    }

    fn expression(&mut self) -> Result<Expression, FilterError> {
        let mut left = self.term()?;
        loop {
            if self.accept(&["and", "&&"]) {
                left = Expression::And(Box::new([left, self.term()?]));
            } else if self.accept(&["or", "||"]) {
                left = Expression::Or(Box::new([left, self.term()?]));
            } else {
                return Ok(left);
            }
        }
    }

    fn term(&mut self) -> Result<Expression, FilterError> {
        let is_not = self.accept(&["not", "!"]);
        if !is_not && !self.accept(&["("]) {
            return self.test();
        }
        self.depth += 1;
        if self.depth > MAX_DEPTH {
            return Err(FilterError::Deep);
        }
        let inner = if is_not {
            Expression::Not(Box::new(self.term()?))
        } else {
            let inner = self.expression()?;
            let close = self.word(")")?;
            if close != ")" {
                return Err(FilterError::Unexpected(close.into(), "')'"));
            }
            inner
        };
        self.depth -= 1;
        Ok(inner)
    }

    fn test(&mut self) -> Result<Expression, FilterError> {
        const KINDS: &str = "a test, such as host, net, port, ether, vlan, ip, tcp";
        let word = self.word(KINDS)?;
        let transport = |p: u8| Expression::Protocol(None, p);
        Ok(match word {
            "ip" => Expression::Ethertype(ETHERTYPE_IPV4),
            "ip6" => Expression::Ethertype(ETHERTYPE_IPV6),
            "arp" => Expression::Ethertype(ETHERTYPE_ARP),
            "tcp" | "udp" => {
                let protocol = if word == "tcp" { TCP } else { UDP };
                match self.peek() {
                    Some("port" | "src" | "dst") => {
                        let side = self.side();
                        self.exactly("port")?;
                        self.port(side, Some(protocol))?
                    }
                    _ => transport(protocol),
                }
            }
            "icmp" => Expression::Protocol(Some(Network::Ipv4), ICMP),
            "icmp6" => Expression::Protocol(Some(Network::Ipv6), ICMPV6),
            "proto" => transport(self.parsed("a protocol number")?),
            "vlan" => match self.peek().and_then(|word| word.parse().ok()) {
                Some(id @ 0..4096u16) => {
                    self.next += 1;
                    Expression::Vlan(Some(id))
                }
                Some(id) => return Err(FilterError::Unexpected(id.to_string(), "a VLAN below 4096")),
                None => Expression::Vlan(None),
            },
            "broadcast" => Expression::Broadcast,
            "multicast" => Expression::Multicast,
            "src" | "dst" | "ether" | "host" | "net" | "port" => {
                self.next -= 1;
                self.located()?
            }
            other => return Err(FilterError::Unexpected(other.into(), KINDS)),
        })
    }

    fn side(&mut self) -> Side {
        if self.accept(&["src"]) {
            Side::Source
        } else if self.accept(&["dst"]) {
            Side::Destination
        } else {
            Side::Either
        }
    }

    fn exactly(&mut self, wanted: &'static str) -> Result<(), FilterError> {
        let word = self.word(wanted)?;
        if word == wanted { Ok(()) } else { Err(FilterError::Unexpected(word.into(), wanted)) }
    }

    /// A test of where from and where to, both `src ether` and `ether src`.
    fn located(&mut self) -> Result<Expression, FilterError> {
        let before = self.side();
        let is_ether = self.accept(&["ether"]);
        let side = if before == Side::Either { self.side() } else { before };
        match self.word("host, net or port")? {
            "host" if is_ether => Ok(Expression::Ether(side, self.mac()?)),
            "proto" if is_ether && side == Side::Either => {
                let word = self.word("an ethertype")?;
                let number =
                    word.strip_prefix("0x").map_or_else(|| word.parse(), |hex| u16::from_str_radix(hex, 16));
                let wrong = |_| FilterError::Unexpected(word.into(), "an ethertype, such as 0x0800");
                Ok(Expression::Ethertype(number.map_err(wrong)?))
            }
            "host" => {
                let address: IpAddr = self.parsed("an IPv4 or IPv6 address")?;
                Ok(Expression::Net(side, address, if address.is_ipv4() { 32 } else { 128 }))
            }
            "net" if !is_ether => self.net(side),
            "port" if !is_ether => self.port(side, None),
            other => Err(FilterError::Unexpected(other.into(), "host, net or port")),
        }
    }

    fn net(&mut self, side: Side) -> Result<Expression, FilterError> {
        const NET: &str = "a net, such as 10.0.0.0/8";
        let word = self.word(NET)?;
        let wrong = || FilterError::Unexpected(word.into(), NET);
        let (address, bits) = word.split_once('/').ok_or_else(wrong)?;
        let address: IpAddr = address.parse().map_err(|_| wrong())?;
        let bits: u8 = bits.parse().map_err(|_| wrong())?;
        let is_good = bits <= if address.is_ipv4() { 32 } else { 128 };
        if is_good { Ok(Expression::Net(side, address, bits)) } else { Err(wrong()) }
    }

    fn port(&mut self, side: Side, protocol: Option<u8>) -> Result<Expression, FilterError> {
        Ok(Expression::Port(side, protocol, self.parsed("a port number")?))
    }

    fn mac(&mut self) -> Result<Mac, FilterError> {
        let word = self.word("a MAC address")?;
        let wrong = || FilterError::Unexpected(word.into(), "a MAC address, such as 52:54:00:12:34:56");
        let mut mac = Mac::default();
        let mut parts = word.split(':');
        for byte in &mut mac {
            let part = parts.next().filter(|part| part.len() <= 2).ok_or_else(wrong)?;
            *byte = u8::from_str_radix(part, 16).map_err(|_| wrong())?;
        }
        if parts.next().is_some() { Err(wrong()) } else { Ok(mac) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use etherparse::PacketBuilder;

    const A: Mac = [2, 0, 0, 0, 0, 1];
    const B: Mac = [2, 0, 0, 0, 0, 2];

    /// UDP from 10.1.2.3:1000 to 10.9.8.7:53 on VLAN 12.
    fn udp() -> Vec<u8> {
        let mut bytes = Vec::new();
        let vlan = etherparse::VlanId::try_new(12).unwrap();
        let builder = PacketBuilder::ethernet2(A, B)
            .single_vlan(vlan)
            .ipv4([10, 1, 2, 3], [10, 9, 8, 7], 9)
            .udp(1000, 53);
        builder.write(&mut bytes, b"x").unwrap();
        bytes
    }

    /// TCP from fd00::1:80 to fd00::2:40000.
    fn tcp6() -> Vec<u8> {
        let (mut one, mut two) = ([0; 16], [0; 16]);
        [one[0], one[15], two[0], two[15]] = [0xfd, 1, 0xfd, 2];
        let mut bytes = Vec::new();
        PacketBuilder::ethernet2(B, A)
            .ipv6(one, two, 9)
            .tcp(80, 40_000, 1, 1)
            .write(&mut bytes, b"x")
            .unwrap();
        bytes
    }

    fn arp() -> Vec<u8> {
        let mut bytes =
            [&[255; 6][..], &A, &[8, 6, 0, 1, 8, 0, 6, 4, 0, 1], &A, &[10, 1, 2, 3], &[0; 6]].concat();
        bytes.extend([10, 9, 8, 7]);
        bytes
    }

    #[test]
    fn expressions_say_what_libpcap_means_by_them() {
        let frames = [udp(), tcp6(), arp()];
        let packets = frames.each_ref().map(|f| Packet::parse(f, f.len()).unwrap());
        for (text, wanted) in [
            ("", [true, true, true]),
            ("ip", [true, false, false]),
            ("ip6", [false, true, false]),
            ("arp", [false, false, true]),
            ("udp or arp", [true, false, true]),
            ("not udp", [false, true, true]),
            ("! udp && !arp", [false, true, false]),
            ("host 10.1.2.3", [true, false, true]),
            ("src host 10.1.2.3 and dst host 10.9.8.7", [true, false, true]),
            ("dst host 10.1.2.3", [false, false, false]),
            ("host fd00::2", [false, true, false]),
            ("net 10.0.0.0/8", [true, false, true]),
            ("net 10.1.2.0/24 and udp", [true, false, false]),
            ("src net 10.9.0.0/16", [false, false, false]),
            ("net fd00::/127", [false, true, false]),
            ("net fd00::/128", [false, false, false]),
            ("net 0.0.0.0/0", [true, false, true]),
            ("port 53", [true, false, false]),
            ("udp port 53", [true, false, false]),
            ("tcp port 53", [false, false, false]),
            ("tcp src port 80", [false, true, false]),
            ("src port 53", [false, false, false]),
            ("proto 17", [true, false, false]),
            ("icmp or icmp6", [false, false, false]),
            ("vlan", [true, false, false]),
            ("vlan 12", [true, false, false]),
            ("vlan 13", [false, false, false]),
            ("vlan and port 53", [true, false, false]),
            ("ether host 02:00:00:00:00:01", [true, true, true]),
            ("ether src 02:0:0:0:0:1", [false; 3]),
            ("ether dst host 2:0:0:0:0:1", [false, true, false]),
            ("src ether host 2:0:0:0:0:1", [true, false, true]),
            ("ether proto 0x86dd", [false, true, false]),
            ("ether proto 2054", [false, false, true]),
            ("broadcast", [false, false, true]),
            ("multicast and not broadcast", [false; 3]),
            // Left to right.
            ("arp or udp and port 54", [false; 3]),
            ("arp or (udp and port 53)", [true, false, true]),
            ("(arp)or(tcp)", [false, true, true]),
        ] {
            if text == "ether src 02:0:0:0:0:1" {
                assert!(text.parse::<Filter>().is_err());
                continue;
            }
            let filter: Filter = text.parse().unwrap_or_else(|e| panic!("{text}: {e}"));
            assert_eq!(packets.each_ref().map(|p| filter.matches(p)), wanted, "{text}");
        }
    }

    #[test]
    fn what_is_no_expression_is_refused() {
        for bad in [
            "host",
            "host 10.1",
            "net 10.0.0.0",
            "net 10.0.0.0/33",
            "port 65536",
            "and",
            "tcp tcp",
            "(tcp",
            "tcp)",
            "not",
            "vlan 4096",
            "ether host 1:2:3",
            "ether host 1:2:3:4:5:6:7",
            "ether port 5",
            "tcp host 1.2.3.4",
            "greater 5",
            "src vlan",
            "proto 256",
        ] {
            assert!(bad.parse::<Filter>().is_err(), "{bad}");
        }
        assert_eq!("not ".repeat(1000).parse::<Filter>(), Err(FilterError::Deep));
        assert_eq!("(".repeat(1000).parse::<Filter>(), Err(FilterError::Deep));
    }

    proptest::proptest! {
        #[test]
        fn no_frame_and_no_text_is_too_much(
            frame in proptest::collection::vec(proptest::num::u8::ANY, 0..200),
            ethertype in 0usize..4,
            text in "(host|net|port|ether|src|dst|not|and|or|\\(|\\)|vlan|10.0.0.1|fd00::1/64|12|tcp|ip6| ){0,12}",
        ) {
            let mut frame = frame;
            let types = [ETHERTYPE_IPV4, ETHERTYPE_IPV6, ETHERTYPE_ARP, 0x8100];
            if let Some(at) = frame.get_mut(12..14) {
                at.copy_from_slice(&types[ethertype].to_be_bytes());
            }
            let filter = text.parse::<Filter>().or_else(|_| "host 10.0.0.1 or net fd00::/8 or port 5 or vlan 3".parse());
            if let (Ok(packet), Ok(filter)) = (Packet::parse(&frame, frame.len()), filter) {
                filter.matches(&packet);
            }
        }
    }
}
