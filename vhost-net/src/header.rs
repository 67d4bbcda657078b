//! What comes before every packet in a ring: `struct virtio_net_hdr` (virtio 1.3, 5.1.6).

use crate::features::HASH_REPORT;

/// Bytes of the header with VERSION_1.
pub const HEADER: usize = 12;
/// Bytes of the header with HASH_REPORT.
pub const HEADER_WITH_HASH: usize = 20;

/// Bytes of the header that these features make.
pub fn header_len(features: u64) -> usize {
    if features & HASH_REPORT == 0 { HEADER } else { HEADER_WITH_HASH }
}

/// `struct virtio_net_hdr`, as it was said: nothing in it is checked.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct VnetHdr {
    /// `VIRTIO_NET_HDR_F_*`.
    pub flags: u8,
    /// `VIRTIO_NET_HDR_GSO_*`.
    pub gso_type: u8,
    /// Bytes of all headers, of packets to be segmented. A hint.
    pub hdr_len: u16,
    /// Bytes of payload of each segment.
    pub gso_size: u16,
    /// Where in the packet checksumming begins.
    pub csum_start: u16,
    /// Where, from there, the checksum belongs.
    pub csum_offset: u16,
    /// Receive buffers that the packet is spread over. Unused on transmit.
    pub num_buffers: u16,
}

impl VnetHdr {
    /// The header in `bytes`.
    pub fn from_bytes(bytes: &[u8; HEADER]) -> VnetHdr {
        let word = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        VnetHdr {
            flags: bytes[0],
            gso_type: bytes[1],
            hdr_len: word(2),
            gso_size: word(4),
            csum_start: word(6),
            csum_offset: word(8),
            num_buffers: word(10),
        }
    }

    /// The header as bytes.
    pub fn to_bytes(&self) -> [u8; HEADER] {
        let mut bytes = [0; HEADER];
        [bytes[0], bytes[1]] = [self.flags, self.gso_type];
        let words = [self.hdr_len, self.gso_size, self.csum_start, self.csum_offset, self.num_buffers];
        for (to, word) in bytes[2..].chunks_exact_mut(2).zip(words) {
            to.copy_from_slice(&word.to_le_bytes());
        }
        bytes
    }
}
