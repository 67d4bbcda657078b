//! The vhost-user codec: bytes to requests, replies to bytes. Numbers are in host byte order, as the protocol says
//! (qemu, docs/interop/vhost-user.rst, "Message Specification").

use serde::{Deserialize, Serialize};

use crate::memory::{Miss, RegionSpec};
use crate::ring::inflight::InflightSpec;

/// Bytes of a message header.
pub const HEADER_LEN: usize = 12;
/// Longest payload taken: the longest of the protocol (a memory table, a configuration space) is well below.
pub const MAX_PAYLOAD: usize = 4096;
/// Most descriptors with one message (`SET_MEM_TABLE`: one a region).
pub const MAX_FDS: usize = 32;

const VERSION: u32 = 1;
const VERSION_MASK: u32 = 3;
const FLAG_REPLY: u32 = 1 << 2;
const FLAG_NEED_REPLY: u32 = 1 << 3;

/// The only request of ours that wants a reply.
const BACKEND_IOTLB_MSG: u32 = 1;

/// Protocol feature bits.
pub mod protocol {
    /// Several queues.
    pub const MQ: u64 = 1 << 0;
    /// The dirty log is shared memory.
    pub const LOG_SHMFD: u64 = 1 << 1;
    /// `SEND_RARP`.
    pub const RARP: u64 = 1 << 2;
    /// Acknowledgement on demand.
    pub const REPLY_ACK: u64 = 1 << 3;
    /// `NET_SET_MTU`.
    pub const NET_MTU: u64 = 1 << 4;
    /// A channel for requests of the back end.
    pub const BACKEND_REQ: u64 = 1 << 5;
    /// Post-copy migration.
    pub const PAGEFAULT: u64 = 1 << 8;
    /// Configuration space.
    pub const CONFIG: u64 = 1 << 9;
    /// A record of requests in flight, in memory that the front end keeps.
    pub const INFLIGHT_SHMFD: u64 = 1 << 12;
    /// `RESET_DEVICE`.
    pub const RESET_DEVICE: u64 = 1 << 13;
    /// Memory added and removed region by region.
    pub const CONFIGURE_MEM_SLOTS: u64 = 1 << 15;
    /// `SET_STATUS`, `GET_STATUS`.
    pub const STATUS: u64 = 1 << 16;
    /// `SET_DEVICE_STATE_FD`, `CHECK_DEVICE_STATE`.
    pub const DEVICE_STATE: u64 = 1 << 19;
}

/// `VHOST_F_LOG_ALL`, in the place of a virtio feature bit: on while what is written to buffers is to be logged.
pub const F_LOG_ALL: u64 = 1 << 26;

/// `VHOST_VRING_F_LOG` in [`VringAddr::flags`]: what is written to the ring is to be logged.
pub const VRING_F_LOG: u32 = 1 << 0;

/// `VHOST_USER_F_PROTOCOL_FEATURES`, in the place of a virtio feature bit.
pub const F_PROTOCOL_FEATURES: u64 = 1 << 30;

/// A message that is no valid message.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum WireError {
    /// A version we do not speak, or a reply where a request belongs.
    #[error("message flags {0:#x} are not those of a vhost-user version 1 request")]
    Flags(u32),
    /// A payload no request has.
    #[error("payload of {0} bytes is longer than any request")]
    TooLong(u32),
    /// A payload that does not fit its request.
    #[error("request {request} does not have a payload of {len} bytes like this one")]
    Payload {
        /// Request number.
        request: u32,
        /// Bytes sent.
        len: usize,
    },
}

/// A request's header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// Request number.
    pub request: u32,
    /// The front end waits for an acknowledgement (counts only with `REPLY_ACK`).
    pub need_reply: bool,
    /// Bytes of payload.
    pub size: usize,
}

