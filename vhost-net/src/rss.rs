//! Receive-side scaling: which receive queue a packet belongs to, by a hash of its addresses and ports, and the hash
//! that is reported with it (virtio 1.3, 5.1.6.4.3, 5.1.6.4.5 and 5.1.6.5.7).
//!
//! The hash is Toeplitz's: for each bit of the input that is set, the 32 bits of the key that begin at that bit. Those
//! are summed up beforehand for every 4 bits that the input can have at each place, which is 4.5 KiB that stay in the
//! cache.

use thiserror::Error;

use crate::header::HashReport;
use crate::packet::{Layers, Network, Packet, TCP, UDP};

/// Bytes of the longest key, and of those that are expected.
pub const KEY: usize = 40;
/// Most entries of the indirection table.
pub const TABLE: usize = 128;
/// Bytes of the longest input: two IPv6 addresses and two ports.
const INPUT: usize = 36;

/// `VIRTIO_NET_HASH_TYPE_*`: what is hashed.
pub mod hash_types {
    /// IPv4: addresses.
    pub const IPV4: u32 = 1 << 0;
    /// TCP over IPv4: addresses and ports.
    pub const TCPV4: u32 = 1 << 1;
    /// UDP over IPv4.
    pub const UDPV4: u32 = 1 << 2;
    /// IPv6.
    pub const IPV6: u32 = 1 << 3;
    /// TCP over IPv6.
    pub const TCPV6: u32 = 1 << 4;
    /// UDP over IPv6.
    pub const UDPV6: u32 = 1 << 5;
    /// IPv6 with extension headers.
    pub const IP_EX: u32 = 1 << 6;
    /// TCP over that.
    pub const TCP_EX: u32 = 1 << 7;
    /// UDP over that.
    pub const UDP_EX: u32 = 1 << 8;
    /// All of them.
    pub const ALL: u32 = (1 << 9) - 1;
}
use hash_types::{IP_EX, IPV4, IPV6, TCP_EX, TCPV4, TCPV6, UDP_EX, UDPV4, UDPV6};

/// Why what the driver wants is not done.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum BadRss {
    /// Bytes are missing, or there are more.
    #[error("the command's length is not that of its table and key")]
    Length,
    /// Hash types that the device has not.
    #[error("hash_types has bits that the device does not offer")]
    HashTypes,
    /// The table's length.
    #[error("the indirection table's length is no power of two, or more than {TABLE}")]
    Table,
    /// A queue that there is none of.
    #[error("the command names a receive queue that is not there")]
    Queue,
    /// The key's length.
    #[error("the key is longer than {KEY} bytes, or empty")]
    Key,
}

/// A key, made ready.
#[derive(Clone)]
pub struct Toeplitz {
    /// For each 4 bits of the input, the high ones of a byte first, what they add to the hash.
    nibbles: Box<[[u32; 16]; INPUT * 2]>,
}

impl std::fmt::Debug for Toeplitz {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Toeplitz").finish_non_exhaustive()
    }
}

impl Toeplitz {
    /// A key of up to [`KEY`] bytes; what a shorter one lacks is zero.
    pub fn new(key: &[u8]) -> Toeplitz {
        let bit = |at: usize| u32::from(key.get(at / 8).is_some_and(|b| b >> (7 - at % 8) & 1 != 0));
        let window = |at: usize| (at..at + 32).fold(0, |sum, i| sum << 1 | bit(i));
        let mut nibbles = Box::new([[0; 16]; INPUT * 2]);
        for (place, sums) in nibbles.iter_mut().enumerate() {
            let windows: [u32; 4] = std::array::from_fn(|i| window(place * 4 + i));
            for (value, sum) in sums.iter_mut().enumerate() {
                let set = windows.iter().enumerate().filter(|(i, _)| value >> (3 - i) & 1 != 0);
                *sum = set.fold(0, |sum, (_, window)| sum ^ window);
            }
        }
        Toeplitz { nibbles }
    }

    /// The hash of up to 36 bytes; more are not looked at.
    #[inline]
    pub fn hash(&self, input: &[u8]) -> u32 {
        self.sum(0, input)
    }

    /// What these bytes add to the hash of an input where they are at `at`.
    #[inline]
    fn sum(&self, at: usize, input: &[u8]) -> u32 {
        let pairs = self.nibbles.as_chunks::<2>().0;
        let places = pairs.get(at..).unwrap_or_default().iter();
        places.zip(input).fold(0, |sum, ([high, low], byte)| {
            sum ^ high[usize::from(byte >> 4)] ^ low[usize::from(byte & 0xf)]
        })
    }
}

/// What is hashed, and with which key. Of `VIRTIO_NET_CTRL_MQ_HASH_CONFIG`, or part of [`Rss`].
#[derive(Clone, Debug)]
pub struct Hasher {
    hash_types: u32,
    key: Toeplitz,
}

impl Hasher {
    /// Hashes what `hash_types` says with this key.
    pub fn new(hash_types: u32, key: &[u8]) -> Hasher {
        Hasher { hash_types, key: Toeplitz::new(key) }
    }

    /// `struct virtio_net_hash_config` (5.1.6.5.6.4).
    pub fn from_hash_config(command: &[u8]) -> Result<Hasher, BadRss> {
        let (fixed, rest) = command.split_first_chunk::<12>().ok_or(BadRss::Length)?;
        hasher([fixed[0], fixed[1], fixed[2], fixed[3]], rest)
    }

