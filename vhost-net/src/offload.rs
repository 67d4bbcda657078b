//! What is done to a frame in software, for one that does not take an [`Offload`]: its checksum
//! is completed, or it is cut into segments. And VLAN tags, put in and taken out.
//!
//! A frame is its first bytes, copied out once and parsed ([`Packet`]), and the rest wherever it is: a closure
//! `read(offset, into)` copies out of that, and is asked only for what lies behind the first bytes. Nothing is
//! allocated: what comes out is a changed beginning and a range of the frame that follows it as it is.

use std::ops::Range;

use crate::header::{Gso, Offload, Partial, Segmenting};
use crate::packet::{PEEK, Packet, TAG, Tag};

/// Bytes read out at a time to be summed.
const CHUNK: usize = 2048;
const FIN: u8 = 0x01;
const PSH: u8 = 0x08;
const CWR: u8 = 0x80;

/// A sum in ones' complement (RFC 1071) that grows piece by piece, of bytes wherever they are cut.
#[derive(Clone, Copy, Debug, Default)]
pub struct Sum {
    /// Of words as the machine reads them: the sum is the same in either order, with its bytes swapped.
    sum: u64,
    odd: bool,
}

impl Sum {
    /// Takes more bytes in.
    #[inline]
    pub fn add(&mut self, mut bytes: &[u8]) {
        if self.odd
            && let Some((first, rest)) = bytes.split_first()
        {
            self.add_native(u16::from_ne_bytes([0, *first]).into());
            self.odd = false;
            bytes = rest;
        }
        // Words of 32 bits into several lanes of 64, which the compiler makes vectors of. They hold 2^32 of them.
        let mut lanes = [0u64; 8];
        let mut blocks = bytes.chunks_exact(32);
        for block in &mut blocks {
            for (lane, word) in lanes.iter_mut().zip(block.as_chunks::<4>().0) {
                *lane += u64::from(u32::from_ne_bytes(*word));
            }
        }
        for lane in lanes {
            self.add_native(lane);
        }
        let mut words = blocks.remainder().chunks_exact(2);
        for word in &mut words {
            self.add_native(u16::from_ne_bytes([word[0], word[1]]).into());
        }
        if let [last] = words.remainder() {
            self.add_native(u16::from_ne_bytes([*last, 0]).into());
            self.odd = true;
        }
    }

    /// Takes a word in, as what comes next.
    #[inline]
    pub fn add_word(&mut self, word: u16) {
        debug_assert!(!self.odd, "words begin at even places");
        self.add_native(u16::from_ne_bytes(word.to_be_bytes()).into());
    }

    #[inline]
    fn add_native(&mut self, value: u64) {
        // Of a frame this is less than 2^48.
        self.sum += value;
    }

    /// The sum so far, in 16 bits.
    #[inline]
    pub fn folded(self) -> u16 {
        let mut sum = self.sum;
        while sum > 0xffff {
            sum = (sum & 0xffff) + (sum >> 16);
        }
        u16::from_be_bytes((sum as u16).to_ne_bytes())
    }

    /// The checksum: the sum's complement. Never 0, which of UDP would say that there is none (RFC 768).
    #[inline]
    pub fn checksum(self) -> u16 {
        match !self.folded() {
            0 => 0xffff,
            checksum => checksum,
        }
    }
}

/// Sums what lies in `range` of a frame.
fn add_range(
    sum: &mut Sum,
    packet: &Packet<'_>,
    range: Range<usize>,
    read: &mut impl FnMut(usize, &mut [u8]),
) {
    let head = packet.head();
    let seen = head.len().clamp(range.start, range.end.max(range.start));
    sum.add(head.get(range.start..seen).unwrap_or_default());
    let mut chunk = [0; CHUNK];
    let mut at = seen;
    while at < range.end {
        let chunk = &mut chunk[..CHUNK.min(range.end - at)];
        read(at, chunk);
        sum.add(chunk);
        at += chunk.len();
    }
}

/// The checksum of a frame that has a partial one. It belongs at [`Partial::place`], in network order.
pub fn complete(packet: &Packet<'_>, csum: Partial, mut read: impl FnMut(usize, &mut [u8])) -> u16 {
    let mut sum = Sum::default();
    add_range(&mut sum, packet, csum.start.into()..packet.len(), &mut read);
    sum.checksum()
}

