//! The file: a header, then records of one size, all numbers little-endian. docs/trace-format.md is its description.
//!
//! No I/O here: values to bytes and back, for the daemon that writes captures and for whoever reads them.

/// First bytes of a capture.
pub const MAGIC: [u8; 8] = *b"kickless";
/// Version of the format that is written here.
pub const VERSION: u16 = 1;
/// Bytes of the header.
pub const HEADER_LEN: usize = 64;
/// Bytes of a record.
pub const RECORD_LEN: usize = 24;

/// Largest time and sector that a record can hold; more is cut off to this.
pub const MAX_56: u64 = (1 << 56) - 1;

/// What stands at the beginning of a capture.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// Queues that the disk offered.
    pub queues: u16,
    /// Bytes of the disk when the capture began.
    pub disk_size: u64,
    /// Its logical block size in bytes.
    pub block_size: u32,
    /// When time was 0, in nanoseconds since 1970 (UTC).
    pub start: u64,
}

/// What a record is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(u8)]
pub enum Kind {
    /// A read.
    Read = 0,
    /// A write.
    Write = 1,
    /// A flush.
    Flush = 2,
    /// A request for the serial number.
    GetId = 3,
    /// A discard; the record has its first range.
    Discard = 4,
    /// A write of zeroes that must stay allocated; the record has its first range.
    WriteZeroes = 5,
    /// A write of zeroes that may give space up; the record has its first range.
    WriteZeroesUnmap = 6,
    /// One more range of the request in the record before it on the same queue.
    Range = 7,
    /// A request that could not be understood; the sector is its type, if it had one.
    Other = 8,
    /// Not a request: as many as the sector says were dropped on this queue, at some time before.
    Lost = 14,
    /// Not a request: the capture was ended properly. The last record.
    End = 15,
}

impl Kind {
    /// The kind with this number.
    pub fn from_number(number: u8) -> Option<Kind> {
        Some(match number {
            0 => Kind::Read,
            1 => Kind::Write,
            2 => Kind::Flush,
            3 => Kind::GetId,
            4 => Kind::Discard,
            5 => Kind::WriteZeroes,
            6 => Kind::WriteZeroesUnmap,
            7 => Kind::Range,
            8 => Kind::Other,
            14 => Kind::Lost,
            15 => Kind::End,
            _ => return None,
        })
    }
}

/// One record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Record {
    /// When the request was taken off the ring, in nanoseconds since the start; at most [`MAX_56`].
    pub time: u64,
    /// Its queue.
    pub queue: u8,
    /// What it was.
    pub kind: Kind,
    /// The status that the guest was given, at most 15.
    pub status: u8,
    /// Where on the disk, in sectors of 512 bytes; at most [`MAX_56`].
    pub sector: u64,
    /// Bytes of data, or of the range.
    pub len: u32,
    /// Time until it was over, in nanoseconds; `u32::MAX` if it was longer than that.
    pub latency: u32,
}

/// What is wrong with a capture.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FormatError {
    /// Another kind of file.
    #[error("no capture: it does not begin with '{}'", MAGIC.escape_ascii())]
    Magic,
    /// Less than a header.
    #[error("truncated: {0} bytes are less than the header's {HEADER_LEN}")]
    Header(usize),
    /// A format that is not known here.
    #[error("capture of version {0}; this program reads version {VERSION}")]
    Version(u16),
    /// A header that does not fit its version.
    #[error(
        "broken header: {0} bytes of header and {1} of each record, instead of {HEADER_LEN} and {RECORD_LEN}"
    )]
    Sizes(u16, u16),
    /// A record that means nothing.
    #[error("broken record: kind {0} is unknown")]
    Kind(u8),
}

fn number<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    std::array::from_fn(|i| bytes[at + i])
}

impl Header {
    /// As bytes.
    pub fn to_bytes(&self) -> [u8; HEADER_LEN] {
        let mut bytes = [0; HEADER_LEN];
        let mut put = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
        put(0, &MAGIC);
        put(8, &VERSION.to_le_bytes());
        put(10, &(HEADER_LEN as u16).to_le_bytes());
        put(12, &(RECORD_LEN as u16).to_le_bytes());
        put(14, &self.queues.to_le_bytes());
        put(16, &self.disk_size.to_le_bytes());
        put(24, &self.block_size.to_le_bytes());
        put(32, &self.start.to_le_bytes());
        bytes
    }

    /// From the first bytes of a file.
    pub fn from_bytes(bytes: &[u8]) -> Result<Header, FormatError> {
        if !bytes.starts_with(&MAGIC) {
            return Err(FormatError::Magic);
        }
        if bytes.len() < HEADER_LEN {
            return Err(FormatError::Header(bytes.len()));
        }
        let version = u16::from_le_bytes(number(bytes, 8));
        if version != VERSION {
            return Err(FormatError::Version(version));
        }
        let sizes = [u16::from_le_bytes(number(bytes, 10)), u16::from_le_bytes(number(bytes, 12))];
        if sizes != [HEADER_LEN as u16, RECORD_LEN as u16] {
            return Err(FormatError::Sizes(sizes[0], sizes[1]));
        }
        Ok(Header {
            queues: u16::from_le_bytes(number(bytes, 14)),
            disk_size: u64::from_le_bytes(number(bytes, 16)),
            block_size: u32::from_le_bytes(number(bytes, 24)),
            start: u64::from_le_bytes(number(bytes, 32)),
        })
    }
}

