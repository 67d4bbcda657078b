//! A packet as a guest sends it: the head is copied out of guest memory once, and all that is decided is decided by the
//! copy; what is behind it is payload, which goes from guest to guest unread.

use std::num::NonZero;

use poll_engine::memory::GuestSlice;
use poll_engine::ring::chain::ChainView;

use crate::header::{BadHeader, Gso, HEADER, HEADER_WITH_HASH, HashReport, Offload, Partial, VnetHdr};
use crate::outside::HOST_OFFLOADS;
use crate::packet::{ETHERTYPE_VLAN, PEEK, Packet, TAG};
use crate::switch::vlan::TagAction;

/// Bytes of most packets that are looked at: both addresses, the type, and two more.
pub const GLANCE: usize = 16;
/// The shortest packet there is: both addresses and a type.
pub const MIN_PACKET: u32 = 14;

/// Why what a guest sends is no packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadPacket {
    /// Shorter than its header, or with writable parts.
    #[error("a chain of {0} readable bytes has no room for a header")]
    NoHeader(u32),
    /// Shorter than an Ethernet header.
    #[error("a packet of {0} bytes is shorter than an Ethernet header")]
    Runt(u32),
}

/// What all but a few packets are told by: their addresses and type, copied out of guest memory once, of a packet that asks
/// for nothing and has no VLAN tag.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Glance {
    ethernet: [u8; GLANCE],
    len: NonZero<u32>,
}

impl Glance {
    /// Of the packet in a chain, whose header has this many bytes. `None` if there is more to be known of it, or if it is none.
    #[inline]
    pub fn of(chain: &ChainView<'_>, header: usize) -> Option<Glance> {
        Glance::of_first(chain.first_readable()?, chain.readable_len(), header)
    }

    /// The same, by the first buffer of the chain and the bytes of them all.
    #[inline(always)] // once a packet of a burst
    pub fn of_first(first: GuestSlice<'_>, len: u32, header: usize) -> Option<Glance> {
        let ethernet = first.part(header, GLANCE).read_array::<GLANCE>()?;
        let is_plain = first.read_array() == Some([0, 0]) && header == HEADER;
        let is_tagged = matches!([ethernet[12], ethernet[13]], [0x81, 0x00] | [0x88, 0xa8]);
        if !is_plain || is_tagged {
            return None;
        }
        Some(Glance { ethernet, len: NonZero::new(len - HEADER as u32)? })
    }

    /// Bytes of the packet.
    #[inline]
    #[expect(clippy::len_without_is_empty, reason = "no packet is empty")]
    pub fn len(&self) -> u32 {
        self.len.get()
    }

    /// Bytes of header and packet.
    #[inline]
    pub fn len_in_ring(&self) -> u32 {
        HEADER as u32 + self.len()
    }

    /// What was copied.
    #[inline]
    pub fn bytes(&self) -> [u8; GLANCE] {
        self.ethernet
    }

    /// Whether both come from the same address and go to the same one.
    #[inline]
    pub fn has_addresses_of(&self, other: &Glance) -> bool {
        const ADDRESSES: u128 = u128::MAX >> 32;
        let [a, b] = [self, other].map(|glance| u128::from_le_bytes(glance.ethernet));
        (a ^ b) & ADDRESSES == 0
    }

    /// What was for us is from us, as an echo does.
    #[inline]
    pub fn swap_addresses(&mut self) {
        swap_addresses(&mut self.ethernet);
    }
}

/// What was for us is from us, as an echo does.
pub fn swap_addresses(packet: &mut [u8]) {
    if let Some((to, rest)) = packet.split_at_mut_checked(6)
        && let Some(from) = rest.get_mut(..6)
    {
        to.swap_with_slice(from);
    }
}

/// The copied head of a packet, with its header before it as the rings want it.
#[derive(Clone, Debug)]
pub struct Head {
    bytes: [u8; HEADER_WITH_HASH + PEEK + TAG],
    /// Bytes of the header.
    header: usize,
    /// Bytes of header and packet that were copied.
    copied: usize,
    /// Bytes of header and packet.
    len: u32,
    /// Bytes of the sender's chain that were copied.
    read: u32,
    /// What the header asks for, once it was held against the packet.
    offload: Offload,
}

impl Head {
    /// Room for a head.
    pub fn new() -> Head {
        Head {
            bytes: [0; HEADER_WITH_HASH + PEEK + TAG],
            header: HEADER,
            copied: 0,
            len: 0,
            read: 0,
            offload: Offload::default(),
        }
    }