/// A frame being cut into segments, one after another.
///
/// ```text
/// headers | payload ....................        headers', payload[0..size]
///                                         ─►    headers', payload[size..2 * size] ...
/// ```
#[derive(Clone, Debug)]
pub struct Segments {
    /// The headers, changed from segment to segment.
    headers: [u8; PEEK],
    gso: Gso,
    l3: usize,
    transport: usize,
    len: usize,
    /// Of the pseudo header without its length, as the driver summed it.
    pseudo: Sum,
    /// Of that, and of the transport header without what changes.
    base: Sum,
    /// Of the IPv4 header without length, identification and checksum.
    ipv4: Sum,
    identification: u16,
    sequence: u32,
    flags: u8,
    /// Segments so far, and where the next one's payload begins.
    count: u32,
    at: usize,
}

impl Segments {
    /// Of a frame whose header was checked, which is where `gso` comes from. `None` if the frame is not that one.
    pub fn new(packet: &Packet<'_>, gso: Gso) -> Option<Segments> {
        let mut headers = [0; PEEK];
        let header_len = usize::from(gso.header_len);
        headers.get_mut(..header_len)?.copy_from_slice(packet.head().get(..header_len)?);
        let layers = packet.layers();
        let is_that = layers.payload == Some(gso.header_len) && Segmenting::of(&layers) == Some(gso.kind);
        if !is_that || gso.size == 0 {
            return None;
        }
        let (l3, transport) = (usize::from(layers.l3), usize::from(layers.transport));
        let mut segments = Segments {
            headers,
            gso,
            l3,
            transport,
            len: packet.len(),
            pseudo: Sum::default(),
            base: Sum::default(),
            ipv4: Sum::default(),
            identification: 0,
            sequence: 0,
            flags: 0,
            count: 0,
            at: header_len,
        };
        // The driver's sum is of the addresses that count at the end, whatever routing headers say.
        let partial = segments.word(segments.csum_at());
        segments.pseudo.add_word(partial);
        segments.pseudo.add_word(!((packet.len() - transport) as u16));
        segments.base = segments.pseudo;
        segments.put(segments.csum_at(), 0);
        if gso.kind.is_tcp() {
            segments.sequence =
                u32::from(segments.word(transport + 4)) << 16 | u32::from(segments.word(transport + 6));
            segments.flags = headers[transport + 13];
            segments.put(transport + 4, 0);
            segments.put(transport + 6, 0);
            segments.headers[transport + 13] = 0;
        } else {
            segments.put(transport + 4, 0);
        }
        segments.base.add(&segments.headers[transport..header_len]);
        if !gso.kind.is_ipv6() {
            segments.identification = segments.word(l3 + 4);
            for changes in [2, 4, 10] {
                segments.put(l3 + changes, 0);
            }
            segments.ipv4.add(&segments.headers[l3..transport]);
        }
        Some(segments)
    }

    /// The payload of the next segment, as a range of the frame. `None` after the last one.
    #[inline]
    pub fn next_payload(&self) -> Option<Range<usize>> {
        let end = self.len.min(self.at + usize::from(self.gso.size));
        (self.at < end).then_some(self.at..end)
    }

