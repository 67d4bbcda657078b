//! The beginning of a frame: addresses, the outer tag, and what comes behind.

use super::vlan::{TPID, Tag};

/// `ETH_P_IP`.
pub const IPV4: u16 = 0x0800;
/// `ETH_P_ARP`.
pub const ARP: u16 = 0x0806;
/// `ETH_P_RARP`.
pub const RARP: u16 = 0x8035;
/// `ETH_P_IPV6`.
pub const IPV6: u16 = 0x86dd;
/// `ETH_P_8021AD`.
const TPID_SERVICE: u16 = 0x88a8;

/// Bytes of a header without a tag.
pub const HEADER: usize = 14;
/// Bytes that a tag adds.
pub const TAG: usize = 4;

/// Whether it is the type of a tag.
#[inline]
pub fn is_tpid(ethertype: u16) -> bool {
    matches!(ethertype, TPID | TPID_SERVICE)
}

/// What is read of a frame first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ethernet {
    /// Destination, as [`MacAddr::to_u64`](crate::mac::MacAddr::to_u64) has it.
    pub dst: u64,
    /// Source.
    pub src: u64,
    /// The outer tag, of a customer VLAN.
    pub tag: Option<Tag>,
    /// What comes behind the outer tag.
    pub ethertype: u16,
    /// Where that begins.
    pub payload: usize,
}

impl Ethernet {
    /// Of a frame's first bytes. `None` when it is shorter than its header.
    #[inline]
    pub fn parse(frame: &[u8]) -> Option<Ethernet> {
        let head: &[u8; HEADER] = frame.first_chunk()?;
        let word = |at: usize| head[at..].first_chunk().map(|bytes| u64::from_be_bytes(*bytes));
        let (dst, src) = (word(0)? >> 16, word(4)? & 0xffff_ffff_ffff);
        let ethertype = u16::from_be_bytes([head[12], head[13]]);
        if ethertype != TPID {
            return Some(Ethernet { dst, src, tag: None, ethertype, payload: HEADER });
        }
        let below: [u8; TAG] = *frame[HEADER..].first_chunk()?;
        let ethertype = u16::from_be_bytes([below[2], below[3]]);
        let tag = Tag { tci: u16::from_be_bytes([below[0], below[1]]), is_stacked: is_tpid(ethertype) };
        Some(Ethernet { dst, src, tag: Some(tag), ethertype, payload: HEADER + TAG })
    }
}