impl Header {
    /// Decodes and checks a header.
    pub fn decode(bytes: [u8; HEADER_LEN]) -> Result<Header, WireError> {
        let [request, flags, size] = [0, 4, 8].map(|at| u32_at(&bytes, at).unwrap_or(0));
        if flags & VERSION_MASK != VERSION || flags & FLAG_REPLY != 0 {
            return Err(WireError::Flags(flags));
        }
        if size as usize > MAX_PAYLOAD {
            return Err(WireError::TooLong(size));
        }
        Ok(Header { request, need_reply: flags & FLAG_NEED_REPLY != 0, size: size as usize })
    }
}

/// Ring addresses, as `SET_VRING_ADDR` gives them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VringAddr {
    /// `VHOST_VRING_F_*`.
    pub flags: u32,
    /// Descriptor table.
    pub desc: u64,
    /// Used ring.
    pub used: u64,
    /// Available ring.
    pub avail: u64,
    /// Guest-physical address under which writes to the used ring are logged, with [`VRING_F_LOG`].
    pub log: u64,
}

/// A request of the front end. Names and numbers are the protocol's.
#[derive(Clone, Debug, PartialEq, Eq)]
#[allow(missing_docs)] // the protocol's own document has them, name by name
pub enum Request {
    GetFeatures,
    SetFeatures(u64),
    SetOwner,
    ResetOwner,
    SetMemTable(Vec<RegionSpec>),
    SetLogBase {
        size: u64,
        offset: u64,
    },
    SetLogFd,
    SetVringNum {
        index: u32,
        num: u32,
    },
    SetVringAddr {
        index: u32,
        addr: VringAddr,
    },
    SetVringBase {
        index: u32,
        base: u32,
    },
    GetVringBase {
        index: u32,
    },
    SetVringKick {
        index: u32,
        has_fd: bool,
    },
    SetVringCall {
        index: u32,
        has_fd: bool,
    },
    SetVringErr {
        index: u32,
        has_fd: bool,
    },
    GetProtocolFeatures,
    SetProtocolFeatures(u64),
    GetQueueNum,
    /// A MAC address.
    SendRarp([u8; 6]),
    SetMtu(u64),
    SetVringEnable {
        index: u32,
        enable: bool,
    },
    SetBackendReqFd,
    GetConfig {
        offset: u32,
        size: u32,
        flags: u32,
    },
    SetConfig {
        offset: u32,
        flags: u32,
        bytes: Vec<u8>,
    },
    PostcopyAdvise,
    PostcopyListen,
    PostcopyEnd,
    /// The front end's answer to our answer to a change of the memory table while a guest comes before its memory. QEMU
    /// sends it under the number of the request before, whichever that was, or of none.
    PostcopyAck(u64),
    GetInflightFd(InflightSpec),
    SetInflightFd(InflightSpec),
    ResetDevice,
    GetMaxMemSlots,
    AddMemReg(RegionSpec),
    RemMemReg(RegionSpec),
    SetStatus(u64),
    GetStatus,
    SetDeviceStateFd {
        direction: u32,
        phase: u32,
    },
    CheckDeviceState,
    /// A translation, or the end of some: `struct vhost_iotlb_msg`.
    Iotlb {
        iova: u64,
        size: u64,
        user_addr: u64,
        perm: u8,
        kind: u8,
    },
    /// One we do not know or did not offer.
    Other(u32),
}

fn u32_at(b: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(b.get(at..at + 4)?.try_into().ok()?))
}

fn u64_at(b: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_ne_bytes(b.get(at..at + 8)?.try_into().ok()?))
}

fn region_at(b: &[u8], at: usize) -> Option<RegionSpec> {
    Some(RegionSpec {
        guest_addr: u64_at(b, at)?,
        size: u64_at(b, at + 8)?,
        user_addr: u64_at(b, at + 16)?,
        mmap_offset: u64_at(b, at + 24)?,
    })
}

fn region(spec: &RegionSpec) -> Vec<u8> {
    [spec.guest_addr, spec.size, spec.user_addr, spec.mmap_offset].map(u64::to_ne_bytes).concat()
}

