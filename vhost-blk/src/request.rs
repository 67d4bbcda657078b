//! A block request out of a chain: pure, no I/O (virtio 1.3, 5.2.6).
//!
//! ```text
//! device-readable  │ type reserved sector │ data of a write, discard or write-zeroes ...
//! device-writable  │ data of a read or an id ...                          │ status │
//! ```
//!
//! The two are byte streams. Where descriptors cut them is the driver's business (2.7.4).

use poll_engine::ring::chain::ChainView;
use poll_engine::stats::ErrorKind;

use crate::disk::{Access, Disk};

/// Bytes of a sector, whatever the block size (5.2.4).
pub const SECTOR: u64 = 512;
/// Bytes of the request header.
pub const HEADER: u32 = 16;
/// Bytes of an id.
pub const ID_LEN: usize = 20;
/// Bytes of one discard or write-zeroes segment.
pub const SEGMENT: u32 = 16;

/// `VIRTIO_BLK_S_OK`.
pub const STATUS_OK: u8 = 0;
/// `VIRTIO_BLK_S_IOERR`.
pub const STATUS_IOERR: u8 = 1;
/// `VIRTIO_BLK_S_UNSUPP`.
pub const STATUS_UNSUPP: u8 = 2;

/// `VIRTIO_BLK_T_IN`.
pub const T_IN: u32 = 0;
/// `VIRTIO_BLK_T_OUT`.
pub const T_OUT: u32 = 1;
/// `VIRTIO_BLK_T_FLUSH`.
pub const T_FLUSH: u32 = 4;
/// `VIRTIO_BLK_T_GET_ID`.
pub const T_GET_ID: u32 = 8;
/// `VIRTIO_BLK_T_DISCARD`.
pub const T_DISCARD: u32 = 11;
/// `VIRTIO_BLK_T_WRITE_ZEROES`.
pub const T_WRITE_ZEROES: u32 = 13;

/// `VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP`.
pub const FLAG_UNMAP: u32 = 1;

/// What a request asks for. Offsets and lengths are in bytes and inside the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// Fill the chain's writable data from the disk.
    Read {
        /// Where on the disk.
        offset: u64,
        /// How much.
        len: u32,
    },
    /// Write the chain's readable data to the disk.
    Write {
        /// Where on the disk.
        offset: u64,
        /// How much.
        len: u32,
    },
    /// Make completed writes durable.
    Flush,
    /// Fill the chain's writable data with the serial number.
    GetId {
        /// Room for it.
        len: u32,
    },
    /// The ranges named by `count` segments are of no more use.
    Discard {
        /// Segments in the readable data.
        count: u32,
    },
    /// The ranges named by `count` segments are to read as zero.
    WriteZeroes {
        /// Segments in the readable data.
        count: u32,
    },
}

/// A range to be discarded or zeroed, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Range {
    /// Where on the disk.
    pub offset: u64,
    /// How much.
    pub len: u64,
    /// Space may be given up (write-zeroes only).
    pub unmap: bool,
}

/// Why a request is answered with an error.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Invalid {
    /// No room for a header or a status byte: such a request cannot even be answered with an error status if there is
    /// no byte to write it to.
    #[error("request without a whole header or a writable status byte")]
    Framing,
    /// A type or flag that is not offered.
    #[error("request type {0} or its flags are not supported")]
    Unsupported(u32),
    /// Data that is no whole number of sectors, blocks or segments.
    #[error("request of type {0} with {1} bytes of data")]
    Length(u32, u32),
    /// Beyond the end of the device, or not on a block boundary.
    #[error("request for sector {sector}, {len} bytes, is out of range")]
    Range {
        /// First sector.
        sector: u64,
        /// Bytes.
        len: u64,
    },
    /// A write to a read-only device.
    #[error("write to a read-only device")]
    ReadOnly,
}

impl Invalid {
    /// The status byte for it.
    pub fn status(self) -> u8 {
        if matches!(self, Invalid::Unsupported(_)) { STATUS_UNSUPP } else { STATUS_IOERR }
    }

    /// How it is counted.
    pub fn kind(self) -> ErrorKind {
        match self {
            Invalid::Framing | Invalid::Length(..) => ErrorKind::Malformed,
            Invalid::Unsupported(_) => ErrorKind::Unsupported,
            Invalid::Range { .. } => ErrorKind::Range,
            Invalid::ReadOnly => ErrorKind::ReadOnly,
        }
    }
}

