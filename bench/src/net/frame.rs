//! The frames: Ethernet, IPv4 and UDP with right checksums, or TCP where a frame is to be segmented; and in the payload
//! what tells one from another.
//!
//! ```text
//! payload  0      1     2     6        10     18    22
//!          |stream|shift|token|sequence| time |check| body ...
//! ```
//!
//! The body is one pattern for all, from `shift` on: which of a few is different from one buffer to the next, so that
//! what was in a buffer before is not taken for what belongs there. The check is of the head before it, of the source
//! port, which is the flow, and of the size. Behind the virtio-net header and 42 bytes of headers, all of them lie
//! within words of 8 bytes, as which they are written and read: a load of what lies in several stores waits for them.

use anyhow::{Context, Result, ensure};
use etherparse::PacketBuilder;

use crate::requests::Random;

/// `struct virtio_net_hdr` with `num_buffers` (virtio 1.3, 5.1.6).
pub const VNET: usize = 12;
/// Bytes of a payload that are told above.
pub const HEAD: usize = 22;
/// What comes before the body, and the virtio-net header before that, in words.
pub const WORDS: usize = 12;
/// The same in bytes: TCP is the longest.
pub const MOST: usize = 8 * WORDS;
/// Where layer 4 begins.
const L4: usize = VNET + 34;
/// Smallest frame: UDP with a head.
pub const SMALLEST: u32 = 14 + 20 + 8 + HEAD as u32;
/// Largest frame: what an IPv4 packet can be, less what is over 64 KiB.
pub const LARGEST: u32 = 65536;
/// The first flow's source port.
const FIRST_PORT: u16 = 1024;
/// Flows that a stream can have at most.
pub const FLOWS: u32 = 32768;
const SHIFTS: usize = 8;
const DISCARD: u16 = 9;
/// Bits of a token that say which part of a run it is.
pub const PART: u32 = 0xff;

/// `VIRTIO_NET_HDR_F_NEEDS_CSUM`, `VIRTIO_NET_HDR_GSO_TCPV4`.
const F_NEEDS_CSUM: u8 = 1;
const GSO_TCPV4: u8 = 1;

/// A kind of frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Kind {
    /// Bytes of the frame, as they are in the ring: without the frame check sequence, which virtio does not carry.
    pub size: u32,
    /// TCP, to be cut into segments of so much payload.
    pub gso_size: Option<u16>,
}

/// What is told in the payload, and the flow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mark {
    /// The run, and its part.
    pub token: u32,
    /// Who has sent it.
    pub stream: u8,
    /// Its number in its flow.
    pub sequence: u32,
    /// When its latency begins, nanoseconds of the run's clock.
    pub time: u64,
    /// Its flow.
    pub flow: u16,
}

/// Why a frame is none of ours as it was sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wrong {
    /// Not ours at all.
    Foreign,
    /// Ours, but something in it is different.
    Corrupt,
}

/// What comes before the body.
pub type Head = [u64; WORDS];

/// A frame with one shift of the body.
#[derive(Clone, Debug)]
struct Template {
    head: Head,
    /// Of the bits of that, those that every frame has.
    fixed: Head,
    /// Sum of what the checksum of layer 4 covers, but for the port and the head of the payload.
    sum: u64,
}

/// What changes from one frame to the next, and where it belongs.
#[derive(Clone, Copy, Debug)]
pub struct Fields {
    /// Source port at 46, in network order.
    pub port: u16,
    /// The checksum at 52, unless it is TCP.
    pub csum: u16,
    /// Token and sequence.
    pub number: u64,
    /// Time.
    pub time: u64,
    /// Check.
    pub check: u32,
}

/// The frames of one stream.
#[derive(Clone, Debug)]
pub struct Frames {
    kinds: Vec<Kind>,
    templates: Vec<[Template; SHIFTS]>,
    pattern: Vec<u8>,
}

impl Kind {
    /// Bytes of headers, after the virtio-net header.
    fn headers(self) -> usize {
        if self.gso_size.is_some() { 54 } else { 42 }
    }

    /// Bytes before the body, the virtio-net header included.
    pub fn before_body(self) -> usize {
        VNET + self.headers() + HEAD
    }
}