/// `VhostUserInflight`, with or without the padding that C puts behind it.
fn inflight(b: &[u8]) -> Option<InflightSpec> {
    let half = |at: usize| Some(u16::from_ne_bytes(b.get(at..at + 2)?.try_into().ok()?));
    Some(InflightSpec {
        mmap_size: u64_at(b, 0)?,
        mmap_offset: u64_at(b, 8)?,
        num_queues: half(16)?,
        queue_size: half(18)?,
    })
}

impl Request {
    /// Decodes the payload of request number `request`.
    pub fn decode(request: u32, b: &[u8]) -> Result<Request, WireError> {
        Self::parse(request, b).ok_or(WireError::Payload { request, len: b.len() })
    }

    fn parse(request: u32, b: &[u8]) -> Option<Request> {
        let number = || if b.len() == 8 { u64_at(b, 0) } else { None };
        let state = || if b.len() == 8 { Some((u32_at(b, 0)?, u32_at(b, 4)?)) } else { None };
        // "Bits (0-7) of the payload contain the vring index. Bit 8 is the invalid FD flag."
        let vring_fd = || number().map(|n| ((n & 0xff) as u32, n & 0x100 == 0));
        Some(match request {
            1 => Request::GetFeatures,
            2 => Request::SetFeatures(number()?),
            3 => Request::SetOwner,
            4 => Request::ResetOwner,
            5 => {
                let count = u32_at(b, 0)? as usize;
                if count > MAX_FDS || b.len() < 8 + 32 * count {
                    return None;
                }
                Request::SetMemTable((0..count).map(|i| region_at(b, 8 + 32 * i)).collect::<Option<_>>()?)
            }
            6 if b.len() == 16 => Request::SetLogBase { size: u64_at(b, 0)?, offset: u64_at(b, 8)? },
            7 => Request::SetLogFd,
            8 => state().map(|(index, num)| Request::SetVringNum { index, num })?,
            9 => {
                let addr = VringAddr {
                    flags: u32_at(b, 4)?,
                    desc: u64_at(b, 8)?,
                    used: u64_at(b, 16)?,
                    avail: u64_at(b, 24)?,
                    log: u64_at(b, 32)?,
                };
                Request::SetVringAddr { index: u32_at(b, 0)?, addr }
            }
            10 => state().map(|(index, base)| Request::SetVringBase { index, base })?,
            11 => state().map(|(index, _)| Request::GetVringBase { index })?,
            12 => vring_fd().map(|(index, has_fd)| Request::SetVringKick { index, has_fd })?,
            13 => vring_fd().map(|(index, has_fd)| Request::SetVringCall { index, has_fd })?,
            14 => vring_fd().map(|(index, has_fd)| Request::SetVringErr { index, has_fd })?,
            15 => Request::GetProtocolFeatures,
            16 => Request::SetProtocolFeatures(number()?),
            17 => Request::GetQueueNum,
            18 => match state()? {
                (index, enable @ 0..=1) => Request::SetVringEnable { index, enable: enable == 1 },
                _ => return None,
            },
            19 => number().and_then(|_| b.first_chunk().copied()).map(Request::SendRarp)?,
            20 => Request::SetMtu(number()?),
            21 => Request::SetBackendReqFd,
            22 => Request::Iotlb {
                iova: u64_at(b, 0)?,
                size: u64_at(b, 8)?,
                user_addr: u64_at(b, 16)?,
                perm: *b.get(24)?,
                kind: *b.get(25)?,
            },
            24 | 25 => {
                let (offset, size, flags) = (u32_at(b, 0)?, u32_at(b, 4)?, u32_at(b, 8)?);
                let bytes = b.get(12..12usize.checked_add(size as usize)?)?;
                if request == 24 {
                    Request::GetConfig { offset, size, flags }
                } else {
                    Request::SetConfig { offset, flags, bytes: bytes.to_vec() }
                }
            }
            28 => Request::PostcopyAdvise,
            29 => Request::PostcopyListen,
            30 => Request::PostcopyEnd,
            31 => Request::GetInflightFd(inflight(b)?),
            32 => Request::SetInflightFd(inflight(b)?),
            34 => Request::ResetDevice,
            36 => Request::GetMaxMemSlots,
            // That of SET_MEM_TABLE looks like a table without regions.
            0 | 37 | 38 if b.len() == 8 => Request::PostcopyAck(number()?),
            37 => Request::AddMemReg(region_at(b, 8)?),
            38 => Request::RemMemReg(region_at(b, 8)?),
            39 => Request::SetStatus(number()?),
            40 => Request::GetStatus,
            42 => state().map(|(direction, phase)| Request::SetDeviceStateFd { direction, phase })?,
            43 => Request::CheckDeviceState,
            other => Request::Other(other),
        })
    }
}