    /// Copies the head of the packet in `chain`, whose header has this many bytes.
    #[inline]
    pub fn peek(&mut self, chain: &ChainView<'_>, header: usize) -> Result<(), BadPacket> {
        let len = chain.readable_len();
        if (len as usize) < header {
            return Err(BadPacket::NoHeader(len));
        }
        let packet = len - header as u32;
        if packet < MIN_PACKET {
            return Err(BadPacket::Runt(packet));
        }
        let room = &mut self.bytes[..header + PEEK];
        self.copied = chain.readable(0, u32::MAX).read(room);
        (self.header, self.len, self.read) = (header, len, self.copied as u32);
        Ok(())
    }

    /// Takes over what a glance has copied.
    #[inline]
    pub fn take_glance(&mut self, glance: &Glance) {
        self.bytes[..HEADER].fill(0);
        self.bytes[HEADER..HEADER + GLANCE].copy_from_slice(&glance.ethernet);
        (self.header, self.copied, self.len) = (HEADER, HEADER + GLANCE, glance.len_in_ring());
        self.read = self.copied as u32;
    }

    /// Makes a packet of this many bytes up: to everybody, from nobody, with a number behind the type, big-endian.
    pub fn make_up(&mut self, len: u32, number: u64) {
        let mut packet = [0; PEEK];
        packet[..6].fill(0xff);
        packet[6] = 2;
        // IEEE 802 local experimental.
        packet[12..14].copy_from_slice(&[0x88, 0xb5]);
        packet[14..22].copy_from_slice(&number.to_be_bytes());
        let copied = (len as usize).min(PEEK);
        self.begin(&packet[..copied], len - copied as u32);
    }

    /// Holds the header against the packet, of a driver with these features. It asks for nothing else from here on.
    #[inline]
    pub fn check(&mut self, features: u64) -> Result<(), BadHeader> {
        if self.is_plain() { Ok(()) } else { self.check_offload(features) }
    }

    #[cold]
    fn check_offload(&mut self, features: u64) -> Result<(), BadHeader> {
        // Without an Ethernet header whole, nothing else is.
        let packet = Packet::parse(self.packet(), self.packet_len() as usize);
        let packet = packet.map_err(|_| BadHeader::GsoNotOfPacket)?;
        let offload = self.vnet().check(&packet, features)?;
        self.set_offload(offload);
        Ok(())
    }

    /// What the header asks for. Of one that is not [plain](Self::is_plain).
    pub fn offload(&self) -> &Offload {
        &self.offload
    }

    /// Has the header ask for this.
    pub fn set_offload(&mut self, offload: Offload) {
        self.offload = offload;
        self.bytes[..HEADER].copy_from_slice(&offload.header().to_bytes());
    }

    /// Makes a packet that begins with these bytes and has so many more, with a plain header.
    pub fn begin(&mut self, bytes: &[u8], more: u32) {
        self.set_offload(Offload::default());
        self.header = HEADER;
        self.copied = HEADER + bytes.len().min(PEEK);
        self.bytes[HEADER..self.copied].copy_from_slice(&bytes[..self.copied - HEADER]);
        self.len = self.copied as u32 + more;
    }

    /// Takes in a frame that is in memory of ours, with what its header says.
    pub fn take_frame(&mut self, header: &VnetHdr, frame: &[u8]) -> Result<(), BadHeader> {
        let n = frame.len().min(PEEK);
        self.begin(&frame[..n], (frame.len() - n) as u32);
        self.read = n as u32;
        if header.flags | header.gso_type == 0 {
            return Ok(());
        }
        let packet = Packet::parse(frame, frame.len()).map_err(|_| BadHeader::GsoNotOfPacket)?;
        let offload = header.check(&packet, HOST_OFFLOADS)?;
        self.set_offload(offload);
        Ok(())
    }

    /// Where in the chain a byte of the packet is, by its place in the packet. Of one behind the addresses and tags.
    pub fn in_chain(&self, at: usize) -> u32 {
        // Both end at the same byte; tags may have come or gone before.
        (self.read as usize + at).saturating_sub(self.copied - self.header) as u32
    }

    /// The header, as the guest has said it.
    pub fn vnet(&self) -> VnetHdr {
        let mut bytes = [0; HEADER];
        bytes.copy_from_slice(&self.bytes[..HEADER]);
        VnetHdr::from_bytes(&bytes)
    }