impl Frames {
    /// Those of stream `stream` from one MAC to another.
    pub fn new(kinds: &[Kind], stream: u8, [from, to]: [[u8; 6]; 2]) -> Result<Frames> {
        let mut random = Random::new(0);
        let pattern: Vec<u8> = (0..LARGEST as usize + SHIFTS).map(|_| random.next() as u8).collect();
        let mut templates = Vec::new();
        for kind in kinds {
            let smallest = SMALLEST + if kind.gso_size.is_some() { 12 } else { 0 };
            let fits = (smallest..=LARGEST).contains(&kind.size);
            ensure!(fits, "frames have {smallest} to {LARGEST} bytes, not {}", kind.size);
            let body = kind.size as usize - kind.headers() - HEAD;
            let of = |shift| template(*kind, stream, [from, to], shift as u8, &pattern[shift..shift + body]);
            let all: Vec<Template> = (0..SHIFTS).map(of).collect::<Result<_>>()?;
            templates.push(all.try_into().ok().context("a number of shifts")?);
        }
        Ok(Frames { kinds: kinds.to_vec(), templates, pattern })
    }

    /// The kinds.
    pub fn kinds(&self) -> &[Kind] {
        &self.kinds
    }

    /// The body of a frame of this kind in slot `slot`.
    pub fn body(&self, kind: usize, slot: usize) -> &[u8] {
        let (shift, kind) = (slot % SHIFTS, self.kinds[kind]);
        &self.pattern[shift..][..kind.size as usize - kind.headers() - HEAD]
    }

    /// What comes before the body in slot `slot`, without what changes.
    pub fn head(&self, kind: usize, slot: usize) -> &Head {
        &self.templates[kind][slot % SHIFTS].head
    }

    /// What changes.
    #[inline]
    pub fn fields(&self, kind: usize, slot: usize, mark: &Mark) -> Fields {
        let (shift, size) = (slot % SHIFTS, self.kinds[kind].size);
        let port = (FIRST_PORT + mark.flow).to_be();
        let number = u64::from(mark.token) | u64::from(mark.sequence) << 32;
        let who = u16::from(mark.stream) | (shift as u16) << 8;
        let check = check(number, mark.time, port, who, size);
        let csum = csum(self.templates[kind][shift].sum, number, mark.time, check, port, who);
        Fields { port, csum, number, time: mark.time, check }
    }

    /// Reads what comes before the body of a frame of `len` bytes and checks it. `of` has the frames of every stream.
    /// What the virtio-net header says is not compared, nor are MAC addresses, which a reflector changes; checksums of
    /// layer 4 are not where the back end may leave them out.
    #[inline]
    pub fn parse(head: &Head, len: u32, token: u32, of: &[Frames]) -> Result<(usize, usize, Mark), Wrong> {
        // The protocol at 35, the source port at 46.
        let gso = (head[4] >> 24) as u8 == 6;
        let port = (head[5] >> 48) as u16;
        let (who, number, time, found) = if gso {
            let (low, high) = (head[9] >> 32 | head[10] << 32, (head[10] >> 32) as u32);
            ((head[8] >> 16) as u16, head[8] >> 32 | head[9] << 32, low, high)
        } else {
            ((head[6] >> 48) as u16, head[7], head[8], head[9] as u32)
        };
        let mark = Mark {
            token: number as u32,
            stream: who as u8,
            sequence: (number >> 32) as u32,
            time,
            flow: u16::from_be(port).wrapping_sub(FIRST_PORT),
        };
        let ours = (mark.token ^ token) & !PART == 0;
        // One bit that is different must not make it somebody else's: addresses and port are ours.
        let looks_ours = || {
            head[4] >> 48 == 0x000a
                && head[5] & 0xffff_0000 == 0x000a_0000
                && head[6] as u16 == DISCARD.to_be()
        };
        let wrong = || if ours || looks_ours() { Wrong::Corrupt } else { Wrong::Foreign };
        let shift = usize::from(who >> 8);
        let frames = of.get(usize::from(mark.stream)).filter(|_| ours && shift < SHIFTS).ok_or_else(wrong)?;
        let is = |k: &Kind| k.size == len && k.gso_size.is_some() == gso;
        let kind = frames.kinds.iter().position(is).ok_or_else(wrong)?;
        let template = &frames.templates[kind][shift];
        let mut different = u64::from(check(number, time, port, who, len) ^ found);
        for ((word, expected), fixed) in head.iter().zip(&template.head).zip(&template.fixed) {
            different |= (word ^ expected) & fixed;
        }
        // Neither VIRTIO_NET_HDR_F_NEEDS_CSUM nor F_DATA_VALID: the checksum at 52 is there.
        let flags = head[0] & 3;
        if !gso && flags == 0 {
            let expected = csum(template.sum, number, time, found, port, who);
            different |= u64::from((head[6] >> 32) as u16 ^ expected);
        }
        let there = different == 0 && u32::from(mark.flow) < FLOWS;
        if there { Ok((kind, shift, mark)) } else { Err(Wrong::Corrupt) }
    }
}