/// A reply's payload.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reply {
    /// A number: features, counts, acknowledgements (0 is success).
    Number(u64),
    /// Index and base of a ring.
    VringState(u32, u32),
    /// Nothing, but for a descriptor.
    Empty,
    /// A whole memory table with our own addresses in the place of the front end's.
    MemTable(Vec<RegionSpec>),
    /// The same for one region.
    MemReg(RegionSpec),
    /// An in-flight record, whose descriptor goes with it; without a size there is none.
    Inflight(InflightSpec),
    /// Size and offset of a log, as taken.
    Log(u64, u64),
    /// Configuration space.
    Config {
        /// As asked.
        offset: u32,
        /// As asked.
        flags: u32,
        /// As many as asked; none is an error.
        bytes: Vec<u8>,
    },
}

impl Reply {
    /// Encodes the reply to request number `request`.
    pub fn encode(&self, request: u32) -> Vec<u8> {
        let mut payload = Vec::with_capacity(16);
        match self {
            Reply::Number(n) => payload.extend(n.to_ne_bytes()),
            Reply::Empty => {}
            Reply::MemTable(regions) => {
                payload.extend([regions.len() as u32, 0].map(u32::to_ne_bytes).concat());
                payload.extend(regions.iter().flat_map(region));
            }
            Reply::MemReg(spec) => {
                payload.extend([0; 8]);
                payload.extend(region(spec));
            }
            Reply::VringState(index, num) => payload.extend([*index, *num].map(u32::to_ne_bytes).concat()),
            Reply::Inflight(spec) => {
                payload.extend([spec.mmap_size, spec.mmap_offset].map(u64::to_ne_bytes).concat());
                payload.extend([spec.num_queues, spec.queue_size].map(u16::to_ne_bytes).concat());
                // QEMU takes no other length than that of its structure, which C pads.
                payload.extend([0; 4]);
            }
            Reply::Log(size, offset) => payload.extend([*size, *offset].map(u64::to_ne_bytes).concat()),
            // "Zero length of payload to indicate an error."
            Reply::Config { bytes, .. } if bytes.is_empty() => {}
            Reply::Config { offset, flags, bytes } => {
                payload.extend([*offset, bytes.len() as u32, *flags].map(u32::to_ne_bytes).concat());
                payload.extend(bytes);
            }
        }
        message(request, VERSION | FLAG_REPLY, &payload)
    }
}

/// Kinds of IOTLB messages (`VHOST_IOTLB_*`).
pub mod iotlb {
    /// The back end misses a translation.
    pub const MISS: u8 = 1;
    /// The front end gives one.
    pub const UPDATE: u8 = 2;
    /// The front end takes some back.
    pub const INVALIDATE: u8 = 3;
    /// A translation does not permit what a driver has asked for.
    pub const ACCESS_FAIL: u8 = 4;
}

/// `VHOST_USER_BACKEND_IOTLB_MSG`, for a miss or a failed access.
pub fn iotlb_message(kind: u8, miss: Miss, need_reply: bool) -> Vec<u8> {
    let mut payload = [0; 32];
    payload[..8].copy_from_slice(&miss.iova.to_ne_bytes());
    payload[24..26].copy_from_slice(&[miss.access.bits(), kind]);
    message(BACKEND_IOTLB_MSG, VERSION | if need_reply { FLAG_NEED_REPLY } else { 0 }, &payload)
}

