//! Commands to an NVMe namespace as the kernel takes them (`struct nvme_uring_cmd`, linux/nvme_ioctl.h), and what comes back.
//! Numbers are those of the NVM Express base and NVM command set specifications.

use std::fmt;

/// Flush.
const FLUSH: u8 = 0x00;
/// Write.
const WRITE: u8 = 0x01;
/// Read.
const READ: u8 = 0x02;
/// Write Zeroes.
const WRITE_ZEROES: u8 = 0x08;
/// Dataset Management.
const DATASET_MANAGEMENT: u8 = 0x09;
/// Identify, of the admin commands.
const IDENTIFY: u8 = 0x06;

/// Force Unit Access, in dword 12 of commands that write.
const FUA: u32 = 1 << 30;
/// Deallocate, in dword 12 of Write Zeroes.
const DEAC: u32 = 1 << 25;
/// Deallocate, in dword 11 of Dataset Management.
const AD: u32 = 1 << 2;

/// Do Not Retry, in a status.
const DNR: i32 = 0x4000;
/// Status code type and status code, in a status.
const CODE: i32 = 0x7ff;
const INVALID_OPCODE: i32 = 0x001;
const INVALID_FIELD: i32 = 0x002;

/// `struct nvme_uring_cmd`, and `struct nvme_passthru_cmd`, which has a result in the place of the last word.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub struct Command {
    opcode: u8,
    flags: u8,
    reserved: u16,
    nsid: u32,
    cdw2: u32,
    cdw3: u32,
    metadata: u64,
    /// Of the data, or of an array of iovecs.
    addr: u64,
    metadata_len: u32,
    /// Bytes, or iovecs.
    data_len: u32,
    cdw10: u32,
    cdw11: u32,
    cdw12: u32,
    cdw13: u32,
    cdw14: u32,
    cdw15: u32,
    timeout_ms: u32,
    result: u32,
}

/// One range of Dataset Management.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub struct Deallocated {
    attributes: u32,
    blocks: u32,
    first: u64,
}

impl Deallocated {
    /// Bytes of one.
    pub const LEN: u32 = 16;

    /// `blocks` from the block `first` on.
    pub fn new(first: u64, blocks: u32) -> Deallocated {
        Deallocated { attributes: 0, blocks: blocks.to_le(), first: first.to_le() }
    }
}

/// What a command is to do with blocks; `blocks` is never 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ask {
    /// Make what was written durable.
    Flush,
    /// Read them.
    Read {
        /// The first.
        first: u64,
        /// How many.
        blocks: u32,
    },
    /// Write them.
    Write {
        /// The first.
        first: u64,
        /// How many.
        blocks: u32,
        /// They are durable when the command is over.
        durable: bool,
    },
    /// Have them read as zeros.
    Zero {
        /// The first.
        first: u64,
        /// How many.
        blocks: u32,
        /// They are durable when the command is over.
        durable: bool,
        /// Their space may be given up.
        unmap: bool,
    },
    /// Give the space of so many ranges up, which are the data.
    Deallocate(u32),
}

impl Command {
    /// To the namespace `nsid`, without the data.
    pub fn new(nsid: u32, ask: Ask) -> Command {
        let (opcode, range, cdw11, cdw12) = match ask {
            Ask::Flush => (FLUSH, None, 0, 0),
            Ask::Read { first, blocks } => (READ, Some((first, blocks)), 0, 0),
            Ask::Write { first, blocks, durable } => {
                (WRITE, Some((first, blocks)), 0, if durable { FUA } else { 0 })
            }
            Ask::Zero { first, blocks, durable, unmap } => {
                let flags = if durable { FUA } else { 0 } | if unmap { DEAC } else { 0 };
                (WRITE_ZEROES, Some((first, blocks)), 0, flags)
            }
            Ask::Deallocate(ranges) => {
                let command =
                    Command { opcode: DATASET_MANAGEMENT, nsid, cdw10: ranges - 1, ..Command::default() };
                return Command { cdw11: AD, ..command };
            }
        };
        let command = Command { opcode, nsid, cdw11, cdw12, ..Command::default() };
        match range {
            None => command,
            // Counts of blocks are one less than they say.
            Some((first, blocks)) => Command {
                cdw10: first as u32,
                cdw11: (first >> 32) as u32,
                cdw12: cdw12 | ((blocks - 1) & 0xffff),
                ..command
            },
        }
    }