/// A number in which every bit of these makes a difference.
#[inline]
fn check(number: u64, time: u64, port: u16, who: u16, size: u32) -> u32 {
    // Each step is one to one, so that words that differ in one place always lead to different numbers of 64 bits.
    let rest = u64::from(port) | u64::from(who) << 16 | u64::from(size) << 32;
    let mut sum = 0x9e37_79b9_7f4a_7c15u64;
    for word in [number, time, rest] {
        sum = (sum ^ word).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        sum ^= sum >> 31;
    }
    (sum.wrapping_mul(0x94d0_49bb_1331_11eb) >> 32) as u32
}

/// The checksum of UDP as it is in memory. Its words may be summed in any byte order (RFC 1071, 2B).
#[inline]
fn csum(sum: u64, number: u64, time: u64, check: u32, port: u16, who: u16) -> u16 {
    let halves = |word: u64| (word & 0xffff_ffff) + (word >> 32);
    let sum = sum + halves(number) + halves(time) + u64::from(check) + u64::from(port) + u64::from(who);
    // 0 would mean that there is none (RFC 768).
    match !fold(sum) {
        0 => 0xffff,
        sum => sum,
    }
}

/// Sum of 16-bit words as they are in memory.
fn words(bytes: &[u8]) -> u64 {
    bytes.chunks(2).map(|w| u64::from(u16::from_le_bytes([w[0], *w.get(1).unwrap_or(&0)]))).sum()
}

#[inline]
fn fold(mut sum: u64) -> u16 {
    sum = (sum & 0xffff_ffff) + (sum >> 32);
    sum = (sum & 0xffff) + (sum >> 16);
    sum = (sum & 0xffff) + (sum >> 16);
    sum = (sum & 0xffff) + (sum >> 16);
    sum as u16
}

fn as_words(bytes: &[u8; MOST]) -> Head {
    std::array::from_fn(|i| bytes[8 * i..].first_chunk().map_or(0, |word| u64::from_le_bytes(*word)))
}

