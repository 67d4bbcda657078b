//! The frames: Ethernet, IPv4 and UDP with right checksums, or TCP where a frame is to be segmented; and in the payload
//! what tells one from another.
//!
//! ```text
//! payload  0        4      5     6        10     18      22
//!          | token  |stream|shift|sequence| time | crc32c| body ...
//! ```
//!
//! The body is one pattern for all, from `shift` on: which of a few is different from one buffer to the next, so that
//! what was in a buffer before is not taken for what belongs there. The checksum covers the body, the head before it
//! and the source port, which is the flow.

use anyhow::{Context, Result, ensure};
use etherparse::PacketBuilder;

use crate::requests::Random;

/// `struct virtio_net_hdr` with `num_buffers` (virtio 1.3, 5.1.6).
pub const VNET: usize = 12;
/// Bytes of a payload that are told above.
pub const HEAD: usize = 22;
/// Most bytes before the body, with the virtio-net header and TCP.
pub const MOST: usize = VNET + 14 + 20 + 20 + HEAD;
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

/// A frame with one shift of the body.
#[derive(Clone, Debug)]
struct Template {
    bytes: [u8; MOST],
    /// Sum of the 16-bit words that the checksum of layer 4 covers, but for those that change.
    sum: u32,
    body_crc: u32,
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

    /// Writes all that comes before the body; returns how many bytes.
    #[inline]
    pub fn head(&self, kind: usize, slot: usize, mark: &Mark, into: &mut [u8; MOST]) -> usize {
        let shift = slot % SHIFTS;
        let template = &self.templates[kind][shift];
        let gso = self.kinds[kind].gso_size.is_some();
        *into = template.bytes;
        let l4 = VNET + 34;
        let port = (FIRST_PORT + mark.flow).to_be_bytes();
        into[l4..l4 + 2].copy_from_slice(&port);
        let mut head = [0; HEAD];
        head[..4].copy_from_slice(&mark.token.to_le_bytes());
        head[4] = mark.stream;
        head[5] = shift as u8;
        head[6..10].copy_from_slice(&mark.sequence.to_le_bytes());
        head[10..18].copy_from_slice(&mark.time.to_le_bytes());
        let mut covered = [0; 20];
        covered[..18].copy_from_slice(&head[..18]);
        covered[18..].copy_from_slice(&port);
        head[18..].copy_from_slice(&crc32c::crc32c_append(template.body_crc, &covered).to_le_bytes());
        let at = l4 + if gso { 20 } else { 8 };
        into[at..at + HEAD].copy_from_slice(&head);
        if !gso {
            // A frame to be segmented has the checksum of its pseudo header, which does not change.
            let mut sum = template.sum + words(&port);
            sum += words(&head);
            // 0 would mean that there is none (RFC 768).
            let sum = !fold(sum);
            into[l4 + 6..l4 + 8].copy_from_slice(&if sum == 0 { 0xffff } else { sum }.to_be_bytes());
        }
        at + HEAD
    }

    /// Reads what comes before the body of a frame of `len` bytes, whose virtio-net header is the first of `bytes`, and
    /// checks it. `of` has the frames of every stream. What the virtio-net header says is not compared, nor are MAC
    /// addresses, which a reflector changes; checksums of layer 4 are not where the back end may leave them out.
    #[inline]
    pub fn parse(
        bytes: &[u8; MOST],
        len: u32,
        token: u32,
        of: &[Frames],
    ) -> Result<(usize, usize, Mark), Wrong> {
        let l4 = VNET + 34;
        let protocol = bytes[VNET + 23];
        let at = l4 + if protocol == 6 { 20 } else { 8 };
        let word = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        // One bit that is different must not make it somebody else's.
        let looks_ours = bytes[VNET + 26] == 10 && bytes[l4 + 3] == DISCARD as u8 && bytes[VNET + 30] == 10;
        let ours = (word(at) ^ token) & 0xffff_ff00 == 0;
        let wrong = if ours || looks_ours { Wrong::Corrupt } else { Wrong::Foreign };
        let mark = Mark {
            token: word(at),
            stream: bytes[at + 4],
            sequence: word(at + 6),
            time: u64::from(word(at + 10)) | u64::from(word(at + 14)) << 32,
            flow: u16::from_be_bytes([bytes[l4], bytes[l4 + 1]]).wrapping_sub(FIRST_PORT),
        };
        let shift = usize::from(bytes[at + 5]);
        let frames = of.get(usize::from(mark.stream)).filter(|_| ours && shift < SHIFTS).ok_or(wrong)?;
        let gso = protocol == 6;
        let is = |k: &Kind| k.size == len && k.gso_size.is_some() == gso;
        let kind = frames.kinds.iter().position(is).ok_or(wrong)?;
        if u32::from(mark.flow) >= FLOWS {
            return Err(wrong);
        }
        let mut expected = [0; MOST];
        let end = frames.head(kind, shift, &mark, &mut expected);
        let csum = if gso { l4 + 16 } else { l4 + 6 };
        // The rest behind MAC addresses, but for the checksum, which the back end may have completed or left out.
        let same = bytes[VNET + 12..csum] == expected[VNET + 12..csum]
            && bytes[csum + 2..end] == expected[csum + 2..end]
            && (bytes[0] & 3 != 0 || gso || bytes[csum..csum + 2] == expected[csum..csum + 2]);
        if same { Ok((kind, shift, mark)) } else { Err(Wrong::Corrupt) }
    }
}