    /// The hash of a packet, and of what it is; of kind 0 (`VIRTIO_NET_HASH_REPORT_NONE`) if it has none.
    pub fn report(&self, packet: &Packet<'_>, layers: &Layers) -> HashReport {
        self.hash(packet, layers).unwrap_or_default()
    }

    fn hash(&self, packet: &Packet<'_>, layers: &Layers) -> Option<HashReport> {
        let (types, addresses) = match layers.network {
            Network::Ipv4 => ([TCPV4, UDPV4, IPV4], 4),
            Network::Ipv6 => ([TCPV6, UDPV6, IPV6], 16),
            _ => return None,
        };
        if layers.extended && layers.whole {
            let source = usize::from(layers.source);
            let destination = usize::from(layers.destination);
            if let Some(found) =
                self.one_of([TCP_EX, UDP_EX, IP_EX], packet, layers, [source, destination], 16)
            {
                return Some(found);
            }
        }
        // Extension headers are skipped.
        let l3 = usize::from(layers.l3);
        let source = l3 + if addresses == 4 { 12 } else { 8 };
        self.one_of(types, packet, layers, [source, source + addresses], addresses)
    }

    /// The first of these types that is enabled and the packet is of.
    #[inline]
    fn one_of(
        &self,
        [tcp, udp, ip]: [u32; 3],
        packet: &Packet<'_>,
        layers: &Layers,
        [source, destination]: [usize; 2],
        len: usize,
    ) -> Option<HashReport> {
        let ports = match layers.protocol {
            _ if layers.payload.is_none() => None,
            TCP if self.hash_types & tcp != 0 => Some(tcp),
            UDP if self.hash_types & udp != 0 => Some(udp),
            _ => None,
        };
        let head = packet.head();
        let hashed = ports.or((self.hash_types & ip != 0).then_some(ip))?;
        let mut value = self.key.sum(0, head.get(source..source + len)?);
        value ^= self.key.sum(len, head.get(destination..destination + len)?);
        if ports.is_some() {
            let transport = usize::from(layers.transport);
            value ^= self.key.sum(2 * len, head.get(transport..transport + 4)?);
        }
        // VIRTIO_NET_HASH_TYPE_XXX = 1 << (VIRTIO_NET_HASH_REPORT_XXX - 1)
        Some(HashReport { value, kind: hashed.trailing_zeros() as u16 + 1 })
    }
}

/// Length and data of a key, which end a command.
fn hasher(hash_types: [u8; 4], key: &[u8]) -> Result<Hasher, BadRss> {
    let hash_types = u32::from_le_bytes(hash_types);
    if hash_types & !hash_types::ALL != 0 {
        return Err(BadRss::HashTypes);
    }
    let (len, key) = key.split_first().ok_or(BadRss::Length)?;
    if key.len() != usize::from(*len) {
        return Err(BadRss::Length);
    }
    // With nothing to hash, there need be no key.
    if key.len() > KEY || (key.is_empty() && hash_types != 0) {
        return Err(BadRss::Key);
    }
    Ok(Hasher::new(hash_types, key))
}

/// Which receive queue gets which packet: `VIRTIO_NET_CTRL_MQ_RSS_CONFIG`.
#[derive(Clone, Debug)]
pub struct Rss {
    hasher: Hasher,
    /// A power of two of them.
    table: Vec<u16>,
    unclassified: u16,
    /// How many transmit queues the driver uses.
    pub transmit_queues: u16,
}

impl Rss {
    /// `struct virtio_net_rss_config` (5.1.6.5.7.1), for a device with so many queue pairs.
    pub fn from_rss_config(command: &[u8], pairs: u16) -> Result<Rss, BadRss> {
        let word = |at: &[u8; 2]| u16::from_le_bytes(*at);
        let (fixed, rest) = command.split_first_chunk::<8>().ok_or(BadRss::Length)?;
        let [t0, t1, t2, t3, m0, m1, u0, u1] = *fixed;
        let entries = usize::from(word(&[m0, m1])) + 1;
        if !entries.is_power_of_two() || entries > TABLE {
            return Err(BadRss::Table);
        }
        let (table, rest) = rest.split_at_checked(2 * entries).ok_or(BadRss::Length)?;
        let table: Vec<u16> = table.as_chunks::<2>().0.iter().map(word).collect();
        let unclassified = word(&[u0, u1]);
        let (transmit_queues, key) = rest.split_first_chunk::<2>().ok_or(BadRss::Length)?;
        let transmit_queues = word(transmit_queues);
        let receive = table.iter().chain([&unclassified]);
        if !receive.into_iter().all(|q| *q < pairs) || transmit_queues > pairs || transmit_queues == 0 {
            return Err(BadRss::Queue);
        }
        Ok(Rss { hasher: hasher([t0, t1, t2, t3], key)?, table, unclassified, transmit_queues })
    }

    /// The queue pair whose receive queue gets a packet, and the hash to report with it.
    #[inline]
    pub fn place(&self, packet: &Packet<'_>, layers: &Layers) -> (u16, HashReport) {
        let report = self.hasher.report(packet, layers);
        if report.kind == 0 {
            return (self.unclassified, report);
        }
        (self.table[report.value as usize & (self.table.len() - 1)], report)
    }
}