/// The header as two little-endian numbers: type (and priority), sector.
#[inline]
fn header(chain: &ChainView<'_>) -> Option<[u64; 2]> {
    if let Some(pair) = chain.readable(0, HEADER).next()?.read_pair_once() {
        return Some(pair);
    }
    let mut bytes = [0; HEADER as usize];
    let half = |bytes: &[u8], at: usize| u64::from_le_bytes(std::array::from_fn(|i| bytes[at + i]));
    (chain.readable(0, HEADER).read(&mut bytes) == bytes.len()).then(|| [half(&bytes, 0), half(&bytes, 8)])
}

/// The type and sector of a request that may be invalid otherwise; `None` without a whole header.
pub fn kind_and_sector(chain: &ChainView<'_>) -> Option<(u32, u64)> {
    header(chain).map(|[kind, sector]| (kind as u32, sector))
}

/// Parses the chain as a request to `disk`.
#[inline]
pub fn parse(chain: &ChainView<'_>, disk: &Disk) -> Result<Operation, Invalid> {
    // The last writable byte is the status.
    let data_in = chain.writable_len().checked_sub(1).ok_or(Invalid::Framing)?;
    let data_out = chain.readable_len().checked_sub(HEADER).ok_or(Invalid::Framing)?;
    let [kind, sector] = header(chain).ok_or(Invalid::Framing)?;
    let kind = kind as u32;
    match kind {
        T_IN => {
            let offset = check_range(disk, Access::Read, kind, sector, data_in)?;
            Ok(Operation::Read { offset, len: data_in })
        }
        T_OUT => {
            let offset = check_range(disk, Access::Write, kind, sector, data_out)?;
            Ok(Operation::Write { offset, len: data_out })
        }
        T_FLUSH => Ok(Operation::Flush),
        T_GET_ID => Ok(Operation::GetId { len: data_in }),
        T_DISCARD | T_WRITE_ZEROES => {
            if disk.is_read_only() {
                return Err(Invalid::ReadOnly);
            }
            if kind == T_DISCARD && !disk.discards() {
                return Err(Invalid::Unsupported(kind));
            }
            let count = data_out / SEGMENT;
            if count == 0 || !data_out.is_multiple_of(SEGMENT) || count > disk.limits().max_segments {
                return Err(Invalid::Length(kind, data_out));
            }
            Ok(if kind == T_DISCARD {
                Operation::Discard { count }
            } else {
                Operation::WriteZeroes { count }
            })
        }
        other => Err(Invalid::Unsupported(other)),
    }
}

#[inline]
fn check_range(disk: &Disk, access: Access, kind: u32, sector: u64, len: u32) -> Result<u64, Invalid> {
    if access == Access::Write && disk.is_read_only() {
        return Err(Invalid::ReadOnly);
    }
    if len == 0 || !u64::from(len).is_multiple_of(SECTOR) {
        return Err(Invalid::Length(kind, len));
    }
    let out_of_range = Invalid::Range { sector, len: u64::from(len) };
    let offset = sector.checked_mul(SECTOR).ok_or(out_of_range)?;
    if !disk.contains(offset, u64::from(len)) {
        return Err(out_of_range);
    }
    Ok(offset)
}

/// Reads the segments of a discard or write-zeroes request, all of them checked before any is acted on.
pub fn ranges(
    chain: &ChainView<'_>,
    disk: &Disk,
    operation: Operation,
    into: &mut Vec<Range>,
) -> Result<(), Invalid> {
    let (kind, count, allowed) = match operation {
        Operation::Discard { count } => (T_DISCARD, count, 0),
        Operation::WriteZeroes { count } => (T_WRITE_ZEROES, count, FLAG_UNMAP),
        _ => return Ok(()),
    };
    into.clear();
    for i in 0..count {
        let mut b = [0; SEGMENT as usize];
        if chain.readable(HEADER + i * SEGMENT, SEGMENT).read(&mut b) < b.len() {
            return Err(Invalid::Length(kind, count * SEGMENT));
        }
        let sector = u64::from_le_bytes([b[0], b[1], b[2], b[3], b[4], b[5], b[6], b[7]]);
        let sectors = u32::from_le_bytes([b[8], b[9], b[10], b[11]]);
        let flags = u32::from_le_bytes([b[12], b[13], b[14], b[15]]);
        // 5.2.6.2: unknown flags, and unmap in a discard, are answered with UNSUPP.
        if flags & !allowed != 0 {
            return Err(Invalid::Unsupported(kind));
        }
        let len = u64::from(sectors) * SECTOR;
        let out_of_range = Invalid::Range { sector, len };
        let offset = sector.checked_mul(SECTOR).ok_or(out_of_range)?;
        if sectors == 0 || sectors > disk.limits().max_range_sectors || !disk.contains(offset, len) {
            return Err(out_of_range);
        }
        into.push(Range { offset, len, unmap: flags & FLAG_UNMAP != 0 });
    }
    Ok(())
}