/// Sum of 16-bit words in network order.
#[inline]
fn words(bytes: &[u8]) -> u32 {
    bytes.chunks(2).map(|w| u32::from(w[0]) << 8 | u32::from(*w.get(1).unwrap_or(&0))).sum()
}

#[inline]
fn fold(mut sum: u32) -> u16 {
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
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
    let l4 = VNET + 34;
    let l4_len = bytes.len() - l4;
    // Addresses, protocol, length.
    let pseudo = words(&bytes[VNET + 26..VNET + 34]) + u32::from(bytes[VNET + 23]) + l4_len as u32;
    if let Some(gso_size) = kind.gso_size {
        // Virtio 1.3, 5.1.6.2: the checksum is that of the pseudo header, and where it starts and belongs is told.
        bytes[0] = F_NEEDS_CSUM;
        bytes[1] = GSO_TCPV4;
        bytes[2..4].copy_from_slice(&54u16.to_le_bytes());
        bytes[4..6].copy_from_slice(&gso_size.to_le_bytes());
        bytes[6..8].copy_from_slice(&34u16.to_le_bytes());
        bytes[8..10].copy_from_slice(&16u16.to_le_bytes());
        bytes[l4 + 16..l4 + 18].copy_from_slice(&fold(pseudo).to_be_bytes());
    }
    bytes[l4..l4 + 2].fill(0);
    // Without checksum and head, which has an even number of bytes; folded, so that sums of parts cannot overflow.
    let fixed = words(&bytes[l4..l4 + 6]);
    let mut sum = u64::from(pseudo) + u64::from(fixed);
    sum += body.chunks(4096).map(|part| u64::from(words(part))).sum::<u64>();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    let mut fixed = [0; MOST];
    let end = kind.before_body();
    fixed[..end].copy_from_slice(&bytes[..end]);
    fixed[end - HEAD + 5] = shift;
    Ok(Template { bytes: fixed, sum: sum as u32, body_crc: crc32c::crc32c(body) })
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

    fn whole(frames: &Frames, kind: usize, slot: usize, mark: &Mark) -> ([u8; MOST], Vec<u8>) {
        let mut head = [0; MOST];
        let n = frames.head(kind, slot, mark, &mut head);
        (head, [&head[..n], frames.body(kind, slot)].concat())
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
            let (mut head, _) = whole(&all[1], i, 11, &MARK);
            // A reflector swaps these.
            head[VNET..VNET + 12].rotate_left(6);
            assert_eq!(Frames::parse(&head, kind.size, MARK.token ^ 1, &all), Ok((i, 3, MARK)));
            assert_eq!(Frames::parse(&head, kind.size - 1, MARK.token, &all), Err(Wrong::Corrupt));
        }
    }

    #[test]
    fn every_bit_that_is_different_is_found() {
        let all = both();
        let (head, bytes) = whole(&all[1], 0, 2, &MARK);
        for bit in (VNET + 12) * 8..bytes.len() * 8 {
            let mut head = head;
            head[bit / 8] ^= 1 << (bit % 8);
            let found = Frames::parse(&head, 64, MARK.token, &all);
            assert_eq!(found, Err(Wrong::Corrupt), "byte {}", bit / 8 - VNET);
        }
        assert_eq!(Frames::parse(&[0; MOST], 64, MARK.token, &all), Err(Wrong::Foreign));
        // Another run's.
        let mut other = head;
        other[VNET + 30] = 11;
        assert_eq!(Frames::parse(&other, 64, !MARK.token, &all), Err(Wrong::Foreign));
    }

    #[test]
    fn a_checksum_that_is_left_out_is_none_that_is_wrong() {
        let all = both();
        let (mut head, _) = whole(&all[1], 0, 0, &MARK);
        head[VNET + 34 + 6] ^= 1;
        assert_eq!(Frames::parse(&head, 64, MARK.token, &all), Err(Wrong::Corrupt));
        // VIRTIO_NET_HDR_F_DATA_VALID.
        head[0] = 2;
        assert!(Frames::parse(&head, 64, MARK.token, &all).is_ok());
    }

    #[test]
    fn sizes_have_bounds() {
        let with = |size, gso_size| Frames::new(&[Kind { size, gso_size }], 0, [[0; 6]; 2]);
        assert!(with(63, None).is_err() && with(64, None).is_ok() && with(65537, None).is_err());
        assert!(with(75, Some(1448)).is_err() && with(76, Some(1448)).is_ok());
    }
}