    /// Identify, of the admin commands: the controller (1), or the namespace `nsid` (0).
    pub fn identify(nsid: u32, what: u32) -> Command {
        Command { opcode: IDENTIFY, nsid, cdw10: what, ..Command::default() }
    }

    /// With data at an address: so many bytes, or iovecs.
    #[must_use]
    pub fn with_data(self, addr: u64, data_len: u32) -> Command {
        Command { addr, data_len, ..self }
    }

    /// As an entry of the ring has it.
    pub fn bytes(&self) -> [u8; 80] {
        let mut bytes = [0; 80];
        let mut at = 0;
        let mut put = |part: &[u8]| {
            bytes[at..at + part.len()].copy_from_slice(part);
            at += part.len();
        };
        put(&[self.opcode, self.flags]);
        put(&self.reserved.to_ne_bytes());
        for word in [self.nsid, self.cdw2, self.cdw3] {
            put(&word.to_ne_bytes());
        }
        for address in [self.metadata, self.addr] {
            put(&address.to_ne_bytes());
        }
        for word in [
            self.metadata_len,
            self.data_len,
            self.cdw10,
            self.cdw11,
            self.cdw12,
            self.cdw13,
            self.cdw14,
            self.cdw15,
            self.timeout_ms,
            self.result,
        ] {
            put(&word.to_ne_bytes());
        }
        bytes
    }
}

/// The status of a command that has failed: its type, its code, and flags.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Status(pub i32);

impl Status {
    /// The controller does not know the command, or what is asked with it.
    pub fn is_unknown(self) -> bool {
        matches!(self.0 & CODE, INVALID_OPCODE | INVALID_FIELD)
    }

    /// It makes sense to try again.
    pub fn may_pass(self) -> bool {
        self.0 & DNR == 0
    }
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Those that happen.
        let what = match self.0 & CODE {
            INVALID_OPCODE => ", invalid command",
            INVALID_FIELD => ", invalid field",
            0x004 => ", data transfer error",
            0x006 => ", internal error",
            0x020 => ", namespace is write protected",
            0x080 => ", LBA out of range",
            0x081 => ", capacity exceeded",
            0x280 => ", write fault",
            0x281 => ", unrecovered read error",
            0x286 => ", access denied",
            0x287 => ", deallocated or unwritten logical block",
            0x370 | 0x371 => ", no path to the controller",
            _ => "",
        };
        write!(f, "NVMe status {:#05x}{what}", self.0 & CODE)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_are_laid_out_as_the_kernel_has_them() {
        assert_eq!(size_of::<Command>(), 72);
        let at = |bytes: [u8; 80], at: usize| u32::from_ne_bytes(std::array::from_fn(|i| bytes[at + i]));
        let ask = Ask::Write { first: 0x1_2345_6789, blocks: 0x1_0000, durable: true };
        let bytes = Command::new(3, ask).with_data(0x77, 9).bytes();
        assert_eq!((bytes[0], at(bytes, 4), at(bytes, 24), at(bytes, 36)), (1, 3, 0x77, 9));
        assert_eq!((at(bytes, 40), at(bytes, 44), at(bytes, 48)), (0x2345_6789, 1, FUA | 0xffff));
        let zero = Command::new(1, Ask::Zero { first: 8, blocks: 1, durable: false, unmap: true }).bytes();
        assert_eq!((zero[0], at(zero, 40), at(zero, 48)), (8, 8, DEAC));
        let deallocate = Command::new(1, Ask::Deallocate(2)).bytes();
        assert_eq!((deallocate[0], at(deallocate, 40), at(deallocate, 44)), (9, 1, AD));
        assert_eq!(Command::new(1, Ask::Flush).bytes()[0], 0);
    }

    #[test]
    fn what_may_pass_is_tried_again() {
        assert!(Status(0x371).may_pass() && !Status(0x4281).may_pass());
        assert!(Status(0x4001).is_unknown() && !Status(0x4101).is_unknown());
        assert_eq!(Status(0x4281).to_string(), "NVMe status 0x281, unrecovered read error");
    }
}