    /// Whether the header asks for anything: a checksum or segmentation.
    #[inline]
    pub fn is_plain(&self) -> bool {
        self.bytes[0] | self.bytes[1] == 0
    }

    /// The packet, as far as it was copied.
    #[inline]
    pub fn packet(&self) -> &[u8] {
        &self.bytes[self.header..self.copied]
    }

    /// The same, to be changed.
    #[inline]
    pub fn packet_mut(&mut self) -> &mut [u8] {
        &mut self.bytes[self.header..self.copied]
    }

    /// Bytes of the packet.
    #[inline]
    pub fn packet_len(&self) -> u32 {
        self.len - self.header as u32
    }

    /// Copies more of a packet that was glanced at, as much as there is room for, by where it is in the sender's chain. What
    /// was decided by stays what it was.
    #[cold]
    pub fn look_further(&mut self, read: impl FnOnce(u32, &mut [u8]) -> usize) {
        let end = (self.header + PEEK).min(self.len as usize);
        if let Some(room) = self.bytes.get_mut(self.copied..end) {
            let more = read(self.read, room);
            self.copied += more;
            self.read += more as u32;
        }
    }

    /// Gives it a header as the receiver wants it, of this many bytes, with a hash if that has room for one.
    #[inline]
    pub fn make_received(&mut self, header: usize, hash: HashReport) {
        if header != self.header {
            self.resize_header(header, hash);
        }
        // What a plain header says besides is nobody's concern.
        if self.is_plain() {
            self.bytes[2..10].fill(0);
        }
    }

    /// Header and packet, as far as it was copied; the header says that the packet is in so many buffers.
    #[inline]
    pub fn bytes(&mut self, buffers: u16) -> &[u8] {
        self.bytes[10..HEADER].copy_from_slice(&buffers.to_le_bytes());
        &self.bytes[..self.copied]
    }

    #[cold]
    fn resize_header(&mut self, header: usize, hash: HashReport) {
        let packet = self.copied - self.header;
        self.bytes.copy_within(self.header..self.copied, header);
        if header == HEADER_WITH_HASH {
            self.bytes[HEADER..header].copy_from_slice(&hash.to_bytes());
        }
        self.len = self.packet_len() + header as u32;
        (self.header, self.copied) = (header, header + packet);
    }

    /// Bytes of the sender's chain that were copied: what is behind them is behind the copy.
    #[inline]
    pub fn read(&self) -> u32 {
        self.read
    }

    /// Gives it a VLAN tag, takes the outer one away, or changes that. What the header says of places in the packet moves
    /// with them.
    #[inline]
    pub fn retag(&mut self, action: TagAction) {
        let at = self.header + 12;
        match action {
            TagAction::Keep => {}
            TagAction::Set(tci) => self.bytes[at + 2..at + TAG].copy_from_slice(&tci.to_be_bytes()),
            TagAction::Push(tci) => {
                self.bytes.copy_within(at..self.copied, at + TAG);
                self.bytes[at..at + 2].copy_from_slice(&ETHERTYPE_VLAN.to_be_bytes());
                self.bytes[at + 2..at + TAG].copy_from_slice(&tci.to_be_bytes());
                self.copied += TAG;
                self.len += TAG as u32;
                self.move_offsets(|offset| offset.saturating_add(TAG as u16));
            }
            TagAction::Pop => {
                self.bytes.copy_within(at + TAG..self.copied, at);
                self.copied -= TAG;
                self.len -= TAG as u32;
                self.move_offsets(|offset| offset.saturating_sub(TAG as u16));
            }
        }
    }

    fn move_offsets(&mut self, to: impl Fn(u16) -> u16) {
        if !self.is_plain() {
            let Offload { csum, gso } = self.offload;
            let csum = csum.map(|c| Partial { start: to(c.start), ..c });
            self.set_offload(Offload { csum, gso: gso.map(|g| Gso { header_len: to(g.header_len), ..g }) });
        }
    }

    /// Whether all of the packet was copied.
    #[inline]
    pub fn is_whole(&self) -> bool {
        self.copied == self.len as usize
    }

    /// Bytes of header and packet.
    #[inline]
    pub fn len(&self) -> u32 {
        self.len
    }

    /// Never: there is a header at least.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }
}

impl Default for Head {
    fn default() -> Head {
        Head::new()
    }
}