impl Record {
    /// As bytes. What is too large for its field becomes the largest that fits.
    pub fn to_bytes(&self) -> [u8; RECORD_LEN] {
        let first = self.time.min(MAX_56) | u64::from(self.queue) << 56;
        let what = self.kind as u8 | self.status.min(15) << 4;
        let second = self.sector.min(MAX_56) | u64::from(what) << 56;
        let mut bytes = [0; RECORD_LEN];
        bytes[..8].copy_from_slice(&first.to_le_bytes());
        bytes[8..16].copy_from_slice(&second.to_le_bytes());
        bytes[16..20].copy_from_slice(&self.len.to_le_bytes());
        bytes[20..].copy_from_slice(&self.latency.to_le_bytes());
        bytes
    }

    /// From its bytes.
    pub fn from_bytes(bytes: &[u8; RECORD_LEN]) -> Result<Record, FormatError> {
        let first = u64::from_le_bytes(number(bytes, 0));
        let second = u64::from_le_bytes(number(bytes, 8));
        let what = (second >> 56) as u8;
        Ok(Record {
            time: first & MAX_56,
            queue: (first >> 56) as u8,
            kind: Kind::from_number(what & 15).ok_or(FormatError::Kind(what & 15))?,
            status: what >> 4,
            sector: second & MAX_56,
            len: u32::from_le_bytes(number(bytes, 16)),
            latency: u32::from_le_bytes(number(bytes, 20)),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const HEADER: Header = Header { queues: 4, disk_size: 1 << 30, block_size: 4096, start: 77 };

    #[test]
    fn the_layout_is_the_one_that_is_documented() {
        let bytes = HEADER.to_bytes();
        assert_eq!(&bytes[..16], b"kickless\x01\0\x40\0\x18\0\x04\0");
        assert_eq!((bytes[19], bytes[25], bytes[32]), (0x40, 0x10, 77));
        let record = Record {
            time: 0x0102_0304,
            queue: 7,
            kind: Kind::Discard,
            status: 2,
            sector: 0x0506,
            len: 0x0a0b,
            latency: 0x0c0d,
        };
        assert_eq!(
            record.to_bytes(),
            [4, 3, 2, 1, 0, 0, 0, 7, 6, 5, 0, 0, 0, 0, 0, 0x24, 0x0b, 0x0a, 0, 0, 0x0d, 0x0c, 0, 0]
        );
    }

    #[test]
    fn other_files_and_versions_are_told_apart() {
        let good = HEADER.to_bytes();
        assert_eq!(Header::from_bytes(&good), Ok(HEADER));
        assert_eq!(Header::from_bytes(b""), Err(FormatError::Magic));
        assert_eq!(Header::from_bytes(b"fio version 2 iolog"), Err(FormatError::Magic));
        assert_eq!(Header::from_bytes(&good[..63]), Err(FormatError::Header(63)));
        let mut other = good;
        other[8] = 2;
        assert_eq!(Header::from_bytes(&other), Err(FormatError::Version(2)));
        other = good;
        other[12] = 16;
        assert_eq!(Header::from_bytes(&other), Err(FormatError::Sizes(64, 16)));
        let mut record = [0; RECORD_LEN];
        record[15] = 9;
        assert_eq!(Record::from_bytes(&record), Err(FormatError::Kind(9)));
    }

    #[test]
    fn what_is_too_large_is_cut_off_and_touches_nothing_else() {
        let record = Record {
            time: u64::MAX,
            queue: 0,
            kind: Kind::Read,
            status: 0xff,
            sector: u64::MAX,
            len: 1,
            latency: 2,
        };
        let cut = Record { time: MAX_56, sector: MAX_56, status: 15, ..record };
        assert_eq!(Record::from_bytes(&record.to_bytes()), Ok(cut));
    }

    proptest! {
        #[test]
        fn records_come_back_as_they_were(
            (time, sector) in (0..=MAX_56, 0..=MAX_56),
            (queue, kind, status) in (any::<u8>(), 0u8..16, 0u8..16),
            (len, latency) in any::<(u32, u32)>(),
        ) {
            let Some(kind) = Kind::from_number(kind) else { return Ok(()) };
            let record = Record { time, queue, kind, status, sector, len, latency };
            prop_assert_eq!(Record::from_bytes(&record.to_bytes()), Ok(record));
        }

        #[test]
        fn any_bytes_are_a_record_that_makes_the_same_bytes_or_an_error(bytes: [u8; RECORD_LEN]) {
            if let Ok(record) = Record::from_bytes(&bytes) {
                prop_assert_eq!(record.to_bytes(), bytes);
            }
        }

        #[test]
        fn headers_come_back_as_they_were(
            (queues, disk_size) in any::<(u16, u64)>(), (block_size, start) in any::<(u32, u64)>(),
        ) {
            let header = Header { queues, disk_size, block_size, start };
            prop_assert_eq!(Header::from_bytes(&header.to_bytes()), Ok(header));
        }
    }
}