/// Bytes of a reply to [`iotlb_message`].
pub const IOTLB_REPLY_LEN: usize = HEADER_LEN + 8;

/// Whether the front end has done what such a message asked for; `None` when that is no reply to one.
pub fn iotlb_reply(bytes: &[u8; IOTLB_REPLY_LEN]) -> Option<bool> {
    let expected = [BACKEND_IOTLB_MSG, VERSION | FLAG_REPLY, 8].map(u32::to_ne_bytes).concat();
    (bytes[..HEADER_LEN] == expected).then(|| bytes[HEADER_LEN..].iter().all(|&b| b == 0))
}

/// `VHOST_USER_BACKEND_CONFIG_CHANGE_MSG`, which wants no reply.
pub fn config_change() -> Vec<u8> {
    message(2, VERSION, &[])
}

fn message(request: u32, flags: u32, payload: &[u8]) -> Vec<u8> {
    let mut m = [request, flags, payload.len() as u32].map(u32::to_ne_bytes).concat();
    m.extend(payload);
    m
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn header(words: [u32; 3]) -> [u8; HEADER_LEN] {
        words.map(u32::to_ne_bytes).concat().try_into().unwrap()
    }

    #[test]
    fn headers_are_checked() {
        assert_eq!(Header::decode(header([1, 9, 0])), Ok(Header { request: 1, need_reply: true, size: 0 }));
        assert_eq!(Header::decode(header([1, 0, 0])), Err(WireError::Flags(0)));
        assert_eq!(Header::decode(header([1, 5, 0])), Err(WireError::Flags(5)), "a reply is no request");
        assert_eq!(Header::decode(header([5, 1, 4097])), Err(WireError::TooLong(4097)));
    }

    #[test]
    fn payloads_are_those_of_the_protocol() {
        let pair = [3u32, 256].map(u32::to_ne_bytes).concat();
        assert_eq!(Request::decode(8, &pair), Ok(Request::SetVringNum { index: 3, num: 256 }));
        assert_eq!(
            Request::decode(12, &0x102u64.to_ne_bytes()),
            Ok(Request::SetVringKick { index: 2, has_fd: false })
        );
        assert_eq!(Request::decode(8, &pair[..4]), Err(WireError::Payload { request: 8, len: 4 }));
        assert_eq!(
            Request::decode(18, &pair),
            Err(WireError::Payload { request: 18, len: 8 }),
            "enable is 0 or 1"
        );
        let too_many = [33u32, 0].map(u32::to_ne_bytes).concat();
        assert!(Request::decode(5, &too_many).is_err());
        assert_eq!(Request::decode(19, &[1, 2, 3, 4, 5, 6, 0, 0]), Ok(Request::SendRarp([1, 2, 3, 4, 5, 6])));
        assert_eq!(Request::decode(19, &[1, 2, 3, 4, 5, 6]), Err(WireError::Payload { request: 19, len: 6 }));
        assert_eq!(Request::decode(99, &[]), Ok(Request::Other(99)));
    }

    #[test]
    fn an_error_reply_to_get_config_has_no_payload() {
        let reply = Reply::Config { offset: 0, flags: 0, bytes: vec![] }.encode(24);
        assert_eq!(reply, [24u32, 5, 0].map(u32::to_ne_bytes).concat());
        let reply = Reply::Config { offset: 4, flags: 1, bytes: vec![7, 8] }.encode(24);
        assert_eq!(reply[..24], [24u32, 5, 14, 4, 2, 1].map(u32::to_ne_bytes).concat());
    }

    proptest! {
        #[test]
        fn no_bytes_make_the_decoder_panic(request in 0u32..60, bytes in prop::collection::vec(any::<u8>(), 0..600)) {
            let _ = Request::decode(request, &bytes);
        }
    }
}