    /// The headers of the next segment, with the checksum of a payload of this sum, and goes on to the one after it.
    /// Without a sum the checksum is partial: for one that completes it, but does not cut.
    pub fn next_headers(&mut self, payload: Option<Sum>) -> &[u8] {
        let Some(range) = self.next_payload() else { return &[] };
        let (l3, transport) = (self.l3, self.transport);
        let end = usize::from(self.gso.header_len) + range.len();
        let transport_len = (end - transport) as u16;
        if self.gso.kind.is_ipv6() {
            self.put(l3 + 4, (end - l3 - 40) as u16);
        } else {
            let words = [(end - l3) as u16, self.identification.wrapping_add(self.count as u16)];
            let mut sum = self.ipv4;
            sum.add_word(words[0]);
            sum.add_word(words[1]);
            self.put(l3 + 2, words[0]);
            self.put(l3 + 4, words[1]);
            self.put(l3 + 10, !sum.folded());
        }
        // What of the transport header was left out of the sum.
        let mut sum = Sum::default();
        if self.gso.kind.is_tcp() {
            let sequence =
                self.sequence.wrapping_add((range.start - usize::from(self.gso.header_len)) as u32);
            let first = self.count == 0;
            let last = range.end == self.len;
            // CWR answers the ECE of one segment; the last one ends what was pushed (RFC 3168, 6.1.2).
            let without = if first { 0 } else { CWR } | if last { 0 } else { FIN | PSH };
            let flags = self.flags & !without;
            let words = [(sequence >> 16) as u16, sequence as u16];
            self.put(transport + 4, words[0]);
            self.put(transport + 6, words[1]);
            self.headers[transport + 13] = flags;
            sum.add_word(words[0]);
            sum.add_word(words[1]);
            sum.add_word(flags.into());
        } else {
            self.put(transport + 4, transport_len);
            sum.add_word(transport_len);
        }
        let csum = if let Some(payload) = payload {
            // Headers are of an even length, so the payload's sum is one of whole words.
            for part in [self.base, payload] {
                sum.add_word(part.folded());
            }
            sum.add_word(transport_len);
            sum.checksum()
        } else {
            let mut pseudo = self.pseudo;
            pseudo.add_word(transport_len);
            pseudo.folded()
        };
        self.put(self.csum_at(), csum);
        self.count += 1;
        self.at = range.end;
        &self.headers[..usize::from(self.gso.header_len)]
    }

    fn csum_at(&self) -> usize {
        self.transport + if self.gso.kind.is_tcp() { 16 } else { 6 }
    }

    fn word(&self, at: usize) -> u16 {
        u16::from_be_bytes([self.headers[at], self.headers[at + 1]])
    }

    fn put(&mut self, at: usize, word: u16) {
        self.headers[at..at + 2].copy_from_slice(&word.to_be_bytes());
    }
}

/// What a frame begins with instead of its first bytes, to have a VLAN tag or not to have one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Beginning {
    bytes: [u8; 12 + TAG],
    len: usize,
    skip: usize,
}

impl Beginning {
    /// With a tag in front of those that it has.
    pub fn push(packet: &Packet<'_>, tag: Tag) -> Beginning {
        Beginning { skip: 12, ..Beginning::replace(packet, tag) }
    }

    /// With its outermost tag replaced. There must be one.
    pub fn replace(packet: &Packet<'_>, tag: Tag) -> Beginning {
        let mut bytes = [0; 12 + TAG];
        bytes[..12].copy_from_slice(&packet.head()[..12]);
        bytes[12..14].copy_from_slice(&tag.tpid.to_be_bytes());
        bytes[14..].copy_from_slice(&tag.tci.to_be_bytes());
        Beginning { bytes, len: 12 + TAG, skip: 12 + TAG }
    }

    /// Without its outermost tag. There must be one.
    pub fn pop(packet: &Packet<'_>) -> Beginning {
        Beginning { len: 12, ..Beginning::replace(packet, Tag { tpid: 0, tci: 0 }) }
    }

    /// The bytes it begins with.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes[..self.len]
    }

    /// How many bytes of the frame, or of the headers of a segment of it, those stand for.
    pub fn skip(&self) -> usize {
        self.skip
    }

    /// What is left to be done with the frame then: the same, further on or further back.
    #[must_use]
    pub fn offload(&self, mut offload: Offload) -> Offload {
        let moved = |at: u16| at.wrapping_add(self.len as u16).wrapping_sub(self.skip as u16);
        if let Some(csum) = &mut offload.csum {
            csum.start = moved(csum.start);
        }
        if let Some(gso) = &mut offload.gso {
            gso.header_len = moved(gso.header_len);
        }
        offload
    }
}

/// Cuts a frame into segments with whole checksums: each goes to `emit` as its headers and the range of the frame that
/// its payload is. `None` if `gso` is not of this frame.
pub fn segment(
    packet: &Packet<'_>,
    gso: Gso,
    mut read: impl FnMut(usize, &mut [u8]),
    mut emit: impl FnMut(&[u8], Range<usize>),
) -> Option<()> {
    let mut segments = Segments::new(packet, gso)?;
    while let Some(payload) = segments.next_payload() {
        let mut sum = Sum::default();
        add_range(&mut sum, packet, payload.clone(), &mut read);
        emit(segments.next_headers(Some(sum)), payload);
    }
    Some(())
}