fn template(kind: Kind, stream: u8, macs: [[u8; 6]; 2], shift: u8, body: &[u8]) -> Result<Template> {
    // Streams differ in addresses, flows in source ports: a switch that hashes either spreads them.
    let addresses = [[10, 0, 0, 1 + stream], [10, 0, 1, 1 + stream]];
    let ip = PacketBuilder::ethernet2(macs[0], macs[1]).ipv4(addresses[0], addresses[1], 64);
    let payload = [&[0; HEAD][..], body].concat();
    let mut bytes = vec![0; VNET];
    match kind.gso_size {
        None => ip.udp(FIRST_PORT, DISCARD).write(&mut bytes, &payload)?,
        Some(_) => ip.tcp(FIRST_PORT, DISCARD, 0, u16::MAX).ack(0).write(&mut bytes, &payload)?,
    }
    let (end, gso) = (kind.before_body(), kind.gso_size.is_some());
    // Addresses, protocol, length.
    let l4_len = (bytes.len() - L4) as u16;
    let pseudo = words(&bytes[VNET + 26..VNET + 34])
        + u64::from(u16::from(bytes[VNET + 23]).to_be())
        + u64::from(l4_len.to_be());
    if let Some(gso_size) = kind.gso_size {
        // Virtio 1.3, 5.1.6.2: the checksum is that of the pseudo header, and where it starts and belongs is told.
        bytes[0] = F_NEEDS_CSUM;
        bytes[1] = GSO_TCPV4;
        bytes[2..4].copy_from_slice(&54u16.to_le_bytes());
        bytes[4..6].copy_from_slice(&gso_size.to_le_bytes());
        bytes[6..8].copy_from_slice(&34u16.to_le_bytes());
        bytes[8..10].copy_from_slice(&16u16.to_le_bytes());
        bytes[L4 + 16..L4 + 18].copy_from_slice(&fold(pseudo).to_le_bytes());
    } else {
        bytes[L4 + 6..L4 + 8].fill(0);
    }
    bytes[L4..L4 + 2].fill(0);
    let sum = pseudo + words(&bytes[L4..L4 + 8]) + words(body);
    bytes[end - HEAD..end - HEAD + 2].copy_from_slice(&[stream, shift]);
    let mut head = [0; MOST];
    head[..end].copy_from_slice(&bytes[..end]);
    // Behind the MAC addresses; not the source port, the checksum and what is told in the payload.
    let mut fixed = [0; MOST];
    fixed[VNET + 12..end - HEAD].fill(0xff);
    let csum = L4 + if gso { 16 } else { 6 };
    for changes in [L4, csum] {
        fixed[changes..changes + 2].fill(0);
    }
    Ok(Template { head: as_words(&head), fixed: as_words(&fixed), sum: u64::from(fold(sum)) })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use etherparse::{SlicedPacket, TransportSlice};

    use super::*;

    const UDP: Kind = Kind { size: 64, gso_size: None };
    const KINDS: [Kind; 4] = [
        UDP,
        Kind { size: 1518, gso_size: None },
        Kind { size: 257, gso_size: None },
        Kind { size: LARGEST, gso_size: Some(1448) },
    ];
    const MARK: Mark = Mark { token: 0x1234_5607, stream: 1, sequence: 77, time: 1 << 40, flow: 300 };

    fn both() -> Vec<Frames> {
        let macs = [[2, 0, 0, 0, 0, 1], [2, 0, 0, 0, 0, 2]];
        (0..2).map(|stream| Frames::new(&KINDS, stream, macs).unwrap()).collect()
    }

    /// The whole frame as it is sent, and what of it is read first.
    fn whole(frames: &Frames, kind: usize, slot: usize, mark: &Mark) -> (Head, Vec<u8>) {
        let fields = frames.fields(kind, slot, mark);
        let mut bytes: Vec<u8> = frames.head(kind, slot).iter().flat_map(|w| w.to_le_bytes()).collect();
        let end = frames.kinds[kind].before_body();
        bytes.truncate(end);
        bytes.extend(frames.body(kind, slot));
        let mut put = |at: usize, field: &[u8]| bytes[at..at + field.len()].copy_from_slice(field);
        put(L4, &fields.port.to_le_bytes());
        if frames.kinds[kind].gso_size.is_none() {
            put(L4 + 6, &fields.csum.to_le_bytes());
        }
        put(end - 20, &fields.number.to_le_bytes());
        put(end - 12, &fields.time.to_le_bytes());
        put(end - 4, &fields.check.to_le_bytes());
        (head(&bytes), bytes)
    }

    fn head(bytes: &[u8]) -> Head {
        let mut first = [0; MOST];
        let n = bytes.len().min(MOST);
        first[..n].copy_from_slice(&bytes[..n]);
        as_words(&first)
    }

    #[test]
    fn another_parser_finds_addresses_lengths_and_checksums_right() {
        let all = both();
        for slot in 0..9 {
            for (i, kind) in KINDS.iter().enumerate() {
                let mark = Mark { sequence: slot as u32 * 7919, ..MARK };
                let (_, bytes) = whole(&all[1], i, slot, &mark);
                assert_eq!(bytes.len(), VNET + kind.size as usize);
                let packet = SlicedPacket::from_ethernet(&bytes[VNET..]).unwrap();
                let Some(etherparse::NetSlice::Ipv4(ip)) = &packet.net else { panic!("no IPv4") };
                assert_eq!(ip.header().header_checksum(), ip.header().to_header().calc_header_checksum());
                let header = ip.header().to_header();
                match packet.transport.unwrap() {
                    TransportSlice::Udp(udp) => {
                        let sum = udp.to_header().calc_checksum_ipv4(&header, udp.payload()).unwrap();
                        assert_eq!(udp.checksum(), sum, "{kind:?} slot {slot}");
                        assert_eq!((udp.source_port(), udp.destination_port()), (1324, 9));
                        assert_eq!(bytes[..VNET], [0; VNET]);
                    }
                    TransportSlice::Tcp(tcp) => {
                        // What a device that completes the checksum gets: the sum from csum_start on.
                        assert_eq!(&bytes[..VNET], [1, 1, 54, 0, 0xa8, 5, 34, 0, 16, 0, 0, 0]);
                        let l4 = &bytes[VNET + 34..];
                        let mut sum = 0u64;
                        for pair in l4.chunks(2) {
                            sum += u64::from(pair[0]) << 8 | u64::from(*pair.get(1).unwrap_or(&0));
                        }
                        while sum > 0xffff {
                            sum = (sum & 0xffff) + (sum >> 16);
                        }
                        let right = tcp.to_header().calc_checksum_ipv4(&header, tcp.payload()).unwrap();
                        assert_eq!(!(sum as u16), right);
                    }
                    other => panic!("{other:?}"),
                }
            }
        }
    }

    #[test]
    fn what_was_sent_is_read_back() {
        let all = both();
        for (i, kind) in KINDS.iter().enumerate() {
            let (_, mut bytes) = whole(&all[1], i, 11, &MARK);
            // A reflector swaps these.
            bytes[VNET..VNET + 12].rotate_left(6);
            let head = head(&bytes);
            assert_eq!(Frames::parse(&head, kind.size, MARK.token ^ 1, &all), Ok((i, 3, MARK)));
            assert_eq!(Frames::parse(&head, kind.size - 1, MARK.token, &all), Err(Wrong::Corrupt));
        }
    }

    #[test]
    fn every_bit_that_is_different_is_found() {
        let all = both();
        for (i, kind) in KINDS.iter().enumerate() {
            let (_, bytes) = whole(&all[1], i, 2, &MARK);
            let checksum = L4 + 16..L4 + 18;
            for bit in (VNET + 12) * 8..kind.before_body() * 8 {
                // What is to be segmented has its checksum completed on the way.
                if kind.gso_size.is_some() && checksum.contains(&(bit / 8)) {
                    continue;
                }
                let mut bytes = bytes.clone();
                bytes[bit / 8] ^= 1 << (bit % 8);
                let found = Frames::parse(&head(&bytes), kind.size, MARK.token, &all);
                assert_eq!(found, Err(Wrong::Corrupt), "{kind:?}, byte {}", bit / 8 - VNET);
            }
        }
        assert_eq!(Frames::parse(&[0; WORDS], 64, MARK.token, &all), Err(Wrong::Foreign));
        // Another run's.
        let (_, mut bytes) = whole(&all[1], 0, 2, &MARK);
        bytes[VNET + 30] = 11;
        assert_eq!(Frames::parse(&head(&bytes), 64, !MARK.token, &all), Err(Wrong::Foreign));
    }

    #[test]
    fn a_checksum_that_is_left_out_is_none_that_is_wrong() {
        let all = both();
        let (_, mut bytes) = whole(&all[1], 0, 0, &MARK);
        bytes[L4 + 6] ^= 1;
        assert_eq!(Frames::parse(&head(&bytes), 64, MARK.token, &all), Err(Wrong::Corrupt));
        // VIRTIO_NET_HDR_F_DATA_VALID.
        bytes[0] = 2;
        assert!(Frames::parse(&head(&bytes), 64, MARK.token, &all).is_ok());
    }

    #[test]
    fn sizes_have_bounds() {
        let with = |size, gso_size| Frames::new(&[Kind { size, gso_size }], 0, [[0; 6]; 2]);
        assert!(with(63, None).is_err() && with(64, None).is_ok() && with(65537, None).is_err());
        assert!(with(75, Some(1448)).is_err() && with(76, Some(1448)).is_ok());
    }
}
